"""Whole boards and collected ones, through the whole service: real brokers, real experts, real kills."""

from __future__ import annotations

import json
import queue
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from appliance import client
from appliance.cli import app
from appliance.drivers.records import Picture, Records
from appliance.lab.simulate import simulated
from tests.kit_boards import (
    BOARDS,
    board_pixels,
    encoded,
    infer,
    part_of,
    write_board_catalog,
    write_product,
)
from tests.kit_box import ALARMS, COMMAND, DEADLY, DEADLY_DECODER, RESULT, STATS, Box, compiled, kept_alive
from tests.kit_brokers import AnyBroker, Camera, Mosquitto, Nats, broker, nats, until
from tests.kit_models import SIDE

__all__ = ["broker", "nats"]  # fixtures

FOUR = {"R1": "c-good", "R2": "c-bad", "R3": "c-compared", "R4": "c-good"}
TWO = {"R1": "c-good", "R2": "c-good"}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_board_catalog(tmp_path_factory.mktemp("boards") / "catalog")
    write_product(folder, "four", FOUR, golden=True)
    write_product(folder, "two", TWO)
    return compiled(folder)


def hear(camera: Camera, tree: str) -> dict[str, Any]:
    """The next body of a tree. Between trees there is no order: a board may come before the last of its parts."""
    body: dict[str, Any] = json.loads(camera.hear_of(f"/{tree}/").payload)
    return body


def stats_when(camera: Camera, verdicts: int) -> dict[str, Any]:
    """The first statistics that count so many verdicts."""
    told: dict[str, Any] = {}
    until(lambda: told.update(hear(camera, "box")) or sum(told["verdicts"].values()) == verdicts)
    return told


def rows(box: Box, text: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(box.folder / "state" / "records.db")) as db:
        return db.execute(text).fetchall()


def test_a_whole_boards_picture_is_cut_inspected_and_answered_once_like_pictures_of_its_parts(
    tmp_path: Path, catalog: Path, broker: AnyBroker
) -> None:
    pixels = board_pixels(4)
    with Box(tmp_path / "box", catalog, broker) as box, Camera(broker.port, RESULT, BOARDS) as camera:
        camera.publish(infer("four", "SN-1", "_board"), encoded(pixels))
        whole = {(heard := camera.hear()).topic: heard.payload for _ in range(2)}
        assert set(whole) == {
            "coe/v1/plant/result/line1/four/SN-1/_board",
            "coe/v1/plant/board/line1/four/SN-1",
        }
        first, second = whole.values()
        assert first == second
        board = json.loads(first)
        assert {part["part"]: part["outcome"] for part in board["parts"]} == {
            "R1": "pass",
            "R2": "fail",
            "R3": "pass",
            "R4": "pass",
        }
        assert (board["outcome"], board["missing"]) == ("fail", [])
        assert rows(box, "SELECT id, outcome FROM verdicts") == [(board["request_id"], "fail")]
        assert rows(box, "SELECT sort FROM kept") == [("fail",)]
        for number, part in enumerate(board["parts"]):
            camera.publish(infer("four", "-", part["part"]), part_of(pixels, number))
            alone = hear(camera, "result")
            assert [finding["score"] for finding in part["findings"]] == pytest.approx(
                [finding["score"] for finding in alone["findings"]], abs=1e-5
            )
            assert [step["expert"] for step in part["steps"]] == [step["expert"] for step in alone["steps"]]
        camera.publish(infer("four", "SN-1", "_board"), encoded(pixels))
        assert camera.hear().payload == first, "asked again, it is answered from the record"
        assert box.stop() == 0
    found = simulated(box.folder / "journal.jsonl", predict=False)
    assert found["requests"] == 8
    _look_up(box, board["request_id"])


def _look_up(box: Box, request: str) -> None:
    """As an operator would, with the service stopped."""

    def told(*words: str) -> str:
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["records", *words, "--config", str(box.config)])
        assert result.exit_code == 0, result.output
        return result.output

    drawn = box.folder / "out.png"
    listed, shown = told("list", "--board", "SN-1"), told("show", request, "--image", str(drawn))
    assert "_board" in listed
    assert "R2 fail" in listed
    assert [word in shown for word in ("R3", "c-compared", "compared 1")] == [True] * 3
    with Image.open(drawn) as picture:
        factor = picture.width // (4 * SIDE)
        assert picture.getpixel((SIDE * factor, SIDE * factor - factor)) == (230, 30, 30), "R2 is marked"


def test_pictures_of_parts_make_one_board_verdict_that_names_them(tmp_path: Path, catalog: Path, nats: Nats) -> None:
    """Those without a serial number or a product make none."""
    pixels = board_pixels(4)
    with Box(tmp_path / "box", catalog, nats), Camera(nats.port, RESULT, BOARDS, STATS) as camera:
        camera.publish(infer("four", "-", "R1"), part_of(pixels, 0))
        camera.publish(infer("-", "SN-1", "c-good"), part_of(pixels, 1))
        assert stats_when(camera, 2)["boards"]["open"] == 0
        assert {hear(camera, "result")["part"] for _ in range(2)} == {"R1", "c-good"}
        for number, part in reversed(list(enumerate(FOUR))):
            camera.publish(infer("four", "SN-1", part), part_of(pixels, number))
        verdicts = {(body := hear(camera, "result"))["part"]: body for _ in FOUR}
        board = hear(camera, "board")
        assert (board["outcome"], board["missing"], board["picture_sha256"]) == ("fail", [], None)
        assert [part["part"] for part in board["parts"]] == list(FOUR)
        for part in board["parts"]:
            known = verdicts[part["part"]]
            assert (part["outcome"], part["request_id"]) == (known["outcome"], known["request_id"])
        camera.publish(infer("four", "SN-1", "R1"), part_of(pixels, 3))
        assert hear(camera, "result")["outcome"] == "pass"
        stats = stats_when(camera, 7)
        assert stats["boards"] == {"open": 0, "verdicts": {"fail": 1}, "too_late": 1, "replaced": 0, "whole": 0}


def test_a_part_that_does_not_come_is_missing_when_the_time_is_up(tmp_path: Path, catalog: Path, nats: Nats) -> None:
    settings = "[limits]\nboard_seconds = 0.5\n"
    with Box(tmp_path / "box", catalog, nats, settings=settings), Camera(nats.port, RESULT, BOARDS) as camera:
        camera.publish(infer("two", "SN-1", "R2"), part_of(board_pixels(2), 1))
        board = hear(camera, "board")
    assert (board["outcome"], board["reason"], board["missing"]) == ("incomplete", "parts-missing", ["R1"])
    assert [(part["part"], part["outcome"]) for part in board["parts"]] == [("R2", "pass")]


def test_a_box_that_is_behind_misses_no_part_that_waits_in_its_spool(tmp_path: Path, catalog: Path, nats: Nats) -> None:
    """All were accepted 100 seconds ago, and it takes one after the other."""
    box = Box(tmp_path / "box", catalog, nats, settings="[limits]\nwaiting_pictures = 1\nboard_seconds = 30\n")
    accepted: queue.Queue[object] = queue.Queue()
    with Records.open(tmp_path / "box" / "state", spool_bytes=1 << 20, verdict_days=1) as records:
        for number, part in enumerate(TWO):
            for n in range(6):
                known = Picture(f"{part}-{n}", "line1", "two", f"SN-{n}", part, "", time.time() - 100.0)
                records.accept(known, part_of(board_pixels(2, n), number), accepted.put)
        for _ in range(12):
            accepted.get(timeout=60)
    with Camera(nats.port, BOARDS) as camera, box:
        boards = [hear(camera, "board") for _ in range(6)]
    assert {(board["outcome"], len(board["parts"])) for board in boards} == {("pass", 2)}


def test_boards_under_way_when_the_service_is_killed_have_one_verdict_each(
    tmp_path: Path, catalog: Path, broker: AnyBroker
) -> None:
    """It is killed twice: while all are begun, and when some are concluded."""
    count = 12
    box = Box(tmp_path / "box", catalog, broker)
    with (
        box,
        Camera(broker.port, BOARDS, name="listener", clean=False) as listener,
        Camera(broker.port, RESULT, name="publisher", clean=False) as camera,
    ):
        first = [camera.publish(infer("two", f"SN-{n}", "R1"), part_of(board_pixels(2, n), 0)) for n in range(count)]
        camera.wait_confirmed(*first)
        for _ in first:
            hear(camera, "result")
        box.kill()
        box.start()
        for n in range(count):
            camera.publish(infer("two", f"SN-{n}", "R2"), part_of(board_pixels(2, n), 1))
        heard = [listener.hear()]
        box.kill()
        box.start()
        until(lambda: _heard_boards(listener, heard) == count)
        box.wait_online()
        assert box.stop() == 0
        _heard_boards(listener, heard)
    bodies = {payload.payload for payload in heard}
    assert len(bodies) == count, "the same bytes, however often"
    boards = [json.loads(body) for body in bodies]
    assert sorted(board["board"] for board in boards) == sorted(f"SN-{n}" for n in range(count))
    assert {(board["outcome"], len(board["parts"])) for board in boards} == {("pass", 2)}
    assert rows(box, "SELECT count(*) FROM verdicts WHERE part = '_board'") == [(count,)]
    assert rows(box, "SELECT * FROM boards") == rows(box, "SELECT * FROM board_parts") == []


def _heard_boards(listener: Camera, heard: list[Any]) -> int:
    while not listener.heard.empty():
        heard.append(listener.hear())
    return len({json.loads(one.payload)["board"] for one in heard})


def test_a_whole_board_that_is_being_inspected_when_the_service_is_killed_is_answered_once(
    tmp_path: Path, catalog: Path, nats: Nats
) -> None:
    box = Box(tmp_path / "box", catalog, nats)
    with box, client.Camera("127.0.0.1", nats.port, line="line1", resend_seconds=2.0) as camera:
        answers: list[client.Answer] = []
        camera.on_answer(answers.append)
        for number in range(30):
            picture = encoded(board_pixels(4, number))
            camera.publish(product="four", board=f"SN-{number}", part="_board", picture=picture)
        until(lambda: len(answers) > 3)
        box.kill()
        box.start()
        assert camera.wait(60)
    assert {(answer.body["outcome"], len(answer.body["parts"])) for answer in answers} == {("fail", 4)}
    assert rows(box, "SELECT count(*) FROM verdicts") == [(30,)]


def test_a_board_that_ends_the_process_becomes_one_dead_letter(tmp_path: Path, catalog: Path, nats: Nats) -> None:
    box = Box(tmp_path / "box", catalog, nats, program=DEADLY_DECODER)
    deadly, sound = encoded(board_pixels(4)) + DEADLY, encoded(board_pixels(4, 1))
    with box, client.Camera("127.0.0.1", nats.port, line="line1", resend_seconds=2.0) as camera:
        answers: dict[str, client.Answer] = {}
        camera.on_answer(lambda answer: answers.update({answer.body["board"]: answer}))
        camera.publish(product="four", board="deadly", part="_board", picture=deadly)
        camera.publish(product="four", board="sound", part="_board", picture=sound)
        assert kept_alive(box, camera) == 3
    poison = answers["deadly"].body
    assert (poison["outcome"], poison["reason"], poison["parts"]) == ("error", "poison", [])
    assert answers["sound"].body["outcome"] == "fail"
    assert [path.suffix for path in sorted((box.folder / "state" / "quarantine").iterdir())] == [".json", ".picture"]


def test_a_board_that_cannot_be_cut_is_an_error(tmp_path: Path, catalog: Path, nats: Nats) -> None:
    damaged, smaller = encoded(board_pixels(4))[:-200], encoded(board_pixels(3))
    with Box(tmp_path / "box", catalog, nats), Camera(nats.port, RESULT) as camera:
        for payload, reason in ((damaged, "picture-damaged"), (smaller, "picture-size")):
            camera.publish(infer("four", "SN-1", "_board"), payload)
            board = hear(camera, "result")
            assert (board["outcome"], board["reason"]) == ("error", reason)
            assert {part["reason"] for part in board["parts"]} == {reason}


def test_recipes_are_replaced_while_boards_are_under_way(tmp_path: Path, catalog: Path, nats: Nats) -> None:
    """The board keeps the recipe that it was opened with, also over a restart; the next has the new one."""
    own = tmp_path / "catalog"
    write_board_catalog(own)
    recipe = write_product(own, "two", TWO)
    pixels = board_pixels(3)
    box = Box(tmp_path / "box", own, nats)
    with (
        box,
        Camera(nats.port, RESULT, BOARDS) as camera,
        Camera(nats.port, COMMAND + "+/ack", name="operator") as operator,
    ):

        def reloaded() -> tuple[bool, str | None, str]:
            operator.publish(COMMAND + "reload", b"{}")
            body = json.loads(operator.hear().payload)
            return body["ok"], body["reason"], body["detail"] or ""

        camera.publish(infer("two", "SN-1", "R1"), part_of(pixels, 0))
        hear(camera, "result")
        sound = recipe.read_text()
        recipe.write_text(sound.replace("rect = [16, 0, 16, 16]", "rect = [17, 0, 16, 16]"))
        ok, reason, detail = reloaded()
        assert (ok, reason) == (False, "catalog")
        assert "recipe.toml" in detail
        assert "R2 reaches outside" in detail
        write_product(own, "two", {"R1": "c-good", "R9": "c-bad", "R3": "c-good"})
        assert reloaded() == (True, None, "")
        camera.publish(infer("two", "SN-2", "R9"), part_of(pixels, 1))
        assert hear(camera, "result")["outcome"] == "fail"
        box.stop()
        box.log.write_text("")
        box.start()
        box.wait_online()
        camera.publish(infer("two", "SN-1", "R2"), part_of(pixels, 1))
        former = hear(camera, "board")
        assert (former["board"], former["outcome"], former["missing"]) == ("SN-1", "pass", [])
        camera.publish(infer("two", "SN-2", "R1"), part_of(pixels, 0))
        camera.publish(infer("two", "SN-2", "R3"), part_of(pixels, 2))
        latter = hear(camera, "board")
        assert [part["part"] for part in latter["parts"]] == ["R1", "R9", "R3"]
        graph = own / "graph.toml"
        graph.write_text(graph.read_text() + "c-new = 'good'\n")
        assert reloaded()[:2] == (False, "restart")


@pytest.mark.mosquitto
def test_an_access_list_from_before_there_were_boards_is_told_by_an_alarm_until_it_allows_them(
    tmp_path: Path, catalog: Path
) -> None:
    rights = tmp_path / "acl"
    old = ("read coe/#", *(f"write coe/v1/plant/{tree}/#" for tree in ("infer", "result", "error", "box")))
    rights.write_text("".join(f"topic {right}\n" for right in old))
    rights.chmod(0o644)

    def told(camera: Camera, *, raised: bool) -> bytes:
        while bool(body := camera.hear_of("/alarm/refused-topic").payload) != raised:
            pass
        return body

    with (
        Mosquitto(tmp_path / "mosquitto", f"acl_file {rights}") as broker,
        Box(tmp_path / "box", catalog, broker),
        Camera(broker.port, ALARMS, BOARDS) as camera,
    ):
        camera.publish(infer("two", "SN-1", "_board"), encoded(board_pixels(2)))
        alarm = json.loads(told(camera, raised=True))
        assert alarm["topic"] == "coe/v1/plant/board/line1/two/SN-1"
        assert "coe/v1/plant/board/#" in alarm["remedy"]
        rights.write_text(rights.read_text() + "topic write coe/v1/plant/board/#\n")
        broker.reload()
        assert hear(camera, "board")["board"] == "SN-1"
        assert told(camera, raised=False) == b""
