"""A task served live by every policy, small: each picture one verdict, the budget kept, the report a page."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil
import pytest

from appliance.core.policies import PAPER
from appliance.errors import ApplianceError, ConfigError
from appliance.lab import fleet as fleets
from appliance.lab import paper
from appliance.lab.fleet import fleet
from appliance.lab.laps import Lap, Workload
from appliance.lab.plain import PLAIN
from appliance.lab.task import NAMES, task
from appliance.lab.taskreport import page

SMALL = Workload("tiny", experts=8, requests=60, budget_share=0.6, gap_seconds=0.001)
ROOM_BYTES = 3 << 29
"""A GiB to spare, as `task` asks for, and what the small one takes."""
FIELDS = {
    *("policy", "loader", "images_per_second", "fraction_of_all_resident", "loads", "loads_floor"),
    *("wait_p50_seconds", "wait_p99_seconds", "peak_bytes", "cpu_seconds", "how"),
}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a task wants to find, of memory and disk: on a machine without it nothing is to be measured."""
    found = {
        "memory available": psutil.virtual_memory().available,
        "disk free": shutil.disk_usage(tmp_path_factory.getbasetemp()).free,
    }
    for what, size in found.items():
        if size < ROOM_BYTES:
            pytest.skip(f"{size / 1e9:.1f} GB of {what}, and a task wants {ROOM_BYTES / 1e9:.1f}")


@pytest.fixture(scope="module")
def served(room: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Mapping[str, Any], Sequence[Lap]]:
    """What every policy came to, and its laps."""
    folder = tmp_path_factory.mktemp("task")
    found, (laps,) = task(SMALL, beside=(0.8,), folder=folder)
    assert list(folder.iterdir()) == [], "experts and store are gone afterwards"
    return found, laps


def test_every_policy_answers_every_picture_once(served: tuple[Mapping[str, Any], Sequence[Lap]]) -> None:
    found, laps = served
    assert [row["policy"] for row in found["policies"]] == list(NAMES)
    assert {policy.name for policy in PAPER} < set(NAMES)
    assert {lap.policy: len(lap.waits_seconds) for lap in laps} == dict.fromkeys(NAMES, SMALL.requests)


def test_no_policy_takes_more_than_the_budget(served: tuple[Mapping[str, Any], Sequence[Lap]]) -> None:
    found, laps = served
    for row in found["policies"]:
        most = found["weights_bytes"] if row["policy"] == "all-resident" else found["budget_bytes"]
        assert 0 < row["peak_bytes"] <= most, row["policy"]
    largest = found["budget_bytes"] // (found["weights_bytes"] // (SMALL.experts + 2))
    for lap in laps:
        if lap.policy not in ("all-resident", PLAIN):
            assert _most_at_a_time(lap) <= largest, lap.policy


def test_the_numbers_say_what_was_found(served: tuple[Mapping[str, Any], Sequence[Lap]]) -> None:
    found, _ = served
    rows = {row["policy"]: row for row in found["policies"]}
    assert all(row.keys() == FIELDS for row in rows.values())
    assert [name for name, row in rows.items() if row["loader"] == "plain"] == [PLAIN]
    assert rows["all-resident"]["fraction_of_all_resident"] == 1.0
    assert rows["all-resident"]["loads"] == rows["all-resident"]["loads_floor"] == 0
    for name, row in rows.items():
        assert row["loads"] >= row["loads_floor"], name
    assert rows["appliance"]["loads_floor"] > 0
    assert json.loads(json.dumps(found)) == found


def test_throughput_is_told_for_each_budget(served: tuple[Mapping[str, Any], Sequence[Lap]]) -> None:
    found, _ = served
    points = [(point["policy"], point["budget_share"]) for point in found["by_budget"]]
    assert points == [(name, share) for name in ("appliance", "coserve", PLAIN) for share in (0.6, 0.8)]
    assert all(point["images_per_second"] > 0 for point in found["by_budget"])


def test_the_report_is_one_page_with_plots(served: tuple[Mapping[str, Any], Sequence[Lap]]) -> None:
    root = ElementTree.fromstring(page(*served))
    assert root.tag == "html"
    assert len([drawing for drawing in root.iter() if drawing.tag == "svg"]) >= 6
    text = "".join(root.itertext())
    assert [name for name in NAMES if name not in text] == []
    assert "http" not in page(*served), "nothing is fetched"


def test_a_report_of_few_policies_is_a_page_too(served: tuple[Mapping[str, Any], Sequence[Lap]]) -> None:
    found, laps = served
    few = {**found, "policies": [row for row in found["policies"] if row["policy"] in ("all-resident", "samba")]}
    assert ElementTree.fromstring(page(few, laps)).tag == "html"


@pytest.mark.usefixtures("room")
def test_what_a_killed_process_left_is_gone_with_the_next_fleet_and_what_is_in_use_stays(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    left, used = tmp_path / f"bench-{gone.pid}-a1", tmp_path / f"bench-{os.getpid()}-a1"
    for folder in (left, used):
        folder.mkdir()
        (folder / "segment").touch()
    with fleet(SMALL.job.board, "tiny", tmp_path, lambda line: None, plain=False):
        assert not left.exists()
        assert used.exists()


@pytest.mark.usefixtures("room")
def test_experts_have_files_and_weights_of_their_own(tmp_path: Path) -> None:
    with fleet(SMALL.job.board, "tiny", tmp_path, lambda line: None) as made:
        segments = [segment for compiled in made.compiled.values() for segment in compiled.segments]
        assert len({segment.id for segment in segments}) == len(segments)
        contents = [made.segment_path(segment.id).read_bytes() for segment in segments]
        assert len(set(contents)) == len(contents)
        assert [len(content) for content in contents] == [segment.bytes for segment in segments]
        assert {made.model_of(name) for name in made.compiled} == set(made.model_files["tiny"])


def test_a_detector_is_asked_for_a_share_of_the_pictures() -> None:
    uses = paper.drawn(replace(SMALL, requests=1000).job).asked
    detected = sum(len(uses.get(name, ())) for name in paper.DETECTOR_BYTES)
    assert 250 < detected < 450
    alone = paper.drawn(replace(SMALL, checked_share=0.0).job).asked
    assert not alone.keys() & paper.DETECTOR_BYTES.keys()


@pytest.mark.usefixtures("room")
def test_rounds_make_medians_and_the_bound_is_always_there(tmp_path: Path) -> None:
    found, rounds = task(replace(SMALL, requests=20), ["samba"], pairs=2, folder=tmp_path)
    assert [[lap.policy for lap in laps] for laps in rounds] == [["all-resident", "samba"], ["samba", "all-resident"]]
    assert [row["policy"] for row in found["policies"]] == ["all-resident", "samba"]


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "_SPARE_BYTES", 1 << 60)
    with (
        pytest.raises(ApplianceError, match=r"GB free.*choose another --folder"),
        fleet(SMALL.job.board, "tiny", tmp_path, lambda line: None),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "names", "says"),
    [
        (SMALL, ["best"], "no policy best"),
        (replace(SMALL, shape="3MB"), [], "no shape 3MB"),
        (replace(SMALL, budget_share=0.2), [], "does not hold two experts"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, wrong: Workload, names: Sequence[str], says: str) -> None:
    with pytest.raises((ApplianceError, ConfigError), match=says):
        task(wrong, names, folder=tmp_path)


@pytest.mark.parametrize("arguments", [("--budget", "0%"), ("--gap", "soon"), ("--budget", "many")])
def test_a_share_or_time_that_is_none_is_asked_wrongly(arguments: tuple[str, str]) -> None:
    command = [sys.executable, "-m", "appliance.cli", "bench", "task", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL)
    assert ran.returncode == 2
    assert arguments[0] in ran.stderr


def _most_at_a_time(lap: Lap) -> int:
    """How many stays there are at once; who leaves for another does so at the same second, or before."""
    steps = Counter[tuple[float, int]]()
    for stay in lap.stays:
        steps[stay.began_seconds, 1] += 1
        steps[stay.ended_seconds, -1] += 1
    most = now = 0
    for (_, step), count in sorted(steps.items()):
        now += step * count
        most = max(most, now)
    return most
