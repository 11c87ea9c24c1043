"""Chats to text, by the tokenizer's chat template or another one."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from torchbandit.prompts.options import PromptOptions
from torchbandit.prompts.records import Records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OURS = ("tools", "messages", "conversation", "chat_template", "tokenize", "add_generation_prompt",
        "continue_final_message", "return_dict", "strftime_now")  # fmt: skip
"""Variables of a template, and arguments beside them, that are set here."""


_NOW = re.compile(r"""\bstrftime_now\(\s*(['"])(.*?)\1\s*\)""")
"""A template's question for the time, as all write it."""


class Chats:
    """Renders those prompts of `records` that are chats.

    Attributes:
        is_chat: whether each prompt goes through the template.
        rendered_at: the time that the template is told, in seconds since 1970; None where it asks for none.
    Raises:
        ValueError: there is no template; an option is of chats, and there are none; a last turn may be an answer.
    """

    def __init__(self, records: Records, tokenizer: PreTrainedTokenizerBase, options: PromptOptions) -> None:
        self.records, self.tokenizer, self.options = records, tokenizer, options
        self.is_chat = [options.chat or not isinstance(prompt, str) for prompt in records.prompts]
        self.template = options.template()
        self.rendered_at: int | None = None
        if not any(self.is_chat):
            self._refuse_unused()
            return
        first = records.places[self.is_chat.index(True)]
        if not (self.template or getattr(tokenizer, "chat_template", None)):
            raise ValueError(
                f"{first}: is to be rendered by the tokenizer's chat template, and the tokenizer has none; set "
                "tokenizer.chat_template, pass chat_template, or give plain texts with chat=False"
            )
        self._check_last_turns()
        tools = next((tool for i in range(len(records.prompts)) if (tool := self._tools(i))), None)
        used = tokenizer.get_chat_template(self.template, tools)
        for name in options.chat_template_kwargs:
            if name in OURS or not re.search(rf"\b{re.escape(name)}\b", used):
                why = "is set by other means" if name in OURS else "the template reads no variable of that name"
                raise ValueError(f"chat_template_kwargs: {name!r}: {why}; leave it out, or pass another chat_template")
        if _NOW.search(used):
            now = datetime.now().timestamp() if options.rendered_at is None else options.rendered_at
            self.rendered_at = int(now)
        if tools is not None and not re.search(r"\btools\b", used):
            warnings.warn("tools: the chat template reads no tools, so the column of that name is not rendered",
                          stacklevel=5)  # fmt: skip

    def render(self, i: int) -> str:
        """The text of prompt i, which is a chat.

        Raises:
            ValueError: names the place of the prompt, and what the template says against it.
        """
        prompt, place = self.records.prompts[i], self.records.places[i]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        while self.options.last_turn == "drop" and messages[-1]["role"] == "assistant":
            messages.pop()
        if self.options.system_prompt is not None and messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": self.options.system_prompt})
        prefilled = messages[-1]["role"] == "assistant"
        if prefilled and messages[-1].get("content") == "":  # the beginning of an answer that has not begun
            messages.pop()
            prefilled = False
        tools, template = self._tools(i), self.template
        if self.rendered_at is not None:
            # As text, since a template takes no functions from outside.
            now = datetime.fromtimestamp(self.rendered_at)
            used = self.tokenizer.get_chat_template(self.template, tools)
            template = _NOW.sub(lambda call: json.dumps(now.strftime(call[2])), used)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=template, tokenize=False,
                    add_generation_prompt=not prefilled, continue_final_message=prefilled,
                    **self.options.chat_template_kwargs,
                )
            )  # fmt: skip
        except Exception as error:  # a template raises what it likes: of jinja2, TypeError, KeyError
            raise ValueError(f"{place}: the tokenizer's chat template cannot render this prompt: {error}") from error

    def _tools(self, i: int) -> list[Any] | None:
        """The row's tools: a list of JSON schemas, or its JSON text (which Parquet keeps whole)."""
        column = self.records.columns.get("tools")
        given = column[i] if isinstance(column, list) and self.is_chat[i] else None
        if isinstance(given, str):
            try:
                given = json.loads(given) if given.strip() else None
            except ValueError:
                return None
        if not isinstance(given, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in given):
            return None  # a column that only bears the name
        return [_without_none(tool) for tool in given] or None

    def _check_last_turns(self) -> None:
        key = self.records.key
        if self.options.last_turn is not None or key is None or "prompt" in key.lower():
            return
        answered = [
            self.records.places[i]
            for i, prompt in enumerate(self.records.prompts)
            if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant"
        ]
        if answered:
            raise ValueError(
                f"{answered[0]}: the chat under {key!r} ends with a turn of the assistant (so do {len(answered)} of "
                f'{len(self.records.prompts)}): pass last_turn="drop" (--last-turn drop) to take that answer off, or '
                'last_turn="continue" if it is the beginning of an answer that the response goes on with'
            )

    def _refuse_unused(self) -> None:
        given = {
            "system_prompt": self.options.system_prompt,
            "chat_template": self.template,
            "chat_template_kwargs": dict(self.options.chat_template_kwargs) or None,
            "last_turn": self.options.last_turn,
        }
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name}: is of chats, and the prompts are plain strings; add chat=True, or drop it")


def _without_none(value: Any) -> Any:
    """Arrow gives every table of a column all keys of all rows, with None for those that it had not."""
    if isinstance(value, Mapping):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, list) else value
