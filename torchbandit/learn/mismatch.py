"""Responses that another engine sampled: how far it is from the policy, and what its samples count."""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor

from torchbandit import batch, losses
from torchbandit.batch import require
from torchbandit.learn.options import MismatchOptions
from torchbandit.learn.ranks import Ranks


def sampler_log_probs(td: TensorDictBase) -> Tensor:
    """What the engine sampled with: [B, T] float32; ValueError for another shape, dtype or device."""
    own = td[batch.LOG_PROBS]
    hint = "write one log-prob for each response token, as the engine reported it"
    return require(
        td, batch.SAMPLER_LOG_PROBS, shape=tuple(own.shape), dtype=torch.float32, device=own.device, hint=hint
    )


def mismatch_weights(
    td: TensorDictBase, mask: Tensor, options: MismatchOptions, ranks: Ranks
) -> tuple[Tensor, dict[str, Tensor]]:
    """What each token counts: policy / sampler, capped.

    Args:
        td: ("log_probs","response") and ("log_probs","sampler") [B, T] float32.
        mask: [B, T] bool, the tokens to learn from.
    Returns:
        weights [B, T] float32, 0 outside the mask; metrics `mismatch/weight` (mean over tokens),
        `mismatch/weight_max` and `mismatch/cut`, the share of tokens whose ratio is beyond the cap.
    Raises:
        ValueError: the sampler's log-probs have another shape, dtype or device.
    """
    own, sampler = td[batch.LOG_PROBS], sampler_log_probs(td)
    per: Literal["token", "sequence"] = "sequence" if options.mismatch_per == "response" else "token"
    assert options.mismatch != "off"
    weights = losses.importance_weights(own, sampler, mask, cap=options.mismatch_cap, per=per, beyond=options.mismatch)
    free = losses.importance_weights(own, sampler, mask, cap=float("inf"), per=per)
    cut = (weights != free) & mask
    sums = ranks.added(torch.stack((weights.sum(), cut.sum().float(), mask.sum().float())))
    mean, share = (sums[:2] / sums[2].clamp(min=1)).unbind()
    largest = ranks.greatest(free.amax().unsqueeze(0))[0]
    return weights, {"mismatch/weight": mean, "mismatch/weight_max": largest, "mismatch/cut": share}
