"""REINFORCE and its baselines: REINFORCE++, RLOO, ReMax. (B, T, G: see batch.py.)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torchbandit import batch, losses
from torchbandit.batch import masked_whiten
from torchbandit.learn.algorithm import (
    ADVANTAGES,
    LEARN_MASK,
    Algorithm,
    Denominators,
    Draw,
    KLDefault,
    row_reward,
    scorable,
    training_rows,
)
from torchbandit.learn.checks import check_clips

if TYPE_CHECKING:
    from tensordict import TensorDict, TensorDictBase
    from torch import Tensor

    from torchbandit.batch import Reduce
    from torchbandit.losses import Loss

BASELINE_REWARD = "baseline_reward"


@dataclass(frozen=True)
class ReinforcePlusPlus(Algorithm):
    """REINFORCE++: PPO's clipped surrogate without a critic; returns normalised over the whole batch.

    A_t = (R_t - mean) / deviation over all tokens of the batch, R_t = sum_{s >= t} token_reward_s: the reward at the
    last token less the KL of this token and those after it. The loss is the mean over tokens.

    Args:
        clip: Ratio clip.
        clip_high: Upper ratio clip where it differs. Default: as clip.
    Source: Hu 2025 (REINFORCE++), section 3.
    """

    kl_default: ClassVar[KLDefault] = KLDefault("reward-token", "k1")

    clip: float = 0.2
    clip_high: float | None = None

    def __post_init__(self) -> None:
        check_clips(self.clip, self.clip_high)

    def targets(self, td: TensorDict, *, group_size: int, reduce: Reduce | None) -> TensorDict:
        """Returns to go, less `baseline`, normalised over the batch's tokens: [B, T]."""
        rows = training_rows(td)
        mask = rows[LEARN_MASK]
        returns = losses.returns_to_go(td[batch.REWARD], td.get(batch.TOKEN_REWARD, None), mask)
        returns = returns - self.baseline(td, group_size).unsqueeze(-1)
        rows[ADVANTAGES] = masked_whiten(returns, mask, reduce=reduce)
        return rows

    def baseline(self, td: TensorDictBase, group_size: int) -> Tensor:
        """What is subtracted from each row's returns: [B]; 0 here, since whitening takes the batch's mean off."""
        return row_reward(td).new_zeros(len(td))

    def loss(self, out: TensorDictBase, targets: TensorDictBase, *, denominators: Denominators) -> Loss:
        """PPO's clipped surrogate, the mean over tokens."""
        part = losses.policy_loss(
            out["log_probs"], targets[batch.LOG_PROBS], targets[ADVANTAGES], targets[LEARN_MASK],
            clip=self.clip, clip_high=self.clip_high, denominator=denominators["tokens"],
        )  # fmt: skip
        return losses.add_up({"policy": part})


@dataclass(frozen=True)
class ReinforcePlusPlusBaseline(ReinforcePlusPlus):
    """REINFORCE++ with a baseline: the group's mean reward is taken off before the batch's normalisation.

    Its KL goes into the loss, as k2.

    Source: Hu 2025 (REINFORCE++), its variant with a baseline.
    """

    least_group_size: ClassVar[int] = 2
    default_group_size: ClassVar[int] = 4
    kl_default: ClassVar[KLDefault] = KLDefault("loss", "k2")

    def baseline(self, td: TensorDictBase, group_size: int) -> Tensor:
        """The mean reward of the row's group over the rows with a valid score: [B]."""
        reward, counted = row_reward(td), scorable(td)
        # In a constant group this is the reward itself: a mean that is off by a rounding would be whitened to an
        # advantage, and Adam makes a whole step of any gradient.
        centred = losses.group_advantages(reward, group_size, scale="none", scorable=counted)
        return losses.keep(reward, counted) - centred


@dataclass(frozen=True)
class RLOO(Algorithm):
    """RLOO: a response is one action; its baseline is the mean reward of its siblings.

    loss = -mean over responses of sg[ratio] A log pi(response); A = r - mean of the other siblings. The ratio is that
    of the whole response and 1 on a batch's first update; a response whose ratio has left the clip, on the side that
    its advantage favours, has no gradient.

    Args:
        clip: Clip of the response's ratio. null: none.
        clip_high: Upper clip where it differs. Default: as clip.
    Source: Ahmadian et al. 2024 (Back to Basics); Kool et al. 2019.
    """

    least_group_size: ClassVar[int] = 2
    default_group_size: ClassVar[int] = 4
    kl_default: ClassVar[KLDefault] = KLDefault("reward-response", "k1")
    mean_of: ClassVar = "sum"

    clip: float | None = 0.2
    clip_high: float | None = None

    def __post_init__(self) -> None:
        check_clips(self.clip, self.clip_high)

    def targets(self, td: TensorDict, *, group_size: int, reduce: Reduce | None) -> TensorDict:
        """Leave-one-out advantages [B]."""
        rows = training_rows(td)
        rows[ADVANTAGES] = losses.rloo_advantages(row_reward(td), group_size, scorable(td))
        return rows

    def loss(self, out: TensorDictBase, targets: TensorDictBase, *, denominators: Denominators) -> Loss:
        """REINFORCE with the response as one action, the mean over responses."""
        part = losses.policy_loss(
            out["log_probs"], targets[batch.LOG_PROBS], targets[ADVANTAGES], targets[LEARN_MASK], ratio="product",
            clip_as="mask", mean="sum", clip=self.clip, clip_high=self.clip_high, denominator=denominators["rows"],
        )  # fmt: skip
        return losses.add_up({"policy": part})


@dataclass(frozen=True)
class ReMax(RLOO):
    """ReMax: REINFORCE whose baseline is the reward of the greedy response to the same prompt.

    loss as RLOO's, with A = r - r(greedy). The greedy responses are scored beside the batch and never trained on.

    Source: Li et al. 2023 (ReMax), algorithm 1.
    """

    least_group_size: ClassVar[int] = 1
    default_group_size: ClassVar[int] = 1

    def collect(self, draw: Draw) -> TensorDict:
        """One draw, and the greedy reward of each row's prompt as `baseline_reward` [B]."""
        td = draw()
        td[BASELINE_REWARD] = draw.greedy_reward(td)
        return td

    def targets(self, td: TensorDict, *, group_size: int, reduce: Reduce | None) -> TensorDict:
        """Rewards less the greedy one's: [B]; rows whose greedy response has no valid score are left out."""
        rows = training_rows(td)
        advantages = row_reward(td) - td[BASELINE_REWARD]
        usable = advantages.isfinite() & scorable(td)
        rows[LEARN_MASK] = rows[LEARN_MASK] & usable.unsqueeze(-1)
        rows[ADVANTAGES] = losses.keep(advantages, usable)
        return rows
