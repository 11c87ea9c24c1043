"""The env's contract: keys, errors, what stays as it was, sharding, resume."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakes import byte_tokenizer, tiny_lm, tiny_reward_model
from tensordict import TensorDict
from torch.testing import assert_close

from torchbandit import batch
from torchbandit.env import BanditEnv
from torchbandit.generation import Sampling
from torchbandit.policy import CausalLMPolicy
from torchbandit.prompts import PromptSet
from torchbandit.rewards import KLPenalty, RewardModel, RewardTerm

TEXTS = [f"prompt number {i}" + "!" * (i % 5) for i in range(20)]


def length(td):
    return td["masks", "response"].sum(-1).float()


def make_env(reward=length, num_prompts=4, group_size=2, texts=TEXTS, **options):
    prompts = PromptSet.from_texts(texts, byte_tokenizer(), max_length=64)
    return BanditEnv(prompts, reward, num_prompts=num_prompts, group_size=group_size, **options)


def answer(td, seed=0, width=6):
    """Random responses, some of which stop."""
    gen = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 256, (len(td), width), generator=gen)
    stop = torch.randint(0, width + 2, (len(td),), generator=gen)
    position = torch.arange(width)
    tokens = torch.where(position == stop[:, None], 258, tokens)
    out = td.copy()
    out["tokens", "response"] = tokens
    out["masks", "response"] = position <= stop[:, None]
    return out


def test_reset_writes_the_contract():
    env = make_env()
    td = env.reset()
    assert td.batch_size == torch.Size([8])
    for key, spec in env.specs(max_new_tokens=6).items():
        if spec.writer == "reset":
            assert td[key].shape == spec.shape and td[key].dtype == spec.dtype, key
    assert td["prompt_id"].tolist() == td["prompt_id"][::2].repeat_interleave(2).tolist()
    assert td["group_id"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    rows = zip(td[batch.PROMPT], td[batch.PROMPT_MASK], strict=True)
    texts = [byte_tokenizer().decode(ids[mask].tolist()) for ids, mask in rows]
    assert texts == [TEXTS[i] for i in td["prompt_id"].tolist()]


def test_step_writes_the_contract_and_leaves_its_input():
    env = make_env()
    td = answer(env.reset())
    before = td.clone()
    out = env.step(td)
    assert set(map(str, td.keys(True, True))) == set(map(str, before.keys(True, True)))
    assert (td == before).all()
    for key, spec in env.specs(max_new_tokens=6).items():
        assert out[key].shape == spec.shape and out[key].dtype == spec.dtype, key
    assert_close(out["next", "reward"].squeeze(-1), length(td))
    assert out["next", "terminated"].all() and out["next", "done"].all()
    stopped = (td["tokens", "response"] == 258).any(-1)
    assert out["next", "truncated"].squeeze(-1).tolist() == (~stopped).tolist()
    assert out["finished"].tolist() == stopped.tolist()


def test_columns_travel():
    prompts = PromptSet.from_texts(TEXTS, byte_tokenizer(), max_length=64, columns={"answer": list(range(20))})
    env = BanditEnv(prompts, lambda td: td["columns", "answer"].float(), num_prompts=3, group_size=2)
    out = env.step(answer(env.reset()))
    assert_close(out["next", "reward"].squeeze(-1), out["prompt_id"].float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prompts": 21}, "num_prompts: must be at most the 20 prompts"),
        ({"num_prompts": 0}, "num_prompts: must be at least 1"),
        ({"group_size": 0}, "group_size: must be at least 1"),
        ({"packing": "always"}, 'packing: must be True, False or "auto"'),
    ],
)
def test_bad_counts(options, message):
    with pytest.raises(ValueError, match=message):
        make_env(**options)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (("masks", "response"), torch.ones(8, 6), r"\(\"masks\",\"response\"\): must be bool \[8, 6\].*float32.*stop"),
        (("masks", "response"), torch.ones(8, 5, dtype=torch.bool), r"must be bool \[8, 6\].*got bool \[8, 5\]"),
        (("tokens", "response"), torch.ones(8, 6), r"\(\"tokens\",\"response\"\): must be int64"),
        (("tokens", "response"), None, r"got no such key"),
        ("finished", torch.ones(8, 1, dtype=torch.bool), r'"finished": must be bool \[8\]'),
        ("temperature", torch.ones(8, dtype=torch.float64), r'"temperature": must be float32 \[8\].*got float64'),
        (("tokens", "response"), torch.ones(8, 6, dtype=torch.int64, device="meta"), r"on cpu, got .* on meta"),
    ],
)  # fmt: skip
def test_bad_batches_are_named(key, value, words):
    env = make_env()
    td = answer(env.reset())
    if value is None:
        del td[key]
    else:
        td = td.to_dict()  # a TensorDict would refuse a mixed device before the env sees it
        td = TensorDict(dict(td), batch_size=[8])
        td[key] = value
    with pytest.raises(ValueError, match=words):
        env.step(td)


def test_masks_with_holes_foreign_ids_and_nan_are_unscorable_not_zero():
    def reward(td):
        return torch.where(td["tokens", "response"][:, 0] == 7, torch.nan, 1.0)

    env = make_env(reward)
    td = answer(env.reset(), width=6)
    td["tokens", "response"] = torch.full((8, 6), 5)
    td["masks", "response"] = torch.ones(8, 6, dtype=torch.bool)
    td["masks", "response"][1, 2] = False  # a hole
    td["masks", "response"][2] = False  # empty
    td["tokens", "response"][3, 0] = 7  # NaN reward
    td["tokens", "response"][4, 1] = 10_000  # no such id
    td["tokens", "response"][5, 1] = -1
    out = env.step(td)
    assert out["next", "unscorable"].tolist() == [False, True, True, True, True, True, False, False]
    assert out["next", "reward"].isnan().squeeze(-1).tolist() == out["next", "unscorable"].tolist()


def test_shards_cover_an_epoch_without_overlap():
    drawn, groups = [], []
    for rank in range(2):
        env = make_env(num_prompts=5, group_size=1)
        env.shard(rank, 2)
        for _ in range(2):
            td = env.reset()
            drawn += td["prompt_id"].tolist()
            groups += td["group_id"].tolist()
    assert sorted(drawn) == list(range(20))
    assert sorted(groups) == list(range(20))


def test_rows_are_independent():
    """G2: permuting rows, junk after the stop token, padding width and batch size change nothing."""
    lm, rm = tiny_lm("llama"), tiny_reward_model("llama")
    env = make_env([RewardModel(rm), KLPenalty(lm, coef=0.1)], num_prompts=6, group_size=3)
    td = answer(env.reset())
    td["log_probs", "response"] = torch.where(td["masks", "response"], -1.0, 0.0)
    out = env.step(td)
    order = torch.randperm(len(td), generator=torch.Generator().manual_seed(1))
    assert_close(env.step(td[order])["next", "reward"], out["next", "reward"][order], atol=1e-5, rtol=1e-5)
    junk = td.clone()
    junk["tokens", "response"] = torch.where(td["masks", "response"], td["tokens", "response"], 77)
    junk["tokens", "prompt"] = torch.where(td["masks", "prompt"], td["tokens", "prompt"], 33)
    assert_close(env.step(junk)["next", "reward"], out["next", "reward"], atol=1e-5, rtol=1e-5)
    wide = td.clone()
    for kind, side in (("prompt", (4, 0)), ("response", (0, 5))):
        wide["tokens", kind] = torch.nn.functional.pad(td["tokens", kind], side)
        wide["masks", kind] = torch.nn.functional.pad(td["masks", kind], side)
    wide["log_probs", "response"] = torch.nn.functional.pad(td["log_probs", "response"], (0, 5))
    assert_close(env.step(wide)["next", "reward"], out["next", "reward"], atol=1e-5, rtol=1e-5)
    one_by_one = torch.cat([env.step(td[i : i + 1])["next", "reward"] for i in range(len(td))])
    assert_close(one_by_one, out["next", "reward"], atol=1e-5, rtol=1e-5)


def test_siblings_that_are_no_siblings_are_scored_as_they_are():
    """The group size is a hint for speed: rows permuted between groups still get their own prompts' scores."""
    env = make_env(RewardModel(tiny_reward_model("llama")), num_prompts=6, group_size=2, packing=True)
    td = answer(env.reset())
    shuffled = td[torch.tensor([0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11])]
    alone = torch.cat([env.step(shuffled[i : i + 1])["next", "reward"] for i in range(12)])
    assert_close(env.step(shuffled)["next", "reward"], alone, atol=1e-5, rtol=1e-5)


RESUME = """
import sys, torch
sys.path[:0] = {paths!r}
from test_env import make_env, answer, noisy
torch.set_num_threads(1)
env = make_env(noisy())
env.load_state_dict(torch.load({file!r}, weights_only=True))
outs = [env.step(answer(env.reset(), seed=step)) for step in range(3, 6)]
torch.save([{{"id": o["prompt_id"], "group": o["group_id"], "reward": o["next", "reward"]}} for o in outs], {result!r})
"""


def noisy():
    return RewardTerm(length, normalize="running")


def test_resume_is_exact_in_a_new_process(tmp_path):
    """G4."""
    env = make_env(noisy(), seed=3)
    for step in range(3):
        env.step(answer(env.reset(), seed=step))
    torch.save(env.state_dict(), tmp_path / "state.pt")
    wanted = [env.step(answer(env.reset(), seed=step)) for step in range(3, 6)]
    here = Path(__file__).parent
    script = RESUME.format(
        paths=[str(here), str(here.parent)], file=str(tmp_path / "state.pt"), result=str(tmp_path / "got.pt")
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=400)
    for got, want in zip(torch.load(tmp_path / "got.pt", weights_only=True), wanted, strict=True):
        assert torch.equal(got["id"], want["prompt_id"]) and torch.equal(got["group"], want["group_id"])
        assert torch.equal(got["reward"], want["next", "reward"])


def test_state_of_other_prompts_is_refused():
    state = make_env().state_dict()
    with pytest.raises(ValueError, match="resume with the prompt"):
        make_env(texts=TEXTS[:19]).load_state_dict(state)


def test_public_snippet_runs():
    """The eight lines of the README."""
    tokenizer = byte_tokenizer()
    lm, rm = tiny_lm("llama"), tiny_reward_model("llama")
    prompts = PromptSet.from_texts(TEXTS, tokenizer, max_length=64)
    env = BanditEnv(prompts, reward=[RewardModel(rm), KLPenalty(lm, coef=0.05)], num_prompts=4, group_size=2)
    policy = CausalLMPolicy(lm, tokenizer, sampling=Sampling(max_new_tokens=5))
    td = env.step(policy.generate(env.reset()))
    assert td["next", "reward"].shape == (8, 1)
    # The policy is its own reference: no KL.
    assert_close(td["next", "reward_terms", "kl"], torch.zeros(8), atol=1e-4, rtol=0)
    assert td["next", "ref_log_probs", "response"].shape == (8, 5)


def test_own_prompts_are_trusted_until_someone_writes_into_them():
    """What `reset` handed out is not looked at again; a copy, or an edit in place, is."""
    env = make_env(num_prompts=4, group_size=2)
    td = env.reset()
    assert env._are_own(td[batch.PROMPT], td[batch.PROMPT_MASK])
    assert not env.step(answer(td))["next", "unscorable"].any()
    assert not env._are_own(td[batch.PROMPT].clone(), td[batch.PROMPT_MASK])
    td[batch.PROMPT][1, -1] = 10**6
    td[batch.PROMPT_MASK][5, -1] = False
    assert env.step(answer(td))["next", "unscorable"].tolist() == [i in (1, 5) for i in range(8)]
    with torch.inference_mode():
        td = env.reset()
        assert not env.step(answer(td))["next", "unscorable"].any()


def test_own_prompts_may_be_foreign_to_a_model():
    """The set vouches for its tokenizer's ids; this model has fewer embeddings."""
    small = tiny_reward_model(vocab_size=112)  # bytes up to "o"; the prompts have a "p" in "prompt"
    env = make_env(RewardModel(small), num_prompts=2, packing=False)
    td = env.reset()
    out = answer(td)
    out["tokens", "response"] = out["tokens", "response"] % 100
    assert env.step(out)["next", "unscorable"].all()
