"""The contract with cameras: which topics are addresses, what a message may ask for, what an answer says."""

from __future__ import annotations

import json
import string
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from appliance.config import Config
from appliance.contract import (
    Address,
    Message,
    Placed,
    Reply,
    Serving,
    Wish,
    board_body,
    board_topic,
    captured_at,
    check_publishable,
    deadline_seconds,
    error_body,
    error_topic,
    is_command,
    request_id,
    result_id,
    verdict_body,
)
from appliance.core.types import (
    BoardName,
    BoardOutcome,
    BoardVerdict,
    Box,
    Finding,
    Outcome,
    PartVerdict,
    Refusal,
    StandIn,
    Step,
    Verb,
    Verdict,
)
from appliance.errors import MessageError

CONFIG = Config()
ADDRESS = Address("line1", "-", "-", "resistor-0603")
TOPIC = "coe/v1/plant/infer/line1/-/-/resistor-0603"


# Topics.


def test_the_topic_of_a_picture_says_where_it_belongs() -> None:
    assert Address.parse("coe/v1/plant/infer/line1/12100003/SN-1/R17", CONFIG) == Address(
        "line1", "12100003", "SN-1", "R17"
    )


def test_product_and_board_may_be_none() -> None:
    address = Address.parse(TOPIC, CONFIG)
    assert address == ADDRESS
    assert address.result_topic(CONFIG) == "coe/v1/plant/result/line1/-/-/resistor-0603"


@pytest.mark.parametrize(
    ("levels", "reason"),
    [
        ("line1/-/-", "topic-depth"),
        ("line1/-/-/R1/more", "topic-depth"),
        ("", "topic-depth"),
        ("line1/-/-/R1/", "topic-depth"),
        ("line1//-/R1", "topic-name"),
        ("/-/-/R1", "topic-name"),
        ("-/-/-/R1", "topic-name"),
        ("line1/-/-/-", "topic-name"),
        ("line1/-/-/+", "topic-name"),
        ("line1/-/-/#", "topic-name"),
        ("+/-/-/R1", "topic-name"),
        ("line1/-/-/R1\0", "topic-name"),
        ("line1/-/-/R1\n", "topic-name"),
        ("line1/-/-/R 1", "topic-name"),
        ("line1/../-/R1", "topic-name"),
        ("line1/./-/R1", "topic-name"),
        ("line1/$SYS/-/R1", "topic-name"),
        ("line1/-/-/Wi\u0064erst\u00e4nde", "topic-name"),
        ("line1/-/-/R\ufffe", "topic-name"),
        ("line1/-/-/R\ud800", "topic-name"),
        ("line1/-/-/\u0661", "topic-name"),
        ("line1/-/-/" + "R" * 65, "topic-name"),
        ("line1/-/-/" + "R" * 65_536, "topic-name"),
        ("_board/-/-/R1", "topic-name"),
        ("line1/-/-/_Board", "topic-name"),
        ("line1/-/-/_board", "board-nameless"),
        ("line1/p1/-/_board", "board-nameless"),
        ("line1/-/SN-1/_board", "board-nameless"),
    ],
)
def test_a_topic_that_is_no_address_is_refused_with_its_reason(levels: str, reason: str) -> None:
    with pytest.raises(MessageError) as caught:
        Address.parse(f"coe/v1/plant/infer/{levels}", CONFIG)
    assert caught.value.reason == reason
    assert caught.value.remedy
    assert len(caught.value.what) < 300
    assert caught.value.what.isascii()


@pytest.mark.parametrize("topic", ["coe/v1/plant/infer", "coe/v1/other/infer/a/-/-/b", "x/v1/plant/infer/a/-/-/b", ""])
def test_a_topic_outside_our_tree_is_refused(topic: str) -> None:
    with pytest.raises(MessageError):
        Address.parse(topic, CONFIG)


@given(st.text() | st.text(alphabet="coe/v1plantinferR+#$-_.\0\n \u00e4", max_size=60))
@example("coe/v1/plant/infer/a/b/c/d")
def test_no_text_makes_parsing_fail_otherwise(topic: str) -> None:
    for candidate in (topic, f"coe/v1/plant/infer/{topic}", f"coe/v1/plant/infer/a/-/{topic}/R1"):
        try:
            address = Address.parse(candidate, CONFIG)
        except MessageError as error:
            check_publishable(error_topic(CONFIG, error.reason))
        else:
            assert address.picture_topic(CONFIG) == candidate
            check_publishable(address.result_topic(CONFIG))


NAMES = st.text(alphabet=string.ascii_letters + string.digits + "._-", min_size=1, max_size=64).filter(
    lambda name: name[0].isalnum()
)


@given(NAMES, NAMES | st.just("-"), NAMES | st.just("-"), NAMES)
def test_every_good_address_comes_back_from_its_topic(line: str, product: str, board: str, part: str) -> None:
    address = Address(line, product, board, part)
    assert Address.parse(address.picture_topic(CONFIG), CONFIG) == address


@pytest.mark.parametrize(
    "topic", ["", "a//b", "/a", "a/", "a/+/b", "a/#", "$SYS/a", "a b", "a\0", "a\n", "\u00e4", "\ud800", "a" * 513]
)
def test_what_a_broker_would_refuse_never_reaches_it(topic: str) -> None:
    with pytest.raises(MessageError, match="no topic to publish to"):
        check_publishable(topic)


# Messages.


def message(**given: object) -> Message:
    fields = {"topic": TOPIC, "payload": b"x", "qos": 1, "retain": False, "duplicate": False, "packet_id": 1}
    return Message(**{**fields, "generation": 1, **given})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "topic",
    ["my/answers", "coe/v2/answers", "coe/v1x", "answers", "camera-7/verdicts/2", "coe/v1/plant/reply/line1/job-7"],
)
def test_a_sender_may_choose_any_topic_of_its_own_for_the_reply(topic: str) -> None:
    assert Reply.wanted(message(response_topic=topic, correlation=b"7"), CONFIG) == Reply(topic, b"7")


@pytest.mark.parametrize(
    "topic",
    [
        TOPIC,
        "coe/v1",
        "coe/v1/plant/result/line1/-/-/R1",
        "coe/v1/plant/error/x",
        "coe/v1/plant/box/box1/cmd/evict",
        "coe/v1/plant/board/line1/-/-",
        "coe/v1/plant/something/else",
        "coe/v1/plant",
        "coe/v1/plant/reply",
        "coe/v1/other/reply/line1",
        "coe/v1/other/infer/a/-/-/b",
        "$SYS/broker/log",
        "$share/group/topic",
        "my/+/answers",
        "my/#",
        "my answers",
        "my/\0",
        "my/\u00e4",
        "my//answers",
        "",
        "a" * 257,
    ],
)
def test_a_hostile_response_topic_is_refused(topic: str) -> None:
    with pytest.raises(MessageError) as caught:
        Reply.wanted(message(response_topic=topic), CONFIG)
    assert caught.value.reason == "response-topic"


REPLIES = Config.model_validate({"mqtt": {"reply_prefix": "coe/v1/plant/reply"}})


def test_with_a_reply_prefix_a_sender_chooses_below_it() -> None:
    topic = "coe/v1/plant/reply/line1/job-7"
    assert Reply.wanted(message(response_topic=topic), REPLIES) == Reply(topic, None)


@pytest.mark.parametrize(
    "topic", ["my/answers", "coe/v1/plant/reply", "coe/v1/plant/replyx/a", "coe/v1/plant/reply/+", TOPIC]
)
def test_with_a_reply_prefix_every_other_topic_is_refused(topic: str) -> None:
    with pytest.raises(MessageError, match="coe/v1/plant/reply/") as caught:
        Reply.wanted(message(response_topic=topic), REPLIES)
    assert caught.value.reason == "response-topic"


@pytest.mark.parametrize("prefix", ["coe", "coe/v1", "coe/v1/plant", "coe/v1/plant/result"])
@pytest.mark.parametrize(
    "topic", ["coe/v1/plant/result/line1/-/-/R1", "coe/v1/plant/box/box1/status", "coe/v1/other/infer/a/-/-/b"]
)
def test_no_reply_prefix_opens_the_trees_of_the_boxes(prefix: str, topic: str) -> None:
    with pytest.raises(MessageError, match="is not allowed"):
        Reply.wanted(message(response_topic=topic), Config.model_validate({"mqtt": {"reply_prefix": prefix}}))


@pytest.mark.parametrize("prefix", ["", "/a", "a/", "a//b", "a/+", "#", "$SYS", "a b", "\u00e4"])
def test_a_reply_prefix_that_is_no_topic_is_refused(prefix: str) -> None:
    with pytest.raises(ValidationError):
        Config.model_validate({"mqtt": {"reply_prefix": prefix}})


def test_too_much_correlation_data_is_refused() -> None:
    assert Reply.wanted(message(response_topic="a", correlation=b"x" * 1024), CONFIG)
    with pytest.raises(MessageError, match="correlation data of 1025 bytes"):
        Reply.wanted(message(response_topic="a", correlation=b"x" * 1025), CONFIG)


def test_who_asks_for_no_reply_gets_none() -> None:
    assert Reply.wanted(message(correlation=b"x" * 5000), CONFIG) is None


def test_the_same_picture_of_the_same_part_is_the_same_question() -> None:
    assert request_id(TOPIC, b"x", {}) == request_id(TOPIC, b"x", {})
    assert len({request_id(TOPIC, b"x", {}), request_id(TOPIC, b"y", {}), request_id(TOPIC + "x", b"", {})}) == 3


def test_a_sender_may_name_its_question() -> None:
    assert request_id(TOPIC, b"x", {"request-id": "cam7:0001"}) == "cam7:0001"


@pytest.mark.parametrize("name", ["", " ", "a b", "../x", "a/b", "-a", "a\n", "\u00e4", "a" * 129, "a\0"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(MessageError) as caught:
        request_id(TOPIC, b"x", {"request-id": name})
    assert caught.value.reason == "request-id"


def test_a_deadline_and_a_time_of_capture_are_read() -> None:
    assert deadline_seconds({"deadline-ms": "250"}) == 0.25
    assert captured_at({"captured-at": "2026-01-31T08:15:00Z"}) == datetime(2026, 1, 31, 8, 15, tzinfo=UTC)
    assert captured_at({"captured-at": "2026-01-31T08:15:00"}) == datetime(2026, 1, 31, 8, 15, tzinfo=UTC)
    later = captured_at({"captured-at": "2026-01-31T10:15:00.5+02:00"})
    assert later is not None
    assert later.isoformat() == "2026-01-31T08:15:00.500000+00:00"
    assert captured_at({}) is None
    assert deadline_seconds({}) is None


@pytest.mark.parametrize("text", ["", "0", "-1", "1e3", "soon", "nan", "\u0661", "9" * 10])
def test_a_deadline_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(MessageError) as caught:
        deadline_seconds({"deadline-ms": text})
    assert caught.value.reason == "deadline-ms"


@pytest.mark.parametrize("text", ["", "yesterday", "2026-13-01", "0001-01-01T00:00:00+14:00"])
def test_a_time_of_capture_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(MessageError) as caught:
        captured_at({"captured-at": text})
    assert caught.value.reason == "captured-at"


# Commands.

COMMAND = "coe/v1/plant/box/box1/cmd/"


def order(verb: str, payload: bytes, **given: object) -> Message:
    return message(topic=COMMAND + verb, payload=payload, **given)


def test_a_command_names_its_verb_in_the_topic_and_its_expert_in_the_body() -> None:
    asked = order("pin", b'{"expert": "resistor", "id": "op:7"}', response_topic="me/7", correlation=b"x")
    assert Wish.parse(asked, CONFIG) == Wish(Verb.PIN, "resistor", "op:7", Reply("me/7", b"x"))
    assert Wish.parse(order("drain", b""), CONFIG) == Wish("drain", None, None, None)
    assert Wish.parse(order("reload", b'{"id": "7"}'), CONFIG) == Wish("reload", None, "7", None)


@pytest.mark.parametrize("topic", ["infer/a/b/c/d", "box/box2/cmd/load", "box/box1/cmd", "box/box1/status"])
def test_what_is_not_for_this_box_is_no_command(topic: str) -> None:
    assert is_command(COMMAND + "load", CONFIG)
    assert not is_command(f"coe/v1/plant/{topic}", CONFIG)


@pytest.mark.parametrize(
    ("verb", "payload", "changed", "reason"),
    [
        ("restart", b"{}", {}, "command-verb"),
        ("reload", b'{"expert": "a"}', {}, "command-body"),
        ("LOAD", b'{"expert": "a"}', {}, "command-verb"),
        ("load/ack", b'{"expert": "a"}', {}, "command-verb"),
        ("load", b'{"expert": "a"}', {"retain": True}, "retained"),
        ("load", b"", {}, "command-body"),
        ("load", b"resistor", {}, "command-body"),
        ("load", b"\xff", {}, "command-body"),
        ("load", b"[1]", {}, "command-body"),
        ("load", b'{"expert": "../a"}', {}, "command-body"),
        ("load", b'{"expert": "a", "force": true}', {}, "command-body"),
        ("load", b'{"expert": "a", "id": "' + 129 * b"x" + b'"}', {}, "command-body"),
        ("load", b'{"expert": "a"}' + 2000 * b" ", {}, "command-body"),
        ("drain", b'{"expert": "a"}', {}, "command-body"),
        ("load", b'{"expert": "a"}', {"response_topic": COMMAND + "drain"}, "response-topic"),
    ],
)
def test_a_command_that_is_none_is_refused(verb: str, payload: bytes, changed: dict[str, object], reason: str) -> None:
    with pytest.raises(MessageError) as caught:
        Wish.parse(order(verb, payload, **changed), CONFIG)
    assert caught.value.reason == reason


@given(st.binary(max_size=200))
def test_no_payload_makes_reading_a_command_fail_otherwise(payload: bytes) -> None:
    with suppress(MessageError):
        Wish.parse(order("load", payload), CONFIG)


# Bodies.

VERDICT = Verdict(
    "q1",
    Outcome.FAIL,
    (
        Step("resistor", (Finding("tilted", 0.98, True, Box(1, 2, 3, 4)),), "cpu-0", 0.0123),
        Step("solder", (Finding("good", 0.9, False),), "cuda-1", 0.002),
    ),
    0.5,
)
NOW = datetime(2026, 1, 31, 8, 15, tzinfo=UTC)


SERVING = {
    ("cpu-0", "resistor"): Serving("1.2", "int8", "12" * 32, 0.5, "cpu"),
    ("cuda-1", "solder"): Serving("3", "full", "34" * 32, 0.25, "cuda:0"),
}


def body_of(verdict: Verdict) -> bytes:
    return verdict_body(
        verdict,
        address=ADDRESS,
        component="resistor-0603",
        picture_sha256="ab" * 32,
        captured_at=NOW,
        out_of_order=True,
        serving=SERVING,
        site="plant",
        box="box1",
        finished_at=NOW,
    )


def test_a_verdict_says_who_stood_in_for_whom() -> None:
    degraded = replace(VERDICT, stand_ins=(StandIn("solder-2", "solder", "crashes"),))
    assert json.loads(body_of(degraded))["degraded"] == [
        {"expert": "solder-2", "stand_in": "solder", "reason": "crashes"}
    ]


def test_a_verdict_says_everything_but_the_picture() -> None:
    assert json.loads(body_of(VERDICT)) == {
        "schema_version": 1,
        "result_id": result_id("q1"),
        "request_id": "q1",
        "outcome": "fail",
        "reason": None,
        "detail": None,
        "component": "resistor-0603",
        "line": "line1",
        "product": "-",
        "board": "-",
        "part": "resistor-0603",
        "picture_sha256": "ab" * 32,
        "captured_at": "2026-01-31T08:15:00Z",
        "out_of_order": True,
        "findings": [
            {"expert": "resistor", "label": "tilted", "score": 0.98, "fails": True, "box": [1.0, 2.0, 3.0, 4.0]},
            {"expert": "solder", "label": "good", "score": 0.9, "fails": False, "box": None},
        ],
        "steps": [
            {
                "expert": "resistor",
                "version": "1.2",
                "precision": "int8",
                "weights_sha256": "12" * 32,
                "threshold": 0.5,
                "executor": "cpu-0",
                "device": "cpu",
                "milliseconds": 12.3,
            },
            {
                "expert": "solder",
                "version": "3",
                "precision": "full",
                "weights_sha256": "34" * 32,
                "threshold": 0.25,
                "executor": "cuda-1",
                "device": "cuda:0",
                "milliseconds": 2.0,
            },
        ],
        "waited_milliseconds": 500.0,
        "degraded": [],
        "site": "plant",
        "box": "box1",
        "finished_at": "2026-01-31T08:15:00Z",
    }


def test_a_verdict_without_an_inspection_says_why() -> None:
    body = json.loads(body_of(Verdict("q2", Outcome.ERROR, (), 0.1, Refusal("picture-truncated", "it ends early"))))
    assert (body["outcome"], body["reason"], body["detail"]) == ("error", "picture-truncated", "it ends early")
    assert body["findings"] == body["steps"] == []


def test_a_boards_verdict_lists_its_parts_and_who_is_missing() -> None:
    """R1 was cut from the board's picture, so its boxes are moved to where they are in that; R2 had a picture."""
    parts = {"R1": PartVerdict("b/R1", Outcome.FAIL), "R2": PartVerdict("q2", Outcome.LATE, Refusal("deadline", "why"))}
    verdict = BoardVerdict("b", BoardName("line1", "p1", "SN-1"), BoardOutcome.FAIL, parts, ("R3",), 0.0)
    body = json.loads(
        board_body(
            verdict,
            placed={"R1": Placed("resistor", (10, 20, 5, 6), VERDICT.steps), "R2": Placed("capacitor", (0, 0, 5, 6))},
            picture_sha256=None,
            waited_seconds=0.25,
            serving=SERVING,
            site="plant",
            box="box1",
            finished_at=datetime(2026, 1, 31, tzinfo=UTC),
        )
    )
    first, second = body.pop("parts")
    assert [finding["box"] for finding in first["findings"]] == [[11.0, 22.0, 13.0, 24.0], None]
    assert [step["expert"] for step in first["steps"]] == ["resistor", "solder"]
    assert (first["outcome"], first["request_id"], first["rect"]) == ("fail", None, [10, 20, 5, 6])
    assert second == {
        "part": "R2",
        "component": "capacitor",
        "outcome": "late",
        "reason": "deadline",
        "detail": "why",
        "request_id": "q2",
        "rect": [0, 0, 5, 6],
        "findings": [],
        "steps": [],
        "degraded": [],
    }
    assert body == {
        "schema_version": 1,
        "result_id": result_id("b"),
        "request_id": "b",
        "outcome": "fail",
        "reason": None,
        "detail": None,
        "line": "line1",
        "product": "p1",
        "board": "SN-1",
        "part": "_board",
        "picture_sha256": None,
        "captured_at": None,
        "out_of_order": False,
        "missing": ["R3"],
        "waited_milliseconds": 250.0,
        "site": "plant",
        "box": "box1",
        "finished_at": "2026-01-31T00:00:00Z",
    }
    assert board_topic(CONFIG, verdict.name) == "coe/v1/plant/board/line1/p1/SN-1"


def test_the_result_has_one_name_for_each_request() -> None:
    assert result_id("q1") == result_id("q1") != result_id("q2")


def test_an_error_answer_is_plain_text_of_bounded_length() -> None:
    error = MessageError("topic-name", "bad", "do better")
    body = json.loads(error_body(error, topic="\ud800\0\u202e" + "x" * 70_000, at=NOW, request_id="q"))
    assert (body["reason"], body["what"], body["remedy"], body["request_id"]) == ("topic-name", "bad", "do better", "q")
    assert len(body["topic"]) == 512
    assert body["topic"].startswith("\\ud800\\x00\\u202e")
