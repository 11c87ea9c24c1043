"""One field per option of `torchbandit train`; the same names are the keys of `--config run.yaml`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from torchbandit import demo
from torchbandit.learn import DEFAULT_ALGORITHM
from torchbandit.learn.algorithm import KLWhere
from torchbandit.learn.checks import at_least
from torchbandit.learn.find import check_groups, find_algorithm, make_algorithm
from torchbandit.learn.options import UpdateOptions
from torchbandit.losses.choices import LossKLEstimator

DEMO_SETTINGS: dict[str, Any] = dict(
    steps=60, num_prompts=64, group_size=2, max_new_tokens=32, epochs=2, minibatches=2, lr=2.5e-4, warmup_steps=5,
    kl_coef=0.1, max_grad_norm=0.5, ptx_coef=1.0, ptx_batch_size=32, ptx_length=128,
)  # fmt: skip
DEMO_ALGO_OPTIONS: dict[str, Any] = dict(value_coef=0.1, value_clip=0.0)  # of the algorithms that have them
"""Found on the demo's 0.4 million parameters; a real model wants a far smaller learning rate."""


@dataclass
class LoopOptions(UpdateOptions):
    """What `BanditTrainer` needs to know beside its env, policy and algorithm.

    Args:
        steps: Batches to train on.
        gradient_checkpointing: Recompute activations in the backward pass.
        lr: Learning rate of AdamW.
        schedule: Learning rate over the run, after the warm-up.
        warmup_steps: Steps of linear warm-up.
        weight_decay: Of AdamW.
        out: Folder of the run. Default: runs/NAME.
        save_every: Steps between checkpoints; 0 for none by steps.
        save_minutes: Minutes between checkpoints, at most, beside save_every; 0 for none by the clock. With both 0 a
            checkpoint is written at the end alone, else also after the first step.
        keep_checkpoints: How many of the last checkpoints are kept.
        log_with: Trackers of accelerate: tensorboard, wandb, …
    """

    steps: int = 100
    gradient_checkpointing: bool = False
    lr: float = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    out: str = ""
    save_every: int = 50
    save_minutes: float = 10.0
    keep_checkpoints: int = 2
    log_with: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, steps=self.steps)
        at_least(0, lr=self.lr, warmup_steps=self.warmup_steps, weight_decay=self.weight_decay)
        at_least(0, save_every=self.save_every, save_minutes=self.save_minutes)
        at_least(1, keep_checkpoints=self.keep_checkpoints)
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"schedule: must be constant, linear or cosine, got {self.schedule!r}")


@dataclass
class TrainOptions(LoopOptions):
    """Options of `torchbandit train`. With no policy of one's own, the demo that ships with the package is trained.

    Args:
        algo: Algorithm: a name of `torchbandit.learn.ALGORITHMS`, or a class of your own as package.module:Class.
        algo_options: The algorithm's own options, by name.
        policy: Model to train: folder or hub id. Default: the demo.
        reference: Frozen model of the KL. Default: the policy's starting weights, or none where kl_coef is 0.
        reward_model: One-label sequence classifier; several are averaged.
        reward: Rewards `package.module:function`: a torch function of the TensorDict, returning [B] or [B, T].
        host_reward: String functions `package.module:function`, called as fn(prompts, completions, **columns).
        prompts: File, folder, glob or hub dataset (name:split) of prompts: JSONL, JSON, CSV, TSV, Parquet, Arrow, text.
        prompt_key: Column of the prompt: a text, or a list of chat messages.
        prompt_template: Makes the prompt of a row's columns, as "Q: {question}\\nA:"; \\n is a newline.
        max_prompt_length: Tokens of a prompt; see overlong. Default: what the context leaves.
        chat: Render prompts with the tokenizer's chat template.
        system_prompt: Put in front of each chat that has none of its own.
        chat_template: Jinja file, in place of the tokenizer's template.
        chat_template_kwargs: Variables of the template, as JSON.
        last_turn: Of a chat that ends with the assistant: continue it, or drop it as an answer.
        on_bad_row: Of rows without a prompt: error, or skip.
        overlong: Of longer prompts: error, drop, or cut to the last tokens. Default: texts are cut, chats an error.
        critic: "head" for a value head on the policy, or a model of its own. Default: what the algorithm needs.
        ptx_data: Pretraining text: any of those files; in a text file, documents are parted by blank lines.
        ptx_key: Column of the pretraining text.
        ptx_length: Tokens a pretraining row.
        eval_prompts: Held-out prompts, scored before and after. Default: none, the first training prompts serve.
        max_eval_prompts: How many of them, the first. Default: all held-out ones; 512 where training prompts serve.
        eval_ptx_data: Held-out text, its loss taken before and after.
        num_prompts: Prompts a batch, on each process.
        group_size: Responses a prompt. Default: the algorithm's.
        max_new_tokens: Longest response.
        temperature: Of sampling, and of every log-prob.
        top_p: Refused in training unless 1: log-probs would be of another distribution.
        top_k: Refused in training unless 0, for the same reason.
        kl_coef: Weight of the KL to the reference; 0: no KL, and no reference unless one is named.
        kl_in: Where the KL goes: into the reward of each token, the reward of the response, or the loss. Default: the
            algorithm's paper decides.
        kl_estimator: k1, k2, k3, or weighted_k3 (in the loss alone). Default: the algorithm's paper decides.
        kl_target: KL in nats a response to steer the coefficient to (Ziegler et al. 2019). Default: fixed.
        length_penalty: Reward taken off for each response token.
        overlong_soft: Response length from which DAPO's overlong punishment begins.
        overlong_hard: Length at which it is 1. Default: max_new_tokens.
        missing_eos_penalty: Reward-model score taken off a response that did not end.
        normalize_reward: Normalise reward-model scores over the batch or over the run.
        device: Default: cuda where there is one, else cpu.
        dtype: Of the weights in forward passes: bfloat16 on cuda, float32 on cpu; optimizers keep float32.
        quantization: Of reward model and reference: nf4, int8 or fp8.
        packing: Score models packed (auto: where they can be).
        compile: Compile the models' layers (auto: on cuda).
        places: Rows in the decode cache at a time. Default: a whole batch.
        name: Name of the run.
        resume: Go on from the checkpoint in `out`.
        extend: At a resume with other steps, stretch the schedule of the learning rate to the new length, from here on.
        num_samples: Prompts of samples.md.
        engine: local, or rllib.
        env_runners: Env runners of the rllib engine.
        learners: Learners of the rllib engine.
    """

    algo: str = DEFAULT_ALGORITHM
    algo_options: dict[str, Any] = field(default_factory=dict)
    policy: str | None = None
    reference: str | None = None
    reward_model: list[str] = field(default_factory=list)
    reward: list[str] = field(default_factory=list)
    host_reward: list[str] = field(default_factory=list)
    prompts: str | None = None
    prompt_key: str = "prompt"
    max_prompt_length: int | None = None
    chat: bool = False
    prompt_template: str | None = None
    system_prompt: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    last_turn: Literal["continue", "drop"] | None = None
    on_bad_row: Literal["error", "skip"] = "error"
    overlong: Literal["error", "drop", "cut"] | None = None
    critic: str | None = None
    ptx_data: str | None = None
    ptx_key: str = "text"
    ptx_length: int = 512
    eval_prompts: str | None = None
    max_eval_prompts: int | None = None
    eval_ptx_data: str | None = None
    num_prompts: int = 64
    group_size: int | None = None
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    kl_coef: float = 0.05
    kl_in: KLWhere | None = None
    kl_estimator: LossKLEstimator | None = None
    kl_target: float | None = None
    length_penalty: float = 0.0
    overlong_soft: int | None = None
    overlong_hard: int | None = None
    missing_eos_penalty: float | None = None
    normalize_reward: Literal["batch", "running"] | None = None
    device: str | None = None
    dtype: str = "auto"
    quantization: Literal["nf4", "int8", "fp8"] | None = None
    packing: bool | Literal["auto"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    places: int | None = None
    name: str | None = None
    resume: bool = False
    extend: bool = False
    num_samples: int = 8
    engine: Literal["local", "rllib"] = "local"
    env_runners: int = 0
    learners: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.algorithm = make_algorithm(self.algo, self.algo_options)
        # What came out stands in the fields, so that runs compare by all that decides them.
        self.algo_options = {own.name: getattr(self.algorithm, own.name) for own in fields(self.algorithm)}
        if self.policy is None:
            raise ValueError(
                "policy: must be a folder or hub id, got none; the demo is TrainOptions(**demo_defaults())"
            )
        if self.prompts is None:
            raise ValueError("prompts: must be given with policy, got none; pass a file with a prompt a row")
        if not (self.reward_model or self.reward or self.host_reward):
            raise ValueError("reward_model: give a reward_model, a reward or a host_reward; got none of them")
        self._check_numbers()
        if self.temperature <= 0 or self.top_p != 1 or self.top_k != 0:
            raise ValueError(
                "temperature, top_p, top_k: training samples with a temperature above 0 alone (log-probs are those of "
                f"softmax(logits / temperature)), got temperature={self.temperature}, top_p={self.top_p}, "
                f"top_k={self.top_k}; truncate when you evaluate"
            )
        if self.engine == "local" and (self.env_runners or self.learners):
            raise ValueError(
                f"env_runners={self.env_runners}, learners={self.learners}: are of the rllib engine; add --engine rllib"
            )
        if self.extend and not self.resume:
            raise ValueError("extend: is of a run that goes on; add --resume, or leave it out")
        if self.ptx_coef and self.ptx_data is None:
            raise ValueError(f"ptx_data: must be given with ptx_coef={self.ptx_coef}, got none")
        self.out = self.out or f"runs/{self.name or 'torchbandit'}"
        self._fit_to_algorithm()
        self._place_kl()

    def _check_numbers(self) -> None:
        least = dict(
            num_prompts=1, group_size=1, max_new_tokens=1, max_prompt_length=1, ptx_length=1, num_samples=0,
            max_eval_prompts=1, overlong_soft=0, overlong_hard=1, env_runners=0, learners=0, kl_coef=0,
        )  # fmt: skip
        for name, floor in least.items():
            value = getattr(self, name)
            if value is not None and not value >= floor:
                raise ValueError(f"{name}: must be at least {floor}, got {value}")
        if self.overlong_hard is not None and self.overlong_soft is None:
            raise ValueError(f"overlong_soft: must be given with overlong_hard={self.overlong_hard}, got none")
        if self.overlong_soft is not None:
            hard = self.max_new_tokens if self.overlong_hard is None else self.overlong_hard
            if not self.overlong_soft < hard:
                raise ValueError(f"overlong_soft: must be below overlong_hard={hard}, got {self.overlong_soft}")

    def _fit_to_algorithm(self) -> None:
        algorithm = self.algorithm
        if self.group_size is None:
            self.group_size = algorithm.default_group_size
        check_groups(self.algo, self.group_size, refill=self.refill)
        if self.critic is not None and not algorithm.needs_critic:
            raise ValueError(f"critic: {self.algo} has no use for one, got {self.critic!r}; leave it out")
        if algorithm.needs_critic and self.critic is None:
            self.critic = "head"
        if self.critic in ("", "none", "null"):
            raise ValueError(
                f"critic: {self.algo} needs one, got {self.critic!r}; 'head' is a value head on the policy"
            )
        if self.max_draws != 4 and not self.refill:
            raise ValueError(f"max_draws={self.max_draws}: is of dynamic sampling; add refill")

    def _place_kl(self) -> None:
        """Where the run's KL goes: `loss_kl_coef` follows from it, and `build_terms` reads the rest."""
        default = self.algorithm.kl_default
        if self.kl_coef == 0:
            given = [name for name in ("kl_in", "kl_estimator", "kl_target") if getattr(self, name) is not None]
            if given:
                raise ValueError(f"{given[0]}: needs a kl_coef above 0, got kl_coef=0")
        where = self.kl_in or default.where
        estimator = self.kl_estimator or (default.estimator if where == default.where else _USUAL[where])
        if where not in get_args(KLWhere):
            raise ValueError(f"kl_in: must be {', '.join(get_args(KLWhere))}, got {self.kl_in!r}")
        if estimator not in get_args(LossKLEstimator):
            raise ValueError(f"kl_estimator: must be {', '.join(get_args(LossKLEstimator))}, got {estimator!r}")
        if where != "loss" and estimator == "weighted_k3":
            raise ValueError(f"kl_estimator: weighted_k3 is for kl_in=loss, got kl_in={where}; use k1 or k3")
        if where == "loss" and self.kl_target is not None:
            raise ValueError("kl_target: steers a KL in the reward; add kl_in=reward-token or reward-response")
        if self.loss_kl_coef not in (0.0, self.kl_coef):
            raise ValueError(f"loss_kl_coef: follows from kl_coef and kl_in, got {self.loss_kl_coef}; set those")
        self.kl_where, self.kl_estimate = where, estimator
        if self.kl_coef:
            self.kl_in, self.kl_estimator = where, estimator
        if where == "loss":
            self.loss_kl_coef, self.loss_kl_estimator = self.kl_coef, estimator


_USUAL: dict[str, LossKLEstimator] = {"reward-token": "k1", "reward-response": "k1", "loss": "k3"}
"""The estimate of a KL that is put elsewhere than its algorithm's paper has it."""


def demo_defaults(given: Collection[str] = (), algo: str = DEFAULT_ALGORITHM) -> dict[str, Any]:
    """What `torchbandit train` takes where no policy is given: the demo's files, and settings that fit its size.

    Args:
        given: names of the options that the user has set.
        algo: the algorithm, whose own options are among the settings, as `algo_options`.
    Raises:
        ValueError: one of them is a model or prompt file, which the demo's tokenizer could not read.
    """
    algorithm = find_algorithm(algo)
    files = ["prompts", "reward_model", "reference"] + ["critic"] * algorithm.needs_critic
    own = [name for name in files if name in given]
    if own:
        raise ValueError(
            f"policy: must be given with {own[0]}, got none; the demo's policy reads the demo's tokens only. Pass "
            "policy, prompts and a reward of your own, or none of them"
        )
    own_options = {option.name for option in fields(algorithm)}
    settings = DEMO_SETTINGS | {"group_size": max(DEMO_SETTINGS["group_size"], algorithm.least_group_size)}
    return {
        "policy": str(demo.SFT),
        "reward_model": [str(demo.REWARD_MODEL)],
        "prompts": str(demo.PROMPTS),
        "ptx_data": str(demo.CORPUS),
        "eval_prompts": str(demo.HELDOUT_PROMPTS),
        "eval_ptx_data": str(demo.HELDOUT_CORPUS),
        "name": "demo",
        "algo_options": {name: value for name, value in DEMO_ALGO_OPTIONS.items() if name in own_options},
    } | settings
