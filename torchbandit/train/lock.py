"""One run a folder: a lock file that names the process of the run. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "run.lock"
Owner = dict[str, Any]


@contextlib.contextmanager
def hold(out: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, which exists; it is removed on every way out but a kill -9.

    The lock of a process of this host that is dead is taken over, with a warning.

    Raises:
        ValueError: another process holds it (see `refuse_live`).
        OSError: the lock could not be written.
    """
    path, text = out / NAME, json.dumps(_this_process())
    try:
        with _one_at_a_time(out):
            refuse_live(out)
            if owner := _read(path):
                warnings.warn(f"{path}: process {owner['pid']} has ended without removing it; taken over", stacklevel=2)
                path.unlink()
            _create(path, text)
    except OSError as error:
        raise OSError(
            f"{path}: could not be written ({error.strerror or error}); make room there, or name another folder with "
            "--out"
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # whoever has removed the folder has removed the lock
            if path.read_text(encoding="utf-8") == text:
                path.unlink()


def refuse_live(out: Path) -> None:
    """Nothing, unless the folder belongs to a run that is live, or that may be.

    Raises:
        ValueError: a live process of this host holds the lock, or one of another host, which cannot be seen from here.
    """
    path = out / NAME
    owner, here = _read(path), socket.gethostname()
    if owner is None:
        return
    if not isinstance(owner.get("pid"), int) or not isinstance(owner.get("host"), str):
        raise ValueError(f"out: {path} cannot be read; if no run is live in {out}, remove that file")
    told = f"live on {owner['host']}, process {owner['pid']}, since {owner.get('since', 'an unknown time')}"
    if owner["host"] != here:
        raise ValueError(
            f"out: the run in {out} is {told}. This is {here}, which cannot see that process: if it has ended, remove "
            f"{path}; else name another folder with --out"
        )
    if _lives(owner):
        raise ValueError(
            f"out: the run in {out} is {told}; stop it (kill {owner['pid']} ends its step and saves), or name another "
            "folder with --out"
        )


def _this_process() -> Owner:
    pid = os.getpid()
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {"host": socket.gethostname(), "pid": pid, "since": since, "started": _started(pid)}


def _read(path: Path) -> Owner | None:
    """What the lock says, {} where it is not a lock's text; None without a lock."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _lives(owner: Owner) -> bool:
    """Whether the owner, of this host, still runs; a process that was given the same number later is another one."""
    try:
        os.kill(owner["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    now = _started(owner["pid"])
    if now == "dead":
        return False
    return now is None or owner.get("started") in (None, now)


def _started(pid: int) -> str | None:
    """The boot and the tick of it at which a process started; "dead" if it only waits to be reaped, None if not known.

    Not the time of day, which is set anew while processes live.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:  # not Linux, or another user's
        return None
    return "dead" if state in "ZX" else f"{boot} {rest[18]}"


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Two starts of one host do not take over the same dead lock, the second removing the first one's."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no flock
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _create(path: Path, text: str) -> None:
    """Create the lock, whole from its first moment; ValueError if another host was quicker."""
    fresh = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        try:
            os.link(fresh, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
    except FileExistsError:
        refuse_live(path.parent)
        raise
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
