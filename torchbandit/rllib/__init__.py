"""The bandit on RLlib's new API stack: `BanditConfig().bandit(env_fn=…).rl_module(pretrained=…).training(algo=…)`.

`BanditConfig` is the way that scales. `BanditVectorEnv` with `stock_ppo_config` is a facade for RLlib's own loop, for
one process and small batches (docs/stock-loop.md).
"""

from __future__ import annotations

try:
    import ray.rllib  # noqa: F401
except ImportError as error:
    raise ImportError(f"torchbandit.rllib needs RLlib ({error}): pip install 'torchbandit[rllib]'") from error

from torchbandit.adapters.gymnasium import BanditVectorEnv
from torchbandit.rllib.config import BanditAlgorithm, BanditConfig, BanditPPOConfig
from torchbandit.rllib.env_runner import BanditEnvRunner
from torchbandit.rllib.learner import BanditLearner
from torchbandit.rllib.module import CausalLMModule
from torchbandit.rllib.stock import stock_ppo_config

__all__ = [
    "BanditAlgorithm",
    "BanditConfig",
    "BanditEnvRunner",
    "BanditLearner",
    "BanditPPOConfig",
    "BanditVectorEnv",
    "CausalLMModule",
    "stock_ppo_config",
]
