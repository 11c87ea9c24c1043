"""The bandit as a `gymnasium.vector.VectorEnv` with placeholder spaces. (B, P, T: see batch.py.)

An observation is a row handle, a number: the tokens stay in TensorDicts on the device, and whoever holds the env asks
for them. So the Gymnasium protocol is served without a copy of a batch, by callers in the env's own process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from tensordict import TensorDict, TensorDictBase

from torchbandit import batch
from torchbandit.env import BanditEnv

ID = "torchbandit/Bandit-v0"


class BanditVectorEnv(VectorEnv[Any, Any, Any]):
    """One env a row of the batch; every episode is one step long.

    The action is the TensorDict `pending` with its responses written (`policy.generate(envs.pending)`), the
    observation of a row its handle, and `rows(handles)` what stands behind handles. Autoreset is NEXT_STEP: after each
    scored step comes an empty one, which draws the next prompts and costs neither generation nor scoring; its action
    is not looked at.

    Args:
        env: a `BanditEnv`, or a function that makes one.
        num_envs: if given, must be the env's batch size (as `gymnasium.make_vec` and RLlib tell it).
        keep: batches that handles can still be asked for.
    Raises:
        ValueError: `num_envs` is not the env's batch size.
    """

    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self, env: BanditEnv | Callable[[], BanditEnv], num_envs: int | None = None, *, keep: int = 64
    ) -> None:
        self.bandit = env if isinstance(env, BanditEnv) else env()
        self.num_envs = self.bandit.batch_size
        if num_envs is not None and num_envs != self.num_envs:
            raise ValueError(
                f"num_envs: must be the env's batch size, {self.num_envs} (num_prompts x group_size), got {num_envs}"
            )
        self.single_observation_space = gymnasium.spaces.Box(0, np.iinfo(np.int64).max, (1,), np.int64)
        self.single_action_space = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32)
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, self.num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, self.num_envs)
        self.pending: TensorDict | None = None
        self.num_scored = 0
        self._drawn = 0
        self._kept: deque[tuple[int, TensorDict]] = deque(maxlen=keep)

    def reset(self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None) -> Any:
        """Draw a batch of prompts; a seed begins the prompts anew in another order.

        Returns:
            handles [B, 1] int64, and an empty info.
        """
        if seed is not None:
            state = self.bandit.state_dict()
            first = seed if isinstance(seed, int) else next((s for s in seed if s is not None), 0)
            state["stream"] = state["stream"] | {"seed": first, "draws": 0}
            self.bandit.load_state_dict(state)
        return self._draw(), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Score the responses; or, right after that, draw the next prompts.

        Args:
            actions: `pending` with the response keys; anything in the empty step.
        Returns:
            handles [B, 1]; rewards [B] float64, for an unscorable row the mean of the others (its place in `info`);
            terminated, truncated [B]; info with "unscorable" [B] and "_unscorable".
        Raises:
            ValueError: the action is no TensorDict with responses.
        """
        if self.pending is None:
            nothing = np.zeros(self.num_envs, dtype=bool)
            return self._draw(), np.zeros(self.num_envs), nothing, nothing.copy(), {}
        if not isinstance(actions, TensorDictBase):
            raise ValueError(
                "actions: must be the TensorDict `pending` with responses (policy.generate(envs.pending)), got "
                f"{type(actions).__name__}; token tensors do not fit into Gymnasium's spaces"
            )
        scored = self.bandit.step(actions)
        self._kept.append((self._drawn - self.num_envs, scored))
        self.num_scored += self.num_envs
        self.pending = None
        rewards = scored[batch.REWARD].squeeze(-1).cpu().double().numpy()
        unscorable = np.isnan(rewards)
        rewards[unscorable] = rewards[~unscorable].mean() if not unscorable.all() else 0.0
        info = {"unscorable": unscorable, "_unscorable": np.ones(self.num_envs, dtype=bool)}
        # A cut response has ended all the same: nothing follows that a value could be bootstrapped from.
        ended = np.ones(self.num_envs, dtype=bool)
        return self._handles(), rewards, ended, ~ended, info

    def rows(self, handles: Sequence[int] | torch.Tensor) -> TensorDict:
        """The scored rows behind handles, in their order, on the device.

        Raises:
            ValueError: a handle is not (or no longer) kept.
        """
        asked = torch.as_tensor(handles, dtype=torch.int64).flatten()
        if not self._kept:
            raise ValueError("handles: no batch has been scored yet")
        starts = torch.tensor([start for start, _ in self._kept])
        number = torch.searchsorted(starts, asked, right=True) - 1
        inside = (number >= 0) & (asked - starts[number.clamp(min=0)] < self.num_envs)
        if not bool(inside.all()):
            raise ValueError(
                f"handles: {int(asked[~inside][0])} is not among the last {len(self._kept)} batches; raise `keep`"
            )
        first, last = int(number.min()), int(number.max())
        used = [td for _, td in list(self._kept)[first : last + 1]]
        at = ((number - first) * self.num_envs + asked - starts[number]).to(self.bandit.device)
        found: TensorDict = (used[0] if len(used) == 1 else torch.cat(used))[at]
        return found

    def close_extras(self, **kwargs: Any) -> None:
        """End the worker processes of host rewards."""
        self.bandit.close()

    def _draw(self) -> Any:
        self.pending = self.bandit.reset()
        self._drawn += self.num_envs
        return self._handles()

    def _handles(self) -> Any:
        return np.arange(self._drawn - self.num_envs, self._drawn, dtype=np.int64)[:, None]


gymnasium.register(ID, vector_entry_point=BanditVectorEnv)
