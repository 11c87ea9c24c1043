"""What is minimised: PPO, value, RLOO, GRPO, KL, likelihood, ptx, entropy. (B, T: see batch.py.)

Each returns (loss, metrics): a scalar with gradient, and scalars without, all over the same denominator.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torchbandit.losses.choices import Loss, LossKLEstimator, Mean
from torchbandit.losses.inputs import check_float, check_tokens, keep, share
from torchbandit.losses.ratios import MAX_LOG_RATIO, kl_estimate
from torchbandit.losses.surrogate import average, per_token, policy_loss, usable


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
    dual_clip: float | None = None,
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
        dual_clip: c > 1: where the advantage is negative, the surrogate is at least c A; None: without bound.
        weights: [B, T] float32, a factor for each token (see importance_weights).
        denominator: what the sum over tokens is divided by; None: the number of tokens in the mask.
    Returns:
        (loss, metrics): "clip_fraction", tokens whose gradient the clip took away; "old_kl", k3 of
        KL(old policy || policy).
    Raises:
        ValueError: clip or clip_high is not positive, or shapes, dtypes or devices differ.
    Source: Schulman et al. 2017 (PPO), eq. 7; Yu et al. 2025 (DAPO), eq. 10, for clip_high.
    """
    check_tokens(mask, advantages=advantages)
    return policy_loss(
        log_probs, old_log_probs, advantages, mask,
        clip=clip, clip_high=clip_high, dual_clip=dual_clip, weights=weights, denominator=denominator,
    )  # fmt: skip


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
    mask = usable(mask, old_values, returns)
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
    check_tokens(mask, log_probs=log_probs)
    check_float("advantages", advantages, mask.shape[:1], mask.device, "the rows of mask")
    return policy_loss(
        log_probs, old_log_probs, advantages, mask, ratio="product", clip_as="mask", mean="sum",
        clip=clip, clip_high=clip_high, weights=weights, denominator=denominator,
    )  # fmt: skip


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
    check_tokens(mask, log_probs=log_probs, ref_log_probs=ref_log_probs)
    check_float("advantages", advantages, mask.shape[:1], mask.device, "the rows of mask")
    if kl_coef and ref_log_probs is None:
        raise ValueError(f"ref_log_probs: needed for kl_coef={kl_coef}, got None; pass them, or kl_coef=0")
    mean: Mean = "response" if sequence_mean else "width"
    loss, metrics = policy_loss(
        log_probs, old_log_probs, advantages, mask, mean=mean,
        clip=clip, clip_high=clip_high, weights=weights, denominator=denominator,
    )  # fmt: skip
    if ref_log_probs is None:
        return loss, metrics
    kl, kl_metrics = kl_loss(log_probs, ref_log_probs, mask, kl_coef, mean=mean, denominator=denominator)
    return loss + kl if kl_coef else loss, metrics | kl_metrics


def kl_loss(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    mask: Tensor,
    coef: float,
    *,
    estimator: LossKLEstimator = "k3",
    old_log_probs: Tensor | None = None,
    mean: Mean = "token",
    denominator: Tensor | float | None = None,
) -> Loss:
    """coef times an estimate of KL(policy || reference), as a part of the loss.

    What is minimised is the gradient of the estimate, and that is the KL's for two of them alone. With
    d = log_probs - ref_log_probs and tokens sampled from the policy: k1's gradient is 0 in expectation; k2's is the
    KL's; k3's is that of KL(reference || policy), which differs wherever the two are apart. Off policy (a second
    update on a batch) k2 and k3 are estimates under the old policy. "weighted_k3" is r k3 with the ratio
    r = policy / old policy, gradient through both: its value and its gradient are the KL's on and off policy. k3 grows
    as exp(-d), so it is bounded where d reaches -MAX_LOG_RATIO (no gradient beyond), as every ratio is.

    Args:
        log_probs: [B, T] float32, with gradient.
        ref_log_probs: [B, T] float32, the reference's.
        mask: [B, T] bool. A row with a log-prob of the reference or an old one that is not finite is left out.
        coef: its weight; 0 keeps the metric alone.
        estimator: "k1", "k2", "k3" or "weighted_k3", which needs old_log_probs.
        mean, denominator: as in `policy_loss`.
    Returns:
        (loss, metrics): "kl", the estimate before `coef`, averaged as the loss is.
    Raises:
        ValueError: an unknown estimator, or shapes, dtypes or devices differ.
    Source: Schulman 2020, "Approximating KL Divergence"; Shao et al. 2024, eq. 4 (k3 as a loss); Tang and Munos 2025,
        "On a few pitfalls in KL divergence gradient estimation for RL"; DeepSeek-AI 2025 (DeepSeek-V3.2), eq. 7, for
        the weighted k3.
    """
    check_tokens(mask, log_probs=log_probs, ref_log_probs=ref_log_probs, old_log_probs=old_log_probs)
    mask = usable(mask, ref_log_probs, old_log_probs)
    if estimator == "k3" or estimator == "weighted_k3":  # what a type checker follows
        near = torch.maximum(keep(log_probs, mask), keep(ref_log_probs, mask) - MAX_LOG_RATIO)
        kl = kl_estimate(near, ref_log_probs, "k3", mask)
    else:
        kl = kl_estimate(log_probs, ref_log_probs, estimator, mask)
    if estimator == "weighted_k3":
        if old_log_probs is None:
            raise ValueError('old_log_probs: needed for estimator="weighted_k3", got None; pass them, or use "k3"')
        log_ratio = keep(log_probs, mask) - keep(old_log_probs, mask)
        kl = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() * kl
    mean_kl = average(kl, mask, mean, denominator)
    return coef * mean_kl, {"kl": mean_kl.detach()}


def likelihood_loss(
    log_probs: Tensor, weights: Tensor, mask: Tensor, *, mean: Mean = "token", denominator: Tensor | float | None = None
) -> Loss:
    """Cross-entropy of chosen responses: -weight log pi, the loss of best-of-n fine-tuning.

    Args:
        log_probs: [B, T] float32, with gradient.
        weights: [B] or [B, T] float32; 1 for a chosen response.
        mask: [B, T] bool, the tokens of the chosen responses. A row whose weight is not finite is left out.
        mean, denominator: as in `policy_loss`.
    Returns:
        (loss, metrics): no metrics beside the loss.
    Raises:
        ValueError: shapes, dtypes or devices differ.
    Source: Dong et al. 2023 (RAFT), section 3; Anthony et al. 2017 (expert iteration).
    """
    check_tokens(mask, log_probs=log_probs)
    weights = per_token(weights, mask)
    mask = usable(mask, weights)
    return average(-keep(weights, mask) * keep(log_probs, mask), mask, mean, denominator), {}


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
