"""Layers of two residual sums, each made by the product that ends its branch, for the decode step alone.

hidden + o_proj(attended) is a product and a sum, which reads and writes the batch once more; and where several layers
are compiled as one, the sums are put off and done again by each kernel that needs them. Within the product the sum is
next to free, and rounded once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchbandit.generation.fuse import plain, swapped

ENDS = (("self_attn", "o_proj"), ("mlp", "down_proj"))


@torch.library.custom_op("torchbandit::add_product", mutates_args=("total",))
def add_product(total: Tensor, x: Tensor, weight: Tensor) -> None:
    """total [..., E] += x [..., I] weight', weight [E, I]; contiguous."""
    total.view(-1, total.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())


class End(nn.Module):
    """Stands in the place of a branch's last product, which is left to `add_product`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight  # the parameter itself

    def forward(self, x: Tensor) -> Tensor:
        return x


def two_sums(layer: Any, call: tuple[Any, ...]) -> bool:
    """Whether a layer is input + attention of its norm, and that + the mlp of its norm, as a call of it shows.

    Args:
        call: (args, kwargs, output); may be made again.
    """
    args, kwargs, out = call
    if len(args) != 1 or not all(_ends_in_product(layer, *names) for names in ENDS):
        return False
    if {args[0].dtype, layer.self_attn.o_proj.weight.dtype, layer.mlp.down_proj.weight.dtype} != {out.dtype}:
        return False  # a sum of another precision than its products
    try:
        hidden = args[0] + layer.self_attn(hidden_states=layer.input_layernorm(args[0]), **kwargs)[0]
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return torch.equal(hidden, out)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # another class's own idea of these names, whatever it makes of such a call
        return False


def _ends_in_product(layer: nn.Module, branch: str, name: str) -> bool:
    end = getattr(getattr(layer, branch, None), name, None)
    # A quantised weight may be a tensor of another class in an ordinary layer.
    return type(end) is nn.Linear and end._parameters["bias"] is None and type(end.weight.data) is Tensor and plain(end)


def forwards(layers: Sequence[nn.Module]) -> tuple[Callable[..., Tensor], ...]:
    """The forwards of successive layers inside `summed`; the first leaves alone what it is given."""
    return (_first, *(_next for _ in layers[1:]))


def _first(layer: nn.Module, hidden: Tensor, **kwargs: Any) -> Tensor:
    return _next(layer, hidden.clone(), **kwargs)


def _next(layer: Any, hidden: Tensor, **kwargs: Any) -> Tensor:
    attended = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs)[0]
    torch.ops.torchbandit.add_product(hidden, attended, layer.self_attn.o_proj.weight)
    made = layer.mlp(layer.post_attention_layernorm(hidden))
    torch.ops.torchbandit.add_product(hidden, made, layer.mlp.down_proj.weight)
    return hidden


@contextlib.contextmanager
def summed(layers: Iterable[nn.Module], found: Container[nn.Module]) -> Iterator[bool]:
    """Inside the block, the layers are for `forwards` to run; False, and nothing is, where one is not among those found
    (see `two_sums`), or has changed."""
    layers = list(layers)
    ready = all(layer in found and all(_ends_in_product(layer, *names) for names in ENDS) for layer in layers)
    branches = [(getattr(layer, branch), name) for layer in layers for branch, name in ENDS] if ready else []
    with swapped([(branch, name, End(getattr(branch, name).weight)) for branch, name in branches]):
        yield ready
