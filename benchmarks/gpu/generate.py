"""What bounds a decode step on one GPU: each part of it in the step, by itself, and at the limits.

    python benchmarks/gpu/generate.py                          # all rows
    python benchmarks/gpu/generate.py --rows b256 b1024        # some
    python benchmarks/gpu/generate.py --ways usual autotuned   # the same step run otherwise (decode_ways.py)
    python benchmarks/gpu/generate.py --tiny                   # a smoke test on the CPU

Rows are those of `torchbandit bench generate`, which tells whether outputs are right and how quick whole calls are.
Here an engine stands in the middle of a call, each row at its mean length, keys and values random; its step is timed,
then traced. Parts: products of matrices; attention, with the writing of the new key and value; the draw; the rest
(norms, rotations, activations, bookkeeping); gaps, while no kernel runs. Columns, in microseconds a step: traced, and
in how many launches; alone, the same work recorded by itself; bytes, what it must read at the quickest rate measured;
limit, the longer of bytes and arithmetic, product by product. Tracing itself costs: the untraced step stands in the
first line. Then a call of one token: the prompts, and what a call costs once. Ways: the same step run otherwise, its
logits compared. Attention and draw with other settings:
decode_kernels.py. The last line is JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from decode_ways import WAYS, arranged
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from torchbandit import generation
from torchbandit.bench.environment import environment
from torchbandit.bench.frame import Frame, short
from torchbandit.bench.generate import Work, prompts, step_bytes
from torchbandit.generation import Sampling, body, fuse, release, step
from torchbandit.generation.attention import decode_mode
from torchbandit.generation.engine import Engine
from torchbandit.generation.sampling import draw, uniforms

SHAPES = {  # model, rows, width of prompts, new tokens
    "b256": ("1b", 256, 256, 256), "b1024": ("1b", 1024, 256, 256), "small": ("410m", 512, 112, 128),
    "long": ("410m", 64, 150, 4096),
}  # fmt: skip
PARTS = {  # by the names of kernels, or of a CPU's operators; the first that matches
    "rest": r"^triton_(?!tem)", "attention": r"_attention|_join_kernel|flash|fmha",
    "draw": r"^_(tile|pick)_kernel|softmax|cumsum|searchsorted",
    "products": r"gemm|nvjet|cutlass|cublas|split_?k|triton_tem|_gated|aten::linear|aten::matmul",
}  # fmt: skip
Intervals = Sequence[tuple[str, float, float]]


def engine_at(frame: Frame, model: Any, rows: int, P: int, C: int) -> Engine:
    """An engine of `rows` lanes with room for P + C tokens, its cache full of random keys and values."""
    engine, gen = generation._engine(model, rows, P, Sampling(C)), torch.Generator(frame.device).manual_seed(0)
    for layer in engine.cache.layers:
        layer.both.normal_(generator=gen)
    uniform = None if frame.cuda else uniforms(rows, Sampling(C), frame.device, gen)
    engine.stepper.begin(model, uniform, Sampling(C), torch.ones(1, dtype=torch.int64, device=frame.device))
    return engine


def stand(engine: Engine, length: int) -> None:
    """Every lane active, with `length` keys and all its tokens to come."""
    lanes = engine.lanes
    lanes.begin(engine.width, ())
    for state, value in ((lanes.active, True), (lanes.length, length), (lanes.count, 0)):
        state.fill_(value)
    lanes.row.copy_(lanes.place)
    lanes.token.copy_(lanes.place + 3)


def steps(engine: Engine, model: Any, rows: int, length: int, num: int) -> None:
    stand(engine, length)
    for _ in range(num):
        engine.stepper(model, rows, engine.capacity, True)


def alone(frame: Frame, call: Callable[[], Any]) -> float:
    """Seconds of a call recorded by itself, so that launching it is not in them."""
    call()
    if frame.cuda:
        frame.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        call = graph.replay
    return frame.quickest(call)


def traced(frame: Frame, call: Callable[[], Any]) -> Intervals:
    """(name, begin, end) in microseconds: the kernels of a call; on a CPU its outermost operators."""
    call()
    frame.wait()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if frame.cuda else ProfilerActivity.CPU]) as prof:
        call()
        frame.wait()
    if frame.cuda:
        found = [e for e in prof.events() if e.device_type == DeviceType.CUDA]
    else:
        found = [e for e in prof.events() if e.cpu_parent is None]
    return sorted(((e.name, e.time_range.start, e.time_range.end) for e in found), key=lambda x: x[1])


def split(intervals: Intervals, num: int) -> dict[str, dict[str, float]]:
    """Microseconds and launches a step, by part; where kernels overlap, the time is the later one's part only."""
    parts = {name: {"us": 0.0, "launches": 0.0} for name in (*PARTS, "gaps")}
    done = intervals[0][1] if intervals else 0.0
    for name, begin, end in intervals:
        part = next((p for p, pattern in PARTS.items() if re.search(pattern, name, re.I)), "rest")
        parts["gaps"]["us"] += max(0.0, begin - done) / num
        parts[part]["us"] += max(0.0, end - max(begin, done)) / num
        parts[part]["launches"] += 1 / num
        done = max(done, end)
    return parts


def products(model: Any) -> dict[str, list[Tensor]]:
    """The matrices that a step multiplies by, all layers' under one name; siblings that lie end to end are one."""
    found: dict[str, list[Tensor]] = {}
    joint: dict[int, Tensor | None] = {}
    for family in fuse.families(body.decoder_layers(model)):
        whole = fuse.joined([x.weight for x in family.linears])
        if whole is not None:
            joint |= {id(x): None for x in family.linears} | {id(family.linears[0]): whole}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (weight := joint.get(id(module), module.weight.detach())) is not None:
            found.setdefault(f"{name.rpartition('.')[2]} {tuple(weight.shape)}", []).append(weight)
    return found


def parts_alone(frame: Frame, model: Any, engine: Engine, n: int, length: int) -> dict[str, dict[str, float]]:
    """The parts of a step by themselves, and at the limits: microseconds."""
    read, flop = frame.limits()["read_bytes_s"], frame.limits()["matmul_flop_s"]
    found: dict[str, dict[str, float]] = {}

    def put(name: str, call: Callable[[], Any], nbytes: float, arithmetic: float = 0.0) -> None:
        took = alone(frame, call), nbytes / read, max(nbytes / read, arithmetic / flop)
        found[name] = dict(zip(("alone", "bytes", "limit"), (1e6 * s for s in took), strict=True))

    def multiply(x: Tensor, weights: list[Tensor]) -> None:
        for weight in weights:
            nn.functional.linear(x, weight)

    matrices = products(model)
    for name, weights in matrices.items():
        x = torch.randn(n, weights[0].shape[1], device=frame.device, dtype=frame.dtype)
        size = sum(w.numel() for w in weights)
        put(name, functools.partial(multiply, x, weights), size * x.itemsize, 2 * n * size)
    found["products"] = {c: sum(found[name][c] for name in matrices) for c in ("alone", "bytes", "limit")}

    heads, K, _, D = model.config.num_attention_heads, *engine.cache.layers[0].keys.shape[1:]
    query, new = (torch.randn(n, K, m, D, device=frame.device, dtype=frame.dtype) for m in (heads // K, 1))
    place = engine.lanes.place[:n]
    lanes = torch.stack((place, torch.full_like(place, length)), -1).int().view(n, 1, 1, 2)

    def attend() -> None:
        for layer in engine.cache.layers:
            torch.ops.torchbandit.append_attention(query, new, new, layer.both, lanes, D**-0.5)

    put("attention", attend, generation.bytes_per_place(engine.shapes, length + 1) * n)
    logits = torch.randn(n, model.config.vocab_size, device=frame.device, dtype=frame.dtype)
    put("draw", drawing(frame, logits), logits.nbytes)
    return found


def drawing(frame: Frame, logits: Tensor, greedy: bool = False) -> Callable[[], Any]:
    n = len(logits)
    if not frame.cuda:
        return functools.partial(draw, logits, Sampling(1), uniforms(n, Sampling(1), frame.device, None)[:, 0])
    from torchbandit.generation import kernels

    row = torch.arange(n, device=frame.device)
    one = torch.ones(1, device=frame.device)
    return functools.partial(kernels.draw, logits, row, row * 0, row[:1], one, greedy=greedy)


def logits_of(engine: Engine, model: Any, rows: int, length: int) -> Tensor:
    """Of the first step of an engine that nothing has run on."""
    steps(engine, model, rows, length, 1)
    if engine.cuda:
        (made,) = engine.stepper._graphs.values()
        return made[1].float()
    stand(engine, length)
    with decode_mode(model), body.compiled_body(model, engine.cache, backend="eager"):
        return engine.stepper._logits(model, rows, None, True).float()


def row_of(frame: Frame, work: Work, name: str, ways: Sequence[str]) -> dict[str, Any]:
    """A step of one row: what it is made of, and how long it takes in each of the ways."""
    shape, rows, P, C = SHAPES[name]
    if frame.tiny:
        rows, P, C = max(rows // 32, 4), 16, 48
    model, num, length = work.use(shape), 2 if frame.tiny else 20, P + C // 2
    limit = 1e3 * step_bytes(model, rows, length + num / 2) / frame.limits()["read_bytes_s"]
    found: dict[str, Any] = {"limit_ms": limit, "ways_ms": {}}
    usual: Tensor | None = None
    for way in ("usual", *(w for w in ways if w != "usual")):
        release(model)
        torch._dynamo.reset()  # what was compiled otherwise
        try:
            with arranged(way), torch._inductor.config.patch(WAYS[way][1]):
                engine = engine_at(frame, model, rows, P, C)
                logits = logits_of(engine, model, rows, length)
                assert engine.stepper.fast == WAYS[way][0], "it fell back"
                usual = logits if usual is None else usual
                off = float((logits - usual).norm() / usual.norm())
                assert off < 0.05, f"its logits are {off:.2g} off, in relative norm"
                del logits
                taken = frame.time(lambda: steps(engine, model, rows, length, num), repeats=3)  # noqa: B023
            found["ways_ms"][way] = 1e3 * taken.median / num
            if way == "usual":
                found |= made_of(frame, model, engine, rows, length, num)
                found["beginning"] = beginning(frame, model, rows, P)
                report(name, found)
        except Exception as error:  # a way that is not in use may fail
            if way == "usual":
                raise
            found["ways_ms"][way] = f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            engine = None  # type: ignore[assignment]
    release(model)
    torch._dynamo.reset()
    print(f"{name} ms a step by way: {short(found['ways_ms'])}", flush=True)
    return found


def made_of(frame: Frame, model: Any, engine: Engine, rows: int, length: int, num: int) -> dict[str, Any]:
    stand(engine, length)
    intervals = traced(frame, lambda: [engine.stepper(model, rows, engine.capacity, True) for _ in range(num)])
    parts, kernels = split(intervals, num), dict[str, float]()
    for name, begin, end in intervals:
        kernels[name] = kernels.get(name, 0.0) + (end - begin) / num
    for name, row in parts_alone(frame, model, engine, rows, length).items():
        parts.setdefault(name, {}).update(row)
    first = dict(sorted(kernels.items(), key=lambda item: -item[1])[:24])
    return {"traced_ms": sum(part.get("us", 0.0) for part in parts.values()) / 1e3, "parts": parts, "kernels": first}


def beginning(frame: Frame, model: Any, rows: int, P: int) -> dict[str, Any]:
    """A call of one token: the prompts, and all that a call costs once; for siblings of eight each prompt once."""
    found = {}
    for siblings in (1, 8 if rows % 8 == 0 else 2):
        ids, mask = (x[: rows // siblings].repeat_interleave(siblings, 0) for x in prompts(frame, 256, rows, P))
        call = functools.partial(
            generation.generate, model, ids, mask, Sampling(1), stop_ids=(), pad_id=0, generator=None,
            group_size=siblings,
        )  # fmt: skip
        ms = 1e3 * frame.time(call, repeats=3).median
        found[f"groups of {siblings}"] = {
            "ms": ms,
            "traced_us": {k: p["us"] for k, p in split(traced(frame, call), 1).items()},
        }
    return found


def report(name: str, found: dict[str, Any]) -> None:
    taken, limit = found["ways_ms"]["usual"], found["limit_ms"]
    print(
        f"\n{name}: {taken:.3f} ms a step, {found['traced_ms']:.3f} traced, {limit:.3f} by bytes: {limit / taken:.1%}"
    )
    columns = ("us", "launches", "alone", "bytes", "limit")
    print(f"  {'us a step':32}" + "".join(f"{x:>10}" for x in ("traced", *columns[1:])))
    for part, row in found["parts"].items():
        print(f"  {part:32}" + "".join(f"{row[c]:10.1f}" if c in row else " " * 10 for c in columns))
    for kernel, us in list(found["kernels"].items())[:16]:
        print(f"  {us:10.1f} us  {kernel[:100]}")
    for groups, row in found["beginning"].items():
        print(f"  a call of one token, {groups}: {row['ms']:.1f} ms; us traced: {short(row['traced_us'])}")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument(
        "--ways", nargs="+", choices=list(WAYS), help="default: for b256 and b1024, without each of its parts"
    )
    parser.add_argument("--tiny", action="store_true", help="small shapes: does it run")
    asked = parser.parse_args()
    frame, found = Frame(asked.tiny), dict[str, Any]()
    work = Work(frame)
    parts = {name: [f"no {what}" for what in sorted(step.FAST)] for name in ("b256", "b1024")}
    for name in asked.rows:
        found[name] = row_of(frame, work, name, asked.ways or parts.get(name, []))
    print(json.dumps({"environment": environment() | {"tiny": asked.tiny}, "limits": frame.limits(), "rows": found}))


if __name__ == "__main__":
    main()
