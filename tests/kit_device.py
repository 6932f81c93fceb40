"""A pretend accelerator, stricter than a real one.

Its device memory is ordinary memory, so that sessions on the processor can run on "device" addresses. What a real
device would do at some time, it does as late as it may, and what a real one would forgive, it refuses.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np

from appliance.drivers.runtime import CpuPlace
from appliance.engine.pinned import Pinned
from appliance.errors import ApplianceError, DeviceError, OutOfMemory

POISON = 0xFF
"""In every byte of memory that nobody has written to: a float32 of it is not a number."""
QUEUE_DEPTH = 64
"""Copies that may be queued before the first has left host memory by itself."""


class Refused(AssertionError):
    """The accelerator was used as none may be."""


@dataclass(slots=True, eq=False)
class _Copy:
    """From pinned memory to the device. `taken` are its bytes once it has left host memory."""

    target: int
    source: int
    size: int
    checksum: int
    taken: bytes | None = None


class PretendAccelerator:
    """The `Accelerator` of device_weights.py over main memory.

    A copy leaves host memory when an event marked after it is waited for or followed, or when more than QUEUE_DEPTH
    are queued; the host memory must be then what it was when the copy was queued. It reaches the device's memory only
    when the compute stream follows such an event: until then runs would find poison, or what was there before.
    """

    name = "pretend:0"

    def __init__(self, total_bytes: int = 1 << 30) -> None:
        self.total_bytes = total_bytes
        self.stalls = 0  # times that the compute stream had to wait for a copy that had not been made
        self.copies = 0
        self._lock = threading.RLock()
        self._device: dict[int, mmap.mmap] = {}
        self._pinned: dict[int, mmap.mmap] = {}
        self._queue: list[_Copy] = []  # queued, not yet seen by the compute stream; the oldest first
        self._seen = 0  # copies that it has seen, of all that were ever queued
        self._calls: Counter[str] = Counter()
        self._failures: dict[tuple[str, int], ApplianceError] = {}
        self._is_closed = False

    def fail(self, call: str, *, at: int = 1, error: ApplianceError | None = None) -> None:
        """Let the so-many-th such call from now on fail, with a DeviceError unless told otherwise."""
        self._failures[call, self._calls[call] + at] = error or DeviceError(f"{self.name}: {call}: unknown error")

    @property
    def is_empty(self) -> bool:
        """Whether everything that was taken of it was given back."""
        return not self._device and not self._pinned

    @property
    def pending(self) -> int:
        """Copies that have not left host memory."""
        return sum(copy.taken is None for copy in self._queue)

    def close(self) -> None:
        if not self.is_empty:
            raise Refused("closed while memory of it was in use")
        self._is_closed = True

    def memory(self) -> tuple[int, int]:
        with self._used("memory"):
            return self.total_bytes - sum(map(len, self._device.values())), self.total_bytes

    def allocate(self, size: int) -> int:
        with self._used("allocate"):
            if size > self.memory()[0]:
                raise OutOfMemory(f"{self.name}: allocate: out of memory")
            return _kept(self._device, size)

    def free(self, address: int) -> None:
        with self._used("free"):
            if any(copy.taken is None and _inside(self._device, copy.target, 1) == address for copy in self._queue):
                raise Refused("device memory was freed before a copy to it was made")
            self._queue = [copy for copy in self._queue if _inside(self._device, copy.target, 1) != address]
            _poison(address, len(self._device[address]))
            self._device.pop(address).close()

    def pin(self, size: int) -> Pinned:
        with self._used("pin"):
            address = _kept(self._pinned, size)
            return Pinned(address, memoryview(self._pinned[address]))

    def unpin(self, pinned: Pinned) -> None:
        with self._used("unpin"):
            if any(
                copy.taken is None and _inside(self._pinned, copy.source, 1) == pinned.address for copy in self._queue
            ):
                raise Refused("pinned memory was freed before a copy from it was made")
            pinned.memory.release()
            self._pinned.pop(pinned.address).close()  # a BufferError if anybody still looks at it

    def copy_in(self, device_address: int, host_address: int, size: int) -> None:
        with self._used("copy_in"):
            if size <= 0 or _inside(self._device, device_address, size) is None:
                raise Refused(f"a copy of {size} bytes to what is no device memory")
            if _inside(self._pinned, host_address, size) is None:
                raise Refused(f"a copy of {size} bytes from what is no pinned memory")
            self._queue.append(_Copy(device_address, host_address, size, zlib.crc32(_bytes(host_address, size))))
            self.copies += 1
            if self.pending > QUEUE_DEPTH:
                self._take(next(copy for copy in self._queue if copy.taken is None))

    def mark(self) -> int:
        with self._used("mark"):
            return self._seen + len(self._queue)

    def wait(self, event: int) -> None:
        with self._used("wait"):
            for copy in islice(self._queue, max(0, event - self._seen)):
                self._take(copy)

    def follow(self, event: int) -> None:
        with self._used("follow"):
            count = max(0, event - self._seen)
            followed, self._queue = self._queue[:count], self._queue[count:]
            self._seen += count
            self.stalls += any(copy.taken is None for copy in followed)
            for copy in followed:
                ctypes.memmove(copy.target, self._take(copy), copy.size)

    def _take(self, copy: _Copy) -> bytes:
        if copy.taken is None:
            copy.taken = _bytes(copy.source, copy.size)
            if zlib.crc32(copy.taken) != copy.checksum:
                raise Refused("pinned memory was written to before a copy from it was made")
        return copy.taken

    def _used(self, call: str) -> threading.RLock:
        """To be entered for the call: it refuses what comes after `close`, and fails as it was told to."""
        with self._lock:
            if self._is_closed:
                raise Refused(f"{call} after close")
            self._calls[call] += 1
            failure = self._failures.pop((call, self._calls[call]), None)
            if failure is not None:
                raise failure
        return self._lock


def _kept(blocks: dict[int, mmap.mmap], size: int) -> int:
    block = mmap.mmap(-1, size)
    address = int(np.frombuffer(block, np.uint8).ctypes.data)
    _poison(address, size)
    blocks[address] = block
    return address


def _poison(address: int, size: int) -> None:
    ctypes.memset(address, POISON, size)


def _bytes(address: int, size: int) -> bytes:
    return ctypes.string_at(address, size)


def _inside(blocks: Mapping[int, mmap.mmap], address: int, size: int) -> int | None:
    """The block that so many bytes from the address lie in."""
    return next((s for s, block in blocks.items() if s <= address and address + size <= s + len(block)), None)


@dataclass(frozen=True, slots=True)
class PretendPlace(CpuPlace):
    """The processor as the place of the pretend accelerator. What a run shrinks is only its own session's arena."""

    @property
    def shares_arena(self) -> bool:
        return False
