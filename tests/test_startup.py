"""Reading, compiling and setting aside: what the box has before it serves."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ByteSize

from appliance import catalog as catalogs
from appliance import profile as profiles
from appliance.config import Config, Experts, Memory, Paths
from appliance.drivers.devices import memory_bytes
from appliance.drivers.store import Compiled
from appliance.errors import ApplianceError, ConfigError
from appliance.startup import checked, install, probabilities, waiting_to_compile
from tests.kit_box import write_catalog
from tests.kit_models import fine_tune, greedy_net

PROFILE = Path(__file__).parents[1] / "profiles" / "default.json"


def test_experts_are_compiled_once(tmp_path: Path) -> None:
    config, reported = _config(tmp_path, 3), list[str]()
    assert len(waiting_to_compile(config)) == 3
    install(config, lambda expert, result: reported.append(expert))
    assert waiting_to_compile(config) == []
    install(config, lambda expert, result: reported.append(expert))
    assert sorted(reported) == ["e0", "e1", "e2"]


def test_costs_come_from_the_compilers_measurement_and_the_profile(tmp_path: Path) -> None:
    made = install(_config(tmp_path, 1))
    cost = made.experts["e0"].costs["cpu"]
    assert cost.item_seconds > 0
    assert cost.load_seconds == pytest.approx(0.002 + made.compiled["e0"].bytes / 5e8)
    assert made.experts["e0"].max_batch == 4


def test_a_hostile_expert_is_set_aside_and_the_others_serve(tmp_path: Path) -> None:
    config = _config(tmp_path, 1)
    write_catalog(tmp_path / "more", {"greedy": greedy_net()})
    (tmp_path / "more" / "greedy").rename(tmp_path / "catalog" / "greedy")
    results: dict[str, Compiled | ApplianceError] = {}
    made = install(config, results.__setitem__)
    assert list(made.compiled) == ["e0"]
    assert made.unavailable["greedy"].reason in ("model", "model-unsafe")
    assert isinstance(results["greedy"], ApplianceError)


def test_settings_that_name_an_expert_that_nobody_has_are_refused(tmp_path: Path) -> None:
    config = _config(tmp_path, 1).model_copy(update={"experts": Experts(pin=("e9",))})
    with pytest.raises(ConfigError, match=r"experts\.pin names e9, which has no bundle"):
        install(config)


def test_pinned_experts_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    config = _config(tmp_path, 2)
    size = install(config).compiled["e0"].bytes
    small = config.model_copy(
        update={"experts": Experts(pin=("e0", "e1")), "memory": Memory(weights=ByteSize(2 * size - 1))}
    )
    with pytest.raises(ConfigError, match=r"experts\.pin: e1 has no room beside the others"):
        install(small).controller()


def test_a_budget_that_the_machine_does_not_have_is_lowered(tmp_path: Path) -> None:
    config = _config(tmp_path, 1).model_copy(update={"memory": Memory(weights=ByteSize(1 << 60))})
    (device,) = install(config).devices
    assert 0 < device.budget_bytes < memory_bytes()
    assert checked(config)["budget_bytes"] == device.budget_bytes


def test_a_check_tells_what_fits(tmp_path: Path) -> None:
    found = checked(_config(tmp_path, 3, weights=100))
    assert (found["experts"], found["architectures"], found["components"]) == (3, 1, 3)
    assert found["too_large"] == ["e0", "e1", "e2"]
    assert found["budget_share"] == pytest.approx(100 / found["weights_bytes"])
    assert found["unavailable"] == {}
    assert "flowchart" in found["graph"]


def test_a_check_reads_every_byte_and_compiles_again_what_is_damaged(tmp_path: Path) -> None:
    config = _config(tmp_path, 2)
    made = install(config)
    path = made.store.segment_path(made.compiled["e1"].segments[0].id)
    path.write_bytes(bytes(path.stat().st_size))
    assert waiting_to_compile(config) == []
    found = checked(config)
    assert list(found["damaged"]) == [str(path)]
    assert found["unavailable"] == {}
    assert checked(config)["damaged"] == {}


def test_an_expert_that_was_there_before_shares_with_one_that_is_new(tmp_path: Path) -> None:
    folder = write_catalog(tmp_path / "catalog", {"old": fine_tune(1, width=200)})
    config = _with_catalog(folder, tmp_path)
    reported = list[str]()
    install(config)
    write_catalog(tmp_path / "more", {"new": fine_tune(2, width=200)})
    (tmp_path / "more" / "new").rename(folder / "new")
    made = install(config, lambda expert, result: reported.append(expert))
    assert reported == ["new"]
    assert made.compiled["old"].segments[1] == made.compiled["new"].segments[1]
    for compiled in made.compiled.values():
        made.store.verify(compiled)


def test_probabilities_follow_usage_and_reach_subsequent_experts(tmp_path: Path) -> None:
    folder = write_catalog(tmp_path, 3, [("e0", "e2"), ("e1", "e2")])
    graph = folder / "graph.toml"
    graph.write_text(graph.read_text().replace("[[edges]]", "[usage]\nc-e0 = 3\nc-e1 = 1\n[[edges]]", 1))
    chances = probabilities(catalogs.load(folder))
    assert chances == {"e0": 0.75, "e1": 0.25, "e2": 1.0}


def test_without_usage_all_components_are_equal(tmp_path: Path) -> None:
    assert probabilities(catalogs.load(write_catalog(tmp_path, 4))) == dict.fromkeys(("e0", "e1", "e2", "e3"), 0.25)


@pytest.mark.parametrize(
    ("text", "says"), [("{", "not JSON"), ('{"schema": 1}', "name"), ('{"schema": 1, "x": 1}', "x")]
)
def test_a_faulty_profile_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "box.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        profiles.load(path)
    assert "box.json" in str(caught.value)


def test_a_missing_profile_says_which_setting_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"paths\.profile"):
        profiles.load(tmp_path / "none.json")


def _config(folder: Path, experts: int, weights: int = 1_000_000) -> Config:
    return _with_catalog(write_catalog(folder / "catalog", experts), folder, weights)


def _with_catalog(catalog: Path, folder: Path, weights: int = 1_000_000) -> Config:
    paths = Paths(catalog=catalog, state=folder / "state", store=folder / "store", profile=PROFILE)
    return Config(paths=paths, memory=Memory.model_validate({"weights": weights}))
