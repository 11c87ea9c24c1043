"""`torchbandit train`: its options under headings, the demo where no policy is given, the engine that trains."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torchbandit.commands.command import Command, fail

GROUPS = {
    "model": (
        "policy", "reference", "critic", "dtype", "quantization",
    ),
    "data": (
        "prompts", "prompt_key", "prompt_template", "chat", "system_prompt", "chat_template", "chat_template_kwargs",
        "last_turn", "max_prompt_length", "overlong", "on_bad_row", "eval_prompts", "max_eval_prompts", "ptx_data",
        "ptx_key", "ptx_length", "eval_ptx_data",
    ),
    "reward": (
        "reward_model", "reward", "host_reward", "normalize_reward", "missing_eos_penalty", "length_penalty",
        "overlong_soft", "overlong_hard",
    ),
    "sampling": (
        "num_prompts", "group_size", "max_new_tokens", "temperature", "top_p", "top_k", "refill", "max_draws",
    ),
    "algorithm": (
        "algo", "kl_coef", "kl_in", "kl_estimator", "kl_target", "entropy_coef", "ptx_coef", "mask_truncated",
        "drop_constant_groups",
    ),
    "optimisation": (
        "steps", "epochs", "minibatches", "micro_batch_size", "ptx_batch_size", "lr", "schedule", "warmup_steps",
        "weight_decay", "max_grad_norm", "gradient_checkpointing",
    ),
    "run": (
        "name", "out", "resume", "extend", "seed", "save_every", "save_minutes", "keep_checkpoints", "log_with",
        "num_samples",
    ),
    "engine": (
        "engine", "env_runners", "learners", "device", "packing", "compile", "places",
    ),
}  # fmt: skip
"""Every option of `TrainOptions`, under one heading each. The algorithm's own stand after `algorithm`."""

_OTHER_SAMPLER = "it is for responses that another engine sampled, which `torchbandit train` never has; leave it out"
ELSEWHERE = {
    "algo_options": "give the algorithm's options by their own names, as --clip-high 0.28 or the key clip_high",
    "loss_kl_coef": "it follows from kl_coef and kl_in; give kl_coef, with kl_in=loss",
    "loss_kl_estimator": "it follows from kl_estimator and kl_in; give kl_estimator, with kl_in=loss",
    "mismatch": _OTHER_SAMPLER,
    "mismatch_per": _OTHER_SAMPLER,
    "mismatch_cap": _OTHER_SAMPLER,
}


def complete(given: dict[str, Any]) -> dict[str, Any]:
    """Without a policy of the user's, the demo; what was given wins."""
    from torchbandit.learn import DEFAULT_ALGORITHM
    from torchbandit.train.options import demo_defaults

    if given.get("policy") is not None:
        return given
    given = {name: value for name, value in given.items() if name not in ("policy", "prompts") or value is not None}
    named = [name for name, value in given.items() if value is not None and (name, value) != ("critic", "head")]
    demo = demo_defaults(named, given.get("algo", DEFAULT_ALGORITHM))
    return demo | given | {"algo_options": demo["algo_options"] | given["algo_options"]}


def run(options: Any) -> int:
    from torchbandit.train import folder
    from torchbandit.train.signals import Interrupted

    if folder.launched_rank() == 0:  # before models, or torch, are loaded for nothing
        folder.check(Path(options.out), options.resume)
    # Both engines take the same options and leave the same files.
    train = importlib.import_module(f"torchbandit.{'rllib' if options.engine == 'rllib' else 'train'}.run").train
    try:
        train(options)
    except Interrupted as stopped:
        return fail(stopped, 128 + stopped.number, "")
    return 0


TRAIN = Command(
    "Train a language model; without options, the demo.", "torchbandit.train.options:TrainOptions", run, complete,
    groups=GROUPS, elsewhere=ELSEWHERE, algorithm=True,
)  # fmt: skip
