"""The house: imports go down the floors only, and each third party is met on its own edge (docs/contract.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchbandit
from torchbandit.learn import ALGORITHMS

ROOT = Path(torchbandit.__file__).parent
FLOORS = (  # from the ground up; a file may import from lower floors, and from its own folder
    {"batch", "clock", "demo", "read", "__version__"},
    {"responses"},
    {"texts"},
    {"masters", "models", "losses"},
    {"prompts"},
    {"scoring", "generation", "corpus"},
    {"rewards", "policy"},
    {"env"},
    {"learn"},
    {"adapters", "train", "testing", "score", "pull", "profile"},
    {"rllib"},  # hands on the Gymnasium adapter, and runs the command line's options and reports
    {"bench"},  # measures all of it
    {"commands"},
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
    "jsonargparse": {"commands"},
    "yaml": {"commands", "bench/peers"},
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


def test_no_circles_between_files() -> None:
    """A file that imports another is not imported by it, over any way round; imports inside functions count too."""
    known = {place: f"torchbandit.{place.replace('/', '.')}" for place in PLACES}
    files = {name: place for place, name in known.items()}
    graph: dict[str, set[str]] = {}
    for place in PLACES:
        path = ROOT / place
        tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
        named: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and not _types_only(tree, node):
                for alias in node.names:  # a submodule of a package is a file of its own
                    submodule = f"{node.module}.{alias.name}"
                    named |= {submodule if submodule in files else node.module} & files.keys()
        graph[place] = {files[name] for name in named} - {place}
    for place in PLACES:
        reached, todo = set[str](), list(graph[place])
        while todo:
            here = todo.pop()
            assert here != place, f"{place} imports itself, by way of {sorted(reached)}"
            if here not in reached:
                reached.add(here)
                todo += graph[here]


def _types_only(tree: ast.AST, node: ast.AST) -> bool:
    return any(
        isinstance(part, ast.If) and ast.unparse(part.test) == "TYPE_CHECKING" and node in ast.walk(part)
        for part in ast.walk(tree)
    )


def test_no_file_but_learn_knows_an_algorithm_by_name() -> None:
    """A new algorithm is one class and one line: nothing else may ask which one it is."""
    names = set(ALGORITHMS)
    found = []
    for place in PLACES:
        if place.split("/")[0] in ("learn", "demo"):
            continue
        path = ROOT / place
        tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
        found += [
            f"{place}:{node.lineno}: {node.value!r}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
        ]
    assert not found, "\n".join(found)
