"""Which keywords a `BanditConfig` knows, and what is said of one that it does not."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any

from torchbandit.learn import ALGORITHMS
from torchbandit.learn.find import name_of, options_of, owners_of, unknown_option
from torchbandit.learn.options import UpdateOptions

OTHERWISE = dict(epochs="num_epochs", max_grad_norm="grad_clip", minibatches="minibatch_size", seed=".debugging's")
UPDATE = {field.name: field.default for field in dataclasses.fields(UpdateOptions) if field.name not in OTHERWISE}
"""The fields of `UpdateOptions` that are keywords of `.training`, and their defaults."""
RLLIB = ("lr", "grad_clip", "num_epochs", "minibatch_size", "train_batch_size_per_learner", "optimizer")
OURS = ("algo", "ptx_data", "ptx_length", "learner_class")
HERE = {
    "clip_param": "clip", "clip_param_high": "clip_high", "vf_clip_param": "value_clip", "vf_loss_coeff": "value_coef",
    "lambda_": "lam", "entropy_coeff": "entropy_coef", "use_kl_loss": "loss_kl_coef", "kl_coeff": "loss_kl_coef",
    "kl_target": "the target of a KLPenalty", "train_batch_size": "train_batch_size_per_learner",
} | OTHERWISE  # fmt: skip
"""What RLlib's PPO, or the local engine, calls otherwise."""
METHODS = (
    "bandit", "rl_module", "env_runners", "learners", "evaluation", "fault_tolerance", "debugging", "environment",
    "resources", "reporting", "checkpointing", "callbacks", "framework",
)  # fmt: skip


def of_learner(learner_class: type) -> dict[str, Any]:
    """The options that a learner class and its bases declare, with their defaults."""
    found: dict[str, Any] = {}
    for cls in reversed(learner_class.__mro__):
        found |= vars(cls).get("keywords", {})
    return found


def of_algorithm(algo: Any) -> list[str]:
    """The options of the algorithm; where none is named yet, those of all that there are."""
    return [option for one in (ALGORITHMS if algo is None else [algo]) for option in options_of(one)]


def why_unknown(name: str, algo: Any, known: Collection[str]) -> str:
    """What is said of a keyword of `training` that nobody has."""
    if name in HERE:
        return f"training({name}=…): is {HERE[name]} here"
    if algo is not None and owners_of(name):
        return f"training({name}=…): {unknown_option(name, name_of(algo), options_of(algo))}"
    return _no_such("training", name, [*RLLIB, *OURS, *UPDATE, *known])


def _no_such(method: str, given: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(given, sorted(known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(sorted(set(known) - {'_'}))}"
    return f"{method}({given}=…): no such keyword; {hint}"


def check_given(method: str, name: str, value: Any) -> None:
    """ValueError for -1, which RLlib takes for "not given" and drops when an algorithm is built."""
    if isinstance(value, (int, float)) and value == -1:
        raise ValueError(f"{method}({name}=…): must not be -1, which RLlib takes for none given, got {value}")


def with_hint(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """Name an unknown keyword and its nearest known one, in place of Python's TypeError."""

    @functools.wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        known: set[str] = set()
        for cls in type(self).__mro__:
            if name in vars(cls):
                known |= set(inspect.signature(vars(cls)[name]).parameters) - {"self", "kwargs", "args"}
        for given in kwargs:
            if given not in known:
                raise ValueError(_no_such(name, given, known))
            check_given(name, given, kwargs[given])
        return method(self, *args, **kwargs)

    return checked
