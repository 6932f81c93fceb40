"""What is accepted into the spool and what is answered instead, without network or broker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from appliance import catalog as catalogs
from appliance.catalog import Catalog
from appliance.config import Config
from appliance.contract import Message
from appliance.drivers.intake import Intake, admit
from appliance.drivers.outbox import Outbox
from appliance.drivers.records import Records
from appliance.errors import MessageError
from tests.kit_box import manifest_text, picture, write_catalog
from tests.kit_brokers import until
from tests.kit_models import SIDE, conv_net, write_bundle

CONFIG = Config()


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """Component c-e0 for anybody; c-compared needs a reference; product p1 has both, with a golden picture."""
    folder = tmp_path_factory.mktemp("catalog")
    write_catalog(folder, 1)
    inputs = [
        {"name": "image", "size": (SIDE, SIDE)},
        {"name": "reference", "size": (SIDE, SIDE), "source": "reference"},
    ]
    bundle = write_bundle(folder, "compared", conv_net(1), inputs=inputs)
    (bundle.folder / "expert.toml").write_text(manifest_text(bundle))
    graph = folder / "graph.toml"
    graph.write_text(graph.read_text() + "\nc-compared = 'compared'\n")
    for product, golden in (("p1", True), ("p2", False)):
        home = folder / "products" / product
        home.mkdir(parents=True)
        if golden:
            Image.fromarray(np.zeros((64, 64), np.uint8)).save(home / "golden.png")
        places = "".join(
            f"[[placements]]\ndesignator = 'R{n}'\ncomponent = '{c}'\nrect = [0, 0, {SIDE}, {SIDE}]\n"
            for n, c in enumerate(("c-e0", "c-compared"))
        )
        line = "golden = 'golden.png'\n" if golden else ""
        (home / "recipe.toml").write_text(f"schema = 1\nproduct = '{product}'\nsize = [64, 64]\n{line}{places}")
    return catalogs.load(folder)


def test_a_part_without_product_is_its_component(catalog: Catalog) -> None:
    accepted = admit(_message("line1/-/-/c-e0"), CONFIG, catalog, 100.0)
    assert (accepted.line, accepted.part, accepted.accepted_at) == ("line1", "c-e0", 100.0)


def test_a_part_of_a_product_is_its_placement(catalog: Catalog) -> None:
    assert admit(_message("line1/p1/SN-1/R1"), CONFIG, catalog, 0.0).product == "p1"


@pytest.mark.parametrize(
    ("topic", "reason"),
    [
        ("line1/-/-/ghost", "unknown-component"),
        ("line1/ghost/-/R1", "unknown-product"),
        ("line1/p1/-/R9", "unknown-part"),
        ("line1/-/-/c-compared", "reference-missing"),
        ("line1/p2/-/R1", "reference-missing"),
        ("line1/-/c-e0", "topic-depth"),
        ("line1/-/-/c+e0", "topic-name"),
    ],
)
def test_what_nothing_can_answer_is_refused(catalog: Catalog, topic: str, reason: str) -> None:
    with pytest.raises(MessageError) as caught:
        admit(_message(topic), CONFIG, catalog, 0.0)
    assert caught.value.reason == reason
    assert caught.value.remedy


def test_what_a_sender_asks_for_is_kept(catalog: Catalog) -> None:
    user = {"request-id": "job-1", "captured-at": "2026-01-31T08:15:00Z", "deadline-ms": "1500"}
    message = _message("line1/-/-/c-e0", user=user, response_topic="my/answers", correlation=b"7")
    accepted = admit(message, CONFIG, catalog, 0.0)
    assert (accepted.id, accepted.deadline_seconds) == ("job-1", 1.5)
    assert (accepted.response_topic, accepted.correlation) == ("my/answers", b"7")
    assert accepted.captured_at == "2026-01-31T08:15:00+00:00"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"retain": True}, "retained"),
        ({"payload": b""}, "picture-empty"),
        ({"payload": b"GIF89a......"}, "picture-format"),
        ({"response_topic": "coe/v1/plant/infer/line1/-/-/c-e0"}, "response-topic"),
        ({"user": {"deadline-ms": "soon"}}, "deadline-ms"),
        ({"user": {"request-id": "a\0b"}}, "request-id"),
    ],
)
def test_what_a_message_may_not_be_is_refused(catalog: Catalog, changed: dict[str, object], reason: str) -> None:
    with pytest.raises(MessageError) as caught:
        admit(_message("line1/-/-/c-e0", **changed), CONFIG, catalog, 0.0)
    assert caught.value.reason == reason


def test_what_finds_the_spool_full_is_acknowledged_when_there_is_room(tmp_path: Path, catalog: Catalog) -> None:
    acknowledged: list[int] = []
    with Records.open(tmp_path, spool_bytes=1000, verdict_days=1.0) as records:
        outbox = Outbox(CONFIG, records)
        intake = Intake(
            CONFIG,
            catalog,
            records,
            outbox,
            acknowledge=lambda message: acknowledged.append(message.packet_id),
            spooled=lambda: None,
        )
        intake.start()
        first, second = picture(1), picture(2)
        intake.deliver(_message("line1/-/-/c-e0", payload=first, packet_id=1))
        until(lambda: acknowledged == [1])
        for packet_id in (2, 3):  # the broker delivers it again while it is held
            intake.deliver(_message("line1/-/-/c-e0", payload=second, packet_id=packet_id))
        until(lambda: intake.counts["spool_full"] >= 2)
        assert acknowledged == [1]
        (spooled,) = records.waiting()
        records.conclude(spooled.picture.id, "pass", b"{}", "coe/v1/plant/result/line1/-/-/c-e0", lambda answer: None)
        intake.room()
        until(lambda: len(acknowledged) > 1)
        assert set(acknowledged) <= {1, 2, 3}
        assert len(records.waiting()) == 1
        intake.stop()


def _message(topic: str, **changed: object) -> Message:
    values: dict[str, object] = {
        "topic": CONFIG.topic("infer", topic),
        "payload": picture(),
        "qos": 1,
        "retain": False,
        "duplicate": False,
        "packet_id": 1,
        "generation": 1,
        **changed,
    }
    return Message(**values)  # type: ignore[arg-type]
