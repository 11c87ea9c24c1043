"""One update: weights of another sampler, what is skipped and refused, clipping, masks and the order of minibatches."""

from __future__ import annotations

import math

import pytest
import torch
from fakes import byte_tokenizer, tiny_lm
from torch.testing import assert_close

from torchbandit.env import BanditEnv
from torchbandit.generation import Sampling
from torchbandit.learn import GRPO
from torchbandit.learn.seeds import minibatch_order
from torchbandit.policy import CausalLMPolicy
from torchbandit.prompts import PromptSet
from torchbandit.rewards import KLPenalty
from torchbandit.rewards.normalize import AdaptiveCoefficient
from torchbandit.train.loop import BanditTrainer, RunStopped
from torchbandit.train.options import LoopOptions


def mean_id(td):
    mask = td["masks", "response"]
    return ((td["tokens", "response"] * mask).sum(-1) / mask.sum(-1).clamp(min=1) / 259).float()


def make_trainer(kind=BanditTrainer, reward=mean_id, generate=None, model=None, **options):
    tokenizer = byte_tokenizer()
    prompts = PromptSet.from_texts([f"prompt {i}" for i in range(16)], tokenizer, max_length=16)
    env = BanditEnv(prompts, reward, num_prompts=4, group_size=2)
    policy = CausalLMPolicy(model or tiny_lm(), tokenizer, sampling=Sampling(max_new_tokens=6))
    return kind(env, policy, GRPO(), LoopOptions(**({"lr": 1e-3} | options)), generate=generate)


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.policy.parameters()]).clone()


def stepped(trainer):
    return trainer.env.step(trainer.generate(trainer.env.reset()))


# --- another sampler ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beyond", ["truncate", "mask"])
@pytest.mark.parametrize("per", ["token", "response"])
def test_importance_weights_of_another_sampler(per, beyond):
    trainer = make_trainer(mismatch=beyond, mismatch_per=per, mismatch_cap=1.5)
    td = stepped(trainer)
    base = trainer.targets(td)["advantages"]
    own, gen = td["log_probs", "response"], torch.Generator().manual_seed(0)
    td["log_probs", "sampler"] = own + 0.5 * torch.randn(own.shape, generator=gen)
    targets, metrics = trainer.update.prepare(td)
    ratios, expected = [], torch.zeros_like(own)
    for i, row in enumerate(td["masks", "response"].tolist()):
        drift = {t: float(own[i, t] - td["log_probs", "sampler"][i, t]) for t, real in enumerate(row) if real}
        for t in drift:
            r = math.exp(sum(drift.values()) if per == "response" else drift[t])
            ratios.append(r)
            within = 1 / 1.5 <= r <= 1.5
            expected[i, t] = base[i, t] * (min(r, 1.5) if beyond == "truncate" else r * within)
    mask = td["masks", "response"]
    assert_close(targets["advantages"] * mask, expected, rtol=1e-4, atol=1e-5)
    kept = [min(r, 1.5) if beyond == "truncate" else r * (1 / 1.5 <= r <= 1.5) for r in ratios]
    cut = [r > 1.5 or (beyond == "mask" and r < 1 / 1.5) for r in ratios]
    right = {"weight": sum(kept) / len(kept), "weight_max": max(ratios), "cut": sum(cut) / len(cut)}
    assert {name: float(metrics[f"mismatch/{name}"]) for name in right} == pytest.approx(right, rel=1e-4)
    assert 0 < right["cut"] < 1


def test_a_sampler_that_reports_a_number_that_is_none_loses_the_row():
    for bad in (torch.nan, torch.inf, -torch.inf):
        trainer = make_trainer()
        td = stepped(trainer)
        td["log_probs", "sampler"] = td["log_probs", "response"].clone()
        td["log_probs", "sampler"][3, 0] = bad
        targets = trainer.targets(td)
        assert targets["learn_mask"].any(-1).tolist() == [i != 3 for i in range(8)]
        assert targets["advantages"].isfinite().all() and targets["lost"].tolist() == [i == 3 for i in range(8)]
        trainer.options.mismatch = "off"
        assert trainer.targets(td)["learn_mask"].any(-1).all()


def test_the_generate_of_another_engine_needs_no_log_probs_of_the_policy():
    def engine(td):
        out = trainer.generate(td)
        out["log_probs", "sampler"] = out["log_probs", "response"] - 0.1
        seen.append(out["log_probs", "response"].clone())
        del out["log_probs", "response"]
        return out

    seen, learned = [], []
    trainer = make_trainer(generate=engine, reward=[mean_id, KLPenalty(tiny_lm(seed=3), coef=0.1)])
    prepare = trainer.update.prepare
    trainer.update.prepare = lambda td: learned.append(prepare(td)) or learned[-1]
    metrics = trainer.step()
    assert metrics["mismatch/weight"] == pytest.approx(math.exp(0.1), rel=1e-3) and metrics["kl"] > 0
    mask = learned[0][0]["masks", "response"]
    assert_close(learned[0][0]["log_probs", "response"] * mask, seen[0] * mask, rtol=1e-4, atol=1e-4)


def test_sampler_log_probs_of_another_shape_or_dtype_are_refused():
    trainer = make_trainer()
    for wrong in (torch.zeros(8, 5), torch.zeros(8), torch.zeros(8, 6, dtype=torch.float16)):
        td = stepped(trainer)
        td["log_probs", "sampler"] = wrong
        with pytest.raises(ValueError, match=r'\("log_probs","sampler"\): must be float32 \[8, 6\].*as the engine'):
            trainer.targets(td)


# --- what is skipped and refused ---------------------------------------------------------------------------------


class Broken(BanditTrainer):
    """Its gradient is NaN in the updates that `bad` names."""

    bad: tuple[int, ...] = ()
    updates = 0

    def loss(self, out, targets, denominators):
        loss, metrics = super().loss(out, targets, denominators)
        self.updates += 1
        return loss * (math.nan if self.updates in self.bad else 1.0), metrics


def test_skipped_updates_are_counted_and_leave_everything_as_it_was():
    trainer = make_trainer(Broken, epochs=2, minibatches=2)
    trainer.bad = (1, 2, 4)
    metrics = trainer.step()
    assert metrics["skipped_updates"] == 3
    assert all(math.isfinite(value) for value in metrics.values())  # means over the one update that was made
    trainer.bad = ()
    assert trainer.step()["skipped_updates"] == 0

    one = make_trainer(Broken)
    one.bad, before = (1,), weights_of(one)
    assert one.step()["skipped_updates"] == 1 and torch.equal(weights_of(one), before)


@pytest.mark.parametrize("options", [{}, {"epochs": 3}])
def test_three_skipped_in_a_row_end_the_run(options):
    trainer = make_trainer(Broken, **options)
    trainer.bad = (1, 2, 3)
    with pytest.raises(RunStopped, match=r"step \d: 3 updates in a row were skipped: their gradient"):
        for _ in range(3):
            trainer.step()
    assert trainer.steps_done == (1 if options else 3)


def test_two_and_then_one_that_is_made_do_not():
    trainer = make_trainer(Broken)
    trainer.bad = (1, 2, 4, 5)
    assert [trainer.step()["skipped_updates"] for _ in range(6)] == [1, 1, 0, 1, 1, 0]


def test_more_rows_lost_than_left_is_a_skipped_update():
    trainer = make_trainer()
    td = stepped(trainer)
    td["log_probs", "response"][:5, 0] = torch.nan
    before = weights_of(trainer)
    metrics = trainer.update(td, 0)
    assert metrics["skipped_updates"] == 1 and torch.equal(weights_of(trainer), before)
    td["log_probs", "response"][:3, 0] = 0.0
    assert trainer.update(td, 0)["skipped_updates"] == 0 and not torch.equal(weights_of(trainer), before)


def test_float16_is_refused():
    with pytest.raises(ValueError, match='float16 gradients underflow.*dtype="bfloat16"'):
        make_trainer(model=tiny_lm().half())


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3])
def test_a_norm_of_0_does_not_clip(max_grad_norm):
    trainer, seen = make_trainer(max_grad_norm=max_grad_norm), []
    step = trainer.optimizer.optimizer.step

    def watched():
        grads = [p.grad for p in trainer.policy.parameters() if p.grad is not None]
        seen.append(float(torch.linalg.vector_norm(torch.stack([g.norm() for g in grads]))))
        return step()

    trainer.optimizer.optimizer.step = watched
    norm = trainer.step()["grad_norm"]
    assert norm > 1e-2 and seen == [pytest.approx(max_grad_norm or norm, rel=1e-3)]


# --- masks, coefficients and order -------------------------------------------------------------------------------


def test_truncated_responses_can_be_left_out():
    trainer = make_trainer(mask_truncated=True)
    td = stepped(trainer)
    cut = torch.arange(8) % 3 == 0
    td["next", "truncated"] = cut[:, None]
    targets = trainer.targets(td)
    assert torch.equal(targets["learn_mask"].any(-1), ~cut)
    trainer.options.mask_truncated = False
    again = trainer.targets(td)
    assert again["learn_mask"].any(-1).all() and torch.equal(again["advantages"], targets["advantages"])


def test_the_adaptive_coefficient_stays_positive_for_huge_batches():
    coefficient = AdaptiveCoefficient(0.1, target=1.0, horizon=10, device=torch.device("cpu"))
    for _ in range(20):
        coefficient.update(torch.zeros(100_000), torch.ones(100_000).bool())
    assert 0 < float(coefficient.value) == pytest.approx(0.1 * 0.8**20, rel=1e-4)
    for _ in range(20):
        coefficient.update(torch.full((100_000,), 50.0), torch.ones(100_000).bool())
    assert float(coefficient.value) == pytest.approx(0.1 * (0.8 * 1.2) ** 20, rel=1e-4)


def test_the_order_of_minibatches_follows_from_seed_and_step_alone():
    order = minibatch_order(16, 2, seed=3, step=5)
    torch.manual_seed(99)
    torch.rand(7)
    assert all(map(torch.equal, order, minibatch_order(16, 2, seed=3, step=5)))
    assert all(sorted(epoch.tolist()) == list(range(16)) for epoch in order) and not torch.equal(*order)
    for other in (dict(seed=3, step=6), dict(seed=4, step=5), dict(seed=5, step=3)):
        assert not torch.equal(order[0], minibatch_order(16, 2, **other)[0])
    trainer = make_trainer(minibatches=2, epochs=2, seed=3)
    targets = trainer.targets(stepped(trainer))
    parts = [part["group_id"].tolist() for part in trainer.update.minibatches(targets, 5)]
    whole = [[int(group) for group in epoch for _ in range(2)] for epoch in minibatch_order(4, 2, 3, 5)]
    assert parts == [epoch[at : at + 4] for epoch in whole for at in (0, 4)]
