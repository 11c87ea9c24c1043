# mypy: disable-error-code="import-not-found,no-untyped-def,untyped-decorator,no-untyped-call,unused-ignore"
"""Triton kernel of a gated layer's first half: silu(x G') * (x U') in one product, for batches that fill a card.

Axis letters: n lanes, E features read, I features made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from torchbandit.generation.kernels import processors

ROWS, COLUMNS, DEPTH = 128, 128, 64
"""Of a tile: so many lanes, features made and features read at a time."""


def gated_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., E], weight [2I, E] of the same 16-bit dtype, the gate's rows first -> [..., I].

    Sums and activation are float32, and rounded once.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    n, E, made = len(flat), flat.shape[1], len(weight) // 2
    out = torch.empty(n, made, dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(n, ROWS) * triton.cdiv(made, COLUMNS)
    _gated_kernel[(min(tiles, processors(x.device)),)](
        TensorDescriptor.from_tensor(flat, [ROWS, DEPTH]),
        TensorDescriptor.from_tensor(weight.view(2, made, E), [2, COLUMNS, DEPTH]),
        TensorDescriptor.from_tensor(out, [ROWS, COLUMNS]), n, made, E,
        ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH, num_warps=8, num_stages=4,
    )  # fmt: skip
    return out.view(*x.shape[:-1], made)


@triton.jit
def _gated_kernel(x, weight, out, n, made, E, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    tl.assume(E > 0)  # with a loop that may not run the assembler makes each step of the product wait for the last one
    tiles = tl.cdiv(n, ROWS)
    columns = tl.cdiv(made, COLUMNS)
    # One program a processor; flat, so that a tile's first parts are on their way while the last one is written.
    for tile in tl.range(tl.program_id(0), tiles * columns, tl.num_programs(0), flatten=True):
        # Programs that run together share columns, up to eight tiles of lanes: weights are read from memory once.
        first = tile // (8 * columns) * 8
        here = tl.minimum(tiles - first, 8)
        row = (first + tile % (8 * columns) % here) * ROWS
        column = tile % (8 * columns) // here * COLUMNS
        both = tl.zeros([ROWS, 2 * COLUMNS], tl.float32)  # the gate's columns, then up's
        for at in range(0, E, DEPTH):
            part = weight.load([0, column, at]).reshape(2 * COLUMNS, DEPTH)
            both = tl.dot(x.load([row, at]), part.T, both)
        gate, up = both.reshape(ROWS, 2, COLUMNS).permute(0, 2, 1).split()
        out.store([row, column], (gate * up / (1.0 + tl.exp(-gate))).to(out.dtype))
