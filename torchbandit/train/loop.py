"""The training loop: draw, generate, score, learn. Read it top to bottom; subclass it to change a part.

What an algorithm is and how a batch is learnt from stands in `torchbandit.learn`; here is who calls it. One process or
many (`accelerate launch`): every rank draws its own prompts, and the sums that decide denominators, whitening and
metrics are taken over all ranks, so W processes compute what one with W times the batch would.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from accelerate import Accelerator
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from torchbandit.clock import Clock
from torchbandit.corpus import Corpus
from torchbandit.env import BanditEnv
from torchbandit.learn.algorithm import Algorithm, Denominators
from torchbandit.learn.collect import EnvDraw, Generate, collect
from torchbandit.learn.completed import with_log_probs
from torchbandit.learn.find import check_groups, name_of
from torchbandit.learn.metrics import Metrics, to_host
from torchbandit.learn.ranks import Ranks
from torchbandit.learn.seeds import sampling_seed
from torchbandit.learn.update import SKIPPED_IN_A_ROW, Update, why_skipped
from torchbandit.losses import Loss
from torchbandit.masters import MasterOptimizer
from torchbandit.models import check_apart
from torchbandit.policy import CausalLMPolicy
from torchbandit.train.options import LoopOptions


class RunStopped(ValueError):
    """The run cannot go on; the message says why."""


class BanditTrainer:
    """Trains a policy on an env with an algorithm, with or without a pretraining loss (ptx).

    Args:
        env: built for this process's share; the trainer shards it.
        policy: with a critic where the algorithm needs one.
        algorithm: of `torchbandit.learn`, or your own.
        options: see `LoopOptions`.
        corpus: pretraining rows, needed where `options.ptx_coef` is above 0.
        accelerator: one of your own; the default serves one process and `accelerate launch` alike.
        generate: answers prompts in place of the policy: td -> td with the response keys. Another engine writes
            ("log_probs","sampler"), and the policy's own log-probs are computed where they are absent.
    Raises:
        ValueError: algorithm, options, policy, env and corpus do not go together.
    """

    def __init__(
        self,
        env: BanditEnv,
        policy: CausalLMPolicy,
        algorithm: Algorithm,
        options: LoopOptions,
        *,
        corpus: Corpus | None = None,
        accelerator: Accelerator | None = None,
        generate: Generate | None = None,
    ) -> None:
        if not isinstance(algorithm, Algorithm):
            raise ValueError(
                f"algorithm: must be an instance of torchbandit.learn.Algorithm, as GRPO(clip=0.2), got {algorithm!r}"
            )
        self.algorithm, self.options, self.env, self.policy, self.corpus = algorithm, options, env, policy, corpus
        self._check()
        self.accelerator = accelerator or Accelerator(cpu=env.device.type == "cpu")
        self.world_size, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.ranks = Ranks(self.rank, self.world_size, self._reduce if self.world_size > 1 else None)
        env.shard(self.rank, self.world_size, self.ranks.sum)
        if corpus is not None:
            corpus.shard(self.rank, self.world_size)
        # Each rank samples its own tokens, but all agree on the order of minibatches.
        policy.generator.manual_seed(sampling_seed(options.seed, self.rank))
        if options.gradient_checkpointing:
            policy.gradient_checkpointing_enable()
        self.optimizer = MasterOptimizer(
            [p for p in policy.parameters() if p.requires_grad], lr=options.lr, weight_decay=options.weight_decay
        )
        # The wrapped module's forward is what averages gradients over ranks (trap 19).
        self.model = self.accelerator.prepare_model(policy) if self.world_size > 1 else policy
        self.update = Update(
            policy, algorithm, options, self.optimizer, group_size=env.group_size, ptx=corpus, ranks=self.ranks,
            forward=self.model, loss=self.loss, **self._no_sync(),
        )  # fmt: skip
        self._generate = generate or self.generate
        self._must_complete = generate is not None
        self.steps_done = 0

    def _no_sync(self) -> dict[str, Any]:
        return {"no_sync": lambda: self.accelerator.no_sync(self.model)} if self.world_size > 1 else {}

    def _check(self) -> None:
        options, policy, algorithm = self.options, self.policy, self.algorithm
        name = name_of(algorithm)
        if algorithm.needs_critic and not policy.has_critic:
            raise ValueError(f'critic: {name} needs one, got none; build the policy with critic="head" or a model')
        if not algorithm.needs_critic and policy.has_critic:
            raise ValueError(f"critic: {name} has no use for one; build the policy with critic=None")
        check_groups(algorithm, self.env.group_size, refill=options.refill)
        if options.ptx_coef and self.corpus is None:
            raise ValueError(f"corpus: must be given with ptx_coef={options.ptx_coef}, got none")
        if options.minibatches > self.env.num_prompts:
            raise ValueError(
                f"minibatches: must be at most num_prompts={self.env.num_prompts} (siblings stay together), "
                f"got {options.minibatches}"
            )
        sampling = policy.sampling
        if sampling.temperature <= 0 or sampling.top_k or sampling.top_p != 1:
            raise ValueError(f"sampling: training draws with a temperature above 0 alone, got {sampling}")
        check_apart(policy, {term.name: term.models() for term in self.env.rewards.terms})
        if policy.device != self.env.device:
            raise ValueError(f"device: the policy is on {policy.device}, the env on {self.env.device}; use one device")

    def step(self) -> Metrics:
        """One batch: draw, generate, score, learn. Returns the step's metrics, copied to the host at once.

        Raises:
            RunStopped: more than half of the batch has no valid score, or update after update was skipped.
        """
        clock = Clock(self.env.device)
        draw = EnvDraw(self.env, self._generate, self.greedy, clock, self._completed if self._must_complete else None)
        td, rewards = collect(self.env, self.algorithm, draw, self.options, self.ranks.sum)
        self._stop_if_unscorable(rewards["unscorable"].item(), td)  # learn waits for the device at once anyway
        with clock("learn"):
            targets, weighed = self.update.prepare(td)
            learned = self.learn(targets) | weighed
        metrics = to_host(rewards | learned)
        seconds = clock.read()
        total = seconds.pop("total")
        rows = self.world_size * self.env.batch_size
        self.steps_done += 1
        why = why_skipped(metrics.pop(SKIPPED_IN_A_ROW))
        if why is not None:
            raise RunStopped(f"step {self.steps_done}: {why}")
        return (
            {"step": self.steps_done}
            | metrics
            | self.env.packing_metrics
            | {"samples_per_s": rows / total}
            | {f"time/{stage}_s": value for stage, value in seconds.items()}
        )

    def generate(self, td: TensorDictBase) -> TensorDict:
        """Answer prompts with the policy."""
        return self.policy.generate(td, group_size=self.env.group_size)

    def greedy(self, td: TensorDictBase) -> TensorDict:
        """Answer each prompt once, greedily: no randomness is used."""
        return self.policy.generate(td, greedy=True, group_size=1)

    def _completed(self, td: TensorDict) -> TensorDict:
        return with_log_probs(td, self.policy, group_size=self.env.group_size)

    def targets(self, td: TensorDict) -> TensorDict:
        """What the update reads: the response keys, `learn_mask` [B, T] and the algorithm's advantages.

        Unscorable rows have an all-False `learn_mask` and so no part in any loss or statistic.
        """
        return self.update.targets(td)

    def learn(self, targets: TensorDict) -> dict[str, Tensor]:
        """`epochs` passes of `minibatches` updates each; the metrics as scalars on the device."""
        self._set_lr()
        return self.update.learn(targets, self.steps_done)

    def loss(self, out: TensorDict, targets: TensorDict, denominators: Denominators) -> Loss:
        """The algorithm's loss of one microbatch; override it to add a part of your own.

        Args:
            out: what `policy(td)` returned. targets: rows of `targets`.
            denominators: "tokens", "rows" and "ptx" of the whole minibatch, over all ranks.
        """
        return self.algorithm.loss(out, targets, denominators=denominators)

    def _reduce(self, x: Tensor) -> Tensor:
        if self.world_size == 1:
            return x
        reduced = self.accelerator.reduce(x, reduction="sum")
        assert isinstance(reduced, Tensor)
        return reduced

    def _stop_if_unscorable(self, share: float, td: TensorDict) -> None:
        if share <= 0.5:
            return
        # The run ends here, so a copy to the host costs nothing any more.
        raise RunStopped(
            f"step {self.steps_done + 1}: {share:.0%} of the batch has no valid score, more than "
            f"half; of {len(td)} rows here: {self.env.rewards.why_unscorable(td)}"
        )

    def _set_lr(self) -> None:
        o = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = o.lr * schedule_factor(o.schedule, self.steps_done, o.steps, o.warmup_steps)

    def position(self) -> dict[str, Any]:
        """Where the run stands, without weights and moments: cheap enough to take before every step."""
        return {
            "steps_done": self.steps_done,
            "env": self.env.state_dict(),
            "corpus": None if self.corpus is None else self.corpus.state_dict(),
            "generator": self.policy.generator.get_state(),
            "schedule": {name: getattr(self.options, name) for name in ("schedule", "steps", "warmup_steps")},
        }

    def state_dict(self) -> dict[str, Any]:
        """All that decides the steps to come, save the policy's weights."""
        return self.position() | {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken. A schedule of another length is followed, and said."""
        own, saved = self.position()["schedule"], state["schedule"]
        if saved != own and "constant" not in (own["schedule"], saved["schedule"]):
            warnings.warn(
                f"schedule: the state is of {saved}, this run has {own}: the learning rate goes on along the new one, "
                "with a jump",
                stacklevel=2,
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.env.load_state_dict(state["env"])
        if self.corpus is not None and state["corpus"] is not None:
            self.corpus.load_state_dict(state["corpus"])
        self.policy.generator.set_state(state["generator"].cpu())
        self.steps_done = state["steps_done"]


def schedule_factor(schedule: str, step: int, steps: int, warmup_steps: int) -> float:
    """Learning-rate factor of a step (from 0): linear warm-up, then constant, or down to 0 linearly or by a cosine."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    gone = (step - warmup_steps) / max(1, steps - warmup_steps)
    if schedule == "linear":
        return 1 - gone
    return 0.5 * (1 + math.cos(math.pi * gone)) if schedule == "cosine" else 1.0
