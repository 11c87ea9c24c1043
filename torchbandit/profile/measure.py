"""The figures: each model in each precision over the same rows, beside the baseline."""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchbandit.models import ModelSpec, check_same_tokenizer, load_causal_lm, load_reward_model, load_tokenizer
from torchbandit.models.offload import plain_tensors
from torchbandit.models.quantize import why_not
from torchbandit.models.spec import first_line
from torchbandit.profile.options import ProfileOptions
from torchbandit.profile.rows import Rows, answer, batches, read
from torchbandit.scoring import log_probs, make_plan, sequence_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Say = Callable[[str], None]


@dataclass
class Run:
    """One model in one precision: what it took, and what it said ([B] scores, or [B, T] log-probs, in batches)."""

    num_bytes: int
    tokens_per_s: float
    results: list[Tensor]


def profile(options: ProfileOptions, say: Say = lambda text: None) -> dict[str, Any]:
    """Measure every precision that the device has.

    Returns:
        plain values: `results` (precision -> reward_model and reference -> figure), `left_out` (precision -> reason),
        and where and on what they were measured.
    Raises:
        ValueError: an option, a model or a line of the input is not what it must be, or a model does not fit.
    """
    device = torch.empty(0, device=options.device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    left_out = {p: why for p in options.precisions if (why := _why_not(p, device)) is not None}
    precisions = [options.baseline, *(p for p in options.precisions if p not in left_out and p != options.baseline)]
    results: dict[str, dict[str, dict[str, float | None]]] = {precision: {} for precision in precisions}
    rows = _read(options, device)
    runners: dict[str, tuple[str | None, Any, Callable[..., Tensor]]] = {
        "reward_model": (options.reward_model, load_reward_model, _scores),
        "reference": (options.reference, load_causal_lm, _log_probs),
    }
    for kind, (path, load, score) in runners.items():
        if path is None:
            continue
        exact: Run | None = None
        for precision in precisions:
            say(f"{kind}: {precision}")
            try:
                model = load(_spec(path, precision, options), device)
            except ValueError as error:
                if exact is None:
                    raise
                left_out[f"{precision} of the {kind}"] = str(error)
                continue
            try:
                run = _run(model, score, rows[kind], options)
            except Exception as error:  # a kernel or a compiler that fails at one precision costs that row alone
                if exact is None:
                    raise
                left_out[f"{precision} of the {kind}"] = f"it failed: {type(error).__name__}: {first_line(error)}"
                continue
            finally:
                del model
                _tidy(device)
            exact = exact or run
            compare = _compare_scores if kind == "reward_model" else _compare_log_probs
            results[precision][kind] = {
                "bytes": run.num_bytes,
                "tokens_per_s": round(run.tokens_per_s, 1),
                **({} if run is exact else compare(exact, run, rows[kind])),
            }
    seen = next(iter(rows.values()))
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "date": time.strftime("%Y-%m-%d"),
        "reward_model": options.reward_model,
        "reference": options.reference,
        "rows": len(seen.prompts),
        "tokens": seen.num_tokens,
        "pairs": len(seen.pairs),
        "source": seen.source,
        "baseline": options.baseline,
        "results": {precision: kinds for precision, kinds in results.items() if kinds},
        "left_out": left_out,
    }


def _why_not(precision: str, device: torch.device) -> str | None:
    return None if precision == "bfloat16" else why_not(precision, device)  # type: ignore[arg-type]


def _spec(path: str, precision: str, options: ProfileOptions) -> ModelSpec:
    if precision in ("float32", "bfloat16"):
        return ModelSpec(path, dtype=precision, compile=options.compile)
    return ModelSpec(path, dtype="bfloat16", quantization=precision, compile=options.compile)  # type: ignore[arg-type]


def _read(options: ProfileOptions, device: torch.device) -> dict[str, Rows]:
    """The rows by model, each in its own tokenizer's ids."""
    paths = {"reward_model": options.reward_model, "reference": options.reference}
    if options.input is not None:
        return {kind: read(options, load_tokenizer(path)) for kind, path in paths.items() if path is not None}
    assert options.reference is not None
    tokenizer = load_tokenizer(options.reference)
    if options.reward_model is not None:
        check_same_tokenizer(tokenizer, options.reward_model, "reward model")
    rows = answer(options, load_causal_lm(_spec(options.reference, options.baseline, options), device), tokenizer)
    _tidy(device)
    return dict.fromkeys(paths, rows)


def _tidy(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@torch.no_grad()
def _run(
    model: PreTrainedModel, score: Callable[..., Tensor], rows: Rows, options: ProfileOptions
) -> Run:  # fmt: skip
    device = model.device
    parts = batches(rows, options.batch_size, device)

    def once() -> list[Tensor]:
        return [score(model, part, make_plan(part[1], part[3], packing=options.packing)) for part in parts]

    results = [result.float().cpu() for result in once()]  # compiles, too
    passes, begin = 0, _now(device)
    while (passed := _now(device) - begin) < options.min_seconds or not passes:
        once()
        passes += 1
    num_bytes = sum(t.untyped_storage().nbytes() for t in plain_tensors(model))
    return Run(num_bytes, rows.num_tokens * passes / passed, results)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _scores(model: PreTrainedModel, part: tuple[Tensor, ...], plan: Any) -> Tensor:
    return sequence_scores(model, *part, plan=plan)


def _log_probs(model: PreTrainedModel, part: tuple[Tensor, ...], plan: Any) -> Tensor:
    return log_probs(model, *part, plan=plan)


def _compare_scores(exact: Run, run: Run, rows: Rows) -> dict[str, float | None]:
    """Correlation of scores, and the share of pairs, tied ones aside, that come out in the other order."""
    right, ours = torch.cat(exact.results).double(), torch.cat(run.results).double()
    good = right.isfinite() & ours.isfinite()
    pairs = rows.pairs[good[rows.pairs].all(-1)]
    gap, our_gap = (x[pairs[:, 0]] - x[pairs[:, 1]] for x in (right, ours))
    told = gap != 0
    flipped = float((gap * our_gap <= 0)[told].double().mean()) if told.any() else None
    correlation = torch.corrcoef(torch.stack([right[good], ours[good]]))[0, 1]
    return {
        "correlation": float(correlation) if correlation.isfinite() else None,
        "flipped_pairs": flipped,
        "mean_error": float((right - ours)[good].abs().mean() / right[good].std()),
        "max_error": float((right - ours)[good].abs().max() / right[good].std()),
    }


def _compare_log_probs(exact: Run, run: Run, rows: Rows) -> dict[str, float | None]:
    """Errors of the response tokens' log-probs, and by how many nats a row's KL to the reference is overstated."""
    errors, bias, at = [], [], 0
    for right, ours in zip(exact.results, run.results, strict=True):
        lengths = torch.tensor([len(response) for response in rows.responses[at : at + len(right)]])
        real = (torch.arange(right.shape[1]) < lengths[:, None]) & right.isfinite() & ours.isfinite()
        off = (right - ours).double().masked_fill(~real, 0.0)
        errors.append(off[real].abs())
        bias.append(off.sum(-1))
        at += len(right)
    error, by_row = torch.cat(errors), torch.cat(bias)
    return {
        "mean_error": float(error.mean()),
        "max_error": float(error.max()),
        "kl_bias": float(by_row.mean()),
        "kl_bias_std_error": float(by_row.std() / len(by_row) ** 0.5) if len(by_row) > 1 else None,
    }
