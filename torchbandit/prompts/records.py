"""Rows of files and datasets to prompts and the columns that travel with them."""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchbandit.prompts.options import PromptOptions
from torchbandit.read import Row, check_text, shown

Columns = Mapping[str, Sequence[Any] | Tensor]
SHOWN = 5
"""Bad rows that a message names."""


@dataclass(frozen=True)
class Records:
    """N prompts and their columns.

    Args:
        prompts: strings, or lists of messages.
        columns: name -> N values as they stand in the source; None where a row has no such value.
        places: what a user knows each by: `prompts.jsonl:7`, `texts[6]`.
        key: of the column that the prompts stood in; None where they were handed over as prompts.
        num_skipped: rows that were left out, for they had no prompt that could be used.
    """

    prompts: list[Any]
    columns: Columns
    places: list[str]
    key: str | None = None
    num_skipped: int = 0

    def take(self, rows: Sequence[int]) -> Records:
        """Some of the rows."""
        if len(rows) == len(self.prompts):
            return self
        columns = {
            name: column[list(rows)] if isinstance(column, Tensor) else [column[i] for i in rows]
            for name, column in self.columns.items()
        }
        return Records([self.prompts[i] for i in rows], columns, [self.places[i] for i in rows], self.key,
                       self.num_skipped)  # fmt: skip


def from_texts(texts: list[Any], columns: Columns, options: PromptOptions) -> Records:
    """Prompts that were handed over as such; `{prompt}` stands for them in a `prompt_template`."""
    places = [f"texts[{i}]" for i in range(len(texts))]
    if options.prompt_template is not None:
        fits = [
            name for name, column in columns.items() if not isinstance(column, Tensor) and len(column) == len(texts)
        ]
        rows = [Row(p, {name: columns[name][i] for name in fits} | {"prompt": texts[i]}) for i, p in enumerate(places)]
        texts = [_filled(options.prompt_template, row) for row in rows]
    return usable(Records(texts, columns, places), options)


def from_rows(
    rows: Iterable[Row], source: str, prompt_key: str, columns: Sequence[str] | None, options: PromptOptions
) -> Records:
    """Turn rows into prompts and columns.

    Args:
        source: the file or dataset, for messages.
        columns: keys that travel with the prompt; None takes all, and what a row lacks is None.
    Raises:
        ValueError: names the rows without a prompt, or the column that no row has.
    """
    kept = list(rows)
    if not kept:
        raise ValueError(f'{source}: must hold at least one row like {{"{prompt_key}": "..."}}, got none')
    template = options.prompt_template
    names = dict.fromkeys(columns if columns is not None else (name for row in kept for name in row.values))
    if template is None:
        names.pop(prompt_key, None)
    for name in names if columns is not None else ():
        if not any(name in row.values for row in kept):
            raise ValueError(f"{source}: must have a column {name!r}, got {list(kept[0].values)}; see columns")
    if template is None:
        prompts = [row.values.get(prompt_key, _Missing(prompt_key, list(row.values))) for row in kept]
    else:
        prompts = [_filled(template, row) for row in kept]
    table = {name: [row.values.get(name) for row in kept] for name in names}
    found = Records(prompts, table, [row.where for row in kept], prompt_key if template is None else None)
    return usable(found, options)


def usable(records: Records, options: PromptOptions) -> Records:
    """The records with a prompt that can be used.

    Raises:
        ValueError: names those without one, or there is none left (with `on_bad_row="skip"`).
    """
    good: list[int] = []
    bad: list[str] = []
    for i, prompt in enumerate(records.prompts):
        why = _problem(prompt, records.places[i], options)
        if why is None:
            good.append(i)
        else:
            bad.append(f"{records.places[i]}: {why}")
    if not bad:
        return records
    if len(bad) == len(records.prompts) > 1 and all(isinstance(prompt, _Missing) for prompt in records.prompts):
        raise ValueError(f"{bad[0]}, as all {len(bad)} rows; see prompt_key")
    told = "; ".join(bad[:SHOWN]) + (f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else "")
    if options.on_bad_row == "error" or not good:
        count = "" if len(bad) == 1 else f"{len(bad)} of {len(records.prompts)} rows have no prompt that can be used: "
        raise ValueError(f'{count}{told}; see prompt_key, mend the rows, or leave them out with on_bad_row="skip"')
    left = records.take(good)
    return Records(left.prompts, left.columns, left.places, left.key, len(bad))


class _Missing:
    """Stands for the prompt of a row that lacks the key."""

    def __init__(self, key: str, found: list[str]) -> None:
        self.why = f"must have the key {key!r}, got {found}"


def _problem(prompt: Any, where: str, options: PromptOptions) -> str | None:
    """What is wrong with a prompt, if anything is."""
    if isinstance(prompt, _Missing):
        return prompt.why
    if prompt is None:
        return "the prompt must be a text, got null"
    is_chat = isinstance(prompt, list) and all(isinstance(m, Mapping) and "role" in m for m in prompt)
    if not is_chat and not isinstance(prompt, str):
        kind = 'must be a string, or a list of messages {"role": ..., "content": ...}'
        return f"the prompt {kind}, got {type(prompt).__name__} {shown(prompt)}"
    if is_chat and prompt:
        mute = [m for m in prompt if m.get("content") is None and not m.get("tool_calls")]
        if mute:
            return f"a message of the prompt must have content, got none in that of the {mute[0]['role']}"
        if options.last_turn == "drop" and all(m["role"] == "assistant" for m in prompt):
            return "the prompt must hold more than the assistant's turns, which last_turn=drop takes off"
    if not prompt or (is_chat and not any(m.get("content") or m.get("tool_calls") for m in prompt)):
        return f"the prompt must hold at least one token, got {shown(prompt)!r}, which is empty"
    try:
        check_text(prompt, where, "prompt")
    except ValueError as error:
        return str(error).removeprefix(f"{where}: ")
    return None


def _filled(template: str, row: Row) -> str | None:
    """A prompt template with the values of a row; None where one of them is null.

    Raises:
        ValueError: the template cannot be read, names a column that the row lacks, or one of lists or tables.
    """
    parts: list[str] = []
    try:
        for literal, name, spec, conversion in string.Formatter().parse(template):
            parts.append(literal)
            if name is None:
                continue
            value, _ = string.Formatter().get_field(name, (), row.values)
            if value is None:
                return None
            if isinstance(value, (list, dict)) and not conversion:
                raise ValueError(f"{name!r} is a {type(value).__name__}; name a part of it, as {{{name}[0]}}")
            parts.append(format(repr(value) if conversion == "r" else value, spec or ""))
    except (KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{row.where}: prompt_template names {error.args[0]!r}, and the row has {list(row.values)}; write {{{{ for "
            "a brace that is text"
        ) from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{row.where}: prompt_template {template!r} cannot be filled: {error}") from error
    return "".join(parts)
