"""Prompts: read once, tokenised once, then a table on the device and an endless stream of draws from it.

prompt_set.py   PromptSet: the table, the strings and the columns of N prompts
stream.py       PromptStream: which prompts come next; seeded, sharded, resumable
options.py      how a row becomes a prompt
records.py      rows of a file or dataset -> prompts and columns; rows without a prompt
datasets.py     rows of a `datasets.Dataset`
columns.py      columns -> tensors, and values as they stand
chat.py         chats -> text
tokenise.py     texts -> token ids; BOS, prompts that are too long
table.py        ragged token ids on the device: dense, or flat with offsets
"""

from __future__ import annotations

from torchbandit.prompts.prompt_set import PromptSet
from torchbandit.prompts.stream import PromptStream

__all__ = ["PromptSet", "PromptStream"]
