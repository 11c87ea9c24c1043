"""The weight files of a folder: that they are safetensors, all there and whole, before a byte of them is used."""

from __future__ import annotations

import json
import struct
from pathlib import Path

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


def check_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a model.

    Returns:
        one path a shard.
    Raises:
        ValueError: names the file that is missing, cut short or no safetensors, or says what is there instead.
    """
    files = [folder / file for file in _shards(folder, name)]
    for file in files:
        if not file.is_file():
            raise ValueError(f"model {name}: {file.name} is missing in {folder}, though {INDEX} lists it; "
                             f"{_again(name)}")  # fmt: skip
        fault = _fault(file)
        if fault:
            raise ValueError(f"model {name}: {file} is corrupt: {fault}; delete it, then {_again(name)}")
    return files


def _shards(folder: Path, name: str) -> list[str]:
    if (folder / WHOLE).exists():
        return [WHOLE]
    if (folder / INDEX).exists():
        try:
            return sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"model {name}: {folder / INDEX} is corrupt ({error}); delete it, then "
                             f"{_again(name)}") from error  # fmt: skip
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"model {name}: is a PEFT adapter, not a whole model; name its base, and the adapter beside "
                         f"it: ModelSpec(BASE, adapter={name!r})")  # fmt: skip
    pickles = sorted(path.name for kind in PICKLES for path in folder.glob(kind))
    got = f"{', '.join(pickles)} (such a file can run code when it is opened)" if pickles else "none"
    raise ValueError(f"model {name}: cannot be loaded: must have safetensors weights ({WHOLE} or {INDEX}), got {got}; "
                     "save it once with model.save_pretrained(folder), where you trust it")  # fmt: skip


def _fault(file: Path) -> str | None:
    """What a safetensors file's own header says against it."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= size - 8:
            return "it has no safetensors header"
        try:
            header = json.loads(opened.read(length))
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "its safetensors header cannot be read"
    expected = 8 + length + int(end)
    return None if size == expected else f"it must be {expected} bytes long, got {size}"


def _again(name: str) -> str:
    return f"copy it again, or run `torchbandit pull --model {name}`"
