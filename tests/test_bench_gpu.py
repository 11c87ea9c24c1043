"""The list of what is run on a card: stages that fail, overrun or cannot run, and a run that is itself ended."""

from __future__ import annotations

import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from torchbandit.bench import generate, score

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_list", GPU / "all.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_list"] = module
    spec.loader.exec_module(module)
    return module


gpu = load()


def stage(name: str, code: str, limit: float = 120.0, needs: tuple[str, ...] = ()) -> Any:
    return gpu.Stage(name, ("-c", code), limit, needs, tiny=())


def test_a_stage_that_fails_overruns_or_cannot_run_is_told_and_the_next_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    stages = [
        stage("fails", "print('before'); raise SystemExit(3)"),
        stage("overruns", "import time; time.sleep(1000)", limit=1.0),
        stage("lacks", "print('never')", needs=("no_such_package",)),
        stage("lacks cards", "print('never')", needs=("two GPUs",)),
        stage("works", "print('{no json}'); print('{\"lines\": [], \"x\": 1}')"),
    ]
    told = gpu.run(stages, tmp_path, tiny=True, budget=1e9)
    assert json.loads((tmp_path / "results.json").read_text()) == told
    ran = told["stages"]
    assert {name: found["rc"] for name, found in ran.items()} == {"fails": 3, "overruns": None, "works": 0}
    assert ran["fails"]["tail"] == ["before"] and ran["works"]["result"] == {"lines": [], "x": 1}
    assert ran["overruns"]["seconds"] >= 1.0
    why = told["left_out"]["lacks"]
    assert why == "no_such_package cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"
    log = (tmp_path / "log.txt").read_text()
    assert "=== fails: -c" in log and "before" in log and "never\n" not in log
    table = gpu.table(told)
    for says in ("failed (3)", "ended at its limit", "ok", "left out: no_such_package cannot be imported"):
        assert says in table
    assert "overruns: ended at its limit" in capsys.readouterr().out


def test_cards_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for cards, missing in ((0, ["needs a CUDA device, 0 are here", "needs two GPUs, 0 are here"]),
                           (1, [None, "needs two GPUs, 1 are here"]), (2, [None, None])):  # fmt: skip
        monkeypatch.setattr("torch.cuda.device_count", lambda cards=cards: cards)
        found = [gpu.lacking(stage("x", "", needs=(need,)), tiny=True) for need in ("cuda", "two GPUs")]
        assert found == missing
        assert (gpu.lacking(stage("x", ""), tiny=False) is None) == (cards > 0), "all but the tiny forms need a card"


def test_a_package_that_lacks_what_it_needs_is_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "half_a_package.py").write_text("import no_such_package")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    stages = [stage("works", "pass"), stage("half", "print('never')", needs=("half_a_package",))]
    told = gpu.run(stages, tmp_path, tiny=True, budget=1e9)
    assert list(told["stages"]) == ["works"] and "no_such_package" in told["left_out"]["half"]
    assert capsys.readouterr().out.startswith("left out: half: half_a_package cannot be imported")


def test_what_the_budget_does_not_hold_is_left_out(tmp_path: Path) -> None:
    told = gpu.run([stage("long", "pass", limit=500.0)], tmp_path, tiny=True, budget=5.0)
    assert told["stages"] == {} and told["left_out"] == {"long": "no time was left"}


def test_tests_run_side_by_side_and_first(tmp_path: Path) -> None:
    """Each of the two waits for the other's file; the log holds both, whole."""
    wait = """
import pathlib, sys, time
here, there = (pathlib.Path({folder!r}) / name for name in {names})
here.touch()
while not there.exists():
    time.sleep(0.05)
print('it is there')
"""
    names = ("one", "two")
    tests = [
        stage(f"test-{name}", wait.format(folder=str(tmp_path), names=(name, names[1 - i])))
        for i, name in enumerate(names)
    ]
    last = stage("measures", f"import os; print(sorted(set(os.listdir({str(tmp_path)!r})) & {set(names)!r}))")
    told = gpu.run([last, *tests], tmp_path, tiny=True, budget=1e9)["stages"]
    assert {name: found["rc"] for name, found in told.items()} == {"test-one": 0, "test-two": 0, "measures": 0}
    assert told["test-one"]["tail"] == told["test-two"]["tail"] == ["it is there"]
    assert told["measures"]["tail"] == ["['one', 'two']"]
    assert (tmp_path / "log.txt").read_text().count("\nit is there\n") == 2


def test_each_card_takes_the_next_stage_and_what_needs_two_comes_last_and_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two wait for each other; a third takes the place of whichever ends."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    see = "import json, os; print(json.dumps({'sees': os.environ['CUDA_VISIBLE_DEVICES']}))"
    wait = """
import pathlib, time
here, there = (pathlib.Path({folder!r}) / name for name in {names})
here.touch()
while not there.exists():
    time.sleep(0.05)
"""
    codes = {name: wait.format(folder=str(tmp_path), names=(name, other)) + see
             for name, other in (("one", "two"), ("two", "one"))}  # fmt: skip
    stages = [
        stage("wide", see, needs=("two GPUs",)),
        *(stage(name, code) for name, code in codes.items()),
        stage("three", see),
    ]
    told = gpu.run(stages, tmp_path, tiny=False, budget=1e9)["stages"]
    sees = {name: found["result"]["sees"] for name, found in told.items()}
    assert {sees["one"], sees["two"]} == {"5", "7"} and sees["three"] in ("5", "7") and sees["wide"] == "5,7"
    assert list(told)[-1] == "wide"


@pytest.mark.parametrize("names", [("first", "second"), ("first", "test-second")])
def test_an_ended_run_keeps_what_it_has_and_leaves_nothing_running(names: tuple[str, str], tmp_path: Path) -> None:
    """Its second stage ends the run itself, and would sleep on."""
    kill = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(1000)"
    code = f"""
import sys
sys.path.insert(0, {str(GPU)!r})
import all as gpu
gpu.STAGES = (
    gpu.Stage({names[0]!r}, ("-c", "print(1)"), 100, (), ()),
    gpu.Stage({names[1]!r}, ("-c", {kill!r}), 100, (), ()),
)
sys.argv = ["all", "--tiny", "--out", {str(tmp_path)!r}]
sys.exit(gpu.main())
"""
    # The pipe closes when the last process that holds it is gone.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 143, done.stderr
    ran = json.loads((tmp_path / "results.json").read_text())["stages"]
    assert ran.pop(names[1]) == {"running": True}
    assert all(found["rc"] == 0 for found in ran.values()) and len(ran) == (names[1] == "second")


def test_a_stage_ends_with_all_that_it_started() -> None:
    child = "import time; print(1, flush=True); time.sleep(1000)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, process_group=0)
    assert process.stdout is not None and process.stdout.readline() == b"1\n"
    gpu.end(process)
    assert process.stdout.read() == b"", "the pipe closes when the last that holds it is gone"


def test_the_list_names_what_there_is() -> None:
    names = [stage.name for stage in gpu.STAGES]
    assert len(set(names)) == len(names)
    words = [word for stage in gpu.STAGES for word in stage.command]
    for file in words:
        assert not file.endswith(".py") or (gpu.ROOT / file).is_file(), file
    rows = {"score": set(score.ROWS), "generate": set(generate.ROWS)}
    for what, known in rows.items():
        asked = [stage.command[5:] for stage in gpu.STAGES if stage.command[1:4] == ("torchbandit", "bench", what)]
        assert sorted(row for part in asked for row in part) == sorted(known)
    tests = {path.name for path in Path(__file__).parent.glob("test_gpu_*.py")}
    kernels = {path.name for path in Path(__file__).parent.glob("test_*_kernels*.py")}
    assert tests | kernels == {Path(word).name for word in words if word.startswith("tests/")}


@pytest.mark.parametrize("script", ["generate", "decode_kernels", "scoring_kernels"])
def test_the_studies_run(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Tiny, so that they never rot; their own assertions are part of it."""
    ways = ["--rows", "b256", "long", "--ways", "plain", "no gates"] if script == "generate" else []
    monkeypatch.syspath_prepend(str(GPU))
    monkeypatch.setattr("sys.argv", [script, "--tiny", *ways])
    runpy.run_path(str(GPU / f"{script}.py"), run_name="__main__")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    if script != "generate":
        return
    assert set(found["rows"]) == {"b256", "long"}
    for row in found["rows"].values():
        assert set(row["ways_ms"]) == {"usual", "plain", "no gates"}
        assert all(isinstance(ms, float) and ms > 0 for ms in row["ways_ms"].values()), row["ways_ms"]
        for part in ("products", "attention", "draw"):
            figures = row["parts"][part]
            assert min(figures[name] for name in ("us", "launches", "alone", "bytes", "limit")) > 0
        assert row["parts"]["rest"]["us"] > 0 and row["limit_ms"] > 0


@pytest.mark.slow
def test_the_engines_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In one process; RLlib's own tests run it."""
    monkeypatch.setattr("sys.argv", ["engines", "--tiny", "--places", "local"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(GPU / "engines.py"), run_name="__main__")
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row["place"] == "local" and row["samples_per_s"] > 0


@pytest.mark.slow
def test_the_precisions_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["precision", "--tiny", "--out", str(tmp_path)])
    monkeypatch.syspath_prepend(str(GPU.parent))
    runpy.run_path(str(GPU / "precision.py"), run_name="__main__")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["results"]["bfloat16"]["reward_model"]["tokens_per_s"] > 0
    assert (tmp_path / "profile.png").stat().st_size > 1000
