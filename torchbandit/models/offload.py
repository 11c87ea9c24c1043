"""Models put to sleep in pinned host memory and woken in place.

The bytes move, the tensors stay: a sleeping tensor keeps its identity, shape and dtype over an empty storage. So ties,
views, quantised weights with their scales, and graphs compiled over the tensors hold after waking.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Sleeper:
    """Where the bytes of sleeping modules lie."""

    def __init__(self) -> None:
        self._asleep: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def offload(self, modules: Iterable[nn.Module]) -> int:
        """Move the weights and buffers of modules to host memory; what is on the CPU, or asleep, is passed over.

        Returns:
            bytes freed on the devices; what several modules share counts once.
        """
        return self.park(t for module in modules for t in plain_tensors(module) if t.device.type != "cpu")

    def park(self, tensors: Iterable[Tensor]) -> int:
        """`offload` of plain tensors, on whatever device."""
        freed, devices = 0, set()
        for tensor in tensors:
            storage = tensor.untyped_storage()
            size, key = storage.nbytes(), storage._cdata
            if not size or key in self._asleep or not storage.resizable():
                continue
            pinned = storage.device.type == "cuda"
            host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned).untyped_storage()
            host.copy_(storage, non_blocking=True)
            self._asleep[key] = (storage, host)
            devices.add(storage.device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # before the source of a copy is given back
        for storage, host in self._asleep.values():
            if storage.nbytes():
                freed += host.nbytes()
                storage.resize_(0)
        if any(device.type == "cuda" for device in devices):
            torch.cuda.empty_cache()
        return freed

    def onload(self) -> int:
        """Bring everything back where it was.

        Returns:
            bytes taken on the devices.
        """
        taken = 0
        for storage, host in self._asleep.values():
            storage.resize_(host.nbytes())
            storage.copy_(host, non_blocking=True)
            taken += host.nbytes()
        for device in {storage.device for storage, _ in self._asleep.values()}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # before the host memory is given back
        self._asleep.clear()
        return taken


def plain_tensors(module: nn.Module) -> list[Tensor]:
    """Every tensor that a module's weights and buffers consist of, quantised ones taken apart; no two share memory."""
    found: dict[int, Tensor] = {}
    for holder in (*module.parameters(), *module.buffers()):
        for tensor in _parts(holder):
            found.setdefault(tensor.untyped_storage()._cdata, tensor)
    return list(found.values())


def _parts(tensor: Any) -> Iterator[Tensor]:
    if is_traceable_wrapper_subclass(tensor):  # torchao
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
        return
    yield tensor
    state = getattr(tensor, "quant_state", None)  # bitsandbytes hangs its scales on the weight
    while state is not None:
        yield from (t for t in (state.absmax, state.code, getattr(state, "offset", None)) if isinstance(t, Tensor))
        state = state.state2
