"""One update of a policy: targets, minibatches, plans, microbatches, one optimizer step. (B, T, G: see batch.py.)

It serves every engine: it knows the ranks it works with as a function that sums, and neither accelerate nor ray.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from tensordict import TensorDict
from torch import Tensor

from torchbandit import batch, losses
from torchbandit.learn.algorithm import ADVANTAGES, LEARN_MASK, Algorithm, Denominators
from torchbandit.learn.completed import with_log_probs
from torchbandit.learn.mismatch import mismatch_weights, sampler_log_probs
from torchbandit.learn.options import UpdateOptions
from torchbandit.learn.ranks import Ranks
from torchbandit.learn.seeds import minibatch_order
from torchbandit.losses import Loss
from torchbandit.losses.inputs import is_finite
from torchbandit.masters import MasterOptimizer
from torchbandit.policy import CausalLMPolicy

REF_LOG_PROBS = "ref_log_probs"
LOST = "lost"
"""[B] bool of targets: rows left out since a number that they learn from is not finite."""
SKIPPED_IN_A_ROW = "skipped_in_a_row_max"
MOST_SKIPPED = 3
"""Updates lost one after the other, after which a run ends."""


class PtxSource(Protocol):
    """Pretraining batches."""

    def next(self, num: int) -> tuple[Tensor, Tensor]:
        """ids [num, L] int64 and mask [num, L] bool, on the policy's device."""


LossFn = Callable[[TensorDict, TensorDict, Denominators], Loss]
"""(out, targets, denominators) -> Loss: `algorithm.loss`, or what an engine's user overrides it with."""


class Update:
    """Learns from batches with one algorithm.

    Args:
        policy: lays out rows, and computes old log-probs where a batch has none.
        algorithm, options: what is learnt, and how.
        optimizer: steps the policy's parameters.
        group_size: G of the batches.
        ptx: pretraining batches; needed where `options.ptx_coef` is above 0.
        ranks: the processes that update together.
        forward: the policy's forward, or DDP's around it (whose gradients are means over ranks).
        no_sync: a context in which DDP adds up gradients and exchanges none.
        loss: what stands in for `algorithm.loss`.
    """

    def __init__(
        self,
        policy: CausalLMPolicy,
        algorithm: Algorithm,
        options: UpdateOptions,
        optimizer: MasterOptimizer,
        *,
        group_size: int,
        ptx: PtxSource | None = None,
        ranks: Ranks | None = None,
        forward: Callable[..., TensorDict] | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
        loss: LossFn | None = None,
    ) -> None:
        self.policy, self.algorithm, self.options, self.optimizer = policy, algorithm, options, optimizer
        self.group_size, self.ptx, self.ranks = group_size, ptx, ranks or Ranks()
        self._forward: Callable[..., TensorDict] = forward or policy
        self._no_sync = no_sync
        self._loss = loss or (lambda out, td, denominators: algorithm.loss(out, td, denominators=denominators))
        self._in_a_row = torch.zeros((), device=policy.device)
        if self.has_parted_siblings:
            warnings.warn(
                f"micro_batch_size={options.micro_batch_size} is smaller than a group of {group_size}: siblings are "
                "parted, and each reads the prompt for itself; a multiple of the group size is quicker",
                stacklevel=2,
            )

    def __call__(self, td: TensorDict, step: int) -> dict[str, Tensor]:
        """Learn from a stepped batch: `epochs` passes of `minibatches` updates each.

        Args:
            td: a batch after `env.step`. step: the steps done before, which decides the order of minibatches.
        Returns:
            scalars on the device, means over the updates (maxima for names that end in `_max`).
        """
        targets, metrics = self.prepare(td)
        return self.learn(targets, step) | metrics

    # --- targets -----------------------------------------------------------------------------------------------------

    def targets(self, td: TensorDict) -> TensorDict:
        """What the loss reads: the response keys, `learn_mask` [B, T] and what the algorithm adds."""
        return self.prepare(td)[0]

    @torch.no_grad()
    def prepare(self, td: TensorDict) -> tuple[TensorDict, dict[str, Tensor]]:
        """The targets of a stepped batch, and the metrics of how another engine's samples were weighed."""
        o, G = self.options, self.group_size
        td = with_log_probs(td, self.policy, group_size=G)
        mask = td[batch.RESPONSE_MASK]
        weighs = o.mismatch != "off" and batch.SAMPLER_LOG_PROBS in td.keys(include_nested=True)
        read = [td[batch.LOG_PROBS], td.get(batch.VALUES, None), sampler_log_probs(td) if weighs else None]
        lost = torch.stack([~(is_finite(x) | ~mask).all(-1) for x in read if x is not None]).any(0)
        td[batch.UNSCORABLE] = td[batch.UNSCORABLE] | lost  # the algorithm's statistics leave them out too
        left = td.get(LEARN_MASK, mask)
        if o.mask_truncated:
            left = left & ~td[batch.TRUNCATED]
        if o.drop_constant_groups and G > 1:
            reward, counted = td[batch.REWARD].squeeze(-1).float(), ~td[batch.UNSCORABLE]
            left = left & ~losses.group_is_constant(reward, G, counted).unsqueeze(-1)
        td[LEARN_MASK] = left
        rows = self.algorithm.targets(td, group_size=G, reduce=self.ranks.sum)
        advantages = self._advantages_of(rows)
        metrics: dict[str, Tensor] = {}
        if weighs:
            weights, metrics = mismatch_weights(td, rows[LEARN_MASK], o, self.ranks)
            advantages = advantages * weights
        wrong = ~(is_finite(advantages) | ~rows[LEARN_MASK]).all(-1)
        rows[LEARN_MASK] = rows[LEARN_MASK] & ~wrong.unsqueeze(-1)
        rows[LOST] = lost | wrong
        rows[ADVANTAGES] = advantages
        if o.loss_kl_coef:
            reference = td.get(batch.REF_LOG_PROBS, None)
            if reference is None:
                raise ValueError(
                    f'("next","ref_log_probs","response"): needed for loss_kl_coef={o.loss_kl_coef}, got no such key; '
                    "add KLPenalty(reference, coef=0) to the env's rewards"
                )
            rows[REF_LOG_PROBS] = reference
        return rows, metrics

    def _advantages_of(self, rows: TensorDict) -> Tensor:
        """The algorithm's advantages as [B, T]; ValueError where it left out what an update needs."""
        name, mask = type(self.algorithm).__name__, rows.get(LEARN_MASK, None)
        shape = rows[batch.RESPONSE_MASK].shape
        if mask is None or mask.dtype != torch.bool or mask.shape != shape:
            raise ValueError(f'{name}.targets: must give "{LEARN_MASK}", bool {list(shape)}; see training_rows')
        advantages = rows.get(ADVANTAGES, None)
        if advantages is None or advantages.shape not in (shape, shape[:1]) or not advantages.is_floating_point():
            got = "no such key" if advantages is None else f"{advantages.dtype} {list(advantages.shape)}"
            raise ValueError(
                f'{name}.targets: must give "{ADVANTAGES}", float32 [{shape[0]}] or {list(shape)}, got {got}'
            )
        wide: Tensor = advantages.float()
        return wide.unsqueeze(-1).expand(shape) if wide.dim() == 1 else wide

    # --- minibatches -------------------------------------------------------------------------------------------------

    def learn(self, targets: TensorDict, step: int) -> dict[str, Tensor]:
        """All updates on the targets of one batch; see `__call__`."""
        each = [self.update(minibatch) for minibatch in self.minibatches(targets, step)]
        out: dict[str, Tensor] = {}
        taken = torch.stack([1 - metrics["skipped_updates"] for metrics in each])
        for name in each[0]:
            values = torch.stack([metrics[name].float() for metrics in each])
            if name.endswith("_max"):
                out[name] = values.amax()
            elif name == "skipped_updates":
                out[name] = values.sum()
            else:  # of the updates that were made; NaN where none was
                out[name] = torch.where(taken > 0, values, 0.0).sum() / taken.sum()
        return out

    def minibatches(self, targets: TensorDict, step: int) -> Iterator[TensorDict]:
        """`epochs` passes over the rows in `minibatches` parts; siblings stay together."""
        o, G, device = self.options, self.group_size, self.policy.device
        for order in minibatch_order(len(targets) // G, o.epochs, o.seed, step):
            for groups in order.to(device, non_blocking=True).tensor_split(o.minibatches):
                yield targets[(groups.unsqueeze(-1) * G + torch.arange(G, device=device)).flatten()]

    @property
    def has_parted_siblings(self) -> bool:
        """Whether microbatches are too small for a group."""
        size = self.options.micro_batch_size
        return size is not None and size < self.group_size

    def _piece_size(self, rows: int) -> int:
        """Rows of a microbatch: whole groups, so that siblings share their prompt, where one fits."""
        size = min(self.options.micro_batch_size or rows, rows)
        return size if size < self.group_size else size - size % self.group_size

    def update(self, minibatch: TensorDict) -> dict[str, Tensor]:
        """One optimizer step, its gradient added up over microbatches.

        Every loss is a sum over tokens (or rows) divided by the count in the whole minibatch over all ranks, so
        neither the cut into microbatches nor the number of ranks changes it. Where the gradient is not finite, or more
        rows were lost than are left, nothing moves.

        Returns:
            the loss's metrics, grad_norm and skipped_updates: scalars on the device.
        """
        o = self.options
        size = self._piece_size(len(minibatch))
        pieces = minibatch.split(size)
        mask = minibatch[LEARN_MASK]
        counts = {"tokens": mask.sum(), "rows": mask.any(-1).sum(), LOST: minibatch[LOST].sum()}
        ptx: list[tuple[Tensor, Tensor]] = []
        if o.ptx_coef:
            assert self.ptx is not None
            ids, real = self.ptx.next(o.ptx_batch_size or len(minibatch))
            counts["ptx"] = real[:, 1:].sum()
            ptx = list(zip(ids.tensor_split(len(pieces)), real.tensor_split(len(pieces)), strict=True))
        siblings = self.group_size if size % self.group_size == 0 else 1
        plans = self.policy.plans(pieces, [real if len(real) else None for _, real in ptx] or None, group_size=siblings)
        totals = dict(zip(counts, self.ranks.added(torch.stack(list(counts.values())).float()).unbind(), strict=True))
        skip = totals[LOST] > totals["rows"]
        denominators = {name: total.clamp(min=1) for name, total in totals.items() if name != LOST}
        sums: dict[str, Tensor] = {}
        self.optimizer.zero_grad()
        for i, (piece, plan) in enumerate(zip(pieces, plans, strict=True)):
            with nullcontext() if i == len(pieces) - 1 else self._no_sync():
                loss, metrics = self._loss_of(piece, ptx[i] if ptx else None, denominators, plan)
                # DDP averages over ranks what must be summed.
                (loss * self.ranks.world_size).backward()
            for name, value in metrics.items():
                value = value.detach().float()
                if name not in sums:
                    sums[name] = value
                else:
                    sums[name] = torch.maximum(sums[name], value) if name.endswith("_max") else sums[name] + value
        sums = self._over_ranks(sums)
        norm = self.optimizer.step(o.max_grad_norm, skip=skip)
        skipped = (skip | ~norm.isfinite()).float()
        self._in_a_row = (self._in_a_row + skipped) * skipped
        return sums | {"grad_norm": norm, "skipped_updates": skipped, SKIPPED_IN_A_ROW: self._in_a_row}

    def _over_ranks(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        maxima = {name: value for name, value in sums.items() if name.endswith("_max")}
        added = {name: value for name, value in sums.items() if name not in maxima}
        out: dict[str, Tensor] = {}
        for numbers, reduce in ((added, self.ranks.added), (maxima, self.ranks.greatest)):
            if numbers:
                out |= dict(zip(numbers, reduce(torch.stack(list(numbers.values()))).unbind(), strict=True))
        return out

    # --- the loss of a microbatch ------------------------------------------------------------------------------------

    def _loss_of(
        self, td: TensorDict, ptx: tuple[Tensor, Tensor] | None, denominators: Denominators, plans: Any
    ) -> Loss:
        """The algorithm's loss, and what is added to any algorithm's: KL, entropy, ptx."""
        o, mask = self.options, td[LEARN_MASK]
        ids, real = (None, None) if ptx is None or len(ptx[0]) == 0 else ptx
        out = self._forward(td, ptx_ids=ids, ptx_mask=real, entropy=o.entropy_coef != 0, plans=plans)
        loss, metrics = self._loss(out, td, denominators)
        parts: dict[str, Loss] = {}
        if o.loss_kl_coef:
            parts["kl_weighted"] = self._kl(out, td, denominators)
        if o.entropy_coef:
            parts["entropy_bonus"] = losses.entropy_bonus(
                out["entropy"], mask, o.entropy_coef, denominator=denominators["tokens"]
            )
        if ids is not None:
            parts["ptx_weighted"] = losses.ptx_loss(
                out["ptx_loss"] * out["ptx_tokens"], out["ptx_tokens"], o.ptx_coef, denominator=denominators["ptx"]
            )
        if parts:
            more, numbers = losses.add_up(parts)
            loss, metrics = loss + more, metrics | numbers
        if self.ranks.world_size > 1:  # DDP waits for every parameter, also for what a loss leaves out
            for name in ("log_probs", "values"):
                loss = loss + 0.0 * out[name].sum() if name in out.keys() else loss
        return loss, {f"loss/{name}": number for name, number in metrics.items()}

    def _kl(self, out: TensorDict, td: TensorDict, denominators: Denominators) -> Loss:
        o, mask = self.options, td[LEARN_MASK]
        mean = getattr(self.algorithm, "mean", self.algorithm.mean_of)
        return losses.kl_loss(
            out["log_probs"], td[REF_LOG_PROBS], mask, o.loss_kl_coef, estimator=o.loss_kl_estimator,
            old_log_probs=td[batch.LOG_PROBS] if o.loss_kl_estimator == "weighted_k3" else None, mean=mean,
            denominator=denominators["tokens" if mean == "token" else "rows"],
        )  # fmt: skip


def why_skipped(skipped_in_a_row: float) -> str | None:
    """What to tell the user where too many updates were lost one after the other; None where all is well."""
    if skipped_in_a_row < MOST_SKIPPED:
        return None
    return (
        f"{int(skipped_in_a_row)} updates in a row were skipped: their gradient, or the log-probs they learn from, "
        "are not finite (NaN or inf), and nothing is learnt any more. Look for overflow in the model (a lower learning "
        "rate, bfloat16 or float32 weights) or a damaged checkpoint"
    )
