"""Other ways to run a decode step, tried by generate.py beside the usual one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from torchbandit.generation import body, step

WAYS: dict[str, tuple[frozenset[str], dict[str, Any]]] = {  # what a step adds, and Inductor's options
    "usual": (step.FAST, {}), "plain": (frozenset(), {}), "no combos": (step.FAST - {"combos"}, {}),
    "layer by layer": (step.FAST - {"layers"}, {}),
    "cublaslt": (step.FAST, {}),  # products by the other of the card's two libraries
    "halves": (step.FAST, {}), "halves, split": (step.FAST, {}),  # see Halves; attention in twice the programs
    "whole norms": (step.FAST, {"triton.multi_kernel": 2}),  # a row's sum in one go, not in a loop that reads it twice
    "early launches": (step.FAST, {"triton.enable_pdl": True}),
    "autotuned": (step.FAST, {"max_autotune_gemm": True, "max_autotune_gemm_backends": "ATEN,TRITON"}),
}  # fmt: skip
RUN_LAYERS = body._run_layers


class Halves:
    """Runs the layers on two halves of the batch, so that one's attention reads while the other's products multiply.

    All but attention is on streams of a higher priority: a product takes processors as attention's programs end, and
    attention takes those that the product leaves. On one priority attention, whose programs are small, never leaves a
    product the room that it needs.
    """

    def __init__(self, cuda: bool, splits: int | None) -> None:
        self.splits, self.kept = splits, []  # type: int | None, list[Tensor]
        pairs = [(torch.cuda.Stream(priority=-1), torch.cuda.Stream()) for _ in "ab"] if cuda else []
        self.streams: list[Any] = [high for high, _ in pairs] or [None, None]
        self.behind = {high.cuda_stream: low for high, low in pairs}
        self.plain_attention: Callable[..., Tensor]

    def run_layers(self, layers: Any, whole: Any, parts: Any, how: Any, *args: Any, **kwargs: Any) -> Tensor:
        """In place of `body._run_layers`."""
        hidden, here = args[0], torch.cuda.current_stream() if self.behind else None
        joined = torch.empty_like(hidden)
        self.kept += [hidden, joined]  # no memory goes to one stream while another reads it
        n, first, last = len(hidden), parts[0] is whole.layers[0], parts[-1] is whole.layers[-1]
        for at, stream in zip((slice(0, n - n // 2), slice(n - n // 2, n)), self.streams, strict=True):
            cut = functools.partial(_cut, n=n, at=at)
            if stream is not None and first:
                stream.wait_stream(here)
            with torch.cuda.stream(stream):
                some = {name: cut(x) for name, x in kwargs.items()}
                joined[at] = RUN_LAYERS(layers, whole, parts, how, *map(cut, args), **some)
            if stream is not None and last:
                here.wait_stream(stream)
        return joined

    def attention(self, *args: Any, **kwargs: Any) -> Tensor:
        """In place of `kernels.decode_attention`."""
        high = torch.cuda.current_stream()
        low = self.behind.get(high.cuda_stream)
        if low is None:
            return self.plain_attention(*args, **kwargs)
        low.wait_stream(high)
        with torch.cuda.stream(low):
            out = self.plain_attention(*args, **kwargs, splits=self.splits)
        high.wait_stream(low)
        return out


def _cut(x: Any, n: int, at: slice) -> Any:
    """A half of whatever a layer is called with; what has no lanes stays whole."""
    if isinstance(x, tuple):
        return tuple(_cut(part, n, at) for part in x)
    return x[at] if isinstance(x, Tensor) and x.dim() > 0 and len(x) == n else x


@contextlib.contextmanager
def arranged(way: str, cuda: bool) -> Iterator[None]:
    """The step run in that way inside the block, as far as it is not Inductor's options."""
    library = torch.backends.cuda.preferred_blas_library()
    with contextlib.ExitStack() as undo:
        if way == "cublaslt":
            torch.backends.cuda.preferred_blas_library(way)
            undo.callback(torch.backends.cuda.preferred_blas_library, library)
        if way.startswith("halves"):
            halves = Halves(cuda, splits=2 if way == "halves, split" else None)
            undo.enter_context(mock.patch.object(body, "_run_layers", halves.run_layers))
            if cuda:
                from torchbandit.generation import kernels

                halves.plain_attention = kernels.decode_attention
                undo.enter_context(mock.patch.object(kernels, "decode_attention", halves.attention))
        undo.enter_context(mock.patch.object(step, "FAST", WAYS[way][0]))
        yield
