"""The unit, its sandbox, the installer and what it installs, as far as one can see without a running systemd."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from appliance import config
from tests.kit_systemd import NotifySocket, can_filter, settings, under_unit

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "systemd"
UNIT = FOLDER / "appliance.service"
GPU = FOLDER / "gpu.conf"
CREDENTIALS = FOLDER / "credentials.conf"

needs_filter = pytest.mark.skipif(not can_filter(), reason="no libseccomp.so.2 on this machine")


@pytest.mark.systemd
@pytest.mark.parametrize(
    ("drop_ins", "most"), [([], 1.5), ([GPU], 2.0), ([CREDENTIALS], 1.5)], ids=["cpu", "gpu", "tls"]
)
def test_the_unit_is_valid_and_its_exposure_is_low(drop_ins: list[Path], most: float, tmp_path: Path) -> None:
    unit = _startable(tmp_path, drop_ins)
    verify = _run(["systemd-analyze", "verify", "--man=no", str(unit)])
    assert (verify.returncode, verify.stderr) == (0, "")
    security = _run(["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)])
    exposure = re.search(r"Overall exposure level.*: ([\d.]+)", security.stdout)
    assert exposure, security.stderr
    assert float(exposure[1]) <= most, security.stdout


@pytest.mark.systemd
def test_the_exposure_of_a_bare_unit_is_seen(tmp_path: Path) -> None:
    bare = tmp_path / "appliance.service"
    bare.write_text("[Service]\nExecStart=/bin/true\n")
    limit = ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=20", str(bare)]
    assert _run(limit).returncode != 0


@pytest.mark.systemd
def test_verify_sees_a_misspelt_line(tmp_path: Path) -> None:
    unit = _startable(tmp_path, [])
    unit.write_text(unit.read_text().replace("WatchdogSec=", "WatchdogSeconds="))
    assert "WatchdogSeconds" in _run(["systemd-analyze", "verify", "--man=no", str(unit)]).stderr


@pytest.mark.systemd
def test_the_user_of_the_unit_is_made(tmp_path: Path) -> None:
    if shutil.which("systemd-sysusers") is None:
        pytest.skip("not installed: systemd-sysusers")
    (tmp_path / "etc").mkdir()
    made = _run(["systemd-sysusers", f"--root={tmp_path}", str(FOLDER / "appliance.sysusers")])
    assert made.returncode == 0, made.stderr
    assert f"{settings(UNIT)['User'][0]}:" in (tmp_path / "etc" / "passwd").read_text()


def test_a_crash_loop_never_ends_the_service_for_good() -> None:
    unit = settings(UNIT)
    assert (unit["Restart"], unit["StartLimitIntervalSec"]) == (["always"], ["0"])


EXPERT = """
import os, resource, subprocess, sys
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy as np, onnx, onnxruntime
from onnx import TensorProto, helper, numpy_helper
weights = numpy_helper.from_array(np.ones((32, 3, 3, 3), np.float32), "w")
picture = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 3, 64, 64])
answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "expert", [picture], [answer], [weights])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
print(session.run(None, {"x": np.ones((4, 3, 64, 64), np.float32)})[0].max())
limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
print(subprocess.run(["echo", "child"], preexec_fn=limit, capture_output=True, text=True, check=True).stdout)
"""

FORBIDDEN = {
    "writable code": "import mmap; mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC)",
    "real-time priority": "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    "raw network": "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "another root": "import os; os.chroot('/')",
}


@pytest.mark.systemd
@needs_filter
def test_experts_and_limited_children_run_under_the_units_filters() -> None:
    ran = _run(under_unit(UNIT, [sys.executable, "-c", EXPERT]))
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.split() == ["27.0", "child"]


@pytest.mark.systemd
@needs_filter
@pytest.mark.parametrize("act", FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_the_units_filters_refuse(act: str) -> None:
    ran = _run(under_unit(UNIT, [sys.executable, "-c", act]))
    assert ran.returncode == 1
    assert re.search(r"PermissionError|Address family not supported", ran.stderr), ran.stderr


def test_the_example_configuration_is_valid_and_agrees_with_the_unit() -> None:
    example, unit = config.load(FOLDER / "appliance.toml"), settings(UNIT)
    assert example.paths.state == Path("/var/lib", unit["StateDirectory"][0])
    assert example.paths.store == Path("/var/cache", unit["CacheDirectory"][0])


def test_the_installed_unit_starts_something_that_is_there(tmp_path: Path) -> None:
    box = installed(tmp_path)
    unit = settings(box / "etc/systemd/system/appliance.service")
    program, *arguments = unit["ExecStart"][0].split()
    assert os.access(box / program.lstrip("/"), os.X_OK)
    assert (box / arguments[arguments.index("--config") + 1].lstrip("/")).is_file()
    assert (box / unit["Documentation"][0].removeprefix("file:///")).is_file()
    assert (box / "usr/local/bin/appliance").readlink() == Path(program)


def test_the_installed_configuration_names_installed_experts(tmp_path: Path) -> None:
    box = installed(tmp_path)
    paths = config.load(box / "etc/appliance/appliance.toml").paths
    for there, here in ((paths.catalog, ROOT / "models_onnx"), (paths.profile, ROOT / "profiles" / "default.json")):
        assert (box / str(there).lstrip("/")).exists() == (here.is_file() or (here / "graph.toml").exists())


def test_another_prefix_is_written_into_what_isinstalled(tmp_path: Path) -> None:
    box = installed(tmp_path, PREFIX="/usr/local/lib/appliance")
    unit = settings(box / "etc/systemd/system/appliance.service")
    assert unit["ExecStart"][0].startswith("/usr/local/lib/appliance/venv/bin/appliance ")
    assert "/opt/" not in (box / "etc/appliance/appliance.toml").read_text()
    assert (box / "usr/local/lib/appliance/venv/bin/appliance").exists()


@pytest.mark.parametrize("prefix", ["/", "//", "relative", "/a b", "/a|b"])
def test_a_prefix_that_cannot_be_is_refused(prefix: str, tmp_path: Path) -> None:
    refused = _install(tmp_path, PREFIX=prefix)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "PREFIX" in refused.stderr
    assert not (tmp_path / "box").exists()


def test_installing_again_keeps_what_the_operator_wrote(tmp_path: Path) -> None:
    box = installed(tmp_path)
    ours = _operators_files(box)
    for path in ours:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    before = _listing(box)
    installed(tmp_path)
    assert [path.read_text() for path in ours] == ["mine"] * len(ours)
    assert _listing(box) - before <= {"opt/appliance/models_onnx/graph.toml.new"}


def test_uninstalling_leaves_configuration_experts_and_state(tmp_path: Path) -> None:
    box = installed(tmp_path, "--gpu")
    venv = tmp_path / "venv"
    for path in _operators_files(box):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    assert _install(tmp_path, "--uninstall").returncode == 0
    left = {name.split("/appliance")[0] for name in _listing(box)}
    assert left == {"etc", "var/lib", "opt"}
    assert {path.name for path in (box / "opt/appliance").iterdir()} <= {"models_onnx", "profiles"}
    assert [path.read_text() for path in _operators_files(box)] == ["mine"] * 4
    assert (venv / "bin" / "appliance").exists(), "the environment that was only linked is not ours to remove"


def test_the_drop_in_for_gpus_is_installed_on_request_only(tmp_path: Path) -> None:
    drop_in = Path("etc/systemd/system/appliance.service.d/gpu.conf")
    assert not (installed(tmp_path / "cpu") / drop_in).exists()
    assert (installed(tmp_path / "gpu", "--gpu") / drop_in).exists()


def test_the_notify_socket_tells_what_it_was_told(tmp_path: Path) -> None:
    say = "import os, socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
    say += "for text in sys.argv[1:]: s.sendto(text.encode(), os.environ['NOTIFY_SOCKET'])"
    with NotifySocket(tmp_path) as systemd:
        told = ["STATUS=loading", "READY=1\nSTATUS=ready", "WATCHDOG=1"]
        subprocess.run([sys.executable, "-c", say, *told], env=systemd.environment(30), check=True)
        assert systemd.wait_for("READY=1", 5)
        assert systemd.wait_for("WATCHDOG=1", 5)
        assert not systemd.wait_for("WATCHDOG=1", 0.01)
        assert systemd.messages == told


def _startable(folder: Path, drop_ins: list[Path]) -> Path:
    """The unit with a program that is there, so that verify has nothing to say about this machine."""
    unit = folder / UNIT.name
    unit.write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text("utf-8")))
    for drop_in in drop_ins:
        (folder / f"{UNIT.name}.d").mkdir()
        shutil.copy(drop_in, folder / f"{UNIT.name}.d")
    return unit


def installed(folder: Path, *options: str, **variables: str) -> Path:
    """An installation below `folder`/box, from an environment that is there already."""
    folder.mkdir(exist_ok=True)
    program = folder / "venv" / "bin" / "appliance"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(f"#!{sys.executable}\nfrom appliance.cli import main\n\nmain()\n")
    program.chmod(0o755)
    done = _install(folder, f"--venv={folder / 'venv'}", *options, **variables)
    assert done.returncode == 0, done.stderr
    return folder / "box"


def _install(folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    words = [word for option in options for word in option.split("=", 1)]
    return _run(["sh", str(FOLDER / "install.sh"), *words], DESTDIR=str(folder / "box"), **variables)


def _operators_files(box: Path) -> list[Path]:
    return [
        box / "etc/appliance/appliance.toml",
        box / "var/lib/appliance/records.sqlite",
        box / "opt/appliance/models_onnx/graph.toml",
        box / "opt/appliance/profiles/mine.json",
    ]


def _listing(box: Path) -> set[str]:
    return {str(path.relative_to(box)) for path in box.rglob("*") if not path.is_dir()}


def _run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment: Mapping[str, str] = {**os.environ, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
