"""Alarms of the box: one retained message each, told when something changed, taken back when it is over."""

from __future__ import annotations

import json

import pytest

from appliance.config import Config
from appliance.drivers.alarms import Alarm, Alarms
from appliance.drivers.outbox import Note

TOPIC = "coe/v1/plant/box/box1/alarm/"


def test_an_alarm_is_told_once_and_taken_back_once() -> None:
    told, alarms = _alarms()
    for detail in ({"experts": {"e1": "3 off"}}, {"experts": {"e1": "3 off"}}, None, None):
        alarms.set(Alarm.EXPERTS, detail)
    assert [(note.topic, note.retain, bool(note.payload)) for note in told] == [
        (TOPIC + "experts", True, True),
        (TOPIC + "experts", True, False),
    ]
    body = json.loads(told[0].payload)
    assert (body["alarm"], body["experts"]) == ("experts", {"e1": "3 off"})


def test_an_alarm_that_changes_is_told_again() -> None:
    told, alarms = _alarms()
    alarms.set(Alarm.EXPERTS, {"experts": {"e1": ""}})
    alarms.set(Alarm.EXPERTS, {"experts": {"e1": "", "e2": ""}})
    assert len(json.loads(told[-1].payload)["experts"]) == 2
    assert alarms.raised == (Alarm.EXPERTS,)


def test_a_new_link_hears_what_is_raised_and_forgets_what_an_earlier_process_raised() -> None:
    told, alarms = _alarms()
    alarms.set(Alarm.GPU, {"detail": "no driver"})
    told.clear()
    alarms.tell_all()
    assert {note.topic.removeprefix(TOPIC): bool(note.payload) for note in told} == {
        alarm: alarm is Alarm.GPU for alarm in Alarm
    }


def test_an_alarm_is_logged_for_who_has_no_broker(caplog: pytest.LogCaptureFixture) -> None:
    _, alarms = _alarms()
    alarms.set(Alarm.MEMORY_DRIFT, {"drift": 0.1})
    alarms.set(Alarm.MEMORY_DRIFT, None)
    assert [record.message for record in caplog.records] == [
        'alarm name=memory-drift {"drift": 0.1}',
        "alarm_lowered name=memory-drift",
    ]


def _alarms() -> tuple[list[Note], Alarms]:
    told: list[Note] = []
    return told, Alarms(Config(), told.append)
