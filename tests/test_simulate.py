"""Simulation and replay: the same core, virtual time, strict worlds."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.controller import Controller
from appliance.core.types import (
    Arrived,
    Batch,
    Device,
    Event,
    Evict,
    Executor,
    Finished,
    Heard,
    Load,
    Loaded,
    LoadFailed,
    Outcome,
    Overflow,
    Refusal,
    Run,
    RunFailed,
    Segment,
    Tick,
)
from appliance.drivers import journal
from appliance.drivers.journal import Journal, Opening
from appliance.errors import ConfigError, RecordsError
from appliance.lab.simulate import (
    Following,
    HostTier,
    SharedDisk,
    World,
    controller_of,
    replay,
    simulate,
    simulated,
    under,
)
from tests.kit import BOXED, DOUBTFUL, SOUND, box, expert, inspection_graph, pretend, request


def test_who_was_given_up_while_loading_is_no_eviction() -> None:
    experts = [expert("a"), expert("detector")]
    controller, devices = box(experts, inspection_graph(["a"]), 100)
    broken = Refusal("disk", "unreadable")
    world = World(experts, devices, lambda r, e: (SOUND,), lambda action: broken)
    report = simulate(controller, world, [request("r", "c-a")])
    assert [type(action) for action in report.actions].count(Evict) == 2
    assert (report.loads, report.evictions) == (2, 0)


def test_a_run_takes_as_long_as_its_costs() -> None:
    experts = [expert("a", load=0.5, item=0.1, fixed=0.2, max_batch=2), expert("detector")]
    controller, devices = box(experts, inspection_graph(["a"]), 100, executors=1)
    report = simulate(controller, pretend(experts, devices), [request(str(n), "c-a") for n in range(4)])
    assert report.seconds == pytest.approx(0.5 + 2 * (0.2 + 2 * 0.1))
    assert report.images_per_second == pytest.approx(4 / report.seconds)


def test_pictures_that_are_late_are_no_throughput_and_have_waited_until_they_were() -> None:
    """Three at once on one executor that has time for one until they are due."""
    experts = [expert("a", load=0.1, item=0.2, fixed=0.0, max_batch=1), expert("detector")]
    controller, devices = box(experts, inspection_graph(["a"]), 100, executors=1)
    report = simulate(controller, pretend(experts, devices), [request(str(n), "c-a", deadline=0.45) for n in range(3)])
    assert Counter(verdict.outcome for verdict in report.verdicts) == {Outcome.PASS: 1, Outcome.LATE: 2}
    assert report.images_per_second == pytest.approx(1 / 0.45)
    assert sorted(report.waits_seconds) == pytest.approx([0.3, 0.45, 0.45])


def test_pictures_that_are_turned_away_are_neither_throughput_nor_have_they_waited() -> None:
    experts = [expert("a"), expert("detector")]
    controller, devices = box(experts, inspection_graph(["a"]), 100, most_waiting=3, overflow=Overflow.REJECT)
    report = simulate(controller, pretend(experts, devices), [request(str(n), "c-a") for n in range(5)])
    assert Counter(verdict.outcome for verdict in report.verdicts) == {Outcome.PASS: 3, Outcome.REJECTED: 2}
    assert report.images_per_second == pytest.approx(3 / report.seconds)
    assert len(report.waits_seconds) == 3


def test_a_world_that_served_before_counts_anew() -> None:
    experts = [expert("a"), expert("detector")]
    controller, devices = box(experts, inspection_graph(["a"]), 100)
    world = pretend(experts, devices)
    for board in range(2):
        report = simulate(controller, world, [request(f"{board}", "c-a", board * 10.0)])
        assert report.answered == 1


def test_loads_in_flight_share_the_disk() -> None:
    """Two of 100 bytes at 100 bytes/s; when a third of 50 joins half-way, all have 50 to go, each at a third of it."""
    disk = SharedDisk(100.0)
    for number in range(2):
        disk.begin(100, number, Loaded("cpu", f"long{number}"), 0.0)
    assert disk.next_seconds() == pytest.approx(2.0)
    disk.begin(50, 2, Loaded("cpu", "short"), 1.0)
    ended = []
    while (at := disk.next_seconds()) < float("inf"):
        ended.append((disk.end(at), round(at, 9)))
    assert ended == [(Loaded("cpu", name), 2.5) for name in ("long0", "long1", "short")]


def test_a_disk_that_rested_is_as_quick_as_before() -> None:
    disk = SharedDisk(100.0)
    disk.begin(100, 0, Loaded("cpu", "a"), 0.0)
    disk.end(disk.next_seconds())
    assert disk.next_seconds() == float("inf")
    disk.begin(100, 1, Loaded("cpu", "b"), 7.0)
    assert disk.next_seconds() == pytest.approx(8.0)


def test_what_left_a_gpu_comes_back_from_host_memory_as_long_as_its_tier_has_room() -> None:
    """Of three experts of 100 bytes the tier keeps two: whoever was brought or left last."""
    names = ("a", "b", "c")
    devices = (Device("gpu", 200, load_slots=1),)
    tier = HostTier(200, 1000.0, fixed_seconds=0.5)
    made = [expert(name, 100, on=("gpu",)) for name in names]
    world = World(made, devices, lambda r, e: (SOUND,), disk=SharedDisk(100.0), tiers={"gpu": tier})

    def load(name: str) -> Following:
        there = world.obey(Load("gpu", name, (Segment(f"{name}-weights", 100),)))
        assert there is not None
        world.note(there.event)
        return there

    def evict(name: str) -> None:
        world.obey(Evict("gpu", name, (Segment(f"{name}-weights", 100),)))

    assert [load(name).disk_bytes for name in "ab"] == [100, 100]
    evict("a")
    assert load("c").disk_bytes == 100, "b leaves the tier for it, which has been unused for longer than a"
    for name in "bc":
        evict(name)
    again = load("a")
    assert again.disk_bytes is None
    assert again.seconds == pytest.approx(0.5 + 0.1)
    assert load("b").disk_bytes == 100


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), max_size=40), st.integers(0, 60))
def test_a_tier_never_holds_more_than_its_budget_and_what_it_held_is_not_read(
    uses: list[tuple[str, bool]], budget: int
) -> None:
    sizes = {name: 5 * (number + 1) for number, name in enumerate("abcdef")}
    tier = HostTier(budget, 1.0)
    for name, is_brought in uses:
        segment, was_there, before = Segment(name, sizes[name]), name in tier.held, {*tier.held}
        if is_brought:
            assert tier.bring(segment) == (0 if was_there else sizes[name])
            assert (name in tier.held) == (sizes[name] <= budget)
            assert name in tier.held or {*tier.held} == before, "nobody leaves for what has no room anyway"
        else:
            assert tier.touch(segment) == was_there
        assert sum(tier.held.values()) <= budget


def test_who_is_resident_on_a_gpu_at_the_start_is_in_its_tier_too() -> None:
    made = [expert(name, 100, on=("gpu",)) for name in "ab"]
    tier = HostTier(100, 1000.0)
    World(made, [Device("gpu", 200)], lambda r, e: (), residents=[("gpu", "a"), ("gpu", "b")], tiers={"gpu": tier})
    assert [*tier.held] == ["b-weights"]


def test_who_is_resident_at_the_start_runs_at_once() -> None:
    experts = [expert("a"), expert("detector")]
    graph = inspection_graph(["a"])
    devices, executors = (Device("cpu", 100),), (Executor("cpu-0", "cpu"),)
    controller = Controller(graph, {e.name: e for e in experts}, devices, executors, residents=[("cpu", "a")])
    world = World(experts, devices, lambda request, expert: (SOUND,), residents=[("cpu", "a")])
    report = simulate(controller, world, [request("r", "c-a")])
    assert report.seconds == pytest.approx(0.03), "and no load ahead counts that goes on after the verdict"
    assert isinstance(report.actions[0], Run)


def test_a_prediction_may_be_of_another_policy(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, _opening()) as written:
        for number in range(6):
            written.note(Heard(number * 0.01, Arrived(request(str(number), "c-a", number * 0.01))))
    assert simulated(path, predict=True, policy="samba")["requests"] == 6
    with pytest.raises(ConfigError, match="no service has a policy nonsense"):
        simulated(path, predict=True, policy="nonsense")


def test_a_prediction_of_coserve_gives_each_executor_a_memory_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, replace(_opening(), devices=(Device("cpu", 30, 4, 16, (1, 2)),))) as written:
        for number in range(6):
            written.note(Heard(float(number), Arrived(request(str(number), "c-a", float(number)))))
    opening, _ = journal.read(path)
    made = under(opening, "coserve")
    assert made.devices == (Device("cpu0", 15, 1, 8, (1, 2)), Device("cpu1", 15, 1, 8, (1, 2)))
    assert made.executors == (Executor("cpu0-0", "cpu0"), Executor("cpu1-0", "cpu1"))
    assert all(expert.footprints.keys() == expert.costs.keys() == {"cpu0", "cpu1"} for expert in made.experts)
    assert under(opening, "samba").executors == (Executor("cpu-0", "cpu"),), "which gives everything to one"
    assert under(opening, "appliance") == opening
    assert simulated(path, predict=True, policy="coserve")["budget_bytes"] == 30
    assert simulated(path, predict=True, policy="coserve")["requests"] == 6


def test_experts_that_are_too_large_for_an_executors_share_are_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, replace(_opening(), devices=(Device("cpu", 19),))).close()
    with pytest.raises(ConfigError, match="a does not fit one executor's share"):
        simulated(path, predict=True, policy="coserve")


def test_a_journal_of_a_service_without_limits_and_priorities_is_read(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, _opening()).close()
    written = json.loads(path.read_text())
    for key in ("priorities", "most_waiting", "overflow"):
        del written[key]
    del written["graph"]["limits"]
    path.write_text(json.dumps(written) + "\n")
    opening, events = journal.read(path)
    assert (opening.graph.limits, opening.priorities, opening.most_waiting) == ({}, {}, None)
    assert opening.overflow is Overflow.BLOCK
    assert list(events) == []


def test_a_written_journal_replays_to_the_same_actions(tmp_path: Path) -> None:
    experts = [expert(name, 40) for name in ("a", "b", "detector")]
    graph = replace(inspection_graph(["a", "b"]), limits={"detector": 2})
    priorities, most, overflow = {"line1": 3}, 20, Overflow.OLDEST
    controller, devices = box(experts, graph, 90, priorities=priorities, most_waiting=most, overflow=overflow)
    events: list[Heard] = []
    handle = controller.handle

    def noted(event: Event, now: float, *, more: bool = False) -> list[object]:
        events.append(Heard(now, event, more))
        return list(handle(event, now, more=more))

    controller.handle = noted  # type: ignore[method-assign, assignment]
    requests = [request(str(n), f"c-{'ab'[n % 2]}", n // 3 * 0.03, line=f"line{n % 2}") for n in range(30)]
    live = simulate(controller, pretend(experts, devices, DOUBTFUL), requests)

    executors = tuple(queue.executor for queue in controller.scheduler.queues.values())
    path = tmp_path / "journal.jsonl"
    opening = Opening(
        "0", graph, tuple(experts), devices, executors, {}, (), (), "appliance", priorities, most, overflow
    )
    with Journal(path, opening) as written:
        for heard in events:
            written.note(heard)
    opening, read = journal.read(path)
    again = replay(controller_of(opening), pretend(opening.experts, opening.devices, DOUBTFUL), read)
    assert again.actions == live.actions
    found = simulated(path, predict=False)
    assert (found["loads"], found["evictions"], found["requests"]) == (live.loads, live.evictions, 30)
    assert simulated(path, predict=True)["loads"] == live.loads


BATCH = Batch(1, "cpu-0", "cpu", "a", ("r", "s"))
EVENTS: list[Event] = [
    Arrived(request("r", "c-a", 1.5, 3.25)),
    Loaded("cpu", "a"),
    LoadFailed("cpu", "a", Refusal("disk", "gone")),
    Finished(BATCH, ((BOXED, DOUBTFUL), Refusal("picture-damaged", "x")), 0.125),
    RunFailed(BATCH, Refusal("run", "y")),
    Tick(),
]


@given(st.lists(st.builds(Heard, st.floats(0, 1e6), st.sampled_from(EVENTS), st.booleans()), max_size=20))
def test_every_event_survives_the_journal(tmp_path_factory: pytest.TempPathFactory, events: list[Heard]) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    with Journal(path, _opening()) as written:
        for heard in events:
            written.note(heard)
    opening, read = journal.read(path)
    assert (opening, list(read)) == (_opening(), events)


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, _opening()) as written:
        for number in range(3):
            written.note(Heard(float(number), EVENTS[0]))
    path.write_bytes(path.read_bytes()[:-20])
    assert len(list(journal.read(path)[1])) == 2


def test_a_journal_from_before_products_were_noted_is_read(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, _opening()) as written:
        written.note(Heard(0.0, EVENTS[0]))
    opening, event = path.read_text().splitlines()
    older = {key: value for key, value in json.loads(opening).items() if key != "products"}
    path.write_text(f"{json.dumps(older)}\n{event}\n")
    assert journal.read(path)[0] == replace(_opening(), products={})


def test_a_foreign_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, _opening()) as written:
        written.note(Heard(0.0, EVENTS[0]))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{}", lines[1]]))
    with pytest.raises(RecordsError, match="line 2"):
        list(journal.read(path)[1])


@pytest.mark.parametrize("content", [None, "", "no json\n"])
def test_what_is_no_journal_is_an_error(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "journal.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RecordsError, match=r"journal\.jsonl"):
        journal.read(path)


def test_a_journal_ends_before_it_fills_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_BYTES", 3000)
    path = tmp_path / "journal.jsonl"
    with Journal(path, _opening()) as written:
        for number in range(1000):
            written.note(Heard(float(number), EVENTS[0]))
    assert path.stat().st_size <= 3000
    assert list(journal.read(path)[1])


def _opening() -> Opening:
    experts = (expert("a"), expert("detector"))
    graph = inspection_graph(["a"])
    controller, devices = box(experts, graph, 100)
    executors = tuple(queue.executor for queue in controller.scheduler.queues.values())
    return Opening("0", graph, experts, devices, executors, {}, products={"boards": {"c-a": 3}})
