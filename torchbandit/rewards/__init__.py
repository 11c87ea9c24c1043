"""Terms of a reward and the pipeline that sums them.

term.py         RewardTerm: a torch function with weight, clip, normalisation; LengthPenalty, OverlongPenalty
model_terms.py  RewardModel, KLPenalty: terms that run a language model
host.py         HostReward: a function of strings, in worker processes (host_pool.py, host_worker.py)
normalize.py    running moments and the adaptive KL coefficient
pipeline.py     RewardPipeline: the sum, unscorable rows, state
"""

from torchbandit.rewards.host import HostReward
from torchbandit.rewards.model_terms import KLPenalty, RewardModel
from torchbandit.rewards.pipeline import RewardPipeline
from torchbandit.rewards.term import LengthPenalty, OverlongPenalty, RewardTerm

__all__ = ["HostReward", "KLPenalty", "LengthPenalty", "OverlongPenalty", "RewardModel", "RewardPipeline", "RewardTerm"]
