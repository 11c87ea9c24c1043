"""What a model can be trusted with, found out once by trying it on a few tokens.

A model takes part in packing when, in a packed line of two sequences, each comes out as it does alone, under ours and
under the model's own attention, and when every layer's attention went through ours. Whatever mixes tokens in another
way (a convolution, a recurrent state, a position bias) fails one of these, and is scored padded, once said aloud.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from torchbandit.models import dropout_in
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
        causal: what it makes of a token does not depend on later ones.
    """

    ours: bool
    packs: bool
    whole: bool
    window: int | None
    why_not: str = ""
    trims: bool = False
    causal: bool = True


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


def check_usable(model: PreTrainedModel, longest: int) -> None:
    """Refuse what would come out wrong without a word: dropout, and rows beyond which positions mean something else.

    Args:
        longest: tokens of the longest row, as far as the host knows (the padded width without packing).
    Raises:
        ValueError: dropout is on; a table of positions ends before `longest`, or the rotary embedding of every row
            would follow the longest.
    """
    if model.training and (found := dropout_in(model)):
        raise ValueError(f"model: must be without dropout, got {found} in {type(model).__name__} in train mode; call "
                         "model.eval(), or torchbandit.models.disable_dropout(model) to train it")  # fmt: skip
    if model not in _reaches:
        _reaches[model] = _reach(model)
    limit, why = _reaches[model]
    if limit is not None and longest > limit:
        raise ValueError(f"model: {type(model).__name__} takes rows of at most {limit} tokens here ({why}), got one of "
                         f"{longest}; shorten prompts or responses (without packing their width counts)")  # fmt: skip


_reaches: weakref.WeakKeyDictionary[nn.Module, tuple[int | None, str]] = weakref.WeakKeyDictionary()


def _reach(model: PreTrainedModel) -> tuple[int | None, str]:
    """(tokens of the longest row that means what it says, why)."""
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        # A rotary embedding goes on past the context, if badly; a table of positions ends.
        table = any(isinstance(m, nn.Embedding) and _of_positions(name) for name, m in model.named_modules())
        return (context, "it has learned no more positions") if context and table else (None, "")
    for each in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind = str(each.get("rope_type"))
        if "dynamic" in kind or kind == "longrope":
            start = each.get("original_max_position_embeddings") or context
            return start, f"beyond, the longest row of a batch changes the {kind} rotary embedding of all"
    return None, ""


def _of_positions(name: str) -> bool:
    return "position" in name or name.endswith("wpe")


def _probe(model: PreTrainedModel) -> Route:
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    ids = _few_tokens(model)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = [_own(model, i, False) for i in ids]
            whole = alone[0] is None or _head_does_more(model, ids[0], alone[0])
            # Another end of the same length, so that the same kernels run: what still moves has seen it.
            one = _own(model, ids[1], True) if whole else alone[1]
            other_end = _own(model, torch.cat((ids[1][:5], ids[1][:1].expand(len(ids[1]) - 5))), whole)
            causal = (  # NaN is no sign of the contrary
                one is not None and other_end is not None
                and not _distance(other_end[:5], one[:5]) > _tolerance(one) / 10
            )  # fmt: skip
            if config.is_encoder_decoder or other:
                why_not = f"it has layers of kind {sorted(other) or 'encoder-decoder'}"
            elif any(hidden is None for hidden in alone):
                why_not = "it shows no hidden states"
            else:
                why_not, trims = _try_packing(model, ids, [hidden for hidden in alone if hidden is not None])
                if not why_not:
                    return Route(True, True, whole, window, trims=trims, causal=causal)
    finally:
        model.train(training)
    return Route(False, False, whole, window, why_not, causal=causal)


def _few_tokens(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Two sequences, of 5 and 9 tokens, without the pad token."""
    config = model.config.get_text_config()
    known = [i for i in range(2, 17) if i != config.pad_token_id][:14]
    ids = torch.tensor(known, device=next(model.parameters()).device) % getattr(config, "vocab_size", 1000)
    short, long = ids.split((5, 9))
    return short, long


def scores_by_head(model: PreTrainedModel) -> bool:
    """Whether a classifier's scores are what its `score` head makes of each last token; found out once.

    Raises:
        ValueError: they are not, and by its own pooling it cannot be scored in batches, or not every row honestly.
    """
    if model not in _by_head:
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                _by_head[model] = _probe_scores(model)
        finally:
            model.train(training)
    return _by_head[model]


_by_head: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def _probe_scores(model: PreTrainedModel) -> bool:
    short, long = _few_tokens(model)
    name, head = type(model).__name__, getattr(model, "score", None)
    if model.get_output_embeddings() is not None:
        raise ValueError(f"reward model: must be a sequence classifier, got {name}, a language model")
    try:
        alone = model(input_ids=short[None]).logits
        if alone.shape != (1, 1):
            raise ValueError(f"it gives {list(alone.shape[1:])} numbers a row, and a reward model gives one")
        hidden = _own(model, short, False) if isinstance(head, nn.Module) else None
        if hidden is not None and head is not None:
            ours = head(hidden[-1:].to(next(head.parameters(), hidden).dtype))
            if ours.shape == alone.shape and (ours - alone).abs() <= _tolerance(alone) / 5 * (1 + alone.abs()):
                return True
        mask = (torch.arange(9, device=long.device) < torch.tensor([[5], [9]], device=long.device)).long()
        lines = torch.stack((torch.nn.functional.pad(short, (0, 4)), long))
        padded = model(input_ids=lines, attention_mask=mask).logits[:1]
        if not (padded - alone).abs() <= _tolerance(alone) * (1 + alone.abs()):
            raise ValueError("padding beside a row changes its score")
        pad = model.config.get_text_config().pad_token_id
        if pad is not None:
            ended = torch.cat((short, short.new_tensor([pad])))
            if (model(input_ids=ended[None]).logits == alone).all():
                raise ValueError("it looks for the end by its pad token's id, which a response may hold")
    except Exception as error:
        raise ValueError(f"reward model: {name} cannot be scored: {error}; use a sequence classifier of a decoder "
                         "architecture with one label, whose `score` head reads the last token") from error  # fmt: skip
    return False


def _own(model: PreTrainedModel, ids: Tensor, whole: bool) -> Tensor | None:
    """[W, D]: hidden states by the model's own attention, or [W, V]: its logits; None where it shows no such thing."""
    if whole:
        found = getattr(model(input_ids=ids[None], use_cache=False), "logits", None)
    else:
        found = getattr(model.base_model(input_ids=ids[None], use_cache=False), "last_hidden_state", None)
    return None if found is None else found[0]


def _try_packing(model: PreTrainedModel, ids: tuple[Tensor, ...], alone: list[Tensor]) -> tuple[str, bool]:
    """(why rows cannot lie end to end, or nothing; whether the last layer may be trimmed)."""
    try:
        with attention.installed(model, _COUNTING):
            before = _counted[0]
            packed = _packed(model, ids)
            calls = _counted[0] - before
            own_lines = torch.cat([_packed(model, (i,)) for i in ids])
    except attention.UnsupportedAttention as error:
        return f"it asks for {error}", False
    except Exception as error:  # its code needs what our attention does not bring, such as a mask
        return f"it does not run without its own attention ({type(error).__name__}: {error})", False
    layers = model.config.get_text_config().num_hidden_layers
    if calls != layers:
        return f"{calls} of its {layers} layers take a pluggable attention", False
    # By the same kernels a row beside another differs by noise alone; from the model's own attention, by rounding.
    beside, kernels = _distance(packed, own_lines), _distance(own_lines, torch.cat(alone))
    if not (beside < _tolerance(packed) / 2 and kernels < _tolerance(packed)):
        return f"a row's hidden states move by {max(beside, kernels):.2g} beside another row", False
    return "", _trims(model, ids, packed)


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
    logits = _own(model, ids, True)
    try:
        ours = Head(model).logits(hidden)
    except RuntimeError:  # a projection stands between
        return True
    return logits is None or ours.shape != logits.shape or not _distance(ours, logits) < _tolerance(hidden) / 5


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).float().norm() / b.float().norm())


def _tolerance(x: Tensor) -> float:
    """Of a relative distance, for what may be rounded otherwise and is the same."""
    if x.dtype != torch.float32:
        return 0.1
    asked = torch.backends.cuda.matmul.fp32_precision, getattr(torch.backends, "fp32_precision", None)
    return 1e-2 if x.is_cuda and "tf32" in asked else 1e-3


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
