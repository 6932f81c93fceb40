"""The child that opens a foreign ONNX file: `python -m export.examine`, one JSON request on stdin, one reply on stdout.

It may crash, hang or eat its memory; its parent sets the limits and reads the cause of death.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from appliance.errors import ModelError
from appliance.sandbox import serve
from export.text import first_line

Feeds = dict[str, NDArray[np.float32]]

OLDEST_OPSET = 7
BUILT_IN_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}
"""Operators that ONNX Runtime brings along. Anything else would need a library from the bundle."""


def examine(request: dict[str, Any]) -> dict[str, Any]:
    """Check the file's structure, then run it at batches of 1, 2 and the largest asked for."""
    folder = Path(request["folder"])
    model = read(folder / "model.onnx")
    check_structure(model)
    session = _open(folder / "model.onnx")
    _check_signature(session, request["inputs"], request["outputs"])
    with np.load(folder / "samples.npz", allow_pickle=False) as stored:
        samples: Feeds = {name: stored[name] for name in request["inputs"]}
    outputs = _run_singly(session, request["outputs"], samples)
    max_batch = _largest_batch(session, samples, outputs, request)
    np.savez(folder / "outputs.npz", allow_pickle=False, **outputs)
    return {
        "opset": _opset(model),
        "ir_version": model.ir_version,
        "max_batch": max_batch,
        "producer": f"{model.producer_name} {model.producer_version}".strip()[:100] or "unknown producer",
    }


def read(path: Path) -> onnx.ModelProto:
    """Without external data: nothing that the file names is opened."""
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError has no public base
        raise ModelError(f"it is not an ONNX file: {first_line(error)}") from error


def check_structure(model: onnx.ModelProto) -> None:
    """Raises ModelError for external data, foreign operators, and versions that this runtime does not know."""
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            where = {item.key: item.value for item in tensor.external_data}.get("location", "?")
            raise ModelError(
                f"tensor {tensor.name!r} keeps its data in {where!r}",
                "save the model as one file: onnx.save(model, path, save_as_external_data=False)",
            )
    local = {function.domain for function in model.functions}
    for domain in sorted({entry.domain for entry in model.opset_import} | {node.domain for node in _nodes(model)}):
        if domain not in BUILT_IN_DOMAINS | local:
            raise ModelError(f"it needs operators of {domain!r}", "custom operator libraries are not loaded")
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= _opset(model) <= newest:
        raise ModelError(f"it has opset {_opset(model)}, {OLDEST_OPSET} to {newest} are accepted", "convert it")
    if not 3 <= model.ir_version <= onnx.IR_VERSION:
        raise ModelError(f"it has IR version {model.ir_version}, 3 to {onnx.IR_VERSION} are accepted", "convert it")
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # ValidationError, and what its C++ lets through
        raise ModelError(f"the ONNX checker refuses it: {first_line(error)}") from error


def _open(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no family below Exception
        raise ModelError(f"ONNX Runtime {onnxruntime.__version__} refuses it: {first_line(error)}") from error


def _check_signature(
    session: onnxruntime.InferenceSession, inputs: dict[str, list[int]], outputs: Sequence[str]
) -> None:
    """The session's inputs, not the file's: old files list every weight as an input too."""
    found = {node.name: node for node in session.get_inputs()}
    if found.keys() != inputs.keys():
        raise ModelError(f"its inputs are {_listed(found)}, the manifest names {_listed(inputs)}", "correct [[inputs]]")
    for name, shape in inputs.items():
        _check_input(name, found[name].type, found[name].shape, shape)
    for name in outputs:
        if name not in (there := [node.name for node in session.get_outputs()]):
            raise ModelError(f"it has no output {name!r}, but {_listed(there)}", "correct [head]")


def _check_input(name: str, kind: str, found: Sequence[int | str | None], wanted: Sequence[int]) -> None:
    if kind != "tensor(float)":
        raise ModelError(f"input {name!r} is a {kind}, only float32 is fed")
    fits = len(found) == 4 and all(
        not isinstance(size, int) or size == want for size, want in zip(found[1:], wanted, strict=True)
    )
    if not fits:
        raise ModelError(f"input {name!r} has shape {list(found)}, the manifest gives N, C, H, W = N, {wanted}")


def _run_singly(session: onnxruntime.InferenceSession, names: Sequence[str], samples: Feeds) -> Feeds:
    count = len(next(iter(samples.values())))
    rows = [_run(session, names, {name: array[[row]] for name, array in samples.items()}) for row in range(count)]
    for name, output in rows[0].items():
        if output.ndim < 2 or output.shape[0] != 1:
            raise ModelError(f"output {name!r} has shape {list(output.shape)} for one picture, it must start with 1")
    try:
        return {name: np.concatenate([row[name] for row in rows]) for name in names}
    except ValueError as error:
        raise ModelError(f"its outputs change shape from picture to picture: {error}") from error


def _run(session: onnxruntime.InferenceSession, names: Sequence[str], feeds: Feeds) -> Feeds:
    try:
        outputs = session.run(list(names), feeds)
    except Exception as error:  # as above
        raise ModelError(f"it does not run: {first_line(error)}") from error
    return {name: np.asarray(output, dtype=np.float32) for name, output in zip(names, outputs, strict=True)}


def _largest_batch(
    session: onnxruntime.InferenceSession, samples: Feeds, singly: Feeds, request: dict[str, Any]
) -> int:
    """The largest of 2 and what was asked for that gives, picture by picture, what single runs give; else 1."""
    if any(isinstance(node.shape[0], int) for node in session.get_inputs()):
        return 1
    proven = 1
    for size in sorted({min(2, request["max_batch"]), request["max_batch"]} - {1}):
        wanted = _wrapped(singly, size)
        try:
            found = _run(session, request["outputs"], _wrapped(samples, size))
        except ModelError:
            break
        if not all(_is_close(found[name], wanted[name], request["tolerance"]) for name in wanted):
            break
        proven = size
    return proven


def _wrapped(arrays: Feeds, size: int) -> Feeds:
    return {name: np.take(array, range(size), axis=0, mode="wrap") for name, array in arrays.items()}


def _is_close(one: NDArray[np.float32], other: NDArray[np.float32], tolerance: float) -> bool:
    return one.shape == other.shape and bool(np.abs(one - other).max(initial=0.0) <= tolerance)


def _opset(model: onnx.ModelProto) -> int:
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)


def _graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """The graph, the functions, and every graph inside a node, without recursion: depth is the file's to choose."""
    waiting: list[onnx.GraphProto | onnx.FunctionProto] = [model.graph, *model.functions]
    while waiting:
        graph = waiting.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                waiting += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in _graphs(model):
        yield from graph.node


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for graph in _graphs(model):
        if isinstance(graph, onnx.GraphProto):
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
    for node in _nodes(model):
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)


def _listed(names: Iterator[str] | Sequence[str] | dict[str, Any]) -> str:
    return ", ".join(repr(name) for name in names) or "none"


if __name__ == "__main__":
    serve(examine)
