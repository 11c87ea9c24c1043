"""All that is to be run on a card, in one go: tests, then measurements, what was never measured before first.

    python benchmarks/gpu/all.py --out results --budget 560              # as much as 560 seconds hold
    python benchmarks/gpu/all.py --out results --stages score-step train # some, in this order
    python benchmarks/gpu/all.py --out results --tiny                    # everything small: also on a CPU
    python benchmarks/gpu/all.py --list

A stage is a process with a time limit. Tests, which measure nothing, run side by side first; the others one by one, as
asked. Where several cards are, each takes the next stage that is not begun, and those that need two cards come last,
alone. One that fails, or is ended at its limit, is told, and the next one goes on; one that cannot run here is left out
with the reason. What a stage has printed is added to DIR/log.txt when it ends, and DIR/results.json, with the JSON of
every stage, is written anew, so that an ended run loses nothing. The last lines are a table and JSON; the exit status
is 1 if any stage failed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TAIL = 40
"""Lines of a stage's output that results.json keeps; all of them are in the log."""


class Stage(NamedTuple):
    """What is run, and for how long at most.

    Args:
        name: of the stage; command: Python's arguments, `{tmp}` being a folder that is removed at the end.
        limit: seconds.
        needs: "cuda", "two GPUs", or a module. Without --tiny every stage needs CUDA.
        tiny: arguments that make it small.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    needs: tuple[str, ...] = ()
    tiny: tuple[str, ...] = ("--tiny",)


def test(name: str, limit: float, *needs: str) -> Stage:
    file = f"tests/test_{name}.py"
    short = name.removeprefix("gpu_").replace("_", "-")
    return Stage(f"test-{short}", ("-m", "pytest", "-q", "-rs", file), limit, ("cuda", "pytest", *needs), ())


def bench(what: str, rows: Sequence[str] = (), limit: float = 120, needs: tuple[str, ...] = ()) -> Stage:
    asked = ("--rows", *rows) if rows else ()
    return Stage("-".join((what, *rows)), ("-m", "torchbandit", "bench", what, *asked), limit, needs)


def script(name: str, file: str, *argv: str, limit: float, needs: tuple[str, ...] = ()) -> Stage:
    return Stage(name, (f"benchmarks/gpu/{file}.py", *argv), limit, needs)


STAGES = (
    test("scoring_kernels", 180), test("scoring_kernels_backward", 180), test("gpu_scoring", 240),
    test("gpu_generation", 480), test("gpu_quant", 300),
    test("generation_kernels", 240), script("scoring-kernels", "scoring_kernels", limit=240),
    bench("generate", ["exact"], 90), bench("generate", ["long"], 120), bench("generate", ["small"], 60),
    bench("score", ["step"]), bench("score", ["groups"]), bench("score", ["flat"]), bench("score", ["rm7b"], 150),
    script("decode", "generate", limit=300), script("decode-kernels", "decode_kernels", limit=150),
    script("precision", "precision", "--out", "{tmp}/learned", limit=330),
    script("engines", "engines", "--places", "local", "0/0", limit=240, needs=("torchbandit.rllib",)),
    script("engines-two", "engines", "--places", "local", "accelerate", "2/2", limit=400,
           needs=("two GPUs", "torchbandit.rllib")),
    bench("rllib", limit=180, needs=("torchbandit.rllib",)), bench("step"),
    test("gpu_rllib", 240, "torchbandit.rllib"),
    test("gpu_losses", 90), test("gpu_rewards", 90), test("gpu_prompts", 60),
    bench("score", ["rm"]), bench("score", ["ref"], 150), bench("score", ["grad"], 180),
    bench("generate", ["b256", "b1024"], 150), bench("generate", ["ragged"], 90), bench("train", limit=240),
    Stage(
        "train-trl", ("-m", "torchbandit", "bench", "train", "--rows", "trl", "--peers", "benchmarks/gpu/trl.yaml"),
        480, ("trl.trainer.grpo_trainer",),
    ),
)  # fmt: skip


def lacking(stage: Stage, tiny: bool) -> str | None:
    """Why a stage cannot run here, or None."""
    import torch

    for need in stage.needs if tiny else ("cuda", *stage.needs):
        if need in ("cuda", "two GPUs"):
            have, want = torch.cuda.device_count(), 2 if need == "two GPUs" else 1
            if have < want:
                return f"needs {'a CUDA device' if want == 1 else need}, {have} are here"
        elif why := cannot_import(need):
            return f"{need} cannot be imported: {why}"
    return None


@functools.cache
def cannot_import(module: str) -> str:
    """Why a process does not import it, or "": a package may be here without one that it needs."""
    env = os.environ | {"PYTHONPATH": modules()}
    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, env=env, cwd=ROOT)
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


def modules() -> str:
    """Where a stage finds the package and what else is on this process's path."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


running: set[subprocess.Popen[bytes]] = set()
writing = threading.Lock()
over = threading.Event()  # the run is being ended: what stages tell from now on is of that


def cards() -> list[str]:
    """The cards that are here, as CUDA_VISIBLE_DEVICES names them; one nameless place where there is none."""
    import torch

    here = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(here)))).split(",")
    return named[:here] or [""]


def run(stages: Sequence[Stage], out: Path, *, tiny: bool, budget: float) -> dict[str, Any]:
    """Run the stages, one on a card at a time; returns what results.json holds: seconds, rc, tail and JSON by stage."""
    out.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {"tiny": tiny, "budget_s": budget, "stages": {}, "left_out": {}}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as tmp:

        def leave_out(stage: Stage, why: str) -> None:
            print(f"left out: {stage.name}: {why}", flush=True)
            write(out, told, "left_out", stage, why)

        def go(stage: Stage, card: str | None) -> None:
            left = budget - (time.monotonic() - begin)
            if left < min(10, stage.limit):
                leave_out(stage, "no time was left")
                return
            write(out, told, "stages", stage, {"running": True})
            found = one(stage, out / "log.txt", tmp, tiny, min(stage.limit, left), card)
            if not over.is_set():
                print(f"{stage.name}: {verdict(found)} in {found['seconds']:.0f} s", flush=True)
                write(out, told, "stages", stage, found)

        needs = {need for stage in stages for need in stage.needs} - {"cuda", "two GPUs"}
        with ThreadPoolExecutor() as pool:  # what cannot run is told before a card's time is spent on anything
            list(pool.map(cannot_import, needs))
        for stage in stages:
            if why := lacking(stage, tiny):
                leave_out(stage, why)
        here, stages = cards(), [stage for stage in stages if stage.name not in told["left_out"]]
        tests = [stage for stage in stages if stage.name.startswith("test-")]
        wide = [stage for stage in stages if "two GPUs" in stage.needs]
        side_by_side(go, tests, [here[i % len(here)] for i in range(len(tests))])
        side_by_side(go, [stage for stage in stages if stage not in tests and stage not in wide], here)
        for stage in wide:
            go(stage, None)
    return told


def side_by_side(go: Callable[[Stage, str], None], stages: Sequence[Stage], places: Sequence[str]) -> None:
    """Each place takes the next stage that is not begun. An end of the run ends those under way."""
    free: queue.Queue[str] = queue.Queue()
    for place in places:
        free.put(place)

    def take(stage: Stage) -> None:
        place = free.get()
        try:
            go(stage, place)
        finally:
            free.put(place)

    with ThreadPoolExecutor(max(len(places), 1)) as pool:
        begun = [pool.submit(take, stage) for stage in stages]
        try:
            for stage in begun:
                stage.result()
        except BaseException:
            over.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                end(process)
            raise


def one(stage: Stage, whole: Path, tmp: str, tiny: bool, limit: float, card: str | None) -> dict[str, Any]:
    """Run a stage, in a process group of its own so that all it started ends with it, and add its log to `whole`.

    Args:
        card: the only one that it sees; None or "" hides none.
    """
    argv = [x.replace("{tmp}", tmp) for x in (*stage.command, *(stage.tiny if tiny else ()))]
    more = {"PYTHONPATH": modules(), "PYTHONUNBUFFERED": "1"} | ({"CUDA_VISIBLE_DEVICES": card} if card else {})
    log, begin = Path(tmp) / f"{stage.name}.txt", time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *argv], cwd=ROOT, env=os.environ | more, stdin=subprocess.DEVNULL, stdout=file,
            stderr=file, process_group=0,
        )  # fmt: skip
        running.add(process)
        try:
            rc: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            rc = None
        finally:
            end(process)
            running.discard(process)
            printed = log.read_bytes()
            with writing, whole.open("ab") as file_of_all:
                file_of_all.write(f"\n=== {stage.name}: {' '.join(argv)}\n".encode() + printed)
    seconds = time.monotonic() - begin
    lines = printed.decode(errors="replace").splitlines()
    result = next((found for line in reversed(lines) if (found := parsed(line)) is not None), None)
    tail = [line[:300] for line in lines if parsed(line) is None][-TAIL:]
    return {"rc": rc, "seconds": seconds, "limit": limit, "command": argv, "result": result, "tail": tail}


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask the stage's processes to end, then make them."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(5)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue


def parsed(line: str) -> dict[str, Any] | None:
    """The JSON of a last line, None where a line is none."""
    if line.startswith("{"):
        try:
            found: dict[str, Any] = json.loads(line)
            return found
        except ValueError:
            pass
    return None


def verdict(found: dict[str, Any]) -> str:
    return "ended at its limit" if found["rc"] is None else "ok" if found["rc"] == 0 else f"failed ({found['rc']})"


def figures(found: dict[str, Any]) -> list[str]:
    """What a stage found, in few words: lines of a benchmark, steps of the study, or the last that was printed."""
    result, told = found["result"] or {}, []
    for line in result.get("lines", []):
        part = f"{line['work']}: {line['rate']:,.0f} {line['unit']}"
        part += f", {line['percent']:.0f}%" if line["percent"] is not None else ""
        part += f", {line['best']['ratio']:.2f} x {line['best']['name']}" if line["best"] else ""
        told.append(part)
    if result and found["command"][0].endswith("generate.py"):
        told += [
            f"{name}: {row['limit_ms']:.3f} ms by bytes, ways {row['ways_ms']}" for name, row in result["rows"].items()
        ]
    return told or [line.strip() for line in found["tail"] if line.strip()][-2:]


def table(told: dict[str, Any]) -> str:
    rows = []
    for name, found in told["stages"].items():
        rows.append(f"{name:24} {verdict(found):20} {found['seconds']:6.0f} s")
        rows += [f"{'':24} {text[:180]}" for text in figures(found)]
    return "\n".join(rows + [f"{name:24} left out: {why}" for name, why in told["left_out"].items()])


def write(out: Path, told: dict[str, Any], part: str, stage: Stage, what: object) -> None:
    """Add to what is told. All at once: a reader, or an end at any moment, finds a whole file."""
    with writing:
        told[part][stage.name] = what
        (out / "results.json.new").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        (out / "results.json.new").replace(out / "results.json")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for results.json and log.txt")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds for all stages together")
    parser.add_argument("--stages", nargs="+", choices=[stage.name for stage in STAGES], metavar="STAGE")
    parser.add_argument("--tiny", action="store_true", help="small shapes: does it run")
    parser.add_argument("--list", action="store_true", help="name the stages, and those that cannot run here")
    asked = parser.parse_args()
    by_name = {stage.name: stage for stage in STAGES}
    stages = [by_name[name] for name in asked.stages or by_name]
    if asked.list:
        for stage in stages:
            print(f"{stage.name:24} {lacking(stage, asked.tiny) or f'at most {stage.limit} s'}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stage under way is ended, too
    told = run(stages, asked.out, tiny=asked.tiny, budget=asked.budget)
    print(table(told))
    ended = {name: {key: found[key] for key in ("rc", "seconds")} for name, found in told["stages"].items()}
    print(json.dumps({"stages": ended, "left_out": told["left_out"], "results": str(asked.out / "results.json")}))
    return int(any(found["rc"] != 0 for found in told["stages"].values()))


if __name__ == "__main__":
    sys.exit(main())
