"""Algorithms that the package does not have, written outside it: a gate in place of the clip, and pass@k."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import pytest
import torch
from fakes import byte_tokenizer, tiny_lm
from naive_algorithms import stepped
from tensordict import TensorDict
from torch.testing import assert_close

from torchbandit import losses
from torchbandit.corpus import Corpus
from torchbandit.env import BanditEnv
from torchbandit.generation import Sampling
from torchbandit.learn import GRPO, Algorithm, training_rows
from torchbandit.policy import CausalLMPolicy
from torchbandit.prompts import PromptSet
from torchbandit.train.loop import BanditTrainer
from torchbandit.train.options import LoopOptions


@dataclass(frozen=True)
class SAPO(GRPO):
    """A sigmoid gate in place of the clip. Gao et al. 2025 (SAPO)."""

    gate: float = 1.0
    gate_low: float = 1.05

    def loss(self, out, targets, *, denominators):
        mask, log_probs = targets["learn_mask"], out["log_probs"]
        drift = losses.keep(log_probs - targets["log_probs", "response"], mask).clamp(-20, 20)
        advantages = targets["advantages"]
        advantages = advantages if advantages.dim() == 2 else advantages.unsqueeze(-1)
        tau = torch.where(advantages > 0, self.gate, self.gate_low)
        gated = torch.sigmoid(tau * (drift.exp() - 1)) * 4 / tau
        loss = self.average(losses.keep(-gated * advantages, mask), mask, denominators)
        return loss, {"policy": loss.detach(), "ratio_max": losses.keep(drift.detach().exp(), mask).amax()}


@dataclass(frozen=True)
class PassAtK(GRPO):
    """The advantage of a response where k of the group are handed in. Chen et al. 2025 (Pass@k training), section 2."""

    k: int = 2
    least_group_size: ClassVar[int] = 2

    def targets(self, td, *, group_size, reduce):
        rows = training_rows(td)
        right = (td["next", "reward"].squeeze(-1) > 0.5).view(-1, group_size)
        wrong = group_size - right.sum(-1, keepdim=True)
        all_wrong, others_wrong = torch.ones_like(wrong).float(), torch.ones_like(wrong).float()
        for j in range(self.k):  # C(wrong, k) / C(G, k), and the same for the siblings of one that is wrong
            all_wrong = all_wrong * ((wrong - j) / (group_size - j)).clamp(min=0)
            if j < self.k - 1:
                others_wrong = others_wrong * ((wrong - 1 - j) / (group_size - 1 - j)).clamp(min=0)
        deviation = (all_wrong * (1 - all_wrong)).sqrt()
        advantages = torch.where(right, all_wrong, all_wrong - others_wrong)
        rows["advantages"] = torch.where(deviation > 0, advantages / deviation.clamp(min=1e-6), 0.0).flatten()
        return rows


def make_trainer(algorithm, **options):
    tokenizer = byte_tokenizer()
    prompts = PromptSet.from_texts([f"prompt {i}" for i in range(16)], tokenizer, max_length=16)
    env = BanditEnv(prompts, lambda td: (td["tokens", "response"][:, 0] % 2).float(), num_prompts=4, group_size=4)
    policy = CausalLMPolicy(tiny_lm(), tokenizer, sampling=Sampling(max_new_tokens=4))
    corpus = Corpus.from_texts([f"document {i}" for i in range(20)], tokenizer)
    options = LoopOptions(
        lr=1e-3, entropy_coef=0.01, ptx_coef=0.1, ptx_batch_size=4, epochs=2, micro_batch_size=8, **options
    )
    return BanditTrainer(env, policy, algorithm, options, corpus=corpus)


@pytest.mark.parametrize("algorithm", [SAPO(gate_low=2.0), PassAtK(k=3)], ids=lambda a: type(a).__name__)
def test_an_algorithm_of_one_s_own_is_trained(algorithm):
    trainer = make_trainer(algorithm)
    before = torch.cat([p.detach().flatten() for p in trainer.policy.parameters()])
    lines = [trainer.step() for _ in range(3)]
    after = torch.cat([p.detach().flatten() for p in trainer.policy.parameters()])
    assert all(value == value for line in lines for value in line.values())
    assert (after - before).abs().max() > 1e-3
    for line in lines:
        assert {"loss/policy", "loss/entropy", "loss/entropy_bonus", "loss/ptx", "loss/ptx_weighted"} <= line.keys()
        assert line["loss/entropy_bonus"] == pytest.approx(-0.01 * line["loss/entropy"], rel=1e-4)
        assert line["loss/ptx_weighted"] == pytest.approx(0.1 * line["loss/ptx"], rel=1e-4)


def test_of_a_metric_that_ends_in_max_the_greatest_is_taken():
    """Over microbatches and updates; others add up over microbatches and are means over updates."""

    seen = []
    trainer = make_trainer(SAPO())

    def watched(out, targets, denominators):
        loss, metrics = trainer.loss(out, targets, denominators)
        seen.append((float(metrics["ratio_max"]), float(metrics["policy"])))
        return loss, metrics

    trainer.update._loss = watched
    line = trainer.step()
    assert len(seen) == 4 and max(seen)[0] > 1 and line["loss/ratio_max"] == pytest.approx(max(seen)[0])
    assert line["loss/policy"] == pytest.approx(sum(loss for _, loss in seen) / 2, rel=1e-4, abs=1e-6)


def test_the_gate_has_the_gradient_of_the_ratio_where_the_policy_has_not_moved():
    old = -torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    td = targets_of(old, torch.tensor([1.0, -1.0, 0.5, 2.0]))
    grads = []
    for algorithm in (SAPO(), GRPO()):
        new = old.clone().requires_grad_()
        loss, _ = algorithm.loss(
            {"log_probs": new}, td, denominators={"tokens": torch.tensor(12.0), "rows": torch.tensor(4.0)}
        )
        grads.append(torch.autograd.grad(loss, new)[0])
    assert_close(*grads)


def targets_of(old, advantages):
    mask = torch.ones_like(old).bool()
    source = {"learn_mask": mask, "advantages": advantages, "log_probs": {"response": old}}
    return TensorDict(source, batch_size=[len(old)])


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_advantage_of_pass_at_k_is_that_of_all_subsets(k):
    """Each subset of k has reward 1 if one of it is right; a response has the mean of its subsets, normalised."""
    td = stepped(0)
    td["next", "reward"] = (torch.arange(16) % 16 < torch.tensor([1, 6, 11, 12]).repeat_interleave(4)).float()[:, None]
    td["next", "unscorable"][:] = False
    found = PassAtK(k=k).targets(td, group_size=4, reduce=None)["advantages"].view(4, 4)
    for group, rewards in zip(found, td["next", "reward"].view(4, 4).tolist(), strict=True):
        subsets = {chosen: max(rewards[i] for i in chosen) for chosen in combinations(range(4), k)}
        every = torch.tensor(list(subsets.values()))
        for i, advantage in enumerate(group):
            own = torch.tensor([r for chosen, r in subsets.items() if i in chosen])
            deviation = every.std(unbiased=False)
            right = (own.mean() - every.mean()) / deviation if deviation > 0 else torch.zeros(())
            assert_close(advantage, right, rtol=1e-5, atol=1e-6)


def test_own_classes_are_short_and_are_algorithms():
    for cls in (SAPO, PassAtK):
        assert issubclass(cls, Algorithm) and len(inspect.getsource(cls).splitlines()) <= 30
