"""What the machine is: cores, memory, instruction set, GPUs, and how much memory this process really holds."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pynvml

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_UNLIMITED = 1 << 60
"""Version 1 cgroups say "no limit" with a number near 2**63."""
_VECTOR_SETS = (
    ("amx", ("amx_tile", "amx_int8")),
    ("avx512bf16", ("avx512f", "avx512bw", "avx512_bf16")),
    ("avx512vnni", ("avx512f", "avx512bw", "avx512_vnni")),
    ("avx512", ("avx512f", "avx512bw")),
    ("avxvnni", ("avx2", "fma", "avx_vnni")),
    ("avx2", ("avx2", "fma")),
    ("avx", ("avx",)),
)
"""Best first. The block layout of compiled weights follows from it."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA device as its driver describes it."""

    index: int
    name: str
    memory_bytes: int
    free_bytes: int
    driver: str


def anonymous_bytes() -> int:
    """Memory of this process that no file backs: what it would take to run it without any page cache.

    RSS counts mapped files too and misleads both ways.
    """
    return _said_in("smaps_rollup", "Anonymous")


def counted_anonymous_bytes() -> int:
    """The same, as the kernel keeps count: off by some pages for each processor, and read in a hundredth of the time
    that walking all of the process's memory takes."""
    return _said_in("status", "RssAnon")


def _said_in(file: str, key: str) -> int:
    for line in Path("/proc/self", file).read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"the kernel's {file} has no line {key}")


def instruction_set() -> str:
    """A short name that is the same on boxes whose processors take the same compiled weights, such as `x86_64-avx2`."""
    return f"{platform.machine()}-{vector_set(_cpu_flags(Path('/proc/cpuinfo').read_text()))}"


def processor() -> str:
    """What it calls itself; its instruction set where it has no name, as on ARM."""
    return _said_of_cpu(Path("/proc/cpuinfo").read_text(), ("model name",)) or instruction_set()


def vector_set(flags: frozenset[str]) -> str:
    """The best of the vector extensions that ONNX Runtime's kernels tell apart, of a processor with these flags."""
    return next((name for name, needed in _VECTOR_SETS if flags.issuperset(needed)), "plain")


def cores(cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUP) -> int:
    """Whole processors that this process may use: its affinity, or less if a cgroup that it is in has a quota."""
    allowed = len(os.sched_getaffinity(0))
    quotas = [quota for folder in _groups(cgroups, own, "cpu") if (quota := _cpu_quota(folder)) is not None]
    return max(1, min([allowed, *(int(quota) for quota in quotas)]))


def memory_bytes(cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUP) -> int:
    """Main memory that this process may use: the box's, or less if a cgroup that it is in has a limit.

    systemd's MemoryMax= is one of them.
    """
    names = ("memory.max", "memory.limit_in_bytes")
    limits = [_number(folder / name) for folder in _groups(cgroups, own, "memory") for name in names]
    return min([int(psutil.virtual_memory().total), *(n for n in limits if n is not None and n < _UNLIMITED)])


def gpus() -> list[Gpu]:
    """The NVIDIA devices of this box; none without a driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        memories = [pynvml.nvmlDeviceGetMemoryInfo(h) for h in handles]
        return [
            Gpu(i, str(pynvml.nvmlDeviceGetName(h)), int(memory.total), int(memory.free), driver)
            for i, (h, memory) in enumerate(zip(handles, memories, strict=True))
        ]
    finally:
        pynvml.nvmlShutdown()


def _cpu_flags(cpuinfo: str) -> frozenset[str]:
    return frozenset(_said_of_cpu(cpuinfo, ("flags", "Features")).split())


def _said_of_cpu(cpuinfo: str, keys: Collection[str]) -> str:
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _groups(cgroups: Path, own: Path, controller: str) -> Iterator[Path]:
    """The folders of the groups that this process is in, each with those around it, of versions 2 and 1.

    A container may see its own group as the root, or name one that it does not see.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    for root, controllers in ((cgroups, ""), (cgroups / controller, controller)):
        path = next((line.split(":", 2)[2] for line in lines if controllers in line.split(":")[1].split(",")), "/")
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            yield root.joinpath(*parts[:depth])


def _cpu_quota(group: Path) -> float | None:
    """Processors' worth of time per period, if limited (cgroup version 2, then 1)."""
    try:
        limit, period = (group / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    quota, length = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    return quota / length if quota is not None and quota > 0 and length else None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


class MemoryWatch:
    """This process's anonymous memory: what it was before the first load, and the most it ever was when looked at."""

    def __init__(self) -> None:
        self.at_start_bytes = self.now_bytes = self._peak_bytes = 0

    def begin(self) -> None:
        self.at_start_bytes = anonymous_bytes()

    def look(self) -> None:
        """While the process may open no more files, what it held last stands: that must end nobody who serves."""
        with suppress(OSError):
            self.now_bytes = counted_anonymous_bytes()
        self._peak_bytes = max(self._peak_bytes, self.now_bytes)

    def numbers(self) -> dict[str, int]:
        return {
            "anonymous_bytes": self.now_bytes,
            "anonymous_peak_bytes": self._peak_bytes,
            "anonymous_at_start_bytes": self.at_start_bytes,
        }
