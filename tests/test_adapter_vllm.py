"""The vLLM engine against a stand-in that records the calls; vLLM itself is not run here."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from fakes import byte_tokenizer, tiny_lm
from torch.testing import assert_close

from torchbandit import batch
from torchbandit.adapters.vllm import VLLMEngine
from torchbandit.env import BanditEnv
from torchbandit.generation import Sampling
from torchbandit.learn import PPO
from torchbandit.learn.completed import with_log_probs
from torchbandit.policy import CausalLMPolicy
from torchbandit.prompts import PromptSet
from torchbandit.testing import check_env
from torchbandit.train.loop import BanditTrainer
from torchbandit.train.options import LoopOptions

TEXTS = [f"prompt number {i}" + "!" * (i % 5) for i in range(8)]
T = 6


class StandIn:
    """Answers through the policy, in vLLM's clothes; its log-probs are `off` above the policy's."""

    def __init__(self, policy, off=0.0, drop_log_probs=False):
        self.policy, self.off, self.drop, self.calls = policy, off, drop_log_probs, []

    def generate(self, prompts, sampling_params, use_tqdm):
        self.calls.append((prompts, sampling_params))
        made = []
        for prompt in prompts:
            ids = torch.tensor([prompt["prompt_token_ids"]])
            td = {batch.PROMPT: ids, batch.PROMPT_MASK: torch.ones_like(ids, dtype=torch.bool)}
            out = self.policy.generate(as_td(td), group_size=1)
            n = int(out[batch.RESPONSE_MASK].sum())
            said = out[batch.RESPONSE][0, :n].tolist()
            log_probs = [
                {i: SimpleNamespace(logprob=x + self.off)}
                for i, x in zip(said, out[batch.LOG_PROBS][0, :n].tolist(), strict=True)
            ]
            reason = "stop" if bool(out[batch.FINISHED]) else "length"
            made.append(SimpleNamespace(outputs=[SimpleNamespace(
                token_ids=said, logprobs=None if self.drop else log_probs, finish_reason=reason
            )]))  # fmt: skip
        return made


def as_td(tensors):
    from tensordict import TensorDict

    td = TensorDict({}, batch_size=[len(next(iter(tensors.values())))])
    for key, value in tensors.items():
        td.set(key, value)
    return td


@pytest.fixture
def parts(monkeypatch):
    module = ModuleType("vllm")
    module.SamplingParams = lambda **given: SimpleNamespace(**given)
    monkeypatch.setitem(sys.modules, "vllm", module)
    tokenizer = byte_tokenizer()
    policy = CausalLMPolicy(tiny_lm(), tokenizer, sampling=Sampling(max_new_tokens=T, temperature=0.7), critic="head")
    prompts = PromptSet.from_texts(TEXTS, tokenizer, max_length=64)
    env = BanditEnv(prompts, lambda td: td["masks", "response"].sum(-1).float(), num_prompts=4, group_size=2)
    return policy, env


def test_what_is_asked_and_what_is_written(parts):
    policy, env = parts
    llm = StandIn(policy)
    engine = VLLMEngine(llm, policy, seed=7)
    td = env.reset()
    before = td.clone()
    out = engine(td)
    assert (td == before).all() and set(td.keys(True, True)) == set(before.keys(True, True))
    ((prompts, params),) = llm.calls
    assert [p["prompt_token_ids"] for p in prompts] == [
        ids[real].tolist() for ids, real in zip(td[batch.PROMPT], td[batch.PROMPT_MASK], strict=True)
    ]
    first = params[0]
    assert (first.n, first.temperature, first.max_tokens, first.logprobs) == (1, 0.7, T, 0)
    assert first.stop_token_ids == [258] and first.ignore_eos and not hasattr(first, "top_k")
    engine(td)
    assert len({p.seed for _, params in llm.calls for p in params}) == 16, "no request repeats another's draws"
    assert batch.LOG_PROBS not in out.keys(True, True), "the policy's own are computed where they are read"
    out = with_log_probs(out, policy, group_size=2)
    assert_close(out[batch.SAMPLER_LOG_PROBS], out[batch.LOG_PROBS], rtol=1e-4, atol=1e-4)
    assert out[batch.VALUES].shape == (8, T) and not out[batch.LOG_PROBS].requires_grad
    assert env.step(out)["next", "reward"].isfinite().all()


def test_the_contract_holds(parts):
    policy, env = parts

    class Engine:
        stop_ids, sampling = policy.stop_ids, policy.sampling
        engine = VLLMEngine(StandIn(policy), policy)
        generate = lambda self, td, **_: with_log_probs(self.engine(td), policy)

    check_env(env, Engine())


def test_a_trainer_weighs_the_mismatch(parts):
    """Log-probs off by a constant: every token's weight is exp(-off), truncated at the cap, and is said."""
    policy, env = parts
    for off, weight, cut in ((0.5, 0.6065, 0.0), (-0.3, 1.3499, 0.0), (-3.0, 2.0, 1.0)):
        engine = VLLMEngine(StandIn(policy, off), policy)
        trainer = BanditTrainer(env, policy, PPO(), LoopOptions(steps=1, lr=0.0), generate=engine)
        metrics = trainer.step()
        assert metrics["mismatch/weight"] == pytest.approx(weight, rel=1e-3)
        assert metrics["mismatch/cut"] == cut
        assert metrics["mismatch/weight_max"] == pytest.approx(math.exp(-off), rel=1e-3)


def test_what_cannot_be_used_is_refused(parts):
    policy, env = parts
    with pytest.raises(ValueError, match="must report a log-prob for each of at most 6 tokens, got none"):
        VLLMEngine(StandIn(policy, drop_log_probs=True), policy)(env.reset())
    for sampling in (Sampling(T, temperature=0.0), Sampling(T, top_k=5), Sampling(T, top_p=0.9)):
        policy.sampling = sampling
        with pytest.raises(ValueError, match="temperature alone"):
            VLLMEngine(StandIn(policy), policy)


def test_without_vllm_it_says_so(parts, monkeypatch):
    policy, env = parts
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="needs vLLM"):
        VLLMEngine(StandIn(policy), policy)(env.reset())
