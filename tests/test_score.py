"""`torchbandit score`: the numbers of a naive pass, in order, and null where there is no honest one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import byte_tokenizer, tiny_lm, tiny_reward_model

from torchbandit import cli
from torchbandit.score import run
from torchbandit.score.options import ScoreOptions

PAIRS = [
    ("a question", "an answer"),
    ("b", "a much longer answer than the others have"),
    ("another question, longer", "ok"),
    ("c", ""),
    ("", "no prompt"),
    ("d", "e"),
    ("f" * 200, "g" * 100),  # 256 positions
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    made = {"policy": tiny_lm(seed=2), "reference": tiny_lm(seed=3), "reward_model": tiny_reward_model()}
    for name, model in made.items():
        model.save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    tiny_lm(seed=4, vocab_size=300).save_pretrained(root / "other")
    other = byte_tokenizer()
    other.add_tokens(["<more>"])
    other.save_pretrained(root / "other")
    return {name: str(root / name) for name in (*made, "other")}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def score(tmp_path: Path, rows: list[Any], **options: Any) -> list[dict[str, Any]]:
    source = write(tmp_path / "in.jsonl", rows)
    run.score(ScoreOptions(input=source, output=str(tmp_path / "out.jsonl"), **({"batch_size": 2} | options)))
    return read(tmp_path / "out.jsonl")


def rows_of(pairs: list[tuple[str, str]] = PAIRS) -> list[dict[str, Any]]:
    return [{"prompt": p, "response": r, "id": i} for i, (p, r) in enumerate(pairs)]


def naive(folder: str, pair: tuple[str, str], eos: bool = True, reward: bool = False) -> float:
    """One row, unpadded, with transformers alone."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    tokenizer = byte_tokenizer()
    prompt, response = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair)
    response = response + [tokenizer.eos_token_id] * eos
    ids = torch.tensor([prompt + response])
    kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    model = kind.from_pretrained(folder).eval()
    with torch.no_grad():
        if reward:
            hidden = model.base_model(ids).last_hidden_state
            return model.score(hidden)[0, -1, 0].item()
        logits = model(ids).logits[0, len(prompt) - 1 : -1].double()
        return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum().item()


SCORABLE = [0, 1, 2, 5]


@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("packing", [True, False])
def test_scores_are_the_naive_ones_in_order(eos: bool, packing: bool, folders: dict[str, str], tmp_path: Path) -> None:
    three = {name: folders[name] for name in ("policy", "reference", "reward_model")}
    rows = score(tmp_path, rows_of(), eos=eos, packing=packing, **three)
    assert [row["id"] for row in rows] == list(range(len(PAIRS)))
    assert [(row["prompt"], row["response"]) for row in rows] == PAIRS, "lines come back whole"
    for i in SCORABLE:
        policy, reference = (naive(folders[name], PAIRS[i], eos) for name in ("policy", "reference"))
        assert rows[i]["reward_model"] == pytest.approx(naive(folders["reward_model"], PAIRS[i], eos, True), abs=1e-4)
        assert rows[i]["log_prob"] == pytest.approx(policy, abs=1e-3)
        assert rows[i]["kl"] == pytest.approx(policy - reference, abs=1e-3)


def test_null_where_there_is_no_honest_score(folders: dict[str, str], tmp_path: Path) -> None:
    three = {name: folders[name] for name in ("policy", "reference", "reward_model")}
    rows = score(tmp_path, rows_of(), **three)
    numbers = [[row[name] is None for name in ("reward_model", "log_prob", "kl")] for row in rows]
    # With its end token an empty response is one: a model that ended at once.
    assert numbers == [[i in (4, 6)] * 3 for i in range(7)]
    rows = score(tmp_path, rows_of(), eos=False, **three)
    assert [row["reward_model"] is None for row in rows] == [i in (3, 4, 6) for i in range(7)]


def test_without_a_policy_the_reference_is_told(folders: dict[str, str], tmp_path: Path) -> None:
    rows = score(tmp_path, rows_of(PAIRS[:1]), reference=folders["reference"])
    assert rows[0]["log_prob"] == pytest.approx(naive(folders["reference"], PAIRS[0]), abs=1e-3)
    assert rows[0]["kl"] is None and rows[0]["reward_model"] is None
    rows = score(tmp_path, rows_of(PAIRS[:1]), reward_model=folders["reward_model"])
    assert rows[0]["log_prob"] is None and rows[0]["reward_model"] is not None


def test_an_end_token_that_is_there_is_not_doubled(folders: dict[str, str], tmp_path: Path) -> None:
    pairs = [("a", "b"), ("a", "b<eos>")]
    bare, ended = score(tmp_path, rows_of(pairs), reference=folders["reference"])
    assert bare["log_prob"] == pytest.approx(ended["log_prob"], abs=1e-4)


def test_every_model_is_quantised_that_is_asked_to_be(folders: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    three = {name: folders[name] for name in ("policy", "reference", "reward_model")}
    plain = score(tmp_path, rows_of(PAIRS[:1]), **three)[0]
    small = score(tmp_path, rows_of(PAIRS[:1]), quantization="int8", **three)[0]
    for name in ("reward_model", "log_prob", "kl"):
        assert small[name] != plain[name] and small[name] == pytest.approx(plain[name], abs=2), name


def test_a_quantisation_that_is_missing_is_told(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="quantization 'int8' on cpu: torchao is not installed: pip install"):
        score(tmp_path, rows_of(PAIRS[:1]), reward_model=folders["reward_model"], quantization="int8")


def test_other_keys_and_windows(folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"q": f"{i}" * (1 + i % 5), "a": "x" * (1 + i * 7 % 11), "n": i} for i in range(13)]
    options: dict[str, Any] = dict(prompt_key="q", response_key="a", reward_model=folders["reward_model"])
    whole = score(tmp_path, rows, **options)
    monkeypatch.setattr(run, "WINDOW", 1)
    narrow = score(tmp_path, rows, batch_size=3, **options)
    assert [row["n"] for row in narrow] == list(range(13))
    for a, b in zip(whole, narrow, strict=True):
        assert a["reward_model"] == pytest.approx(b["reward_model"], abs=1e-4)


def test_counts_say_why(folders: dict[str, str], tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", rows_of())
    counts = run.score(
        ScoreOptions(input=source, output=str(tmp_path / "out"), reward_model=folders["reward_model"], eos=False)
    )
    assert run.report(counts) == (
        "7 lines scored; null for want of an honest score: 2 empty (reward_model), "
        "1 longer than the context of 256 tokens (reward_model)"
    )


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "in.jsonl:2: must be one JSON object"),
        ("[1]", "in.jsonl:2: must be one JSON object, a row with named values, got list"),
        (
            '{"prompt": "a"}',
            "in.jsonl:2: must be an object with the key 'response', got ['prompt']; see --response-key",
        ),
        ('{"prompt": "a", "response": null}', "in.jsonl:2: 'response' must be a string, got NoneType"),
        ('{"prompt": 3, "response": "a"}', "in.jsonl:2: 'prompt' must be a string, got int"),
        ('{"prompt": ["a"], "response": "a"}', "in.jsonl:2: the prompt must be a string, or a list of messages"),
    ],
)
def test_a_bad_line_is_named(
    line: str, says: str, folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a", "response": "b"}\n' + line + "\n")
    argv = [
        "score",
        "--input",
        str(source),
        "--output",
        str(tmp_path / "out"),
        "--reward-model",
        folders["reward_model"],
    ]
    assert cli.main(argv) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (r'{"prompt": "a", "response": "x \ud83d"}', "in.jsonl:2: 'the row' holds half a character"),
        (r'{"prompt": "a", "response": "x", "note": ["\ud83d"]}', "in.jsonl:2: 'the row' holds half a character"),
        ('{"prompt": "a", "response": "x", "kl": 1}', "in.jsonl:2: has the key 'kl', which the score is written to"),
        ('{"prompt": "a", "response": "x"', "in.jsonl:2: must be one JSON object in UTF-8"),
    ],
)
@pytest.mark.parametrize("once", [False, True])
def test_an_input_that_breaks_off_leaves_no_output(
    line: str, says: str, once: bool, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "is_stream", lambda source: once)
    monkeypatch.setattr(run, "WINDOW", 1)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "response": "b"}\n' + line + "\n")
    (tmp_path / "out.jsonl").write_text("of before")
    options = ScoreOptions(
        input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out.jsonl"), reward_model=folders["reward_model"],
        batch_size=1,
    )  # fmt: skip
    with pytest.raises(ValueError) as refused:
        run.score(options)
    assert says in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    assert (tmp_path / "out.jsonl").read_text() == "of before"


def test_other_formats_and_no_nan(folders: dict[str, str], tmp_path: Path) -> None:
    want = score(tmp_path, rows_of(PAIRS[:3]), reward_model=folders["reward_model"])
    (tmp_path / "in.csv").write_text(
        "prompt,response,id\n" + "".join(f'"{p}","{r}",{i}\n' for i, (p, r) in enumerate(PAIRS[:3]))
    )
    (tmp_path / "in.json").write_text(json.dumps([row | {"odd": [float("nan")]} for row in rows_of(PAIRS[:3])]))
    for name in ("in.csv", "in.json"):
        counts = run.score(
            ScoreOptions(input=str(tmp_path / name), output=str(tmp_path / "out"), reward_model=folders["reward_model"])
        )
        got = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "out").read_text().splitlines()]
        assert [row["reward_model"] for row in got] == pytest.approx([row["reward_model"] for row in want], abs=1e-4)
    assert got[0]["odd"] == [None] and "3 lines with NaN or infinity in the input" in run.report(counts)


def test_stdin_is_scored_in_one_pass(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io
    import sys

    content = "".join(json.dumps(row) + "\n" for row in rows_of(PAIRS[:3]))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    assert cli.main(["score", "--input", "-", "--output", "-", "--reward-model", folders["reward_model"]]) == 0
    got = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["id"] for row in got] == [0, 1, 2] and all(row["reward_model"] is not None for row in got)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert cli.main(["score", "--input", "-", "--output", "-", "--reward-model", folders["reward_model"]]) == 2


def test_bad_files_and_models(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        run.score(ScoreOptions(input="no.jsonl", output=str(tmp_path / "out"), reward_model=folders["reward_model"]))
    with pytest.raises(ValueError, match="must hold at least one row"):
        score(tmp_path, [], reward_model=folders["reward_model"])
    with pytest.raises(ValueError, match="must have the policy's tokenizer"):
        score(tmp_path, rows_of(), policy=folders["policy"], reference=folders["other"])
    with pytest.raises(ValueError, match="no-model"):
        score(tmp_path, rows_of(), reward_model="/no-model")
    with pytest.raises(ValueError, match="give a reward_model"):
        score(tmp_path, rows_of())
    with pytest.raises(ValueError, match="another file than the input"):
        ScoreOptions(input="a", output="./a", policy="p")


def test_a_full_disk_is_one_message(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    source = write(tmp_path / "in.jsonl", rows_of())
    argv = ["score", "--input", source, "--output", str(full), "--reward-model", folders["reward_model"]]
    assert cli.main(argv) == 1
    assert "No space left on device" in capsys.readouterr().err


def test_the_command(folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = write(tmp_path / "in.jsonl", rows_of()), tmp_path / "out.jsonl"
    config = tmp_path / "run.yaml"
    config.write_text(f"reward_model: {folders['reward_model']}\nreference: {folders['reference']}\n")
    assert cli.main(["score", "--config", str(config), "--input", source, "--output", str(output), "--no-eos"]) == 0
    assert set(read(output)[0]) == {"prompt", "response", "id", "reward_model", "log_prob", "kl"}
    assert "7 lines scored" in capsys.readouterr().err
