"""Compilation by decoder layer, with dynamic shapes, for scoring alone.

One graph serves all like layers of a model and all packs. A layer stays as it was for everyone else (generation runs
the same modules on other shapes): its compiled call is put in place for the length of a forward pass.
"""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx.experimental._config as _shape_config
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from torchbandit.models import wants_compile
from torchbandit.scoring.attention import checkpointed

backend = "inductor"
"""Of torch.compile; tests count graphs with a cheaper one."""

_calls: weakref.WeakKeyDictionary[nn.Module, Callable[..., Any]] = weakref.WeakKeyDictionary()
_reductions: weakref.WeakKeyDictionary[nn.Module, dict[Any, Callable[..., Any]]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def layers(model: PreTrainedModel) -> Iterator[None]:
    """Run `model`'s decoder layers compiled inside the block, if it wants that."""
    # With gradient checkpointing a layer runs a second time outside this block: as it runs the first time, eager.
    if not wants_compile(model) or checkpointed(model):
        yield
        return
    call = _calls.get(model)
    if call is None:
        call = _calls[model] = own(_call_layer)
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for block in blocks:
        block._compiled_call_impl = functools.partial(call, block)
    try:
        with no_duck_shapes():
            yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def own(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled, with a code object of its own.

    The compiler counts graphs by code object and gives up past a handful; models, which differ in shapes, must not
    share that count.
    """
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return torch.compile(copy, dynamic=True, backend=backend)


def reduction(model: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of a chunk of logits (its first argument, [M, V]), compiled if `model` wants that."""
    if not wants_compile(model):
        return function
    mine = _reductions.setdefault(model, {})
    if function not in mine:
        call = own(function)

        def reduce(logits: Tensor, *args: Any) -> Any:
            torch._dynamo.mark_static(logits, 1)
            with no_duck_shapes():
                return call(logits, *args)

        mine[function] = reduce
    return mine[function]


@contextlib.contextmanager
def no_duck_shapes() -> Iterator[None]:
    """Two sizes that happen to be equal in the first pack stay two sizes; else the next pack would compile anew."""
    with _shape_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
        yield


def _call_layer(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return layer._call_impl(*args, **kwargs)
