"""TorchRL's own checks on the adapter: specs, rollout, a collector, and GRPOLoss."""

from __future__ import annotations

import pytest
import torch
from fakes import byte_tokenizer, tiny_lm
from torch.testing import assert_close

from torchbandit import batch
from torchbandit.env import BanditEnv
from torchbandit.generation import Sampling
from torchbandit.policy import CausalLMPolicy
from torchbandit.prompts import PromptSet

pytest.importorskip("torchrl", reason="the torchrl extra is not installed")

from torchrl.envs.utils import check_env_specs

from torchbandit.adapters.torchrl import BanditTorchRLEnv, PolicyModule, grpo_batch

T, GROUP = 6, 2
TEXTS = [f"prompt number {i}" + "!" * (i % 5) for i in range(20)]


def length(td):
    return td["masks", "response"].sum(-1).float()


def make_env(reward=length, **columns):
    prompts = PromptSet.from_texts(TEXTS, byte_tokenizer(), max_length=64, columns=columns)
    return BanditTorchRLEnv(BanditEnv(prompts, reward, num_prompts=4, group_size=GROUP), T)


def make_policy():
    return CausalLMPolicy(tiny_lm(), byte_tokenizer(), sampling=Sampling(max_new_tokens=T))


def test_specs():
    check_env_specs(make_env(), seed=0, break_when_any_done="both")
    check_env_specs(make_env(answer=list(range(20)), box=torch.zeros(20, 3)))


def test_rollout_is_the_bandit():
    env, twin = make_env(), make_env().bandit
    out = env.rollout(1, PolicyModule(make_policy(), group_size=GROUP))
    assert out.batch_size == (8, 1)
    expected = twin.step(make_policy().generate(twin.reset(), group_size=GROUP))
    for key in (batch.PROMPT, batch.GROUP_ID, batch.RESPONSE, batch.LOG_PROBS, batch.REWARD, batch.TRUNCATED):
        assert_close(out[key][:, 0], expected[key])
    assert out["next", "done"].all() and out["next", "terminated"].all()


def test_a_response_without_mask_ends_at_eos():
    env = make_env()
    td = env.reset()
    td["tokens", "response"] = torch.tensor([65, 66, 258, 67, 68, 69]).repeat(8, 1)
    assert env.step(td)["next", "reward"].flatten().tolist() == [3.0] * 8


def test_a_seed_begins_the_prompts_anew():
    env = make_env()
    env.set_seed(3)
    first = env.reset()["prompt_id"]
    assert not torch.equal(env.reset()["prompt_id"], first)
    env.set_seed(3)
    assert torch.equal(env.reset()["prompt_id"], first)


def test_collector_and_grpo_loss():
    from torchrl.collectors import Collector
    from torchrl.modules.llm import TransformersWrapper
    from torchrl.objectives.llm.grpo import GRPOLoss

    env, policy = make_env(), make_policy()
    collector = Collector(env, PolicyModule(policy, group_size=GROUP), frames_per_batch=16, total_frames=32)
    batches = list(collector)
    collector.shutdown()
    assert [b.batch_size for b in batches] == [(8, 2)] * 2
    data = grpo_batch(batches[0], GROUP)
    assert data["group_id"].tolist() == [i // GROUP for i in range(16)], "siblings stand together"
    lm = policy.lm.requires_grad_(True)
    actor = TransformersWrapper(
        lm, tokenizer=byte_tokenizer(), input_mode="tokens", generate=False, pad_output=True, return_log_probs=True
    )
    loss = GRPOLoss(actor, entropy_bonus=False)(data)
    assert abs(loss.kl_approx.item()) < 1e-3, "the policy that sampled is the actor: the ratios are 1"
    mask = data["masks", "response"]
    advantage = data["advantage"][:, -T:, 0]
    assert_close(loss.loss_objective.flatten()[0], -(advantage * mask).sum() / mask.sum(), rtol=1e-3, atol=1e-4)
    loss.loss_objective.sum().backward()
    assert max(p.grad.abs().max() for p in lm.parameters() if p.grad is not None) > 0


def test_unscorable_rows_are_masked_out():
    nan_row = lambda td: torch.where(torch.arange(8) == 3, torch.nan, torch.arange(8.0))
    data = grpo_batch(make_env(nan_row).rollout(1, PolicyModule(make_policy(), group_size=GROUP)), GROUP)
    P = data[batch.PROMPT].shape[1]
    assert not data["masks", "all_attention_mask"][3, P:].any() and data["masks", "all_attention_mask"][2, P:].any()
    assert data["advantage"][3].abs().max() == 0 and data["advantage"].isfinite().all()
    assert data["masks", "all_attention_mask"][:, :P].equal(data[batch.PROMPT_MASK])
