"""The bandit on RLlib's new API stack: `BanditPPOConfig().bandit(env_fn=…).rl_module(pretrained=…).build_algo()`.

`BanditPPOConfig` is the way that scales. `BanditVectorEnv` with `stock_ppo_config` is a facade for RLlib's own loop,
for one process and small batches (docs/stock-loop.md).
"""

from __future__ import annotations

try:
    import ray.rllib  # noqa: F401
except ImportError as error:
    raise ImportError(f"torchbandit.rllib needs RLlib ({error}): pip install 'torchbandit[rllib]'") from error

from torchbandit.adapters.gymnasium import BanditVectorEnv
from torchbandit.rllib.algorithm import BanditPPO
from torchbandit.rllib.config import BanditPPOConfig
from torchbandit.rllib.env_runner import BanditEnvRunner
from torchbandit.rllib.learner import PPOPtxLearner
from torchbandit.rllib.module import CausalLMModule
from torchbandit.rllib.stock import stock_ppo_config

__all__ = [
    "BanditEnvRunner",
    "BanditPPO",
    "BanditPPOConfig",
    "BanditVectorEnv",
    "CausalLMModule",
    "PPOPtxLearner",
    "stock_ppo_config",
]
