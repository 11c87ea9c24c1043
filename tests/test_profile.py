"""`torchbandit profile`: figures that can be computed by hand, lines that cannot be read, and the whole command."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import byte_tokenizer, tiny_lm, tiny_reward_model

from torchbandit import cli, demo
from torchbandit.models import load_tokenizer
from torchbandit.profile import measure
from torchbandit.profile.measure import Run, profile
from torchbandit.profile.options import ProfileOptions
from torchbandit.profile.report import table
from torchbandit.profile.rows import Rows, read

FAST = {"min_seconds": 0.0, "device": "cpu"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    found = []
    for model in (tiny_reward_model(hidden_size=64), tiny_lm(hidden_size=64)):
        path = tmp_path_factory.mktemp("model")
        model.save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
        found.append(str(path))
    return found[0], found[1]


def write(path: Path, *rows: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    words = ("lamp", "a clock", "tea", "stove and kettle", "no", "rain")
    return write(tmp_path / "in.jsonl", *(dict(prompt=f"my {w} is", chosen=f" {w * 2}", rejected=" hm") for w in words))


def run(values: torch.Tensor) -> Run:
    return Run(1, 1.0, [values])


def test_correlation_and_flips_by_hand() -> None:
    rows = Rows([[1]] * 5, [[2]] * 5, torch.tensor([[0, 1], [1, 2], [3, 3], [2, 0], [0, 4]]), "")
    exact, ours = torch.tensor([0.0, 1.0, 2.0, 5.0, torch.nan]), torch.tensor([1.0, 0.0, 2.0, 6.0, 3.0])
    found = measure._compare_scores(run(exact), run(ours), rows)
    assert found["flipped_pairs"] == pytest.approx(1 / 3), "of three pairs; one is tied and one has no score"
    want = torch.corrcoef(torch.stack([exact[:4], ours[:4]]))[0, 1]
    assert found["correlation"] == pytest.approx(float(want), abs=1e-6)
    same = measure._compare_scores(run(exact), run(exact * 3), rows)
    assert same["flipped_pairs"] == 0 and same["correlation"] == pytest.approx(1)
    lost = measure._compare_scores(run(exact), run(torch.zeros(5)), rows)
    assert lost["flipped_pairs"] == 1 and lost["correlation"] is None, "all rewards alike tell nothing (trap 13)"


def test_log_prob_errors_and_kl_bias_by_hand() -> None:
    rows = Rows([[1]] * 2, [[2, 3], [2]], torch.zeros(0, 2, dtype=torch.int64), "")
    exact, ours = torch.tensor([[-1.0, -2.0], [-3.0, 9.0]]), torch.tensor([[-1.5, -2.25], [-2.0, -9.0]])
    found = measure._compare_log_probs(run(exact), run(ours), rows)
    assert found["mean_error"] == pytest.approx((0.5 + 0.25 + 1) / 3) and found["max_error"] == 1
    # log p - log ref grows where the reference's log-probs came out too low.
    assert found["kl_bias"] == pytest.approx((0.75 - 1) / 2)


def test_bfloat16_against_float32(folders: tuple[str, str], pairs: str) -> None:
    found = profile(ProfileOptions(*folders, input=pairs, precisions=["bfloat16", "fp8"], **FAST))
    assert found["rows"] == 12 and found["pairs"] == 6
    assert "CUDA" in found["left_out"]["fp8"] or "not installed" in found["left_out"]["fp8"]
    exact, half = found["results"]["float32"], found["results"]["bfloat16"]
    assert "correlation" not in exact["reward_model"]
    for kind in ("reward_model", "reference"):
        assert half[kind]["bytes"] == pytest.approx(exact[kind]["bytes"] / 2, rel=0.01)
        assert half[kind]["tokens_per_s"] > 0
    assert 0.99 < half["reward_model"]["correlation"] < 1 and half["reward_model"]["flipped_pairs"] <= 0.2
    assert 0 < half["reference"]["mean_error"] <= half["reference"]["max_error"] < 1
    assert abs(half["reference"]["kl_bias"]) < 2


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_a_quantised_model_is_in_the_table(folders: tuple[str, str], pairs: str) -> None:
    found = profile(ProfileOptions(folders[0], input=pairs, precisions=["int8"], **FAST))
    int8 = found["results"]["int8"]["reward_model"]
    assert int8["bytes"] < found["results"]["float32"]["reward_model"]["bytes"] / 2
    assert int8["correlation"] > 0.99 and "reference" not in found["results"]["int8"]
    assert "ref. bytes" not in table(found)


def test_a_precision_that_fails_costs_its_own_row_alone(
    folders: tuple[str, str], pairs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = measure.sequence_scores

    def brittle(model: Any, *args: Any, **options: Any) -> torch.Tensor:
        if model.dtype == torch.bfloat16:
            raise RuntimeError("no such kernel\nand more")
        return own(model, *args, **options)

    monkeypatch.setattr(measure, "sequence_scores", brittle)
    found = profile(ProfileOptions(*folders, input=pairs, precisions=["bfloat16"], **FAST))
    assert found["left_out"] == {"bfloat16 of the reward_model": "it failed: RuntimeError: no such kernel"}
    assert "reward_model" not in found["results"]["bfloat16"] and "reference" in found["results"]["bfloat16"]
    assert "no such kernel" in table(found)
    monkeypatch.setattr(measure, "sequence_scores", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        profile(ProfileOptions(*folders, input=pairs, precisions=["bfloat16"], **FAST))


def test_the_command_on_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No input: the reference answers. Table, JSON and picture."""
    written, drawn = tmp_path / "p.json", tmp_path / "p.png"
    arguments = ["--reward-model", str(demo.REWARD_MODEL), "--reference", str(demo.SFT), "--rows", "64",
                 "--precisions", "bfloat16", "--min-seconds", "0", "--device", "cpu"]  # fmt: skip
    assert cli.main(["profile", *arguments, "--json", str(written), "--plot", str(drawn)]) == 0
    out = capsys.readouterr().out
    assert "| precision | RM bytes" in out and "64 rows of the reference's answers to 16 demo prompts" in out
    found = json.loads(written.read_text())
    assert found["pairs"] == 16 * 6 and found["results"]["bfloat16"]["reward_model"]["correlation"] > 0.99
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_lines_of_one_prompt_are_pairs(tmp_path: Path, folders: tuple[str, str]) -> None:
    path = write(
        tmp_path / "in.jsonl",
        dict(prompt="a", response="long one"), dict(prompt="b", response="x"),
        dict(prompt="a", response="two"), dict(prompt="a", response=""),
    )  # fmt: skip
    rows = read(ProfileOptions(folders[0], input=path), load_tokenizer(folders[0]))
    assert [len(r) for r in rows.responses] == [1, 2, 4, 9], "shortest first, each with an end token"
    assert {frozenset(pair) for pair in rows.pairs.tolist()} == {frozenset(p) for p in ((0, 2), (0, 3), (2, 3))}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a"}, "must have the key 'response'"),
        ({"prompt": "a", "chosen": "b"}, "must have the key 'rejected'"),
        ({"prompt": "a", "response": 3}, "'response' must be a string, got int"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(
    row: dict[str, object], says: str, tmp_path: Path, folders: tuple[str, str]
) -> None:
    path = write(tmp_path / "in.jsonl", dict(prompt="a", response="b"), row)
    with pytest.raises(ValueError, match=f"in.jsonl:2: .*{says}"):
        profile(ProfileOptions(folders[0], input=path, **FAST))


def test_options_that_make_no_sense() -> None:
    for wrong, says in (
        (dict(), "got neither"),
        (dict(reward_model="x"), "input: must be given"),
        (dict(reference="x", precisions=["int3"]), "among bfloat16, fp8, int8, nf4, got 'int3'"),
        (dict(reference="x", rows=0), "rows: must be at least 1"),
    ):
        with pytest.raises(ValueError, match=says):
            ProfileOptions(**wrong)
