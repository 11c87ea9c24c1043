"""Compiled layers: the same numbers, one graph for all layers and packs, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import naive
import pytest
import torch
from fakes import ARCHS, fake_batch, tiny_lm, tiny_reward_model
from test_scoring import LAYOUTS, TOL, layout
from test_scoring_routes import PACKED, build
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from torchbandit.scoring import compiled, log_probs, sequence_scores
from torchbandit.scoring.forward import hidden_states


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compiled, "backend", count)
    yield count
    torch._dynamo.reset()


def wanting(model: PreTrainedModel) -> PreTrainedModel:
    model.torchbandit_compile = True
    return model


@pytest.mark.parametrize("arch", [*ARCHS, "OPT", "Mistral", "Qwen3", "Gemma"])
def test_compiled_equals_naive(arch: str, counter: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every architecture in every layout, gradients too; by one model, so that layouts share what they can."""
    if arch != "llama":  # the compiler's front alone, which is where architectures differ
        counter = CompileCounterWithBackend("eager")
        monkeypatch.setattr(compiled, "backend", counter)
    model, args = wanting(tiny_lm(arch) if arch in ARCHS else build(arch, PACKED[arch])), naive.tensors(fake_batch())
    heat = torch.linspace(0.5, 1.5, 8)
    want, _ = naive.log_probs(model, args, heat)
    want.sum().backward()
    want_grads = naive.gradients(model)
    for kind in LAYOUTS:
        graphs = counter.frame_count
        got = log_probs(model, *args, temperature=heat, plan=layout(kind, args))
        new = kind != "sorted" and (arch, kind) != ("Mistral", "shared")  # padded lines; behind a window, unshared
        assert (counter.frame_count > graphs) == new, kind
        got.sum().backward()
        torch.testing.assert_close(got, want, **TOL, msg=lambda m, k=kind: f"{k}: {m}")
        for name, grad in naive.gradients(model).items():
            torch.testing.assert_close(grad, want_grads[name], atol=2e-4, rtol=1e-3, msg=lambda m, k=kind: f"{k}: {m}")
    assert all(layer._compiled_call_impl is None for layer in model.modules())


@pytest.mark.parametrize("kind", ["packed", "shared"])
def test_no_recompilation_in_steady_state(kind: str, counter: CompileCounterWithBackend) -> None:
    """Other batches, other lengths, other longest rows: the graphs of the first step serve them all."""
    counters.clear()
    lm, rm = wanting(tiny_lm()), wanting(tiny_reward_model(hidden_size=64))

    def step(seed: int, **sizes: int) -> None:
        args = naive.tensors(fake_batch(seed=seed, **sizes))
        plan = layout(kind, args, token_budget=150)
        log_probs(lm, *args, plan=plan).sum().backward()
        with torch.no_grad():
            log_probs(lm, *args, plan=plan)
            sequence_scores(rm, *args, plan=plan)

    step(0)
    first = counters["stats"]["unique_graphs"]
    with_gradient = ["layer", "norm", "reduction"]
    without = [*with_gradient, "last layer"]
    assert first == len(with_gradient + without + ["layer of the reward model", "its last layer", "its norm"])
    for seed, (width, reply, number) in enumerate([(30, 5, 4), (9, 40, 3), (64, 64, 7)], start=1):
        step(seed, prompt_width=width, response_width=reply, num_prompts=number)
    assert counters["stats"]["unique_graphs"] == first


def test_a_plain_longest_length_would_recompile(counter: CompileCounterWithBackend) -> None:
    """The wrong variant that size carriers avoid is told apart by the counter: a static shape compiles anew."""
    double = torch.compile(lambda x: x * 2, dynamic=False, backend=counter)
    for n in (3, 4, 5):
        double(torch.ones(n))
    assert counter.frame_count == 3


def test_off_by_default_on_cpu_and_by_request(counter: CompileCounterWithBackend) -> None:
    args = naive.tensors(fake_batch())
    plain, refused = tiny_lm(), tiny_lm()
    refused.torchbandit_compile = False
    for model in (plain, refused):
        log_probs(model, *args)
    assert counter.frame_count == 0


def test_generation_does_not_meet_compiled_layers(counter: CompileCounterWithBackend) -> None:
    model, args = wanting(tiny_lm()), naive.tensors(fake_batch())
    log_probs(model, *args)
    count = counter.frame_count
    with torch.no_grad():
        model(args[0], attention_mask=args[1].long())
    assert counter.frame_count == count and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["packed", "shared"])
def test_pointwise_results_are_computed_again_in_backward(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept a layer and token: what matrix products and attention gave, and no norm, rotation or silu * mul of it."""
    import torch._functorch.config as autograd_config

    args = naive.tensors(fake_batch())
    monkeypatch.setattr(compiled, "backend", "aot_eager_decomp_partition")

    def kept(usual: bool) -> float:
        torch._dynamo.reset()
        if usual:
            keeping = {"ban_recompute_materialized_backward": True}
            patch = SimpleNamespace(patch=lambda **_: autograd_config.patch(**keeping))
            monkeypatch.setattr(compiled, "_autograd_config", patch)
        model = wanting(tiny_lm(intermediate_size=128))
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            if x.untyped_storage().data_ptr() not in weights:
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            part = next(iter(hidden_states(model, torch.cat((args[0], args[2]), 1), layout(kind, args))))
            part.hidden.sum()
        return sum(sizes.values()) / (part.hidden.numel() * 4 * model.config.num_hidden_layers)

    ours, compilers_own = kept(usual=False), kept(usual=True)
    assert ours < 15.5 < 19 < compilers_own
    torch._dynamo.reset()
