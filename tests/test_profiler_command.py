"""`appliance profile` as it is asked: what is refused before anything is measured, and what is kept until all is
written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from appliance import profile as profiles
from appliance.cli import app
from appliance.core.types import Arrived, Heard
from appliance.drivers.journal import Journal, Opening
from appliance.errors import ConfigError, RecordsError
from appliance.lab import laps
from appliance.profiler import boxes
from appliance.profiler.command import Pictures, _live, _why_default, _written, of_box, of_made
from appliance.profiler.gridded import _grid, against_grid
from appliance.profiler.measurements import Architecture, Latency, Loading, Measured
from appliance.profiler.profiled import Plan, Profiled
from appliance.profiler.progress import Lap
from appliance.profiler.rig import Outcome
from appliance.profiler.settings import Settings
from appliance.startup import hardware
from tests.kit import inspection_graph, request
from tests.kit_box import write_catalog

USUAL = Pictures(20, 0.35, 0.0)
SHAPE = ("--shape", "tiny")


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """The settings of a box for which nothing was compiled yet."""
    write_catalog(tmp_path / "catalog", 2)
    profiles.save(profiles.DEFAULT, tmp_path / "profiles" / "default.json")
    config = tmp_path / "appliance.toml"
    config.write_text("[paths]\ncatalog = 'catalog'\nstore = 'store'\nstate = 'state'\n", "utf-8")
    return config


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("--due", "60s"), "--due"),
        (("--journal", "j", "--due", "60s"), "--due"),
        (("--speed", "2"), "--speed"),
        (("--journal", "j", "--product", "p"), "--product"),
        (("--journal", "j", "--gap", "1ms"), "--gap"),
        (("--journal", "j", "--checked", "0.1"), "--checked"),
        (("--journal", "j", "--requests", "10"), "--requests"),
        ((*SHAPE, "--product", "p"), "--product"),
        ((*SHAPE, "--journal", "j"), "--journal"),
        ((*SHAPE, "--product", "p", "--due", "1s"), "--product"),
        ((*SHAPE, "--due", "1s"), "--due"),
        ((*SHAPE, "--speed", "2"), "--speed"),
        ((*SHAPE, "--config", "c"), "--config"),
        (("--experts", "10"), "--experts"),
        (("--memory", "10%"), "--memory"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(arguments: Sequence[str], option: str) -> None:
    found = CliRunner().invoke(app, ["profile", *arguments])
    assert found.exit_code == 2
    assert f"Invalid value for {option}" in found.output
    assert "leave it out" in found.output


@pytest.mark.parametrize("command", [("profile",), ("bench", "profile")])
def test_a_budget_that_is_too_short_to_find_anything_is_refused(command: Sequence[str]) -> None:
    found = CliRunner().invoke(app, [*command, "--budget", "9s"])
    assert found.exit_code == 2
    assert "at least 10s" in found.output


@pytest.mark.parametrize("option", ["--out", "--html", "--folder"])
@pytest.mark.parametrize("is_made", [False, True])
def test_a_place_that_cannot_be_written_is_told_before_anything_is_compiled(
    box: Path, tmp_path: Path, option: str, is_made: bool
) -> None:
    """Below a file there are no files, for nobody: not even for root."""
    places = {
        "--out": tmp_path / "out" / "box1.json",
        "--html": tmp_path / "page.html",
        "--folder": tmp_path / "kept",
    }
    places[option] = box / "below"
    out, html, folder = places.values()
    before, said = sorted(tmp_path.rglob("*")), list[str]()
    plan, tiny = Plan(10.0, folder), laps.Workload("tiny", experts=2)

    def ask() -> None:
        if is_made:
            of_made(tiny, plan, folder, out, html, said.append)
        else:
            of_box(box, USUAL, plan, out, html, said.append)

    with pytest.raises(ConfigError, match=rf"appliance\.toml/below cannot be written: .*{option}"):
        ask()
    assert said == []
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"


def test_a_page_in_a_folder_that_there_is_not_and_a_profile_that_is_a_folder_are_told(
    box: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"nowhere/x\.html cannot be written: No such file .*--html"):
        of_box(box, USUAL, Plan(10.0, tmp_path), None, tmp_path / "nowhere" / "x.html", print)
    with pytest.raises(ConfigError, match=r"cannot be written: Is a directory.*--out"):
        of_box(box, USUAL, Plan(10.0, tmp_path), tmp_path, None, print)
    with pytest.raises(ConfigError, match=r"page would lie where the profile does.*--html"):
        of_box(box, USUAL, Plan(10.0, tmp_path), tmp_path / "x", tmp_path / "below" / ".." / "x", print)


def test_the_profile_of_any_box_is_written_over_only_by_who_names_it(box: Path, tmp_path: Path) -> None:
    box.write_text(f"{box.read_text()}\n[box]\nname = 'default'\n")
    with pytest.raises(ConfigError, match=r"default\.json is any box's.*box\.name.*--out"):
        of_box(box, USUAL, Plan(10.0, tmp_path), None, None, print)


def test_a_product_or_journal_that_there_is_not_is_told_before_anything_is_compiled(box: Path, tmp_path: Path) -> None:
    said = list[str]()
    plan = Plan(10.0, tmp_path / "kept")
    with pytest.raises(ConfigError, match="no product ghost"):
        of_box(box, Pictures(20, 0.35, 0.0, product="ghost"), plan, None, None, said.append)
    with pytest.raises(RecordsError, match="gone"):
        of_box(box, Pictures(20, 0.35, 0.0, journal=tmp_path / "gone.jsonl"), plan, None, None, said.append)
    assert said == []
    assert not (tmp_path / "store").exists()


def test_deadlines_are_no_objective_where_nothing_has_one(box: Path, tmp_path: Path) -> None:
    plan, path = Plan(10.0, tmp_path / "kept", "deadlines"), tmp_path / "journal.jsonl"
    with Journal(path, Opening("0.1.0", inspection_graph(["a"]), (), (), (), {})) as journal:
        journal.note(Heard(100.0, Arrived(request("x", "c-e0", 50.0))))
    for asked in (USUAL, Pictures(20, 0.35, 0.0, journal=path)):
        with pytest.raises(ConfigError, match=r"has a deadline.*--due"):
            of_box(box, asked, plan, None, None, print)
    with pytest.raises(ConfigError, match=r"has a deadline"):
        of_made(laps.Workload("tiny", experts=2), plan, tmp_path, tmp_path / "out.json", None, print)
    assert not (tmp_path / "store").exists()


def profiled_of(default: Settings, home: Path, is_complete: bool = True) -> Profiled:
    """A search that found nothing better, and kept there what it knew."""
    known = Measured((), Loading({1: 1e9}, 0.001), (), 1.0, {})
    facts: dict[str, Any] = {"settings": default, "default": default, "measured": known, "predicted": ()}
    facts |= {"laps": (), "trials": 0, "importances": {}, "predicted_images_per_second": 1.0, "seconds": 1.0}
    return Profiled(**facts | {"share": 1.0, "is_complete": is_complete, "home": home})


@pytest.mark.parametrize("is_complete", [True, False])
def test_what_was_found_is_kept_until_it_is_written(tmp_path: Path, is_complete: bool) -> None:
    """The disk may be full by then: the same command goes on to write it. Who was interrupted goes on anyhow."""
    plan, out, html = Plan(10.0, tmp_path / "kept"), tmp_path / "out.json", tmp_path / "page.html"
    home = plan.folder / "of this search"
    home.mkdir(parents=True)
    with boxes.made_rig(laps.Workload("tiny", experts=2, requests=4), tmp_path, lambda line: None) as (rig, default):
        found = profiled_of(default, home, is_complete)
        to_full_disk = tmp_path / "full.html"
        to_full_disk.symlink_to("/dev/full")
        with pytest.raises(ConfigError, match=r"full\.html cannot be written: No space left.*--html"):
            _written(found, rig, plan, profiles.DEFAULT, hardware(), out, to_full_disk)
        assert home.exists()
        _written(found, rig, plan, profiles.DEFAULT, hardware(), out, html)
    assert (html.exists(), home.exists()) == (True, not is_complete)


def test_the_grid_beside_which_the_profiler_stands_has_weights_between_the_ends_too(tmp_path: Path) -> None:
    with boxes.made_rig(laps.Workload("tiny", experts=2, requests=4), tmp_path, lambda line: None) as (rig, default):
        asked = _grid(replace(rig, cores=2), default)
    assert len(asked) == 24
    assert sorted({round(one.weights_share, 2) for one in asked}) == [0.5, 0.66, 0.82, 0.98]


def test_beside_a_grid_nothing_is_kept_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "kept"
    home.mkdir()
    monkeypatch.setattr("appliance.profiler.gridded.profiled", lambda rig, default, *_: profiled_of(default, home))
    monkeypatch.setattr("appliance.profiler.gridded.COUNTS", {"cpu_executors": 2})
    with boxes.made_rig(laps.Workload("tiny", experts=2, requests=4), tmp_path, lambda line: None) as (rig, default):
        found = against_grid(rig, default, Plan(10.0, tmp_path), lambda line: None)
    assert found["grid_configurations"] == 2
    assert not home.exists()


def test_before_and_after_are_medians_of_the_rounds_that_both_were_in(tmp_path: Path) -> None:
    default, chosen = Settings(1), Settings(2)
    served = [(0, default, 9.0), (0, chosen, 1.0), (1, default, 4.0), (1, chosen, 3.0), (2, default, 99.0)]
    laps_of_both = [Lap(number, one, Outcome(50.0, p99, 0.0, 5)) for number, one, p99 in served]
    found = replace(profiled_of(default, tmp_path), settings=chosen, laps=laps_of_both)
    assert _live(found, default)["wait_p99_seconds"] == 6.5
    assert _live(found, chosen)["wait_p99_seconds"] == 2.0
    assert _live(replace(found, laps=()), chosen) == {}


@pytest.mark.parametrize(
    ("rounds", "is_complete", "says"),
    [
        ([(0, Settings(1)), (0, Settings(2)), (1, Settings(1)), (1, Settings(2))], True, "nothing was better"),
        ([(0, Settings(1)), (0, Settings(2))], True, "larger --budget"),
        ([(0, Settings(1)), (0, Settings(2)), (0, Settings(3)), (1, Settings(2))], True, "larger --budget"),
        ([(0, Settings(1)), (0, Settings(2))], False, ""),
    ],
)
def test_why_the_defaults_stay_is_what_was_seen(
    tmp_path: Path, rounds: Sequence[tuple[int, Settings]], is_complete: bool, says: str
) -> None:
    """In a single round another was better: then it is for want of time, and not for want of a better one."""
    served = [Lap(number, one, Outcome(float(one.cpu_executors), 1.0, 0.0, 5)) for number, one in rounds]
    found = replace(profiled_of(Settings(1), tmp_path, is_complete), laps=served)
    assert says in _why_default(found)
    assert bool(says) == bool(_why_default(found))
    assert _why_default(replace(found, settings=Settings(2))) == ""


def test_how_far_off_a_profiles_costs_are_is_told_of_the_batches_that_will_be_run(tmp_path: Path) -> None:
    """A large batch that outgrew a cache, and that nobody will run, makes the others no worse."""
    samples = (Latency(1, 0.01), Latency(2, 0.02), Latency(4, 0.04), Latency(16, 0.32))
    model = Architecture("net", "cpu", 1, samples, 0.02, 0.0, 1.0, 1.0, 1)
    with boxes.made_rig(laps.Workload("tiny", experts=2, requests=4), tmp_path, lambda line: None) as (rig, default):
        found = profiled_of(replace(default, batch_cap=4), tmp_path)
        found = replace(found, measured=replace(found.measured, architectures=(model,)))
        written = boxes.profile_of(found, rig, "box1", "throughput", "", hardware())
    assert written.running["net"].item_seconds == pytest.approx(0.01)
    assert written.running["net"].fit_error == pytest.approx(0.0, abs=1e-9)
