"""The training loop: draw, generate, score, learn. Read it top to bottom; subclass it to change a part.

One process or many (`accelerate launch`): every rank draws its own prompts, and the sums that decide denominators,
whitening and metrics are taken over all ranks, so W processes compute what one with W times the batch would.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from tensordict import TensorDict
from torch import Tensor

from torchbandit import batch, losses
from torchbandit.clock import Clock
from torchbandit.corpus import Corpus
from torchbandit.env import BanditEnv
from torchbandit.masters import MasterOptimizer
from torchbandit.models import check_apart
from torchbandit.policy import CausalLMPolicy, Plans
from torchbandit.train.metrics import Metrics, reward_metrics, to_host
from torchbandit.train.options import LoopOptions


class RunStopped(ValueError):
    """The run cannot go on honestly; the message says why."""


class BanditTrainer:
    """Trains a policy on an env with PPO, RLOO or GRPO, with or without a pretraining loss (ptx).

    Args:
        env: built for this process's share; the trainer shards it.
        policy: with a critic for ppo.
        options: see `LoopOptions`.
        corpus: pretraining rows, needed where `options.ptx_coef` is above 0.
        accelerator: one of your own; the default serves one process and `accelerate launch` alike.
    Raises:
        ValueError: options, policy, env and corpus do not go together.
    """

    def __init__(
        self,
        env: BanditEnv,
        policy: CausalLMPolicy,
        options: LoopOptions,
        *,
        corpus: Corpus | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.options, self.env, self.policy, self.corpus = options, env, policy, corpus
        self._check()
        self.accelerator = accelerator or Accelerator(cpu=env.device.type == "cpu")
        self.world_size, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        reduce = self._reduce if self.world_size > 1 else None
        env.shard(self.rank, self.world_size, reduce)
        if corpus is not None:
            corpus.shard(self.rank, self.world_size)
        # Each rank draws its own tokens, but all agree on the order of minibatches.
        policy.generator.manual_seed(options.seed * 1_000_003 + self.rank)
        self.shuffler = torch.Generator().manual_seed(options.seed)
        if options.gradient_checkpointing:
            policy.gradient_checkpointing_enable()
        self.optimizer = MasterOptimizer(
            [p for p in policy.parameters() if p.requires_grad], lr=options.lr, weight_decay=options.weight_decay
        )
        # The wrapped module's forward is what averages gradients over ranks (trap 19).
        self.model = self.accelerator.prepare_model(policy) if self.world_size > 1 else policy
        self.steps_done = 0

    def _check(self) -> None:
        options, policy = self.options, self.policy
        if options.algo == "ppo" and not policy.has_critic:
            raise ValueError('critic: ppo needs one, got none; build the policy with critic="head" or a model')
        if options.algo != "ppo" and policy.has_critic:
            raise ValueError(f"critic: {options.algo} has no use for one; build the policy with critic=None")
        if options.algo != "ppo" and self.env.group_size < 2:
            raise ValueError(f"group_size: must be at least 2 for {options.algo}, got {self.env.group_size}")
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
            RunStopped: more than half of the batch has no honest score.
        """
        clock = Clock(self.env.device)
        td = self.env.reset()
        with clock("generate"):
            td = self.policy.generate(td, group_size=self.env.group_size)
        with clock("score"):
            td = self.env.step(td)
        rewards = reward_metrics(td, self.env.group_size, self._reduce if self.world_size > 1 else None)
        self._stop_if_unscorable(rewards["unscorable"].item(), td)  # learn waits for the device at once anyway
        with clock("learn"):
            learned = self.learn(self.targets(td))
        metrics = to_host(rewards | learned)
        seconds = clock.read()
        total = seconds.pop("total")
        rows = self.world_size * self.env.batch_size
        self.steps_done += 1
        return (
            {"step": self.steps_done}
            | metrics
            | self.env.packing_metrics
            | {"samples_per_s": rows / total}
            | {f"time/{stage}_s": value for stage, value in seconds.items()}
        )

    def targets(self, td: TensorDict) -> TensorDict:
        """What the update reads: the response keys, `learn_mask` [B, T] and the algorithm's advantages.

        Unscorable rows have an all-False `learn_mask` and so no part in any loss or statistic.
        """
        options, G = self.options, self.env.group_size
        scorable = ~td[batch.UNSCORABLE]
        mask = td[batch.RESPONSE_MASK] & scorable.unsqueeze(-1)
        reward = td[batch.REWARD].squeeze(-1)
        if options.drop_constant_groups and G > 1:
            mask = mask & ~losses.group_is_constant(reward, G, scorable).unsqueeze(-1)
        out: TensorDict = td.select(
            batch.PROMPT, batch.PROMPT_MASK, batch.RESPONSE, batch.RESPONSE_MASK, batch.LOG_PROBS, batch.TEMPERATURE,
            batch.VALUES, strict=False,
        ).copy()  # fmt: skip
        out["learn_mask"] = mask
        reduce = self._reduce if self.world_size > 1 else None
        if options.algo == "ppo":
            out["advantages"], out["returns"] = losses.ppo_advantages(
                td[batch.REWARD], td.get(batch.TOKEN_REWARD, None), td[batch.VALUES], mask,
                gamma=options.gamma, lam=options.lam, reduce=reduce,
            )  # fmt: skip
        elif options.algo == "rloo":
            out["advantages"] = losses.rloo_advantages(reward, G, scorable)
        else:
            out["advantages"] = losses.grpo_advantages(reward, G, scale=not options.dr_grpo, scorable=scorable)
            if batch.REF_LOG_PROBS in td.keys(include_nested=True):
                out["ref_log_probs"] = td[batch.REF_LOG_PROBS]
        return out

    def learn(self, targets: TensorDict) -> dict[str, Tensor]:
        """`epochs` passes of `minibatches` updates each; siblings of a prompt stay in one minibatch.

        Returns:
            the losses' metrics, averaged over the updates, and grad_norm: scalars on the device.
        """
        self._set_lr()
        G, device = self.env.group_size, self.env.device
        sums: dict[str, Tensor] = {}
        updates = self.options.epochs * self.options.minibatches
        for _ in range(self.options.epochs):
            order = torch.randperm(self.env.num_prompts, generator=self.shuffler).to(device, non_blocking=True)
            for groups in order.tensor_split(self.options.minibatches):
                rows = (groups.unsqueeze(-1) * G + torch.arange(G, device=device)).flatten()
                for name, value in self.update(targets[rows]).items():
                    sums[name] = sums.get(name, 0) + value / updates
        return sums

    def update(self, minibatch: TensorDict) -> dict[str, Tensor]:
        """One optimizer step, its gradient added up over microbatches.

        Every loss is a sum over tokens (or rows) divided by the count in the whole minibatch over all ranks, so
        neither the cut into microbatches nor the number of ranks changes it.
        """
        G = self.env.group_size
        size = min(self.options.micro_batch_size or len(minibatch), len(minibatch))
        pieces = minibatch.split(size)
        siblings = G if size % G == 0 else 1
        mask = minibatch["learn_mask"]
        counts = {"tokens": mask.sum(), "rows": mask.any(-1).sum()}
        ptx: list[tuple[Tensor, Tensor]] = []
        if self.options.ptx_coef and self.corpus is not None:
            ids, real = self.corpus.next(self.options.ptx_batch_size or len(minibatch))
            counts["ptx"] = real[:, 1:].sum()
            ptx = list(zip(ids.tensor_split(len(pieces)), real.tensor_split(len(pieces)), strict=True))
        plans = self.policy.plans(pieces, [real if len(real) else None for _, real in ptx] or None, group_size=siblings)
        totals = self._reduce(torch.stack(list(counts.values())).float()).clamp(min=1)
        denominators = dict(zip(counts, totals.unbind(), strict=True))
        sums: dict[str, Tensor] = {}
        self.optimizer.zero_grad()
        for i, piece in enumerate(pieces):
            last = i == len(pieces) - 1
            with nullcontext() if last or self.model is self.policy else self.accelerator.no_sync(self.model):
                loss, metrics = self.loss(piece, ptx[i] if ptx else None, denominators, plans[i])
                # DDP averages over ranks what must be summed.
                (loss * self.world_size).backward()
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0) + value
        names = list(sums)
        sums = dict(zip(names, self._reduce(torch.stack([sums[name] for name in names])).unbind(), strict=True))
        sums["grad_norm"] = self.optimizer.step(self.options.max_grad_norm)
        return sums

    def loss(
        self,
        td: TensorDict,
        ptx: tuple[Tensor, Tensor] | None,
        denominators: dict[str, Tensor],
        plans: Plans,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one microbatch and its metrics; override it to add a part of your own.

        Args:
            td: rows of `targets`.
            ptx: pretraining ids and mask [M, L].
            denominators: "tokens", "rows" and "ptx" of the whole minibatch, over all ranks.
            plans: how the policy lays out td and ptx.
        """
        o = self.options
        ids, real = (None, None) if ptx is None or len(ptx[0]) == 0 else ptx
        out = self.model(td, ptx_ids=ids, ptx_mask=real, entropy=o.entropy_coef != 0, plans=plans)
        mask, tokens = td["learn_mask"], denominators["tokens"]
        new, old, advantages = out["log_probs"], td[batch.LOG_PROBS], td["advantages"]
        clip: dict[str, Any] = {"clip": o.clip, "clip_high": o.clip_high}
        parts: dict[str, losses.Loss] = {}
        if o.algo == "ppo":
            parts["policy"] = losses.ppo_loss(new, old, advantages, mask, denominator=tokens, **clip)
            parts["value"] = losses.value_loss(
                out["values"], td[batch.VALUES], td["returns"], mask, clip=o.value_clip or None, denominator=tokens
            )
        elif o.algo == "rloo":
            parts["policy"] = losses.rloo_loss(new, old, advantages, mask, denominator=denominators["rows"], **clip)
        else:
            parts["policy"] = losses.grpo_loss(
                new, old, advantages, mask, ref_log_probs=td.get("ref_log_probs", None), kl_coef=o.loss_kl_coef,
                sequence_mean=not o.dr_grpo, denominator=denominators["rows"], **clip,
            )  # fmt: skip
        if o.entropy_coef:
            parts["entropy_bonus"] = losses.entropy_bonus(out["entropy"], mask, o.entropy_coef, denominator=tokens)
        if ids is not None:
            total = out["ptx_loss"] * out["ptx_tokens"]
            parts["ptx_weighted"] = losses.ptx_loss(
                total, out["ptx_tokens"], o.ptx_coef, denominator=denominators["ptx"]
            )
        loss, metrics = losses.add_up(parts, {"value": o.value_coef})
        return loss, {f"loss/{name}": number for name, number in metrics.items()}

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
            f"step {self.steps_done + 1}: {share:.0%} of the batch has no honest score, more than "
            f"half; of {len(td)} rows here: {self.env.rewards.why_unscorable(td)}"
        )

    def _set_lr(self) -> None:
        o = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = o.lr * schedule_factor(o.schedule, self.steps_done, o.steps, o.warmup_steps)

    def any_rank(self, flag: bool) -> bool:
        """True on every rank if it is on one, so that all leave the loop together."""
        return self._reduce(torch.tensor(float(flag), device=self.env.device)).item() > 0

    def position(self) -> dict[str, Any]:
        """Where the run stands, without weights and moments: cheap enough to take before every step."""
        return {
            "steps_done": self.steps_done,
            "env": self.env.state_dict(),
            "corpus": None if self.corpus is None else self.corpus.state_dict(),
            "generator": self.policy.generator.get_state(),
            "shuffler": self.shuffler.get_state(),
        }

    def state_dict(self) -> dict[str, Any]:
        """All that decides the steps to come, save the policy's weights."""
        return self.position() | {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.env.load_state_dict(state["env"])
        if self.corpus is not None and state["corpus"] is not None:
            self.corpus.load_state_dict(state["corpus"])
        self.policy.generator.set_state(state["generator"].cpu())
        self.shuffler.set_state(state["shuffler"].cpu())
        self.steps_done = state["steps_done"]


def schedule_factor(schedule: str, step: int, steps: int, warmup_steps: int) -> float:
    """Learning-rate factor of a step (from 0): linear warm-up, then constant, or down to 0 linearly or by a cosine."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    gone = (step - warmup_steps) / max(1, steps - warmup_steps)
    if schedule == "linear":
        return 1 - gone
    return 0.5 * (1 + math.cos(math.pi * gone)) if schedule == "cosine" else 1.0
