"""Small real networks, hostile ones, and bundles of them, made with `onnx.helper` and random weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static

from appliance.catalog import Bundle, ExpertManifest

SIDE = 16
LABELS = ("sound", "missing", "turned", "bridged", "lifted", "cracked", "foreign")
FROZEN = ("k1", "b1", "k2", "b2", "square")
"""A trunk: most of the bytes of a wide `conv_net`."""


def conv_net(
    seed: int = 0, channels: int = 8, *, batch: str | int = "n", width: int = 0, prefix: str = ""
) -> ModelProto:
    """Picture `image` (n, 3, 16, 16) to `logits` (n, 7). `width` adds a dense layer of so many numbers squared.

    `prefix` renames everything inside: the same architecture from another exporter.
    """
    numbers = np.random.default_rng(seed)

    def tensor(name: str, *shape: int) -> TensorProto:
        values = numbers.standard_normal(shape, np.float32) / np.sqrt(np.prod(shape[1:]) or 1)
        return numpy_helper.from_array(values.astype(np.float32), prefix + name)

    hidden = width or channels
    weights = [
        tensor("k1", channels, 3, 3, 3),
        tensor("b1", channels),
        tensor("k2", channels, channels, 3, 3),
        tensor("b2", channels),
        *([tensor("dense", channels, width), tensor("square", width, width)] if width else []),
        tensor("head", hidden, len(LABELS)),
        tensor("bias", len(LABELS)),
    ]
    p = prefix
    nodes = [
        helper.make_node("Conv", ["image", p + "k1", p + "b1"], [p + "a"], p + "conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", [p + "a"], [p + "r"], p + "relu1"),
        helper.make_node("Conv", [p + "r", p + "k2", p + "b2"], [p + "c"], p + "conv2", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", [p + "c"], [p + "s"], p + "relu2"),
        helper.make_node("GlobalAveragePool", [p + "s"], [p + "g"], p + "pool"),
        helper.make_node("Flatten", [p + "g"], [p + "f"], p + "flat"),
        *(
            [
                helper.make_node("MatMul", [p + "f", p + "dense"], [p + "d"], p + "dense1"),
                helper.make_node("MatMul", [p + "d", p + "square"], [p + "h"], p + "dense2"),
            ]
            if width
            else []
        ),
        helper.make_node("Gemm", [p + ("h" if width else "f"), p + "head", p + "bias"], ["logits"], p + "gemm"),
    ]
    return model(nodes, weights, {"image": [batch, 3, SIDE, SIDE]}, {"logits": [batch, len(LABELS)]})


def deep_net(seed: int = 0, *, channels: int = 160, layers: int = 12, side: int = SIDE) -> ModelProto:
    """A trunk of `layers` convolutions that all seeds share, and a head of its own; picture to `logits` (n, 7)."""
    numbers = np.random.default_rng(0)
    weights: list[TensorProto] = []

    def tensor(name: str, *shape: int) -> str:
        values = numbers.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]) if len(shape) > 1 else 1e-4)
        weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    nodes, source, inputs = list[NodeProto](), "image", 3
    for number in range(layers):
        kernels = tensor(f"k{number}", channels, inputs, 3, 3)
        around: dict[str, Any] = {"pads": [1, 1, 1, 1]}
        nodes.append(
            helper.make_node("Conv", [source, kernels, tensor(f"b{number}", channels)], [f"c{number}"], **around)
        )
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"]))
        source, inputs = f"r{number}", channels
    numbers = np.random.default_rng(seed)
    nodes += [
        helper.make_node("GlobalAveragePool", [source], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", tensor("head", channels, len(LABELS)), tensor("bias", len(LABELS))], ["logits"]),
    ]
    return model(nodes, weights, {"image": ["n", 3, side, side]}, {"logits": ["n", len(LABELS)]})


def int8_net(folder: Path, seed: int = 0, net: ModelProto | None = None) -> Path:
    """A file with a network, or a `deep_net` of 2.5 MB, whose convolutions are quantized as ONNX Runtime's tool does it
    (QDQ)."""

    class Samples(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rest = iter([{"image": noise(2, seed=n)} for n in range(4)])

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            return next(self._rest, None)

    source = save(net or deep_net(seed), folder / f"float-{seed}.onnx")
    target = folder / f"int8-{seed}.onnx"
    quantize_static(source, target, Samples(), op_types_to_quantize=["Conv"], per_channel=True)
    return target


def attention_net(seed: int = 0, *, width: int = 256, blocks: int = 3) -> ModelProto:
    """A transformer's blocks of one head each, 10 MB, nearly all of it in MatMul; picture to `logits` (n, 7)."""
    numbers = np.random.default_rng(seed)
    nodes, weights = list[NodeProto](), list[TensorProto]()
    patch, tokens = 4, (SIDE // 4) ** 2

    def tensor(*shape: int) -> str:
        values = (numbers.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"w{len(weights)}"))
        return weights[-1].name

    def node(kind: str, *sources: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, list(sources), [f"v{len(nodes)}"], **attributes))
        return str(nodes[-1].output[0])

    def dense(source: str, inputs: int, outputs: int) -> str:
        return node("Add", node("MatMul", source, tensor(inputs, outputs)), tensor(outputs))

    weights.append(numpy_helper.from_array(np.array([0, width, tokens], np.int64), "shape"))
    patches = node("Conv", "image", tensor(width, 3, patch, patch), kernel_shape=[patch, patch], strides=[patch, patch])
    x = node("Transpose", node("Reshape", patches, "shape"), perm=[0, 2, 1])
    for _ in range(blocks):
        queries, keys, values = (dense(x, width, width) for _ in range(3))
        looked = node("Softmax", node("MatMul", queries, node("Transpose", keys, perm=[0, 2, 1])), axis=-1)
        x = node("Add", x, node("MatMul", looked, values))
        x = node("Add", x, dense(node("Relu", dense(x, width, 4 * width)), 4 * width, width))
    pooled = node("ReduceMean", x, axes=[1], keepdims=0)
    nodes.append(helper.make_node("Gemm", [pooled, tensor(width, len(LABELS)), tensor(len(LABELS))], ["logits"]))
    return model(nodes, weights, {"image": ["n", 3, SIDE, SIDE]}, {"logits": ["n", len(LABELS)]})


def fine_tune(seed: int, frozen: Sequence[str] = FROZEN, *, channels: int = 8, width: int) -> ModelProto:
    """A `conv_net` in which these tensors are those of seed 0, as after training the rest of it."""
    trunk = {tensor.name: tensor for tensor in conv_net(0, channels, width=width).graph.initializer}
    net = conv_net(seed, channels, width=width)
    for tensor in net.graph.initializer:
        if tensor.name in frozen:
            tensor.CopyFrom(trunk[tensor.name])
    return net


def model(
    nodes: Sequence[NodeProto],
    weights: Sequence[TensorProto],
    inputs: Mapping[str, Sequence[str | int]],
    outputs: Mapping[str, Sequence[str | int]],
) -> ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "net",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        list(weights),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def greedy_net() -> ModelProto:
    """One operator that asks for a terabyte."""
    shape = numpy_helper.from_array(np.array([1 << 19, 1 << 19], np.int64), "shape")
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["huge"]),
        helper.make_node("ReduceMax", ["huge"], ["most"], keepdims=0),
        helper.make_node("Add", ["image", "most"], ["logits"]),
    ]
    return model(nodes, [shape], {"image": ["n", 3, SIDE, SIDE]}, {"logits": ["n", 3, SIDE, SIDE]})


def endless_net() -> ModelProto:
    """A loop that never ends."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["carried", "carried"], ["more"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("more", TensorProto.FLOAT, None),
        ],
    )
    forever = numpy_helper.from_array(np.array(True), "forever")
    nodes = [helper.make_node("Loop", ["", "forever", "image"], ["logits"], body=body)]
    return model(nodes, [forever], {"image": ["n", 3, SIDE, SIDE]}, {"logits": ["n", 3, SIDE, SIDE]})


def plain_session(path: Path) -> Any:
    """ONNX Runtime as everybody uses it: the answer to compare with."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_plain(path: Path, feeds: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[Any]]:
    session = plain_session(path)
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, dict(feeds)), strict=True))


def noise(count: int, *shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Prepared pictures (count, *shape); 3 x 16 x 16 unless told."""
    return np.random.default_rng(seed).random((count, *(shape or (3, SIDE, SIDE))), np.float32)


def write_bundle(
    catalog: Path,
    name: str,
    net: ModelProto | Path,
    *,
    version: int = 1,
    inputs: Sequence[Mapping[str, Any]] = ({"name": "image", "size": (SIDE, SIDE)},),
    head: Mapping[str, Any] | None = None,
    max_batch: int = 4,
    golden: Mapping[str, NDArray[Any]] | None = None,
    tolerance: float = 1e-4,
) -> Bundle:
    """A bundle on disk as `export` would leave it, its manifest only in memory."""
    folder = catalog / name / str(version)
    folder.mkdir(parents=True)
    content = net.read_bytes() if isinstance(net, Path) else net.SerializeToString()
    (folder / "model.onnx").write_bytes(content)
    manifest: dict[str, Any] = {
        "schema": 1,
        "name": name,
        "version": version,
        "model": {
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
            "opset": 17,
            "ir_version": 8,
            "max_batch": max_batch,
        },
        "inputs": [dict(spec) for spec in inputs],
        "head": dict(head or {"kind": "classification", "output": "logits", "labels": LABELS, "normal": "sound"}),
    }
    if golden is not None:
        np.savez(folder / "golden.npz", allow_pickle=False, **golden)
        digest = hashlib.sha256((folder / "golden.npz").read_bytes()).hexdigest()
        manifest["golden"] = {"sha256": digest, "tolerance": tolerance}
    return Bundle(folder, ExpertManifest.model_validate(manifest))


def with_digests(bundle: Bundle) -> Bundle:
    """The bundle after somebody who can also write manifests changed its files."""
    manifest = bundle.manifest.model_dump(by_alias=True)
    for key, path in (("model", bundle.model_path), ("golden", bundle.golden_path)):
        if path is not None:
            manifest[key]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return Bundle(bundle.folder, ExpertManifest.model_validate(manifest))


def save(net: ModelProto, path: Path) -> Path:
    onnx.save(net, path)
    return path
