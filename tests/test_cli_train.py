"""`torchbandit train` on the command line: options of the algorithm, headings, the printed config, the demo."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from torchbandit import cli, demo
from torchbandit.commands.layout import lay_out
from torchbandit.commands.train import ELSEWHERE, GROUPS, TRAIN
from torchbandit.learn import ALGORITHMS
from torchbandit.train.options import DEMO_SETTINGS, TrainOptions

NAMES = sorted(ALGORITHMS)
OWN = """
import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torchbandit.learn import GRPO, Algorithm

@dataclass(frozen=True)
class Mine(GRPO):
    '''Mine: my own.

    Args:
        strength: How much of it.
    '''

    least_group_size: ClassVar[int] = 3
    strength: float = 1
    weights: tuple[float, ...] = (1, 2.5)
    words: list[str] = field(default_factory=lambda: ["1e-6"])
    on: bool = True
    bound: float = math.inf
    kind: Literal["a", "b"] = "a"

@dataclass(frozen=True)
class Needs(GRPO):
    must: float = field(kw_only=True)

@dataclass(frozen=True)
class Takes(GRPO):
    lr: float = 1.0

@dataclass(frozen=True)
class Complex(GRPO):
    f: complex = 1j

@dataclass(frozen=True)
class Unknown(GRPO):
    f: "Nowhere" = 1

class Bare(GRPO):
    f: float = 1.0

@dataclass(frozen=True)
class Half(Algorithm):
    f: float = 1.0

class NoAlgorithm:
    pass
"""


def options(*argv: str) -> TrainOptions:
    made: TrainOptions = cli.read_options("train", argv)
    return made


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line; nothing else was said."""
    assert cli.main(["train", *argv]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1
    return err.removeprefix("error: ").strip()


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["train", *argv, "--print-config"]) == 0
    out, err = capsys.readouterr()
    assert not err
    return out


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with algorithms of one's own, in the current folder."""
    name = f"own_{re.sub(r'[^a-z0-9]', '_', tmp_path.name.lower())}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def test_every_option_stands_under_one_heading() -> None:
    fields = [field.name for field in dataclasses.fields(TrainOptions)]
    listed = [name for names in GROUPS.values() for name in names]
    assert sorted([*listed, *ELSEWHERE]) == sorted(fields)
    assert list(GROUPS) == ["model", "data", "reward", "sampling", "algorithm", "optimisation", "run", "engine"]


@pytest.mark.parametrize("algo", NAMES)
def test_the_algorithms_fields_are_options(algo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cls = ALGORITHMS[algo]
    layout = lay_out(TRAIN, algo)
    assert layout.own == [field.name for field in dataclasses.fields(cls)] and len(layout.own) >= 2
    assert all(layout.options[name].help for name in layout.own)
    first = layout.own[-1]
    default = options("--algo", algo)
    assert default.algo == algo and type(default.algorithm) is cls and list(default.algo_options) == layout.own
    # A printed config is the same run, and prints the same bytes; the demo is in it.
    config = tmp_path / "run.yaml"
    config.write_text(printed(capsys, "--algo", algo))
    assert options("--config", str(config)) == default
    assert printed(capsys, "--config", str(config)) == config.read_text()
    assert f"\n{first}: " in config.read_text() and f"policy: {demo.SFT}\n" in config.read_text()


def test_options_of_the_algorithm_are_given_flat(tmp_path: Path) -> None:
    made = options("--algo", "dapo", "--clip-high", "0.5", "--scale", "batch", "--clip", "null")
    assert (made.algorithm.clip_high, made.algorithm.scale, made.algorithm.clip) == (0.5, "batch", None)
    assert made.algorithm.mean == "token", "what is not given is the algorithm's own"
    config = tmp_path / "run.yaml"
    config.write_text("algo: grpo\nclip-high: 0.3\nscale: none\n")
    made = options("--config", str(config), "--scale", "batch")
    assert (made.algo, made.algorithm.clip_high, made.algorithm.scale) == ("grpo", 0.3, "batch"), "arguments win"
    assert options("--config", str(config), "--algo", "cispo").algorithm.clip_as == "weight"
    with pytest.raises(ValueError, match=r"run.yaml: clip_high: is no option of raft; ppo, .*grpo.* have it"):
        options("--config", str(config), "--algo", "raft")


def test_the_order_of_a_printed_config_is_that_of_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--algo", "gspo")
    assert "\ngroup_size: 2\n" in text and "\nkl_in: loss\nkl_estimator: k3\n" in text, "as they come out"
    with pytest.raises(SystemExit):
        cli.main(["train", "--algo", "gspo", "--help"])
    told = capsys.readouterr().out
    keys = re.findall(r"^(\w+): ", text, re.MULTILINE)
    flags = re.findall(r"^  --([\w-]+)", told, re.MULTILINE)
    assert keys == [flag.replace("-", "_") for flag in flags if flag not in ("config", "print-config")]
    titles = re.findall(r"^# (.*)$", text, re.MULTILINE)
    assert titles == [*list(GROUPS)[:5], "options of gspo", *list(GROUPS)[5:]]
    assert [line[:-1] for line in told.splitlines() if line[:-1] in titles and line.endswith(":")] == titles


def test_help_shows_the_algorithms_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, says, not_says in (
        (["--algo", "gspo"], "options of gspo: GSPO: the ratio is that of the response", "--gamma"),
        (["--algo=gspo"], "Ratio clip. null: none below. (default: 0.0003)", "--value-clip"),
        (["--algo", "cispo"], "Ratio clip. null: none below. (default: null)", "--best"),
        ([], "options of ppo: PPO: GAE against a critic", "--clip-as"),
        ([], "Lambda of GAE. (default: 0.95)", "--mismatch"),
        ([], "--overlong-soft", "--loss-kl-coef"),
        ([], "--print-config", "--algo-options"),
    ):
        with pytest.raises(SystemExit) as left:
            cli.main(["train", *argv, "--help"])
        out = " ".join(capsys.readouterr().out.split())
        assert left.value.code == 0 and says in out and not_says not in out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--algo grpo --gamma 0.9", "gamma: is no option of grpo; ppo has it"),
        ("--gamma=0.9 --algo=grpo", "gamma: is no option of grpo; ppo has it"),
        ("--scale none", "scale: is no option of ppo; grpo, dr_grpo, dapo, gspo, cispo have it"),
        ("--best 2 --algo rloo", "best: is no option of rloo; raft has it"),
        ("--algo grpo --loss-kl-coef 0.3", "loss_kl_coef: is no option here: it follows from kl_coef and kl_in; give "),
        ("--loss-kl-estimator k1", "loss_kl_estimator: is no option here: it follows from kl_estimator and kl_in"),
        ("--mismatch off", "mismatch: is no option here: it is for responses that another engine sampled"),
        ("--mismatch-per token", "mismatch_per: is no option here"),
        ("--mismatch-cap 0", "mismatch_cap: is no option here"),
        ("--algo-options {}", "algo_options: is no option here: give the algorithm's options by their own names"),
        ("--gama 0.9", "unknown option --gama; did you mean --gamma?"),
        ("--algo dr-grpo", "algo: must be ppo, "),
        ("--algo dr-grpo", "got 'dr-grpo'; did you mean dr_grpo?"),
        ("--algo dpo --help", "got 'dpo'; did you mean dapo?"),
        ("--algo=", "got ''; or package.module:Class for one of your own"),
        ("--algo", "argument --algo: expected one argument"),
        ("--algo math:pi", "algo: 'math:pi' must be a subclass of torchbandit.learn.Algorithm, got 3.14"),
        ("--algo nowhere:Class", "algo: 'nowhere' cannot be imported (ModuleNotFoundError: No module named 'nowhere')"),
        ("--algo math:Class", "algo: module 'math' has no 'Class'"),
        ("--clip 0", "clip: must be above 0, got 0.0"),
        ("--algo grpo --clip-high 0", "clip_high: must be above 0, got 0.0"),
        ("--algo grpo --mean tokn", "--mean: must be token or response or width or sum, got tokn"),
        ("--algo grpo --group-size 1", "group_size: must be at least 2 for grpo, got 1"),
        ("--algo grpo --critic head", "critic: grpo has no use for one, got 'head'; leave it out"),
        ("--algo grpo --critic some/model", "critic: grpo has no use for one, got 'some/model'; leave it out"),
        ("--policy p --prompts x --reward m:f --critic none", "critic: ppo needs one, got 'none'; 'head' is"),
        ("--max-draws 0", "max_draws: must be at least 1, got 0"),
        ("--algo grpo --refill --max-draws 0", "max_draws: must be at least 1, got 0"),
        ("--top-p 0.9", "temperature, top_p, top_k: training samples with a temperature above 0 alone"),
        ("--top-k 5", "temperature, top_p, top_k: training samples with a temperature above 0 alone"),
        ("--engine rllib --algo rloo --group-size 1", "group_size: must be at least 2 for rloo, got 1"),
    ],
)  # fmt: skip
def test_a_bad_option_is_one_line(argv: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in fails(capsys, *argv.split())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("algo: grpo\ngamma: 0.9", "gamma: is no option of grpo; ppo has it"),
        ("loss_kl_coef: 0.3", "loss_kl_coef: is no option here: it follows from kl_coef and kl_in"),
        ("mismatch-cap: 0", "mismatch_cap: is no option here"),
        ("algo_options: {clip: 0.3}", "algo_options: is no option here: give the algorithm's options by"),
        ("algo: null", "algo: must be text, got null"),
        ("algo: [grpo]", "algo: must be text, got ['grpo']"),
        ("clip: null", "clip: must be a finite number, got null"),
        ("clip: .inf", "clip: must be a finite number, got inf"),
        ("clp: 0.1", "unknown option clp; did you mean clip?"),
        ("steps: null", "steps: must be int, got null"),
        ("chat: null", "chat: must be true or false, got null"),
    ],
)  # fmt: skip
def test_a_bad_key_is_one_line(text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(text)
    assert fails(capsys, "--config", str(config)).startswith(f"{config}: {says}")


def test_bad_input_loads_nothing() -> None:
    argvs = ["--algo grpo --gamma 0.9", "--algo dpo", "--algo grpo --group-size 1 --engine rllib", "--clip 0",
             "--algo nowhere:Class", "--algo grpo --critic head", "--max-draws 0", "--top-p 0.9"]  # fmt: skip
    code = (
        "import sys; from torchbandit.cli import main\n"
        f"assert all(main(['train', *argv.split()]) == 2 for argv in {argvs})\n"
        "assert main(['train', '--algo', 'gspo', '--print-config']) == 0\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'ray', 'numpy')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_an_algorithm_of_ones_own(own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    algo = f"{own}:Mine"
    made = options("--algo", algo, "--strength", "2", "--weights", "[3, 4]", "--no-on", "--words", "a", "null")
    mine: Any = made.algorithm
    assert (mine.strength, mine.weights, mine.on, mine.words) == (2.0, (3.0, 4.0), False, ["a", "null"])
    assert made.group_size == 3, "the demo's two responses are too few for it"
    config = tmp_path / "run.yaml"
    config.write_text(printed(capsys, "--algo", algo))
    assert f"# options of {algo}\n" in config.read_text()
    assert '\nstrength: 1.0\nweights: [1.0, 2.5]\nwords: ["1e-6"]\n"on": true\nbound: .inf\n' in config.read_text()
    assert options("--config", str(config)) == options("--algo", algo)
    assert printed(capsys, "--config", str(config)) == config.read_text()
    config.write_text(f"algo: {algo}\nstrength: x\n")
    assert fails(capsys, "--config", str(config)) == f"{config}: strength: must be a finite number, got x"
    with pytest.raises(SystemExit):
        cli.main(["train", "--algo", algo, "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "Mine: my own." in out and "How much of it. (default: 1)" in out
    assert "a or b. (default: a)" in out, "an option that is not documented has its default too"
    assert options("--algo", f"{own}:Needs", "--must", "2").algo_options["must"] == 2.0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Needs", "--must: must be given with OWN:Needs; see torchbandit train --help"),
        ("Takes", "algo: 'OWN:Takes' has an option lr, which torchbandit train has already; rename it"),
        ("Complex", "algo: option f of 'OWN:Complex' must be of a type that YAML has (int, float, str, bool, Literal, "
         "list, dict, None), got complex; change it, or use BanditTrainer"),
        ("Unknown", "algo: the type of an option of 'OWN:Unknown' cannot be read: name 'Nowhere' is not defined; "
         "import it there"),
        ("Bare", "algo: 'OWN:Bare' declares 'f', which is no option of it; decorate the class with "
         "@dataclass(frozen=True)"),
        ("Half", "algo: 'OWN:Half' must define loss and targets; see torchbandit.learn.Algorithm"),
        ("NoAlgorithm", "algo: 'OWN:NoAlgorithm' must be a subclass of torchbandit.learn.Algorithm, got <class "
         "'OWN.NoAlgorithm'>"),
    ],
)  # fmt: skip
def test_an_algorithm_that_is_none(name: str, says: str, own: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, "--algo", f"{own}:{name}") == says.replace("OWN", own)


def test_a_needed_option_is_named_in_code_too(own: str) -> None:
    with pytest.raises(ValueError, match=f"must: must be given for {own}:Needs, which has no default for it"):
        TrainOptions(algo=f"{own}:Needs", policy="p", prompts="x", reward=["m:f"])


def test_the_demo_takes_any_algorithm(tmp_path: Path) -> None:
    made = options("--algo", "grpo", "--group-size", "8")
    assert (made.group_size, made.critic, made.steps) == (8, None, DEMO_SETTINGS["steps"])
    assert options().algo_options["value_coef"] == 0.1, "the demo's"
    assert options("--value-coef", "0.7").algo_options["value_coef"] == 0.7, "the user's"
    assert options("--value-coef", "0.7").algo_options["value_clip"] == 0.0
    assert options("--policy", "p", "--prompts", "x", "--reward", "m:f").algo_options["value_clip"] == 0.2, "PPO's"
    assert options("--critic", "head").critic == "head", "the demo's policy can have a head"
    config = tmp_path / "run.yaml"
    config.write_text("policy: null\nprompts: null\nreference: null\nsteps: 3\n")
    assert options("--config", str(config)) == options("--steps", "3")


@pytest.mark.parametrize("algo", ["dr_grpo", "remax"])
def test_the_demo_runs(algo: str, tmp_path: Path) -> None:
    argv = ["train", "--algo", algo, "--steps", "1", "--num-prompts", "4", "--max-new-tokens", "4",
            "--ptx-batch-size", "2", "--num-samples", "1", "--device", "cpu",
            "--out", str(tmp_path / "run")]  # fmt: skip
    assert cli.main(argv) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 1
