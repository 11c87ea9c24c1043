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

PART_KEYS = 128
"""Fewer are not worth a program of their own."""
BLOCK_VOCAB = 4096
"""Fixed: a row's sums are added up in one order, so that its draw is the same in every batch."""


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lanes: Tensor,
    scale: float,
    new: tuple[Tensor, Tensor] | None = None,
    *,
    splits: int | None = None,
    setting: tuple[int, int, int] | None = None,
) -> Tensor:
    """One new token a lane over its part of the cache.

    Each program takes one lane, one key head and one of `splits` equal parts of the lane's own length, and a second
    kernel joins the parts. Lengths are read on the device: a short lane costs little beside a long one.

    Args:
        query: [n, K, H, D]; keys, values: [S+1, K, L, D], of the same strides; lanes: [n, 1, 1, 2] int32: place, and
            length less one.
        new: the token's own key and value [n, K, 1, D], attended to and written into the cache on the way; None: they
            are there already.
        splits: parts a lane is cut into; None cuts until the card is full.
        setting: keys read at a time, warps and stages of a program; None takes those that were found best.
    Returns:
        [n, K, H, D], query's dtype.
    Source: Dao et al. 2023 (Flash-Decoding).
    """
    n, K, H, D = query.shape
    L = keys.shape[2]
    assert keys.stride() == values.stride()
    query, *own = (x if x.stride(3) == 1 else x.contiguous() for x in (query, *(new or ())))
    key, value = own or (query, query)  # not read
    heads, size = max(16, triton.next_power_of_2(H)), max(16, triton.next_power_of_2(D))
    exact = query.dtype == torch.float32
    if splits is None:
        splits = min(triton.cdiv(8 * processors(query.device), n * K), max(1, L // PART_KEYS), 32)
    block, warps, stages = setting or _setting(splits == 1 and L >= 4 * PART_KEYS, heads * size, exact)
    out = torch.empty(n, K, H, D, dtype=query.dtype, device=query.device)
    if splits == 1:
        part, log_sum = out, out  # not written
    else:
        part = torch.empty(n, K, splits, H, D, dtype=torch.float32, device=query.device)
        log_sum = torch.empty(n, K, splits, H, dtype=torch.float32, device=query.device)
    _attention_kernel[(n * K, splits)](
        query, keys, values, key, value, lanes, out, part, log_sum, scale * 1.4426950408889634,
        query.stride(0), query.stride(1), query.stride(2), keys.stride(0), keys.stride(1), keys.stride(2),
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        K=K, H=H, HEADS=heads, D=D, SIZE=size, BLOCK=block, SPLITS=splits, EXACT=exact,
        APPEND=new is not None, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        _join_kernel[(n * K,)](
            part, log_sum, out, H=H, D=D, HEADS=triton.next_power_of_2(H), SIZE=size, SPLITS=splits,
            PARTS=triton.next_power_of_2(splits), num_warps=4,
        )  # fmt: skip
    return out


@functools.cache
def processors(device: torch.device) -> int:
    """How many a card has."""
    if device.type != "cuda":
        return 3  # the interpreter, in tests
    return torch.cuda.get_device_properties(device).multi_processor_count


def _setting(long: bool, sums: int, exact: bool) -> tuple[int, int, int]:
    """Long lanes that fill the card uncut are read quickest in large pieces; short ones, and parts, in small ones."""
    if exact:  # twice the bytes a stage, and, without tensor cores, more registers
        return 32, 4, 2
    if long and sums == 1024:
        return 128, 4, 2
    return 32, min(4, max(1, sums // 1024)), 3  # a warp's registers hold 16 x 64 sums well


@triton.jit
def _attention_kernel(
    query, keys, values, new_keys, new_values, lanes, out, part, log_sum, scale,
    query_lane, query_head, query_row, cache_place, cache_head, cache_row, key_lane, key_head, value_lane, value_head,
    K: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, EXACT: tl.constexpr, APPEND: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0) // K
    head = tl.program_id(0) % K
    split = tl.program_id(1)
    place = tl.load(lanes + 2 * lane).to(tl.int64)
    cache_row = cache_row.to(tl.int64)  # a place may hold more than 2^31 numbers
    last = tl.load(lanes + 2 * lane + 1)
    length = last if APPEND else last + 1  # of what is read from the cache
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
    if APPEND:  # noqa: SIM102 - decided when it is compiled; the other when it runs
        if split == 0:  # the new token, last: the cache is being read by then, and need not wait for it
            own_key = tl.load(new_keys + lane * key_lane + head * key_head + d, mask=d < D, other=0.0)
            own_value = tl.load(new_values + lane * value_lane + head * value_head + d, mask=d < D, other=0.0)
            own = base + last * cache_row + d
            tl.store(keys + own, own_key, mask=d < D)
            tl.store(values + own, own_value, mask=d < D)
            score = tl.sum(q.to(tl.float32) * own_key.to(tl.float32)[None, :], 1) * scale
            higher = tl.maximum(peak, score)
            fade = tl.exp2(peak - higher)
            weight = tl.exp2(score - higher)
            total = total * fade + weight
            mean = mean * fade[:, None] + weight[:, None] * own_value.to(tl.float32)[None, :]
            peak = higher

    wanted = (h[:, None] < H) & (d[None, :] < D)
    pair = lane.to(tl.int64) * K + head
    if SPLITS == 1:
        spot = (pair * H + h[:, None]) * D + d[None, :]
        tl.store(out + spot, (mean / total[:, None]).to(out.dtype.element_ty), mask=wanted)
    else:
        some = start < end
        if APPEND:
            some = some | (split == 0)
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

    The vocabulary is cut into tiles, each summed by a program of its own. A tile is drawn by its share of the whole,
    then a token by its share of the tile: two uniforms a token, not one a vocabulary entry. They are a function of
    seed, row and response token alone, so that what a row draws does not depend on its lane. Greedy: argmax of the
    logits, log-prob at temperature 1.

    Args:
        logits: [n, V], any float dtype; row, count: [n] int64; seed: [1] int64; inverse_temperature: [1] float32.
    Returns:
        tokens [n] int64, log_probs [n] float32.
    Source: Salmon et al. 2011 (Philox, counter-based random numbers).
    """
    n, V = logits.shape
    tiles = triton.cdiv(V, BLOCK_VOCAB)
    peaks = torch.empty(n, tiles, dtype=torch.float32, device=logits.device)
    sums = torch.empty(n, tiles, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(n, dtype=torch.int64, device=logits.device)
    log_probs = torch.empty(n, dtype=torch.float32, device=logits.device)
    _tile_kernel[(n * tiles,)](
        logits, inverse_temperature, peaks, sums, logits.stride(0), V, tiles, BLOCK=BLOCK_VOCAB, num_warps=4
    )
    _pick_kernel[(n,)](
        logits, row, count, seed, inverse_temperature, peaks, sums, tokens, log_probs, logits.stride(0), V, tiles,
        GREEDY=greedy, BLOCK=BLOCK_VOCAB, TILES=triton.next_power_of_2(tiles), num_warps=8,
    )  # fmt: skip
    return tokens, log_probs


@triton.jit
def _tile_kernel(logits, inverse_temperature, peaks, sums, stride, V, tiles, BLOCK: tl.constexpr):
    lane = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    at = tile * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + lane.to(tl.int64) * stride + at, mask=at < V, other=float("-inf")).to(tl.float32)
    x = x * tl.load(inverse_temperature)
    peak = tl.maximum(tl.max(x, 0), -1.0e30)  # finite, also where every entry is masked
    tl.store(peaks + lane * tiles + tile, peak)
    tl.store(sums + lane * tiles + tile, tl.sum(tl.exp(x - peak), 0))


@triton.jit
def _first_beyond(weight, uniform, i):
    """The first index whose running sum passes its share of the whole; never one without weight."""
    running = tl.cumsum(weight, 0)
    some = weight > 0
    hit = some & (running > uniform * tl.max(running, 0))
    first = tl.min(tl.where(hit, i, 2147483647), 0)
    return tl.minimum(first, tl.max(tl.where(some, i, 0), 0))  # rounding may leave no hit: the last one, then


@triton.jit
def _pick_kernel(
    logits, row, count, seed, inverse_temperature, peaks, sums, tokens, log_probs, stride, V, tiles,
    GREEDY: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0)
    t = tl.arange(0, TILES)
    i = tl.arange(0, BLOCK)
    scale = tl.load(inverse_temperature)
    peak = tl.load(peaks + lane * tiles + t, mask=t < tiles, other=float("-inf"))
    top = tl.max(peak, 0)
    share = tl.load(sums + lane * tiles + t, mask=t < tiles, other=0.0) * tl.exp(peak - top)
    whole = tl.sum(share, 0)
    if GREEDY:
        tile = tl.min(tl.where(peak == top, t, TILES - 1), 0)
    else:
        c_row = tl.load(row + lane).to(tl.uint32)
        c_count = tl.load(count + lane).to(tl.uint32)
        zero = c_row * 0
        bits, more, _, _ = tl.philox(tl.load(seed), zero, c_count, c_row, zero)
        tile = _first_beyond(share, (bits >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08, t)
    at = tile * BLOCK + i
    x = tl.load(logits + lane.to(tl.int64) * stride + at, mask=at < V, other=float("-inf")).to(tl.float32) * scale
    high = tl.max(x, 0)
    if GREEDY:
        token = tl.min(tl.where(x == high, i, BLOCK - 1), 0)  # of equals the first, as in argmax
    else:
        weight = tl.exp(x - tl.maximum(high, -1.0e30))
        token = _first_beyond(weight, (more >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08, i)
    picked = tl.sum(tl.where(i == token, x, 0.0), 0)
    tl.store(tokens + lane, tl.minimum(tile * BLOCK + token, V - 1).to(tl.int64))
    tl.store(log_probs + lane, picked - top - tl.log(whole))
