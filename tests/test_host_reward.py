"""HostReward: values, reasons, limits, overlap, and the end of its processes."""

from __future__ import annotations

import functools
import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import host_functions as fns
import pytest
import torch
from fakes import byte_tokenizer
from tensordict import TensorDict

from torchbandit.prompts import PromptSet
from torchbandit.rewards import HostReward, RewardPipeline

TOKENIZER = byte_tokenizer()


def batch(completions: list[str], prompts: PromptSet | None = None, stop: bool = True) -> TensorDict:
    """A batch whose responses are these strings, each closed by <eos>; "" is an empty response."""
    ids = [TOKENIZER(text)["input_ids"] + [258] * stop if text else [] for text in completions]
    T, B = max(map(len, ids)) + 1, len(ids)
    mask = torch.arange(T) < torch.tensor([len(row) for row in ids])[:, None]
    tokens = torch.tensor([row + [97] * (T - len(row)) for row in ids])  # junk, not padding, after the stop
    prompt_id = torch.arange(B) % (len(prompts) if prompts is not None else B)
    prompt = torch.tensor([TOKENIZER("bbb")["input_ids"]] * B)
    prompt_mask = torch.ones(B, 3, dtype=torch.bool)
    source = {"tokens": {"prompt": prompt, "response": tokens}, "masks": {"prompt": prompt_mask, "response": mask}}
    td = TensorDict({**source, "prompt_id": prompt_id}, batch_size=[B])
    if prompts is not None:
        ids, mask, columns = prompts.gather(prompt_id)
        td["tokens", "prompt"], td["masks", "prompt"] = ids, mask
        if columns is not None:
            td["columns"] = columns
    return td


@pytest.fixture
def close():
    """Close what a test opened, pass or fail."""
    opened: list[HostReward] = []
    yield lambda term: opened.append(term) or term
    for term in opened:
        term.close()


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie, which only waits for its parent, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def gone(pids: list[int], within_s: float) -> bool:
    end = time.monotonic() + within_s
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


def workers(term: HostReward) -> list[int]:
    assert term._pool is not None
    return [worker.process.pid for worker in term._pool._workers]


def test_values_of_decoded_completions(close):
    term = close(HostReward(fns.count, TOKENIZER))
    out = RewardPipeline(term, tokenizer=TOKENIZER)(batch(["ab", "", "abcde", "é"]))
    assert term.name == "count"
    torch.testing.assert_close(out["reward_terms", "count"], torch.tensor([2.0, torch.nan, 5.0, 1.0]), equal_nan=True)
    assert out["unscorable"].tolist() == [False, True, False, False]
    assert not term.failures  # an empty response is not the function's failure


def test_prompts_and_columns_belong_to_their_rows(close):
    columns = {"answer": [f"a{i}" for i in range(5)], "level": list(range(5)), "unasked": ["x"] * 5}
    prompts = PromptSet.from_texts([f"p{i}" for i in range(5)], TOKENIZER, max_length=8, columns=columns)
    term = close(HostReward(fns.matches, TOKENIZER, chunk_size=3))
    td = batch(["y"] * 20, prompts)[torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    out = RewardPipeline(term, tokenizer=TOKENIZER, prompts=prompts)(td)
    assert out["reward"].flatten().tolist() == [1.0] * 20
    every = close(HostReward(fns.all_columns, TOKENIZER))
    assert RewardPipeline(every, prompts=prompts)(td)["reward"].flatten().tolist() == [3.0] * 20


def test_missing_column_is_named(close):
    prompts = PromptSet.from_texts(["p0"], TOKENIZER, max_length=8, columns={"level": [0]})
    pipeline = RewardPipeline(close(HostReward(fns.matches, TOKENIZER)), prompts=prompts)
    with pytest.raises(ValueError, match=r"needs the columns \['answer'\], the prompts have \['level'\]"):
        pipeline(batch(["y"], prompts))


def test_without_a_prompt_set_prompts_are_decoded(close):
    fn = functools.partial(fns.prompt_is, word="bbb")
    term = close(HostReward(fn, TOKENIZER))
    assert term.name == "prompt_is"
    assert RewardPipeline(term)(batch(["x", "y"]))["reward"].flatten().tolist() == [1.0, 1.0]


def test_each_failure_has_its_reason_and_spoils_no_other_row(close):
    term = close(HostReward(fns.by_word, TOKENIZER, timeout_s=3.0, chunk_size=16))
    bad = ["raise", "none", "nan", "text", "huge", "short", "crash", "hang", "exit"]
    td = batch([word for pair in zip(bad, ["fine"] * len(bad), strict=True) for word in pair] + ["true"])
    pipeline = RewardPipeline(term, tokenizer=TOKENIZER)
    out = pipeline(td)
    # "short" returns [] only when it is alone, as every row of a failed chunk is
    assert out["unscorable"].tolist() == [True, False] * len(bad) + [False]
    assert out["reward"][1::2].flatten().tolist() == [1.0] * len(bad)
    once = ("ZeroDivisionError", "SystemExit", "none", "wrong length", "died", "timeout")
    assert pipeline.host_failures() == {"by_word": {"bad value": 3, **dict.fromkeys(once, 1)}}
    again = pipeline(batch(["fine", "none"]))  # the pool has survived
    assert again["unscorable"].tolist() == [False, True]
    assert pipeline.host_failures()["by_word"]["none"] == 2


@pytest.mark.parametrize("fn", [fns.slow_count, fns.asked_together])
def test_async_functions_are_awaited(close, fn):
    term = close(HostReward(fn, TOKENIZER, num_workers=1))
    out = RewardPipeline(term, tokenizer=TOKENIZER)(batch(["ab", "abc", "abcd"]))
    assert out["reward"].flatten().tolist() == [2.0, 3.0, 4.0] and not term.failures


def test_an_awaited_row_that_fails_spoils_no_other(close):
    term = close(HostReward(fns.asked_together, TOKENIZER, num_workers=1))
    out = RewardPipeline(term, tokenizer=TOKENIZER)(batch(["ab", "raise", "abcd"]))
    assert out["unscorable"].tolist() == [False, True, False]
    assert term.failures == {"ConnectionError": 1}


def test_a_row_that_is_not_a_terms_task_lives_on_its_other_terms(close):
    def terms(missing):
        return [
            close(HostReward(fns.only_sums, TOKENIZER, num_workers=1, missing=missing, weight=10.0, clip=(0.0, 1.5))),
            close(HostReward(fns.only_words, TOKENIZER, num_workers=1, missing=missing, missing_eos_penalty=1.0)),
        ]

    td = batch(["a+b", "ab", "1", "c+"], stop=False)
    skipped, strict = terms("skip"), terms("unscorable")
    out = RewardPipeline(skipped, tokenizer=TOKENIZER)(td)
    assert out["unscorable"].tolist() == [False, False, True, False], "no term has the third"
    torch.testing.assert_close(out["reward"].flatten(), torch.tensor([15.0, 2.0, torch.nan, 15.0]), equal_nan=True)
    nan = torch.nan
    torch.testing.assert_close(out["reward_terms", "only_words"], torch.tensor([nan, 3.0, nan, nan]), equal_nan=True)
    assert not skipped[0].failures
    assert RewardPipeline(strict, tokenizer=TOKENIZER)(td)["unscorable"].all()
    assert strict[0].failures == {"none": 2}
    # what the other terms say of it is all that counts: a row beside a plain term is never lost
    both = RewardPipeline([*skipped, lambda td: td["masks", "response"].sum(-1).float()], tokenizer=TOKENIZER)
    assert both(td)["unscorable"].tolist() == [False] * 4
    with pytest.raises(ValueError, match='missing must be "unscorable" or "skip", got \'ignore\''):
        HostReward(fns.only_sums, TOKENIZER, missing="ignore")


def test_a_call_that_holds_the_interpreters_lock_is_ended(close):
    term = close(HostReward(fns.by_word, TOKENIZER, timeout_s=2.0, num_workers=1))
    assert RewardPipeline(term)(batch(["locked", "fine"]))["unscorable"].tolist() == [True, False]
    assert term.failures == {"timeout": 1}


def test_killing_a_worker_kills_what_it_started(close, tmp_path):
    note = tmp_path / "pid"
    prompts = PromptSet.from_texts([str(note)], TOKENIZER, max_length=400)
    term = close(HostReward(fns.leave_child, TOKENIZER, timeout_s=3.0, num_workers=1))
    assert RewardPipeline(term, prompts=prompts)(batch(["y"], prompts))["unscorable"].all()
    assert gone([int(note.read_text())], 60.0)


@pytest.mark.parametrize("first", ["host", "model"])
def test_overlaps_with_the_models(close, tmp_path, first):
    """The function ends only while the model runs, and the model only while the function does, in either order."""
    term = close(HostReward(fns.meet, TOKENIZER, num_workers=1, timeout_s=60.0))
    prompts = PromptSet.from_texts([str(tmp_path)], TOKENIZER, max_length=400)

    def model(td):
        end = time.monotonic() + 60
        while not (tmp_path / "host").exists() and time.monotonic() < end:
            time.sleep(0.01)
        (tmp_path / "model").touch()
        return torch.full((2,), float((tmp_path / "host").exists()))

    terms = [term, model] if first == "host" else [model, term]
    assert RewardPipeline(terms, prompts=prompts)(batch(["a", "b"], prompts))["reward"].tolist() == [[2.0], [2.0]]


def test_all_workers_take_part_and_chunks_are_bounded(close):
    term = close(HostReward(fns.process_id, TOKENIZER, num_workers=2))
    out = RewardPipeline(term)(batch(["a"] * 6))
    for _ in range(200):  # a slow start of the second worker must not decide the test
        if len(out["reward"].unique()) == 2:
            break
        out = RewardPipeline(term)(batch(["a"] * 6))
    assert set(out["reward"].flatten().int().tolist()) <= set(workers(term))
    assert len(out["reward"].unique()) == 2
    term = close(HostReward(fns.sizes, TOKENIZER, num_workers=2, chunk_size=4))
    assert RewardPipeline(term)(batch(["a"] * 9))["reward"].flatten().tolist() == [4.0] * 8 + [1.0]
    assert RewardPipeline(term)(batch(["a"] * 6))["reward"].flatten().tolist() == [3.0] * 6


def test_workers_import_neither_torch_nor_print_into_stdout(close, capfd):
    assert RewardPipeline(close(HostReward(fns.has_torch, TOKENIZER)))(batch(["a"]))["reward"].item() == 0.0
    RewardPipeline(close(HostReward(fns.chatter, TOKENIZER)))(batch(["a"]))
    captured = capfd.readouterr()
    assert captured.out == ""


def test_functions_that_workers_cannot_import_are_refused_at_build():
    def local(prompts, completions):
        return [0.0] * len(prompts)

    for fn in (lambda p, c: [0.0] * len(p), local):
        with pytest.raises(ValueError, match=r"must be importable by worker processes.*module of its own"):
            HostReward(fn, TOKENIZER)
    script = """
        from fakes import byte_tokenizer
        from torchbandit.rewards import HostReward
        def score(prompts, completions):
            return [0.0] * len(prompts)
        HostReward(score, byte_tokenizer())
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=_env(), capture_output=True, text=True)
    assert run.returncode == 1
    assert "ValueError" in run.stderr and "__main__" in run.stderr and "my_rewards.py" in run.stderr


def test_a_module_that_does_not_import_is_refused_at_build(tmp_path, monkeypatch):
    """It imports here but not in a worker, as when sys.path was only right once."""
    (tmp_path / "fickle_module.py").write_text(
        "import os\nif os.environ.get('FICKLE'):\n    raise OSError('not here')\ndef f(p, c):\n    return [0.0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import fickle_module

    monkeypatch.setenv("FICKLE", "1")
    with pytest.raises(ValueError, match="cannot import the function: OSError: not here"):
        HostReward(fickle_module.f, TOKENIZER)


@pytest.mark.parametrize("option", [{"num_workers": 0}, {"timeout_s": 0.0}, {"chunk_size": 0}])
def test_options_without_meaning_are_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        HostReward(fns.count, TOKENIZER, **option)


def test_close_and_garbage_collection_leave_no_process():
    term = HostReward(fns.count, TOKENIZER, num_workers=2)
    pipeline = RewardPipeline(term)
    pipeline(batch(["a"]))
    pids = workers(term)
    assert all(map(alive, pids))
    pipeline.close()
    pipeline.close()
    assert gone(pids, 0.0)  # close waits for their end
    assert pipeline(batch(["abc"]))["reward"].item() == 3.0  # it opens again when used again
    pids = workers(term)
    del term, pipeline
    gc.collect()
    assert gone(pids, 0.0)


def test_another_terms_error_cancels_the_job(close):
    term = close(HostReward(fns.by_word, TOKENIZER, timeout_s=200.0, num_workers=1))

    def wrong(td):
        raise KeyError("another term")

    started = time.monotonic()  # with the function's limit of 200 s to wait for
    with pytest.raises(KeyError, match="another term"):
        RewardPipeline([term, wrong])(batch(["hang"]))
    assert not any(worker.rows for worker in term._pool._workers)  # at once, not only when the next batch comes
    assert RewardPipeline(term)(batch(["fine"]))["reward"].item() == 1.0
    assert time.monotonic() - started < 100


HANGING = """
    import signal
    import sys
    import torch
    # A shell's background job starts with Ctrl-C ignored, and a child inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import host_functions as fns
    from test_host_reward import TOKENIZER, batch, workers
    from torchbandit.rewards import HostReward, RewardPipeline
    term = HostReward(fns.by_word, TOKENIZER, timeout_s={timeout}, num_workers=2)
    print(*workers(term), flush=True)
    def model(td):
        print("running", flush=True)
        return torch.zeros(1)
    RewardPipeline([term, model])(batch(["{word}"]))
"""


def _env() -> dict[str, str]:
    here = Path(__file__).parent
    return {**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("sig", "word"), [(signal.SIGINT, "locked"), (signal.SIGTERM, "hang"), (signal.SIGKILL, "locked")]
)
def test_no_process_outlives_the_parent(sig, word):
    """Ctrl-C ends the workers at once; after a kill an idle worker sees its pipe end, a busy one meets its alarm."""
    script = textwrap.dedent(HANGING).format(timeout=250 if sig == signal.SIGINT else 1.5, word=word)
    parent = subprocess.Popen(
        [sys.executable, "-c", script], env=_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert parent.stdout.readline() == "running\n"
    time.sleep(0.3)  # so that, mostly, the worker is busy; idle it must end all the same
    parent.send_signal(sig)
    parent.communicate(timeout=200)
    # Ctrl-C: their limit of 250 s would end them later than this.
    assert gone(pids, 60.0)
