"""Scoring on one GPU: each row beside its baselines, correctness first, then time, ceilings in the same run.

    python benchmarks/gpu/score.py                      # the whole table, under four minutes on an H200
    python benchmarks/gpu/score.py --only rm,groups     # some rows
    python benchmarks/gpu/score.py --tiny               # a smoke test on the CPU

Work, after SPEED.md: 512 rows, prompt lengths exp(N(4.8, 0.6)) in 16..512, response lengths exp(N(5.3, 0.8)) in
8..1024, random bf16 weights. Baselines are transformers with SDPA: padded right in arrival order, and sorted by length.
A row that fails its comparison with float32 stops the run. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from torchbandit.scoring import log_probs, make_plan, sequence_scores

ROWS = ("rm", "rm7b", "ref", "grad", "groups", "flat", "quant")
SHAPES = {
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 8192, "vocab_size": 128256},
    "410m": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8,
             "intermediate_size": 4096, "vocab_size": 32000},
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
           "intermediate_size": 11008, "vocab_size": 32000},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 128, "vocab_size": 512},
}  # fmt: skip
Args = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass
class Run:
    """What all rows share."""

    device: torch.device
    dtype: torch.dtype
    tiny: bool
    profile: bool = False
    matmul: float = 0.0
    copy: float = 0.0

    def shape(self, name: str) -> dict[str, int]:
        return SHAPES["tiny" if self.tiny else name]

    def rows(self, n: int) -> int:
        return min(n, 16) if self.tiny else n

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self, work: Callable[[], Any], repeats: int = 3, warm: int = 1) -> float:
        """Median seconds, after `warm` calls that are not counted."""
        for _ in range(warm):
            work()
        taken = []
        for _ in range(1 if self.tiny else repeats):
            self.sync()
            begin = time.perf_counter()
            work()
            self.sync()
            taken.append(time.perf_counter() - begin)
        return sorted(taken)[len(taken) // 2]

    def peak(self, work: Callable[[], Any]) -> float:
        """GB above what was allocated before."""
        if self.device.type != "cuda":
            work()
            return 0.0
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e9


def build(run: Run, shape: str, kind: type[PreTrainedModel], compile: bool, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(**run.shape(shape), max_position_embeddings=8192, pad_token_id=0, num_labels=1)
    config._attn_implementation = "sdpa"
    with torch.device(run.device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(run.dtype)
        try:
            model = kind(config)
        finally:
            torch.set_default_dtype(default)
    model.torchbandit_compile = compile
    return model.eval().requires_grad_(False)


def ragged(run: Run, num: int, group_size: int = 1, prompt: int | None = None, reply: int | None = None) -> Args:
    """Left-padded prompts and right-padded responses; fixed lengths where they are given."""
    gen = torch.Generator().manual_seed(0)

    def lengths(n: int, mean: float, std: float, low: int, high: int, fixed: int | None) -> Tensor:
        if fixed is not None:
            return torch.full((n,), min(fixed, 24) if run.tiny else fixed)
        drawn = (torch.randn(n, generator=gen) * std + mean).exp().long().clamp(low, high)
        return (drawn // 16).clamp(min=1) if run.tiny else drawn

    p = lengths(num // group_size, 4.8, 0.6, 16, 512, prompt).repeat_interleave(group_size)
    r = lengths(num, 5.3, 0.8, 8, 1024, reply)
    vocab = run.shape("1b")["vocab_size"] if run.tiny else 32000
    prompts = torch.randint(1, vocab, (num // group_size, int(p.max())), generator=gen).repeat_interleave(group_size, 0)
    replies = torch.randint(1, vocab, (num, int(r.max())), generator=gen)
    tensors = (
        prompts, torch.arange(prompts.shape[1]) >= (prompts.shape[1] - p)[:, None],
        replies, torch.arange(replies.shape[1]) < r[:, None],
    )  # fmt: skip
    return tuple(x.to(run.device) for x in tensors)  # type: ignore[return-value]


def tokens_of(args: Args) -> int:
    return int(args[1].sum() + args[3].sum())


def flops(model: PreTrainedModel, args: Args, head_tokens: int = 0) -> float:
    """Of a forward pass: two a weight and token in the layers, attention, and the head where it is asked for."""
    body = sum(p.numel() for layer in model.base_model.layers for p in layer.parameters())
    lengths = (args[1].sum(1) + args[3].sum(1)).double()
    config = model.config
    attention = float((lengths**2).sum()) * 2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return 2.0 * body * tokens_of(args) + attention + 2.0 * head_tokens * config.hidden_size * config.vocab_size


def unpadded(args: Args, row: int) -> Tensor:
    return torch.cat((args[0][row][args[1][row]], args[2][row][args[3][row]]))


class Padded:
    """transformers as people call it: right-padded microbatches with an attention mask, trimmed to their longest."""

    def __init__(self, args: Args, sort: bool, micro_batch: int) -> None:
        lengths = (args[1].sum(1) + args[3].sum(1)).tolist()
        order = sorted(range(len(lengths)), key=lengths.__getitem__) if sort else list(range(len(lengths)))
        self.batches = []
        for begin in range(0, len(order), micro_batch):
            rows = order[begin : begin + micro_batch]
            lines = [unpadded(args, row) for row in rows]
            ids = nn.utils.rnn.pad_sequence(lines, batch_first=True)
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in lines], batch_first=True)
            starts = torch.tensor([int(args[1][row].sum()) for row in rows], device=ids.device)
            ends = torch.tensor([len(x) for x in lines], device=ids.device)
            self.batches.append((rows, ids, mask, starts, ends))

    def scores(self, model: PreTrainedModel) -> Tensor:
        out = torch.empty(sum(len(b[0]) for b in self.batches), device=self.batches[0][1].device)
        for rows, ids, mask, _, _ in self.batches:
            out[rows] = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].float()
        return out

    def log_probs(self, model: PreTrainedModel, backward: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Full logits, float32 log-softmax a row; [B] sums over responses."""
        out = torch.empty(sum(len(b[0]) for b in self.batches), device=self.batches[0][1].device)
        for rows, ids, mask, starts, ends in self.batches:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            at = torch.arange(ids.shape[1] - 1, device=ids.device)
            real = (at >= starts[:, None] - 1) & (at < ends[:, None] - 1)
            logps = torch.stack([
                row.float().log_softmax(-1).gather(1, target[:, None]).squeeze(1)
                for row, target in zip(logits[:, :-1], ids[:, 1:], strict=True)
            ])  # fmt: skip
            total = torch.where(real, logps, 0.0).sum(1)
            if backward is not None:
                backward(total)
            out[rows] = total.detach()
        return out


def check(name: str, got: Tensor, want: Tensor, reference: Tensor | None) -> dict[str, float]:
    """`got` may be no further from float32 `reference` than twice what the padded baseline `want` is, and 10%.

    Without a reference the two 16-bit results are compared with each other. Distances are root mean squares, in
    standard deviations over the rows.
    """
    exact = want if reference is None else reference
    scale = exact.float().std() + 1e-6
    ours, theirs = (float((x.float() - exact.float()).square().mean().sqrt() / scale) for x in (got, want))
    if not ours <= 2 * theirs + (0.3 if reference is None else 0.1):
        raise SystemExit(f"{name}: off by {ours:.3g} std from the reference, where the baseline is off by {theirs:.3g}")
    return {"error_std": round(ours, 5), "baseline_error_std": round(theirs, 5)}


def exact_scores(model: PreTrainedModel, args: Args, rows: list[int]) -> Tensor:
    """A float32 copy of the model, one row at a time, unpadded."""
    exact = _float32(model)
    with torch.no_grad():
        return torch.stack([exact(unpadded(args, row)[None]).logits[0, 0] for row in rows])


def exact_log_probs(model: PreTrainedModel, args: Args, rows: list[int]) -> Tensor:
    exact, out = _float32(model), []
    with torch.no_grad():
        for row in rows:
            ids, start = unpadded(args, row), int(args[1][row].sum())
            logits = exact(ids[None], logits_to_keep=len(ids) - start + 1).logits[0, :-1]
            out.append(logits.log_softmax(-1).gather(1, ids[start:, None]).sum())
    return torch.stack(out)


def _float32(model: PreTrainedModel) -> PreTrainedModel:
    import copy

    compile, model.torchbandit_compile = model.torchbandit_compile, False
    exact = copy.deepcopy(model).float()
    model.torchbandit_compile = compile
    return exact


def ceilings(run: Run) -> None:
    n = 256 if run.tiny else 8192
    a, b = (torch.randn(n, n, device=run.device, dtype=run.dtype) for _ in range(2))
    seconds = run.time(lambda: [a @ b for _ in range(10)], repeats=5, warm=2) / 10
    run.matmul = 2 * n**3 / seconds
    big = torch.empty(1 << (20 if run.tiny else 31), device=run.device, dtype=torch.uint8)
    target = torch.empty_like(big)
    run.copy = 2 * big.numel() / run.time(lambda: target.copy_(big), repeats=5)


# --- rows ------------------------------------------------------------------------------------------------------------


def rm_row(run: Run, shape: str = "1b", num: int = 512, arrival: bool = True) -> dict[str, Any]:
    args = ragged(run, run.rows(num))
    model = build(run, shape, LlamaForSequenceClassification, compile=False)
    some = list(range(0, run.rows(num), max(run.rows(num) // 8, 1)))
    plan = make_plan(args[1], args[3])
    with torch.no_grad():
        ordered, arriving = Padded(args, True, 32), Padded(args, False, 32)
        base = ordered.scores(model)
        exact = exact_scores(model, args, some) if shape != "7b" else None
        eager = sequence_scores(model, *args, plan=plan)
        out = check("rm eager", eager[some], base[some], exact)
        row: dict[str, Any] = {"tokens": tokens_of(args), **out}
        if arrival:
            row["hf_arrival_tok_s"] = tokens_of(args) / run.time(lambda: arriving.scores(model), 2)
        row["hf_sorted_tok_s"] = tokens_of(args) / run.time(lambda: ordered.scores(model))
        row["eager_tok_s"] = tokens_of(args) / run.time(lambda: sequence_scores(model, *args, plan=plan))
        model.torchbandit_compile = True
        row["compile_s"] = _once(run, lambda: sequence_scores(model, *args, plan=plan))
        check("rm compiled", sequence_scores(model, *args, plan=plan)[some], base[some], exact)
        seconds = run.time(lambda: sequence_scores(model, *args, plan=make_plan(args[1], args[3])), 5)
        if run.profile:
            profile(run, lambda: sequence_scores(model, *args, plan=plan))
    row["compiled_tok_s"] = tokens_of(args) / seconds
    row["tflops"] = flops(model, args) / seconds / 1e12
    row["of_ceiling"] = flops(model, args) / seconds / run.matmul
    row["of_ceiling_linear"] = 2 * sum(p.numel() for p in model.base_model.layers.parameters()) * tokens_of(args) / (
        seconds * run.matmul)  # fmt: skip
    row["over_sorted"] = row["compiled_tok_s"] / row["hf_sorted_tok_s"]
    if arrival:
        row["over_arrival"] = row["compiled_tok_s"] / row["hf_arrival_tok_s"]
    return row


def profile(run: Run, work: Callable[[], Any], limit: int = 12) -> None:
    """Print the kernels that one call spends its time in, and what part of it none runs."""
    if run.device.type != "cuda":
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        seconds = _once(run, work)
    kernels = sorted(trace.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in kernels) / 1e6
    print(f"  {seconds * 1e3:.0f} ms, of which kernels {total * 1e3:.0f} ms:")
    for event in kernels[:limit]:
        share = event.self_device_time_total / 1e6 / total
        print(f"    {share:6.1%} {event.count:6} x {event.key[:100]}")


def _once(run: Run, work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    run.sync()
    return time.perf_counter() - begin


def rm7b_row(run: Run) -> dict[str, Any]:
    return rm_row(run, "7b", 256, arrival=False)


def ref_row(run: Run) -> dict[str, Any]:
    args = ragged(run, run.rows(512))
    model = build(run, "1b", LlamaForCausalLM, compile=False)
    some = list(range(0, run.rows(512), max(run.rows(512) // 8, 1)))
    plan = make_plan(args[1], args[3])

    def ours() -> Tensor:
        return log_probs(model, *args, plan=plan)

    with torch.no_grad():
        ordered = Padded(args, True, 16)
        exact, base = exact_log_probs(model, args, some), ordered.log_probs(model)
        row: dict[str, Any] = {"tokens": tokens_of(args), "response_tokens": int(args[3].sum())}
        row |= check("ref eager", ours().sum(1)[some], base[some], exact)
        row["hf_sorted_tok_s"] = tokens_of(args) / run.time(lambda: ordered.log_probs(model), 2)
        row["hf_sorted_peak_gb"] = run.peak(lambda: ordered.log_probs(model))
        row["eager_tok_s"] = tokens_of(args) / run.time(ours)
        row["eager_peak_gb"] = run.peak(ours)
        model.torchbandit_compile = True
        row["compile_s"] = _once(run, ours)
        check("ref compiled", ours().sum(1)[some], base[some], exact)
        seconds = run.time(ours, 5)
        row["compiled_peak_gb"] = run.peak(ours)
        if run.profile:
            profile(run, ours)
    row["compiled_tok_s"] = tokens_of(args) / seconds
    row["of_ceiling"] = flops(model, args, int(args[3].sum())) / seconds / run.matmul
    row["over_sorted"] = row["compiled_tok_s"] / row["hf_sorted_tok_s"]
    return row


def grad_row(run: Run) -> dict[str, Any]:
    """Forward and backward of a 410M policy over 128 rows of mixed lengths, gradients added up over microbatches."""
    num = run.rows(128)
    args = ragged(run, num)
    model = build(run, "410m", LlamaForCausalLM, compile=False).requires_grad_(True)
    ordered = Padded(args, True, 16)

    def theirs() -> Tensor:
        model.zero_grad()
        return ordered.log_probs(model, lambda total: total.sum().backward())

    some = list(range(0, num, max(num // 8, 1)))
    exact, base = exact_log_probs(model, args, some), theirs()
    their_grad = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    row: dict[str, Any] = {"tokens": tokens_of(args), "response_tokens": int(args[3].sum())}
    row["hf_sorted_tok_s"] = tokens_of(args) / run.time(theirs, 2)
    row["hf_sorted_peak_gb"] = run.peak(theirs)
    for budget in (256,) if run.tiny else (8192, 16384, 32768):
        micro = _micro_batches(args, budget)

        def ours(micro: list[tuple[Tensor, Args]] = micro, budget: int = budget) -> Tensor:
            model.zero_grad()
            out = torch.empty(num, device=run.device)
            for rows, part in micro:
                total = log_probs(model, *part, plan=make_plan(part[1], part[3], token_budget=2 * budget)).sum(1)
                total.sum().backward()
                out[rows] = total.detach()
            return out

        def verify(name: str, work: Callable[[], Tensor] = ours) -> None:
            row.update(check(name, work()[some], base[some], exact))
            off = [float((p.grad - their_grad[n]).float().norm() / (their_grad[n].float().norm() + 1e-9))
                   for n, p in model.named_parameters() if p.grad is not None]  # fmt: skip
            if not max(off) < 0.3:
                raise SystemExit(f"{name}: a gradient is {max(off):.2g} from the baseline's, in relative norm")
            row["gradient_distance"] = max(off)

        cell: dict[str, float] = {}
        model.torchbandit_compile = False
        if budget != 32768:
            verify("grad eager")
            cell["eager_tok_s"] = tokens_of(args) / run.time(ours, 2)
            cell["eager_peak_gb"] = run.peak(ours)
        model.torchbandit_compile = True
        cell["compile_s"] = _once(run, ours)
        verify("grad compiled")
        seconds = run.time(ours, 3)
        cell["peak_gb"] = run.peak(ours)
        cell["tok_s"] = tokens_of(args) / seconds
        cell["tflops"] = 3 * flops(model, args, int(args[3].sum())) / seconds / 1e12
        cell["over_sorted"] = cell["tok_s"] / row["hf_sorted_tok_s"]
        cell["peak_of_sorted"] = cell["peak_gb"] / max(row["hf_sorted_peak_gb"], 1e-9)
        row[f"micro_{budget}"] = cell
        if run.profile and budget == 16384:
            profile(run, ours)
    return row


def _micro_batches(args: Args, budget: int) -> list[tuple[Tensor, Args]]:
    """Rows in order of length, about `budget` real tokens at a time."""
    lengths = (args[1].sum(1) + args[3].sum(1)).tolist()
    spans: list[list[int]] = [[]]
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if spans[-1] and sum(lengths[k] for k in spans[-1]) + lengths[i] > budget:
            spans.append([])
        spans[-1].append(i)
    rows = [torch.tensor(span, device=args[0].device) for span in spans]
    return [(r, tuple(x[r] for x in args)) for r in rows]  # type: ignore[misc]


def groups_row(run: Run) -> dict[str, Any]:
    """Eight responses a prompt: shared prompts against unshared packed and padded."""
    model = build(run, "1b", LlamaForSequenceClassification, compile=True)
    out: dict[str, Any] = {}
    for prompt, reply, groups in ((512, 256, 16), (150, 1000, 8), (2000, 256, 8), (256, 256, 16), (64, 256, 32)):
        num = run.rows(8 * groups)
        args = ragged(run, num, 8, prompt, reply)
        plans = {s: make_plan(args[1], args[3], group_size=8, share_prompts=s) for s in (True, False)}
        with torch.no_grad():
            padded = Padded(args, False, 32)
            base = padded.scores(model)
            seconds = {}
            for share, plan in plans.items():
                got = sequence_scores(model, *args, plan=plan)
                check(f"groups {prompt}/{reply}", got, base, None)
                seconds[share] = run.time(lambda a=args, p=plan: sequence_scores(model, *a, plan=p))
            hf = run.time(lambda p=padded: p.scores(model), 2)
        auto = make_plan(args[1], args[3], group_size=8)
        out[f"P{prompt}_C{reply}"] = {
            "hf_padded_tok_s": tokens_of(args) / hf,
            "unshared_tok_s": tokens_of(args) / seconds[False],
            "shared_tok_s": tokens_of(args) / seconds[True],
            "over_padded": hf / seconds[True],
            "over_unshared": seconds[False] / seconds[True],
            "auto_shares": auto.metrics["packing/shared"],
        }
    return out


def flat_row(run: Run) -> dict[str, Any]:
    """Cost a token from 64 to 4096 rows."""
    model = build(run, "1b", LlamaForSequenceClassification, compile=True)
    out = {}
    with torch.no_grad():
        for num in (16, 32) if run.tiny else (64, 512, 4096):
            args = ragged(run, num)
            seconds = run.time(lambda a=args: sequence_scores(model, *a), 3 if num < 1024 else 1)
            out[str(num)] = seconds / tokens_of(args) * 1e6
    return {"us_per_token": out, "spread": max(out.values()) / min(out.values())}


def quant_row(run: Run) -> dict[str, Any]:
    """Filled when models load quantised."""
    from torchbandit import models

    if not hasattr(models, "quantize"):
        return {"skipped": "ModelSpec(quantization=...) does not load yet"}
    return {"skipped": "not measured"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(ROWS), help="rows, by comma: " + ", ".join(ROWS))
    parser.add_argument("--tiny", action="store_true", help="a smoke test: tiny models, few rows, CPU, float32")
    parser.add_argument("--profile", action="store_true", help="print the kernels of rm, ref and grad")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(ROWS):
        parser.error(f"--only: unknown rows {sorted(unknown)}; known: {', '.join(ROWS)}")
    device = torch.device("cpu" if options.tiny or not torch.cuda.is_available() else "cuda")
    if device.type == "cpu" and not options.tiny:
        parser.error("no CUDA device here; --tiny runs a smoke test on the CPU")
    run = Run(device, torch.float32 if options.tiny else torch.bfloat16, options.tiny, options.profile)
    ceilings(run)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"{name}: matmul {run.matmul / 1e12:.0f} TFLOP/s, copy {run.copy / 1e12:.2f} TB/s; torch {torch.__version__}")
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "matmul": run.matmul, "copy": run.copy}
    for row in chosen:
        begin = time.perf_counter()
        result[row] = globals()[f"{row}_row"](run)
        print(f"\n{row} ({time.perf_counter() - begin:.0f} s)", flush=True)
        for key, figure in result[row].items():
            print(f"  {key:22} {_short(figure)}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(json.dumps(result))


def _short(figure: Any) -> str:
    if isinstance(figure, dict):
        return "  ".join(f"{k}={_short(v)}" for k, v in figure.items())
    if isinstance(figure, str):
        return figure
    return f"{figure:,.4g}" if abs(figure) < 1e4 else f"{figure:,.0f}"


if __name__ == "__main__":
    main()
