"""Commands as people and machines call them: real processes, exit codes, one line for every error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kit_box import Box, picture, write_catalog
from tests.kit_ports import deaf_port

COMMANDS = ("serve", "check", "export", "publish", "simulate", "explain", "demo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A box that published three pictures of its own, keeps every part's that passed, and stopped."""
    home = tmp_path_factory.mktemp("cli")
    for number in range(3):
        (home / f"{number}.png").write_bytes(picture(number))
    (home / "broken.png").write_bytes(picture(9)[:-300])
    with Box(home / "box", write_catalog(home / "catalog", 2), settings="[keep]\nmargin = 1.0\n") as box:
        pictures = [str(home / f"{number}.png") for number in range(3)]
        common = ["--port", str(box.port), "--part"]
        (home / "published").write_text(_run("publish", *pictures, *common, "c-e0", "--json").stdout)
        (home / "shown").write_text(_run("publish", str(home / "broken.png"), *common, "c-e1").stdout)
        refused = _run("publish", pictures[0], *common, "ghost")
        (home / "refused").write_text(f"{refused.stdout}exit code {refused.returncode}")
    return home


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    shown = _run(command, "--help")
    assert shown.returncode == 0
    assert "--json" in shown.stdout


def test_publishing_waits_for_every_verdict(folder: Path) -> None:
    found: dict[str, Any] = json.loads((folder / "published").read_text())
    assert (found["pictures"], found["verdicts"], found["unanswered"]) == (3, 3, [])
    assert {answer["body"]["outcome"] for answer in found["answers"]} <= {"pass", "fail"}


def test_a_damaged_and_an_unknown_picture_are_shown_with_their_reason(folder: Path) -> None:
    assert "picture-damaged" in (folder / "shown").read_text()
    assert "unknown-component" in (folder / "refused").read_text()
    assert (folder / "refused").read_text().endswith("exit code 1")


def test_what_was_decided_is_listed_shown_and_exported(folder: Path, tmp_path: Path) -> None:
    config = ["--config", str(folder / "box" / "appliance.toml")]
    listed = json.loads(_run("records", "list", "--part", "c-e0", "--json", *config).stdout)["records"]
    assert len(listed) == 3
    (damaged,) = json.loads(_run("records", "list", "--outcome", "error", "--json", *config).stdout)["records"]
    assert (damaged["reason"], damaged["has_picture"]) == ("picture-damaged", True)
    (step,) = json.loads(_run("records", "show", listed[0]["request_id"][:12], "--json", *config).stdout)["steps"]
    assert (step["device"], len(step["weights_sha256"])) == ("cpu", 64)
    assert "picture-damaged" in _run("records", "show", damaged["request_id"], *config).stdout
    assert _run("records", "export", str(tmp_path / "all.csv"), "--csv", *config).returncode == 0
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 1 + 4
    assert len(_run("records", "export", "--outcome", "error", *config).stdout.splitlines()) == 1
    _fails(_run("records", "show", "nothing", *config), "there is no verdict of nothing")


def test_a_kept_picture_is_written_as_an_image(folder: Path, tmp_path: Path) -> None:
    config = ["--config", str(folder / "box" / "appliance.toml")]
    kept = [
        record["request_id"]
        for record in json.loads(_run("records", "list", "--json", *config).stdout)["records"]
        if record["has_picture"] and record["outcome"] != "error"
    ]
    for request in kept:
        assert _run("records", "show", request, "--image", str(tmp_path / "out.png"), *config).returncode == 0
        assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert kept


def test_publishing_to_no_broker_is_one_line(folder: Path) -> None:
    with deaf_port() as port:
        published = _run("publish", str(folder / "0.png"), "--part", "c-e0", "--port", str(port))
    _fails(published, f"no broker at 127.0.0.1:{port}")


def test_publishing_with_files_of_tls_that_are_not_there_is_one_line(folder: Path) -> None:
    published = ["publish", str(folder / "0.png"), "--part", "c-e0"]
    _fails(_run(*published, "--ca-file", "gone.crt"), "ca_file gone.crt cannot be read: No such file or directory")
    assert _run(*published, "--key-file", "line1.key").returncode == 2


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe"])
def test_a_password_file_without_a_password_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)
    published = _run("publish", "a.png", "--part", "R1", "--password-file", str(path))
    _fails(published, f"--password-file {path} has no password (put it on the first line)")


def test_a_check_says_what_serves(folder: Path) -> None:
    config = str(folder / "box" / "appliance.toml")
    found = json.loads(_run("check", "--config", config, "--json").stdout)
    assert (found["experts"], found["unavailable"]) == (2, {})
    assert json.loads(_run("check", "--config", config, "--json", "--prune").stdout)["freed_bytes"] == 0
    assert "Everything in the catalogue can serve" in _run("check", "--config", config).stdout


def test_a_budget_beyond_the_machines_memory_is_said(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "appliance.toml"
    text = (folder / "box" / "appliance.toml").read_text().replace("'state'", f"'{tmp_path}'")
    config.write_text(
        text.replace("store = 'store'", f"store = '{folder / 'box' / 'store'}'") + "[memory]\nweights = '99 PB'\n"
    )
    assert "there is memory for" in _run("check", "--config", str(config)).stdout


def test_a_check_fails_when_an_expert_cannot_serve(tmp_path: Path) -> None:
    box = Box(tmp_path / "box", write_catalog(tmp_path / "catalog", 2))
    (tmp_path / "catalog" / "e1" / "1" / "model.onnx").write_bytes(b"other")
    checked = _run("check", "--config", str(box.config), "--json")
    assert checked.returncode == 1
    assert json.loads(checked.stdout)["unavailable"]["e1"]["reason"] == "digest-mismatch"


def test_a_misspelt_setting_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "appliance.toml"
    path.write_text("[memory]\nwieghts = 1\n")
    _fails(_run("check", "--config", str(path)), "line 2: memory.wieghts: unknown key")


def test_a_stopped_boxs_journal_is_simulated(folder: Path) -> None:
    journal = str(folder / "box" / "journal.jsonl")
    found = json.loads(_run("simulate", journal, "--json").stdout)
    assert found["requests"] == 4
    assert found["loads"] == 2
    assert "images per second" in _run("simulate", journal, "--predict").stdout


def test_a_stopped_boxs_journal_is_explained(folder: Path) -> None:
    journal = str(folder / "box" / "journal.jsonl")
    found = json.loads(_run("explain", journal, "--json").stdout)
    assert found["requests"] == 4
    slowest = found["slowest"][0]
    told = json.loads(_run("explain", journal, slowest["request"][:20], "--json").stdout)["request"]
    assert told["outcome"] == slowest["outcome"]
    assert sum(told["waits"].values()) == pytest.approx(told["waited_seconds"], abs=1e-6)
    assert len(json.loads(_run("explain", journal, "--minute", "0", "--json").stdout)["span"]["loads"]) == 2
    assert "resident on cpu" in _run("explain", journal, "--at", "0").stdout
    _fails(_run("explain", journal, "nobody"), "has no request nobody")
    assert _run("explain", journal, "x", "--at", "1").returncode == 2


def test_a_task_of_the_paper_is_simulated() -> None:
    found = json.loads(_run("simulate", "--device", "uma", "--task", "A1", "--policy", "coserve", "--json").stdout)
    assert (found["policy"], found["device"], found["task"]) == ("coserve", "uma", "A1")
    assert found["switches_per_executor"] == found["switches_total"] / 4
    _fails(_run("simulate", "--task", "C3"), "there is no task C3 (choose one of A1, A2, B1, B2)")


@pytest.mark.parametrize(
    ("arguments", "option", "says"),
    [
        (("j", "--policy", "coserve"), "--policy", "add --predict"),
        (("j", "--predict", "--loader", "paper"), "--loader", "it goes with --task"),
        (("j", "--predict", "--gap", "1"), "--gap", "it goes with --task"),
        (("j", "--due", "1"), "--due", "it goes with --task"),
        (("j", "--boards", "2"), "--boards", "it goes with --task"),
        (("j", "--device", "numa"), "--device", "it goes with --task"),
        (("--paper-table", "--task", "A1"), "--task", "the table has all machines, tasks and policies"),
        (("--task", "A1", "--predict"), "--predict", "it goes with a journal"),
    ],
)
def test_an_option_of_simulate_that_would_change_nothing_is_refused(
    arguments: tuple[str, ...], option: str, says: str
) -> None:
    ran = _run("simulate", *arguments)
    assert ran.returncode == 2
    said = " ".join(ran.stderr.replace("│", " ").split())
    assert f"Invalid value for {option}: " in said
    assert says in said


def test_simulating_what_is_no_journal_is_one_line(folder: Path) -> None:
    _fails(_run("simulate", str(folder / "0.png")), "0.png cannot be read")


def test_a_demo_without_products_says_what_it_needs(folder: Path, tmp_path: Path) -> None:
    options = ["--catalog", str(folder / "catalog"), "--folder", str(tmp_path)]
    _fails(_run("demo", *options), "has no product with a sample")


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "appliance.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL)


def _fails(ran: subprocess.CompletedProcess[str], says: str) -> None:
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()
    assert line.startswith("appliance: ")
    assert says in line
