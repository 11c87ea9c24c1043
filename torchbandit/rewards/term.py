"""One summand of the reward: a function of the batch, with its weight, clip and normalisation. (B, T: see batch.py.)"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from torchbandit.batch import RESPONSE_MASK
from torchbandit.responses import lengths

if TYPE_CHECKING:
    from torchbandit.prompts import PromptSet
    from torchbandit.scoring import Plan

TermFn = Callable[[TensorDictBase], Tensor]
Normalize = Literal["batch", "running"] | None
Clip = float | tuple[float, float] | None


class RewardTerm:
    """A term made of a torch function of the batch.

    What a term adds to the reward, in this order:
        1. `raw = fn(td)`; its sum over the row is recorded under ("next","reward_terms",name);
        2. `missing_eos_penalty` is subtracted where the response was cut off (not `finished`);
        3. `normalize`: shift and scale to mean 0 and variance 1, over this batch ("batch") or over all rows seen so
           far, this batch included ("running"). Unscorable rows do not count. A per-token term is normalised over
           its real tokens;
        4. `clip`: to [-c, c] or to (low, high); a per-token term token by token;
        5. times `weight`.

    Args:
        fn: td -> float [B], or [B, T] for one value a token, on td's device. It sees the root keys of a step, with
            the response and `finished`; it must not change them.
        name: under which raw values and state are kept; default the function's name, `reward` for a lambda.
        weight: factor of the term in the reward.
        clip: None, c > 0, or (low, high).
        normalize: None, "batch" or "running".
        missing_eos_penalty: what a response without a stop token loses; None or a number >= 0.
    Raises:
        ValueError: an option that has no meaning.
    Source: missing_eos_penalty and reward normalisation: Huang et al. 2024, "The N+ Implementation Details of RLHF
        with PPO", details 4 and 13.
    """

    uses_models: ClassVar[bool] = False
    """Whether `evaluate` wants the step's packing plan."""
    on_host: ClassVar[bool] = False
    """Whether `start` sets off work beside the device; such terms are collected last."""

    def __init__(
        self,
        fn: Callable[..., Any],
        name: str | None = None,
        weight: float = 1.0,
        clip: Clip = None,
        normalize: Normalize = None,
        missing_eos_penalty: float | None = None,
    ) -> None:
        self.abstained: Tensor | None = None
        """[B] bool, of the last batch: rows that were not this term's task. They live on their other terms."""
        if not callable(fn):
            raise ValueError(f"reward: a term must be a callable td -> Tensor [B] or a RewardTerm, got {fn!r}")
        self.fn = fn
        self.name = name_of(fn) if name is None else name
        if not self.name or not isinstance(self.name, str):
            raise ValueError(f"name: must be a non-empty string, got {self.name!r}")
        self.weight = float(weight)
        self.clip = _bounds(self.name, clip)
        if normalize not in (None, "batch", "running"):
            raise ValueError(
                f'reward term "{self.name}": normalize must be None, "batch" or "running", got {normalize!r}'
            )
        self.normalize = normalize
        if missing_eos_penalty is not None and not missing_eos_penalty >= 0:
            raise ValueError(
                f'reward term "{self.name}": missing_eos_penalty must be None or >= 0 (it is subtracted), '
                f"got {missing_eos_penalty!r}"
            )
        self.missing_eos_penalty = missing_eos_penalty

    def bind(self, device: torch.device, tokenizer: Any) -> None:
        """Told by a pipeline where it runs; checks what can be checked before the first step."""

    def load(self, device: torch.device | str, tokenizer: Any = None) -> None:
        """Load what is named by path, if that was not done yet."""

    def start(self, td: TensorDictBase, prompts: PromptSet | None) -> None:
        """Called before any term is evaluated: work beside the device begins here."""

    def evaluate(self, td: TensorDictBase, plan: Plan | None, out: TensorDict) -> Tensor:
        """The raw values, [B] or [B, T]; a term may write further keys of `next` into `out`."""
        value: Tensor = self.fn(td)
        return value

    def cancel(self) -> None:
        """Another term failed: what `start` set off is not wanted any more."""

    def models(self) -> list[nn.Module]:
        """The modules loaded so far."""
        return []

    def close(self) -> None:
        """End what runs beside the device. The term may be used again afterwards."""


class LengthPenalty(RewardTerm):
    """Minus `coef` for every response token beyond `start`; reward_terms holds the number of those tokens.

    Args:
        coef: reward lost per token.
        start: tokens that cost nothing.
        name: under which the count of tokens is kept.
    Raises:
        ValueError: `start` is negative.
    Source: Yu et al. 2025 (DAPO), equation 13: the soft overlong punishment is coef=1/L_cache, start=L_max - L_cache.
    """

    def __init__(self, coef: float, start: int = 0, name: str = "length") -> None:
        if start < 0:
            raise ValueError(f'reward term "{name}": start must be >= 0, got {start}')
        super().__init__(lambda td: (lengths(td[RESPONSE_MASK]) - start).clamp(min=0).float(), name, weight=-coef)


class OverlongPenalty(RewardTerm):
    """DAPO's soft overlong punishment: 0 up to `soft` tokens, then falling to -1 at `hard`, and -1 beyond.

    Args:
        soft: response tokens that cost nothing (L_max - L_cache in the paper).
        hard: tokens from which a response loses all of `weight`.
        weight: what it loses there.
        name: under which the punishment, 0 to -1, is kept.
    Raises:
        ValueError: not 0 <= soft < hard.
    Source: Yu et al. 2025 (DAPO), equation 13.
    """

    def __init__(self, soft: int, hard: int, weight: float = 1.0, name: str = "overlong") -> None:
        if not 0 <= soft < hard:
            raise ValueError(f'reward term "{name}": must have 0 <= soft < hard, got soft={soft} and hard={hard}')

        def punishment(td: TensorDictBase) -> Tensor:
            return -((lengths(td[RESPONSE_MASK]) - soft) / (hard - soft)).clamp(0.0, 1.0)

        super().__init__(punishment, name, weight=weight)


def as_term(term: RewardTerm | TermFn) -> RewardTerm:
    """A RewardTerm as it is; a bare callable as a RewardTerm with its defaults."""
    return term if isinstance(term, RewardTerm) else RewardTerm(term)


def name_of(fn: Any) -> str:
    inner = getattr(fn, "func", fn)  # functools.partial
    name = getattr(inner, "__name__", None) or type(inner).__name__
    return "reward" if name == "<lambda>" else str(name)


def _bounds(name: str, clip: Clip) -> tuple[float, float] | None:
    if clip is None:
        return None
    low, high = (-clip, clip) if isinstance(clip, (int, float)) else clip
    if not low < high:
        raise ValueError(f'reward term "{name}": clip must be None, c > 0 or (low, high) with low < high, got {clip!r}')
    return float(low), float(high)
