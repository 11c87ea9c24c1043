"""RAFT: fine-tune on the best responses of each group. (B, T, G: see batch.py.)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from tensordict import TensorDict, TensorDictBase

    from torchbandit.batch import Reduce
    from torchbandit.losses import Loss


from torchbandit import losses
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
from torchbandit.learn.checks import at_least


@dataclass(frozen=True)
class RAFT(Algorithm):
    """RAFT: best-of-n and expert iteration. Cross-entropy on the chosen responses; the others are not learnt from.

    loss = -mean over the chosen responses' tokens of log pi.

    Args:
        best: Responses of each group to learn from, the best first.
        threshold: Learn from every response with at least this reward, in place of the best. Default: the best.
        mean: Over all tokens, or over a response's tokens and then over responses.
    Source: Dong et al. 2023 (RAFT), section 3; Anthony et al. 2017 (expert iteration).
    """

    default_group_size: ClassVar[int] = 4
    kl_default: ClassVar[KLDefault] = KLDefault("reward-response", "k1")

    best: int = 1
    threshold: float | None = None
    mean: Literal["token", "response"] = "token"

    def __post_init__(self) -> None:
        at_least(1, best=self.best)
        if self.threshold is not None and self.threshold != self.threshold:
            raise ValueError("threshold: must be a number, got nan")
        if self.mean not in ("token", "response"):
            raise ValueError(f"mean: must be 'token' or 'response', got {self.mean!r}")

    def targets(self, td: TensorDict, *, group_size: int, reduce: Reduce | None) -> TensorDict:
        """Advantages [B]: 1 for a chosen response; the others leave the learn_mask."""
        rows = training_rows(td)
        chosen = losses.best_of_group(
            row_reward(td), group_size, best=self.best, threshold=self.threshold, scorable=scorable(td)
        )
        rows[LEARN_MASK] = rows[LEARN_MASK] & chosen.unsqueeze(-1)
        rows[ADVANTAGES] = chosen.float()
        return rows

    def loss(self, out: TensorDictBase, targets: TensorDictBase, *, denominators: Denominators) -> Loss:
        """Cross-entropy of the chosen responses."""
        part = losses.likelihood_loss(
            out["log_probs"], targets[ADVANTAGES], targets[LEARN_MASK], mean=self.mean,
            denominator=denominators["tokens" if self.mean == "token" else "rows"],
        )  # fmt: skip
        return losses.add_up({"policy": part})
