"""The policy: response keys, one forward for all a loss needs, critics, saving, DDP (trap 19)."""

from __future__ import annotations

import pytest
import torch
from fakes import ARCHS, byte_tokenizer, fake_batch, tiny_lm, tiny_reward_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from torchbandit.generation import Sampling
from torchbandit.policy import CausalLMPolicy


def make_policy(arch="llama", critic=None, T=6, **options):
    return CausalLMPolicy(
        tiny_lm(arch), byte_tokenizer(), sampling=Sampling(max_new_tokens=T), critic=critic, **options
    )


@pytest.mark.parametrize("arch", ARCHS)
def test_generate_writes_its_keys_and_forward_agrees(arch):
    policy = make_policy(arch, "head")
    td = fake_batch().exclude(("tokens", "response"), ("masks", "response"))
    out = policy.generate(td)
    assert ("tokens", "response") not in td.keys(True)
    assert out["tokens", "response"].shape == (8, 6) and out["tokens", "response"].dtype == torch.int64
    assert out["masks", "response"].dtype == torch.bool and out["masks", "response"].any(-1).all()
    assert out["values"].shape == (8, 6) and out["temperature"].tolist() == [1.0] * 8
    again = policy(out)
    assert_close(again["log_probs"], out["log_probs", "response"], atol=2e-4, rtol=1e-4)


def test_the_seed_decides_and_global_generators_do_not():
    td = fake_batch().exclude(("tokens", "response"), ("masks", "response"))
    torch.manual_seed(1)
    first = make_policy(seed=5).generate(td)["tokens", "response"]
    torch.manual_seed(2)
    second = make_policy(seed=5).generate(td)["tokens", "response"]
    assert torch.equal(first, second)
    assert not torch.equal(first, make_policy(seed=6).generate(td)["tokens", "response"])


def test_an_evaluation_leaves_the_generator_alone():
    policy = make_policy()
    td = fake_batch().exclude(("tokens", "response"), ("masks", "response"))
    state = policy.generator.get_state()
    policy.generate(td, generator=torch.Generator().manual_seed(0))
    policy.generate(td, greedy=True)
    assert torch.equal(policy.generator.get_state(), state)


def test_greedy_says_that_its_log_probs_are_at_one():
    td = fake_batch().exclude(("tokens", "response"), ("masks", "response"))
    out = make_policy().generate(td, greedy=True)
    assert out["temperature"].tolist() == [1.0] * 8
    assert torch.equal(out["tokens", "response"][::2], out["tokens", "response"][1::2])  # siblings alike


def test_forward_gives_entropy_values_and_ptx_with_gradient():
    policy = make_policy(critic="head")
    td = fake_batch()
    ids = torch.randint(0, 256, (3, 8))
    mask = torch.ones(3, 8, dtype=torch.bool)
    out = policy(td, ptx_ids=ids, ptx_mask=mask, entropy=True)
    logits = policy.lm(ids).logits[:, :-1].log_softmax(-1)
    wanted = -logits.gather(-1, ids[:, 1:, None]).mean()
    assert_close(out["ptx_loss"], wanted, atol=1e-5, rtol=1e-5)
    assert out["ptx_tokens"].item() == 21
    assert out["entropy"].shape == out["values"].shape == out["log_probs"].shape == (8, 7)
    (out["ptx_loss"] + out["entropy"].sum() + out["values"].sum() + out["log_probs"].sum()).backward()
    missing = [name for name, weight in policy.named_parameters() if weight.grad is None]
    assert not missing


def test_a_critic_of_its_own_reads_one_value_before_each_token():
    critic = tiny_reward_model("llama")
    policy = make_policy(critic=critic)
    td = fake_batch()
    values = policy.values(td)
    row = 0
    ids = torch.cat([td["tokens", "prompt"][row][td["masks", "prompt"][row]], td["tokens", "response"][row]])
    hidden = critic.model(ids[None]).last_hidden_state
    start = int(td["masks", "prompt"][row].sum()) - 1
    wanted = critic.score(hidden)[0, start : start + 7, 0]
    assert_close(values[row], wanted.float(), atol=1e-4, rtol=1e-4)
    assert_close(policy(td)["values"], values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("own_critic", [False, True])
@pytest.mark.parametrize("group_size", [None, 4])
def test_values_of_generated_siblings_go_through_their_prompt_once(own_critic, group_size, monkeypatch):
    policy = make_policy(critic=tiny_reward_model("llama") if own_critic else "head", packing=True)
    td = fake_batch(num_prompts=3, group_size=4).exclude(("tokens", "response"), ("masks", "response"))
    tokens, plans = [], policy.plans

    def spy(*args, **kwargs):
        made = plans(*args, **kwargs)
        tokens.append(made[0].rows.metrics["packing/tokens"])
        return made

    monkeypatch.setattr(policy, "plans", spy)
    out = policy.generate(td, group_size=group_size)
    prompts, responses = (int(out["masks", name].sum()) for name in ("prompt", "response"))
    assert tokens == [prompts // 4 + responses]
    assert_close(out["values"], policy.values(out), atol=1e-5, rtol=1e-5)
    assert tokens[1] == prompts + responses


def test_a_policy_without_critic_has_no_values():
    with pytest.raises(ValueError, match='critic="head"'):
        make_policy().values(fake_batch())


def test_live_models_need_a_tokenizer():
    with pytest.raises(ValueError, match="tokenizer: a live model brings none"):
        CausalLMPolicy(tiny_lm())


@pytest.mark.parametrize("critic", ["head", "model"])
def test_saved_folder_opens_in_transformers(tmp_path, critic):
    policy = make_policy(critic="head" if critic == "head" else tiny_reward_model())
    policy.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, 256, (2, 5))
    assert_close(again(ids).logits, policy.lm(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id == 258
    if critic == "head":
        assert (tmp_path / "value_head.safetensors").exists()
    else:
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    reopened = CausalLMPolicy(tmp_path)
    assert reopened.tokenizer.eos_token_id == 258


def test_gradient_checkpointing_changes_memory_and_not_gradients():
    td = fake_batch()
    grads = []
    for checkpointing in (False, True):
        policy = make_policy(critic="head")
        if checkpointing:
            policy.gradient_checkpointing_enable()
        policy(td)["log_probs"].sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in policy.lm.parameters()]))
    assert_close(grads[0], grads[1])


def test_trap_19_one_forward_gives_all_that_a_loss_needs():
    """DDP averages only what its wrapped forward computed: no part of the loss may come from another method."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        policy = make_policy(critic="head")
        wrapped = DistributedDataParallel(policy)
        ids, mask = torch.randint(0, 256, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
        out = wrapped(fake_batch(), ptx_ids=ids, ptx_mask=mask, entropy=True)
        # The reducer marks a parameter ready by a hook on its gradient: count what reached it through the wrapper.
        sum(out[key].sum() for key in ("log_probs", "values", "ptx_loss", "entropy")).backward()
        assert all(p.grad is not None for p in wrapped.parameters())
        # The wrong variant: a loss off another method leaves the reducer waiting, and it says so at the next forward.
        policy.zero_grad()
        wrapped(fake_batch())["log_probs"].sum()
        policy.corpus_loss(ids, mask)[0].backward()
        with pytest.raises(RuntimeError, match="finished reduction"):
            wrapped(fake_batch())
    finally:
        dist.destroy_process_group()
