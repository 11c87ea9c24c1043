"""A batched decode loop over any transformers causal LM: its own forward, its own growing cache.

What a model takes rightly is tried on a few tokens, once. Where padding beside a prompt would change it (a recurrent
state or a convolution reads whatever stands before the prompt), prompts of one length run together, unpadded. A model
that does not go on rightly from the cache it is handed reads its whole row again for each token: slow, and right.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from torchbandit.generation.sampling import Generated, Sampling, draw, uniforms
from torchbandit.responses import is_stop

LOOK_EVERY = 8
"""Tokens between two looks at whether all rows have stopped; on a CPU a look is free."""


class Manner(NamedTuple):
    """How a model runs.

    Args:
        caches: it goes on from a cache that it was handed; else it reads the whole row for each token.
        pads: prompts of several lengths may run together, padded on the left.
    """

    caches: bool
    pads: bool


_manners: WeakKeyDictionary[PreTrainedModel, Manner] = WeakKeyDictionary()


def generate_plain(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    pad_id: int,
    generator: torch.Generator | None,
    group_size: int,
) -> Generated:
    """Sample a response a row; arguments and result as `generate`, checked by it."""
    if model not in _manners:
        _manners[model] = _try_out(model)
    manner = _manners[model]
    B = prompt_ids.shape[0]
    ids, mask = left_padded(prompt_ids[::group_size], prompt_mask[::group_size])
    uniform = uniforms(B, sampling, prompt_ids.device, generator)
    if manner.pads:
        return _rows(model, manner, ids, mask, sampling, stop_ids, pad_id, uniform, group_size)
    parts, order = [], []
    for groups, width in _by_length(mask):
        rows = (groups[:, None] * group_size + torch.arange(group_size, device=ids.device)).flatten()
        theirs = None if uniform is None else uniform[rows]
        some = (ids[groups, -width:], mask[groups, -width:])
        parts.append(_rows(model, manner, *some, sampling, stop_ids, pad_id, theirs, group_size))
        order.append(rows)
    back = torch.cat(order).argsort()
    return Generated(*(torch.cat(column)[back] for column in zip(*parts, strict=True)))


def _by_length(mask: Tensor) -> Iterator[tuple[Tensor, int]]:
    """(indices of the prompts of one length, that length), shortest first; copies the lengths to the host."""
    lengths = mask.sum(-1)
    for width in sorted(set(lengths.tolist())):
        yield (lengths == width).nonzero()[:, 0], int(width)


def _rows(
    model: PreTrainedModel,
    manner: Manner,
    ids: Tensor,
    mask: Tensor,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    pad_id: int,
    uniform: Tensor | None,
    group_size: int,
) -> Generated:
    """Responses to prompts that may run together: ids and mask [prompts, P], left-padded; uniform [rows, T]."""
    forward = _Forward(model, manner)
    logits = forward(ids, mask)
    if group_size > 1:
        forward.repeat(group_size)  # the state, not the work
        logits, mask = (x.repeat_interleave(group_size, 0) for x in (logits, mask))
    device, B, P, T = ids.device, mask.shape[0], mask.shape[1], sampling.max_new_tokens
    seen = torch.cat((mask, mask.new_ones(B, T)), 1)  # what a token may attend to, sliced as the row grows

    tokens = torch.full((B, T), pad_id, dtype=torch.int64, device=device)
    alive = torch.zeros(B, T, dtype=torch.bool, device=device)
    log_probs = torch.zeros(B, T, dtype=torch.float32, device=device)
    running = torch.ones(B, dtype=torch.bool, device=device)
    look_every = LOOK_EVERY if device.type == "cuda" else 1
    for t in range(T):
        token, log_prob = draw(logits, sampling, None if uniform is None else uniform[:, t])
        tokens[:, t] = torch.where(running, token, pad_id)
        log_probs[:, t] = torch.where(running, log_prob, 0.0)
        alive[:, t] = running
        running = running & ~is_stop(token, stop_ids)
        if t == T - 1 or ((t + 1) % look_every == 0 and stop_ids and not running.any()):
            break
        logits = forward(token.unsqueeze(1), seen[:, : P + t + 1])
    return Generated(tokens, alive, log_probs, ~running)


class _Forward:
    """Logits of the next token, call by call, as rows grow. Positions are given with padding alone: without it a model
    knows its own, which need not begin at 0 (RoBERTa's kind)."""

    def __init__(self, model: PreTrainedModel, manner: Manner) -> None:
        self.model, self.pads, caches = model, manner.pads, manner.caches
        self.cache = DynamicCache(config=model.config) if caches else None
        self.ids: Tensor | None = None
        parameters = inspect.signature(model.forward).parameters
        self.takes = set(parameters)
        self.takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())

    def __call__(self, ids: Tensor, seen: Tensor) -> Tensor:
        """[n, V], behind the tokens `ids` [n, k] that follow those of the calls before; `seen` [n, all] bool."""
        if self.cache is None:
            self.ids = ids = ids if self.ids is None else torch.cat((self.ids, ids), 1)
        given: dict[str, Any] = {
            "input_ids": ids, "attention_mask": seen.long(), "logits_to_keep": 1, "use_cache": self.cache is not None
        }  # fmt: skip
        if self.pads:
            given["position_ids"] = (seen.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        if self.cache is not None:
            given["cache_params" if "cache_params" in self.takes else "past_key_values"] = self.cache
        if not self.takes_any:
            given = {name: value for name, value in given.items() if name in self.takes}
        logits: Tensor = self.model(**given).logits[:, -1]
        return logits

    def repeat(self, times: int) -> None:
        """Each row `times` times."""
        if self.cache is not None:
            n = next(n for n in map(_rows_of, self.cache.layers) if n)
            rows = torch.arange(n, device=self.model.device).repeat_interleave(times)
            self.cache.reorder_cache(cast(torch.LongTensor, rows))
        if self.ids is not None:
            self.ids = self.ids.repeat_interleave(times, 0)


def _rows_of(layer: Any) -> int:
    """Rows that a layer's cache holds; 0 where it holds nothing."""
    for kept in vars(layer).values():
        for x in kept.values() if isinstance(kept, dict) else (kept,):
            if isinstance(x, Tensor) and x.dim() > 2:
                return x.shape[0]
    return 0


def _try_out(model: PreTrainedModel) -> Manner:
    """Compare the logits behind six tokens, read at once, with those from a cache, of repeated rows, and with padding.

    Raises:
        ValueError: the model does not run on tokens alone.
    """
    _require_causal(model)
    config = model.config.get_text_config()
    known = [i for i in range(2, 17) if i != config.pad_token_id][:12]
    ids = torch.tensor(known, device=model.device).view(2, 6) % int(config.vocab_size)
    real = torch.ones_like(ids, dtype=torch.bool)
    try:
        want = model(input_ids=ids, use_cache=False).logits[:, -1]
    except Exception as error:
        why = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"model: {type(model).__name__} cannot generate from tokens alone ({type(error).__name__}: "
                         f"{why}); use a decoder-only language model") from error  # fmt: skip
    # Five tokens and one more; and one and five more: less than a convolution's width.
    twice = want.repeat_interleave(2, 0)
    caches = all(_same(lambda first=first: _goes_on(model, ids, real, first), twice) for first in (5, 1))
    if not caches:
        name = type(model).__name__
        warnings.warn(f"{name} does not go on from a cache that it is given: each token reads its whole row",
                      stacklevel=3)  # fmt: skip
    kinds = set(getattr(config, "layer_types", None) or ())
    pads = kinds <= {"full_attention", "sliding_attention"} and _same(lambda: _padded(model, caches, ids, real), want)
    return Manner(caches, pads)


def _require_causal(model: PreTrainedModel) -> None:
    """Refuse a model whose logits of a token depend on later ones: what it generates would be changed by what follows.

    Raises:
        ValueError: it does.
    """
    size = int(model.config.get_text_config().vocab_size)
    one = torch.arange(3, 9, device=model.device)[None] % size
    other = torch.cat((one[:, :-1], (one[:, -1:] + 7) % size), 1)
    try:
        a, b = (model(input_ids=ids, use_cache=False).logits[:, :-1].float() for ids in (one, other))
    except Exception:  # it does not run so; `_try_out` or the engine says what is amiss
        return
    if a.shape == b.shape and float((a - b).norm() / b.norm()) > (1e-4 if a.device.type == "cpu" else 0.1):
        raise ValueError(f"model: must be causal to generate, got {type(model).__name__}, whose predictions see later "
                         "tokens; load a causal LM (of BERT's kind: is_decoder=True in its config)")  # fmt: skip


def _goes_on(model: PreTrainedModel, ids: Tensor, real: Tensor, first: int) -> Tensor:
    forward = _Forward(model, Manner(caches=True, pads=False))
    logits = forward(ids[:, :first], real[:, :first])
    if not any(map(_rows_of, forward.cache.layers if forward.cache is not None else [])):
        raise ValueError("nothing was kept")
    forward.repeat(2)
    ids, real = ids.repeat_interleave(2, 0), real.repeat_interleave(2, 0)
    for t in range(first, ids.shape[1]):
        logits = forward(ids[:, t : t + 1], real[:, : t + 1])
    return logits


def _padded(model: PreTrainedModel, caches: bool, ids: Tensor, real: Tensor) -> Tensor:
    forward = _Forward(model, Manner(caches, pads=True))
    ids, real = torch.cat((ids[:, :3], ids), 1), torch.cat((~real[:, :3], real), 1)
    forward(ids[:, :-1], real[:, :-1])
    return forward(ids[:, -1:], real)


def _same(run: Any, want: Tensor) -> bool:
    try:
        got = run()
    except Exception:  # whatever a model makes of arguments that it does not know
        return False
    bound = 1e-3 if want.dtype == torch.float32 and not want.is_cuda else 0.1
    return got.shape == want.shape and float((got - want).float().norm() / want.float().norm()) < bound


def left_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Real tokens moved to the right end, in order, wherever the padding stood: [B, P] -> [B, P], no sync."""
    order = mask.byte().argsort(dim=-1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)
