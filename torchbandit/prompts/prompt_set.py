"""PromptSet: N prompts, tokenised once, as a table on the device. (B, P, N: see batch.py.)"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict
from torch import Tensor

from torchbandit.models import num_ids
from torchbandit.prompts.columns import split_columns
from torchbandit.prompts.datasets import dataset_rows
from torchbandit.prompts.options import PromptOptions
from torchbandit.prompts.records import Columns, Records, from_rows, from_texts
from torchbandit.prompts.table import make_table
from torchbandit.prompts.tokenise import as_tensor, tokenise
from torchbandit.read import rows as read_rows
from torchbandit.responses import is_contiguous, is_left_padded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptSet:
    """Prompts as a table on the device, with the columns that travel with them. Made by one of the `from_*`.

    Columns of numbers of one shape become tensors and travel in the batch. All others (strings, lists of several
    lengths, None, tables) stay here as they stand, for `HostReward`.

    Attributes:
        tokenizer: what made the ids, or decodes them.
        width: P, the tokens of the longest prompt.
        pad_id: stands in front of short prompts; the tokenizer's pad id, or its eos id. It may be a real token
            elsewhere: only masks tell padding.
        lengths: [N] int64 on the device.
        columns: name -> tensor [N, ...] on the device.
        host_columns: name -> list of N, of those that are no tensors.
        num_truncated: prompts that were cut to `max_length`.
        num_dropped: prompts that were longer, and left out.
        num_skipped: rows that had no prompt that could be used, and were left out.
        rendered_at: what a chat template that asks for the time was told, in seconds since 1970; None for others.
        fingerprint: a checksum of ids and lengths, by which a checkpoint knows its prompts.
    """

    def __init__(
        self,
        flat: Tensor,
        lengths: Tensor,
        tokenizer: PreTrainedTokenizerBase,
        *,
        columns: Columns | None = None,
        texts: list[str] | None = None,
        num_truncated: int = 0,
        num_dropped: int = 0,
        num_skipped: int = 0,
        where: Callable[[int], str],
    ) -> None:
        """Check the ids and build the table.

        Args:
            flat: [sum of lengths] int64 on the CPU, prompt after prompt.
            lengths: [N] int64 on the CPU.
            texts: what the ids were made of; None decodes when asked.
            where: names a prompt in a message.
        """
        if not lengths.numel():
            raise ValueError("prompts: must be at least one, got none")
        if int(lengths.min()) < 1:
            raise ValueError(f"{where(int(lengths.argmin()))}: must hold at least one token, got none")
        vocabulary = num_ids(tokenizer)
        outside = (flat < 0) | (flat >= vocabulary)
        if outside.any():
            at = int(outside.int().argmax())
            row = int(torch.searchsorted(lengths.cumsum(0), at, right=True))
            raise ValueError(
                f"{where(row)}: token ids must be 0 to {vocabulary - 1}, the tokenizer's vocabulary, got "
                f"{int(flat[at])}; were the ids made by another tokenizer?"
            )
        self.tokenizer = tokenizer
        self.pad_id = _pad_id(tokenizer, vocabulary)
        self.columns, self._lists = split_columns(columns or {}, lengths.numel())
        self.host_columns = {name: values for name, values in self._lists.items() if name not in self.columns}
        self.num_truncated, self.num_dropped, self.num_skipped = num_truncated, num_dropped, num_skipped
        self.rendered_at: int | None = None
        self._source: tuple[Records, int, PromptOptions] | None = None  # where the time matters
        self.fingerprint = _checksum(flat) ^ _checksum(lengths)
        self._shortest, self._num_tokens = int(lengths.min()), flat.numel()
        self._texts = texts
        self._table = make_table(flat, lengths, self.pad_id)

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[Any],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        columns: Columns | None = None,
        **options: Any,
    ) -> PromptSet:
        """Tokenise texts, with the BOS that the tokenizer puts in front.

        Args:
            texts: strings, or lists of messages `{"role", "content"}`, which go through the chat template. A last
                message of the assistant is the beginning of an answer, which the response goes on with.
            max_length: most tokens of a prompt. A longer text keeps its BOS and its end, and a warning says how many
                do; a longer chat is an error (see `overlong`).
            columns: name -> N values, or a tensor [N, ...]. A column "tools" is handed to the chat template.
            options: the fields of `prompts.options.PromptOptions`: chat, prompt_template, system_prompt,
                chat_template, chat_template_kwargs, last_turn, overlong, on_bad_row, rendered_at.
        Raises:
            ValueError: names the text or the column, what was expected and what came.
        """
        if isinstance(texts, str):
            raise ValueError("texts: must be a list of strings, got one string; put it in a list")
        how = PromptOptions(**options)
        return cls._tokenised(from_texts(list(texts), columns or {}, how), tokenizer, max_length, how)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt_key: str = "prompt",
        max_length: int,
        columns: Sequence[str] | None = None,
        option: str = "the path",
        **options: Any,
    ) -> PromptSet:
        """Read JSONL, JSON, CSV, TSV, Parquet, Arrow or text, compressed or not.

        Args:
            path: a file, a folder, a glob, `-` for stdin, a folder of `save_to_disk`, or a dataset of the hub; with
                `:split` where there are several splits. See docs/data.md.
            prompt_key: the column of the prompt, a string or a list of messages.
            columns: the columns that travel with a prompt; None takes all others.
            option: what the user calls the path, for messages.
            max_length, options: as in `from_texts`.
        Raises:
            ValueError: names the file and line, what was expected and what came.
        """
        how = PromptOptions(**options)
        rows = read_rows(path, option=option, key=prompt_key)
        return cls._tokenised(from_rows(rows, str(path), prompt_key, columns, how), tokenizer, max_length, how)

    from_jsonl = from_file

    @classmethod
    def from_dataset(
        cls,
        dataset: Iterable[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt_key: str = "prompt",
        max_length: int,
        columns: Sequence[str] | None = None,
        **options: Any,
    ) -> PromptSet:
        """Read a `datasets.Dataset` (one split), or any iterable of dicts; arguments as in `from_file`."""
        how = PromptOptions(**options)
        rows = dataset_rows(dataset, None if columns is None or how.prompt_template else [prompt_key, *columns])
        return cls._tokenised(from_rows(rows, "dataset", prompt_key, columns, how), tokenizer, max_length, how)

    @classmethod
    def from_tokens(
        cls,
        tokens: Sequence[Sequence[int]] | tuple[Tensor, Tensor],
        *,
        tokenizer: PreTrainedTokenizerBase,
        columns: Columns | None = None,
    ) -> PromptSet:
        """Take ready tokens as they are: no BOS is added and nothing is cut.

        Args:
            tokens: lists of ids, or a pair (ids [N, L] int64, mask [N, L] bool), padded on either side.
            columns: as in `from_texts`.
        """
        if isinstance(tokens, tuple) and len(tokens) == 2 and isinstance(tokens[0], Tensor):
            flat, lengths = _unpad(*tokens)
        else:
            flat, lengths = _flatten([list(row) for row in tokens])
        return cls(flat, lengths, tokenizer, columns=columns, where=lambda i: f"tokens[{i}]")

    @classmethod
    def _tokenised(
        cls, records: Records, tokenizer: PreTrainedTokenizerBase, max_length: int, options: PromptOptions
    ) -> PromptSet:
        made = tokenise(records, tokenizer, max_length=max_length, options=options)
        kept = records.take(made.kept)
        prompts = cls(
            made.flat,
            made.lengths,
            tokenizer,
            columns=kept.columns,
            texts=made.texts,
            num_truncated=made.num_cut,
            num_dropped=len(records.prompts) - len(made.kept),
            num_skipped=records.num_skipped,
            where=lambda i: kept.places[i],
        )
        if made.rendered_at is not None:
            prompts.rendered_at, prompts._source = made.rendered_at, (records, max_length, options)
        return prompts

    def rendered(self, at: int | None) -> PromptSet:
        """The same prompts, their chat template told that it is the time `at` (in seconds since 1970).

        A run that goes on renders its prompts as they were the first time. Prompts whose template asks for no time
        are returned as they are.
        """
        if self._source is None or at is None or at == self.rendered_at:
            return self
        records, max_length, options = self._source
        made = self._tokenised(records, self.tokenizer, max_length, replace(options, rendered_at=at))
        return made.to(self.device)

    def __len__(self) -> int:
        return self._table.lengths.shape[0]

    @property
    def width(self) -> int:
        return self._table.position.shape[0]

    @property
    def device(self) -> torch.device:
        return self._table.lengths.device

    @property
    def lengths(self) -> Tensor:
        return self._table.lengths

    @property
    def is_dense(self) -> bool:
        """False where padding would waste more than half of the table, so that it is flat with offsets."""
        return self._table.ends is None

    def to(self, device: torch.device | str) -> PromptSet:
        """The same prompts on `device`; what is on the host is shared."""
        moved = copy.copy(self)
        moved._table = self._table.to(torch.device(device))
        moved.columns = {name: column.to(device) for name, column in self.columns.items()}
        return moved

    def gather(self, prompt_id: Tensor) -> tuple[Tensor, Tensor, TensorDict | None]:
        """The prompts of these rows, without a sync.

        Args:
            prompt_id: [n] int64 on the set's device.
        Returns:
            ids [n, P] int64, left-padded; mask [n, P] bool, True on real tokens; the columns, batch_size [n], or
            None where there are none.
        """
        if prompt_id.dtype != torch.int64 or prompt_id.dim() != 1 or prompt_id.device != self.device:
            raise ValueError(
                f"prompt_id: must be int64 [n] on {self.device}, got {str(prompt_id.dtype).removeprefix('torch.')} "
                f"{list(prompt_id.shape)} on {prompt_id.device}"
            )
        ids, mask = self._table.gather(prompt_id)
        if not self.columns:
            return ids, mask, None
        columns = {name: column[prompt_id] for name, column in self.columns.items()}
        return ids, mask, TensorDict(columns, batch_size=[prompt_id.shape[0]], device=self.device)

    def texts(self, prompt_id: Tensor | Sequence[int] | None = None) -> list[str]:
        """What the policy reads, as strings: chats as rendered, long prompts as cut. Leaves the device.

        Args:
            prompt_id: [n] rows; None takes all.
        """
        rows = range(len(self)) if prompt_id is None else [int(row) for row in torch.as_tensor(prompt_id).tolist()]
        if self._texts is not None:
            return [self._texts[row] for row in rows]
        ids, mask = (part.cpu() for part in self._table.gather(torch.tensor(list(rows), device=self.device)))
        return [str(self.tokenizer.decode(row[kept].tolist())) for row, kept in zip(ids, mask, strict=True)]

    def values(self, name: str, prompt_id: Sequence[int]) -> list[Any]:
        """A column's values of these rows, as they stand in the source (as lists, where it was given as a tensor)."""
        if name in self._lists:
            return [self._lists[name][row] for row in prompt_id]
        rows = torch.tensor(list(prompt_id), dtype=torch.int64, device=self.device)
        return list(self.columns[name][rows].cpu().tolist())

    def __repr__(self) -> str:
        parts = [
            f"{len(self)} prompts",
            f"{self._shortest} to {self.width} tokens, mean {self._num_tokens / len(self):.1f}",
            f"{'dense' if self.is_dense else 'flat'} on {self.device}",
        ]
        if self.num_truncated:
            parts.append(f"{self.num_truncated} cut")
        parts += [f"{n} {what}" for n, what in ((self.num_dropped, "dropped"), (self.num_skipped, "skipped")) if n]
        for name, column in self.columns.items():
            parts.append(f"{name}: {str(column.dtype).removeprefix('torch.')} {list(column.shape)}")
        parts += [f"{name}: host" for name in self.host_columns]
        return f"PromptSet({'; '.join(parts)})"


def _pad_id(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> int:
    candidates = [t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(t, int)]
    if not candidates:
        raise ValueError(
            "tokenizer: must have a pad or an eos token, got neither; set tokenizer.eos_token to the token that ends "
            "a response"
        )
    # A pad id may lie outside the vocabulary (some checkpoints say -1), where an embedding would read foreign memory.
    return next((t for t in candidates if 0 <= t < vocabulary), 0)


def _flatten(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    try:
        flat = array("q", chain.from_iterable(rows))  # several times as fast as torch.tensor of a list
    except (TypeError, OverflowError) as error:
        odd = next(i for i, row in enumerate(rows) if any(type(t) is not int or not -(2**63) <= t < 2**63 for t in row))
        raise ValueError(f"tokens[{odd}]: token ids must be ints of the vocabulary, got {rows[odd][:8]}") from error
    return as_tensor(flat), lengths


def _unpad(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    if ids.dim() != 2 or ids.dtype != torch.int64 or mask.dtype != torch.bool or mask.shape != ids.shape:
        raise ValueError(
            "tokens: must be a pair of ids int64 [N, L] and mask bool [N, L], got "
            + " and ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (ids, mask))
        )
    ids, mask = ids.cpu(), mask.cpu()
    holes = ~(is_contiguous(mask) | is_left_padded(mask))
    if holes.any():
        odd = int(holes.int().argmax())
        raise ValueError(
            f"tokens[{odd}]: the mask must be one run of True, padded on the left or the right, got a mask with holes"
        )
    return ids[mask], mask.sum(-1)


def _checksum(values: Tensor) -> int:
    """A checksum that tells order: int64 arithmetic wraps around, alike everywhere."""
    total, block = 0, 1 << 16  # block by block, so that no second table is in memory
    for first in range(0, values.numel(), block):
        part = values[first : first + block]
        weight = torch.arange(first + 1, first + 1 + part.numel()) * 0x9E3779B97F4A7C1
        total += int(((part + 1) * (weight ^ (weight >> 29))).sum())
    return total & 0x7FFFFFFFFFFFFFFF
