# mypy: disable-error-code="import-not-found,no-untyped-def,untyped-decorator,no-untyped-call,unused-ignore"
"""Triton kernel of attention over a packed line, whose responses may share prompts: one pass, one softmax.

Axis letters: see varlen.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, prompts: int, responses: int,
    starts_q: Tensor, starts_k: Tensor, scale: float,
    *, block_q: int = 64, block_k: int = 64, warps: int = 4, stages: int = 2,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Each token sees its own segment up to itself, and a response's token its group's whole prompt before that.

    Args:
        query: [N, H, D]; key, value: [N, K, D]; starts: [n + 1] int32, over the whole line.
        longest: at least the longest segment; prompts, responses: tokens of all prompts and of all responses that share
            them. 0 and 0: nothing is shared, and starts_q and starts_k are not read.
        starts_q: [groups + 1] int32, over response tokens; starts_k: [groups + 1] int32, over prompt tokens.
        block_q, block_k: queries of a program, and keys of a turn; warps, stages: of its launch.
    Returns:
        ([N, H, D], log-sum-exp [H, N] float32).
    Source: Dao et al. 2022 (FlashAttention), algorithm 1; Juravsky et al. 2024 (Hydragen) for the shared prefix.
    """
    N, H, D = query.shape
    query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
    out = torch.empty(N, H, D, dtype=query.dtype, device=query.device)
    lse = torch.empty(H, N, dtype=torch.float32, device=query.device)
    groups, blocks = len(starts_q) - 1, triton.cdiv(longest, block_q)
    size = max(16, triton.next_power_of_2(D))
    _packed_kernel[((len(starts) - 1) * blocks, H)](
        query, key, value, starts, starts_q, starts_k, out, lse, scale * LOG2_E, prompts, responses, groups, blocks, N,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        H=H, GROUPED=H // key.shape[1], D=D, SIZE=size, GROUPS=max(64, triton.next_power_of_2(groups)),
        BLOCK_Q=block_q, BLOCK_K=block_k, EXACT=query.dtype == torch.float32, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse


@triton.jit
def _add_keys(
    q, keys, values, key_row, value_row, begin, end, at_q, peak, total, mean, scale,
    D: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr, CAUSAL: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Add the keys `begin` to `end` to the sums of a block of queries. EDGE: the last turn may be a part of one."""
    d = tl.arange(0, SIZE)
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    for at in range(begin, end, BLOCK):
        row = at + tl.arange(0, BLOCK)
        real = (row[:, None] < end) & (d[None, :] < D) if EDGE else (row[:, None] >= 0) & (d[None, :] < D)
        key = tl.load(keys + row[:, None] * key_row + d[None, :], mask=real, other=0.0)
        score = tl.dot(q, tl.trans(key), input_precision=precision) * scale
        if CAUSAL:
            score = tl.where((row[None, :] <= at_q[:, None]) & (row[None, :] < end), score, float("-inf"))
        elif EDGE:
            score = tl.where(row[None, :] < end, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        fade = tl.exp2(peak - higher)
        total = total * fade + tl.sum(weight, 1)
        value = tl.load(values + row[:, None] * value_row + d[None, :], mask=real, other=0.0)
        mean = mean * fade[:, None] + tl.dot(weight.to(value.dtype), value, input_precision=precision)
        peak = higher
    return peak, total, mean


# What differs from pack to pack is no reason to compile anew, whatever it can be divided by.
@triton.jit(do_not_specialize=["prompts", "responses", "groups", "blocks", "N"])
def _packed_kernel(
    query, key, value, starts, starts_q, starts_k, out, lse, scale, prompts, responses, groups, blocks, N,
    query_row, query_head, key_row, key_head, value_row, value_head,
    H: tl.constexpr, GROUPED: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    segment, head = tl.program_id(0) // blocks, tl.program_id(1)
    start, end = tl.load(starts + segment), tl.load(starts + segment + 1)
    first = tl.program_id(0) % blocks * BLOCK_Q  # of this program's queries, within the segment
    length = end - start
    if first >= length:
        return
    at_q = first + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, SIZE)
    inside = (at_q[:, None] < length) & (d[None, :] < D)
    base = start.to(tl.int64)
    query += base * query_row + head * query_head
    key += (head // GROUPED) * key_head
    value += (head // GROUPED) * value_head
    q = tl.load(query + at_q[:, None] * query_row + d[None, :], mask=inside, other=0.0)
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    mean = tl.zeros([BLOCK_Q, SIZE], tl.float32)

    own = base * key_row
    own_value = base * value_row
    whole = first // BLOCK_K * BLOCK_K  # keys that every query of this program sees
    peak, total, mean = _add_keys(
        q, key + own, value + own_value, key_row, value_row, whole, tl.minimum(first + BLOCK_Q, length), at_q,
        peak, total, mean, scale, D, SIZE, BLOCK_K, True, True, EXACT,
    )  # fmt: skip
    peak, total, mean = _add_keys(
        q, key + own, value + own_value, key_row, value_row, 0, whole, at_q,
        peak, total, mean, scale, D, SIZE, BLOCK_K, False, False, EXACT,
    )  # fmt: skip
    offset = start - prompts
    if (offset >= 0) & (offset < responses):
        g = tl.arange(0, GROUPS)
        ends = tl.load(starts_q + 1 + g, mask=g < groups, other=2147483647)
        group = tl.sum((ends <= offset).to(tl.int32), 0)
        begin = tl.load(starts_k + group)
        size = tl.load(starts_k + group + 1) - begin
        shared = begin.to(tl.int64) * key_row
        shared_value = begin.to(tl.int64) * value_row
        full = size // BLOCK_K * BLOCK_K
        peak, total, mean = _add_keys(
            q, key + shared, value + shared_value, key_row, value_row, 0, full, at_q,
            peak, total, mean, scale, D, SIZE, BLOCK_K, False, False, EXACT,
        )  # fmt: skip
        peak, total, mean = _add_keys(
            q, key + shared, value + shared_value, key_row, value_row, full, size, at_q,
            peak, total, mean, scale, D, SIZE, BLOCK_K, True, False, EXACT,
        )  # fmt: skip

    spot = (base + at_q[:, None]) * (H * D) + head * D + d[None, :]
    tl.store(out + spot, (mean / total[:, None]).to(out.dtype.element_ty), mask=inside)
    log_sum = (peak + tl.log2(total)) * 0.6931471805599453  # of base e
    tl.store(lse + head.to(tl.int64) * N + base + at_q, log_sum, mask=at_q < length)
