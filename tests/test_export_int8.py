"""Int8 variants of a trained expert, calibrated and judged on real pictures: kept where they agree, else refused."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from typer.testing import CliRunner

from appliance import catalog as catalogs
from appliance.core.types import Box, Finding
from appliance.errors import ExportError
from export import agreement, bundle, manifest, proof, quantise, toml, variants
from export.__main__ import app
from export.manifest import Entry
from tests.kit_int8 import EXPERT, Line, blacken, write_line
from tests.kit_models import attention_net, conv_net, noise, run_plain, save

SOUND, OPEN, SHORT = Finding("sound", 0.9, False), Finding("open", 0.8, True), Finding("short", 0.8, True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Line:
    line = write_line(tmp_path_factory.mktemp("made"))
    variants.make(line.job)
    return line


def test_an_int8_variant_agrees_with_its_network_and_has_a_quarter_of_its_bytes(made: Line) -> None:
    found = catalogs.verified_int8(made.bundle)
    assert found is not None
    assert found.manifest.model.bytes < 0.3 * made.bundle.manifest.model.bytes
    shown = variants.pictures(made.pictures, made.bundle.manifest)
    assert sum(one.fails is True for one in shown) >= 4
    answers = []
    for one in (made.bundle, found):
        session = proof.open_session(one.model_path, EXPERT)
        answers.append([_verdict(session, one, picture.path) for picture in shown])
    agree = sum(ours == theirs for ours, theirs in zip(*answers, strict=True)) / len(shown)
    assert agree >= 0.99


def _verdict(session: object, one: catalogs.Bundle, path: Path) -> tuple[str, bool]:
    picture, reference = proof.decoded(path.read_bytes()), proof.reference_of(path)
    feeds = {
        spec.name: proof.prepared([picture if spec.source == "picture" else reference], spec)
        for spec in one.manifest.inputs
    }
    outputs = {"logits": session.run(["logits"], feeds)[0]}  # type: ignore[attr-defined]
    ((finding,),) = proof.decisions(one.manifest, outputs, [(128, 128)])
    return finding.label, finding.fails


def test_the_network_beside_its_variant_is_untouched(made: Line) -> None:
    shipped = catalogs.read_bundle(Path("models_onnx") / EXPERT / "1")
    catalogs.verify(made.bundle)
    assert made.bundle.manifest.model == shipped.manifest.model
    assert made.bundle.mark == shipped.mark, "what is counted against an expert stays its own"
    text = (made.bundle.folder / "expert.toml").read_text("utf-8")
    assert text.startswith((shipped.folder / "expert.toml").read_text("utf-8")), "no word of the manifest is lost"


def test_a_variant_says_of_what_and_how_it_was_made(made: Line) -> None:
    variant = made.bundle.manifest.variants.int8
    assert variant is not None
    golden_samples = 6
    many = len(variants.pictures(made.pictures, made.bundle.manifest))
    assert variant.made_from == made.bundle.manifest.model.sha256
    assert (variant.calibrated, variant.judged) == ((many + 1) // 2, many // 2 + golden_samples)
    assert variant.tolerance["logits"] >= 0.001
    assert many % 2 == 1, "or who judges could not be told from who calibrates"
    assert variant.runtime.startswith("onnxruntime 1.")
    scales = [tensor.dims for tensor in onnx.load(made.variant_path).graph.initializer if tensor.name.endswith("scale")]
    assert max(scales, key=len)[0] > 1, "each channel has a scale of its own"


def test_a_variant_that_was_calibrated_on_black_pictures_is_refused_with_its_numbers(
    made: Line, tmp_path: Path
) -> None:
    line = made.copied(tmp_path)
    for number, one in enumerate(variants.pictures(line.pictures, line.bundle.manifest)):
        if number % 2 == 0:
            blacken(one.path)
            blacken(proof.reference_paths(one.path)[0])
    with pytest.raises(variants.Disagrees, match=r"agree to \d+\.\d+%, asked is 99\.00%"):
        variants.make(line.job)
    assert line.bundle.manifest.variants.int8 is None, "the one that was there is not kept either"
    assert not list(line.bundle.folder.glob("int8-*"))
    catalogs.verify(line.bundle)


def test_a_network_that_ends_in_large_numbers_keeps_its_end_in_full_precision(tmp_path: Path) -> None:
    line = write_line(tmp_path)
    _add_to_logits(line, 10_000.0)
    _, variant = variants.make(line.job)
    assert (variant.scope, variant.agreement >= 0.99) == ("layers", True)
    assert variant.bytes < 0.35 * line.bundle.manifest.model.bytes


def _add_to_logits(line: Line, offset: float) -> None:
    """Which changes no softmax; but in 8 bits a step of what goes from 0 to ten thousand is 40 wide."""
    folder = line.bundle.folder
    model = onnx.load(folder / "model.onnx")
    next(node for node in model.graph.node if "logits" in node.output).output[0] = "raw"
    model.graph.node.append(helper.make_node("Add", ["raw", "offset"], ["logits"], "lift"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(offset, np.float32), "offset"))
    onnx.save(model, folder / "model.onnx")
    document = tomllib.loads((folder / "expert.toml").read_text("utf-8"))
    content = (folder / "model.onnx").read_bytes()
    document["model"] |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    del document["golden"]
    (folder / "expert.toml").write_text(toml.dumps(document), "utf-8")


def test_too_few_pictures_are_refused_with_the_number_that_is_needed(made: Line, tmp_path: Path) -> None:
    line = made.copied(tmp_path)
    for path in proof.picture_files(line.pictures)[31:]:
        path.unlink()
    with pytest.raises(ExportError, match="holds 31 pictures, 32 are needed"):
        variants.make(line.job)
    assert catalogs.verified_int8(line.bundle) is not None, "the one that is there was made of enough"


def test_a_folder_that_is_named_after_no_label_is_an_error(made: Line, tmp_path: Path) -> None:
    line = made.copied(tmp_path)
    (line.pictures / "sound").rename(line.pictures / "fine")
    with pytest.raises(ExportError, match="named after no label"):
        variants.make(line.job)


def test_one_command_makes_the_variants_that_are_not_there_as_they_should_be(made: Line, tmp_path: Path) -> None:
    line = made.copied(tmp_path)
    assert _report(line) == {"passed": 1, "failed": 0, "already_there": 1}
    line.variant_path.write_bytes(b"damaged")
    assert _report(line) == {"passed": 1, "failed": 0, "already_there": 0}
    assert line.variant_path.read_bytes() == made.variant_path.read_bytes(), "the same pictures make the same variant"
    assert line.bundle.manifest == made.bundle.manifest
    blacken(proof.picture_files(line.pictures)[-1])
    assert not variants.is_done(line.job), "other pictures"


def _report(line: Line) -> dict[str, int]:
    flags = ["--int8", "--out", str(line.catalog), "--samples", str(line.pictures.parent), "--resume", "--jobs", "1"]
    result = CliRunner().invoke(app, [*flags, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    (expert,) = report.pop("experts")
    assert (expert["expert"], expert["precision"]) == (EXPERT, "int8")
    return dict(report)


def test_an_expert_is_exported_with_its_variant_at_once(made: Line, tmp_path: Path) -> None:
    source, path = made.bundle, tmp_path / "experts.toml"
    entry = Entry(
        name="theirs",
        onnx=str(source.model_path),
        samples=str(made.pictures),
        inputs=source.manifest.inputs,
        head=source.manifest.head,
    )
    manifest.write((entry,), path)
    flags = ["--manifest", str(path), "--int8", "--out", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, flags)
    assert result.exit_code == 0, result.output
    experts = json.loads(result.stdout)["experts"]
    assert [(expert["expert"], expert["precision"]) for expert in experts] == [("theirs", "full"), ("theirs", "int8")]
    assert experts[1]["agreement"] >= 0.99
    assert catalogs.verified_int8(catalogs.read_bundle(tmp_path / "out" / "theirs" / "1")) is not None


def test_a_manifest_without_samples_is_refused_before_anything_is_exported(made: Line, tmp_path: Path) -> None:
    source, path = made.bundle, tmp_path / "experts.toml"
    entry = Entry(name="e", onnx=str(source.model_path), inputs=source.manifest.inputs, head=source.manifest.head)
    manifest.write((entry,), path)
    result = CliRunner().invoke(app, ["--all", str(path), "--int8", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "--int8 needs pictures, and e names none" in result.output
    assert not (tmp_path / "out").exists()


def test_a_network_of_an_old_opset_is_brought_to_one_with_a_scale_for_each_channel(tmp_path: Path) -> None:
    net = conv_net()
    net.opset_import[0].version = 11
    old = save(net, tmp_path / "old.onnx")
    new = quantise.modern(old, tmp_path)
    assert onnx.load(new).opset_import[0].version == quantise.CHANNELS_OPSET
    before, after = (run_plain(path, {"image": noise(2)})["logits"] for path in (old, new))
    np.testing.assert_array_equal(before, after)
    assert quantise.modern(new, tmp_path) == new


def test_without_pictures_the_command_says_where_they_belong(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--int8", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "FOLDER/<expert>/" in result.output


def test_a_manifest_that_was_written_by_hand_keeps_its_words(made: Line, tmp_path: Path) -> None:
    line = made.copied(tmp_path)
    path = line.bundle.folder / "expert.toml"
    ours = path.read_text("utf-8")
    variant = ours[ours.index("[variants]") :]
    by_hand = ours.removesuffix(variant).replace("[head]", "# we looked long for this threshold\n[head]")
    path.write_text(by_hand.replace("# we", f"{variant}\n# we"), "utf-8")
    bundle.remove_int8(line.bundle)
    assert path.read_text("utf-8") == by_hand.rstrip() + "\n"
    assert line.bundle.manifest.variants.int8 is None


@pytest.mark.parametrize(
    ("ours", "share"),
    [
        ([(SOUND,), (OPEN,)], 1.0),
        ([(SOUND,), (SHORT,)], 0.5),  # fails all the same, but not for the same
        ([(OPEN,), (OPEN,)], 0.5),
    ],
)
def test_agreement_minds_label_and_outcome(ours: list[agreement.Found], share: float) -> None:
    assert agreement.compare([(SOUND,), (OPEN,)], ours, [None, None]).share == share


def test_findings_of_a_detector_are_the_same_where_their_boxes_overlap_by_half() -> None:
    def box(left: float) -> Finding:
        return Finding("open", 0.9, True, Box(left, 0, left + 10, 10))

    assert agreement.compare([(box(0), box(50))], [(box(52), box(2))], [None]).share == 1.0
    moved = agreement.compare([(box(0), box(50))], [(box(0), box(58))], [None])
    assert (moved.verdicts, moved.findings) == (1.0, 0.5)
    twice = agreement.compare([(box(0), box(1))], [(box(0),)], [None])
    assert twice.findings == pytest.approx(2 / 3), "one is not found twice"


def test_a_recall_that_falls_is_a_miss_however_many_pictures_agree() -> None:
    full, ours = [(OPEN,), *[(SOUND,)] * 999], [(SOUND,)] * 1000
    truths = [True, *[False] * 999]
    assert agreement.compare(full, ours, truths).misses(0.99) == ["recall falls from 100.00% to 0.00%"]
    assert agreement.compare(full, ours, [None] * 1000).misses(0.99) == []
    assert agreement.compare(ours, full, truths).misses(0.99) == [], "it may rise"


def test_the_last_layers_are_those_behind_which_there_is_no_other() -> None:
    assert quantise.last_layers(conv_net()) == ["gemm"]
    assert quantise.last_layers(conv_net(width=8)) == ["gemm"]


def test_layers_without_a_name_are_told_apart() -> None:
    net = attention_net(blocks=1)
    (last,) = quantise.last_layers(quantise.named(net))
    assert last == net.graph.node[-1].name != ""
    assert len({node.name for node in net.graph.node}) == len(net.graph.node)
