"""The bandit as a TorchRL environment, and its batches as TorchRL's GRPOLoss reads them. (B, P, T: see batch.py.)

The keys are ours, which resemble TorchRL's; `grpo_batch` adds those that have another name there:
    ("tokens","full")                [B, P + T]   prompt, then response
    ("masks","all_attention_mask")   [B, P + T]   both masks
    ("masks","all_assistant_mask")   [B, P + T]   the response's mask
    ("log_probs","full")             [B, P + T]   0 on the prompt
    "advantage"                      [B, P + T, 1]
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

try:
    from torchrl.data import Binary, Categorical, Composite, Unbounded
    from torchrl.envs import EnvBase
except ImportError as error:
    raise ImportError("torchbandit.adapters.torchrl needs TorchRL: pip install torchbandit[torchrl]") from error

from torchbandit import batch
from torchbandit.env import BanditEnv
from torchbandit.losses import grpo_advantages
from torchbandit.models import num_ids
from torchbandit.policy import CausalLMPolicy
from torchbandit.responses import stop_mask


class BanditTorchRLEnv(EnvBase):
    """One env a row of the batch; every episode is one step long.

    The action is ("tokens","response"). What else a policy writes is used where it is there: the response's mask
    (absent: up to one of the env's `stop_ids`), `finished`, `temperature`, and the log-probs that a KL term needs. An
    unscorable row has a NaN reward.

    Args:
        env: a `BanditEnv`; it stays the owner of prompts, terms and state.
        max_new_tokens: T, the width of every response.
    """

    def __init__(self, env: BanditEnv, max_new_tokens: int) -> None:
        super().__init__(device=env.device, batch_size=torch.Size([env.batch_size]))
        self.bandit = env
        B, P, T = env.batch_size, env.prompts.width, max_new_tokens
        vocabulary = num_ids(env.prompts.tokenizer)
        where: dict[str, Any] = {"device": env.device}
        whole: dict[str, Any] = {"shape": (B,), **where}
        specs: dict[str, Any] = {
            "tokens": Composite(prompt=Categorical(vocabulary, (B, P), dtype=torch.int64, **where), **whole),
            "masks": Composite(prompt=Binary(P, (B, P), dtype=torch.bool, **where), **whole),
            batch.PROMPT_ID: Categorical(len(env.prompts), (B,), dtype=torch.int64, **where),
            batch.GROUP_ID: Unbounded((B,), dtype=torch.int64, **where),
        }
        if env.prompts.columns:
            columns = {
                name: Unbounded((B, *x.shape[1:]), dtype=x.dtype, **where) for name, x in env.prompts.columns.items()
            }
            specs[batch.COLUMNS] = Composite(columns, **whole)
        self.observation_spec = Composite(specs, **whole)
        response = Categorical(vocabulary, (B, T), dtype=torch.int64, **where)
        self.action_spec = Composite(tokens=Composite(response=response, **whole), **whole)
        self.reward_spec = Unbounded((B, 1), **where)
        flag = Binary(1, (B, 1), dtype=torch.bool, **where)
        self.done_spec = Composite(done=flag, terminated=flag.clone(), truncated=flag.clone(), **whole)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        return self.bandit.reset()  # all rows end together, so that all begin together

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        td = tensordict.copy().exclude("next")  # a copy of the nested parts too: the input stays as it was
        if td.get(batch.RESPONSE_MASK, None) is None:
            td.set(batch.RESPONSE_MASK, stop_mask(td[batch.RESPONSE], self.bandit.stop_ids))
        following = self.bandit.step(td)["next"]
        out = tensordict.select(*self.observation_spec.keys(True, True))
        return out.update(following.select("reward", "done", "terminated", "truncated"))

    def _set_seed(self, seed: int | None) -> None:
        state = self.bandit.state_dict()
        self.bandit.load_state_dict(state | {"stream": state["stream"] | {"seed": seed or 0, "draws": 0}})


class PolicyModule(TensorDictModuleBase):
    """A `CausalLMPolicy` as TorchRL's collectors call one: it writes the response keys."""

    def __init__(self, policy: CausalLMPolicy, *, group_size: int | None = None) -> None:
        super().__init__()
        self.policy, self.group_size = policy, group_size
        self.in_keys = [batch.PROMPT, batch.PROMPT_MASK]
        self.out_keys = [batch.RESPONSE, batch.RESPONSE_MASK, batch.LOG_PROBS, batch.FINISHED, batch.TEMPERATURE]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        made = self.policy.generate(tensordict, group_size=self.group_size)
        return tensordict.update(made.select(*self.out_keys))


def grpo_batch(td: TensorDictBase, group_size: int, *, scale: bool = True) -> TensorDict:
    """A scored batch with the keys that TorchRL's GRPOLoss reads.

    Its actor is a `TransformersWrapper(model, tokenizer=..., input_mode="tokens", generate=False, pad_output=True)`,
    which knows no temperature: sample at 1.

    Args:
        td: [B], from `BanditEnv.step`; or [B, steps], from a rollout or a collector.
        group_size: siblings of a prompt.
        scale: divide advantages by the group's standard deviation.
    Returns:
        [B * steps] with the keys at the head of this file. An unscorable row is masked out.
    """
    if td.batch_dims == 2:
        td = td.transpose(0, 1).reshape(-1)  # steps first, so that siblings stay together
    reward = td[batch.REWARD].squeeze(-1)
    scorable = reward.isfinite()
    prompt_mask, mask = td[batch.PROMPT_MASK], td[batch.RESPONSE_MASK] & scorable.unsqueeze(-1)
    log_probs = td[batch.LOG_PROBS]
    advantage = grpo_advantages(reward, group_size, scale=scale, scorable=scorable)
    nothing = torch.zeros_like(prompt_mask)

    def joined(left: Tensor, right: Tensor) -> Tensor:
        return torch.cat((left, right), -1)

    out: TensorDict = td.exclude("next").to_tensordict()
    out.set(("tokens", "full"), joined(td[batch.PROMPT], td[batch.RESPONSE]))
    out.set(("masks", "all_attention_mask"), joined(prompt_mask, mask))
    out.set(("masks", "all_assistant_mask"), joined(nothing, mask))
    out.set(("log_probs", "full"), joined(nothing.to(log_probs.dtype), log_probs))
    out.set("advantage", advantage[:, None, None].expand(-1, out["tokens", "full"].shape[1], 1).clone())
    return out
