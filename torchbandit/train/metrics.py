"""The numbers of a step: means over all ranks, kept on the device until one copy brings them all to the host."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from torchbandit import batch, losses
from torchbandit.batch import Reduce, masked_sum

Metrics = dict[str, float]


def mean(value: Tensor, kept: Tensor, reduce: Reduce | None = None) -> Tensor:
    """Mean of [B] `value` where `kept` [B] is True, over all ranks; 0 where nothing is."""
    sums = torch.stack((masked_sum(value, kept), kept.sum().float()))
    total, count = (sums if reduce is None else reduce(sums)).unbind()
    return total / count.clamp(min=1)


def reward_metrics(td: TensorDictBase, group_size: int, reduce: Reduce | None = None) -> dict[str, Tensor]:
    """What `env.step` found, as scalars on the device.

    Args:
        td: a batch after `env.step`.
        group_size: contiguous siblings.
    Returns:
        reward, reward_std and reward_terms/<name> over the rows that have them, kl if a term is named so, unscorable,
        truncated, response_length and, with groups, constant_groups.
    """
    scorable = ~td[batch.UNSCORABLE]
    every = torch.ones_like(scorable)
    reward = td[batch.REWARD].squeeze(-1).float()
    rows: dict[str, tuple[Tensor, Tensor]] = {"reward": (reward, scorable)}
    for name, value in td[batch.REWARD_TERMS].items():
        rows[f"reward_terms/{name}"] = (value, value.isfinite())
    if "reward_terms/kl" in rows:
        rows["kl"] = rows["reward_terms/kl"]
    rows["unscorable"] = (td[batch.UNSCORABLE], every)
    rows["truncated"] = (td[batch.TRUNCATED].squeeze(-1), every)
    rows["response_length"] = (td[batch.RESPONSE_MASK].sum(-1), every)
    if group_size > 1:
        rows["constant_groups"] = (losses.group_is_constant(reward, group_size, scorable), every)
    means = {name: mean(value.float(), kept, reduce) for name, (value, kept) in rows.items()}
    means["reward_std"] = mean((reward - means["reward"]).square(), scorable, reduce).sqrt()
    return means


def to_host(metrics: dict[str, Tensor]) -> Metrics:
    """One copy for all numbers of a step."""
    return dict(zip(metrics, torch.stack([v.detach().float() for v in metrics.values()]).tolist(), strict=True))
