"""A box's profile: what it settles and what it leaves alone, and that one of another time or box is noticed."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from appliance import config as settings
from appliance import profile as profiles
from appliance.config import Config, Executors
from appliance.core.costs import Cost
from appliance.core.relearn import Learnt
from appliance.core.types import Executor
from appliance.errors import ConfigError
from appliance.lab.simulate import simulated
from appliance.profile import DEFAULT, Choice, Found, Hardware, Loads, OnGpus, Origin, Profile, Running
from appliance.report import print_check
from appliance.startup import Installation, checked, graph_sha256, hardware, install
from appliance.telemetry import Telemetry
from tests.kit_box import ALARMS, INFER, RESULT, STATS, Box, compiled, hear_verdicts, picture, write_catalog
from tests.kit_brokers import Camera, until
from tests.kit_models import conv_net

HERE = Hardware(processor="one", cores=2, memory_bytes=1000, runtime="onnxruntime 1")
FOUND = Found(
    workload="usage", objective="throughput", trials=9, confirmed=3, predicted=9.0, live=8.0, default_live=7.0
)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(write_catalog(tmp_path_factory.mktemp("profile") / "catalog", 4, [("e0", "e3")]))


def origin(box: Hardware = HERE, graph: str = "graph") -> Origin:
    return Origin(version="0.1.0", made_at="2026-11-22T00:00:00+00:00", hardware=box, graph_sha256=graph, found=FOUND)


def profile(of: Origin | None = None, **settled: object) -> Profile:
    return Profile.model_validate({"schema": 2, "name": "box1", "origin": of, **settled})


FULL = profile(
    origin(),
    cpu_executors=3,
    threads=2,
    load_slots=4,
    batch_cap=2,
    weights_bytes=10_000_000,
    activation_bytes=5_000_000,
    hold_share=0.5,
    running={"a": Running(item_seconds=0.5, fixed_seconds=0.25, fit_error=0.01)},
    gpus=OnGpus(
        count=0,
        weights_bytes=40_000_000,
        activation_bytes=20_000_000,
        host_tier_bytes=30_000_000,
        from_disk=Loads(fixed_seconds=0.003, bytes_per_second=1e9),
        from_host=Loads(fixed_seconds=0.001, bytes_per_second=1e10),
        running={"a": Running(item_seconds=0.05, fixed_seconds=0.5, fit_error=0.01)},
    ),
)
SETTLED = {
    "executors.cpu": 3,
    "executors.gpus": 0,
    "executors.load_slots": 4,
    "memory.weights": 10_000_000,
    "memory.activations": 5_000_000,
    "memory.gpu_weights": 40_000_000,
    "memory.gpu_activations": 20_000_000,
    "memory.gpu_host_tier": 30_000_000,
}


@given(st.sets(st.sampled_from(sorted(SETTLED))))
def test_what_the_settings_say_goes_before_what_the_profile_says(given_keys: set[str]) -> None:
    sections: dict[str, dict[str, int]] = {}
    for key in given_keys:
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = 7
    config = FULL.applied(Config.model_validate(sections))
    for key, wanted in SETTLED.items():
        section, name = key.split(".")
        assert int(getattr(getattr(config, section), name)) == (7 if key in given_keys else wanted)


def test_a_profile_that_settles_nothing_leaves_the_settings_as_they_are() -> None:
    assert DEFAULT.applied(Config()) == Config()


def test_costs_are_those_that_were_measured_on_the_device_and_else_those_of_compiling() -> None:
    size, once = 500_000_000, (1.0, 2.0)
    from_disk = 0.002 + size / 5e8
    assert FULL.cost("cpu", "a", size, once) == Cost(0.5, 0.25, from_disk)
    assert FULL.cost("cpu", "b", size, once) == Cost(1.0, 2.0, from_disk)
    assert FULL.cost("cuda", "a", size, once) == Cost(0.05, 0.5, 0.503), (
        "never mind how much quicker it was guessed to be"
    )
    assert FULL.cost("cuda", "b", size, once) == Cost(0.1, 0.2, 0.503)
    assert DEFAULT.cost("cuda", "a", size, once, host_share=1.0) == Cost(0.1, 0.2, from_disk), "nothing was measured"


@given(st.floats(0, 1), st.integers(0, 10**9))
def test_the_more_loads_of_a_gpu_find_host_memory_the_nearer_they_are_to_its_speed(share: float, size: int) -> None:
    far, near = 0.003 + size / 1e9, 0.001 + size / 1e10
    assert FULL.load_seconds("cuda", size, share) == pytest.approx(share * near + (1 - share) * far)
    assert FULL.load_seconds("cpu", size, share) == FULL.load_seconds("cpu", size), "main memory has no tier before it"


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"processor": "two"}, "processor was one and is two"),
        ({"cores": 4}, "cores was 2 and is 4"),
        ({"gpus": ("H200, driver 1",)}, "gpus was"),
        ({"runtime": "onnxruntime 2"}, "runtime was onnxruntime 1 and is onnxruntime 2"),
        ({"memory_bytes": 900}, "memory_bytes was 1000 and is 900"),
    ],
)
def test_a_profile_of_another_box_is_refused_and_says_why(other: dict[str, object], says: str) -> None:
    choice = profiles.chosen(FULL, HERE.model_copy(update=other), "graph")
    assert choice.profile == DEFAULT
    assert says in str(choice.refused)
    assert choice.trouble == choice.refused
    assert "appliance profile" in str(choice.trouble)


def test_a_little_more_or_less_memory_is_the_same_box() -> None:
    for size in (960, 1040):
        assert profiles.chosen(FULL, HERE.model_copy(update={"memory_bytes": size}), "graph") == Choice(FULL)


def test_a_profile_for_other_experts_is_used_and_told() -> None:
    choice = profiles.chosen(FULL, HERE, "another graph")
    assert (choice.profile, choice.refused, choice.outdated) == (FULL, None, True)
    assert "other experts" in str(choice.trouble)
    assert profiles.chosen(FULL, HERE, "graph").trouble is None
    assert profiles.chosen(DEFAULT, HERE, "whatever").trouble is None


def test_a_profile_for_other_experts_gives_costs_and_counts_but_not_its_split_of_memory() -> None:
    outdated, fitting = (profiles.chosen(FULL, HERE, graph).applied(Config()) for graph in ("another graph", "graph"))
    assert fitting == FULL.applied(Config())
    assert outdated.memory == Config().memory, "it was split for other bytes"
    assert outdated.executors == fitting.executors


def test_a_box_whose_experts_have_changed_splits_memory_by_its_settings(tmp_path: Path, catalog: Path) -> None:
    size = 50_000_000
    found = profile(origin(hardware(), "of other experts"), cpu_executors=1, weights_bytes=size, activation_bytes=size)
    made = install(_config(tmp_path / "box", catalog, found))
    assert made.choice.outdated
    assert made.config.memory == Config().memory
    assert made.config.executors.cpu == 1
    there = found.model_copy(update={"origin": origin(hardware(), graph_sha256(made.catalog, made.compiled))})
    assert int(install(_config(tmp_path / "box", catalog, there)).config.memory.weights) == size


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "not yet there" / "box1.json"
    profiles.save(FULL, path)
    assert profiles.load(path) == FULL
    assert [one.name for one in path.parent.iterdir()] == ["box1.json"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not JSON"),
        ('{"schema": 2, "name": "cut', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (f'{{"threads": {"9" * 5_000}}}', "is not JSON"),
        ("[]", r"profile\.json: Input should be"),
        ('{"schema": 1, "name": "old"}', "schema: Input should be 2"),
        ('{"schema": 2, "name": "x", "executors": 3}', "executors: Extra inputs"),
        ('{"schema": 2, "name": "x", "cpu_executors": 100000000}', "cpu_executors: Input should be less"),
        ('{"schema": 2, "name": "x", "threads": 0}', "threads: Input should be greater"),
        ('{"schema": 2, "name": "x", "load_fixed_seconds": Infinity}', "load_fixed_seconds: .*finite"),
        ('{"schema": 2, "name": "x", "hold_share": 1e999}', "hold_share: .*finite"),
        ('{"schema": 2, "name": "x", "disk_bytes_per_second": NaN}', "disk_bytes_per_second: "),
    ],
)
def test_a_file_that_is_no_profile_is_refused_by_its_name_and_key(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=says) as error:
        profiles.load(path)
    assert str(path) in str(error.value)
    assert "appliance profile" in str(error.value)


def test_a_profile_that_cannot_be_written_whole_leaves_the_former_one(tmp_path: Path) -> None:
    path = tmp_path / "box1.json"
    profiles.save(DEFAULT, path)
    (tmp_path / ".box1.json.new").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"box1\.json cannot be written"):
        profiles.save(FULL, path)
    assert profiles.load(path) == DEFAULT


def test_the_shipped_profile_is_the_default() -> None:
    assert profiles.load(Path(__file__).parents[1] / "profiles" / "default.json") == DEFAULT


def test_experts_that_come_change_the_graphs_digest_and_new_weights_do_not(tmp_path: Path) -> None:
    def digest(name: str, nets: int, seed: int) -> str:
        experts = {f"e{n}": conv_net(n + seed) for n in range(nets)}
        made = install(_config(tmp_path / name, write_catalog(tmp_path / name / "catalog", experts), DEFAULT))
        return graph_sha256(made.catalog, made.compiled)

    first = digest("first", 2, 0)
    assert digest("weights", 2, 7) == first
    assert digest("more", 3, 0) != first


def test_a_check_shows_what_is_wrong_with_the_profile_in_red(tmp_path: Path, catalog: Path) -> None:
    shown = io.StringIO()
    found = checked(_config(tmp_path, catalog, FULL))
    print_check(found, Console(file=shown, width=300, force_terminal=True))
    assert (found["profile"], found["profile_outdated"]) == ("default", False)
    assert f"\x1b[31m{found['profile_trouble'][:30]}" in shown.getvalue()
    sound = checked(_config(tmp_path, catalog, DEFAULT))
    assert sound["profile_trouble"] is None


def test_a_check_shows_what_the_profile_comes_to(tmp_path: Path, catalog: Path) -> None:
    """Who has profiled a box wants to see that it will be served so, before it is."""
    config = _config(tmp_path, catalog, DEFAULT)
    made = install(config)
    here = origin(hardware(), graph_sha256(made.catalog, made.compiled))
    profiles.save(
        profile(here, cpu_executors=1, threads=2, load_slots=3, batch_cap=7, activation_bytes=20_000_000),
        config.paths.profile,
    )
    shown = io.StringIO()
    print_check(checked(config), Console(file=shown, width=200))
    assert "by 2 threads each, batches of 7 at most in 20.0 MB; 3 loads at once" in shown.getvalue()
    config = config.model_copy(update={"executors": Executors(load_slots=1)})
    assert checked(config)["load_slots"] == 1, "what the settings say goes before it"


class AlarmLog:
    """What telemetry does with the alarm `profile` while runs of one architecture take so many times as long."""

    def __init__(self) -> None:
        self.told, self.raised = list[str](), list[str]()
        self._made = SimpleNamespace(choice=Choice(FULL), profile=FULL, executors=[Executor("cpu-0", "cpu")])

    def set(self, alarm: str, wrong: dict[str, Any] | None) -> None:
        if bool(wrong) != bool(self.raised):
            self.told.append(f"raised {wrong['times_as_long']['a']}" if wrong else "lowered")
        self.raised = [alarm] if wrong else []

    def look(self, times_as_long: float) -> None:
        learnt = {("a", "cpu"): Learnt(0.5, 0.25, times_as_long)}
        relearning = SimpleNamespace(learnt=lambda: learnt)
        facts = {"_installation": self._made, "_alarms": self, "_cores": 2, "_relearning": relearning}
        Telemetry._look_at_costs(SimpleNamespace(**facts))  # type: ignore[arg-type]


def test_a_service_serves_by_its_profile_and_its_journal_replays_so(tmp_path: Path, catalog: Path) -> None:
    """Executors, threads of each run, the split of memory and the policy's hold."""
    by_default, box = (Box(tmp_path / name, catalog) for name in ("default", "box"))
    found = {"cpu_executors": 1, "threads": 9, "weights_bytes": 16384, "hold_share": 0.9, "batch_cap": 2}
    _serve_by(box, profile(origin(hardware(), _graph_of(box)), **found))
    _serve_by(by_default, profile(origin(hardware()), cpu_executors=1))
    threads = []
    for one in (by_default, box):
        with one, Camera(one.port, RESULT, STATS) as camera:
            for number in range(60):
                camera.publish(INFER + f"c-e{number % 4}", picture(number))
            hear_verdicts(camera, 60)
            threads.append(psutil.Process(one.pid).num_threads())
            stats = until(partial(_stats, camera, 60))
            assert ("profile" in stats["alarms"]) == (one is by_default), "that of other experts is used and told"
            one.stop()
    assert threads[1] >= threads[0] + 6, "a run has eight helpers; one or two others may come and go"
    opening, *_ = (box.folder / "journal.jsonl").read_text().splitlines()
    assert json.loads(opening)["hold_share"] == 0.9
    assert len(json.loads(opening)["executors"]) == 1
    assert {expert["max_batch"] for expert in json.loads(opening)["experts"]} == {2}
    replayed = simulated(box.folder / "journal.jsonl", predict=False)
    assert (replayed["loads"], replayed["evictions"]) == (stats["loads"], stats["evictions"])
    assert replayed["evictions"] > 0


def test_a_service_raises_an_alarm_for_a_profile_of_another_box(tmp_path: Path, catalog: Path) -> None:
    box = Box(tmp_path / "box", catalog)
    _serve_by(box, profile(origin()))
    with box, Camera(box.port, ALARMS) as operator:
        body = json.loads(until(lambda: operator.hear_of("/alarm/profile").payload))
        assert body["alarm"] == "profile"
        assert "profile box1 is of another box, and not used" in body["detail"]
        assert "alarm name=profile" in box.log_text
        assert "profile=default" in box.log_text


def test_runs_near_the_limit_raise_the_alarm_once() -> None:
    """Now beyond it and now not, they would raise and lower it all day."""
    alarm_log = AlarmLog()
    for times_as_long in (1.4, 1.55, 1.45, 1.55, 1.35, 1.2, 1.4, 0.6, 0.7, 0.6, 0.8):
        alarm_log.look(times_as_long)
    assert alarm_log.told == ["raised 1.55", "lowered", "raised 0.6", "lowered"]


def _config(folder: Path, catalog: Path, found: Profile) -> Config:
    folder.mkdir(exist_ok=True)
    profiles.save(found, folder / "profile.json")
    store = catalog.with_name("store")
    paths = {"catalog": catalog, "state": folder / "state", "store": store, "profile": folder / "profile.json"}
    return Config.model_validate({"paths": paths})


def _serve_by(box: Box, found: Profile) -> None:
    path = box.folder / "profile.json"
    profiles.save(found, path)
    lines = box.config.read_text("utf-8").splitlines()
    box.config.write_text("\n".join(f"profile = '{path}'" if "profile =" in line else line for line in lines))


def _graph_of(box: Box) -> str:
    made: Installation = install(settings.load(box.config))
    return graph_sha256(made.catalog, made.compiled)


def _stats(camera: Camera, verdicts: int) -> dict[str, Any]:
    """The next message if it is statistics that count so many verdicts, else nothing."""
    heard = camera.hear()
    if heard.topic != STATS:
        return {}
    body: dict[str, Any] = json.loads(heard.payload)
    return body if sum(body["verdicts"].values()) == verdicts else {}


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "profiles").iterdir()), ids=lambda path: path.name)
def test_every_shipped_profile_is_sound(path: Path) -> None:
    assert profiles.load(path).name == path.stem
