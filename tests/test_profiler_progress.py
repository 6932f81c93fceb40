"""What a search keeps and goes on with, what names it, and how it keeps to its time, by a pretend clock."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from appliance.core.graph import Edge
from appliance.core.policies import COSERVE
from appliance.core.types import Finding
from appliance.errors import ProfileError
from appliance.lab import laps
from appliance.profiler import boxes, progress
from appliance.profiler.measure import GpuRuns, Runs
from appliance.profiler.measurements import Handover, Loading, Measured
from appliance.profiler.profiled import Plan, Profiled, profiled
from appliance.profiler.progress import Lap, Progress, alone, search_key
from appliance.profiler.rig import Outcome, Rig
from appliance.profiler.settings import Settings
from appliance.startup import hardware
from tests.kit_profiler import few_samples

__all__ = ["few_samples"]  # a fixture

KNOWN = Measured((), Loading({1: 1e9, 2: 1.5e9}, 0.001), (), 1.0, {}, handover=Handover(0.001, 0.001))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, Settings]]:
    asked = laps.Workload("tiny", experts=8, requests=60, budget_share=0.6, gap_seconds=0.001)
    with boxes.made_rig(asked, tmp_path_factory.mktemp("tiny"), lambda line: None) as made:
        yield made


def kept(rig: Rig, default: Settings, folder: Path, measured: Measured, objective: str = "throughput") -> Path:
    """All is measured already."""
    path = folder / search_key(rig, default, objective, 1, hardware()) / "progress.json"
    path.parent.mkdir()
    Progress(path, measured=measured).write()
    return path


def key(rig: Rig, default: Settings, objective: str = "throughput", seed: int = 1) -> str:
    return search_key(rig, default, objective, seed, hardware())


OTHERS: Sequence[tuple[str, Callable[[Rig], Rig]]] = [
    ("memory", lambda rig: replace(rig, memory_bytes=rig.memory_bytes + 1)),
    ("what is settled", lambda rig: replace(rig, settled={"load_slots": "executors.load_slots"})),
    ("the policy", lambda rig: replace(rig, policy=COSERVE)),
    ("who stays", lambda rig: replace(rig, pinned=("a",))),
    ("chances", lambda rig: replace(rig, chances={})),
    ("the graph", lambda rig: replace(rig, graph=replace(rig.graph, edges={"x": (Edge("x", "y"),)}))),
    (
        "what experts find",
        lambda rig: replace(
            rig, workload=replace(rig.workload, answer=lambda request, expert: (Finding("f", 0.5, False),))
        ),
    ),
    ("when pictures are due", lambda rig: due(rig, 9.0)),
]


def due(rig: Rig, seconds: float) -> Rig:
    requests = tuple(replace(request, deadline_seconds=seconds) for request in rig.workload.requests)
    return replace(rig, workload=replace(rig.workload, requests=requests))


@pytest.mark.parametrize(("what", "other"), OTHERS, ids=[what for what, _ in OTHERS])
def test_another_box_or_workload_is_another_search(
    tiny: tuple[Rig, Settings], what: str, other: Callable[[Rig], Rig]
) -> None:
    rig, default = tiny
    assert key(rig, default) == key(replace(rig), default)
    assert key(rig, default) != key(other(rig), default), what


def test_another_version_hardware_or_wish_is_another_search(
    tiny: tuple[Rig, Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, default = tiny
    usual, here = key(rig, default), hardware()
    others = {
        key(rig, replace(default, load_slots=1)),
        key(rig, default, "p99"),
        key(rig, default, seed=2),
        search_key(rig, default, "throughput", 1, here.model_copy(update={"runtime": "onnxruntime 9"})),
        search_key(rig, default, "throughput", 1, here.model_copy(update={"processor": "another"})),
    }
    with monkeypatch.context() as patch:
        patch.setattr(progress, "__version__", "99")
        others.add(key(rig, default))
    monkeypatch.setattr(progress, "PREDICTIONS", 99)
    others.add(key(rig, default))
    assert len(others - {usual}) == 7


def full(path: Path) -> Progress:
    runs = {"a": Runs([(1, 1, 0.5)], [(1, 2, 1.5)], [(1, 1.1)], 0.1)}
    lap = Lap(0, Settings(2), Outcome(5.0, 1.0, 0.0, 3, 2.0))
    return Progress(path, 5.0, 2.0, replace(KNOWN, int8=KNOWN), runs, {"a": GpuRuns([(1, 0.5)], 1.1)}, [lap], 0.5)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    full(path).write()
    (tmp_path / "search.db").touch()
    assert asdict(Progress.read(path)) == asdict(full(path)) | {
        "runs": {"a": asdict(Runs([(1, 1, 0.5)], [(1, 2, 1.5)], [(1, 1.1)], 0.1))}
    }
    assert (tmp_path / "search.db").exists()


def foreign(folder: Path) -> Iterator[str]:
    path = folder / "written.json"
    full(path).write()
    good: dict[str, Any] = json.loads(path.read_text())
    yield from ("", "[1]", "[{}]", "null", "7", '{"spent_seconds": 1.0', '{"name": "another program"}')
    yield from (json.dumps({name: value for name, value in good.items() if name != lacking}) for lacking in good)
    yield json.dumps(good | {"more": 1})
    yield json.dumps(good | {"measured": {"architectures": 3}})
    yield json.dumps(good | {"laps": [{"round": 0}]})
    yield json.dumps(good | {"laps": [good["laps"][0] | {"settings": {"cpu": 1}}]})


def test_a_file_of_another_shape_begins_all_anew_and_the_search_with_it(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    for text in foreign(tmp_path):
        path.write_text(text, "utf-8")
        (tmp_path / "search.db").touch()
        assert Progress.read(path) == Progress(path), text
        assert not (tmp_path / "search.db").exists(), text


def test_a_full_disk_is_told_and_leaves_what_was_known(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    Progress(path, spent_seconds=3.0).write()
    (tmp_path / "progress.new").symlink_to("/dev/full")
    with pytest.raises(ProfileError, match=r"progress\.json cannot be written: No space left.*same command"):
        Progress(path, spent_seconds=4.0).write()
    assert Progress.read(path).spent_seconds == 3.0


def test_two_profilers_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    """They would measure each other, and write the same search."""
    folder = tmp_path / "not yet there"
    with alone(folder):
        with (
            pytest.raises(ProfileError, match=f"process {os.getpid()} is profiling with .*not yet there"),
            alone(folder),
        ):
            pass
        with alone(tmp_path / "another"):
            pass
    with alone(folder):
        pass


def test_a_workload_in_which_all_is_late_ends_with_a_result(tiny: tuple[Rig, Settings], tmp_path: Path) -> None:
    rig, default = due(tiny[0], 0.0), tiny[1]
    kept(rig, default, tmp_path, replace(KNOWN, handover=None), "deadlines")
    found = profiled(rig, default, Plan(1.0, tmp_path, "deadlines"))
    assert found.is_complete
    assert found.settings == default
    assert {lap.outcome.late_share for lap in found.laps} == {1.0}
    handover = found.measured.handover
    assert handover is not None
    assert handover.seconds(1) > 0, "it was watched without deadlines"


@pytest.mark.usefixtures("few_samples")
def test_who_is_interrupted_while_measuring_does_not_measure_an_architecture_again(
    tiny: tuple[Rig, Settings], tmp_path: Path
) -> None:
    said = list[str]()

    def hear(line: str) -> None:
        said.append(line)
        if line == "loading":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profiled(*tiny, Plan(8.0, tmp_path), hear)
    assert any("the same command goes on" in line for line in said)
    (path,) = tmp_path.rglob("progress.json")
    first = Progress.read(path)
    assert first.runs.keys() == {one.architecture for one in tiny[0].compiled.values()}
    assert first.measured is None
    assert first.spent_seconds > 1

    def no_more(phase: str, seconds: float) -> None:
        if phase == "search":
            raise KeyboardInterrupt

    again = list[str]()
    found = profiled(*tiny, Plan(8.0, tmp_path, begun=no_more), again.append)
    assert not any(line.startswith("running") for line in again)
    assert {one.architecture for one in found.measured.architectures} == first.runs.keys()
    assert found.measured.loading.bytes_per_second
    assert Progress.read(path).runs == {}, "it is in what was measured"


@dataclass
class Clock:
    """Goes on by what is predicted and served."""

    now: float = 0.0
    monotonic: Callable[[], float] = field(init=False)

    def __post_init__(self) -> None:
        self.monotonic = lambda: self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("appliance.profiler.profiled.time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def pretend(
    rig: Rig,
    clock: Clock,
    arrives: Callable[[int], float],
    predicting_seconds: float = 0.5,
    picture_seconds: float = 0.0,
) -> Rig:
    """A lap takes as long as its pictures need, 0.1 s each, and a tenth more; all settings are as good."""

    class Pretend(Rig):
        def predicted(self, settings: Settings, measured: Measured, share: float = 1.0) -> Outcome:
            clock.now += predicting_seconds + picture_seconds * len(self.workload.played(share).requests)
            return self._outcome(share)

        def served(self, settings: Settings, measured: Measured, share: float = 1.0) -> Outcome:
            outcome = self._outcome(share)
            clock.now += 1.1 * outcome.seconds
            return outcome

        def _outcome(self, share: float) -> Outcome:
            requests = self.workload.played(share).requests
            seconds = max(0.1 * len(requests), requests[-1].arrived_seconds)
            return Outcome(len(requests) / seconds, 1.0, 0.0, 1, seconds)

    requests = tuple(replace(r, arrived_seconds=arrives(n)) for n, r in enumerate(rig.workload.requests))
    made = Pretend(**{one.name: getattr(rig, one.name) for one in fields(rig)})
    return replace(made, workload=replace(rig.workload, requests=requests))


def on_time(rig: Rig, default: Settings, folder: Path, budget_seconds: float) -> tuple[Profiled, list[str]]:
    kept(rig, default, folder, KNOWN)
    said = list[str]()
    return profiled(rig, default, Plan(budget_seconds, folder), said.append), said


def test_where_pictures_come_seldom_the_time_rules_and_somebody_is_served_often_enough_to_win(
    tiny: tuple[Rig, Settings], clock: Clock, tmp_path: Path
) -> None:
    rig, default = pretend(tiny[0], clock, lambda number: 10.0 * number), tiny[1]
    found, said = on_time(rig, default, tmp_path, 300.0)
    assert {lap.round for lap in found.laps if lap.settings == default} == {0, 1}
    assert len([lap for lap in found.laps if lap.round == 1]) == 2
    assert clock.now <= 300
    assert [line for line in said if "--budget" in line and "--speed" in line]
    assert found.share < 1


def test_the_default_and_one_candidate_are_served_even_when_the_time_is_over(
    tiny: tuple[Rig, Settings], clock: Clock, tmp_path: Path
) -> None:
    rig, default = pretend(tiny[0], clock, lambda number: 1.0 * number), tiny[1]
    found, _ = on_time(rig, default, tmp_path, 1.0)
    assert [(lap.round, lap.settings == default) for lap in found.laps] == [(0, True), (0, False)]
    assert all(lap.outcome.seconds <= 6 for lap in found.laps), "and not for long"


def test_where_there_is_time_two_candidates_are_served_and_the_best_of_them_beside_the_default_again(
    tiny: tuple[Rig, Settings], clock: Clock, tmp_path: Path
) -> None:
    rig, default = pretend(tiny[0], clock, lambda number: 0.0), tiny[1]
    found, said = on_time(rig, default, tmp_path, 200.0)
    assert [lap.round for lap in found.laps][:5] == [0, 0, 0, 1, 1]
    assert clock.now <= 200
    assert not [line for line in said if "--budget" in line]


def test_a_lap_of_a_workload_that_comes_unevenly_ends_before_the_long_wait(
    tiny: tuple[Rig, Settings], clock: Clock, tmp_path: Path
) -> None:
    rig, default = pretend(tiny[0], clock, lambda number: 0.0 if number < 30 else 1000.0), tiny[1]
    found, _ = on_time(rig, default, tmp_path, 100.0)
    assert 25 < round(60 * found.share) <= 30
    assert clock.now <= 100


@pytest.mark.parametrize(("picture_seconds", "share"), [(1e-2, 0.5), (1e-3, 0.75), (1e-6, 1.0)])
def test_of_a_long_day_a_search_plays_what_leaves_time_for_a_hundred_plays(
    tiny: tuple[Rig, Settings],
    clock: Clock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    picture_seconds: float,
    share: float,
) -> None:
    """But no fewer than 2,000 pictures of it; and the same share when it goes on."""
    monkeypatch.setattr("appliance.profiler.profiled._MOST_TRIALS", 12)
    day = replace(tiny[0], workload=tiny[0].workload.played(4_000 / 60))
    rig, default = pretend(day, clock, lambda number: 0.1 * number, 0.0, picture_seconds), tiny[1]
    found, _ = on_time(rig, default, tmp_path, 3000.0)
    known = Progress.read(found.home / "progress.json")
    assert known.searched_share == pytest.approx(share)
    assert known.searched_seconds <= 1.4 * 12 * share * 4_000 * picture_seconds


def test_the_search_goes_on_as_long_as_its_share_of_time_lasts_over_all_sittings(
    tiny: tuple[Rig, Settings], clock: Clock, tmp_path: Path
) -> None:
    rig, default = pretend(tiny[0], clock, lambda number: 0.0, predicting_seconds=0.3), tiny[1]
    path = kept(rig, default, tmp_path, KNOWN)
    phases = list[tuple[str, float]]()

    def sit(stopped_at: str) -> Profiled:
        def hear(line: str) -> None:
            if line.startswith(stopped_at):
                noted.append(Progress.read(path))
                raise KeyboardInterrupt

        plan = Plan(500.0, tmp_path, begun=lambda *phase: phases.append(phase))
        return profiled(rig, default, plan, hear)

    noted = list[Progress]()
    sit("searching: 50 ")
    (at_fifty,) = noted
    assert 0 < at_fifty.searched_seconds < at_fifty.spent_seconds < clock.now, "noted at 25, for who is killed"
    first = Progress.read(path).searched_seconds
    assert 0 < first < 50
    second = sit("live")
    assert [phase for phase, _ in phases] == ["search", "search", "confirm"]
    assert phases[1][1] == pytest.approx(50 - first)
    assert second.trials > 100, "all are as good, and it has gone on"
    assert Progress.read(path).searched_seconds == pytest.approx(50, abs=2)
    sit("never")
    assert [phase for phase, _ in phases[3:]] == ["confirm"]
