"""What a run leaves behind: metrics.jsonl, curve.png, samples.md, evaluation.json; and the progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from torchbandit.train.evaluate import Evaluation
from torchbandit.train.signals import mute_closed_streams


class Reporter:
    """Writes one flat line of metrics a step and moves the progress bar.

    Args:
        out: folder of the run.
        steps: of the whole run.
        done: steps done before, by a run that is resumed: the lines of later steps are cut off.
        show: draw the bar (the main process alone).
    Raises:
        OSError: metrics.jsonl cannot be written; what it held is still there.
    """

    def __init__(self, out: Path, *, steps: int, done: int = 0, show: bool = True) -> None:
        self.path = out / "metrics.jsonl"
        lines = {line["step"]: line for line in read_metrics(self.path) if line["step"] <= done}
        _replace(self.path, "".join(json.dumps(lines[step]) + "\n" for step in sorted(lines)))
        self._file = self.path.open("a", encoding="utf-8")
        self._bar = tqdm(total=steps, initial=done, disable=not show, unit="step", dynamic_ncols=True)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _mute_if_closed():
            self._bar.close()
        # What could not be written was raised when it was: closing tries, and fails, once more.
        with contextlib.suppress(OSError):
            self._file.close()

    def __call__(self, metrics: Mapping[str, float]) -> None:
        """Write a step's line (NaN becomes null: JSON has no NaN) and move the bar.

        Raises:
            OSError: the line could not be written.
        """
        line = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with _named(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        told = {name: f"{metrics[key]:.3g}" for name, key in BAR.items() if key in metrics}
        with _mute_if_closed():
            self._bar.set_postfix(told, refresh=False)
            self._bar.update()

    def flush(self) -> None:
        """Wait until the disk has all lines; OSError where it has not."""
        with _named(self.path):
            os.fsync(self._file.fileno())


@contextlib.contextmanager
def _mute_if_closed() -> Iterator[None]:
    """A bar that nobody sees any more is no reason to end a run."""
    try:
        yield
    except OSError:
        mute_closed_streams(sys.stderr)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: could not be written ({error.strerror or error})") from error


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    fresh = path.with_name(path.name + ".new")
    with _named(path):
        try:
            with fresh.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise


BAR = {"reward": "reward", "kl": "kl", "samples/s": "samples_per_s"}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that a kill or a full disk cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def write_curve(metrics: Path, picture: Path) -> None:
    """Draw reward, KL and ptx loss over the steps of a metrics.jsonl; what was not measured is left out."""
    from matplotlib.figure import Figure  # slow to import, and only needed when a run ends

    lines = read_metrics(metrics)
    panels = [
        ("reward", "reward"),
        ("kl", "KL to the reference (nats a response)"),
        ("loss/ptx", "ptx loss (nats a token)"),
    ]
    panels = [(key, title) for key, title in panels if any(line.get(key) is not None for line in lines)]
    if not panels:
        return
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    for axis, (key, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        axis.plot(*zip(*points, strict=True), linewidth=1.6)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
    figure.savefig(picture, dpi=120)


def write_samples(path: Path, before: Evaluation, after: Evaluation) -> None:
    """The same prompts answered before and after training, with each term's score."""
    lines = ["# Samples", "", "The same prompts before and after training, with the raw score of each reward term.", ""]
    for old, new in zip(before.samples, after.samples, strict=True):
        lines += [f"## {_one_line(old.prompt)}", "", "| | response | " + " | ".join(old.terms) + " |"]
        lines += ["|---|---|" + "---|" * len(old.terms)]
        for name, sample in (("before", old), ("after", new)):
            scores = " | ".join(map(_number, sample.terms.values()))
            lines.append(f"| {name} | {_one_line(sample.response)} | {scores} |")
        lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")


def _number(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"  # no -0.000


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|") or "*(empty)*"


def write_evaluation(path: Path, before: Evaluation, after: Evaluation | None) -> None:
    """Both evaluations as JSON, NaN as null; `after` is absent while the run goes on. Whole or not at all."""
    content = {"before": asdict(before)} | ({} if after is None else {"after": asdict(after)})
    _replace(path, json.dumps(_without_nan(content), indent=1))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_finished(path: Path) -> bool:
    """Whether the run of this evaluation.json was evaluated after its last step."""
    return path.exists() and "after" in json.loads(path.read_text(encoding="utf-8"))


def read_before(path: Path) -> Evaluation | None:
    """The evaluation that an interrupted run made before its first step."""
    from torchbandit.train.evaluate import Sample

    if not path.exists():
        return None
    before = json.loads(path.read_text(encoding="utf-8"))["before"]

    def numbers(told: dict[str, float | None]) -> dict[str, float]:
        return {name: math.nan if value is None else value for name, value in told.items()}

    samples = [Sample(**(sample | {"terms": numbers(sample["terms"])})) for sample in before["samples"]]
    return Evaluation(numbers(before["metrics"]), samples)


def summary(before: Evaluation, after: Evaluation) -> str:
    """A few lines for the terminal: every number before and after, and its rise in deviations of the former."""
    names = [name for name in after.metrics if not name.endswith("_std")]
    width = max(len(name) for name in names)
    rows = [f"{'':{width}}  {'before':>9}  {'after':>9}  rise / std before"]
    for name in names:
        old, new = before.metrics.get(name, math.nan), after.metrics[name]
        std = before.metrics.get(f"{name}_std", 0.0)
        rise = f"  {round((new - old) / std, 2) + 0.0:9.2f}" if std > 1e-3 else ""
        rows.append(f"{name:{width}}  {_number(old):>9}  {_number(new):>9}{rise}")
    return "\n".join(rows)
