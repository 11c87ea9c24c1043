# mypy: disable-error-code="import-not-found,no-untyped-def,untyped-decorator,no-untyped-call,unused-ignore"
"""Triton kernels of the gradients of `packed_attention`: a pass for queries, and a pass for keys and values.

Neither adds to what another program writes, so the same line always gets the same gradients.

Axis letters: see varlen.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchbandit.scoring.kernels import LOG2_E


class Launch(NamedTuple):
    """Queries and keys that a turn multiplies, warps of a program, and turns whose loads are under way at once."""

    block_q: int
    block_k: int
    warps: int
    stages: int


def packed_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, starts: Tensor, longest: int,
    prompts: int, responses: int, starts_q: Tensor, starts_k: Tensor, scale: float,
    *, of_queries: Launch | None = None, of_keys: Launch | None = None, splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `packed_attention`; with prompts = responses = 0 those of causal attention within each segment.

    Args:
        grad, out: [N, H, D]; lse: [H, N] float32: of the forward; query: [N, H, D]; key, value: [N, K, D].
        starts, longest, prompts, responses, starts_q, starts_k, scale: as there. The first segments are the prompts,
            one for each group, and group g's responses follow one another.
        of_queries, of_keys: how each pass is launched; None: what fits the shared memory of any card that has bfloat16.
        splits: programs that share the work of a block of prompt keys; None: as many as a group has responses of the
            longest segment's length, so that no program works much longer than the others.
    Returns:
        gradients of query [N, H, D], key and value [N, K, D], contiguous; 0 where no segment is.
    Source: Dao 2023 (FlashAttention-2), algorithm 2, as two passes that each write every sum once.
    """
    N, H, D = query.shape
    K, dtype = key.shape[1], query.dtype
    grad, query, key, value, out = (x if x.stride(2) == 1 else x.contiguous() for x in (grad, query, key, value, out))
    size, exact = max(16, triton.next_power_of_2(D)), dtype == torch.float32
    of_queries = of_queries or (Launch(64, 64, 4, 3) if size <= 64 else Launch(64, 32, 4, 3))
    of_keys = of_keys or (Launch(64, 64, 4, 3) if size <= 64 else Launch(32, 64, 4, 3))
    groups, segments = (len(starts_k) - 1 if prompts and responses else 0), len(starts) - 1
    if splits is None:
        turns = responses * (H // K) // max(groups * of_keys.block_q, 1)
        splits = min(responses // max(groups * longest, 1), turns // 16, 16)
    splits = max(splits, 1) if groups else 1
    sums = torch.empty(H, N, 2, dtype=torch.float32, device=query.device)
    dquery, dkey, dvalue = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (query, key, value))
    part = torch.empty(2, splits, prompts, K, D, dtype=torch.float32, device=key.device) if splits > 1 else sums
    strides = [s for x in (grad, query, key, value) for s in x.stride()[:2]]
    sizes = {"H": H, "GROUPED": H // K, "D": D, "SIZE": size, "EXACT": exact}

    block_q, block_k, warps, stages = of_queries
    blocks = max(triton.cdiv(longest, block_q), 1)
    _query_kernel[((segments + 1) * blocks * H,)](
        grad, query, key, value, out, lse.contiguous(), sums, dquery, starts, starts_q, starts_k, scale * LOG2_E,
        prompts, responses, groups, segments, blocks, N, *strides, *out.stride()[:2],
        **sizes, GROUPS=max(64, triton.next_power_of_2(groups)), BLOCK_Q=block_q, BLOCK_K=block_k,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    block_q, block_k, warps, stages = of_keys
    blocks = max(triton.cdiv(longest, block_k), 1)
    _key_kernel[((segments + 1 + groups * (splits - 1)) * blocks * K,)](
        grad, query, key, value, sums, dkey, dvalue, part, starts, starts_q, scale * LOG2_E,
        prompts, groups, segments, splits, blocks, N, *strides,
        **sizes, BLOCK_Q=block_q, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        dkey[:prompts], dvalue[:prompts] = part.sum(1)
    return dquery, dkey, dvalue


@triton.jit
def _rows(tensor, first, row_stride, end, D: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """Rows of one head from `first` on: [BLOCK, SIZE]. EDGE: those from `end` on are 0."""
    at, d = tl.arange(0, BLOCK), tl.arange(0, SIZE)
    spot = tensor + tl.cast(first, tl.int64) * row_stride + (at[:, None] * row_stride + d[None, :])
    if EDGE:
        loaded = tl.load(spot, mask=(at[:, None] < end - first) & (d[None, :] < D), other=0.0)
    elif D < SIZE:
        loaded = tl.load(spot, mask=d[None, :] < D, other=0.0)
    else:
        loaded = tl.load(spot)
    return loaded


@triton.jit
def _store(tensor, x, first, end, ROW: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Write x [BLOCK, SIZE] to one head's rows from `first` to `end` of a contiguous tensor."""
    at, d = tl.arange(0, BLOCK), tl.arange(0, SIZE)
    spot = tensor + tl.cast(first, tl.int64) * ROW + (at[:, None] * ROW + d[None, :])
    tl.store(spot, x.to(tensor.dtype.element_ty), mask=(at[:, None] < end - first) & (d[None, :] < D))


@triton.jit
def _add_keys(
    q, do, log_sum, rowsum, key, value, key_row, value_row, near, near_end, far, far_end, at_q, dq, scale,
    D: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Add what keys give a block of queries: rows `near` to `near_end`, and `far` to `far_end`, of the line.

    Not MASKED: whole blocks, which every query sees. Both stretches are one loop: where segments are short, a loop
    each would mostly wait for its first loads.
    """
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    near_turns = tl.cdiv(near_end - near, BLOCK)
    for turn in range(near_turns + tl.cdiv(far_end - far, BLOCK)):
        beyond = turn - near_turns
        first = tl.where(beyond < 0, near + turn * BLOCK, far + beyond * BLOCK)
        end = tl.where(beyond < 0, near_end, far_end)
        k = _rows(key, first, key_row, end, D, SIZE, BLOCK, MASKED)
        v = _rows(value, first, value_row, end, D, SIZE, BLOCK, MASKED)
        score = tl.dot(q, tl.trans(k), input_precision=precision)
        prob = tl.exp2(score * scale - log_sum[:, None])
        if MASKED:
            last = tl.minimum(at_q, end - 1) - first
            prob = tl.where(tl.arange(0, BLOCK)[None, :] <= last[:, None], prob, 0.0)
        dprob = tl.dot(do, tl.trans(v), input_precision=precision)
        dscore = prob * (dprob - rowsum[:, None])
        dq = tl.dot(dscore.to(k.dtype), k, dq, input_precision=precision)
    return dq


# What differs from pack to pack is no reason to compile anew, whatever it can be divided by.
@triton.jit(do_not_specialize=["prompts", "responses", "groups", "segments", "blocks", "N"])
def _query_kernel(
    grad, query, key, value, out, lse, sums, dquery, starts, starts_q, starts_k, scale,
    prompts, responses, groups, segments, blocks, N,
    grad_row, grad_head, query_row, query_head, key_row, key_head, value_row, value_head, out_row, out_head,
    H: tl.constexpr, GROUPED: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, EXACT: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dquery [N, H, D] of a block of queries of one segment and head; and, for the other kernel, sums [H, N, 2]: the
    log-sum-exp, of base 2, and rowsum(out * grad)."""
    # Heads next to one another: those that share keys find them in the cache.
    head = (tl.program_id(0) % H).to(tl.int64)
    block = tl.program_id(0) // H % blocks
    segment = tl.program_id(0) // H // blocks
    start = tl.load(starts + segment)
    dquery += head * D
    if segment == segments:  # what is left of the line
        for at in range(start + block * BLOCK_Q, N, blocks * BLOCK_Q):
            _store(dquery, tl.zeros([BLOCK_Q, SIZE], tl.float32), at, N, H * D, D, SIZE, BLOCK_Q)
        return
    end = tl.load(starts + segment + 1)
    first = start + (blocks - 1 - block) * BLOCK_Q  # of this program's queries; the most work begins first
    if first >= end:
        return
    q = _rows(query + head * query_head, first, query_row, end, D, SIZE, BLOCK_Q, True)
    do = _rows(grad + head * grad_head, first, grad_row, end, D, SIZE, BLOCK_Q, True)
    mean = _rows(out + head * out_head, first, out_row, end, D, SIZE, BLOCK_Q, True)
    at_q = first + tl.arange(0, BLOCK_Q)
    rowsum = tl.sum(mean.to(tl.float32) * do.to(tl.float32), 1)
    log_sum = tl.load(lse + head * N + at_q, mask=at_q < end, other=0.0) * 1.4426950408889634  # of base 2
    tl.store(sums + (head * N + at_q) * 2, log_sum, mask=at_q < end)
    tl.store(sums + (head * N + at_q) * 2 + 1, rowsum, mask=at_q < end)
    key += head // GROUPED * key_head
    value += head // GROUPED * value_head

    near = start + (first - start) // BLOCK_K * BLOCK_K  # every query of this program sees the keys before it
    far, far_end = 0, 0
    if (groups > 0) & (start >= prompts) & (start < prompts + responses):
        g = tl.arange(0, GROUPS)
        ends = tl.load(starts_q + 1 + g, mask=g < groups, other=2147483647)
        group = tl.sum((ends <= start - prompts).to(tl.int32), 0)
        far = tl.load(starts_k + group)
        far_end = tl.load(starts_k + group + 1)
    edge = far + (far_end - far) // BLOCK_K * BLOCK_K
    dq = tl.zeros([BLOCK_Q, SIZE], tl.float32)
    dq = _add_keys(
        q, do, log_sum, rowsum, key, value, key_row, value_row, near, tl.minimum(first + BLOCK_Q, end), edge, far_end,
        at_q, dq, scale, D, SIZE, BLOCK_K, True, EXACT,
    )  # fmt: skip
    dq = _add_keys(
        q, do, log_sum, rowsum, key, value, key_row, value_row, start, near, far, edge,
        at_q, dq, scale, D, SIZE, BLOCK_K, False, EXACT,
    )  # fmt: skip
    _store(dquery, dq * (scale * 0.6931471805599453), first, end, H * D, D, SIZE, BLOCK_Q)  # of base e


@triton.jit
def _add_queries(
    k, v, grad, query, sums, grad_row, grad_head, query_row, query_head, N, near, near_end, far, far_end,
    split, splits, at_k, dk, dv, scale, GROUPED: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Add what queries of all heads give a block of keys: the `split`-th of `splits` parts of all turns.

    As in `_add_keys`, but that blocks that are not whole may lie at the end of either stretch.
    """
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    near_turns = tl.cdiv(near_end - near, BLOCK)
    turns = near_turns + tl.cdiv(far_end - far, BLOCK)  # of a head
    begin = turns * GROUPED * split // splits
    head = begin // tl.maximum(turns, 1)
    turn = begin - head * turns
    for _ in range(begin, turns * GROUPED * (split + 1) // splits):
        beyond = turn - near_turns
        first = tl.where(beyond < 0, near + turn * BLOCK, far + beyond * BLOCK)
        end = tl.where(beyond < 0, near_end, far_end)
        q = _rows(query + head.to(tl.int64) * query_head, first, query_row, end, D, SIZE, BLOCK, MASKED)
        do = _rows(grad + head.to(tl.int64) * grad_head, first, grad_row, end, D, SIZE, BLOCK, MASKED)
        spot = tl.arange(0, 2 * BLOCK)
        pair = sums + (head.to(tl.int64) * N + first) * 2 + spot
        # Beyond the edge all is 0 but the weights, which are 1: nothing is added.
        pair = tl.load(pair, mask=spot < 2 * (end - first), other=0.0) if MASKED else tl.load(pair)
        log_sum, rowsum = tl.split(tl.reshape(pair, [BLOCK, 2]))
        score = tl.dot(k, tl.trans(q), input_precision=precision)
        prob = tl.exp2(score * scale - log_sum[None, :])
        if MASKED:
            prob = tl.where((at_k - first)[:, None] <= tl.arange(0, BLOCK)[None, :], prob, 0.0)
        dv = tl.dot(prob.to(do.dtype), do, dv, input_precision=precision)
        dprob = tl.dot(v, tl.trans(do), input_precision=precision)
        dscore = prob * (dprob - rowsum[None, :])
        dk = tl.dot(dscore.to(q.dtype), q, dk, input_precision=precision)
        turn += 1
        head += (turn == turns).to(tl.int32)
        turn = tl.where(turn == turns, 0, turn)
    return dk, dv


@triton.jit(do_not_specialize=["prompts", "groups", "segments", "splits", "blocks", "N"])
def _key_kernel(
    grad, query, key, value, sums, dkey, dvalue, part, starts, starts_q, scale,
    prompts, groups, segments, splits, blocks, N,
    grad_row, grad_head, query_row, query_head, key_row, key_head, value_row, value_head,
    H: tl.constexpr, GROUPED: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dkey, dvalue [N, K, D] of a block of keys of one segment and head; part [2, splits, prompts, K, D] of prompts
    where there are splits."""
    K: tl.constexpr = H // GROUPED
    head = (tl.program_id(0) % K).to(tl.int64)
    block = tl.program_id(0) // K % blocks
    segment = tl.program_id(0) // K // blocks
    # The first segments are the prompts, `splits` programs for each of their blocks: they take longest.
    split = segment % splits
    if segment < groups * splits:
        segment = segment // splits
    else:
        segment -= groups * (splits - 1)
        split, splits = 0, 1
    first = tl.load(starts + segment) + block * BLOCK_K  # of this program's keys
    dkey += head * D
    dvalue += head * D
    if segment == segments:  # what is left of the line
        for at in range(first, N, blocks * BLOCK_K):
            _store(dkey, tl.zeros([BLOCK_K, SIZE], tl.float32), at, N, K * D, D, SIZE, BLOCK_K)
            _store(dvalue, tl.zeros([BLOCK_K, SIZE], tl.float32), at, N, K * D, D, SIZE, BLOCK_K)
        return
    end = tl.load(starts + segment + 1)
    if first >= end:
        return
    k = _rows(key + head * key_head, first, key_row, end, D, SIZE, BLOCK_K, True)
    v = _rows(value + head * value_head, first, value_row, end, D, SIZE, BLOCK_K, True)
    at_k = first + tl.arange(0, BLOCK_K)
    grad += head * GROUPED * grad_head
    query += head * GROUPED * query_head
    sums += head * GROUPED * N * 2

    # Queries past this program's last key see all of its keys; their blocks are whole, counted back from the end.
    near = end - tl.maximum(end - first - BLOCK_K, 0) // BLOCK_Q * BLOCK_Q
    far, far_end = 0, 0
    if segment < groups:
        far = prompts + tl.load(starts_q + segment)
        far_end = prompts + tl.load(starts_q + segment + 1)
    edge = far + (far_end - far) // BLOCK_Q * BLOCK_Q
    dk = tl.zeros([BLOCK_K, SIZE], tl.float32)
    dv = tl.zeros([BLOCK_K, SIZE], tl.float32)
    dk, dv = _add_queries(
        k, v, grad, query, sums, grad_row, grad_head, query_row, query_head, N, first, near, edge, far_end,
        split, splits, at_k, dk, dv, scale, GROUPED, D, SIZE, BLOCK_Q, True, EXACT,
    )  # fmt: skip
    dk, dv = _add_queries(
        k, v, grad, query, sums, grad_row, grad_head, query_row, query_head, N, near, end, far, edge,
        split, splits, at_k, dk, dv, scale, GROUPED, D, SIZE, BLOCK_Q, False, EXACT,
    )  # fmt: skip
    dk = dk * (scale * 0.6931471805599453)  # of base e
    if splits == 1:
        _store(dkey, dk, first, end, K * D, D, SIZE, BLOCK_K)
        _store(dvalue, dv, first, end, K * D, D, SIZE, BLOCK_K)
    else:
        size = prompts.to(tl.int64) * (K * D)
        part += head * D + split * size
        _store(part, dk, first, end, K * D, D, SIZE, BLOCK_K)
        _store(part + splits * size, dv, first, end, K * D, D, SIZE, BLOCK_K)
