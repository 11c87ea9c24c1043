"""The Triton kernel of scoring against plain float32 torch: on CUDA, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_here import DEVICE

from torchbandit.scoring import kernels
from torchbandit.scoring.packs import size_carrier
from torchbandit.scoring.varlen import shared_forward, varlen_forward

DTYPES = [torch.bfloat16, torch.float16] if DEVICE == "cuda" else [torch.float32]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def line(prompts: list[int], replies: list[int], group_size: int) -> tuple[list[Tensor], list[int]]:
    """(starts, starts_q, starts_k) of a line as packs lay it out, filled up to 64, and (longest, p, r)."""
    p, r = sum(prompts), sum(replies)
    lengths = [*prompts, *replies, -(p + r) % 64]
    groups = [sum(replies[i : i + group_size]) for i in range(0, len(replies), group_size)]
    return [cumulative(lengths), cumulative(groups), cumulative(prompts)], [max(lengths), p, r]


CASES = {
    "lengths that fit no block": ([40, 3, 70], [5, 33, 0, 64, 1, 20], 2),
    "one group": ([1], [100], 1),
    "prompts and responses of no tokens": ([17, 0, 33], [0, 0, 5, 6, 9, 40], 2),
    "a group of no tokens": ([7, 30, 12], [9, 3, 0, 0, 20, 70], 2),
    "more groups than a vector of 64": ([5] * 70, [3, 1] * 70, 2),
    "responses alone": ([0, 0], [130, 5, 64, 65], 2),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "K", "D"), [(4, 2, 16), (3, 1, 20), (2, 2, 8), (8, 2, 64), (2, 1, 128)])
@pytest.mark.parametrize("case", CASES)
def test_one_pass_equals_two_merged(case: str, H: int, K: int, D: int, dtype: torch.dtype) -> None:
    if DEVICE == "cpu" and D > 20 and case != "lengths that fit no block":
        pytest.skip("slow in the interpreter")
    (starts, starts_q, starts_k), (longest, p, r) = line(*CASES[case])
    gen = torch.Generator().manual_seed(D)
    query, key, value = (torch.randn(int(starts[-1]), heads, D, generator=gen) for heads in (H, K, 3 * K))
    value = value[:, ::3]  # a part of a joint projection has strides of its own
    if D == 16:
        query = query.transpose(0, 1).contiguous().transpose(0, 1)
    longest_q, longest_k = (size_carrier(int(x.diff().max())) for x in (starts_q, starts_k))
    sizes = size_carrier(longest), size_carrier(p), size_carrier(r)
    whole, log_sum = shared_forward(
        *(x.to(dtype).float() for x in (query, key, value)),
        starts, *sizes, starts_q, starts_k, longest_q, longest_k, 0.21,
    )  # fmt: skip
    on_device = [x.to(DEVICE, dtype) for x in (query, key, value)]
    bounds = [x.to(DEVICE) for x in (starts_q, starts_k)]
    near = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    others = ({"block_q": 32, "block_k": 64}, {"block_q": 64, "block_k": 32}) if D == 16 else ()
    for blocks in ({}, *others):
        out, lse = kernels.packed_attention(*on_device, starts.to(DEVICE), longest, p, r, *bounds, 0.21, **blocks)
        torch.testing.assert_close(out.cpu().float(), whole, **near)
        torch.testing.assert_close(lse.cpu(), log_sum, **near)
        assert out.dtype == dtype and out.is_contiguous() and lse.is_contiguous()


def test_rows_that_share_nothing_see_themselves() -> None:
    """Also where what says who shares is a single 0."""
    starts = cumulative([40, 1, 0, 70, 17])
    gen = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(128, heads, 20, generator=gen) for heads in (4, 2, 2))
    longest = size_carrier(70)
    want, want_lse = varlen_forward(query, key, value, starts, starts, longest, longest, True, 0.3, 0)
    none = starts[:1].to(DEVICE)
    on_device = [x.to(DEVICE, DTYPES[0]) for x in (query, key, value)]
    out, lse = kernels.packed_attention(*on_device, starts.to(DEVICE), 70, 0, 0, none, none, 0.3)
    near = {"rtol": TOLERANCE[DTYPES[0]], "atol": TOLERANCE[DTYPES[0]]}
    torch.testing.assert_close(out.cpu().float(), want, **near)
    torch.testing.assert_close(lse.cpu(), want_lse, **near)


def test_nothing_is_seen_of_other_groups() -> None:
    (starts, starts_q, starts_k), (longest, p, r) = line([20, 30], [10, 12, 14, 16], 2)
    gen = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(int(starts[-1]), heads, 16, generator=gen).to(DEVICE) for heads in (2, 1, 1))
    bounds = [x.to(DEVICE) for x in (starts, starts_q, starts_k)]

    def run() -> Tensor:
        return kernels.packed_attention(query, key, value, bounds[0], longest, p, r, *bounds[1:], 0.3)[0]

    before = run()
    second = [*range(20, 50), *range(50 + 22, 50 + 52)]  # its prompt and its responses
    key[second], value[second] = 9.0, 9.0
    after = run()
    first = [*range(20), *range(50, 50 + 22)]
    assert torch.equal(after[first], before[first]) and not torch.equal(after[second], before[second])
