"""Writes docs/configuration.md from the descriptions in appliance/config.py: `make docs`.

tests/test_docs.py fails when the page is not what this would write.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo

from appliance.config import Config

PAGE = Path(__file__).parent / "configuration.md"

INTRODUCTION = """\
# Configuration

One TOML file, `appliance.toml`, read once at start. The service takes it from `/etc/appliance/appliance.toml`; every
command takes another with `--config`. A key that is not on this page is an error that names its line. Sizes are
numbers of bytes, or texts such as `"512MB"` and `"2GiB"`.
[An example](../systemd/appliance.toml) is installed with the service.

<!-- Made from appliance/config.py by `make docs`; edit the descriptions there. -->
"""


def configuration_page() -> str:
    """The whole of docs/configuration.md."""
    return "\n".join([INTRODUCTION, *_sections(Config)])


def _sections(config: type[BaseModel]) -> Iterator[str]:
    for name, field in config.model_fields.items():
        section, title = field.annotation, name
        if get_origin(section) is Mapping:
            section, title = get_args(section)[1], f"{name}.<name>"
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        yield f"## [{title}]\n\n{section.__doc__}\n"
        yield "| key | type | default | meaning |\n|---|---|---|---|"
        yield from (_row(key, inner) for key, inner in section.model_fields.items())
        yield ""


def _row(key: str, field: FieldInfo) -> str:
    cells = (f"`{key}`", _kind(field.annotation, field.metadata), _default(field.default), field.description or "")
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _kind(annotation: Any, metadata: list[Any]) -> str:
    """A type in the words of someone who edits the file."""
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_kind(part, metadata) for part in get_args(annotation) if part is not NoneType)
    if get_origin(annotation) is tuple:
        return f"list of {_kind(get_args(annotation)[0], metadata)}"
    if get_origin(annotation) is Literal:
        return ", ".join(f'`"{choice}"`' for choice in get_args(annotation))
    if hasattr(annotation, "__metadata__"):
        return _kind(annotation.__origin__, [*metadata, *annotation.__metadata__])
    names = {bool: "true or false", int: "whole number", float: "number", ByteSize: "size", Path: "path", str: "text"}
    return names[annotation] + _range(metadata)


def _range(metadata: list[Any]) -> str:
    flat = [inner for outer in metadata for inner in getattr(outer, "metadata", [outer])]
    facts = {
        name: value
        for constraint in flat
        for name in ("ge", "gt", "le", "lt", "pattern")
        if (value := getattr(constraint, name, None)) is not None
    }
    if "ge" in facts and "le" in facts:
        return f", {facts['ge']} to {facts['le']}"
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than", "pattern": "matching"}
    return "".join(f", {words[name]} {_code(value)}" for name, value in facts.items())


def _code(value: object) -> str:
    return f"`{value}`" if isinstance(value, str) else str(value)


def _default(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return f"`{str(value).lower()}`"
        case ByteSize():
            return f'`"{value.human_readable(decimal=True, separator="").replace(".0", "")}"`'
        case ():
            return "`[]`"
        case str() | Path():
            return f'`"{value}"`'
        case _:
            return f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(configuration_page(), "utf-8")
    print(f"wrote {PAGE.relative_to(Path.cwd()) if PAGE.is_relative_to(Path.cwd()) else PAGE}")
