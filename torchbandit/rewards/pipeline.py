"""From a batch of responses to one reward a row: the sum of the terms. (B, P, T: see batch.py.)

    reward = sum over terms of  weight * clip(normalise(raw - missing_eos_penalty where cut off))

`RewardTerm` says what each step means. If any term is per token, `token_reward` holds the same sum token by token, a
row's value landing on its last response token. Every step is a fixed sequence of device operations; HostReward alone
copies to the host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from torchbandit.batch import (
    FINISHED,
    PROMPT,
    PROMPT_MASK,
    RESPONSE,
    RESPONSE_MASK,
    VALUES,
    Reduce,
    masked_sum,
    masked_whiten,
    require,
)
from torchbandit.models import num_ids
from torchbandit.models.offload import Sleeper
from torchbandit.responses import any_row, has_stopped, last_token, stop_ids_told
from torchbandit.rewards.host import HostReward
from torchbandit.rewards.model_terms import KLPenalty
from torchbandit.rewards.normalize import AdaptiveCoefficient, RunningNormalizer
from torchbandit.rewards.term import RewardTerm, TermFn, as_term

if TYPE_CHECKING:
    from torchbandit.prompts import PromptSet
    from torchbandit.scoring import Plan


class RewardPipeline:
    """The terms of a reward, their shared plan, and the statistics they keep.

    A term may serve in several pipelines (training and evaluation share a reward model); statistics and adaptive
    coefficients belong to the pipeline.

    Args:
        terms: one term or a list; a term is a RewardTerm or a callable td -> Tensor [B] or [B, T].
        device: where the batches live; models named by path load there at their first use.
        tokenizer: of the prompts; models with another one are refused. None (ready-made tokens) skips the check, and
            then the models' embeddings alone tell which ids exist.
        prompts: the PromptSet, for the strings that a HostReward reads.
    Raises:
        ValueError: no term, two of one name, two KL penalties, a model with another tokenizer.
    """

    def __init__(
        self,
        terms: RewardTerm | TermFn | Sequence[RewardTerm | TermFn],
        *,
        device: torch.device | str = "cpu",
        tokenizer: Any = None,
        prompts: PromptSet | None = None,
    ) -> None:
        given: list[Any] = list(terms) if isinstance(terms, (list, tuple)) else [terms]
        self.terms = [as_term(term) for term in given]
        if not self.terms:
            raise ValueError("reward: must be a term or a list of terms, got an empty list")
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(f"reward: every term needs a name of its own, got {names}; pass name=... to RewardTerm")
        if sum(isinstance(term, KLPenalty) for term in self.terms) > 1:
            raise ValueError('reward: at most one KLPenalty fits, since ("next","ref_log_probs") holds one reference')
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as tensors report it
        self.tokenizer, self.prompts = tokenizer, prompts
        self._tokenizer_size = None if tokenizer is None else num_ids(tokenizer)
        self._reduce: Reduce | None = None
        self._is_frozen = False
        self._sleeper = Sleeper()
        for term in self.terms:
            term.bind(self.device, tokenizer)
        self._normalizers = {t.name: RunningNormalizer(self.device) for t in self.terms if t.normalize == "running"}
        self._coefficients = {
            t.name: AdaptiveCoefficient(t.coef, t.target, t.horizon, self.device)
            for t in self.terms
            if isinstance(t, KLPenalty) and t.target is not None
        }

    @torch.no_grad()
    def __call__(
        self, td: TensorDictBase, plan_fn: Callable[[], Plan] | None = None, *, prompts_are_own: bool = False
    ) -> TensorDict:
        """The reward of a batch.

        Args:
            td: the root keys of a step, with the response; it stays as it was.
            plan_fn: makes the packing plan of this batch; called at most once, and only if a term runs a model.
            prompts_are_own: the prompts are as the PromptSet gave them, which has looked at its ids and padding; so
                they are not looked at again.
        Returns:
            The keys of `next` but the done flags: `reward` [B, 1] float32 (NaN where unscorable), `token_reward`
            [B, T] float32 if a term is per token (NaN on the real tokens of an unscorable row, 0 outside the mask),
            `reward_terms` (name: [B] float32), `unscorable` [B] bool, and what terms add.
        Raises:
            ValueError: a key or a term's result is missing or of the wrong shape, dtype or device.
        """
        for term in self.terms:
            term.load(self.device)
        td, broken = self._checked(td, prompts_are_own)
        out = TensorDict({}, batch_size=td.batch_size, device=self.device)
        raw: dict[str, Tensor] = {}
        try:
            for term in self.terms:
                term.start(td, self.prompts)
            plan = plan_fn() if plan_fn is not None and any(term.uses_models for term in self.terms) else None
            for term in sorted(self.terms, key=lambda term: term.on_host):  # a stable sort: host terms come last
                raw[term.name] = self._validated(term, term.evaluate(td, plan, out), td)
        except BaseException:
            for term in self.terms:
                term.cancel()
            raise
        return self._sum(td, raw, broken, out)

    def _checked(self, td: TensorDictBase, prompts_are_own: bool) -> tuple[TensorDictBase, Tensor]:
        """A shallow copy that every term can read safely, and the rows [B] that have no honest score.

        Ids outside the vocabulary become its nearest there: a model would index past its embeddings, which on a GPU
        ends the process.
        """
        prompt = require(td, PROMPT, shape=(-1, -1), dtype=torch.int64, device=self.device)
        rows = prompt.shape[0]
        prompt_mask = require(td, PROMPT_MASK, shape=tuple(prompt.shape), dtype=torch.bool, device=self.device)
        hint = "policy.generate writes it"
        response = require(td, RESPONSE, shape=(rows, -1), dtype=torch.int64, device=self.device, hint=hint)
        mask = require(
            td, RESPONSE_MASK, shape=tuple(response.shape), dtype=torch.bool, device=self.device,
            hint="build it with responses.stop_mask",
        )  # fmt: skip
        td = td.clone(recurse=False)
        size = self._vocabulary()
        known, odd = _known(response, mask, size)
        td.set(RESPONSE, known)
        odd[:, 1:] |= mask[:, 1:] > mask[:, :-1]  # a hole
        broken = any_row(odd) | ~mask[:, 0] if mask.shape[1] else ~mask.any(-1)
        # The PromptSet vouches for its tokenizer's vocabulary; a model may have fewer embeddings.
        if not prompts_are_own or size is None or self._tokenizer_size is None or size < self._tokenizer_size:
            known, odd = _known(prompt, prompt_mask, size)
            td.set(PROMPT, known)
            odd[:, 1:] |= prompt_mask[:, 1:] < prompt_mask[:, :-1]  # not padded on the left
            broken |= any_row(odd)
        if td.get(VALUES, None) is not None:  # a critic has none for a row beyond its context
            broken = broken | any_row(~td[VALUES].isfinite() & mask)
        if td.get(FINISHED, None) is not None:
            require(td, FINISHED, shape=(rows,), dtype=torch.bool, device=self.device)
        elif self.tokenizer is not None and (stops := stop_ids_told(self.tokenizer)):
            td.set(FINISHED, has_stopped(response, mask, stops))
        elif any(term.missing_eos_penalty is not None for term in self.terms):
            raise ValueError(
                '"finished": a term has a missing_eos_penalty, but td has no such key and the prompts no tokenizer '
                "with an eos token; write it with responses.has_stopped"
            )
        return td, broken

    def _vocabulary(self) -> int | None:
        """The first id that the tokenizer or some loaded model does not know; None if nobody says."""
        sizes = [] if self._tokenizer_size is None else [self._tokenizer_size]
        for module in self.models():
            table = module.get_input_embeddings()  # type: ignore[operator]
            sizes.append(int(table.num_embeddings))
        return min(sizes, default=None)

    def _validated(self, term: RewardTerm, value: object, td: TensorDictBase) -> Tensor:
        """A term's result as float32 [B] or [B, T], checked by its metadata alone."""
        B, T = td[RESPONSE_MASK].shape
        fits = isinstance(value, Tensor) and tuple(value.shape) in ((B,), (B, T))
        if isinstance(value, Tensor) and fits and value.is_floating_point() and value.device == self.device:
            return value.detach().float()
        want = f'reward term "{term.name}": must return a float tensor [{B}] or [{B}, {T}] on {self.device}'
        if not isinstance(value, Tensor):
            raise ValueError(f"{want}, got {type(value).__name__}; for a function of strings use HostReward")
        got = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
        if not fits:
            raise ValueError(f"{want}, got {got}" + ("; squeeze(-1) it" if tuple(value.shape) == (B, 1) else ""))
        if not value.is_floating_point():
            raise ValueError(f"{want}, got {got}; call .float() on it")
        raise ValueError(f"{want}, got {got}; move it with .to(td.device)")

    def _sum(self, td: TensorDictBase, raw: dict[str, Tensor], broken: Tensor, out: TensorDict) -> TensorDict:
        mask = td[RESPONSE_MASK]
        last = last_token(mask) if any(x.dim() == 2 for x in raw.values()) else None
        rows = {name: x if x.dim() == 1 else masked_sum(x, mask, -1) for name, x in raw.items()}
        away = {term.name: term.abstained for term in self.terms if term.abstained is not None}
        unscorable = broken
        for name, x in rows.items():
            unscorable = unscorable | (~x.isfinite() & ~away[name] if name in away else ~x.isfinite())
        if len(away) == len(rows):  # nobody's task
            unscorable = unscorable | torch.stack(list(away.values())).all(0)
        scorable = ~unscorable
        per_row = torch.zeros(mask.shape[0], device=self.device)
        per_token: Tensor | None = None
        for term in self.terms:
            counted = scorable & ~away[term.name] if term.name in away else scorable
            part = self._weighted(term, raw[term.name], td, counted, last)
            if part.dim() == 1:
                per_row = per_row + part
            else:
                per_token = part if per_token is None else per_token + part
        if per_token is not None:
            assert last is not None
            token_reward = (per_token + per_row.unsqueeze(-1) * last).masked_fill(unscorable.unsqueeze(-1), torch.nan)
            out.set("token_reward", token_reward.masked_fill(~mask, 0.0))
            per_row = masked_sum(token_reward, mask, -1)
        out.set("reward", per_row.masked_fill(unscorable, torch.nan).unsqueeze(-1))
        out.set("reward_terms", TensorDict(rows, batch_size=td.batch_size, device=self.device))
        out.set("unscorable", unscorable)
        if not self._is_frozen:
            for name, coefficient in self._coefficients.items():  # after its use: this step is paid at the old price
                coefficient.update(rows[name], scorable, self._reduce)
        return out

    def _weighted(
        self, term: RewardTerm, x: Tensor, td: TensorDictBase, scorable: Tensor, last: Tensor | None
    ) -> Tensor:
        """penalty, normalise, clip, weight: [B] or [B, T]; 0 on unscorable rows and outside the response mask."""
        counted = scorable if x.dim() == 1 else scorable.unsqueeze(-1) & td[RESPONSE_MASK]
        if term.missing_eos_penalty is not None:
            cut = ~td[FINISHED] if last is None or x.dim() == 1 else ~td[FINISHED].unsqueeze(-1) & last
            x = x - term.missing_eos_penalty * cut
        x = x.masked_fill(~counted, 0.0)
        if term.normalize == "batch":
            if self._is_frozen:
                raise ValueError(
                    f'reward term "{term.name}": is normalised over a batch, so its values of two batches (a baseline '
                    'beside the responses) cannot be compared; use normalize="running", or none'
                )
            x = masked_whiten(x, counted, reduce=self._reduce)
        elif term.normalize == "running":
            normalizer = self._normalizers[term.name]
            if not self._is_frozen:
                normalizer.update(x, counted, self._reduce)
            x = normalizer.normalized(x, counted)
        if term.clip is not None:
            x = x.clamp(*term.clip).masked_fill(~counted, 0.0)
        adaptive = self._coefficients.get(term.name)
        return x * (term.weight if adaptive is None else -adaptive.value)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Score rows without counting them: statistics and adaptive coefficients stay as they are inside.

        A term that is normalised over the batch raises ValueError there: its values would be of another scale.
        """
        self._is_frozen = True
        try:
            yield
        finally:
            self._is_frozen = False

    def shard(self, reduce: Reduce | None) -> None:
        """Merge statistics over processes by `reduce`, which sums a tensor over them; None: one process."""
        self._reduce = reduce

    @property
    def kl_coef(self) -> Tensor | float | None:
        """The present KL coefficient: a device scalar if it adapts; None without a KL penalty."""
        for term in self.terms:
            if isinstance(term, KLPenalty):
                adaptive = self._coefficients.get(term.name)
                return term.coef if adaptive is None else adaptive.value
        return None

    def host_failures(self) -> dict[str, dict[str, int]]:
        """Rows without a value so far, by host term and reason: "timeout", an exception's name, "none", ..."""
        return {term.name: dict(term.failures) for term in self.terms if isinstance(term, HostReward)}

    def why_unscorable(self, td: TensorDictBase) -> str:
        """What kept a stepped batch's rows from an honest score, with counts; copies to the host."""
        told = {"empty response(s)": ~td[RESPONSE_MASK].any(-1)}
        told |= {f"not finite from {name}": ~x.isfinite() for name, x in td["next", "reward_terms"].items()}
        why = [f"{int(rows.sum())} {what}" for what, rows in told.items() if rows.any()]
        why += [f"{name}: {n} x {what}" for name, found in self.host_failures().items() for what, n in found.items()]
        return ", ".join(why)

    def models(self) -> list[nn.Module]:
        """The modules that the terms were given, or have loaded so far."""
        return [module for term in self.terms for module in term.models()]

    def offload(self) -> int:
        """Put the terms' models to sleep in pinned host memory; what was not loaded yet stays so.

        Returns:
            bytes freed on the device; 0 where the models are on the CPU, or asleep already.
        """
        return self._sleeper.offload(self.models())

    def onload(self) -> int:
        """Wake what `offload` put to sleep, in place.

        Returns:
            bytes taken on the device.
        """
        return self._sleeper.onload()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Statistics and coefficients by the terms' names, copies of the device tensors; empty for most terms."""
        kept: dict[str, RunningNormalizer | AdaptiveCoefficient] = {**self._normalizers, **self._coefficients}
        return {term.name: kept[term.name].state_dict() if term.name in kept else {} for term in self.terms}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take up the statistics of `state_dict`.

        Raises:
            ValueError: the state is of other terms, or a term kept other statistics then.
        """
        own = self.state_dict()
        unknown, missing = sorted(set(state) - set(own)), sorted(set(own) - set(state))
        if unknown or missing:
            raise ValueError(
                f"reward state: must hold the terms {sorted(own)}, got {sorted(state)} (unknown: {unknown}, missing: "
                f"{missing}); resume with the terms, and the names, that the state was saved with"
            )
        for name, part in state.items():
            if set(part) != set(own[name]):
                raise ValueError(
                    f'reward state of term "{name}": must hold {sorted(own[name])}, got {sorted(part)}; resume with '
                    "the normalize and target options that the state was saved with"
                )
        for name, part in state.items():
            if name in self._normalizers:
                self._normalizers[name].load_state_dict(part)
            if name in self._coefficients:
                self._coefficients[name].load_state_dict(part)

    def close(self) -> None:
        """End the worker processes of host terms."""
        for term in self.terms:
            term.close()


def _known(tokens: Tensor, mask: Tensor, size: int | None) -> tuple[Tensor, Tensor]:
    """Ids that an embedding of `size` rows can look up, and where a real token is not one of them."""
    known = tokens.clamp(0, None if size is None else size - 1)
    return known, (tokens != known) & mask
