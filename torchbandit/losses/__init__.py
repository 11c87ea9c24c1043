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
    gae,
    group_is_constant,
    grpo_advantages,
    num_constant_groups,
    ppo_advantages,
    rloo_advantages,
)
from torchbandit.losses.objectives import (
    Loss,
    add_up,
    entropy_bonus,
    grpo_loss,
    ppo_loss,
    ptx_loss,
    rloo_loss,
    value_loss,
)
from torchbandit.losses.ratios import KLEstimator, importance_weights, kl_estimate

__all__ = [
    "KLEstimator",
    "Loss",
    "add_up",
    "entropy_bonus",
    "gae",
    "group_is_constant",
    "grpo_advantages",
    "grpo_loss",
    "importance_weights",
    "kl_estimate",
    "num_constant_groups",
    "ppo_advantages",
    "ppo_loss",
    "ptx_loss",
    "rloo_advantages",
    "rloo_loss",
    "value_loss",
]
