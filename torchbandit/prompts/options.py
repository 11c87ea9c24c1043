"""How a row becomes a prompt: what a PromptSet's `**options` are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

LastTurn = Literal["continue", "drop"]
Overlong = Literal["error", "drop", "cut"]
OnBadRow = Literal["error", "skip"]


@dataclass(frozen=True)
class PromptOptions:
    """How rows become prompts.

    Args:
        chat: strings go through the chat template too, each as a user message; lists of messages always do.
        prompt_template: makes the prompt of a row's columns, as `"Q: {question}\\nA:"`; `prompt_key` is not read then.
        system_prompt: put in front of each chat that has none of its own.
        chat_template: a Jinja file, or the template itself; None takes the tokenizer's.
        chat_template_kwargs: variables of the template, as `{"enable_thinking": False}`.
        last_turn: what to do with a chat whose last message is the assistant's. "continue": the response goes on with
            it. "drop": it is an answer, and is taken off. None: continued in a column whose name has "prompt" in it
            (and in `from_texts`); in any other, as `messages`, where it may well be the answer, an error.
        overlong: what to do with a prompt of more than `max_length` tokens: "error", "drop" the row, or "cut" it to
            its last tokens (and its BOS). None: a text is cut, a chat, which would begin in the middle of a turn, is
            an error.
        on_bad_row: a row whose prompt is missing, null, empty or of another kind is an "error", or is left out with
            "skip", and counted.
        rendered_at: seconds since 1970 that templates take for now; None is the time of the call.
    Raises:
        ValueError: an option that has no meaning.
    """

    chat: bool = False
    prompt_template: str | None = None
    system_prompt: str | None = None
    chat_template: str | Path | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    last_turn: LastTurn | None = None
    overlong: Overlong | None = None
    on_bad_row: OnBadRow = "error"
    rendered_at: int | None = None

    def __post_init__(self) -> None:
        for name, kind in (("last_turn", LastTurn), ("overlong", Overlong), ("on_bad_row", OnBadRow)):
            known, given = get_args(kind), getattr(self, name)
            if given not in known and (given is not None or name == "on_bad_row"):
                raise ValueError(f"{name}: must be {' or '.join(known)}, got {given!r}")
        if not isinstance(self.chat_template_kwargs, Mapping):
            raise ValueError(
                f'chat_template_kwargs: must be a mapping like {{"enable_thinking": false}}, got '
                f"{self.chat_template_kwargs!r}"
            )

    def template(self) -> str | None:
        """The text of `chat_template`.

        Raises:
            ValueError: it is neither a template nor a file that can be read.
        """
        given = self.chat_template
        if given is None or (isinstance(given, str) and ("{{" in given or "{%" in given)):
            return given
        try:
            return Path(given).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"chat_template: must be a Jinja template or a file with one, got {str(given)!r} "
                f"({getattr(error, 'strerror', None) or 'not UTF-8'})"
            ) from error
