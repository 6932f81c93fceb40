"""Segment files, experts of standard operators over them, and reads that go on when they are told to."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto

from appliance.core.types import Segment
from appliance.engine.disk import READERS, Reader
from appliance.engine.weights import Weights
from appliance.store.sharing import layout
from appliance.store.store import Compiled, TensorSlot
from appliance.store.template import content, dtype_of, lift, packed


def written(content: bytes, folder: Path) -> Segment:
    """A file named by its content."""
    segment = Segment(hashlib.sha256(content).hexdigest(), len(content))
    (folder / segment.id).write_bytes(content)
    return segment


class Disk:
    """Segment files with random content in a folder, and how often each was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []

    def segment(self, size: int, seed: int = 0) -> Segment:
        return written(np.random.default_rng(seed).bytes(size), self.folder)

    def path(self, name: str) -> Path:
        self.asked.append(name)
        return self.folder / name


def bytes_of(memory: Weights, segment_id: str) -> memoryview:
    """The bytes of a segment in main memory; while a view of it lives, it cannot be dropped."""
    return memoryview(memory._ready(segment_id))


def all_idle(reader: Reader) -> None:
    """Return when all helpers have begun, and none does anything else."""
    together = threading.Barrier(READERS - 1)
    for waiting in [reader._helpers.submit(together.wait, 60) for _ in range(READERS - 1)]:
        waiting.result()


class Reads:
    """Watches how these segments are read from now on: which files were opened, whose reads have begun, which ended.

    Reads of a segment that is `slow` do not end before `go_on`.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, watched: Sequence[Segment], slow: Sequence[Segment]) -> None:
        self.opened = {segment.id: threading.Event() for segment in watched}
        self.begun = {segment.id: threading.Event() for segment in watched}
        self.go_on = threading.Event()
        self.ended: list[str] = []
        self._slow = {segment.id for segment in slow}
        self._really_open, self._really_read = os.open, os.preadv
        monkeypatch.setattr(os, "open", self._open)
        monkeypatch.setattr(os, "preadv", self._read)

    def until_last_of(self, segment: Segment) -> list[str]:
        """Whose reads ended, in order, until the last of this one had."""
        return self.ended[: len(self.ended) - self.ended[::-1].index(segment.id)]

    def _open(self, path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(path).name in self.opened:
            self.opened[Path(path).name].set()
        return self._really_open(path, *args, **kwargs)

    def _read(self, descriptor: int, buffers: Any, offset: int) -> int:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        if name in self.begun:
            self.begun[name].set()
        if name in self._slow:
            assert self.go_on.wait(60), "nobody said go on"
        count = self._really_read(descriptor, buffers, offset)
        self.ended.append(name)
        return count


def portable_expert(name: str, net: ModelProto, folder: Path, shared: Collection[str] = ()) -> Compiled:
    """The net as a template over segments in the folder, each a file named by its content.

    The runtime optimises it to standard operators only: what the shipped compiler makes for a processor has operators
    (com.microsoft.nchwc) that no accelerator knows. Tensors whose digests are in `shared` lie in a second segment.
    """
    template = lift(_optimised(net, folder / f"{name}.onnx"), [value.name for value in net.graph.input])
    (folder / template.signature).write_bytes(template.model)
    pieces = [content(tensor) for tensor in template.weights]
    digests = [hashlib.sha256(piece).hexdigest() for piece in pieces]
    segments: list[Segment] = []
    slots: dict[int, TensorSlot] = {}
    for is_shared in (False, True):
        group = [number for number, digest in enumerate(digests) if (digest in shared) == is_shared]
        offsets, size = layout([len(pieces[number]) for number in group])
        for number, offset in zip(group, offsets, strict=True):
            tensor = template.weights[number]
            dtype, shape = dtype_of(tensor).name, tuple(tensor.dims)
            slots[number] = TensorSlot(f"w{number}", dtype, shape, len(segments), offset, digests[number])
        if group:
            segments.append(written(packed([pieces[number] for number in group], offsets, size).tobytes(), folder))
    return Compiled(
        expert=name,
        version=1,
        model_sha256=hashlib.sha256(net.SerializeToString()).hexdigest(),
        architecture=template.signature,
        template_path=folder / template.signature,
        segments=tuple(segments),
        tensors=tuple(slots[number] for number in sorted(slots)),
        inputs=tuple(value.name for value in net.graph.input),
        outputs=template.outputs,
        item_seconds=0.0,
        fixed_seconds=0.0,
    )


def _optimised(net: ModelProto, path: Path) -> ModelProto:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(net.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(path)
