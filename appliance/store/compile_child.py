"""The child process that compiles: `python -m appliance.store.compile_child`, requests in, descriptions out.

The files are foreign, so everything that opens them happens here: it parses, optimises, lifts, proves what is to
serve against the bundle's golden samples and the whole graph's session, and measures it. It knows neither the store's
layout nor other experts; what it makes lies in the folder that the request names.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import GraphProto, ModelProto, TensorProto

from appliance import sandbox
from appliance.drivers import golden, runtime
from appliance.errors import ModelError, StoreError
from appliance.store import sealed, trial
from appliance.store.sharing import layout
from appliance.store.template import content, dtype_of, lift, packed, plain_form, views
from appliance.store.trial import Pixels, Trial, runtime_errors

_ROUNDING = 1e-4
"""Largest difference to the whole graph's session, relative to the largest output (measured: up to 4e-7)."""
_EXPORT_AGAIN = "export the expert again"
_REPORT = "report this model: it cannot be served"


def compile_one(request: dict[str, Any]) -> dict[str, Any]:
    """Compile one expert into `request["folder"]`: template.onnx, plain.onnx and segment; the reply describes them.

    The request names `model`, `inputs` (name, channels, width, height each), `outputs` that must exist, `max_batch`,
    `golden` (a path or None), `tolerance` and by output `tolerances`, the `provider` that it is for, and `known`, the
    folder of architectures that were measured already.

    For CUDA the graph keeps to the standard's operators, which every provider knows: the processor's own layouts do not
    leave it. It is proven and measured here, on the processor, and is a template always.
    """
    folder = Path(request["folder"])
    try:
        try:
            return _compiled(request, folder)
        except ModelError:  # the runtime says the same of a bad model and of a full disk
            _check_room(folder, 2 * Path(request["model"]).stat().st_size)
            raise
    except OSError as error:
        raise StoreError(
            f"{folder} cannot be written: {error.strerror or error}", "make room there, or correct paths.store"
        ) from error


def _check_room(folder: Path, size: int) -> None:
    """Raises OSError when no file of this size can be written here."""
    with (folder / "room").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def _compiled(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    is_for_cpu = request["provider"] == "cpu"
    reference = _optimise(_portable(request), folder, "all" if is_for_cpu else "basic")
    limit = _batch_limit(reference, request["max_batch"])
    template = lift(_parse(folder / "optimised.onnx"), [spec["name"] for spec in request["inputs"]])
    (folder / "optimised.onnx").unlink()
    plain = plain_form(template)
    (folder / "template.onnx").write_bytes(template.model)
    (folder / "plain.onnx").write_bytes(plain)
    segment, weights = _written(template.weights, folder / "segment")
    openers = {False: partial(trial.as_template, folder / "template.onnx", weights)}
    if is_for_cpu:
        openers[True] = partial(trial.as_plain, folder / "plain.onnx", weights)
    known = _known(Path(request["known"]) / template.signature)
    for is_plain, opened in openers.items():
        if known is None or known["is_plain"] == is_plain:
            _prove(opened(), reference, template.outputs, limit, request)
    output_bytes = _output_bytes(reference, request)
    del reference  # what it leaves free would be taken for what is measured
    costs = None
    if known is None:
        costs = asdict(trial.measured(openers, partial(_noise, request), limit, segment["bytes"]))
    return {
        **segment,
        "architecture": template.signature,
        "outputs": list(template.outputs),
        "output_bytes": output_bytes,
        "plain": hashlib.sha256(plain).hexdigest() if is_for_cpu and (known is None or known["is_plain"]) else None,
        "costs": costs,
    }


def _written(weights: Sequence[TensorProto], path: Path) -> tuple[dict[str, Any], trial.Weights]:
    """Write the segment. What the reply says of it, and the tensors as they lie in it."""
    digests, distinct = _distinct(weights)
    starts, size = layout([len(piece) for piece in distinct.values()])
    pack = packed(list(distinct.values()), starts, size)
    places = dict(zip(distinct, starts, strict=True))
    offsets = [places[digest] for digest in digests]
    path.write_bytes(pack.data)
    tensors = [
        {
            "name": f"w{i}",
            "dtype": dtype_of(tensor).name,
            "shape": list(tensor.dims),
            "offset": offset,
            "sha256": digest,
        }
        for i, (tensor, offset, digest) in enumerate(zip(weights, offsets, digests, strict=True))
    ]
    segment = {"segment": hashlib.sha256(pack.data).hexdigest(), "bytes": size, "tensors": tensors}
    return segment, views(weights, offsets, pack)


def _known(home: Path) -> dict[str, Any] | None:
    """What the first expert of this architecture found out for all of them, if there was one."""
    try:
        return sealed.read(home / "architecture.json")
    except (OSError, ValueError):
        return None


def _distinct(weights: Sequence[TensorProto]) -> tuple[list[str], dict[str, bytes]]:
    """The digest of each tensor, and the contents by digest: what is equal within an expert lies there once."""
    digests, distinct = [], dict[str, bytes]()
    for tensor in weights:
        piece = content(tensor)
        digests.append(hashlib.sha256(piece).hexdigest())
        distinct.setdefault(digests[-1], piece)
    return digests, distinct


def _portable(request: dict[str, Any]) -> ModelProto:
    """The foreign graph, with weights that are no longer inputs (before IR 4 they had to be listed there)."""
    path = Path(request["model"])
    model = _parse(path)
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise ModelError(f"{path.name} keeps weights in other files", "export it as one file")
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    _check_interface(model.graph, request)
    model.ir_version = max(model.ir_version, 8)
    return model


def _parse(path: Path) -> ModelProto:
    try:
        return onnx.load_model(path, load_external_data=False)
    except DecodeError as error:
        raise ModelError(f"{path.name} is not an ONNX file: {error}", _EXPORT_AGAIN) from error


def _check_interface(graph: GraphProto, request: dict[str, Any]) -> None:
    expected = {spec["name"]: spec for spec in request["inputs"]}
    found = {value.name: value for value in graph.input}
    if expected.keys() != found.keys():
        raise ModelError(
            f"the graph's inputs are {', '.join(found) or 'none'}; the manifest lists {', '.join(expected)}",
            "correct [[inputs]] in expert.toml",
        )
    for name, spec in expected.items():
        if found[name].type.tensor_type.elem_type != TensorProto.FLOAT:
            raise ModelError(f"input {name} is not float32", _EXPORT_AGAIN)
        shape = [d.dim_value for d in found[name].type.tensor_type.shape.dim]
        wanted = [0, spec["channels"], spec["height"], spec["width"]]
        if len(shape) != 4 or any(s not in (0, w) for s, w in zip(shape[1:], wanted[1:], strict=True)):
            raise ModelError(f"input {name} has shape {shape}, the manifest's is {wanted} (0: free)", _EXPORT_AGAIN)
    missing = set(request["outputs"]) - {value.name for value in graph.output}
    if missing:
        raise ModelError(
            f"the head wants the output {', '.join(sorted(missing))}; "
            f"the graph has {', '.join(value.name for value in graph.output)}",
            "correct [head] in expert.toml",
        )


def _optimise(model: ModelProto, folder: Path, level: runtime.Optimisation) -> Any:
    """The plain session of a graph, which leaves `optimised.onnx` in the folder."""
    source = folder / "portable.onnx"
    source.write_bytes(model.SerializeToString())
    with runtime_errors("cannot be opened"):
        session = runtime.open_session(source, level, save_as=folder / "optimised.onnx")
    source.unlink()
    return session


def _batch_limit(reference: Any, max_batch: int) -> int:
    """The largest batch that the graph takes. Raises ModelError when the manifest promises another."""
    fixed = {shape[0] for shape in (value.shape for value in reference.get_inputs()) if isinstance(shape[0], int)}
    if fixed - {1}:
        raise ModelError(f"the graph takes batches of {max(fixed)} only", "export it with a free or single batch")
    if fixed and max_batch > 1:
        raise ModelError(
            f"the graph takes single pictures, its manifest says max_batch = {max_batch}", "set max_batch = 1"
        )
    return max_batch


def _noise(request: dict[str, Any], count: int) -> list[Pixels]:
    """Random pictures of the shape that the manifest gives each input; the same in every run."""
    generator = np.random.default_rng(count)
    return [
        generator.random((count, spec["channels"], spec["height"], spec["width"]), np.float32)
        for spec in request["inputs"]
    ]


def _prove(ours: Trial, reference: Any, outputs: Sequence[str], limit: int, request: dict[str, Any]) -> None:
    _prove_equal(ours, reference, _noise(request, min(2, limit)), request)
    _prove_golden(ours, outputs, limit, request)


def _prove_equal(ours: Trial, reference: Any, pictures: list[Pixels], request: dict[str, Any]) -> None:
    """It gives what the session of the whole graph gives, to rounding."""
    names = [spec["name"] for spec in request["inputs"]]
    with runtime_errors("does not run"):
        expected = reference.run(None, dict(zip(names, pictures, strict=True)))
    for output, found, theirs in zip(reference.get_outputs(), ours.run(pictures), expected, strict=True):
        scale = max(1.0, float(np.max(np.abs(theirs[np.isfinite(theirs)]), initial=0.0)))
        if found.shape != theirs.shape or not np.allclose(
            found, theirs, rtol=0, atol=_ROUNDING * scale, equal_nan=True
        ):
            raise ModelError(f"output {output.name} differs from the plain session's when weights are apart", _REPORT)


def _prove_golden(ours: Trial, outputs: Sequence[str], limit: int, request: dict[str, Any]) -> None:
    """It gives what the original framework gave on the bundle's golden samples."""
    if request["golden"] is not None:
        inputs = [spec["name"] for spec in request["inputs"]]
        allowed = {"tolerance": request["tolerance"], "tolerances": request["tolerances"]}
        golden.prove(ours.run, Path(request["golden"]), inputs, outputs, max_batch=limit, **allowed)


def _output_bytes(reference: Any, request: dict[str, Any]) -> int:
    """What one picture's results take: all of them, also those that the head does not read."""
    names = [spec["name"] for spec in request["inputs"]]
    with runtime_errors("does not run"):
        return sum(int(o.nbytes) for o in reference.run(None, dict(zip(names, _noise(request, 1), strict=True))))


if __name__ == "__main__":
    sandbox.serve(compile_one)
