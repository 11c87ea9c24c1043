"""What an engine that is not the policy left unwritten: the policy's own log-probs and values."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase

from torchbandit import batch
from torchbandit.policy import CausalLMPolicy


@torch.no_grad()
def with_log_probs(td: TensorDictBase, policy: CausalLMPolicy, *, group_size: int = 1) -> TensorDict:
    """A shallow copy of a batch with the policy's log-probs and, with a critic, its values, computed where absent.

    Args:
        td: the prompt and response keys [B, ...].
        group_size: contiguous siblings, whose prompt is then read once.
    Returns:
        td's keys and ("log_probs","response") [B, T] float32, `values` [B, T] float32 with a critic.
    """
    out: TensorDict = td.copy()
    lacks_values = policy.has_critic and td.get(batch.VALUES, None) is None
    if td.get(batch.LOG_PROBS, None) is not None:
        if lacks_values:
            out.set(batch.VALUES, policy.values(out, group_size=group_size))
        return out
    scores = policy(out, group_size=group_size)
    out.set(batch.LOG_PROBS, scores["log_probs"])
    if lacks_values:
        out.set(batch.VALUES, scores["values"])
    return out
