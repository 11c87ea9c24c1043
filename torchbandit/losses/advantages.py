"""How much better a token or a response was than expected: GAE, RLOO, GRPO. (B, T, G: see batch.py.)"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchbandit.batch import Reduce, masked_whiten
from torchbandit.losses.choices import Baseline, Scale, check_choices
from torchbandit.losses.inputs import check_float, check_mask, check_tokens, is_finite, keep
from torchbandit.responses import last_token


@torch.no_grad()
def gae(
    token_reward: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation; the episode ends after the last real token.

    Args:
        token_reward: [B, T] float32, the reward for each response token.
        values: [B, T] float32, the value before each response token.
        mask: [B, T] bool, right-padded: the real tokens of the rows to learn from.
        gamma: discount of a token.
        lam: the lambda of GAE; 1 gives Monte Carlo returns, 0 one-step errors.
    Returns:
        (advantages, returns), each [B, T] float32 without gradient, 0 outside the mask; advantages are not
        whitened. returns = advantages + values is what the critic is fitted to.
    Raises:
        ValueError: shapes, dtypes or devices differ, or gamma or lam is outside [0, 1].
    Source: Schulman et al. 2016 (GAE), eq. 16, with delta of eq. 10.
    """
    check_tokens(mask, token_reward=token_reward, values=values)
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"{name}: must be in [0, 1], got {number}")
    values = keep(values, mask)
    next_values = pad(values[:, 1:], (0, 1))
    advantages = keep(token_reward + gamma * next_values - values, mask)
    # A_t = delta_t + c A_{t+1}, by doubling: after the pass with `reach`, A_t holds the next 2 * reach deltas. That is
    # log2(T) passes over the batch in place of T, and no matrix product whose precision a global switch may lower.
    reach, decay = 1, gamma * lam
    while reach < mask.shape[1]:
        advantages = advantages + decay**reach * pad(advantages[:, reach:], (0, reach))
        reach *= 2
    advantages = keep(advantages, mask)
    return advantages, keep(advantages + values, mask)


@torch.no_grad()
def ppo_advantages(
    reward: Tensor,
    token_reward: Tensor | None,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor]:
    """GAE on a batch's rewards, its advantages whitened over all real tokens.

    Args:
        reward: [B, 1] float32, given for the last real token where there is no token_reward.
        token_reward: [B, T] float32 or None.
        values, mask, gamma, lam: as in `gae`.
        reduce: sums over processes (see masked_whiten).
    Returns:
        (advantages, returns), each [B, T] float32 without gradient.
    Source: Schulman et al. 2017 (PPO); Huang et al. 2024 (The N+ Implementation Details of RLHF with PPO), whitening.
    """
    if token_reward is None:
        token_reward = torch.where(last_token(mask), reward, 0.0)
    advantages, returns = gae(token_reward, values, mask, gamma=gamma, lam=lam)
    return masked_whiten(advantages, mask, reduce=reduce), returns


@torch.no_grad()
def returns_to_go(reward: Tensor, token_reward: Tensor | None, mask: Tensor) -> Tensor:
    """What each token still brings in: the sum of the token rewards from it on.

    Args:
        reward: [B, 1] float32, on every token where there is no token_reward.
        token_reward: [B, T] float32 or None. mask: [B, T] bool, right-padded.
    Returns:
        [B, T] float32 without gradient, 0 outside the mask.
    Source: Hu 2025 (REINFORCE++), eq. 7, with the KL of each token in its reward.
    """
    if token_reward is None:
        return keep(reward.expand_as(mask), mask)
    kept = keep(token_reward, mask)
    return keep(kept.flip(-1).cumsum(-1).flip(-1), mask)


@torch.no_grad()
def group_advantages(
    reward: Tensor,
    group_size: int,
    *,
    baseline: Baseline = "mean",
    scale: Scale = "group",
    scorable: Tensor | None = None,
    reduce: Reduce | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Reward less a baseline made of the group, over a standard deviation.

    Args:
        reward: [B] float32; siblings of a prompt are contiguous.
        group_size: G, at least 2 with a baseline or the group's deviation.
        baseline: "mean": the group's mean; "leave_one_out": the mean of the other siblings; "none": 0.
        scale: "group": over the group's deviation; "batch": over that of all rewards of the batch; "none": as it is.
            Deviations are over n - 1.
        scorable: [B] bool, the rows that count; None: all. Rows whose reward is not finite never count.
        reduce: sums over processes, for scale="batch".
        eps: added to the deviation.
    Returns:
        [B] float32 without gradient; 0 for rows that do not count, and where no sibling is left to compare with.
        Groups whose rewards are all equal get exactly 0 where there is a baseline.
    Raises:
        ValueError: an unknown choice, group_size is too small or does not divide B, or a tensor has the wrong shape
            or dtype.
    Source: Shao et al. 2024 (DeepSeekMath), section 4.1.2; Ahmadian et al. 2024 (Back to Basics) for "leave_one_out";
        Liu et al. 2025 (Dr. GRPO), section 3.2, for scale="none"; Hu 2025 (REINFORCE++) for "batch".
    """
    check_choices(baseline=baseline, scale=scale)
    if baseline != "none" or scale == "group":
        _check_siblings(group_size, "group_advantages")
    groups, counted = _groups(reward, group_size, scorable)
    count = counted.sum(-1, keepdim=True)
    centred = _centred(groups, counted, count)
    out = groups if baseline == "none" else centred
    if baseline == "leave_one_out":  # r_i - sum_{j != i} r_j / (n - 1) = n / (n - 1) * (r_i - mean)
        out = centred * count / (count - 1).clamp(min=1)
    if scale == "group":
        variance = centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
        out = out / (variance.sqrt() + eps)
    elif scale == "batch":
        out = out / (_batch_deviation(groups, counted, reduce) + eps)
    return out.flatten()


def rloo_advantages(reward: Tensor, group_size: int, scorable: Tensor | None = None) -> Tensor:
    """Reward less the mean reward of the other responses to the same prompt (see group_advantages).

    Source: Ahmadian et al. 2024 (Back to Basics), the RLOO estimator; first in Kool et al. 2019.
    """
    _check_siblings(group_size, "rloo_advantages")
    return group_advantages(reward, group_size, baseline="leave_one_out", scale="none", scorable=scorable)


def grpo_advantages(
    reward: Tensor, group_size: int, *, scale: bool = True, scorable: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Reward less the group's mean, over the group's standard deviation (see group_advantages).

    Args:
        scale: divide by the standard deviation; False is Dr. GRPO.
    Source: Shao et al. 2024 (DeepSeekMath), section 4.1.2; Liu et al. 2025 (Dr. GRPO), section 3.2, for `scale=False`.
    """
    _check_siblings(group_size, "grpo_advantages")
    return group_advantages(reward, group_size, scale="group" if scale else "none", scorable=scorable, eps=eps)


@torch.no_grad()
def best_of_group(
    reward: Tensor, group_size: int, *, best: int = 1, threshold: float | None = None, scorable: Tensor | None = None
) -> Tensor:
    """The responses that best-of-n fine-tuning learns from.

    Args:
        reward: [B] float32; siblings of a prompt are contiguous.
        group_size: G.
        best: how many of each group; of equal rewards the first siblings are taken.
        threshold: take those with at least this reward in place of the best; None: the best.
        scorable: [B] bool, the rows that count; None: all. Rows whose reward is not finite never count.
    Returns:
        [B] bool.
    Raises:
        ValueError: best is not in 1..group_size, or a tensor has the wrong shape or dtype.
    Source: Dong et al. 2023 (RAFT), algorithm 1; Anthony et al. 2017 (expert iteration), for the threshold.
    """
    counted = _counted(reward, group_size, scorable)
    if threshold is not None:
        return (counted & (reward.view(-1, group_size) >= threshold)).flatten()
    if not 1 <= best <= group_size:
        raise ValueError(f"best: must be 1 to group_size={group_size}, got {best}")
    groups = reward.view(-1, group_size).masked_fill(~counted, -torch.inf)
    order = groups.argsort(dim=-1, descending=True, stable=True)[:, :best]
    chosen = torch.zeros_like(counted).scatter_(-1, order, True)
    return (chosen & counted).flatten()


@torch.no_grad()
def group_is_constant(reward: Tensor, group_size: int, scorable: Tensor | None = None) -> Tensor:
    """True for the rows of groups that teach nothing: the rewards that count are all equal, or fewer than two.

    Leave such groups out of a loss with `mask & ~group_is_constant(...)[:, None]`.

    Args:
        reward: [B] float32; siblings of a prompt are contiguous.
        group_size: G.
        scorable: [B] bool, the rows that count; None: all. Rows whose reward is not finite never count.
    Returns:
        [B] bool, the same for all siblings.
    Raises:
        ValueError: group_size is below 1 or does not divide B, or a tensor has the wrong shape or dtype.
    Source: Yu et al. 2025 (DAPO), section 3.2 (dynamic sampling) leaves these groups out.
    """
    counted = _counted(reward, group_size, scorable)
    return _constant(reward.view(-1, group_size), counted).expand_as(counted).flatten()


@torch.no_grad()
def num_constant_groups(reward: Tensor, group_size: int, scorable: Tensor | None = None) -> Tensor:
    """How many groups `group_is_constant` marks: a scalar int64 tensor on the device. Arguments as there."""
    counted = _counted(reward, group_size, scorable)
    return _constant(reward.view(-1, group_size), counted).sum()


def _check_siblings(group_size: int, name: str) -> None:
    if group_size < 2:
        raise ValueError(
            f"group_size: {name} compares a response with its siblings, so must be at least 2, got {group_size}; "
            "raise it, or use PPO, whose baseline is a critic"
        )


def _groups(reward: Tensor, group_size: int, scorable: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rewards and which of them count, both [B / G, G]; a reward that does not count is 0."""
    counted = _counted(reward, group_size, scorable)
    return keep(reward.view(-1, group_size), counted), counted


def _counted(reward: Tensor, group_size: int, scorable: Tensor | None) -> Tensor:
    """Which rewards count: [B / G, G]."""
    if reward.dim() != 1:
        raise ValueError(f"reward: must be float32 [B], got {list(reward.shape)}; squeeze the last axis of [B, 1]")
    check_float("reward", reward, reward.shape, reward.device, "one number a response")
    if group_size < 1 or reward.shape[0] % group_size:
        raise ValueError(
            f"group_size: must be a positive divisor of the {reward.shape[0]} rows, got {group_size}; pass whole groups"
        )
    counted = is_finite(reward)
    if scorable is not None:
        check_mask(scorable, num_dims=1)
        if scorable.shape != reward.shape or scorable.device != reward.device:
            raise ValueError(f"scorable: must be {list(reward.shape)} like reward, got {list(scorable.shape)}")
        counted = counted & scorable
    return counted.view(-1, group_size)


def _constant(groups: Tensor, counted: Tensor) -> Tensor:
    """[B / G, 1] bool: the greatest counted reward is not above the least. What does not count may be anything."""
    out = ~counted
    low = groups.masked_fill(out, torch.inf).amin(-1, keepdim=True)
    high = groups.masked_fill(out, -torch.inf).amax(-1, keepdim=True)
    return high <= low


def _batch_deviation(groups: Tensor, counted: Tensor, reduce: Reduce | None) -> Tensor:
    """Standard deviation over all rewards that count, of all processes: a scalar."""
    moments = torch.stack((counted.sum().to(groups.dtype), groups.sum()))
    count, total = (moments if reduce is None else reduce(moments)).unbind()
    squares = keep(groups - total / count.clamp(min=1), counted).square().sum()
    squares = squares if reduce is None else reduce(squares)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def _centred(groups: Tensor, counted: Tensor, count: Tensor) -> Tensor:
    """Rewards less their group's mean; exactly 0 in a constant group, where the mean may be off by a rounding."""
    mean = groups.sum(-1, keepdim=True) / count.clamp(min=1)
    return keep(groups - mean, counted & ~_constant(groups, counted))
