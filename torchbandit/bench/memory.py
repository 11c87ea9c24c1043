"""The peak memory of a call, of what torch allocates on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.autograd.profiler import profile


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Call once, and tell the most bytes that lay on the device at a time, above what lay there before.

    On CUDA by the allocator's own count. A CPU's allocator keeps none: there it is torch's profiler that tells of each
    block, for the thread that calls. Blocks older than the call are not known to it, so that to free one in the call
    does not lower the peak, as it would on CUDA.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as recorded:
        call()
    assert recorded.kineto_results is not None
    tree = recorded.kineto_results.experimental_event_tree()
    found = [(event.start_time_ns, event.typed[1]) for event in _events(tree) if event.name == "[memory]"]
    blocks = [block for _, block in sorted(found, key=lambda pair: pair[0])]
    return _peak((block.ptr, block.alloc_size) for block in blocks if block.device.type == "cpu")


def _events(tree: Iterable[Any]) -> Iterator[Any]:
    """An event comes before what happened within it."""
    left = list(tree)[::-1]
    while left:
        event = left.pop()
        yield event
        left.extend(reversed(event.children))


def _peak(blocks: Iterable[tuple[int, int]]) -> int:
    """The most bytes at a time, of blocks by address in order of time: allocated (> 0) or freed (< 0).

    By address, since a block may be freed that an earlier recording saw allocated: it is none of this call's.
    """
    live: dict[int, int] = {}
    total = peak = 0
    for address, size in blocks:
        total -= live.pop(address, 0)
        if size > 0:
            live[address] = size
            total += size
        peak = max(peak, total)
    return peak
