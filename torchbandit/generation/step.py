"""One decode step: the model's own forward for one token a lane, the draw, and the lanes moved on.

On CUDA the decoder layer is compiled once for all layers and batch sizes, and the whole step is recorded as a CUDA
graph for each batch size in use. Both work on the weights where they are: an optimizer that updates in place reaches
them, and weights that were replaced (other addresses) make the graphs be recorded anew.
"""

from __future__ import annotations

import contextlib
import functools
import time
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx.experimental._config as shape_config
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchbandit.generation import fuse
from torchbandit.generation.attention import decode_mode
from torchbandit.generation.cache import Cache, Unfit
from torchbandit.generation.lanes import Lanes, advance
from torchbandit.generation.sampling import Sampling, draw
from torchbandit.models.quantize import compiler_options

FAST: frozenset[str] = frozenset({"combos", "products", "writes"})
"""What a step adds to the compiled layer: small kernels that do not need each other, such as the rotations of query and
key, as one; sibling projections as one product (fuse.py); keys and values written by the attention itself. The
benchmark times steps with less."""


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
        self.seed = torch.zeros(1, dtype=torch.int64, device=lanes.device)
        self.inverse_temperature = torch.ones(1, dtype=torch.float32, device=lanes.device)
        self.uniform: Tensor | None = None
        self.record_s = 0.0  # spent on compiling and recording, for whoever tells first calls apart
        self._graphs: dict[tuple[int, bool, bool, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
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
            with decode_mode(model):
                self._logits(model, 1, 1 if self.host_bound else None, True)
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
        key = (n, self.fused, greedy, len(self.lanes.stops))
        if key not in self._graphs:
            self._graphs[key] = self._record(model, n)
        graph, logits = self._graphs[key]
        graph.replay()
        if not self.fused:
            self._draw_and_advance(logits, n)

    def _logits(self, model: PreTrainedModel, n: int, used: int | None, in_order: bool) -> Tensor:
        lanes = self.lanes
        place, length = lanes.place[:n].clone(), lanes.length[:n].clone()  # no views: their base would be guarded too
        self.cache.aim(place, length, used, in_order, late=used is None and "writes" in self.fast)
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
                logits, lanes.row[:n], lanes.count[:n], self.seed, self.inverse_temperature,
                greedy=self.sampling.temperature == 0,
            )  # fmt: skip
        else:
            uniform = None
            if self.uniform is not None:
                rows, columns = self.uniform.shape
                uniform = self.uniform[lanes.row[:n].clamp_max(rows - 1), lanes.count[:n].clamp_max(columns - 1)]
            token, log_prob = draw(logits, self.sampling, uniform)
        move = _compiled(advance) if self.cuda else advance
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
        joint = fuse.fused(decoder_layers(model)) if "products" in self.fast else contextlib.nullcontext()
        with decode_mode(model), compiled_body(model, self.cache, combos="combos" in self.fast), joint:
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


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's list of decoder layers."""
    return next(
        child for child in model.modules()
        if isinstance(child, nn.ModuleList) and len(child) == model.config.num_hidden_layers
    )  # fmt: skip


@contextlib.contextmanager
def compiled_body(model: PreTrainedModel, cache: Cache, **how: Any) -> Iterator[None]:
    """Inside the block the decoder layers of `model`, and what stands around them, run compiled.

    All layers share one compilation, so it lasts seconds for any depth: each is handed its own part of the cache, and
    nothing that is traced tells one layer from another. `how`: see `_compiled`.
    """
    how |= {"options": tuple(compiler_options(model).items())} if "backend" not in how else {}
    layers = decoder_layers(model)
    body = next(parent for parent in model.modules() if any(child is layers for child in parent.children()))
    around = [
        child for child in body.children() if child is not layers and not isinstance(child, nn.Embedding | nn.Dropout)
    ]
    patched: list[nn.Module] = []
    try:
        for index, layer in enumerate(layers):
            layer.forward = functools.partial(_run_layer, layer, cache, cache.layers[index], how)
            patched.append(layer)
        for module in around:
            module.forward = functools.partial(_run, module, how)
            patched.append(module)
        yield
    finally:
        for module in patched:
            del module.forward  # the class's own again


def _run_layer(layer: nn.Module, whole: Cache, part: object, how: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    args = tuple(part if x is whole else x for x in args)
    kwargs = {name: part if x is whole else x for name, x in kwargs.items()}
    return _run(layer, how, *args, **kwargs)


def _run(module: nn.Module, how: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    kind: Any = type(module)
    return _compiled(_forward_of(kind), **how)(module, *args, **kwargs)


@functools.cache
def _forward_of(kind: Any) -> Callable[..., Any]:
    """The forward of a class, with a code object of its own: that is what the compiler keeps its versions on, a few
    for each, and training or scoring may have filled those of the original."""
    forward = kind.forward

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(module, *args, **kwargs)

    code = call.__code__.replace(co_name=f"decode_{kind.__name__}")
    return types.FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)


@functools.cache
def _compiled(
    function: Callable[..., Any], combos: bool = False, options: tuple[tuple[str, Any], ...] = (), **how: Any
) -> Callable[..., Any]:
    told = dict(options)
    if combos and "combo_kernels" in torch._inductor.list_options():  # young in Inductor: another torch may lack it
        told["combo_kernels"] = True
    if told:
        how["options"] = told
    compiled = torch.compile(function, dynamic=True, fullgraph=True, **how)

    def call(*args: Any, **kwargs: Any) -> Any:
        # A batch of 64 is no head size of 64, though the numbers are equal.
        with shape_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            return compiled(*args, **kwargs)

    return call
