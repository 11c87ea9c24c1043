"""The loop learns, adds up over microbatches and ranks, resumes bit for bit, and ends honestly."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakes import byte_tokenizer, tiny_lm, tiny_reward_model
from safetensors.torch import load_file

from torchbandit.corpus import Corpus
from torchbandit.env import BanditEnv
from torchbandit.generation import Sampling
from torchbandit.learn import ALGORITHMS
from torchbandit.policy import CausalLMPolicy
from torchbandit.prompts import PromptSet
from torchbandit.testing.host_copy import count_host_copies
from torchbandit.train import checkpoint, report
from torchbandit.train.evaluate import Evaluation, Sample
from torchbandit.train.loop import BanditTrainer, RunStopped, schedule_factor
from torchbandit.train.options import LoopOptions, TrainOptions
from torchbandit.train.run import train

HERE = Path(__file__).parent


def likes_small_ids(td):
    """Share of response bytes below 100: dense, so a tiny random model can learn it in a few steps."""
    mask = td["masks", "response"]
    return ((td["tokens", "response"] < 100) & mask).sum(-1).float() / mask.sum(-1).clamp(min=1)


def make_trainer(
    algo="ppo", reward=likes_small_ids, num_prompts=16, group_size=4, corpus=None, kind=BanditTrainer, **options
):
    tokenizer = byte_tokenizer()
    prompts = PromptSet.from_texts([f"prompt {i}" for i in range(32)], tokenizer, max_length=32)
    env = BanditEnv(prompts, reward, num_prompts=num_prompts, group_size=group_size)
    policy = CausalLMPolicy(
        tiny_lm(), tokenizer, sampling=Sampling(max_new_tokens=8), critic="head" if ALGORITHMS[algo].needs_critic else None
    )
    own = {field.name for field in dataclasses.fields(ALGORITHMS[algo])}
    algorithm = ALGORITHMS[algo](**{name: options.pop(name) for name in list(options) if name in own})
    return kind(env, policy, algorithm, LoopOptions(lr=5e-3, **options), corpus=corpus)


@pytest.mark.parametrize(
    ("algo", "options"),
    [("ppo", {}), ("rloo", {}), ("grpo", {}), ("dr_grpo", {"drop_constant_groups": True}), ("remax", {})],
)
def test_it_learns(algo, options):
    trainer = make_trainer(algo, epochs=2, minibatches=2, **options)
    lines = [trainer.step() for _ in range(12)]
    first, last = lines[0]["reward"], sum(line["reward"] for line in lines[-2:]) / 2
    assert last > first + 0.25, (first, last)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert {"step", "reward", "unscorable", "truncated", "response_length", "samples_per_s", "time/generate_s",
            "time/score_s", "time/learn_s", "time/rest_s", "loss/policy"} <= lines[0].keys()  # fmt: skip


@pytest.mark.parametrize("algo", ["ppo", "rloo", "grpo"])
def test_microbatches_add_up(algo):
    """Cut in 3 uneven pieces or not at all: the same update (siblings may be parted too)."""
    corpus = Corpus.from_texts([f"document {i}" for i in range(20)], byte_tokenizer())
    weights = []
    for size in (None, 24, 6):
        trainer = make_trainer(algo, micro_batch_size=size, ptx_coef=0.3, corpus=corpus, entropy_coef=0.01)
        corpus.load_state_dict(corpus.state_dict() | {"stream": corpus._stream.state_dict() | {"draws": 0}})
        trainer.step()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.policy.parameters()]))
    start = torch.cat([p.detach().flatten() for p in make_trainer(algo).policy.parameters()])
    assert (weights[0] - start).abs().max() > 1e-3
    # Adam's first step is lr * sign(gradient): compare where the gradient is not rounding noise.
    for other in weights[1:]:
        assert ((weights[0] - other).abs() > 1e-4).float().mean() < 0.01


def test_all_microbatches_of_an_update_are_laid_out_with_one_copy_to_the_host(monkeypatch):
    """Lengths of prompts, responses and pretraining rows, for every microbatch and model at once."""
    corpus = Corpus.from_texts([f"document {i}" for i in range(20)], byte_tokenizer())
    trainer = make_trainer("ppo", micro_batch_size=12, ptx_coef=0.3, corpus=corpus)
    made, update = [], trainer.update

    def watched(minibatch):
        with count_host_copies() as copies:
            out = update(minibatch)
        made.append((list(copies), -(-len(minibatch) // 12)))
        return out

    monkeypatch.setattr(trainer, "update", watched)
    trainer.step()
    assert made == [(["Tensor.tolist()"], 6)]


@pytest.mark.parametrize("algo", ["ppo", "rloo"])
def test_two_processes_do_what_one_does_with_twice_the_batch(tmp_path, algo):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "OMP_NUM_THREADS": "1"}
    script = str(HERE / "two_ranks.py")
    # accelerate starts several processes through MPI or as it does for GPUs; the script asks for the CPU itself.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
              "--main_process_port", "0"]  # fmt: skip
    one = subprocess.Popen([sys.executable, script, str(tmp_path / "one"), algo], env=env)
    subprocess.run([*launch, script, str(tmp_path / "two"), algo], env=env, check=True, timeout=300)
    assert one.wait(300) == 0
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    assert (one["world"], two["world"]) == (1, 2)
    assert one["state"] == two["state"] == 24
    for alone, shared in zip(one["lines"], two["lines"], strict=True):
        for name, value in alone.items():
            if not name.startswith(("time/", "samples_per_s", "packing/")):  # packing is of this rank
                assert shared[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    moved = torch.tensor(one["weights"]) - torch.tensor(two["weights"])
    assert (moved.abs() > 2e-5).float().mean() < 0.01


def test_unscorable_rows_are_left_out_and_counted():
    def some_nan(td):
        return torch.where(td["prompt_id"] % 4 == 0, torch.nan, likes_small_ids(td))

    for algo in ("ppo", "rloo", "grpo"):
        trainer = make_trainer(algo, some_nan)
        metrics = trainer.step()
        assert 0 < metrics["unscorable"] < 0.5
        assert all(torch.isfinite(p).all() for p in trainer.policy.parameters())
        assert metrics["reward"] == metrics["reward"]


def test_more_than_half_unscorable_stops_with_the_reason():
    def mostly_nan(td):
        return torch.where(td["prompt_id"] % 4 == 0, 1.0, torch.nan)

    trainer = make_trainer(reward=mostly_nan)
    before = [p.detach().clone() for p in trainer.policy.parameters()]
    with pytest.raises(RunStopped, match=r"step 1: \d+% .* more than half; .* not finite from mostly_nan"):
        trainer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.policy.parameters(), strict=True))


@pytest.mark.parametrize(
    ("algo", "options", "words"),
    [
        ("rloo", {"group_size": 1}, "group_size: must be at least 2 for rloo"),
        ("ppo", {"minibatches": 17}, "minibatches: must be at most num_prompts=16"),
        ("ppo", {"ptx_coef": 1.0}, "corpus: must be given with ptx_coef=1.0"),
        ("ppo", {"lam": 1.5}, "lam: must be at most 1"),
        ("ppo", {"steps": 0}, "steps: must be at least 1"),
        ("dpo", {}, "algo: must be ppo, rloo or grpo"),
    ],
)
def test_bad_options(algo, options, words):
    with pytest.raises(ValueError, match=words):
        make_trainer(algo, **options)


def test_truncated_sampling_is_refused_in_training():
    trainer = make_trainer()
    trainer.policy.sampling = Sampling(max_new_tokens=4, top_k=5)
    with pytest.raises(ValueError, match="training draws with a temperature above 0 alone"):
        BanditTrainer(trainer.env, trainer.policy, LoopOptions())
    with pytest.raises(ValueError, match="training samples with a temperature above 0 alone"):
        TrainOptions(policy="a", prompts="b", reward_model=["c"], top_p=0.9)


def test_a_part_can_be_changed_by_subclassing():
    class Doubled(BanditTrainer):
        def loss(self, td, ptx, denominators, plans):
            loss, metrics = super().loss(td, ptx, denominators, plans)
            return 2 * loss, metrics | {"loss/doubled": 2 * loss.detach()}

    assert "loss/doubled" in make_trainer(kind=Doubled).step()


def test_schedules():
    assert [schedule_factor("constant", s, 10, 4) for s in (0, 3, 4)] == [0.2, 0.8, 1.0]
    assert schedule_factor("linear", 7, 10, 4) == 0.5
    assert schedule_factor("cosine", 7, 10, 4) == pytest.approx(0.5)
    trainer = make_trainer(schedule="linear", steps=4)
    trainer.step()
    trainer.step()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(5e-3 * 0.75)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy, a reward model, prompts and a corpus, as a user has them."""
    root = tmp_path_factory.mktemp("user")
    tokenizer = byte_tokenizer()
    for name, model in (("lm", tiny_lm()), ("rm", tiny_reward_model())):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(12)))
    (root / "text.txt").write_text("\n\n".join(f"some text {i}" for i in range(12)))
    return root


def options_for(root, out, **changes):
    base = dict(
        policy=str(root / "lm"), reward_model=[str(root / "rm")], prompts=str(root / "prompts.jsonl"),
        ptx_data=str(root / "text.txt"), eval_ptx_data=str(root / "text.txt"), ptx_coef=0.5, steps=4, num_prompts=4,
        group_size=2, max_new_tokens=6, lr=1e-3, out=str(out), device="cpu", num_samples=2, normalize_reward="running",
        kl_target=1.0,
    )  # fmt: skip
    return TrainOptions(**(base | changes))


def test_a_run_leaves_what_it_promises_and_resumes_bit_for_bit(folders, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(options_for(folders, whole))
    for name in (
        "metrics.jsonl",
        "curve.png",
        "samples.md",
        "evaluation.json",
        "policy/model.safetensors",
        "checkpoint",
    ):
        assert (whole / name).exists(), name
    assert (whole / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"kl", "reward_terms/reward_model", "loss/ptx"} <= lines[0].keys()
    evaluation = json.loads((whole / "evaluation.json").read_text())
    assert evaluation["before"]["metrics"]["kl"] == pytest.approx(0, abs=1e-4)
    assert evaluation["after"]["metrics"]["lm_loss"] < evaluation["before"]["metrics"]["lm_loss"]
    assert (whole / "samples.md").read_text().count("| before |") == 2

    train(options_for(folders, halves, steps=2))
    train(options_for(folders, halves, resume=True))
    for name in ("policy/model.safetensors", "checkpoint/policy.safetensors"):
        one, other = load_file(whole / name), load_file(halves / name)
        assert all(torch.equal(one[key], other[key]) for key in one)
    again = [json.loads(line) for line in (halves / "metrics.jsonl").read_text().splitlines()]
    for one, other in zip(lines, again, strict=True):
        timeless = [key for key in one if not key.startswith(("time/", "samples_per_s"))]
        assert [one[key] for key in timeless] == [other[key] for key in timeless]

    with pytest.raises(ValueError, match="holds a run already"):
        train(options_for(folders, whole))
    with pytest.raises(ValueError, match=r"another run's: lr was 0.001, is now 0.01"):
        train(options_for(folders, whole, resume=True, lr=0.01, steps=6))
    with pytest.raises(ValueError, match="has done its 4 steps"):
        train(options_for(folders, whole, resume=True))
    saved = whole / "checkpoint" / "options.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"processes": 2}))
    with pytest.raises(ValueError, match="another run's: processes was 2, is now 1"):
        train(options_for(folders, whole, resume=True, steps=6))
    with pytest.raises(ValueError, match="no checkpoint at"):
        train(options_for(folders, tmp_path / "nothing", resume=True))


def test_a_run_that_was_stopped_at_its_end_is_finished_by_resuming(folders, tmp_path, monkeypatch):
    """All steps are done, but the last evaluation was interrupted: nothing more is trained, the rest is written."""
    options = options_for(folders, tmp_path / "run", steps=2)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(report, "write_curve", interrupted)
        train(options)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert not report.is_finished(tmp_path / "run" / "evaluation.json")
    train(options_for(folders, tmp_path / "run", steps=2, resume=True))
    assert (tmp_path / "run" / "curve.png").exists() and (tmp_path / "run" / "metrics.jsonl").read_text() == metrics
    with pytest.raises(ValueError, match="has done its 2 steps"):
        train(options_for(folders, tmp_path / "run", steps=2, resume=True))


def test_numbers_that_are_none_are_null_in_the_files(tmp_path):
    sample = Sample("p", "r", {"term": math.nan})
    path = tmp_path / "evaluation.json"
    report.write_evaluation(path, Evaluation({"term": math.nan, "kl": 0.5}, [sample]), None)
    assert json.loads(path.read_text())["before"]["metrics"] == {"term": None, "kl": 0.5}
    again = report.read_before(path)
    assert math.isnan(again.metrics["term"]) and math.isnan(again.samples[0].terms["term"])
    assert again.metrics["kl"] == 0.5 and "nan" in report.summary(again, again)


def test_what_was_trained_before_an_error_is_kept(folders, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "breaks.py").write_text(
        "calls = []\n"
        "def reward(td):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 5:\n"
        "        raise ValueError('broken')\n"
        "    return td['masks', 'response'].sum(-1).float()\n"
    )
    with pytest.raises(ValueError, match="broken"):
        train(options_for(folders, tmp_path / "run", reward=["breaks:reward"], save_every=0))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    # The checkpoint stands before the step that failed, so the run goes on with that very step.
    train(options_for(folders, tmp_path / "run", reward=["breaks:reward"], save_every=0, resume=True))
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_a_full_disk_leaves_the_former_checkpoint(tmp_path, monkeypatch):
    policy = make_trainer().policy
    checkpoint.save(tmp_path / "checkpoint", policy, {"steps_done": 1}, {"lr": 1})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path / "checkpoint", policy, {"steps_done": 2}, {"lr": 1})
    assert checkpoint.load(tmp_path / "checkpoint", policy, {"lr": 1}) == {"steps_done": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    policy = make_trainer().policy
    checkpoint.save(tmp_path / "c", policy, {"steps_done": 1}, {})
    other = make_trainer("rloo").policy
    with pytest.raises(ValueError, match="is of another model"):
        checkpoint.load(tmp_path / "c", other, {})
    with pytest.raises(ValueError, match="number of processes"):
        checkpoint.load(tmp_path / "c", policy, {}, rank=1)
    (tmp_path / "c" / "rank0.pt").write_bytes(b"junk")
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load(tmp_path / "c", policy, {})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy": None}, "policy: must be a folder or hub id, got none"),
        ({"prompts": None}, "prompts: must be given with policy"),
        ({"reward_model": []}, "reward_model: give a reward_model, a reward or a host_reward"),
        ({"group_size": 0}, "group_size: must be at least 1"),
        ({"reward": ["nothing"]}, "reward: must be package.module:function, got 'nothing'"),
        ({"reward": ["no.such.module:f"]}, "'no.such.module' cannot be imported"),
        ({"reward": ["json:nothing"]}, "module 'json' has no 'nothing'"),
        ({"policy": "/no/such/folder"}, "/no/such/folder"),
        ({"num_prompts": 13}, "num_prompts: must be at most the 12 prompts"),
        ({"max_new_tokens": 300}, "max_new_tokens: must leave room for a prompt in the policy's context of 256 tokens"),
        ({"max_prompt_length": 251}, "together at most the policy's context of 256 tokens, got 251 and 6"),
        ({"max_prompt_length": 0}, "max_prompt_length: must be at least 1, got 0"),
        ({"device": "cuda:7"}, "device: cuda:7"),
        ({"device": "banana"}, "device: must be cpu, cuda or cuda:N, got 'banana'"),
        ({"seed": -1}, "seed: must be at least 0, got -1"),
        ({"seed": 2**64}, "seed: must be at most"),
        ({"num_samples": -1}, "num_samples: must be at least 0"),
        ({"log_with": ["banana"]}, "log_with: must be trackers that are installed .*got 'banana'"),
        ({"ptx_data": None}, "ptx_data: must be given with ptx_coef"),
    ],
)
def test_bad_runs_are_named(folders, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        train(options_for(folders, tmp_path / "run", **changes))
