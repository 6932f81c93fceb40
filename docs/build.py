"""Writes what is made from the code: `make docs`.

The page of settings comes from appliance/config.py; the topics as AsyncAPI, and the schemas of message bodies, from
appliance/contract.py. tests/test_docs.py fails when a file is not what this would write.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo

from appliance import __version__, contract
from appliance.config import Config
from appliance.contract import (
    DRAIN,
    RELOAD,
    AcknowledgementBody,
    Address,
    BoardBody,
    CommandBody,
    ErrorBody,
    VerdictBody,
)
from appliance.core.types import BoardName, Verb

FOLDER = Path(__file__).parent
BODIES: Mapping[str, type[BaseModel]] = {
    "verdict": VerdictBody,
    "board": BoardBody,
    "error": ErrorBody,
    "command": CommandBody,
    "acknowledgement": AcknowledgementBody,
}

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


def schemas() -> dict[str, str]:
    """The bodies of messages as JSON Schema (draft 2020-12), by file name. What the box sends has all its fields."""
    return {f"schemas/{name}.json": _json(_schema(model)) for name, model in BODIES.items()}


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    mode: Literal["validation", "serialization"] = "validation" if model is CommandBody else "serialization"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema(mode=mode)}


PARAMETERS = {
    "root": "First topic level (mqtt.root).",
    "site": "The site (box.site).",
    "box": "The box (box.name).",
    "line": "The publishing line: 1 to 64 of A-Z a-z 0-9 . _ -, beginning with a letter or digit.",
    "product": "A product with a recipe, or - for none.",
    "board": "A serial number, or - for none.",
    "part": "A placement of the recipe, or, without product, a component type; _board is the whole board.",
    "reason": "Why the message was refused, in one word.",
    "alarm": "What is wrong.",
}


def asyncapi() -> str:
    """The topics as an AsyncAPI 3 document, from the box's point of view."""
    address = Address("{line}", "{product}", "{board}", "{part}")
    one, config = address.below, Config()
    verbs = [*Verb, RELOAD, DRAIN]
    status, alarm = contract.status_topic(config), contract.alarm_topic(config, "{alarm}")
    stats = status.removesuffix("status") + "{numbers}"
    channels = {
        "pictures": _channel(config.topic(*one("infer")), "picture"),
        "verdicts": _channel(config.topic(*one("result")), "verdict", "board"),
        "boards": _channel(contract.board_topic(config, BoardName("{line}", "{product}", "{board}")), "board"),
        "errors": _channel(contract.error_topic(config, "{reason}"), "error"),
        "status": _channel(status, "status"),
        "numbers": _channel(stats, "numbers", numbers={"enum": ["info", "stats", "cache"]}),
        "alarms": _channel(alarm, "alarm"),
        "commands": _channel(contract.command_topic(config, "{verb}"), "command", verb={"enum": verbs}),
        "acknowledgements": _channel(
            contract.acknowledgement_topic(config, "{verb}"), "acknowledgement", verb={"enum": verbs}
        ),
    }
    heard = {"pictures": "verdicts", "commands": "acknowledgements"}
    retained = {"bindings": {"mqtt": {"qos": 1, "retain": True}}}
    return _json(
        {
            "asyncapi": "3.0.0",
            "info": {
                "title": "The CoE appliance",
                "version": __version__,
                "description": "Topics and bodies, over MQTT 3.1.1 or 5. docs/mqtt.md says what they mean.",
            },
            "defaultContentType": "application/json",
            "channels": channels,
            "operations": {
                name: {
                    "action": "receive" if name in heard else "send",
                    "channel": _to("channels", name),
                    **({"reply": {"channel": _to("channels", heard[name])}} if name in heard else {}),
                    **(retained if name in ("status", "alarms") else {}),
                }
                for name in channels
            },
            "components": {
                "parameters": {name: {"description": meaning} for name, meaning in PARAMETERS.items()},
                "messages": _messages(),
            },
        }
    )


def _channel(topic: str, *messages: str, **parameters: Mapping[str, object]) -> dict[str, object]:
    """A topic of the default site and box, with their names made parameters too."""
    pattern = topic.replace("coe/v1/plant/", "{root}/v1/{site}/").replace("/box1/", "/{box}/")
    shared = {name: _to("components", "parameters", name) for name in PARAMETERS if f"{{{name}}}" in pattern}
    return {
        "address": pattern,
        "messages": {message: _to("components", "messages", message) for message in messages},
        "parameters": {**shared, **parameters},
    }


def _messages() -> dict[str, object]:
    bodies: dict[str, dict[str, object]] = {name: {"payload": {"$ref": f"schemas/{name}.json"}} for name in BODIES}
    resent = {"type": "string", "const": "true", "description": "It may have been published before (MQTT 5)."}
    bodies["verdict"]["headers"] = {"type": "object", "properties": {"resent": resent}}
    return {
        "picture": {
            "contentType": "application/octet-stream",
            "summary": "A picture as plain bytes: JPEG, PNG, BMP, TIFF, PNM or NPY. At QoS 1, not retained.",
        },
        **bodies,
        "status": {
            "contentType": "text/plain",
            "payload": {"type": "string", "enum": ["online", "draining", "stopped", "offline"]},
        },
        "numbers": {"payload": {"type": "object"}, "summary": "Counts and bytes; info is retained."},
        "alarm": {"payload": {"type": "object"}, "summary": "Empty when it is over."},
    }


def _to(*names: str) -> dict[str, str]:
    return {"$ref": "#/" + "/".join(names)}


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


def files() -> dict[str, str]:
    """Everything that is made from the code, by its place below docs/."""
    return {"configuration.md": configuration_page(), "asyncapi.json": asyncapi(), **schemas()}


if __name__ == "__main__":
    for name, text in files().items():
        (FOLDER / name).parent.mkdir(exist_ok=True)
        (FOLDER / name).write_text(text, "utf-8")
        print(f"wrote docs/{name}")
