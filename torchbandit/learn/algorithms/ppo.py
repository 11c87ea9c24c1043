"""PPO on tokens, with a critic. (B, T: see batch.py.)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from tensordict import TensorDict, TensorDictBase

    from torchbandit.batch import Reduce
    from torchbandit.losses import Loss


from torchbandit import batch, losses
from torchbandit.learn.algorithm import ADVANTAGES, LEARN_MASK, Algorithm, Denominators, KLDefault, training_rows
from torchbandit.learn.checks import at_least, check_clips, within


@dataclass(frozen=True)
class PPO(Algorithm):
    """PPO: GAE against a critic, clipped ratios, clipped values. With a ptx_coef it is PPO-ptx (InstructGPT).

    loss = -mean_t min(r_t A_t, clip(r_t, 1 - clip, 1 + clip_high) A_t) + value_coef/2 mean_t max((v - R)^2, clipped),
    A = GAE(gamma, lam) of the token rewards, whitened over the batch's tokens; R = A (before whitening) + old values.

    Args:
        clip: Ratio clip.
        clip_high: Upper ratio clip where it differs (clip-higher). Default: as clip.
        dual_clip: c > 1: where the advantage is negative, a token loses at most c times it. Default: off.
        value_clip: How far a value may move from the old one; 0 for no clip.
        value_coef: Weight of the value loss.
        gamma: Discount of a token.
        lam: Lambda of GAE.
    Source: Schulman et al. 2017 (PPO); Schulman et al. 2016 (GAE); Ouyang et al. 2022 (InstructGPT), section 3.5; Ye
        et al. 2020, eq. 5 (dual clip).
    """

    needs_critic: ClassVar[bool] = True
    kl_default: ClassVar[KLDefault] = KLDefault("reward-token", "k1")

    clip: float = 0.2
    clip_high: float | None = None
    dual_clip: float | None = None
    value_clip: float = 0.2
    value_coef: float = 0.5
    gamma: float = 1.0
    lam: float = 0.95

    def __post_init__(self) -> None:
        check_clips(self.clip, self.clip_high, self.dual_clip)
        at_least(0, value_clip=self.value_clip, value_coef=self.value_coef)
        within(0, 1, gamma=self.gamma, lam=self.lam)

    def targets(self, td: TensorDict, *, group_size: int, reduce: Reduce | None) -> TensorDict:
        """Whitened GAE advantages [B, T] and `returns` [B, T]."""
        rows = training_rows(td)
        rows[ADVANTAGES], rows["returns"] = losses.ppo_advantages(
            td[batch.REWARD], td.get(batch.TOKEN_REWARD, None), td[batch.VALUES], rows[LEARN_MASK],
            gamma=self.gamma, lam=self.lam, reduce=reduce,
        )  # fmt: skip
        return rows

    def loss(self, out: TensorDictBase, targets: TensorDictBase, *, denominators: Denominators) -> Loss:
        """Clipped surrogate and clipped value loss, both means over tokens."""
        mask, tokens = targets[LEARN_MASK], denominators["tokens"]
        parts = {
            "policy": losses.policy_loss(
                out["log_probs"], targets[batch.LOG_PROBS], targets[ADVANTAGES], mask, clip=self.clip,
                clip_high=self.clip_high, dual_clip=self.dual_clip, denominator=tokens,
            )
        }  # fmt: skip
        if "returns" in targets.keys():
            parts["value"] = losses.value_loss(
                out["values"], targets[batch.VALUES], targets["returns"], mask,
                clip=None if self.value_clip == 0 else self.value_clip, denominator=tokens,
            )  # fmt: skip
        return losses.add_up(parts, {"value": self.value_coef})
