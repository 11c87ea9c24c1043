"""What is orthogonal to an algorithm, as small dataclasses that `LoopOptions` and the RLlib config put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torchbandit.learn.checks import at_least
from torchbandit.losses.choices import LossKLEstimator, check_cap


@dataclass
class RefillOptions:
    """Dynamic sampling.

    Args:
        refill: Replace groups of equal rewards by newly drawn prompts, until the batch is full.
        max_draws: Batches drawn for one step at most, the first included.
    Source: Yu et al. 2025 (DAPO), section 3.2.
    """

    refill: bool = False
    max_draws: int = 4

    def __post_init__(self) -> None:
        at_least(1, max_draws=self.max_draws)


@dataclass
class MismatchOptions:
    """Responses that another engine sampled, which wrote ("log_probs","sampler").

    Args:
        mismatch: What an importance weight beyond the cap becomes: the cap (truncate) or 0 (mask); off: no weights.
        mismatch_per: A weight for each token, or the whole response's.
        mismatch_cap: The greatest weight.
    Source: Yao et al. 2025 (truncate); Liu et al. 2025 (mask); see `losses.importance_weights`.
    """

    mismatch: Literal["truncate", "mask", "off"] = "truncate"
    mismatch_per: Literal["token", "response"] = "token"
    mismatch_cap: float = 2.0

    def __post_init__(self) -> None:
        if self.mismatch not in ("truncate", "mask", "off"):
            raise ValueError(f"mismatch: must be truncate, mask or off, got {self.mismatch!r}")
        if self.mismatch_per not in ("token", "response"):
            raise ValueError(f"mismatch_per: must be token or response, got {self.mismatch_per!r}")
        if self.mismatch != "off":
            try:
                check_cap(self.mismatch_cap, self.mismatch)
            except ValueError as error:
                raise ValueError(f"mismatch_{error}") from None


@dataclass
class UpdateOptions(RefillOptions, MismatchOptions):
    """What an update needs to know beside its algorithm.

    Args:
        epochs: Passes over each batch.
        minibatches: Optimizer updates a pass.
        micro_batch_size: Rows a forward and backward pass. Default: a whole minibatch.
        max_grad_norm: Gradients are clipped to this norm; 0 for no clipping.
        entropy_coef: Weight of the entropy bonus.
        loss_kl_coef: Weight of the KL to the reference in the loss.
        loss_kl_estimator: Estimate of the KL in the loss.
        mask_truncated: Leave responses that were cut off out of the loss.
        drop_constant_groups: Leave groups of equal rewards out of the loss.
        ptx_coef: Weight of the pretraining loss (InstructGPT's gamma).
        ptx_batch_size: Pretraining rows an update. Default: as many as the update has rows.
        seed: Of prompts, sampling and minibatches.
    """

    epochs: int = 1
    minibatches: int = 1
    micro_batch_size: int | None = None
    max_grad_norm: float = 1.0
    entropy_coef: float = 0.0
    loss_kl_coef: float = 0.0
    loss_kl_estimator: LossKLEstimator = "k3"
    mask_truncated: bool = False
    drop_constant_groups: bool = False
    ptx_coef: float = 0.0
    ptx_batch_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        RefillOptions.__post_init__(self)
        MismatchOptions.__post_init__(self)
        at_least(
            1, epochs=self.epochs, minibatches=self.minibatches, micro_batch_size=self.micro_batch_size,
            ptx_batch_size=self.ptx_batch_size,
        )  # fmt: skip
        at_least(
            0, max_grad_norm=self.max_grad_norm, loss_kl_coef=self.loss_kl_coef, ptx_coef=self.ptx_coef, seed=self.seed
        )
        if self.seed > 2**31 - 1:
            raise ValueError(f"seed: must be at most {2**31 - 1}, got {self.seed}")
        if self.entropy_coef != self.entropy_coef:
            raise ValueError("entropy_coef: must be a number, got nan")
        if self.loss_kl_estimator not in get_args(LossKLEstimator):
            raise ValueError(
                f"loss_kl_estimator: must be {', '.join(get_args(LossKLEstimator))}, got {self.loss_kl_estimator!r}"
            )
