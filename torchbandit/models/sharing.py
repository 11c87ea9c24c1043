"""What is trained and what is frozen hold weights of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from torchbandit.models.offload import plain_tensors


def check_apart(trained: nn.Module, frozen: Mapping[str, Iterable[nn.Module]]) -> None:
    """Refuse a frozen model over weights that are trained: a policy as its own reference has a KL of 0 for ever, and a
    critic that is the reward model rewrites the reward (trap 21). A base that an adapter leaves frozen may be shared.

    Args:
        trained: its parameters that require gradient are trained.
        frozen: models by the name of the term that uses them.
    Raises:
        ValueError: names the term and the weight.
    """
    storages = {
        weight.untyped_storage()._cdata: name for name, weight in trained.named_parameters() if weight.requires_grad
    }
    for term, models in frozen.items():
        for model in models:
            for weight in plain_tensors(model):
                name = storages.get(weight.untyped_storage()._cdata)
                if name is not None:
                    raise ValueError(
                        f'reward term "{term}": its {type(model).__name__} must have weights of its own, got the '
                        f"policy's {name}, which is trained; pass copy.deepcopy(model), or the model's folder"
                    )
