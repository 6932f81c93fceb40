"""Networks of real shapes with random weights, made with `onnx.helper`, to measure on: nothing to download or train.

They have the layers, sizes and numbers of weights of the networks that they are named after, batch normalisation
folded into the convolutions as exporters leave it. What they answer means nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from appliance.catalog import Bundle, ClassificationHead, ExpertManifest, InputSpec, ModelFile

LABELS = ("sound", "missing", "turned", "bridged", "lifted", "cracked", "foreign")
_OPSET, _IR_VERSION = 17, 8
_RESIDUAL = 0.2
"""Scale of the last convolution of a residual block: without normalisation the sums would grow from block to block."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A network to measure on. `build` gives it the weights that belong to a seed."""

    name: str
    like: str
    side: int
    build: Callable[[int], ModelProto]


@dataclass(slots=True)
class _Net:
    """A graph in the making: layers are appended, each returns the name of its result."""

    numbers: np.random.Generator
    nodes: list[NodeProto] = field(default_factory=list)
    weights: list[TensorProto] = field(default_factory=list)

    def conv(
        self, source: str, inputs: int, outputs: int, kernel: int, *, stride: int = 1, group: int = 1, scale: float = 1
    ) -> str:
        spread = scale * np.sqrt(2.0 / (inputs // group * kernel * kernel))
        kernels = self._tensor(spread, outputs, inputs // group, kernel, kernel)
        around = [kernel // 2] * 4
        return self.node(
            "Conv", source, kernels, self._tensor(0.01, outputs), pads=around, strides=[stride, stride], group=group
        )

    def dense(self, source: str, inputs: int, outputs: int) -> str:
        spread = np.sqrt(1.0 / inputs)
        return self.node("Gemm", source, self._tensor(spread, inputs, outputs), self._tensor(0.01, outputs))

    def node(self, kind: str, *sources: str, **attributes: Any) -> str:
        result = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(sources), [result], result, **attributes))
        return result

    def scalar(self, value: float) -> str:
        return self._keep(np.array(value, np.float32))

    def model(self, side: int, pooled: str, width: int, classes: int) -> ModelProto:
        """The whole network, after global pooling of `pooled` into a dense layer of so many classes."""
        flat = self.node("Flatten", self.node("GlobalAveragePool", pooled))
        self.dense(flat, width, classes)
        self.nodes[-1].output[0] = "logits"
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, side, side])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", classes])],
            self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)

    def _tensor(self, spread: float, *shape: int) -> str:
        return self._keep(self.numbers.standard_normal(shape, np.float32) * np.float32(spread))

    def _keep(self, values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(values, name))
        return name


def mobilenet_v2(seed: int) -> ModelProto:
    """MobileNetV2 for ImageNet: 17 inverted residuals, 3.5 million weights."""
    net = _Net(np.random.default_rng(seed))
    low, high = net.scalar(0), net.scalar(6)

    def relu6(source: str) -> str:
        return net.node("Clip", source, low, high)

    x, width = relu6(net.conv("image", 3, 32, 3, stride=2)), 32
    plan = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expansion, outputs, count, first_stride in plan:
        for number in range(count):
            stride = first_stride if number == 0 else 1
            inner = width * expansion
            y = relu6(net.conv(x, width, inner, 1)) if expansion > 1 else x
            y = relu6(net.conv(y, inner, inner, 3, stride=stride, group=inner))
            adds = stride == 1 and width == outputs
            y = net.conv(y, inner, outputs, 1, scale=_RESIDUAL if adds else 1)
            x, width = net.node("Add", x, y) if adds else y, outputs
    return net.model(224, relu6(net.conv(x, width, 1280, 1)), 1280, 1000)


def resnet_18(seed: int) -> ModelProto:
    """ResNet-18 for ImageNet: 8 basic blocks, 11.7 million weights."""
    net = _Net(np.random.default_rng(seed))
    x, width = _stem(net), 64
    for stage, outputs in enumerate((64, 128, 256, 512)):
        for number in range(2):
            stride = 2 if stage > 0 and number == 0 else 1
            y = net.node("Relu", net.conv(x, width, outputs, 3, stride=stride))
            y = net.conv(y, outputs, outputs, 3, scale=_RESIDUAL)
            x, width = net.node("Relu", net.node("Add", y, _shortcut(net, x, width, outputs, stride))), outputs
    return net.model(224, x, 512, 1000)


def resnet_101(seed: int) -> ModelProto:
    """ResNet-101 for ImageNet: 33 bottleneck blocks, 44.5 million weights."""
    net = _Net(np.random.default_rng(seed))
    x, width = _stem(net), 64
    for stage, (inner, count) in enumerate(((64, 3), (128, 4), (256, 23), (512, 3))):
        for number in range(count):
            stride = 2 if stage > 0 and number == 0 else 1
            y = net.node("Relu", net.conv(x, width, inner, 1))
            y = net.node("Relu", net.conv(y, inner, inner, 3, stride=stride))
            y = net.conv(y, inner, inner * 4, 1, scale=_RESIDUAL)
            x, width = net.node("Relu", net.node("Add", y, _shortcut(net, x, width, inner * 4, stride))), inner * 4
    return net.model(224, x, 2048, 1000)


def small_net(channels: int, layers: int = 3) -> Callable[[int], ModelProto]:
    """Networks of so many convolutions for pictures of 32 x 32; three of 128 channels make 1.2 MB."""

    def build(seed: int) -> ModelProto:
        net = _Net(np.random.default_rng(seed))
        x = net.node("Relu", net.conv("image", 3, channels, 3, stride=2))
        x = net.node("Relu", net.conv(x, channels, channels, 3, stride=2))
        for _ in range(layers - 2):
            x = net.node("Relu", net.conv(x, channels, channels, 3))
        return net.model(32, x, channels, len(LABELS))

    return build


def pooled(seed: int) -> ModelProto:
    """One dense layer behind the mean of 8 x 8 pixels: as little as an expert can do."""
    return _Net(np.random.default_rng(seed)).model(8, "image", 3, len(LABELS))


def _stem(net: _Net) -> str:
    x = net.node("Relu", net.conv("image", 3, 64, 7, stride=2))
    return net.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])


def _shortcut(net: _Net, source: str, inputs: int, outputs: int, stride: int) -> str:
    return source if inputs == outputs and stride == 1 else net.conv(source, inputs, outputs, 1, stride=stride)


SHAPES: Mapping[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("14MB", "MobileNetV2", 224, mobilenet_v2),
        Shape("45MB", "ResNet-18", 224, resnet_18),
        Shape("170MB", "ResNet-101", 224, resnet_101),
    )
}
"""What `appliance bench switch` measures, by the name of its size."""


def write_expert(folder: Path, name: str, net: ModelProto, *, side: int, max_batch: int = 1) -> Bundle:
    """A bundle on disk with a network that takes up to `max_batch` pictures of `side` x `side` at once."""
    home = folder / name / "1"
    home.mkdir(parents=True)
    content = net.SerializeToString()
    (home / "model.onnx").write_bytes(content)
    classes = net.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    labels = LABELS if classes == len(LABELS) else tuple(f"class-{number}" for number in range(classes))
    digest = hashlib.sha256(content).hexdigest()
    manifest = ExpertManifest(
        schema=1,
        name=name,
        version=1,
        model=ModelFile(sha256=digest, bytes=len(content), opset=_OPSET, ir_version=_IR_VERSION, max_batch=max_batch),
        inputs=(InputSpec(name="image", size=(side, side)),),
        head=ClassificationHead(kind="classification", output="logits", labels=labels),
    )
    return Bundle(home, manifest)


def write_manifest(bundle: Bundle) -> None:
    """expert.toml beside the model, as `appliance export` would write it, for who reads a catalogue from disk."""
    (bundle.folder / "expert.toml").write_text(manifest_text(bundle), "utf-8")


def manifest_text(bundle: Bundle) -> str:
    """JSON values are TOML values here. Without variants: those are made from what lies on the disk."""
    text = bundle.manifest.model_dump_json(by_alias=True, exclude_none=True, exclude={"variants"})
    plain: dict[str, Any] = json.loads(text)
    tables = [(f"[{key}]", value) for key, value in plain.items() if isinstance(value, dict)]
    tables += [("[[inputs]]", value) for value in plain["inputs"]]
    lines = [f"{k} = {json.dumps(v)}" for k, v in plain.items() if k != "inputs" and not isinstance(v, dict)]
    for title, values in tables:
        lines += [title, *(f"{k} = {json.dumps(v)}" for k, v in values.items())]
    return "\n".join(lines)
