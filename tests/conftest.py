"""What a test may need of the machine: without it the test is skipped with a reason, or fails where it was promised.

APPLIANCE_REQUIRE_MOSQUITTO, APPLIANCE_REQUIRE_TORCH, APPLIANCE_REQUIRE_SYSTEMD and APPLIANCE_REQUIRE_GPU promise it:
what is set and not 0 must be there.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import hypothesis
import pytest

# The same examples in every run; no time limit, since machines are noisy. To search further, on purpose:
# pytest --hypothesis-profile=search
hypothesis.settings.register_profile("steady", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("steady")


@dataclass(frozen=True, slots=True)
class Need:
    """What a marked test needs. `missing` says what is not there, or None; `promise` is its REQUIRE variable."""

    promise: str
    missing: Callable[[], str | None]


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers():
        if mark.name in NEEDS:
            decide(NEEDS[mark.name], os.environ)


def decide(need: Need, environment: Mapping[str, str]) -> None:
    """Return if what is needed is there. Raises pytest's Skipped, or Failed when it was promised."""
    missing = need.missing()
    if missing is None:
        return
    if environment.get(need.promise, "0") not in ("", "0"):
        pytest.fail(f"{missing}, but {need.promise} is set", pytrace=False)
    pytest.skip(missing)


def program(name: str) -> str | None:
    """Where a program is. Daemons lie in /usr/sbin, which is not on everyone's path."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/sbin")


def _missing_programs(*names: str) -> str | None:
    missing = [name for name in names if program(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def _missing_modules(*names: str) -> str | None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)} (extra `export`)" if missing else None


def _missing_gpu() -> str | None:
    try:
        started = ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        started = False
    return None if started else "no CUDA device"


NEEDS = {
    "mosquitto": Need(
        "APPLIANCE_REQUIRE_MOSQUITTO",
        lambda: _missing_programs("mosquitto", "mosquitto_pub", "mosquitto_rr", "openssl"),
    ),
    "export": Need("APPLIANCE_REQUIRE_TORCH", lambda: _missing_modules("torch", "onnxscript")),
    "systemd": Need("APPLIANCE_REQUIRE_SYSTEMD", lambda: _missing_programs("systemd-analyze")),
    "gpu": Need("APPLIANCE_REQUIRE_GPU", _missing_gpu),
}
