"""Packed scoring and learning on a CPU, beside `packing=False`: seconds and peak memory of log-probs.

    python benchmarks/cpu_packing.py --threads 1
    python benchmarks/cpu_packing.py --threads 2 --layers 30 --vocab-size 49152     # the shape of a 135M model
    python benchmarks/cpu_packing.py --lengths 9000,30,30,30 --packed-only

Random weights, 33M of them unless told otherwise; a row is half prompt, half response, but for groups of 8, whose
prompt is shared. Seconds are the least of `--repeat` calls, the sides in turn: by one thread its own, by several the
clock's. Peak memory is what torch allocates within a call.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from torchbandit.bench.memory import peak_bytes
from torchbandit.scoring import log_probs, make_plan, prepare

Args = tuple[Tensor, Tensor, Tensor, Tensor]
GROUP = 8


def lognormal(num: int, median: float, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [max(4, min(1024, round(median * draw.lognormvariate(0, 0.8)))) for _ in range(num)]


MIXED = lognormal(32, 100, 0)
ROWS = {
    "1 x 1024": [1024],
    "1 x 1024 + 15 x 30": [1024] + [30] * 15,
    "8 x 512": [512] * 8,
    "16 x 60": [60] * 16,
    "32 of mixed lengths": MIXED,
}
GROUPS = {  # prompts, responses
    "4 groups of 8, prompts of 256, responses of 64": ([256] * 4, [64] * 32),
    "4 groups of 8, mixed lengths": (lognormal(4, 150, 1), lognormal(32, 60, 2)),
}


def batch(prompts: list[int], replies: list[int], vocab_size: int) -> Args:
    """Prompts padded left, responses right; those of a group are one prompt."""
    gen, group = torch.Generator().manual_seed(0), len(replies) // len(prompts)
    ids = [torch.randint(vocab_size, (len(n), max(n)), generator=gen) for n in (prompts, replies)]
    prompt = torch.arange(max(prompts)) >= max(prompts) - torch.tensor(prompts)[:, None]
    reply = torch.arange(max(replies)) < torch.tensor(replies)[:, None]
    return ids[0].repeat_interleave(group, 0), prompt.repeat_interleave(group, 0), ids[1], reply


def seconds(calls: list[Callable[[], object]], repeat: int) -> list[float]:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = [float("inf")] * len(calls)
    for _ in range(repeat):
        for i, call in enumerate(calls):
            start = clock()
            call()
            best[i] = min(best[i], clock() - start)
    return best


def measure(name: str, model: LlamaForCausalLM, args: Args, group_size: int, ways: list[bool], repeat: int) -> None:
    def call(packing: bool, learn: bool) -> Callable[[], None]:
        def run() -> None:
            plan = make_plan(args[1], args[3], packing=packing, group_size=group_size)
            with torch.set_grad_enabled(learn):
                found = log_probs(model, *args, plan=plan)
                if learn:
                    found.sum().backward()
                    model.zero_grad()

        return run

    for what, learn in (("forward", False), ("forward + backward", True)):
        calls = [call(packing, learn) for packing in ways]
        peaks = [peak_bytes(run, torch.device("cpu")) / 1e6 for run in calls]
        took = seconds(calls, repeat)
        ratio = f" | {took[1] / took[0]:.2f} x" if len(ways) == 2 else ""
        cells = " | ".join(f"{s:.2f} s | {mb:.0f} MB" for s, mb in zip(took, peaks, strict=True))
        print(f"| {name} | {what} | {cells}{ratio} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--lengths", help="rows of these lengths alone")
    parser.add_argument("--packed-only", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=options.layers, num_attention_heads=9,
                    num_key_value_heads=3, vocab_size=options.vocab_size, max_position_embeddings=16384,
                    tie_word_embeddings=True)
    ).eval()  # fmt: skip
    prepare(model)
    ways = [True] if options.packed_only else [True, False]
    print(f"| rows | | packed | peak |{'' if options.packed_only else ' padded | peak | packed is |'}")
    rows = ROWS
    if options.lengths:
        rows = {options.lengths: [int(n) for n in options.lengths.split(",")]}
    for name, lengths in rows.items():
        halves = [n // 2 for n in lengths]
        args = batch(halves, [n - h for n, h in zip(lengths, halves, strict=True)], options.vocab_size)
        measure(name, model, args, 1, ways, options.repeat)
    for name, (prompts, replies) in GROUPS.items() if not options.lengths else ():
        measure(name, model, batch(prompts, replies, options.vocab_size), GROUP, ways, options.repeat)


if __name__ == "__main__":
    main()
