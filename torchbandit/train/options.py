"""One field per option of `torchbandit train`; the same names are the keys of `--config run.yaml`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from torchbandit import demo

DEMO_SETTINGS: dict[str, Any] = dict(
    steps=60, num_prompts=64, group_size=2, max_new_tokens=32, epochs=2, minibatches=2, lr=2.5e-4, warmup_steps=5,
    kl_coef=0.1, value_coef=0.1, value_clip=0.0, max_grad_norm=0.5, ptx_coef=1.0, ptx_batch_size=32, ptx_length=128,
)  # fmt: skip
"""Found on the demo's 0.4 million parameters; a real model wants a far smaller learning rate."""


@dataclass
class LoopOptions:
    """What `BanditTrainer` needs to know beside its env and policy.

    Args:
        algo: ppo (GAE and a critic), rloo or grpo.
        steps: Batches to train on.
        epochs: Passes over each batch.
        minibatches: Optimizer updates a pass.
        micro_batch_size: Rows a forward and backward pass. Default: a whole minibatch.
        gradient_checkpointing: Recompute activations in the backward pass.
        lr: Learning rate of AdamW.
        schedule: Learning rate over the run, after the warm-up.
        warmup_steps: Steps of linear warm-up.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are clipped to this norm.
        clip: Ratio clip of the policy loss.
        clip_high: Upper ratio clip where it differs (clip-higher).
        value_clip: Clip of the value loss; 0 for none.
        value_coef: Weight of the value loss.
        entropy_coef: Weight of the entropy bonus.
        gamma: Discount of GAE.
        lam: Lambda of GAE.
        loss_kl_coef: Weight of the k3 KL to the reference in the loss of grpo.
        dr_grpo: GRPO without the division by the group's deviation and by response length (Dr. GRPO).
        drop_constant_groups: Leave groups of equal rewards out of the loss.
        ptx_coef: Weight of the pretraining loss (InstructGPT's gamma).
        ptx_batch_size: Pretraining rows an update. Default: as many as the update has rows.
        seed: Of prompts, sampling and minibatches.
        out: Folder of the run. Default: runs/NAME.
        save_every: Steps between checkpoints; 0 for the end alone.
        log_with: Trackers of accelerate: tensorboard, wandb, …
    """

    algo: Literal["ppo", "rloo", "grpo"] = "ppo"
    steps: int = 100
    epochs: int = 1
    minibatches: int = 1
    micro_batch_size: int | None = None
    gradient_checkpointing: bool = False
    lr: float = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    clip: float = 0.2
    clip_high: float | None = None
    value_clip: float = 0.2
    value_coef: float = 0.5
    entropy_coef: float = 0.0
    gamma: float = 1.0
    lam: float = 0.95
    loss_kl_coef: float = 0.0
    dr_grpo: bool = False
    drop_constant_groups: bool = False
    ptx_coef: float = 0.0
    ptx_batch_size: int | None = None
    seed: int = 0
    out: str = ""
    save_every: int = 50
    log_with: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        least: dict[str, float] = dict(
            steps=1, epochs=1, minibatches=1, micro_batch_size=1, lr=0, warmup_steps=0, weight_decay=0,
            max_grad_norm=0, clip=0, clip_high=0, value_clip=0, value_coef=0, gamma=0, lam=0, loss_kl_coef=0,
            ptx_coef=0, ptx_batch_size=1, save_every=0, seed=0,
        )  # fmt: skip
        for name, floor in least.items():
            value = getattr(self, name)
            # `not >=` also catches NaN.
            if value is not None and not value >= floor:
                raise ValueError(f"{name}: must be at least {floor}, got {value}")
        for name, ceiling in dict(gamma=1, lam=1, seed=2**31 - 1).items():
            if getattr(self, name) > ceiling:
                raise ValueError(f"{name}: must be at most {ceiling}, got {getattr(self, name)}")
        if self.algo not in ("ppo", "rloo", "grpo"):
            raise ValueError(f"algo: must be ppo, rloo or grpo, got {self.algo!r}")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"schedule: must be constant, linear or cosine, got {self.schedule!r}")


@dataclass
class TrainOptions(LoopOptions):
    """Options of `torchbandit train`. With no policy of one's own, the demo that ships with the package is trained.

    Args:
        policy: Model to train: folder or hub id. Default: the demo.
        reference: Frozen model of the KL term. Default: the policy's own starting weights.
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
        critic: "head" for a value head on the policy, or a model of its own. Default: "head" with ppo.
        ptx_data: Pretraining text: any of those files; in a text file, documents are parted by blank lines.
        ptx_key: Column of the pretraining text.
        ptx_length: Tokens a pretraining row.
        eval_prompts: Held-out prompts, scored before and after. Default: none, the first training prompts serve.
        eval_ptx_data: Held-out text, its loss taken before and after.
        num_prompts: Prompts a batch, on each process.
        group_size: Responses a prompt. Default: 1 for ppo, 4 for rloo and grpo.
        max_new_tokens: Longest response.
        temperature: Of sampling, and of every log-prob.
        top_p: Refused in training unless 1: log-probs would be of another distribution.
        top_k: Refused in training unless 0, for the same reason.
        kl_coef: Weight of the KL to the reference: in the reward for ppo and rloo, in the loss for grpo.
        kl_target: KL in nats a response to steer the coefficient to (Ziegler et al. 2019). Default: fixed.
        length_penalty: Reward taken off for each response token.
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
        num_samples: Prompts of samples.md.
        engine: local, or rllib.
        env_runners: Env runners of the rllib engine.
        learners: Learners of the rllib engine.
    """

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
    eval_ptx_data: str | None = None
    num_prompts: int = 64
    group_size: int | None = None
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    kl_coef: float = 0.05
    kl_target: float | None = None
    length_penalty: float = 0.0
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
    num_samples: int = 8
    engine: Literal["local", "rllib"] = "local"
    env_runners: int = 0
    learners: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.policy is None:
            raise ValueError(
                "policy: must be a folder or hub id, got none; the demo is TrainOptions(**demo_defaults())"
            )
        if self.prompts is None:
            raise ValueError("prompts: must be given with policy, got none; pass a file with a prompt a row")
        if not (self.reward_model or self.reward or self.host_reward):
            raise ValueError("reward_model: give a reward_model, a reward or a host_reward; got none of them")
        least = dict(num_prompts=1, group_size=1, max_new_tokens=1, max_prompt_length=1, ptx_length=1, num_samples=0)
        for name, floor in least.items():
            value = getattr(self, name)
            if value is not None and value < floor:
                raise ValueError(f"{name}: must be at least {floor}, got {value}")
        if self.temperature <= 0 or self.top_p != 1 or self.top_k != 0:
            raise ValueError(
                "temperature, top_p, top_k: training samples with a temperature above 0 alone (log-probs are those of "
                f"softmax(logits / temperature)), got temperature={self.temperature}, top_p={self.top_p}, "
                f"top_k={self.top_k}; truncate when you evaluate"
            )
        if min(self.env_runners, self.learners) < 0:
            raise ValueError(f"env_runners, learners: must be at least 0, got {self.env_runners} and {self.learners}")
        if self.engine == "local" and (self.env_runners or self.learners):
            raise ValueError(
                f"env_runners={self.env_runners}, learners={self.learners}: are of the rllib engine; add --engine rllib"
            )
        if self.ptx_coef and self.ptx_data is None:
            raise ValueError(f"ptx_data: must be given with ptx_coef={self.ptx_coef}, got none")
        self.out = self.out or f"runs/{self.name or 'torchbandit'}"
        if self.group_size is None:
            self.group_size = 1 if self.algo == "ppo" else 4
        if self.algo == "grpo":
            self.loss_kl_coef = self.kl_coef


def demo_defaults(given: Collection[str] = ()) -> dict[str, Any]:
    """What `torchbandit train` takes where no policy is given: the demo's files, and settings that fit its size.

    Args:
        given: names of the options that the user has set.
    Raises:
        ValueError: one of them is a model or prompt file, which the demo's tokenizer could not read.
    """
    own = [name for name in ("prompts", "reward_model", "reference", "critic") if name in given]
    if own:
        raise ValueError(
            f"policy: must be given with {own[0]}, got none; the demo's policy reads the demo's tokens only. Pass "
            "policy, prompts and a reward of your own, or none of them"
        )
    return {
        "policy": str(demo.SFT),
        "reward_model": [str(demo.REWARD_MODEL)],
        "prompts": str(demo.PROMPTS),
        "ptx_data": str(demo.CORPUS),
        "eval_prompts": str(demo.HELDOUT_PROMPTS),
        "eval_ptx_data": str(demo.HELDOUT_CORPUS),
        "name": "demo",
    } | DEMO_SETTINGS
