"""The user's env_fn: called in every runner, where that runner lives, and what it returns is checked there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torchbandit.env import BanditEnv
from torchbandit.rllib.module import CausalLMModule, here


def call_env_fn(env_fn: Callable[..., Any], worker_index: int, num_workers: int, device: torch.device) -> BanditEnv:
    """The env of one runner, models loaded, its share of the prompts taken; ValueError where it cannot be had."""
    made_by, world_size = _named(env_fn), max(1, num_workers)
    try:
        env = env_fn(worker_index, num_workers, device)
        if isinstance(env, BanditEnv):
            for term in env.rewards.terms:  # now, and not in the first batch: weights may be missing on this node
                term.load(env.device)
    except Exception as error:
        raise ValueError(
            f"{made_by}: raised {type(error).__name__} on node {here()}: {error}. Every replica runs it on its own "
            "node and loads its models there: put them on all nodes or on shared storage, or give hub ids"
        ) from error
    if not isinstance(env, BanditEnv):
        raise ValueError(f"{made_by}: must return a BanditEnv, got {type(env).__name__}")
    if env.device != device:
        raise ValueError(
            f"{made_by}: must build the env on the device it is given, {device}, where the policy is, got "
            f"{env.device}; pass device=device to BanditEnv"
        )
    if world_size > len(env.prompts):
        raise ValueError(
            f"num_env_runners: must be at most the {len(env.prompts)} prompts of the set, got {world_size}; use "
            "fewer runners, or give more prompts"
        )
    env.shard(max(0, worker_index - 1), world_size)
    return env


def check_tokenizers(env_fn: Callable[..., Any], env: BanditEnv, module: CausalLMModule) -> None:
    """ValueError unless prompts and policy read the same ids; a token that differs is named."""
    ours, theirs = env.prompts.tokenizer.get_vocab(), module.policy.tokenizer.get_vocab()
    if ours != theirs:
        odd = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
        raise ValueError(
            f"{_named(env_fn)}: the prompts must be tokenised as the policy is ({len(theirs)} tokens), got another "
            f"tokenizer ({len(ours)} tokens; {odd[0]!r} differs); build the PromptSet with "
            f"load_tokenizer({str(module.model_config['pretrained'])!r})"
        )


def _named(env_fn: Callable[..., Any]) -> str:
    return f"bandit(env_fn={getattr(env_fn, '__qualname__', None) or type(env_fn).__name__})"
