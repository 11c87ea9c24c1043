"""The numbers of a step: means over all ranks, kept on the device until one copy brings them all to the host."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from torchbandit import batch, losses
from torchbandit.batch import Reduce, masked_sum
from torchbandit.losses.inputs import is_finite

Metrics = dict[str, float]


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
    reward = td[batch.REWARD].squeeze(-1).float()
    rows: dict[str, Tensor] = {"reward": reward}
    for name, value in td[batch.REWARD_TERMS].items():
        rows[f"reward_terms/{name}"] = value
    rows["unscorable"] = td[batch.UNSCORABLE]
    rows["truncated"] = td[batch.TRUNCATED].squeeze(-1)
    rows["response_length"] = td[batch.RESPONSE_MASK].sum(-1)
    if group_size > 1:
        rows["constant_groups"] = losses.group_is_constant(reward, group_size, scorable)
    # All means at once: launches of one after the other took most of a millisecond of the host's.
    values = torch.stack([value.float() for value in rows.values()])
    kept = is_finite(values)
    kept[0] = scorable
    sums = torch.stack((masked_sum(values, kept, -1), kept.sum(-1, dtype=torch.float32)))
    totals, counts = (sums if reduce is None else reduce(sums)).unbind()
    counts = counts.clamp(min=1)
    told = dict(zip(rows, (totals / counts).unbind(), strict=True))
    centred = torch.where(scorable, reward, told["reward"]) - told["reward"]
    squares = centred.dot(centred)
    told["reward_std"] = ((squares if reduce is None else reduce(squares)) / counts[0]).sqrt()
    if "reward_terms/kl" in told:
        told["kl"] = told["reward_terms/kl"]
    return told


def to_host(metrics: dict[str, Tensor]) -> Metrics:
    """One copy for all numbers of a step."""
    return dict(zip(metrics, torch.stack([v.detach().float() for v in metrics.values()]).tolist(), strict=True))
