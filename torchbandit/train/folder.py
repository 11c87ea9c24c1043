"""A run's folder: whose it is, and its checkpoints, each written whole or not at all. Imports nothing heavy.

`checkpoint/` is the newest one; `checkpoint.step40/` and so on are older ones. A checkpoint is written as
`checkpoint.new/`, flushed to the disk, and renamed: whatever ends the process, or the power, a whole one is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torchbandit.train import lock

FREE = {
    "out", "name", "resume", "save_every", "save_minutes", "keep_checkpoints", "extend", "log_with", "num_samples",
    "device", "places",
}  # fmt: skip
"""Options that a resumed run may have otherwise; all others decide what the run computes. `steps` has its own rule."""


@contextlib.contextmanager
def claim(out: Path, resume: bool) -> Iterator[None]:
    """Make the folder and hold its lock; a run that is in it already is neither overwritten nor joined.

    Raises:
        ValueError: the folder holds a run (or none, with `resume`), belongs to a live one, or cannot be made.
        OSError: the lock could not be written.
    """
    check(out, resume)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: {out} cannot be made ({error.strerror}); name another folder") from error
    with lock.hold(out):
        check(out, resume, locked=True)
        if not resume:  # what a kill left of the first checkpoint
            shutil.rmtree(out / "checkpoint.new", ignore_errors=True)
        yield


def check(out: Path, resume: bool, locked: bool = False) -> None:
    """What can be said of the folder before anything is loaded; raises what `claim` does.

    Args:
        locked: this process holds the lock.
    """
    if not locked:
        lock.refuse_live(out)
    exists = bool(_candidates(out / "checkpoint"))
    if exists and not resume:
        raise ValueError(f"out: {out} holds a run already; go on with --resume, or name another folder with --out")
    if resume and not exists:
        raise ValueError(
            f"resume: no checkpoint at {out / 'checkpoint'}; drop --resume to begin a run, or name its folder with "
            "--out"
        )


def launched_rank() -> int:
    """This process's rank as launchers tell it, before anything is imported that would say so."""
    names = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), 0)


# --- writing ----------------------------------------------------------------------------------------------------------


def write(
    directory: Path, fill: Callable[[Path], object], step: int, options: Mapping[str, Any], keep: int = 1
) -> None:
    """Write the checkpoint `directory`; the one that was there is kept as an older one.

    Args:
        fill: writes into a folder; what other ranks have written is in it already.
        step: steps done.
        options: of the run, for `find`.
        keep: checkpoints to keep, this one included.
    Raises:
        OSError: the disk is full or not writable; the former checkpoint is still there.
    """
    with fresh_folder(directory) as fresh:
        fill(fresh)
        others = list(fresh.glob("files.rank*.json"))
        listed = {name for path in others for name in json.loads(path.read_text(encoding="utf-8"))["files"]}
        files = [path for path in _files(fresh) if str(path.relative_to(fresh)) not in listed]
        # Without a checksum: whoever reads it sees that it is text, and whose.
        told = fresh / "options.json"
        told.write_text(json.dumps(dict(options) | {"steps_done": step}, indent=1), encoding="utf-8")
        _flush(told)
        seal(fresh, files, step)
    put_in_place(fresh, directory, keep)


@contextlib.contextmanager
def fresh_folder(directory: Path) -> Iterator[Path]:
    """`checkpoint.new`, to write into; removed where that fails.

    Raises:
        OSError: instead of any error, with what happened: libraries wrap a full disk in errors that do not say so.
    """
    fresh = directory.with_name(directory.name + ".new")
    try:
        fresh.mkdir(parents=True, exist_ok=True)
        yield fresh
    except BaseException as error:
        free = shutil.disk_usage(directory.parent).free if directory.parent.exists() else 0
        shutil.rmtree(fresh, ignore_errors=True)
        if isinstance(error, Exception):
            told = f"checkpoint: could not be written to {directory}, {free / 1e6:.0f} MB are free there: {error}"
            raise OSError(told) from error
        raise


def seal(fresh: Path, files: Collection[Path], step: int, rank: int = 0) -> None:
    """Flush files to the disk and note their sizes and checksums; of the main process the last thing written."""
    sums = {str(path.relative_to(fresh)): _flush(path) for path in files}
    note = fresh / f"files.rank{rank}.json"
    note.write_text(json.dumps({"step": step, "files": sums}), encoding="utf-8")
    _flush(note)
    for folder in [fresh, *(path for path in fresh.rglob("*") if path.is_dir())]:
        _flush_folder(folder)


def put_in_place(fresh: Path, directory: Path, keep: int = 1) -> None:
    """Rename a whole checkpoint to its final name; whenever this is killed, `recover` finds a whole one."""
    step = _step(fresh)
    former = directory.with_name(f"{directory.name}.step{_step(directory)}")
    if directory.exists():
        shutil.rmtree(former, ignore_errors=True)
        os.replace(directory, former)
    os.replace(fresh, directory)
    _flush_folder(directory.parent)
    # Checkpoints of this step or a later one are of a past that was left by going back.
    older = [path for path in _older(directory) if _number(path) < step]
    for path in set(_older(directory)) - set(older[: keep - 1]):
        shutil.rmtree(path, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flush(path: Path) -> list[int]:
    """A file's size and checksum, once the disk has it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return _sum(file)


def _sum(file: BinaryIO) -> list[int]:
    size = crc = 0
    while block := file.read(1 << 24):
        size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def _flush_folder(folder: Path) -> None:
    """Names are on the disk only when their folder is."""
    with contextlib.suppress(OSError):  # Windows opens no folders, and some file systems flush none
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# --- reading ----------------------------------------------------------------------------------------------------------


def recover(directory: Path) -> None:
    """Make `directory` the newest checkpoint that is whole; a damaged one is set aside, with a warning.

    Raises:
        ValueError: none is whole.
    """
    damaged: dict[Path, str] = {}
    for path in _candidates(directory):
        problem = damage(path)
        if problem is None:
            break
        damaged[path] = f"{path.name} is damaged ({problem})"
    else:
        raise ValueError(
            f"resume: no checkpoint in {directory.parent} is whole: {'; '.join(damaged.values())}. Begin a new run, in "
            "another folder (--out)"
        )
    for other in damaged:
        aside = other.with_name(other.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(other, aside)
    if path != directory:
        os.replace(path, directory)
        _flush_folder(directory.parent)
    if damaged:
        warnings.warn(
            f"resume: {'; '.join(damaged.values())}. Set aside as {', '.join(p.name + '.damaged' for p in damaged)}; "
            f"going on from {path.name}, after step {_step(directory)}",
            stacklevel=2,
        )
    shutil.rmtree(directory.with_name(directory.name + ".new"), ignore_errors=True)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: files that are missing, or that are not what was written."""
    notes = sorted(checkpoint.glob("files.rank*.json"))
    try:
        if checkpoint / "files.rank0.json" not in notes:
            return "files.rank0.json is missing"
        int(json.loads((checkpoint / "options.json").read_text(encoding="utf-8"))["steps_done"])
        for note in notes:
            for name, written in json.loads(note.read_text(encoding="utf-8"))["files"].items():
                if not (checkpoint / name).is_file():
                    return f"{name} is missing"
                with (checkpoint / name).open("rb") as file:
                    if _sum(file) != written:
                        return f"{name} is not as it was written"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return str(error)
    return None


def find(directory: Path, options: Mapping[str, Any], free: Collection[str] = FREE) -> dict[str, Any]:
    """Make sure that a checkpoint is there and is this run's.

    Args:
        options: of the run that is to go on.
        free: options that may differ.
    Returns:
        what its options.json holds: the options, and `steps_done`.
    Raises:
        ValueError: there is none, or it is another run's (the options that differ are named), or the steps do not fit.
    """
    try:
        saved: dict[str, Any] = json.loads((directory / "options.json").read_text(encoding="utf-8"))
        saved["steps_done"] = int(saved["steps_done"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if not directory.exists():
            raise ValueError(f"resume: no checkpoint at {directory}; drop --resume to begin a run") from None
        raise ValueError(f"resume: the checkpoint at {directory} is damaged ({error}); begin a new run") from error
    differing = {
        name: (saved[name], value) for name, value in options.items()
        if name not in free and name != "steps" and name in saved and saved[name] != json.loads(json.dumps(value))
    }  # fmt: skip
    if differing:
        told = "; ".join(f"{name} was {old!r}, is now {new!r}" for name, (old, new) in differing.items())
        raise ValueError(
            f"resume: the checkpoint at {directory} is another run's: {told}. Use its options, or a new --out"
        )
    _check_steps(saved, options)
    return saved


def _check_steps(saved: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """More steps are the same run, gone on with, unless the learning rate depends on how many there are."""
    done, was, now, schedule = saved["steps_done"], saved.get("steps"), options.get("steps"), options.get("schedule")
    if was is None or now is None:
        return
    if now < done:
        raise ValueError(f"steps: the run has done {done} steps; must be at least that, got {now}")
    if now == was or schedule in (None, "constant"):
        return
    if not options.get("extend"):
        raise ValueError(
            f"steps: was {was}, is now {now}, and the {schedule} schedule of the learning rate depends on it. Use "
            f"--steps {was}, or add --extend: the learning rate then follows the schedule of {now} steps from step "
            f"{done + 1} on, and jumps there"
        )
    warnings.warn(
        f"extend: from step {done + 1} on the learning rate follows the {schedule} schedule of {now} steps, no longer "
        f"that of {was}",
        stacklevel=3,
    )


def _candidates(directory: Path) -> list[Path]:
    """Checkpoints, the newest first. A whole one may not have its final name yet: it was killed between two renames."""
    fresh = directory.with_name(directory.name + ".new")
    newest = directory if directory.exists() else fresh if fresh.exists() and damage(fresh) is None else None
    return ([] if newest is None else [newest]) + _older(directory)


def _older(directory: Path) -> list[Path]:
    named = directory.parent.glob(f"{directory.name}.step*")
    return sorted((path for path in named if path.suffix[5:].isdecimal()), key=_number, reverse=True)


def _number(path: Path) -> int:
    return int(path.suffix[5:])


def _step(checkpoint: Path) -> int:
    """Steps done before a checkpoint; 0 where it does not say so any more."""
    try:
        return int(json.loads((checkpoint / "options.json").read_text(encoding="utf-8"))["steps_done"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
