"""Config files: one `key: value` an option."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_origin

import yaml
from jsonargparse import ArgumentParser, get_loader

from torchbandit.commands.command import Command, UsageError
from torchbandit.commands.fields import Option, show, show_value
from torchbandit.commands.layout import Layout, check_known
from torchbandit.commands.parser import parse


def read_table(path: str) -> dict[str, Any]:
    """The keys and values of a YAML file, as they stand there; dashes in keys are underscores.

    Raises:
        ValueError: it cannot be read, is no YAML, is no mapping, or has a key twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config: {path} cannot be read: {getattr(error, 'strerror', error)}") from error
    try:
        table = get_loader("yaml")(text) if text.strip() else {}
        root = yaml.compose(text, yaml.SafeLoader)
    except Exception as error:
        raise UsageError(f"{path}: must be YAML; {' '.join(str(error).split())}") from error
    if table is None:  # comments alone
        return {}
    if not isinstance(table, dict):
        raise UsageError(f"{path}: must hold one option a line, `key: value`, got {type(table).__name__}")
    keys = [str(key.value).replace("-", "_") for key, _ in root.value] if isinstance(root, yaml.MappingNode) else []
    for key in keys:
        if keys.count(key) > 1:  # a loader takes the last one in silence
            raise UsageError(f"{path}: {key} stands there {keys.count(key)} times; keep one")
    return {str(key).replace("-", "_"): value for key, value in table.items()}


def check_table(
    path: str, table: dict[str, Any], command: Command, layout: Layout, parser: ArgumentParser
) -> dict[str, Any]:
    """The values, each of its option's type; ValueError for what is no option, or of another type."""
    options = layout.options
    values = dict(table)
    for key, value in table.items():
        try:
            check_known(command, layout, key, key)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        hint = options[key].hint
        if hint is bool and not isinstance(value, bool) and str(value).lower() not in ("true", "false", "yes", "no"):
            raise UsageError(f"{path}: {key}: must be {show(hint)}, got {show_value(value)}")
        if get_origin(hint) is list and value is not None and not isinstance(value, list):
            values[key] = [value]
    return parse(lambda: parser.parse_object(values, defaults=False), options, f"{path}: ")


def dump(layout: Layout, values: dict[str, Any]) -> str:
    """YAML of all options, in the order of the help, its headings as comments."""
    lines = []
    for group in layout.groups:
        if group.title:
            lines.append(f"# {group.title}\n")
        lines += [_line(option, values[option.name]) for option in group.options]
    return "".join(lines)


def _line(option: Option, value: Any) -> str:
    return f"{_inline(option.name)}: {_inline(list(value) if isinstance(value, tuple) else value)}\n"


def _inline(value: Any) -> str:
    text: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf
    )
    return text.removesuffix("\n...\n").removesuffix("\n")


class _Dumper(yaml.SafeDumper):
    """Quotes text that would be read as something else; our reader knows more numbers than this writer (1e-6)."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        same = get_loader("yaml")(text) == text
    except Exception:
        same = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if same else '"')


_Dumper.add_representer(str, _text)
