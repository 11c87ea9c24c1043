"""Reward terms as one entry of TRL's `reward_funcs`. (B, P, T: see batch.py.)

TRL hands strings and token ids on the host to its reward functions, and takes a list of floats; this makes a batch of
them, scores it with a `RewardPipeline` on the device, and hands the rewards back. Nothing of TRL is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict

from torchbandit import batch
from torchbandit.prompts import PromptSet
from torchbandit.responses import has_stopped, stop_ids_told
from torchbandit.rewards import KLPenalty, RewardPipeline, RewardTerm
from torchbandit.rewards.term import TermFn
from torchbandit.scoring import make_plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TRLReward:
    """A reward function for TRL's GRPOTrainer and RLOOTrainer.

        GRPOTrainer(..., reward_funcs=TRLReward(RewardModel("path"), tokenizer, device="cuda"))

    Args:
        reward: one term or a list, as for `BanditEnv`; a KLPenalty is TRL's `beta`, and refused here.
        tokenizer: the policy's, with which completions were made.
        device: where the terms run; models named by path load there.
        max_prompt_length: longer prompts keep their end.
        name: under which TRL logs it.
        stop_ids: ids that end a completion, as the eos ids of the model's generation config; None takes those of a
            policy that was built with this tokenizer, or the tokenizer's eos.
    Raises:
        ValueError: a term is a KLPenalty, or not a term.
    """

    def __init__(
        self,
        reward: RewardTerm | TermFn | Sequence[RewardTerm | TermFn],
        tokenizer: PreTrainedTokenizerBase,
        *,
        device: str | torch.device = "cpu",
        max_prompt_length: int = 4096,
        name: str = "torchbandit",
        stop_ids: Sequence[int] | None = None,
    ) -> None:
        self.pipeline = RewardPipeline(reward, device=device, tokenizer=tokenizer)
        if any(isinstance(term, KLPenalty) for term in self.pipeline.terms):
            raise ValueError("reward: TRL has a KL penalty of its own and hands no log-probs to a reward; set its beta")
        self.tokenizer, self.max_prompt_length = tokenizer, max_prompt_length
        self.stop_ids = None if stop_ids is None else tuple(stop_ids)
        self.__name__ = name

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **given: Any
    ) -> list[float | None]:
        """The rewards of a batch.

        Args:
            prompts: strings, or lists of messages, one a completion.
            completions: as text; unused, since the ids are exact.
            completion_ids: token ids of each completion, with its eos where it ended.
            given: dataset columns, one value a completion; what TRL adds besides (`trainer_state`, ...) is left out.
        Returns:
            one float a completion, None where there is no honest score.
        """
        device, rows = self.pipeline.device, len(prompts)
        columns = {name: list(column) for name, column in given.items() if _is_column(name, column, rows)}
        table = PromptSet.from_texts(
            list(prompts), self.tokenizer, max_length=self.max_prompt_length, columns=columns, overlong="cut"
        ).to(device)
        row = torch.arange(rows, device=device)
        ids, mask, tensors = table.gather(row)
        response, response_mask = _padded(completion_ids, device)
        stops = stop_ids_told(self.tokenizer) if self.stop_ids is None else self.stop_ids
        source: dict[str, Any] = {
            "tokens": {"prompt": ids, "response": response},
            "masks": {"prompt": mask, "response": response_mask},
            batch.PROMPT_ID: row,
            batch.GROUP_ID: row,
            batch.FINISHED: has_stopped(response, response_mask, stops),
        }
        if tensors is not None:
            source[batch.COLUMNS] = tensors
        self.pipeline.prompts = table  # a HostReward reads its strings there
        td = TensorDict(source, batch_size=[rows], device=device)
        scored = self.pipeline(td, lambda: make_plan(mask, response_mask))
        rewards = scored["reward"].squeeze(-1).tolist()
        return [reward if reward == reward else None for reward in rewards]  # NaN is not equal to itself

    def close(self) -> None:
        """End the worker processes of host rewards."""
        self.pipeline.close()


def _is_column(name: str, value: Any, rows: int) -> bool:
    """One value a row, of any kind: a column of the data set. TRL's own arguments are none, or no lists."""
    return name not in TRL_OWN and isinstance(value, (list, tuple)) and len(value) == rows


TRL_OWN = ("trainer_state", "log_extra", "log_metric", "environments")


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of ids -> [B, T] int64, right-padded with 0, and its mask."""
    width = max((len(row) for row in rows), default=0)
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.int64).view(len(rows), width)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    return ids.to(device), (torch.arange(width) < lengths[:, None]).to(device)
