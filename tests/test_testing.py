"""check_env and no_host_copy, each check seen red on an environment or function that is broken on purpose."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fakes import byte_tokenizer, tiny_lm, tiny_reward_model
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from torchbandit import batch
from torchbandit.env import BanditEnv
from torchbandit.generation import Sampling
from torchbandit.policy import CausalLMPolicy
from torchbandit.prompts import PromptSet
from torchbandit.rewards import KLPenalty, RewardModel, RewardTerm
from torchbandit.testing import check_env, no_host_copy

TEXTS = ["a", "two words", "the third prompt", "what is this?", "five", "a longer prompt than the others"]


def length(td: TensorDictBase) -> Tensor:
    return -td[batch.RESPONSE_MASK].sum(-1).float()


def per_token(td: TensorDictBase) -> Tensor:
    return (td[batch.RESPONSE] % 7).float()


def make_env(kind: type[BanditEnv] = BanditEnv, reward: Any = (length, per_token), **options: Any) -> BanditEnv:
    prompts = PromptSet.from_texts(TEXTS, byte_tokenizer(), max_length=40)
    return kind(prompts, list(reward), **({"num_prompts": 4, "group_size": 2} | options))


def reward_model() -> list[Any]:
    return [RewardModel(tiny_reward_model()), KLPenalty(tiny_lm(seed=3))]


@pytest.mark.parametrize(
    "reward",
    [
        lambda: [length],
        lambda: [length, per_token],
        lambda: [RewardTerm(length, normalize="running"), RewardTerm(per_token, clip=2.0, missing_eos_penalty=1.0)],
        lambda: [RewardTerm(length, normalize="batch")],
        reward_model,
    ],
    ids=["sequence", "token", "running", "batch", "models"],
)
@pytest.mark.parametrize("group_size", [1, 2])
def test_honest_envs_pass(reward: Callable[[], list[Any]], group_size: int) -> None:
    check_env(make_env(reward=reward(), group_size=group_size))


def test_a_policy_is_checked_too() -> None:
    env = make_env(reward=reward_model())
    policy = CausalLMPolicy(tiny_lm(), byte_tokenizer(), sampling=Sampling(max_new_tokens=6), critic="head")
    check_env(env, policy)


def test_the_env_is_left_as_it_was() -> None:
    env = make_env(reward=[RewardTerm(length, normalize="running")])
    env.reset()
    before = copy.deepcopy(env.state_dict())
    check_env(env)
    assert str(env.state_dict()) == str(before)


class Broken(BanditEnv):
    """An env whose `reset` and `step` are spoiled by a test."""

    spoil_reset = staticmethod(lambda env, td: td)
    spoil_step = staticmethod(lambda env, given, out: out)

    def reset(self) -> TensorDict:
        return self.spoil_reset(self, super().reset())

    def step(self, td: TensorDictBase) -> TensorDict:
        return self.spoil_step(self, td, super().step(td))


def put(key: batch.Key, change: Callable[[Any], Any]) -> Callable[..., TensorDict]:
    """Spoil one key of what comes back."""

    def spoil(*args: Any) -> TensorDict:
        out = args[-1].copy()
        out.set(key, change(out[key]))
        return out

    return spoil


def drop(key: batch.Key) -> Callable[..., TensorDict]:
    return lambda *args: args[-1].exclude(key)


def write_into(env: Broken, given: TensorDict, out: TensorDict) -> TensorDict:
    given["extra"] = torch.zeros(len(given))
    return out


def overwrite(env: Broken, given: TensorDict, out: TensorDict) -> TensorDict:
    given[batch.RESPONSE].zero_()
    return out


def reads(key: batch.Key) -> Callable[..., TensorDict]:
    """A reward that takes in what it may not: whole tensors, masks ignored."""
    return lambda env, given, out: put(batch.REWARD, lambda r: r + given[key].double().mean(-1, True).float())(out)


def leaks_between_rows(env: Broken, given: TensorDict, out: TensorDict) -> TensorDict:
    return put(batch.REWARD, lambda r: r + torch.arange(len(r))[:, None])(out)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (drop(batch.PROMPT), '"tokens","prompt".*no such key'),
        (put(batch.PROMPT, lambda x: x.int()), "must be int64"),
        (put(batch.PROMPT, lambda x: x.roll(1, 0)), "siblings must have one prompt"),
        (put(batch.PROMPT, lambda x: x + 1000), "every id, padding included"),
        (put(batch.PROMPT_MASK, lambda x: x.flip(-1)), "left-padded"),
        (put(batch.PROMPT_MASK, lambda x: x & False), "at least one token"),
        (put(batch.PROMPT_ID, lambda x: x.roll(1)), '"prompt_id": the 2 siblings'),
        (put(batch.GROUP_ID, lambda x: x * 0), "unique to a draw"),
        (lambda env, td: td[:4], "batch_size must be"),
    ],
)
def test_a_broken_reset_is_named(spoil: Callable[..., TensorDict], says: str) -> None:
    env = make_env(Broken)
    env.spoil_reset = spoil
    with pytest.raises((AssertionError, ValueError), match=says):
        check_env(env)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (write_into, "step changed the batch"),
        (overwrite, "step changed the batch"),
        (drop(batch.PROMPT_ID), "keys .*prompt_id"),
        (drop(batch.REWARD), "no such key"),
        (drop(batch.UNSCORABLE), "no such key"),
        (drop(batch.FINISHED), "no such key"),
        (put(batch.REWARD, lambda x: x[:, 0]), r"must be float32 \[8, 1\]"),
        (put(batch.REWARD, lambda x: x.double()), "got float64"),
        (put(batch.REWARD, lambda x: x + torch.tensor([[torch.nan]] + [[0.0]] * 7)), "must be NaN where unscorable"),
        (put(batch.REWARD, lambda x: x + torch.tensor([[torch.inf]] + [[0.0]] * 7)), "infinite"),
        (put(batch.UNSCORABLE, lambda x: ~x), "must be NaN where unscorable"),
        (put(batch.TERMINATED, lambda x: ~x), "terminated"),
        (put(batch.DONE, lambda x: ~x), "terminated"),
        (put(batch.TRUNCATED, lambda x: ~x), "not finished"),
        (put(batch.TOKEN_REWARD, lambda x: x + 1), "0 outside the mask"),
        (put(batch.TOKEN_REWARD, lambda x: x * 2), "must sum to"),
        (drop(batch.REWARD_TERMS), "raw value"),
    ],
)
def test_a_broken_step_is_named(spoil: Callable[..., TensorDict], says: str) -> None:
    env = make_env(Broken)
    env.spoil_step = spoil
    with pytest.raises((AssertionError, ValueError), match=says):
        check_env(env)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (leaks_between_rows, "permuting rows"),
        (reads(batch.RESPONSE), "after the stop token"),
        (reads(batch.PROMPT), "ids behind a mask"),
        (reads(batch.RESPONSE_MASK), "width of the padding"),
        (put(batch.REWARD, lambda x: x.nan_to_num(0.0)), "empty response"),
    ],
)
def test_a_dishonest_reward_is_named(spoil: Callable[..., TensorDict], says: str) -> None:
    """No token rewards here, whose sum would tell first."""
    env = make_env(Broken, reward=[length])
    env.spoil_step = spoil
    if "empty" in says:  # scored with 0, and not told: trap 14
        honest = env.spoil_step
        env.spoil_step = lambda env, given, out: put(batch.UNSCORABLE, lambda x: x & False)(honest(env, given, out))
    with pytest.raises(AssertionError, match=says):
        check_env(env)


def test_a_hole_that_gets_a_score_is_named() -> None:
    def spoil(env: Broken, given: TensorDict, out: TensorDict) -> TensorDict:
        hole = given[batch.RESPONSE_MASK].any(-1) & ~given[batch.RESPONSE_MASK][:, 0]
        out = put(batch.UNSCORABLE, lambda x: x & ~hole)(out)
        return put(batch.REWARD, lambda x: x.masked_fill(hole[:, None], 0.0))(out)

    env = make_env(Broken, reward=[length])
    env.spoil_step = spoil
    with pytest.raises(AssertionError, match="a mask with a hole"):
        check_env(env)


class Forgetful(BanditEnv):
    """A state dict without the prompts' cursor."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rewards.load_state_dict(state["rewards"])


class Stuck(BanditEnv):
    """Draws the same prompts for ever."""

    def reset(self) -> TensorDict:
        self.stream.draws = 0
        return super().reset()


class Amnesiac(BanditEnv):
    """A state dict without the terms' statistics."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Forgetful, "must draw the same batch"),
        (Stuck, "must be of new draws"),
        (Amnesiac, "what was loaded"),
    ],
)
def test_a_broken_state_dict_is_named(kind: type[BanditEnv], says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        check_env(make_env(kind, reward=[RewardTerm(length, normalize="running")]))


STOPS = tuple(range(0, 259, 4))  # a quarter of all tokens, so that rows end everywhere


@pytest.mark.parametrize(
    ("key", "change", "says"),
    [
        (batch.LOG_PROBS, lambda x: x + 1, "0 outside the mask|at most 0"),
        (batch.LOG_PROBS, lambda x: x.double(), "must be float32"),
        (batch.RESPONSE_MASK, lambda x: x.flip(-1), "a run of True"),
        (batch.RESPONSE_MASK, lambda x: x | True, "end at the stop"),
        (batch.FINISHED, lambda x: ~x, "last token is a stop token"),
        (batch.TEMPERATURE, lambda x: x[:, None], r"must be float32 \[8\]"),
    ],
)
def test_a_broken_policy_is_named(key: batch.Key, change: Callable[[Tensor], Tensor], says: str) -> None:
    policy = CausalLMPolicy(tiny_lm(), byte_tokenizer(), sampling=Sampling(max_new_tokens=12, stop_ids=STOPS))
    generate = policy.generate
    policy.generate = lambda td: put(key, change)(generate(td))
    with pytest.raises((AssertionError, ValueError), match=says):
        check_env(make_env(), policy)


X = torch.arange(6.0)
MASK = X > 2


@pytest.mark.parametrize(
    "read",
    [
        lambda: X.sum().item(),
        lambda: bool(MASK.any()),
        lambda: int(X[0]),
        lambda: X.tolist(),
        lambda: X.numpy(),
        lambda: X.__array__(),
        lambda: X[MASK],
        lambda: X.clone().__setitem__(MASK, torch.ones(3)),
        lambda: MASK.nonzero(),
        lambda: torch.where(MASK),
        lambda: X.masked_select(MASK),
        lambda: X.unique(),
        lambda: X.unique_consecutive(),
        lambda: torch.equal(X, X),
        lambda: torch.allclose(X, X),
        lambda: X.repeat_interleave(torch.ones(6, dtype=torch.int64)),
        lambda: [float(x) for x in X],
    ],
)
def test_a_read_is_seen(read: Callable[[], object]) -> None:
    with pytest.raises(AssertionError, match="no_host_copy"), no_host_copy():
        read()
    read()  # and allowed again outside


def test_what_stays_on_the_device_passes() -> None:
    with no_host_copy():
        X.clone().masked_fill_(MASK, 0.0)[torch.tensor([1, 2])] = 1.0
        X.clone()[MASK] = 0.0
        X.repeat_interleave(2)
        X.repeat_interleave(torch.ones(6, dtype=torch.int64), output_size=6)
        torch.where(MASK, X, 0).cumsum(0).split([2, 4])


def test_copies_are_counted() -> None:
    with no_host_copy(allow=1):
        X.tolist()
    with pytest.raises(AssertionError, match="copy 2"), no_host_copy(allow=1):
        X.tolist()
        X.sum().item()


@pytest.mark.parametrize("reward", [lambda: [length, per_token], reward_model], ids=["functions", "models"])
def test_g1_reset_and_step_make_no_host_copy(reward: Callable[[], list[Any]]) -> None:
    env = make_env(reward=reward(), packing=False)
    policy = CausalLMPolicy(tiny_lm(), byte_tokenizer(), sampling=Sampling(max_new_tokens=6))
    answered = policy.generate(env.reset())
    env.step(answered)  # models load at their first use
    with no_host_copy():
        answered.update(env.reset())
        env.step(answered)
