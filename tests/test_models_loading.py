"""Before and while weights are read: files, sizes, memory, and nothing hidden."""

from __future__ import annotations

import json
import mmap
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fakes import byte_tokenizer, tiny_lm

from torchbandit.models import ModelSpec, estimate, load_causal_lm, load_reward_model
from torchbandit.models.mapped import given_back

MIB = 2**20
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 220 MiB of float32 in shards of at most 40 MiB."""
    path = tmp_path_factory.mktemp("sharded")
    model = tiny_lm(hidden_size=512, intermediate_size=2048, num_hidden_layers=13, vocab_size=512)
    model.save_pretrained(path, max_shard_size=40 * MIB)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_lm(hidden_size=64).save_pretrained(tmp_path, max_shard_size="100KB")
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def peak(folder: Path, tmp_path: Path, *how: str) -> dict[str, int]:
    tiny_lm().save_pretrained(tmp_path)
    command = [sys.executable, str(HERE / "peak_memory.py"), str(tmp_path), str(folder), *how]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=200).stdout)


def mapped(file: Path) -> int:
    """Bytes of the file that are in this process's memory."""
    found = re.findall(rf"{re.escape(str(file))}\n(?:.*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text())
    return sum(map(int, found)) * 1024


def largest(folder: Path) -> int:
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("how", ["right", "wrong"])
def test_host_memory_stays_below_one_shard(how: str, sharded: Path, tmp_path: Path) -> None:
    """float32 files to bfloat16: beyond the model itself there is never more than a shard on the host."""
    took = peak(sharded, tmp_path, "cpu", "bfloat16", *(["wrong"] if how == "wrong" else []))
    beyond = took["private"] - took["weights"]
    assert took["weights"] > 90 * MIB
    assert (beyond < 1.2 * largest(sharded) + 16 * MIB) == (how == "right"), beyond


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_pages_that_were_read_are_given_back(sharded: Path) -> None:
    file = max(sharded.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        whole = sum(pages[i] for i in range(0, len(pages), 4096))
        assert mapped(file) > 0.9 * len(pages), "a mapped file stays in memory once it is read"
        with given_back([file], every_s=0.005):
            end = time.monotonic() + 60
            while mapped(file) > 0 and time.monotonic() < end:
                time.sleep(0.01)
        assert mapped(file) == 0
        assert sum(pages[i] for i in range(0, len(pages), 4096)) == whole


def test_too_little_memory_is_told_before_loading(monkeypatch: pytest.MonkeyPatch, sharded: Path) -> None:
    def unread(*args: object, **options: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("torchbandit.models.load.AutoModelForCausalLM.from_pretrained", unread)
    monkeypatch.setattr(estimate, "free_bytes", lambda device: 150 * MIB)
    with pytest.raises(ValueError) as told:
        load_causal_lm(sharded, "cpu")
    text = str(told.value)
    assert re.search(r"take 0.2\d GiB in float32, and cpu has 0.15 GiB free", text), text
    assert re.search(r'next smaller precision is bfloat16 \(0.1\d GiB: dtype="bfloat16"\)', text), text
    monkeypatch.setattr(estimate, "free_bytes", lambda device: MIB)
    with pytest.raises(ValueError, match="in bfloat16, and cpu has 1.00 MiB free"):
        load_causal_lm(ModelSpec(sharded, dtype="bfloat16"), "cpu")


def test_the_next_smaller_precision_that_the_device_has(monkeypatch: pytest.MonkeyPatch, sharded: Path) -> None:
    monkeypatch.setattr(estimate, "free_bytes", lambda device: 80 * MIB)
    monkeypatch.setattr(estimate.quantize, "why_not", lambda kind, device: "no" if kind == "fp8" else None)
    with pytest.raises(ValueError, match=r'next smaller precision is int8 \(\S+ \S+: quantization="int8".*\)'):
        load_causal_lm(ModelSpec(sharded, dtype="bfloat16"), "cpu")
    monkeypatch.setattr(estimate.quantize, "why_not", lambda kind, device: "not installed")
    with pytest.raises(ValueError, match=r"free; or free memory on cpu"):
        load_causal_lm(ModelSpec(sharded, dtype="bfloat16"), "cpu")


def test_the_estimate_counts_tied_weights_once_and_buffers() -> None:
    model = tiny_lm("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    taken = sum(p.numel() * 4 for p in model.parameters()) + sum(b.numel() * b.element_size() for b in model.buffers())
    assert estimate.weight_bytes(model, torch.float32) == taken
    assert estimate.free_bytes(torch.device("cpu")) > 0 and estimate.free_bytes(torch.device("meta")) is None


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def test_a_missing_shard_is_named(folder: Path) -> None:
    gone = shards(folder)[1]
    gone.unlink()
    with pytest.raises(ValueError, match=rf"{gone.name} is missing in .*torchbandit pull --model"):
        load_causal_lm(folder, "cpu")


@pytest.mark.parametrize("fault", ["cut", "longer", "no header", "garbage header", "empty"])
def test_a_corrupt_shard_is_named(fault: str, folder: Path) -> None:
    broken = shards(folder)[1]
    whole = broken.read_bytes()
    broken.write_bytes(
        {
            "cut": whole[:-100],
            "longer": whole + b"x",
            "no header": b"\xff" * 1000,
            "garbage header": whole[:8] + b"{" * (len(whole) - 8),
            "empty": b"",
        }[fault]
    )
    with pytest.raises(ValueError, match=rf"{broken.name} is corrupt: .*delete it"):
        load_causal_lm(folder, "cpu")


def test_a_corrupt_index_is_named(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model.safetensors.index.json is corrupt"):
        load_causal_lm(folder, "cpu")


def test_g5_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = tiny_lm("gpt2")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"must have safetensors weights .* got pytorch_model.bin .*can run code"):
        load_causal_lm(tmp_path, "cpu")
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="got none"):
        load_causal_lm(tmp_path, "cpu")


def test_g5_a_model_with_code_of_its_own_is_refused(folder: Path) -> None:
    """Its module would leave a file if it were imported."""
    trace = folder / "was_run"
    (folder / "mine.py").write_text(f"open({str(trace)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": auto}))
    for load in (load_causal_lm, load_reward_model):
        with pytest.raises(ValueError, match="code of its own .auto_map in config.json., which torchbandit never does"):
            load(folder, "cpu")
    assert not trace.exists()


def test_g5_code_beside_a_known_architecture_is_not_run(folder: Path) -> None:
    trace = folder / "was_run"
    (folder / "mine.py").write_text(f"open({str(trace)!r}, 'w')\nclass Model: pass\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "mine.Model"}}))
    assert type(load_causal_lm(folder, "cpu")).__name__ == "LlamaForCausalLM"
    assert not trace.exists()
