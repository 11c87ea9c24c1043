"""Rewards on a GPU: what a CPU can only stand in for."""

from __future__ import annotations

import pytest
import torch
from fakes import tiny_reward_model
from test_rewards_models import sampled, step_without_host_copy
from torch.testing import assert_close

from torchbandit.rewards import RewardModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="asks CUDA itself whether anything waits for it")


def test_g1_no_host_copy():
    step_without_host_copy("cuda")


def test_a_live_model_is_used_where_it_is():
    """The model stays on the CPU; the batch comes from the GPU and its scores go back there."""
    td, model = sampled(), tiny_reward_model()
    scores = RewardModel(model).score(td)
    moved = RewardModel(model).score(td.to("cuda"))
    assert moved.device.type == "cuda" and next(model.parameters()).device.type == "cpu"
    assert_close(moved.cpu(), scores, equal_nan=True)
