"""Losses on a GPU: no sync, and the numbers of the CPU."""

from __future__ import annotations

import pytest
import test_losses as cpu
import torch
from torch.testing import assert_close

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _fake(device: str) -> cpu.Fake:
    fake = cpu.Fake(spread=0.2, dtype=torch.float32)
    for name, x in vars(fake).items():
        setattr(fake, name, x.to(device))
    fake.log_probs.requires_grad_()
    return fake


def test_no_function_syncs_with_the_gpu() -> None:
    fake = _fake("cuda")
    count = fake.mask.sum()
    cpu.run_everything(fake, count)  # the first call may load kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cpu.run_everything(fake, count)
        with pytest.raises(RuntimeError, match="synchroniz"):
            count.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cpu.every_loss
def test_losses_on_the_gpu_are_those_of_the_cpu(loss: str) -> None:
    here, there = _fake("cpu"), _fake("cuda")
    want, got = (cpu.run_of(loss)(fake, slice(None), None)[0] for fake in (here, there))
    assert_close(got.cpu(), want)
    assert_close(cpu.gradient(got, there.log_probs).cpu(), cpu.gradient(want, here.log_probs))


def test_k3_is_never_negative_on_the_gpu() -> None:
    """expm1 there is not correctly rounded, so this is where the floor at 0 may bind."""
    tiny = torch.logspace(-12, 1, 1_000_000, device="cuda")
    steps = torch.cat((tiny, -tiny))[None]
    assert float(cpu.L.kl_estimate(steps, torch.zeros_like(steps), "k3").min()) >= 0
