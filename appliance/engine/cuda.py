"""An NVIDIA GPU: its memory, streams and events as the `Accelerator` of device_weights, its sessions as a `Place`.

Not run on a GPU yet. What is written here comes from the documents and sources of CUDA 13 and ONNX Runtime 1.31.1, and
from the strict pretend that the same tests run against; tests/test_conformance.py holds it to them where there is one.

Asked for CUDA, the runtime quietly computes on the processor when anything is missing. Here that is an error.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import onnxruntime

from appliance.drivers import devices
from appliance.engine.pinned import Pinned
from appliance.errors import DeviceError, OutOfMemory

_PROVIDER = "CUDAExecutionProvider"
_LIBRARIES = ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10", "libcudnn.so.9")
"""What the provider of 1.31.1 links to, and cuDNN, which it opens only when it first meets a convolution."""
_INSTALL = "install the appliance with its extra `cuda`"
_LOOK = "look at `nvidia-smi` and the kernel's log"
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
"""cuDNN plans a convolution anew for every batch size that it meets."""


def usable_gpu(index: int) -> str | None:
    """Why this GPU cannot be used, in words for an operator; None if it can."""
    gpus = devices.gpus()
    if not gpus:
        return "no NVIDIA driver, or no GPU"
    if index not in {gpu.index for gpu in gpus}:
        return f"there is no GPU {index}, only {', '.join(str(gpu.index) for gpu in gpus)}"
    if not _has_bindings():
        return f"the package cuda-bindings is missing: {_INSTALL}"
    if _PROVIDER not in onnxruntime.get_available_providers():
        return f"this ONNX Runtime is built without CUDA: {_INSTALL}"
    missing = _missing_libraries()
    return f"{', '.join(missing)} cannot be loaded: {_INSTALL}" if missing else None


class CudaAccelerator:
    """One GPU. Copies run on a stream of their own, beside the compute stream that sessions are given."""

    def __init__(self, index: int) -> None:
        """Raises DeviceError when the bindings, the driver or the device are missing."""
        self.name = f"cuda:{index}"
        self.index = index
        self._cudart = _bindings(self.name)
        self._pinned: dict[int, mmap.mmap] = {}
        self._upload = self._new_stream()
        try:
            self._compute = self._new_stream()
        except DeviceError:
            self._call("cudaStreamDestroy", self._upload)
            raise

    @property
    def compute_stream(self) -> int:
        """The address of the stream for runs."""
        return int(self._compute)

    def close(self) -> None:
        """Give the streams back, when nothing uses them any more."""
        for stream in (self._upload, self._compute):
            self._call("cudaStreamDestroy", stream)

    def memory(self) -> tuple[int, int]:
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def allocate(self, size: int) -> int:
        (address,) = self._call("cudaMalloc", size)
        return int(address)

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def pin(self, size: int) -> Pinned:
        """Our own mapping, pinned: page-aligned, open to direct reads, and seen by whoever counts our memory."""
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise OutOfMemory(
                f"{size} bytes of memory cannot be mapped: {error.strerror}", "lower its budget"
            ) from error
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.madvise(mmap.MADV_DONTFORK)  # a child's copy would tear the device's pages away from ours
        address = int(np.frombuffer(memory, np.uint8).ctypes.data)
        self._call("cudaHostRegister", address, size, self._cudart.cudaHostRegisterDefault)
        self._pinned[address] = memory
        return Pinned(address, memoryview(memory))

    def unpin(self, pinned: Pinned) -> None:
        self._call("cudaHostUnregister", pinned.address)
        pinned.memory.release()
        self._pinned.pop(pinned.address).close()

    def copy_in(self, device_address: int, host_address: int, size: int) -> None:
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", device_address, host_address, size, kind, self._upload)

    def mark(self) -> _Event:
        # Whoever waits for it sleeps: spinning would take a processor from those who prepare pictures.
        flags = self._cudart.cudaEventBlockingSync | self._cudart.cudaEventDisableTiming
        (handle,) = self._call("cudaEventCreateWithFlags", flags)
        event = _Event(handle, self._cudart.cudaEventDestroy)
        self._call("cudaEventRecord", handle, self._upload)
        return event

    def wait(self, event: _Event) -> None:
        self._call("cudaEventSynchronize", event.handle)

    def follow(self, event: _Event) -> None:
        self._call("cudaStreamWaitEvent", self._compute, event.handle, 0)

    def _new_stream(self) -> Any:
        """One that does not wait for the default stream, which the runtime's libraries may use."""
        (stream,) = self._call("cudaStreamCreateWithFlags", self._cudart.cudaStreamNonBlocking)
        return stream

    def _call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        """What the call returns beside its error code. Raises OutOfMemory or DeviceError."""
        # Each thread has a current device of its own, at first the device 0.
        self._check("cudaSetDevice", self._cudart.cudaSetDevice(self.index)[0])
        code, *values = getattr(self._cudart, name)(*arguments)
        self._check(name, code)
        return tuple(values)

    def _check(self, name: str, code: Any) -> None:
        if code == self._cudart.cudaError_t.cudaSuccess:
            return
        # The thread would remember it, and the runtime take it for the failure of its own next kernel.
        self._cudart.cudaGetLastError()
        _, reason = self._cudart.cudaGetErrorString(code)
        what = f"{self.name}: {name}: {reason.decode() if isinstance(reason, bytes) else reason}"
        if code == self._cudart.cudaError_t.cudaErrorMemoryAllocation:
            raise OutOfMemory(what, "lower the device's budgets")
        raise DeviceError(what, _LOOK)


class _Event:
    """A CUDA event that is given back when nobody needs it any more."""

    __slots__ = ("_destroy", "handle")

    def __init__(self, handle: Any, destroy: Callable[[Any], Any]) -> None:
        self.handle, self._destroy = handle, destroy

    def __del__(self) -> None:
        self._destroy(self.handle)  # what is still to come of it, the driver looks after


@dataclass(frozen=True, slots=True)
class CudaPlace:
    """One GPU as ONNX Runtime sees it. It serves templates only.

    Runs are queued on `compute_stream`. Each session has an arena of its own, which may keep as much as runs may take:
    `activation_bytes`.
    """

    index: int
    compute_stream: int
    activation_bytes: int

    @property
    def device(self) -> tuple[str, int]:
        return "cuda", self.index

    @property
    def shares_arena(self) -> bool:
        return False

    def open_template(self, path: Path) -> Any:
        """An InferenceSession of a graph without weights. Raises one of runtime.ERRORS, or DeviceError."""
        _preload()
        levels = onnxruntime.GraphOptimizationLevel
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = levels.ORT_DISABLE_ALL
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = [(_PROVIDER, self._provider_options()), "CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
        if _PROVIDER not in session.get_providers():
            why = usable_gpu(self.index) or "the runtime does not say why; its log does"
            raise DeviceError(f"cuda:{self.index}: the runtime fell back to the processor: {why}", _INSTALL)
        return session

    def open_plain(self, path: Path, weights: Mapping[str, Any]) -> Any:
        """Raises DeviceError: a plain session would copy its weights into an arena that never gives them back."""
        raise DeviceError(f"cuda:{self.index} serves templates only", "run this expert on the processor")

    def run_options(self, *, shrink: bool) -> Any:
        options = onnxruntime.RunOptions()
        if shrink:
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", f"gpu:{self.index}")
        return options

    def _provider_options(self) -> dict[str, str]:
        return {
            "device_id": str(self.index),
            "user_compute_stream": str(self.compute_stream),
            "do_copy_in_default_stream": "1",  # pictures and results on the compute stream; 0 is known for races
            "gpu_mem_limit": str(2 * self.activation_bytes),  # what was kept and what runs: beyond it a run fails
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "HEURISTIC",  # EXHAUSTIVE runs every algorithm on first sight of a shape
            "use_tf32": "0",  # ten bits of mantissa would be further from golden outputs than their tolerance allows
            "prefer_nhwc": "0",  # it would turn around weights that are inputs in every run
            "external_data_loader_reading_threads": "0",  # each session would pin 128 MiB for files we do not have
        }


_preloading = Lock()


def _preload() -> None:
    """Load CUDA's libraries where pip put them. What is missing is said elsewhere; here it would go to stdout."""
    with _preloading, redirect_stdout(StringIO()), suppress(RuntimeError):
        onnxruntime.preload_dlls()


def _missing_libraries() -> list[str]:
    _preload()
    return [name for name in _LIBRARIES if not _loads(name)]


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _has_bindings() -> bool:
    try:
        return find_spec("cuda.bindings.runtime") is not None
    except ModuleNotFoundError:  # not even its parent is there
        return False


def _bindings(name: str) -> Any:
    """The module; imported here, since it is there only where the extra `cuda` was installed."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise DeviceError(
            f"{name}: the package cuda-bindings is missing or does not load: {error}", _INSTALL
        ) from error
    return runtime
