"""`no_host_copy`: what would make the host wait for the device fails, on a CPU too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that hand a value, or a shape that depends on values, to the host: on a GPU each waits for the device.
_READS = {
    "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::allclose",
    "aten::nonzero", "aten::nonzero_numpy", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::bincount",
}  # fmt: skip


class _Watch(TorchDispatchMode):
    def __init__(self, seen: Callable[[str], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in _READS or _reads(name, args, kwargs):
            self.seen(str(func))
        return func(*args, **kwargs)


def _reads(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Operators that read only with some arguments."""
    if name in ("aten::index", "aten::index_put", "aten::index_put_"):  # a bool index becomes nonzero()
        indices = [i for i in args[1] if isinstance(i, Tensor)]
        # index_put_ of one element is masked_fill_: torch never looks at the mask then
        fills = name != "aten::index" and isinstance(args[2], Tensor) and args[2].numel() == 1
        return not fills and any(i.dtype in (torch.bool, torch.uint8) for i in indices)
    if name == "aten::repeat_interleave":  # the counts must be summed on the host unless the sum is given
        counts = next((a for a in reversed(args) if isinstance(a, Tensor)), None)
        return kwargs.get("output_size") is None and counts is not None and not isinstance(args[-1], int)
    if name == "aten::_to_copy":
        return args[0].is_cuda and str(kwargs.get("device")) == "cpu"
    if name == "aten::copy_":
        return isinstance(args[1], Tensor) and args[1].is_cuda and not args[0].is_cuda
    return False


@contextmanager
def no_host_copy(allow: int = 0) -> Iterator[None]:
    """Fail where a value is copied from the device to the host: `.item()`, `bool(x)`, `.tolist()`, `.numpy()`,
    boolean indexing, `nonzero`, …

    On a CPU it stands in for the GPU: what would wait for the device raises. Where CUDA is, torch's own sync debug
    mode watches as well.

    Args:
        allow: copies that are allowed; packed scoring needs one a step, for the lengths. (torch's own mode knows no
            count, so it is used with 0 alone.)
    Raises:
        AssertionError: a copy too many; the traceback shows which line made it.
    """
    made = 0

    def seen(what: str) -> None:
        nonlocal made
        made += 1
        if made > allow:
            raise AssertionError(f"no_host_copy: {what} brings a value of the device to the host (copy {made})")

    with ExitStack() as stack:
        stack.enter_context(_watched(seen))
        if torch.cuda.is_available() and torch.cuda.is_initialized() and allow == 0:
            stack.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
            torch.cuda.set_sync_debug_mode("error")
        yield


@contextmanager
def count_host_copies() -> Iterator[list[str]]:
    """Record what `no_host_copy` refuses: a name for each copy, in the list that it yields."""
    made: list[str] = []
    with _watched(made.append):
        yield made


@contextmanager
def _watched(seen: Callable[[str], None]) -> Iterator[None]:
    def told(name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)

        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen(f"Tensor.{name}()")
            return original(self, *args, **kwargs)

        return method

    with ExitStack() as stack:
        for name in ("tolist", "numpy", "__array__"):  # these read memory, past the dispatcher
            stack.enter_context(mock.patch.object(torch.Tensor, name, told(name)))
        stack.enter_context(_Watch(seen))
        yield
