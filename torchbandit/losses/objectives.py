"""What is minimised: PPO, value, RLOO, GRPO, ptx, entropy. (B, T: see batch.py.)

Each returns (loss, metrics): a scalar with gradient, and scalars without, all over the same denominator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from torchbandit.losses.inputs import check_float, check_tokens, keep, share
from torchbandit.losses.ratios import kl_estimate

Loss = tuple[Tensor, dict[str, Tensor]]


def add_up(parts: Mapping[str, Loss], coefs: Mapping[str, float] | None = None) -> Loss:
    """The parts' sum, each times its coefficient (1 where none is given), and all metrics, the parts' losses too."""
    first, *others = (loss * (coefs or {}).get(name, 1.0) for name, (loss, _) in parts.items())
    total = sum(others, start=first)
    metrics = {name: loss.detach() for name, (loss, _) in parts.items()}
    for _, more in parts.values():
        metrics |= more
    return total, metrics


def ppo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    weights: Tensor | None = None,
    denominator: Tensor | float | None = None,
) -> Loss:
    """PPO's clipped surrogate, per token: -min(ratio A, clip(ratio, 1 - clip, 1 + clip_high) A).

    Args:
        log_probs: [B, T] float32, with gradient.
        old_log_probs: [B, T] float32, of the policy before its first update on this batch.
        advantages: [B, T] float32.
        mask: [B, T] bool, the tokens to learn from.
        clip: how far the ratio counts below 1, and above it.
        clip_high: how far above, where that differs (clip-higher).
        weights: [B, T] float32, a factor for each token (see importance_weights).
        denominator: what the sum over tokens is divided by; None: the number of tokens in the mask.
    Returns:
        (loss, metrics): "clip_fraction", tokens whose gradient the clip took away; "old_kl", k3 of
        KL(old policy || policy).
    Raises:
        ValueError: clip or clip_high is not positive, or shapes, dtypes or devices differ.
    Source: Schulman et al. 2017 (PPO), eq. 7; Yu et al. 2025 (DAPO), eq. 10, for clip_high.
    """
    check_tokens(mask, log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages, weights=weights)
    bounds = _log_bounds(clip, clip_high)
    per_token, is_clipped, log_ratio = _clipped_surrogate(
        log_probs, old_log_probs, keep(advantages, mask), mask, bounds
    )
    if weights is not None:
        per_token = per_token * keep(weights, mask)
    num_tokens = mask.sum()
    return share(per_token.sum(), denominator, num_tokens), _drift(log_ratio, is_clipped, denominator, num_tokens)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    denominator: Tensor | float | None = None,
) -> Loss:
    """Half the squared error of the critic, the greater of the plain one and that of the clipped value.

    Args:
        values: [B, T] float32, with gradient.
        old_values: [B, T] float32, those that the returns were computed with.
        returns: [B, T] float32 (see gae).
        mask: [B, T] bool.
        clip: how far a value may move from the old one before it stops counting; None: no clip.
        denominator: what the sum over tokens is divided by; None: the number of tokens in the mask.
    Returns:
        (loss, metrics): "value_clip_fraction", tokens where the clipped error is the greater;
        "value_error", the mean squared error without clip.
    Raises:
        ValueError: clip is not positive, or shapes, dtypes or devices differ.
    Source: PPO's reference code (Dhariwal et al. 2017, Baselines); Huang et al. 2022 ("37 details"), detail 9.
    """
    check_tokens(mask, values=values, old_values=old_values, returns=returns)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: must be above 0, or None for no clip, got {clip}")
    values, old_values, returns = keep(values, mask), keep(old_values, mask), keep(returns, mask)
    plain = error = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(plain, (near - returns).square())
    num_tokens = mask.sum()
    with torch.no_grad():
        metrics = {
            "value_clip_fraction": share((error > plain).sum(), denominator, num_tokens),
            "value_error": share(plain.sum(), denominator, num_tokens),
        }
    return share(0.5 * error.sum(), denominator, num_tokens), metrics


def rloo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    clip_high: float | None = None,
    weights: Tensor | None = None,
    denominator: Tensor | float | None = None,
) -> Loss:
    """REINFORCE with the response as one action: -A ratio log pi(response), the ratio without gradient.

    The log-prob of a response is the sum over its tokens, not the mean. On the batch's first update the ratio is 1.
    On later ones it is pi / pi_old of the whole response, which keeps the gradient that of the current policy (the
    gradient of a ratio is the ratio times that of its logarithm); rows where it has gone beyond the clip, on the side
    that the advantage favours, have no gradient, as in PPO.

    Args:
        log_probs: [B, T] float32, with gradient.
        old_log_probs: [B, T] float32, of the policy before its first update on this batch; None: this is the first.
        advantages: [B] float32, one a response (see rloo_advantages).
        mask: [B, T] bool, the tokens to learn from; whole responses or none of a row.
        clip: how far the response's ratio counts below 1, and above it; None: no clip.
        clip_high: how far above, where that differs.
        weights: [B, T] float32, a factor for each token (see importance_weights, per="sequence").
        denominator: what the sum over rows is divided by; None: the number of rows with a token in the mask.
    Returns:
        (loss, metrics): "clip_fraction", rows whose gradient the clip took away; "old_kl", k3 of
        KL(old policy || policy), per response.
    Raises:
        ValueError: clip is not positive, or shapes, dtypes or devices differ.
    Source: Ahmadian et al. 2024 (Back to Basics), the RLOO estimator: responses, not tokens, are the actions.
    """
    check_tokens(mask, log_probs=log_probs, old_log_probs=old_log_probs, weights=weights)
    check_float("advantages", advantages, mask.shape[:1], mask.device, "the rows of mask")
    low, high = (-math.inf, math.inf) if clip is None else _log_bounds(clip, clip_high)
    has_tokens = mask.any(-1)
    log_probs, advantages = keep(log_probs, mask), keep(advantages, has_tokens)
    with torch.no_grad():
        old = log_probs if old_log_probs is None else keep(old_log_probs, mask)
        log_ratio = (log_probs - old).sum(-1)
        is_clipped = torch.where(advantages < 0, log_ratio < low, log_ratio > high) & (advantages != 0)
        factor = torch.where(is_clipped | (advantages == 0), 0.0, advantages * log_ratio.exp())
    weighted = log_probs if weights is None else log_probs * keep(weights, mask)
    num_rows = has_tokens.sum()
    loss = share(-(factor * weighted.sum(-1)).sum(), denominator, num_rows)
    return loss, _drift(log_ratio, is_clipped, denominator, num_rows)


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ref_log_probs: Tensor | None = None,
    kl_coef: float = 0.0,
    clip: float = 0.2,
    clip_high: float | None = None,
    weights: Tensor | None = None,
    sequence_mean: bool = True,
    denominator: Tensor | float | None = None,
) -> Loss:
    """PPO's clipped surrogate with one advantage a response, plus kl_coef times k3, averaged over responses.

    Args:
        log_probs: [B, T] float32, with gradient.
        old_log_probs: [B, T] float32, of the policy before its first update on this batch.
        advantages: [B] float32, one a response (see grpo_advantages).
        mask: [B, T] bool, the tokens to learn from; whole responses or none of a row.
        ref_log_probs: [B, T] float32, the reference's; needed where kl_coef is not 0, else for the metric alone.
        kl_coef: the weight of the KL estimate, beta in the paper.
        clip, clip_high, weights: as in ppo_loss; the weights leave the KL alone.
        sequence_mean: True: each response counts by its mean over tokens. False (Dr. GRPO): by its sum over
            T, the mask's width and so one constant for all (do not trim microbatches): with the mean, a failed
            response is blamed the less per token the longer it is.
        denominator: what the sum over responses is divided by; None: the number of rows with a token in the mask.
    Returns:
        (loss, metrics): "clip_fraction" and "old_kl", and with a reference "kl" (k3), each averaged as the loss is.
    Raises:
        ValueError: kl_coef without ref_log_probs, clip not positive, or shapes, dtypes or devices differ.
    Source: Shao et al. 2024 (DeepSeekMath), eq. 3 and 4; Liu et al. 2025 (Dr. GRPO), section 3.2.
    """
    check_tokens(mask, log_probs=log_probs, old_log_probs=old_log_probs, weights=weights, ref_log_probs=ref_log_probs)
    check_float("advantages", advantages, mask.shape[:1], mask.device, "the rows of mask")
    if kl_coef and ref_log_probs is None:
        raise ValueError(f"ref_log_probs: needed for kl_coef={kl_coef}, got None; pass them, or kl_coef=0")
    per_row = keep(advantages.unsqueeze(-1).expand_as(mask), mask)
    bounds = _log_bounds(clip, clip_high)
    per_token, is_clipped, log_ratio = _clipped_surrogate(log_probs, old_log_probs, per_row, mask, bounds)
    if weights is not None:
        per_token = per_token * keep(weights, mask)
    lengths = mask.sum(-1, keepdim=True).clamp(min=1) if sequence_mean else mask.shape[1]
    num_rows = mask.any(-1).sum()
    metrics = _drift(log_ratio, is_clipped, denominator, num_rows, lengths)
    if ref_log_probs is not None:
        kl = kl_estimate(log_probs, ref_log_probs, "k3", mask)
        metrics["kl"] = share((kl.detach() / lengths).sum(), denominator, num_rows)
        if kl_coef:
            per_token = per_token + kl_coef * kl
    return share((per_token / lengths).sum(), denominator, num_rows), metrics


def ptx_loss(
    summed_cross_entropy: Tensor, num_tokens: Tensor, coef: float, *, denominator: Tensor | float | None = None
) -> Loss:
    """The pretraining part of PPO-ptx: `coef` times the mean token cross-entropy of a pretraining batch.

    The paper sums over the tokens of a text; the mean keeps `coef` independent of the length of the texts.

    Args:
        summed_cross_entropy: scalar float32 with gradient, over the batch's tokens (see scoring.corpus_loss).
        num_tokens: scalar, how many tokens were summed.
        coef: gamma in the paper; 0 keeps the metric alone.
        denominator: what the sum is divided by; None: num_tokens.
    Returns:
        (loss, metrics): "ptx", the mean token cross-entropy before `coef`.
    Source: Ouyang et al. 2022 (InstructGPT), eq. 2, its last term.
    """
    mean = share(summed_cross_entropy, denominator, num_tokens)
    return coef * mean, {"ptx": mean.detach()}


def entropy_bonus(entropy: Tensor, mask: Tensor, coef: float, *, denominator: Tensor | float | None = None) -> Loss:
    """-coef times the mean entropy of the policy over real tokens: to be added to a loss.

    Args:
        entropy: [B, T] float32, of the next-token distribution before each response token.
        mask: [B, T] bool.
        coef: positive values keep the policy broad.
        denominator: what the sum over tokens is divided by; None: the number of tokens in the mask.
    Returns:
        (loss, metrics): "entropy", the mean before `coef`, in nats.
    Raises:
        ValueError: shapes, dtypes or devices differ.
    Source: Schulman et al. 2017 (PPO), eq. 9, the term c2 S.
    """
    check_tokens(mask, entropy=entropy)
    mean = share(keep(entropy, mask).sum(), denominator, mask.sum())
    return -coef * mean, {"entropy": mean.detach()}


def _log_bounds(clip: float, clip_high: float | None) -> tuple[float, float]:
    """(log(1 - clip), log(1 + clip_high)); a clip of 1 or more leaves the ratio free below."""
    high = clip if clip_high is None else clip_high
    for name, number in (("clip", clip), ("clip_high", high)):
        if not number > 0:
            raise ValueError(f"{name}: must be above 0, got {number}; 0.2 is usual")
    return (math.log1p(-clip) if clip < 1 else -math.inf), math.log1p(high)


def _clipped_surrogate(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, bounds: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """(surrogate to minimise, whether the clip took its gradient, log ratio without gradient), each [B, T].

    min(ratio A, clip(ratio) A) binds above where A > 0 and below where A < 0. Clamping the *log* ratio there gives the
    same number and gradient, and never makes the inf * 0 = NaN that an overflowing ratio leaves in min's backward.
    """
    log_ratio = keep(log_probs, mask) - keep(old_log_probs, mask)
    low, high = bounds
    bounded = torch.where(advantages < 0, log_ratio.clamp(min=low), log_ratio.clamp(max=high))
    with torch.no_grad():
        is_clipped = (bounded != log_ratio) & (advantages != 0)
    return -advantages * bounded.exp(), is_clipped, log_ratio.detach()


@torch.no_grad()
def _drift(
    log_ratio: Tensor,
    is_clipped: Tensor,
    denominator: Tensor | float | None,
    default: Tensor,
    lengths: Tensor | int = 1,
) -> dict[str, Tensor]:
    """How far the policy has moved from the old one; where nothing counts, the log ratio is 0 and adds 0."""
    old_kl = torch.expm1(log_ratio) - log_ratio
    return {
        "clip_fraction": share((is_clipped / lengths).sum(), denominator, default),
        "old_kl": share((old_kl / lengths).sum(), denominator, default),
    }
