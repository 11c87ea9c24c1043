"""String functions that the workers of test_host_reward.py import: the standard library only."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path


def count(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(completion)) for completion in completions]


def matches(prompts: list[str], completions: list[str], answer: list[str], level: list[int]) -> list[float]:
    """Tells whether every argument belongs to its row: prompt "p3" has the answer "a3" and level 3."""
    rows = zip(prompts, answer, level, strict=True)
    return [float(p[1:] == a[1:] == str(n)) for p, a, n in rows]


async def slow_count(prompts: list[str], completions: list[str]) -> list[float]:
    await asyncio.sleep(0)
    return count(prompts, completions)


def asked_together(prompts: list[str], completions: list[str]) -> list[object]:
    """One call of a server a row: each waits until all have been sent."""
    sent, all_sent = [], asyncio.Event()

    async def ask(text: str) -> float:
        sent.append(text)
        if text == "raise":
            raise ConnectionError("the server is away")
        if len(sent) == len(completions):
            all_sent.set()
        await asyncio.wait_for(all_sent.wait(), 5.0)
        return float(len(text))

    return [ask(text) for text in completions]


def only_sums(prompts: list[str], completions: list[str]) -> list[float | None]:
    return [2.0 if "+" in text else None for text in completions]


def only_words(prompts: list[str], completions: list[str]) -> list[float | None]:
    return [3.0 if text.isalpha() else None for text in completions]


def all_columns(prompts: list[str], completions: list[str], **columns: list[object]) -> list[float]:
    return [float(len(columns))] * len(prompts)


def prompt_is(prompts: list[str], completions: list[str], *, word: str) -> list[float]:
    return [float(prompt == word) for prompt in prompts]


def by_word(prompts: list[str], completions: list[str]) -> list[object]:
    """What the completion asks for."""
    out: list[object] = []
    for text in completions:
        if text == "raise":
            raise ZeroDivisionError("asked to")
        if text == "exit":
            sys.exit(3)
        if text == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if text == "hang":
            time.sleep(300)
        if text == "locked":  # holds the interpreter's lock for hours
            re.match(r"(a+)+$", "a" * 60 + "b")
        if text == "short" and len(completions) == 1:
            return []
        out.append({"none": None, "nan": float("nan"), "text": "1.0", "huge": 1e300, "true": True}.get(text, 1.0))
    return out


def meet(prompts: list[str], completions: list[str]) -> list[float]:
    """Says that it runs, and ends only once the model has said so too; the prompt is the folder of their notes."""
    folder = Path(prompts[0])
    (folder / "host").touch()
    while not (folder / "model").exists():
        time.sleep(0.01)
    return [1.0] * len(prompts)


def has_torch(prompts: list[str], completions: list[str]) -> list[float]:
    return [float("torch" in sys.modules)] * len(prompts)


def chatter(prompts: list[str], completions: list[str]) -> list[float]:
    print("a function may print")
    return [1.0] * len(prompts)


def sizes(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(prompts))] * len(prompts)


def leave_child(prompts: list[str], completions: list[str]) -> list[float]:
    """Starts a process of its own, writes its id where the prompt says, and hangs."""
    child = subprocess.Popen(["sleep", "300"])
    Path(prompts[0]).write_text(str(child.pid))
    time.sleep(300)
    return [0.0]


def process_id(prompts: list[str], completions: list[str]) -> list[float]:
    time.sleep(0.2)  # long enough that every worker gets a share
    return [float(os.getpid())] * len(prompts)
