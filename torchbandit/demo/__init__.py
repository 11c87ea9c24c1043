"""The embedded default: what `torchbandit train` uses where no path of one's own is given.

Paths only; nothing is read here. `make.py` is the script that made the files, `grammar.py` the world they speak of.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

ROOT = Path(str(files(__name__)))
SFT = ROOT / "sft"
"""Hugging Face folder of a causal LM and its tokenizer: the policy's start and the reference."""
REWARD_MODEL = ROOT / "reward_model"
"""Hugging Face folder of a one-label sequence classifier; one unit is one SFT standard deviation."""
PROMPTS = ROOT / "prompts.jsonl"
"""Training prompts, key "prompt"."""
HELDOUT_PROMPTS = ROOT / "heldout_prompts.jsonl"
"""Prompts that neither the language model, the reward model nor RL has seen."""
CORPUS = ROOT / "corpus.jsonl"
"""Pretraining text for ptx, key "text": one document a line, an end token after each."""
HELDOUT_CORPUS = ROOT / "heldout_corpus.jsonl"
"""Text that the language model has not seen, to measure what RL costs."""
