"""`torchbandit bench score`: scores and log-probs beside transformers padded and sorted, correctness first.

Rows: rm, rm7b (reward model), ref (reference log-probs over a vocabulary of 128k), grad (log-probs with gradient),
groups (eight responses a prompt), step (what part of env.step runs in the models' kernels), flat (cost a token from
few to many rows). 512 rows of mixed lengths: prompts of
exp(N(4.8, 0.6)) in 16..512, responses of exp(N(5.3, 0.8)) in 8..1024, random bf16 weights. A row that is further from
float32 than the baseline ends the run.

TFLOP/s and shares of a ceiling count the arithmetic that scoring does. That is less than the baselines do: behind its
attention the last layer runs on the tokens that are read (of a reward model one a row), which of 16 layers saves 5%.
`of_ceiling_linear` counts every layer on every token instead, and attention not at all.
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
    last_layer_share,
    ragged,
    tokens_of,
)
from torchbandit.scoring import Rows, log_probs, make_plan, make_plans, sequence_scores

ROWS = ("rm", "rm7b", "ref", "grad", "groups", "step", "flat")


def run(frame: Frame) -> None:
    shared = Run(frame)
    if not frame.cuda and not frame.tiny:
        frame.leave_out("score", "no CUDA device; --tiny shows that it runs")
        return
    calls: dict[str, Callable[[Run], dict[str, Any]]] = {
        "rm": rm_row, "rm7b": rm7b_row, "ref": ref_row, "grad": grad_row, "groups": groups_row, "step": step_row,
        "flat": flat_row,
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
        line.peak_gb = run.frame.peak_gb(ours) if peak_gb is None else peak_gb
    run.frame.add(line)


def rm_row(run: Run, shape: str = "1b", num: int = 512, full: bool = True) -> dict[str, Any]:
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
        if full:
            row["hf_arrival_tok_s"] = tokens_of(args) / run.time(lambda: arriving.scores(model), 1)
            row["eager_tok_s"] = tokens_of(args) / run.time(lambda: sequence_scores(model, *args, plan=plan), 2, 0)
        row["hf_sorted_tok_s"] = tokens_of(args) / run.time(lambda: ordered.scores(model), 3 if full else 2, 0)
        compile_layers(model, True)
        row["compile_s"] = _once(run, lambda: sequence_scores(model, *args, plan=plan))
        check("rm compiled", sequence_scores(model, *args, plan=plan)[some], base[some], exact)
        seconds = run.time(ours, 5 if full else 3)
        if run.frame.profile:
            profile(run, lambda: sequence_scores(model, *args, plan=plan))
        took, peak = run.last, run.frame.peak_gb(ours)
    flop = flops(model, args, last=last_layer_share(plan, "last"))
    row["compiled_tok_s"] = tokens_of(args) / seconds
    row["tflops"] = flop / seconds / 1e12
    row["of_ceiling"] = flop / seconds / run.matmul
    row["of_ceiling_linear"] = 2 * body_size(model) * tokens_of(args) / (seconds * run.matmul)
    row["over_sorted"] = row["compiled_tok_s"] / row["hf_sorted_tok_s"]
    theirs = {"transformers, padded, sorted": row["hf_sorted_tok_s"]}
    if full:
        row["over_arrival"] = row["compiled_tok_s"] / row["hf_arrival_tok_s"]
        theirs["transformers, padded, arrival order"] = row["hf_arrival_tok_s"]
    with torch.no_grad():
        add(
            run, f"reward model, {shape}, {run.rows(num)} rows of mixed lengths", shape, tokens_of(args), took,
            flop=flop, theirs=theirs, row=row, peak_gb=peak, ours=ours,
        )  # fmt: skip
    return row


def kernel_times(run: Run, work: Callable[[], Any]) -> tuple[float, dict[tuple[str, int], float]]:
    """Wall seconds of one call, and the seconds of each of its kernels by (name, how often)."""
    if run.device.type != "cuda":
        return _once(run, work), {}
    run.sync()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        seconds = _once(run, work)
    return seconds, {(e.key, e.count): e.self_device_time_total / 1e6 for e in trace.key_averages()}


def profile(run: Run, work: Callable[[], Any], limit: int = 14) -> None:
    """Print the kernels that one call spends its time in, and what part of it none runs."""
    seconds, kernels = kernel_times(run, work)
    total = sum(kernels.values())
    print(f"  {seconds * 1e3:.0f} ms, of which kernels {total * 1e3:.0f} ms:")
    for (name, count), taken in sorted(kernels.items(), key=lambda item: -item[1])[:limit]:
        print(f"    {taken / total:6.1%} {count:6} x {name[:100]}")


def _once(run: Run, work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    run.sync()
    return time.perf_counter() - begin


def rm7b_row(run: Run) -> dict[str, Any]:
    return rm_row(run, "7b", 256, full=False)


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
        row["hf_sorted_tok_s"] = tokens_of(args) / run.time(lambda: ordered.log_probs(model), 2, 0)
        row["hf_sorted_peak_gb"] = run.peak(lambda: ordered.log_probs(model))
        row["eager_tok_s"] = tokens_of(args) / run.time(ours, 2, 0)
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
    flop = flops(model, args, int(args[3].sum()), last=last_layer_share(plan, "predict"))
    row["of_ceiling"] = flop / seconds / run.matmul
    row["over_sorted"] = row["compiled_tok_s"] / row["hf_sorted_tok_s"]
    with torch.no_grad():
        add(
            run, f"reference log-probs, 1b, {run.rows(512)} rows of mixed lengths", "1b", tokens_of(args), took,
            flop=flop, theirs={"transformers, full logits, sorted": row["hf_sorted_tok_s"]}, row=row,
            peak_gb=row["compiled_peak_gb"], ours=ours,
        )  # fmt: skip
    return row


def grad_row(run: Run) -> dict[str, Any]:
    """Forward and backward of a 410M policy over rows of mixed lengths, gradients added up over microbatches."""
    num = run.rows(512)
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
    for budget in (256,) if run.tiny else (20480, 24576, 32768):
        micro = _micro_batches(args, budget)

        def ours(micro: list[tuple[Tensor, Args]] = micro, budget: int = budget) -> Tensor:
            model.zero_grad()
            out = torch.empty(num, device=run.device)
            plans = make_plans([Rows(part[1], part[3]) for _, part in micro], token_budget=2 * budget)
            for (rows, part), plan in zip(micro, plans, strict=True):
                total = log_probs(model, *part, plan=plan).sum(1)
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

        cell: dict[str, float] = {"micro_batches": len(micro)}
        compile_layers(model, False)
        if budget in (256, 20480):
            verify("grad eager")
            cell["eager_tok_s"] = tokens_of(args) / run.time(ours, 1)
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
            run, f"log-probs with gradient, 410m, {num} rows, {budget} tokens a microbatch or fewer", "410m",
            tokens_of(args), took, flop=3 * flops(model, args, int(args[3].sum())),
            theirs={"transformers, full logits, sorted": row["hf_sorted_tok_s"]},
            row=cell | {k: row[k] for k in ("gradient_distance", "error_std", "hf_sorted_peak_gb")},
            peak_gb=cell["peak_gb"], ours=ours,
        )  # fmt: skip
        if run.frame.profile and budget == 24576:
            profile(run, ours)
    return row


def _micro_batches(args: Args, budget: int) -> list[tuple[Tensor, Args]]:
    """Rows in order of length, in as few spans of even token counts as come out at about `budget`."""
    lengths = (args[1].sum(1) + args[3].sum(1)).tolist()
    even = sum(lengths) / -(-sum(lengths) // budget)
    spans: list[list[int]] = [[]]
    done = 0.0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if spans[-1] and done + lengths[i] / 2 > even * len(spans):
            spans.append([])
        spans[-1].append(i)
        done += lengths[i]
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
                seconds[share] = run.time(lambda a=args, p=plan: sequence_scores(model, *a, plan=p), 5)  # type: ignore[misc]
                took[share] = run.last
                if run.frame.profile and prompt == 512:
                    profile(run, lambda a=args, p=plan: sequence_scores(model, *a, plan=p))  # type: ignore[misc]
            hf = run.time(lambda p=padded: p.scores(model), 3, 0)  # type: ignore[misc]
        auto = make_plan(args[1], args[3], group_size=8)
        out[f"P{prompt}_C{reply}"] = {
            "hf_padded_tok_s": tokens_of(args) / hf,
            "unshared_tok_s": tokens_of(args) / seconds[False],
            "shared_tok_s": tokens_of(args) / seconds[True],
            "over_padded": hf / seconds[True],
            "over_unshared": seconds[False] / seconds[True],
            "auto_shares": auto.metrics["packing/shared"],
        }

        def ours(args: Args = args) -> Tensor:
            plan = make_plan(args[1], args[3], group_size=8, share_prompts=True)
            return sequence_scores(model, *args, plan=plan)

        # What is done: each prompt once. The others' prompts, by themselves, are taken off again.
        again, last = torch.arange(num, device=run.device) % 8 != 0, last_layer_share(plans[True], "last")
        spared: Args = (args[0][again], args[1][again], args[2][again, :0], args[3][again, :0])
        with torch.no_grad():
            add(
                run, f"reward model, 1b, groups of 8, prompts of {prompt}, responses of {reply}", "1b", tokens_of(args),
                took[True], flop=flops(model, args, last=last) - flops(model, spared, last=last),
                theirs={"transformers, padded": tokens_of(args) / hf}, row=out[f"P{prompt}_C{reply}"], ours=ours,
            )  # fmt: skip
    return out


def step_row(run: Run) -> dict[str, Any]:
    """`env.step` with a reward model, a reference and a KL penalty: what part of it runs in the models' kernels."""
    from tensordict import TensorDict
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from torchbandit.env import BanditEnv
    from torchbandit.prompts import PromptSet
    from torchbandit.rewards import KLPenalty, RewardModel

    args = ragged(run, run.rows(512))
    rm = build(run, "1b", LlamaForSequenceClassification, compile=not run.tiny)
    reference = build(run, "1b", LlamaForCausalLM, compile=not run.tiny, seed=1)
    core = Tokenizer(models.WordLevel({f"t{i}": i for i in range(rm.config.vocab_size)}, unk_token="t1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="t2", pad_token="t0")
    prompts = PromptSet.from_tokens((args[0].cpu(), args[1].cpu()), tokenizer=tokenizer)
    env = BanditEnv(prompts, [RewardModel(rm), KLPenalty(reference)], num_prompts=len(args[0]), device=run.device)
    td = env.reset()
    td["tokens", "response"], td["masks", "response"] = args[2], args[3]
    td["log_probs"] = TensorDict({"response": torch.zeros(args[3].shape, device=run.device)}, batch_size=td.batch_size)
    td["finished"] = torch.ones(len(td), dtype=torch.bool, device=run.device)
    rows = (td["tokens", "prompt"], td["masks", "prompt"], args[2], args[3])

    plan = make_plan(rows[1], rows[3])

    def models_alone() -> None:
        with torch.no_grad():
            sequence_scores(rm, *rows, plan=plan)
            log_probs(reference, *rows, plan=plan)

    alone = run.time(models_alone)
    run.time(lambda: env.step(td))
    wall, kernels = kernel_times(run, lambda: env.step(td))
    _, kernels_alone = kernel_times(run, models_alone)
    if run.frame.profile:
        profile(run, lambda: env.step(td))
    row = {
        "step_ms": run.last.median * 1e3,
        "models_alone_ms": alone * 1e3,
        "in_kernels": sum(kernels.values()) / wall,
        "in_model_kernels": sum(kernels_alone.values()) / wall,
    }
    work = f"env.step with reward model, reference and KL, 1b, {run.rows(512)} rows"
    flop = flops(rm, args, last=last_layer_share(plan, "last"))
    flop += flops(reference, args, int(args[3].sum()), last=last_layer_share(plan, "predict"))
    add(run, work, "1b", tokens_of(args), run.last, flop=flop, theirs={}, row=row, ours=lambda: env.step(td))
    return row


def flat_row(run: Run) -> dict[str, Any]:
    """Cost a token from 64 to 4096 rows."""
    model = build(run, "1b", LlamaForSequenceClassification, compile=True)
    out: dict[str, float] = {}
    with torch.no_grad():
        for num in (16, 32) if run.tiny else (64, 512, 4096):
            args = ragged(run, num)
            seconds = run.time(lambda a=args: sequence_scores(model, *a), *((3, 1) if num < 1024 else (1, 0)))  # type: ignore[misc]
            out[str(num)] = seconds / tokens_of(args) * 1e6
            row = {
                "us a token": out[str(num)],
                "over that of the fewest rows": out[str(num)] / next(iter(out.values())),
            }
            flop = flops(model, args, last=last_layer_share(make_plan(args[1], args[3]), "last"))
            add(
                run, f"reward model, 1b, {num} rows", "1b", tokens_of(args), run.last, flop=flop, theirs={}, row=row,
                ours=lambda a=args: sequence_scores(model, *a),  # type: ignore[misc]
            )  # fmt: skip
    return {"us_per_token": out, "spread": max(out.values()) / min(out.values())}
