"""The contract with cameras, line software and operators: topics, what a message may ask for, the bodies of answers.

Values in, values out; paho, sockets and pictures are elsewhere. Box, client and demo share it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, StringConstraints, ValidationError

from appliance.config import Config, Level
from appliance.core.types import BoardName, BoardVerdict, PartVerdict, Precision, Refusal, StandIn, Step, Verb, Verdict
from appliance.errors import MessageError

LEVEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
TOPIC_CHARACTERS = 512
REPLY_CHARACTERS = 256
CORRELATION_BYTES = 1024
USER_PROPERTIES = ("request-id", "captured-at", "deadline-ms")
COMMAND_BYTES = 1024
RATE: Final = "rate"
"""The reason for which a picture shall be sent again, as it is: its line sent too many."""
DRAIN: Final = "drain"
"""A command that is not about an expert."""
RELOAD: Final = "reload"
"""The other one: it reads the recipes again."""
WHOLE_BOARD: Final = "_board"
"""In place of a part: the picture shows the whole board."""
OUR_TREES = ("infer", "result", "board", "error", "box")
"""Below `<root>/v1/<site>`: nobody else may have us publish there, where it would be taken for our own word."""


# Topics.


@dataclass(frozen=True, slots=True)
class Address:
    """Where a picture belongs: the four levels behind `infer`. Product and board may be `-`: none."""

    line: str
    product: str
    board: str
    part: str

    @classmethod
    def parse(cls, topic: str, config: Config) -> Address:
        """Read a picture's topic. Raises MessageError `topic-depth`, `topic-name` or `board-nameless`."""
        pattern = config.topic("infer", "<line>", "<product>", "<board>", "<part>")
        prefix = config.topic("infer", "")
        if not (topic + "/").startswith(prefix):
            raise MessageError("topic-name", f"topic {shortened(topic)} is not below {prefix}", f"publish to {pattern}")
        levels = topic[len(prefix) :].split("/")
        if len(levels) != 4:
            what = f"topic {shortened(topic)} has {len(levels)} levels behind `infer`, not 4"
            raise MessageError("topic-depth", what, f"publish to {pattern}")
        return cls(*levels).checked()

    def checked(self) -> Address:
        """Itself. Raises MessageError `topic-name` or `board-nameless`."""
        for name in ("line", "product", "board", "part"):
            level = getattr(self, name)
            if not _names(name, level):
                what = f"<{name}> {shortened(level)} of the topic is not a name"
                remedy = "use 1 to 64 of A-Z a-z 0-9 . _ - and begin with a letter or digit"
                raise MessageError("topic-name", what, remedy)
        if self.is_whole and "-" in (self.product, self.board):
            what = "a whole board's picture needs a product, whose recipe says what sits where, and a serial number"
            raise MessageError("board-nameless", what, f"publish to .../<product>/<serial>/{WHOLE_BOARD}")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether the picture shows a whole board."""
        return self.part == WHOLE_BOARD

    @property
    def board_name(self) -> BoardName:
        return BoardName(self.line, self.product, self.board)

    def below(self, tree: Literal["infer", "result"]) -> tuple[str, ...]:
        """The levels behind `<root>/v1/<site>` of this part's pictures or verdicts."""
        return (tree, self.line, self.product, self.board, self.part)

    def picture_topic(self, config: Config) -> str:
        return config.topic(*self.below("infer"))

    def result_topic(self, config: Config) -> str:
        return config.topic(*self.below("result"))


def board_topic(config: Config, name: BoardName) -> str:
    """Where a board's verdict goes."""
    return config.topic("board", name.line, name.product, name.serial)


def error_topic(config: Config, reason: str) -> str:
    return config.topic("error", reason)


def status_topic(config: Config) -> str:
    """Retained: online | draining | stopped, or `offline`: the last will, or the last word of a service that failed."""
    return config.topic("box", config.box.name, "status")


def box_topic(config: Config, name: str) -> str:
    """What the box tells of itself: `info`, retained; `stats` and `cache`, while it is online."""
    return config.topic("box", config.box.name, name)


def alarm_topic(config: Config, name: str) -> str:
    """Retained while the alarm is raised, then cleared."""
    return config.topic("box", config.box.name, "alarm", name)


def command_topic(config: Config, verb: str) -> str:
    return config.topic("box", config.box.name, "cmd", verb)


def acknowledgement_topic(config: Config, verb: str) -> str:
    return config.topic("box", config.box.name, "cmd", verb, "ack")


def check_publishable(topic: str) -> None:
    """Raise MessageError `topic-name` unless the topic may be given to paho.

    A topic that the broker rejects costs the connection, is sent again on the next one, and blocks all behind it.
    """
    good = (
        0 < len(topic) <= TOPIC_CHARACTERS
        and topic.isascii()
        and topic.isprintable()
        and not topic.startswith("$")
        and not set(topic) & set("+# ")
        and all(topic.split("/"))
    )
    if not good:
        raise MessageError(
            "topic-name", f"{shortened(topic)} is no topic to publish to", "use plain ASCII levels without wildcards"
        )


def shortened(text: str, characters: int = 80) -> str:
    """Foreign text for a log line or an answer: quoted, ASCII, of bounded length."""
    return ascii(text if len(text) <= characters else text[:characters] + "...")


def _names(name: str, level: str) -> bool:
    if level == "-":
        return name in ("product", "board")
    if level == WHOLE_BOARD:
        return name == "part"
    return LEVEL.fullmatch(level) is not None


# Messages.


@dataclass(frozen=True, slots=True)
class Message:
    """One PUBLISH as it arrived. `generation` names the connection on which `packet_id` means something."""

    topic: str
    payload: bytes = field(repr=False)
    qos: int
    retain: bool
    duplicate: bool
    packet_id: int
    generation: int
    response_topic: str | None = None
    correlation: bytes | None = None
    user: Mapping[str, str] = field(default_factory=dict)
    """Those of USER_PROPERTIES that came with it; none on MQTT 3.1.1."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Where a sender wants its verdict besides the result topic, and the mark it wants back."""

    topic: str
    correlation: bytes | None

    @classmethod
    def wanted(cls, message: Message, config: Config) -> Reply | None:
        """The reply that a message asks for, None when it asks for none.

        Both fields are the sender's and untrusted. Allowed is what lies below the setting `mqtt.reply_prefix`; without
        one, any plain topic outside `$…` that is not below `<root>/v1/`, and what lies below `<root>/v1/<site>/reply`.
        Never one of our own trees, of any site, where it would be taken for a picture, a verdict or a command.
        Raises MessageError `response-topic` or `correlation-data`; the verdict's own topic is not affected.
        """
        topic, correlation = message.response_topic, message.correlation
        if topic is None:
            return None
        if len(topic) > REPLY_CHARACTERS or not _is_publishable(topic) or not _is_reply_topic(topic, config):
            what = f"response topic {shortened(topic)} is not allowed"
            where = config.mqtt.reply_prefix or config.topic("reply")
            remedy = f"use at most {REPLY_CHARACTERS} plain ASCII characters, such as {where}/<line>/<name>"
            raise MessageError("response-topic", what, remedy)
        if correlation is not None and len(correlation) > CORRELATION_BYTES:
            what = f"correlation data of {len(correlation)} bytes"
            raise MessageError("correlation-data", what, f"send at most {CORRELATION_BYTES} bytes")
        return cls(topic, correlation)


@dataclass(frozen=True, slots=True)
class Wish:
    """What an operator wants done: a Verb with its `expert`, DRAIN or RELOAD. `id` is the operator's mark."""

    verb: Verb | Literal["drain", "reload"]
    expert: str | None
    id: str | None
    reply: Reply | None

    @classmethod
    def parse(cls, message: Message, config: Config) -> Wish:
        """Raises MessageError: `command-verb`, `retained`, `command-body`, `response-topic` or `correlation-data`."""
        verb = verb_of(message.topic, config)
        if message.retain:
            raise MessageError("retained", "a retained command would be obeyed at every start", "publish without -r")
        body = CommandBody.parse(message.payload)
        if isinstance(verb, Verb) == (body.expert is None):
            what = f"{verb} names {'an' if body.expert else 'no'} expert"
            raise MessageError("command-body", what, f"{DRAIN} and {RELOAD} are for the box, {', '.join(Verb)} for one")
        return cls(verb, body.expert, body.id, Reply.wanted(message, config))


def is_command(topic: str, config: Config) -> bool:
    return topic.startswith(command_topic(config, ""))


def verb_of(topic: str, config: Config) -> Verb | Literal["drain", "reload"]:
    """What a command's topic asks for. Raises MessageError `command-verb`."""
    verb = topic.removeprefix(command_topic(config, ""))
    if verb == DRAIN:
        return DRAIN
    if verb == RELOAD:
        return RELOAD
    try:
        return Verb(verb)
    except ValueError as error:
        what = f"{shortened(verb)} is no command"
        raise MessageError("command-verb", what, f"use {', '.join(Verb)}, {RELOAD} or {DRAIN}") from error


def request_id(topic: str, payload: bytes, user: Mapping[str, str]) -> str:
    """Who a picture is: the sender's `request-id`, else the SHA-256 of topic, a zero byte and payload.

    Packet identifiers and the DUP flag are no identities. Raises MessageError `request-id` for one that is no name.
    """
    given = user.get("request-id")
    if given is None:
        digest = hashlib.sha256(topic.encode("utf-8", "surrogatepass") + b"\0")
        digest.update(payload)
        return digest.hexdigest()
    if REQUEST_ID.fullmatch(given) is None:
        what = f"request-id {shortened(given)} is not a name"
        raise MessageError("request-id", what, "use 1 to 128 of A-Z a-z 0-9 . _ : - and begin with a letter or digit")
    return given


def captured_at(user: Mapping[str, str]) -> datetime | None:
    """When the picture was taken, as the sender says, in UTC. Raises MessageError `captured-at`."""
    given = user.get("captured-at")
    if given is None:
        return None
    try:
        taken = datetime.fromisoformat(given)
        return taken.astimezone(UTC) if taken.tzinfo else taken.replace(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        what = f"captured-at {shortened(given)} is not ISO 8601"
        raise MessageError("captured-at", what, "write it like 2026-01-31T08:15:00Z") from error


def deadline_seconds(user: Mapping[str, str]) -> float | None:
    """How long the verdict is worth waiting for, counted from acceptance. Raises MessageError `deadline-ms`."""
    given = user.get("deadline-ms")
    if given is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}", given) is None or int(given) == 0:
        what = f"deadline-ms {shortened(given)} is not a number of milliseconds"
        raise MessageError("deadline-ms", what, "write a whole number from 1 to 999999999")
    return int(given) / 1000


def _is_reply_topic(topic: str, config: Config) -> bool:
    root, version, site, tree, *below = [*topic.split("/"), "", "", "", ""]
    is_inside = (root, version) == (config.mqtt.root, "v1")
    if is_inside and (not tree or tree in OUR_TREES):
        return False
    if config.mqtt.reply_prefix is not None:
        return topic.startswith(config.mqtt.reply_prefix + "/")
    return not is_inside or ((site, tree) == (config.box.site, "reply") and any(below))


def _is_publishable(topic: str) -> bool:
    try:
        check_publishable(topic)
    except MessageError:
        return False
    return True


# Bodies.


class CommandBody(BaseModel):
    """What a command says; `id` comes back with its acknowledgement."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    expert: Level | None = None
    id: Annotated[str, StringConstraints(pattern=rf"^{REQUEST_ID.pattern}$")] | None = None

    @classmethod
    def parse(cls, payload: bytes) -> CommandBody:
        """Raises MessageError `command-body`. An empty payload says nothing, and is as good as `{}`."""
        remedy = 'send JSON such as {"expert": "moulded-figure", "id": "7"}'
        if len(payload) > COMMAND_BYTES:
            raise MessageError("command-body", f"a command of {len(payload)} bytes, at most {COMMAND_BYTES}", remedy)
        try:
            return cls.model_validate_json(payload or b"{}")
        except ValidationError as error:
            first, *_ = error.errors()
            where = ".".join(map(str, first["loc"]))
            what = f"the command cannot be read: {f'{shortened(where)}: ' if where else ''}{first['msg']}"
            raise MessageError("command-body", what, remedy) from error


class Body(BaseModel):
    """A message of ours; `schema_version` grows when a reader would have to change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1

    def encoded(self) -> bytes:
        return self.model_dump_json().encode()


class FindingBody(BaseModel):
    """What one expert saw; `box` is [x1, y1, x2, y2] in pixels of the published picture, or null."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    expert: str
    label: str
    score: float
    fails: bool
    box: tuple[float, float, float, float] | None


class StepBody(BaseModel):
    """Which expert ran, in which version and precision, with which weights, where, how long, and from which score on it
    fails."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    expert: str
    version: str
    precision: Precision
    weights_sha256: str
    threshold: float
    executor: str
    device: str
    milliseconds: float


class StandInBody(BaseModel):
    """Another expert was asked instead of one that could not serve, and why that could not."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    expert: str
    stand_in: str
    reason: str


class VerdictBody(Body):
    """A verdict as published. The same `request_id` always has the same `result_id`."""

    result_id: str
    request_id: str
    outcome: Literal["pass", "fail", "error", "late", "rejected"]
    reason: str | None
    detail: str | None
    component: str
    line: str
    product: str
    board: str
    part: str
    picture_sha256: str
    captured_at: AwareDatetime | None
    out_of_order: bool
    """A picture of the same line, product, board and part that was taken later has its verdict already."""
    findings: tuple[FindingBody, ...]
    steps: tuple[StepBody, ...]
    degraded: tuple[StandInBody, ...]
    """Empty when all were asked whom the graph names."""
    waited_milliseconds: float
    site: str
    box: str
    finished_at: AwareDatetime


class BoardPartBody(BaseModel):
    """A part of a board. `request_id` names the verdict of its own picture, where there was one.

    Of a whole board's picture there was none: then findings and steps are here, boxes in pixels of that picture.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    part: str
    component: str
    outcome: Literal["pass", "fail", "error", "late", "rejected"]
    reason: str | None
    detail: str | None
    request_id: str | None
    rect: tuple[int, int, int, int]
    """x, y, width, height in pixels of the board's picture."""
    findings: tuple[FindingBody, ...]
    steps: tuple[StepBody, ...]
    degraded: tuple[StandInBody, ...]


class BoardBody(Body):
    """A board's verdict: that of its worst part. The same `request_id` always has the same `result_id`.

    `request_id` is that of the whole board's picture, whose verdict this is; else it names the board's opening.
    """

    result_id: str
    request_id: str
    outcome: Literal["pass", "fail", "error", "late", "rejected", "incomplete"]
    reason: str | None
    detail: str | None
    line: str
    product: str
    board: str
    part: Literal["_board"] = WHOLE_BOARD
    picture_sha256: str | None
    captured_at: AwareDatetime | None
    out_of_order: bool
    """Whether a picture of this board that was taken later has its verdict already."""
    parts: tuple[BoardPartBody, ...]
    """Those that have a verdict."""
    missing: tuple[str, ...]
    """Those of which no picture came in time."""
    waited_milliseconds: float
    site: str
    box: str
    finished_at: AwareDatetime


class ErrorBody(Body):
    """Rejected input: which message, why, and what to do. Never the picture."""

    reason: str
    what: str
    remedy: str
    topic: str
    request_id: str | None
    picture_sha256: str | None
    has_verdict: bool
    """The request of this id was accepted: it has its verdict, or will have, and this error does not end it."""
    at: AwareDatetime


class AcknowledgementBody(Body):
    """What became of a command: it is done (`ok`), or was refused, and why."""

    id: str | None
    verb: str
    expert: str | None
    ok: bool
    reason: str | None
    detail: str | None
    box: str
    at: AwareDatetime


@dataclass(frozen=True, slots=True)
class Serving:
    """An expert as one executor runs it. `weights_sha256` names the weights as they were compiled for its device, in
    this precision."""

    version: str
    precision: Precision
    weights_sha256: str
    threshold: float
    device: str


def result_id(request: str) -> str:
    """The verdict's name: made from the request's, so that a repeated answer carries the same."""
    return hashlib.sha256(b"verdict\0" + request.encode()).hexdigest()[:32]


def verdict_body(
    verdict: Verdict,
    *,
    address: Address,
    component: str,
    picture_sha256: str,
    captured_at: datetime | None,
    out_of_order: bool,
    serving: Mapping[tuple[str, str], Serving],
    site: str,
    box: str,
    finished_at: datetime,
) -> bytes:
    """A verdict as JSON. `serving` has (executor, expert); `finished_at` is wall time with its zone, a label."""
    return VerdictBody(
        result_id=result_id(verdict.request),
        request_id=verdict.request,
        outcome=verdict.outcome.value,
        reason=verdict.refusal.reason if verdict.refusal else None,
        detail=verdict.refusal.detail if verdict.refusal else None,
        component=component,
        line=address.line,
        product=address.product,
        board=address.board,
        part=address.part,
        picture_sha256=picture_sha256,
        captured_at=captured_at,
        out_of_order=out_of_order,
        findings=_finding_bodies(verdict.steps),
        steps=tuple(_step_body(step, serving[step.executor, step.expert]) for step in verdict.steps),
        degraded=_stand_in_bodies(verdict.stand_ins),
        waited_milliseconds=round(verdict.waited_seconds * 1000, 3),
        site=site,
        box=box,
        finished_at=finished_at,
    ).encoded()


@dataclass(frozen=True, slots=True)
class Placed:
    """A part of a board as the recipe has it, and what was seen of it in the whole board's picture, if there is one."""

    component: str
    rect: tuple[int, int, int, int]
    steps: tuple[Step, ...] | None = None
    stand_ins: tuple[StandIn, ...] = ()


def board_body(
    verdict: BoardVerdict,
    *,
    placed: Mapping[str, Placed],
    picture_sha256: str | None,
    waited_seconds: float,
    serving: Mapping[tuple[str, str], Serving],
    site: str,
    box: str,
    finished_at: datetime,
    captured_at: datetime | None = None,
    out_of_order: bool = False,
) -> bytes:
    """A board's verdict as JSON; `placed` has its parts."""
    return BoardBody(
        result_id=result_id(verdict.id),
        request_id=verdict.id,
        outcome=verdict.outcome.value,
        reason=verdict.refusal.reason if verdict.refusal else None,
        detail=verdict.refusal.detail if verdict.refusal else None,
        line=verdict.name.line,
        product=verdict.name.product,
        board=verdict.name.serial,
        picture_sha256=picture_sha256,
        captured_at=captured_at,
        out_of_order=out_of_order,
        parts=tuple(_part_body(part, known, placed[part], serving) for part, known in verdict.parts.items()),
        missing=verdict.missing,
        waited_milliseconds=round(waited_seconds * 1000, 3),
        site=site,
        box=box,
        finished_at=finished_at,
    ).encoded()


def _part_body(
    part: str, known: PartVerdict, placed: Placed, serving: Mapping[tuple[str, str], Serving]
) -> BoardPartBody:
    x, y, _, _ = placed.rect
    steps = placed.steps or ()
    return BoardPartBody(
        part=part,
        component=placed.component,
        outcome=known.outcome.value,
        reason=known.refusal.reason if known.refusal else None,
        detail=known.refusal.detail if known.refusal else None,
        request_id=known.request if placed.steps is None else None,
        rect=placed.rect,
        findings=_finding_bodies(steps, x, y),
        steps=tuple(_step_body(step, serving[step.executor, step.expert]) for step in steps),
        degraded=_stand_in_bodies(placed.stand_ins),
    )


def _stand_in_bodies(stand_ins: Iterable[StandIn]) -> tuple[StandInBody, ...]:
    return tuple(StandInBody(expert=one.expert, stand_in=one.stand_in, reason=one.reason) for one in stand_ins)


def _finding_bodies(steps: Iterable[Step], x: int = 0, y: int = 0) -> tuple[FindingBody, ...]:
    """What was found, in pixels of a picture in which that of the part begins at x, y."""
    return tuple(
        FindingBody(
            expert=step.expert,
            label=finding.label,
            score=finding.score,
            fails=finding.fails,
            box=(box.x1 + x, box.y1 + y, box.x2 + x, box.y2 + y) if (box := finding.box) else None,
        )
        for step in steps
        for finding in step.findings
    )


def acknowledgement_body(
    verb: str, expert: str | None, id: str | None, refusal: Refusal | None, *, box: str, at: datetime
) -> bytes:
    """An answer for `acknowledgement_topic(config, verb)`, as JSON. `at` is wall time with its zone."""
    return AcknowledgementBody(
        id=id,
        verb=verb,
        expert=expert,
        ok=refusal is None,
        reason=refusal.reason if refusal else None,
        detail=refusal.detail if refusal else None,
        box=box,
        at=at,
    ).encoded()


def _step_body(step: Step, serving: Serving) -> StepBody:
    return StepBody(
        expert=step.expert,
        version=serving.version,
        precision=serving.precision,
        weights_sha256=serving.weights_sha256,
        threshold=serving.threshold,
        executor=step.executor,
        device=serving.device,
        milliseconds=round(step.seconds * 1000, 3),
    )


def error_body(
    error: MessageError,
    *,
    topic: str,
    at: datetime,
    request_id: str | None = None,
    picture_sha256: str | None = None,
    has_verdict: bool = False,
) -> bytes:
    """An answer for `error_topic(config, error.reason)`, as JSON. `at` is wall time with its zone."""
    return ErrorBody(
        reason=error.reason,
        what=error.what,
        remedy=error.remedy,
        topic=ascii(topic)[1:-1][:TOPIC_CHARACTERS],
        request_id=request_id,
        picture_sha256=picture_sha256,
        has_verdict=has_verdict,
        at=at,
    ).encoded()
