"""Gradients of the Triton kernel of scoring against plain float32 torch: on CUDA, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_scoring_kernels import CASES, DTYPES, line
from torch import Tensor
from triton_here import DEVICE

from torchbandit.scoring.kernels_backward import Launch, packed_attention_backward
from torchbandit.scoring.packs import size_carrier
from torchbandit.scoring.varlen import shared_backward, shared_forward, varlen_backward, varlen_forward

# Of keys and queries that are not there, weights may overflow: nothing of them is written.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::DeprecationWarning:triton")

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 6e-3}
SCALE = 0.21
OTHERS: list[dict[str, Any]] = [
    {"of_queries": Launch(32, 64, 4, 2), "of_keys": Launch(32, 64, 4, 2)},
    {"of_queries": Launch(64, 32, 4, 1), "of_keys": Launch(64, 32, 4, 1)},
    {"of_queries": Launch(16, 16, 1, 2), "of_keys": Launch(16, 16, 1, 2), "splits": 3},
    {"splits": 1},
]


class Line:
    """Random tensors of a packed line, what the forward says of them, and the gradients in float32.

    A `group_size` of 0: nothing is shared. `factor`: scores are all negative, and that many times as large.
    """

    def __init__(
        self, prompts: list[int], replies: list[int], group_size: int, H: int, K: int, D: int, dtype: torch.dtype,
        factor: float = 0.0,
    ) -> None:  # fmt: skip
        (self.starts, *self.bounds), (self.longest, self.p, self.r) = line(prompts, replies, max(group_size, 1))
        if not group_size:
            self.bounds, self.p, self.r = [torch.zeros(1 + len(prompts) % 2).int()] * 2, 0, 0
        gen = torch.Generator().manual_seed(D)
        N = int(self.starts[-1])
        query, key, value, grad = (torch.randn(N, heads, D, generator=gen) for heads in (H, K, 3 * K, H))
        value = value[:, ::3]  # a part of a joint projection has strides of its own
        if D == 16:
            query, grad = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (query, grad))
        if factor:
            query, key = query.abs() * factor, -key.abs()
        self.tensors = [x.to(dtype) for x in (grad, query, key, value)]
        grad, query, key, value = (x.float() for x in self.tensors)
        starts, longest = self.starts, size_carrier(self.longest)
        if group_size:
            sizes = [size_carrier(int(x.diff().max())) for x in self.bounds]
            shared = size_carrier(self.p), size_carrier(self.r), *self.bounds, *sizes
            self.out, self.lse = shared_forward(query, key, value, starts, longest, *shared, SCALE)
        else:
            self.out, self.lse = varlen_forward(query, key, value, starts, starts, longest, longest, True, SCALE, 0)
        given = grad, query, key, value, self.out, self.lse
        if group_size:
            self.expected = shared_backward(*given, starts, longest, *shared, SCALE)
        else:
            self.expected = varlen_backward(*given, starts, starts, longest, longest, True, SCALE, 0)

    def gradients(self, **how: Any) -> list[Tensor]:
        """What the kernels say."""
        dtype = self.tensors[0].dtype
        tensors = [x.to(DEVICE) for x in (*self.tensors, self.out.to(dtype), self.lse, self.starts)]
        bounds = [x.to(DEVICE) for x in self.bounds]
        found = packed_attention_backward(*tensors, self.longest, self.p, self.r, *bounds, SCALE, **how)
        assert all(x.dtype == dtype and x.is_contiguous() for x in found)
        return [x.cpu() for x in found]

    def check(self, loose: float = 1.0, **how: Any) -> None:
        for found, expected in zip(self.gradients(**how), self.expected, strict=True):
            near(found, expected, loose)


def near(found: Tensor, expected: Tensor, loose: float = 1.0) -> None:
    tolerance = TOLERANCE[found.dtype] * loose
    size = max(1.0, float(expected.abs().max()))  # sums of rounded numbers are as exact as the largest of them
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "K", "D"), [(4, 2, 16), (3, 1, 20), (2, 2, 8), (8, 2, 64), (2, 1, 128)])
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_two_parts(case: str, H: int, K: int, D: int, dtype: torch.dtype) -> None:
    if DEVICE == "cpu" and case != "lengths that fit no block" and (20 if "vector" in case else 16) != D:
        pytest.skip("slow in the interpreter")
    Line(*CASES[case], H, K, D, dtype).check()


@pytest.mark.parametrize("how", OTHERS)
def test_gradients_with_other_launches(how: dict[str, Any]) -> None:
    for case in list(CASES)[:3]:
        Line(*CASES[case], 4, 2, 16, DTYPES[0]).check(**how)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "K", "D"), [(4, 2, 16), (2, 2, 24), (2, 1, 64), (1, 1, 128)])
def test_gradients_of_a_line_that_shares_nothing(H: int, K: int, D: int, dtype: torch.dtype) -> None:
    example = Line([100, 0, 1, 64, 70] if D < 64 else [129, 60], [], 0, H, K, D, dtype)
    for how in ({}, *(OTHERS[:2] if D == 16 else ())):
        example.check(**how)


def test_gradients_are_those_of_automatic_differentiation() -> None:
    """One group as rows of prompt and response, each with plain attention."""
    prompt, replies = 37, [20, 70]
    example = Line([prompt], replies, 2, 2, 1, 16, DTYPES[0])
    grad, *inputs = (x.float() for x in example.tensors)
    inputs = [x.detach().requires_grad_() for x in inputs]
    total, begin = torch.zeros(()), prompt
    for i, reply in enumerate(replies):
        row = [*range(prompt), *range(begin, begin + reply)]
        query, key, value = (x[row].transpose(0, 1) for x in inputs)
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=SCALE, enable_gqa=True
        ).transpose(0, 1)
        counted = torch.arange(len(row))[:, None, None] >= (prompt if i else 0)  # the prompt's own rows once
        total = total + (out * grad[row] * counted).sum()
        begin += reply
    total.backward()
    for found, tensor in zip(example.gradients(), inputs, strict=True):
        assert tensor.grad is not None
        near(found[:begin], tensor.grad[:begin])


def test_very_low_scores_overflow_nothing() -> None:
    """Beside a log of the sum below -88, the weight of a key that is not there, of score 0, is infinite."""
    example = Line([70], [9, 33], 2, 1, 1, 16, DTYPES[0], factor=200.0)
    assert example.lse.max() < -100
    for how in ({}, OTHERS[2]):
        example.check(loose=50 if DEVICE == "cpu" else 2, **how)  # float32 scores of some hundred


def test_nothing_flows_between_groups_and_gradients_repeat() -> None:
    example = Line([20, 30], [10, 12, 14, 16], 2, 4, 2, 16, DTYPES[0])
    how = {"of_keys": Launch(16, 16, 1, 2), "splits": 2}
    before, again = example.gradients(**how), example.gradients(**how)
    assert all(torch.equal(x, y) for x, y in zip(before, again, strict=True))
    second = [*range(20, 50), *range(50 + 22, 50 + 52)]  # its prompt and its responses
    first = [*range(20), *range(50, 50 + 22)]
    for tensor in example.tensors:
        tensor[second] = float("nan")
    after = example.gradients(**how)
    for x, y in zip(after, before, strict=True):
        assert torch.equal(x[first], y[first]) and x[second].isnan().any()


def test_rows_of_no_segment_have_no_gradient() -> None:
    example = Line([5], [40, 3], 2, 2, 1, 16, DTYPES[0])  # 48 tokens, and 16 to fill up
    whole = example.gradients()
    example.starts, example.longest = example.starts[:-1], 40
    for found, expected in zip(example.gradients(**OTHERS[2]), whole, strict=True):
        assert not found[48:].any() and expected[48:].any()
        near(found[:48], expected[:48].float())


def test_a_line_without_tokens_has_gradients_of_none() -> None:
    nothing, starts = torch.zeros(0, 2, 16, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    found = packed_attention_backward(
        *[nothing] * 5, torch.zeros(2, 0, device=DEVICE), starts, 0, 0, 0, starts, starts, SCALE
    )
    assert [tuple(x.shape) for x in found] == [(0, 2, 16)] * 3
