"""A PyTorch checkpoint to a proven ONNX model. Imports torch; nothing else of the export command does."""

from __future__ import annotations

import hashlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from appliance.errors import ExportError
from export import nets, proof
from export.bundle import SOURCE_KEY, Proven
from export.manifest import Entry
from export.proof import Arrays, Samples
from export.text import first_line

OPSET = 18
_PARALLEL_PREFIX = "module."


def convert(entry: Entry, root: Path) -> Proven:
    """Load, export, run and compare. Raises ExportError; NotTheSame when the ONNX model answers differently.

    Each expert is exported by itself, also when hundreds share an architecture: 1.5 s each (torch 2.13, one core,
    2026-11) costs minutes once, while swapping weights into one exported graph would need a proof of its own that
    no constant was folded from the first expert's weights.
    """
    assert entry.architecture is not None
    torch.set_num_threads(1)  # --jobs decides how many cores are used
    checkpoint = root / entry.source
    net = load(entry.architecture, checkpoint)
    samples = proof.read_samples(entry, root)
    expected = partial(compute, net, entry)
    model = _exported(net, entry, samples)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        proof.prove(path, entry, samples, expected)
        content = path.read_bytes()
    return Proven(
        model=content,
        opset=OPSET,
        ir_version=model.ir_version,
        max_batch=entry.max_batch,
        golden={**samples.feeds, **expected(samples.feeds)},
        provenance={
            "framework": f"torch {torch.__version__}",
            "architecture": entry.architecture,
            SOURCE_KEY: hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        },
    )


def load(architecture: str, checkpoint: Path) -> nn.Module:
    """The network with its weights, ready to answer. Only tensors are read: a checkpoint cannot run code."""
    net = nets.build(architecture)
    try:
        saved = torch.load(io.BytesIO(checkpoint.read_bytes()), map_location="cpu", weights_only=True)
        net.load_state_dict(_weights(saved))
    except OSError as error:
        raise ExportError(f"{checkpoint} cannot be read: {error.strerror}") from error
    except Exception as error:  # torch.load raises whatever its unpickler met
        raise ExportError(
            f"{checkpoint} does not fit {architecture}: {first_line(error)}",
            "save net.state_dict() of that very architecture",
        ) from error
    return net.eval()


def _weights(saved: Mapping[str, object]) -> dict[str, Tensor]:
    """A state dictionary, also from inside a training checkpoint or from a data-parallel wrapper."""
    inner = saved.get("state_dict", saved)
    if not isinstance(inner, Mapping):
        raise TypeError("it holds no state dictionary")
    return {name.removeprefix(_PARALLEL_PREFIX): tensor for name, tensor in inner.items()}


def _exported(net: nn.Module, entry: Entry, samples: Samples) -> onnx.ModelProto:
    # A dynamic axis must not have size 1 in the example: the exporter would take 1 for a constant.
    example = tuple(torch.from_numpy(array) for array in samples.batch(2).feeds.values())
    batch = torch.export.Dim("batch", min=1, max=max(entry.max_batch, 2))
    shapes = tuple({0: batch} if entry.max_batch > 1 else None for _ in example)
    if entry.max_batch == 1:
        example = tuple(tensor[:1] for tensor in example)
    try:
        with _quiet():
            program = torch.onnx.export(
                net,
                example,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=list(samples.feeds),
                output_names=list(entry.output_names),
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds
        raise ExportError(f"{entry.name} cannot be exported: {first_line(error)}") from error
    assert program is not None
    return _stripped(program.model_proto)


def _stripped(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without stack traces: they name the exporting machine's folders and are larger than small weights."""
    for part in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    for tensor in model.graph.initializer:
        tensor.ClearField("metadata_props")
        tensor.ClearField("doc_string")
    model.ClearField("metadata_props")
    return model


def compute(net: nn.Module, entry: Entry, feeds: Arrays) -> Arrays:
    with torch.inference_mode():
        outputs = net(*(torch.from_numpy(feeds[spec.name]) for spec in entry.inputs))
    tensors = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    if len(tensors) != len(entry.output_names):
        raise ExportError(
            f"{entry.name} returns {len(tensors)} tensors, its head names {', '.join(entry.output_names)}"
        )
    return {name: tensor.numpy() for name, tensor in zip(entry.output_names, tensors, strict=True)}


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks about missing torchvision operators and its own deprecations; errors still come through."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
