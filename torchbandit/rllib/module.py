"""CausalLMModule: a pretrained causal LM, with its critic, as an RLModule. (B, T: see batch.py.)"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import ray
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from tensordict import TensorDict, TensorDictBase

from torchbandit.models import ModelSpec, empty_causal_lm, empty_reward_model, load_tokenizer
from torchbandit.policy import CausalLMPolicy
from torchbandit.rllib.wire import pack, unpack

PLACEHOLDER = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32)
"""RLlib wants spaces; a bandit on token tensors has none to tell."""


def here() -> str:
    """This node, for messages: host name and, inside a cluster, the address that Ray knows it by."""
    address = ray.util.get_node_ip_address() if ray.is_initialized() else "no cluster"
    return f"{socket.gethostname()} ({address})"


@contextlib.contextmanager
def same_algorithms() -> Iterator[None]:
    """RLlib's seeding also switches a CPU build of torch to deterministic algorithms, for all that the process runs."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class CausalLMModule(TorchRLModule):
    """An RLModule around `CausalLMPolicy`, built from a folder or hub id: no catalog, no forward pass at build.

    `model_config` is filled by `BanditConfig`: pretrained, critic, dtype, sampling, packing, device, and `empty`, which
    leaves the weights to the first broadcast.
    """

    policy: CausalLMPolicy

    def setup(self) -> None:
        """Build the policy, on the device it will stay on."""
        given = self.model_config
        try:
            self.policy = _build(given)
        except AttributeError as error:  # RLModuleSpec.build would swallow it and try a deprecated signature
            raise RuntimeError(f"CausalLMModule: {error}") from error
        except (OSError, ValueError) as error:
            raise ValueError(
                f"rl_module(pretrained={str(given['pretrained'])!r}, critic={str(given['critic'])!r}): cannot be built "
                f"on node {here()}: {error}. Every node loads it for itself: put it on all nodes or on shared storage, "
                "or give a hub id"
            ) from error
        self.num_loads = 0

    def generate(self, td: TensorDictBase, **options: Any) -> TensorDict:
        """Answer every prompt, as `CausalLMPolicy.generate`; where `BanditEnvRunner` gets its responses."""
        return self.policy.generate(td, **options)

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """`CausalLMPolicy.forward` of batch["td"]; the other keys are its options, ptx among them, so that DDP
        averages every gradient."""
        options = {key: value for key, value in batch.items() if key != "td"}
        return dict(self.policy(batch["td"], **options).items())  # DDP looks for tensors in dicts, not in a TensorDict

    def _forward_exploration(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {"td": self.generate(batch["td"])}

    def _forward_inference(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {"td": self.generate(batch["td"], greedy=True)}

    def train(self, mode: bool = True) -> CausalLMModule:
        """Nothing: the policy is in the mode it needs; RLlib would switch it around every forward pass."""
        return self

    def get_state(self, components: Any = None, **kwargs: Any) -> dict[str, Any]:
        """All weights as bits, tied ones once; the runner needs the critic too, so `inference_only` drops nothing."""
        return {"weights": pack(self.weights())}

    def set_state(self, state: dict[str, Any]) -> None:
        """Load `get_state()` of the same model, whatever its device; ValueError where names differ."""
        weights = unpack(state["weights"])
        known = self.weights()
        if known.keys() != weights.keys():
            odd = sorted(known.keys() ^ weights.keys())
            raise ValueError(
                f"module state: must hold this model's {len(known)} weights, got {len(weights)}; {odd[0]!r} is in one "
                "alone; restore with the pretrained model and critic that wrote it"
            )
        self.copy_weights(weights)

    def copy_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Take over the values of `weights()` of the same model, from any device."""
        known = self.weights()
        with torch.no_grad():
            torch._foreach_copy_(list(known.values()), [weights[name] for name in known])
        self.num_loads += 1

    def weights(self) -> dict[str, torch.Tensor]:
        """State dict without the second name of a tied weight, which would be sent twice."""
        seen: set[tuple[int, torch.Size]] = set()
        kept: dict[str, torch.Tensor] = {}
        for name, tensor in self.state_dict().items():
            identity = (tensor.data_ptr(), tensor.shape)
            if identity not in seen or tensor.numel() == 0:
                kept[name] = tensor
            seen.add(identity)
        return kept


def _build(given: dict[str, Any]) -> CausalLMPolicy:
    pretrained, critic, device, dtype = (given[k] for k in ("pretrained", "critic", "device", "dtype"))
    options = {"sampling": given["sampling"], "device": device, "dtype": dtype, "packing": given["packing"]}
    if not given["empty"]:
        return CausalLMPolicy(pretrained, critic=critic, **options)
    if isinstance(critic, (str, ModelSpec)) and critic != "head":
        critic = empty_reward_model(critic, device, dtype=dtype)
    lm = empty_causal_lm(pretrained, device, dtype=dtype)
    return CausalLMPolicy(lm, load_tokenizer(pretrained), critic=critic, trainable=False, **options)


def empty_module(config: Any, device: torch.device) -> CausalLMModule:
    """The module of a `BanditConfig` without its weights, which come with the first `set_state`."""
    spaces = {DEFAULT_MODULE_ID: (PLACEHOLDER, PLACEHOLDER)}
    spec = config.get_rl_module_spec(spaces=spaces, inference_only=True)
    module = spec.module_class(
        observation_space=PLACEHOLDER, action_space=PLACEHOLDER, inference_only=True,
        model_config=spec.model_config | {"device": str(device), "empty": True},
    )  # fmt: skip
    assert isinstance(module, CausalLMModule)
    return module
