"""Operators' commands: each becomes an event and one acknowledgement, or a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from appliance.config import Config
from appliance.contract import Message
from appliance.core.types import Command, Refusal, Verb
from appliance.drivers.commands import WAITING_COMMANDS, CommandIntake
from appliance.drivers.outbox import Note

TOPIC = "coe/v1/plant/box/box1/cmd/"


class Office:
    """What commands come to."""

    def __init__(self) -> None:
        self.told: list[Command] = []
        self.notes: list[Note] = []
        self.drained = 0
        self.reloads: list[Callable[[Refusal | None], None]] = []
        self.commands = CommandIntake(
            Config(),
            tell=self.told.append,
            drain=self._drain,
            reload=self.reloads.append,
            note=self.notes.append,
        )

    def _drain(self) -> None:
        self.drained += 1

    def hear(self, verb: str, payload: bytes, **given: Any) -> None:
        self.commands.deliver(Message(TOPIC + verb, payload, 0, given.pop("retain", False), False, 0, 1, **given))

    def said(self) -> list[tuple[str, dict[str, Any]]]:
        """Topics behind the box's name and bodies, once."""
        said = [(note.topic.removeprefix(TOPIC), json.loads(note.payload)) for note in self.notes]
        self.notes.clear()
        return said


def test_a_command_is_told_and_acknowledged_when_it_is_done() -> None:
    office = Office()
    office.hear("load", b'{"expert": "a", "id": "x7"}')
    (command,) = office.told
    assert (command.verb, command.expert, office.notes) == (Verb.LOAD, "a", [])
    for _ in range(2):  # whatever happens, once
        office.commands.acknowledge(command.number, None)
    ((topic, body),) = office.said()
    assert body.pop("at")
    assert topic == "load/ack"
    assert body == {
        "schema_version": 1,
        "id": "x7",
        "verb": "load",
        "expert": "a",
        "ok": True,
        "reason": None,
        "detail": None,
        "box": "box1",
    }


def test_a_refusal_says_why_on_the_response_topic_too() -> None:
    office = Office()
    office.hear("evict", b'{"expert": "a"}', response_topic="mine/7", correlation=b"seven")
    office.commands.acknowledge(office.told[0].number, Refusal("in-use", "a batch of a runs on cpu"))
    acknowledged, replied = office.notes
    assert (replied.topic, replied.payload, replied.correlation) == ("mine/7", acknowledged.payload, b"seven")
    body = json.loads(acknowledged.payload)
    assert (body["ok"], body["reason"], body["detail"]) == (False, "in-use", "a batch of a runs on cpu")


def test_what_cannot_be_read_or_is_retained_is_refused_at_once() -> None:
    office = Office()
    office.hear("pin", b"a")
    office.hear("pin", b'{"expert": "a"}', retain=True)
    assert [(topic, body["ok"], body["reason"]) for topic, body in office.said()] == [
        ("pin/ack", False, "command-body"),
        ("pin/ack", False, "retained"),
    ]
    assert office.told == []


def test_an_unknown_verb_is_answered_on_the_error_topic() -> None:
    office = Office()
    office.hear("\ufeff#/load", b"{}")
    ((topic, body),) = office.said()
    assert topic == "coe/v1/plant/error/command-verb"
    assert "use load, pin, unpin, evict, reinstate, reload or drain" in f"{body['what']} {body['remedy']}"


def test_draining_is_acknowledged_and_begun() -> None:
    office = Office()
    office.hear("drain", b"")
    assert [(topic, body["ok"]) for topic, body in office.said()] == [("drain/ack", True)]
    assert office.drained == 1


def test_a_reload_is_acknowledged_when_the_recipes_were_read() -> None:
    office = Office()
    for _ in range(2):
        office.hear("reload", b'{"id": "7"}')
    assert office.notes == []
    office.reloads[0](None)
    office.reloads[1](Refusal("catalog", "recipe.toml: placements.0.rect: …"))
    said = [(topic, body["id"], body["ok"], body["reason"]) for topic, body in office.said()]
    assert said == [("reload/ack", "7", True, None), ("reload/ack", "7", False, "catalog")]
    assert office.drained == 0


def test_too_many_commands_at_once_are_refused() -> None:
    office = Office()
    for _ in range(WAITING_COMMANDS + 1):
        office.hear("load", b'{"expert": "a"}')
    assert len(office.told) == WAITING_COMMANDS
    assert [body["reason"] for _, body in office.said()] == ["busy"]


def test_a_service_that_stops_says_so_to_who_waits() -> None:
    office = Office()
    office.hear("load", b'{"expert": "a"}')
    office.commands.stop()
    office.hear("evict", b'{"expert": "a"}')
    assert [(topic, body["reason"]) for topic, body in office.said()] == [
        ("load/ack", "stopping"),
        ("evict/ack", "stopping"),
    ]
