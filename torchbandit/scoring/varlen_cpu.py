"""Variable-length attention on a CPU: segment by segment, neighbours of one length together, through torch's flash
attention, which makes no score of every query and key. Its time is that of the pairs that are seen, its memory grows
with tokens.

Axis letters as in varlen.py, beside L, the tokens of a segment.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

SPAN = 512
"""Behind a window so many queries go at a time, beside the keys that any of them sees."""


class _Part(NamedTuple):
    """Queries of n neighbours of one length, and the keys that any of them sees.

    Args:
        queries, keys: their span of the line, n segments long; of each segment they take the tokens `of_q`, `of_k`.
        mask: [queries, keys] of a segment, 0 where seen and else -inf; None where causality (or nothing) hides.
    """

    num: int
    queries: slice
    keys: slice
    of_q: slice
    of_k: slice
    causal: bool
    mask: Tensor | None

    def q(self, line: Tensor) -> Tensor:
        """[N, heads, D] -> [n, heads, L, D], a view."""
        return _cut(line[self.queries], self.num, self.of_q)

    def k(self, line: Tensor) -> Tensor:
        return _cut(line[self.keys], self.num, self.of_k)


def forward(
    query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts_k: Tensor,
    causal: bool, scale: float, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `varlen.varlen_forward`; computed in float32, in float64 where that came."""
    dtype, size = query.dtype, value.shape[-1]
    query, key, value = _alike_in_size(*(_exact(x) for x in (query, key, value)))
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    lse = query.new_full(query.shape[:2], -torch.inf)
    for part in _parts(query, starts_q, starts_k, causal, window):
        done, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            part.q(query), part.k(key), part.k(value), 0.0, part.causal, attn_mask=part.mask, scale=scale
        )
        part.q(out).copy_(done)
        part.q(lse[..., None]).copy_(log_sum[..., None])
    return out[..., :size].to(dtype).contiguous(), lse.t().contiguous()


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    starts_q: Tensor, starts_k: Tensor, causal: bool, scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `varlen.varlen_backward`."""
    dtypes, sizes = [x.dtype for x in (query, key, value)], [x.shape[-1] for x in (query, key, value)]
    grad, query, key, value, out = _alike_in_size(*(_exact(x) for x in (grad, query, key, value, out)))
    lse = lse.t()
    dq, dk, dv = found = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    for part in _parts(query, starts_q, starts_k, causal, window):
        of_q, of_k, of_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            part.q(grad), part.q(query), part.k(key), part.k(value), part.q(out), part.q(lse[..., None]).squeeze(-1),
            0.0, part.causal, attn_mask=part.mask, scale=scale,
        )  # fmt: skip
        part.q(dq).copy_(of_q)
        # Behind a window a key is seen from two spans.
        part.k(dk).add_(of_k)
        part.k(dv).add_(of_v)
    dq, dk, dv = (x[..., :size].to(dtype).contiguous() for x, size, dtype in zip(found, sizes, dtypes, strict=True))
    return dq, dk, dv


def _parts(query: Tensor, starts_q: Tensor, starts_k: Tensor, causal: bool, window: int) -> Iterator[_Part]:
    """What the line is computed in: segments without queries or without keys are left out."""
    first_q = first_k = 0
    lengths = zip(_lengths(starts_q), _lengths(starts_k), strict=True)
    for (Lq, Lk), alike in itertools.groupby(lengths):
        num = len(list(alike))
        queries, keys = (slice(first, first + num * L) for first, L in ((first_q, Lq), (first_k, Lk)))
        first_q, first_k = queries.stop, keys.stop
        if not (Lq and Lk):
            continue
        if not (causal and window and window < Lq):
            yield _Part(num, queries, keys, slice(0, Lq), slice(0, Lk), causal, None)
            continue
        for begin in range(0, Lq, SPAN):
            end, seen_from = min(begin + SPAN, Lq), max(begin - window + 1, 0)
            at_q, at_k = torch.arange(begin, end)[:, None], torch.arange(seen_from, end)
            hidden = (at_k > at_q) | (at_q - at_k >= window)
            mask = query.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
            yield _Part(num, queries, keys, slice(begin, end), slice(seen_from, end), False, mask)


def _cut(line: Tensor, num: int, tokens: slice) -> Tensor:
    segments: Tensor = line.unflatten(0, (num, -1))
    return segments[:, tokens].transpose(1, 2)


def _lengths(starts: Tensor) -> list[int]:
    """Of each segment. torch reads by itself where to split: nothing waits for a device here, and `tolist()` would say
    so to all that watch for it."""
    line = starts.new_empty(1).expand(torch.iinfo(torch.int32).max)
    return [segment.shape[0] for segment in line.tensor_split(starts.long())[1:-1]]


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _alike_in_size(*tensors: Tensor) -> list[Tensor]:
    """Heads filled up with 0 to the largest: keys and values may differ in head size, not so in torch's kernel."""
    D = max(x.shape[-1] for x in tensors)
    return [x if x.shape[-1] == D else pad(x, (0, D - x.shape[-1])) for x in tensors]
