"""What a model can be trusted with, found out once by trying it on a few tokens.

A model takes part in packing when, in a packed line of two sequences, each comes out as it does alone under the
model's own attention, and when every layer's attention went through ours. Whatever mixes tokens in another way (a
convolution, a recurrent state, a position bias) fails one of the two, and is scored padded, once said aloud.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from torchbandit.scoring import attention, last_layer, packs
from torchbandit.scoring.heads import Head


class Route(NamedTuple):
    """How a model is run.

    Args:
        ours: with our attention; else with its own and a padding mask.
        packs: rows may lie end to end.
        whole: its head does more than we know: its own logits are taken, all at once.
        window: the longest sequence for which a window hides nothing; None without a window.
        why_not: for the warning.
        trims: its last layer may run on the tokens that are read alone.
    """

    ours: bool
    packs: bool
    whole: bool
    window: int | None
    why_not: str = ""
    trims: bool = False


_routes: weakref.WeakKeyDictionary[nn.Module, Route] = weakref.WeakKeyDictionary()


def route_of(model: PreTrainedModel) -> Route:
    """The route of `model`; tried out at the first call, which therefore syncs once with the device."""
    route = _routes.get(model)
    if route is None:
        route = _routes[model] = _probe(model)
        if not route.packs:
            warnings.warn(f"{type(model).__name__} is scored padded, without packing: {route.why_not}", stacklevel=2)
    return route


def remember(model: PreTrainedModel, route: Route) -> None:
    """Set a route by hand."""
    _routes[model] = route


def _probe(model: PreTrainedModel) -> Route:
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if config.is_encoder_decoder or other:
        return Route(False, False, False, window, f"it has layers of kind {sorted(other) or 'encoder-decoder'}")
    device = next(model.parameters()).device
    lengths = (5, 9)
    ids = (torch.arange(2, 2 + sum(lengths), device=device) % min(config.vocab_size, 1000)).split(lengths)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = [model.base_model(input_ids=i[None], use_cache=False).last_hidden_state[0] for i in ids]
            whole = _head_does_more(model, ids[0], alone[0])
            with attention.installed(model, _COUNTING):
                before = _counted[0]
                packed = _packed(model, ids)
                calls = _counted[0] - before
            trims = _trims(model, ids, packed)
    except attention.UnsupportedAttention as error:
        return Route(False, False, whole, window, f"it asks for {error}")
    finally:
        model.train(training)
    layers = config.num_hidden_layers
    if calls != layers:
        return Route(False, False, whole, window, f"{calls} of its {layers} layers take a pluggable attention")
    moved = _distance(packed, torch.cat(alone))
    if not moved < _tolerance(packed):
        return Route(False, False, whole, window, f"a row's hidden states move by {moved:.2g} beside another row")
    return Route(True, True, whole, window, trims=trims)


def _trims(model: PreTrainedModel, ids: tuple[Tensor, ...], want: Tensor) -> bool:
    """Whether each sequence's last token comes out the same where the last layer runs on these tokens alone."""
    ends = torch.tensor([len(i) for i in ids], device=want.device).cumsum(0) - 1
    try:
        with attention.installed(model), last_layer.trimmed(model, ends, want.shape[0]) as done:
            got = _packed(model, ids) if done else None
    except (attention.UnsupportedAttention, TypeError):
        return False
    return got is not None and _distance(got[ends], want[ends]) < _tolerance(want) / 5


def _head_does_more(model: PreTrainedModel, ids: Tensor, hidden: Tensor) -> bool:
    """True where logits are not what the head and the config's scalings make of hidden states."""
    if model.get_output_embeddings() is None:
        return False
    return not _distance(Head(model).logits(hidden), model(ids[None]).logits[0]) < _tolerance(hidden)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).float().norm() / b.float().norm())


def _tolerance(x: Tensor) -> float:
    return 1e-3 if x.dtype == torch.float32 else 0.1


def _count(*args: Any, **kwargs: Any) -> Any:
    _counted[0] += 1
    return attention.attention(*args, **kwargs)


_COUNTING = "torchbandit_counting"
_counted = [0]
AttentionInterface.register(_COUNTING, _count)


def _packed(model: PreTrainedModel, ids: tuple[Tensor, ...]) -> Tensor:
    lengths = [len(i) for i in ids]
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    line = torch.cat(ids)[None]
    positions = torch.cat([torch.arange(len(i), device=line.device) for i in ids])[None]
    segments = packs.Segments(starts.to(line.device), packs.size_carrier(max(lengths)))
    out = model.base_model(input_ids=line, position_ids=positions, use_cache=False, segments=segments)
    hidden: Tensor = out.last_hidden_state[0]
    return hidden
