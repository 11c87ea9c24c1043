"""Advantages, ratios and losses: plain functions of tensors and masks. (B, T, G: see batch.py.)

Three habits hold throughout:

- What is outside the mask is put to 0 *before* anything is computed from it, so NaN there reaches neither the
  loss nor a gradient. A row that is unscorable is left out by a mask that is False on all its tokens.
- Every loss is a sum over real tokens (or rows) divided by `denominator`, and so are its metrics. With the
  denominator of the whole batch, the losses of microbatches and of ranks add up to the loss of the batch. (DDP
  averages gradients over ranks: multiply the loss by the world size, or divide the denominator by it.)
- Shapes and dtypes are checked, values never: nothing here waits for the device.
"""

from torchbandit.losses.advantages import (
    Baseline,
    Scale,
    best_of_group,
    gae,
    group_advantages,
    group_is_constant,
    grpo_advantages,
    num_constant_groups,
    ppo_advantages,
    returns_to_go,
    rloo_advantages,
)
from torchbandit.losses.objectives import (
    add_up,
    entropy_bonus,
    grpo_loss,
    kl_loss,
    likelihood_loss,
    ppo_loss,
    ptx_loss,
    rloo_loss,
    value_loss,
)
from torchbandit.losses.ratios import KLEstimator, LossKLEstimator, importance_weights, kl_estimate
from torchbandit.losses.surrogate import MAX_LOG_RATIO, ClipAs, Loss, Mean, Ratio, average, policy_loss

__all__ = [
    "MAX_LOG_RATIO",
    "Baseline",
    "ClipAs",
    "KLEstimator",
    "Loss",
    "LossKLEstimator",
    "Mean",
    "Ratio",
    "Scale",
    "add_up",
    "average",
    "best_of_group",
    "entropy_bonus",
    "gae",
    "group_advantages",
    "group_is_constant",
    "grpo_advantages",
    "grpo_loss",
    "importance_weights",
    "kl_estimate",
    "kl_loss",
    "likelihood_loss",
    "num_constant_groups",
    "policy_loss",
    "ppo_advantages",
    "ppo_loss",
    "ptx_loss",
    "returns_to_go",
    "rloo_advantages",
    "rloo_loss",
    "value_loss",
]
