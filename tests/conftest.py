"""What a test may need of the machine: without it the test is skipped with a reason, or fails where it was promised.

APPLIANCE_REQUIRE_MOSQUITTO, APPLIANCE_REQUIRE_TORCH, APPLIANCE_REQUIRE_SYSTEMD and APPLIANCE_REQUIRE_GPU promise it:
what is set and not 0 must be there.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import hypothesis
import pytest

# The same examples in every run; no time limit, since machines are noisy. To search further, on purpose:
# pytest --hypothesis-profile=search
hypothesis.settings.register_profile("steady", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("steady")


LONGEST_FIRST = (
    "test_service.py",
    "test_trial.py",
    "test_compile.py",
    "test_profiler.py",
    "test_cli.py",
    "test_export_torch.py",
    "test_bench.py",
    "test_properties.py",
    "test_faults_process.py",
    "test_records.py",
    "test_faults_broker.py",
    "test_faults_network.py",
    "test_profiler_search.py",
    "test_boards_service.py",
    "test_fairness.py",
    "test_door.py",
    "test_sessions.py",
    "test_mqtt.py",
    "test_faults_load.py",
    "test_task.py",
    "test_profile.py",
    "test_outbox.py",
    "test_systemd_unit.py",
    "test_profiler_measure.py",
    "test_store.py",
    "test_device_weights.py",
    "test_client.py",
)
"""Files of ten seconds and more, the longest first: one that is begun last has one worker while the others have nothing
left. Who is not told here comes after them."""


def pytest_configure(config: pytest.Config) -> None:
    """The order below, and not pytest-xdist's own by the number of tests, which begins files of few long ones last."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    turns = {name: turn for turn, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: turns.get(item.path.name, len(turns)))


@pytest.fixture(scope="module", autouse=True)
def shared_folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a module's tests shared goes with it unless one of them failed: pytest would keep it for the session."""
    home, failed = tmp_path_factory.getbasetemp(), request.session.testsfailed
    before = set(home.iterdir())
    yield
    if request.session.testsfailed == failed:
        for folder in set(home.iterdir()) - before:
            shutil.rmtree(folder, ignore_errors=True)


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
