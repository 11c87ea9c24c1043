"""One field per option of `torchbandit score`; the same names are the keys of `--config`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass
class ScoreOptions:
    """Score the prompt/response pairs of a file: JSONL, JSON, CSV, TSV, Parquet or Arrow.

    Each row comes back in its place, as a line of JSON, with three numbers more: `reward_model`, the reward model's
    score; `log_prob`, the log-probability of the response under the policy, or under the reference where no policy is
    given; `kl`, the log-probability under the policy minus that under the reference, in nats (a one-sample estimate
    of their KL, which may be negative). A number is null where its model was not given, and where there is no honest
    score: an empty prompt or response, more tokens than the model's context, a result that is not finite.

    Prompt and response are tokenised apart, as in training, and each model reads them with its own tokenizer.

    Args:
        input: File, folder, glob or dataset with a prompt and a response a row; - for stdin.
        output: Where the lines go, with their scores; overwritten when all are scored. - for stdout.
        reward_model: One-label sequence classifier: folder or hub id.
        reference: Causal language model: folder or hub id.
        policy: Causal language model with the reference's tokenizer.
        prompt_key: Key of the prompt in each line: a string, or a list of chat messages.
        response_key: Key of the response in each line.
        chat: Render prompts that are strings with the chat template too.
        system_prompt: Put in front of each chat that has none of its own.
        chat_template: Jinja file, in place of the tokenizer's template.
        chat_template_kwargs: Variables of the template, as JSON.
        last_turn: Of a chat that ends with the assistant: continue it, or drop it as an answer.
        eos: Append the end token to each response that has none, as the models saw it in training.
        batch_size: Rows of one forward pass.
        device: Default: cuda where there is one, else cpu.
        dtype: Of the weights: auto is bfloat16 on cuda and float32 on cpu.
        quantization: Of all models: nf4, int8 or fp8.
        packing: Score rows without padding (auto: where model and device allow).
    """

    input: str
    output: str
    reward_model: str | None = None
    reference: str | None = None
    policy: str | None = None
    prompt_key: str = "prompt"
    response_key: str = "response"
    chat: bool = False
    system_prompt: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    last_turn: Literal["continue", "drop"] | None = None
    eos: bool = True
    batch_size: int = 32
    device: str | None = None
    dtype: str = "auto"
    quantization: Literal["nf4", "int8", "fp8"] | None = None
    packing: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.reward_model is None and self.reference is None and self.policy is None:
            raise ValueError("reward_model: give a reward_model, a reference or a policy; got none of them")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: must be at least 1, got {self.batch_size}")
        if self.input != "-" and Path(self.input).resolve() == Path(self.output).resolve():
            raise ValueError(f"output: must be another file than the input, got {self.output} for both")
