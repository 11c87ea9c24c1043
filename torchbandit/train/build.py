"""From options to parts: what `torchbandit train` and the RLlib engine both stand on."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from torchbandit.corpus import Corpus
from torchbandit.env import BanditEnv
from torchbandit.generation import Sampling
from torchbandit.models import ModelSpec, load_tokenizer
from torchbandit.policy import CausalLMPolicy
from torchbandit.prompts import PromptSet
from torchbandit.rewards import HostReward, KLPenalty, LengthPenalty, OverlongPenalty, RewardModel, RewardTerm
from torchbandit.train.options import TrainOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def pick_device(options: TrainOptions) -> torch.device:
    """The device of this process: `options.device`, else cuda (the local one of several) where there is one."""
    wanted = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ValueError(f"device: must be cpu, cuda or cuda:N, got {wanted!r}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: {wanted} was asked for, and torch sees no CUDA device; use --device cpu")
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(f"device: cuda:{index} was asked for, torch sees {torch.cuda.device_count()} device(s)")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def build_accelerator(options: TrainOptions, device: torch.device) -> Accelerator:
    """This process among the others, with the trackers of `log_with`.

    Raises:
        ValueError: a tracker is unknown or not installed: a run whose curves go nowhere is found out too late.
    """
    there = [str(tracker.value) for tracker in get_available_trackers()]
    for name in options.log_with:
        if name not in there:
            raise ValueError(
                f"log_with: must be trackers that are installed ({', '.join(there) or 'none is'}), got {name!r}; "
                "install its package, or leave it out"
            )
    return Accelerator(cpu=device.type == "cpu", log_with=list(options.log_with) or None, project_dir=options.out)


def build_prompts(options: TrainOptions, path: str, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """The prompts of a file, of no more tokens than what the policy's context leaves beside a whole response."""
    assert options.policy is not None
    context = _context(options.policy, tokenizer)
    room = context - options.max_new_tokens
    length = room if options.max_prompt_length is None else options.max_prompt_length
    if room < 1:
        raise ValueError(
            f"max_new_tokens: must leave room for a prompt in the policy's context of {context} tokens, "
            f"got {options.max_new_tokens}"
        )
    if length > room:
        raise ValueError(
            f"max_prompt_length, max_new_tokens: together at most the policy's context of {context} tokens, "
            f"got {length} and {options.max_new_tokens}"
        )
    template = options.prompt_template
    return PromptSet.from_file(
        path,
        tokenizer,
        prompt_key=options.prompt_key,
        max_length=length,
        option="--prompts",
        chat=options.chat,
        prompt_template=None if template is None else template.replace("\\n", "\n"),  # as a shell hands it over
        system_prompt=options.system_prompt,
        chat_template=options.chat_template,
        chat_template_kwargs=options.chat_template_kwargs or {},
        last_turn=options.last_turn,
        on_bad_row=options.on_bad_row,
        overlong=options.overlong,
    )


def _context(policy: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that the model's positions and its tokenizer allow."""
    from torchbandit.models import context_length

    found = [n for n in (context_length(policy), tokenizer.model_max_length) if n is not None and n < 10**9]
    return min(found, default=10**9)


def build_terms(options: TrainOptions, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """The reward terms: models first, then functions, length, KL. Models are named by path and load in place."""
    frozen: dict[str, Any] = dict(dtype=options.dtype, quantization=options.quantization, compile=options.compile)
    terms: list[Any] = []
    if options.reward_model:
        terms.append(
            RewardModel(
                [ModelSpec(path, **frozen) for path in options.reward_model],
                normalize=options.normalize_reward,
                missing_eos_penalty=options.missing_eos_penalty,
            )
        )
    terms += [RewardTerm(import_function(name, "reward")) for name in options.reward]
    terms += [HostReward(import_function(name, "host_reward"), tokenizer) for name in options.host_reward]
    if options.length_penalty:
        terms.append(LengthPenalty(options.length_penalty))
    if options.overlong_soft is not None:
        hard = options.max_new_tokens if options.overlong_hard is None else options.overlong_hard
        terms.append(OverlongPenalty(soft=options.overlong_soft, hard=hard))
    assert options.policy is not None
    if options.kl_coef or options.reference:  # nobody pays for a reference that nothing reads
        terms.append(
            KLPenalty(
                ModelSpec(options.reference or options.policy, **frozen),
                # A KL in the loss is only recorded here, with the reference's log-probs.
                coef=0.0 if options.kl_where == "loss" else options.kl_coef,
                estimator="k1" if options.kl_estimate == "weighted_k3" else options.kl_estimate,
                per_token=options.kl_where == "reward-token",
                target=options.kl_target,
            )
        )
    return terms


def build_env(
    options: TrainOptions, tokenizer: PreTrainedTokenizerBase, device: torch.device, *, terms: list[Any] | None = None,
    prompts: str | None = None,
) -> BanditEnv:  # fmt: skip
    """The env of one process; `prompts` names another file than the training one (evaluation)."""
    path = prompts or options.prompts
    assert path is not None and options.group_size is not None
    table = build_prompts(options, path, tokenizer)
    num = min(options.num_prompts, len(table)) if prompts else options.num_prompts
    return BanditEnv(
        table,
        build_terms(options, tokenizer) if terms is None else terms,
        num_prompts=num,
        group_size=options.group_size,
        device=device,
        seed=options.seed,
        packing=options.packing,
    )


def build_sampling(options: TrainOptions) -> Sampling:
    """How responses are drawn."""
    return Sampling(max_new_tokens=options.max_new_tokens, temperature=options.temperature, places=options.places)


def build_policy(options: TrainOptions, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> CausalLMPolicy:
    """The trainable policy, with the critic that the algorithm needs."""
    assert options.policy is not None
    critic = options.critic
    return CausalLMPolicy(
        ModelSpec(options.policy, dtype=options.dtype, compile=options.compile),
        tokenizer,
        sampling=build_sampling(options),
        critic=critic if critic in (None, "head") else ModelSpec(critic, dtype=options.dtype, compile=options.compile),
        device=device,
        seed=options.seed,
        packing=options.packing,
    )


def build_corpus(
    options: TrainOptions, path: str | None, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Corpus | None:
    """Pretraining rows of a file, or None without one."""
    if path is None:
        return None
    length = ptx_length(options, tokenizer)
    return Corpus.from_file(path, tokenizer, key=options.ptx_key, max_length=length, seed=options.seed, device=device)


def ptx_length(options: TrainOptions, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens a pretraining row: `options.ptx_length`, or the policy's context where that is shorter."""
    assert options.policy is not None
    return min(options.ptx_length, _context(options.policy, tokenizer))


def build_tokenizer(options: TrainOptions) -> PreTrainedTokenizerBase:
    """The policy's tokenizer; every other model must read the same ids."""
    assert options.policy is not None
    return load_tokenizer(options.policy)


def import_function(name: str, option: str) -> Callable[..., Any]:
    """`package.module:function`, the current folder included.

    Raises:
        ValueError: the name is not of this form, or leads to nothing callable.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise ValueError(f"{option}: must be package.module:function, got {name!r}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise ValueError(
            f"{option}: {module_name!r} cannot be imported ({error}); run where it can, or install it"
        ) from error
    except AttributeError:
        raise ValueError(f"{option}: module {module_name!r} has no {attribute!r}") from None
    if not callable(function):
        raise ValueError(f"{option}: {name!r} must be a function, got {type(function).__name__}")
    made: Callable[..., Any] = function
    return made
