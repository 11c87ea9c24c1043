"""The model's layers compiled for the decode step: once for all of them and for any batch size.

Each layer is handed its own part of the cache, and nothing that is traced tells one layer from another, so compiling
lasts seconds for any depth. Several layers may be compiled as one, so that one's last sum and the next one's norm are a
kernel.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.fx.experimental._config as shape_config
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchbandit.generation.cache import Cache, LayerCache
from torchbandit.models.quantize import compiler_options


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's list of decoder layers."""
    return next(
        child for child in model.modules()
        if isinstance(child, nn.ModuleList) and len(child) == model.config.num_hidden_layers
    )  # fmt: skip


@contextlib.contextmanager
def watched(layers: nn.ModuleList) -> Iterator[list[tuple[Any, ...]]]:
    """What each layer is called with inside the block, and what it returns: (args, kwargs, output)."""
    calls: list[tuple[Any, ...]] = []
    hooks = [layer.register_forward_hook(lambda _, *call: calls.append(call), with_kwargs=True) for layer in layers]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def is_chain(calls: list[tuple[Any, ...]]) -> bool:
    """Whether each layer reads first what the one before it returned, and else what all of them read."""
    for (args, kwargs, out), (next_args, next_kwargs, _) in itertools.pairwise(calls):
        same = len(args) == len(next_args) > 0 and kwargs.keys() == next_kwargs.keys()
        if not (same and isinstance(out, Tensor) and next_args[0] is out):
            return False
        others = (*zip(args[1:], next_args[1:], strict=True), *((kwargs[k], next_kwargs[k]) for k in kwargs))
        if any(one is not other for one, other in others):
            return False
    return len(calls) > 0 and isinstance(calls[-1][2], Tensor)


def own_forwards(layers: Sequence[nn.Module]) -> tuple[Callable[..., Any], ...]:
    """The forwards of the layers' classes."""
    return tuple(type(layer).forward for layer in layers)


@contextlib.contextmanager
def compiled_body(
    model: PreTrainedModel, cache: Cache, at_once: int = 1, forwards: Any = own_forwards, **how: Any
) -> Iterator[None]:
    """Inside the block the decoder layers of `model`, and what stands around them, run compiled.

    Args:
        at_once: layers compiled as one, which a model must allow (`is_chain`); it divides their number.
        forwards: of successive layers what each runs, a function of the layer and of what its forward takes.
        how: see `compiled`.
    """
    # Elementwise kernels as Inductor lays them out for large tensors. Timed against a layout for small ones in the
    # first step, which may be one of few lanes, they come out either way, and a full batch's take half as long again.
    options = compiler_options(model) | {"triton.autotune_pointwise": False}
    how |= {"options": tuple(options.items())} if "backend" not in how else {}
    layers = decoder_layers(model)
    body = next(parent for parent in model.modules() if any(child is layers for child in parent.children()))
    around = [
        child for child in body.children() if child is not layers and not isinstance(child, nn.Embedding | nn.Dropout)
    ]
    patched: list[nn.Module] = []
    try:
        for first in range(0, len(layers), at_once):
            some = tuple(layers[first : first + at_once])
            parts = cache.layers[first : first + at_once]
            run = compiled(_chain_of(forwards(some)), **how)
            some[0].forward = functools.partial(_run_layers, run, some, cache, parts)
            patched.append(some[0])
            for layer in some[1:]:
                layer.forward = _pass_on
                patched.append(layer)
        for module in around:
            module.forward = functools.partial(_run, module, how)
            patched.append(module)
        yield
    finally:
        for module in patched:
            del module.forward  # the class's own again


def _run_layers(
    run: Callable[..., Any],
    layers: tuple[nn.Module, ...],
    whole: Cache,
    parts: list[LayerCache],
    *args: Any,
    **kwargs: Any,
) -> Any:
    each = [
        (tuple(part if x is whole else x for x in args), {k: part if x is whole else x for k, x in kwargs.items()})
        for part in parts
    ]
    return run(layers, each)


def _pass_on(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """In place of a layer that the one at the head of its chain has run."""
    return hidden


def _run(module: nn.Module, how: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    kind: Any = type(module)
    return compiled(_forward_of(kind), **how)(module, *args, **kwargs)


@functools.cache
def _forward_of(kind: Any) -> Callable[..., Any]:
    """The forward of a class."""
    forward = kind.forward

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(module, *args, **kwargs)

    return _with_own_code(call, f"decode_{kind.__name__}")


@functools.cache
def _chain_of(forwards: tuple[Callable[..., Any], ...]) -> Callable[..., Any]:
    """These forwards, one layer's after the other's."""

    def call(layers: tuple[nn.Module, ...], each: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> Any:
        made: tuple[Any, ...] = ()
        for forward, layer, (args, kwargs) in zip(forwards, layers, each, strict=True):
            made = (forward(layer, *made, *args[len(made) :], **kwargs),)
        return made[0]

    return _with_own_code(call, f"decode_{len(forwards)}_{forwards[-1].__qualname__.partition('.')[0]}")


def _with_own_code(function: Any, name: str) -> Callable[..., Any]:
    """With a code object of its own: that is what the compiler keeps its versions on, a few for each, and training or
    scoring may have filled those of the original."""
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, None, function.__closure__)


@functools.cache
def compiled(
    function: Callable[..., Any], combos: bool = False, options: tuple[tuple[str, Any], ...] = (), **how: Any
) -> Callable[..., Any]:
    told = dict(options)
    if combos and "combo_kernels" in torch._inductor.list_options():  # young in Inductor: another torch may lack it
        told["combo_kernels"] = True
    if told:
        how["options"] = told
    made = torch.compile(function, dynamic=True, fullgraph=True, **how)

    def call(*args: Any, **kwargs: Any) -> Any:
        # A batch of 64 is no head size of 64, though the numbers are equal.
        with shape_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            return made(*args, **kwargs)

    return call
