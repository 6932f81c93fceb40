from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper

from appliance.catalog import Bundle
from appliance.core.types import Batch, Event, Finished, Load, Loaded, LoadFailed, Refusal, RunFailed
from appliance.drivers import heads, images, runtime
from appliance.drivers.compile import compile_bundles
from appliance.drivers.executors import Executors, Inspection, LoaderLane, Views
from appliance.drivers.sessions import Sessions
from appliance.drivers.store import Compiled, Store
from appliance.drivers.weights import Weights
from appliance.errors import LoadError, MessageError, PictureError, RunError
from tests import kit_models as kit

TIMEOUT = 20.0


def batch(number: int, executor: str = "one", expert: str = "e", requests: tuple[str, ...] = ("r",)) -> Batch:
    return Batch(number, executor, "cpu", expert, requests)


def finished(done: Batch) -> Event:
    return Finished(done, ((),) * len(done.requests), 0.0)


def test_every_batch_is_reported_by_the_thread_of_its_executor() -> None:
    reports: SimpleQueue[Event] = SimpleQueue()
    threads: dict[str, set[int]] = {"one": set(), "two": set()}

    def work(done: Batch) -> Event:
        threads[done.executor].add(threading.get_ident())
        return finished(done)

    executors = Executors({"one": "cpu", "two": "cpu"}, work, reports.put)
    for number in range(5):
        for name in ("one", "two"):
            executors.run(batch(number, name))
        assert {event_batch(reports.get(timeout=TIMEOUT)).id for _ in range(2)} == {number}
    executors.stop()
    assert len(threads["one"]) == len(threads["two"]) == 1
    assert threads["one"] != threads["two"]
    assert threading.get_ident() not in threads["one"] | threads["two"]


def event_batch(event: Event) -> Batch:
    assert isinstance(event, Finished | RunFailed)
    return event.batch


def test_a_desk_holds_one_batch_and_refuses_the_next_without_waiting() -> None:
    begun, go = threading.Event(), threading.Event()
    reports: SimpleQueue[Event] = SimpleQueue()

    def work(done: Batch) -> Event:
        begun.set()
        assert go.wait(TIMEOUT)
        return finished(done)

    executors = Executors({"one": "cpu"}, work, reports.put)
    executors.run(batch(1))
    assert begun.wait(TIMEOUT)
    executors.run(batch(2))
    with pytest.raises(RunError, match="executor one has a batch waiting"):
        executors.run(batch(3))
    go.set()
    executors.stop()
    assert [event_batch(reports.get_nowait()).id for _ in range(2)] == [1, 2]


@pytest.mark.parametrize(
    ("error", "reason", "detail"),
    [
        (RunError("e failed", "look"), "run", "e failed (look)"),
        (ZeroDivisionError("division by zero"), "internal", "ZeroDivisionError: division by zero"),
        (MemoryError(), "internal", "MemoryError: "),
    ],
)
def test_whatever_work_raises_becomes_a_failed_run_and_the_thread_lives(
    error: Exception, reason: str, detail: str
) -> None:
    reports: SimpleQueue[Event] = SimpleQueue()

    def work(done: Batch) -> Event:
        if done.id == 1:
            raise error
        return finished(done)

    executors = Executors({"one": "cpu"}, work, reports.put)
    executors.run(batch(1))
    assert reports.get(timeout=TIMEOUT) == RunFailed(batch(1), Refusal(reason, detail))
    executors.run(batch(2))
    assert reports.get(timeout=TIMEOUT) == finished(batch(2))
    executors.stop()


def load(expert: str) -> Load:
    return Load("cpu", expert, ())


def test_loads_run_beside_each_other_and_each_is_reported() -> None:
    reports: SimpleQueue[Event] = SimpleQueue()
    together = threading.Barrier(2, timeout=TIMEOUT)

    def bring(action: Load) -> None:
        if action.expert in ("a", "b"):
            together.wait()
        elif action.expert == "broken":
            raise LoadError("x is missing", "restore it")
        elif action.expert == "odd":
            raise KeyError("odd")

    lane = LoaderLane("cpu", 2, bring, reports.put)
    for expert in ("a", "b", "broken", "odd", "c"):
        lane.load(load(expert))
    events = [reports.get(timeout=TIMEOUT) for _ in range(5)]
    found = {event.expert: event for event in events if isinstance(event, Loaded | LoadFailed)}
    lane.stop()
    assert found == {
        **{name: Loaded("cpu", name) for name in ("a", "b", "c")},
        "broken": LoadFailed("cpu", "broken", Refusal("load", "x is missing (restore it)")),
        "odd": LoadFailed("cpu", "odd", Refusal("internal", "KeyError: 'odd'")),
    }


def test_stopping_a_lane_waits_for_the_load_in_work_and_forgets_the_rest() -> None:
    reports: SimpleQueue[Event] = SimpleQueue()
    begun, go = threading.Event(), threading.Event()

    def bring(action: Load) -> None:
        begun.set()
        assert go.wait(TIMEOUT)

    lane = LoaderLane("cpu", 1, bring, reports.put)
    lane.load(load("a"))
    assert begun.wait(TIMEOUT)
    lane.load(load("b"))
    stopping = threading.Thread(target=lane.stop)
    stopping.start()
    go.set()
    stopping.join(TIMEOUT)
    assert not stopping.is_alive()
    assert reports.get_nowait() == Loaded("cpu", "a")


SIZE = (kit.SIDE, kit.SIDE)
COMPARED = [
    {"name": "image", "size": SIZE, "color": "grey", "scale": 1 / 255},
    {"name": "golden", "size": SIZE, "color": "grey", "scale": 1 / 255, "source": "reference"},
]
DIFFERS = {
    "kind": "classification",
    "output": "logits",
    "labels": ["same", "other"],
    "normal": "same",
    "activation": "none",
    "threshold": 0.2,
}


def difference_net() -> ModelProto:
    """How much brighter the picture's brightest pixel is than its reference: (n, 2) as (1 - d, d)."""
    flip = numpy_helper.from_array(np.array([[-1, 1]], np.float32), "flip")
    base = numpy_helper.from_array(np.array([1, 0], np.float32), "base")
    shape: list[str | int] = ["n", 1, kit.SIDE, kit.SIDE]
    nodes = [
        helper.make_node("Sub", ["image", "golden"], ["difference"]),
        helper.make_node("GlobalMaxPool", ["difference"], ["most"]),
        helper.make_node("Flatten", ["most"], ["flat"]),
        helper.make_node("Mul", ["flat", "flip"], ["signed"]),
        helper.make_node("Add", ["signed", "base"], ["logits"]),
    ]
    return kit.model(nodes, [flip, base], {"image": shape, "golden": shape}, {"logits": ["n", 2]})


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Bundle], Sessions]:
    """Experts ready to run: `e` with batches of at most two, `single` of one; `compared` needs a reference."""
    folder = tmp_path_factory.mktemp("executors")
    bundles = [
        kit.write_bundle(folder, "e", kit.conv_net(3), max_batch=2),
        kit.write_bundle(folder, "compared", difference_net(), inputs=COMPARED, head=DIFFERS),
        kit.write_bundle(folder, "single", kit.conv_net(4, batch=1), max_batch=1),
    ]
    store = Store(folder / "store")
    memory = Weights(store.segment_path)
    sessions = Sessions(memory, runtime.CpuPlace(), activation_bytes=64 << 20)
    for result in compile_bundles(store, bundles, report=lambda name, result: None).values():
        assert isinstance(result, Compiled)
        memory.load(result.segments)
        sessions.activate(result)
    return bundles, sessions


def picture(seed: int, *shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape or (20, 24, 3), np.uint8)


def inspection(workshop: tuple[list[Bundle], Sessions], look: Callable[[str], Views]) -> Inspection:
    bundles, sessions = workshop
    return Inspection(sessions, {b.manifest.name: b.manifest for b in bundles}, look)


def test_a_batch_is_answered_as_each_of_its_pictures_alone(workshop: tuple[list[Bundle], Sessions]) -> None:
    [bundle, *_], _ = workshop
    work = inspection(workshop, lambda request: Views(picture(int(request))))
    together = work(batch(1, requests=("1", "2", "3", "4", "5")))
    alone = [work(batch(1, requests=(name,))).answers[0] for name in "12345"]
    assert [labels(answer) for answer in together.answers] == [labels(answer) for answer in alone]
    prepared = np.stack([images.prepare(picture(seed), bundle.manifest.inputs[0]) for seed in range(1, 6)])
    outputs = kit.run_plain(bundle.model_path, {"image": prepared})
    assert [labels(a) for a in together.answers] == [
        labels(a) for a in heads.findings(bundle.manifest, outputs, [(24, 20)] * 5)
    ]
    assert together.seconds > 0


def test_an_expert_for_single_pictures_answers_a_batch_one_by_one(workshop: tuple[list[Bundle], Sessions]) -> None:
    work = inspection(workshop, lambda request: Views(picture(int(request))))
    done = work(batch(1, expert="single", requests=("1", "2", "3")))
    alone = [work(batch(1, expert="single", requests=(name,))).answers[0] for name in "123"]
    assert [labels(answer) for answer in done.answers] == [labels(answer) for answer in alone]


def labels(answer: heads.Answer) -> list[tuple[str, float, bool]]:
    assert not isinstance(answer, Refusal), answer
    return [(finding.label, round(finding.score, 4), finding.fails) for finding in answer]


def test_a_picture_that_cannot_be_looked_at_does_not_spoil_its_batch(
    workshop: tuple[list[Bundle], Sessions],
) -> None:
    refused: dict[str, MessageError] = {
        "broken": PictureError("picture-damaged", "it is cut", "send it again"),
        "gone": MessageError("spool-missing", "its bytes are gone", "send it again"),
    }

    def look(request: str) -> Views:
        if request in refused:
            raise refused[request]
        return Views(picture(1))

    done = inspection(workshop, look)(batch(1, requests=("broken", "a", "gone", "b")))
    assert done.answers[0] == Refusal("picture-damaged", "it is cut (send it again)")
    assert done.answers[2] == Refusal("spool-missing", "its bytes are gone (send it again)")
    assert labels(done.answers[1]) == labels(done.answers[3])


def test_a_batch_of_nothing_but_refusals_does_not_run(workshop: tuple[list[Bundle], Sessions]) -> None:
    def look(request: str) -> Views:
        raise PictureError("picture-empty", "nothing", "send it")

    bundles, sessions = workshop
    work = Inspection(sessions, {"absent": bundles[0].manifest}, look)
    assert work(batch(1, expert="absent")).answers == (Refusal("picture-empty", "nothing (send it)"),)


def test_an_expert_that_compares_gets_the_reference_or_says_that_it_is_missing(
    workshop: tuple[list[Bundle], Sessions],
) -> None:
    dark, bright = np.zeros((16, 16), np.uint8), np.full((16, 16), 204, np.uint8)
    views = {"same": Views(dark, dark), "other": Views(bright, dark), "alone": Views(bright)}
    done = inspection(workshop, views.__getitem__)(batch(1, expert="compared", requests=("same", "alone", "other")))
    assert labels(done.answers[0]) == [("same", 1.0, False)]
    assert labels(done.answers[2]) == [("other", 0.8, True)]
    alone = done.answers[1]
    assert isinstance(alone, Refusal)
    assert alone.reason == "reference-missing"


def test_an_expert_that_is_not_ready_fails_the_whole_batch(workshop: tuple[list[Bundle], Sessions]) -> None:
    bundles, _ = workshop
    reports: SimpleQueue[Event] = SimpleQueue()
    empty = Sessions(Weights(lambda name: bundles[0].folder / name), runtime.CpuPlace(), activation_bytes=64 << 20)
    work = Inspection(empty, {"e": bundles[0].manifest}, lambda request: Views(picture(1)))
    executors = Executors({"one": "cpu"}, work, reports.put)
    executors.run(batch(7))
    assert reports.get(timeout=TIMEOUT) == RunFailed(batch(7), Refusal("run", "e is not active (load it first)"))
    executors.stop()
