"""Attention of packed lines alone: our kernel in several settings, beside torch's own.

    python benchmarks/gpu/scoring_kernels.py          # on one GPU; --tiny to see that it runs there

Groups of eight responses of `torchbandit bench score --rows groups`, for which torch takes two passes and a merge, and
rows of mixed lengths without shared prompts, one pass of torch's. 32 heads of 64, or 128, with 8 key heads.
Microseconds; each result is compared with torch's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
from typing import Any

import torch
from generate import alone
from torch import Tensor

from torchbandit.bench.environment import environment
from torchbandit.bench.frame import Frame, short

SETTINGS = tuple(
    dict(zip(("block_q", "block_k", "warps", "stages"), setting, strict=True))
    for setting in ((64, 64, 4, 2), (64, 64, 4, 1), (64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 3), (64, 128, 4, 2),
                    (128, 64, 4, 2), (128, 32, 4, 2), (128, 64, 8, 2))
)  # fmt: skip
LAUNCHES = ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 1), (64, 32, 4, 2), (32, 64, 4, 2), (64, 64, 8, 2),
            (128, 64, 8, 2), (64, 128, 8, 2))  # fmt: skip
SCALE = 0.125


def flash(query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts_k: Tensor, causal: bool) -> Any:
    """torch's flash attention: a call that gives (out, log-sum-exp)."""
    longest = [int(x.diff().max()) for x in (starts_q, starts_k)]  # before the call is recorded
    kernel = torch.ops.aten._flash_attention_forward
    return lambda: kernel(query, key, value, starts_q, starts_k, *longest, 0.0, causal, False, scale=SCALE)[:2]


def flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, starts_q: Tensor,
    starts_k: Tensor, causal: bool,
) -> Any:  # fmt: skip
    """torch's flash attention backward: a call that gives the gradients of query, key and value."""
    longest = [int(x.diff().max()) for x in (starts_q, starts_k)]
    kernel, unused = torch.ops.aten._flash_attention_backward, torch.zeros(2, dtype=torch.uint64, device=query.device)
    given = grad, query, key, value, out, lse, starts_q, starts_k, *longest, 0.0, causal, unused, unused
    return lambda: kernel(*given, scale=SCALE)


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().cuda()


def merged(near: Tensor, near_lse: Tensor, far: Tensor, far_lse: Tensor, p: int, r: int) -> tuple[Tensor, Tensor]:
    """Two parts of attention as one, where responses stand."""
    mine, mine_lse = near[p : p + r], near_lse[:, p : p + r]
    weight = torch.sigmoid(far_lse - mine_lse).t().unsqueeze(-1)
    out = torch.cat((near[:p], (mine * (1 - weight) + far * weight).to(near.dtype), near[p + r :]))
    return out, torch.cat((near_lse[:, :p], torch.logaddexp(mine_lse, far_lse), near_lse[:, p + r :]), 1)


def case(frame: Frame, D: int, prompts: list[int], replies: list[int], compiled: Any) -> dict[str, float]:
    """Groups of eight; without prompts the replies are whole rows."""
    from torchbandit.scoring import kernels

    p, r = sum(prompts), sum(replies) if prompts else 0
    starts = cumulative([*prompts, *replies])
    longest, N = max(prompts + replies), int(starts[-1])
    query, key, value = (torch.randn(N, heads, D, device=frame.device, dtype=frame.dtype) for heads in (32, 8, 8))
    groups = [sum(replies[i : i + 8]) for i in range(0, len(replies), 8)] if prompts else [0]
    starts_q, starts_k = cumulative(groups), cumulative(prompts or [0])

    near = flash(query, key, value, starts, starts, True)
    far = flash(query[p : p + r], key[:p], value[:p], starts_q, starts_k, False) if prompts else None

    def torchs() -> tuple[Tensor, Tensor]:
        made: tuple[Tensor, Tensor] = near() if far is None else compiled(*near(), *far(), p, r)
        return made

    want, want_lse = torchs()
    found = {"torch": 1e6 * alone(frame, torchs)}
    for how in SETTINGS:
        call = functools.partial(
            kernels.packed_attention, query, key, value, starts, longest, p, r, starts_q, starts_k, SCALE, **how
        )
        name = " ".join(str(x) for x in how.values())
        try:
            out, lse = call()
        except Exception as error:  # more than the card's shared memory
            print(f"{name}: {type(error).__name__}", flush=True)
            continue
        torch.testing.assert_close(out.float(), want.float(), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse, want_lse, rtol=2e-2, atol=2e-2)
        found[name] = 1e6 * alone(frame, call)
    return found | gradients(frame, query, key, value, want, want_lse, starts, longest, p, r, starts_q, starts_k)


def gradients(
    frame: Frame, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, starts: Tensor, longest: int,
    p: int, r: int, starts_q: Tensor, starts_k: Tensor,
) -> dict[str, float]:  # fmt: skip
    """Backward: of queries, and of keys and values, each pass in several settings; torch's first."""
    from torchbandit.scoring.kernels_backward import Launch, packed_attention_backward

    grad = torch.randn_like(query)

    near, far = flash_backward(grad, query, key, value, out, lse, starts, starts, True), None
    mine = slice(p, p + r)
    if p:
        given = grad[mine], query[mine], key[:p], value[:p], out[mine], lse[:, mine].contiguous(), starts_q, starts_k
        far = flash_backward(*given, False)

    def torchs() -> Any:
        whole = near()
        if far is not None:
            for x, y, rows in zip(whole, far(), (mine, slice(p), slice(p)), strict=True):
                x[rows] += y
        return whole

    want = torchs()
    found = {"backward, torch": 1e6 * alone(frame, torchs)}
    line = grad, query, key, value, out, lse, starts, longest, p, r, starts_q, starts_k, SCALE
    for which in ("of_queries", "of_keys"):
        for launch in LAUNCHES:
            call = functools.partial(packed_attention_backward, *line, **{which: Launch(*launch)})
            name = f"backward, {which} {' '.join(map(str, launch))}"
            try:
                made = call()
            except Exception as error:  # more than the card's shared memory
                print(f"{name}: {type(error).__name__}", flush=True)
                continue
            for x, y in zip(made, want, strict=True):
                assert float((x.float() - y.float()).norm() / y.float().norm()) < 0.02, name
            found[name] = 1e6 * alone(frame, call)
    found["backward, in use"] = 1e6 * alone(frame, functools.partial(packed_attention_backward, *line))
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes: does it run")
    frame, found = Frame(parser.parse_args().tiny), dict[str, dict[str, float]]()
    if frame.cuda:
        gen = torch.Generator().manual_seed(0)
        mixed = sum(
            (torch.randn(512, generator=gen) * spread + mean).exp().clamp(low, high).int()
            for mean, spread, low, high in ((4.8, 0.6, 16, 512), (5.3, 0.8, 8, 1024))
        )
        assert isinstance(mixed, Tensor)
        rows, few = sorted(mixed.tolist()), 8 if frame.tiny else 1
        compiled = torch.compile(merged, dynamic=True)
        for D in (64, 128):
            for P, C, groups in ((512, 256, 16), (150, 1000, 4), (2000, 256, 8)):
                work = [P // few] * groups, [C // few] * 8 * groups
                found[f"heads of {D}, P={P}, C={C}"] = case(frame, D, *work, compiled)
            for name, some in (("short rows", rows[:120]), ("middling rows", rows[240:320]), ("long rows", rows[-32:])):
                found[f"heads of {D}, {name}"] = case(frame, D, [], some[: len(some) // few], compiled)
        for name, row in found.items():
            print(f"{name}: {short(row)}", flush=True)
    else:
        frame.leave_out("kernels", "Triton needs CUDA")
    told = {"environment": environment() | {"tiny": frame.tiny}, "limits": frame.limits(), "left_out": frame.left_out}
    print(json.dumps(told | {"microseconds": found}))


if __name__ == "__main__":
    main()
