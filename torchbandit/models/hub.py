"""A model's name to a folder on this machine, by way of the hub's cache.

Downloads, locks between processes, and taking up a broken transfer are huggingface_hub's. Ours are: which files are
fetched (safetensors, JSON and tokenizer files; never code), and one line that says what to do when it fails.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

from torchbandit.models.spec import ModelSpec, first_line

SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""Configs and tokenizers."""
WEIGHTS = ("*.safetensors",)
ELSEWHERE = ("*/*", "consolidated*")
"""Copies of the weights for other programs."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def fetch(spec: ModelSpec, what: str = "model", *, weights: bool = False) -> Path:
    """The folder of `spec.path`; what the hub's cache lacks of it is downloaded.

    Processes that start at once on one node download each file once; the others wait for it. Offline
    (`HF_HUB_OFFLINE=1`) the cache serves alone.

    Args:
        spec: a folder is returned as it is.
        what: who it is, for the message.
        weights: with the weights, not configs and tokenizer alone.
    Returns:
        a folder; of a hub id, the snapshot of one commit.
    Raises:
        ValueError: there is no such folder or repo, it is private, or it can neither be reached nor is it cached.
    """
    name = str(spec.path)
    if Path(name).is_dir():
        return Path(name)
    where = f"{what} {name}: cannot be loaded: "
    if not _HUB_ID.fullmatch(name):
        raise ValueError(f"{where}there is no such folder; give a hub id (owner/name) or a folder with config.json "
                         "and safetensors weights")  # fmt: skip
    revision = spec.revision or "main"
    patterns = [*SMALL, *(WEIGHTS if weights else ())]
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=list(ELSEWHERE),
                tqdm_class=None if weights else _Quiet,
            )
        )
    except Exception as error:
        raise ValueError(where + _remedy(error, name, revision)) from error


class _Quiet(tqdm):
    """No bar for a handful of small files."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **(options | {"disable": True}))  # type: ignore[no-untyped-call]


def _remedy(error: Exception, name: str, revision: str) -> str:
    page = f"{constants.ENDPOINT}/{name}"
    if isinstance(error, GatedRepoError):
        return f"it is gated; accept its terms at {page}, then log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError) or _status(error) == 401:
        return (f"no such folder, and on {constants.ENDPOINT} no such repo, or it is private; check the name, and for "
                "a private repo log in with `hf auth login` or set HF_TOKEN")  # fmt: skip
    if isinstance(error, RevisionNotFoundError):
        return f"the repo has no revision {revision!r}; its branches and tags are at {page}/tree/main"
    if isinstance(error, LocalEntryNotFoundError):
        offline = constants.is_offline_mode() if hasattr(constants, "is_offline_mode") else constants.HF_HUB_OFFLINE
        missing = re.findall(r"[\w.-]+\.(?:safetensors|json|txt|model|jinja)", str(error))
        lacks = f"the cache lacks {', '.join(dict.fromkeys(missing))} of it" if missing else "it is not in the cache"
        why = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} cannot be reached"
        return f"{lacks} and {why}; run `torchbandit pull --model {name}` where there is a network"
    return f"the download failed ({type(error).__name__}: {first_line(error)}); run it again, whole files are kept"


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def verify(folder: Path) -> list[str]:
    """Names of a cached snapshot's files whose content is not what the hub said it is.

    The cache names a file's blob by its checksum: sha256 where the hub keeps it as a large file, else git's sha1. A
    folder that is no snapshot has no such names, and none is found wrong.
    """
    return [path.name for path in sorted(folder.iterdir()) if path.is_symlink() and not _intact(path.resolve())]


def _intact(blob: Path) -> bool:
    kinds = {64: hashlib.sha256, 40: hashlib.sha1}
    if len(blob.name) not in kinds or not re.fullmatch("[0-9a-f]+", blob.name):
        return True
    if not blob.is_file():
        return False
    digest = kinds[len(blob.name)]()
    if len(blob.name) == 40:
        digest.update(b"blob %d\0" % blob.stat().st_size)
    with blob.open("rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest() == blob.name
