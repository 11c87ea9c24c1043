"""What a user asks of generation, and how one token is drawn. (B, T, V: see batch.py.)"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled.

    Args:
        max_new_tokens: T, the fixed width of the responses.
        temperature: divides the logits; 0 is greedy, with log-probs at temperature 1.
        top_k: keep the k likeliest tokens; 0 keeps all. For evaluation: the log-probs stay those of the whole softmax.
        top_p: keep the smallest set of likeliest tokens that holds this mass (after top_k); 1 keeps all.
        places: at most so many rows are in the cache at a time, the others wait; None lets memory decide.
        stop_ids: ids that end a response; None takes the tokenizer's and the model's eos ids, () lets nothing stop.
        num_ids: ids from here on are never sampled: a padded vocabulary has more than any tokenizer. The log-probs stay
            those of the whole softmax. None: the policy takes its tokenizer's.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    places: int | None = None
    stop_ids: tuple[int, ...] | None = None
    num_ids: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: must be at least 1, got {self.max_new_tokens}")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature: must be finite and at least 0 (0 is greedy), got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: must be at least 0 (0 keeps every token), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: must be above 0 and at most 1 (1 keeps every token), got {self.top_p}")
        if self.places is not None and self.places < 1:
            raise ValueError(f"places: must be at least 1, or None, got {self.places}")
        if self.stop_ids is not None and any(stop < 0 for stop in self.stop_ids):
            raise ValueError(f"stop_ids: must be token ids, so not negative, got {self.stop_ids}")
        if self.num_ids is not None and self.num_ids < 1:
            raise ValueError(f"num_ids: must be at least 1, or None, got {self.num_ids}")

    @property
    def truncates(self) -> bool:
        """True where sampling leaves tokens out, so that log-probs are not those of the sampled distribution."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


class Generated(NamedTuple):
    """Responses: tokens [B, T] int64, mask [B, T] bool, log_probs [B, T] float32, finished [B] bool."""

    tokens: Tensor
    mask: Tensor
    log_probs: Tensor
    finished: Tensor


def uniforms(
    num_rows: int, sampling: Sampling, device: torch.device, generator: torch.Generator | None
) -> Tensor | None:
    """All the randomness of a call, drawn ahead: [B, T] float64 in [0, 1), or None where nothing is drawn.

    A number belongs to a row and a token, so that neither the place of a row nor its neighbours change its response.
    """
    if sampling.temperature == 0:
        return None
    return torch.rand(num_rows, sampling.max_new_tokens, dtype=torch.float64, device=device, generator=generator)


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token a row and its log-prob under softmax(logits / temperature) over the whole vocabulary.

    Args:
        logits: [B, V], any float dtype; reduced in float32, the cumulative sum in float64.
        uniform: [B] float64 in [0, 1), inverted through the distribution function; not read at temperature 0.
    Returns:
        tokens [B] int64, log_probs [B] float32.
    """
    scaled = logits.float()
    if sampling.temperature == 0:
        tokens = scaled[:, : sampling.num_ids].argmax(-1, keepdim=True)
        return tokens[:, 0], (scaled.gather(-1, tokens) - scaled.logsumexp(-1, keepdim=True))[:, 0]
    assert uniform is not None
    if sampling.temperature != 1:
        scaled = scaled / sampling.temperature
    probs = scaled.softmax(-1)
    kept = probs[:, : sampling.num_ids]
    if sampling.truncates:
        kept = truncate(kept, sampling)
    mass = kept.cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True).clamp_(max=mass.shape[-1] - 1)
    return tokens[:, 0], probs.gather(-1, tokens)[:, 0].log()


def of_whole(
    log_prob: Tensor, token: Tensor, logits: Tensor, num_ids: int | None, inverse_temperature: Tensor
) -> Tensor:
    """Log-probs over the whole vocabulary, of those over the first `num_ids` ids: [n] float32.

    Args:
        logits: [n, V], of the whole vocabulary; inverse_temperature: [1] float32.
    """
    if num_ids is None or num_ids >= logits.shape[-1]:
        return log_prob
    scaled = logits.gather(-1, token[:, None])[:, 0].float() * inverse_temperature
    beyond = (logits[:, num_ids:].float() * inverse_temperature).logsumexp(-1)
    return scaled - torch.logaddexp(scaled - log_prob, beyond)


def truncate(probs: Tensor, sampling: Sampling) -> Tensor:
    """`probs` with the tokens outside top-k and top-p at 0, not renormalised: [B, V] -> [B, V].

    Source: Fan et al. 2018 (top-k); Holtzman et al. 2020 (nucleus), where top-p counts the mass that top-k left.
    """
    if 0 < sampling.top_k < probs.shape[-1]:
        kth = probs.topk(sampling.top_k, dim=-1).values[..., -1:]
        probs = torch.where(probs < kth, 0.0, probs)
    if sampling.top_p < 1:
        ordered, index = probs.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        kept = before < sampling.top_p * ordered.sum(-1, keepdim=True)
        probs = probs * torch.zeros_like(kept).scatter_(-1, index, kept)
    return probs
