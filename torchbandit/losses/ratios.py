"""How far two policies are apart on the sampled tokens: KL estimators, importance weights. (B, T: see batch.py.)"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from torchbandit.losses.choices import KLEstimator, check_cap
from torchbandit.losses.inputs import check_float, check_tokens, keep

MAX_LOG_RATIO = 20.0
"""Bound of every log ratio. exp(20) = 4.9e8 is far beyond any ratio that a gradient should follow, and float32 still
adds up a million of them; at log ratio 89 exp is inf, and one such token makes the loss of a whole batch inf."""


def kl_estimate(
    log_probs: Tensor, ref_log_probs: Tensor, estimator: KLEstimator = "k1", mask: Tensor | None = None
) -> Tensor:
    """Estimate, per sampled token, KL(policy || reference), in nats. Nothing is clamped.

    With d = log_probs - ref_log_probs: k1 = d, unbiased, may be negative; k2 = d^2 / 2, biased, its *gradient* in
    expectation is that of the KL; k3 = exp(-d) - 1 + d, unbiased and never negative. As a reward, any may serve. As
    a loss, k1 pulls nowhere (its gradient is 1 whatever d is, 0 in expectation); k3 is the one of GRPO.

    Args:
        log_probs: [B, T] float32, the policy's; sampled from it. The gradient flows through it.
        ref_log_probs: [B, T] float32, the reference's, of the same tokens at the same temperature.
        estimator: "k1", "k2" or "k3".
        mask: [B, T] bool; the estimate is 0 outside it, whatever stands there. None: as if all True.
    Returns:
        [B, T] float32.
    Raises:
        ValueError: an unknown estimator, or shapes, dtypes or devices differ.
    Source: Schulman 2020, "Approximating KL Divergence" (k1, k2, k3 are its names); k3 is Shao et al. 2024, eq. 4.
    """
    if estimator not in get_args(KLEstimator):
        raise ValueError(f'estimator: must be "k1", "k2" or "k3", got {estimator!r}')
    if mask is None:
        check_float("log_probs", log_probs, log_probs.shape, log_probs.device, "itself")
        check_float("ref_log_probs", ref_log_probs, log_probs.shape, log_probs.device, "log_probs")
    else:
        check_tokens(mask, log_probs=log_probs, ref_log_probs=ref_log_probs)
        log_probs, ref_log_probs = keep(log_probs, mask), keep(ref_log_probs, mask)
    difference = log_probs - ref_log_probs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    # 0 is k3's exact minimum: this floor only takes away what rounding may leave below it
    return (torch.expm1(-difference) + difference).clamp(min=0.0)


@torch.no_grad()
def importance_weights(
    log_probs: Tensor,
    sampler_log_probs: Tensor,
    mask: Tensor,
    *,
    cap: float = 2.0,
    per: Literal["token", "sequence"] = "token",
    beyond: Literal["truncate", "mask"] = "truncate",
) -> Tensor:
    """Importance weights policy / sampler with a cap, for responses that another engine sampled.

    Args:
        log_probs: [B, T] float32, of the policy as it was when the engine had its weights (the old log-probs).
        sampler_log_probs: [B, T] float32, as the engine reported them.
        mask: [B, T] bool.
        cap: the greatest weight; inf leaves them untruncated (to exp(MAX_LOG_RATIO)).
        per: "token": each token's own ratio; "sequence": the ratio of the whole response, on each of its tokens.
        beyond: what a ratio above the cap becomes: "truncate" (TIS): the cap; "mask" (MIS): 0, and so does a ratio
            below 1 / cap.
    Returns:
        [B, T] float32 without gradient, 0 outside the mask; the `weights` of a loss.
    Raises:
        ValueError: cap is not positive (above 1 for "mask"), an unknown choice, or shapes, dtypes or devices differ.
    Source: Ionides 2008 (Truncated Importance Sampling); Espeholt et al. 2018 (IMPALA), the rho below eq. 1; for
        language models Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"
        (TIS); Liu et al. 2025, "When Speed Kills Stability" (MIS).
    """
    check_tokens(mask, log_probs=log_probs, sampler_log_probs=sampler_log_probs)
    check_cap(cap, beyond)
    if per not in ("token", "sequence"):
        raise ValueError(f'per: must be "token" or "sequence", got {per!r}')
    log_ratio = keep(log_probs, mask) - keep(sampler_log_probs, mask)
    if per == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True).expand_as(mask)
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    bound = math.log(cap)
    if beyond == "mask":
        return keep(log_ratio.exp(), mask & (log_ratio.abs() <= bound))
    return keep(log_ratio.clamp(max=bound).exp(), mask)
