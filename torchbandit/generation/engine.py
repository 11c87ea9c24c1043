"""Who runs where and when: rows are admitted to lanes, looked at now and then, and written out.

More rows than places is normal: a row that has stopped gives its lane and place to a waiting one. With none waiting
the batch shrinks. The host looks at which lanes still run every `LOOK_EVERY` steps and acts on it `LOOK_LAG` steps
later, when the answer has long arrived; so the device never waits for the host.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from torchbandit.generation.cache import Cache, LayerShape, Prefill
from torchbandit.generation.lanes import Lanes
from torchbandit.generation.sampling import Generated, Sampling, uniforms
from torchbandit.generation.step import Stepper
from torchbandit.responses import has_stopped

LOOK_EVERY, LOOK_LAG = 8, 2
PREFILL_TOKENS = 16_384
"""Tokens of one prefill forward: enough to fill a card, little enough to need no memory worth naming."""


class Engine:
    """Generates for one model, again and again; owns the cache and everything recorded.

    Args:
        shapes: what each layer keeps of a token.
        places: rows in the cache at a time; capacity: tokens of a place; width: the longest response.
        dtype: the model's, by which an engine is known to be out of date.
        host_bound: see `Stepper`.
    """

    def __init__(
        self,
        shapes: list[LayerShape],
        places: int,
        capacity: int,
        width: int,
        device: torch.device,
        *,
        dtype: torch.dtype,
        host_bound: bool | None = None,
    ) -> None:
        self.shapes, self.dtype, self.all_that_is_free = shapes, dtype, False
        self.places, self.capacity, self.width, self.device = places, capacity, width, device
        self.cuda = device.type == "cuda"
        self.cache = Cache(shapes, places, capacity, device)
        self.lanes = Lanes(places, width, device)
        self.stepper = Stepper(self.cache, self.lanes, host_bound=host_bound)
        self.flags = torch.zeros(places, dtype=torch.bool, pin_memory=self.cuda)
        self.steps: list[int] = []
        """Lanes of each step of the last call."""

    def run(
        self,
        model: PreTrainedModel,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        sampling: Sampling,
        stop_ids: tuple[int, ...],
        pad_id: int,
        generator: torch.Generator | None,
        group_size: int,
    ) -> Generated:
        """Sample a response a row; arguments and result as `generate`, checked by it."""
        call = _Call(self, model, prompt_ids, prompt_mask, sampling, stop_ids, pad_id, generator, group_size)
        return call.run()


class _Call:
    """One call of an engine: the host's side of the bookkeeping."""

    def __init__(
        self,
        engine: Engine,
        model: PreTrainedModel,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        sampling: Sampling,
        stop_ids: tuple[int, ...],
        pad_id: int,
        generator: torch.Generator | None,
        group_size: int,
    ) -> None:
        self.engine, self.model, self.stop_ids, self.group_size = engine, model, stop_ids, group_size
        self.B, self.T, self.pad_id = prompt_ids.shape[0], sampling.max_new_tokens, pad_id
        self.ids = left_compact(prompt_ids[::group_size], prompt_mask[::group_size])
        self.prompt_lengths: list[int] = (
            prompt_mask[::group_size].sum(-1).tolist()
        )  # the call's one wait for the device
        if 0 in self.prompt_lengths:
            row = self.prompt_lengths.index(0) * group_size
            raise ValueError(f"prompt_mask: every row must have a real token, row {row} has none")
        device = engine.device
        self.tokens = torch.full((self.B, self.T), pad_id, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(self.B, self.T, dtype=torch.float32, device=device)
        self.counts = torch.zeros(self.B, dtype=torch.int64, device=device)

        engine.lanes.begin(self.T, stop_ids)
        uniform = seed = None
        if engine.cuda and not sampling.truncates:
            seed = torch.randint(2**62, (1,), device=device, generator=generator) if sampling.temperature else None
        else:
            uniform = uniforms(self.B, sampling, device, generator)
        engine.stepper.begin(model, uniform, sampling, seed)

        self.step = 0
        self.waiting = 0  # the next row to be admitted; rows go in order
        self.n = min(engine.places, self.B, sampling.places or self.B)
        # By lane, None where it idles: its row, its place, the step it began, its keys then.
        self.row: list[int | None] = [None] * self.n
        self.place = list(range(self.n))
        self.began = [0] * self.n
        self.keys = [0] * self.n
        self.alive = [False] * self.n
        self.in_order = True
        self.ends: int | None = None  # the step at which a row has all its tokens; None: nothing runs
        self.longest = 0  # plus the step: keys of the longest row, its new one included

    def run(self) -> Generated:
        engine = self.engine
        engine.steps = []
        self.admit(list(range(self.n)))
        self.count_steps()
        every, lag = (LOOK_EVERY, LOOK_LAG) if engine.cuda else (1, 0)
        arrived: torch.cuda.Event | None = None
        looked = -1  # the step of a look that is under way
        while self.ends is not None:
            engine.stepper(self.model, self.n, self.step + self.longest, self.in_order)
            engine.steps.append(self.n)
            self.step += 1
            if looked < 0 and self.stop_ids and self.step % every == 0:
                looked = self.step
                engine.flags[: self.n].copy_(engine.lanes.active[: self.n], non_blocking=True)
                if engine.cuda:
                    arrived = torch.cuda.Event()
                    arrived.record()
            if 0 <= looked <= self.step - lag:
                if arrived is not None:
                    arrived.synchronize()
                flags: list[bool] = engine.flags[: self.n].tolist()
                if flags != self.alive:
                    self.alive = [a and f for a, f in zip(self.alive, flags, strict=True)]
                    self.make_room()
                looked = -1
            if self.step == self.ends:
                self.alive = [a and self.step - b < self.T for a, b in zip(self.alive, self.began, strict=True)]
                self.make_room()
                looked = -1  # a look under way is dropped: lanes have changed hands
        self.write_out([lane for lane, row in enumerate(self.row) if row is not None])
        mask = torch.arange(self.T, device=engine.device) < self.counts.unsqueeze(-1)
        finished = has_stopped(self.tokens, mask, engine.lanes.stops)
        tokens = torch.where(mask, self.tokens, self.pad_id)
        return Generated(tokens, mask, torch.where(mask, self.log_probs, 0.0), finished)

    def make_room(self) -> None:
        """Give idle lanes to waiting rows, or shrink the batch."""
        idle = [lane for lane, alive in enumerate(self.alive) if not alive]
        left = self.B - self.waiting
        if left:
            # A prefill of few rows costs as much as one of some more: wait until it pays.
            if len(idle) >= min(left, max(1, self.n // 16)):
                self.write_out([lane for lane in idle[:left] if self.row[lane] is not None])
                self.admit(idle[:left])
        elif (smaller := bucket(self.n - len(idle), self.engine.cuda)) < self.n:
            order = sorted(range(self.n), key=lambda lane: not self.alive[lane])
            self.write_out([lane for lane in order[smaller:] if self.row[lane] is not None])
            order = order[:smaller]
            self.engine.lanes.reorder(self.tensor(order))
            for name in ("row", "place", "began", "keys", "alive"):
                old = getattr(self, name)
                setattr(self, name, [old[lane] for lane in order])
            self.n = smaller
            self.in_order = self.place == list(range(smaller))
        self.count_steps()

    def count_steps(self) -> None:
        """Foresee the step at which the next row has all its tokens, and how long rows get until then."""
        running = [(k - b, b) for k, b, a in zip(self.keys, self.began, self.alive, strict=True) if a]
        self.ends = min(b for _, b in running) + self.T if running else None
        self.longest = max((k for k, _ in running), default=0) + 1

    def admit(self, lanes: list[int]) -> None:
        """Start the next waiting rows in `lanes`; each prompt among them is computed once."""
        rows = list(range(self.waiting, self.waiting + len(lanes)))
        self.waiting += len(lanes)
        prompts = sorted({row // self.group_size for row in rows})
        places = [self.place[lane] for lane in lanes]
        widest = max(self.prompt_lengths[prompt] for prompt in prompts)
        chunk = max(1, PREFILL_TOKENS // widest)
        for start in range(0, len(prompts), chunk):
            some = prompts[start : start + chunk]
            at = {prompt: index for index, prompt in enumerate(some)}
            taken = [i for i, row in enumerate(rows) if row // self.group_size in at]
            which = self.tensor([at[rows[i] // self.group_size] for i in taken])
            self.prefill(some, self.tensor([places[i] for i in taken]), which)
        last = [self.prompt_lengths[row // self.group_size] - 1 for row in rows]
        lane, row, length = self.tensor(lanes), self.tensor(rows), self.tensor(last)
        self.engine.lanes.admit(lane, row, self.ids[row // self.group_size, length], length)
        for i, number in zip(lanes, rows, strict=True):
            self.row[i], self.began[i], self.alive[i] = number, self.step, True
            self.keys[i] = self.prompt_lengths[number // self.group_size] - 1

    def prefill(self, prompts: list[int], places: Tensor, which: Tensor) -> None:
        """Fill `places` with the keys of `prompts`. The last token's is computed again by the first step, which so
        makes the first logits as it makes all others."""
        widest = max(self.prompt_lengths[prompt] for prompt in prompts)
        ids = self.ids[self.tensor(prompts), :widest]
        positions = torch.arange(widest, device=ids.device).expand_as(ids)
        body = getattr(self.model, self.model.base_model_prefix, self.model)
        # Padded on the right, where causal attention never looks: no mask.
        body(
            input_ids=ids, position_ids=positions, use_cache=True,
            past_key_values=Prefill(self.engine.cache, places, which),
        )  # fmt: skip

    def write_out(self, lanes: list[int]) -> None:
        """Copy the responses of `lanes` out of their places, and leave the lanes free."""
        if not lanes:
            return
        state = self.engine.lanes
        lane = self.tensor(lanes)
        row, place = state.row[lane], state.place[lane]
        self.tokens[row] = state.tokens[place, : self.T]
        self.log_probs[row] = state.log_probs[place, : self.T]
        self.counts[row] = state.count[lane]
        for i in lanes:
            self.row[i] = None

    def tensor(self, numbers: list[int]) -> Tensor:
        """To the device, without waiting for it."""
        held = torch.tensor(numbers, dtype=torch.int64, pin_memory=self.engine.cuda)
        return held.to(self.engine.device, non_blocking=True)


def bucket(alive: int, coarse: bool) -> int:
    """The batch size that runs `alive` lanes: 1, 2, 3, 4, 6, 8, 12 ..., on a card from 8 on, since each is a graph."""
    size = 8 if coarse else 1
    while size < alive:
        size = size * 3 // 2 if size & (size - 1) == 0 and size > 1 else size * 4 // 3 if size > 2 else size + 1
    return size


def left_compact(ids: Tensor, mask: Tensor) -> Tensor:
    """Real tokens moved to the left end, in order, wherever the padding stood: [B, P] -> [B, P], no sync."""
    return ids.gather(1, (~mask).byte().argsort(dim=-1, stable=True))
