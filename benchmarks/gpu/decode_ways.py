"""Other ways to run a decode step, tried by generate.py beside the usual one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from torchbandit.generation import step

WAYS: dict[str, tuple[frozenset[str], dict[str, Any]]] = {  # what a step adds, and Inductor's options
    "usual": (step.FAST, {}), "plain": (frozenset(), {}),
    **{f"no {what}": (step.FAST - {what}, {}) for what in sorted(step.FAST)},
    "cublaslt": (step.FAST, {}),  # products by the other of the card's two libraries
    "whole norms": (step.FAST, {"triton.multi_kernel": 2}),  # a row's sum in one go, not in a loop that reads it twice
    "sums": (step.FAST, {"realize_reads_threshold": 1}),  # the residual written by the first kernel that adds to it
    "early launches": (step.FAST, {"triton.enable_pdl": True}),
    "autotuned": (step.FAST, {"max_autotune_gemm": True, "max_autotune_gemm_backends": "ATEN,TRITON"}),
}  # fmt: skip


@contextlib.contextmanager
def arranged(way: str) -> Iterator[None]:
    """The step run in that way inside the block, as far as it is not Inductor's options."""
    library = torch.backends.cuda.preferred_blas_library()
    with contextlib.ExitStack() as undo:
        if way == "cublaslt":
            torch.backends.cuda.preferred_blas_library(way)
            undo.callback(torch.backends.cuda.preferred_blas_library, library)
        undo.enter_context(mock.patch.object(step, "FAST", WAYS[way][0]))
        yield
