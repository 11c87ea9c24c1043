"""Prompts: read once, tokenised once, then a table on the device and an endless stream of draws from it.

prompt_set.py   PromptSet: the table, the strings and the columns of N prompts
stream.py       PromptStream: which prompts come next; seeded, sharded, resumable
read.py         JSONL files and datasets -> prompts and columns
tokenise.py     texts and chats -> token ids; BOS, truncation
table.py        ragged token ids on the device: dense, or flat with offsets
"""

from __future__ import annotations

from torchbandit.prompts.prompt_set import PromptSet
from torchbandit.prompts.stream import PromptStream

__all__ = ["PromptSet", "PromptStream"]
