from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper

from appliance.catalog import Bundle
from appliance.core.types import Batch, Device, Event, Finished, Load, Loaded, LoadFailed, Refusal, RunFailed
from appliance.drivers import heads, images, runtime
from appliance.drivers.images import Views
from appliance.engine.arena import Arena
from appliance.engine.cancellation import Cancellation
from appliance.engine.executors import Executors, Inspection, LoaderLane
from appliance.engine.sessions import Sessions
from appliance.engine.weights import Weights
from appliance.errors import Cancelled, LoadError, MessageError, ModelError, OutOfMemory, PictureError, RunError
from appliance.store.compile import compile_bundles
from appliance.store.store import Compiled, Store
from tests import kit_models as kit
from tests.kit_children import kept_children
from tests.kit_process import amid_work
from tests.kit_segments import bytes_of
from tests.test_sessions import long_net

__all__ = ["kept_children"]  # a fixture

pytestmark = pytest.mark.usefixtures("kept_children")

TIMEOUT = 60.0
CPU = Device("cpu", 0)


def batch(number: int, executor: str = "one", expert: str = "e", requests: tuple[str, ...] = ("r",)) -> Batch:
    return Batch(number, executor, "cpu", expert, requests)


def finished(done: Batch) -> Event:
    return Finished(done, ((),) * len(done.requests), 0.0)


def test_every_batch_is_reported_by_the_thread_of_its_executor() -> None:
    reports: SimpleQueue[Event] = SimpleQueue()
    threads: dict[str, set[int]] = {"one": set(), "two": set()}

    def work(done: Batch, cancellation: Cancellation) -> Event:
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

    def work(done: Batch, cancellation: Cancellation) -> Event:
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
    assert [reports.get(timeout=TIMEOUT) for _ in range(2)] == [finished(batch(1)), finished(batch(2))]
    executors.stop()


@pytest.mark.parametrize(
    ("error", "reason", "detail"),
    [
        (RunError("e failed", "look"), "run", "e failed (look)"),
        (ZeroDivisionError("division by zero"), "internal", "ZeroDivisionError: division by zero"),
        (MemoryError(), "out-of-memory", "batch of e: this process had no memory left"),
        (OutOfMemory("e needs more"), "out-of-memory", "e needs more"),
    ],
)
def test_whatever_work_raises_becomes_a_failed_run_and_the_thread_lives(
    error: Exception, reason: str, detail: str
) -> None:
    reports: SimpleQueue[Event] = SimpleQueue()

    def work(done: Batch, cancellation: Cancellation) -> Event:
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

    def bring(action: Load, cancellation: Cancellation) -> None:
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


def until_cancelled(cancellation: Cancellation) -> None:
    """What can be given up, and never ends otherwise."""
    ended = threading.Event()
    with cancellation.ended_by(ended.set):
        assert ended.wait(TIMEOUT)
    cancellation.check("the work")


def test_a_batch_that_runs_is_given_up_and_its_executor_goes_on() -> None:
    begun: SimpleQueue[int] = SimpleQueue()
    reports: SimpleQueue[Event] = SimpleQueue()

    def work(done: Batch, cancellation: Cancellation) -> Event:
        begun.put(done.id)
        if done.id == 1:
            until_cancelled(cancellation)
        return finished(done)

    executors = Executors({"one": "cpu"}, work, reports.put)
    executors.run(batch(1))
    assert begun.get(timeout=TIMEOUT) == 1
    executors.run(batch(2))
    executors.cancel(3)
    executors.cancel(1)
    assert reports.get(timeout=TIMEOUT) == RunFailed(batch(1), Refusal("cancelled", "the work was given up"))
    assert reports.get(timeout=TIMEOUT) == finished(batch(2))
    executors.cancel(2)
    executors.stop()
    assert reports.empty()


def test_a_batch_given_up_on_the_desk_never_runs() -> None:
    begun: SimpleQueue[int] = SimpleQueue()
    reports: SimpleQueue[Event] = SimpleQueue()

    def work(done: Batch, cancellation: Cancellation) -> Event:
        begun.put(done.id)
        until_cancelled(cancellation)
        return finished(done)

    executors = Executors({"one": "cpu"}, work, reports.put)
    executors.run(batch(1))
    assert begun.get(timeout=TIMEOUT) == 1
    executors.run(batch(2))
    executors.cancel(2)
    executors.cancel(1)
    ends = [reports.get(timeout=TIMEOUT) for _ in range(2)]
    assert ends[1] == RunFailed(batch(2), Refusal("cancelled", "the batch of e was given up"))
    executors.stop()
    assert begun.empty()


def test_stopping_gives_up_all_batches() -> None:
    reports: SimpleQueue[Event] = SimpleQueue()

    def work(done: Batch, cancellation: Cancellation) -> Event:
        until_cancelled(cancellation)
        return finished(done)

    executors = Executors({"one": "cpu", "two": "cpu"}, work, reports.put)
    for name in ("one", "two"):
        executors.run(batch(1, name))
    executors.stop()
    ends = [reports.get_nowait() for _ in range(2)]
    assert {end.refusal.reason for end in ends if isinstance(end, RunFailed)} == {"cancelled"}


def ahead(expert: str) -> Load:
    return Load("cpu", expert, (), ahead=True)


def test_what_is_needed_is_brought_before_what_is_loaded_ahead() -> None:
    begun: SimpleQueue[str] = SimpleQueue()
    reports: SimpleQueue[Event] = SimpleQueue()
    go = threading.Event()

    def bring(action: Load, cancellation: Cancellation) -> None:
        begun.put(action.expert)
        assert action.expert not in ("first", "needed") or go.wait(TIMEOUT)

    lane = LoaderLane("cpu", 1, bring, reports.put)
    lane.load(load("first"))
    assert begun.get(timeout=TIMEOUT) == "first"
    lane.load(load("needed"))
    lane.load(ahead("ahead"))
    lane.load(ahead("ahead too"))
    lane.load(load("needed too"))
    go.set()
    assert begun.get(timeout=TIMEOUT) == "needed"
    assert begun.get(timeout=TIMEOUT) == "needed too"
    assert [begun.get(timeout=TIMEOUT) for _ in range(2)] == ["ahead", "ahead too"]
    for _ in range(5):
        reports.get(timeout=TIMEOUT)
    lane.stop()


def test_a_load_ahead_that_is_hurried_is_brought_as_one_that_is_needed() -> None:
    begun: SimpleQueue[Load] = SimpleQueue()
    hurried: SimpleQueue[str] = SimpleQueue()
    reports: SimpleQueue[Event] = SimpleQueue()
    go = threading.Event()

    def bring(action: Load, cancellation: Cancellation) -> None:
        begun.put(action)
        assert not action.ahead or go.wait(TIMEOUT)

    lane = LoaderLane("cpu", 1, bring, reports.put, hurried.put)
    lane.load(ahead("in work"))
    assert begun.get(timeout=TIMEOUT) == ahead("in work")
    lane.load(ahead("waiting"))
    lane.hurry("waiting")
    assert begun.get(timeout=TIMEOUT) == load("waiting")
    lane.hurry("in work")
    assert [hurried.get(timeout=TIMEOUT) for _ in range(2)] == ["waiting", "in work"]
    go.set()
    lane.stop()


def test_a_load_ahead_keeps_no_needed_load_waiting() -> None:
    reports: SimpleQueue[Event] = SimpleQueue()
    begun, go = threading.Event(), threading.Event()

    def bring(action: Load, cancellation: Cancellation) -> None:
        if action.ahead:
            begun.set()
            assert go.wait(TIMEOUT)

    lane = LoaderLane("cpu", 1, bring, reports.put)
    lane.load(ahead("ahead"))
    assert begun.wait(TIMEOUT)
    lane.load(load("needed"))
    assert reports.get(timeout=TIMEOUT) == Loaded("cpu", "needed")
    go.set()
    assert reports.get(timeout=TIMEOUT) == Loaded("cpu", "ahead")
    lane.stop()


def test_a_load_given_up_while_it_waits_is_never_begun() -> None:
    begun: SimpleQueue[str] = SimpleQueue()
    reports: SimpleQueue[Event] = SimpleQueue()

    def bring(action: Load, cancellation: Cancellation) -> None:
        begun.put(action.expert)
        if action.expert == "first":
            until_cancelled(cancellation)

    lane = LoaderLane("cpu", 1, bring, reports.put)
    lane.load(load("first"))
    assert begun.get(timeout=TIMEOUT) == "first"
    for expert in ("second", "third"):
        lane.load(load(expert))
    lane.cancel("second")
    assert reports.get_nowait() == LoadFailed("cpu", "second", Refusal("cancelled", "the load of second was given up"))
    lane.cancel("first")
    assert reports.get(timeout=TIMEOUT) == LoadFailed("cpu", "first", Refusal("cancelled", "the work was given up"))
    assert reports.get(timeout=TIMEOUT) == Loaded("cpu", "third")
    lane.cancel("third")
    lane.stop()
    assert reports.empty()
    assert begun.get_nowait() == "third"
    assert begun.empty()


def test_stopping_a_lane_gives_up_the_load_in_work_and_forgets_the_rest() -> None:
    reports: SimpleQueue[Event] = SimpleQueue()
    begun = threading.Event()

    def bring(action: Load, cancellation: Cancellation) -> None:
        begun.set()
        until_cancelled(cancellation)

    lane = LoaderLane("cpu", 1, bring, reports.put)
    lane.load(load("a"))
    assert begun.wait(TIMEOUT)
    lane.load(load("b"))
    lane.stop()
    assert reports.get_nowait() == LoadFailed("cpu", "a", Refusal("cancelled", "the work was given up"))
    assert reports.empty()


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
    return Inspection(CPU, sessions, {b.manifest.name: b for b in bundles}, look)


def test_a_batch_is_answered_as_each_of_its_pictures_alone(workshop: tuple[list[Bundle], Sessions]) -> None:
    [bundle, *_], _ = workshop
    work = inspection(workshop, lambda request: Views(picture(int(request))))
    together = work(batch(1, requests=("1", "2", "3", "4", "5")), Cancellation())
    alone = [work(batch(1, requests=(name,)), Cancellation()).answers[0] for name in "12345"]
    assert [labels(answer) for answer in together.answers] == [labels(answer) for answer in alone]
    prepared = np.stack([images.prepare(picture(seed), bundle.manifest.inputs[0]) for seed in range(1, 6)])
    outputs = kit.run_plain(bundle.model_path, {"image": prepared})
    assert [labels(a) for a in together.answers] == [
        labels(a) for a in heads.findings(bundle.manifest, outputs, [(24, 20)] * 5)
    ]
    assert together.seconds > 0


def test_an_expert_for_single_pictures_answers_a_batch_one_by_one(workshop: tuple[list[Bundle], Sessions]) -> None:
    work = inspection(workshop, lambda request: Views(picture(int(request))))
    done = work(batch(1, expert="single", requests=("1", "2", "3")), Cancellation())
    alone = [work(batch(1, expert="single", requests=(name,)), Cancellation()).answers[0] for name in "123"]
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

    done = inspection(workshop, look)(batch(1, requests=("broken", "a", "gone", "b")), Cancellation())
    assert done.answers[0] == Refusal("picture-damaged", "it is cut (send it again)")
    assert done.answers[2] == Refusal("spool-missing", "its bytes are gone (send it again)")
    assert labels(done.answers[1]) == labels(done.answers[3])


def test_a_batch_of_nothing_but_refusals_does_not_run(workshop: tuple[list[Bundle], Sessions]) -> None:
    def look(request: str) -> Views:
        raise PictureError("picture-empty", "nothing", "send it")

    bundles, sessions = workshop
    work = Inspection(CPU, sessions, {"absent": bundles[0]}, look)
    assert work(batch(1, expert="absent"), Cancellation()).answers == (Refusal("picture-empty", "nothing (send it)"),)


def test_an_expert_that_compares_gets_the_reference_or_says_that_it_is_missing(
    workshop: tuple[list[Bundle], Sessions],
) -> None:
    dark, bright = np.zeros((16, 16), np.uint8), np.full((16, 16), 204, np.uint8)
    views = {"same": Views(dark, dark), "other": Views(bright, dark), "alone": Views(bright)}
    done = inspection(workshop, views.__getitem__)(
        batch(1, expert="compared", requests=("same", "alone", "other")), Cancellation()
    )
    assert labels(done.answers[0]) == [("same", 1.0, False)]
    assert labels(done.answers[2]) == [("other", 0.8, True)]
    alone = done.answers[1]
    assert isinstance(alone, Refusal)
    assert alone.reason == "reference-missing"


def test_an_expert_that_is_not_ready_fails_the_whole_batch(workshop: tuple[list[Bundle], Sessions]) -> None:
    bundles, _ = workshop
    reports: SimpleQueue[Event] = SimpleQueue()
    empty = Sessions(Weights(lambda name: bundles[0].folder / name), runtime.CpuPlace(), activation_bytes=64 << 20)
    work = Inspection(CPU, empty, {"e": bundles[0]}, lambda request: Views(picture(1)))
    executors = Executors({"one": "cpu"}, work, reports.put)
    executors.run(batch(7))
    assert reports.get(timeout=TIMEOUT) == RunFailed(batch(7), Refusal("run", "e is not active (load it first)"))
    executors.stop()


# Golden samples.


@dataclass(frozen=True, slots=True)
class Proving:
    """Expert `sworn`, ready to run, whose bundle has `samples` golden samples."""

    bundle: Bundle
    compiled: Compiled
    memory: Weights
    sessions: Sessions

    def work(self, device: Device = CPU, batch_cap: int | None = None) -> Inspection:
        return Inspection(
            device, self.sessions, {"sworn": self.bundle}, lambda request: Views(picture(1)), batch_cap=batch_cap
        )

    def run(self, work: Inspection) -> Finished:
        return work(batch(1, expert="sworn"), Cancellation())

    def forget_samples(self) -> None:
        assert self.bundle.golden_path is not None
        self.bundle.golden_path.unlink()


@pytest.fixture
def proving(tmp_path: Path) -> Proving:
    return ready_to_prove(tmp_path, kit.conv_net(5), samples=5)


def ready_to_prove(folder: Path, net: ModelProto, *, samples: int, max_batch: int = 2) -> Proving:
    pictures = kit.noise(samples)
    plain = kit.plain_session(kit.save(net, folder / "net.onnx"))
    parts = [plain.run(None, {"image": pictures[i : i + max_batch]})[0] for i in range(0, samples, max_batch)]
    golden = {"image": pictures, "logits": np.concatenate(parts)}
    bundle = kit.write_bundle(folder / "models", "sworn", net, max_batch=max_batch, golden=golden)
    store = Store(folder / "store")
    [compiled] = compile_bundles(store, [bundle], report=lambda name, result: None).values()
    assert isinstance(compiled, Compiled)
    memory = Weights(store.segment_path)
    sessions = Sessions(memory, runtime.CpuPlace(), activation_bytes=64 << 20)
    memory.load(compiled.segments)
    sessions.activate(compiled)
    return Proving(bundle, compiled, memory, sessions)


def test_a_sound_expert_is_proven_before_its_first_batch_and_never_again(proving: Proving) -> None:
    work = proving.work()
    assert proving.run(work).answers
    proving.forget_samples()
    assert proving.run(work).answers
    proving.sessions.drop("sworn")
    proving.sessions.activate(proving.compiled)
    assert proving.run(work).answers
    with pytest.raises(ModelError, match=r"golden\.npz cannot be read"):
        proving.run(proving.work())


def test_another_compiled_form_is_proven_anew(proving: Proving) -> None:
    work = proving.work()
    proving.run(work)
    proving.forget_samples()
    proving.sessions.drop("sworn")
    proving.sessions.activate(replace(proving.compiled, fixed_seconds=1.0))
    with pytest.raises(ModelError):
        proving.run(work)


@dataclass(frozen=True, slots=True)
class Ran:
    """A run: how many pictures it has, those that fill it included, and when it began."""

    pictures: int
    begun_seconds: float


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Ran]:
    """The runs from now on."""
    runs: list[Ran] = []
    really_begin = Arena.begin

    def begin(arena: Arena, kind: tuple[str, int], size_bytes: int) -> bool:
        runs.append(Ran(kind[1], time.perf_counter()))
        return really_begin(arena, kind, size_bytes)

    monkeypatch.setattr(Arena, "begin", begin)
    return runs


def test_an_expert_is_proven_in_runs_no_larger_than_the_batch_for_which_there_is_memory(
    tmp_path: Path, ran: list[Ran]
) -> None:
    proving = ready_to_prove(tmp_path, kit.conv_net(5), samples=5, max_batch=4)
    work = proving.work()
    work(batch(1, expert="sworn", requests=("r", "s")), Cancellation())
    assert [run.pictures for run in ran] == [2, 2, 1, 2]


@pytest.mark.parametrize(
    ("max_batch", "cap", "items", "expected"), [(8, None, 3, 4), (5, None, 5, 5), (8, 6, 5, 6), (8, None, 8, 8)]
)
def test_a_batch_is_filled_to_a_size_that_runs_well_and_never_beyond_what_was_booked(
    tmp_path: Path, ran: list[Ran], max_batch: int, cap: int | None, items: int, expected: int
) -> None:
    proving, steps = ready_to_prove(tmp_path, kit.conv_net(5), samples=1, max_batch=max_batch), (1, 2, 4, 8)
    work = proving.work(Device("gpu", 0, batch_sizes=steps), cap)
    done = work(batch(1, expert="sworn", requests=tuple(f"{n}" for n in range(items))), Cancellation())
    assert isinstance(done, Finished)
    assert len(done.answers) == items
    assert [run.pictures for run in ran] == [1, expected]


def test_an_expert_that_takes_single_pictures_is_proven_with_single_samples(tmp_path: Path) -> None:
    proving = ready_to_prove(tmp_path, kit.conv_net(5, batch=1), samples=3, max_batch=1)
    assert proving.run(proving.work()).answers


def test_an_expert_whose_answers_are_others_reports_no_finding(proving: Proving) -> None:
    reports: SimpleQueue[Event] = SimpleQueue()
    executors = Executors({"one": "cpu"}, proving.work(), reports.put)
    segment = proving.compiled.segments[0]
    with bytes_of(proving.memory, segment.id) as view:
        sound = bytes(view)
        view[:] = flipped(sound)
        for number in range(3):
            executors.run(batch(number, expert="sworn"))
            end = reports.get(timeout=TIMEOUT)
            assert isinstance(end, RunFailed)
            assert end.refusal.reason == "golden-mismatch"
            assert end.refusal.detail.startswith("sworn: output logits is ")
        view[:] = sound
    executors.run(batch(3, expert="sworn"))
    assert isinstance(reports.get(timeout=TIMEOUT), Finished)
    executors.stop()


def flipped(content: bytes) -> bytes:
    """Every number with its sign turned."""
    return (-np.frombuffer(content, np.float32)).tobytes()


def test_the_seconds_of_a_batch_are_without_the_proof(tmp_path: Path, ran: list[Ran]) -> None:
    """They begin after the last run of the proof has begun."""
    proving = ready_to_prove(tmp_path, kit.conv_net(5), samples=400)
    done = proving.run(proving.work())
    ended = time.perf_counter()
    assert len(ran) == 400 + 1
    assert done.seconds < ended - ran[-2].begun_seconds


def test_a_batch_can_be_given_up_during_the_proof_which_is_then_done_by_the_next(proving: Proving) -> None:
    work, given_up = proving.work(), Cancellation()
    given_up.cancel()
    with pytest.raises(Cancelled):
        work(batch(1, expert="sworn"), given_up)
    assert proving.run(work).answers
    proving.forget_samples()
    assert proving.run(work).answers


def test_a_batch_in_the_middle_of_a_long_run_is_given_up(tmp_path: Path) -> None:
    single, bundle = (kit.write_bundle(tmp_path / f"{n}", "long", long_net(), head=LONG, max_batch=n) for n in (1, 500))
    store = Store(tmp_path / "store")
    # The compiler runs an expert's largest batch, too.
    [compiled] = compile_bundles(store, [single], report=lambda name, result: None).values()
    assert isinstance(compiled, Compiled)
    memory = Weights(store.segment_path)
    sessions = Sessions(memory, runtime.CpuPlace(), activation_bytes=64 << 20)
    memory.load(compiled.segments)
    sessions.activate(compiled)
    reports: SimpleQueue[Event] = SimpleQueue()
    looked = threading.Event()

    def look(request: str) -> Views:
        if request == "499":
            looked.set()
        return Views(np.zeros((kit.SIDE, kit.SIDE, 3), np.uint8))

    executors = Executors({"one": "cpu"}, Inspection(CPU, sessions, {"long": bundle}, look), reports.put)
    ten_seconds = batch(1, expert="long", requests=tuple(str(number) for number in range(500)))
    executors.run(ten_seconds)
    assert looked.wait(TIMEOUT)
    begun = time.process_time()
    amid_work(lambda: executors.cancel(1))
    end = reports.get(timeout=TIMEOUT)
    assert end == RunFailed(ten_seconds, Refusal("cancelled", "the run of long was given up"))
    assert time.process_time() - begun < 3, "of work, of which the run has ten seconds"
    executors.run(batch(2, expert="long", requests=("0",)))
    assert isinstance(reports.get(timeout=TIMEOUT), Finished)
    executors.stop()


LONG = {"kind": "classification", "output": "logits", "labels": ["a", "b", "c"], "normal": "a"}
