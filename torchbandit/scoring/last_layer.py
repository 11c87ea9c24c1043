"""The last layer, on the tokens that are read.

Its attention needs the keys and values of every token. What comes after it works token by token, and of most tokens
nobody reads the result: a reward model is read on one token a row, log-probs on none of the prompt. There the output
projection and the MLP run on the tokens that are read; the others get finite numbers that mean nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchbandit.scoring.attention import UnsupportedAttention, blocks

WORTH_BELOW = 0.75
"""Share of tokens that are read above which gathering them is not worth it."""

# Which tokens the modules below work on: [M] their places in the flattened lines, and [W] who stands for each place.
# Here, and not in the modules, because compilers take the shapes of a module's tensors as fixed.
_reading: list[Tensor] = []


class _OnRead(nn.Module):
    """A module that works token by token, put to work on the tokens that are read."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        read, stand_in = _reading
        done = self.inner(hidden.flatten(0, -2).index_select(0, read).unsqueeze(0))
        if not isinstance(done, Tensor):
            raise UnsupportedAttention("a last layer that returns more than a tensor")
        return done.flatten(0, -2).index_select(0, stand_in).view(*hidden.shape[:-1], done.shape[-1])


@contextlib.contextmanager
def trimmed(model: PreTrainedModel, read: Tensor, num_tokens: int) -> Iterator[bool]:
    """Run `model`'s last layer on the tokens `read` inside the block, without gradient; yields whether it does.

    Args:
        read: [M] int64, places in the flattened lines, repeated or not; num_tokens: how many places there are.
    """
    places = _places(model)
    # Where backward follows, what it would gather and scatter costs what little a policy's prompts would save.
    if not places or torch.is_grad_enabled() or read.shape[0] > WORTH_BELOW * num_tokens:
        yield False
        return
    # Two more (of the first token), since compilers take sizes 0 and 1 for constants.
    read = nn.functional.pad(read, (0, 2))
    stand_in = read.new_zeros(num_tokens).scatter(0, read, torch.arange(read.shape[0], device=read.device))
    own = [(owner, name, owner._modules[name]) for owner, name in places]
    _reading[:] = read, stand_in
    for owner, name, inner in own:
        assert inner is not None
        owner._modules[name] = _OnRead(inner)
    try:
        yield True
    finally:
        for owner, name, inner in own:
            owner._modules[name] = inner
        _reading.clear()


def _places(model: PreTrainedModel) -> list[tuple[nn.Module, str]]:
    """Where the last layer's modules after its attention sit; none where they go by other names than we know."""
    layers = blocks(model)
    last = layers[-1] if layers else None
    if last is None or last._modules.get("mlp") is None:
        return []
    attention = last._modules.get("self_attn")
    projected = attention is not None and attention._modules.get("o_proj") is not None
    return [(last, "mlp"), *([(attention, "o_proj")] if attention is not None and projected else [])]
