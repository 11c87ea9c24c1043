"""Variable-length attention where no fast kernel is (float32 on CUDA, heads beyond its sizes): padded blocks.

The host knows the longest segment alone, and asking for the others would wait for the device. So segments are padded
to it, as many at a time, and as many of their queries, as keep the scores within `CELLS`.

Axis letters as in varlen.py, beside m segments of a block; g query heads of a key head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CELLS = 1 << 26
"""Scores of one block, at most (but for one query of one segment)."""


class _Block(NamedTuple):
    """Some queries of some segments.

    Args:
        of_q: [m, queries] and of_k: [m, keys]: their places in the line; the line's length for padding.
        hidden: [m, 1, 1, queries, keys] bool.
    """

    of_q: Tensor
    of_k: Tensor
    hidden: Tensor


def forward(
    query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int,
    causal: bool, scale: float, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `varlen.varlen_forward`; computed in float32, in float64 where that came."""
    H, K, dtype = query.shape[1], key.shape[1], query.dtype
    query, key, value = (_with_padding(x) for x in (query, key, value))
    out = value.new_zeros((query.shape[0], K, H // K, value.shape[-1]))
    lse = query.new_full((query.shape[0], K, H // K), -torch.inf)
    for block in _blocks(starts_q, starts_k, longest_q, longest_k, query.shape[0] - 1, key.shape[0] - 1, H, causal,
                         window):  # fmt: skip
        scores = _scores(query, key, block, scale)
        log_sum = scores.logsumexp(-1)
        probs = (scores - _finite(log_sum)[..., None]).exp()
        out[block.of_q] = torch.einsum("mkgqs,mskd->mqkgd", probs, value[block.of_k])
        lse[block.of_q] = log_sum.permute(0, 3, 1, 2)
    return out[:-1].flatten(1, 2).to(dtype), lse[:-1].flatten(1, 2).t().contiguous()


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int, causal: bool, scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `varlen.varlen_backward`."""
    H, K, dtypes = query.shape[1], key.shape[1], [x.dtype for x in (query, key, value)]
    grad, query, key, value, out, log_sums = (_with_padding(x) for x in (grad, query, key, value, out, lse.t()))
    dquery, dkey, dvalue = (torch.zeros_like(x) for x in (query, key, value))
    delta, groups = (grad * out).sum(-1), (K, H // K)
    for block in _blocks(starts_q, starts_k, longest_q, longest_k, query.shape[0] - 1, key.shape[0] - 1, H, causal,
                         window):  # fmt: skip
        log_sum, towards = (x[block.of_q].unflatten(2, groups).permute(0, 2, 3, 1) for x in (log_sums, delta))
        probs = (_scores(query, key, block, scale) - _finite(log_sum)[..., None]).exp()
        dout = grad[block.of_q].unflatten(2, groups)
        dvalue[block.of_k] += torch.einsum("mkgqs,mqkgd->mskd", probs, dout)
        dprobs = torch.einsum("mqkgd,mskd->mkgqs", dout, value[block.of_k])
        dscores = probs.mul_(dprobs.sub_(towards[..., None])).mul_(scale)
        dquery[block.of_q] = torch.einsum("mkgqs,mskd->mqkgd", dscores, key[block.of_k]).flatten(2, 3)
        dkey[block.of_k] += torch.einsum("mkgqs,mqkgd->mskd", dscores, query[block.of_q].unflatten(2, groups))
    dq, dk, dv = (x[:-1].to(dtype) for x, dtype in zip((dquery, dkey, dvalue), dtypes, strict=True))
    return dq, dk, dv


def _blocks(
    starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int, Nq: int, Nk: int, H: int, causal: bool,
    window: int,
) -> Iterator[_Block]:  # fmt: skip
    num = starts_q.shape[0] - 1
    m = max(CELLS // max(H * longest_q * longest_k, 1), 1)
    span = max(min(CELLS // max(min(m, num) * H * longest_k, 1), longest_q), 1)
    for first in range(0, num, m):
        of_q, of_k = starts_q[first : first + m + 1], starts_k[first : first + m + 1]
        for begin in range(0, longest_q, span):
            end = min(begin + span, longest_q)
            seen_from, seen_to = (
                max(begin - window + 1, 0) if window else 0,
                min(end, longest_k) if causal else longest_k,
            )
            at_q = torch.arange(begin, end, device=starts_q.device)
            at_k = torch.arange(seen_from, seen_to, device=starts_q.device)
            hidden = (at_k >= of_k.diff()[:, None])[:, None, None, None]
            if causal:
                hidden = hidden | (at_k > at_q[:, None])
                if window:
                    hidden = hidden | (at_q[:, None] - at_k >= window)
            yield _Block(_places(of_q, at_q, Nq), _places(of_k, at_k, Nk), hidden)


def _scores(query: Tensor, key: Tensor, block: _Block, scale: float) -> Tensor:
    """[m, K, g, queries, keys] scaled, -inf where a key is not seen."""
    queries = query[block.of_q].unflatten(2, (key.shape[1], -1))
    scores = torch.einsum("mqkgd,mskd->mkgqs", queries, key[block.of_k])
    return scores.mul_(scale).masked_fill_(block.hidden, -torch.inf)


def _finite(lse: Tensor) -> Tensor:
    """A query that sees no key has weight 0 everywhere, not NaN."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _places(starts: Tensor, at: Tensor, N: int) -> Tensor:
    return torch.where(at < starts.diff()[:, None], starts[:-1, None] + at, N).long()


def _with_padding(line: Tensor) -> Tensor:
    """[N, ...] -> [N + 1, ...], the last of 0, in float32 or float64."""
    exact = line if line.dtype == torch.float64 else line.float()
    return torch.cat((exact, exact.new_zeros((1, *exact.shape[1:]))))
