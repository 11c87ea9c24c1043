"""A reward from a plain function of strings, run in worker processes while the models score. (B, T: see batch.py.)"""

from __future__ import annotations

import inspect
import logging
import math
import pickle
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from torchbandit.batch import COLUMNS, PROMPT, PROMPT_ID, PROMPT_MASK, RESPONSE, RESPONSE_MASK, require, show
from torchbandit.rewards.host_pool import Job, Rows, WorkerPool
from torchbandit.rewards.term import Clip, Normalize, RewardTerm, name_of
from torchbandit.texts import response_texts

if TYPE_CHECKING:
    from torchbandit.prompts import PromptSet
    from torchbandit.scoring import Plan

HostFn = Callable[..., Sequence[float | None]]
logger = logging.getLogger(__name__)


class HostReward(RewardTerm):
    """Score completions with `fn(prompts, completions, **columns) -> list[float | None]` in a pool of processes.

    The one term that leaves the device: the response is copied to the host, decoded and handed out in chunks before
    the models run; the values are collected after them. A completion is what the model wrote, special tokens included
    (`<think>` may be one); only the special token that ended it, its eos, is left out. A call that fails is repeated
    row by row, so that one bad row does not spoil the others. A row that still has no value is unscorable and is
    counted in `failures` by its reason:
        "timeout"       the call took longer than `timeout_s`; its worker was killed and replaced
        "ValueError"..  the exception that the function raised
        "died"          the worker process ended (a crash, no memory)
        "none"          the function returned None for the row (unless `missing="skip"`)
        "bad value"     it returned no finite number
        "wrong length"  it returned more or fewer values than rows
    Rows with an empty response are unscorable anyway, and are not sent.

    Args:
        fn: a function of a module, since workers import it. It gets lists of strings and, by name, the columns of
            the PromptSet that it has parameters for (all, if it takes **columns), each value as it stands in the
            file: strings, numbers, lists, dicts, None. An `async def` is awaited, and so is each value that needs it.
        tokenizer: decodes the responses.
        num_workers: processes.
        timeout_s: limit on one call. A chunk that passes it is repeated row by row, each row with this limit.
        skip_special_tokens: leave every special token out of completions.
        missing: what None for a row means: "unscorable": the row has no valid score; "skip": it is not this term's
            task, and the row lives on its other terms.
        chunk_size: most rows of one call; 1 for a function of a second or more a row.
        name, weight, clip, normalize, missing_eos_penalty: as in RewardTerm.
    Raises:
        ValueError: an option that has no meaning, or workers cannot import `fn`.
    """

    on_host: ClassVar[bool] = True

    def __init__(
        self,
        fn: HostFn,
        tokenizer: Any,
        *,
        num_workers: int = 2,
        timeout_s: float = 10.0,
        chunk_size: int = 16,
        skip_special_tokens: bool = False,
        missing: Literal["unscorable", "skip"] = "unscorable",
        name: str | None = None,
        weight: float = 1.0,
        clip: Clip = None,
        normalize: Normalize = None,
        missing_eos_penalty: float | None = None,
    ) -> None:
        super().__init__(fn, name_of(fn) if name is None else name, weight, clip, normalize, missing_eos_penalty)
        for option, number in (("num_workers", num_workers), ("chunk_size", chunk_size), ("timeout_s", timeout_s)):
            if not (number >= 1 if option != "timeout_s" else 0 < number < math.inf):
                least = "> 0" if option == "timeout_s" else ">= 1"
                raise ValueError(f'reward term "{self.name}": {option} must be {least}, got {number!r}')
        self.tokenizer, self.num_workers, self.timeout_s, self.chunk_size = (
            tokenizer,
            num_workers,
            timeout_s,
            chunk_size,
        )
        if missing not in ("unscorable", "skip"):
            raise ValueError(f'reward term "{self.name}": missing must be "unscorable" or "skip", got {missing!r}')
        self.skip_special_tokens, self.missing = skip_special_tokens, missing
        self.failures: Counter[str] = Counter()
        self._wanted, self._needed, self._takes_all = _parameters(fn)
        self._pickled = _pickle_by_name(fn, self.name)
        self._job: Job | None = None
        self._sent: list[int] = []
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._pool: WorkerPool | None = None
        self._open()  # now, so that a function that workers cannot import is refused here

    def start(self, td: TensorDictBase, prompts: PromptSet | None) -> None:
        """Copy the responses to the host, decode them, and set the workers to work.

        Raises:
            ValueError: a key is missing, or the function needs a column that is not there.
        """
        self._sent = [row for row, real in enumerate(td[RESPONSE_MASK].any(-1).tolist()) if real]
        completions = response_texts(td, self.tokenizer, self._sent, skip_special_tokens=self.skip_special_tokens)
        texts, columns = self._from_prompts(td, prompts)
        picked = {name: [column[row] for row in self._sent] for name, column in columns.items()}
        rows = Rows([texts[row] for row in self._sent], completions, picked)
        chunk_size = max(1, min(self.chunk_size, math.ceil(len(self._sent) / self.num_workers)))
        self._job = self._open().submit(rows, chunk_size)

    def evaluate(self, td: TensorDictBase, plan: Plan | None, out: TensorDict) -> Tensor:
        """Wait for the workers: [B] float32 on td's device, NaN for a row without a value."""
        assert self._job is not None, "start() comes first"
        outcomes, self._job = self._job.result(), None
        values = torch.full((td.batch_size[0],), torch.nan)
        skips = self.missing == "skip"
        abstained = torch.zeros(td.batch_size[0], dtype=torch.bool)
        for row, (value, reason, example) in zip(self._sent, outcomes, strict=True):
            values[row] = value
            if skips and reason == "none":
                abstained[row] = True
            elif reason is not None:
                if reason not in self.failures:
                    logger.warning('reward term "%s": a row is unscorable (%s): %s', self.name, reason, example)
                self.failures[reason] += 1
        self.abstained = abstained.to(td[RESPONSE].device) if skips else None
        return values.to(td[RESPONSE].device)

    def cancel(self) -> None:
        if self._job is not None:
            self._job.cancel()
            self._job = None

    def close(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._pool = self._finalizer = self._job = None

    def _open(self) -> WorkerPool:
        if self._pool is None:
            try:
                self._pool = WorkerPool(self._pickled, self.num_workers, self.timeout_s)
            except ValueError as error:
                raise ValueError(f'reward term "{self.name}": {error}; it must be importable from sys.path') from None
            self._finalizer = weakref.finalize(self, self._pool.close)  # at the last reference, or at exit
        return self._pool

    def _from_prompts(self, td: TensorDictBase, prompts: PromptSet | None) -> tuple[list[str], dict[str, list[Any]]]:
        """The prompts as strings, and the columns that the function takes."""
        on_device = td.get(COLUMNS, None)
        on_device = {} if on_device is None else dict(on_device.items())
        of_prompts = set() if prompts is None else {*prompts.columns, *prompts.host_columns}
        names = (set(on_device) | of_prompts) - {"prompts", "completions"}
        missing = sorted(self._needed - names)
        if missing:
            raise ValueError(
                f'reward term "{self.name}": the function needs the columns {missing}, the prompts have '
                f"{sorted(names)}; add them to the PromptSet, or give the parameters a default"
            )
        if not self._takes_all:
            names &= self._wanted
        columns = {name: on_device[name].cpu().tolist() for name in names - of_prompts}
        if prompts is None:
            tokens, mask = td[PROMPT].cpu(), td[PROMPT_MASK].cpu()
            ids = [row[real].tolist() for row, real in zip(tokens, mask, strict=True)]
            return self.tokenizer.batch_decode(ids, skip_special_tokens=self.skip_special_tokens), columns
        hint = f"{show(PROMPT_ID)} tells which strings belong to a row; keep what env.reset() returned"
        prompt_id = require(td, PROMPT_ID, shape=(td.batch_size[0],), dtype=torch.int64, hint=hint).tolist()
        columns |= {name: prompts.values(name, prompt_id) for name in names & of_prompts}
        return prompts.texts(prompt_id), columns


def _parameters(fn: HostFn) -> tuple[set[str], set[str], bool]:
    """The columns a function can take, those it must have, and whether it takes any."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # some builtins tell nothing
        return set(), set(), False
    named = [p for p in parameters[2:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = {p.name for p in named if p.default is p.empty}
    return {p.name for p in named}, needed, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _pickle_by_name(fn: HostFn, name: str) -> bytes:
    try:
        pickled = pickle.dumps(fn)
        problem = "is defined in the script that was started (__main__)" if b"__main__" in pickled else ""
    except Exception as error:
        problem = f"cannot be named from outside ({error})"
    if problem:
        raise ValueError(
            f'reward term "{name}": the function must be importable by worker processes, but {fn!r} {problem}; move '
            "it to the top level of a module of its own, say my_rewards.py beside your script, and import it from there"
        )
    return pickled
