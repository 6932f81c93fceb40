from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from appliance.catalog import Bundle
from appliance.drivers import runtime
from appliance.engine.sessions import Sessions
from appliance.engine.weights import Weights
from appliance.errors import (
    ApplianceError,
    Cancelled,
    CatalogError,
    DigestMismatch,
    ModelError,
    StoreError,
    UnsafeModel,
)
from appliance.sandbox import Child
from appliance.store import compile_child, trial
from appliance.store.compile import Interruption, compile_bundles
from appliance.store.store import Compiled, Store
from appliance.store.storecheck import StoreCheck
from tests import kit_models as kit
from tests.kit_brokers import until
from tests.kit_children import kept_children, own_children

__all__ = ["kept_children", "own_children"]  # fixtures

pytestmark = pytest.mark.usefixtures("kept_children")

ZOO = Path(__file__).parent / "data" / "zoo"
LOST = 1e9
"""By a template: so much that no memory which this process takes meanwhile weighs against it."""


@dataclass(frozen=True, slots=True)
class Workbench:
    """A catalogue's folder and a store beside it."""

    catalog: Path
    store: Store

    def bundle(self, name: str, net: ModelProto | Path | None = None, **kwargs: Any) -> Bundle:
        return kit.write_bundle(self.catalog, name, net or kit.conv_net(), **kwargs)

    def compile(self, *bundles: Bundle, jobs: int = 1) -> dict[str, Compiled | ApplianceError]:
        return compile_bundles(self.store, bundles, report=lambda name, result: None, jobs=jobs)

    def compiled(self, *bundles: Bundle) -> list[Compiled]:
        results = self.compile(*bundles)
        return [sound(results[bundle.manifest.name]) for bundle in bundles]

    def failure(self, bundle: Bundle) -> ApplianceError:
        result = self.compile(bundle)[bundle.manifest.name]
        assert isinstance(result, ApplianceError)
        return result

    def run(self, compiled: Compiled, feeds: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[Any]]:
        memory = Weights(self.store.segment_path)
        sessions = Sessions(memory, runtime.CpuPlace(), activation_bytes=64 << 20)
        memory.load(compiled.segments)
        sessions.activate(compiled)
        with sessions.lease(compiled.expert) as lease:
            return lease.run(feeds)

    def weights(self, compiled: Compiled) -> dict[str, onnxruntime.OrtValue]:
        files = [np.fromfile(self.store.segment_path(segment.id), np.uint8) for segment in compiled.segments]
        return {
            slot.name: onnxruntime.OrtValue.ortvalue_from_numpy(
                files[slot.segment][slot.offset : slot.offset + slot.bytes].view(slot.dtype).reshape(slot.shape)
            )
            for slot in compiled.tensors
        }


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(tmp_path / "models", Store(tmp_path / "store"))


def sound(result: Compiled | ApplianceError) -> Compiled:
    if isinstance(result, ApplianceError):
        raise result
    return result


@pytest.mark.usefixtures("own_children")
def test_a_compiled_expert_gives_what_its_plain_session_gives(bench: Workbench) -> None:
    bundle = bench.bundle("e", kit.conv_net(width=64))
    [compiled] = bench.compiled(bundle)
    feeds = {"image": kit.noise(3)}
    expected = kit.run_plain(bundle.model_path, feeds)
    np.testing.assert_allclose(bench.run(compiled, feeds)["logits"], expected["logits"], atol=1e-5)


ZOO_CASES: list[tuple[str, str, tuple[int, int], tuple[str, ...], int]] = [
    ("ultraface-rfb-320", "input", (320, 240), ("scores", "boxes"), 1),
    ("ppocr-mobile-v2-cls", "x", (192, 48), ("softmax_0.tmp_0",), 4),
    ("resnet20-12fca82f", "image", (32, 32), ("logits",), 8),
]


@pytest.mark.parametrize(("file", "picture", "size", "outputs", "max_batch"), ZOO_CASES)
def test_models_that_strangers_made_run_as_templates(
    bench: Workbench, file: str, picture: str, size: tuple[int, int], outputs: Sequence[str], max_batch: int
) -> None:
    path = ZOO / f"{file}.onnx"
    bundle = bench.bundle(
        "stranger",
        path,
        inputs=[{"name": picture, "size": size}],
        head={"kind": "classification", "output": outputs[0], "labels": ["a", "b"]},
        max_batch=max_batch,
    )
    [compiled] = bench.compiled(bundle)
    feeds = {picture: kit.noise(max_batch, 3, size[1], size[0])}
    expected, found = kit.run_plain(path, feeds), bench.run(compiled, feeds)
    assert tuple(found) == tuple(outputs)
    for name in outputs:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-4)
    assert weight_bytes(compiled) > 0.8 * sum(a.nbytes for a in constants(path))
    assert left_inside(compiled) < 200


def test_two_exports_of_one_architecture_share_a_template(bench: Workbench) -> None:
    ours = bench.bundle("ours", kit.conv_net(1))
    theirs = bench.bundle("theirs", shuffled(kit.conv_net(2, prefix="encoder/block.", batch="batch_size")))
    as_inputs = bench.bundle("old", weights_as_inputs(kit.conv_net(3)))
    as_constants = bench.bundle("paddle", weights_as_constants(kit.conv_net(4)))
    compiled = bench.compiled(ours, theirs, as_inputs, as_constants)
    assert len({c.architecture for c in compiled}) == 1
    assert len({c.segments for c in compiled}) == 4
    assert len(list((bench.store.folder / "architectures").iterdir())) == 1


def test_another_architecture_has_another_template(bench: Workbench) -> None:
    nets = [kit.conv_net(0, 8), kit.conv_net(0, 16), kit.conv_net(0, 8, width=8), kit.conv_net(0, 8, batch=1)]
    bundles = [bench.bundle(f"e{i}", net, max_batch=1) for i, net in enumerate(nets)]
    assert len({c.architecture for c in bench.compiled(*bundles)}) == len(nets)


def test_no_learned_number_stays_in_a_template(bench: Workbench) -> None:
    [compiled] = bench.compiled(bench.bundle("e", kit.conv_net(5)))
    assert left_inside(compiled) == 0
    bias = [slot for slot in compiled.tensors if slot.shape == (7,)]
    assert len(bias) == 1


def test_numbers_that_stay_inside_make_another_architecture(bench: Workbench) -> None:
    low, high = (bench.bundle(f"clip{i}", clipped(kit.conv_net(1), limit)) for i, limit in enumerate((3.0, 6.0)))
    first, second = bench.compiled(low, high)
    assert first.architecture != second.architecture
    assert first.segments == second.segments


def test_experts_with_equal_weights_share_their_segment(bench: Workbench) -> None:
    first, second = bench.compiled(bench.bundle("a"), bench.bundle("b"))
    assert first.segments == second.segments
    assert len(list((bench.store.folder / "segments").iterdir())) == 1


def test_segments_are_whole_pages_with_aligned_tensors_in_order(bench: Workbench) -> None:
    [compiled] = bench.compiled(bench.bundle("e", kit.conv_net(width=20)))
    [segment] = compiled.segments
    path = bench.store.segment_path(segment.id)
    assert path.stat().st_size == segment.bytes
    assert segment.bytes % 4096 == 0
    end = 0
    for slot in compiled.tensors:
        assert slot.offset % 256 == 0
        assert end <= slot.offset < end + 256
        end = slot.offset + int(np.prod(slot.shape)) * np.dtype(slot.dtype).itemsize
    assert end <= segment.bytes < end + 4096
    bench.store.verify(compiled)


def test_what_was_compiled_is_found_and_not_compiled_again(bench: Workbench) -> None:
    bundle = bench.bundle("e")
    assert bench.store.find(bundle) is None
    [compiled] = bench.compiled(bundle)
    before = snapshot(bench.store.folder)
    assert bench.store.find(bundle) == compiled
    assert bench.compiled(bundle) == [compiled]
    assert Store(bench.store.folder.parent).find(bundle) == compiled
    assert snapshot(bench.store.folder) == before


@pytest.mark.parametrize("harm", ["segment-gone", "segment-short", "template-gone", "cost-gone", "entry-cut"])
def test_an_incomplete_entry_counts_as_absent_and_is_made_again(bench: Workbench, harm: str) -> None:
    bundle = bench.bundle("e")
    [compiled] = bench.compiled(bundle)
    segment = bench.store.segment_path(compiled.segments[0].id)
    [entry] = (bench.store.folder / "experts" / "e").iterdir()
    match harm:
        case "segment-gone":
            segment.unlink()
        case "segment-short":
            os.truncate(segment, 100)
        case "template-gone":
            compiled.template_path.unlink()
        case "cost-gone":
            (compiled.template_path.parent / "architecture.json").unlink()
        case _:
            os.truncate(entry, 100)
    assert bench.store.find(bundle) is None
    [again] = bench.compiled(bundle)
    measured: dict[str, Any] = {
        "item_seconds": 0.0,
        "fixed_seconds": 0.0,
        "activation_item_bytes": 0,
        "activation_fixed_bytes": 0,
    }
    assert replace(again, **measured) == replace(compiled, **measured)
    assert bench.store.find(bundle) == again


def test_damage_inside_a_segment_is_found_when_asked(bench: Workbench) -> None:
    [compiled] = bench.compiled(bench.bundle("e"))
    path = bench.store.segment_path(compiled.segments[0].id)
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match="is damaged"):
        bench.store.verify(compiled)


def test_an_int8_expert_is_served_by_a_plain_session_of_its_segments(bench: Workbench, tmp_path: Path) -> None:
    """As a template it takes 1.9 to 2.1 times as long (1.31.1, AVX2 and AVX-512, 2026-11)."""
    bundles = [bench.bundle(f"e{seed}", kit.int8_net(tmp_path, seed)) for seed in (1, 2)]
    compiled = bench.compiled(*bundles)
    assert len({c.architecture for c in compiled}) == 1
    assert len({c.plain_path for c in compiled}) == 1
    assert compiled[0].segments[1] == compiled[1].segments[1], "they share their trunk"
    assert compiled[0].segments[0] != compiled[1].segments[0]
    for bundle, expert in zip(bundles, compiled, strict=True):
        assert expert.plain_path is not None
        assert expert.plain_path.stat().st_size < 100_000, "it holds no weights"
        feeds = {"image": kit.noise(3)}
        expected = kit.run_plain(bundle.model_path, feeds)["logits"]
        np.testing.assert_allclose(bench.run(expert, feeds)["logits"], expected, atol=1e-5)
        assert 0.8 * expert.bytes < expert.private_bytes < 2 * expert.bytes, "the runtime packs a copy"


@pytest.mark.parametrize("loses", [True, False])
def test_quantised_experts_of_one_network_are_one_architecture_each_with_its_scales(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loses: bool
) -> None:
    monkeypatch.setattr("appliance.store.compile.Child", InProcess)
    monkeypatch.setattr("appliance.store.trial.loss", lambda pairs: LOST * loses)
    nets = {f"e{seed}": kit.int8_net(tmp_path, seed, kit.conv_net(seed, 32)) for seed in (1, 2)}
    bundles = [bench.bundle(name, net) for name, net in nets.items()]
    experts = bench.compiled(*bundles)
    assert len({expert.architecture for expert in experts}) == 1
    for bundle, expert in zip(bundles, experts, strict=True):
        assert (expert.plain_path is not None) == loses
        feeds = {"image": kit.noise(3)}
        expected = kit.run_plain(bundle.model_path, feeds)["logits"]
        np.testing.assert_allclose(bench.run(expert, feeds)["logits"], expected, atol=1e-5)


def test_convolutions_are_served_as_templates(bench: Workbench) -> None:
    [compiled] = bench.compiled(bench.bundle("e", kit.deep_net()))
    assert compiled.plain_path is None
    assert compiled.private_bytes == 0


@pytest.mark.parametrize("loses", [True, False])
def test_how_an_architecture_is_served_follows_the_first_measurement(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, loses: bool
) -> None:
    monkeypatch.setattr("appliance.store.compile.Child", InProcess)
    monkeypatch.setattr("appliance.store.trial.loss", lambda pairs: LOST * loses)
    first, second = bench.bundle("first", kit.conv_net(1)), bench.bundle("second", kit.conv_net(2))
    [compiled] = bench.compiled(first)
    monkeypatch.setattr("appliance.store.trial.loss", lambda pairs: LOST * (not loses))
    [other] = bench.compiled(second)
    for bundle, expert in ((first, compiled), (second, other)):
        assert (expert.plain_path is not None) == loses
        feeds = {"image": kit.noise(2)}
        expected = kit.run_plain(bundle.model_path, feeds)["logits"]
        np.testing.assert_allclose(bench.run(expert, feeds)["logits"], expected, atol=1e-5)
    assert other.item_seconds == compiled.item_seconds


class InProcess:
    """A child that is none, so that a test can change what it finds."""

    is_alive = True

    def __init__(self, module: str, *, memory_bytes: int) -> None: ...

    def ask(self, request: dict[str, Any], *, seconds: float) -> dict[str, Any]:
        reply: dict[str, Any] = json.loads(json.dumps(compile_child.compile_one(request)))
        return reply

    def close(self) -> None: ...


@pytest.mark.parametrize(("loses", "opens"), [(True, "as_plain"), (False, "as_template")])
def test_what_will_serve_is_what_is_proven(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, loses: bool, opens: str
) -> None:
    monkeypatch.setattr("appliance.store.compile.Child", InProcess)
    monkeypatch.setattr("appliance.store.trial.loss", lambda pairs: LOST * loses)
    bench.compiled(bench.bundle("first"))
    real = getattr(trial, opens)

    def wrong(path: Path, weights: trial.Weights) -> trial.Trial:
        opened: trial.Trial = real(path, {name: np.zeros_like(array) for name, array in weights.items()})
        return opened

    monkeypatch.setattr(trial, opens, wrong)
    assert "differs from the plain session's" in str(bench.failure(bench.bundle("other", kit.conv_net(1))))
    monkeypatch.setattr("appliance.store.compile_child._prove_equal", lambda *_: None)
    truth = {
        "image": kit.noise(1),
        "logits": kit.run_plain(bench.bundle("x").model_path, {"image": kit.noise(1)})["logits"],
    }
    assert "off golden.npz" in str(bench.failure(bench.bundle("golden", golden=truth)))


def test_a_plain_session_that_is_given_too_few_weights_is_refused(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.store.compile.Child", InProcess)
    monkeypatch.setattr("appliance.store.trial.loss", lambda pairs: LOST)
    [compiled] = bench.compiled(bench.bundle("e"))
    assert compiled.plain_path is not None
    weights = bench.weights(compiled)
    for name in weights:
        with pytest.raises(runtime.ERRORS):
            runtime.CpuPlace().open_plain(
                compiled.plain_path, {other: value for other, value in weights.items() if other != name}
            )


def test_a_flipped_bit_in_a_plain_graph_is_put_away_and_compiled_again(bench: Workbench, tmp_path: Path) -> None:
    bundle = bench.bundle("e", kit.int8_net(tmp_path))
    [compiled] = bench.compiled(bundle)
    path = compiled.plain_path
    assert path is not None
    for notice in (bench.store.check, lambda: bench.store.repair(bundle)):
        flip_bit(path)
        with pytest.raises(StoreError, match="is damaged"):
            bench.store.verify(compiled)
        assert bench.store.find(bundle) is None
        notice()
        assert not path.exists()
        assert (bench.store.quarantine / path.name).is_file()
        assert bench.compiled(bundle) == [compiled]
        bench.store.verify(compiled)


@pytest.mark.parametrize(
    ("pairs", "lost"),
    [
        ([(0.012, 0.010)] * 5, 0.2),
        ([(0.0108, 0.010)] * 5, 0.0),
        ([(0.008, 0.010)] * 5, 0.0),
        ([(0.00019, 0.00010)] * 5, 0.0),  # a tenth of a millisecond is not worth a session
        ([(0.010, 0.010)] * 6 + [(0.050, 0.010)] * 5, 0.0),  # the box was busy in between
        ([(0.020, 0.010)] * 6 + [(0.020, 0.080)] * 5, 1.0),
    ],
)
def test_a_template_has_to_lose_clearly_and_often(pairs: list[tuple[float, float]], lost: float) -> None:
    assert trial.loss(pairs) == pytest.approx(lost)


@pytest.mark.parametrize(
    ("lost", "private_share", "plain"),
    [(0.95, 1.2, True), (0.3, 1.0, False), (0.7, 1.0, True), (0.3, 0.1, True), (0.0, 0.0, False)],
)
def test_memory_that_a_plain_session_keeps_has_to_buy_speed(lost: float, private_share: float, plain: bool) -> None:
    assert trial.is_worth(lost, int(private_share * 1_000_000), 1_000_000) is plain


@pytest.mark.usefixtures("own_children")
def test_what_a_run_takes_beside_the_weights_is_measured(bench: Workbench) -> None:
    """Two results of 64 x 96 x 96 are there at once; a planned block lies beside the pieces of the first run."""
    inputs = [{"name": "image", "size": (96, 96)}]
    [compiled] = bench.compiled(bench.bundle("e", kit.deep_net(channels=64, layers=3, side=96), inputs=inputs))
    both = 2 * 64 * 96 * 96 * 4
    for count in (1, 2, 4, 8):
        taken = compiled.activation_fixed_bytes + count * compiled.activation_item_bytes
        assert count * both <= taken <= 3 * count * both


@pytest.mark.parametrize(
    ("samples", "line"),
    [
        ([(1, 1000)], (1000, 0)),
        ([(1, 1000), (2, 1500)], (500, 500)),
        ([(1, 900), (2, 1000), (4, 3000)], (1000, 0)),
        ([(1, 5000), (2, 1000), (4, 1000)], (0, 5000)),
        ([(1, 5000), (2, 1000)], (0, 5000)),
        ([(1, 1000), (2, 2300), (4, 4000)], (979, 342)),
    ],
)
def test_no_measured_run_takes_more_than_is_booked_for_it(
    samples: list[tuple[int, int]], line: tuple[int, int]
) -> None:
    item, fixed = trial.ceiling(samples)
    assert (item, fixed) == line
    assert all(fixed + item * count >= size for count, size in samples)


def test_another_model_file_of_the_same_version_is_another_entry(bench: Workbench) -> None:
    first = bench.bundle("e", kit.conv_net(1))
    bench.compiled(first)
    second = kit.write_bundle(bench.catalog.parent / "other", "e", kit.conv_net(2))
    assert bench.store.find(second) is None
    assert sound(bench.compile(second)["e"]).model_sha256 == second.manifest.model.sha256
    assert bench.store.find(first) is not None


def test_the_cost_of_a_larger_batch_is_known(bench: Workbench) -> None:
    [compiled] = bench.compiled(bench.bundle("e", kit.conv_net(channels=32), max_batch=8))
    assert 0 < compiled.item_seconds < inf
    assert 0 <= compiled.fixed_seconds < inf


def test_golden_samples_are_compared_with_the_template(bench: Workbench, tmp_path: Path) -> None:
    pictures = kit.noise(5)
    truth = kit.run_plain(kit.save(kit.conv_net(), tmp_path / "net.onnx"), {"image": pictures})["logits"]
    good = bench.bundle("good", golden={"image": pictures, "logits": truth}, max_batch=2)
    off = bench.bundle("off", golden={"image": pictures, "logits": truth + 0.01}, tolerance=1e-3)
    tolerant = bench.bundle("tolerant", golden={"image": pictures, "logits": truth + 0.01}, tolerance=0.02)
    short = bench.bundle("short", golden={"image": pictures, "logits": truth[:3]})
    undefined = bench.bundle("undefined", golden={"image": pictures, "logits": truth * np.nan})
    inputless = bench.bundle("inputless", golden={"logits": truth})
    results = bench.compile(good, off, tolerant, short, undefined, inputless)
    assert {name for name, result in results.items() if isinstance(result, Compiled)} == {"good", "tolerant"}
    assert "off version 1: output logits is 0.01 off golden.npz, allowed is 0.001" in str(results["off"])
    assert "shape" in str(results["short"])
    assert "nan off" in str(results["undefined"])
    assert "no samples for the input image" in str(results["inputless"])
    assert all(isinstance(result, Compiled | ModelError) for result in results.values())


def test_golden_samples_are_never_unpickled(bench: Workbench) -> None:
    bundle = bench.bundle("e", golden={"image": kit.noise(1), "logits": np.zeros((1, 7), np.float32)})
    assert bundle.golden_path is not None
    np.savez(bundle.golden_path, allow_pickle=True, image=np.array([Path()], dtype=object))
    assert "cannot be read" in str(bench.failure(kit.with_digests(bundle)))


@pytest.mark.parametrize("file", ["model.onnx", "golden.npz"])
def test_flipped_bytes_are_refused_before_anything_opens_them(bench: Workbench, file: str) -> None:
    bundle = bench.bundle("e", golden={"image": kit.noise(1), "logits": np.zeros((1, 7), np.float32)})
    path = bundle.folder / file
    flip_bit(path)
    assert isinstance(bench.failure(bundle), DigestMismatch)


def test_a_missing_model_file_is_an_answer_too(bench: Workbench) -> None:
    bundle = bench.bundle("e")
    bundle.model_path.unlink()
    assert isinstance(bench.failure(bundle), CatalogError)


@pytest.mark.usefixtures("own_children")
def test_a_model_that_eats_memory_is_unsafe_and_the_others_are_compiled(bench: Workbench) -> None:
    results = bench.compile(bench.bundle("a"), bench.bundle("greedy", kit.greedy_net()), bench.bundle("z"))
    assert isinstance(results["greedy"], UnsafeModel)
    assert str(results["greedy"]).startswith("greedy version 1: it broke the memory limit")
    assert isinstance(results["a"], Compiled)
    assert isinstance(results["z"], Compiled)


@pytest.mark.usefixtures("own_children")
def test_a_model_that_never_ends_is_unsafe_and_a_new_child_goes_on(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Brief(Child):
        def ask(self, request: dict[str, Any], *, seconds: float) -> dict[str, Any]:
            return super().ask(request, seconds=3.0 if "endless" in request["model"] else seconds)

    monkeypatch.setattr("appliance.store.compile.Child", Brief)
    results = bench.compile(bench.bundle("endless", kit.endless_net()), bench.bundle("z"))
    assert isinstance(results["endless"], UnsafeModel)
    assert str(results["endless"]).startswith("endless version 1: it took longer than 3 s")
    assert isinstance(results["z"], Compiled)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"inputs": [{"name": "picture", "size": (16, 16)}]}, "inputs are image; the manifest lists picture"),
        ({"inputs": [{"name": "image", "size": (32, 32)}]}, r"shape \[0, 3, 16, 16\]"),
        ({"inputs": [{"name": "image", "size": (16, 16), "color": "grey"}]}, r"shape \[0, 3, 16, 16\]"),
        ({"head": {"kind": "classification", "output": "scores", "labels": ["a", "b"]}}, "the graph has logits"),
    ],
)
def test_a_manifest_that_does_not_fit_the_graph_is_named(
    bench: Workbench, change: dict[str, Any], complaint: str
) -> None:
    error = bench.failure(bench.bundle("e", **change))
    assert type(error) is ModelError
    with pytest.raises(ModelError, match=complaint):
        raise error


def test_a_graph_for_single_pictures_must_not_promise_more(bench: Workbench) -> None:
    error = bench.failure(bench.bundle("e", kit.conv_net(batch=1), max_batch=4))
    assert "takes single pictures" in str(error)


@pytest.mark.parametrize("content", [b"not a model", b"\x08\x08" * 400, bytes(range(256)) * 8])
def test_files_that_are_no_models_are_model_errors(bench: Workbench, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "junk.onnx"
    path.write_bytes(content)
    assert isinstance(bench.failure(bench.bundle("junk", path)), ModelError)


def test_an_unknown_operator_is_a_model_error(bench: Workbench) -> None:
    net = kit.conv_net()
    net.graph.node[1].op_type = "NoSuchOperator"
    error = bench.failure(bench.bundle("e", net))
    assert type(error) is ModelError
    assert "NoSuchOperator" in str(error)


def test_weights_in_other_files_are_refused(bench: Workbench, tmp_path: Path) -> None:
    onnx.save(kit.conv_net(), tmp_path / "net.onnx", save_as_external_data=True, size_threshold=0, location="w.bin")
    assert "keeps weights in other files" in str(bench.failure(bench.bundle("e", tmp_path / "net.onnx")))


def test_an_output_that_ignores_the_picture_is_refused(bench: Workbench) -> None:
    weights = [numpy_helper.from_array(np.ones((1, 7), np.float32), "w")]
    nodes = [helper.make_node("Add", ["w", "w"], ["logits"])]
    net = kit.model(nodes, weights, {"image": ["n", 3, kit.SIDE, kit.SIDE]}, {"logits": [1, 7]})
    assert "not computed from the picture" in str(bench.failure(bench.bundle("e", net)))


def test_branches_compile_with_their_weights_outside(bench: Workbench) -> None:
    bundle = bench.bundle("e", branching())
    [compiled] = bench.compiled(bundle)
    assert [slot.shape for slot in compiled.tensors] == [(1, 3, 1, 1)]
    for feeds in ({"image": kit.noise(2)}, {"image": -kit.noise(2)}):
        expected = kit.run_plain(bundle.model_path, feeds)["logits"]
        np.testing.assert_allclose(bench.run(compiled, feeds)["logits"], expected, atol=1e-6)


def test_two_inputs_keep_their_order_and_their_names(bench: Workbench) -> None:
    nodes = [helper.make_node("Sub", ["left side", "right/side"], ["d"]), helper.make_node("Relu", ["d"], ["logits"])]
    shape: list[str | int] = ["n", 3, kit.SIDE, kit.SIDE]
    net = kit.model(nodes, [], {"right/side": shape, "left side": shape}, {"logits": shape})
    inputs = [
        {"name": "left side", "size": (16, 16)},
        {"name": "right/side", "size": (16, 16), "source": "reference"},
    ]
    [compiled] = bench.compiled(bench.bundle("e", net, inputs=inputs))
    assert compiled.inputs == ("left side", "right/side")
    left, right = kit.noise(2, seed=1), kit.noise(2, seed=2)
    found = bench.run(compiled, {"right/side": right, "left side": left})
    np.testing.assert_array_equal(found["logits"], np.maximum(left - right, 0))


@pytest.mark.usefixtures("own_children")
def test_several_jobs_and_processes_share_one_store(bench: Workbench) -> None:
    bundles = [bench.bundle(f"e{i}", kit.fine_tune(i, width=200)) for i in range(6)]
    other = subprocess.Popen(
        [sys.executable, "-c", _COMPILE_ELSEWHERE, str(bench.store.folder.parent), str(bench.catalog)],
        env=None,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    results = bench.compile(*bundles, jobs=2)
    output, _ = other.communicate(timeout=240)
    assert other.returncode == 0
    assert json.loads(output) == {b.manifest.name: sound(results[b.manifest.name]).segments[0].id for b in bundles}
    assert len({sound(result).segments[1] for result in results.values()}) == 1
    for bundle in bundles:
        bench.store.verify(sound(results[bundle.manifest.name]))
        assert bench.store.find(bundle) is not None
    assert list(bench.store.making.iterdir()) == []


_COMPILE_ELSEWHERE = """
import json, sys
from pathlib import Path
from tests import kit_models as kit
from appliance.store.compile import Store, compile_bundles
bundles = [kit.write_bundle(Path(sys.argv[2] + "-elsewhere"), f"e{i}", kit.fine_tune(i, width=200)) for i in range(6)]
results = compile_bundles(Store(Path(sys.argv[1])), bundles, report=lambda name, result: None)
print(json.dumps({name: result.segments[0].id for name, result in results.items()}))
"""


def test_a_store_that_cannot_be_written_stops_the_compile(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    bundle = kit.write_bundle(tmp_path / "models", "e", kit.conv_net())
    with pytest.raises(StoreError, match="cannot be written"):
        compile_bundles(Store(tmp_path / "store"), [bundle], report=lambda name, result: None)


def test_fine_tunes_of_a_frozen_trunk_store_and_load_it_once(bench: Workbench) -> None:
    bundles = [bench.bundle(f"e{i}", kit.fine_tune(i, channels=64, width=300)) for i in range(1, 21)]
    compiled = bench.compiled(*bundles)
    unshared = sum(c.bytes for c in compiled)
    stored = sum(path.stat().st_size for path in (bench.store.folder / "segments").iterdir())
    assert compiled[0].segments[1].bytes / compiled[0].bytes > 0.8
    assert stored <= 0.25 * unshared
    memory = Weights(bench.store.segment_path)
    sessions = Sessions(memory, runtime.CpuPlace(), activation_bytes=64 << 20)
    for expert in compiled:
        memory.load(expert.segments)
        sessions.activate(expert)
    assert memory.mapped_bytes == stored
    for bundle in bundles:
        assert_runs_like_plain(sessions, bundle)
    sessions.drop("e1")
    memory.drop(compiled[0].segments[:1])
    for bundle in bundles[1:]:
        assert_runs_like_plain(sessions, bundle)
    bench.store.verify(compiled[-1])


def test_one_more_fine_tune_of_a_known_trunk_divides_what_is_there(bench: Workbench) -> None:
    bundles = [bench.bundle(f"e{i}", kit.fine_tune(i, width=300)) for i in (1, 2)]
    bundles.append(bench.bundle("part", kit.fine_tune(3, ["square"], width=300)))
    for bundle in bundles:
        bench.compiled(bundle)
    found = bench.compiled(*bundles)
    assert len({c.segments[-1] for c in found}) == 1
    for bundle, compiled in zip(bundles, found, strict=True):
        feeds = {"image": kit.noise(2)}
        expected = kit.run_plain(bundle.model_path, feeds)["logits"]
        np.testing.assert_allclose(bench.run(compiled, feeds)["logits"], expected, atol=1e-5)
    assert len(list((bench.store.folder / "segments").iterdir())) == 1 + 3


def test_fine_tunes_with_heads_of_another_size_share_the_trunk_too(bench: Workbench) -> None:
    bundles = [bench.bundle(f"e{n}", with_labels(kit.fine_tune(n, width=200), n)) for n in (2, 3, 9)]
    compiled = bench.compiled(*bundles)
    assert len({c.architecture for c in compiled}) == 1
    assert len({c.segments[1] for c in compiled}) == 1
    for bundle, expert in zip(bundles, compiled, strict=True):
        feeds = {"image": kit.noise(2)}
        expected = kit.run_plain(bundle.model_path, feeds)["logits"]
        np.testing.assert_allclose(bench.run(expert, feeds)["logits"], expected, atol=1e-5)


ALIKE = {
    "gemm": ["Gemm k b"],
    "gemm-t": ["Gemm kt b transB"],
    "gemm-bare": ["Gemm k"],
    "matmul": ["MatMul k", "Add b"],
    "matmul-bare": ["MatMul k"],
    "softmax": ["Gemm k b", "Softmax axis=-1"],
    "softmax-1": ["Gemm k b", "Softmax axis=1"],
    "logsoftmax": ["MatMul k", "Add b", "LogSoftmax axis=-1"],
    "sigmoid": ["Gemm k b", "Sigmoid"],
    "relu": ["Gemm k b", "Relu"],
}
"""Ways in which classifiers end, of whatever size: k is (features, n), kt (n, features), b (n), one (1)."""
APART = {
    "a bias that broadcasts": ["Gemm k one"],
    "a bias that is added to all": ["MatMul k", "Add one"],
    "softmax over the batch": ["Gemm k b", "Softmax axis=0"],
    "an operator that is not known to keep rows": ["Gemm k b", "Hardmax axis=-1"],
    "a weight that serves twice": ["MatMul k", "Add b", "Add b"],
}


@pytest.mark.parametrize("end", ALIKE)
def test_heads_of_any_size_share_one_template(bench: Workbench, end: str) -> None:
    bundles = [bench.bundle(f"e{n}", ending(ALIKE[end], n)) for n in (5, 7, 1, 2)]
    compiled = bench.compiled(*bundles)
    assert len({c.architecture for c in compiled}) == 1
    assert_all_run_like_plain(bench, bundles, compiled)


@pytest.mark.parametrize("end", APART)
def test_heads_whose_size_something_else_knows_have_templates_of_their_own(bench: Workbench, end: str) -> None:
    bundles = [bench.bundle(f"e{n}", ending(APART[end], n)) for n in (5, 7, 1)]
    compiled = bench.compiled(*bundles)
    assert len({c.architecture for c in compiled[:2]}) == 2
    assert_all_run_like_plain(bench, bundles, compiled)


def test_two_heads_of_one_trunk_are_free_each(bench: Workbench) -> None:
    bundles = [bench.bundle(f"e{i}", two_heads(*sizes)) for i, sizes in enumerate([(5, 7), (7, 5), (1, 4), (3, 3)])]
    compiled = bench.compiled(*bundles)
    assert len({c.architecture for c in compiled}) == 1
    weights = onnx.load(compiled[0].template_path).graph.input[1:]
    free = [d.dim_param for value in weights for d in value.type.tensor_type.shape.dim if d.dim_param]
    assert sorted(free) == ["h0", "h1"], "equal lengths are no promise"
    assert_all_run_like_plain(bench, bundles, compiled)


def test_a_width_that_a_later_layer_reads_is_not_free(bench: Workbench) -> None:
    bundles = [bench.bundle(f"e{width}", kit.conv_net(width=width)) for width in (8, 9)]
    assert len({c.architecture for c in bench.compiled(*bundles)}) == 2


def test_a_larger_head_than_the_measured_one_is_booked(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.store.compile.Child", InProcess)
    monkeypatch.setattr("appliance.store.trial.loss", lambda pairs: LOST)
    bundles = [bench.bundle(f"e{n}", ending(ALIKE["gemm"], n)) for n in (5, 1005)]
    small, large = bench.compiled(*bundles)
    assert small.architecture == large.architecture
    assert small.plain_path != large.plain_path
    assert large.activation_item_bytes - small.activation_item_bytes >= 2 * 4 * 1000
    assert large.private_bytes - small.private_bytes >= 4 * 1000 * 8
    feeds = {"image": kit.noise(2)}
    for bundle, expert in zip(bundles, (small, large), strict=True):
        expected = kit.run_plain(bundle.model_path, feeds)["logits"]
        np.testing.assert_allclose(bench.run(expert, feeds)["logits"], expected, atol=1e-5)


def assert_all_run_like_plain(bench: Workbench, bundles: Sequence[Bundle], compiled: Sequence[Compiled]) -> None:
    """By turns, batches of several sizes: what a session planned for one head must not hold for the next."""
    memory = Weights(bench.store.segment_path)
    sessions = Sessions(memory, runtime.CpuPlace(), activation_bytes=64 << 20)
    for expert in compiled:
        memory.load(expert.segments)
        sessions.activate(expert)
    for count in (2, 1, 4, 2):
        feeds = {"image": kit.noise(count, seed=count)}
        for bundle in bundles:
            with sessions.lease(bundle.manifest.name) as lease:
                found = lease.run(feeds)
            for name, expected in kit.run_plain(bundle.model_path, feeds).items():
                assert found[name].shape == expected.shape
                np.testing.assert_allclose(found[name], expected, atol=1e-5)


def ending(steps: Sequence[str], classes: int) -> ModelProto:
    """A trunk that is always the same, and these steps after it: an operator, its weights and its attributes."""
    net = headless(classes)
    value = "f"
    for number, step in enumerate(steps):
        kind, *words = step.split()
        attributes: dict[str, Any] = {
            name: int(value or 1) for name, _, value in (w.partition("=") for w in words if w not in SIZES)
        }
        result = "logits" if number == len(steps) - 1 else f"s{number}"
        net.graph.node.append(
            helper.make_node(kind, [value, *(w for w in words if w in SIZES)], [result], **attributes)
        )
        value = result
    used = {name for node in net.graph.node for name in node.input}
    numbers = np.random.default_rng(classes)
    for name, shape in SIZES.items():
        if name in used:
            numeric = numbers.standard_normal([classes if n == 0 else n for n in shape]).astype(np.float32)
            net.graph.initializer.append(numpy_helper.from_array(numeric, name))
    return net


SIZES = {"k": (8, 0), "kt": (0, 8), "b": (0,), "one": (1,)}
"""Shapes of an ending's weights; 0 stands for the number of classes."""


def two_heads(first: int, second: int) -> ModelProto:
    net = headless(first)
    numbers = np.random.default_rng(first)
    for name, classes in (("logits", first), ("other", second)):
        net.graph.initializer.append(
            numpy_helper.from_array(numbers.standard_normal((8, classes)).astype(np.float32), f"k-{name}")
        )
        net.graph.node.append(helper.make_node("MatMul", ["f", f"k-{name}"], [name]))
    net.graph.output.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, ["n", second]))
    return net


def headless(classes: int) -> ModelProto:
    net = kit.conv_net(0)
    kept = [tensor for tensor in net.graph.initializer if tensor.name not in ("head", "bias")]
    del net.graph.node[-1], net.graph.initializer[:]
    net.graph.initializer.extend(kept)
    net.graph.output[0].type.tensor_type.shape.dim[1].dim_value = classes
    return net


def with_labels(net: ModelProto, count: int) -> ModelProto:
    for tensor in net.graph.initializer:
        if tensor.name in ("head", "bias"):
            shape = (*tensor.dims[:-1], count)
            tensor.CopyFrom(numpy_helper.from_array(np.full(shape, 1 / count, np.float32), tensor.name))
    net.graph.output[0].type.tensor_type.shape.dim[1].dim_value = count
    return net


def assert_runs_like_plain(sessions: Sessions, bundle: Bundle) -> None:
    feeds = {"image": kit.noise(2)}
    with sessions.lease(bundle.manifest.name) as lease:
        found = lease.run(feeds)["logits"]
    np.testing.assert_allclose(found, kit.run_plain(bundle.model_path, feeds)["logits"], atol=1e-5)


def test_flipped_bits_in_segment_and_template_are_put_away_and_compiled_again(bench: Workbench) -> None:
    bundle = bench.bundle("e", kit.conv_net(width=64))
    [compiled] = bench.compiled(bundle)
    segment = bench.store.segment_path(compiled.segments[0].id)
    for path in (segment, compiled.template_path):
        flip_bit(path)
    assert bench.store.find(bundle) is None, "a template is read whole each time"
    assert [damage.experts for damage in bench.store.check()] == [("e",), ("e",)]
    [again] = bench.compiled(bundle)
    bench.store.verify(again)
    assert again.segments == compiled.segments
    assert {path.name for path in bench.store.quarantine.iterdir()} == {
        name + end for name in (segment.name, f"{compiled.architecture}.onnx") for end in ("", ".reason")
    }


def test_what_the_check_beside_a_service_finds_damaged_is_made_whole_again(
    bench: Workbench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A flipped bit each in a trunk that two share and in the graph of a third; nothing is restarted."""
    bundles = {n: bench.bundle(n, kit.fine_tune(int(n[1]), width=200)) for n in ("e1", "e2")}
    bundles |= {"plain": bench.bundle("plain", kit.int8_net(tmp_path)), "sound": bench.bundle("sound", kit.conv_net())}
    serving = dict(zip(bundles, bench.compiled(*bundles.values()), strict=True))
    trunk, plain = bench.store.segment_path(serving["e1"].segments[1].id), serving["plain"].plain_path
    assert plain is not None
    content = [path.read_bytes() for path in (trunk, plain)]
    for path in (trunk, plain):
        flip_bit(path)
    check_beside(bench.store, bundles, serving, caplog)
    assert {path.name for path in (trunk, plain)} <= {path.name for path in bench.store.quarantine.iterdir()}
    assert [path.read_bytes() for path in (trunk, plain)] == content
    assert [f"rebuilt expert={name}" in caplog.text for name in serving] == [True, True, True, False]
    assert "rebuild_" not in caplog.text
    assert {name: bench.store.find(bundle) for name, bundle in bundles.items()} == serving
    for name, compiled in serving.items():
        bench.store.verify(compiled)
        feeds = {"image": kit.noise(2)}
        expected = kit.run_plain(bundles[name].model_path, feeds)["logits"]
        np.testing.assert_allclose(bench.run(compiled, feeds)["logits"], expected, atol=1e-5)


def test_a_rebuilt_expert_that_is_another_than_the_served_one_is_an_error(
    bench: Workbench, caplog: pytest.LogCaptureFixture
) -> None:
    bundles = {"e": bench.bundle("e"), "broken": bench.bundle("broken", kit.conv_net(1))}
    e, broken = bench.compiled(*bundles.values())
    for compiled in (e, broken):
        flip_bit(bench.store.segment_path(compiled.segments[0].id))
    flip_bit(bundles["broken"].model_path)
    serving = {"e": replace(e, fixed_seconds=e.fixed_seconds + 1), "broken": broken}
    check_beside(bench.store, bundles, serving, caplog)
    assert "rebuild_differs expert=e" in caplog.text
    assert "rebuild_failed expert=broken" in caplog.text
    assert "rebuilt expert" not in caplog.text


def test_a_rebuild_removes_nothing_that_the_service_read_about(
    bench: Workbench, caplog: pytest.LogCaptureFixture
) -> None:
    bundles = {n: bench.bundle(n, kit.fine_tune(int(n[1]), width=200)) for n in ("e1", "e2")}
    serving = dict(zip(bundles, bench.compiled(*bundles.values()), strict=True))
    later = Store(bench.store.folder.parent)
    third = bench.bundle("part", kit.fine_tune(3, ["square"], width=200))
    compile_bundles(later, [third], report=lambda name, result: None)
    assert bench.store.find(bundles["e1"]) != serving["e1"]
    del later
    damaged = bench.store.find(third)
    assert damaged is not None
    flip_bit(bench.store.segment_path(damaged.segments[0].id))
    check_beside(bench.store, {**bundles, "part": third}, {**serving, "part": damaged}, caplog)
    assert "rebuilt expert=part" in caplog.text
    for compiled in serving.values():
        bench.store.verify(compiled)


def test_a_rebuild_is_ended_in_the_midst_of_a_slow_compile(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The child's work takes a minute; the next start finds nothing half-made and compiles it."""
    bundle = bench.bundle("e")
    [compiled] = bench.compiled(bundle)
    flip_bit(bench.store.segment_path(compiled.segments[0].id))
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    (tmp_path / "slow_child.py").write_text(
        "import pathlib, sys, time\n"
        f"sys.stdin.readline(); pathlib.Path({str(begun)!r}).touch(); time.sleep(60)\n"
        f"pathlib.Path({str(ended)!r}).touch()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    check = StoreCheck(bench.store, {"e": bundle}, {"e": compiled}, share=1.0)
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr("appliance.store.compile._COMPILER", "slow_child")
        check.start()
        until(begun.exists)
        check.stop()
    assert not ended.exists(), "it was not waited for"
    assert not any(record.message.startswith("rebu") for record in caplog.records)
    assert bench.compiled(bundle) == [compiled]


def test_a_rebuild_that_was_ended_before_it_began_compiles_nothing(bench: Workbench) -> None:
    bundle, interruption = bench.bundle("e"), Interruption()
    interruption.interrupt()
    with pytest.raises(Cancelled):
        compile_bundles(bench.store, [bundle], report=lambda *_: None, interruption=interruption)
    assert bench.store.find(bundle) is None


def test_a_rebuild_gives_way_to_runs_and_loads(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = bench.bundle("e")
    [compiled] = bench.compiled(bundle)
    flip_bit(bench.store.segment_path(compiled.segments[0].id))
    niceness = list[int]()

    def noted(store: Store, bundles: Sequence[Bundle], **_: object) -> dict[str, Compiled]:
        child = subprocess.run(
            [sys.executable, "-c", "import os; print(os.nice(0))"], stdout=subprocess.PIPE, check=True
        )
        niceness.append(int(child.stdout))
        return {"e": compiled}

    monkeypatch.setattr("appliance.store.storecheck.compile_bundles", noted)
    check_beside(bench.store, {"e": bundle}, {"e": compiled}, caplog)
    assert niceness[0] >= 10, "a child has the priority of the thread that starts it, whatever that of the service is"


def check_beside(
    store: Store, bundles: Mapping[str, Bundle], serving: Mapping[str, Compiled], caplog: pytest.LogCaptureFixture
) -> None:
    check = StoreCheck(store, bundles, serving, share=1.0)
    with caplog.at_level(logging.INFO):
        check.start()
        check.wait()


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_template_is_replaced_without_being_asked(bench: Workbench) -> None:
    bundles = [bench.bundle(f"e{i}", kit.conv_net(i)) for i in range(2)]
    before = bench.compiled(*bundles)
    os.truncate(before[0].template_path, 100)
    after = bench.compiled(*bundles)
    assert [c.segments for c in after] == [c.segments for c in before]
    bench.store.verify(after[1])
    assert (bench.store.quarantine / f"{before[0].architecture}.onnx").stat().st_size == 100


def test_damage_that_comes_to_light_when_sharing_is_repaired_in_the_same_run(bench: Workbench) -> None:
    first = bench.bundle("e1", kit.fine_tune(1, width=300))
    [compiled] = bench.compiled(first)
    path = bench.store.segment_path(compiled.segments[0].id)
    path.write_bytes(b"\xff" * path.stat().st_size)
    both = bench.compiled(first, bench.bundle("e2", kit.fine_tune(2, width=300)))
    for expert in both:
        bench.store.verify(expert)
    assert both[0].segments[1] == both[1].segments[1]


@pytest.mark.parametrize("seconds", [0.01, 0.1, 0.2, 0.3])
def test_a_child_killed_while_it_compiles_fails_its_expert_only(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    class Mortal(Child):
        def ask(self, request: dict[str, Any], *, seconds: float) -> dict[str, Any]:
            if "doomed" in request["model"]:
                doomed.append(self._process)
                killer.start()
            return super().ask(request, seconds=seconds)

    doomed: list[subprocess.Popen[bytes]] = []
    killer = threading.Timer(seconds, lambda: doomed[0].kill())
    bundles = [bench.bundle("a"), bench.bundle("doomed", kit.conv_net(1, width=900)), bench.bundle("z")]
    monkeypatch.setattr("appliance.store.compile.Child", Mortal)
    results = bench.compile(*bundles)
    killer.join()
    assert isinstance(results["doomed"], Compiled) or "SIGKILL" in str(results["doomed"])
    assert isinstance(results["a"], Compiled)
    monkeypatch.undo()
    for compiled in bench.compiled(*bundles):
        bench.store.verify(compiled)
    assert list(bench.store.making.iterdir()) == []


@pytest.mark.parametrize("told", [1, 3])
def test_a_compile_that_is_killed_is_resumed(bench: Workbench, told: int) -> None:
    """Killed when so many experts were reported."""
    bundles = [bench.bundle(f"e{i}", kit.fine_tune(i, width=200)) for i in range(6)]
    process = subprocess.Popen(
        [sys.executable, "-c", _COMPILE_UNTIL_KILLED, str(bench.store.folder.parent), str(bench.catalog), str(told)],
        cwd=Path(__file__).parent.parent,
    )
    assert process.wait(timeout=240) == -signal.SIGKILL
    assert sum(bench.store.find(bundle) is not None for bundle in bundles) == told
    assert bench.store.check() == []
    found = bench.compiled(*bundles)
    assert len({compiled.segments[-1] for compiled in found}) == 1
    for compiled in found:
        bench.store.verify(compiled)


_COMPILE_UNTIL_KILLED = """
import os, signal, sys
from pathlib import Path
from tests import kit_models as kit
from appliance.store.compile import Report, compile_bundles
from appliance.store.store import Store
catalog, last = Path(sys.argv[2] + "-again"), int(sys.argv[3])
bundles = [kit.write_bundle(catalog, f"e{i}", kit.fine_tune(i, width=200)) for i in range(6)]
told = []
def report(name, result):
    told.append(name)
    if len(told) == last:
        os.kill(os.getpid(), signal.SIGKILL)
compile_bundles(Store(Path(sys.argv[1])), bundles, report=report)
"""


@pytest.mark.usefixtures("own_children")
@pytest.mark.parametrize("limit", [100_000, 390_000])
def test_a_disk_that_refuses_in_the_midst_is_a_store_error(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Every file of the child ends at so many bytes, as on a full disk."""

    def limited(pid: int, memory_bytes: int) -> None:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, limit))

    monkeypatch.setattr("appliance.sandbox._limit", limited)
    bundle = bench.bundle("e", kit.conv_net(channels=16, width=300))
    assert bundle.manifest.model.bytes > 390_000
    with pytest.raises(StoreError, match="cannot be written"):
        bench.compile(bundle)
    assert_nothing_half_written(bench.store)


@pytest.mark.parametrize("kilobytes", [700, 900, 1200, 1500, 1700, 2000, 2400])
def test_a_full_disk_stops_the_compile_and_more_room_lets_it_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kilobytes: int
) -> None:
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", place], check=False).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        bench = Workbench(tmp_path / "models", Store(place))
        bundles = [bench.bundle(f"e{i}", kit.fine_tune(i, channels=16, width=300)) for i in range(4)]
        with pytest.raises(StoreError, match="bytes left, compiling needs"):
            bench.compile(*bundles)
        assert_nothing_half_written(bench.store)
        monkeypatch.setattr("appliance.store.compile._FILES_PER_MODEL", 0)
        with suppress(StoreError):  # never an expert that is said to be bad
            assert all(isinstance(result, Compiled) for result in bench.compile(*bundles).values())
        assert_nothing_half_written(bench.store)
        monkeypatch.undo()
        subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
        for compiled in bench.compiled(*bundles):
            bench.store.verify(compiled)
    finally:
        subprocess.run(["umount", "--lazy", place], check=False)


def assert_nothing_half_written(store: Store) -> None:
    assert store.check() == []
    for path in (store.folder / "segments").glob("*"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    assert list(store.making.iterdir()) == []


def test_every_result_is_reported_once(bench: Workbench) -> None:
    bundles = [bench.bundle("a"), bench.bundle("b", kit.greedy_net())]
    told: list[tuple[str, bool]] = []
    for _ in range(2):
        compile_bundles(bench.store, bundles, report=lambda name, r: told.append((name, isinstance(r, Compiled))))
    assert told == [("a", True), ("b", False)] * 2


def weight_bytes(compiled: Compiled) -> int:
    return sum(int(np.prod(slot.shape)) * np.dtype(slot.dtype).itemsize for slot in compiled.tensors)


def left_inside(compiled: Compiled) -> int:
    """Bytes of floating-point numbers in a template."""
    tensors = [numpy_helper.to_array(t) for t in onnx.load(compiled.template_path).graph.initializer]
    return sum(tensor.nbytes for tensor in tensors if tensor.dtype.kind == "f")


def constants(path: Path) -> list[NDArray[Any]]:
    """Every larger floating-point constant of a portable model, wherever it keeps them."""
    graph = onnx.load(path).graph
    tensors = [*graph.initializer]
    tensors += [a.t for node in graph.node if node.op_type == "Constant" for a in node.attribute if a.name == "value"]
    arrays = [numpy_helper.to_array(tensor) for tensor in tensors]
    return [array for array in arrays if array.dtype.kind == "f" and array.size > 64]


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def shuffled(net: ModelProto) -> ModelProto:
    """The same graph with its weights listed backwards, notes everywhere and a producer."""
    weights = list(net.graph.initializer)[::-1]
    del net.graph.initializer[:]
    net.graph.initializer.extend(weights)
    net.producer_name, net.doc_string, net.graph.name = "another", "made elsewhere", "main_graph"
    for node in net.graph.node:
        node.doc_string = "line 7"
    return net


def weights_as_inputs(net: ModelProto) -> ModelProto:
    net.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in net.graph.initializer)
    return net


def weights_as_constants(net: ModelProto) -> ModelProto:
    constants = [helper.make_node("Constant", [], [t.name], value=t) for t in net.graph.initializer]
    nodes = [*constants, *net.graph.node]
    del net.graph.initializer[:], net.graph.node[:]
    net.graph.node.extend(nodes)
    return net


def clipped(net: ModelProto, limit: float) -> ModelProto:
    net.graph.node[-1].output[0] = "unlimited"
    net.graph.initializer.append(numpy_helper.from_array(np.array(-limit, np.float32), "low"))
    net.graph.initializer.append(numpy_helper.from_array(np.array(limit, np.float32), "high"))
    net.graph.node.append(helper.make_node("Clip", ["unlimited", "low", "high"], ["logits"]))
    return net


def branching() -> ModelProto:
    """Multiplies or adds its weights, depending on the sign of the picture's sum."""

    def branch(operator: str, name: str) -> onnx.GraphProto:
        result = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(operator, ["image", "w"], [name])], name, [], [result])

    weights = [
        numpy_helper.from_array(np.array([0.5, 2, -1], np.float32).reshape(1, 3, 1, 1), "w"),
        numpy_helper.from_array(np.array(0, np.float32), "zero"),
    ]
    nodes = [
        helper.make_node("ReduceSum", ["image"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["is_bright"]),
        helper.make_node(
            "If", ["is_bright"], ["logits"], then_branch=branch("Mul", "m"), else_branch=branch("Add", "a")
        ),
    ]
    shape: list[str | int] = ["n", 3, kit.SIDE, kit.SIDE]
    return kit.model(nodes, weights, {"image": shape}, {"logits": shape})
