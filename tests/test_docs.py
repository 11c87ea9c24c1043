"""Every Python block of the README and of docs/ runs, in a folder with the demo's models and prompts.

A block is preceded by what it takes for granted, which readers do not see: `<!-- setup: ... -->`. A block may be left
out with `<!-- not run: why -->`, which skips it aloud.
"""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from torchbandit import demo
from torchbandit.models import load_tokenizer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(
    r"(?:<!-- (?P<kind>setup|not run):(?P<note>.*?)-->\s*)?^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", re.M | re.S
)


class Block(NamedTuple):
    name: str
    setup: str
    skip: str
    code: str


def blocks(page: Path, text: str) -> list[Block]:
    found = []
    for match in BLOCK.finditer(text):
        if match["language"] == "python":
            line = text.count("\n", 0, match.start("code"))
            note, kind = match["note"] or "", match["kind"]
            # Blank lines in front, so that a traceback points into the page.
            code = "\n" * line + match["code"]
            name = f"{page.relative_to(ROOT)}:{line}"
            found.append(Block(name, note if kind == "setup" else "", note.strip() if kind == "not run" else "", code))
    return found


ALL = [block for page in PAGES for block in blocks(page, page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("block", ALL, ids=lambda block: block.name)
def test_block(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if block.skip:
        pytest.skip(block.skip)
    (tmp_path / "sft").symlink_to(demo.SFT)
    (tmp_path / "reward_model").symlink_to(demo.REWARD_MODEL)
    (tmp_path / "prompts.jsonl").symlink_to(demo.PROMPTS)
    (tmp_path / "corpus.jsonl").symlink_to(demo.CORPUS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    threads = torch.get_num_threads()
    names = {"__name__": "__main__", "load_tokenizer": load_tokenizer}
    try:
        exec(compile(block.setup, f"{block.name} (setup)", "exec"), names)
        exec(compile(block.code, block.name, "exec"), names)
    finally:
        torch.set_num_threads(threads)


def test_blocks_are_found() -> None:
    text = "a\n\n<!-- setup:\nx = 1\n-->\n```python\nassert x\n```\n\n```\nshell\n```\n"
    text += "<!-- not run: why -->\n```python\ny\n```\n"
    one, two = blocks(ROOT / "page.md", text)
    assert (one.setup.strip(), one.code.strip(), one.skip) == ("x = 1", "assert x", "")
    assert (two.setup, two.skip) == ("", "why")
    assert len(ALL) >= 10 and {block.name.split(":")[0] for block in ALL} >= {"README.md", "docs/loop.md"}


def test_the_two_commands_stand_on_the_first_screen() -> None:
    screen = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:15])
    assert "\npip install -c constraints.txt . && torchbandit train\n" in screen
    assert '\npip install -c constraints.txt ".[test]" && pytest -n 2 --dist loadgroup\n' in screen


def test_every_page_is_in_the_contents_and_no_link_is_dead() -> None:
    contents = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        if page.parent.name == "docs":
            assert page.name in contents, f"{page.name} is missing in mkdocs.yml"
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_tables_and_lists_begin_after_a_blank_line() -> None:
    """GitHub shows them all the same; mkdocs shows them as text."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "```", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for before, line in itertools.pairwise(text.splitlines()):
            for mark in ("| ", "- "):
                begins = line.startswith(mark) and not before.startswith((mark, "|", " ", "#"))
                assert not (begins and before), f"{page.name}: a blank line must stand before {line!r}"


def test_the_tree_in_the_readme_is_the_package() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("torchbandit/\n", 1)[1].split("```", 1)[0]
    named = {name for line in tree.splitlines() for name in line[:28].split()}
    there = {path.name for path in (ROOT / "torchbandit").glob("*.py")}
    there |= {f"{path.parent.name}/" for path in (ROOT / "torchbandit").glob("*/__init__.py")}
    assert named == there - {"__init__.py", "__main__.py"}
