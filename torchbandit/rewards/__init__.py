"""Terms of a reward and the pipeline that sums them."""

from torchbandit.rewards.model_terms import KLPenalty, RewardModel
from torchbandit.rewards.pipeline import RewardPipeline
from torchbandit.rewards.term import LengthPenalty, RewardTerm

__all__ = ["KLPenalty", "LengthPenalty", "RewardModel", "RewardPipeline", "RewardTerm"]
