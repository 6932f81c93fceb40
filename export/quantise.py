"""The child process that quantises: `python -m export.quantise`, one request on stdin, the reply on stdout.

ONNX Runtime's own tool does the work. It opens files that may be anybody's, and may crash, hang or eat its memory; the
parent sets the limits and judges what comes out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from appliance.errors import ModelError
from appliance.sandbox import serve
from export import proof
from export.examine import check_structure, read
from export.text import first_line

Feed = NDArray[np.float32]

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""What holds nearly all weights, and takes nearly all time."""

CHANNELS_OPSET = 13
"""The first whose DequantizeLinear has an axis."""
_BATCH_ERROR = 1e-4
"""Of a batch beside its pictures alone, relative to the largest output: rounding, and no more."""


def quantise(request: dict[str, Any]) -> dict[str, Any]:
    """Write `int8.onnx`, and what it and `model` answer to each picture that does not calibrate, into the folder.

    The request names the `folder` with `<n>.npy` for the n-th of `inputs` (pictures, C, H, W), the `model`, `outputs`,
    how many pictures `calibrate` (the first ones), `max_batch`, and the `scope`: `all` operators that can be, or only
    inner `layers`, which costs a little speed and keeps what is made of their results exact.
    """
    folder, source = Path(request["folder"]), Path(request["model"])
    feeds = {name: np.load(folder / f"{n}.npy", mmap_mode="r") for n, name in enumerate(request["inputs"])}
    check_structure(read(source))
    target = folder / "int8.onnx"
    try:
        # Symbolic shapes would need sympy, and change nothing for networks whose only free size is the batch.
        quant_pre_process(modern(source, folder), folder / "plain.onnx", skip_symbolic_shape=True)
        _quantise(folder / "plain.onnx", target, _Pictures(feeds, request["calibrate"]), request["scope"])
    except Exception as error:  # the tool raises many kinds
        raise ModelError(f"it cannot be quantised: {first_line(error)}") from error
    judged = {name: feed[request["calibrate"] :] for name, feed in feeds.items()}
    for name, path in (("full", source), ("int8", target)):
        session = proof.open_session(path, name)
        outputs = _answers(session, request["outputs"], judged)
        if name == "int8":
            _check_batch(session, request, judged, outputs)
        np.savez(folder / f"{name}.npz", allow_pickle=False, **outputs)
    made = onnx.load(target)
    return {"opset": _opset(made), "ir_version": made.ir_version}


def _opset(model: onnx.ModelProto) -> int:
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)


def modern(source: Path, folder: Path) -> Path:
    """The file, or one of the same network with an opset in which channels may have scales of their own."""
    model = read(source)
    if _opset(model) >= CHANNELS_OPSET:
        return source
    onnx.save(onnx.version_converter.convert_version(model, CHANNELS_OPSET), folder / "modern.onnx")
    return folder / "modern.onnx"


class _Pictures(CalibrationDataReader):  # type: ignore[misc]
    """The first so many, one at a time."""

    def __init__(self, feeds: Mapping[str, Feed], count: int) -> None:
        self._feeds, self._rows = feeds, iter(range(count))

    def get_next(self) -> dict[str, Feed] | None:
        row = next(self._rows, None)
        return None if row is None else {name: np.array(feed[[row]]) for name, feed in self._feeds.items()}


def _quantise(source: Path, target: Path, pictures: _Pictures, scope: str) -> None:
    model = named(onnx.load(source))
    only = {"op_types_to_quantize": list(LAYERS), "nodes_to_exclude": last_layers(model)}
    quantize_static(
        model,
        target,
        pictures,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        **(only if scope == "layers" else {}),
    )


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, in which every node has a name of its own: the tool goes by it."""
    for number, node in enumerate(model.graph.node):
        node.name = f"{number}:{node.name}"
    return model


def last_layers(model: onnx.ModelProto) -> list[str]:
    """The layers whose results reach an output by way of no other layer."""
    makers = {output: node for node in model.graph.node for output in node.output}
    found, waiting, seen = list[str](), [output.name for output in model.graph.output], set[str]()
    while waiting:
        node = makers.get(name := waiting.pop())
        if node is None or name in seen:
            continue
        seen.add(name)
        if node.op_type in LAYERS:
            found.append(node.name)
        else:
            waiting += node.input
    return sorted(set(found))


def _answers(session: Any, names: Sequence[str], feeds: Mapping[str, Feed]) -> dict[str, Feed]:
    """Picture by picture, as one that has a fixed batch wants it."""
    count = len(next(iter(feeds.values())))
    rows = [_run(session, names, {name: feed[[row]] for name, feed in feeds.items()}) for row in range(count)]
    return {name: np.concatenate([row[number] for row in rows]) for number, name in enumerate(names)}


def _run(session: Any, names: Sequence[str], feeds: Mapping[str, Feed]) -> list[Feed]:
    try:
        outputs = session.run(list(names), {name: np.ascontiguousarray(feed) for name, feed in feeds.items()})
    except Exception as error:  # ONNX Runtime's exceptions share no family below Exception
        raise ModelError(f"it does not run: {first_line(error)}") from error
    return [np.asarray(output, np.float32) for output in outputs]


def _check_batch(
    session: Any, request: Mapping[str, Any], feeds: Mapping[str, Feed], alone: Mapping[str, Feed]
) -> None:
    """The largest batch gives what its pictures give alone. Raises ModelError."""
    size = request["max_batch"]
    found = _run(
        session, request["outputs"], {n: np.take(f, range(size), axis=0, mode="wrap") for n, f in feeds.items()}
    )
    for name, output in zip(request["outputs"], found, strict=True):
        wanted = np.take(alone[name], range(size), axis=0, mode="wrap")
        scale = max(1.0, float(np.abs(wanted).max(initial=0.0)))
        if output.shape != wanted.shape or not np.abs(output - wanted).max(initial=0.0) <= _BATCH_ERROR * scale:
            raise ModelError(f"output {name!r} of a batch of {size} differs from that of single pictures")


if __name__ == "__main__":
    serve(quantise)
