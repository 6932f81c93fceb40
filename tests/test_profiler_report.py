"""What was profiled, as people see it: a page with plots, a table on the terminal, bars while it runs."""

from __future__ import annotations

import io
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from appliance.profiler.page import page
from appliance.profiler.settings import Settings
from appliance.report import print_profile, print_search, profiling

DEFAULT, CHOSEN = Settings(cpu_executors=2), Settings(cpu_executors=4, hold_share=0.5)
UNSERVED: Mapping[str, Any] = {"default_live_images_per_second": 0.0, "live": {}, "default_live": {}}


def lap(number: int, settings: Settings, live: float) -> dict[str, Any]:
    rates = {"images_per_second": live, "predicted_images_per_second": 2 * live}
    return {
        "round": number,
        "settings": settings.told(),
        "wait_p99_seconds": 1.5,
        "late_share": 0.0,
        "loads": 7,
    } | rates


def fit(expert: str, threads: int, error: float) -> dict[str, Any]:
    return {
        "architecture": f"sha-of-{expert}",
        "expert": expert,
        "device": "cpu",
        "precision": "full",
        "threads": threads,
        "samples": [{"items": items, "seconds": 0.01 * items} for items in (1, 2, 4)],
        "item_seconds": 0.01,
        "fixed_seconds": 0.001,
        "fit_error": error,
        "worst_error": 2 * error,
        "best_batch": 2,
        "activation_item_bytes": 6_400_000,
        "waited_share": 0.01,
    }


def found(**other: Any) -> dict[str, Any]:
    told = {
        "version": "0.1.0",
        "hardware": {"processor": "A <fast> one", "cores": 2, "gpus": (), "runtime": "onnxruntime 1.31.1"},
        "workload": "boards & more",
        "requests": 400,
        "requests_per_lap": 200,
        "experts": 42,
        "weights_bytes": 587_000_000,
        "memory_bytes": 269_000_000,
        "objective": "throughput",
        "budget_seconds": 60.0,
        "seconds": 58.0,
        "complete": True,
        "trials": 111,
        "configurations_confirmed_live": 2,
        "predicted_images_per_second": 156.0,
        "live_images_per_second": 78.0,
        "default_live_images_per_second": 52.0,
        "live": {"images_per_second": 78.0, "wait_p99_seconds": 1.25, "late_share": 0.01},
        "default_live": {"images_per_second": 52.0, "wait_p99_seconds": 2.5, "late_share": 0.2},
        "profile_path": "profiles/box1.json",
        "changed": "cpu_executors 4, hold_share 0.5",
        "why_default": "",
        "settings": CHOSEN.told(),
        "default": DEFAULT.told(),
        "fits": [fit("good", 1, 0.01), fit("good", 2, 0.02), fit("bad", 1, 0.2)],
        "loading": {"bytes_per_second": {"1": 1.7e9, "2": 1.9e9}, "fixed_seconds": 0.0005},
        "handover": {"fixed_seconds": 0.0004, "item_seconds": 0.00005},
        "contention": [{"threads": 1, "beside_runs": {"1": 1.0, "2": 1.38}, "beside_loads": 1.2}],
        "gpu": None,
        "failed": {},
        "importances": {"hold_share": 0.7, "cpu_executors": 0.3},
        "laps": [lap(0, DEFAULT, 52.0), lap(0, CHOSEN, 78.0), lap(0, Settings(1), 60.0)],
        "memory_curve": [{"memory_bytes": size * 1e8, "images_per_second": 50.0 * size} for size in (1, 2, 3)],
    }
    return told | other


def drawings(html: str) -> int:
    return len([one for one in ElementTree.fromstring(html).iter() if one.tag == "svg"])


def text_of(html: str) -> str:
    return " ".join(" ".join(ElementTree.fromstring(html).itertext()).split())


def test_the_page_shows_before_and_after_and_every_plot() -> None:
    html = page(found())
    assert drawings(html) == 4 + 2, "laps, predictions, importances, memory; and two architectures"
    text = text_of(html)
    for said in (
        "78.0 pictures per second, 52.0 by default",
        "as many as by default",
        "6.4 MB",
        "A <fast> one",
        "boards & more",
        "70%",
        "bad",
    ):
        assert said in text
    assert "http" not in html, "nothing is fetched"
    assert "<script" not in html


def test_what_was_measured_on_a_gpu_is_shown_beside_the_cpu() -> None:
    loading = {"bytes_per_second": {"1": 3e9}, "fixed_seconds": 0.0005}
    empty = {"bytes_per_second": {}, "fixed_seconds": 0.0}
    gpu = {"from_disk": empty, "from_host": loading, "beside_cpu": 1.25, "beside_loads": 1.0, "cpu_beside": 1.5}
    on_gpu = fit("quick", 1, 0.3) | {"device": "cuda"}
    other = {"gpu": gpu, "fits": [fit("good", 1, 0.01), on_gpu]}
    text = text_of(page(found(**other)))
    for said in (
        "quick GPU",
        "host memory to a GPU 1 at once 3.00 GB/s",
        "beside all cores at work 1.25",
        "1.50 times",
    ):
        assert said in text
    assert "disk to a GPU" not in text, "that could not be measured"
    assert "GPU" not in text_of(page(found()))
    assert "GPU" in printed(**other)
    assert "GPU" not in printed()


def test_each_lap_and_sample_is_drawn_once() -> None:
    html = page(found())
    assert html.count("<circle") == 3 + 3 + 9, "laps, the memory curve, samples"
    assert [name in text_of(html) for name in ("1: default", "1: chosen", "1: A")] == [True, True, True]


def test_after_many_sittings_each_configuration_still_has_a_name_of_its_own() -> None:
    served = [lap(0, Settings(executors), 50.0 + executors) for executors in range(5, 35)]
    text = text_of(page(found(laps=served)))
    assert [name in text for name in ("1: A", "1: Z", "1: 1", "1: 4")] == [True] * 4


def test_of_many_architectures_the_worst_fits_are_drawn_and_all_are_listed() -> None:
    html = page(found(fits=[fit(f"e{number}", 1, number / 100) for number in range(20)]))
    assert drawings(html) == 4 + 6
    assert text_of(html).count("e19") == 2
    assert text_of(html).count("e3 ") == 1


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"complete": False, "laps": [], **UNSERVED}, "Interrupted"),
        (
            {"laps": [], **UNSERVED, "importances": {}, "memory_curve": [], "fits": [], "contention": []},
            "Nothing was served live",
        ),
        ({"settings": DEFAULT.told(), "why_default": "The defaults stay & so"}, "The defaults stay & so"),
        ({"failed": {"loads": "no room"}}, "Not measured: loads: no room"),
    ],
)
def test_what_is_lacking_is_told_and_leaves_a_page(other: Mapping[str, Any], says: str) -> None:
    assert says in text_of(page(found(**other)))


def printed(**other: Any) -> str:
    shown = io.StringIO()
    print_profile(found(**other), Console(file=shown, width=120))
    return shown.getvalue()


def test_the_terminal_shows_before_and_after_and_what_changed() -> None:
    text = printed()
    for said in ("52.0 images/s", "78.0 images/s, 1.50 times as many", "cpu executors", "hold share 70%", "20.0%"):
        assert said in text
    assert "threads  " not in text.split("runs of")[0], "what stays as it is has no row"
    assert "1 thread " in text
    assert "2 threads" in text
    assert "1 threads" not in text
    assert "Interrupted" not in text


def test_the_last_lines_are_the_settings_to_serve_by_it() -> None:
    path = '/a "quoted" place/box1.json'
    lines = printed(profile_path=path).splitlines()[-2:]
    assert tomllib.loads("\n".join(lines)) == {"paths": {"profile": path}}


def test_who_was_interrupted_or_found_nothing_better_is_told() -> None:
    assert "Interrupted" in printed(complete=False, laps=[], **UNSERVED)
    assert "The defaults stay" in printed(settings=DEFAULT.told(), why_default="The defaults stay.")
    assert "not measured: loads: [red]no" in printed(failed={"loads": "[red]no"})


@pytest.mark.parametrize(
    ("objective", "on_page", "on_terminal"),
    [
        (
            "p99",
            (
                "99 % of the pictures waited 1.2 s at most, 2.5 s by default",
                "2.5 s 99 % waited at most, live by default",
            ),
            ("99 % waited 2.50 s at most; 52.0", "99 % waited 1.25 s at most; 78.0 images/s, 1.50 times as many"),
        ),
        (
            "deadlines",
            ("1.00% came late, 20.00% by default", "1.00% late, live as chosen"),
            ("20.00% late; 52.0 images/s", "1.00% late; 78.0 images/s"),
        ),
    ],
)
def test_what_the_objective_asks_for_is_shown_before_and_after(
    objective: str, on_page: Sequence[str], on_terminal: Sequence[str]
) -> None:
    for said in on_page:
        assert said in text_of(page(found(objective=objective)))
    for said in on_terminal:
        assert said in printed(objective=objective)


def test_what_was_chosen_is_never_called_the_same_for_it_serves_no_more_images() -> None:
    """Where waits count it may well serve a few less."""
    live = {"images_per_second": 51.0, "wait_p99_seconds": 1.0, "late_share": 0.0}
    assert "the same" not in printed(objective="p99", live=live)
    usual = {"settings": DEFAULT.told(), "live": found()["default_live"]}
    assert "the same" in printed(objective="p99", **usual)


def test_how_the_choice_was_made_is_told_as_it_was() -> None:
    text = text_of(page(found()))
    assert "more than half of the rounds" in text
    assert "the best so far is served beside the default again" in text
    assert "in every round" not in text + printed(settings=DEFAULT.told())
    assert "it is corrected by that" in text


def test_the_table_of_searches_shows_what_was_missed() -> None:
    shown = io.StringIO()
    rates = dict.fromkeys((f"{name}_images_per_second" for name in ("casual", "two_steps", "joint")), 20.0)
    ratios = {"joint_to_casual": 1.5, "joint_to_two_steps": 0.9, "paper_best_to_casual": 1.2}
    plays = {"joint_plays": 7.4, "two_steps_plays": 8, "joint_without_guesses_images_per_second": 19.0}
    targets = [{"name": "joint_to_casual", "met": True}, {"name": "joint_to_two_steps", "met": False}]
    row = {"device": "numa", "task": "A1", "targets": targets, **rates, **ratios, **plays}
    print_search({"policy": "coserve", "seed": 1, "rows": [row]}, Console(file=shown, width=120))
    for said in ("NUMA A1", "19.0", "1.500", "0.900", "7.4 of 8", "1 missed"):
        assert said in shown.getvalue()


def test_a_terminal_has_a_bar_for_each_phase_and_other_places_have_lines() -> None:
    for is_terminal in (True, False):
        shown = io.StringIO()
        with profiling(Console(file=shown, force_terminal=is_terminal, width=120)) as (say, begun):
            say("reading experts")
            begun("measure", 10.0)
            say("running e1")
            begun("search", -1.0)
            say("searching: 25 [configurations]")
        text = shown.getvalue()
        assert "reading experts" in text
        assert ("measuring" in text, "of 10 s" in text) == (is_terminal, is_terminal)
        assert "searching: 25 [configurations]" in text
