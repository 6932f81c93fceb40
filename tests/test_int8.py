"""A box that is asked for int8: sound variants are served, everybody else is as before, and all can be told apart."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from appliance import catalog as catalogs
from appliance import profile as profiles
from appliance.config import Config, Experts, Paths
from appliance.drivers.devices import Gpu
from appliance.errors import CatalogError, VariantError
from appliance.profile import Profile
from appliance.report import print_check
from appliance.startup import Installation, checked, hardware, install, waiting_to_compile
from export import proof, variants
from tests.kit_box import ALARMS, RESULT, Box
from tests.kit_brokers import Camera
from tests.kit_int8 import EXPERT, PRODUCT, Line, write_line

PROFILE = Path(__file__).parents[1] / "profiles" / "default.json"
INT8, FULL = Experts(precision="int8"), Experts(precision="full")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """With a store beside the catalogue that holds both precisions."""
    line = write_line(tmp_path_factory.mktemp("made"))
    variants.make(line.job)
    for experts in (INT8, FULL):
        install(_config(line, experts))
    return line


@pytest.fixture
def line(made: Line, tmp_path: Path) -> Line:
    return made.copied(tmp_path)


def _config(line: Line, experts: Experts, profile: Path = PROFILE) -> Config:
    paths = Paths(catalog=line.catalog, state=line.folder / "state", store=line.folder / "store", profile=profile)
    return Config(paths=paths, experts=experts)


# The catalogue.


def test_a_damaged_variant_is_refused_by_name_and_the_bundle_is_sound(line: Line) -> None:
    line.variant_path.write_bytes(line.variant_path.read_bytes()[:-1] + b"\0")
    catalogs.verify(line.bundle)
    with pytest.raises(VariantError, match=rf"{line.variant_path.name} has SHA-256 .*appliance export --int8"):
        catalogs.verified_int8(line.bundle)


def test_a_missing_variant_is_refused_by_name(line: Line) -> None:
    path = line.variant_path
    path.unlink()
    with pytest.raises(VariantError, match=rf"{path.name} cannot be read"):
        catalogs.verified_int8(line.bundle)


def test_a_variant_of_another_network_is_refused(line: Line) -> None:
    manifest = line.bundle.folder / "expert.toml"
    made_from = f'made_from = "{line.bundle.manifest.model.sha256}"'
    manifest.write_text(manifest.read_text("utf-8").replace(made_from, f'made_from = "{"0" * 64}"'), "utf-8")
    with pytest.raises(VariantError, match=r"was made from another model\.onnx"):
        catalogs.verified_int8(line.bundle)


def test_an_unknown_key_of_a_variant_is_an_error(line: Line) -> None:
    manifest = line.bundle.folder / "expert.toml"
    manifest.write_text(manifest.read_text("utf-8").replace("scope =", "scoop = 1\nscope ="), "utf-8")
    with pytest.raises(CatalogError, match=r"variants\.int8\.scoop"):
        _ = line.bundle


# Installing.


def test_a_box_that_is_asked_for_int8_serves_the_variant_and_no_other_box_does(line: Line) -> None:
    ours, full = install(_config(line, INT8)), install(_config(line, Experts()))
    assert ours.compiled[EXPERT].model_sha256 == line.bundle.manifest.variants.int8.sha256  # type: ignore[union-attr]
    assert full.compiled[EXPERT].model_sha256 == line.bundle.manifest.model.sha256
    assert ours.compiled[EXPERT].bytes < 0.35 * full.compiled[EXPERT].bytes
    ((_, served),), ((_, served_full),) = (set(made.serving.items()) for made in (_one(ours), _one(full)))
    assert (served.precision, served_full.precision) == ("int8", "full")
    assert served.weights_sha256 == ours.compiled[EXPERT].weights_sha256 != served_full.weights_sha256


def _one(made: Installation) -> Installation:
    """The box with one executor."""
    from dataclasses import replace

    executors = made.config.executors.model_copy(update={"cpu": 1})
    return replace(made, config=made.config.model_copy(update={"executors": executors}))


def test_both_precisions_lie_in_the_store_beside_each_other(line: Line) -> None:
    made = install(_config(line, INT8))
    assert made.store.unused(made.catalog) == {}
    assert made.store.prune(made.catalog) == 0
    for experts in (INT8, FULL):
        assert waiting_to_compile(_config(line, experts)) == []
    shutil.rmtree(line.folder / "store")
    for experts in (INT8, FULL):
        assert [bundle.precision for bundle in waiting_to_compile(_config(line, experts))] == [experts.precision]


def test_a_damaged_variant_leads_to_full_precision_and_a_line_in_check(line: Line) -> None:
    line.variant_path.write_bytes(b"damaged")
    found = checked(_config(line, INT8))
    assert (found["experts"], found["unavailable"]) == (1, {})
    assert (found["int8"]["variants"], found["int8"]["experts"], found["int8"]["saved_bytes"]) == (1, 0, 0)
    assert found["int8"]["refused"][EXPERT]["reason"] == "variant"
    assert install(_config(line, INT8)).compiled[EXPERT].model_sha256 == line.bundle.manifest.model.sha256
    assert f"{EXPERT} serves in full precision, not in int8 (variant)" in _shown(found)


def test_a_variant_that_answers_its_golden_samples_otherwise_than_it_did_is_not_served(line: Line) -> None:
    """As on a processor whose arithmetic is another."""
    manifest = line.bundle.folder / "expert.toml"
    head, _ = manifest.read_text("utf-8").split("[variants.int8.tolerance]")
    manifest.write_text(f"{head}[variants.int8.tolerance]\nlogits = 1e-9\n", "utf-8")
    shutil.rmtree(line.folder / "store")
    made = install(_config(line, INT8))
    assert made.variants.refused[EXPERT].reason == "golden-mismatch"
    assert made.compiled[EXPERT].model_sha256 == line.bundle.manifest.model.sha256
    assert made.bundles_on("cpu")[EXPERT].precision == "full"


def test_check_tells_how_many_serve_in_int8_and_what_that_saves(line: Line) -> None:
    found = checked(_config(line, INT8))
    saved = line.bundle.manifest.model.bytes - line.variant_path.stat().st_size
    assert (found["int8"]["experts"], found["int8"]["saved_bytes"]) == (1, saved)
    assert "1 experts, 0.4 MB less" in _shown(found)
    assert "1 experts have a variant" in _shown(checked(_config(line, FULL)))


def _shown(found: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=300)
    print_check(found, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_profile_says_the_precision_that_the_settings_leave_open(line: Line) -> None:
    path = line.folder / "box.json"
    profiles.save(Profile(schema=2, name="box", precision="int8"), path)
    assert install(_config(line, Experts(), path)).bundles_on("cpu")[EXPERT].precision == "int8"
    assert install(_config(line, FULL, path)).bundles_on("cpu")[EXPERT].precision == "full"


def test_the_precision_of_another_boxs_profile_counts_for_nothing(line: Line) -> None:
    here = hardware()
    found = profiles.Found(workload="", objective="", trials=1, confirmed=1, predicted=1, live=1, default_live=1)
    elsewhere = here.model_copy(update={"cores": here.cores + 1})
    origin = profiles.Origin(version="1", made_at="", hardware=elsewhere, graph_sha256="", found=found)
    path = line.folder / "box.json"
    profiles.save(Profile(schema=2, name="box", precision="int8", origin=origin), path)
    made = install(_config(line, Experts(), path))
    assert made.choice.refused is not None
    assert (made.config.experts.precision, made.bundles_on("cpu")[EXPERT].precision) == ("full", "full")


def test_a_gpu_takes_the_network_and_never_the_variant(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.startup.devices.gpus", lambda: [Gpu(0, "Test GPU", 8 << 30, 5 << 30, "1")])
    monkeypatch.setattr("appliance.startup.cuda.usable_gpu", lambda index: None)
    made = install(_config(line, INT8))
    assert made.compiled_on("cuda:0")[EXPERT].model_sha256 == line.bundle.manifest.model.sha256
    assert {(device, serving.precision) for (_, _), serving in made.serving.items() for device in [serving.device]} == {
        ("cuda:0", "full"),
        ("cpu", "int8"),
    }


# Serving.


def test_verdicts_of_a_box_in_int8_name_the_variants_weights(line: Line) -> None:
    compiled = install(_config(line, INT8)).compiled[EXPERT]
    settings = "[experts]\nprecision = 'int8'\n"
    part = next(name for name, p in catalogs.load(line.catalog).products[PRODUCT].placements.items())
    with Box(line.folder / "box", line.catalog, settings=settings) as box, Camera(box.port, RESULT) as camera:
        camera.publish(f"coe/v1/plant/infer/line1/{PRODUCT}/-/{part}", _picture(line))
        verdict = json.loads(camera.hear().payload)
    (step,) = verdict["steps"]
    assert (step["expert"], step["precision"], step["weights_sha256"]) == (EXPERT, "int8", compiled.weights_sha256)
    assert verdict["outcome"] in ("pass", "fail")


def test_a_box_whose_variant_is_damaged_serves_in_full_precision_and_raises_an_alarm(line: Line) -> None:
    line.variant_path.write_bytes(b"damaged")
    settings = "[experts]\nprecision = 'int8'\n"
    part = next(name for name, p in catalogs.load(line.catalog).products[PRODUCT].placements.items())
    with Box(line.folder / "box", line.catalog, settings=settings) as box:
        with Camera(box.port, ALARMS, name="operator") as operator:
            alarm = json.loads(operator.hear_of("/variants").payload)
        with Camera(box.port, RESULT) as camera:
            camera.publish(f"coe/v1/plant/infer/line1/{PRODUCT}/-/{part}", _picture(line))
            (step,) = json.loads(camera.hear().payload)["steps"]
    assert alarm["experts"][EXPERT]["reason"] == "variant"
    assert step["precision"] == "full"


def _picture(line: Line) -> bytes:
    return proof.picture_files(line.pictures)[0].read_bytes()
