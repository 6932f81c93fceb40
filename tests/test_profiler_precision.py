"""Where experts have int8 variants, the profiler measures both precisions, may choose either, and says which."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest

from appliance import config as settings
from appliance import profile as profiles
from appliance.config import Config
from appliance.core.types import Batch
from appliance.errors import OutOfMemory
from appliance.profiler import boxes, workload
from appliance.profiler.choosing import diverse, guesses
from appliance.profiler.joint import Trial
from appliance.profiler.measurements import Architecture, Contention, Handover, Latency, Loading, Measured
from appliance.profiler.profiled import REFUSED, Plan, Profiled, profiled
from appliance.profiler.progress import Progress, search_key
from appliance.profiler.rig import Outcome, Rig, Taking
from appliance.profiler.settings import Settings
from appliance.startup import footprint, hardware, install
from export import variants
from tests.kit_int8 import EXPERT, Line, write_line
from tests.kit_profiler import few_samples, kept

__all__ = ["few_samples"]  # a fixture

PATHS = "[paths]\ncatalog = 'catalog'\nstore = 'store'\nstate = 'state'\nprofile = 'profiles/default.json'\n"
MEMORY = "[memory]\nweights = 4000000\nactivations = 8000000\n"


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """A box whose one expert has a variant."""
    line = write_line(tmp_path_factory.mktemp("line"))
    variants.make(line.job)
    profiles.save(profiles.DEFAULT, line.folder / "profiles" / "default.json")
    (line.folder / "appliance.toml").write_text(PATHS + MEMORY, "utf-8")
    return line


@pytest.fixture(scope="module")
def rig(line: Line) -> Rig:
    return rig_with(line)


def rig_with(line: Line, more: str = "") -> Rig:
    """Of this box, with some settings more."""
    path = line.folder / "other.toml"
    path.write_text(PATHS + MEMORY + more, "utf-8")
    made = install(settings.load(path), profile=profiles.DEFAULT)
    return boxes.rig_of(made, workload.of_usage(made.catalog, 60, 0.5, 0.0))


DEFAULT = Settings(cpu_executors=2, batch_cap=1)
INT8 = replace(DEFAULT, int8=1)


def known(rig: Rig, seconds: float, handover: Handover | None = None) -> Measured:
    """A picture takes so long, alone or beside another."""
    (architecture,) = {one.architecture for one in rig.compiled.values()}
    model = Architecture(architecture, "cpu", 1, (Latency(1, seconds),), seconds, 0.0, 0.0, 0.0, 1)
    beside = Contention(1, dict.fromkeys((1, 2, 4), 1.0), 1.0)
    return Measured((model,), Loading({1: 1e12}, 0.0), (beside,), 1.0, {}, None, handover)


def in_both(rig: Rig, full_seconds: float, int8_seconds: float) -> Measured:
    return replace(known(rig, full_seconds), int8=known(rig.in_precision(INT8), int8_seconds))


def test_precision_is_chosen_where_there_are_variants_and_settings_leave_it_open(rig: Rig, line: Line) -> None:
    assert rig.space()["int8"].steps(2) == [0, 1]
    assert replace(DEFAULT, int8=1) in guesses(rig, DEFAULT)
    for chosen in ("full", "int8"):
        other = rig_with(line, f"[experts]\nprecision = '{chosen}'\n")
        assert "int8" not in other.space()
        assert other.compiled[EXPERT] == rig.in_precision(INT8 if chosen == "int8" else DEFAULT).compiled[EXPERT]


def test_what_the_settings_say_is_not_searched_and_the_profile_leaves_it_as_they_do(rig: Rig, line: Line) -> None:
    """The box would serve otherwise than what was found: settings go before a profile."""
    config = settings.load(line.folder / "appliance.toml")
    assert boxes.settled(config) == rig.settled == {"weights_share": "memory.activations"}
    assert "weights_share" not in rig.space()
    other = rig_with(line, "[executors]\nload_slots = 1\ncpu = 2\n")
    assert rig.space().keys() - other.space().keys() == {"load_slots", "cpu_executors"}
    assert boxes.settled(Config()) == {}


def test_each_precision_is_predicted_by_what_it_was_measured_to_take(rig: Rig) -> None:
    both = in_both(rig, 0.040, 0.010)
    assert rig.predicted(DEFAULT, both).images_per_second == pytest.approx(2 / 0.040, rel=0.1)
    assert rig.predicted(INT8, both).images_per_second == pytest.approx(2 / 0.010, rel=0.1)


def test_a_candidate_in_the_other_precision_is_served_before_more_of_the_same() -> None:
    ranked = [Trial(replace(INT8, hold_share=0.1), 9.0), Trial(replace(INT8, hold_share=0.2), 8.0), Trial(DEFAULT, 5.0)]
    assert diverse(ranked)[:2] == [ranked[0], ranked[2]]


def test_memory_that_holds_the_variants_alone_is_enough_in_int8(rig: Rig) -> None:
    full, int8 = (footprint(rig.in_precision(s).compiled[EXPERT]).weights_bytes for s in (DEFAULT, INT8))
    share = (full + int8) / 2 / rig.memory_bytes
    assert rig.holds(replace(INT8, weights_share=share))
    assert not rig.holds(replace(DEFAULT, weights_share=share))


def test_what_passes_between_two_batches_counts_for_each_and_for_its_pictures(rig: Rig) -> None:
    rig = replace(rig, cores=2)
    without, between = known(rig, 0.010), known(rig, 0.010, Handover(0.001, 0.004))
    assert rig.predicted(DEFAULT, without).images_per_second == pytest.approx(2 / 0.010, rel=0.1)
    assert rig.predicted(DEFAULT, between).images_per_second == pytest.approx(2 / 0.015, rel=0.1)


def test_threads_that_are_more_than_cores_share_these_between_batches_too(rig: Rig) -> None:
    rig = replace(rig, cores=2)
    batch = Batch(1, "cpu-0", "cpu", EXPERT, ("r0",))
    for threads, running, times in ((1, 2, 1.0), (2, 1, 1.0), (2, 2, 2.0)):
        takes = Taking(rig, known(rig, 0.010, Handover(0.001, 0.004)), replace(DEFAULT, threads=threads))
        beside = Counter(cpu=running), Counter[str]()
        assert takes(batch, *beside) - takes.run_seconds(batch, *beside) == pytest.approx(times * 0.005)


def test_what_is_watched_in_int8_is_compared_with_what_was_measured_in_it(rig: Rig) -> None:
    assert rig.watched(INT8, in_both(rig, 1000.0, 1e-6), 0.2).times_as_long > 100
    assert rig.watched(DEFAULT, in_both(rig, 1e-6, 1000.0), 0.2).times_as_long > 100


@pytest.fixture(scope="module")
def found(rig: Rig, few_samples: None, tmp_path_factory: pytest.TempPathFactory) -> Profiled:
    """Everything measured, searched and served for real, in little time."""
    return profiled(rig, replace(DEFAULT, batch_cap=4), Plan(4.0, tmp_path_factory.mktemp("kept")))


def test_a_candidate_that_a_device_refuses_ends_no_search(rig: Rig, tmp_path: Path) -> None:
    class Refusing(Rig):
        def served(self, settings: Settings, measured: Measured, share: float = 1.0) -> Outcome:
            if settings != default:
                raise OutOfMemory("cuda:0 cannot give 9 bytes", "lower its weights budget")
            return Outcome(100.0, 0.1, 0.0, 1)

    default = replace(DEFAULT, batch_cap=4)
    refusing = Refusing(**{field.name: getattr(rig, field.name) for field in fields(rig)})
    kept = tmp_path / search_key(refusing, default, "throughput", 1, hardware())
    kept.mkdir()
    Progress(kept / "progress.json", measured=replace(in_both(rig, 0.02, 0.01), handover=Handover())).write()
    said = list[str]()
    found = profiled(refusing, default, Plan(2.0, tmp_path), said.append)
    assert found.is_complete
    assert found.settings == default
    assert REFUSED in {lap.outcome for lap in found.laps}
    assert any("cuda:0 cannot give 9 bytes" in line for line in said)


def test_both_precisions_are_measured_and_either_is_served_live(rig: Rig, found: Profiled, tmp_path: Path) -> None:
    full, ours = found.measured, found.measured.of(int8=True)
    assert ours is not full
    (one,) = {one.architecture for one in rig.compiled.values()}
    (other,) = {one.architecture for one in rig.in_precision(INT8).compiled.values()}
    assert one != other
    assert {one} == full.on("cpu").keys()
    assert {one, other} == ours.on("cpu").keys()
    assert ours.loading.bytes_per_second
    assert full.handover is not None
    assert full.handover.seconds(1) > 0
    assert ours.handover == full.handover
    assert rig.served(replace(found.settings, int8=1), full).images_per_second > 0
    assert kept(found.measured, tmp_path) == found.measured


@pytest.mark.parametrize("precision", ["full", "int8"])
def test_a_profile_says_the_precision_that_the_box_then_serves_in(
    line: Line, rig: Rig, found: Profiled, precision: str, tmp_path: Path
) -> None:
    best = replace(found.settings, int8=int(precision == "int8"))
    made = install(settings.load(line.folder / "appliance.toml"))
    graph = boxes.graph_of(made, rig, best)
    path = tmp_path / "box1.json"
    profiles.save(boxes.profile_of(replace(found, settings=best), rig, "box1", "throughput", graph, hardware()), path)
    config = line.folder / "served.toml"
    config.write_text(PATHS.replace("profiles/default.json", str(path)) + MEMORY, "utf-8")
    serving = install(settings.load(config))
    assert serving.choice.trouble is None
    assert {one.precision for one in serving.serving.values()} == {precision}
    assert serving.profile.running.keys() >= {serving.compiled[EXPERT].architecture}
