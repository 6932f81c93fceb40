"""Registering ONNX files that strangers made: awkward ones work, dangerous ones are refused by name. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from appliance import catalog
from appliance.catalog import ClassificationHead, DetectionHead, InputSpec
from appliance.errors import ModelError, UnsafeModel
from export import bundle, examine, foreign
from export.__main__ import app
from export.manifest import Entry
from tests.kit_models import LABELS, SIDE, conv_net, endless_net, greedy_net, model, save

ZOO = Path(__file__).parent / "data" / "zoo"

FACES = Entry(
    name="faces",
    onnx="ultraface-rfb-320.onnx",
    max_batch=8,
    inputs=(InputSpec(name="input", color="rgb", size=(320, 240), mean=(127.0,), std=(128.0,)),),
    head=DetectionHead(
        kind="detection", boxes="boxes", scores="scores", coordinates="relative", labels=("face",), background=0
    ),
)
UPRIGHT = Entry(
    name="upright",
    onnx="ppocr-mobile-v2-cls.onnx",
    max_batch=4,
    inputs=(InputSpec(name="x", size=(192, 48), scale=1 / 255, mean=(0.5,), std=(0.5,)),),
    head=ClassificationHead(
        kind="classification", output="softmax_0.tmp_0", activation="none", labels=("upright", "turned")
    ),
)
THINGS = Entry(
    name="things",
    onnx="resnet20-12fca82f.onnx",
    max_batch=8,
    inputs=(
        InputSpec(name="image", size=(32, 32), scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    ),
    head=ClassificationHead(
        kind="classification",
        output="logits",
        labels=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
)
SMALL = Entry(
    name="small",
    onnx="model.onnx",
    max_batch=4,
    inputs=(InputSpec(name="image", size=(SIDE, SIDE)),),
    head=ClassificationHead(kind="classification", output="logits", labels=LABELS, normal="sound"),
)


@pytest.mark.parametrize(
    ("entry", "max_batch"),
    [
        pytest.param(FACES, 1, id="weights listed as inputs, fixed batch"),
        pytest.param(UPRIGHT, 4, id="weights in Constant nodes"),
        pytest.param(THINGS, 8, id="an older exporter's"),
    ],
)
def test_awkward_models_of_strangers_become_bundles(entry: Entry, max_batch: int, tmp_path: Path) -> None:
    written = catalog.read_bundle(bundle.write(entry, foreign.register(entry, ZOO), tmp_path))
    catalog.verify(written)
    assert written.manifest.model.max_batch == max_batch
    assert written.model_path.read_bytes() == (ZOO / str(entry.onnx)).read_bytes()


def test_golden_samples_are_named_like_the_graphs_inputs_and_outputs(tmp_path: Path) -> None:
    written = catalog.read_bundle(bundle.write(THINGS, foreign.register(THINGS, ZOO), tmp_path))
    assert written.golden_path is not None
    with np.load(written.golden_path) as golden:
        assert set(golden) == {"image", "logits"}
        assert golden["image"].shape[1:] == (3, 32, 32)


def test_the_command_registers_a_file_given_by_flag(tmp_path: Path) -> None:
    save(conv_net(), tmp_path / "theirs.onnx")
    manifest = tmp_path / "small.toml"
    manifest.write_text(
        'schema = 1\n[[experts]]\nname = "small"\nmax_batch = 4\n'
        f'[[experts.inputs]]\nname = "image"\nsize = [{SIDE}, {SIDE}]\n'
        f'[experts.head]\nkind = "classification"\noutput = "logits"\nlabels = {list(LABELS)}\n'
    )
    flags = ["--manifest", str(manifest), "--from-onnx", str(tmp_path / "theirs.onnx"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, flags)
    assert result.exit_code == 0, result.output
    catalog.verify(catalog.read_bundle(tmp_path / "out" / "small" / "1"))


def test_a_model_that_asks_for_a_terabyte_is_refused_and_we_live(tmp_path: Path) -> None:
    save(greedy_net(), tmp_path / "model.onnx")
    with pytest.raises(ModelError):
        foreign.register(SMALL, tmp_path)


def test_a_model_that_never_ends_is_killed_at_its_time(tmp_path: Path) -> None:
    save(endless_net(), tmp_path / "model.onnx")
    with pytest.raises(UnsafeModel, match=r"took longer|time limit"):
        foreign.register(SMALL, tmp_path, seconds=4)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 300)
    with pytest.raises(ModelError, match="not an ONNX file"):
        foreign.register(SMALL, tmp_path)


def test_a_wrong_input_name_is_told_with_the_right_one(tmp_path: Path) -> None:
    save(conv_net(), tmp_path / "model.onnx")
    wrong = SMALL.model_copy(update={"inputs": (InputSpec(name="picture", size=(SIDE, SIDE)),)})
    with pytest.raises(ModelError, match="'image'"):
        foreign.register(wrong, tmp_path)


def test_a_model_whose_batch_is_fixed_serves_one_by_one(tmp_path: Path) -> None:
    save(conv_net(batch=1), tmp_path / "model.onnx")
    assert foreign.register(SMALL, tmp_path).max_batch == 1


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="not a regular file"):
        foreign.read_model(tmp_path / "model.onnx")


def test_a_file_over_the_cap_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "model.onnx").open("wb") as file:
        file.truncate(foreign.MAX_MODEL_BYTES + 1)
    with pytest.raises(ModelError, match="are accepted"):
        foreign.read_model(tmp_path / "model.onnx")


def _external(tensor: TensorProto, location: str) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


def _in_initializer(location: str) -> ModelProto:
    net = conv_net()
    _external(net.graph.initializer[0], location)
    return net


def _in_constant(location: str) -> ModelProto:
    value = numpy_helper.from_array(np.zeros(8, np.float32), "hidden")
    _external(value, location)
    node = helper.make_node("Constant", [], ["c"], value=value)
    return model(
        [node, helper.make_node("Add", ["image", "c"], ["logits"])], [], {"image": ["n", 8]}, {"logits": ["n", 8]}
    )


def _in_branch(location: str) -> ModelProto:
    value = numpy_helper.from_array(np.zeros(8, np.float32), "hidden")
    _external(value, location)
    branch = helper.make_graph([helper.make_node("Identity", ["hidden"], ["b"])], "branch", [], [], [value])
    node = helper.make_node("If", ["go"], ["logits"], then_branch=branch, else_branch=branch)
    return model([node], [], {"go": [1]}, {"logits": ["n", 8]})


@pytest.mark.parametrize("place", [_in_initializer, _in_constant, _in_branch])
@pytest.mark.parametrize("location", ["weights.bin", "../weights.bin", "/etc/passwd"])
def test_external_data_is_refused_wherever_it_hides(place: Callable[[str], ModelProto], location: str) -> None:
    with pytest.raises(ModelError, match=location):
        examine.check_structure(place(location))


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_external_data_behind_a_link_is_never_opened(link: Callable[[Path, Path], None], tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s" * 4096)
    link(tmp_path / "secret", tmp_path / "weights.bin")
    (tmp_path / "model.onnx").write_bytes(_in_initializer("weights.bin").SerializeToString())
    with pytest.raises(ModelError, match=r"weights\.bin"):
        foreign.register(SMALL, tmp_path)


def test_operators_of_a_strange_domain_are_refused() -> None:
    net = conv_net()
    net.graph.node[0].domain = "com.example"
    net.opset_import.add(domain="com.example", version=1)
    with pytest.raises(ModelError, match=r"com\.example"):
        examine.check_structure(net)


@pytest.mark.parametrize("opset", [6, onnx.defs.onnx_opset_version() + 1])
def test_an_opset_that_the_runtime_does_not_know_is_refused(opset: int) -> None:
    net = conv_net()
    net.opset_import[0].version = opset
    with pytest.raises(ModelError, match=f"opset {opset}"):
        examine.check_structure(net)


def test_an_ir_version_of_the_future_is_refused() -> None:
    net = conv_net()
    net.ir_version = onnx.IR_VERSION + 1
    with pytest.raises(ModelError, match="IR version"):
        examine.check_structure(net)
