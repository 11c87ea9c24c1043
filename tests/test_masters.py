"""Float32 masters: trap 17, clipping, a norm that is not finite, resume."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from torchbandit.masters import MasterOptimizer


def _weight(dtype: torch.dtype, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(256, 64, generator=torch.Generator().manual_seed(seed)).to(dtype))


def _gradient(step: int) -> Tensor:
    return torch.randn(256, 64, generator=torch.Generator().manual_seed(100 + step))


def test_trap_17_bf16_weights_need_masters() -> None:
    ours, wrong, exact = _weight(torch.bfloat16), _weight(torch.bfloat16), None
    exact = nn.Parameter(ours.detach().float())
    start = ours.detach().float()
    good = MasterOptimizer([ours], lr=1e-5, weight_decay=0.0)
    bad, best = (torch.optim.AdamW([p], lr=1e-5, weight_decay=0.0) for p in (wrong, exact))
    for _ in range(60):
        # A steady direction: each step moves a weight by 1e-5, far below half a bf16 spacing of most weights.
        ours.grad, wrong.grad = (_gradient(0).bfloat16() for _ in range(2))
        exact.grad = _gradient(0).bfloat16().float()
        good.step()
        bad.step()
        best.step()
    master = good.param_groups[0]["params"][0]
    torch.testing.assert_close(master.detach(), exact.detach())
    torch.testing.assert_close(ours.detach(), exact.detach().bfloat16())
    travelled = (exact.detach() - start).norm()
    assert (wrong.detach().float() - start).norm() < 0.5 * travelled


def test_float32_parameters_are_their_own_master() -> None:
    weight = _weight(torch.float32)
    optimizer = MasterOptimizer([weight], lr=0.1)
    assert optimizer.param_groups[0]["params"][0] is weight


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_clipping_is_torchs(kind: type[torch.optim.Optimizer]) -> None:
    ours, theirs = [_weight(torch.float32, i) for i in range(2)], [_weight(torch.float32, i) for i in range(2)]
    good, plain = MasterOptimizer(ours, kind, lr=0.01), kind(theirs, lr=0.01)
    for step in range(3):
        for i in range(2):
            ours[i].grad, theirs[i].grad = _gradient(10 * step + i), _gradient(10 * step + i)
        norm = good.step(grad_clip=1.0)
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, 1.0))
        plain.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_that_is_not_finite_moves_nothing(dtype: torch.dtype) -> None:
    weight = _weight(dtype)
    optimizer = MasterOptimizer([weight], lr=0.1)
    weight.grad = _gradient(0).to(dtype)
    optimizer.step(1.0)
    kept = weight.detach().clone()
    state = {k: v.clone() for k, v in next(iter(optimizer.optimizer.state.values())).items()}
    weight.grad = torch.full_like(weight, torch.nan)
    assert not optimizer.step(1.0).isfinite()
    assert torch.equal(weight.detach(), kept)
    for key, value in next(iter(optimizer.optimizer.state.values())).items():
        assert torch.equal(value, state[key]), key


def test_resume_is_exact() -> None:
    def run(weight: nn.Parameter, optimizer: MasterOptimizer, steps: range) -> None:
        for step in steps:
            weight.grad = _gradient(step).bfloat16()
            optimizer.step(1.0)
            optimizer.zero_grad()

    whole = _weight(torch.bfloat16)
    first = MasterOptimizer([whole], lr=1e-4)
    run(whole, first, range(3))
    saved = copy.deepcopy(first.state_dict())
    resumed = nn.Parameter(whole.detach().clone())
    run(whole, first, range(3, 6))
    second = MasterOptimizer([resumed], lr=1e-4)
    second.load_state_dict(saved)
    run(resumed, second, range(3, 6))
    assert torch.equal(whole.detach(), resumed.detach())
    assert torch.equal(first.param_groups[0]["params"][0].detach(), second.param_groups[0]["params"][0].detach())
    with pytest.raises(ValueError, match="masters"):
        MasterOptimizer([_weight(torch.float32)], lr=1e-4).load_state_dict(saved)


def test_groups_keep_their_options_and_frozen_parameters_stay() -> None:
    a, b, frozen = _weight(torch.bfloat16), _weight(torch.float32), _weight(torch.float32).requires_grad_(False)
    optimizer = MasterOptimizer([{"params": [a, frozen], "lr": 1.0}, {"params": [b]}], lr=0.1)
    assert [len(g["params"]) for g in optimizer.param_groups] == [1, 1]
    assert [g["lr"] for g in optimizer.param_groups] == [1.0, 0.1]
    with pytest.raises(ValueError, match="at least one"):
        MasterOptimizer([frozen], lr=0.1)
