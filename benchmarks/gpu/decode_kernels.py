"""The kernels of a decode step alone, with other settings beside those in use: percent of the quickest read rate.

    python benchmarks/gpu/decode_kernels.py          # on one GPU; --tiny to see that it runs there

Attention over the shapes of generate.py's rows, each result compared with torch's own; the draw over a vocabulary of
128256. The last line is JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
from typing import Any

import torch
from generate import alone, drawing
from torch import nn

from torchbandit.bench.environment import environment
from torchbandit.bench.frame import Frame, short
from torchbandit.generation.cache import keys_and_values

SETTINGS: tuple[dict[str, Any], ...] = (  # keys read at a time, warps, stages
    {}, *({"setting": each} for each in (
        (32, 1, 3), (32, 1, 2), (16, 1, 6), (64, 1, 3), (64, 2, 3), (64, 4, 2), (128, 2, 2), (128, 4, 2), (128, 4, 3),
    )), {"splits": 2},
)  # fmt: skip


def attention(frame: Frame, n: int, H: int, L: int, used: int) -> dict[str, float]:
    """8 key heads of 64 with H queries each, `used` keys a row in places of L."""
    from torchbandit.generation import kernels

    query = torch.randn(n, 8, H, 64, device=frame.device, dtype=frame.dtype)
    both = torch.randn(n + 1, L, 8, 2, 64, device=frame.device, dtype=frame.dtype)
    keys, values = keys_and_values(both)
    lanes = torch.stack((torch.arange(n), torch.full((n,), used - 1)), -1).int().view(n, 1, 1, 2).to(frame.device)
    sdpa = nn.functional.scaled_dot_product_attention
    torchs = functools.partial(sdpa, query, keys[:n, :, :used], values[:n, :, :used], scale=0.125)
    want, found = torchs().float(), dict[str, float]()
    bytes_read = 2 * n * 8 * used * 64 * keys.element_size()
    for how in SETTINGS:
        call: Any = functools.partial(kernels.decode_attention, query, keys, values, lanes, 0.125, **how)
        torch.testing.assert_close(call().float(), want, rtol=2e-2, atol=2e-2)
        name = " ".join(f"{key} {value}" for key, value in how.items()) or "in use"
        found[name] = 100 * bytes_read / alone(frame, call) / frame.limits()["read_bytes_s"]
    found["torch, no mask"] = 100 * bytes_read / alone(frame, torchs) / frame.limits()["read_bytes_s"]
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes: does it run")
    frame, found = Frame(parser.parse_args().tiny), dict[str, dict[str, float]]()
    if frame.cuda:
        for n, H, L, used in ((256, 4, 512, 384), (1024, 4, 512, 384), (512, 2, 256, 176), (64, 2, 4288, 2198)):
            name = f"attention, {n} rows, {used} keys, {H} queries a key"
            found[name] = attention(frame, 8 if frame.tiny else n, H, L, used)
            print(f"{name}: {short(found[name])}", flush=True)
        for n in (256, 1024):
            logits = torch.randn(n, 5000 if frame.tiny else 128256, device=frame.device, dtype=frame.dtype)
            took = {what: alone(frame, drawing(frame, logits, what == "greedy")) for what in ("sampled", "greedy")}
            found[f"draw, {n} rows"] = {
                what: 100 * logits.nbytes / s / frame.limits()["read_bytes_s"] for what, s in took.items()
            }
            print(f"draw, {n} rows: {short(found[f'draw, {n} rows'])}", flush=True)
    else:
        frame.leave_out("kernels", "Triton needs CUDA")
    told = {"environment": environment() | {"tiny": frame.tiny}, "limits": frame.limits(), "left_out": frame.left_out}
    print(json.dumps(told | {"percent_of_read": found}))


if __name__ == "__main__":
    main()
