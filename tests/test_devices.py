from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np
import psutil
import pytest

from appliance.drivers import devices
from tests.kit_process import alone


def test_anonymous_memory_grows_with_what_is_written_and_not_with_what_is_only_reserved() -> None:
    alone(write_and_reserve)


def write_and_reserve() -> None:
    size = 64 << 20
    before = devices.anonymous_bytes()
    written = np.ones(size, np.uint8)
    between = devices.anonymous_bytes()
    reserved = np.zeros(size, np.uint8)
    after = devices.anonymous_bytes()
    assert between - before == pytest.approx(size, abs=4 << 20)
    assert after - between < 8 << 20
    assert devices.counted_anonymous_bytes() == pytest.approx(after, abs=4 << 20)
    assert written.size == reserved.size


def test_what_a_file_backs_is_not_anonymous(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(64 << 20))
    alone(read_mapped, path)


def read_mapped(path: Path) -> None:
    before = devices.anonymous_bytes()
    mapped = np.memmap(path, np.uint8, "r")
    assert int(mapped.sum()) == 0
    assert devices.anonymous_bytes() - before < 8 << 20


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("sse sse2", "plain"),
        ("sse avx", "avx"),
        ("avx avx2 fma", "avx2"),
        ("avx avx2", "avx"),
        ("avx avx2 fma avx_vnni", "avxvnni"),
        ("avx avx2 fma avx512f avx512bw", "avx512"),
        ("avx avx2 fma avx512f avx512bw avx512_vnni avx_vnni", "avx512vnni"),
    ],
)
def test_processors_that_take_the_same_weights_have_the_same_name(flags: str, name: str) -> None:
    assert devices.vector_set(frozenset(flags.split())) == name


def test_the_instruction_set_is_fit_for_a_folder_name_and_always_the_same() -> None:
    assert devices.instruction_set().startswith(platform.machine() + "-")
    assert "/" not in devices.instruction_set()
    assert devices.instruction_set() == devices.instruction_set()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, len(os.sched_getaffinity(0))),
        ({"cpu.max": "max 100000"}, len(os.sched_getaffinity(0))),
        ({"cpu.max": "150000 100000"}, 1),
        ({"cpu.max": "20000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, len(os.sched_getaffinity(0))),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"system.slice/cpu.max": "100000 100000"}, 1),
    ],
)
def test_a_quota_of_the_cgroup_lowers_the_cores(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    write(tmp_path, files)
    assert devices.cores(tmp_path, _inside(tmp_path)) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, psutil.virtual_memory().total),
        ({"memory.max": "max"}, psutil.virtual_memory().total),
        ({"memory.max": "450000000"}, 450_000_000),
        ({"memory/memory.limit_in_bytes": "450000000"}, 450_000_000),
        ({"memory/memory.limit_in_bytes": "9223372036854771712"}, psutil.virtual_memory().total),
        ({"system.slice/coe.service/memory.max": "450000000"}, 450_000_000),
        ({"system.slice/memory.max": "300000000", "system.slice/coe.service/memory.max": "450000000"}, 300_000_000),
        ({"memory/box/memory.limit_in_bytes": "450000000"}, 450_000_000),
        ({"system.slice/other.service/memory.max": "450000000"}, psutil.virtual_memory().total),
    ],
)
def test_a_limit_of_the_cgroup_lowers_the_memory(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    write(tmp_path, files)
    assert devices.memory_bytes(tmp_path, _inside(tmp_path)) == expected


def test_a_process_whose_groups_cannot_be_read_has_the_limits_of_the_root(tmp_path: Path) -> None:
    write(tmp_path, {"memory.max": "450000000"})
    assert devices.memory_bytes(tmp_path, tmp_path / "missing") == 450_000_000


def _inside(folder: Path) -> Path:
    """What the kernel says of a process in a service's group, of version 2 and of version 1."""
    path = folder / "own"
    path.write_text("4:memory:/box\n3:cpu,cpuacct:/\n0::/system.slice/coe.service\n")
    return path


def test_gpus_are_named_with_their_memory_and_a_box_without_a_driver_has_none() -> None:
    found = devices.gpus()
    assert all(gpu.memory_bytes > 0 and gpu.name for gpu in found)
    assert found or not Path("/dev/nvidia0").exists()


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
