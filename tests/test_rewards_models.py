"""Reward models and the KL to a reference: scores against one row at a time, options, traps, lazy loading."""

from __future__ import annotations

import math

import naive
import pytest
import torch
from fakes import ARCHS, byte_tokenizer, fake_batch, tiny_lm, tiny_reward_model
from tensordict import TensorDict
from torch.testing import assert_close

from torchbandit import scoring
from torchbandit.responses import stop_mask
from torchbandit.rewards import KLPenalty, RewardModel, RewardPipeline, RewardTerm
from torchbandit.testing import no_host_copy

TOKENIZER = byte_tokenizer()


def sampled(seed=0, empty_rows=1, **options):
    """A batch with the log-probs of some policy."""
    td = fake_batch(empty_rows=empty_rows, seed=seed, **options)
    noise = torch.randn(td["masks", "response"].shape, generator=torch.Generator().manual_seed(seed))
    td["log_probs", "response"] = (-5 + noise) * td["masks", "response"]
    return td


@pytest.fixture
def folder(tmp_path):
    def save(model, tokenizer=TOKENIZER):
        path = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return save


@pytest.mark.parametrize("arch", ARCHS)
def test_score_is_that_of_each_row_alone(arch):
    td, model = fake_batch(empty_rows=1), tiny_reward_model(arch)
    scores = RewardModel(model).score(td)
    assert scores.shape == (8,) and scores.dtype == torch.float32 and not scores.requires_grad
    assert_close(scores, naive.scores(model, naive.tensors(td)).detach(), equal_nan=True, rtol=1e-4, atol=1e-4)
    assert scores[7].isnan() and not scores[:7].isnan().any()


def test_ensembles_by_mean_and_min():
    td, members = fake_batch(empty_rows=1), [tiny_reward_model(seed=seed) for seed in (1, 2, 3)]
    apart = torch.stack([naive.scores(m, naive.tensors(td)).detach() for m in members])
    assert_close(RewardModel(members).score(td), apart.mean(0), equal_nan=True, rtol=1e-4, atol=1e-4)
    least = RewardModel(members, ensemble="min").score(td)
    assert_close(least, apart.amin(0), equal_nan=True, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="ensemble"):
        RewardModel(members, ensemble="median")
    with pytest.raises(ValueError, match="at least one model"):
        RewardModel([])


def test_models_named_by_path_load_at_first_use(folder):
    model = tiny_reward_model()
    term = RewardModel(folder(model))
    pipeline = RewardPipeline(term, tokenizer=TOKENIZER)
    assert pipeline.models() == []
    td = fake_batch()
    out = pipeline(td)
    assert len(pipeline.models()) == 1
    assert_close(out["reward"].flatten(), RewardModel(model).score(td))
    loaded = term.models()[0]
    pipeline(td)
    assert term.models()[0] is loaded
    assert not any(p.requires_grad for p in loaded.parameters())


def test_live_models_are_used_as_they_are():
    model = tiny_reward_model()
    term = RewardModel(model)
    RewardPipeline(term, tokenizer=TOKENIZER)(fake_batch())
    assert term.models()[0] is model


def test_another_tokenizer_is_refused_at_build(folder):
    """Trap 5 for terms: foreign ids are never scored."""
    other = byte_tokenizer()
    other.add_tokens(["<other>"])
    for term in (RewardModel(folder(tiny_reward_model(), other)), KLPenalty(folder(tiny_lm(), other))):
        with pytest.raises(ValueError, match=f'reward term "{term.name}".*tokenizer'):
            RewardPipeline(term, tokenizer=TOKENIZER)


def test_two_labels_are_refused(folder):
    term = RewardModel(folder(_two_labels()))
    with pytest.raises(ValueError, match="exactly one label"):
        term.score(fake_batch())


def _two_labels():
    from transformers import AutoModelForSequenceClassification

    config = tiny_reward_model().config
    config.num_labels = 2
    return AutoModelForSequenceClassification.from_config(config)


def test_ids_that_a_model_cannot_embed_make_a_row_unscorable():
    """On a GPU an index past the embeddings ends the process, so it must not come to that, even on a first step."""
    td = sampled(empty_rows=0)
    td["tokens", "response"][2, 0] = 200
    td["tokens", "response"][3, 0] = 5000
    small = tiny_reward_model(vocab_size=200)
    td["tokens", "response"].clamp_(max=5000)
    known = (td["tokens", "prompt"] < 200).all(-1) & ((td["tokens", "response"] < 200) | ~td["masks", "response"]).all(
        -1
    )
    out = RewardPipeline(RewardModel(small))(td)
    assert out["unscorable"].tolist() == (~known).tolist()
    assert out["unscorable"][2] and out["unscorable"][3]


def test_trap_08_the_score_is_read_on_the_stop_token_and_lands_on_it():
    """The stop token is a custom one, not eos; it is scored, and nothing lands one slot past it."""
    td, model = sampled(empty_rows=0), tiny_reward_model()
    td["tokens", "response"][0] = torch.tensor([5, 6, 99, 7, 8, 9, 10])
    mask = td["masks", "response"]
    mask[0] = stop_mask(td["tokens", "response"][:1], [99])[0]
    td["finished"] = torch.ones(8, dtype=torch.bool)
    with_stop = naive.scores(model, naive.tensors(td))[0]
    shorter = td.clone()
    shorter["masks", "response"][0, 2] = False
    without = naive.scores(model, naive.tensors(shorter))[0]
    assert abs(with_stop - without) > 1e-2
    out = RewardPipeline([RewardModel(model), RewardTerm(lambda td: torch.zeros(8, 7), "zero")], tokenizer=TOKENIZER)(
        td
    )
    expected = torch.zeros(7)
    expected[2] = with_stop.item()
    assert_close(out["token_reward"][0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_trap_15_reward_models_and_references_run_without_dropout(arch):
    """A live model handed over in training mode scores as it does in evaluation mode."""
    drop = {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5} if arch == "gpt2" else {"attention_dropout": 0.5}
    td = sampled()
    still = RewardModel(tiny_reward_model(arch)).score(td)
    assert_close(RewardModel(tiny_reward_model(arch, **drop).train()).score(td), still, equal_nan=True)
    still = KLPenalty(tiny_lm(arch)).log_probs(td)
    assert_close(KLPenalty(tiny_lm(arch, **drop).train()).log_probs(td), still)


def test_trap_15_what_stands_after_the_stop_changes_nothing():
    td = sampled()
    junk = td.clone()
    mask = td["masks", "response"]
    junk["tokens", "response"][~mask] = 77
    junk["log_probs", "response"][~mask] = math.nan
    pipeline = RewardPipeline([RewardModel(tiny_reward_model()), KLPenalty(tiny_lm())], tokenizer=TOKENIZER)
    straight, other = pipeline(td), pipeline(junk)
    assert_close(other["token_reward"], straight["token_reward"])
    assert_close(other["reward_terms"].to_dict(), straight["reward_terms"].to_dict(), equal_nan=True)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("heat", [None, 0.7])
def test_trap_16_the_reference_scores_the_sampled_ids(arch, heat):
    """Token by token, on the ids that were drawn and at their temperature; it does not continue the text."""
    td, reference = sampled(), tiny_lm(arch)
    if heat is not None:
        td["temperature"] = torch.full((8,), heat)
    expected = naive.log_probs(reference, naive.tensors(td), heat or 1.0)[0].detach()
    term = KLPenalty(reference)
    found = term.log_probs(td)
    assert found.dtype == torch.float32 and not found.requires_grad
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    out = RewardPipeline(term)(td)
    assert_close(out["ref_log_probs", "response"], expected, rtol=1e-4, atol=1e-4)
    changed = td.clone()
    changed["tokens", "response"][0, 0] = (td["tokens", "response"][0, 0] + 1) % 200
    assert (term.log_probs(changed) - found)[0].abs().max() > 1e-2


def test_temperature_may_differ_by_row_and_greedy_counts_as_one():
    td, reference = sampled(empty_rows=0), tiny_lm()
    td["temperature"] = torch.tensor([0.0, 1.0, 0.5, 2.0] * 2)
    expected = naive.log_probs(reference, naive.tensors(td), torch.tensor([1.0, 1.0, 0.5, 2.0] * 2))[0].detach()
    assert_close(KLPenalty(reference).log_probs(td), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("per_token", [True, False])
def test_kl_is_in_nats_and_its_penalty_is_minus_coef_times_it(estimator, per_token):
    td, reference = sampled(), tiny_lm()
    out = RewardPipeline(
        [KLPenalty(reference, 0.3, estimator, per_token), RewardTerm(lambda td: torch.ones(8), "one")]
    )(td)
    ratio = (td["log_probs", "response"] - naive.log_probs(reference, naive.tensors(td))[0].detach()).double()
    kl = {"k1": ratio, "k2": ratio.square() / 2, "k3": torch.exp(-ratio) - 1 + ratio}[estimator].float()
    mask = td["masks", "response"]
    kl = kl * mask
    assert_close(out["reward_terms", "kl"], kl.sum(-1), rtol=1e-4, atol=1e-4)
    assert_close(out["reward"].flatten()[:7], 1 - 0.3 * kl.sum(-1)[:7], rtol=1e-4, atol=1e-4)
    if not per_token:
        assert "token_reward" not in out.keys()
        return
    expected = -0.3 * kl
    for row in range(7):
        expected[row, int(mask[row].sum()) - 1] += 1
    assert_close(out["token_reward"][:7], expected[:7], rtol=1e-4, atol=1e-4)


def test_coef_zero_only_records():
    td = sampled(empty_rows=0)
    with_kl = RewardPipeline([KLPenalty(tiny_lm(), coef=0), lambda td: torch.ones(8)])(td)
    assert (with_kl["reward"] == 1).all()
    assert (with_kl["reward_terms", "kl"] != 0).all()
    assert ("ref_log_probs", "response") in with_kl.keys(True)


def test_kl_needs_log_probs():
    with pytest.raises(
        ValueError, match=r'\("log_probs","response"\): must be float32 \[8, 7\] on cpu, got no such key'
    ):
        RewardPipeline(KLPenalty(tiny_lm()))(fake_batch())


def test_kl_options_without_meaning_are_refused():
    for options, message in (
        ({"coef": -0.1}, "coef"),
        ({"estimator": "k4"}, "estimator"),
        ({"target": 0.0}, "target"),
        ({"target": 6.0, "coef": 0.0}, "coef"),
    ):
        with pytest.raises(ValueError, match=message):
            KLPenalty("folder", **options)
    with pytest.raises(ValueError, match="at most one KLPenalty"):
        RewardPipeline([KLPenalty(tiny_lm()), KLPenalty(tiny_lm(), name="other")])


def test_nan_log_probs_make_a_row_unscorable():
    td = sampled(empty_rows=0)
    td["log_probs", "response"][2, 0] = math.nan
    out = RewardPipeline([KLPenalty(tiny_lm()), RewardModel(tiny_reward_model(), normalize="batch")])(td)
    assert out["unscorable"].tolist() == [row == 2 for row in range(8)]
    assert_close(out["reward"].isnan().flatten(), out["unscorable"])


def test_adaptive_coefficient():
    """Ziegler et al. 2019, section 2.2: the relative error, clipped to 0.2; a step pays the old price."""
    td, reference = sampled(), tiny_lm()
    kl = RewardPipeline(KLPenalty(reference))(td)["reward_terms", "kl"][:7]
    mean = kl.double().mean().item()
    assert mean > 0
    for target in (mean * 0.5, mean * 0.95, mean * 1.1, mean * 4):
        pipeline = RewardPipeline(KLPenalty(reference, coef=0.2, target=target, horizon=100))
        coef = 0.2
        for _ in range(3):
            out = pipeline(td)
            assert_close(out["reward"].flatten()[:7], -coef * kl, rtol=1e-4, atol=1e-4)
            coef *= 1 + min(max(mean / target - 1, -0.2), 0.2) * 7 / 100  # 7 rows have a KL
        assert_close(pipeline.kl_coef, torch.tensor(coef), rtol=1e-5, atol=0)
        again = RewardPipeline(KLPenalty(reference, coef=0.2, target=target, horizon=100))
        again.load_state_dict(pipeline.state_dict())
        assert torch.equal(again(td)["reward"][:7], pipeline(td)["reward"][:7])
    assert RewardPipeline(KLPenalty(reference, coef=0.2)).kl_coef == 0.2


def test_adaptive_coefficient_of_two_ranks():
    td, reference = sampled(empty_rows=0), tiny_lm()
    whole = RewardPipeline(KLPenalty(reference, coef=0.2, target=10.0, horizon=100))
    whole(td)
    both = TensorDict.cat([td, td])
    twice = RewardPipeline(KLPenalty(reference, coef=0.2, target=10.0, horizon=100))
    twice(both)
    sharded = RewardPipeline(KLPenalty(reference, coef=0.2, target=10.0, horizon=100))
    sharded.shard(lambda x: 2 * x)  # the other rank had the same batch
    sharded(td)
    assert_close(sharded.kl_coef, twice.kl_coef)
    assert whole.kl_coef != twice.kl_coef


def test_the_plan_is_made_at_most_once_and_only_for_models():
    td, made = sampled(), []

    def plan_fn():
        made.append(1)
        return scoring.make_plan(td["masks", "prompt"], td["masks", "response"], group_size=2)

    RewardPipeline(lambda td: torch.zeros(8))(td, plan_fn)
    assert not made
    terms = [RewardModel(tiny_reward_model()), KLPenalty(tiny_lm())]
    planned = RewardPipeline(terms)(td, plan_fn)
    assert len(made) == 1
    assert_close(planned["token_reward"], RewardPipeline(terms)(td)["token_reward"], rtol=1e-4, atol=1e-4)


def test_terms_are_freed_with_their_last_reference():
    """No cycle keeps a model's weights on the device until some garbage collection."""
    import gc
    import weakref

    gc.collect()
    gc.disable()
    try:
        term = RewardModel(tiny_reward_model())
        kl = KLPenalty(tiny_lm())
        ends = [weakref.ref(term), weakref.ref(kl)]
        del term, kl
        assert [end() for end in ends] == [None, None]
    finally:
        gc.enable()


def everything(device="cpu"):
    """Every device term and option at once."""
    models = [tiny_reward_model(seed=seed).to(device) for seed in (1, 2)]
    return RewardPipeline(
        [
            RewardModel(models, ensemble="min", normalize="running", clip=5.0, missing_eos_penalty=1.0),
            RewardTerm(lambda td: td["masks", "response"].sum(-1).float(), "length", normalize="batch"),
            RewardTerm(
                lambda td: td["masks", "response"].float(), "token", normalize="running", missing_eos_penalty=1.0
            ),
            KLPenalty(tiny_lm().to(device), target=6.0),
        ],
        tokenizer=TOKENIZER,
        device=device,
    )


def step_without_host_copy(device):
    td = sampled().to(device)
    td["temperature"] = torch.ones(8, device=device)
    pipeline = everything(device)
    pipeline.shard(lambda x: x * 2)
    plan = scoring.make_plan(td["masks", "prompt"], td["masks", "response"], group_size=2, packing=False)
    pipeline(td, lambda: plan)  # the first use may load and compile
    with no_host_copy():
        out = pipeline(td, lambda: plan)
    assert not out["reward"][:7].isnan().any() and out["reward"][7].isnan()


def test_g1_no_host_copy():
    step_without_host_copy("cpu")
    with pytest.raises(AssertionError, match="no_host_copy"), no_host_copy():
        RewardPipeline(lambda td: torch.full((8,), td["masks", "response"].sum().item()))(sampled())
