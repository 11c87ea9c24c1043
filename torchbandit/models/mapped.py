"""Weight files are mapped and read once; their pages are given back as the reading goes on.

The loader keeps every shard mapped to the end, so the memory of the process would seem to grow by the whole checkpoint
though nobody needs what was copied to the device already.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

MAPS = Path("/proc/self/maps")
_DONTNEED = 4  # of madvise: a page that is read again comes back from the file


@contextlib.contextmanager
def given_back(files: Iterable[Path], every_s: float = 0.01) -> Iterator[None]:
    """Inside the block, drop the read pages of mapped files again and again.

    Only for mappings that nobody writes to: a page that was written would lose it. Does nothing without /proc.
    """
    if not MAPS.exists():
        yield
        return
    names = {str(file.resolve()) for file in files}
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    over = threading.Event()

    def drop() -> None:
        while not over.wait(every_s):
            for begin, end in _mappings(names):
                madvise(begin, end - begin, _DONTNEED)

    thread = threading.Thread(target=drop, name="torchbandit-mapped", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _mappings(names: set[str]) -> list[tuple[int, int]]:
    """Addresses (begin, end) of this process at which one of the files is mapped."""
    found = []
    for line in MAPS.read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] in names:
            begin, end = fields[0].split("-")
            found.append((int(begin, 16), int(end, 16)))
    return found
