"""The lanes of the running batch: tensors that a step reads and moves on, without a word from the host.

Buffers keep their addresses for as long as they live, since replayed graphs hold them. A lane is a row of the batch
that the model sees; its place (see cache.py) is where its keys and its response so far are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NO_STOP = -1


class Lanes:
    """State of S lanes.

    Args:
        places: S. capacity of the responses: `width`, the longest that can be asked for.
    """

    def __init__(self, places: int, width: int, device: torch.device) -> None:
        def zeros() -> Tensor:
            return torch.zeros(places, dtype=torch.int64, device=device)

        self.places, self.width, self.device = places, width, device
        self.place = torch.arange(places, device=device)
        self.token = zeros()  # fed next
        self.length = zeros()  # keys in the cache, and so the position of the token fed next
        self.count = zeros()  # response tokens drawn
        self.row = zeros()  # of the output
        self.active = torch.zeros(places, dtype=torch.bool, device=device)
        # By place; one row and one column too many take what idle lanes and rehearsals write.
        self.tokens = torch.zeros(places + 1, width + 1, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(places + 1, width + 1, dtype=torch.float32, device=device)
        self.limit = torch.full((), width, dtype=torch.int64, device=device)  # T of this call
        self.stops = torch.full((8,), NO_STOP, dtype=torch.int64, device=device)

    def begin(self, limit: int, stop_ids: Sequence[int]) -> None:
        """A new call: everything idle, lanes in the order of places."""
        self.place.copy_(torch.arange(self.places, device=self.device))
        self.active.fill_(False)
        self.length.fill_(0)
        self.limit.fill_(limit)
        if len(stop_ids) > len(self.stops):  # graphs are told by this length, and recorded anew
            self.stops = torch.empty(2 * len(stop_ids), dtype=torch.int64, device=self.device)
        self.stops.fill_(NO_STOP)
        if stop_ids:
            held = torch.tensor(stop_ids, dtype=torch.int64, pin_memory=self.device.type == "cuda")
            self.stops[: len(stop_ids)].copy_(held, non_blocking=True)  # no wait for the device

    def admit(self, lanes: Tensor, rows: Tensor, token: Tensor, length: Tensor) -> None:
        """Start `rows` [r] in `lanes` [r]: their last prompt token is fed next, `length` keys stand before it."""
        for state, new in ((self.row, rows), (self.token, token), (self.length, length)):
            state.index_copy_(0, lanes, new)
        self.count.index_fill_(0, lanes, 0)
        self.active.index_fill_(0, lanes, True)

    def reorder(self, order: Tensor) -> None:
        """Lane i becomes what lane order[i] was; places stay with their rows, so nothing else moves."""
        for state in (self.place, self.token, self.length, self.count, self.row, self.active):
            state[: len(order)] = state[order]


def advance(
    token: Tensor,
    log_prob: Tensor,
    place: Tensor,
    fed: Tensor,
    length: Tensor,
    count: Tensor,
    active: Tensor,
    tokens: Tensor,
    log_probs: Tensor,
    limit: Tensor,
    stops: Tensor,
) -> None:
    """Write the drawn tokens down and move the lanes on, in place.

    Args:
        token: [n] int64, log_prob: [n] float32: what was drawn.
        place, fed, length, count, active: [n], the lanes' state; the rest as in `Lanes`.
    """
    column = torch.where(active, count, tokens.shape[1] - 1)
    tokens[place, column] = token
    log_probs[place, column] = log_prob
    drawn = count + active
    alive = active & (token.unsqueeze(-1) != stops).all(-1) & (drawn < limit)
    length.copy_(torch.where(alive, length + 1, 0))  # an idle lane reads and overwrites one key of its own place
    count.copy_(drawn)
    fed.copy_(token)
    active.copy_(alive)
