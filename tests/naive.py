"""One row at a time, unpadded, in float32, by transformers alone: what every fast path is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

Args = tuple[Tensor, Tensor, Tensor, Tensor]


def tensors(td: TensorDict) -> Args:
    return td["tokens", "prompt"], td["masks", "prompt"], td["tokens", "response"], td["masks", "response"]


def rows(args: Args) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(row, prompt ids, response ids) without padding."""
    prompt, prompt_mask, response, response_mask = args
    for row in range(prompt.shape[0]):
        yield row, prompt[row][prompt_mask[row]], response[row][response_mask[row]]


def log_probs(model: Any, args: Args, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """([B, T] log-probs, [B, T] entropy)."""
    table = torch.zeros(args[3].shape)
    entropy = torch.zeros(args[3].shape)
    logp_rows, entropy_rows = list(table.unbind()), list(entropy.unbind())
    for row, prompt, response in rows(args):
        heat = float(temperature[row]) if isinstance(temperature, Tensor) else temperature
        logits = model(torch.cat((prompt, response))[None]).logits[0].float() / heat
        dist = logits.log_softmax(-1)[len(prompt) - 1 : -1] if len(response) else logits[:0]
        at = args[3][row].nonzero().squeeze(1)
        logp_rows[row] = torch.zeros(args[3].shape[1]).index_put((at,), dist.gather(1, response[:, None]).squeeze(1))
        entropy_rows[row] = torch.zeros(args[3].shape[1]).index_put((at,), -(dist.exp() * dist).sum(-1))
    return torch.stack(logp_rows), torch.stack(entropy_rows)


def scores(model: Any, args: Args) -> Tensor:
    """[B]: the score head on the last real token; NaN for an empty response."""
    out = []
    for _, prompt, response in rows(args):
        hidden = model.base_model(torch.cat((prompt, response))[None]).last_hidden_state[0]
        out.append(model.score(hidden[-1]).squeeze().float() if len(response) else torch.tensor(torch.nan))
    return torch.stack(out)


def values(model: Any, args: Args) -> Tensor:
    """[B, T]: the score head on the token before each response token."""
    table = []
    for row, prompt, response in rows(args):
        hidden = model.base_model(torch.cat((prompt, response))[None]).last_hidden_state[0]
        at = args[3][row].nonzero().squeeze(1)
        before = model.score(hidden).squeeze(-1)[len(prompt) - 1 : len(prompt) - 1 + len(response)]
        table.append(torch.zeros(args[3].shape[1]).index_put((at,), before.float()))
    return torch.stack(table)


def gradients(model: Any) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
