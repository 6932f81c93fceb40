"""The calls to CUDA, made to a strict pretend of its runtime; with a real GPU test_conformance.py makes real ones."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import mmap
import threading
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from appliance.core.types import Device, Segment
from appliance.drivers import devices
from appliance.drivers.devices import Gpu
from appliance.engine import cuda
from appliance.engine.cuda import CudaAccelerator, CudaPlace, usable_gpu
from appliance.engine.device_weights import DeviceWeights
from appliance.engine.engine import Engine
from appliance.errors import DeviceError, OutOfMemory
from tests import kit_models as kit
from tests.kit_segments import portable_expert


class Code(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorUnknown = 999


class Kind(IntEnum):
    cudaMemcpyHostToDevice = 1


Answer = tuple[Any, ...]


class PretendRuntime:
    """What of `cuda.bindings.runtime` is used, over main memory. It takes nothing that it did not give.

    Each thread has to choose the device before anything else, and copies are made at once.
    """

    cudaError_t, cudaMemcpyKind = Code, Kind
    cudaHostRegisterDefault, cudaStreamNonBlocking = 0, 1
    cudaEventBlockingSync, cudaEventDisableTiming = 1, 2

    def __init__(self) -> None:
        self.device = threading.local()
        self.blocks: dict[int, mmap.mmap] = {}
        self.registered: dict[int, int] = {}
        self.streams: set[int] = set()
        self.events: set[int] = set()
        self.recorded: set[int] = set()
        self.followed: set[tuple[int, int]] = set()
        self.refused: dict[str, Code] = {}
        self.last_error = Code.cudaSuccess
        self._count = 0

    def cudaSetDevice(self, index: int) -> Answer:
        self.device.index = index
        return (self._code("cudaSetDevice", index == 0),)

    def cudaGetLastError(self) -> Answer:
        code, self.last_error = self.last_error, Code.cudaSuccess
        return (code,)

    def cudaGetErrorString(self, code: Code) -> Answer:
        return Code.cudaSuccess, code.name.encode()

    def cudaMemGetInfo(self) -> Answer:
        return self._code("cudaMemGetInfo"), 1 << 30, 2 << 30

    def cudaMalloc(self, size: int) -> Answer:
        code = self._code("cudaMalloc", size > 0)
        if code:
            return code, None
        block = mmap.mmap(-1, size)
        address = int(np.frombuffer(block, np.uint8).ctypes.data)
        self.blocks[address] = block
        return code, address

    def cudaFree(self, address: int) -> Answer:
        return (self._code("cudaFree", self.blocks.pop(address, None) is not None),)

    def cudaHostRegister(self, address: int, size: int, flags: int) -> Answer:
        code = self._code("cudaHostRegister", address % mmap.PAGESIZE == 0 and flags == 0)
        if not code:
            self.registered[address] = size
        return (code,)

    def cudaHostUnregister(self, address: int) -> Answer:
        return (self._code("cudaHostUnregister", self.registered.pop(address, None) is not None),)

    def cudaStreamCreateWithFlags(self, flags: int) -> Answer:
        code = self._code("cudaStreamCreateWithFlags", flags == 1)
        return code, None if code else self._new(self.streams)

    def cudaStreamDestroy(self, stream: int) -> Answer:
        known = stream in self.streams
        self.streams.discard(stream)
        return (self._code("cudaStreamDestroy", known),)

    def cudaEventCreateWithFlags(self, flags: int) -> Answer:
        return self._code("cudaEventCreateWithFlags", flags == 3), self._new(self.events)

    def cudaEventDestroy(self, event: int) -> Answer:
        self.events.discard(event)
        return (Code.cudaSuccess,)

    def cudaEventRecord(self, event: int, stream: int) -> Answer:
        self.recorded.add(event)
        return (self._code("cudaEventRecord", event in self.events and stream in self.streams),)

    def cudaEventSynchronize(self, event: int) -> Answer:
        return (self._code("cudaEventSynchronize", event in self.recorded),)

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> Answer:
        self.followed.add((stream, event))
        return (self._code("cudaStreamWaitEvent", stream in self.streams and event in self.recorded and flags == 0),)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Kind, stream: int) -> Answer:
        blocks = {start: len(block) for start, block in self.blocks.items()}
        is_right = kind == Kind.cudaMemcpyHostToDevice and stream in self.streams
        is_right &= _inside(blocks, target, size) and _inside(self.registered, source, size)
        code = self._code("cudaMemcpyAsync", is_right)
        if not code:
            ctypes.memmove(target, source, size)
        return (code,)

    def _code(self, call: str, is_right: bool = True) -> Code:
        is_right &= getattr(self.device, "index", None) is not None
        code = self.refused.get(call, Code.cudaSuccess if is_right else Code.cudaErrorInvalidValue)
        self.last_error = code or self.last_error
        return code

    def _new(self, handles: set[int]) -> int:
        self._count += 1
        handles.add(self._count)
        return self._count


def _inside(blocks: dict[int, int], address: int, size: int) -> bool:
    return any(start <= address and address + size <= start + length for start, length in blocks.items())


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> PretendRuntime:
    made = PretendRuntime()
    monkeypatch.setattr(cuda, "_bindings", lambda name: made)
    return made


@pytest.fixture
def gpu(runtime: PretendRuntime) -> Iterator[CudaAccelerator]:
    made = CudaAccelerator(0)
    yield made
    runtime.refused.clear()
    made.close()
    assert not runtime.streams


def test_segments_reach_the_device_and_everything_is_given_back(
    runtime: PretendRuntime, gpu: CudaAccelerator, tmp_path: Path
) -> None:
    content = np.random.default_rng(0).bytes(20 << 20)
    segment = Segment(hashlib.sha256(content).hexdigest(), len(content))
    (tmp_path / segment.id).write_bytes(content)
    memory = DeviceWeights(lambda name: tmp_path / name, gpu, device_bytes=40 << 20, host_bytes=24 << 20)
    for _ in range(2):
        memory.load([segment])
        memory.hold([segment])
        assert ctypes.string_at(memory.address(segment.id), segment.bytes) == content
        assert gpu.compute_stream in {stream for stream, _ in runtime.followed}
        memory.release([segment])
        memory.drop([segment])
    assert memory.hits == {"device": 0, "host": 1, "disk": 1}
    memory.close()
    assert (runtime.blocks, runtime.registered, runtime.events) == ({}, {}, set())


def test_pinned_memory_is_page_aligned_and_may_be_written_to(gpu: CudaAccelerator) -> None:
    pinned = gpu.pin(3 * 4096)
    assert pinned.address % 4096 == 0
    pinned.memory[:3] = b"abc"
    assert ctypes.string_at(pinned.address, 3) == b"abc"
    gpu.unpin(pinned)


def test_what_cuda_refuses_is_named_with_device_call_and_reason(runtime: PretendRuntime, gpu: CudaAccelerator) -> None:
    runtime.refused["cudaEventRecord"] = Code.cudaErrorUnknown
    with pytest.raises(DeviceError, match="cuda:0: cudaEventRecord: cudaErrorUnknown"):
        gpu.mark()


def test_a_full_gpu_is_a_shortage_of_memory_that_later_kernels_do_not_hear_of(
    runtime: PretendRuntime, gpu: CudaAccelerator
) -> None:
    runtime.refused["cudaMalloc"] = Code.cudaErrorMemoryAllocation
    with pytest.raises(OutOfMemory, match="cuda:0: cudaMalloc"):
        gpu.allocate(4096)
    assert runtime.last_error == Code.cudaSuccess


def test_memory_is_told_as_free_and_all(gpu: CudaAccelerator) -> None:
    assert gpu.memory() == (1 << 30, 2 << 30)


def test_a_device_that_is_not_there_is_an_error(runtime: PretendRuntime) -> None:
    with pytest.raises(DeviceError, match="cuda:3: cudaSetDevice"):
        CudaAccelerator(3)


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaHostRegister"])
def test_an_engine_that_cannot_be_made_leaves_nothing_on_its_gpu(runtime: PretendRuntime, call: str) -> None:
    runtime.refused[call] = Code.cudaErrorMemoryAllocation
    with pytest.raises(OutOfMemory):
        Engine.on_gpu(
            Device("cuda:0", 1 << 20, activation_bytes=1 << 20), {}, Path, lambda event: None, host_bytes=1 << 20
        )
    assert (runtime.streams, runtime.blocks, runtime.registered) == (set(), {}, {})


def test_a_gpu_with_a_stream_for_copies_alone_is_left_without_any(
    runtime: PretendRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_create = runtime.cudaStreamCreateWithFlags

    def only_one(flags: int) -> Answer:
        return (Code.cudaErrorUnknown, None) if runtime.streams else really_create(flags)

    monkeypatch.setattr(runtime, "cudaStreamCreateWithFlags", only_one)
    with pytest.raises(DeviceError, match="cuda:0: cudaStreamCreateWithFlags"):
        CudaAccelerator(0)
    assert not runtime.streams


def test_every_name_that_is_used_is_in_the_real_bindings() -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="not installed: cuda-bindings (extra `cuda`)")
    real = importlib.import_module("cuda.bindings.runtime")
    pretended = {name for name in dir(PretendRuntime) if name.startswith("cuda")}
    assert {name for name in pretended if not hasattr(real, name)} == set()
    for name in ("cudaHostRegisterDefault", "cudaStreamNonBlocking", "cudaEventBlockingSync", "cudaEventDisableTiming"):
        assert getattr(real, name) == getattr(PretendRuntime, name)


def test_asking_for_cuda_where_it_is_not_usable_is_an_error_and_not_the_processor(tmp_path: Path) -> None:
    if usable_gpu(0) is None:
        pytest.skip("there is a usable GPU")
    compiled = portable_expert("e0", kit.conv_net(), tmp_path)
    with pytest.raises(DeviceError, match="fell back to the processor: "):
        CudaPlace(0, 0, 1 << 20).open_template(compiled.template_path)


def test_plain_experts_are_not_for_gpus() -> None:
    with pytest.raises(DeviceError, match="cuda:1 serves templates only"):
        CudaPlace(1, 0, 1 << 20).open_plain(Path("model.onnx"), {})


def test_the_options_of_a_session_name_device_stream_and_limit() -> None:
    options = CudaPlace(1, 4711, 1 << 20)._provider_options()
    assert options["device_id"] == "1"
    assert options["user_compute_stream"] == "4711"
    assert options["gpu_mem_limit"] == str(2 << 20)


@pytest.mark.parametrize(
    ("missing", "why"),
    [
        ("driver", "no NVIDIA driver"),
        ("gpu", "there is no GPU 1, only 0"),
        ("package", "cuda-bindings is missing"),
        ("provider", "built without CUDA"),
        ("library", "libcudnn.so.9 cannot be loaded"),
        ("nothing", None),
    ],
)
def test_why_a_gpu_cannot_be_used_is_said_in_words(
    monkeypatch: pytest.MonkeyPatch, missing: str, why: str | None
) -> None:
    gpus = [] if missing == "driver" else [Gpu(0, "one", 1 << 30, 1 << 29, "1")]
    monkeypatch.setattr(devices, "gpus", lambda: gpus)
    monkeypatch.setattr(cuda, "_has_bindings", lambda: missing != "package")
    providers = ["CPUExecutionProvider", *([] if missing == "provider" else ["CUDAExecutionProvider"])]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(cuda, "_loads", lambda name: not (missing == "library" and "cudnn" in name))
    reason = usable_gpu(1 if missing == "gpu" else 0)
    assert reason is None if why is None else reason and why in reason
