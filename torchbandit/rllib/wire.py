"""What crosses a process or a checkpoint: flat dicts of tensors, and their bits as numpy arrays.

RLlib's own conversion goes through numpy values, where bfloat16 raises and a 0-dim tensor becomes a Python number.
Here every tensor travels as its bits beside its dtype. Ray's serialiser writes numpy arrays into shared memory in one
copy and reads them in none; a pickled torch tensor is copied several times.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

Rows = dict[str, Tensor]
"""A batch as RLlib carries it: "tokens/prompt", "next/reward", … -> tensor [B, …]."""


INNER = "\x1f"
"""Stands for a "/" inside a name, as a reward term may have it."""


class Bits(NamedTuple):
    """A tensor off its device: raw bytes [..., itemsize * last axis], dtype name, shape."""

    raw: np.ndarray[Any, np.dtype[np.uint8]]
    dtype: str
    shape: tuple[int, ...]


def flatten(td: TensorDictBase) -> Rows:
    """Nested keys joined by "/"; the tensors are the same ones. A "/" inside a name is told apart by `unflatten`."""
    return {
        "/".join(part.replace("/", INNER) for part in ((key,) if isinstance(key, str) else key)): value
        for key, value in td.items(True, True)
    }


def unflatten(rows: Rows) -> TensorDict:
    """The inverse of `flatten`, with batch_size [B]."""
    size = next(iter(rows.values())).shape[:1]
    td = TensorDict({}, batch_size=size)
    for key, value in rows.items():
        td.set(tuple(part.replace(INNER, "/") for part in key.split("/")), value)
    return td


def to_array(x: Tensor) -> Any:
    """A column for the object store: a numpy array where numpy has the dtype, else the tensor."""
    cpu = x.detach().cpu()
    return cpu if x.dtype.itemsize < 4 and x.is_floating_point() else cpu.numpy()


def to_tensor(x: Any, device: torch.device | str = "cpu") -> Tensor:
    """The inverse of `to_array`; shared memory is read-only, so an array is copied."""
    return x.to(device) if isinstance(x, Tensor) else torch.tensor(x, device=device)


def pack(tree: Any) -> Any:
    """Every tensor inside dicts, lists and tuples as `Bits`; everything else as it is."""
    if isinstance(tree, Tensor):
        cpu = tree.detach().cpu().contiguous()
        raw = cpu.reshape(-1).view(torch.uint8).numpy()
        return Bits(raw, str(tree.dtype).removeprefix("torch."), tuple(tree.shape))
    if isinstance(tree, dict):
        return {key: pack(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)) and not isinstance(tree, Bits):
        return type(tree)(pack(value) for value in tree)
    return tree


def unpack(tree: Any, device: torch.device | str = "cpu") -> Any:
    """The inverse of `pack`: bit for bit the same tensors, on `device`; memory of their own."""
    if isinstance(tree, Bits):
        flat = torch.empty(len(tree.raw), dtype=torch.uint8)
        flat.numpy()[:] = tree.raw
        return flat.view(getattr(torch, tree.dtype)).reshape(tree.shape).to(device)
    if isinstance(tree, dict):
        return {key: unpack(value, device) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(unpack(value, device) for value in tree)
    return tree
