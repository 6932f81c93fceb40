"""Who is loaded, when and what becomes of it: patience, holds, loads ahead, shortages of memory."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import inf

import pytest

from appliance.core import thrash
from appliance.core.controller import Controller
from appliance.core.graph import compile_graph
from appliance.core.memory import RECOVERY_SECONDS
from appliance.core.policies import (
    APPLIANCE,
    PAPER,
    PATIENCE_SECONDS,
    SLACK_SHARE,
    Policy,
)
from appliance.core.types import (
    CANCELLED,
    FRAGMENTED,
    Action,
    Arrived,
    CancelLoad,
    Device,
    Evict,
    Executor,
    Finished,
    HurryLoad,
    Load,
    Loaded,
    LoadFailed,
    Outcome,
    Publish,
    Refusal,
    Rule,
    Run,
    Segment,
    Tick,
)
from appliance.lab.simulate import World, simulate
from tests.kit import DOUBTFUL, SOUND, box, expert, inspection_graph, pretend, request
from tests.kit_controller import (
    BROKEN,
    NO_MEMORY,
    Noting,
    one_expert,
    only_run,
    pinning,
    plain_experts,
)


def test_a_failed_load_is_tried_once_more_and_then_answered() -> None:
    experts = plain_experts("a")
    for failures, outcome in ((1, Outcome.PASS), (2, Outcome.ERROR)):
        left = iter([BROKEN] * failures)
        controller, devices = box(experts, inspection_graph(["a"]), 100)
        world = World(experts, devices, lambda r, e: (SOUND,), lambda a, left=left: next(left, None))  # type: ignore[misc]
        report = simulate(controller, world, [request("r", "c-a")])
        assert [v.outcome for v in report.verdicts] == [outcome]
        assert [a.expert for a in report.actions if isinstance(a, Load)][:2] == ["a", "a"]


def test_a_picture_whose_turn_came_long_before_it_is_due_is_looked_at_again_then() -> None:
    """Its deadline leaves it more time than patience: it takes its turn by patience, and displaces by its deadline."""
    experts = [*plain_experts("a", "b", size=60), expert("c", 40)]
    controller, _ = box(experts, inspection_graph(["a", "b", "c"]), 100, executors=1)
    controller.handle(Arrived(request("a1", "c-a")), 0.0)
    run = only_run(controller.handle(Loaded("cpu", "a"), 0.1))
    controller.handle(Arrived(request("c1", "c-c")), 0.1)
    controller.handle(Loaded("cpu", "c"), 0.2)
    controller.handle(Arrived(request("b1", "c-b", deadline=60.0)), 0.3)
    controller.handle(Arrived(request("a2", "c-a", deadline=100.0)), 0.4)
    controller.handle(Finished(run.batch, ((SOUND,),), 0.3), 0.5)
    assert controller.next_wakeup(0.5) == 0.3 + PATIENCE_SECONDS
    assert controller.handle(Tick(), 0.3 + PATIENCE_SECONDS) == []
    due = controller.next_wakeup(0.3 + PATIENCE_SECONDS)
    assert due is not None
    assert due == pytest.approx(60.0 - SLACK_SHARE * 0.13)
    assert [type(move) for move in controller.handle(Tick(), due)] == [Evict, Load]


def test_the_least_probable_is_loaded_first_until_patience_of_another_ends() -> None:
    """More pictures will likely come for the others: loaded later, they need no second load for these."""
    likely, rare, first = (
        expert(name, 30, probability=p) for name, p in (("likely", 0.3), ("rare", 0.1), ("first", 0.2))
    )
    experts = [likely, rare, first, expert("detector", 200)]
    for asked_again, following in ((1.0, "rare"), (PATIENCE_SECONDS + 1.0, "likely")):
        controller, _ = box(experts, inspection_graph(["likely", "rare", "first"]), 100, executors=1, load_slots=1)
        controller.handle(Arrived(request("0", "c-first")), 0.0)
        controller.handle(Arrived(request("1", "c-likely")), 0.1)
        controller.handle(Arrived(request("2", "c-rare")), asked_again)
        loads = [a for a in controller.handle(Loaded("cpu", "first"), asked_again + 0.1) if isinstance(a, Load)]
        assert [load.expert for load in loads] == [following]


def test_a_hold_that_ends_before_anybody_asks_when_to_wake_up_is_not_forgotten() -> None:
    """Deciding takes time, and small experts are held for less: what has passed since is due at once."""
    controller, _ = box(plain_experts("here", "next", size=60), inspection_graph(["here", "next"]), 100, executors=1)
    controller.handle(Arrived(request("0", "c-here")), 0.0)
    run = only_run(controller.handle(Loaded("cpu", "here"), 0.1))
    controller.handle(Finished(run.batch, ((SOUND,),), 0.1), 0.2)
    assert controller.handle(Arrived(request("1", "c-next")), 1.0) == []
    held_until = 1.0 + APPLIANCE.hold_share * 0.1
    assert controller.next_wakeup(held_until + 0.01) == pytest.approx(held_until)
    assert [type(move) for move in controller.handle(Tick(), held_until + 0.01)] == [Evict, Load]


def test_a_load_for_which_somebody_has_to_leave_is_held_for_a_moment_and_a_rarer_one_may_come_first() -> None:
    here, first, rarer = (
        expert(name, 60, load=0.4, probability=p) for name, p in (("here", 0.5), ("first", 0.2), ("rarer", 0.1))
    )
    experts = [here, first, rarer, expert("detector", 200)]
    controller, _ = box(experts, inspection_graph(["here", "first", "rarer"]), 100, executors=1, load_slots=1)
    controller.handle(Arrived(request("0", "c-here")), 0.0)
    run = only_run(controller.handle(Loaded("cpu", "here"), 0.4))
    controller.handle(Finished(run.batch, ((SOUND,),), 0.1), 0.5)
    assert controller.handle(Arrived(request("1", "c-first")), 1.0) == []
    assert controller.next_wakeup(1.0) == pytest.approx(1.0 + APPLIANCE.hold_share * 0.4)
    assert controller.handle(Arrived(request("2", "c-rarer")), 1.05) == []
    wakeup = controller.next_wakeup(1.05)
    assert wakeup is not None
    assert wakeup == pytest.approx(1.05 + APPLIANCE.hold_share * 0.4)
    evict, load = controller.handle(Tick(), wakeup)
    assert (evict, load) == (
        Evict("cpu", "here", (Segment("here-weights", 60),)),
        Load("cpu", "rarer", (Segment("rarer-weights", 60),)),
    )


def test_an_expert_loaded_for_waiting_pictures_stays_until_it_has_run() -> None:
    """However long another waits: a load that is evicted before its run would be for nothing."""
    experts = [*(expert(name, 50) for name in "abc"), expert("detector", 200)]
    controller, _ = box(experts, inspection_graph(["a", "b", "c"]), 100, executors=1)
    controller.handle(Arrived(request("a1", "c-a")), 0.0)
    controller.handle(Loaded("cpu", "a"), 0.1)
    controller.handle(Arrived(request("b1", "c-b")), 0.2)
    controller.handle(Loaded("cpu", "b"), 0.3)
    controller.handle(Arrived(request("c1", "c-c")), 0.4)
    assert controller.handle(Tick(), 0.4 + 2 * PATIENCE_SECONDS) == []


@pytest.mark.parametrize(("pictures", "waits"), [(60, False), (180, True)])
def test_a_load_for_which_somebody_leaves_waits_while_executors_have_plenty_to_run(pictures: int, waits: bool) -> None:
    """A load takes as long as ten runs of `a`, and as many are over when `b` is asked. While more than 80 are to come
    the load waits, as more may be asked of `b`."""
    experts = [expert(name, 40, item=0.01, fixed=0.0, load=0.1, max_batch=1) for name in ("a", "b", "idle")]
    graph = compile_graph({f"c-{e.name}": e.name for e in experts}, [], [e.name for e in experts])
    controller, devices = box(experts, graph, 80, executors=1)
    begun = [request("idle", "c-idle"), *(request(f"a{n}", "c-a", 1.0) for n in range(pictures))]
    report = simulate(controller, pretend(experts, devices), [*begun, request("b", "c-b", 1.2)])
    moves = [action for action in report.actions if isinstance(action, Load | Run)]
    loaded = next(n for n, move in enumerate(moves) if isinstance(move, Load) and move.expert == "b")
    runs = sum(isinstance(move, Run) and move.batch.expert == "a" for move in moves[:loaded])
    assert runs == pytest.approx(pictures - 80 if waits else 12, abs=4)
    assert len(report.verdicts) == pictures + 2


def test_whom_a_running_batch_may_lead_to_is_loaded_ahead_into_free_memory() -> None:
    controller, _ = box(plain_experts("a", size=50), inspection_graph(["a"]), 100, executors=1)
    controller.handle(Arrived(request("r", "c-a")), 0.0)
    _, ahead = controller.handle(Loaded("cpu", "a"), 0.1)
    assert ahead == Load("cpu", "detector", (Segment("detector-weights", 50),), ahead=True)


def test_nobody_leaves_for_what_is_loaded_ahead() -> None:
    controller, _ = box(plain_experts("a", "b", size=50), inspection_graph(["a", "b"]), 149, executors=1)
    controller.handle(Arrived(request("a", "c-a")), 0.0)
    controller.handle(Arrived(request("b", "c-b")), 0.0)
    controller.handle(Loaded("cpu", "a"), 0.1)
    assert [a for a in controller.handle(Loaded("cpu", "b"), 0.2) if isinstance(a, Load | Evict)] == []


def test_what_is_loaded_ahead_gives_way_to_who_waits() -> None:
    controller, _ = box(plain_experts("a", "b", size=50), inspection_graph(["a", "b"]), 100, executors=1)
    controller.handle(Arrived(request("a", "c-a")), 0.0)
    controller.handle(Loaded("cpu", "a"), 0.1)
    assert controller.handle(Arrived(request("b", "c-b")), 0.2) == [CancelLoad("cpu", "detector")]
    assert controller.handle(Arrived(request("b2", "c-b")), 0.2) == []
    evict, load = controller.handle(LoadFailed("cpu", "detector", Refusal(CANCELLED, "")), 0.3)
    assert (evict, load) == (
        Evict("cpu", "detector", (Segment("detector-weights", 50),), Rule.NOT_LOADED),
        Load("cpu", "b", (Segment("b-weights", 50),)),
    )
    assert controller.counts["load_failures"] == 0


def test_what_is_loaded_ahead_is_hurried_when_somebody_needs_it() -> None:
    controller, _ = one_expert()
    controller.handle(Arrived(request("r", "c-a")), 0.0)
    run = only_run(controller.handle(Loaded("cpu", "a"), 0.1))
    assert controller.handle(Finished(run.batch, ((DOUBTFUL,),), 0.1), 0.2) == [HurryLoad("cpu", "detector")]
    assert controller.handle(Tick(), 0.3) == []
    assert only_run(controller.handle(Loaded("cpu", "detector"), 0.4)).batch.requests == ("r",)


def test_pinned_experts_are_loaded_at_the_start_and_never_leave() -> None:
    experts = plain_experts("a", "b", "c", size=30)
    controller, devices = pinning(experts, 90, pinned=["b"], preload=["a"])
    assert controller.handle(Tick(), 0.0) == [
        Load("cpu", "b", (Segment("b-weights", 30),), ahead=True),
        Load("cpu", "a", (Segment("a-weights", 30),), ahead=True),
    ]
    controller, devices = pinning(experts, 90, pinned=["b"], preload=["a"])
    stream = [request(f"{n}", f"c-{name}", n * 0.3) for n, name in enumerate("abccabcbacbabc" * 4)]
    report = simulate(controller, pretend(experts, devices, DOUBTFUL), stream)
    assert len(report.verdicts) == len(stream)
    assert [a for a in report.actions if isinstance(a, Evict) and a.expert == "b"] == []
    assert report.evictions > 0


def test_an_expert_that_has_no_room_beside_the_pinned_ones_is_refused_and_not_kept_waiting() -> None:
    controller, _ = pinning(plain_experts("a", "b", size=60), 100, pinned=["b"])
    (publish, *_) = controller.handle(Arrived(request("r", "c-a")), 0.0)
    assert isinstance(publish, Publish)
    assert publish.verdict.refusal is not None
    assert publish.verdict.refusal.reason == "no-room"


def test_what_is_preloaded_gives_way_to_who_waits_and_a_pinned_expert_comes_later() -> None:
    controller, _ = pinning(plain_experts("a", "b", "c", size=30), 60, pinned=["b"], preload=["c"])
    controller.handle(Tick(), 0.0)
    assert controller.handle(Arrived(request("r", "c-a")), 0.1) == [CancelLoad("cpu", "b"), CancelLoad("cpu", "c")]
    _, load = controller.handle(LoadFailed("cpu", "b", Refusal(CANCELLED, "")), 0.2)
    assert load == Load("cpu", "a", (Segment("a-weights", 30),))
    controller.handle(LoadFailed("cpu", "c", Refusal(CANCELLED, "")), 0.3)
    run = only_run(controller.handle(Loaded("cpu", "a"), 0.4))
    moves = controller.handle(Finished(run.batch, ((SOUND,),), 0.1), 0.5)
    assert [m.expert for m in moves if isinstance(m, Load)] == []
    assert controller.ledgers["cpu"].resident == ("a", "b")


IN_PIECES = Refusal(FRAGMENTED, "40 free in pieces of 20")


def test_a_load_that_finds_no_memory_evicts_and_is_tried_once_more() -> None:
    controller, _ = box(plain_experts("a", "b", size=30), inspection_graph(["a", "b"]), 100, executors=1, load_slots=1)
    controller.handle(Arrived(request("a", "c-a")), 0.0)
    run = only_run(controller.handle(Loaded("cpu", "a"), 0.1))
    controller.handle(Loaded("cpu", "detector"), 0.2)
    controller.handle(Finished(run.batch, ((SOUND,),), 0.1), 0.3)
    controller.handle(Arrived(request("b", "c-b")), 0.4)
    moves = controller.handle(LoadFailed("cpu", "b", NO_MEMORY), 0.5)
    assert [(type(move), move.expert) for move in moves if isinstance(move, Evict | Load)] == [
        (Evict, "b"),
        (Evict, "detector"),
        (Load, "b"),
    ]
    assert controller.ledgers["cpu"].used_bytes == 60


def test_who_finds_no_memory_twice_asks_the_cpu_and_then_is_told() -> None:
    experts = [expert(name, on=("gpu", "cpu")) for name in ("a", "detector")]
    devices = (Device("gpu", 100), Device("cpu", 100))
    names = (Executor("gpu-0", "gpu"), Executor("cpu-0", "cpu"))
    for broken, outcome, where in ((("gpu",), Outcome.PASS, "cpu"), (("gpu", "cpu"), Outcome.ERROR, None)):
        for kind in (Load, Run):

            def fails(
                action: Load | Run, broken: Sequence[str] = broken, kind: type[Load | Run] = kind
            ) -> Refusal | None:
                device = action.device if isinstance(action, Load) else action.batch.device
                return NO_MEMORY if isinstance(action, kind) and device in broken else None

            controller = Controller(inspection_graph(["a"]), {e.name: e for e in experts}, devices, names)
            world = World(experts, devices, lambda r, e: (SOUND,), fails)
            (verdict,) = simulate(controller, world, [request("r", "c-a")]).verdicts
            assert verdict.outcome is outcome
            assert [step.executor for step in verdict.steps] == ([f"{where}-0"] if where else [])
            assert where or (verdict.refusal == NO_MEMORY)


def test_memory_withheld_after_a_shortage_comes_back_by_and_by() -> None:
    controller, _ = one_expert()
    ledger = controller.ledgers["cpu"]
    controller.handle(Arrived(request("r", "c-a")), 0.0)
    controller.handle(LoadFailed("cpu", "a", NO_MEMORY), 0.1)
    controller.handle(Loaded("cpu", "a"), 0.2)
    assert ledger.withheld_bytes == 100
    wakeups = []
    while (wakeup := controller.next_wakeup(0.0)) is not None:
        controller.handle(Tick(), wakeup)
        wakeups.append((wakeup, ledger.withheld_bytes))
    assert wakeups[:2] == [(0.1 + RECOVERY_SECONDS, 50), (0.1 + 2 * RECOVERY_SECONDS, 25)]
    assert wakeups[-1][1] == 0


def test_a_device_whose_free_memory_is_in_pieces_lets_one_leave_and_is_not_short_of_memory() -> None:
    controller, _ = box(plain_experts("a", "b", size=30), inspection_graph(["a", "b"]), 100, executors=1, load_slots=1)
    controller.handle(Arrived(request("a", "c-a")), 0.0)
    run = only_run(controller.handle(Loaded("cpu", "a"), 0.1))
    controller.handle(Loaded("cpu", "detector"), 0.2)
    controller.handle(Finished(run.batch, ((SOUND,),), 0.1), 0.3)
    controller.handle(Arrived(request("b", "c-b")), 0.4)
    for left in ("detector", "a"):
        moves = controller.handle(LoadFailed("cpu", "b", IN_PIECES), 0.5)
        assert [(m.expert, m.rule if isinstance(m, Evict) else None) for m in moves if isinstance(m, Evict | Load)] == [
            ("b", Rule.NOT_LOADED),
            (left, Rule.FRAGMENTED),
            ("b", None),
        ]
    assert controller.ledgers["cpu"].withheld_bytes == 0
    controller.handle(LoadFailed("cpu", "b", IN_PIECES), 0.6)
    moves = controller.handle(LoadFailed("cpu", "b", IN_PIECES), 0.7)
    assert [m.verdict.refusal for m in moves if isinstance(m, Publish)] == [IN_PIECES], "nobody is left who could leave"


def test_what_failed_while_nobody_needed_it_does_not_count_when_somebody_does() -> None:
    controller, _ = one_expert()
    controller.handle(Arrived(request("r1", "c-a")), 0.0)
    run = only_run(controller.handle(Loaded("cpu", "a"), 0.1))
    controller.handle(LoadFailed("cpu", "detector", BROKEN), 0.2)
    (load,) = controller.handle(Finished(run.batch, ((DOUBTFUL,),), 0.1), 0.3)
    assert isinstance(load, Load)
    (_, load) = controller.handle(LoadFailed("cpu", "detector", BROKEN), 0.4)
    assert isinstance(load, Load), "the first of two attempts"


def test_a_pinned_expert_whose_load_failed_is_loaded_again() -> None:
    controller, _ = pinning(plain_experts("a", "b"), 90, pinned=["b"])
    controller.handle(Tick(), 0.0)
    _, load = controller.handle(LoadFailed("cpu", "b", BROKEN), 0.1)
    assert load == Load("cpu", "b", (Segment("b-weights", 10),), ahead=True)
    assert [type(move) for move in controller.handle(LoadFailed("cpu", "b", BROKEN), 0.2)] == [Evict]


def test_nobody_is_loaded_ahead_while_somebody_waits_for_memory() -> None:
    experts = [expert("hot", 40), expert("cold", 70), expert("detector", 20)]
    controller, _ = box(experts, inspection_graph(["hot", "cold"]), 100, executors=1)
    controller.handle(Arrived(request("h1", "c-hot")), 0.0)
    controller.handle(Arrived(request("c", "c-cold")), 0.0)
    moves = controller.handle(Loaded("cpu", "hot"), 0.1)
    assert [type(move) for move in moves] == [Run]


def test_a_quick_load_goes_before_rarer_experts_that_take_long() -> None:
    """The likeliest of all, but its load takes no longer than one of its pictures."""
    experts = [
        expert("first", 90),
        expert("rare", 90, probability=0.01),
        expert("detector", 90, load=0.02, probability=0.5),
    ]
    graph = compile_graph({f"c-{e.name}": e.name for e in experts}, [], [e.name for e in experts])
    controller, _ = box(experts, graph, 100, executors=1, load_slots=1)
    for name in ("first", "rare", "detector"):
        controller.handle(Arrived(request(name, f"c-{name}")), 0.0)
    run = only_run(controller.handle(Loaded("cpu", "first"), 0.1))
    moves = controller.handle(Finished(run.batch, ((SOUND,),), 0.1), 0.2)
    assert [move.expert for move in moves if isinstance(move, Load)] == ["detector"]


def test_while_it_thrashes_each_load_serves_more_and_everybody_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 experts in memory for 60, and twice as many pictures as the executors can run."""
    chance = random.Random(1)
    names = [f"e{number:03}" for number in range(300)]
    experts = [expert(name, load=0.6, item=0.04, fixed=0.01, probability=1 / 300) for name in names]
    graph = compile_graph({f"c-{name}": name for name in names}, [], names)
    requests = [request(str(n), f"c-{chance.choice(names)}", n * 0.01) for n in range(9000)]
    loads = []
    for share in (inf, thrash.BEGIN_SHARE):  # without protection, and with it
        monkeypatch.setattr(thrash, "BEGIN_SHARE", share)
        controller, devices = box(experts, graph, 600, executors=2, load_slots=4)
        report = simulate(controller, pretend(experts, devices), requests)
        assert len(report.verdicts) == len(requests)
        assert max(verdict.waited_seconds for verdict in report.verdicts) < 200
        assert controller.counts["came_back"] > 0
        assert controller.thrashing(report.seconds + 3600) == {}, "it is over by itself"
        loads.append(report.loads)
    assert loads[1] < 0.9 * loads[0]


def test_who_waits_for_a_load_is_counted_by_what_it_waits_for() -> None:
    experts = [expert(name, 60, load=0.4) for name in ("a", "b")]
    graph = compile_graph({"c-a": "a", "c-b": "b"}, [], ["a", "b"])
    controller, devices = box(experts, graph, 100, executors=1)
    report = simulate(controller, pretend(experts, devices), [request("0", "c-a"), request("1", "c-b", 2.0)])
    assert (report.loads, controller.counts["loads_evicting"]) == (2, 1)
    waits = controller.load_waits
    assert waits.tasks == 2
    assert waits.load_seconds == pytest.approx(0.8)
    assert waits.turn_seconds == pytest.approx(APPLIANCE.hold_share * 0.4), "b was held before a left for it"
    assert controller.idle_seconds == pytest.approx(2.1 - 0.4), "a was used last when its run began"


def test_load_and_run_overlap() -> None:
    controller, _ = box(plain_experts("a", "b"), inspection_graph(["a", "b"]), 100, executors=1)
    controller.handle(Arrived(request("a1", "c-a")), 0.0)
    controller.handle(Loaded("cpu", "a"), 0.1)
    assert isinstance(controller.handle(Arrived(request("b1", "c-b")), 0.11)[0], Load)


@pytest.mark.parametrize("policy", PAPER, ids=lambda policy: policy.name)
def test_a_load_occupies_its_executor_where_queues_are_worked_off_in_order(policy: Policy) -> None:
    experts = plain_experts("a", "b", "c", size=40)
    controller, devices = box(experts, inspection_graph(["a", "b", "c"]), 100, executors=1, policy=policy)
    stream = [request(f"{n}", f"c-{name}", n * 0.05) for n, name in enumerate("abcabccbacab")]
    busy: set[str] = set()

    class Alone(Noting):
        def look(self, actions: Sequence[Action], now: float) -> None:
            event = self.events[-1][1]
            busy.difference_update(
                {"run"} if isinstance(event, Finished) else {"load"} if isinstance(event, Loaded) else ()
            )
            for action in actions:
                if isinstance(action, Load | Run):
                    assert not busy
                    busy.add("run" if isinstance(action, Run) else "load")

    simulate(Alone(controller), pretend(experts, devices, DOUBTFUL), stream)  # type: ignore[arg-type]


def test_a_load_failure_event_evicts_what_was_booked() -> None:
    controller, _ = one_expert()
    controller.handle(Arrived(request("r", "c-a")), 0.0)
    actions = controller.handle(LoadFailed("cpu", "a", BROKEN), 0.1)
    segments = (Segment("a-weights", 10),)
    assert actions == [Evict("cpu", "a", segments, Rule.NOT_LOADED), Load("cpu", "a", segments)]
