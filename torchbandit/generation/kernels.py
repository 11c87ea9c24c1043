# mypy: disable-error-code="import-not-found,no-untyped-def,untyped-decorator,no-untyped-call,unused-ignore"
"""Triton kernels of a decode step: attention over each lane's own stretch of the cache, and the draw.

Axis letters: see cache.py; H heads that share a key, V vocabulary.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_KEYS = 64
KEYS_WARPS, KEYS_STAGES = 4, 3
BLOCK_VOCAB = 1024
"""Fixed, since the noise of a token depends on its block."""


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lanes: Tensor,
    scale: float,
    *,
    splits: int | None = None,
    block: int = BLOCK_KEYS,
    warps: int = KEYS_WARPS,
    stages: int = KEYS_STAGES,
) -> Tensor:
    """One new token a lane over its part of the cache.

    Each program takes one lane, one key head and one of `splits` equal parts of the lane's own length, and a second
    kernel joins the parts. Lengths are read on the device: a short lane costs little beside a long one.

    Args:
        query: [n, K, H, D]; keys, values: [S+1, K, L, D]; lanes: [n, 1, 1, 2] int32: place, and length less one.
        splits: parts a lane is cut into; None cuts until the card is full.
    Returns:
        [n, K, H, D], query's dtype.
    Source: Dao et al. 2023 (Flash-Decoding).
    """
    n, K, H, D = query.shape
    L = keys.shape[2]
    if query.stride(3) != 1:
        query = query.contiguous()
    if query.dtype == torch.float32:
        stages = min(stages, 2)  # twice the bytes a stage
    if splits is None:
        splits = min(triton.cdiv(_programs_wanted(query.device), n * K), max(1, L // (4 * block)), 32)
    out = torch.empty(n, K, H, D, dtype=query.dtype, device=query.device)
    if splits == 1:
        part, log_sum = out, out  # not written
    else:
        part = torch.empty(n, K, splits, H, D, dtype=torch.float32, device=query.device)
        log_sum = torch.empty(n, K, splits, H, dtype=torch.float32, device=query.device)
    shapes = {"K": K, "H": H, "HEADS": max(16, triton.next_power_of_2(H)), "D": D}
    size = max(16, triton.next_power_of_2(D))
    _attention_kernel[(n * K, splits)](
        query, keys, values, lanes, out, part, log_sum, scale * 1.4426950408889634,
        query.stride(0), query.stride(1), query.stride(2), keys.stride(0), keys.stride(1), keys.stride(2),
        **shapes, SIZE=size, BLOCK=block, SPLITS=splits, EXACT=query.dtype == torch.float32,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        _join_kernel[(n * K,)](
            part, log_sum, out, H=H, D=D, HEADS=triton.next_power_of_2(H), SIZE=size, SPLITS=splits,
            PARTS=triton.next_power_of_2(splits), num_warps=4,
        )  # fmt: skip
    return out


@functools.cache
def _programs_wanted(device: torch.device) -> int:
    if device.type != "cuda":
        return 8  # the interpreter, in tests
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _attention_kernel(
    query, keys, values, lanes, out, part, log_sum, scale,
    query_lane, query_head, query_row, cache_place, cache_head, cache_row,
    K: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0) // K
    head = tl.program_id(0) % K
    split = tl.program_id(1)
    place = tl.load(lanes + 2 * lane).to(tl.int64)
    length = tl.load(lanes + 2 * lane + 1) + 1
    span = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    start = split * span
    end = tl.minimum(start + span, length)

    h = tl.arange(0, HEADS)
    d = tl.arange(0, SIZE)
    k = tl.arange(0, BLOCK)
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    q = tl.load(
        query + lane * query_lane + head * query_head + h[:, None] * query_row + d[None, :],
        mask=(h[:, None] < H) & (d[None, :] < D), other=0.0,
    )  # fmt: skip
    base = place * cache_place + head * cache_head
    peak = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    mean = tl.zeros([HEADS, SIZE], tl.float32)
    for at in range(start, end, BLOCK):
        row = at + k
        inside = row < end
        spot = base + row[:, None] * cache_row + d[None, :]
        real = inside[:, None] & (d[None, :] < D)
        key = tl.load(keys + spot, mask=real, other=0.0)
        score = tl.dot(q, tl.trans(key), input_precision=precision) * scale
        score = tl.where(inside[None, :], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        fade = tl.exp2(peak - higher)
        total = total * fade + tl.sum(weight, 1)
        value = tl.load(values + spot, mask=real, other=0.0)
        mean = mean * fade[:, None] + tl.dot(weight.to(value.dtype), value, input_precision=precision)
        peak = higher

    wanted = (h[:, None] < H) & (d[None, :] < D)
    pair = lane.to(tl.int64) * K + head
    if SPLITS == 1:
        spot = (pair * H + h[:, None]) * D + d[None, :]
        tl.store(out + spot, (mean / total[:, None]).to(out.dtype.element_ty), mask=wanted)
    else:
        some = start < end
        row = (pair * SPLITS + split) * H + h
        safe = tl.where(total > 0, total, 1.0)
        tl.store(log_sum + row, tl.where(some, peak + tl.log2(safe), float("-inf")), mask=h < H)
        if some:  # the part of an empty split is never read
            tl.store(part + row[:, None] * D + d[None, :], mean / safe[:, None], mask=wanted)


@triton.jit
def _join_kernel(
    part, log_sum, out,
    H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HEADS)
    d = tl.arange(0, SIZE)
    s = tl.arange(0, PARTS)
    rows = (pair * SPLITS + s[None, :]) * H + h[:, None]
    known = (s[None, :] < SPLITS) & (h[:, None] < H)
    peak = tl.max(tl.load(log_sum + rows, mask=known, other=float("-inf")), 1)
    peak = tl.where(h < H, peak, 0.0)
    total = tl.zeros([HEADS], tl.float32)
    mean = tl.zeros([HEADS, SIZE], tl.float32)
    for split in range(SPLITS):
        row = (pair * SPLITS + split) * H + h
        weight = tl.exp2(tl.load(log_sum + row, mask=h < H, other=float("-inf")) - peak)
        spot = row[:, None] * D + d[None, :]
        wanted = (h[:, None] < H) & (d[None, :] < D) & (weight[:, None] > 0)
        mean += weight[:, None] * tl.load(part + spot, mask=wanted, other=0.0)
        total += weight
    total = tl.where(h < H, total, 1.0)
    spot = (pair * H + h[:, None]) * D + d[None, :]
    tl.store(out + spot, (mean / total[:, None]).to(out.dtype.element_ty), mask=(h[:, None] < H) & (d[None, :] < D))


def draw(
    logits: Tensor, row: Tensor, count: Tensor, seed: Tensor, inverse_temperature: Tensor, *, greedy: bool
) -> tuple[Tensor, Tensor]:
    """One token a lane and its log-prob under softmax(logits / temperature), in one pass over the logits.

    An exponential race in logarithms: argmax of logit / temperature - log E with E ~ Exp(1) has the softmax's
    distribution. The noise is a function of seed, row, response token and vocabulary entry alone, so that what a row
    draws does not depend on its lane. Greedy: argmax of the logits, log-prob at temperature 1.

    Args:
        logits: [n, V], any float dtype; row, count: [n] int64; seed: [1] int64; inverse_temperature: [1] float32.
    Returns:
        tokens [n] int64, log_probs [n] float32.
    Source: Salmon et al. 2011 (Philox, counter-based random numbers); Maddison et al. 2014 (the Gumbel race).
    """
    n, V = logits.shape
    blocks = triton.cdiv(V, 4 * BLOCK_VOCAB)
    parts = max(1, min(blocks, triton.cdiv(_programs_wanted(logits.device), n)))
    each = triton.cdiv(blocks, parts)
    parts = triton.cdiv(blocks, each)
    partial = torch.empty(4, n, parts, dtype=torch.float32, device=logits.device)
    index = torch.empty(n, parts, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(n, dtype=torch.int64, device=logits.device)
    log_probs = torch.empty(n, dtype=torch.float32, device=logits.device)
    _race_kernel[(n, parts)](
        logits, row, count, seed, inverse_temperature, partial, index, logits.stride(0), V, n, parts, each,
        GREEDY=greedy, BLOCK=BLOCK_VOCAB, num_warps=8,
    )  # fmt: skip
    _finish_kernel[(n,)](
        partial, index, tokens, log_probs, n, parts, PARTS=triton.next_power_of_2(parts), num_warps=1
    )  # fmt: skip
    return tokens, log_probs


@triton.jit
def _log_exponential(bits):
    """log E, E ~ Exp(1), of 32 random bits; exact where it matters, at small E, which win the race."""
    low = (bits >> 8).to(tl.int32).to(tl.float32) * 256.0 + (bits & 255).to(tl.int32).to(tl.float32)
    v = (low + 0.5) * 2.3283064365386963e-10
    # float32 of 1 - v keeps nothing of a small v, whose E is v + v^2/2 + v^3/3. v may round to 1: E is bounded there.
    series = v * (1.0 + v * (0.5 + v * 0.3333333))
    return tl.log(tl.where(v < 0.01, series, -tl.log(tl.maximum(1.0 - v, 2.9802322e-08))))


@triton.jit(do_not_specialize=["n", "parts", "each"])
def _race_kernel(
    logits, row, count, seed, inverse_temperature, partial, index, stride, V, n, parts, each,
    GREEDY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0)
    part = tl.program_id(1)
    i = tl.arange(0, BLOCK)
    line = logits + lane.to(tl.int64) * stride
    scale = tl.load(inverse_temperature)
    c_row = tl.load(row + lane).to(tl.uint32)
    c_count = tl.load(count + lane).to(tl.uint32)
    key = tl.load(seed)
    zero = (i * 0).to(tl.uint32)
    # Each of the BLOCK threads of the race keeps its own; they meet at the end.
    peak = tl.full([BLOCK], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_logit = tl.full([BLOCK], float("-inf"), tl.float32)
    best_index = tl.full([BLOCK], 2147483647, tl.int32)
    last = tl.minimum((part + 1) * each, tl.cdiv(V, 4 * BLOCK))
    for block in range(part * each, last):
        at = block * 4 * BLOCK + i
        x0 = tl.load(line + at, mask=at < V, other=float("-inf")).to(tl.float32) * scale
        x1 = tl.load(line + at + BLOCK, mask=at + BLOCK < V, other=float("-inf")).to(tl.float32) * scale
        x2 = tl.load(line + at + 2 * BLOCK, mask=at + 2 * BLOCK < V, other=float("-inf")).to(tl.float32) * scale
        x3 = tl.load(line + at + 3 * BLOCK, mask=at + 3 * BLOCK < V, other=float("-inf")).to(tl.float32) * scale
        higher = tl.maximum(peak, tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)))
        total = total * tl.exp(peak - higher)
        total += tl.exp(x0 - higher) + tl.exp(x1 - higher) + tl.exp(x2 - higher) + tl.exp(x3 - higher)
        peak = higher
        if GREEDY:
            s0 = x0
            s1 = x1
            s2 = x2
            s3 = x3
        else:
            spot = (block * BLOCK + i).to(tl.uint32)
            r0, r1, r2, r3 = tl.philox(key, spot, zero + c_count, zero + c_row, zero)
            s0 = x0 - _log_exponential(r0)
            s1 = x1 - _log_exponential(r1)
            s2 = x2 - _log_exponential(r2)
            s3 = x3 - _log_exponential(r3)
        # Strictly greater: of equals the first id stays, as in argmax.
        won = s0 > best
        best = tl.where(won, s0, best)
        best_logit = tl.where(won, x0, best_logit)
        best_index = tl.where(won, at, best_index)
        won = s1 > best
        best = tl.where(won, s1, best)
        best_logit = tl.where(won, x1, best_logit)
        best_index = tl.where(won, at + BLOCK, best_index)
        won = s2 > best
        best = tl.where(won, s2, best)
        best_logit = tl.where(won, x2, best_logit)
        best_index = tl.where(won, at + 2 * BLOCK, best_index)
        won = s3 > best
        best = tl.where(won, s3, best)
        best_logit = tl.where(won, x3, best_logit)
        best_index = tl.where(won, at + 3 * BLOCK, best_index)
    top = tl.max(peak, 0)
    winner = tl.max(best, 0)
    token = tl.min(tl.where(best == winner, best_index, 2147483647), 0)
    spot = lane * parts + part
    tl.store(partial + spot, top)
    tl.store(partial + n * parts + spot, tl.sum(total * tl.exp(peak - top), 0))
    tl.store(partial + 2 * n * parts + spot, winner)
    tl.store(partial + 3 * n * parts + spot, tl.max(tl.where(best_index == token, best_logit, float("-inf")), 0))
    tl.store(index + spot, token)


@triton.jit(do_not_specialize=["n", "parts"])
def _finish_kernel(partial, index, tokens, log_probs, n, parts, PARTS: tl.constexpr):
    lane = tl.program_id(0)
    p = tl.arange(0, PARTS)
    spot = lane * parts + p
    real = p < parts
    peak = tl.load(partial + spot, mask=real, other=-1.0e30)
    total = tl.load(partial + n * parts + spot, mask=real, other=0.0)
    best = tl.load(partial + 2 * n * parts + spot, mask=real, other=float("-inf"))
    logit = tl.load(partial + 3 * n * parts + spot, mask=real, other=float("-inf"))
    at = tl.load(index + spot, mask=real, other=2147483647)
    top = tl.max(peak, 0)
    whole = top + tl.log(tl.sum(total * tl.exp(peak - top), 0))
    winner = tl.max(best, 0)
    token = tl.min(tl.where(best == winner, at, 2147483647), 0)
    picked = tl.max(tl.where(at == token, logit, float("-inf")), 0)
    tl.store(tokens + lane, token.to(tl.int64))
    tl.store(log_probs + lane, picked - whole)
