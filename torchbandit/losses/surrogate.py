"""The policy loss as independent choices: ratio, clip, mean, and the advantage that comes in. (B, T: see batch.py.)

Nearly every paper since PPO is one combination of them; `torchbandit.learn.algorithms` names the combinations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchbandit.losses.choices import ClipAs, Loss, Mean, Ratio, check_choices, check_dual_clip, log_bounds
from torchbandit.losses.inputs import check_float, check_tokens, is_finite, keep, share
from torchbandit.losses.ratios import MAX_LOG_RATIO


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    ratio: Ratio = "token",
    clip_as: ClipAs = "min",
    mean: Mean = "token",
    clip: float | None = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
    denominator: Tensor | float | None = None,
) -> Loss:
    """-E[surrogate], where the surrogate of a token is made of a ratio, a clip and an advantage.

    With d_t = log_probs - old_log_probs, each log ratio bounded to ±MAX_LOG_RATIO (no gradient beyond):

    - ratio="token": r_t = exp(d_t). "response": r = exp(mean_t d_t), the geometric mean over the response.
      "response_token": r's value, the gradient of each token's own d_t. "product": r = exp(sum_t d_t).
    - clip_as="min": min(r A, clip(r, 1 - clip, 1 + clip_high) A). "weight": sg[clip(r)] A log pi, so that a clipped
      token keeps a gradient. "mask": sg[r] A log pi, and none where "min" would give none.
    - mean="token": over all tokens. "response": over a response's tokens, then over responses. "width": sum over a
      response's tokens divided by T, then over responses. "sum": sum over tokens, then mean over responses.

    Args:
        log_probs: [B, T] float32, with gradient.
        old_log_probs: [B, T] float32, of the policy before its first update on this batch; None: this is the first.
        advantages: [B] or [B, T] float32.
        mask: [B, T] bool, the tokens to learn from. A row with an advantage, an old log-prob or a weight that is not
            finite is left out.
        clip: how far below 1 the ratio counts; None: without bound. 1 or more leaves it free below.
        clip_high: how far above 1; None: as far as `clip`.
        dual_clip: c > 1: where A < 0 the surrogate is at least c A ("min" alone).
        weights: [B, T] float32, a factor for each token (see importance_weights).
        denominator: what the sum over tokens (mean="token") or responses is divided by; None: their number.
    Returns:
        (loss, metrics): "clip_fraction", where the clip bound the ratio; "old_kl", k3 of KL(old policy || policy);
        "ratio_at_bound", where the log ratio reached MAX_LOG_RATIO; averaged as the loss is.
    Raises:
        ValueError: an unknown choice, a clip that is not positive, or shapes, dtypes or devices differ.
    Source: Schulman et al. 2017 (PPO), eq. 7; Ye et al. 2020 (dual clip), eq. 5; Yu et al. 2025 (DAPO), sections
        3.1 and 3.3, for clip_high and mean="token"; Zheng et al. 2025 (GSPO), section 4; MiniMax 2025
        (MiniMax-M1, CISPO), section 3.1, for "weight"; Liu et al. 2025 (Dr. GRPO), section 3.2, for "width".
    """
    check_choices(ratio=ratio, clip_as=clip_as, mean=mean)
    check_tokens(mask, log_probs=log_probs, old_log_probs=old_log_probs, weights=weights)
    advantages = per_token(advantages, mask)
    low, high = log_bounds(clip, clip_high)
    check_dual_clip(dual_clip, clip_as)
    mask = usable(mask, advantages, old_log_probs, weights)
    log_probs, advantages = keep(log_probs, mask), keep(advantages, mask)
    old = log_probs.detach() if old_log_probs is None else keep(old_log_probs, mask)
    raw = log_ratio_of(log_probs, old, mask, ratio)
    log_ratio = raw.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    below = math.inf if dual_clip is None else math.log(dual_clip)
    # Where A > 0 the clip binds above, where A < 0 below. Clamping the *log* ratio gives the number and gradient of
    # min(r A, clip(r) A), and never the inf * 0 = NaN that an overflowing ratio leaves in min's backward.
    bounded = torch.where(advantages < 0, log_ratio.clamp(low, below), log_ratio.clamp(max=high))
    with torch.no_grad():
        counts = advantages != 0
        at_bound = (raw.abs() >= MAX_LOG_RATIO) & mask
        is_clipped = (bounded != log_ratio) & counts
        if clip_as == "weight":
            is_clipped = ((log_ratio < low) | (log_ratio > high)) & counts
    if clip_as == "min":
        per = -advantages * bounded.exp()
    else:
        with torch.no_grad():
            factor = log_ratio.clamp(low, high).exp() if clip_as == "weight" else log_ratio.exp()
            lost = at_bound | is_clipped if clip_as == "mask" else ~counts
            factor = torch.where(lost | ~counts, 0.0, advantages * factor)
        per = -factor * log_probs
    if weights is not None:
        per = per * keep(weights, mask)
    loss = average(per, mask, mean, denominator)
    rows = "response" if mean == "sum" else mean  # a response's share or drift, not one for each of its tokens
    old_kl = torch.expm1(log_ratio.detach()) - log_ratio.detach()
    drift = {"clip_fraction": is_clipped, "old_kl": keep(old_kl, mask), "ratio_at_bound": at_bound}
    return loss, {name: average(x, mask, rows, denominator) for name, x in drift.items()}


def average(x: Tensor, mask: Tensor, mean: Mean, denominator: Tensor | float | None = None) -> Tensor:
    """The mean of [B, T] values that are 0 outside the mask, as `policy_loss` takes it: a scalar.

    Args:
        denominator: tokens for mean="token", responses for the others; None: those of this mask.
    """
    if mean == "token":
        return share(x.sum(), denominator, mask.sum())
    lengths: Tensor | int = 1
    if mean == "response":
        lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    elif mean == "width":
        lengths = mask.shape[1]
    return share((x / lengths).sum(), denominator, mask.any(-1).sum())


def log_ratio_of(log_probs: Tensor, old: Tensor, mask: Tensor, ratio: Ratio) -> Tensor:
    """The log ratio of each token, [B, T]; both log-probs are 0 outside the mask."""
    difference = log_probs - old
    if ratio == "token":
        return difference
    total = difference.sum(-1, keepdim=True)
    if ratio == "product":
        return total * mask
    level = total / mask.sum(-1, keepdim=True).clamp(min=1) * mask
    return level if ratio == "response" else level.detach() + log_probs - log_probs.detach()


def per_token(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages [B] or [B, T] as [B, T]; ValueError for any other shape, dtype or device."""
    if advantages.dim() == 1:
        check_float("advantages", advantages, mask.shape[:1], mask.device, "the rows of mask")
        return advantages.unsqueeze(-1).expand_as(mask)
    check_float("advantages", advantages, mask.shape, mask.device, "mask, or [B]")
    return advantages


def usable(mask: Tensor, *numbers: Tensor | None) -> Tensor:
    """The mask without the rows on whose real tokens one of the [B, T] numbers is not finite."""
    kept = mask
    for x in numbers:
        if x is not None:
            kept = kept & (is_finite(x) | ~mask).all(-1, keepdim=True)
    return kept
