"""Log-probs, entropy and KL from hidden states, without the logits of more than one chunk in memory.

The LM head runs on the tokens that predict, `CHUNK_BYTES` of float32 logits at a time; backward recomputes a chunk's
logits. Log-sum-exp is in float32 whatever the weights are (trap 12).

Axis letters beside batch.py's: M predictions, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from torchbandit.scoring import compiled

CHUNK_BYTES = 1 << 30

Reduction = Callable[..., tuple[Tensor, Tensor]]


class Head:
    """The LM head of a model, chunk by chunk.

    Args:
        model: a causal LM; its config names the scaling and soft cap of its logits.
        whole: what comes in are logits already: for a model whose head does more than its config names.
    """

    def __init__(self, model: PreTrainedModel, whole: bool = False) -> None:
        config = model.config.get_text_config()
        self.vocab_size = int(config.vocab_size)
        self.whole = whole
        self._model = model
        self._head = model.get_output_embeddings()
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._multiply = getattr(config, "logit_scale", None)
        self._divide = getattr(config, "logits_scaling", None)

    def logits(self, hidden: Tensor) -> Tensor:
        """[M, D] -> [M, V], in the head's dtype."""
        if self.whole:
            return hidden
        if self._head is None:
            raise ValueError(
                "model: must be a causal LM with an LM head to give log-probs, got "
                f"{type(self._model).__name__}; load it with AutoModelForCausalLM"
            )
        out: Tensor = self._head(hidden)
        if self._multiply is not None:
            out = out * self._multiply
        if self._divide is not None:
            out = out / self._divide
        if self._softcap is not None:
            out = torch.tanh(out / self._softcap) * self._softcap
        return out

    def of_targets(
        self, hidden: Tensor, targets: Tensor, temperature: Tensor | None = None, *, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs of `targets`, and the entropy of the distribution that they come from.

        Args:
            hidden: [M, D]; targets: [M] int64; temperature: [M] float32, or None for 1.
        Returns:
            [M] float32 each, with gradient where `hidden` or the head has it.
        """
        reduce = compiled.reduction(self._model, _target_and_entropy if entropy else _target)
        parts = [
            _recomputed(self._targets_chunk, reduce, hidden[s], targets[s], _at(temperature, s))
            for s in self._spans(hidden.shape[0])
        ]
        log_probs, entropies = zip(*parts, strict=True)
        return torch.cat(log_probs), torch.cat(entropies) if entropy else None

    def kl_to(self, hidden: Tensor, other: Head, other_hidden: Tensor, temperature: Tensor | None = None) -> Tensor:
        """KL(this || other) over the whole vocabulary, in nats.

        Args:
            hidden: [M, D]; other_hidden: [M, D'] of another model over the same vocabulary; temperature as above.
        Returns:
            [M] float32, with gradient.
        """
        reduce = compiled.reduction(self._model, _full_kl)
        parts = [
            _recomputed(self._kl_chunk, reduce, hidden[s], other, other_hidden[s], _at(temperature, s))
            for s in self._spans(hidden.shape[0])
        ]
        return torch.cat([part for part, _ in parts])

    def _targets_chunk(
        self, reduce: Reduction, hidden: Tensor, targets: Tensor, temperature: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return reduce(self.logits(hidden), targets, temperature)

    def _kl_chunk(
        self, reduce: Reduction, hidden: Tensor, other: Head, other_hidden: Tensor, temperature: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return reduce(self.logits(hidden), other.logits(other_hidden), temperature)

    def _spans(self, M: int) -> Iterator[slice]:
        """Even chunks of at most `CHUNK_BYTES`; at least one, be it empty."""
        size = max(CHUNK_BYTES // (4 * self.vocab_size), 16)
        even = max(-(-M // max(-(-M // size), 1)), 1)
        for begin in range(0, max(M, 1), even):
            yield slice(begin, begin + even)


def _at(temperature: Tensor | None, span: slice) -> Tensor | None:
    return None if temperature is None else temperature[span]


def _recomputed(function: Callable[..., tuple[Tensor, Tensor]], *args: Any) -> tuple[Tensor, Tensor]:
    if not torch.is_grad_enabled():
        return function(*args)
    out: tuple[Tensor, Tensor] = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return out


def _scaled(logits: Tensor, temperature: Tensor | None) -> Tensor:
    logits = logits.float()
    return logits if temperature is None else logits / temperature[:, None]


def _target(logits: Tensor, targets: Tensor, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
    logits = _scaled(logits, temperature)
    log_probs = logits.gather(-1, targets[:, None]).squeeze(-1) - torch.logsumexp(logits, -1)
    return log_probs, log_probs


def _target_and_entropy(logits: Tensor, targets: Tensor, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
    logits = _scaled(logits, temperature)
    lse = torch.logsumexp(logits, -1)
    log_probs = logits.gather(-1, targets[:, None]).squeeze(-1) - lse
    return log_probs, lse - ((logits - lse[:, None]).exp() * logits).sum(-1)


def _full_kl(logits: Tensor, other: Tensor, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
    ours, theirs = _scaled(logits, temperature).log_softmax(-1), _scaled(other, temperature).log_softmax(-1)
    kl = (ours.exp() * (ours - theirs)).sum(-1)
    return kl, kl
