"""The GRPO family: one class of independent choices, and the papers as presets of it. (B, T, G: see batch.py.)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from tensordict import TensorDict, TensorDictBase

    from torchbandit.batch import Reduce
    from torchbandit.losses import Loss


from torchbandit import batch, losses
from torchbandit.learn.algorithm import (
    ADVANTAGES,
    LEARN_MASK,
    Algorithm,
    Denominators,
    KLDefault,
    row_reward,
    scorable,
    training_rows,
)
from torchbandit.learn.checks import check_clips
from torchbandit.losses.choices import Baseline, ClipAs, Mean, Ratio, Scale, check_choices


@dataclass(frozen=True)
class GRPO(Algorithm):
    """GRPO: PPO's clipped surrogate with an advantage made of the group.

    A = (r - mean of the group) / deviation of the group; loss = -mean over responses of the mean over tokens of
    min(r_t A, clip(r_t, 1 - clip, 1 + clip_high) A).

    Args:
        baseline: What is taken off a reward: the group's mean, the mean of the other siblings, or nothing.
        scale: Whose standard deviation divides it: the group's, the batch's, or none.
        ratio: Of a token; "response": the geometric mean over the response; "response_token": its value with each
            token's own gradient; "product": of the whole response.
        clip_as: "min": PPO's; "weight": the clipped ratio weighs the log-prob and has no gradient of its own; "mask": a
            clipped token has no gradient.
        mean: Over a response's tokens and then over responses; "token": over all tokens; "width": a response's sum
            over max_new_tokens, then over responses; "sum": a response's sum, then over responses.
        clip: Ratio clip. null: none below.
        clip_high: Upper ratio clip where it differs (clip-higher). Default: as clip.
        dual_clip: c > 1: where the advantage is negative, a token loses at most c times it. Default: off.
    Source: Shao et al. 2024 (DeepSeekMath), section 4.1, without its KL, which the run adds (`kl_coef`).
    """

    least_group_size: ClassVar[int] = 2
    default_group_size: ClassVar[int] = 4
    kl_default: ClassVar[KLDefault] = KLDefault("loss", "k3")

    baseline: Baseline = "mean"
    scale: Scale = "group"
    ratio: Ratio = "token"
    clip_as: ClipAs = "min"
    mean: Mean = "response"
    clip: float | None = 0.2
    clip_high: float | None = None
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        check_choices(baseline=self.baseline, scale=self.scale, ratio=self.ratio, clip_as=self.clip_as, mean=self.mean)
        check_clips(self.clip, self.clip_high, self.dual_clip, self.clip_as)

    def targets(self, td: TensorDict, *, group_size: int, reduce: Reduce | None) -> TensorDict:
        """One advantage a response: [B]."""
        rows = training_rows(td)
        rows[ADVANTAGES] = losses.group_advantages(
            row_reward(td), group_size, baseline=self.baseline, scale=self.scale, scorable=scorable(td), reduce=reduce
        )
        return rows

    def loss(self, out: TensorDictBase, targets: TensorDictBase, *, denominators: Denominators) -> Loss:
        """The policy loss of these choices."""
        part = losses.policy_loss(
            out["log_probs"], targets[batch.LOG_PROBS], targets[ADVANTAGES], targets[LEARN_MASK],
            ratio=self.ratio, clip_as=self.clip_as, mean=self.mean,
            clip=self.clip, clip_high=self.clip_high, dual_clip=self.dual_clip,
            denominator=denominators["tokens" if self.mean == "token" else "rows"],
        )  # fmt: skip
        return losses.add_up({"policy": part})


@dataclass(frozen=True)
class DrGRPO(GRPO):
    """Dr. GRPO: no division by the group's deviation, and a response's tokens over a constant width.

    Division by the length blames a failed response the less per token the longer it is; division by the deviation
    weighs prompts by how alike their answers are.

    Source: Liu et al. 2025 (Understanding R1-Zero-Like Training), section 3.2.
    """

    scale: Scale = "none"
    mean: Mean = "width"


@dataclass(frozen=True)
class DAPO(GRPO):
    """DAPO: the mean over all tokens of the batch, and a higher clip above than below.

    Its dynamic sampling is `refill`, its overlong filtering `mask_truncated`, its soft punishment `OverlongPenalty`.

    Source: Yu et al. 2025 (DAPO), section 3.
    """

    mean: Mean = "token"
    clip_high: float | None = 0.28


@dataclass(frozen=True)
class GSPO(GRPO):
    """GSPO: the ratio is that of the response, as the geometric mean over its tokens; clips are far narrower.

    r = exp(mean_t (log pi - log pi_old)); the mean is over responses. ratio="response_token" is GSPO-token.

    Source: Zheng et al. 2025 (GSPO), section 4.
    """

    ratio: Ratio = "response"
    clip: float | None = 3e-4
    clip_high: float | None = 4e-4


@dataclass(frozen=True)
class CISPO(GRPO):
    """CISPO: the ratio, bounded above and without gradient, weighs the log-prob; no token loses its gradient.

    loss = -mean over tokens of sg[min(r_t, 1 + clip_high)] A log pi_t. No bound below.

    Source: MiniMax 2025 (MiniMax-M1), section 3.1; Khatri et al. 2025 (ScaleRL) for the bound of 5.
    """

    clip_as: ClipAs = "weight"
    mean: Mean = "token"
    clip: float | None = None
    clip_high: float | None = 4.0
