"""Which keywords a `BanditConfig` knows, and what is said of one that it does not."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any

from torchbandit.learn import ALGORITHMS
from torchbandit.learn.algorithm import Algorithm
from torchbandit.learn.find import check_algorithm_class, find_algorithm, name_of, owners_of, unknown_option
from torchbandit.learn.options import UpdateOptions

OTHERWISE = {
    "epochs": "num_epochs",
    "max_grad_norm": "grad_clip",
    "minibatches": "minibatch_size, in rows",
    "seed": "debugging(seed=…)",
}
"""What `UpdateOptions` calls otherwise than RLlib does."""
UPDATE = [field for field in dataclasses.fields(UpdateOptions) if field.name not in OTHERWISE]
HERE = {
    "clip_param": "clip",
    "clip_param_high": "clip_high",
    "vf_clip_param": "value_clip",
    "vf_loss_coeff": "value_coef",
    "lambda_": "lam",
    "entropy_coeff": "entropy_coef",
    "use_kl_loss": "loss_kl_coef",
    "kl_coeff": "loss_kl_coef, or the coef of a KLPenalty in the env",
    "kl_target": "the target of a KLPenalty in the env",
    "train_batch_size": "train_batch_size_per_learner",
    "num_sgd_iter": "num_epochs",
    "sgd_minibatch_size": "minibatch_size",
    "loss_fn": "compute_loss_for_module of a learner_class",
} | OTHERWISE
"""RLlib's names, and the local engine's, for what is called otherwise here."""
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


def class_of(algo: Any) -> type[Algorithm]:
    """The class behind `training(algo=…)`; ValueError where there is none."""
    if algo is None:
        raise ValueError(f"training(algo=…): must be {', '.join(ALGORITHMS)} or a class of your own, got none")
    if isinstance(algo, str):
        return find_algorithm(algo)
    cls = algo if isinstance(algo, type) else type(algo)
    return check_algorithm_class(cls, cls.__qualname__)


def of_algorithm(algo: Any) -> list[str]:
    """The options of the algorithm; where none is named yet, those of all that there are."""
    classes: Iterable[type[Algorithm]] = ALGORITHMS.values() if algo is None else [class_of(algo)]
    return list(dict.fromkeys(field.name for cls in classes for field in dataclasses.fields(cls)))


def make(algo: Any, options: dict[str, Any]) -> Algorithm:
    """The algorithm with its options; ValueError where it has no such option, or refuses a value."""
    cls, own = class_of(algo), of_algorithm(algo)
    for option in options:
        if option not in own:
            raise ValueError(f"training({option}=…): {unknown_option(option, _called(algo), own)}")
    if isinstance(algo, Algorithm):
        return dataclasses.replace(algo, **options)
    return cls(**options)


def why_unknown(name: str, algo: Any, known: Collection[str], own: list[str]) -> str:
    """What is said of a keyword of `training` that nobody has."""
    if name in HERE:
        return f"training({name}=…): is {HERE[name]} here"
    if algo is not None and owners_of(name):
        return f"training({name}=…): {unknown_option(name, _called(algo), own)}"
    return _no_such("training", name, known)


def _called(algo: Any) -> str:
    if isinstance(algo, str):
        return algo
    return name_of(algo) if isinstance(algo, Algorithm) else class_of(algo).__name__


def _no_such(method: str, given: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(given, sorted(known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(sorted(set(known) - {'_'}))}"
    return f"{method}({given}=…): no such keyword; {hint}"


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
        return method(self, *args, **kwargs)

    return checked
