"""Generation on CUDA: recorded steps, the kernels within them, and no wait of the host for a token."""

from __future__ import annotations

import warnings

import pytest
import torch
from fakes import ARCHS, tiny_lm
from test_generation import STOPS, chi_square_of_first_tokens, hf_greedy, prompts, rescore
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedModel

import torchbandit.generation as generation
from torchbandit.generation import Generated, Sampling, fuse, generate, release, step
from torchbandit.generation.cache import layer_shapes

if torch.cuda.is_available():
    from torchbandit.generation import gated_kernel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: recorded steps and Triton kernels")
MANY_STOPS = tuple(range(0, 259, 7))


def cuda_case(arch: str = "llama", rows: int = 20) -> tuple[PreTrainedModel, Tensor, Tensor]:
    torch.backends.cuda.matmul.allow_tf32 = False
    ids, mask = prompts(rows)
    return tiny_lm(arch).cuda(), ids.cuda(), mask.cuda()


def call(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    sampling: Sampling,
    stops: tuple[int, ...] = MANY_STOPS,
    **how: int,
) -> Generated:
    gen = torch.Generator("cuda").manual_seed(how.pop("seed", 0))
    return generate(model, ids, mask, sampling, stop_ids=stops, pad_id=0, generator=gen, **how)


@pytest.mark.parametrize("places", [None, 9])
@pytest.mark.parametrize("arch", ARCHS)
def test_greedy_equals_transformers(arch: str, places: int | None) -> None:
    model, ids, mask = cuda_case(arch)
    out = call(model, ids, mask, Sampling(40, 0, places=places), STOPS)
    assert torch.equal(out.tokens, hf_greedy(model, ids, mask, 40, STOPS))
    torch.testing.assert_close(out.log_probs, rescore(model, ids, mask, out, 1.0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("arch", ARCHS)
def test_kept_log_probs_equal_a_rescore(arch: str) -> None:
    model, ids, mask = cuda_case(arch, 60)
    for ask in (Sampling(40, 0.8), Sampling(40, 0.8, places=16), Sampling(40, 1.4, top_k=20, top_p=0.9)):
        out = call(model, ids, mask, ask)
        assert out.finished.any() and (~out.mask).any()
        mine = rescore(model, ids, mask, out, ask.temperature)
        torch.testing.assert_close(out.log_probs, mine, rtol=1e-3, atol=1e-3)
        again = call(model, ids, mask, ask)
        assert torch.equal(out.tokens, again.tokens) and torch.equal(out.log_probs, again.log_probs)
        assert not torch.equal(out.tokens, call(model, ids, mask, ask, seed=1).tokens)


def test_the_batch_shrinks_to_smaller_graphs_and_freed_places_are_taken() -> None:
    model, ids, mask = cuda_case(rows=90)
    call(model, ids, mask, Sampling(80, places=32), tuple(range(0, 259, 20)))  # of which some run long
    steps = generation._engines[model].steps
    assert steps == sorted(steps, reverse=True) and steps[0] == 32 and steps[-1] == 8


@pytest.mark.parametrize("sampling", [Sampling(1), Sampling(1, 0.6), Sampling(1, 1.5, top_k=5), Sampling(1, top_p=0.7)])
def test_sampled_frequencies_pass_a_chi_square_test(sampling: Sampling) -> None:
    chi_square_of_first_tokens(tiny_lm(vocab_size=16).cuda(), 40_000, sampling)


def test_training_reaches_the_recorded_step_without_recording_anew() -> None:
    model, ids, mask = cuda_case()
    call(model, ids, mask, Sampling(12), ())
    stepper = generation._engines[model].stepper
    spent, graphs = stepper.record_s, dict(stepper._graphs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(ids).logits.logsumexp(-1).mean().backward()
    optimizer.step()
    out = call(model, ids, mask, Sampling(12), ())
    assert stepper.record_s == spent and stepper._graphs == graphs
    torch.testing.assert_close(out.log_probs, rescore(model, ids, mask, out, 1.0), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.data = weight.data * 1.1  # other addresses
    out = call(model, ids, mask, Sampling(12), ())
    assert stepper.record_s > spent
    torch.testing.assert_close(out.log_probs, rescore(model, ids, mask, out, 1.0), rtol=1e-3, atol=1e-3)


def test_no_wait_for_the_device_in_a_token() -> None:
    model, ids, mask = cuda_case()
    call(model, ids, mask, Sampling(30), ())
    stepper = generation._engines[model].stepper
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            for _ in range(3):
                stepper(model, len(ids), 30, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_host_looks_every_eighth_token_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, mask = cuda_case(rows=40)
    ask = Sampling(80, places=16)
    call(model, ids, mask, ask)
    waits, honest = [], torch.cuda.Event.synchronize
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: (waits.append(event), honest(event)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call(model, ids, mask, ask)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    steps = len(generation._engines[model].steps)
    assert 0 < len(waits) <= steps / 8, (len(waits), steps)
    told = [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
    assert len(told) <= 1, told  # the lengths of the prompts


def test_release_frees_the_cache() -> None:
    model, ids, mask = cuda_case()
    call(model, ids, mask, Sampling(8), ())  # what the libraries keep for each stream is there from now on
    release(model)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    call(model, ids, mask, Sampling(200), ())
    assert torch.cuda.memory_allocated() - before > 20 * 200 * 2 * 2 * 16 * 4
    release(model)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() - before < 100_000


@pytest.mark.parametrize("arch", ARCHS)
def test_fast_ways_say_what_the_plain_compiled_step_says(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()  # the compiler keeps a few versions of a layer, and each way is one
    model, ids, mask = cuda_case(arch, 40)
    outs = []
    for fast in ((), *((way,) for way in sorted(step.FAST)), tuple(step.FAST)):
        monkeypatch.setattr(step, "FAST", frozenset(fast))
        release(model)
        outs.append(call(model, ids, mask, Sampling(40, 0), STOPS))
        assert generation._engines[model].stepper.fast == frozenset(fast), "it fell back"
    for out in outs[1:]:
        assert torch.equal(out.tokens, outs[0].tokens)
        torch.testing.assert_close(out.log_probs, outs[0].log_probs, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs Hopper: the gated kernel"
)
def test_large_batches_go_through_the_gated_kernel_and_small_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, mask = cuda_case("llama", 640)
    model = model.bfloat16()
    used: list[int] = []
    kernel = gated_kernel.gated_product
    monkeypatch.setattr(gated_kernel, "gated_product", lambda x, w: (used.append(len(x)), kernel(x, w))[1])
    out = call(model, ids, mask, Sampling(16), STOPS)
    assert set(used) <= {640, 512} and len(used) % 2 == 0 and used, used
    gap = ((out.log_probs - rescore(model, ids, mask, out, 1.0)) * out.mask).abs()
    assert gap.sum() / out.mask.sum() < 0.05
    used.clear()
    call(model, ids[:300], mask[:300], Sampling(4), STOPS)
    assert not used


def test_a_fast_way_that_fails_is_left_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, mask = cuda_case()
    good = call(model, ids, mask, Sampling(20, 0), STOPS)
    release(model)
    torch._dynamo.reset()  # or the layer as it was compiled would do

    def broken(*_: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(fuse.Part, "forward", broken)
    with pytest.warns(UserWarning, match="without combos, gates, layers, products, sums"):
        out = call(model, ids, mask, Sampling(20, 0), STOPS)
    assert torch.equal(out.tokens, good.tokens)


def test_fewer_places_than_rows_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, mask = cuda_case(rows=40)
    whole = call(model, ids, mask, Sampling(40))
    release(model)
    one = generation.bytes_per_place(layer_shapes(model, 64), 64)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _d: (20 * one, 10**12))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda d: torch.cuda.memory_allocated(d))
    with pytest.warns(UserWarning, match="15 run at a time"):
        out = call(model, ids, mask, Sampling(40))
    assert max(generation._engines[model].steps) == 15
    torch.testing.assert_close(out.log_probs, rescore(model, ids, mask, out, 1.0), rtol=1e-3, atol=1e-3)
    assert torch.equal(out.tokens, whole.tokens)


def test_what_the_fast_path_cannot_take_falls_back() -> None:
    """The reason is found before anything is compiled."""
    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=259,
        intermediate_size=64, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids, mask = (x.cuda() for x in prompts(12))
    with pytest.warns(UserWarning, match="plain loop: Gemma2Attention uses softcap"):
        out = call(model, ids, mask, Sampling(20, 0.8))
    torch.testing.assert_close(out.log_probs, rescore(model, ids, mask, out, 0.8), rtol=1e-3, atol=1e-3)
