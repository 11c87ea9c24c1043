"""What an algorithm is. (B, T, G: see batch.py.)

An algorithm says which batch it wants, what each token is worth, and what is minimised. It knows no optimizer, no
accelerator and no engine; whoever calls it adds entropy, ptx, the KL in the loss and the weights of another sampler.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol

from torchbandit import batch, losses
from torchbandit.losses.choices import LossKLEstimator, Mean

if TYPE_CHECKING:
    from tensordict import TensorDict, TensorDictBase
    from torch import Tensor

    from torchbandit.batch import Reduce
    from torchbandit.losses import Loss

KLWhere = Literal["reward-token", "reward-response", "loss"]
Denominators = Mapping[str, "Tensor"]

LEARN_MASK = "learn_mask"
ADVANTAGES = "advantages"


class KLDefault(NamedTuple):
    """Where a paper puts its KL to the reference, and which estimate it takes."""

    where: KLWhere
    estimator: LossKLEstimator


class Draw(Protocol):
    """What `collect` asks for batches."""

    def __call__(self) -> TensorDict:
        """The next prompts, answered and scored: [B] rows, siblings contiguous."""

    def greedy_reward(self, td: TensorDictBase) -> Tensor:
        """The reward of the greedy response to the prompt of each row: [B] float32, one response a group.

        It uses no randomness and leaves the statistics of reward terms as they are.
        """


@dataclass(frozen=True)
class Algorithm(ABC):
    """Base of all algorithms. Its fields are its options: on the command line, in YAML and in code.

    A subclass is a frozen dataclass with `targets` and `loss`; `docs/algorithms` shows one in 30 lines.
    """

    needs_critic: ClassVar[bool] = False
    """Whether the policy must write `values`."""
    least_group_size: ClassVar[int] = 1
    """Responses a prompt below which it has nothing to compare."""
    default_group_size: ClassVar[int] = 1
    """Responses a prompt where none are asked for."""
    kl_default: ClassVar[KLDefault] = KLDefault("reward-token", "k1")
    """Where the run's KL goes if the user does not say."""
    mean_of: ClassVar[Mean] = "token"
    """How entropy and KL are averaged beside the loss; a subclass with a field `mean` averages as that says."""

    def collect(self, draw: Draw) -> TensorDict:
        """The batch to learn from; one draw, unless the algorithm wants more."""
        return draw()

    @abstractmethod
    def targets(self, td: TensorDict, *, group_size: int, reduce: Reduce | None) -> TensorDict:
        """What `loss` reads, from a batch after `env.step`.

        Args:
            td: the batch, with `learn_mask` [B, T] bool if the caller leaves tokens out.
            group_size: G, contiguous siblings.
            reduce: sums a tensor over processes; None: one process.
        Returns:
            `training_rows(td)` with `advantages` [B] or [B, T] float32 and what else `loss` reads. No host sync.
        """

    @abstractmethod
    def loss(self, out: TensorDictBase, targets: TensorDictBase, *, denominators: Denominators) -> Loss:
        """The loss of one microbatch.

        Args:
            out: what `policy(td)` returns: log_probs [B, T] with gradient, values [B, T] with a critic, ...
            targets: rows of `targets`.
            denominators: "tokens" and "rows" of the whole minibatch's learn_mask over all ranks (and "ptx"): what sums
                are divided by, so that microbatches and ranks add up.
        Returns:
            (scalar with gradient, metrics): scalars that add up over microbatches; of a name that ends in `_max` the
            greatest is taken.
        """

    def average(self, x: Tensor, mask: Tensor, denominators: Denominators) -> Tensor:
        """[B, T] values, 0 outside the mask, averaged as this algorithm's loss is: a scalar."""
        mean: Mean = getattr(self, "mean", self.mean_of)
        return losses.average(x, mask, mean, denominators["tokens" if mean == "token" else "rows"])


def training_rows(td: TensorDictBase) -> TensorDict:
    """The keys of a stepped batch that an update reads, and `learn_mask` [B, T] bool.

    The mask is True on the real tokens of scorable rows, less what a `learn_mask` of the batch leaves out.
    """
    rows: TensorDict = td.select(
        batch.PROMPT, batch.PROMPT_MASK, batch.RESPONSE, batch.RESPONSE_MASK, batch.LOG_PROBS, batch.TEMPERATURE,
        batch.VALUES, batch.GROUP_ID, strict=False,
    ).copy()  # fmt: skip
    mask = td[batch.RESPONSE_MASK] & scorable(td).unsqueeze(-1)
    given = td.get(LEARN_MASK, None)
    rows[LEARN_MASK] = mask if given is None else mask & given
    return rows


def scorable(td: TensorDictBase) -> Tensor:
    """Rows with a valid score: [B] bool. A reward that is not finite is none, whoever wrote it."""
    unscorable: Tensor = td[batch.UNSCORABLE]
    return ~unscorable & row_reward(td).isfinite()


def row_reward(td: TensorDictBase) -> Tensor:
    """The reward of each row: [B] float32, NaN where there is no valid score."""
    reward: Tensor = td[batch.REWARD]
    return reward.squeeze(-1)
