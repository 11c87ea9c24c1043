"""`torchbandit train --engine rllib`: the command line, the files and the ends of the local engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ray = pytest.importorskip("ray", reason="the rllib extra is not installed")

from rllib_toy import NUM_PROMPTS, T, make_models  # noqa: E402

from torchbandit.cli import main, read_options  # noqa: E402
from torchbandit.rllib.run import gpu_shares, to_config  # noqa: E402
from torchbandit.train.loop import schedule_factor  # noqa: E402

FILES = {"metrics.jsonl", "curve.png", "samples.md", "evaluation.json", "policy", "checkpoint"}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a run on files of one's own."""
    folder = tmp_path_factory.mktemp("toy")
    paths = make_models(folder)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(NUM_PROMPTS)))
    given: dict[str, Any] = dict(
        policy=paths["policy"], reward_model=paths["reward"], prompts=prompts, ptx_data=paths["corpus.txt"],
        ptx_coef=0.1, ptx_length=32, num_prompts=4, group_size=4, max_new_tokens=T, minibatches=2, lr=1e-3,
        save_every=0, save_minutes=0, device="cpu", schedule="linear", packing=False, num_samples=2,
    )  # fmt: skip
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def engine(own: list[str], out: Path, steps: int, places: str = "0/0") -> list[str]:
    if places == "local":
        return ["train", *own, "--out", str(out), "--steps", str(steps)]
    runners, learners = places.split("/")
    more = ["--engine", "rllib", "--env-runners", runners, "--learners", learners]
    return ["train", *own, "--out", str(out), "--steps", str(steps), *more]


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def processes(mark: str) -> dict[int, str]:
    """Those that have `mark` in their environment: whatever a marked process has started, Ray's daemons too."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended, or is not ours
            continue
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """With two GPUs that Ray believes in."""
    ray.init("local", num_cpus=8, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("places", ["local", "2/1"])
def test_ctrl_c_leaves_a_checkpoint_and_no_process(own: list[str], tmp_path: Path, places: str) -> None:
    """SIGINT to the whole foreground group, as a terminal sends it; then the run goes on, with another learner."""
    out, mark = tmp_path / "out", uuid.uuid4().hex
    command = [sys.executable, "-m", "torchbandit", *engine(own, out, 10_000, places)]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"MARK": mark}, start_new_session=True)
        metrics = out / "metrics.jsonl"
        while run.poll() is None and not (metrics.exists() and "\n" in metrics.read_text()):
            time.sleep(0.05)
        assert len(processes(mark)) > 5 or places == "local", "the search for processes finds none"
        os.killpg(run.pid, signal.SIGINT)
        code = run.wait(timeout=300)
    told, done = (tmp_path / "log").read_text(), len(lines(out))
    assert code == 130 and f"stopped after step {done} of 10000; the checkpoint is written" in told, told[-3000:]
    assert {path.name for path in out.iterdir()} == {"metrics.jsonl", "evaluation.json", "checkpoint"}
    deadline = time.monotonic() + 120
    while (left := processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, left
    more = engine(own, out, done + 2, "2/2" if places == "2/1" else places)
    assert main([*more, "--resume", "--extend"]) == 0
    assert [line["step"] for line in lines(out)] == list(range(1, done + 3))
    assert {path.name for path in out.iterdir()} == FILES | {f"checkpoint.step{done}"}


@pytest.mark.slow
def test_files_of_the_local_engine(
    own: list[str], tmp_path: Path, cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out, beside = tmp_path / "rllib", tmp_path / "local"
    assert main(engine(own, out, 3)) == main(engine(own, beside, 3, "local")) == 0
    assert {path.name for path in out.iterdir()} == {path.name for path in beside.iterdir()} == FILES
    ours, theirs = lines(out), lines(beside)
    assert [line["step"] for line in ours] == [1, 2, 3]
    assert set(ours[1]) ^ set(theirs[1]) == {"time/sync_s"}
    assert ours[0]["loss/ptx"] == pytest.approx(theirs[0]["loss/ptx"], abs=1e-5)
    assert main(engine(own, out, 3)) == 2 and "holds a run already" in capsys.readouterr().err
    assert main([*engine(own, out, 3), "--resume"]) == 2 and "has done its 3 steps" in capsys.readouterr().err
    assert main([*engine(own, out, 4), "--resume", "--lr", "0.5"]) == 2
    assert "lr was 0.001, is now 0.5" in capsys.readouterr().err
    assert main([*engine(own, out, 4), "--resume"]) == 2 and "add --extend" in capsys.readouterr().err
    assert main([*engine(own, out, 4, "1/0"), "--resume", "--extend"]) == 2
    assert "env_runners was 0, is now 1" in capsys.readouterr().err, "the schedule counts rows"
    assert main([*engine(own, out, 4), "--resume", "--extend"]) == 0
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--algo", "grpo", "--critic", "head"], "critic: grpo has no use for one"),
        (["--env-runners", "2", "--learners", "3"], "minibatches, learners: must divide the batch of 8 prompts"),
        (["--env-runners", "-1"], "env_runners: must be at least 0, got -1"),
        (["--engine", "local", "--env-runners", "2"], "are of the rllib engine; add --engine rllib"),
    ],
)
def test_bad_options(
    own: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert main([*engine(own, tmp_path / "out", 3), *options]) == 2
    assert words in capsys.readouterr().err


def test_schedule_of_the_local_engine(own: list[str], tmp_path: Path, cluster: None) -> None:
    """RLlib interpolates over rows sampled; at every iteration it must be the local engine's rate."""
    options = read_options("train", [*engine(own, tmp_path / "out", 4), "--warmup-steps", "1"][1:])
    algo = to_config(options, torch.device("cpu")).build_algo()
    groups = algo.learner_group._learner._masters.param_groups
    rates = [groups[0]["lr"]]
    for _ in range(3):
        algo.train()
        rates.append(groups[0]["lr"])
    algo.stop()
    assert rates == pytest.approx([1e-3 * schedule_factor("linear", step, 4, 1) for step in range(4)])


@pytest.mark.slow
def test_gpus_are_shared_out(own: list[str], tmp_path: Path, cluster: None) -> None:
    """As Ray packs actors onto two GPUs, runners first: NCCL takes no two learners on one of them."""

    @ray.remote(num_cpus=0)
    class Actor:
        def gpu(self) -> Any:
            return ray.get_gpu_ids()[0]

    def place(num: int, share: float) -> list[Any]:
        return [Actor.options(num_gpus=share).remote() for _ in range(num)]

    for runners, learners in ((2, 2), (4, 2), (1, 2), (2, 1), (5, 0)):
        options = read_options("train", engine(own, tmp_path / "out", 4, f"{runners}/{learners}")[1:])
        runner_share, learner_share = gpu_shares(options)
        actors = place(runners, runner_share)
        ray.get([actor.gpu.remote() for actor in actors], timeout=300)
        ranks = place(learners, learner_share)
        theirs = ray.get([actor.gpu.remote() for actor in ranks], timeout=300)
        assert len(set(theirs)) == learners, (runners, learners, theirs)
        for actor in actors + ranks:
            ray.kill(actor)
        deadline = time.monotonic() + 60
        while ray.available_resources().get("GPU") != 2 and time.monotonic() < deadline:
            time.sleep(0.05)
    for places, most in (("2/3", 2), ("1/3", 2), ("0/4", 2)):
        options = read_options("train", engine(own, tmp_path / "out", 4, places)[1:])
        with pytest.raises(ValueError, match=f"learners: each needs a GPU of its own.*at most {most}, got"):
            gpu_shares(options)
    assert (one := gpu_shares(read_options("train", engine(own, tmp_path / "out", 4, "1/1")[1:]))) == (1.0, 1.0), one
