"""The house: imports go down the floors only, and each third party is met on its own edge (docs/contract.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchbandit

ROOT = Path(torchbandit.__file__).parent
FLOORS = (  # from the ground up; a file may import from lower floors, and from its own folder
    {"batch", "clock", "demo", "read", "__version__"},
    {"responses", "texts"},
    {"masters", "models", "losses"},
    {"prompts"},
    {"scoring", "generation", "corpus"},
    {"rewards", "policy"},
    {"env"},
    {"adapters", "train", "testing", "score", "pull", "profile"},
    {"rllib"},  # hands on the Gymnasium adapter, and runs the command line's options and reports
    {"bench"},  # measures all of it
    {"cli"},
    {"__main__"},
)
HEIGHT = {part: height for height, floor in enumerate(FLOORS) for part in floor}
HOME = {  # a third party, and the only places that may import it when they run
    "transformers": {"models", "generation", "policy", "scoring", "bench"},  # bench: as a peer, and its configs
    "ray": {"rllib", "bench/rllib"},
    "gymnasium": {"adapters/gymnasium", "rllib"},  # RLlib's own spaces are gymnasium's
    "torchrl": {"adapters/torchrl", "bench"},
    "trl": {"adapters/trl", "bench"},
    "vllm": {"adapters/vllm"},
    "datasets": {"read/arrow", "bench"},
    "pyarrow": {"read/arrow"},
    "numpy": {"rllib", "adapters", "bench"},
    "jsonargparse": {"cli"},
    "huggingface_hub": {"models/hub"},
    "bitsandbytes": {"models/quantize"},
    "torchao": {"models/quantize"},
    "peft": {"models/adapters"},
}
SCRIPTS = {"demo/make"}  # run by hand, imported by nobody


def imports(tree: ast.AST, runs: bool = True) -> Iterator[tuple[str, bool]]:
    """(module, whether the import is executed): those under TYPE_CHECKING only name types."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, runs) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write the whole path"
            whole = node.module == "torchbandit"
            yield from ((f"torchbandit.{a.name}", runs) for a in node.names) if whole else [(node.module or "", runs)]
        else:
            types_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            yield from imports(node, runs and not types_only)


def within(place: str, homes: set[str]) -> bool:
    return any(place == home or place.startswith(home + "/") for home in homes)


def faults(place: str, source: str) -> list[str]:
    part = place.split("/")[0]
    if part not in HEIGHT:
        return [f"{place}: stands on no floor; give it one in FLOORS"]
    found = []
    for module, runs in imports(ast.parse(source)):
        top, _, rest = module.partition(".")
        other = rest.split(".")[0]
        if top == "torchbandit" and other != part and HEIGHT.get(other, len(FLOORS)) >= HEIGHT[part]:
            found.append(f"{place}: imports {module}, which is not on a lower floor")
        if runs and top in HOME and not within(place, HOME[top]):
            found.append(f"{place}: imports {top}, whose home is {' and '.join(sorted(HOME[top]))}")
    return found


PLACES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().removesuffix("/__init__")
    for path in ROOT.rglob("*.py")
    if path != ROOT / "__init__.py"  # the package's front hands out names of every floor, lazily
)


@pytest.mark.parametrize("place", sorted(set(PLACES) - SCRIPTS))
def test_imports_go_down(place: str) -> None:
    path = ROOT / place
    found = faults(place, (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("place", "source", "says"),
    [
        ("rewards/term", "from torchbandit.env import BanditEnv", "not on a lower floor"),
        ("rewards/term", "from torchbandit import policy", "not on a lower floor"),
        ("batch", "def f():\n    import torchbandit.scoring.plan", "not on a lower floor"),
        ("env", "import transformers", "whose home is"),
        ("train/loop", "try:\n    from ray import tune\nexcept ImportError:\n    pass", "whose home is bench/rllib"),
        ("adapters/trl", "import gymnasium.vector", "whose home is adapters/gymnasium"),
        ("utils", "", "stands on no floor"),
    ],
)
def test_a_fault_is_seen(place: str, source: str, says: str) -> None:
    assert [says in fault for fault in faults(place, source)] == [True]


def test_what_is_allowed() -> None:
    assert not faults("rewards/term", "from torchbandit import batch\nfrom torchbandit.rewards.host import HostReward")
    assert not faults("prompts/read", "if TYPE_CHECKING:\n    from transformers import PreTrainedTokenizerBase")
    assert not faults("scoring/packed", "import transformers.masking_utils")
