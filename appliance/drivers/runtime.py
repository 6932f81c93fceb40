"""ONNX Runtime as this appliance uses it: how sessions are opened, what memory they share, what they raise.

Threads: each session has its own pool without spinning. The process-wide pool would do with fewer threads, but Python
cannot stop it from spinning (1.31.1, 2026-11: 30 ms of processor time burnt per thread after every run), and once it
exists no other session of the process may have threads of its own. There are as many sessions as architectures, and
one thread each unless told otherwise, so there is no explosion to prevent.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort

ERRORS: tuple[type[Exception], ...] = (
    ort.EPFail,
    ort.EngineError,
    ort.Fail,
    ort.InvalidArgument,
    ort.InvalidGraph,
    ort.InvalidProtobuf,
    ort.NoModel,
    ort.NoSuchFile,
    ort.NotFound,
    ort.NotImplemented,
    ort.RuntimeException,
    RuntimeError,  # what the binding makes of any other C++ exception
    ValueError,  # what it makes of a wrong dtype or shape
)
"""They have no common base but Exception."""
_OUT_OF_MEMORY = (
    *("bad_alloc", "bad array new length", "failed to allocate", "allocate memory", "out of memory"),
    *("cublas_status_alloc_failed", "cudnn_status_alloc_failed", "is smaller than requested"),
)
"""In lower case; the runtime has no error type for it."""
Optimisation = Literal["none", "basic", "all"]
"""`basic` keeps to the standard's operators, `all` makes what is fastest on this processor."""
_LEVELS = {
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
VERSION: str = onnxruntime.__version__
_setting_up = Lock()
_is_set_up = False


def open_session(
    path: Path,
    optimisation: Optimisation = "none",
    *,
    intra_threads: int = 1,
    save_as: Path | None = None,
    weights: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """An InferenceSession of a file on the CPU. Raises one of ERRORS.

    The optimised graph may be saved; without optimisation it runs as it is written.
    `weights` are OrtValues for initializers whose bytes are not in the file; they must outlive the session.
    """
    _set_up()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = _LEVELS[optimisation]
    options.intra_op_num_threads, options.inter_op_num_threads = intra_threads, 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.use_env_allocators", "1")
    for name, value in weights.items():
        options.add_initializer(name, value)
    if save_as is not None:
        options.optimized_model_filepath = str(save_as)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0)


@dataclass(frozen=True, slots=True)
class CpuPlace:
    """Main memory and its processors: the `Place` that every box has."""

    intra_threads: int = 1

    @property
    def device(self) -> tuple[str, int]:
        return "cpu", 0

    @property
    def shares_arena(self) -> bool:
        return True

    def open_template(self, path: Path) -> Any:
        return open_session(path, intra_threads=self.intra_threads)

    def open_plain(self, path: Path, weights: Mapping[str, Any]) -> Any:
        return open_session(path, intra_threads=self.intra_threads, weights=weights)

    def run_options(self, *, shrink: bool) -> Any:
        """Shrinking makes a run of 2 to 3 ms 0.1 to 0.4 ms longer; a run that is ended shrinks, too (1.31.1)."""
        options = onnxruntime.RunOptions()
        if shrink:
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        return options


def trim() -> None:
    """Give what the C heap keeps back to the system: after a large block was freed once, glibc keeps its like."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def says_out_of_memory(error: Exception) -> bool:
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in said for sign in _OUT_OF_MEMORY)


def value_at(address: int, dtype: np.dtype[Any], shape: Sequence[int]) -> Any:
    """An OrtValue over memory of ours: it copies nothing and keeps nothing alive."""
    raw = (ctypes.c_uint8 * (math.prod(shape) * dtype.itemsize)).from_address(address)
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ctypeslib.as_array(raw).view(dtype).reshape(shape))


def _set_up() -> None:
    """Once per process: no chatter, and one arena for the activations of all sessions.

    With an arena each, six idle sessions held 235 MB; with this one, 4.5 MB (1.31.1).
    """
    global _is_set_up
    with _setting_up:
        if _is_set_up:
            return
        onnxruntime.set_default_logger_severity(3)
        place = onnxruntime.OrtMemoryInfo(
            "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
        )
        same_as_requested = onnxruntime.OrtArenaCfg({"arena_extend_strategy": 1})
        onnxruntime.create_and_register_allocator(place, same_as_requested)
        _is_set_up = True
