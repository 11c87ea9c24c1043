"""The card, the versions and the commit that a result belongs to."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from torchbandit import __version__


def environment() -> dict[str, Any]:
    """Card, versions, commit."""
    found: dict[str, Any] = {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cards": torch.cuda.device_count(), "cpu": _cpu(), "python": platform.python_version(),
        "torch": torch.__version__, "cuda": torch.version.cuda, "torchbandit": __version__, "commit": _commit(),
    }  # fmt: skip
    for package in ("transformers", "tensordict", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _commit() -> str | None:
    """Of the checkout that the package is imported from; a trailing + where files differ from it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    return head and head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*argv: str) -> str | None:
    try:
        return subprocess.run(
            ["git", *argv], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
