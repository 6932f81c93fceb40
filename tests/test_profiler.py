"""The profiler itself on real experts: what it chooses, what an interruption or a kill leaves, what is written."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from appliance import config as settings
from appliance import profile as profiles
from appliance.core.controller import Controller
from appliance.core.policies import APPLIANCE, COSERVE, Policy
from appliance.core.types import Evict
from appliance.errors import ConfigError, ProfileError
from appliance.lab import laps, live
from appliance.lab.simulate import simulate
from appliance.profiler import boxes, workload
from appliance.profiler.choosing import CANDIDATES, OBJECTIVES, ROUNDS, diverse, guesses, roomy, winner
from appliance.profiler.command import place
from appliance.profiler.joint import NO_ROOM, Judged, Trial
from appliance.profiler.measurements import Contention, Loading, Measured
from appliance.profiler.profiled import LEAST_TRIALS, Plan, Profiled, learnt, profiled
from appliance.profiler.progress import Lap, Progress
from appliance.profiler.rig import Outcome, Rig, Watched
from appliance.profiler.settings import Settings
from appliance.startup import footprint, hardware, install
from tests.kit_box import compiled, write_catalog
from tests.kit_brokers import until
from tests.kit_models import conv_net
from tests.kit_profiler import few_samples

__all__ = ["few_samples"]  # a fixture

DEFAULT, ONE, TWO = Settings(1), Settings(2), Settings(3)
PATHS = "[paths]\ncatalog = 'catalog'\nstore = 'store'\nstate = 'state'\n"
KNOWN = Measured((), Loading({1: 1e9, 2: 1.5e9}, 0.001), (), 1.0, {})


def lap(number: int, one: Settings, rate: float, p99: float = 1.0, late: float = 0.0) -> Lap:
    return Lap(number, one, Outcome(rate, p99, late, 5))


def rounds(one: Settings, *rates: float) -> list[Lap]:
    return [lap(number, one, rate) for number, rate in enumerate(rates)]


@pytest.mark.parametrize(
    ("served", "wins"),
    [
        ([*rounds(DEFAULT, 5, 5, 5), *rounds(ONE, 6, 6, 6)], ONE),
        ([*rounds(DEFAULT, 5, 5, 5), *rounds(ONE, 9, 9, 4.9)], ONE),
        ([*rounds(DEFAULT, 5, 5, 5), *rounds(ONE, 9, 4.9, 4.9)], DEFAULT),
        ([*rounds(DEFAULT, 5, 5), *rounds(ONE, 9, 4.9)], DEFAULT),
        ([*rounds(DEFAULT, 5, 5, 5), *rounds(ONE, 5, 5, 5)], DEFAULT),
        ([*rounds(DEFAULT, 5, 5, 5), *rounds(ONE, 5.04, 5.04, 5.04)], DEFAULT),
        ([*rounds(DEFAULT, 5, 5, 5), *rounds(ONE, 9), *rounds(TWO, 6, 6, 6)], TWO),
        ([*rounds(DEFAULT, 5, 5, 5), *rounds(ONE, 7, 7), *rounds(TWO, 6, 6, 6)], ONE),
        ([*rounds(DEFAULT, 5), *rounds(ONE, 9, 9, 9)], DEFAULT),
        (rounds(DEFAULT, 5, 5, 5), DEFAULT),
        ([], DEFAULT),
    ],
)
def test_the_defaults_stay_unless_they_were_beaten_live_in_more_than_half_of_two_rounds_or_more(
    served: list[Lap], wins: Settings
) -> None:
    assert winner(served, DEFAULT, "throughput") == wins


def test_candidates_differ_in_executors_and_threads_before_anything_else() -> None:
    """Where the prediction for one such pair is wrong, the others are tried all the same."""
    crowd = [Trial(replace(TWO, hold_share=number / 10), 9.0 - number / 10) for number in range(5)]
    ranked = [*crowd, Trial(ONE, 5.0), Trial(DEFAULT, 4.0)]
    assert diverse(ranked) == [crowd[0], ranked[5], ranked[6], crowd[1]]
    assert diverse(crowd) == crowd[:CANDIDATES]
    assert diverse([]) == []


def test_of_candidates_that_are_as_good_the_one_that_leaves_most_for_activations_is_served() -> None:
    """What runs lose where that is scarce is in no prediction."""
    best, even, worse = (
        Trial(replace(ONE, weights_share=share), rate) for share, rate in ((0.95, 100.0), (0.6, 99.2), (0.5, 98.8))
    )
    other = Trial(DEFAULT, 90.0)
    assert diverse([best, even, worse, other]) == [even, other, best, worse]
    fewer, many = Trial(DEFAULT, 99.5), Trial(TWO, 100.0)
    assert diverse([many, best, fewer]) == [fewer, best, many], "the fewest threads first"
    late = [replace(trial, value=-1 / trial.value) for trial in (best, even, worse)]
    assert diverse(late)[0] == late[1], "where less is better, too"


def test_what_is_better_depends_on_the_objective() -> None:
    served = [
        one
        for number in range(ROUNDS)
        for one in (lap(number, DEFAULT, 9.0, p99=5.0, late=0.1), lap(number, ONE, 8.5, p99=2.0, late=0.0))
    ]
    assert [winner(served, DEFAULT, objective) for objective in OBJECTIVES] == [DEFAULT, ONE, ONE]


@pytest.mark.parametrize(("seen", "counts"), [(1.1, 1.0), (0.9, 1.0), (1.2, 1.2), (0.7, 0.7)])
def test_runs_that_serving_shows_to_be_far_longer_or_shorter_beside_each_other_count_as_they_were(
    seen: float, counts: float
) -> None:
    beside = (Contention(1, {1: 1.0, 2: 1.6}, 1.3), Contention(2, {1: 1.0, 2: 1.8}, 1.3))
    known = replace(KNOWN, contention=beside, int8=replace(KNOWN, contention=(beside[0].scaled(2.0),)))
    found = learnt(known, Watched(3.0, [(1, 0.002)], 1), Watched(seen, [(4, 0.005), (4, 0.005)], 20), threads=1)
    assert found.contention[0].beside_runs == {1: 1.0, 2: pytest.approx(1.6 * counts)}
    assert found.contention[1] == beside[1], "of others nothing was seen"
    assert found.handover is not None
    assert (found.handover.seconds(1), found.handover.seconds(4)) == pytest.approx((0.002, 0.005))
    assert found.int8 is not None
    assert found.int8.handover == found.handover
    assert found.int8.contention[0].beside_runs == {1: 1.0, 2: pytest.approx(3.2 * counts)}


def test_runs_are_never_shorter_beside_each_other_than_alone() -> None:
    known = replace(KNOWN, contention=(Contention(1, {1: 1.0, 2: 1.1}, 1.0),))
    found = learnt(known, Watched(1.0, [], 20), Watched(0.5, [], 20), threads=1)
    assert found.contention[0].beside_runs == {1: 1.0, 2: 1.0}


def test_a_few_cold_batches_correct_no_contention() -> None:
    known = replace(KNOWN, contention=(Contention(1, {1: 1.0, 2: 1.6}, 1.0),))
    assert learnt(known, Watched(1.0, [], 19), Watched(3.0, [], 19), threads=1).contention == known.contention


def test_a_lap_tells_what_ran_beside_what_and_what_passed_between(tiny: tuple[Rig, Settings]) -> None:
    rig, default = tiny
    found = rig.watched(replace(default, cpu_executors=2), KNOWN, 1.0)
    assert found.times_as_long > 0
    assert found.batches >= len(found.handovers) > 0
    assert found.handovers
    assert all(items >= 1 and 0 < seconds < 60 for items, seconds in found.handovers)


def test_an_objective_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"objective luck.*throughput"):
        Plan(5.0, tmp_path, "luck")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, Settings]]:
    asked = laps.Workload("tiny", experts=8, requests=60, budget_share=0.6, gap_seconds=0.001)
    with boxes.made_rig(asked, tmp_path_factory.mktemp("tiny"), lambda line: None) as made:
        yield made


@dataclass(frozen=True, slots=True)
class Sitting:
    """One call of the profiler, and what it said."""

    found: Profiled
    said: Sequence[str]
    phases: Sequence[str]


@pytest.fixture(scope="module")
def sittings(
    tiny: tuple[Rig, Settings], few_samples: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Sitting], Path]:
    """Interrupted before the search, again after the first live lap, and then let through to the end."""
    folder = tmp_path_factory.mktemp("profiler")

    def sit(interrupted: Callable[[str], bool]) -> Sitting:
        said: list[str] = []
        phases: list[str] = []

        def hear(to: list[str], line: str) -> None:
            to.append(line)
            if interrupted(line):
                raise KeyboardInterrupt

        plan = Plan(20.0, folder, begun=lambda phase, seconds: hear(phases, phase))
        return Sitting(profiled(*tiny, plan, lambda line: hear(said, line)), said, phases)

    return [
        sit(lambda line: line == "search"),
        sit(lambda line: line.startswith("live")),
        sit(lambda line: False),
    ], folder


def test_who_is_interrupted_before_the_search_keeps_the_defaults_and_the_measurements(
    sittings: tuple[list[Sitting], Path], tiny: tuple[Rig, Settings]
) -> None:
    (first, *_), _ = sittings
    assert (first.found.is_complete, first.found.settings, first.found.trials) == (False, tiny[1], 0)
    assert first.phases == ["measure", "search"]
    assert first.found.measured.architectures
    assert any("the same command goes on" in line for line in first.said)
    written = boxes.profile_of(first.found, tiny[0], "box1", "throughput", "graph", hardware())
    assert written.applied(settings.Config()).executors.cpu == tiny[1].cpu_executors
    assert written.running.keys() == {one.architecture for one in tiny[0].compiled.values()}


def test_who_is_interrupted_while_serving_keeps_what_was_served(
    sittings: tuple[list[Sitting], Path], tiny: tuple[Rig, Settings]
) -> None:
    (first, second, _), _ = sittings
    assert (second.found.is_complete, second.found.settings, len(second.found.laps)) == (False, tiny[1], 1)
    assert second.phases == ["search", "confirm"], "what is measured is not measured again"
    assert second.found.measured == first.found.measured
    assert second.found.trials >= LEAST_TRIALS, "however little time there is"
    assert Progress.read(second.found.home / "progress.json").searched_seconds > 0


def test_the_same_again_goes_on_and_confirms_candidates_beside_the_default(
    sittings: tuple[list[Sitting], Path], tiny: tuple[Rig, Settings]
) -> None:
    (_, second, last), folder = sittings
    found, (rig, default) = last.found, tiny
    assert found.is_complete
    assert last.phases == ["confirm"], "who confirms has chosen: no time goes to the search again"
    assert found.trials == second.found.trials
    assert [*found.laps][:1] == [*second.found.laps], "what was served is not served again"
    rounds = sorted({one.round for one in found.laps})  # as many as there was time for
    by_round = [[one.settings for one in found.laps if one.round == number] for number in rounds]
    assert all(default in served and len(served) == len(set(served)) for served in by_round)
    assert 2 <= len(by_round[0]) <= CANDIDATES + 1
    assert all(len(served) == 2 and set(served) <= set(by_round[0]) for served in by_round[1:])
    assert found.settings == winner(found.laps, default, "throughput")
    assert found.share > 1, "60 pictures are over too soon to tell anything"
    assert all(one.outcome.images_per_second > 0 for one in found.laps)
    assert all(rig.holds(trial.settings) for trial in found.predicted)
    assert list(folder.iterdir()) == [found.home], "who has kept the answer deletes it"


def test_no_time_to_measure_loads_is_an_error_that_says_so(
    tiny: tuple[Rig, Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.profiler.profiled._LEAST_MEASURING_SECONDS", 0.0)
    with pytest.raises(ProfileError, match="loads could not be measured"):
        profiled(*tiny, Plan(0.0, tmp_path))


def test_defaults_that_do_not_hold_the_largest_expert_are_refused(tiny: tuple[Rig, Settings], tmp_path: Path) -> None:
    rig, default = tiny
    with pytest.raises(ConfigError, match=r"largest expert.*memory\.weights"):
        profiled(replace(rig, memory_bytes=1000), default, Plan(5.0, tmp_path))


def test_defaults_that_cannot_be_profiled_for_another_reason_say_which(
    tiny: tuple[Rig, Settings], tmp_path: Path
) -> None:
    """Who is told to raise what is not scarce tries in vain."""
    rig, default = tiny
    with pytest.raises(ConfigError, match=r"executors on 2 cores.*executors\.cpu"):
        profiled(replace(rig, cores=2), replace(default, cpu_executors=5, threads=1), Plan(5.0, tmp_path))
    with pytest.raises(ConfigError, match=r"no room to be run.*memory\.activations"):
        profiled(rig, replace(default, weights_share=1.0), Plan(5.0, tmp_path))


def test_guesses_have_room_and_are_other_than_the_default(tiny: tuple[Rig, Settings]) -> None:
    rig, default = tiny
    found = guesses(rig, default)
    assert all(rig.holds(guess) for guess in found)
    assert {guess.cpu_executors for guess in found} >= {1, rig.cores}


def test_the_space_is_what_a_box_can_do_and_settings_beyond_it_do_not_hold(tiny: tuple[Rig, Settings]) -> None:
    rig, default = tiny
    assert all(hasattr(default, name) for name in rig.space())
    assert rig.holds(default)
    assert not rig.holds(replace(default, cpu_executors=2 * rig.cores + 1))
    assert not rig.holds(replace(default, weights_share=1.0)), "nothing is left for activations"
    assert rig.space().keys() - replace(rig, policy=COSERVE).space().keys() == {"hold_share"}


def test_a_roomy_configuration_has_activations_for_twice_what_runs_at_once(tiny: tuple[Rig, Settings]) -> None:
    rig, default = tiny
    largest = max(footprint(one).activation_bytes(rig.most_items(name, default)) for name, one in rig.compiled.items())
    memory = 40 * largest
    rig = replace(rig, memory_bytes=memory)
    for executors in (1, 2, 3):
        scarce, ample = (replace(default, cpu_executors=executors, weights_share=share) for share in (0.98, 0.55))
        assert rig.activation_bytes(rig.with_room(scarce)) == pytest.approx(2 * executors * largest, abs=2)
        assert rig.with_room(ample) == ample
    most = replace(default, cpu_executors=9, weights_share=0.98)
    assert rig.with_room(most).weights_share == rig.space()["weights_share"].low
    assert replace(rig, settled={"weights_share": "memory.weights"}).with_room(most) == most


@pytest.mark.parametrize(("judged", "is_roomy"), [(9.95, True), (9.8, False), (12.0, True)])
def test_the_roomy_one_is_served_if_it_is_predicted_to_be_as_good(
    tiny: tuple[Rig, Settings], judged: float, is_roomy: bool
) -> None:
    rig, default = tiny
    scarce = replace(default, cpu_executors=2 * rig.cores, weights_share=0.98)
    rig = replace(rig, memory_bytes=rig.memory_bytes // 4)
    found = roomy(rig, lambda settings, share: Judged(judged), Trial(scarce, 10.0))
    assert found == (rig.with_room(scarce) if is_roomy else scarce)
    assert rig.with_room(scarce) != scarce
    assert roomy(rig, lambda settings, share: NO_ROOM, Trial(scarce, 10.0)) == scarce


def test_what_is_predicted_and_served_is_the_policy_of_the_box(
    tiny: tuple[Rig, Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, default = tiny
    asked = list[str]()

    def hear(*given: Any, policy: Policy, **named: Any) -> Controller:
        asked.append(policy.name)
        return Controller(*given, policy=policy, **named)

    monkeypatch.setattr("appliance.lab.contenders.Controller", hear)
    for policy in (APPLIANCE, COSERVE):
        box = replace(rig, policy=policy)
        box.predicted(default, KNOWN)
        box.served(default, KNOWN)
    assert asked == [APPLIANCE.name] * 2 + [COSERVE.name] * 2


def test_who_is_pinned_has_room_in_every_configuration_and_so_has_everybody_else_beside_it(
    tiny: tuple[Rig, Settings], tmp_path: Path
) -> None:
    """Or the service would not start by what was found."""
    rig, default = tiny
    sizes = {name: footprint(one).weights_bytes for name, one in rig.compiled.items()}
    pinned, left = list[str](), rig.weights_bytes(default)
    for name in sorted(sizes):
        if sizes[name] <= left - max(sizes.values()):
            pinned.append(name)
            left -= sizes[name]
    rig = replace(rig, pinned=tuple(pinned))
    assert rig.holds(default)
    too_many = replace(rig, pinned=(*pinned, *sorted(sizes.keys() - set(pinned))[:1]))
    assert not too_many.holds(default)
    assert too_many.holds(replace(default, weights_share=0.5))
    all_of_them = replace(rig, pinned=tuple(sizes))
    with pytest.raises(ConfigError, match=r"experts\.pin.*pin fewer"):
        profiled(all_of_them, default, Plan(5.0, tmp_path))


def test_who_is_pinned_stays_predicted_and_live(tiny: tuple[Rig, Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    rig, default = tiny
    seldom = min(rig.compiled, key=lambda name: rig.chances[name])
    simulations, laps_served = list[Any](), list[Any]()
    monkeypatch.setattr("appliance.profiler.rig.simulate", heard(simulate, simulations))
    monkeypatch.setattr("appliance.profiler.rig.live.served", heard(live.served, laps_served))
    for pinned in ((), (seldom,)):
        box = replace(rig, pinned=pinned)
        box.predicted(default, KNOWN)
        box.served(default, KNOWN)
    left = [any(isinstance(a, Evict) and a.expert == seldom for a in found.actions) for found in simulations]
    assert not left[1]
    (stay,) = (stay for stay in laps_served[1].stays if stay.expert == seldom)
    assert stay.began_seconds == 0
    assert stay.ended_seconds == max(one.ended_seconds for one in laps_served[1].stays)
    others = [[one for one in found.stays if one.expert == seldom] for found in laps_served]
    assert left[0] or others[0] != [stay], "nobody kept it there before"


def heard(made: Callable[..., Any], found: list[Any]) -> Callable[..., Any]:
    def hear(*given: Any, **named: Any) -> Any:
        found.append(made(*given, **named))
        return found[-1]

    return hear


def test_predicted_and_live_serve_the_same_pictures_and_keep_the_budget(tiny: tuple[Rig, Settings]) -> None:
    rig, default = tiny
    for share in (0.5, 1.0):
        for outcome in (rig.predicted(default, KNOWN, share), rig.served(default, KNOWN, share)):
            assert outcome.images_per_second > 0
            assert outcome.late_share == 0
            assert outcome.loads >= 0
    assert rig.predicted(default, KNOWN) == rig.predicted(default, KNOWN), "a prediction has no chance in it"


def test_live_as_predicted_only_those_are_late_that_are_due_before_they_can_be_answered(
    tiny: tuple[Rig, Settings],
) -> None:
    """Seconds of a workload begin with it, those of its deadlines too."""
    rig, default = tiny
    requests = tuple(
        replace(one, deadline_seconds=one.arrived_seconds + (60.0 if number % 4 else 0.0))
        for number, one in enumerate(rig.workload.requests)
    )
    rig = replace(rig, workload=replace(rig.workload, requests=requests))
    for outcome in (rig.predicted(default, KNOWN), rig.served(default, KNOWN)):
        assert outcome.late_share == 0.25
        assert outcome.images_per_second > 0


@pytest.mark.parametrize(
    ("is_complete", "there", "name"),
    [(True, True, "box1.json"), (False, False, "box1.json"), (False, True, "box1.interrupted.json")],
)
def test_what_an_interrupted_run_knows_takes_the_place_of_no_former_profile(
    tmp_path: Path, is_complete: bool, there: bool, name: str
) -> None:
    if there:
        (tmp_path / "box1.json").touch()
    assert place(tmp_path / "box1.json", is_complete).name == name


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The settings of a box with a catalogue of its own."""
    home = tmp_path_factory.mktemp("box")
    nets = {f"e{number}": conv_net(number, width=64) for number in range(4)}
    compiled(write_catalog(home / "catalog", nets, [("e0", "e3")]))
    profiles.save(profiles.DEFAULT, home / "profiles" / "default.json")
    config = home / "appliance.toml"
    config.write_text(f"{PATHS}[memory]\nweights = 60000\nactivations = 4000000\n", "utf-8")
    return config


def test_the_default_of_a_box_is_how_it_serves_without_a_profile(box: Path) -> None:
    made = install(settings.load(box))
    rig = boxes.rig_of(made, workload.of_usage(made.catalog, 10, 0.5, 0.001))
    default = boxes.default_of(made)
    (device,) = made.devices
    assert rig.weights_bytes(default) == pytest.approx(device.budget_bytes, abs=2)
    assert rig.activation_bytes(default) == pytest.approx(device.activation_bytes, abs=2)
    assert default.cpu_executors == len(made.executors)
    assert default.load_slots == device.load_slots
    assert default.batch_cap == max(expert.max_batch for expert in made.experts.values())


def test_a_profiler_that_is_killed_goes_on_and_writes_what_the_box_then_serves_by(box: Path, tmp_path: Path) -> None:
    page, kept = tmp_path / "page.html", tmp_path / "kept"
    arguments = ["--config", str(box), "--requests", "80", "--gap", "1ms", "--budget", "12s", "--json"]
    command = [sys.executable, "-m", "appliance.cli", "profile", *arguments, "--folder", str(kept), "--html", str(page)]
    with (tmp_path / "first.err").open("wb") as said:
        first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
    until(lambda: first.poll() is not None or _trials(kept) >= 2, 120.0)
    assert first.poll() is None, (tmp_path / "first.err").read_text()
    first.kill()
    first.wait(60)
    before = _trials(kept)
    assert "running" in (tmp_path / "first.err").read_text()

    second = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert second.returncode == 0, second.stderr
    found: dict[str, Any] = json.loads(second.stdout)
    assert "running" not in second.stderr, "what is measured is not measured again"
    assert found["trials"] > before
    assert found["complete"]
    assert ElementTree.fromstring(page.read_text()).tag == "html"

    written = profiles.load(Path(found["profile_path"]))
    assert found["profile_path"] == str((box.parent / "profiles" / "box1.json").resolve())
    box.write_text(box.read_text().replace(PATHS, f"{PATHS}profile = 'profiles/box1.json'\n"))
    made = install(settings.load(box))
    assert made.choice.trouble is None
    assert made.profile == written
    assert Counter(executor.device for executor in made.executors) == {"cpu": found["settings"]["cpu_executors"]}
    assert written.origin is not None
    assert written.origin.found.live == found["live_images_per_second"]
    assert found["settings"] == found["default"] or written.origin.found.live > written.origin.found.default_live


def _trials(folder: Path) -> int:
    """Configurations that are known to the search by now."""
    for path in folder.rglob("search.db"):
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as storage:
            try:
                (count,) = storage.execute("SELECT count(*) FROM trials WHERE state = 'COMPLETE'").fetchone()
            except sqlite3.OperationalError:  # its tables are not made yet
                return 0
            return int(count)
    return 0
