"""The decode loop against transformers' generate, the softmax, and a re-score."""

from __future__ import annotations

import pytest
import torch
from fakes import ARCHS, fake_batch, tiny_lm
from torch import Tensor
from transformers import PreTrainedModel

from torchbandit.generation import Generated, Sampling, generate
from torchbandit.generation.sampling import draw, uniforms

STOPS = (*range(2, 256, 11), 258)


def prompts(num: int = 6, width: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    td = fake_batch(num, 1, prompt_width=width, seed=seed)
    return td["tokens", "prompt"], td["masks", "prompt"]


def hf_greedy(model: PreTrainedModel, ids: Tensor, mask: Tensor, T: int, stops: tuple[int, ...]) -> Tensor:
    out = model.generate(
        ids, attention_mask=mask.long(), max_new_tokens=T, do_sample=False, pad_token_id=0,
        eos_token_id=list(stops) or None,
    )[:, ids.shape[1] :]  # fmt: skip
    return torch.nn.functional.pad(out, (0, T - out.shape[1]))


def rescore(model: PreTrainedModel, ids: Tensor, mask: Tensor, out: Generated, temperature: float) -> Tensor:
    """One row at a time, no padding, plain forward, float32."""
    scores = torch.zeros_like(out.log_probs)
    for row in range(ids.shape[0]):
        prompt, response = ids[row][mask[row]], out.tokens[row][out.mask[row]]
        with torch.no_grad():
            logits = model(torch.cat((prompt, response))[None]).logits[0, len(prompt) - 1 : -1].float()
        picked = (logits / temperature).log_softmax(-1).gather(-1, response[:, None])[:, 0]
        scores[row, : len(response)] = picked
    return scores


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("arch", ARCHS)
def test_greedy_equals_transformers(arch: str) -> None:
    model, (ids, mask) = tiny_lm(arch), prompts(12)
    out = generate(model, ids, mask, Sampling(24, temperature=0), stop_ids=STOPS, pad_id=0, generator=None)
    assert torch.equal(out.tokens, hf_greedy(model, ids, mask, 24, STOPS))
    stopped = torch.isin(out.tokens, torch.tensor(STOPS)) & out.mask
    assert torch.equal(out.finished, stopped.any(-1))
    assert out.finished.any() and (~out.mask).any(), "the case must hold stopped rows"
    torch.testing.assert_close(out.log_probs, rescore(model, ids, mask, out, 1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_kept_log_probs_equal_a_rescore(arch: str) -> None:
    model, (ids, mask) = tiny_lm(arch), prompts()
    out = generate(model, ids, mask, Sampling(16, temperature=0.7), stop_ids=STOPS, pad_id=0, generator=seeded())
    torch.testing.assert_close(out.log_probs, rescore(model, ids, mask, out, 0.7), rtol=1e-4, atol=1e-4)


def test_trap_09_log_probs_are_of_the_sampled_distribution() -> None:
    """Recorded at the sampling temperature; truncation, which training refuses, leaves them those of the softmax."""
    model, (ids, mask) = tiny_lm(), prompts()
    for sampling in (Sampling(8, temperature=1.7), Sampling(8, temperature=0.5, top_k=20, top_p=0.9)):
        out = generate(model, ids, mask, sampling, stop_ids=(), pad_id=0, generator=seeded())
        mine = rescore(model, ids, mask, out, sampling.temperature)
        torch.testing.assert_close(out.log_probs, mine, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(mine, rescore(model, ids, mask, out, 1.0), atol=1e-2)


def test_trap_18_the_models_generation_config_changes_nothing() -> None:
    model, (ids, mask) = tiny_lm(), prompts()
    sample = lambda: generate(model, ids, mask, Sampling(12), stop_ids=(258,), pad_id=0, generator=seeded())
    before = sample()
    config = model.generation_config
    config.top_p, config.top_k, config.temperature, config.do_sample = 0.1, 2, 0.01, True
    config.repetition_penalty, config.max_length, config.eos_token_id, config.min_new_tokens = 5.0, 11, [1, 2, 3], 9
    for one, other in zip(before, sample(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1), Sampling(1, 0.6), Sampling(1, 1.5, top_k=5), Sampling(1, top_p=0.7), Sampling(1, 2.0, 9, 0.8)],
)
def test_sampled_frequencies_pass_a_chi_square_test(sampling: Sampling) -> None:
    n, logits = 200_000, torch.randn(12, generator=seeded(1)) * 1.5
    tokens, log_probs = draw(logits.expand(n, 12), sampling, uniforms(n, sampling, logits.device, seeded())[:, 0])
    full = (logits.double() / sampling.temperature).softmax(-1)
    torch.testing.assert_close(log_probs, full.log()[tokens].float())
    expected, mass = torch.zeros(12, dtype=torch.float64), 0.0
    ranked = full.argsort(descending=True)[: sampling.top_k or None]
    total = full[ranked].sum()
    for token in ranked:  # likeliest first, until the nucleus is full
        if mass < sampling.top_p * total:
            expected[token], mass = full[token], mass + full[token]
    expected *= n / expected.sum()
    counts, kept = tokens.bincount(minlength=12), expected > 0
    assert counts[~kept].sum() == 0
    chi_square = ((counts[kept] - expected[kept]).square() / expected[kept]).sum()
    dof = int(kept.sum()) - 1
    assert chi_square < dof + 5 * (2 * dof) ** 0.5 + 5, (chi_square, dof)


def chi_square_of_first_tokens(model: PreTrainedModel, n: int, sampling: Sampling) -> None:
    """The whole path: n siblings of one prompt, their first tokens against the model's own softmax."""
    device = model.device
    ids = torch.tensor([[3, 1, 4]], device=device).expand(n, 3)
    out = generate(
        model, ids, torch.ones_like(ids, dtype=torch.bool), sampling,
        stop_ids=(), pad_id=0, generator=torch.Generator(device).manual_seed(0), group_size=n,
    )  # fmt: skip
    with torch.no_grad():
        full = (model(ids[:1]).logits[0, -1].double() / sampling.temperature).softmax(-1)
    expected = torch.zeros_like(full)
    ranked = full.argsort(descending=True)[: sampling.top_k or None]
    before = full[ranked].cumsum(0) - full[ranked]
    ranked = ranked[before < sampling.top_p * full[ranked].sum()]
    expected[ranked] = full[ranked] / full[ranked].sum() * n
    counts, kept = out.tokens[:, 0].bincount(minlength=len(full)), expected > 0
    assert counts[~kept].sum() == 0
    chi_square = ((counts[kept] - expected[kept]).square() / expected[kept]).sum()
    dof = int(kept.sum()) - 1
    assert chi_square < dof + 5 * (2 * dof) ** 0.5 + 5, (chi_square, dof)


@pytest.mark.parametrize("sampling", [Sampling(1), Sampling(1, 0.6), Sampling(1, 1.5, top_k=5), Sampling(1, top_p=0.7)])
def test_first_tokens_are_drawn_from_the_models_softmax(sampling: Sampling) -> None:
    chi_square_of_first_tokens(tiny_lm(vocab_size=16), 4000, sampling)


def test_padding_side_and_width_change_nothing() -> None:
    model, (ids, mask) = tiny_lm("gpt2"), prompts()
    ask = Sampling(10, temperature=0)
    left = generate(model, ids, mask, ask, stop_ids=STOPS, pad_id=0, generator=None)
    flip = mask.long().argsort(dim=-1, descending=True, stable=True)
    wide = torch.nn.functional.pad
    right = generate(
        model, wide(ids.gather(1, flip), (0, 3), value=5), wide(mask.gather(1, flip), (0, 3)), ask,
        stop_ids=STOPS, pad_id=0, generator=None,
    )  # fmt: skip
    assert torch.equal(left.tokens, right.tokens)
    torch.testing.assert_close(left.log_probs, right.log_probs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHS)
def test_siblings_share_the_prefill(arch: str) -> None:
    model, (ids, mask) = tiny_lm(arch), prompts(4)
    widths: list[tuple[int, ...]] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _m, args, _o: widths.append(args[0].shape))
    rows = ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0)
    ask = Sampling(9, temperature=0.9)
    out = generate(model, *rows, ask, stop_ids=STOPS, pad_id=0, generator=seeded(), group_size=3)
    handle.remove()
    widths = [width for width in widths if width != (1, 1)]  # a first call looks at what a layer keeps
    assert widths[0] == (4, 9) and widths[1] == (12, 1) and len([w for w in widths if w[1] > 1]) == 1
    torch.testing.assert_close(out.log_probs, rescore(model, *rows, out, 0.9), rtol=1e-4, atol=1e-4)
    alone = generate(model, *rows, ask, stop_ids=STOPS, pad_id=0, generator=seeded())
    assert torch.equal(out.tokens, alone.tokens)
    assert not torch.equal(out.tokens[0], out.tokens[1]), "siblings are drawn apart"


def test_rows_after_the_stop_are_padded_and_the_generator_is_the_only_randomness() -> None:
    model, (ids, mask) = tiny_lm(), prompts(32)
    sample = lambda seed: generate(model, ids, mask, Sampling(12), stop_ids=range(80), pad_id=9, generator=seeded(seed))
    torch.manual_seed(0)
    out = sample(5)
    torch.manual_seed(1)
    again = sample(5)
    assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))
    assert not torch.equal(out.tokens, sample(6).tokens)
    assert out.tokens.shape == out.mask.shape == out.log_probs.shape == (32, 12)
    assert (out.tokens[~out.mask] == 9).all() and (out.log_probs[~out.mask] == 0).all()
    assert (out.log_probs[out.mask] < 0).all() and out.mask[:, 0].all()
    assert out.log_probs.dtype == torch.float32 and out.mask.dtype == out.finished.dtype == torch.bool


def test_dropout_is_off_and_the_mode_is_given_back() -> None:
    model, (ids, mask) = tiny_lm("gpt2").train(), prompts()
    assert model.config.resid_pdrop > 0
    ask = Sampling(6, temperature=0)
    one, two = (generate(model, ids, mask, ask, stop_ids=(), pad_id=0, generator=None) for _ in range(2))
    assert torch.equal(one.log_probs, two.log_probs) and model.training and not one.log_probs.requires_grad


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p: must be above 0"),
        ({"top_p": 1.1}, "top_p"),
        ({"places": 0}, "places"),
        ({"stop_ids": (-1,)}, "stop_ids"),
    ],
)
def test_bad_sampling_is_refused(bad: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Sampling(**bad)  # type: ignore[arg-type]


def test_bad_arguments_are_refused() -> None:
    model, (ids, mask) = tiny_lm(), prompts()

    def call(i: Tensor, m: Tensor, T: int = 4, group_size: int = 1) -> None:
        generate(model, i, m, Sampling(T), stop_ids=(), pad_id=0, generator=None, group_size=group_size)

    with pytest.raises(ValueError, match=r"prompt_ids: must be int64 \[B, P\]"):
        call(ids.int(), mask)
    with pytest.raises(ValueError, match=r"prompt_mask: must be bool \[6, 9\] on cpu, got float32"):
        call(ids, mask.float())
    with pytest.raises(ValueError, match="group_size: must be at least 1 and divide the 6 rows, got 4"):
        call(ids, mask, group_size=4)
    with pytest.raises(ValueError, match="exceed the model's context of 256"):
        call(ids, mask, T=249)
