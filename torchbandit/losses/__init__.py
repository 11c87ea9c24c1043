"""Advantages, ratios and losses: plain functions of tensors and masks. (B, T, G: see batch.py.)

Three habits hold throughout:

- What is outside the mask is put to 0 *before* anything is computed from it, so NaN there reaches neither the
  loss nor a gradient. A row that is unscorable is left out by a mask that is False on all its tokens.
- Every loss is a sum over real tokens (or rows) divided by `denominator`, and so are its metrics. With the
  denominator of the whole batch, the losses of microbatches and of ranks add up to the loss of the batch. (DDP
  averages gradients over ranks: multiply the loss by the world size, or divide the denominator by it.)
- Shapes and dtypes are checked, values never: nothing here waits for the device.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchbandit.losses.advantages import (
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
    from torchbandit.losses.choices import Baseline, ClipAs, KLEstimator, Loss, LossKLEstimator, Mean, Ratio, Scale
    from torchbandit.losses.inputs import keep
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
    from torchbandit.losses.ratios import MAX_LOG_RATIO, importance_weights, kl_estimate
    from torchbandit.losses.surrogate import average, policy_loss

# Each name is imported when it is first asked for: an algorithm names its losses without importing torch.
_HOME = {
    name: module
    for module, names in {
        "advantages": "best_of_group gae group_advantages group_is_constant grpo_advantages num_constant_groups "
        "ppo_advantages returns_to_go rloo_advantages",
        "choices": "Baseline ClipAs KLEstimator Loss LossKLEstimator Mean Ratio Scale",
        "inputs": "keep",
        "objectives": "add_up entropy_bonus grpo_loss kl_loss likelihood_loss ppo_loss ptx_loss rloo_loss value_loss",
        "ratios": "MAX_LOG_RATIO importance_weights kl_estimate",
        "surrogate": "average policy_loss",
    }.items()
    for name in names.split()
}

__all__ = [
    "MAX_LOG_RATIO", "Baseline", "ClipAs", "KLEstimator", "Loss", "LossKLEstimator", "Mean", "Ratio", "Scale",
    "add_up", "average", "best_of_group", "entropy_bonus", "gae", "group_advantages", "group_is_constant",
    "grpo_advantages", "grpo_loss", "importance_weights", "keep", "kl_estimate", "kl_loss", "likelihood_loss",
    "num_constant_groups", "policy_loss", "ppo_advantages", "ppo_loss", "ptx_loss", "returns_to_go",
    "rloo_advantages", "rloo_loss", "value_loss",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'torchbandit.losses' has no attribute {name!r}")
    value = getattr(import_module(f"torchbandit.losses.{_HOME[name]}"), name)
    globals()[name] = value  # asked for once
    return value
