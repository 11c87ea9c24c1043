"""The pretraining text of PPO-ptx, as token batches on the device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchbandit.prompts import PromptStream
from torchbandit.read import check_text, rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Corpus:
    """Documents cut into rows of at most L tokens, drawn in seeded permutations.

    One row never holds two documents, so no attention crosses from one to the next; a document longer than L becomes
    several rows. Rows of a single token predict nothing and are left out.

    Args:
        ids: [M, L] int64, right-padded with an in-vocabulary id; mask: [M, L] bool.
        seed: of the permutations.
    """

    def __init__(self, ids: Tensor, mask: Tensor, *, seed: int = 0) -> None:
        if ids.dim() != 2 or ids.shape != mask.shape or ids.dtype != torch.int64 or mask.dtype != torch.bool:
            raise ValueError(
                f"corpus: must be int64 [M, L] with a bool mask of that shape, got {ids.dtype} {list(ids.shape)} and "
                f"{mask.dtype} {list(mask.shape)}"
            )
        if len(ids) == 0:
            raise ValueError("corpus: must hold at least one row of two tokens, got none; give a longer text")
        self.ids, self.mask, self._seed = ids, mask, seed
        self._stream = PromptStream(len(ids), seed, device=ids.device)

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 512,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> Corpus:
        """Tokenise documents, end each with the tokenizer's eos (if it has one), and cut them into rows."""
        eos = tokenizer.eos_token_id
        rows: list[list[int]] = []
        for ids in tokenizer(list(texts))["input_ids"] if texts else []:
            if eos is not None and (not ids or ids[-1] != eos):
                ids = [*ids, eos]
            rows += [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
        rows = [row for row in rows if len(row) > 1]
        width = max((len(row) for row in rows), default=0)
        pad = next((i for i in (tokenizer.pad_token_id, eos) if i is not None), 0)
        table = torch.tensor([row + [pad] * (width - len(row)) for row in rows], dtype=torch.int64)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(width) < lengths.unsqueeze(-1)
        return cls(table.view(len(rows), width).to(device), mask.view(len(rows), width).to(device), seed=seed)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        key: str = "text",
        option: str = "ptx_data",
        **options: Any,
    ) -> Corpus:
        """Read the documents of a file, folder, glob or dataset (see `read.rows`).

        Args:
            key: the column of the text. A text file has none; its documents are parted by blank lines.
            option: what the user calls the path, for messages.
            options: max_length, seed, device, as in `from_texts`.
        Raises:
            ValueError: the file is missing, empty, or a row (named by its line) is not what it must be.
        """
        texts: list[str] = []
        for where, values in rows(path, option=option, key=key, documents=True):
            if key not in values:
                raise ValueError(f"{where}: must have the column {key!r}, got {list(values)}; see ptx_key")
            text = values[key]
            if not isinstance(text, str):
                raise ValueError(f"{where}: {key!r} must be a text, got {type(text).__name__}; see ptx_key")
            check_text(text, where, key)
            texts.append(str(text))
        if not texts:
            raise ValueError(f"{path}: must hold at least one document, got none; check {option}")
        return cls.from_texts(texts, tokenizer, **options)

    def __len__(self) -> int:
        return len(self.ids)

    def next(self, num: int) -> tuple[Tensor, Tensor]:
        """The next `num` rows (at most the corpus): ids [num, L] int64 and mask [num, L] bool, no sync."""
        row, _ = self._stream.next(min(num, len(self)))
        return self.ids[row], self.mask[row]

    def shard(self, rank: int, world_size: int) -> None:
        """Take turns with the other ranks over one permutation."""
        self._stream.shard(rank, world_size)

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream."""
        return {"rows": len(self.ids), "stream": self._stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError for a corpus of another size."""
        if state["rows"] != len(self.ids):
            raise ValueError(f"corpus: the state is of {state['rows']} rows, this corpus has {len(self.ids)}")
        self._stream.load_state_dict(state["stream"])
