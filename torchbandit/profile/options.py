"""One field per option of `torchbandit profile`; the same names are the keys of `--config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ProfileOptions:
    """Measure a reward model and a reference in each precision against float32: bytes on the device, tokens a second,
    correlation of scores, share of preference pairs whose order flips, error of log-probs, bias of the KL estimate.

    Each line of the input is one object: a prompt with a chosen and a rejected response, or with one response; then
    the lines of one prompt are pairs of each other. Without an input the reference answers the demo's prompts, four
    times each. The kept precision of embeddings, norms and heads is bfloat16.

    Args:
        reward_model: One-label sequence classifier: folder or hub id.
        reference: Causal language model: folder or hub id.
        input: JSONL file.
        json: Where the figures go.
        plot: Where the picture goes (png, svg or pdf).
        precisions: Among bfloat16, fp8, int8, nf4; what the device cannot do is left out, with the reason.
        baseline: What the others are compared with.
        rows: Responses at most.
        batch_size: Rows of one forward pass.
        prompt_key: Key of the prompt in each line: a string, or a list of chat messages.
        chat: Render prompts that are strings with the chat template too.
        eos: Append the end token to each response that has none, as the models saw it in training.
        max_new_tokens: Of a response, where the reference answers itself.
        device: Default: cuda where there is one, else cpu.
        packing: Score rows without padding (auto: where model and device allow).
        compile: Compile scoring by decoder layer; auto is on for CUDA.
        min_seconds: How long each timing lasts at least.
    """

    reward_model: str | None = None
    reference: str | None = None
    input: str | None = None
    json: str | None = None
    plot: str | None = None
    precisions: list[str] = field(default_factory=lambda: ["bfloat16", "fp8", "int8", "nf4"])
    baseline: Literal["float32", "bfloat16"] = "float32"
    rows: int = 4096
    batch_size: int = 512
    prompt_key: str = "prompt"
    chat: bool = False
    eos: bool = True
    max_new_tokens: int = 32
    device: str | None = None
    packing: bool | Literal["auto"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    min_seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.reward_model is None and self.reference is None:
            raise ValueError("reward_model: give a reward_model, a reference or both; got neither")
        if self.input is None and self.reference is None:
            raise ValueError("input: must be given where there is no reference to answer the demo's prompts")
        known = ("bfloat16", "fp8", "int8", "nf4")
        for precision in self.precisions:
            if precision not in known:
                raise ValueError(f"precisions: must be among {', '.join(known)}, got {precision!r}")
        for name in ("rows", "batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
