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
import torch._functorch.config as _autograd_config
import torch.fx.experimental._config as _shape_config
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchbandit.models import wants_compile
from torchbandit.models.quantize import compiler_options
from torchbandit.scoring.attention import blocks, checkpointed

backend = "inductor"
"""Of torch.compile; tests count graphs with a cheaper one."""

_calls: weakref.WeakKeyDictionary[nn.Module, dict[str, Callable[..., Any]]] = weakref.WeakKeyDictionary()
_reductions: weakref.WeakKeyDictionary[nn.Module, dict[Any, Callable[..., Any]]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def layers(model: PreTrainedModel, *, trimmed: bool = False) -> Iterator[None]:
    """Run `model`'s decoder layers and its final norm compiled inside the block, if it wants that.

    Args:
        trimmed: the last layer is another one than the rest (`last_layer.trimmed`).
    """
    # With gradient checkpointing a layer runs a second time outside this block: as it runs the first time, eager.
    if not wants_compile(model) or checkpointed(model):
        yield
        return
    calls = _calls.get(model)
    if calls is None:
        how: dict[str, Any] = {}
        if backend == "inductor" and (options := compiler_options(model)):
            how["options"] = options
        calls = _calls[model] = {kind: own(_call_layer, **how) for kind in ("layer", "last", "norm")}
    modules = [(block, "layer") for block in blocks(model)]
    if trimmed:
        modules[-1] = (modules[-1][0], "last")
    if (norm := _final_norm(model)) is not None:
        modules.append((norm, "norm"))
    for module, kind in modules:
        module._compiled_call_impl = functools.partial(calls[kind], module)
    try:
        # What is pointwise in a layer (norms, rotary embedding, silu * mul) is computed again in backward even where
        # that means one more write there: 14 instead of 20 activations a token and layer are kept.
        with no_duck_shapes(), _autograd_config.patch(ban_recompute_materialized_backward=False):
            yield
    finally:
        for module, _ in modules:
            module._compiled_call_impl = None


def _final_norm(model: PreTrainedModel) -> nn.Module | None:
    """The norm after the last layer, by the names that decoders give it."""
    body = model.base_model
    return next((m for name in ("norm", "ln_f", "final_layer_norm") if (m := body._modules.get(name))), None)


def own(function: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    """`function` compiled, with a code object of its own; `how` goes to the compiler.

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
    return torch.compile(copy, dynamic=True, backend=backend, **how)


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
