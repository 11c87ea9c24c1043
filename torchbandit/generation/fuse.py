"""Projections of one input as one product, for the decode step alone: q, k and v; gate and up, for large batches with
what follows them up to the last product of their layer.

A step's products are small, and small ones leave most of a card idle. The weights of such siblings are moved once into
one buffer, end to end, and each parameter becomes a view of its part: same object, shape and values, no second copy.
So optimizers, checkpoints and the model's own forward go on as before, and an update in place reaches the buffer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""What modules of transformers call linear layers that read the same input."""


class Family(NamedTuple):
    """Linear layers of one parent that fit together."""

    parent: nn.Module
    names: tuple[str, ...]
    linears: list[nn.Linear]


def families(layers: Iterable[nn.Module]) -> Iterator[Family]:
    """Those of `layers` that are plain: adapters, quantised ones and ones with hooks are left as they are."""
    for layer in layers:
        for parent in layer.modules():
            for names in SIBLINGS:
                linears = [child for name in names if (child := parent._modules.get(name)) is not None]
                if len(linears) == len(names) and _fit(linears):
                    yield Family(parent, names, linears)  # type: ignore[arg-type]


def _fit(linears: list[nn.Module]) -> bool:
    def kind(linear: nn.Linear) -> object:
        weight = linear.weight
        return linear.in_features, weight.dtype, weight.device, linear.bias is None

    if not all(type(x) is nn.Linear and plain(x) for x in linears) or len({kind(x) for x in linears}) > 1:  # type: ignore[arg-type]
        return False
    tensors = [tensor for x in linears for tensor in x.parameters(recurse=False)]
    simple = all(type(tensor.data) is Tensor and tensor.is_contiguous() and tensor.numel() for tensor in tensors)
    return simple and len({id(tensor) for tensor in tensors}) == len(tensors)


def plain(module: nn.Module) -> bool:
    """Whether nothing has been hung on it that replacing it would lose."""
    return "forward" not in module.__dict__ and not module._forward_hooks and not module._forward_pre_hooks


def rehome(layers: Iterable[nn.Module]) -> bool:
    """Lay the weights of every family end to end in memory, where they are not yet; returns whether any moved.

    A weight that shares its memory with anything else (tied, or a view of some flat buffer) stays, and so its family.
    """
    layers = list(layers)
    owners: dict[int, int] = {}
    for tensor in {id(tensor): tensor for layer in layers for tensor in layer.parameters()}.values():
        storage = tensor.untyped_storage()._cdata
        owners[storage] = owners.get(storage, 0) + 1
    moved = False
    for layer in layers:
        moved_here = False
        for family in families([layer]):
            for tensors in ([x.weight for x in family.linears], [x.bias for x in family.linears]):
                if tensors[0] is None or joined(tensors) is not None:
                    continue
                alone = all(
                    owners[x.untyped_storage()._cdata] == 1 and x.untyped_storage().nbytes() == x.nbytes
                    for x in tensors
                )  # fmt: skip
                # Vector loads of 16 bytes must stay possible.
                if alone and all(x.nbytes % 16 == 0 for x in tensors):
                    home = torch.cat([x.detach() for x in tensors])
                    for weight, part in zip(tensors, home.split([len(x) for x in tensors]), strict=True):
                        weight.data = part
                    moved_here = True
        if moved_here and next(layer.parameters()).is_cuda:
            torch.cuda.empty_cache()  # what was left is of sizes that nothing else asks for
        moved |= moved_here
    return moved


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """The tensors as one, without a copy, or None where they do not lie end to end in one storage."""
    first = tensors[0]
    at = first.data_ptr()
    for tensor in tensors:
        if tensor.untyped_storage()._cdata != first.untyped_storage()._cdata or tensor.data_ptr() != at:
            return None
        at += tensor.nbytes
    return first.detach().as_strided((sum(len(x) for x in tensors), *first.shape[1:]), first.stride())


class Product(nn.Module):
    """What the members of a family compute together, once for each input."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)  # a view
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.read: Tensor | None = None
        self.made: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.made is None or self.read is not x:
            self.read, self.made = x, F.linear(x, self.weight, self.bias)
        return self.made


class Part(nn.Module):
    """Stands in a member's place: its columns of the product."""

    def __init__(self, product: Product, start: int, stop: int, last: bool) -> None:
        super().__init__()
        self.product, self.start, self.stop, self.last = product, start, stop, last

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.product(x)[..., self.start : self.stop]
        if self.last:
            self.product.read = self.product.made = None
        return out


@torch.library.custom_op("torchbandit::gated_product", mutates_args=())
def gated_product(x: Tensor, weight: Tensor) -> Tensor:
    """silu(x G') * (x U') for x [..., E] and the rows of G and U, weight [2I, E] -> [..., I].

    This is the reference, and what runs off CUDA. Source: Shazeer 2020 (SwiGLU).
    """
    gate, up = F.linear(x, weight).chunk(2, -1)
    return F.silu(gate) * up


@gated_product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)


@gated_product.register_kernel("cuda")
def _(x: Tensor, weight: Tensor) -> Tensor:
    from torchbandit.generation import gated_kernel  # Triton exists with CUDA alone

    return gated_kernel.gated_product(x, weight)


class Gated(nn.Module):
    """Stands in the place of a gated layer; its activations are not rounded before they are multiplied."""

    def __init__(self, weight: Tensor, down_proj: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)  # a view
        self.down_proj = down_proj

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(torch.ops.torchbandit.gated_product(x, self.weight))
        return out


def gates(layers: Iterable[nn.Module]) -> set[nn.Module]:
    """Modules of `layers` that compute down_proj(silu(gate_proj(x)) * up_proj(x)), as a try with numbers of all sizes
    shows: what a class does with an activation, or a bound on it, its attributes do not tell."""
    found: set[nn.Module] = set()
    for family in families(layers):
        mlp, down, weight = family.parent, family.parent._modules.get("down_proj"), family.linears[0].weight
        biased = family.linears[0].bias is not None
        if family.names != SIBLINGS[1] or down is None or biased or len(weight) % 8 or weight.shape[1] % 8:
            continue  # the kernel reads and writes pieces of 16 bytes
        generator = torch.Generator(weight.device).manual_seed(0)
        x = torch.randn(5, weight.shape[1], device=weight.device, generator=generator)
        x = (x * 10.0 ** torch.arange(-2, 3, device=weight.device)[:, None]).to(weight.dtype)
        gate, up = (linear(x) for linear in family.linears)
        try:
            same = torch.equal(mlp(x), down(F.silu(gate) * up))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # another class's own idea of these names, whatever it makes of such a call
            continue
        if same:
            found.add(mlp)
    return found


@contextlib.contextmanager
def fused(layers: Iterable[nn.Module], gated: Container[nn.Module] = ()) -> Iterator[None]:
    """Inside the block the families that `rehome` has laid end to end run as one product each.

    Args:
        gated: parents of gate and up (see `gates`) that do so together with their activation.
    """
    layers = list(layers)
    homes = {
        child: (owner, name)
        for layer in layers for owner in layer.modules() for name, child in owner._modules.items() if child is not None
    }  # fmt: skip
    parts: list[tuple[nn.Module, str, nn.Module]] = []
    for family in families(layers):
        parent, weight = family.parent, joined([x.weight for x in family.linears])
        biased = family.linears[0].bias is not None
        bias = joined([x.bias for x in family.linears]) if biased else None
        if weight is None or (biased and bias is None):
            continue
        if family.names == SIBLINGS[1] and parent in gated and parent in homes and plain(parent):
            parts.append((*homes[parent], Gated(weight, parent._modules["down_proj"])))  # type: ignore[arg-type]
            continue
        product, start = Product(weight, bias), 0
        for name, linear in zip(family.names, family.linears, strict=True):
            stop = start + linear.out_features
            parts.append((parent, name, Part(product, start, stop, name == family.names[-1])))
            start = stop
    with swapped(parts):
        yield


@contextlib.contextmanager
def swapped(parts: Sequence[tuple[nn.Module, str, nn.Module]]) -> Iterator[None]:
    """Inside the block each module stands in its owner's place of that name, and as before after it."""
    before = [owner._modules[name] for owner, name, _ in parts]
    try:
        for owner, name, module in parts:
            owner._modules[name] = module
        yield
    finally:
        for (owner, name, _), was in zip(parts, before, strict=True):
            owner._modules[name] = was
