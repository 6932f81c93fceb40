"""Writes the TOML that this package makes: the standard library only reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

Value = object


def dumps(document: Mapping[str, Value]) -> str:
    """A document of strings, numbers, booleans, lists, tables and lists of tables. A value of None is left out."""
    return "\n".join(_table(document, ())).strip() + "\n"


def _table(table: Mapping[str, Value], path: tuple[str, ...]) -> list[str]:
    """Plain values first, then the tables below, as TOML demands."""
    lines = [
        f"{_key(key)} = {_value(value)}" for key, value in table.items() if value is not None and not _is_nested(value)
    ]
    for key, value in table.items():
        below = (*path, key)
        title = ".".join(_key(part) for part in below)
        if isinstance(value, Mapping):
            lines += ["", f"[{title}]", *_table(value, below)]
        elif _is_nested(value):
            assert isinstance(value, Sequence)
            for row in value:
                lines += ["", f"[[{title}]]", *_table(row, below)]
    return lines


def _is_nested(value: Value) -> bool:
    """Tables, and lists of tables at the head of a line; conditions of an edge stay inline."""
    if isinstance(value, Mapping):
        return True
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _value(value: Value) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return _string(value)
        case int() | float():
            return repr(value)
        case Mapping():
            inner = ", ".join(f"{_key(key)} = {_value(one)}" for key, one in value.items() if one is not None)
            return f"{{ {inner} }}"
        case Sequence():
            return f"[{', '.join(_value(one) for one in value)}]"
        case _:
            raise TypeError(f"TOML has no {type(value).__name__}")


def _key(key: str) -> str:
    is_bare = key != "" and all(letter.isascii() and (letter.isalnum() or letter in "-_") for letter in key)
    return key if is_bare else _string(key)


def _string(text: str) -> str:
    """JSON's escapes are TOML's, but for DEL, which TOML wants escaped too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
