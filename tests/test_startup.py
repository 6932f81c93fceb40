"""Reading, compiling and setting aside: what the box has before it serves."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
from pydantic import ByteSize
from rich.console import Console

from appliance import catalog as catalogs
from appliance import profile as profiles
from appliance.catalog import Bundle
from appliance.config import Config, Executors, Experts, Limits, Memory, Paths
from appliance.core.types import Arrived, Load, Publish, Request, bytes_together
from appliance.drivers.devices import Gpu, memory_bytes
from appliance.errors import ApplianceError, CatalogError, ConfigError, ModelError
from appliance.lab.shapes import manifest_text
from appliance.profile import Found, Loads, OnGpus, Origin, Profile, Running
from appliance.report import print_check
from appliance.startup import (
    Installation,
    checked,
    footprint,
    graph_sha256,
    hardware,
    install,
    probabilities,
    waiting_to_compile,
)
from appliance.store.compile import compile_bundles
from appliance.store.store import Compiled, Store
from tests.kit_boards import write_board_catalog, write_product
from tests.kit_box import write_catalog
from tests.kit_children import kept_children
from tests.kit_models import conv_net, fine_tune, greedy_net, write_bundle

__all__ = ["kept_children"]  # a fixture

pytestmark = pytest.mark.usefixtures("kept_children")

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


@pytest.mark.parametrize("overflow", ["reject", "oldest"])
def test_a_recipe_of_which_no_whole_board_could_ever_wait_is_refused(tmp_path: Path, overflow: str) -> None:
    config = _with_catalog(write_board_catalog(tmp_path / "catalog"), tmp_path)
    write_product(tmp_path / "catalog", "five", {f"R{number}": "c-good" for number in range(5)})
    limits = {"overflow": overflow, "picture_bytes": "1MB"}
    few = config.model_copy(update={"limits": Limits.model_validate({**limits, "waiting_pictures": 4})})
    with pytest.raises(CatalogError, match=r"five has 5 placements, and limits\.waiting_pictures is 4"):
        checked(few)
    enough = config.model_copy(update={"limits": Limits.model_validate({**limits, "waiting_pictures": 5})})
    assert "five" in install(enough).catalog.products


def test_where_pictures_wait_outside_a_whole_board_may_exceed_the_limit(tmp_path: Path) -> None:
    config = _with_catalog(write_board_catalog(tmp_path / "catalog"), tmp_path)
    write_product(tmp_path / "catalog", "five", {f"R{number}": "c-good" for number in range(5)})
    blocking = config.model_copy(update={"limits": Limits(waiting_pictures=4)})
    controller = install(blocking).controller()
    for number in range(5):
        actions = controller.handle(Arrived(Request(f"b/R{number}", "c-good", 0.0, picture="b")), 0.0, more=True)
        assert not any(isinstance(action, Publish) for action in actions), "nobody is turned away"
    assert controller.room(1) <= 0, "the next waits outside"


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


@pytest.mark.parametrize("wanted", [None, 1])
def test_a_gpu_that_cannot_be_used_is_said_and_the_cpu_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: int | None
) -> None:
    monkeypatch.setattr("appliance.startup.devices.gpus", lambda: [Gpu(0, "Test GPU", 8 << 30, 7 << 30, "1")])
    monkeypatch.setattr("appliance.startup.cuda.usable_gpu", lambda index: "cuda-bindings is missing")
    made = install(_config(tmp_path, 1).model_copy(update={"executors": Executors(gpus=wanted)}))
    assert made.gpus.trouble["cuda:0"] == "cuda-bindings is missing"
    assert ("gpu" in made.gpus.trouble) == (wanted == 1)
    assert [device.name for device in made.devices] == ["cpu"]


def test_a_usable_gpu_has_experts_of_its_own_a_budget_and_one_executor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.startup.devices.gpus", lambda: [Gpu(0, "Test GPU", 8 << 30, 5 << 30, "1")])
    monkeypatch.setattr("appliance.startup.cuda.usable_gpu", lambda index: None)
    made = install(_config(tmp_path, 1))
    gpu, cpu = made.devices
    assert (gpu.name, cpu.name) == ("cuda:0", "cpu")
    assert gpu.budget_bytes == int((0.8 * (5 << 30) - 2_000_000_000) / 1.25)
    assert [e.name for e in made.executors if e.device == "cuda:0"] == ["cuda:0-0"]
    (expert,) = made.experts.values()
    assert expert.footprints.keys() == expert.costs.keys() == {"cuda:0", "cpu"}
    measured = made.compiled_on("cuda:0")[expert.name]
    assert expert.costs["cuda:0"].item_seconds == measured.item_seconds / made.profile.gpu_speed
    assert expert.costs["cuda:0"].fixed_seconds == measured.fixed_seconds / made.profile.gpu_speed
    assert [d.name for d in made.without("cuda:0", "lost").devices] == ["cpu"]
    off = install(made.config.model_copy(update={"executors": Executors(gpus=0)}))
    assert (len(off.devices), off.gpus.trouble) == (1, {})


def test_a_profile_settles_how_many_gpus_run_experts_and_how_their_memory_is_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"weights_bytes": 1 << 30, "activation_bytes": 1 << 20, "host_tier_bytes": 0}
    made = _gpu_box(tmp_path, monkeypatch, found=OnGpus(**found, count=1))
    gpu, _ = made.devices
    assert (gpu.budget_bytes, gpu.activation_bytes) == (1 << 30, 1 << 20)
    assert int(made.config.memory.gpu_host_tier) == 0
    config = _with_catalog(tmp_path / "catalog", tmp_path)
    without = install(config, profile=_profile(OnGpus(count=0)))
    assert [device.name for device in without.devices] == ["cpu"]
    assert (without.gpus.trouble, without.choice.trouble) == ({}, None), "it is as it shall be"
    asked = config.model_copy(update={"executors": Executors(gpus=1)})
    assert len(install(asked, profile=_profile(OnGpus(count=0))).devices) == 2, "what the settings say goes before it"


def test_a_profile_that_uses_no_gpu_is_of_the_box_that_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _gpu_box(tmp_path, monkeypatch)
    settled = Profile(schema=2, name="box1", gpus=OnGpus(count=0), origin=_origin(made))
    for _ in range(2):
        chosen = install(made.config, profile=settled)
        assert chosen.choice.trouble is None
        assert len(chosen.devices) == 1


@pytest.mark.parametrize(("times_as_long", "device"), [(0.1, "cuda:0"), (1000.0, "cpu")])
def test_what_was_measured_on_a_gpu_decides_where_a_run_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times_as_long: float, device: str
) -> None:
    """By the guess every picture goes to the GPU."""
    made = _gpu_box(tmp_path, monkeypatch)
    assert _loaded_on(made) == {"cuda:0"}
    running = {
        one.architecture: Running(item_seconds=one.item_seconds * times_as_long, fixed_seconds=0.0, fit_error=0.0)
        for one in made.gpus.compiled.values()
    }
    measured = install(made.config, profile=_profile(OnGpus(running=running)))
    assert _loaded_on(measured) == {device}


def test_loads_of_a_gpu_cost_what_its_tier_and_the_disk_make_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far, near = Loads(fixed_seconds=1.0, bytes_per_second=1e30), Loads(fixed_seconds=0.5, bytes_per_second=1e30)
    made = _gpu_box(tmp_path, monkeypatch)
    size = bytes_together(footprint(one) for one in made.gpus.compiled.values())
    for tier, seconds in ((0, 1.0), (size // 2, 0.75), (size, 0.5), (9 * size, 0.5)):
        found = OnGpus(from_disk=far, from_host=near, host_tier_bytes=tier)
        expert = install(made.config, profile=_profile(found)).experts["e0"]
        assert expert.costs["cuda:0"].load_seconds == pytest.approx(seconds)
        assert expert.costs["cpu"].load_seconds == pytest.approx(0.002, rel=0.1)


def _loaded_on(made: Installation) -> set[str]:
    """Where experts are loaded for a picture that comes alone."""
    actions = made.controller().handle(Arrived(Request("r", "c-e0", 0.0)), 0.0)
    return {action.device for action in actions if isinstance(action, Load)}


def _profile(found: OnGpus) -> Profile:
    return Profile(schema=2, name="box1", gpus=found)


def _origin(made: Installation) -> Origin:
    found = Found(
        workload="usage", objective="throughput", trials=9, confirmed=3, predicted=9.0, live=8.0, default_live=7.0
    )
    graph = graph_sha256(made.catalog, made.compiled)
    return Origin(version="1", made_at="now", hardware=hardware(made.gpus.used), graph_sha256=graph, found=found)


def test_a_gpu_without_room_beside_activations_is_not_used_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.startup.devices.gpus", lambda: [Gpu(0, "Test GPU", 8 << 30, 1 << 30, "1")])
    monkeypatch.setattr("appliance.startup.cuda.usable_gpu", lambda index: None)
    made = install(_config(tmp_path, 1))
    assert [device.name for device in made.devices] == ["cpu"]
    assert f"{1 << 30} of its {8 << 30} bytes are free" in made.gpus.trouble["cuda:0"]
    asked = Memory.model_validate({"weights": 1_000_000, "gpu_weights": "500MB"})
    assert len(install(made.config.model_copy(update={"memory": asked})).devices) == 2


def test_what_cannot_be_compiled_for_gpus_is_said_and_the_cpu_serves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _gpu_box(tmp_path, monkeypatch, refuses="e1")
    assert made.unavailable == {}
    assert made.gpus.unavailable["e1"].reason == "model"
    assert made.experts["e1"].footprints.keys() == {"cpu"}
    found = checked(made.config)
    assert found["gpu_unavailable"] == {"e1": {"reason": "model", "detail": "no such kernel"}}
    assert found["gpu_budgets_bytes"] == {"cuda:0": int((0.8 * (5 << 30) - 2_000_000_000) / 1.25)}
    assert "e1 runs on no GPU (model): no such kernel" in _printed(found)
    assert "budget of cuda:0" in _printed(found)


def test_pins_that_need_a_gpu_that_was_lost_may_leave_and_stop_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _gpu_box(tmp_path, monkeypatch, weights=1, pin=("e0", "e1"))
    assert made.unpinned(made.controller().ledgers) == ()
    lost = made.without("cuda:0", "lost")
    assert lost.unpinned(lost.controller().ledgers) == ("e0", "e1")


def test_a_check_says_which_pins_do_not_fit(tmp_path: Path) -> None:
    config = _config(tmp_path, 2, weights=1).model_copy(update={"experts": Experts(pin=("e1",))})
    found = checked(config)
    assert found["unpinned"] == ["e1"]
    assert "e1 is pinned and has no room beside the others" in _printed(found)


def _gpu_box(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    weights: int = 1_000_000,
    refuses: str = "",
    pin: tuple[str, ...] = (),
    found: OnGpus | None = None,
) -> Installation:
    """Two experts and a GPU, for which one of them may be no good; with a profile of what was `found` for GPUs."""

    def compiling(store: Store, bundles: Sequence[Bundle], **more: Any) -> dict[str, Compiled | ApplianceError]:
        results = compile_bundles(store, bundles, **more)
        return results | ({refuses: ModelError("no such kernel")} if refuses and store.provider == "cuda" else {})

    monkeypatch.setattr("appliance.startup.devices.gpus", lambda: [Gpu(0, "Test GPU", 8 << 30, 5 << 30, "1")])
    monkeypatch.setattr("appliance.startup.cuda.usable_gpu", lambda index: None)
    monkeypatch.setattr("appliance.startup.compile_bundles", compiling)
    config = _config(folder, 2, weights).model_copy(update={"experts": Experts(pin=pin)})
    return install(config, profile=None if found is None else _profile(found))


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


def test_a_check_says_how_far_it_is(tmp_path: Path) -> None:
    config, told = _config(tmp_path, 2), list[tuple[str, int, int]]()
    checked(config, tell=lambda *step: told.append(step))
    assert told == [("experts", 1, 2), ("experts", 2, 2)]
    told.clear()
    checked(config, tell=lambda *step: told.append(step))
    assert {what for what, _, _ in told} == {"bytes"}
    assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})
    assert told[-1][1] == told[-1][2] > 0


def test_compiled_experts_that_no_bundle_names_are_told_and_stay(tmp_path: Path) -> None:
    config, folder = _with_one_gone(tmp_path)
    before = _files(folder)
    found = checked(config)
    [(name, size)] = found["unused"].items()
    assert name.startswith("gone/1-")
    assert size > 160_000
    assert found["freed_bytes"] is None
    assert _files(folder) == before
    assert f"appliance check --prune removes them\n  {name}" in _printed(found)


def _printed(found: dict[str, Any]) -> str:
    shown = io.StringIO()
    print_check(found, Console(file=shown, width=200))
    return shown.getvalue()


def test_compiled_experts_that_no_bundle_names_are_pruned_when_told_to(tmp_path: Path) -> None:
    config, folder = _with_one_gone(tmp_path)
    kept = install(config).compiled["kept"]
    old = kept.template_path.with_name("plain-of-a-head-that-nobody-has.onnx")
    old.write_bytes(b"old")
    size = sum(_files(folder).values())
    found = checked(config, prune=True)
    assert len(found["unused"]) == 1
    assert "removed compiled experts that no bundle names: 1" in _printed(found)
    assert found["freed_bytes"] == size - sum(_files(folder).values()) > 10_000
    assert checked(config)["unused"] == {}
    assert not old.exists()
    made = install(config)
    assert {path.name for path in (folder / "segments").iterdir()} == {s.id for s in made.compiled["kept"].segments}
    assert [path.name for path in (folder / "architectures").iterdir()] == [made.compiled["kept"].architecture]
    made.store.verify(made.compiled["kept"])


def test_what_is_compiled_for_gpus_is_checked_and_pruned_too(tmp_path: Path) -> None:
    config, _ = _with_one_gone(tmp_path)
    bundles = list(catalogs.load(config.paths.catalog).bundles.values())
    gone = write_bundle(tmp_path / "elsewhere", "gone-too", conv_net(7, width=150))
    store = Store(config.paths.store, "cuda")
    compile_bundles(store, [*bundles, gone], report=lambda *_: None)
    (description,) = (store.folder / "experts" / "gone-too").iterdir()
    segment = store.find(bundles[0]).segments[0]  # type: ignore[union-attr]
    path = store.segment_path(segment.id)
    path.write_bytes(bytes(segment.bytes))
    del store
    found = checked(config, prune=True)
    assert str(path) in found["damaged"]
    assert any(name.startswith("gone-too/") for name in found["unused"])
    assert not description.exists()


def test_what_a_running_service_may_need_is_not_pruned(tmp_path: Path) -> None:
    config, folder = _with_one_gone(tmp_path)
    service = Store(config.paths.store)
    service.join()
    weights = {
        path for path in _files(folder) if path.parent.name != "experts" and path.parent.parent.name != "experts"
    }
    checked(config, prune=True)
    assert weights <= _files(folder).keys()
    del service
    checked(config, prune=True)
    assert [path.name for path in (folder / "experts").glob("*/*.json")] == ["1-" + _model_digest(config) + ".json"]
    assert len(list((folder / "architectures").iterdir())) == 1


def test_every_version_on_disk_keeps_what_was_compiled_of_it(tmp_path: Path) -> None:
    """The newest serves; an older one may be pinned tomorrow, also if its manifest cannot be read today."""
    catalog = write_catalog(tmp_path / "catalog", {"e": fine_tune(1, width=200)})
    config = _with_catalog(catalog, tmp_path)
    install(config)
    second = write_bundle(catalog, "e", fine_tune(2, width=200), version=2)
    (second.folder / "expert.toml").write_text(manifest_text(second), "utf-8")
    assert checked(config, prune=True)["unused"] == {}
    (catalog / "e" / "1" / "expert.toml").write_text("nonsense")
    assert checked(config, prune=True)["unused"] == {}
    rmtree(second.folder)
    third = write_bundle(catalog, "e", fine_tune(3, width=200), version=2)
    (third.folder / "expert.toml").write_text(manifest_text(third), "utf-8")
    [name] = checked(config)["unused"]
    assert name == f"e/2-{second.manifest.model.sha256[:12]}", "the same version of another model"


def _with_one_gone(folder: Path) -> tuple[Config, Path]:
    """A box of two experts of different architectures and one trunk, of which one has left the catalogue."""
    nets = {"kept": fine_tune(1, width=200), "gone": conv_net(2, width=201)}
    catalog = write_catalog(folder / "catalog", nets)
    config = _with_catalog(catalog, folder)
    assert checked(config)["unused"] == {}
    rmtree(catalog / "gone")
    (catalog / "graph.toml").write_text("schema = 1\nname = 'test'\n[components]\nc-kept = 'kept'")
    return config, Store(config.paths.store).folder


def _model_digest(config: Config) -> str:
    return catalogs.load(config.paths.catalog).bundles["kept"].manifest.model.sha256[:12]


def _files(folder: Path) -> dict[Path, int]:
    kinds = ("architectures", "experts", "segments")
    return {path: path.stat().st_size for kind in kinds for path in (folder / kind).rglob("*") if path.is_file()}


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
    ("text", "says"), [("{", "not JSON"), ('{"schema": 2}', "name"), ('{"schema": 2, "x": 1}', "x")]
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
