"""Fetching, against a small hub on loopback: once a node, resumed, checked, offline, and with one line of remedy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub
from fakes import byte_tokenizer, tiny_lm
from huggingface_hub import constants
from safetensors.torch import save

from torchbandit.models import load_causal_lm, load_tokenizer
from torchbandit.pull import PullOptions, pull

LOAD = """
import sys, torch
torch.set_num_threads(1)
from torchbandit.models import load_causal_lm, load_tokenizer
name = sys.argv[1]
print(len(load_tokenizer(name)), load_causal_lm(name, "cpu").num_parameters())
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("repo")
    tiny_lm(hidden_size=64, num_hidden_layers=3).save_pretrained(folder, max_shard_size="150KB")
    byte_tokenizer().save_pretrained(folder)
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sum(name.endswith(".safetensors") for name in found) >= 2
    return found | {"pytorch_model.bin": b"pickle", "modeling.py": b"code", "consolidated.safetensors": b"a copy"}


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[FakeHub]:
    repos = {"we/model": dict(files), "we/secret": files, "we/gated": files}
    hub = FakeHub(repos, private=("we/secret",), gated=("we/gated",))
    yield hub
    hub.close()


def environment(hub: FakeHub, cache: Path, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "60",
            "OMP_NUM_THREADS": "1"}  # fmt: skip
    return kept | ours | more


def start(command: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def cache(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process fetches from `hub` into a new cache."""
    at(hub.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return tmp_path


def at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # CI sets it for all the other tests
    monkeypatch.setattr(constants, "ENDPOINT", url)
    path = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + path)


def fetched(name: str = "we/model", **options: str) -> None:
    pull(PullOptions([name], **options))


def refused(name: str = "we/model", **options: str) -> str:
    with pytest.raises(ValueError) as told:
        fetched(name, **options)
    assert name in str(told.value) and "\n" not in str(told.value)
    return str(told.value)


def weights(files: dict[str, bytes]) -> dict[str, int]:
    return {name: len(b) for name, b in files.items() if name.startswith("model-")}


def blob(cache: Path, name: str) -> Path:
    (link,) = cache.glob(f"hub/models--we--model/snapshots/*/{name}")
    return link.resolve()


def test_replicas_that_start_at_once_fetch_each_file_once(
    hub: FakeHub, files: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three processes load by hub id; then this one, offline, from what they left."""
    command = [sys.executable, "-c", LOAD, "we/model"]
    replicas = [start(command, environment(hub, cache)) for _ in range(3)]
    ends = [replica.communicate(timeout=200) for replica in replicas]
    assert [replica.returncode for replica in replicas] == [0, 0, 0], ends
    assert len({out for out, _ in ends}) == 1
    once = {name: len(files[name]) for name in files if hub.sent[name]}
    assert dict(hub.sent) == once
    assert set(once) == set(files) - {"pytorch_model.bin", "modeling.py", "consolidated.safetensors"}
    hub.sent.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    parameters = load_causal_lm("we/model", "cpu").num_parameters()
    assert ends[0][0].split() == [str(len(load_tokenizer("we/model"))), str(parameters)] and not hub.sent


def test_a_broken_download_goes_on_where_it_broke(hub: FakeHub, cache: Path) -> None:
    """huggingface_hub writes in pieces; what was written is not sent again."""
    piece = constants.DOWNLOAD_CHUNK_SIZE
    content = save({"x": torch.zeros(piece + piece // 2, dtype=torch.uint8)})
    hub.repos["we/model"] = {"model.safetensors": content}
    hub.cut["model.safetensors"] = piece + 1000
    fetched()
    assert hub.ranges == [("model.safetensors", f"bytes={piece}-")]
    assert hub.sent["model.safetensors"] == len(content) + 1000
    assert blob(cache, "model.safetensors").read_bytes() == content


def test_a_new_process_keeps_whole_files_and_begins_a_broken_one_again(
    hub: FakeHub, files: dict[str, bytes], cache: Path
) -> None:
    """A process dies in the middle of a shard. huggingface_hub gives each download a file of its own, so that what is
    left of one is never taken for part of another's."""
    name = max(weights(files))
    hub.stall[name] = len(files[name]) // 2
    one_at_a_time = "from huggingface_hub import snapshot_download as s; s('we/model', max_workers=1, token=False)"
    first = start([sys.executable, "-c", one_at_a_time], environment(hub, cache))
    assert hub.stalled.wait(100)
    first.kill()
    first.communicate()
    hub.stall.clear()
    whole = set(hub.sent) - {name}
    assert whole
    fetched()
    assert hub.sent[name] == len(files[name]) // 2 + len(files[name]) and not hub.ranges
    assert all(hub.sent[other] == len(files[other]) for other in whole), "what was there is not sent again"
    assert blob(cache, name).read_bytes() == files[name]


def test_pull_again_fetches_nothing_and_sees_what_is_corrupt(
    hub: FakeHub, files: dict[str, bytes], cache: Path
) -> None:
    fetched()
    hub.sent.clear()
    fetched()
    assert not hub.sent
    for name in (next(iter(weights(files))), "config.json"):
        broken = bytearray(files[name])
        broken[-1] ^= 1  # the size stays, so only the checksum tells
        blob(cache, name).write_bytes(broken)
        told = refused()
        assert name in told and "corrupt" in told
        blob(cache, name).unlink()
        fetched()
        assert blob(cache, name).read_bytes() == files[name]


def test_a_repo_that_lacks_a_shard_is_refused(hub: FakeHub, files: dict[str, bytes], cache: Path) -> None:
    name = next(iter(weights(files)))
    hub.repos["we/model"].pop(name)
    assert f"{name} is missing" in refused()


def test_offline_names_the_file_that_the_cache_lacks(
    hub: FakeHub, files: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fetched()
    name = next(iter(weights(files)))
    (link,) = cache.glob(f"hub/models--we--model/snapshots/*/{name}")
    link.resolve().unlink()
    link.unlink()
    told = refused()
    assert name in told and "run `torchbandit pull --model we/model`" in told


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("we/secret", {}, "it is private; check the name"),
        ("we/nothing", {}, "no such repo"),
        ("we/gated", {}, "accept its terms at http"),
        ("we/model", {"revision": "v9"}, "has no revision 'v9'"),
        ("no/such/folder", {}, "there is no such folder"),
    ],
)
def test_one_line_says_what_to_do(name: str, options: dict[str, str], says: str, hub: FakeHub, cache: Path) -> None:
    assert says in refused(name, **options)


def test_one_line_without_a_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at("http://127.0.0.1:9", monkeypatch)
    assert "not in the cache and http://127.0.0.1:9 cannot be reached; run `torchbandit pull" in refused()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not in the cache and HF_HUB_OFFLINE is set; run `torchbandit pull" in refused()


def test_the_command_line(hub: FakeHub, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torchbandit", "pull", "--model", "we/model", "we/secret"]
    process = start(command, environment(hub, tmp_path))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out.startswith(f"we/model: {tmp_path}") and err.splitlines()[-1].startswith("error: model we/secret: ")
