from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import pytest

from appliance.core.types import Event, Evict, Load, LoadFailed, Refusal, Segment
from appliance.drivers import runtime
from appliance.engine.cancellation import Cancellation
from appliance.engine.executors import LoaderLane
from appliance.engine.residents import Residents
from appliance.engine.sessions import Sessions
from appliance.engine.weights import Weights
from appliance.errors import Cancelled, RunError
from appliance.store.compile import compile_bundles
from appliance.store.store import Compiled, Store
from tests import kit_models as kit

TIMEOUT = 60.0


class SlowDisk(Weights):
    """It delivers a segment when told to, and until then whoever waits for it can only be cancelled."""

    def __init__(self, segment_path: Callable[[str], Path]) -> None:
        super().__init__(segment_path)
        self.asked: SimpleQueue[tuple[Segment, bool]] = SimpleQueue()
        self._turns = threading.Condition()
        self._delivered: set[Segment] = set()
        self._rounds: dict[Segment, int] = {}

    def deliver(self, *segments: Segment) -> None:
        with self._turns:
            self._delivered.update(segments)
            self._turns.notify_all()

    def load(self, segments: Sequence[Segment], *, ahead: bool = False) -> None:
        for segment in segments:
            with self._turns:
                begun = self._rounds.setdefault(segment, 0)
                self.asked.put((segment, ahead))
                assert self._turns.wait_for(
                    lambda segment=segment, begun=begun: (  # type: ignore[misc]
                        segment in self._delivered or self._rounds[segment] != begun
                    ),
                    TIMEOUT,
                )
                if self._rounds[segment] != begun:
                    raise Cancelled("the disk was told so")
            super().load([segment], ahead=ahead)

    def cancel(self, segments: Sequence[Segment]) -> None:
        with self._turns:
            for segment in segments:
                self._rounds[segment] = self._rounds.get(segment, 0) + 1
            self._turns.notify_all()


class Yard:
    """Experts `e1` and `e2` of one trunk: a segment each of their own, then the one that they share."""

    def __init__(self, store: Store, compiled: Mapping[str, Compiled]) -> None:
        self.compiled = compiled
        self.disk = SlowDisk(store.segment_path)
        self.sessions = Sessions(self.disk, runtime.CpuPlace(), activation_bytes=1 << 20)
        self.residents = Residents(compiled, self.disk, self.sessions)
        self.pool = ThreadPoolExecutor(4)

    @property
    def trunk(self) -> Segment:
        return self.compiled["e1"].segments[1]

    def own(self, expert: str) -> Segment:
        return self.compiled[expert].segments[0]

    def bring(self, expert: str, *, ahead: bool = False) -> tuple[Future[None], Cancellation]:
        cancellation = Cancellation()
        load = Load("cpu", expert, self.compiled[expert].segments, ahead)
        return self.pool.submit(self.residents.bring, load, cancellation), cancellation

    def asked(self) -> Segment:
        """The next segment that somebody waits for."""
        return self.disk.asked.get(timeout=TIMEOUT)[0]

    def runs(self, expert: str) -> bool:
        try:
            with self.sessions.lease(expert) as lease:
                return lease.run({"image": kit.noise(1)})["logits"].shape == (1, 7)
        except RunError:
            return False


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Mapping[str, Compiled]]:
    folder = tmp_path_factory.mktemp("residents")
    bundles = [kit.write_bundle(folder / "models", f"e{i}", kit.fine_tune(i, width=300)) for i in (1, 2)]
    store = Store(folder / "store")
    results = compile_bundles(store, bundles, report=lambda name, result: None)
    compiled = {name: result for name, result in results.items() if isinstance(result, Compiled)}
    assert compiled["e1"].segments[1] == compiled["e2"].segments[1]
    return store, compiled


@pytest.fixture
def yard(made: tuple[Store, Mapping[str, Compiled]]) -> Iterator[Yard]:
    yard = Yard(*made)
    yield yard
    yard.disk.deliver(*(segment for compiled in yard.compiled.values() for segment in compiled.segments))
    yard.pool.shutdown()


def test_what_is_hurried_is_read_as_what_is_needed_from_then_on(yard: Yard) -> None:
    brought, _ = yard.bring("e1", ahead=True)
    assert yard.disk.asked.get(timeout=TIMEOUT) == (yard.own("e1"), True)
    yard.residents.hurry("e1")
    yard.disk.deliver(yard.own("e1"), yard.trunk)
    assert yard.disk.asked.get(timeout=TIMEOUT) == (yard.trunk, False)
    brought.result(TIMEOUT)


def test_what_is_hurried_before_it_began_is_not_forgotten(yard: Yard) -> None:
    yard.residents.hurry("e1")
    yard.bring("e1", ahead=True)
    assert yard.disk.asked.get(timeout=TIMEOUT) == (yard.own("e1"), False)


def test_what_was_hurried_too_late_is_loaded_ahead_the_next_time(yard: Yard) -> None:
    yard.disk.deliver(yard.own("e1"), yard.trunk)
    yard.bring("e1", ahead=True)[0].result(TIMEOUT)
    yard.residents.hurry("e1")
    yard.residents.evict(Evict("cpu", "e1", yard.compiled["e1"].segments))
    yard.bring("e1", ahead=True)[0].result(TIMEOUT)
    assert [yard.disk.asked.get_nowait()[1] for _ in range(4)] == [True] * 4


def test_what_is_brought_runs_until_it_is_evicted(yard: Yard) -> None:
    yard.disk.deliver(yard.own("e1"), yard.trunk)
    yard.bring("e1")[0].result(TIMEOUT)
    assert yard.runs("e1")
    yard.residents.evict(Evict("cpu", "e1", yard.compiled["e1"].segments))
    assert not yard.runs("e1")
    assert yard.disk.mapped_bytes == 0


@pytest.mark.parametrize("ahead", [False, True])
def test_the_memory_hears_whether_a_load_is_ahead_of_its_need(yard: Yard, ahead: bool) -> None:
    yard.disk.deliver(yard.own("e1"), yard.trunk)
    yard.bring("e1", ahead=ahead)[0].result(TIMEOUT)
    assert [yard.disk.asked.get_nowait()[1] for _ in range(2)] == [ahead, ahead]


def test_a_load_given_up_ends_and_what_came_of_it_can_be_evicted(yard: Yard) -> None:
    yard.disk.deliver(yard.own("e1"))
    loading, cancellation = yard.bring("e1")
    assert [yard.asked(), yard.asked()] == [yard.own("e1"), yard.trunk]
    cancellation.cancel()
    with pytest.raises(Cancelled):
        loading.result(TIMEOUT)
    assert not yard.runs("e1")
    assert yard.disk.mapped_bytes > 0
    yard.residents.evict(Evict("cpu", "e1", yard.compiled["e1"].segments))
    assert yard.disk.mapped_bytes == 0


def test_what_another_load_needs_is_still_brought(yard: Yard) -> None:
    yard.disk.deliver(yard.own("e2"))
    first, cancellation = yard.bring("e1")
    assert yard.asked() == yard.own("e1")
    second, _ = yard.bring("e2")
    assert [yard.asked(), yard.asked()] == [yard.own("e2"), yard.trunk]
    cancellation.cancel()
    with pytest.raises(Cancelled):
        first.result(TIMEOUT)
    yard.disk.deliver(yard.trunk)
    second.result(TIMEOUT)
    assert yard.runs("e2")


def test_whoever_gives_up_waits_for_the_segment_that_it_brings_for_another(yard: Yard) -> None:
    yard.disk.deliver(yard.own("e1"), yard.own("e2"))
    (first, cancellation), (second, _) = yard.bring("e1"), yard.bring("e2")
    assert {yard.asked() for _ in range(4)} == {yard.own("e1"), yard.own("e2"), yard.trunk}
    cancellation.cancel()
    assert not first.done()
    yard.disk.deliver(yard.trunk)
    second.result(TIMEOUT)
    with pytest.raises(Cancelled, match="the load of e1 was given up"):
        first.result(TIMEOUT)
    assert yard.runs("e2")
    assert not yard.runs("e1")


def test_a_segment_that_two_loads_need_is_given_up_with_both(yard: Yard) -> None:
    yard.disk.deliver(yard.own("e1"), yard.own("e2"))
    loads = [yard.bring("e1"), yard.bring("e2")]
    assert {yard.asked() for _ in range(4)} == {yard.own("e1"), yard.own("e2"), yard.trunk}
    for _, cancellation in loads:
        cancellation.cancel()
    for loading, _ in loads:
        with pytest.raises(Cancelled):
            loading.result(TIMEOUT)


def test_what_is_given_up_first_is_never_asked_for(yard: Yard) -> None:
    cancellation = Cancellation()
    cancellation.cancel()
    with pytest.raises(Cancelled):
        yard.residents.bring(Load("cpu", "e1", yard.compiled["e1"].segments), cancellation)
    assert yard.disk.asked.empty()


def test_an_expert_given_up_can_be_brought_again(yard: Yard) -> None:
    loading, cancellation = yard.bring("e1")
    yard.asked()
    cancellation.cancel()
    with pytest.raises(Cancelled):
        loading.result(TIMEOUT)
    yard.disk.deliver(yard.own("e1"), yard.trunk)
    yard.bring("e1")[0].result(TIMEOUT)
    assert yard.runs("e1")


def test_a_lane_stops_though_the_disk_never_answers(yard: Yard) -> None:
    reports: SimpleQueue[Event] = SimpleQueue()
    lane = LoaderLane("cpu", 2, yard.residents.bring, reports.put)
    for expert in ("e1", "e2"):
        lane.load(Load("cpu", expert, yard.compiled[expert].segments))
    assert {yard.asked(), yard.asked()} == {yard.own("e1"), yard.own("e2")}
    lane.stop()
    ends = [reports.get_nowait(), reports.get_nowait()]
    assert {event.refusal.reason for event in ends if isinstance(event, LoadFailed)} == {"cancelled"}


def test_a_lane_gives_up_the_load_of_one_expert(yard: Yard) -> None:
    reports: SimpleQueue[Event] = SimpleQueue()
    lane = LoaderLane("cpu", 1, yard.residents.bring, reports.put)
    lane.load(Load("cpu", "e1", yard.compiled["e1"].segments))
    yard.asked()
    lane.cancel("e2")
    lane.cancel("e1")
    assert reports.get(timeout=TIMEOUT) == LoadFailed("cpu", "e1", Refusal("cancelled", "the disk was told so"))
    lane.stop()
    assert reports.empty()
