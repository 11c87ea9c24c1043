"""Generation on one GPU: correctness first, then each row beside transformers' generate and the bandwidth's limit.

    python benchmarks/gpu/generate.py                    # the whole table, about two minutes on an H200
    python benchmarks/gpu/generate.py --only exact,b256  # some rows
    python benchmarks/gpu/generate.py --tiny             # a smoke test, also on a CPU

Rows: exact (greedy against transformers in float32 for four architectures, log-probs against a re-score), kernel (the
attention and the draw alone, with other settings beside the ones in use), b256 and b1024 (Llama shape, hidden 2048, 16
layers, vocabulary 128256; prompts and responses of 256), ragged (512 rows in 256 places), small (410M, 512 rows, P=112,
C=128: what a training step generates), long (410M, 64 rows, P=150, C=4096). Random bf16 weights. Times of a step
are (a call of C tokens - a call of 1) / (C - 1), so without prefill.
The limit is (weights + cache in use) / (bytes a second read, measured here). A second limit adds up what a step cannot
overlap: its matrix products, timed alone at this batch size, and the cache in use; `arithmetic_limit` takes for each
product its bytes or its arithmetic at the measured rate, whichever lasts longer. `b256` also shows a step with less
(without joint products, without late writes) or with more (combined kernels), and what its kernels take. transformers'
steps are means over 64 tokens, whose cache is shorter on average than ours over 256. The last line is JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, PreTrainedModel, Qwen2Config

import torchbandit.generation as generation
from torchbandit.generation import Generated, Sampling, fuse, generate, release, step

ROWS = ("exact", "kernel", "b256", "b1024", "ragged", "small", "long")
SHAPES: dict[str, dict[str, int]] = {
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 8192, "vocab_size": 128256},
    "410m": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8,
             "intermediate_size": 4096, "vocab_size": 32000},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 128, "vocab_size": 512},
}  # fmt: skip


class Bench:
    """What all rows share: the device, its measured limits, and what was found."""

    def __init__(self, tiny: bool) -> None:
        self.tiny = tiny
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.found: dict[str, Any] = {}
        self.models: dict[str, PreTrainedModel] = {}

    def model(self, name: str) -> PreTrainedModel:
        name = "tiny" if self.tiny else name
        if name not in self.models:
            self.models.clear()  # one at a time
            config = LlamaConfig(**SHAPES[name], max_position_embeddings=8192, tie_word_embeddings=False)
            torch.manual_seed(0)
            with self.device:
                self.models[name] = AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval()
        return self.models[name]

    def seconds(self, call: Callable[[], Any], repeats: int = 1) -> float:
        self.wait()
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        self.wait()
        return (time.perf_counter() - begin) / repeats

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def limits(self) -> None:
        """Bytes a second, read and copied; matrix products of a common size."""
        big = torch.zeros(2**31 if self.cuda else 2**24, dtype=torch.float32, device=self.device)
        other = torch.empty_like(big[: len(big) // 2])
        a = torch.randn(8192 if self.cuda else 256, 8192 if self.cuda else 256, device=self.device).to(self.dtype)
        for _ in range(2):
            read = big.nbytes / self.seconds(lambda: big.sum(), 5)
            copy = 2 * other.nbytes / self.seconds(lambda: other.copy_(big[: len(other)]), 5)
            matmul = 2 * len(a) ** 3 / self.seconds(lambda: a @ a, 20)
        self.read, self.matmul = max(read, copy), matmul
        self.say("limits", read_tb_s=read / 1e12, copy_tb_s=copy / 1e12, matmul_tflop_s=matmul / 1e12)

    def say(self, row: str, **numbers: Any) -> None:
        self.found.setdefault(row, {}).update(numbers)
        shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
        print(f"{row:8} {shown}", flush=True)


def prompts(bench: Bench, model: PreTrainedModel, rows: int, width: int, ragged: bool = False) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (rows, width), generator=gen)
    shortest = torch.randint(0, width * 3 // 4, (rows, 1), generator=gen) if ragged else 0
    mask = (torch.arange(width) >= shortest).expand(rows, width)
    return ids.to(bench.device), mask.to(bench.device)


def ours(
    bench: Bench, model: PreTrainedModel, ids: Tensor, mask: Tensor, T: int, stops: tuple[int, ...] = (), **how: Any
) -> Generated:
    gen = torch.Generator(bench.device).manual_seed(0)
    return generate(model, ids, mask, Sampling(T, **how), stop_ids=stops, pad_id=0, generator=gen)


@torch.no_grad()
def theirs(model: PreTrainedModel, ids: Tensor, mask: Tensor, T: int, **how: Any) -> Tensor:
    """transformers' generate, T tokens exactly."""
    model.generation_config.eos_token_id = None
    settings = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0} | how
    out: Tensor = model.generate(
        ids, attention_mask=mask.long(), max_new_tokens=T, min_new_tokens=T, pad_token_id=0, **settings
    )
    return out[:, ids.shape[1] :]


@torch.no_grad()
def rescore(model: PreTrainedModel, ids: Tensor, mask: Tensor, out: Generated) -> Tensor:
    T = out.tokens.shape[1]
    whole = torch.cat((mask, out.mask), 1)
    logits = model(
        torch.cat((ids, out.tokens), 1), attention_mask=whole.long(),
        position_ids=(whole.cumsum(-1) - 1).clamp_min(0), logits_to_keep=T + 1,
    ).logits[:, :-1]  # fmt: skip
    return logits.float().log_softmax(-1).gather(-1, out.tokens[..., None])[..., 0] * out.mask


def exact(bench: Bench) -> None:
    """Asserted: greedy in float32 says what transformers says, and kept log-probs are those of a re-score."""
    size = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 1000}
    rope = size | {"intermediate_size": 256, "max_position_embeddings": 512}
    configs = (
        LlamaConfig(**rope, num_key_value_heads=2), Qwen2Config(**rope, num_key_value_heads=4), GPTNeoXConfig(**rope),
        GPT2Config(n_embd=128, n_layer=4, n_head=8, n_positions=512, vocab_size=1000),
    )  # fmt: skip
    torch.backends.cuda.matmul.allow_tf32 = False
    rows, T = (12, 24) if bench.tiny else (60, 96)
    for config in configs:
        torch.manual_seed(0)
        with bench.device:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            for weight in model.parameters():
                if weight.dim() > 1:
                    torch.nn.init.normal_(weight, std=0.1)
        ids, mask = prompts(bench, model, rows, 40, ragged=True)
        stops = tuple(range(3, 1000, 97))
        model.generation_config.eos_token_id = None
        hf = model.generate(
            ids, attention_mask=mask.long(), max_new_tokens=T, do_sample=False, pad_token_id=0, eos_token_id=list(stops)
        )[:, 40:]
        hf = torch.nn.functional.pad(hf, (0, T - hf.shape[1]))
        worst = 0.0
        for places in (None, 16 if rows > 16 else 5):
            release(model)
            out = ours(bench, model, ids, mask, T, stops, temperature=0.0, places=places)
            assert torch.equal(out.tokens, hf), f"{type(model).__name__}: greedy differs from transformers"
            drawn = ours(bench, model, ids, mask, T, stops, places=places)
            again = ours(bench, model, ids, mask, T, stops, places=places)
            assert torch.equal(drawn.tokens, again.tokens), "one seed, two outcomes"
            for each in (out, drawn):
                worst = max(worst, (each.log_probs - rescore(model, ids, mask, each)).abs().max().item())
            short = drawn.mask.sum(-1).float().mean().item()
        assert worst < 1e-3, f"{type(model).__name__}: log-probs off by {worst}"
        with torch.no_grad():  # an update in place reaches the recorded step
            for weight in model.parameters():
                weight.mul_(1.05)
        out = ours(bench, model, ids, mask, T, stops)
        worst_after = (out.log_probs - rescore(model, ids, mask, out)).abs().max().item()
        assert worst_after < 1e-3, f"{type(model).__name__}: stale weights, log-probs off by {worst_after}"
        name = type(model).__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        bench.say("exact", **{f"{name}_log_prob_gap": worst, f"{name}_mean_length": short})
        release(model)


def bf16_agreement(bench: Bench, row: str, model: PreTrainedModel) -> None:
    ids, mask = prompts(bench, model, 32, 64, ragged=True)
    T = 16
    out = ours(bench, model, ids, mask, T, temperature=0.0)
    hf = theirs(model, ids, mask, T, do_sample=False, top_k=None, top_p=None, temperature=None)
    same = (out.tokens == hf).float()
    gap = (out.log_probs - rescore(model, ids, mask, out)).abs()
    assert same[:, 0].mean() > 0.8, f"first greedy tokens agree in {same[:, 0].mean():.0%}"
    assert gap.mean() < 0.05, f"log-probs are {gap.mean():.4f} off on average"
    bench.say(row, hf_first_token_agrees=same[:, 0].mean().item(), log_prob_gap=gap.mean().item())


@torch.no_grad()
def kernel(bench: Bench) -> None:
    """Attention and draw alone; settings in use first."""
    if not bench.cuda:
        print("kernel   left out: Triton needs CUDA")
        return
    for n, H, L, used in ((256, 4, 512, 512), (1024, 4, 512, 512), (64, 2, 4288, 2200), (8, 4, 512, 512)):
        attention_alone(bench, 8 if bench.tiny else n, H, L, used)
    for n in (256, 1024):
        draw_alone(bench, n, 5000 if bench.tiny else 128256)


def attention_alone(bench: Bench, n: int, H: int, L: int, used: int) -> None:
    """8 key heads of 64 with H queries each, all lanes `used` keys long."""
    from torchbandit.generation import kernels

    q = torch.randn(n, 8, H, 64, device=bench.device, dtype=bench.dtype)
    keys, values = (torch.randn(n + 1, 8, L, 64, device=bench.device, dtype=bench.dtype) for _ in range(2))
    at = used - 1
    new = (keys[:n, :, at : at + 1].clone(), values[:n, :, at : at + 1].clone())
    lanes = torch.stack((torch.arange(n), torch.full((n,), used - 1)), -1).int().view(n, 1, 1, 2).to(bench.device)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    calls: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: kernels.decode_attention(q, keys, values, lanes, 0.125),
        "ours_with_write": lambda: kernels.decode_attention(q, keys, values, lanes, 0.125, new),
        "sdpa_no_mask": lambda: sdpa(q, keys[:n, :, :used], values[:n, :, :used], scale=0.125),
    }
    for block, warps, stages, splits in ((64, 4, 3, None), (64, 2, 2, None), (32, 1, 6, None), (32, 2, 4, None)):
        how: dict[str, Any] = {"block": block, "warps": warps, "stages": stages, "splits": splits}
        call = functools.partial(kernels.decode_attention, q, keys, values, lanes, 0.125, **how)
        calls[f"b{block}w{warps}s{stages}x{splits or '-'}"] = call
    reference = calls["sdpa_no_mask"]().float()
    shown = {}
    for name, call in calls.items():
        torch.testing.assert_close(call().float(), reference, rtol=2e-2, atol=2e-2)
        shown[name] = round(100 * (2 * n * 8 * used * 64 * 2) / bench.read / replayed(bench, call))
    bench.say("kernel", **{f"attention_n{n}_k{used}_percent_of_read": shown})


def draw_alone(bench: Bench, n: int, V: int) -> None:
    from torchbandit.generation import kernels

    logits = torch.randn(n, V, device=bench.device, dtype=bench.dtype)
    rows, zeros = (torch.arange(n, device=bench.device) * x for x in (1, 0))
    one = torch.ones(1, device=bench.device)
    draw = functools.partial(kernels.draw, logits, rows, zeros, zeros[:1], one)
    micros = {
        "draw": 1e6 * replayed(bench, lambda: draw(greedy=False)),
        "argmax": 1e6 * replayed(bench, lambda: draw(greedy=True)),
        "limit": 1e6 * logits.nbytes / bench.read,
    }
    bench.say("kernel", **{f"draw_n{n}_us": {k: round(v, 1) for k, v in micros.items()}})


def replayed(bench: Bench, call: Callable[[], Any], repeats: int = 50) -> float:
    """Seconds of one call inside a recorded graph of ten: launch costs are not what is asked."""
    call()
    bench.wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            call()
    graph.replay()
    return bench.seconds(graph.replay, max(1, repeats // 10)) / 10


def weight_bytes(model: PreTrainedModel) -> int:
    """Read by a step: all but the input embedding, of which it reads a row a lane."""
    table = model.get_input_embeddings().weight
    return sum(w.nbytes for w in model.parameters()) - table.nbytes


def token_bytes(model: PreTrainedModel) -> int:
    c = model.config
    return (
        2 * c.num_hidden_layers * c.num_key_value_heads * c.hidden_size // c.num_attention_heads * model.dtype.itemsize
    )


@torch.no_grad()
def products(bench: Bench, model: PreTrainedModel, n: int, joint: bool = False) -> float:
    """Seconds of all matrix products of a step at batch n, alone; `joint`: siblings as one, where they lie so."""
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    weights = {id(m): m.weight for m in linears}
    for family in fuse.families(step.decoder_layers(model)) if joint else ():
        whole = fuse.joined([m.weight for m in family.linears])
        if whole is not None:
            weights[id(family.linears[0])] = whole
            for m in family.linears[1:]:
                del weights[id(m)]
    inputs = {m.in_features: torch.randn(n, m.in_features, device=bench.device, dtype=bench.dtype) for m in linears}

    def run() -> None:
        for weight in weights.values():
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    return replayed(bench, run, 50) if bench.cuda else bench.seconds(run)


def arithmetic_limit(bench: Bench, model: PreTrainedModel, n: int) -> float:
    """Seconds of all products if each took its bytes' time or its arithmetic's, whichever is longer."""
    sizes = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)]
    return sum(max(size * model.dtype.itemsize / bench.read, 2 * n * size / bench.matmul) for size in sizes)


def variants(bench: Bench, row: str, model: PreTrainedModel, ids: Tensor, mask: Tensor, C: int) -> None:
    """A step with less and with more than it has, one after another on the same work."""
    shown: dict[str, Any] = {}
    n, length, usual = len(ids), ids.shape[1] + C // 2, step.FAST
    ways: dict[str, frozenset[str]] = {
        "in use": usual, "plain": frozenset(), "products": frozenset({"products"}), "with combo kernels": usual,
    }  # fmt: skip
    for name, fast in ways.items():
        release(model)
        step.FAST = fast
        how: Any = {}
        if "combo" in name:
            torch._dynamo.reset()
            how = {"combo_kernels": True}
        try:
            with torch._inductor.config.patch(how):
                ours(bench, model, ids, mask, C)
            engine = generation._engines[model]
            assert not bench.cuda or engine.stepper.fast == fast, "fell back"
            shown[name] = round(1e3 * step_seconds(bench, model, engine, n, length, C), 3)
        except Exception as error:  # a way that is not in use may fail
            if name == "in use":
                raise
            shown[name] = f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            step.FAST = usual
    release(model)
    torch._dynamo.reset()  # what was compiled with other settings
    bench.say(row, step_ms_by_way=shown)


def profile(bench: Bench, row: str, call: Callable[[], Any], repeats: int = 5) -> None:
    """Microseconds and launches a step, by kernel."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        bench.seconds(call, repeats)
    events = sorted(prof.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events) / repeats
    print(f"{row:8} kernels of a step: {total:.0f} us")
    for e in events[:24]:
        print(f"{'':8} {e.self_device_time_total / repeats:8.1f} us  {e.count / repeats:5.1f} x  {e.key[:110]}")


def fixed(bench: Bench, row: str, rows: int, hf: bool, shape: str = "1b", P: int = 256, C: int = 256) -> None:
    """Every row draws all its tokens."""
    model = bench.model(shape)
    P, C = (P, C) if not bench.tiny else (16, 8)
    rows = rows if not bench.tiny else rows // 16
    bf16_agreement(bench, row, model)
    release(model)
    ids, mask = prompts(bench, model, rows, P)
    first = bench.seconds(lambda: ours(bench, model, ids, mask, C))
    engine = generation._engines[model]
    recorded = engine.stepper.record_s
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    whole = min(bench.seconds(lambda: ours(bench, model, ids, mask, C)) for _ in range(2))
    out = ours(bench, model, ids, mask, C)
    assert out.mask.all() and generation._engines[model] is engine and engine.stepper.record_s == recorded
    one = bench.seconds(lambda: ours(bench, model, ids, mask, 1))
    step_s = (whole - one) / (C - 1)
    used = rows * (P + C / 2) * token_bytes(model)
    limit = (weight_bytes(model) + used) / bench.read
    matrix, joint = products(bench, model, rows), products(bench, model, rows, joint=True)
    arithmetic = arithmetic_limit(bench, model, rows) + used / bench.read
    bench.say(
        row, first_call_s=first, compile_and_record_s=recorded, call_s=whole, prefill_s=one - step_s,
        step_ms=1e3 * step_s, limit_ms=1e3 * limit, percent_of_limit=100 * limit / step_s,
        arithmetic_limit_ms=1e3 * arithmetic, percent_of_arithmetic_limit=100 * arithmetic / step_s,
        fast=sorted(engine.stepper.fast), products_ms=1e3 * matrix, joint_products_ms=1e3 * joint,
        products_and_cache_ms=1e3 * (matrix + used / bench.read),
        percent_of_products_and_cache=100 * (matrix + used / bench.read) / step_s, tokens_per_s=rows * C / whole,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if bench.cuda else 0.0,
    )  # fmt: skip
    if bench.cuda:
        step_seconds(bench, model, engine, rows, P + C // 2, C)  # lanes set up, and with most of their tokens to come
        profile(bench, row, functools.partial(engine.stepper, model, rows, P + C, True))
    if hf:
        release(model)
        for name, how in (("dynamic", {}), ("static", {"cache_implementation": "static"})):
            T = min(C, 64)
            # The first call of a length compiles, where anything does.
            begin = bench.seconds(lambda h=how, t=T: theirs(model, ids, mask, t, **h))
            again = bench.seconds(lambda h=how, t=T: theirs(model, ids, mask, t, **h))
            prefill = bench.seconds(lambda h=how: theirs(model, ids, mask, 1, **h))
            each = (again - prefill) / (T - 1)
            bench.say(
                row, **{f"hf_{name}_step_ms": 1e3 * each, f"hf_{name}_first_s": begin, f"ratio_{name}": each / step_s}
            )
        variants(bench, row, model, ids, mask, C)


def ragged(bench: Bench) -> None:
    """More rows than places, and rows that stop by chance: so many stop ids that a token stops with chance 1/200."""
    model = bench.model("1b")
    rows, places, P, T, mean = (512, 256, 256, 1024, 200) if not bench.tiny else (24, 8, 16, 40, 10)
    release(model)
    ids, mask = prompts(bench, model, rows, P)
    stops = tuple(range(7, model.config.vocab_size, mean))
    run = lambda: ours(bench, model, ids, mask, T, stops, places=places)
    first = bench.seconds(run)
    engine = generation._engines[model]
    recorded = engine.stepper.record_s
    taken = min(bench.seconds(run) for _ in range(2))
    out = run()
    steps = list(engine.steps)
    assert out.finished.float().mean() > 0.9
    lengths = out.mask.sum(-1)
    gap = (out.log_probs[:16] - rescore(model, ids[:16], mask[:16], Generated(*(x[:16] for x in out)))).abs()
    assert gap.mean() < 0.05, f"log-probs are {gap.mean():.4f} off on average"
    # What a step costs at each batch size, with its lanes at the mean length.
    sizes = sorted({*steps})
    costs = {n: step_seconds(bench, model, engine, n, P + int(lengths.float().mean()) // 2, T) for n in sizes}
    prefill = bench.seconds(lambda: ours(bench, model, ids[:places], mask[:places], 1)) * rows / places
    perfect = sum(between(costs, n) for n in perfect_batches(lengths.tolist(), places))
    bench.say(
        "ragged", mean_length=lengths.float().mean().item(), longest=int(lengths.max()), steps=len(steps),
        lanes_used=lengths.sum().item() / sum(steps), first_call_s=first, compile_and_record_s=recorded, call_s=taken,
        prefill_s=prefill, perfect_steps_s=perfect, over_perfect=taken / (perfect + prefill),
        over_perfect_without_prefill=(taken - prefill) / perfect, tokens_per_s=lengths.sum().item() / taken,
        step_ms={n: round(1e3 * s, 2) for n, s in costs.items()}, log_prob_gap=gap.mean().item(),
    )  # fmt: skip


def perfect_batches(lengths: list[int], places: int) -> list[int]:
    """The batch size of each step if rows, in order, took a freed place at once and none idled."""
    left, running, batches = list(reversed(lengths)), [], []
    while left or running:
        while left and len(running) < places:
            running.append(left.pop())
        batches.append(len(running))
        running = [n - 1 for n in running if n > 1]
    return batches


def between(costs: dict[int, float], n: int) -> float:
    """Cost at batch n: on the line between the two measured sizes around it."""
    sizes = sorted(costs)
    if n <= sizes[0]:
        return costs[sizes[0]]
    low = max(s for s in sizes if s <= n)
    high = min((s for s in sizes if s >= n), default=low)
    share = 0.0 if high == low else (n - low) / (high - low)
    return costs[low] + share * (costs[high] - costs[low])


@torch.no_grad()
def step_seconds(bench: Bench, model: PreTrainedModel, engine: Any, n: int, length: int, T: int) -> float:
    lanes = engine.lanes
    lanes.begin(T, ())
    lanes.active.fill_(True)
    lanes.length.fill_(length)
    lanes.count.zero_()
    call = lambda: engine.stepper(model, n, length + 40, True)
    call()
    return bench.seconds(call, 20)


def long(bench: Bench) -> None:
    """Few rows, long responses."""
    model = bench.model("410m")
    rows, P, C = (64, 150, 4096) if not bench.tiny else (4, 10, 40)
    release(model)
    ids, mask = prompts(bench, model, rows, P)
    before = torch.cuda.memory_allocated() if bench.cuda else 0
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    first = bench.seconds(lambda: ours(bench, model, ids, mask, C))
    recorded = generation._engines[model].stepper.record_s
    peak = torch.cuda.max_memory_allocated() if bench.cuda else 0
    one = bench.seconds(lambda: ours(bench, model, ids, mask, 1))
    whole = first - recorded  # 4096 steps need no second call to be told apart from what comes once
    step_s = (whole - one) / (C - 1)
    used = rows * (P + C / 2) * token_bytes(model)
    limit = (weight_bytes(model) + used) / bench.read
    matrix = products(bench, model, rows)
    cache = (rows + 1) * (-(-(P + C) // 64) * 64) * token_bytes(model)
    bench.say(
        "long", first_call_s=first, compile_and_record_s=recorded, call_s=whole, step_ms=1e3 * step_s,
        limit_ms=1e3 * limit, percent_of_limit=100 * limit / step_s, products_ms=1e3 * matrix,
        percent_of_products_and_cache=100 * (matrix + used / bench.read) / step_s, cache_gib=cache / 2**30,
        peak_over_weights_gib=(peak - before) / 2**30, tokens_per_s=rows * C / whole,
    )  # fmt: skip
    release(model)
    T = min(C, 32)
    theirs(model, ids, mask, 2)
    each = (bench.seconds(lambda: theirs(model, ids, mask, T)) - bench.seconds(lambda: theirs(model, ids, mask, 1))) / (
        T - 1
    )
    bench.say("long", hf_dynamic_step_ms_of_its_first_32=1e3 * each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(ROWS), help="rows, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="small shapes: does it run")
    parser.add_argument("--no-hf", action="store_true", help="leave transformers' generate out of the times")
    asked = parser.parse_args()
    rows = asked.only.split(",")
    if unknown := set(rows) - set(ROWS):
        parser.error(f"unknown rows {sorted(unknown)}; there are {', '.join(ROWS)}")
    bench = Bench(asked.tiny)
    card = torch.cuda.get_device_name() if bench.cuda else "CPU"
    bench.found["environment"] = {"device": card, "torch": torch.__version__, "tiny": asked.tiny}
    print(bench.found["environment"])
    bench.limits()
    run: dict[str, Callable[[], None]] = {
        "exact": lambda: exact(bench), "kernel": lambda: kernel(bench), "ragged": lambda: ragged(bench),
        "b256": lambda: fixed(bench, "b256", 256, not asked.no_hf), "b1024": lambda: fixed(bench, "b1024", 1024, False),
        "small": lambda: fixed(bench, "small", 512, False, "410m", 112, 128), "long": lambda: long(bench),
    }  # fmt: skip
    for row in ROWS:
        if row in rows:
            took = bench.seconds(run[row])
            print(f"{row:8} done in {took:.0f} s", flush=True)
    print(json.dumps(bench.found))


if __name__ == "__main__":
    main()
