"""Packed attention without a fast kernel: exact, in time and memory by tokens and not by the longest row's square."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fakes import tiny_lm
from test_scoring_routes import SMALL, build
from torch import Tensor

from torchbandit.bench.memory import peak_bytes
from torchbandit.scoring import log_probs, make_plan, prepare, varlen_blocks, varlen_cpu
from torchbandit.scoring.packs import size_carrier
from torchbandit.scoring.varlen import shared_backward, shared_forward, varlen_backward, varlen_forward

CPU = torch.device("cpu")
CASES = {  # lengths of queries and of keys, causal, window
    "rows": ([5, 5, 5, 130, 1, 64], None, True, 0),
    "rows of no tokens": ([0, 7, 7, 0, 0, 3], None, True, 0),
    "a window": ([3, 40, 40, 9], None, True, 7),
    "a window over two spans": ([70], None, True, 30),
    "responses to prompts": ([5, 130, 1, 0, 64], [3, 0, 200, 4, 9], False, 0),
}


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


class Line:
    """Random tensors of a case, and what plain attention of each segment alone makes of them, in float64."""

    def __init__(self, case: str, heads: tuple[int, int] = (4, 2), sizes: tuple[int, int] = (16, 16)) -> None:
        lengths, of_keys, self.causal, self.window = CASES[case]
        self.lengths = lengths, of_keys or lengths
        self.starts = [cumulative(n) for n in self.lengths]
        self.longest = [max(n) for n in self.lengths]
        gen = torch.Generator().manual_seed(len(case))
        self.query, self.key, self.value, self.grad = (
            torch.randn(sum(n), h, d, generator=gen, dtype=torch.float64)
            for n, h, d in zip((lengths, *[self.lengths[1]] * 2, lengths), (heads[0], heads[1], heads[1], heads[0]),
                               (sizes[0], sizes[0], sizes[1], sizes[1]), strict=True)
        )  # fmt: skip
        inputs = [x.requires_grad_() for x in (self.query, self.key, self.value)]
        parts = [self._alone(*part) for part in zip(*(x.split(n) for x, n in zip(
            inputs, (lengths, *[self.lengths[1]] * 2), strict=True)), strict=True)]  # fmt: skip
        self.out, self.lse = (torch.cat([p[i] for p in parts], i) for i in (0, 1))
        self.grads = torch.autograd.grad(self.out, inputs, self.grad)
        for x in inputs:
            x.requires_grad_(False)

    def _alone(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        group = query.shape[1] // key.shape[1]
        scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(group, 1)) * 0.3
        back = torch.arange(len(query))[:, None] - torch.arange(len(key))
        if self.causal:
            scores = scores.masked_fill((back < 0) | (back >= (self.window or 10**9)), -torch.inf)
        if not len(key):
            return query[..., :0].sum(-1, keepdim=True).expand(*query.shape[:2], value.shape[-1]), scores.logsumexp(-1)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.repeat_interleave(group, 1)), scores.logsumexp(-1)

    def given(self, dtype: torch.dtype) -> list[Tensor]:
        return [x.to(dtype) for x in (self.query, self.key, self.value)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("blocks", [0, 12000, 1 << 20], ids=lambda n: f"blocks of {n}" if n else "by segment")
@pytest.mark.parametrize("case", CASES)
def test_both_ways_are_plain_attention(
    case: str, blocks: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen_blocks, "CELLS", blocks)
    monkeypatch.setattr(varlen_cpu, "SPAN", 32)
    exact = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    for sizes in ((16, 16), (12, 8), (8, 20)) if dtype == torch.float64 else ((16, 16),):
        line = Line(case, sizes=sizes)
        how = (line.causal, 0.3, line.window)
        where = [*line.starts, *(line.longest if blocks else ())]
        way = varlen_blocks if blocks else varlen_cpu
        out, lse = way.forward(*line.given(dtype), *where, *how)
        assert out.dtype == lse.dtype == dtype and out.is_contiguous() and lse.is_contiguous()
        torch.testing.assert_close(out, line.out.to(dtype), **exact)
        torch.testing.assert_close(lse, line.lse.to(dtype), **exact)
        grads = way.backward(line.grad.to(dtype), *line.given(dtype), out, lse, *where, *how)
        for got, want in zip(grads, line.grads, strict=True):
            torch.testing.assert_close(got, want.to(dtype), **exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_computed_in_32(dtype: torch.dtype) -> None:
    line = Line("rows")
    where = *line.starts, *(size_carrier(n) for n in line.longest), True, 0.3, 0
    query, key, value = line.given(dtype)
    out, lse = varlen_forward(query, key, value, *where)
    want, want_lse = varlen_forward(query.float(), key.float(), value.float(), *where)
    assert out.dtype == dtype and torch.equal(out, want.to(dtype)) and torch.equal(lse, want_lse)
    grads = varlen_backward(line.grad.to(dtype), query, key, value, out, lse, *where)
    assert all(x.dtype == dtype for x in grads)


def test_shared_prompts_in_float64() -> None:
    """Two groups; each response beside its prompt, as rows of their own."""
    prompts, replies = [9, 4], [[5, 1], [0, 12]]
    flat = [*prompts, *replies[0], *replies[1]]
    gen = torch.Generator().manual_seed(0)
    query, key, value, grad = (torch.randn(sum(flat), h, 8, generator=gen).double() for h in (4, 2, 2, 4))
    shared = [size_carrier(sum(prompts)), size_carrier(18), cumulative([6, 12]), cumulative(prompts)]
    where = cumulative(flat), size_carrier(12), *shared, size_carrier(12), size_carrier(9), 0.3
    out, lse = shared_forward(query, key, value, *where)
    grads = shared_backward(grad, query, key, value, out, lse, *where)
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    lines = [x.split(flat) for x in inputs]
    given = grad.split(flat)
    total = torch.zeros((), dtype=torch.float64)
    for row in range(6):
        first = [] if row < 2 else [(row - 2) // 2]
        parts = [torch.cat([x[i] for i in (*first, row)]).transpose(0, 1) for x in lines]
        whole = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, scale=0.3, enable_gqa=True)
        own = whole.transpose(0, 1)[whole.shape[1] - flat[row] :]
        torch.testing.assert_close(out.split(flat)[row], own, rtol=1e-12, atol=1e-12)
        total = total + (own * given[row]).sum()
    for got, want in zip(grads, torch.autograd.grad(total, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# --- memory ----------------------------------------------------------------------------------------------------------


def rows(prompts: list[int], replies: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    group = len(replies) // len(prompts)
    gen = torch.Generator().manual_seed(0)
    ids = [torch.randint(256, (len(n), max(n)), generator=gen) for n in (prompts, replies)]
    masks = [torch.arange(max(n)) < torch.tensor(n)[:, None] for n in (prompts, replies)]
    prompt, mask = ids[0].repeat_interleave(group, 0), masks[0].repeat_interleave(group, 0)
    return prompt, mask, ids[1], masks[1]


def learning(kind: str, prompts: list[int], replies: list[int], budget: int = 1 << 20) -> Callable[[], object]:
    """Log-probs and their gradient, all rows in one pack, by a model with or without a window."""
    options = {"max_position_embeddings": 8192, "num_key_value_heads": 2}
    model = build("Mistral", SMALL | options | {"sliding_window": 100}) if "window" in kind else tiny_lm(**options)
    prepare(model)
    args, group = rows(prompts, replies), len(replies) // len(prompts)

    def run() -> None:
        plan = make_plan(args[1], args[3], packing="padded" not in kind, group_size=group, token_budget=budget)
        log_probs(model, *args, plan=plan).sum().backward()

    run()  # gradients are there from now on
    return run


@pytest.mark.parametrize("kind", ["packed", "shared", "window", "window, padded"])
def test_memory_grows_with_tokens(kind: str) -> None:
    """Four times as long a row beside short ones takes four times the memory, or less; by the square it is sixteen."""
    peaks = []
    for long in (500, 2000):
        many = 1 if "padded" in kind else 16
        if kind == "shared":
            run = learning(kind, [long, 10], [4] * many)
        else:
            run = learning(kind, [long, *[10] * (many - 1)], [4] * many)
        peaks.append(peak_bytes(run, CPU))
    assert peaks[1] < 4.2 * peaks[0]


def test_a_long_prompt_beside_short_ones_fits() -> None:
    """The scores of one head alone would take 64 MB."""
    peak = peak_bytes(learning("packed", [4000, *[10] * 15], [4] * 16, budget=2048), CPU)
    assert peak < 30e6


def test_short_rows_do_not_pay_for_the_longest() -> None:
    """1024 tokens beside 15 rows of 30: the attention of each row alone does what all do together."""
    line = [1024, *[30] * 15]
    gen = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(sum(line), 2, 16, generator=gen) for _ in range(3))
    starts = cumulative(line)

    def run() -> None:
        longest = size_carrier(1024)
        where = starts, starts, longest, longest, True, 0.3, 0
        out, lse = varlen_forward(query, key, value, *where)
        varlen_backward(query, query, key, value, out, lse, *where)

    run()
    assert peak_bytes(run, CPU) < 14 * query.numel() * 4


def test_a_line_of_short_rows_is_hardly_filled_up() -> None:
    args = rows([9], [6])
    (pack,) = make_plan(args[1], args[3]).packed()
    assert pack.source.shape == (1, 16)
