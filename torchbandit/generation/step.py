"""One decode step: the model's own forward for one token a lane, the draw, and the lanes moved on.

On CUDA the decoder layer is compiled once for all layers and batch sizes, and the whole step is recorded as a CUDA
graph for each batch size in use. Both work on the weights where they are: an optimizer that updates in place reaches
them, and weights that were replaced (other addresses) make the graphs be recorded anew.
"""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchbandit.generation import fuse, residual
from torchbandit.generation.attention import decode_mode
from torchbandit.generation.body import compiled, compiled_body, decoder_layers, is_chain, own_forwards, watched
from torchbandit.generation.cache import Cache, Unfit
from torchbandit.generation.lanes import Lanes, advance
from torchbandit.generation.sampling import Sampling, draw, of_whole

FAST: frozenset[str] = frozenset({"combos", "gates", "layers", "products", "sums"})
"""What a step adds to the compiled layer: small kernels that do not need each other, such as the rotations of query and
key, as one; gate, up and their activation as one kernel (fuse.py); several layers compiled together, so that one's last
sum and the next one's norm are a kernel; sibling projections as one product (fuse.py); residual sums as part of the
products before them (residual.py). The benchmark times steps with less."""

GATED_LANES = 512
"""From so many lanes on gate and up are bound by arithmetic, not by their weights' bytes, and our kernel is the quicker
way to their activation. It is laid out for Hopper."""


class Stepper:
    """Runs steps over the first n lanes.

    Args:
        host_bound: the host says how much of the cache is in use, and attention is SDPA over that part; False leaves
            it to the kernel, which goes by lengths on the device. None: False on CUDA alone.
    """

    def __init__(self, cache: Cache, lanes: Lanes, *, host_bound: bool | None = None) -> None:
        self.cache, self.lanes = cache, lanes
        self.cuda = lanes.device.type == "cuda"
        self.host_bound = not self.cuda if host_bound is None else host_bound
        self.fast = FAST
        self.chained = False  # whether layers may be compiled several at a time, as `probe` finds
        self.gated: set[nn.Module] = set()  # layers' gated parts, and
        self.two_sums: set[nn.Module] = set()  # layers of two residual sums, as `probe` finds
        self.seed = torch.zeros(1, dtype=torch.int64, device=lanes.device)
        self.inverse_temperature = torch.ones(1, dtype=torch.float32, device=lanes.device)
        self.uniform: Tensor | None = None
        self.record_s = 0.0  # spent on compiling and recording, for whoever tells first calls apart
        self._graphs: dict[tuple[int, bool, bool, int, int | None], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None
        self._weights: tuple[int, ...] = ()

    def begin(self, model: PreTrainedModel, uniform: Tensor | None, sampling: Sampling, seed: Tensor | None) -> None:
        """A new call. Either `uniform` [B, T] float64 or `seed` [1] int64 holds its randomness."""
        self.uniform, self.sampling = uniform, sampling
        self.fused = self.cuda and not sampling.truncates
        if seed is not None:
            self.seed.copy_(seed)
        self.inverse_temperature.fill_(1 / (sampling.temperature or 1.0))
        if self.cuda:
            if "products" in self.fast:
                fuse.rehome(decoder_layers(model))
            weights = tuple(weight.data_ptr() for weight in (*model.parameters(), *model.buffers()))
            if weights != self._weights:
                self._weights = weights
                self._graphs.clear()

    def probe(self, model: PreTrainedModel) -> None:
        """Run the model over one lane, nothing compiled, before anything is worth keeping.

        Raises:
            Unfit: it does not run; within a compiled step the reason would be harder to tell.
        """
        try:
            layers = decoder_layers(model)
            with decode_mode(model):
                with watched(layers) as calls:
                    self._logits(model, 1, 1 if self.host_bound else None, True)
                self.chained = is_chain(calls)
                if self.chained:
                    pairs = zip(layers, calls, strict=True)
                    self.two_sums = {layer for layer, call in pairs if residual.two_sums(layer, call)}
            if self.cuda and torch.cuda.get_device_capability(self.lanes.device)[0] == 9 and model.dtype.itemsize == 2:
                self.gated = fuse.gates(layers)
        except (Unfit, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise Unfit(f"{type(model).__name__} does not decode from a cache of this kind: {error}") from error

    def __call__(self, model: PreTrainedModel, n: int, used: int, in_order: bool) -> None:
        """One token for each active lane of the first n.

        Args:
            used: no lane has more keys than this, the new one included; in_order: lane i has place i.
        """
        if not self.cuda:
            bound = used if self.host_bound else None
            with decode_mode(model):
                self._draw_and_advance(self._logits(model, n, bound, in_order), n)
            return
        greedy = self.sampling.temperature == 0
        key = (n, self.fused, greedy, len(self.lanes.stops), self.sampling.num_ids)
        if key not in self._graphs:
            self._graphs[key] = self._record(model, n)
        graph, logits = self._graphs[key]
        graph.replay()
        if not self.fused:
            self._draw_and_advance(logits, n)

    def _logits(self, model: PreTrainedModel, n: int, used: int | None, in_order: bool) -> Tensor:
        lanes = self.lanes
        place, length = lanes.place[:n].clone(), lanes.length[:n].clone()  # no views: their base would be guarded too
        self.cache.aim(place, length, used, in_order)
        if used is None:
            mask = torch.stack((place, length), -1).int().view(n, 1, 1, 2)
        else:
            seen = torch.arange(used, device=lanes.device) <= length.unsqueeze(-1)
            # Of the model's dtype, which is the query's under no autocast.
            mask = torch.zeros(seen.shape, dtype=model.dtype, device=lanes.device)
            mask = mask.masked_fill_(~seen, float("-inf")).view(n, 1, 1, used)
        logits: Tensor = model(
            input_ids=lanes.token[:n].unsqueeze(1), position_ids=length.unsqueeze(1), attention_mask=mask,
            past_key_values=self.cache, use_cache=True,
        ).logits[:, -1]  # fmt: skip
        return logits

    def _draw_and_advance(self, logits: Tensor, n: int) -> None:
        lanes = self.lanes
        if self.fused:
            from torchbandit.generation import kernels

            token, log_prob = kernels.draw(
                logits[:, : self.sampling.num_ids], lanes.row[:n], lanes.count[:n], self.seed, self.inverse_temperature,
                greedy=self.sampling.temperature == 0,
            )  # fmt: skip
            log_prob = of_whole(log_prob, token, logits, self.sampling.num_ids, self.inverse_temperature)
        else:
            uniform = None
            if self.uniform is not None:
                rows, columns = self.uniform.shape
                uniform = self.uniform[lanes.row[:n].clamp_max(rows - 1), lanes.count[:n].clamp_max(columns - 1)]
            token, log_prob = draw(logits, self.sampling, uniform)
        move = compiled(advance) if self.cuda else advance
        move(
            token, log_prob, lanes.place[:n], lanes.token[:n], lanes.length[:n], lanes.count[:n], lanes.active[:n],
            lanes.tokens, lanes.log_probs, lanes.limit, lanes.stops,
        )  # fmt: skip

    def _record(self, model: PreTrainedModel, n: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Rehearse a step for n lanes on the scratch place, and record it."""
        begin = time.perf_counter()
        lanes = self.lanes
        state = (lanes.place, lanes.token, lanes.length, lanes.count, lanes.row, lanes.active)
        before = [x.clone() for x in state]
        try:
            lanes.place.fill_(lanes.places)
            lanes.active.fill_(False)
            lanes.length.fill_(0)
            while True:
                try:
                    return self._rehearse_and_record(model, n)
                except (Unfit, torch.OutOfMemoryError):
                    raise
                except Exception as error:
                    if not self.fast:
                        raise Unfit(f"a step of {type(model).__name__} cannot be recorded: {error}") from error
                    warnings.warn(f"generation runs without {', '.join(sorted(self.fast))}: {error}", stacklevel=2)
                    self.fast = frozenset()
        finally:
            for x, old in zip(state, before, strict=True):
                x.copy_(old)
            torch.cuda.synchronize()
            self.record_s += time.perf_counter() - begin

    def _rehearse_and_record(self, model: PreTrainedModel, n: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        def step() -> Tensor:
            logits = self._logits(model, n, None, False)
            if self.fused:
                self._draw_and_advance(logits, n)
            return logits

        graph = torch.cuda.CUDAGraph()
        layers = decoder_layers(model)
        gated = self.gated if "gates" in self.fast and n >= GATED_LANES else ()
        two_sums = self.two_sums if "sums" in self.fast else ()
        at_once = max(k for k in (1, 2, 3, 4) if len(layers) % k == 0) if self.chained and "layers" in self.fast else 1
        with contextlib.ExitStack() as way:
            way.enter_context(decode_mode(model))
            if "products" in self.fast:
                way.enter_context(fuse.fused(layers, gated))
            forwards = residual.forwards if way.enter_context(residual.summed(layers, two_sums)) else own_forwards
            way.enter_context(compiled_body(model, self.cache, at_once, forwards, combos="combos" in self.fast))
            side = _side_stream(self.lanes.device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step()
                step()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, pool=self._pool):
                logits = step()
        self._pool = self._pool or graph.pool()
        return graph, logits


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all rehearsals: the product library keeps a workspace for every stream that it ever ran on."""
    return torch.cuda.Stream(device)
