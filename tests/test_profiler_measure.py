"""Measuring a box: real children with real sessions on tiny networks, and the rules that make numbers of samples."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.catalog import Bundle
from appliance.core import costs
from appliance.core.types import Segment
from appliance.profiler.measure import LOADS, Runs, ladder, measured
from appliance.profiler.measure_child import sampled
from appliance.profiler.measurements import (
    Architecture,
    Contention,
    Handover,
    Latency,
    Loading,
    Measured,
    errors,
    handover_fit,
    loads_fit,
    plateau,
)
from appliance.store.compile import compile_bundles
from appliance.store.store import Compiled, Store
from tests.kit_brokers import until
from tests.kit_models import conv_net, write_bundle
from tests.kit_profiler import kept

ROOT = Path(__file__).parents[1]
TWINS = ("left", "right")
"""Two experts of one architecture."""
NAMES = (*TWINS, "wider", "widest")


@dataclass(frozen=True, slots=True)
class Box:
    """Experts compiled here."""

    compiled: Mapping[str, Compiled]
    bundles: Mapping[str, Bundle]
    store: Store

    def measured(
        self,
        *names: str,
        budget_seconds: float = 60.0,
        known: Measured | None = None,
        runs: Mapping[str, Runs] = MappingProxyType({}),
        keep: Callable[[str, Any], None] = lambda architecture, found: None,
        pictures: Sequence[bytes] | None = None,
    ) -> Measured:
        chosen = {name: self.compiled[name] for name in names}
        return measured(
            chosen,
            self.bundles,
            self.store.segment_path,
            threads=(1, 2),
            executors=2,
            budget_seconds=budget_seconds,
            repeats=2,
            known=known,
            runs=runs,
            keep=keep,
            pictures=pictures,
        )


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    home = tmp_path_factory.mktemp("box")
    channels = dict(zip(NAMES, (8, 8, 16, 24), strict=True))
    bundles = {
        name: write_bundle(home / "catalog", name, conv_net(seed, channels[name]), max_batch=4)
        for seed, name in enumerate(NAMES)
    }
    store = Store(home / "store")
    made = compile_bundles(store, list(bundles.values()), report=lambda name, result: None, jobs=2)
    compiled = {name: one for name, one in made.items() if isinstance(one, Compiled)}
    assert compiled.keys() == set(NAMES)
    return Box(compiled, bundles, store)


@pytest.fixture(scope="module")
def found(box: Box) -> Measured:
    return box.measured(*TWINS, "wider")


def test_each_architecture_is_measured_once_with_every_number_of_threads(box: Box, found: Measured) -> None:
    assert found.failed == {}
    architectures = {box.compiled[name].architecture for name in ("left", "wider")}
    assert Counter((one.architecture, one.threads) for one in found.architectures) == {
        (architecture, threads): 1 for architecture in architectures for threads in (1, 2)
    }


def test_runs_are_measured_on_the_pictures_that_are_given(box: Box) -> None:
    """A damaged one says so; the folder of `--pictures` is checked before."""
    found = box.measured("left", pictures=[b"no picture"])
    (why,) = (why for name, why in found.failed.items() if name != LOADS)
    assert "the payload begins with" in why
    assert found.architectures == ()


def test_what_is_told_of_an_architecture_follows_from_its_samples(box: Box, found: Measured) -> None:
    for one in found.architectures:
        assert [sample.items for sample in one.samples] == [1, 2, 3, 4]
        assert all(sample.seconds > 0 for sample in one.samples)
        pairs = [(sample.items, sample.seconds) for sample in one.samples]
        assert (one.item_seconds, one.fixed_seconds) == costs.fit(pairs)
        assert (one.fit_error, one.worst_error) == errors(one.samples, one.item_seconds, one.fixed_seconds)
        assert one.best_batch == plateau(one.samples)
        compiled = box.compiled[one.expert]
        assert one.activation_item_bytes == compiled.activation_item_bytes
        assert one.activation_fixed_bytes == compiled.activation_fixed_bytes


def test_loads_are_measured_with_as_many_in_flight_as_there_are_experts(found: Measured) -> None:
    assert found.loading.bytes_per_second.keys() == {1, 2}
    assert all(rate > 0 for rate in found.loading.bytes_per_second.values())
    assert found.loading.fixed_seconds > 0


def test_runs_are_measured_beside_runs_and_beside_loads(found: Measured) -> None:
    assert [one.threads for one in found.contention] == [1, 2]
    for one in found.contention:
        assert one.beside_runs.keys() == {1, 2}
        assert one.beside_runs[1] == 1.0
        assert one.beside_runs[2] > 0
        assert one.beside_loads > 0


def test_measurements_are_kept_as_they_were(found: Measured, tmp_path: Path) -> None:
    assert kept(found, tmp_path) == found


def test_what_is_known_is_not_measured_again(box: Box, found: Measured) -> None:
    again = box.measured(*TWINS, "wider", known=found)
    assert replace(again, seconds=found.seconds) == found


def test_who_goes_on_measures_only_the_other_architectures_and_each_as_long_as_it_would_have_been(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With children that are quick to answer, and only note how long they might have taken."""
    might = list[tuple[str, float]]()

    def answer(asked: object, measure: str, experts: Sequence[Compiled], until: float, gpus: object = None) -> object:
        might.append((experts[0].expert if measure == "runs" else measure, until - time.monotonic()))
        return {"latencies": [(1, 1, 0.5)], "beside_runs": [(1, 2, 1.5)]} if measure == "runs" else {"rows": []}

    monkeypatch.setattr("appliance.profiler.measure._Asked._answer", answer)
    heard = dict[str, Runs]()
    whole = box.measured("left", "wider", "widest", budget_seconds=100.0, keep=heard.__setitem__)
    (_, first), _, (lacking, _), (last, until) = might
    assert heard.keys() == {one.architecture for one in whole.architectures}
    assert (first, until) == pytest.approx((85 / 3, 100), abs=4)
    assert last == "loads"
    del heard[box.compiled[lacking].architecture]
    might.clear()
    again = box.measured("left", "wider", "widest", budget_seconds=100.0, runs=heard)
    assert [name for name, _ in might] == [lacking, "loads"]
    assert [seconds for _, seconds in might] == pytest.approx([85 / 3, 85 / 3 + 15], abs=4)
    assert again.contention == whole.contention
    assert set(again.architectures) == set(whole.architectures)


def test_without_time_nothing_runs_and_each_architecture_is_told(box: Box) -> None:
    found = box.measured("left", budget_seconds=0.0)
    assert found.architectures == ()
    assert found.loading == Loading()
    assert [one.beside_runs for one in found.contention] == [{1: 1.0}, {1: 1.0}]
    assert "left" in found.failed[box.compiled["left"].architecture]
    assert "allow more time" in found.failed[box.compiled["left"].architecture]


def test_who_is_killed_and_who_lacks_memory_or_files_are_named_and_the_others_are_measured(
    box: Box, tmp_path: Path
) -> None:
    """`wider` needs more memory than its child may have, and the files of `left` go when its batches are done."""
    huge = Segment("0" * 64, 1 << 40)
    compiled = {name: box.compiled[name] for name in ("left", "wider", "widest")}
    compiled["wider"] = replace(compiled["wider"], segments=(huge,))
    paths = {segment.id: tmp_path / segment.id for one in compiled.values() for segment in one.segments}
    for name, path in paths.items():
        if name != huge.id:
            shutil.copy(box.store.segment_path(name), path)
    paths[huge.id].touch()
    os.truncate(paths[huge.id], huge.bytes)
    killers = list[Thread]()

    def say(line: str) -> None:
        if line.startswith("running widest"):
            killers.append(Thread(target=kill_the_next_child))
            killers[-1].start()
        if line == "loading":
            for path in paths.values():
                path.unlink()

    found = measured(
        compiled,
        box.bundles,
        paths.__getitem__,
        threads=(1,),
        executors=1,
        budget_seconds=60.0,
        repeats=1,
        say=say,
        memory_bytes=1 << 38,
    )
    for killer in killers:
        killer.join()
    assert {one.expert for one in found.architectures} == {"left"}
    assert found.failed.keys() == {compiled["wider"].architecture, compiled["widest"].architecture, LOADS}
    assert "cannot be mapped" in found.failed[compiled["wider"].architecture]
    assert "widest" in found.failed[compiled["widest"].architecture]
    assert "SIGKILL" in found.failed[compiled["widest"].architecture]
    assert "cannot be read" in found.failed[LOADS]
    assert found.loading == Loading()


def kill_the_next_child() -> None:
    while True:
        for child in psutil.Process().children():
            try:
                is_meant = any("measure_child" in word for word in child.cmdline())
            except psutil.Error:
                continue
            if is_meant:
                child.send_signal(signal.SIGKILL)
                return
        time.sleep(0.001)


def test_a_child_ends_with_a_profiler_that_is_killed(tmp_path: Path) -> None:
    """The same command goes on at once, and would measure what it had left at work."""
    begun = tmp_path / "begun"
    answer = f"def answer(request):\n    open({str(begun)!r}, 'w').close()\n    time.sleep(60)\n"
    module = f"import time\nfrom appliance import sandbox\n{answer}sandbox.serve(answer)\n"
    (tmp_path / "measures.py").write_text(module, "utf-8")
    asking = "from appliance.sandbox import Child\nChild('measures', memory_bytes=1 << 33).ask({}, seconds=60)"
    profiler = psutil.Popen([sys.executable, "-c", asking], env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"})
    try:
        until(begun.exists)
        (child,) = profiler.children()
    finally:
        profiler.kill()
        profiler.wait(20)
    _, alive = psutil.wait_procs([child], timeout=10.0)
    for left in alive:
        left.kill()
    assert not alive


def test_a_batch_takes_what_was_measured_of_its_size_and_between_sizes_what_lies_between() -> None:
    samples = (Latency(1, 2.0), Latency(2, 3.0), Latency(4, 9.0))
    one = Architecture("a", "cpu", 1, samples, 2.0, 0.0, 0.0, 0.0, 2)
    assert [one.run_seconds(items) for items in (1, 2, 3, 4, 6)] == [2.0, 3.0, 6.0, 9.0, 13.0]
    assert one.line(2) == (1.0, 1.0)
    assert one.line(4) == costs.fit([(1, 2.0), (2, 3.0), (4, 9.0)])


def test_numbers_that_were_not_measured_are_taken_from_those_beside_them() -> None:
    contention = Contention(1, {1: 1.0, 2: 1.2, 4: 2.0}, 1.0)
    assert [contention.times_as_long(n) for n in (1, 2, 4, 8)] == [1.0, 1.2, 2.0, 2.0]
    assert contention.times_as_long(3) == pytest.approx(1.6)
    loading = Loading({1: 1e9, 2: 2e9}, fixed_seconds=0.5)
    assert [loading.seconds(10**9, at_once=n) for n in (1, 2, 3)] == [1.5, 1.0, 1.0]


# How samples are taken: a clock that goes on only while something is measured.


@dataclass(slots=True)
class World:
    seconds: Mapping[str, float]
    now: float = 0.0
    order: tuple[str, ...] = ()

    def measure(self, key: str) -> float:
        self.now += self.seconds[key]
        self.order += (key,)
        return self.seconds[key]

    def clock(self) -> float:
        return self.now


SECONDS = st.dictionaries(st.sampled_from("abcdef"), st.floats(0.001, 10), min_size=1)


@given(SECONDS, st.floats(-1, 60))
def test_no_more_than_one_run_goes_beyond_the_time(seconds: Mapping[str, float], until: float) -> None:
    world = World(seconds)
    found = sampled(world.measure, list(seconds), until=until, clock=world.clock)
    begun = [sum(seconds[key] for key in world.order[:number]) for number in range(len(world.order))]
    assert all(at < until for at in begun)
    assert found.keys() == set(world.order)


@given(SECONDS, st.floats(0, 60))
def test_all_have_their_turn_before_any_has_another(seconds: Mapping[str, float], until: float) -> None:
    world = World(seconds)
    sampled(world.measure, list(seconds), until=until, clock=world.clock)
    for end in range(len(world.order) + 1):
        counts = Counter(dict.fromkeys(seconds, 0)) + Counter(world.order[:end])
        assert max(counts.values(), default=0) - min(counts[key] for key in seconds) <= 1


def test_it_ends_early_when_more_samples_would_change_nothing() -> None:
    world = World({"a": 1.0, "b": 2.0})
    sampled(world.measure, ["a", "b"], until=1e9, clock=world.clock)
    assert len(world.order) == 2 * 8, "one to settle, and seven that are all the same"


def test_it_ends_at_the_most_when_samples_never_agree() -> None:
    values = iter(range(1, 1000))
    found = sampled(lambda key: float(next(values)), ["a"], until=1e9, clock=lambda: 0.0, most=10)
    assert found == {"a": [float(n) for n in range(2, 12)]}


def test_a_first_sample_counts_only_where_there_is_no_other() -> None:
    world = World({"a": 1.0, "b": 1.0})
    found = sampled(world.measure, ["a", "b"], until=2.5, clock=world.clock)
    assert found == {"a": [1.0], "b": [1.0]}
    assert world.order == ("a", "b", "b")


# What is made of samples.

SAMPLES = st.dictionaries(st.integers(1, 64), st.floats(1e-5, 10), min_size=1).map(
    lambda seconds: [Latency(items, taken) for items, taken in seconds.items()]
)


def share(samples: Sequence[Latency], items: int) -> float:
    return next(sample.seconds / sample.items for sample in samples if sample.items == items)


@given(SAMPLES)
def test_no_larger_batch_is_worth_five_hundredths_more_than_the_plateau(samples: Sequence[Latency]) -> None:
    best = plateau(samples)
    assert all(share(samples, s.items) >= 0.95 * share(samples, best) for s in samples if s.items > best)


@given(SAMPLES)
def test_each_batch_below_the_plateau_has_a_larger_one_that_is_worth_it(samples: Sequence[Latency]) -> None:
    best = plateau(samples)
    for smaller in (s.items for s in samples if s.items < best):
        assert any(share(samples, s.items) < 0.95 * share(samples, smaller) for s in samples if s.items > smaller)


@given(st.floats(1e-4, 1), st.integers(1, 64))
def test_pictures_that_gain_nothing_together_are_best_alone(item_seconds: float, most: int) -> None:
    assert plateau([Latency(items, items * item_seconds) for items in ladder(most)]) == 1


@given(st.integers(1, 1000))
def test_sizes_rise_by_no_more_than_a_half_from_three_on_and_end_at_the_most(most: int) -> None:
    sizes = ladder(most)
    assert sizes[0] == 1
    assert sizes[-1] == most
    assert all(before < after <= max(before + 1, 1.5 * before) for before, after in pairwise(sizes))


@given(st.floats(1e-4, 1e-2), st.floats(1e8, 1e10), st.sets(st.integers(10, 200), min_size=2, max_size=4))
def test_loads_on_a_line_are_found_as_they_are(fixed: float, rate: float, megabytes: set[int]) -> None:
    rows = [(1, size * 10**6, fixed + size * 10**6 / rate) for size in megabytes]
    together = [(2, 2 * size, fixed + 2 * size / (1.5 * rate)) for _, size, _ in rows]
    found = loads_fit([(1, 0, fixed), *rows, *together])
    assert found.fixed_seconds == pytest.approx(fixed, rel=1e-6, abs=1e-9)
    assert found.bytes_per_second == {1: pytest.approx(rate), 2: pytest.approx(1.5 * rate)}
    assert found.seconds(10**9, at_once=2) == pytest.approx(fixed + 1e9 / (1.5 * rate))


def test_without_a_load_there_is_nothing_to_tell_of_loads() -> None:
    assert loads_fit([]) == Loading()


@given(st.floats(0, 1e-2), st.floats(1e-6, 1e-2), st.lists(st.integers(1, 32), min_size=2, max_size=20))
def test_what_passes_between_batches_is_told_for_a_batch_and_for_each_of_its_pictures(
    item: float, fixed: float, sizes: list[int]
) -> None:
    found = handover_fit([(size, item * size + fixed) for size in sizes])
    assert found.item_seconds >= 0
    assert found.fixed_seconds >= -1e-12
    assert sum(found.seconds(size) for size in sizes) == pytest.approx(sum(item * size + fixed for size in sizes))
    if len(set(sizes)) > 1:
        assert found.seconds(64) == pytest.approx(item * 64 + fixed)


@pytest.mark.parametrize("samples", [[(1, 3.0), (2, 1.0)], [(1, 1.0), (2, 5.0)], [(4, 2.0)]])
def test_noise_makes_nothing_pass_backwards(samples: list[tuple[int, float]]) -> None:
    found = handover_fit(samples)
    assert min(found.item_seconds, found.fixed_seconds) >= 0
    assert sum(map(found.seconds, dict(samples))) == pytest.approx(sum(seconds for _, seconds in samples))


def test_without_a_batch_after_another_nothing_passes_between() -> None:
    assert handover_fit([]) == Handover()


def test_a_line_is_off_by_nothing_where_it_was_drawn_and_by_its_share_elsewhere() -> None:
    samples = [Latency(1, 3.0), Latency(2, 5.0), Latency(4, 10.0)]
    assert errors(samples, item_seconds=2.0, fixed_seconds=1.0) == pytest.approx((0.0, 0.1))
