"""`torchbandit pull`: models into the hub's cache ahead of a run, whole and checked."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class PullOptions:
    """Fetch models into the hub's cache ahead of a run, and check every byte that is there.

    Configs, tokenizers and safetensors weights are fetched, nothing else. What is cached already is not fetched again.
    HF_HOME says where the cache is, HF_TOKEN who you are.

    Args:
        model: Hub ids.
        revision: Branch, tag or commit, of all of them.
    """

    model: list[str]
    revision: str | None = None


def pull(options: PullOptions) -> None:
    """Fetch and check `options.model`; prints the folder of each.

    Raises:
        ValueError: one cannot be fetched, misses a weight file, or has a file that is not what the hub says it is.
    """
    from torchbandit.models import ModelSpec
    from torchbandit.models.hub import fetch, verify
    from torchbandit.models.weights import check_files

    for name in options.model:
        folder = fetch(ModelSpec(name, revision=options.revision), weights=True)
        wrong = verify(folder)
        if wrong:
            files = ", ".join(str(folder / file) for file in wrong)
            raise ValueError(f"model {name}: corrupt: {files}; delete what that is a link to, and pull again")
        check_files(folder, name)
        print(f"{name}: {folder}")
