"""Log-probs, entropy and KL from hidden states, without the logits of more than one chunk in memory.

The LM head runs on the tokens that predict, `CHUNK_BYTES` of float32 logits at a time; backward recomputes a chunk's
logits. Log-sum-exp is in float32 whatever the weights are (trap 12).

Axis letters beside batch.py's: M predictions, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 1 << 30

Head = Callable[[Tensor], Tensor]


class HeadOutput(NamedTuple):
    """[M] float32 each."""

    log_probs: Tensor
    entropy: Tensor | None


def lm_head(model: nn.Module) -> Head:
    """hidden [M, D] -> logits [M, V] of a causal LM, with the scaling and soft cap that its config names."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    softcap = getattr(config, "final_logit_softcapping", None)
    multiply = getattr(config, "logit_scale", None)
    divide = getattr(config, "logits_scaling", None)

    def logits(hidden: Tensor) -> Tensor:
        out: Tensor = head(hidden)
        if multiply is not None:
            out = out * multiply
        if divide is not None:
            out = out / divide
        if softcap is not None:
            out = torch.tanh(out / softcap) * softcap
        return out

    return logits


def of_targets(
    head: Head, hidden: Tensor, targets: Tensor, temperature: float | Tensor, *, vocab_size: int, entropy: bool = False
) -> HeadOutput:
    """Log-probs of `targets`, and the entropy of the distribution they come from.

    Args:
        hidden: [M, D] any float dtype; targets: [M] int64.
        temperature: a number, or [M] float32.
    Returns:
        float32, with gradient where `hidden` or the head has it.
    """
    M = hidden.shape[0]
    size = chunk_size(vocab_size)
    if size >= M:
        spans = [slice(0, M)]
    else:
        count = -(-M // size)
        even = -(-M // count)
        spans = [slice(i, min(i + even, M)) for i in range(0, M, even)]
    logps, entropies = [], []
    for span in spans:
        heat = temperature[span] if isinstance(temperature, Tensor) else temperature
        logp, ent = _recomputed(_chunk, head, hidden[span], targets[span], heat, entropy)
        logps.append(logp)
        entropies.append(ent)
    return HeadOutput(torch.cat(logps), torch.cat(entropies) if entropy else None)


def chunk_size(vocab_size: int) -> int:
    """Predictions whose float32 logits take `CHUNK_BYTES`."""
    return max(CHUNK_BYTES // (4 * vocab_size), 16)


def _recomputed(fn: Callable[..., tuple[Tensor, Tensor]], *args: object) -> tuple[Tensor, Tensor]:
    if not torch.is_grad_enabled():
        return fn(*args)
    out: tuple[Tensor, Tensor] = checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False)
    return out


def _chunk(
    head: Head, hidden: Tensor, targets: Tensor, temperature: float | Tensor, entropy: bool
) -> tuple[Tensor, Tensor]:
    heat = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    logits = head(hidden).float() / heat
    lse = torch.logsumexp(logits, -1)
    log_probs = logits.gather(-1, targets[:, None]).squeeze(-1) - lse
    if not entropy:
        return log_probs, log_probs
    return log_probs, lse - (torch.softmax(logits, -1) * logits).sum(-1)
