"""A batch to learn from: prompts, responses, rewards; drawn again where groups teach nothing. (B, G: see batch.py.)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from torchbandit import batch, losses
from torchbandit.batch import Reduce
from torchbandit.clock import Clock
from torchbandit.env import BanditEnv
from torchbandit.learn.algorithm import LEARN_MASK, Algorithm, row_reward, scorable
from torchbandit.learn.metrics import reward_metrics
from torchbandit.learn.options import RefillOptions

Generate = Callable[[TensorDict], TensorDict]
"""td -> td with the response keys."""


class Collected(NamedTuple):
    """A stepped batch, and the means of all that was drawn for it: scalars on the device."""

    td: TensorDict
    metrics: dict[str, Tensor]


class EnvDraw:
    """What an algorithm's `collect` draws from: an env and what answers its prompts.

    Args:
        generate: answers a batch of prompts; the policy's, or another engine's.
        greedy: answers greedily, without randomness.
        complete: adds what `generate` did not write (log-probs, values); None: nothing is missing.
    """

    def __init__(
        self,
        env: BanditEnv,
        generate: Generate,
        greedy: Generate,
        clock: Clock,
        complete: Generate | None = None,
    ) -> None:
        self._env, self._generate, self._greedy, self._clock = env, generate, greedy, clock
        self._complete = complete

    def __call__(self) -> TensorDict:
        """The next prompts, answered and scored."""
        td = self._env.reset()
        with self._clock("generate"):
            td = self._generate(td)
            if self._complete is not None:
                td = self._complete(td)
        with self._clock("score"):
            return self._env.step(td)

    def greedy_reward(self, td: TensorDictBase) -> Tensor:
        """The reward of the greedy response to each row's prompt: [B] float32."""
        env, G = self._env, self._env.group_size
        packing = env.packing_metrics  # of the rows that are learnt from
        prompts: TensorDict = env.gather(td[batch.PROMPT_ID][::G], td[batch.GROUP_ID][::G])
        with self._clock("generate"):
            answered = self._greedy(prompts)
        with self._clock("score"), env.rewards.frozen():
            reward = row_reward(env.step(answered))
        env.packing_metrics = packing
        return reward.repeat_interleave(G, output_size=len(td))


def collect(
    env: BanditEnv, algorithm: Algorithm, draw: EnvDraw, options: RefillOptions, reduce: Reduce | None = None
) -> Collected:
    """The batch of one step.

    With `options.refill`, batches are drawn until no group of equal rewards is left in the batch, at most `max_draws`
    of them. Groups that teach come first, in the order in which they were drawn, and what is beyond the batch is
    dropped; where too few came, constant groups fill it up and are left out of the `learn_mask`. All ranks draw as
    often as the one that needs most: one copy to the host a draw.

    Args:
        reduce: sums over the ranks that decide together; None: this process decides alone.
    Returns:
        td: [B] rows. metrics: `reward_metrics` over all rows drawn; with refill `refill/draws`, and over all ranks
        `refill/groups_drawn`, `refill/groups_kept`, `refill/groups_thrown_away`.
    """
    G = env.group_size
    td = algorithm.collect(draw)
    if not options.refill:
        return Collected(td, reward_metrics(td, G, reduce))
    drawn, draws = [td], 1
    constant = _constant_groups(td, G)
    while draws < options.max_draws and _is_short(constant, env.num_prompts, reduce):
        drawn.append(algorithm.collect(draw))
        constant = torch.cat((constant, _constant_groups(drawn[-1], G)))
        draws += 1
    everything: Any = td if draws == 1 else torch.cat(drawn)
    first = constant.int().argsort(stable=True)[: env.num_prompts]  # a stable sort keeps the order of drawing
    teaches = ~constant[first]
    td = everything[(first.unsqueeze(-1) * G + torch.arange(G, device=first.device)).flatten()]
    left = td.get(LEARN_MASK, td[batch.RESPONSE_MASK])  # the algorithm's `collect` may have left tokens out
    td[LEARN_MASK] = left & teaches.repeat_interleave(G, output_size=len(td)).unsqueeze(-1)
    numbers = torch.stack((torch.full_like(teaches.sum(), len(constant)), teaches.sum())).float()
    total, kept = (numbers if reduce is None else reduce(numbers)).unbind()
    told = {"draws": torch.full_like(total, draws), "groups_drawn": total, "groups_kept": kept}
    told["groups_thrown_away"] = total - kept
    return Collected(td, reward_metrics(everything, G, reduce) | {f"refill/{name}": n for name, n in told.items()})


def _constant_groups(td: TensorDictBase, group_size: int) -> Tensor:
    """[B / G] bool: the groups that teach nothing."""
    return losses.group_is_constant(row_reward(td).float(), group_size, scorable(td))[::group_size]


def _is_short(constant: Tensor, num_groups: int, reduce: Reduce | None) -> bool:
    """Whether a rank still lacks groups; the one wait for the device of a draw."""
    missing = (num_groups - (~constant).sum()).clamp(min=0).float()
    return bool((missing if reduce is None else reduce(missing)).item() > 0)
