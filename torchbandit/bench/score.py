"""`torchbandit bench score`: scores and log-probs beside transformers padded and sorted, correctness first.

Rows: rm, rm7b (reward model), ref (reference log-probs over a vocabulary of 128k), grad (log-probs with gradient),
groups (eight responses a prompt), flat (cost a token from few to many rows). 512 rows of mixed lengths: prompts of
exp(N(4.8, 0.6)) in 16..512, responses of exp(N(5.3, 0.8)) in 8..1024, random bf16 weights. A row that is further from
float32 than the baseline ends the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from torchbandit.bench.frame import Frame, Line, Peer, Times
from torchbandit.bench.score_work import (
    Args,
    Padded,
    Run,
    body_size,
    build,
    check,
    compile_layers,
    exact_log_probs,
    exact_scores,
    flops,
    ragged,
    tokens_of,
)
from torchbandit.scoring import log_probs, make_plan, sequence_scores

ROWS = ("rm", "rm7b", "ref", "grad", "groups", "flat")


def run(frame: Frame) -> None:
    shared = Run(frame)
    if not frame.cuda and not frame.tiny:
        frame.leave_out("score", "no CUDA device; --tiny shows that it runs")
        return
    calls: dict[str, Callable[[Run], dict[str, Any]]] = {
        "rm": rm_row, "rm7b": rm7b_row, "ref": ref_row, "grad": grad_row, "groups": groups_row, "flat": flat_row,
    }  # fmt: skip
    for name in frame.chosen(ROWS):
        calls[name](shared)
        if frame.cuda:
            torch.cuda.empty_cache()
    frame.leave_out("score in nf4, int8 and fp8", "`torchbandit profile` measures precisions, on your own models")


def add(
    run: Run, work: str, shape: str, tokens: int, took: Times, *, flop: float | None, theirs: dict[str, float],
    row: dict[str, Any], peak_gb: float | None = None, ours: Callable[[], Any] | None = None,
) -> None:  # fmt: skip
    """A line from the seconds of ours, the rates of the peers, and what a row has found besides."""
    rate = tokens / took.median
    line = Line("score", work, rate, "tokens/s", tokens / took.high, tokens / took.low, peak_gb=peak_gb, more=row)
    if flop is not None:
        line.percent = 100 * flop / took.median / run.own_matmul(shape)
        line.ceiling = "the matmuls of its own shapes"
    line.peers = [Peer(name, theirs_rate, rate / theirs_rate) for name, theirs_rate in theirs.items()]
    if ours is not None:
        line.host_syncs = run.frame.host_syncs(ours)
    run.frame.add(line)


def rm_row(run: Run, shape: str = "1b", num: int = 512, arrival: bool = True) -> dict[str, Any]:
    args = ragged(run, run.rows(num))
    model = build(run, shape, LlamaForSequenceClassification, compile=False)
    some = list(range(0, run.rows(num), max(run.rows(num) // 8, 1)))
    plan = make_plan(args[1], args[3])

    def ours() -> Tensor:
        return sequence_scores(model, *args, plan=make_plan(args[1], args[3]))

    with torch.no_grad():
        ordered, arriving = (Padded(args, sort, run.micro("scores")) for sort in (True, False))
        base = ordered.scores(model)
        exact = exact_scores(model, args, some) if shape != "7b" else None
        eager = sequence_scores(model, *args, plan=plan)
        out = check("rm eager", eager[some], base[some], exact)
        row: dict[str, Any] = {"tokens": tokens_of(args), **out}
        if arrival:
            row["hf_arrival_tok_s"] = tokens_of(args) / run.time(lambda: arriving.scores(model), 2)
        row["hf_sorted_tok_s"] = tokens_of(args) / run.time(lambda: ordered.scores(model))
        row["eager_tok_s"] = tokens_of(args) / run.time(lambda: sequence_scores(model, *args, plan=plan))
        compile_layers(model, True)
        row["compile_s"] = _once(run, lambda: sequence_scores(model, *args, plan=plan))
        check("rm compiled", sequence_scores(model, *args, plan=plan)[some], base[some], exact)
        seconds = run.time(ours, 5)
        if run.frame.profile:
            profile(run, lambda: sequence_scores(model, *args, plan=plan))
        took, peak = run.last, run.frame.peak_gb(ours)
    row["compiled_tok_s"] = tokens_of(args) / seconds
    row["tflops"] = flops(model, args) / seconds / 1e12
    row["of_ceiling"] = flops(model, args) / seconds / run.matmul
    row["of_ceiling_linear"] = 2 * body_size(model) * tokens_of(args) / (
        seconds * run.matmul)  # fmt: skip
    row["over_sorted"] = row["compiled_tok_s"] / row["hf_sorted_tok_s"]
    theirs = {"transformers, padded, sorted": row["hf_sorted_tok_s"]}
    if arrival:
        row["over_arrival"] = row["compiled_tok_s"] / row["hf_arrival_tok_s"]
        theirs["transformers, padded, arrival order"] = row["hf_arrival_tok_s"]
    with torch.no_grad():
        add(
            run, f"reward model, {shape}, {run.rows(num)} rows of mixed lengths", shape, tokens_of(args), took,
            flop=flops(model, args), theirs=theirs, row=row, peak_gb=peak, ours=ours,
        )  # fmt: skip
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
        ordered = Padded(args, True, run.micro("log_probs"))
        exact, base = exact_log_probs(model, args, some), ordered.log_probs(model)
        row: dict[str, Any] = {"tokens": tokens_of(args), "response_tokens": int(args[3].sum())}
        row |= check("ref eager", ours().sum(1)[some], base[some], exact)
        row["hf_sorted_tok_s"] = tokens_of(args) / run.time(lambda: ordered.log_probs(model), 2)
        row["hf_sorted_peak_gb"] = run.peak(lambda: ordered.log_probs(model))
        row["eager_tok_s"] = tokens_of(args) / run.time(ours)
        row["eager_peak_gb"] = run.peak(ours)
        compile_layers(model, True)
        row["compile_s"] = _once(run, ours)
        check("ref compiled", ours().sum(1)[some], base[some], exact)
        seconds = run.time(ours, 5)
        took = run.last
        row["compiled_peak_gb"] = run.peak(ours)
        if run.frame.profile:
            profile(run, ours)
    row["compiled_tok_s"] = tokens_of(args) / seconds
    row["of_ceiling"] = flops(model, args, int(args[3].sum())) / seconds / run.matmul
    row["over_sorted"] = row["compiled_tok_s"] / row["hf_sorted_tok_s"]
    with torch.no_grad():
        add(
            run, f"reference log-probs, 1b, {run.rows(512)} rows of mixed lengths", "1b", tokens_of(args), took,
            flop=flops(model, args, int(args[3].sum())),
            theirs={"transformers, full logits, sorted": row["hf_sorted_tok_s"]}, row=row,
            peak_gb=row["compiled_peak_gb"] if run.frame.cuda else None, ours=ours,
        )  # fmt: skip
    return row


def grad_row(run: Run) -> dict[str, Any]:
    """Forward and backward of a 410M policy over 128 rows of mixed lengths, gradients added up over microbatches."""
    num = run.rows(128)
    args = ragged(run, num)
    model = build(run, "410m", LlamaForCausalLM, compile=False).requires_grad_(True)
    ordered = Padded(args, True, run.micro("log_probs"))

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
                raise AssertionError(f"{name}: a gradient is {max(off):.2g} from the baseline's, in relative norm")
            row["gradient_distance"] = max(off)

        cell: dict[str, float] = {}
        compile_layers(model, False)
        if budget != 32768:
            verify("grad eager")
            cell["eager_tok_s"] = tokens_of(args) / run.time(ours, 2)
            cell["eager_peak_gb"] = run.peak(ours)
        compile_layers(model, True)
        cell["compile_s"] = _once(run, ours)
        verify("grad compiled")
        seconds = run.time(ours, 3)
        took = run.last
        cell["peak_gb"] = run.peak(ours)
        cell["tok_s"] = tokens_of(args) / seconds
        cell["tflops"] = 3 * flops(model, args, int(args[3].sum())) / seconds / 1e12
        cell["over_sorted"] = cell["tok_s"] / row["hf_sorted_tok_s"]
        cell["peak_of_sorted"] = cell["peak_gb"] / max(row["hf_sorted_peak_gb"], 1e-9)
        row[f"micro_{budget}"] = cell
        add(
            run, f"log-probs with gradient, 410m, {num} rows, {budget} tokens a microbatch", "410m", tokens_of(args),
            took, flop=3 * flops(model, args, int(args[3].sum())),
            theirs={"transformers, full logits, sorted": row["hf_sorted_tok_s"]},
            row=cell | {k: row[k] for k in ("gradient_distance", "error_std", "hf_sorted_peak_gb")},
            peak_gb=cell["peak_gb"] if run.frame.cuda else None, ours=ours,
        )  # fmt: skip
        if run.frame.profile and budget == 16384:
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
            padded = Padded(args, False, run.micro("scores"))
            base = padded.scores(model)
            seconds: dict[bool, float] = {}
            took: dict[bool, Times] = {}
            for share, plan in plans.items():
                got = sequence_scores(model, *args, plan=plan)
                check(f"groups {prompt}/{reply}", got, base, None)
                seconds[share] = run.time(lambda a=args, p=plan: sequence_scores(model, *a, plan=p))  # type: ignore[misc]
                took[share] = run.last
            hf = run.time(lambda p=padded: p.scores(model), 2)  # type: ignore[misc]
        auto = make_plan(args[1], args[3], group_size=8)
        out[f"P{prompt}_C{reply}"] = {
            "hf_padded_tok_s": tokens_of(args) / hf,
            "unshared_tok_s": tokens_of(args) / seconds[False],
            "shared_tok_s": tokens_of(args) / seconds[True],
            "over_padded": hf / seconds[True],
            "over_unshared": seconds[False] / seconds[True],
            "auto_shares": auto.metrics["packing/shared"],
        }
        add(
            run, f"reward model, 1b, groups of 8, prompts of {prompt}, responses of {reply}", "1b", tokens_of(args),
            took[True], flop=None, theirs={"transformers, padded": tokens_of(args) / hf},
            row=out[f"P{prompt}_C{reply}"],
        )  # fmt: skip
    return out


def flat_row(run: Run) -> dict[str, Any]:
    """Cost a token from 64 to 4096 rows."""
    model = build(run, "1b", LlamaForSequenceClassification, compile=True)
    out: dict[str, float] = {}
    with torch.no_grad():
        for num in (16, 32) if run.tiny else (64, 512, 4096):
            args = ragged(run, num)
            seconds = run.time(lambda a=args: sequence_scores(model, *a), 3 if num < 1024 else 1)  # type: ignore[misc]
            out[str(num)] = seconds / tokens_of(args) * 1e6
            row = {
                "us a token": out[str(num)],
                "over that of the fewest rows": out[str(num)] / next(iter(out.values())),
            }
            add(
                run, f"reward model, 1b, {num} rows", "1b", tokens_of(args), run.last, flop=flops(model, args),
                theirs={}, row=row,
            )  # fmt: skip
    return {"us_per_token": out, "spread": max(out.values()) / min(out.values())}
