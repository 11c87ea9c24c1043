"""A bandit small enough to learn in seconds, whose every part can be imported in an actor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fakes import byte_tokenizer, tiny_lm, tiny_reward_model

from torchbandit.env import BanditEnv
from torchbandit.generation import Sampling
from torchbandit.models import load_tokenizer
from torchbandit.prompts import PromptSet
from torchbandit.rewards import KLPenalty, RewardTerm
from torchbandit.rllib import BanditConfig

T = 6
NUM_PROMPTS = 24


def make_models(folder: Path) -> dict[str, str]:
    """A policy, a reward model and a corpus, saved the way a user has them."""
    tokenizer = byte_tokenizer()
    for name, model in (("policy", tiny_lm("llama")), ("reward", tiny_reward_model("llama"))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "corpus.txt").write_text("\n\n".join(f"text number {i} goes on" for i in range(40)))
    return {name: str(folder / name) for name in ("policy", "reward", "corpus.txt")}


def prefers_low_bytes(td: Any) -> torch.Tensor:
    """Share of response tokens below 64: 0.25 for a policy that knows nothing."""
    mask = td["masks", "response"]
    low = (td["tokens", "response"] < 64) & mask
    return low.sum(-1) / mask.sum(-1).clamp(min=1)


class ToyEnv:
    """An env_fn with its settings; picklable."""

    def __init__(
        self, policy: str, *, num_prompts: int = 4, group_size: int = 4, kl: float | None = None, **options: Any
    ) -> None:
        self.policy, self.num_prompts, self.group_size, self.kl = policy, num_prompts, group_size, kl
        self.options = options

    def __call__(self, worker_index: int, num_workers: int, device: torch.device) -> BanditEnv:
        tokenizer = load_tokenizer(self.policy)
        prompts = PromptSet.from_texts([f"p{i}" for i in range(NUM_PROMPTS)], tokenizer, max_length=8)
        terms: list[Any] = [RewardTerm(prefers_low_bytes, **self.options)]
        if self.kl is not None:
            terms.append(KLPenalty(self.policy, coef=self.kl))
        return BanditEnv(
            prompts, terms, num_prompts=self.num_prompts, group_size=self.group_size, device=device, seed=7,
            packing=False,
        )  # fmt: skip


def toy_config(
    policy: str, runners: int = 0, learners: int = 0, *, env_fn: Any = None, **training: Any
) -> BanditConfig:
    """The toy on `runners` and `learners`; one logical CPU each."""
    settings: dict[str, Any] = dict(algo="ppo", lr=3e-3, num_epochs=2, minibatch_size=16) | training
    return (
        BanditConfig()
        .bandit(env_fn=env_fn or ToyEnv(policy), sampling=Sampling(max_new_tokens=T))
        .env_runners(num_env_runners=runners, num_cpus_per_env_runner=1)
        .learners(num_learners=learners)
        .rl_module(pretrained=policy, packing=False)
        .training(**settings)
        .debugging(seed=3)
    )


def reward(result: dict[str, Any]) -> float:
    """Mean reward of an iteration."""
    return float(result["env_runners"]["reward"])
