"""Whatever ends a run, what was finished is there, and `--resume` goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import byte_tokenizer, tiny_lm, tiny_reward_model
from safetensors.torch import load_file

from torchbandit.train import checkpoint, folder, lock, report, steps
from torchbandit.train.options import TrainOptions
from torchbandit.train.signals import StoppedAtOnce, stop_signals

HERE = Path(__file__).parent
STEPS = 4


class Runs:
    """Command lines in processes of their own, forked from one that has imported everything."""

    def __init__(self, root: Path) -> None:
        self.root = root
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "forks.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            # Autograd's threads for a GPU would not live on in forks.
            env=env | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.given = dict(
            policy=root / "lm", reward_model=root / "rm", prompts=root / "prompts.jsonl", num_prompts=4, group_size=2,
            max_new_tokens=4, lr=1e-3, device="cpu", num_samples=1, normalize_reward="running", minibatches=2,
        )  # fmt: skip

    def ask(self, **asked: Any) -> int:
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, out: Path, *more: str, **asked: Any) -> int:
        options = [word for key, value in self.given.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        log = str(out.with_suffix(".log"))
        argv = ["train", *options, "--out", str(out), "--steps", str(STEPS), *more]
        return self.ask(argv=argv, log=log, **asked)

    def end(self, pid: int) -> int:
        return self.ask(wait=pid)

    def __call__(self, out: Path, *more: str, **asked: Any) -> int:
        return self.end(self.start(out, *more, **asked))

    def said(self, out: Path) -> str:
        return out.with_suffix(".log").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    root, tokenizer = tmp_path_factory.mktemp("user"), byte_tokenizer()
    for name, model in (("lm", tiny_lm(num_hidden_layers=1)), ("rm", tiny_reward_model(num_hidden_layers=1))):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(6)))
    made = Runs(root)
    assert made.start(root / "whole", here=True) == 0
    yield made
    made.process.stdin.close()
    made.process.wait(60)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Path:
    """A run that nothing has disturbed."""
    return runs.root / "whole"


def metrics(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "samples_per_s"))} for line in lines]


def same(out: Path, whole: Path) -> None:
    """Bit for bit the same run."""
    assert metrics(out) == metrics(whole)
    for name in ("policy/model.safetensors", "checkpoint/policy.safetensors"):
        one, other = load_file(out / name), load_file(whole / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert (out / "evaluation.json").read_text() == (whole / "evaluation.json").read_text()
    assert not (out / "run.lock").exists() and not (out / "checkpoint.new").exists()


def step_of(path: Path) -> int:
    return int(json.loads((path / "options.json").read_text())["steps_done"])


def in_step(number: int, code: str) -> str:
    """Code that runs in the middle of a step, after sampling and scoring."""
    return (
        "import os, resource, signal, sys, time\nfrom pathlib import Path\n"
        "from torchbandit.train.loop import BanditTrainer as T\nold = T.learn\n"
        f"def learn(self, targets):\n    if self.steps_done == {number - 1}:\n        {code}\n"
        "    return old(self, targets)\nT.learn = learn\n"
    )


KILL = "os.kill(os.getpid(), signal.SIGKILL)"
AT_FILE = """
import os, signal, sys
seen = []
def hook(event, args):
    if event == {event!r} and str(args[0]).endswith({name!r}):
        seen.append(1)
        if len(seen) == {count}:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""


@pytest.mark.parametrize(
    ("first", "every", "saved"),
    [
        (in_step(3, KILL), 50, 1),  # long before save_every
        (
            AT_FILE.format(event="open", name="checkpoint.new/options.json", count=4),
            2,
            1,
        ),  # the second one, half written
        (AT_FILE.format(event="os.rename", name="checkpoint.new", count=2), 2, 2),  # whole, and without its name yet
    ],
    ids=["in a step", "in a write", "between renames"],
)
def test_after_kill_9_a_run_goes_on_bit_for_bit(
    runs: Runs, whole: Path, tmp_path: Path, first: str, every: int, saved: int
) -> None:
    out = tmp_path / "run"
    assert runs(out, "--save-every", str(every), first=first) == -signal.SIGKILL
    assert (out / "run.lock").exists()
    with pytest.raises(ValueError, match="holds a run already; go on with --resume"):
        folder.check(out, resume=False)
    assert runs(out, "--resume") == 0, runs.said(out)
    assert f"{saved * 100 // STEPS}%" in runs.said(out).split("has ended without removing it; taken over")[1]
    same(out, whole)


def test_after_kill_9_before_the_first_step_a_run_begins_anew(runs: Runs, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert runs(out, first=AT_FILE.format(event="open", name="checkpoint.new/options.json", count=1)) == -9
    assert runs(out, "--resume") == 2 and "no checkpoint at" in runs.said(out)
    assert runs(out) == 0, runs.said(out)
    same(out, whole)


def killed_at(count: int, directory: Path, policy: torch.nn.Module) -> int:
    """Exit code of a process that writes the third checkpoint and is killed at its file operation `count`."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seen = []

    def hook(event: str, args: Any) -> None:
        if any(str(directory.parent) in str(arg) for arg in args):
            seen.append(event)
            if len(seen) == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    checkpoint.save(directory, policy, {"steps_done": 3}, {"lr": 1}, keep=2)
    os._exit(0)


def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    policy, ends, code = torch.nn.Linear(3, 2), [], -signal.SIGKILL
    while code:
        directory = tmp_path / str(len(ends)) / "checkpoint"
        for step in (1, 2, 3):
            policy.weight.data.fill_(step)
            if step < 3:
                checkpoint.save(directory, policy, {"steps_done": step}, {"lr": 1}, keep=2)
        code = killed_at(len(ends) + 1, directory, policy)
        with pytest.raises(ValueError, match="holds a run already"):
            folder.check(directory.parent, resume=False)
        folder.recover(directory)
        done = checkpoint.load(directory, policy, {"lr": 1})["steps_done"]
        assert bool((policy.weight == done).all())
        ends.append(done)
    assert set(ends) == {2, 3} and ends == sorted(ends) and len(ends) > 10, ends
    assert sorted(path.name for path in directory.parent.iterdir()) == ["checkpoint", "checkpoint.step2"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_ends_the_step_and_saves(runs: Runs, whole: Path, tmp_path: Path, name: str) -> None:
    out, number = tmp_path / "run", getattr(signal, name)
    first = in_step(3, f"os.kill(os.getpid(), signal.{name})")
    assert runs(out, "--save-every", "0", first=first) == 128 + number, runs.said(out)
    told = f"{name}: stopped after step 3 of {STEPS}; the checkpoint is written, go on with the same command and --r"
    assert told in runs.said(out)
    assert step_of(out / "checkpoint") == 3 and not (out / "run.lock").exists()
    if name == "SIGTERM":
        assert runs(out, "--resume") == 0, runs.said(out)
        same(out, whole)


def test_a_second_signal_stops_at_once(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    twice = "[os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]; time.sleep(60)"
    assert runs(out, first=in_step(3, twice)) == 143
    assert "error: interrupted by SIGTERM; what was saved before is whole, --resume goes on there" in runs.said(out)
    assert step_of(out / "checkpoint") == 1 and not (out / "run.lock").exists()


def test_a_signal_before_the_first_step_stops_at_once(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = "import os, signal\nfrom torchbandit.train import build\n"
    first += "build.build_env = lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM)\n"
    assert runs(out, first=first) == 143
    assert "error: interrupted by SIGTERM; what" in runs.said(out) and not list(out.iterdir())


def test_signals_that_are_to_be_ignored_stay_so() -> None:
    """nohup, and a shell's background job."""
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals(patient=True) as seen:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, former)


def test_the_signal_is_told_whatever_has_caught_it() -> None:
    """Ray's own code, in which the handler may run, raises a KeyboardInterrupt of its own instead."""
    with pytest.raises(StoppedAtOnce, match="by SIGTERM") as stopped, stop_signals(patient=False):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        except StoppedAtOnce:
            raise KeyboardInterrupt from None
    assert stopped.value.number == signal.SIGTERM


def test_a_launcher_that_hands_a_signal_on_is_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    now, handler = [100.0], signal.getsignal(signal.SIGTERM)  # a test before may have brought ray's
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with pytest.raises(StoppedAtOnce) as stopped, stop_signals(patient=True) as seen:
        for later in (0.0, 0.5, 5.0):
            now[0] += later
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert seen == [signal.SIGTERM]
    assert now[0] == 105.5 and stopped.value.number == 15
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_closed_terminal_does_not_keep_a_run_from_saving(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    terminal, theirs = pty.openpty()
    first = in_step(3, "Path('here').touch(); [time.sleep(.01) for _ in range(3000) if not Path('gone').exists()]")
    first += "from torchbandit.env import BanditEnv\nrest = BanditEnv.reset\n"
    first += (
        "BanditEnv.reset = lambda self, *a: (sys.stdout.write('!\\n'), sys.stderr.write('!\\n'), rest(self, *a))[2]\n"
    )
    first = f"import os\nos.chdir({str(tmp_path)!r})\n{first}"
    pid = runs.start(out, "--save-every", "0", first=first, tty=os.ttyname(theirs))
    told = b""
    while not (tmp_path / "here").exists():
        if select.select([terminal], [], [], 0.05)[0]:
            told += os.read(terminal, 1000)
    os.close(theirs)
    os.close(terminal)  # the kernel sends SIGHUP, and every write fails from now on
    time.sleep(0.1)
    (tmp_path / "gone").touch()
    assert runs.end(pid) == 129, told
    assert step_of(out / "checkpoint") == 3 and not (out / "run.lock").exists()


def limit(size: str) -> str:
    return f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))"


def test_a_full_disk_leaves_the_former_checkpoint(runs: Runs, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert runs(out, "--save-every", "1", first=in_step(3, limit("100_000"))) == 1
    told = runs.said(out)
    assert "error: checkpoint: could not be written to" in told and "MB are free there" in told
    assert "The checkpoint of step 2 is whole: make room, then go on with the same command and --resume" in told
    assert "Traceback" not in told and not (out / "checkpoint.new").exists() and not (out / "run.lock").exists()
    assert runs(out, "--resume") == 0, runs.said(out)
    same(out, whole)


def test_a_full_disk_under_the_metrics_costs_no_line(runs: Runs, whole: Path, tmp_path: Path) -> None:
    """Part of the third line is written: it is gone after the resume, and none is there twice or missing."""
    out = tmp_path / "run"
    here = f"(Path({str(out)!r}) / 'metrics.jsonl').stat().st_size + 50"
    assert runs(out, first=in_step(3, limit(here))) == 1
    assert "metrics.jsonl: could not be written (File too large). The checkpoint of step 1 is whole" in runs.said(out)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3 and "Traceback" not in runs.said(out)
    assert runs(out, "--resume") == 0, runs.said(out)
    same(out, whole)


def test_a_full_disk_under_the_lock_is_told(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    assert runs(out, first=f"import resource\n{limit('0')}") == 1  # the log itself stays empty
    monkeypatch.setattr(lock, "_create", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    told = r"run.lock: could not be written \(No space left.*make room there, or name"
    with pytest.raises(OSError, match=told), folder.claim(out, resume=False):
        pass
    assert not list(out.iterdir())


def test_metrics_are_cut_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"st'
    (tmp_path / "metrics.jsonl").write_text(text)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match=r"metrics.jsonl: could not be written \(No space left"):
            report.Reporter(tmp_path, steps=4, done=2, show=False)
    assert (tmp_path / "metrics.jsonl").read_text() == text and len(list(tmp_path.iterdir())) == 1
    with report.Reporter(tmp_path, steps=4, done=2, show=False) as reporter:
        reporter({"step": 3})
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]


def test_two_runs_never_share_a_folder(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pid = runs.start(out, "--steps", "10000", "--save-every", "0")
    while not (out / "checkpoint").exists():
        time.sleep(0.01)
    owner = json.loads((out / "run.lock").read_text())
    assert (owner["host"], owner["pid"]) == (socket.gethostname(), pid)
    told = rf"the run in .* is live on {owner['host']}, process {pid}, since {owner['since'][:10]}"
    for resume in (False, True):
        with pytest.raises(ValueError, match=told):
            folder.check(out, resume)
        with pytest.raises(ValueError, match=told), lock.hold(out):
            pass
    before = (out / "run.lock").read_text()
    code = (
        "import sys; from torchbandit.cli import main\n"
        f"code = main(['train', '--out', {str(out)!r}, '--resume'])\n"
        "sys.exit(code + 10 * any(name in sys.modules for name in ('torch', 'accelerate', 'ray')))"
    )
    started = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert started.returncode == 2 and f"process {pid}" in started.stderr, "refused before anything heavy is loaded"
    assert (out / "run.lock").read_text() == before
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while lock._lives(owner) and time.monotonic() < deadline:  # nobody has reaped it yet, and still it is dead
        time.sleep(0.01)
    with pytest.warns(UserWarning, match=f"process {pid} has ended without removing it; taken over"), lock.hold(out):
        assert json.loads((out / "run.lock").read_text())["pid"] == os.getpid()
    assert runs.end(pid) == -9 and not (out / "run.lock").exists()


def test_whose_lock_it_is(tmp_path: Path) -> None:
    path = tmp_path / lock.NAME
    mine = lock._this_process()

    def write(**changes: Any) -> None:
        path.write_text(json.dumps(mine | changes))

    write(host="elsewhere", pid=4)
    with pytest.raises(ValueError, match=rf"live on elsewhere, process 4, .*remove {path}"), lock.hold(tmp_path):
        pass
    for text in ("", "{", "[]", '{"pid": "x"}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{path} cannot be read; .*remove that file"), lock.hold(tmp_path):
            pass
    write()
    with pytest.raises(ValueError, match=f"process {os.getpid()}"), lock.hold(tmp_path):
        pass
    write(started="another boot 17")  # the number was given to another process later: to this one
    with pytest.warns(UserWarning, match="taken over"), lock.hold(tmp_path):
        path.write_text("another run's, since someone removed ours")
    assert path.read_text().startswith("another run's"), "only one's own lock is removed"


def test_the_last_checkpoints_are_kept(runs: Runs, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert runs(out, "--save-minutes", "1e-9", "--keep-checkpoints", "3") == 0, runs.said(out)
    assert sorted(p.name for p in out.glob("checkpoint*")) == ["checkpoint", "checkpoint.step2", "checkpoint.step3"]
    assert [step_of(out / name) for name in ("checkpoint", "checkpoint.step2")] == [4, 2]
    # The newest is damaged in its middle, its size as it was; the next lacks a file.
    weights = out / "checkpoint" / "policy.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    (out / "checkpoint.step3" / "rank0.pt").unlink()
    assert runs(out, "--resume") == 0, runs.said(out)
    told = "resume: checkpoint is damaged (policy.safetensors is not as it was written); checkpoint.step3 is damaged "
    told += "(rank0.pt is missing). Set aside as checkpoint.damaged, checkpoint.step3.damaged; going on from "
    assert f"warning: {told}checkpoint.step2, after step 2" in runs.said(out)
    same(out, whole)
    assert step_of(out / "checkpoint.step2") == 2
    for name in ("checkpoint", "checkpoint.step2"):
        (out / name / "files.rank0.json").unlink()
    with pytest.raises(
        ValueError, match="no checkpoint in .* is whole: checkpoint is dam.*checkpoint.step2 is dam.*new"
    ):
        folder.recover(out / "checkpoint")


def test_when_a_checkpoint_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def due(every: int, minutes: float, done: int = 0) -> list[int]:
        now[0] = 0.0
        saves = steps.Saves(SimpleNamespace(save_every=every, save_minutes=minutes), done)
        found = []
        for step in range(done + 1, 11):
            now[0] += 60.0
            if saves.due(step):
                found.append(step)
                saves.note(step)
        return found

    assert due(50, 10) == [1] and due(0, 0) == []
    assert due(4, 0) == [1, 4, 8] and due(0, 3) == [1, 4, 7, 10] and due(4, 3) == [1, 4, 7, 8]
    assert due(50, 10, done=5) == [] and due(0, 3, done=5) == [8]


def test_a_schedule_is_part_of_what_a_run_is(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    linear = ("--schedule", "linear", "--num-samples", "1", "--steps")
    assert runs(out, *linear, "2") == 0, runs.said(out)
    assert runs(out, *linear, "3", "--resume") == 2
    assert "steps: was 2, is now 3, and the linear schedule of the learning rate depends on it" in runs.said(out)
    assert "Use --steps 2, or add --extend" in runs.said(out) and len(metrics(out)) == 2
    assert runs(out, *linear, "3", "--resume", "--extend") == 0, runs.said(out)
    assert "extend: from step 3 on the learning rate follows the linear schedule of 3 steps" in runs.said(out)
    assert [line["step"] for line in metrics(out)] == [1, 2, 3]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_other_steps_at_a_resume(tmp_path: Path, schedule: str) -> None:
    def find(steps: int, extend: bool = False) -> int:
        options = {"steps": steps, "schedule": schedule, "extend": extend}
        return int(folder.find(tmp_path / "checkpoint", options)["steps_done"])

    saved = {"steps": 8, "schedule": schedule, "extend": False}
    folder.write(tmp_path / "checkpoint", lambda _: None, 4, saved)
    assert find(8) == 4
    for extend in (False, True):
        with pytest.raises(ValueError, match="steps: the run has done 4 steps; must be at least that, got 3"):
            find(3, extend)
    for other in (6, 16):
        if schedule == "constant":
            assert find(other) == find(other, extend=True) == 4
        else:
            with pytest.raises(ValueError, match=f"steps: was 8, is now {other}, and the {schedule} .* add --extend"):
                find(other)
            with pytest.warns(UserWarning, match=f"from step 5 on .* {schedule} schedule of {other} steps, no longer"):
                assert find(other, extend=True) == 4


def test_extend_is_of_a_resume() -> None:
    with pytest.raises(ValueError, match="extend: is of a run that goes on; add --resume"):
        TrainOptions(policy="a", prompts="b", reward_model=["c"], extend=True)


def test_half_a_step_is_not_saved(runs: Runs, whole: Path, tmp_path: Path) -> None:
    """The second of two updates fails: the weights have moved, so the last checkpoint is the one to go on from."""
    out = tmp_path / "run"
    first = (
        "from torchbandit.learn.update import Update as T\nold = T.update\nseen = []\n"
        "def update(self, *a):\n    seen.append(1)\n    if len(seen) == 6:\n        raise ValueError('broken')\n"
        "    return old(self, *a)\nT.update = update\n"
    )
    assert runs(out, first=first) == 2
    assert "step 3 failed; the checkpoint of step 1 is whole" in runs.said(out)
    assert runs(out, "--resume") == 0, runs.said(out)
    same(out, whole)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return int(taken.getsockname()[1])


def both(runs: Runs, out: Path, *more: str, first: tuple[str, str] = ("", "")) -> list[int]:
    """Two processes of one run, as a launcher starts them."""
    port = free_port()
    pids = [
        runs.start(
            out, *more, first=first[rank],
            env={"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                 "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
        )
        for rank in range(2)
    ]  # fmt: skip
    return [runs.end(pid) for pid in pids]


@pytest.mark.slow
def test_all_processes_leave_together(runs: Runs, tmp_path: Path) -> None:
    """One of two gets the signal, and only the main one has a clock; both save and leave after the same step."""
    straight, out = tmp_path / "straight", tmp_path / "run"
    assert both(runs, straight, "--save-minutes", "0") == [0, 0], runs.said(straight)
    slow = "import time\nt = time.monotonic\ntime.monotonic = lambda: 1e5 * t()\n"
    term = in_step(3, "os.kill(os.getpid(), signal.SIGTERM)")
    assert both(runs, out, "--save-every", "0", "--keep-checkpoints", "9", first=(slow, term)) == [143, 143]
    assert "SIGTERM: stopped after step 3" in runs.said(out)
    assert {p.name for p in out.glob("checkpoint*")} == {"checkpoint", "checkpoint.step1", "checkpoint.step2"}
    assert {p.name for p in (out / "checkpoint").iterdir()} >= {"rank0.pt", "rank1.pt", "files.rank1.json"}
    full = in_step(4, limit("100_000"))
    assert both(runs, out, "--resume", "--save-every", "2", first=("", full)) == [1, 1]
    assert "another process could not write its part" in runs.said(out), "no process waits for one that has failed"
    assert both(runs, out, "--resume") == [0, 0], runs.said(out)
    same(out, straight)


@pytest.mark.slow
def test_the_rllib_engine_survives_too(runs: Runs, tmp_path: Path) -> None:
    """Killed while its second checkpoint has no name yet, then told to stop, then left alone."""
    pytest.importorskip("ray", reason="the rllib extra is not installed")
    rllib = ("--engine", "rllib", "--save-every", "2", "--packing", "false")
    straight, out = tmp_path / "straight", tmp_path / "run"
    assert runs(straight, *rllib) == 0, runs.said(straight)
    kill = AT_FILE.format(event="os.rename", name="checkpoint.new", count=2)
    assert runs(out, *rllib, first=kill) == -9
    assert runs(out, *rllib, "--resume", first=RAY_TERM) == 143, runs.said(out)
    assert "SIGTERM: stopped after step 3 of 4" in runs.said(out) and not (out / "run.lock").exists()
    assert {path.name: step_of(path) for path in out.glob("checkpoint*")} == {"checkpoint": 3, "checkpoint.step2": 2}
    assert runs(out, *rllib, "--resume") == 0, runs.said(out)
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4] and metrics(out) == metrics(straight)
    one, other = (load_file(path / "policy/model.safetensors") for path in (out, straight))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_rllib_takes_a_failed_batch_again(tmp_path: Path) -> None:
    """A reward that fails has drawn prompts and tokens; undone, the next iteration is that of a run without it."""
    pytest.importorskip("ray", reason="the rllib extra is not installed")
    from rllib_toy import make_models, toy_config

    policy = make_models(tmp_path)["policy"]
    rewards = []
    for fails in (True, False):
        algo = toy_config(policy).build_algo()
        assert not algo.undo_sampling(), "nothing was tried yet"
        algo.train()
        assert not algo.undo_sampling(), "it has learnt"
        runner = algo.env_runner_group.local_env_runner
        if fails:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Exception, match="broken"):
                patch.setattr(runner.env, "step", lambda td: (_ for _ in ()).throw(ValueError("broken")))
                algo.train()
            assert algo.undo_sampling()
        rewards.append(algo.train()["env_runners"]["reward"])
        algo.stop()
    assert rewards[0] == rewards[1]


RAY_TERM = """
import os, signal
from torchbandit.rllib.config import BanditAlgorithm as A
old = A.training_step
def training_step(self):
    if self.iteration == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return old(self)
A.training_step = training_step
"""
