"""Scoring through CUDA's own kernels, against float32 one row at a time; skipped, aloud, where there is no CUDA."""

from __future__ import annotations

import naive
import pytest
import torch
from fakes import ARCHS, fake_batch, tiny_lm, tiny_reward_model
from test_scoring import LAYOUTS, layout
from test_scoring_routes import PACKED, build
from torch import Tensor

from torchbandit.scoring import last_layer, log_probs, make_plan, sequence_scores
from torchbandit.scoring.packs import size_carrier
from torchbandit.scoring.routes import route_of
from torchbandit.scoring.varlen import shared_backward, shared_forward, varlen_backward, varlen_forward

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: the flash kernels run there")
# A head size the kernels take; hidden 64 over 4 heads.
WIDE = {"hidden_size": 64, "intermediate_size": 128}


def on(args: naive.Args, device: str) -> naive.Args:
    return tuple(x.to(device) for x in args)  # type: ignore[return-value]


def wide(arch: str) -> dict[str, int]:
    return {"n_embd": 64} if arch == "gpt2" else WIDE


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_bf16_log_probs_and_gradients(arch: str, compile: bool) -> None:
    """Every layout; compiled, by one model, so that what layouts have in common is compiled once."""
    torch._dynamo.reset()
    args = naive.tensors(fake_batch(num_prompts=6, group_size=4, prompt_width=40, response_width=30))
    exact = tiny_lm(arch, **wide(arch)).bfloat16().float()
    want, _ = naive.log_probs(exact, args)
    want.sum().backward()
    wants = naive.gradients(exact)
    model = tiny_lm(arch, **wide(arch)).bfloat16().cuda()
    model.torchbandit_compile = compile
    cuda = on(args, "cuda")
    for kind in LAYOUTS:
        got = log_probs(model, *cuda, plan=layout(kind, cuda, group_size=4, token_budget=600))
        got.sum().backward()
        torch.testing.assert_close(got.cpu(), want, atol=0.15, rtol=0.05, msg=lambda m, k=kind: f"{k}: {m}")
        assert (got.cpu() - want).abs().mean() < 0.02, kind
        for name, grad in naive.gradients(model).items():
            distance = (grad.float().cpu() - wants[name]).norm() / (wants[name].norm() + 1e-6)
            assert distance < 0.1, f"{kind}, {name}: {float(distance):.3f}"


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("arch", ARCHS)
def test_bf16_scores(arch: str, kind: str) -> None:
    args = naive.tensors(fake_batch(num_prompts=6, group_size=4, prompt_width=40, response_width=30, empty_rows=2))
    want = naive.scores(tiny_reward_model(arch, **wide(arch)).bfloat16().float(), args)
    model = tiny_reward_model(arch, **wide(arch)).bfloat16().cuda()
    model.torchbandit_compile = False
    cuda = on(args, "cuda")
    got = sequence_scores(model, *cuda, plan=layout(kind, cuda, group_size=4, token_budget=600))
    torch.testing.assert_close(got.cpu(), want, atol=0.1, rtol=0.05, equal_nan=True)


@pytest.mark.parametrize("compile", [False, True])
def test_bf16_without_gradient(compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer on the tokens that are read, eager and compiled."""
    torch._dynamo.reset()
    monkeypatch.setattr(last_layer, "WORTH_BELOW", 1.1)
    args = naive.tensors(fake_batch(num_prompts=6, group_size=4, prompt_width=40, response_width=30, empty_rows=2))
    want = naive.scores(tiny_reward_model(**WIDE).bfloat16().float(), args)
    want_logps, _ = naive.log_probs(tiny_lm(**WIDE).bfloat16().float(), args)
    rm, lm = tiny_reward_model(**WIDE).bfloat16().cuda(), tiny_lm(**WIDE).bfloat16().cuda()
    rm.torchbandit_compile = lm.torchbandit_compile = compile
    assert route_of(rm).trims and route_of(lm).trims
    cuda = on(args, "cuda")
    for kind in ("packed", "shared"):
        plan = layout(kind, cuda, group_size=4, token_budget=600)
        with torch.no_grad():
            scores, logps = sequence_scores(rm, *cuda, plan=plan), log_probs(lm, *cuda, plan=plan)
        torch.testing.assert_close(scores.cpu(), want, atol=0.1, rtol=0.05, equal_nan=True)
        torch.testing.assert_close(logps.cpu(), want_logps, atol=0.15, rtol=0.05)


@pytest.mark.parametrize("kind", list(PACKED))
def test_bf16_architectures(kind: str) -> None:
    args = naive.tensors(fake_batch())
    exact = build(kind, PACKED[kind]).bfloat16().float()
    want, _ = naive.log_probs(exact, args)
    model = build(kind, PACKED[kind]).bfloat16().cuda()
    model.torchbandit_compile = False
    cuda = on(args, "cuda")
    for name in LAYOUTS:
        got = log_probs(model, *cuda, plan=layout(name, cuda))
        torch.testing.assert_close(got.cpu(), want, atol=0.15, rtol=0.05)


@pytest.mark.parametrize(("causal", "window"), [(True, 0), (True, 7), (False, 0)])
def test_the_kernels_are_the_fallbacks_mathematics(causal: bool, window: int) -> None:
    gen = torch.Generator().manual_seed(0)
    lengths_q, lengths_k = torch.tensor([5, 130, 1, 64]), torch.tensor([5, 130, 1, 64] if causal else [3, 0, 200, 9])

    def draw(lengths: Tensor, heads: int) -> Tensor:
        return torch.randn(int(lengths.sum()), heads, 32, generator=gen).bfloat16()

    q, grad, k, v = draw(lengths_q, 4), draw(lengths_q, 4), draw(lengths_k, 2), draw(lengths_k, 2)
    starts = [torch.nn.functional.pad(n.cumsum(0), (1, 0)).int() for n in (lengths_q, lengths_k)]
    longest = [size_carrier(int(n.max())) for n in (lengths_q, lengths_k)]

    def both(device: str, dtype: torch.dtype) -> list[Tensor]:
        move = [x.to(device, dtype) for x in (q, k, v, grad)]
        ends = [x.to(device) for x in starts]
        out, lse = varlen_forward(*move[:3], *ends, *longest, causal, 0.2, window)
        back = varlen_backward(move[3], *move[:3], out, lse, *ends, *longest, causal, 0.2, window)
        return [x.float().cpu() for x in (out, lse, *back)]

    for name, ours, want in zip(
        ("out", "lse", "dq", "dk", "dv"), both("cuda", torch.bfloat16), both("cpu", torch.float32), strict=True
    ):
        torch.testing.assert_close(ours, want, atol=0.03, rtol=0.03, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("size", [32, 128])
def test_shared_prompts_by_our_kernels_and_by_torchs(size: int) -> None:
    """Heads of 32 go through ours, of 128 through two passes of torch's."""
    prompts, replies = [40, 3, 70], [5, 33, 0, 64, 1, 20]
    gen = torch.Generator().manual_seed(0)
    lengths = [*prompts, *replies, -sum(prompts + replies) % 64]
    starts, starts_q, starts_k = (
        torch.tensor([0, *n]).cumsum(0).int() for n in (lengths, [38, 64, 21], prompts)
    )  # fmt: skip
    grad, query, key, value = (
        torch.randn(sum(lengths), heads, size, generator=gen).bfloat16() for heads in (4, 4, 2, 2)
    )
    numbers = [size_carrier(n) for n in (70, sum(prompts), sum(replies), 64, 70)]

    def both(device: str, dtype: torch.dtype) -> list[Tensor]:
        move = [x.to(device, dtype) for x in (grad, query, key, value)]
        bounds = [x.to(device) for x in (starts, starts_q, starts_k)]
        line = bounds[0], *numbers[:3], *bounds[1:], *numbers[3:], 0.2
        out, lse = shared_forward(*move[1:], *line)
        return [x.float().cpu() for x in (out, lse, *shared_backward(*move, out, lse, *line))]

    for name, ours, want in zip(
        ("out", "lse", "dq", "dk", "dv"), both("cuda", torch.bfloat16), both("cpu", torch.float32), strict=True
    ):
        torch.testing.assert_close(ours, want, atol=0.05, rtol=0.03, msg=lambda m, n=name: f"{n}: {m}")


def test_no_sync_beyond_the_lengths() -> None:
    """G1 on a device: everything after the plan runs under sync debug mode "error"."""
    args = on(naive.tensors(fake_batch(num_prompts=6, group_size=4)), "cuda")
    lm, rm = tiny_lm(**WIDE).bfloat16().cuda(), tiny_reward_model(**WIDE).bfloat16().cuda()
    for model in (lm, rm):
        model.torchbandit_compile = False
    for share in (True, False):
        plan = make_plan(args[1], args[3], group_size=4, share_prompts=share)
        free = make_plan(args[1], args[3], packing=False)
        for first in (True, False):
            torch.cuda.set_sync_debug_mode("default" if first else "error")
            try:
                for p in (plan, free):
                    p._packs.clear()
                    log_probs(lm, *args, plan=p, temperature=0.7).sum().backward()
                    with torch.no_grad():
                        sequence_scores(rm, *args, plan=p)
                if not first:
                    make_plan(args[1], args[3], packing=False)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_peak_of_log_probs_is_bounded_by_the_chunk() -> None:
    """[B, T, V] would be 4.2 GB in float32; a chunk is one."""
    model = tiny_lm(vocab_size=128256, **WIDE).bfloat16().cuda()
    model.torchbandit_compile = False
    args = on(naive.tensors(fake_batch(num_prompts=32, response_width=512)), "cuda")
    args = (args[0], args[1], args[2], torch.ones_like(args[3]))
    with torch.no_grad():
        log_probs(model, *args)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        log_probs(model, *args)
    assert (torch.cuda.max_memory_allocated() - before) / 1e9 < 3.0
