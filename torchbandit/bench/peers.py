"""How peers are set up: as their own documentation recommends, printed in every run, overridable from a YAML file."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

DEFAULTS: dict[str, dict[str, Any]] = {
    # TorchRL's ChatEnv: the modes of its documentation that take ragged prompts; the quickest one counts.
    "chatenv": {"input_modes": ["history", "text"], "max_rows": 1024},
    # transformers, microbatches padded on the right; sorted by length unless the line says arrival order.
    "transformers": {"micro_batch_scores": 32, "micro_batch_log_probs": 16, "attention": "sdpa"},
    # transformers' generate; both of its caches that run on the device.
    "generate": {"caches": ["dynamic", "static"]},
    # RLlib's SingleAgentEnvRunner with its default connectors.
    "rllib": {},
    # TRL's GRPOTrainer; the quickest of the settings tried on this work (docs/benchmarks.md). `others`: names and the
    # settings in which they differ, measured too.
    "trl": {
        "gradient_checkpointing": False,
        "bf16": True,
        "use_vllm": False,
        "model_init_kwargs": {"dtype": "bfloat16"},
        "others": {},
    },
}
PACKAGES = {
    "datasets": "datasets",
    "chatenv": "torchrl",
    "transformers": "transformers",
    "generate": "transformers",
    "rllib": "ray",
    "trl": "trl",
}


def read_settings(path: str | None) -> dict[str, dict[str, Any]]:
    """The settings of all peers, those of the file in place of the defaults.

    Raises:
        ValueError: the file is no such YAML, or names an unknown peer or setting.
    """
    settings = copy.deepcopy(DEFAULTS)
    if path is None:
        return settings
    import yaml

    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"peers: {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(given, Mapping) or not all(isinstance(part, Mapping) for part in given.values()):
        raise ValueError(f"{path}: must hold a table of settings for each peer, {', '.join(DEFAULTS)}")
    for peer, part in given.items():
        if peer not in settings:
            raise ValueError(f"{path}: unknown peer {peer!r}; there are {', '.join(DEFAULTS)}")
        unknown = set(part) - set(settings[peer])
        if unknown and peer != "trl":  # any field of TRL's GRPOConfig may be given
            known = ", ".join(settings[peer]) or "none"
            raise ValueError(f"{path}: {peer} has no setting {', '.join(sorted(unknown))}; it has {known}")
        settings[peer].update(part)
    others = settings["trl"]["others"]
    if not isinstance(others, Mapping) or not all(isinstance(part, Mapping) for part in others.values()):
        raise ValueError(f"{path}: trl's others must be a table of settings by name, got {others!r}")
    return settings


def installed(peer: str) -> str | None:
    """The peer's name and version, or None where its package is not installed."""
    try:
        return f"{PACKAGES[peer]} {version(PACKAGES[peer])}"
    except PackageNotFoundError:
        return None
