"""Terms that run a language model over the batch: reward models, and the KL to a reference. (B, P, T: see batch.py.)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from torchbandit import scoring
from torchbandit.batch import (
    LOG_PROBS,
    PROMPT,
    PROMPT_MASK,
    RESPONSE,
    RESPONSE_MASK,
    TEMPERATURE,
    longer_than,
    masked_sum,
    require,
)
from torchbandit.losses import KLEstimator, kl_estimate
from torchbandit.models import ModelLike, check_same_tokenizer, context_length, load_causal_lm, load_reward_model
from torchbandit.rewards.term import Clip, Normalize, RewardTerm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from torchbandit.scoring import Plan


class RewardModel(RewardTerm):
    """The score of a sequence classifier with one label, or of an ensemble of them.

    A model named by path is loaded at its first use, on the pipeline's device, in evaluation mode. A live module is
    used where it is. The score is read on the last response token. A row of more tokens than the model's context is
    unscorable.

    Args:
        model: hub id, folder, ModelSpec or live module; several make an ensemble.
        ensemble: "mean" of the members' scores, or their "min" (the cautious choice).
        name, weight, clip, normalize, missing_eos_penalty: as in RewardTerm.
    Raises:
        ValueError: no model, or an unknown ensemble.
    Source: Ouyang et al. 2022 (InstructGPT), section 3.5; ensembles: Coste et al. 2023, section 3 (mean, worst case).
    """

    uses_models: ClassVar[bool] = True

    def __init__(
        self,
        model: ModelLike | Sequence[ModelLike],
        *,
        ensemble: Literal["mean", "min"] = "mean",
        name: str = "reward_model",
        weight: float = 1.0,
        clip: Clip = None,
        normalize: Normalize = None,
        missing_eos_penalty: float | None = None,
    ) -> None:
        super().__init__(RewardModel.score, name, weight, clip, normalize, missing_eos_penalty)
        self.sources: list[ModelLike] = list(model) if isinstance(model, (list, tuple)) else [model]  # type: ignore[list-item]
        if not self.sources:
            raise ValueError(f'reward term "{name}": model must name at least one model, got an empty list')
        if ensemble not in ("mean", "min"):
            raise ValueError(f'reward term "{name}": ensemble must be "mean" or "min", got {ensemble!r}')
        self.ensemble = ensemble
        self._device: torch.device | None = None
        self._models: list[PreTrainedModel] = []

    def bind(self, device: torch.device, tokenizer: Any) -> None:
        for source in self.sources:
            _check_tokenizer(tokenizer, source, f'reward term "{self.name}"')
        self._device = self._device or device

    def load(self, device: torch.device | str, tokenizer: Any = None) -> None:
        """Load what is named by path, now, on `device`; `tokenizer`, if given, must be the models' own.

        Raises:
            ValueError: a tokenizer differs, or a model is no classifier with exactly one label.
        """
        self.bind(torch.device(device), tokenizer)
        if not self._models:
            self._models = [load_reward_model(source, torch.device(device)) for source in self.sources]

    def score(self, td: TensorDictBase, plan: Plan | None = None) -> Tensor:
        """Score each response with the reward model.

        Args:
            td: reads ("tokens","prompt") [B, P] int64, ("tokens","response") [B, T] int64 and their masks, bool.
            plan: how scoring packs the rows; None makes one.
        Returns:
            [B] float32 on td's device, no gradient; NaN where the response is empty or the row exceeds the context.
        Raises:
            ValueError: a key is missing, or shape, dtype or device differ.
        Source: Ouyang et al. 2022 (InstructGPT), section 3.5.
        """
        batch = _inputs(td)
        self.load(self._device or batch[0].device)
        with torch.no_grad():
            scores = [_where_it_is(scoring.sequence_scores, m, batch, plan) for m in self._models]
            if len(scores) == 1:
                return scores[0]
            stacked = torch.stack(scores)  # both reductions keep a member's NaN
            return stacked.mean(0) if self.ensemble == "mean" else stacked.amin(0)

    def evaluate(self, td: TensorDictBase, plan: Plan | None, out: TensorDict) -> Tensor:
        return self.score(td, plan)

    def models(self) -> list[nn.Module]:
        return list(self._models) or [source for source in self.sources if isinstance(source, nn.Module)]


class KLPenalty(RewardTerm):
    """Minus `coef` times the KL of the policy from a frozen reference, estimated on the sampled tokens.

    Needs ("log_probs","response") in td. The reference scores the very token ids that were sampled, at the same
    temperature; its log-probs go to ("next","ref_log_probs","response"), and the KL of each row, in nats, to
    ("next","reward_terms",name). Nothing is clamped.

    Args:
        reference: hub id, folder, ModelSpec or live module: usually the policy's starting weights.
        coef: factor of the KL in the reward; 0 only records.
        estimator: "k1" (log-ratio), "k2" (half its square) or "k3" (exp(-ratio) - 1 + ratio), token by token.
        per_token: each token bears its own penalty; otherwise the row's sum lands on the last token.
        target: if given, the coefficient adapts so that the mean KL of a row seeks this many nats.
        horizon: rows in which an error of 100% would change the coefficient e-fold; larger is slower.
        name: under which the KL is kept.
    Raises:
        ValueError: an option that has no meaning.
    Source: Ziegler et al. 2019, sections 2.1 and 2.2; Schulman 2020, "Approximating KL Divergence".
    """

    uses_models: ClassVar[bool] = True

    def __init__(
        self,
        reference: ModelLike,
        coef: float = 0.05,
        estimator: KLEstimator = "k1",
        per_token: bool = True,
        target: float | None = None,
        horizon: float = 10_000,
        name: str = "kl",
    ) -> None:
        super().__init__(KLPenalty.log_probs, name, weight=-coef)
        if not coef >= 0:
            raise ValueError(f'reward term "{name}": coef must be >= 0, got {coef!r}')
        if estimator not in ("k1", "k2", "k3"):
            raise ValueError(f'reward term "{name}": estimator must be "k1", "k2" or "k3", got {estimator!r}')
        if target is not None and not (target > 0 and coef > 0 and horizon > 0):
            raise ValueError(
                f'reward term "{name}": with a target KL, target, coef and horizon must be > 0, '
                f"got {target!r}, {coef!r} and {horizon!r}"
            )
        self.source, self.coef, self.estimator, self.per_token = reference, float(coef), estimator, per_token
        self.target, self.horizon = target, horizon
        self._device: torch.device | None = None
        self._model: PreTrainedModel | None = None

    def bind(self, device: torch.device, tokenizer: Any) -> None:
        _check_tokenizer(tokenizer, self.source, f'reward term "{self.name}" (the reference)')
        self._device = self._device or device

    def load(self, device: torch.device | str, tokenizer: Any = None) -> None:
        """Load the reference now, on `device`; `tokenizer`, if given, must be the model's own.

        Raises:
            ValueError: the tokenizer differs.
        """
        self.bind(torch.device(device), tokenizer)
        if self._model is None:
            self._model = load_causal_lm(self.source, torch.device(device))

    def log_probs(self, td: TensorDictBase, plan: Plan | None = None) -> Tensor:
        """The reference's log-probs of the sampled response ids, at the sampling temperature.

        Args:
            td: reads ("tokens","prompt") [B, P] int64, ("tokens","response") [B, T] int64, their masks, bool, and
                `temperature` [B] float32 (absent: 1; 0, greedy, counts as 1).
            plan: how scoring packs the rows; None makes one.
        Returns:
            [B, T] float32 on td's device, no gradient; 0 outside the response mask, NaN where a row exceeds the
            reference's context.
        Raises:
            ValueError: a key is missing, or shape, dtype or device differ.
        """
        batch = _inputs(td)
        self.load(self._device or batch[0].device)
        assert self._model is not None
        temperature: float | Tensor = 1.0
        if td.get(TEMPERATURE, None) is not None:
            shape = (batch[0].shape[0],)
            temperature = require(td, TEMPERATURE, shape=shape, dtype=torch.float32, device=batch[0].device)
        with torch.no_grad():
            return _where_it_is(scoring.log_probs, self._model, batch, plan, temperature=temperature)

    def evaluate(self, td: TensorDictBase, plan: Plan | None, out: TensorDict) -> Tensor:
        mask = td[RESPONSE_MASK]
        hint = "a KL term compares the policy's log-probs with the reference's; policy.generate writes them"
        own = require(td, LOG_PROBS, shape=tuple(mask.shape), dtype=torch.float32, device=mask.device, hint=hint)
        reference = self.log_probs(td, plan)
        out.set(("ref_log_probs", "response"), reference)
        kl = kl_estimate(own, reference, self.estimator, mask)
        return kl if self.per_token else masked_sum(kl, mask, -1)

    def models(self) -> list[nn.Module]:
        if self._model is not None:
            return [self._model]
        return [self.source] if isinstance(self.source, nn.Module) else []


def _inputs(td: TensorDictBase) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompt ids, prompt mask, response ids, response mask, with their metadata checked."""
    prompt = require(td, PROMPT, shape=(-1, -1), dtype=torch.int64)
    response = require(td, RESPONSE, shape=(prompt.shape[0], -1), dtype=torch.int64, device=prompt.device)
    prompt_mask = require(td, PROMPT_MASK, shape=tuple(prompt.shape), dtype=torch.bool, device=prompt.device)
    hint = "build it with responses.stop_mask"
    response_mask = require(
        td, RESPONSE_MASK, shape=tuple(response.shape), dtype=torch.bool, device=prompt.device, hint=hint
    )
    return prompt, prompt_mask, response, response_mask


def _where_it_is(score: Any, model: nn.Module, batch: tuple[Tensor, ...], plan: Plan | None, **options: Any) -> Tensor:
    """Run a scoring function on the model's device. A live model may sit elsewhere than the batch: its rows are
    copied over, device to device, and packed there, since the step's plan belongs to the batch's device."""
    weight = next(model.parameters())
    here, there = batch[0].device, weight.device
    if not weight.untyped_storage().nbytes():
        raise ValueError(f"{type(model).__name__}: sleeps in host memory since offload(); call onload() first")
    if there == here:
        return _within_context(score, model, batch, plan, options)
    moved = {k: v.to(there) if isinstance(v, Tensor) else v for k, v in options.items()}
    return _within_context(score, model, tuple(x.to(there) for x in batch), None, moved).to(here)


def _within_context(
    score: Any, model: nn.Module, batch: tuple[Tensor, ...], plan: Plan | None, options: dict[str, Any]
) -> Tensor:
    """Scores of the rows that the model's context can hold; NaN for those beyond it, which it never learned to read.

    Where the widths alone show that all rows fit, as they mostly do, nothing is looked at.
    """
    prompt, prompt_mask, response, mask = batch
    limit = context_length(model)  # type: ignore[arg-type]
    if limit is None or prompt.shape[1] + response.shape[1] <= limit:
        result: Tensor = score(model, *batch, plan=plan, **options)
        return result
    plan = scoring.make_plan(prompt_mask, mask) if plan is None else plan
    long = longer_than(limit, prompt_mask, mask)
    if not plan.packing or plan.longest > limit:
        # One token stands for such a row: a table of positions ends before the whole.
        first = prompt_mask & (prompt_mask.cumsum(1) == 1)
        prompt_mask, mask = torch.where(long[:, None], first, prompt_mask), mask & ~long[:, None]
        plan = scoring.make_plan(prompt_mask, mask, packing=plan.packing)
    result = score(model, prompt, prompt_mask, response, mask, plan=plan, **options)
    beyond = long if result.dim() == 1 else long[:, None] & batch[3]
    return result.masked_fill(beyond, torch.nan)


def _check_tokenizer(tokenizer: Any, source: ModelLike, what: str) -> None:
    if tokenizer is not None:
        check_same_tokenizer(tokenizer, source, what)
