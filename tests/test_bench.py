"""A smoke run of every benchmark with tiny sizes, and the frame around them."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from torchbandit import cli
from torchbandit.bench import step
from torchbandit.bench.frame import Frame, Line, Peer
from torchbandit.bench.memory import peak_bytes
from torchbandit.bench.peers import DEFAULTS, read_settings


def bench(what: str, capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """The last line of a run, which is JSON; every line says what it must."""
    threads = torch.get_num_threads()
    assert cli.main(["bench", what, "--tiny", *argv]) == 0
    assert torch.get_num_threads() == threads
    out = capsys.readouterr().out
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert found["environment"]["torch"] == torch.__version__ and found["limits"]["copy_bytes_s"] > 0
    for line in found["lines"]:
        assert line["work"] in out and line["unit"] in ("rows/s", "tokens/s", "samples/s")
        assert 0 < line["low"] <= line["rate"] <= line["high"], line
        assert line["bench"] == "train" or line["peak_gb"] > 0, line
        assert line["host_syncs"] is not None and line["percent"] > 0 and line["ceiling"], line
        for peer in line["peers"]:
            assert peer["ratio"] == pytest.approx(line["rate"] / peer["rate"]), line
    return found


def test_step(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = bench("step", capsys, "--json", str(tmp_path / "x.json"), "--plot", str(tmp_path / "x.png"))
    assert json.loads((tmp_path / "x.json").read_text()) == found
    assert (tmp_path / "x.png").stat().st_size > 10_000
    lines = [line for line in found["lines"] if "CPU" in line["work"]]
    assert len(lines) == 2 and all(line["host_syncs"] == 0 for line in lines)
    told = any("ChatEnv does more" in note for note in lines[0]["notes"])
    assert told == bool(lines[0]["peers"]) == ("step: chatenv" not in found["left_out"])


def test_a_fast_wrong_answer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    work = step.Work(64, torch.device("cpu"), width=16)
    work.check()
    reset = work.env.reset

    def wrong() -> Any:
        td = reset()
        td["tokens", "prompt"] = td["tokens", "prompt"].roll(1, 0)
        return td

    monkeypatch.setattr(work.env, "reset", wrong)
    with pytest.raises(AssertionError):
        work.check()


def test_a_peer_that_is_missing_is_skipped_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torchbandit.bench.frame.installed", lambda peer: None)
    found = bench("step", capsys)
    assert found["left_out"]["step: chatenv"] == "not installed" and not found["lines"][0]["peers"]


def test_settings_of_peers_come_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "peers.yaml"
    file.write_text("chatenv: {max_rows: 0}\ntrl: {beta: 0.1, others: {fp32: {bf16: false}}}\n")
    settings = read_settings(str(file))
    assert settings["chatenv"] == DEFAULTS["chatenv"] | {"max_rows": 0} and settings["trl"]["beta"] == 0.1
    assert settings["trl"]["others"] == {"fp32": {"bf16": False}}
    found = bench("step", capsys, "--peers", str(file))
    assert found["peers"]["chatenv"]["max_rows"] == 0 and not found["lines"][0]["peers"]
    for text, says in (
        ("chatenv: {rows: 3}", "chatenv has no setting rows; it has input_modes, max_rows"),
        ("vllm: {}", "unknown peer 'vllm'; there are chatenv"),
        ("- chatenv", "must hold a table of settings"),
        ("a: [", "cannot be read"),
        ("trl: {others: [1]}", "trl's others must be a table of settings by name"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=says):
            read_settings(str(file))


def test_the_best_peer_is_the_quickest() -> None:
    line = Line("step", "w", 10.0, "rows/s", 9.0, 11.0, peers=[Peer("a", 2.0, 5.0), Peer("b", 5.0, 2.0)])
    assert line.best == line.peers[1]
    assert "2 x b, the best peer; 5 x a" in line.text()
    assert Line("step", "w", 10.0, "rows/s", 9.0, 11.0).best is None


def block(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


def test_the_peak_on_a_cpu_is_of_what_lies_there_at_a_time() -> None:
    cpu = torch.device("cpu")

    def three_one_less_one_more(last: int) -> None:
        a, b, c = block(3000), block(5000), block(7000)
        del b
        d = block(last)
        del a, c, d

    given = block(1000)

    def a_temporary_dominates() -> None:
        kept = given.double().to(torch.uint8)
        block(2000)
        del kept

    assert peak_bytes(lambda: three_one_less_one_more(4000), cpu) == 3000 + 5000 + 7000
    assert peak_bytes(lambda: three_one_less_one_more(6000), cpu) == 3000 + 7000 + 6000
    assert peak_bytes(a_temporary_dominates, cpu) == 8000 + 1000
    assert peak_bytes(lambda: None, cpu) == 0
    assert Frame(tiny=True).peak_gb(lambda: block(4000), cpu) == pytest.approx(4e-6)


def test_what_was_there_before_a_call_is_no_part_of_its_peak() -> None:
    cpu, held = torch.device("cpu"), [block(5000)]
    assert peak_bytes(lambda: held.append(block(7000)), cpu) == 7000  # the profiler knows of this one from now on

    def call() -> None:
        held.clear()
        block(3000)
        block(2000)

    assert peak_bytes(call, cpu) == 3000


def test_a_small_peak_is_readable() -> None:
    def text(peak: float | None) -> str:
        return Line("step", "w", 10.0, "rows/s", 9.0, 11.0, peak_gb=peak).text()

    assert "; peak 2.1 MB" in text(0.0021) and "; peak 0.25 GB" in text(0.25) and "; peak 36 GB" in text(36.0)
    assert "peak" not in text(None)


def test_host_syncs_are_counted() -> None:
    frame, x = Frame(tiny=True), torch.ones(3)
    x = x.to(frame.device)
    assert frame.host_syncs(lambda: x.sum()) == 0
    assert frame.host_syncs(lambda: (x.sum().item(), x.tolist())) >= 2


def test_the_mode_that_tells_of_syncs_is_not_one(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = Frame(tiny=True)
    frame.device = torch.device("cuda")
    said = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: warnings.warn(said, stacklevel=2))
    wait = lambda: warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
    assert frame.host_syncs(lambda: (wait(), wait())) == 2


@pytest.mark.slow
def test_rllib(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray", reason="the rllib extra is not installed")
    found = bench("rllib", capsys)
    assert [line["work"] for line in found["lines"]] == [f"sample + get_metrics, {n} rows" for n in (16, 32)]
    assert all(line["best"]["name"].startswith("RLlib") for line in found["lines"])


def works(found: dict[str, Any]) -> list[str]:
    return [line["work"] for line in found["lines"]]


def test_score(capsys: pytest.CaptureFixture[str]) -> None:
    found = bench("score", capsys, "--rows", "rm", "ref", "groups")
    assert len(works(found)) == 2 + 5
    model, reference = found["lines"][:2]
    assert [peer["name"] for peer in model["peers"]] == [
        f"transformers, padded, {order}" for order in ("sorted", "arrival order")
    ]
    assert model["percent"] > 0 and model["host_syncs"] >= 1 and reference["more"]["error_std"] < 0.01


@pytest.mark.slow
def test_score_rest(capsys: pytest.CaptureFixture[str]) -> None:
    found = bench("score", capsys, "--rows", "rm7b", "grad", "flat", "step")
    assert len(works(found)) == 1 + 1 + 1 + 2
    assert found["lines"][1]["more"]["gradient_distance"] < 0.01


def test_a_wrong_score_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchbandit.bench import score

    honest = score.sequence_scores
    monkeypatch.setattr(score, "sequence_scores", lambda *a, **k: honest(*a, **k).roll(1))
    with pytest.raises(AssertionError, match="rm eager: off by"):
        cli.main(["bench", "score", "--tiny", "--rows", "rm"])


def test_generate(capsys: pytest.CaptureFixture[str]) -> None:
    found = bench("generate", capsys)
    assert len(works(found)) == 5
    assert [peer["name"] for peer in found["lines"][0]["peers"]] == [
        f"transformers' generate, {cache} cache" for cache in ("dynamic", "static")
    ]


def test_perfect_compaction_is_what_it_says() -> None:
    from torchbandit.bench.generate import between, perfect_batches

    assert perfect_batches([3, 1, 2], places=2) == [2, 2, 2]
    assert perfect_batches([1, 4], places=2) == [2, 1, 1, 1]
    assert between({2: 1.0, 4: 3.0}, 3) == 2.0 and between({2: 1.0, 4: 3.0}, 1) == 1.0


@pytest.mark.slow
def test_train(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "peers.yaml"
    file.write_text("trl: {others: {checkpointing: {gradient_checkpointing: true}, impossible: {beta: much}}}\n")
    found = bench("train", capsys, "--peers", str(file))
    (line,) = found["lines"]
    assert line["more"]["split, s"].keys() == {"generate", "score", "learn", "rest"}
    if "train: trl" in found["left_out"]:
        assert not line["best"]
        return
    assert [peer["name"].partition(", ")[2] for peer in line["peers"]] == ["GRPOTrainer", "GRPOTrainer, checkpointing"]
    assert "train: TRL, impossible" in found["left_out"]


def test_rows_belong_to_one_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--tiny", "--rows", "rm"]) == 2
    assert "name it" in capsys.readouterr().err
    assert cli.main(["bench", "score", "--tiny", "--rows", "rn"]) == 2
    assert re.search(r"rows: must be of rm, .*, got rn", capsys.readouterr().err)


def test_the_last_layer_is_counted_on_the_tokens_it_runs_on() -> None:
    from fakes import fake_batch, tiny_lm, tiny_reward_model

    from torchbandit.bench.score_work import flops, last_layer_share
    from torchbandit.scoring import last_layer, log_probs, make_plan, prepare, sequence_scores

    td = fake_batch(num_prompts=40, prompt_width=30)
    args = td["tokens", "prompt"], td["masks", "prompt"], td["tokens", "response"], td["masks", "response"]
    plan = make_plan(args[1], args[3])
    for model, score, read in ((tiny_reward_model(), sequence_scores, "last"), (tiny_lm(), log_probs, "predict")):
        prepare(model)
        seen: list[int] = []
        model.model.layers[-1].mlp.register_forward_pre_hook(
            lambda _, given, seen=seen: seen.append(given[0].shape[:-1].numel())
        )
        with torch.no_grad():
            score(model, *args, plan=plan)
        lines = sum(pack.source.numel() for pack in plan.packed())
        share = last_layer_share(plan, read)
        assert 0 < share < last_layer.WORTH_BELOW and sum(seen) == round(share * lines) + 2 * len(seen)
        layer = model.model.layers[-1]
        behind = sum(p.numel() for p in layer.mlp.parameters()) + layer.self_attn.o_proj.weight.numel()
        tokens = int(args[1].sum() + args[3].sum())
        saved = flops(model, args) - flops(model, args, last=share)
        assert saved == pytest.approx(2 * behind * tokens * (1 - share))
