"""Learning: what an algorithm is, the algorithms, and the one update that every engine runs.

algorithm.py   Algorithm: which batch, what a token is worth, what is minimised
algorithms/    each algorithm beside its paper
find.py        an algorithm by its name here, or `package.module:Class`
options.py     what is orthogonal to an algorithm: KL, truncation, refill, another sampler, ptx
collect.py     a batch: prompts, responses, rewards; drawn again where groups teach nothing
update.py      targets, minibatches, microbatches, one optimizer step
ptx.py         pretraining batches from a file, tensors or a function
seeds.py       every seed of a run, from one
metrics.py     the numbers of a batch
"""

from torchbandit.learn.algorithm import Algorithm, Draw, KLDefault, training_rows
from torchbandit.learn.algorithms.groups import CISPO, DAPO, GRPO, GSPO, DrGRPO
from torchbandit.learn.algorithms.ppo import PPO
from torchbandit.learn.algorithms.raft import RAFT
from torchbandit.learn.algorithms.reinforce import RLOO, ReinforcePlusPlus, ReinforcePlusPlusBaseline, ReMax
from torchbandit.losses.choices import Loss

ALGORITHMS: dict[str, type[Algorithm]] = {
    "ppo": PPO,
    "reinforce++": ReinforcePlusPlus,
    "reinforce++-baseline": ReinforcePlusPlusBaseline,
    "rloo": RLOO,
    "remax": ReMax,
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "cispo": CISPO,
    "raft": RAFT,
}

DEFAULT_ALGORITHM = "ppo"

__all__ = [
    "ALGORITHMS",
    "CISPO",
    "DAPO",
    "DEFAULT_ALGORITHM",
    "GRPO",
    "GSPO",
    "PPO",
    "RAFT",
    "RLOO",
    "Algorithm",
    "DrGRPO",
    "Draw",
    "KLDefault",
    "Loss",
    "ReMax",
    "ReinforcePlusPlus",
    "ReinforcePlusPlusBaseline",
    "training_rows",
]
