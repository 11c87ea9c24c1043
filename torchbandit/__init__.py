"""A bandit environment for RL fine-tuning of language models.

The names below are the public surface. Each is imported when it is first asked for, so that `import torchbandit` (and
the command line's help) is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchbandit.env import BanditEnv
    from torchbandit.generation import Sampling
    from torchbandit.models import ModelSpec
    from torchbandit.policy import CausalLMPolicy
    from torchbandit.prompts import PromptSet
    from torchbandit.rewards import HostReward, KLPenalty, RewardModel, RewardTerm
    from torchbandit.scoring import log_probs, sequence_scores
    from torchbandit.testing import check_env, no_host_copy

__version__ = "0.1.0"

_HOME = {
    "BanditEnv": "env",
    "CausalLMPolicy": "policy",
    "HostReward": "rewards",
    "KLPenalty": "rewards",
    "ModelSpec": "models",
    "PromptSet": "prompts",
    "RewardModel": "rewards",
    "RewardTerm": "rewards",
    "Sampling": "generation",
    "check_env": "testing",
    "log_probs": "scoring",
    "no_host_copy": "testing",
    "sequence_scores": "scoring",
}

__all__ = [
    "BanditEnv",
    "CausalLMPolicy",
    "HostReward",
    "KLPenalty",
    "ModelSpec",
    "PromptSet",
    "RewardModel",
    "RewardTerm",
    "Sampling",
    "__version__",
    "check_env",
    "log_probs",
    "no_host_copy",
    "sequence_scores",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'torchbandit' has no attribute {name!r}")
    value = getattr(import_module(f"torchbandit.{_HOME[name]}"), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return __all__
