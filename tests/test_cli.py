"""The command line: options, config files, and one message where something cannot be done."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

import torchbandit
from torchbandit import cli
from torchbandit.commands.layout import lay_out

RAN: list[Any] = []


@dataclasses.dataclass
class Base:
    """A base.

    Args:
        steps: How many.
    """

    steps: int = 100


@dataclasses.dataclass
class Toy(Base):
    """Play with toys.

    The second paragraph is kept apart.

    Args:
        path: Where, with 100% certainty,
            told on two lines.
        rate: How fast, in 5% steps.
        fast: Whether.
        careful: Whether not.
        names: Whose.
        kind: Which.
        packing: How.
        limit: Of what.
    """

    path: str = dataclasses.field(kw_only=True)
    rate: float = 1e-3
    fast: bool = False
    careful: bool = True
    names: list[str] = dataclasses.field(default_factory=list)
    kind: Literal["bear", "train"] = "bear"
    packing: bool | Literal["auto"] = "auto"
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: must be at least 1, got {self.steps}")


ALL = Toy(
    path="p", steps=3, rate=1e-6, fast=True, careful=False, names=["a", "b"], kind="train", packing=False, limit=7
)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    RAN.clear()
    command = cli.Command("Play.", f"{__name__}:Toy", lambda options: RAN.append(options) or 0)
    monkeypatch.setattr(cli, "COMMANDS", {"toy": command})


def run(*argv: str) -> Any:
    assert cli.main(["toy", "--path", "p", *argv]) == 0
    return RAN.pop()


def fails(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """The one message; nothing ran, nothing else was said."""
    assert cli.main(["toy", *argv]) == code
    out, err = capsys.readouterr()
    assert not RAN and not out and err.startswith("error: ") and "Traceback" not in err
    return err.removeprefix("error: ").strip()


def test_defaults_are_the_dataclass() -> None:
    assert run() == Toy(path="p")


def test_every_kind_of_option() -> None:
    given = "--steps 3 --rate 1e-6 --fast --no-careful --names a b --kind train --packing false --limit 7".split()
    assert run(*given) == ALL
    assert run("--packing", "auto", "--fast", "false", "--limit", "null") == Toy(path="p")
    assert run("--steps=4").steps == 4


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_every_option_is_a_key(tmp_path: Path) -> None:
    config = write(
        tmp_path / "run.yaml",
        "steps: 3\nrate: 1e-6\nfast: true\ncareful: false\nnames: [a, b]\nkind: train\npacking: false\nlimit: 7\n",
    )
    assert run("--config", config) == ALL
    assert run("--config", config, "--steps", "5", "--careful").steps == 5, "arguments win"
    assert run("--steps", "5", "--config", config).steps == 5, "wherever they stand"
    alone = write(tmp_path / "one.yaml", "path: q\nnames: a\n")
    assert cli.main(["toy", "--config", alone]) == 0
    assert RAN.pop() == Toy(path="q", names=["a"]), "one name needs no list"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--stpes 3", "unknown option --stpes; did you mean --steps?"),
        ("--step 3", "unknown option --step; did you mean --steps?"),
        ("--zzzzzzz 3", "unknown option --zzzzzzz; torchbandit toy --help lists all"),
        ("--path p --steps x", "--steps: must be int, got x"),
        ("--path p --steps 1.5", "--steps: must be int, got 1.5"),
        ("--path p --kind boat", "--kind: must be bear or train, got boat"),
        ("--path p --fast maybe", "--fast: must be true or false, got maybe"),
        ("--path p --steps null", "--steps: must be int, got null"),
        ("--path p --rate nan", "--rate: must be a finite number, got nan"),
        ("--path p --rate .inf", "--rate: must be a finite number, got inf"),
        ("--path p --packing boat", "--packing: must be true or false or auto, got boat"),
        ("--path p --limit x", "--limit: must be int or null, got x"),
        ("--path p --steps 0", "steps: must be at least 1, got 0"),
        ("", "--path: must be given; see torchbandit toy --help"),
        ("--path p stray", "unrecognized arguments: stray"),
        ("--path", "argument --path: expected one argument"),
    ],
)
def test_a_bad_option_is_one_message(argv: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, *argv.split()) == says


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stpes: 3", "unknown option stpes; did you mean steps?"),
        ("steps: x", "steps: must be int, got x"),
        ("steps: null", "steps: must be int, got null"),
        ("steps: true", "steps: must be int, got True"),
        ("steps: 1.5", "steps: must be int, got 1.5"),
        ("steps: [1]", "steps: must be int, got [1]"),
        ("rate: null", "rate: must be a finite number, got null"),
        ("rate: .nan", "rate: must be a finite number, got nan"),
        ("rate: .inf", "rate: must be a finite number, got inf"),
        ("fast: null", "fast: must be true or false, got null"),
        ("fast: 1", "fast: must be true or false, got 1"),
        ("kind: null", "kind: must be bear or train, got null"),
        ("packing: null", "packing: must be true or false or auto, got null"),
        ("path: null", "path: must be text, got null"),
        ("path: 3", "path: must be text, got 3"),
        ("names: null", "names: must be one or more of text, got null"),
        ("names: [a, null]", "names: must be one or more of text, got null"),
        ("steps: 3\nsteps: 4", "steps stands there 2 times; keep one"),
        ("null: 3", "unknown option None"),
        ("print_config: true", "unknown option print_config"),
        ("- steps", "must hold one option a line, `key: value`, got list"),
        ("steps: [", "must be YAML; "),
    ],
)
def test_a_bad_config_is_one_message(text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path / "run.yaml", text)
    assert fails(capsys, "--config", config).startswith(f"{config}: {says}")


def test_a_missing_config_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, "--config", "no.yaml") == "--config: no.yaml cannot be read: No such file or directory"


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["toi"]) == 2
    assert "got 'toi'; did you mean toy?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ValueError("prompts.jsonl:3: must be JSON"), 2, "prompts.jsonl:3: must be JSON"),
        (OSError(28, "No space left on device", "runs/x"), 1, "[Errno 28] No space left on device: 'runs/x'"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ImportError("needs ray: pip install torchbandit[rllib]"), 2, "needs ray: pip install torchbandit[rllib]"),
    ],
)
def test_what_a_run_raises(
    error: BaseException, code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(options: Any) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "toy", cli.COMMANDS["toy"]._replace(run=broken))
    assert fails(capsys, "--path", "p", code=code) == says


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ImportError("a broken install")])
def test_a_bug_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(options: Any) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "toy", cli.COMMANDS["toy"]._replace(run=broken))
    with pytest.raises(type(error), match=str(error)):
        cli.main(["toy", "--path", "p"])


def test_help_says_what_the_docstring_says(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["toy", "--help"])
    out = capsys.readouterr().out
    assert left.value.code == 0
    assert "Play with toys.\n\nThe second paragraph is kept apart.\n" in out
    assert "Where, with 100% certainty, told on two lines." in " ".join(out.split())
    assert "How fast, in 5% steps. (default: 0.001)" in " ".join(out.split())
    assert "How many. (default: 100)" in " ".join(out.split()), "a base's fields are told too"


def test_print_config_is_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["1e-6", "null", "a: b", "#", "x\ny", "é", "", "yes", "2024-01-01", "[a]", "'"]
    assert cli.main(["toy", "--path", "3", "--rate", "1e-6", "--names", *texts, "--print-config"]) == 0
    out, err = capsys.readouterr()
    assert not RAN and not err and "rate: 1.0e-06\n" in out and "limit: null\n" in out
    config = write(tmp_path / "run.yaml", out)
    assert cli.main(["toy", "--config", config]) == 0
    assert RAN.pop() == Toy(path="3", rate=1e-6, names=texts)
    assert cli.main(["toy", "--config", config, "--print-config"]) == 0
    assert capsys.readouterr().out == out
    assert cli.main(["toy", "--config", config, "--print-config", "--steps", "0"]) == 2
    assert not capsys.readouterr().out


def test_the_overview_and_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == cli.main(["--help"]) == cli.main(["--version"]) == 0
    out = capsys.readouterr().out
    assert "toy       Play." in out and f"torchbandit {torchbandit.__version__}" in out


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.undo()  # the real ones
    return cli.read_options


def test_train_without_a_policy_is_the_demo(commands: Callable[..., Any]) -> None:
    from torchbandit import demo

    options = commands("train", ["--steps", "3", "--ptx-coef", "0"])
    assert (options.steps, options.ptx_coef, options.policy) == (3, 0.0, str(demo.SFT))
    assert options.out == "runs/demo" and commands("train", ["--name", "mine"]).out == "runs/mine"
    assert commands("train", ["--name", "mine", "--out", "there"]).out == "there"
    with pytest.raises(ValueError, match="policy: must be given with prompts"):
        commands("train", ["--prompts", "mine.jsonl"])


def test_train_with_a_policy_is_its_own(commands: Callable[..., Any]) -> None:
    given = ["--policy", "p", "--prompts", "x.jsonl", "--reward-model", "a", "b", "--algo", "grpo", "--resume"]
    options = commands("train", given)
    assert (options.reward_model, options.algo, options.resume, options.steps) == (["a", "b"], "grpo", True, 100)


@pytest.mark.parametrize("command", ["train", "score", "profile", "bench", "pull"])
def test_every_option_has_its_help(command: str, commands: Callable[..., Any]) -> None:
    options = lay_out(cli.COMMANDS[command]).options
    assert len(options) > 1 and not [option.name for option in options.values() if not option.help]


def test_bench_takes_its_first_word_bare(commands: Callable[..., Any]) -> None:
    assert commands("bench", ["step", "--tiny"]).what == commands("bench", ["--tiny", "--what", "step"]).what == "step"
    assert commands("bench", []).what == "all"
    with pytest.raises(ValueError, match="--what: must be step or score .*, got boat"):
        commands("bench", ["boat"])


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from torchbandit.cli import main\n"
        "for argv in ([], ['train', '--help'], ['score', '--help'], ['bench', '--help']):\n"
        "    try: main(argv)\n"
        "    except SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'ray', 'numpy')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_python_m_and_exit_codes() -> None:
    argv = [sys.executable, "-m", "torchbandit", "train", "--stpes", "3"]
    ended = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (2, "error: unknown option --stpes; did you mean --steps?\n")
