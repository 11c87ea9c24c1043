"""`torchbandit bench generate`: the decode loop beside transformers' generate and the bandwidth's limit.

Rows: exact (asserted: greedy says what transformers says in float32, for four architectures), b256, b1024 (1B shape,
prompts and responses of 256), small (410M, 512 rows: what a training step generates), ragged (512 rows in 256 places),
long (410M, 64 rows, 4096 tokens). Rates are of decoding, without the prefill: tokens after the first over (a call of C
tokens less a call of 1). The limit of a step is (weights + cache in use) / (bytes a second read). What a step is made
of, kernel by kernel, is asked by benchmarks/gpu/generate.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen2Config

from torchbandit.bench.frame import Frame, Line, Peer, Times
from torchbandit.bench.models import llama
from torchbandit.generation import Generated, Sampling, generate, record_s, release

ROWS = ("exact", "b256", "b1024", "small", "ragged", "long")


def run(frame: Frame) -> None:
    if not frame.cuda and not frame.tiny:
        frame.leave_out("generate", "no CUDA device; --tiny shows that it runs")
        return
    work = Work(frame)
    calls: dict[str, Callable[[], None]] = {
        "exact": lambda: exact(frame),
        "b256": lambda: fixed(work, "1b", 256, 256, 256, peers=True),
        "b1024": lambda: fixed(work, "1b", 1024, 256, 256),
        "small": lambda: fixed(work, "410m", 512, 112, 128),
        "ragged": lambda: ragged(work),
        "long": lambda: fixed(work, "410m", 64, 150, 4096, peers=True, once=True),
    }
    for name in frame.chosen(ROWS):
        calls[name]()


class Work:
    """One model at a time, and calls on it."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.name = ""
        self.model: Any = None

    def use(self, shape: str) -> Any:
        if self.name != shape:
            self.model, self.name = None, shape  # one at a time
            torch.manual_seed(0)
            with self.frame.device:
                config = llama("tiny" if self.frame.tiny else shape)
                self.model = AutoModelForCausalLM.from_config(config, dtype=self.frame.dtype).eval()
        release(self.model)
        return self.model


def prompts(frame: Frame, vocabulary: int, rows: int, width: int, ragged: bool = False) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (rows, width), generator=gen)
    shortest = torch.randint(0, width * 3 // 4, (rows, 1), generator=gen) if ragged else torch.zeros(rows, 1)
    return ids.to(frame.device), (torch.arange(width) >= shortest).to(frame.device)


def ours(model: Any, ids: Tensor, mask: Tensor, T: int, stops: Sequence[int] = (), **how: Any) -> Generated:
    gen = torch.Generator(ids.device).manual_seed(0)
    return generate(model, ids, mask, Sampling(T, **how), stop_ids=tuple(stops), pad_id=0, generator=gen)


@torch.no_grad()
def theirs(model: Any, ids: Tensor, mask: Tensor, T: int, stops: Sequence[int] = (), **how: Any) -> Tensor:
    """transformers' generate; T tokens exactly where nothing stops."""
    model.generation_config.eos_token_id = list(stops) or None
    settings: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0} | how
    if not stops:
        settings["min_new_tokens"] = T
    out: Tensor = model.generate(ids, attention_mask=mask.long(), max_new_tokens=T, pad_token_id=0, **settings)
    return torch.nn.functional.pad(out[:, ids.shape[1] :], (0, T - (out.shape[1] - ids.shape[1])))


GREEDY: dict[str, Any] = {"do_sample": False, "top_k": None, "top_p": None, "temperature": None}


@torch.no_grad()
def log_prob_gap(model: Any, ids: Tensor, mask: Tensor, out: Generated) -> Tensor:
    """How far the kept log-probs are from those of one forward pass of transformers."""
    whole = torch.cat((mask, out.mask), 1)
    logits = model(
        torch.cat((ids, out.tokens), 1), attention_mask=whole.long(),
        position_ids=(whole.cumsum(-1) - 1).clamp_min(0), logits_to_keep=out.tokens.shape[1] + 1,
    ).logits[:, :-1]  # fmt: skip
    exact = logits.float().log_softmax(-1).gather(-1, out.tokens[..., None])[..., 0]
    gap: Tensor = ((out.log_probs - exact) * out.mask).abs()
    return gap


def exact(frame: Frame) -> None:
    """Asserted, not timed."""
    size: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 1000}
    rope = size | {"intermediate_size": 256, "max_position_embeddings": 512}
    configs = (
        LlamaConfig(**rope, num_key_value_heads=2), Qwen2Config(**rope, num_key_value_heads=4), GPTNeoXConfig(**rope),
        GPT2Config(n_embd=128, n_layer=4, n_head=8, n_positions=512, vocab_size=1000),
    )  # fmt: skip
    rows, T = (8, 12) if frame.tiny else (60, 96)
    stops = tuple(range(3, 1000, 97))
    told = []
    for config in configs:
        torch.manual_seed(0)
        with frame.device:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            for weight in model.parameters():
                if weight.dim() > 1:
                    torch.nn.init.normal_(weight, std=0.1)
        ids, mask = prompts(frame, 1000, rows, 40, ragged=True)
        want = theirs(model, ids, mask, T, stops, **GREEDY)
        name = type(model).__name__
        for places in (None, rows // 3):
            release(model)
            greedy = ours(model, ids, mask, T, stops, temperature=0.0, places=places)
            assert torch.equal(greedy.tokens, want), f"{name}: greedy differs from transformers"
            for made in (greedy, ours(model, ids, mask, T, stops, places=places)):
                gap = float(log_prob_gap(model, ids, mask, made).max())
                assert gap < 1e-3, f"{name}: log-probs are {gap} off"
        told.append(name)
        release(model)
    print(f"generate exact: greedy and log-probs as transformers' in float32 for {', '.join(told)}", flush=True)


def check_bf16(frame: Frame, model: Any) -> None:
    """16-bit rounding may change a token, seldom the first one."""
    ids, mask = prompts(frame, model.config.vocab_size, 32, 64, ragged=True)
    out = ours(model, ids, mask, 16, temperature=0.0)
    same = float((out.tokens == theirs(model, ids, mask, 16, **GREEDY))[:, 0].float().mean())
    gap = float(log_prob_gap(model, ids, mask, out).mean())
    assert same > 0.8, f"first greedy tokens agree with transformers' in {same:.0%} of the rows"
    assert gap < 0.05, f"log-probs are {gap:.4f} off on average"
    release(model)


def step_bytes(model: Any, rows: int, length: float) -> float:
    """Read by a step: all weights but the input embedding, and the cache of `length` tokens a row."""
    c = model.config
    weights = sum(w.nbytes for w in model.parameters()) - model.get_input_embeddings().weight.nbytes
    token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.hidden_size // c.num_attention_heads
    return float(weights + rows * length * token * model.dtype.itemsize)


def fixed(work: Work, shape: str, rows: int, P: int, C: int, *, peers: bool = False, once: bool = False) -> None:
    """Every row draws all its tokens."""
    frame, model = work.frame, work.use(shape)
    if frame.tiny:
        rows, P, C = max(rows // 32, 4), 16, 12
    check_bf16(frame, model)
    ids, mask = prompts(frame, model.config.vocab_size, rows, P)
    peaks: list[float] = []
    first = frame.time(lambda: peaks.append(frame.peak_gb(lambda: ours(model, ids, mask, C))), repeats=1, warm=0).median
    compiled = record_s(model)
    if once:  # thousands of steps need no second call to be told apart from what comes once
        took = Times(*[first - compiled] * 3)
    else:
        took = frame.time(lambda: ours(model, ids, mask, C), repeats=3, warm=0)
    one = frame.time(lambda: ours(model, ids, mask, 1), repeats=3).median
    assert bool(ours(model, ids, mask, min(C, 64)).mask.all()), "a row stopped where nothing stops"
    step = Times(*((seconds - one) / (C - 1) for seconds in took))
    read = step_bytes(model, rows, P + C / 2)
    limit, by_copy = (read / frame.limits()[rate] for rate in ("read_bytes_s", "copy_bytes_s"))
    line = Line(
        "generate", f"{shape}, {rows} rows, prompts of {P}, {C} new tokens", rows / step.median, "tokens/s",
        rows / step.high, rows / step.low, percent=100 * limit / step.median, ceiling="the read bandwidth",
        peak_gb=peaks[0], host_syncs=frame.host_syncs(lambda: ours(model, ids, mask, min(C, 256))),
    )  # fmt: skip
    assert record_s(model) == compiled, "a step was recorded twice"
    line.more = {
        "ms a step": 1e3 * step.median, "limit, ms a step": 1e3 * limit,
        "% of the copy bandwidth": 100 * by_copy / step.median, "whole call, s": took.median,
        "first call, s": first, "of which compiling and recording, s": compiled,
        "tokens/s of the whole call": rows * C / took.median,
    }  # fmt: skip
    release(model)
    if peers:
        add_peers(frame, line, model, rows, P, C)
    frame.add(line)


def add_peers(frame: Frame, line: Line, model: Any, rows: int, P: int, C: int) -> None:
    """transformers' generate over a few tokens in the middle, where a row has its mean length."""
    T = min(C, 64)
    ids, mask = prompts(frame, model.config.vocab_size, rows, P + (C - T) // 2)
    for cache in frame.setting("generate", "caches"):
        how = {} if cache == "dynamic" else {"cache_implementation": cache}
        many, alone = (
            frame.time(functools.partial(theirs, model, ids, mask, tokens, **how), repeats=1).median
            for tokens in (T, 1)
        )
        rate = rows * (T - 1) / (many - alone)
        line.peers.append(Peer(f"transformers' generate, {cache} cache", rate, line.rate / rate))
    if T < C:
        line.notes.append(
            f"the peers' rates are of {T} tokens after prompts of {ids.shape[1]}: as long a cache as ours on average"
        )


def ragged(work: Work) -> None:
    """More rows than places, and rows that stop by chance: a token of so many stops one with chance 1/200."""
    frame, model = work.frame, work.use("1b")
    rows, places, P, T, mean = (24, 8, 16, 40, 10) if frame.tiny else (512, 256, 256, 1024, 200)
    ids, mask = prompts(frame, model.config.vocab_size, rows, P)
    stops = tuple(range(7, model.config.vocab_size, mean))
    made = ours(model, ids, mask, T, stops, places=places)
    assert float(made.finished.float().mean()) > 0.9
    lengths = made.mask.sum(-1)
    call = functools.partial(ours, model, ids, mask, T, stops, places=places)
    took = frame.time(call, repeats=3, warm=1)
    # What a step costs at each batch size: calls in which every row draws as many tokens as one does here on average.
    draws, costs, sizes = max(int(lengths.float().mean()) // 2, 4), {}, [places]
    while sizes[-1] > places // 16 and sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    prefill = frame.time(lambda: ours(model, ids[:places], mask[:places], 1)).median * rows / places
    for n in sizes:
        whole, one = (
            frame.time(functools.partial(ours, model, ids[:n], mask[:n], T, places=places), repeats=3).median
            for T in (draws, 1)
        )
        costs[n] = (whole - one) / (draws - 1)
    perfect = sum(between(costs, n) for n in perfect_batches(lengths.tolist(), places))
    tokens = int(lengths.sum())
    line = Line(
        "generate", f"1b, ragged, {rows} rows in {places} places, prompts of {P}", tokens / took.median, "tokens/s",
        tokens / took.high, tokens / took.low, percent=100 * (perfect + prefill) / took.median,
        ceiling="perfect compaction by the same steps' costs",
        peak_gb=frame.peak_gb(call), host_syncs=frame.host_syncs(call),
        more={"mean length": float(lengths.float().mean()), "longest": int(lengths.max()),
              "over perfect compaction": took.median / (perfect + prefill),
              "ms a step by rows": {n: round(1e3 * s, 3) for n, s in costs.items()}},
    )  # fmt: skip
    line.notes.append("no peer: transformers' generate has no places, and keeps a finished row until the last one ends")
    frame.add(line)


def perfect_batches(lengths: list[int], places: int) -> list[int]:
    """The batch size of each step if rows, in order, took a freed place at once and none idled."""
    left, running = list(reversed(lengths)), list[int]()
    batches = []
    while left or running:
        while left and len(running) < places:
            running.append(left.pop())
        batches.append(len(running))
        running = [n - 1 for n in running if n > 1]
    return batches


def between(costs: dict[int, float], n: int) -> float:
    """Cost at batch n, on the line between the two measured sizes around it; below the smallest, that of it."""
    low = max((size for size in costs if size <= n), default=min(costs))
    high = min((size for size in costs if size >= n), default=low)
    share = 0.0 if high <= low else (n - low) / (high - low)
    return costs[low] + share * (costs[max(high, low)] - costs[low])
