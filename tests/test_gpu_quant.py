"""Quantised, offloaded and sharded weights on a GPU: fp8's kernels, pinned memory, and what the host sees of a load."""

from __future__ import annotations

import gc
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import naive
import pytest
import torch
from fakes import byte_tokenizer, fake_batch, tiny_lm, tiny_reward_model
from transformers import PreTrainedModel

from torchbandit import KLPenalty, ModelSpec, PromptSet, RewardModel
from torchbandit.env import BanditEnv
from torchbandit.models import estimate, load_causal_lm, load_reward_model, quantize
from torchbandit.scoring import log_probs, make_plan, sequence_scores

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="fp8, pinned memory and CUDA's own counters")
MIB = 2**20
SIZES = dict(hidden_size=256, intermediate_size=512, num_attention_heads=8)


def asks(kind: str) -> object:
    missing = importlib.util.find_spec(quantize.LIBRARY[kind]) is None
    return pytest.param(kind, marks=pytest.mark.skipif(missing, reason=f"{quantize.LIBRARY[kind]} is not installed"))


KINDS = [asks("fp8"), asks("int8"), asks("nf4")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    lm, rm = tmp_path_factory.mktemp("lm"), tmp_path_factory.mktemp("rm")
    tiny_lm(**SIZES).save_pretrained(lm)
    tiny_reward_model(**SIZES).save_pretrained(rm)
    return lm, rm


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 1 GiB of float32 in shards of at most 100 MiB."""
    path = tmp_path_factory.mktemp("sharded")
    model = tiny_lm(hidden_size=1024, intermediate_size=4096, num_hidden_layers=16, vocab_size=1024)
    model.save_pretrained(path, max_shard_size=100 * MIB)
    return path


def batch(number: int = 32) -> tuple[torch.Tensor, ...]:
    return tuple(x.cuda() for x in naive.tensors(fake_batch(num_prompts=number)))


@pytest.fixture(scope="module")
def right() -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and summed log-probs of `batch()`, in float32 on the CPU."""
    args = tuple(x.cpu() for x in batch())
    with torch.no_grad():
        return naive.scores(tiny_reward_model(**SIZES), args), naive.log_probs(tiny_lm(**SIZES), args)[0].sum(-1)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.cpu(), b.cpu()]))[0, 1])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_padded_and_compiled(
    kind: str, compiled: bool, folders: tuple[Path, Path], right: tuple[torch.Tensor, torch.Tensor]
) -> None:
    torch._dynamo.reset()
    # Weights and activations rounded as fp8 does, and the rest in float32, give scores that correlate by 0.974.
    args, floor = batch(), {"fp8": 0.95, "int8": 0.99, "nf4": 0.9}[kind]
    exact, exact_logps = right
    lm = load_causal_lm(ModelSpec(folders[0], quantization=kind, compile=compiled), "cuda")
    rm = load_reward_model(ModelSpec(folders[1], quantization=kind, compile=compiled), "cuda")
    assert rm.score.weight.dtype == lm.lm_head.weight.dtype == lm.model.norm.weight.dtype == torch.bfloat16
    with torch.no_grad():
        for packing in (True, False):
            plan = make_plan(args[1], args[3], packing=packing)
            assert correlation(sequence_scores(rm, *args, plan=plan), exact) > floor
            assert correlation(log_probs(lm, *args, plan=plan).sum(-1), exact_logps) > floor


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_is_what_the_device_gives(kind: str, sharded: Path) -> None:
    load_causal_lm(ModelSpec(sharded, quantization=kind), "cuda")
    gc.collect()  # the first one's: libraries that a first load brings are not of the weights
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = load_causal_lm(ModelSpec(sharded, quantization=kind), "cuda")
    skeleton = tiny_lm(hidden_size=1024, intermediate_size=4096, num_hidden_layers=16, vocab_size=1024)
    guess = estimate.weight_bytes(skeleton, torch.bfloat16, kind)
    assert torch.cuda.memory_allocated() - before == pytest.approx(guess, rel=0.03)
    assert model.device.type == "cuda"


def test_too_little_memory_is_told(monkeypatch: pytest.MonkeyPatch, sharded: Path) -> None:
    assert 0 < estimate.free_bytes(torch.device("cuda")) <= torch.cuda.get_device_properties(0).total_memory
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300 * MIB, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    with pytest.raises(ValueError, match=r"0.\d\d GiB in bfloat16, and cuda has 0.29 GiB free"):
        load_causal_lm(sharded, "cuda")


@pytest.mark.parametrize("kind", ["", *KINDS])
def test_host_memory_stays_below_one_shard(kind: str, sharded: Path, folders: tuple[Path, Path]) -> None:
    """Mapped files counted in."""
    command = [sys.executable, str(Path(__file__).parent / "peak_memory.py"), str(folders[0]), str(sharded), "cuda",
               "bfloat16", *([kind] if kind else [])]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    took = json.loads(done.stdout.splitlines()[-1])
    largest = max(path.stat().st_size for path in sharded.glob("*.safetensors"))
    print(kind or "bfloat16", took, "largest shard", largest)
    assert took["weights"] == 0
    assert took["private"] < 1.2 * largest + 64 * MIB and took["all"] < 1.2 * largest + 256 * MIB


def scores(models: list[PreTrainedModel], args: tuple[torch.Tensor, ...]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([sequence_scores(models[0], *args), log_probs(models[1], *args).sum(-1)])


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_an_env_sleeps_and_wakes(kind: str | None, folders: tuple[Path, Path], sharded: Path) -> None:
    prompts = PromptSet.from_texts(["one", "three", "five"], byte_tokenizer(), max_length=8)
    rm, lm = (ModelSpec(folder, quantization=kind, compile=False) for folder in (folders[1], sharded))
    terms = [RewardModel(rm), KLPenalty(lm)]
    env = BanditEnv(prompts, terms, num_prompts=2, device="cuda")

    def step() -> torch.Tensor:
        env.load_state_dict(start)
        td = env.reset()
        response = torch.full((2, 3), 65, device=env.device)
        td["tokens", "response"], td["masks", "response"] = response, response == 65
        td["log_probs", "response"] = torch.zeros(2, 3, device=env.device)
        return env.step(td)["next", "reward"]

    start = env.state_dict()
    first, args = step(), batch()
    gc.collect()
    before = scores(env.rewards.models(), args)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    freed = env.offload()
    print(kind, f"{freed} bytes freed, {allocated - torch.cuda.memory_allocated()} by the allocator's count")
    assert allocated - torch.cuda.memory_allocated() == pytest.approx(freed, rel=0.05)
    assert torch.cuda.memory_reserved() <= reserved - freed // 2
    with pytest.raises(ValueError, match="onload"):
        step()
    assert env.onload() == freed
    assert torch.equal(scores(env.rewards.models(), args), before) and torch.equal(step(), first)


@pytest.mark.parametrize("kind", KINDS)
def test_g1_quantised_scoring_waits_for_nothing(kind: str, folders: tuple[Path, Path]) -> None:
    """Unpacked and warm, a quantised reward model makes no copy to the host."""
    args = batch()
    rm = load_reward_model(ModelSpec(folders[1], quantization=kind), "cuda")
    plan = make_plan(args[1], args[3], packing=False)
    with torch.no_grad():
        sequence_scores(rm, *args, plan=plan)
        torch.cuda.set_sync_debug_mode("error")
        try:
            sequence_scores(rm, *args, plan=make_plan(args[1], args[3], packing=False))
        finally:
            torch.cuda.set_sync_debug_mode("default")
