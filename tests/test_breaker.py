"""Experts that keep failing: who is set aside, when one may try again, and who stands in meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.breaker import (
    FAILURES,
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    OWN_FAULT,
    WINDOW_SECONDS,
    Breaker,
)
from appliance.core.controller import Controller
from appliance.core.graph import compile_graph
from appliance.core.types import (
    FAILING,
    GOLDEN_MISMATCH,
    Acknowledge,
    Action,
    Arrived,
    Command,
    Device,
    Event,
    Evict,
    Executor,
    Finding,
    Finished,
    Load,
    Loaded,
    Outcome,
    Publish,
    Quarantine,
    Refusal,
    Reinstate,
    Request,
    Rule,
    Run,
    RunFailed,
    StandIn,
    Tick,
    Verb,
    Verdict,
)
from appliance.lab.simulate import World, simulate
from tests.kit import DOUBTFUL, SOUND, expert, inspection_graph, is_idle, request

RUN = Refusal("run", "the runtime says no")
LATER = FIRST_PAUSE_SECONDS + 1.0


def test_so_many_failures_in_a_row_open_it() -> None:
    breaker = Breaker()
    assert [breaker.failed("a", "run", float(n)) for n in range(FAILURES)] == [False] * (FAILURES - 1) + [True]


def test_one_success_between_them_begins_the_count_anew() -> None:
    breaker = Breaker()
    for now in range(FAILURES - 1):
        breaker.failed("a", "run", float(now))
    assert not breaker.worked("a"), "it was not on trial"
    assert not breaker.failed("a", "run", 9.0)


def test_failures_that_are_far_apart_do_not_add_up() -> None:
    breaker = Breaker()
    assert not any(breaker.failed("a", "run", n * WINDOW_SECONDS / 2) for n in range(20))


@pytest.mark.parametrize("reason", ["picture-damaged", "reference-missing", "out-of-memory", "device", "cancelled"])
def test_what_is_no_fault_of_the_expert_does_not_count(reason: str) -> None:
    breaker = Breaker()
    assert not any(breaker.failed("a", reason, float(n)) for n in range(3 * FAILURES))


def test_the_pause_before_a_trial_grows_up_to_a_bound_and_starts_small_after_a_success() -> None:
    breaker, now, pauses = Breaker(), 0.0, list[float]()
    for _ in range(10):
        breaker.open("a", now)
        pauses.append(next(s for s in range(10_000) if breaker.try_again("a", now + s)))
        now += pauses[-1]
        assert breaker.failed("a", "load", now), "on trial one failure is enough"
    assert pauses[:3] == [FIRST_PAUSE_SECONDS, 2 * FIRST_PAUSE_SECONDS, 4 * FIRST_PAUSE_SECONDS]
    assert pauses[-1] == LONGEST_PAUSE_SECONDS
    assert breaker.worked("a"), "it passed its trial"
    breaker.open("a", now)
    assert breaker.try_again("a", now + FIRST_PAUSE_SECONDS)


def test_one_picture_counts_once_however_many_of_its_parts_fail() -> None:
    breaker = Breaker()
    assert not any(breaker.failed("a", "run", 0.0, "board") for _ in range(3 * FAILURES))
    others = [breaker.failed("a", "run", 1.0, f"p{n}") for n in range(FAILURES - 1)]
    assert others == [False] * (FAILURES - 2) + [True]


def test_whom_nobody_opened_is_not_tried() -> None:
    assert not Breaker().try_again("a", 1e9)


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["run", "picture-size", "worked", "ask"]), st.floats(0, 2 * LONGEST_PAUSE_SECONDS)),
        max_size=80,
    )
)
def test_whatever_happens_it_opens_only_for_failures_in_a_row_and_never_for_longer_than_the_longest_pause(
    steps: list[tuple[str, float]],
) -> None:
    breaker, now, in_a_row, opened_at, on_trial = Breaker(), 0.0, 0, None, False
    for what, passing in steps:
        now += passing
        if what == "ask":
            if breaker.try_again("a", now):
                assert opened_at is not None
                opened_at, on_trial = None, True
            assert opened_at is None or now - opened_at < LONGEST_PAUSE_SECONDS
        elif what == "worked":
            assert breaker.worked("a") == (on_trial and opened_at is None)
            if opened_at is None:
                in_a_row, on_trial = 0, False
        else:
            in_a_row += what in OWN_FAULT and opened_at is None
            if breaker.failed("a", what, now):
                assert on_trial or in_a_row >= FAILURES
                breaker.open("a", now)
                opened_at, in_a_row, on_trial = now, 0, False


# In the controller.


def controller_of(
    names: Sequence[str], *, stand_ins: Mapping[str, str] | None = None, pinned: Sequence[str] = ()
) -> Controller:
    graph = compile_graph({f"c-{name}": name for name in names}, [], names, stand_ins=stand_ins or {})
    executors = (Executor("cpu-0", "cpu"),)
    return Controller(graph, {n: expert(n) for n in names}, (Device("cpu", 25),), executors, pinned=pinned)


def fail(controller: Controller, name: str, count: int, refusal: Refusal = RUN, at: float = 0.0) -> list[Action]:
    """So many pictures that the expert fails, one after the other; what was done in all."""
    done = list[Action]()
    for number in range(count):
        actions = controller.handle(Arrived(request(f"{name}-{at}-{number}", f"c-{name}", at)), at)
        while actions:
            done += actions
            actions = [after for action in actions for after in _answered(controller, action, refusal, at)]
    return done


def _answered(controller: Controller, action: Action, refusal: Refusal, at: float) -> list[Action]:
    if isinstance(action, Load):
        return controller.handle(Loaded(action.device, action.expert), at)
    if isinstance(action, Run):
        return controller.handle(RunFailed(action.batch, refusal), at)
    return []


def verdicts(actions: Sequence[Action]) -> list[Verdict]:
    return [action.verdict for action in actions if isinstance(action, Publish)]


def ask(controller: Controller, id: str, name: str, at: float, finding: Finding = SOUND) -> list[Action]:
    """One more picture, of an expert that works by now."""
    done, actions = list[Action](), controller.handle(Arrived(request(id, f"c-{name}", at)), at)
    while actions:
        done += actions
        following = list[Action]()
        for action in actions:
            if isinstance(action, Load):
                following += controller.handle(Loaded(action.device, action.expert), at)
            if isinstance(action, Run):
                answers = tuple((finding,) for _ in action.batch.requests)
                following += controller.handle(Finished(action.batch, answers, 0.1), at)
        actions = following
    return done


def test_an_expert_that_fails_picture_after_picture_serves_no_more_and_others_do() -> None:
    controller = controller_of(["a", "b"])
    done = fail(controller, "a", FAILURES)
    (quarantine,) = [action for action in done if isinstance(action, Quarantine)]
    assert (quarantine.expert, quarantine.refusal.reason) == ("a", FAILING)
    assert "the runtime says no" in quarantine.refusal.detail
    assert Evict("cpu", "a", done[0].segments, Rule.QUARANTINED) in done  # type: ignore[union-attr]
    (verdict,) = verdicts(fail(controller, "a", 1, at=1.0))
    assert (verdict.outcome, verdict.refusal) == (Outcome.ERROR, quarantine.refusal)
    assert [v.outcome for v in verdicts(ask(controller, "r", "b", 2.0))] == [Outcome.PASS]


@pytest.mark.parametrize(("late", "whole_runs_fail"), [(False, False), (True, False), (False, True)])
def test_the_parts_of_one_picture_set_no_expert_aside_and_those_of_several_do(
    late: bool, whole_runs_fail: bool
) -> None:
    controller = controller_of(["a"])
    for number in range(FAILURES):
        board, at = f"b{number}", 10.0 * number
        due = at + 1.0 if late else None
        parts = [replace(request(f"{board}/{n}", "c-a", at, due), picture=board) for n in range(2 * FAILURES)]
        assert controller.unavailable == {}
        _fail_all(controller, parts, at, at + 2.0 if late else at, whole_runs_fail)
    assert controller.unavailable.keys() == {"a"}


def _fail_all(
    controller: Controller, requests: Sequence[Request], begins: float, ends: float, whole_runs_fail: bool
) -> None:
    actions = [action for one in requests for action in controller.handle(Arrived(one), begins)]
    while actions:
        following = list[Action]()
        for action in actions:
            if isinstance(action, Load):
                following += controller.handle(Loaded(action.device, action.expert), begins)
            if isinstance(action, Run):
                nans = tuple(Refusal("invalid-output", "NaN") for _ in action.batch.requests)
                failed = RunFailed(action.batch, RUN) if whole_runs_fail else Finished(action.batch, nans, 0.1)
                following += controller.handle(Tick(), ends)  # who is late has a verdict before the batch ends
                following += controller.handle(failed, ends)
        actions = following


def test_an_expert_whose_loads_keep_failing_serves_no_more() -> None:
    world_fails = Refusal("load", "unreadable")
    experts = [expert("a"), expert("detector")]
    graph = inspection_graph(["a"])
    devices = (Device("cpu", 100),)
    controller = Controller(graph, {e.name: e for e in experts}, devices, (Executor("cpu-0", "cpu"),))
    world = World(experts, devices, lambda r, e: (SOUND,), lambda action: world_fails)
    report = simulate(controller, world, [request(str(n), "c-a", float(n)) for n in range(10)])
    assert sum(isinstance(action, Load) for action in report.actions) == FAILURES
    assert [v.refusal.reason for v in report.verdicts if v.refusal] == ["load"] * 2 + [FAILING] * 8


def test_numbers_that_are_no_answer_count_as_failures() -> None:
    controller = controller_of(["a"])
    for number in range(FAILURES):
        actions = controller.handle(Arrived(request(str(number), "c-a")), 0.0)
        if isinstance(actions[0], Load):
            actions = controller.handle(Loaded("cpu", "a"), 0.0)
        (run,) = [action for action in actions if isinstance(action, Run)]
        done = controller.handle(Finished(run.batch, (Refusal("invalid-output", "NaN"),), 0.1), 0.0)
    assert any(isinstance(action, Quarantine) for action in done)


def test_no_answer_to_pictures_that_became_late_is_no_success() -> None:
    controller = controller_of(["a"])
    fail(controller, "a", FAILURES)
    actions = controller.handle(Arrived(request("r", "c-a", LATER, deadline=LATER + 1.0)), LATER)
    assert [type(action) for action in actions] == [Reinstate, Load]
    (run,) = [action for action in controller.handle(Loaded("cpu", "a"), LATER) if isinstance(action, Run)]
    done = controller.handle(Finished(run.batch, (Refusal("invalid-output", "NaN"),), 0.1), LATER + 2.0)
    assert [type(action) for action in done if isinstance(action, Reinstate | Quarantine)] == [Quarantine]


def test_bad_pictures_never_set_an_expert_aside() -> None:
    controller = controller_of(["a"])
    done = fail(controller, "a", 3 * FAILURES, Refusal("picture-damaged", "truncated"))
    assert not any(isinstance(action, Quarantine) for action in done)


def test_after_a_pause_the_next_picture_is_the_trial_and_its_success_reinstates_the_expert() -> None:
    controller = controller_of(["a", "b"])
    fail(controller, "a", FAILURES)
    assert controller.unavailable.keys() == {"a"}
    done = ask(controller, "trial", "a", LATER)
    assert [action for action in done if isinstance(action, Reinstate)] == [Reinstate("a", True), Reinstate("a", False)]
    assert [v.outcome for v in verdicts(done)] == [Outcome.PASS]
    assert not controller.unavailable
    assert not controller.on_trial


def test_a_failed_trial_sets_it_aside_for_longer() -> None:
    controller = controller_of(["a"])
    fail(controller, "a", FAILURES)
    done = fail(controller, "a", 1, at=LATER)
    assert [type(action) for action in done if isinstance(action, Reinstate | Quarantine)] == [Reinstate, Quarantine]
    (verdict,) = verdicts(ask(controller, "early", "a", 2 * LATER))
    assert verdict.outcome is Outcome.ERROR
    (verdict,) = verdicts(ask(controller, "again", "a", 4 * LATER))
    assert verdict.outcome is Outcome.PASS


def test_who_fails_golden_samples_is_tried_again_in_the_same_way() -> None:
    controller = controller_of(["a"])
    done = fail(controller, "a", 1, Refusal(GOLDEN_MISMATCH, "3 off"))
    assert any(isinstance(action, Quarantine) for action in done)
    assert [v.outcome for v in verdicts(ask(controller, "r", "a", 1.0))] == [Outcome.ERROR]
    assert [v.outcome for v in verdicts(ask(controller, "s", "a", LATER))] == [Outcome.PASS]


def test_an_operator_reinstates_an_expert_at_once() -> None:
    controller = controller_of(["a"])
    fail(controller, "a", FAILURES)
    assert controller.handle(Command(7, Verb.REINSTATE, "a"), 1.0) == [Reinstate("a", False), Acknowledge(7, None)]
    assert [v.outcome for v in verdicts(ask(controller, "r", "a", 1.0))] == [Outcome.PASS]


def test_what_an_expert_that_serves_or_has_no_sound_bundle_is_told() -> None:
    why = Refusal("digest-mismatch", "other bytes")
    graph = compile_graph({}, [], ["a", "b"])
    controller = Controller(graph, {"a": expert("a")}, (Device("cpu", 9),), (Executor("cpu-0", "cpu"),), {"b": why})
    (told,) = controller.handle(Command(1, Verb.REINSTATE, "b"), 0.0)
    assert told == Acknowledge(1, why)
    controller = controller_of(["a"])
    (told,) = controller.handle(Command(1, Verb.REINSTATE, "a"), 0.0)
    assert isinstance(told, Acknowledge)
    assert told.refusal is not None
    assert told.refusal.reason == "not-quarantined"


def test_who_was_pinned_stays_again_when_it_serves_again() -> None:
    controller = controller_of(["a", "b"], pinned=["a"])
    fail(controller, "a", FAILURES)
    assert not controller.ledgers["cpu"].pinned
    ask(controller, "r", "a", LATER)
    assert controller.ledgers["cpu"].pinned == {"a"}


def test_who_was_set_aside_before_the_start_can_be_reinstated_and_is_pinned_then() -> None:
    graph, why = compile_graph({"c-a": "a"}, [], ["a"]), Refusal("crashes", "three times")
    cpu = (Executor("cpu-0", "cpu"),)
    controller = Controller(graph, {"a": expert("a")}, (Device("cpu", 25),), cpu, {"a": why}, pinned=["a"])
    assert [v.refusal for v in verdicts(ask(controller, "r", "a", 1e6))] == [why], "no time heals it"
    done = controller.handle(Command(1, Verb.REINSTATE, "a"), 1e6)
    assert [type(action) for action in done] == [Reinstate, Acknowledge, Load]
    controller.handle(Loaded("cpu", "a"), 1e6)
    assert controller.ledgers["cpu"].pinned == {"a"}
    assert [v.outcome for v in verdicts(ask(controller, "s", "a", 1e6))] == [Outcome.PASS]


def test_a_batch_of_an_expert_that_was_set_aside_meanwhile_is_not_run_again() -> None:
    graph = compile_graph({"c-a": "a"}, [], ["a"])
    executors = (Executor("cpu-0", "cpu"), Executor("cpu-1", "cpu"))
    controller = Controller(graph, {"a": expert("a", max_batch=1)}, (Device("cpu", 25),), executors)
    for name in ("r1", "r2"):
        controller.handle(Arrived(request(name, "c-a")), 0.0)
    one, two = [a.batch for a in controller.handle(Loaded("cpu", "a"), 0.1) if isinstance(a, Run)]
    controller.handle(RunFailed(one, Refusal(GOLDEN_MISMATCH, "3 off")), 0.2)
    done = controller.handle(RunFailed(two, RUN), 0.3)
    assert [v.refusal.reason for v in verdicts(done) if v.refusal] == [GOLDEN_MISMATCH]
    assert is_idle(controller)


# Stand-ins.


def test_another_expert_stands_in_and_the_verdict_says_so() -> None:
    controller = controller_of(["a", "b", "c"], stand_ins={"a": "b", "b": "c"})
    fail(controller, "a", FAILURES)
    (verdict,) = verdicts(ask(controller, "r", "a", 1.0))
    assert ([step.expert for step in verdict.steps], verdict.outcome) == (["b"], Outcome.PASS)
    assert verdict.stand_ins == (StandIn("a", "b", FAILING),)


def test_where_the_stand_in_cannot_serve_either_its_own_does() -> None:
    controller = controller_of(["a", "b", "c"], stand_ins={"a": "b", "b": "c"})
    fail(controller, "b", FAILURES)
    fail(controller, "a", FAILURES)
    (verdict,) = verdicts(ask(controller, "r", "a", 1.0))
    assert verdict.stand_ins == (StandIn("a", "c", FAILING),)


def test_where_nobody_can_stand_in_the_verdict_is_an_error_and_never_a_pass() -> None:
    controller = controller_of(["a", "b"], stand_ins={"a": "b"})
    fail(controller, "b", FAILURES)
    fail(controller, "a", FAILURES)
    (verdict,) = verdicts(ask(controller, "r", "a", 1.0))
    assert (verdict.outcome, verdict.refusal and verdict.refusal.reason) == (Outcome.ERROR, FAILING)


def test_pictures_that_wait_when_an_expert_is_set_aside_go_to_its_stand_in() -> None:
    controller = controller_of(["a", "b"], stand_ins={"a": "b"})
    fail(controller, "a", FAILURES - 1)
    (run,) = [a for a in controller.handle(Arrived(request("r1", "c-a")), 0.0) if isinstance(a, Run)]
    controller.handle(Arrived(request("r2", "c-a")), 0.0)
    for _ in range(2):  # each once
        (run,) = [a for a in controller.handle(RunFailed(run.batch, RUN), 0.0) if isinstance(a, Run)]
    done = controller.handle(RunFailed(run.batch, RUN), 0.0)
    assert [v.request for v in verdicts(done)] == ["r1"], "the one that it failed again"
    assert [a.expert for a in done if isinstance(a, Load)] == ["b"]
    (run,) = [a for a in controller.handle(Loaded("cpu", "b"), 0.1) if isinstance(a, Run)]
    assert run.batch.requests == ("r2",)


def test_a_stand_in_that_was_asked_anyway_is_not_asked_twice() -> None:
    experts = [expert(name) for name in ("a", "detector", "spare")]
    graph = replace(inspection_graph(["a", "spare"]), stand_ins={"detector": "a"})
    devices, why = (Device("cpu", 100),), Refusal("crashes", "three times")
    cpu = (Executor("cpu-0", "cpu"),)
    controller = Controller(graph, {e.name: e for e in experts}, devices, cpu, {"detector": why})
    world = World(experts, devices, lambda r, e: (DOUBTFUL,))
    report = simulate(controller, world, [request("r", "c-a")])
    assert [v.stand_ins for v in report.verdicts] == [(StandIn("detector", "a", "crashes"),)]
    assert [action.batch.expert for action in report.actions if isinstance(action, Run)] == ["a"]


@given(
    broken=st.dictionaries(st.integers(0, 4), st.tuples(st.floats(0, 300), st.booleans())),
    stand_ins=st.dictionaries(st.integers(0, 3), st.integers(1, 4)),
    asked=st.lists(st.tuples(st.integers(0, 4), st.floats(0, 40)), min_size=1, max_size=60),
)
def test_every_picture_has_one_verdict_and_no_expert_that_fails_for_ever_passes_one(
    broken: dict[int, tuple[float, bool]], stand_ins: dict[int, int], asked: list[tuple[int, float]]
) -> None:
    """Experts are broken until some second, some in loading; whom one answers for is in the verdict."""
    names = [f"e{number}" for number in range(5)]
    experts = [expert(name) for name in names]
    instead = {f"e{a}": f"e{b}" for a, b in stand_ins.items() if b > a}
    graph = compile_graph({f"c-{n}": n for n in names}, [], names, stand_ins=instead)
    devices = (Device("cpu", 30),)
    controller = Controller(graph, {e.name: e for e in experts}, devices, (Executor("cpu-0", "cpu"),))
    moment = [0.0]

    def fails(action: Load | Run) -> Refusal | None:
        name = action.expert if isinstance(action, Load) else action.batch.expert
        until, in_loading = broken.get(int(name[1:]), (0.0, False))
        is_broken = moment[0] < until and isinstance(action, Load) == in_loading
        return Refusal("load" if in_loading else "run", "broken") if is_broken else None

    class Timed(Controller):
        def handle(self, event: Event, now: float, *, more: bool = False) -> list[Action]:
            moment[0] = now
            return Controller.handle(self, event, now, more=more)

    controller.__class__ = Timed
    requests, at = [], 0.0
    for number, (which, passing) in enumerate(asked):
        at += passing
        requests.append(request(f"r{number}", f"c-e{which}", at))
    report = simulate(controller, World(experts, devices, lambda r, e: (SOUND,), fails), requests)
    assert sorted(v.request for v in report.verdicts) == sorted(r.id for r in requests)
    assert is_idle(controller)
    wanted = {r.id: r.component.removeprefix("c-") for r in requests}
    for verdict in report.verdicts:
        if verdict.outcome is Outcome.PASS:
            (step,) = verdict.steps
            assert step.expert == (verdict.stand_ins[-1].stand_in if verdict.stand_ins else wanted[verdict.request])
            assert all(one.expert == wanted[verdict.request] for one in verdict.stand_ins)
