"""appliance.toml: what is wrong with it is said with file, line, key and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance import config as settings
from appliance.config import Config
from appliance.errors import ConfigError
from appliance.tls import Certificates


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    loaded = _load(tmp_path, "")
    assert loaded.box == Config().box
    assert loaded.memory.weights == 1_000_000_000


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    loaded = _load(tmp_path, "[paths]\nstate = 'state'\n[mqtt]\npassword_file = 'secret'\n")
    assert loaded.paths.state == tmp_path / "state"
    assert loaded.mqtt.password_file == tmp_path / "secret"


def test_sizes_may_be_words(tmp_path: Path) -> None:
    assert _load(tmp_path, "[memory]\nweights = '1.5 GiB'\n").memory.weights == 1_610_612_736


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[mqtt]\nport = 1883\nhsot = 'x'\n", r"line 3: mqtt.hsot: unknown key"),
        ("[mqttt]\n", r"line 1: mqttt: unknown key"),
        ("mqtt.prot = 1\n", r"line 1: mqtt.prot: unknown key"),
        ("[mqtt]\nport = 99999\n", r"line 2: mqtt.port: .*65535"),
        ("[mqtt]\nprotocol = '4'\n", r"line 2: mqtt.protocol: .*'auto'"),
        ("[box]\nname = 'a/b'\n", r"line 2: box.name: "),
        ("[box\n", r"is not TOML"),
        ("[lines.line1]\npriority = 10\n", r"line 2: lines.line1.priority: .*9"),
        ("[lines.'a/b']\npriority = 1\n", r"lines.a/b"),
        ("[limits]\nspool = 9\npicture_bytes = 5\n", r"limits: .*spool must take two pictures"),
        ("[limits]\noverflow = 'reject'\n", r"limits: .*here 160000000000 bytes, or it blocks"),
        ("[limits]\npicture_pixels = 'many'\n", r"line 2: limits.picture_pixels: .*integer"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        _load(tmp_path, text)
    assert str(tmp_path / "appliance.toml") in str(caught.value)


def test_a_line_has_a_priority(tmp_path: Path) -> None:
    loaded = _load(tmp_path, "[lines.line1]\npriority = 5\n[lines.line2]\n")
    assert loaded.priorities == {"line1": 5, "line2": 0}


def test_a_missing_file_says_how_to_name_another(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--config"):
        settings.load(tmp_path / "none.toml")


def test_the_password_is_the_first_line_and_never_printed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cret\nrest\n")
    loaded = _load(tmp_path, "[mqtt]\npassword_file = 'secret'\n")
    password = loaded.password()
    assert password is not None
    assert password.get_secret_value() == "s3cret"
    assert "s3cret" not in f"{loaded!r}{password!r}"


def test_files_of_the_broker_may_lie_among_systemds_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "[mqtt]\npassword_file = '$CREDENTIALS_DIRECTORY/mqtt-password'\nca_file = 'ca.crt'\n"
    (tmp_path / "mqtt-password").write_text("s3cret\n")
    with pytest.raises(ConfigError, match="no password"):
        _load(tmp_path, text).password()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    loaded = _load(tmp_path, text)
    assert loaded.password() is not None
    assert loaded.mqtt.certificates == Certificates(tmp_path / "ca.crt")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[mqtt]\nca_file = 'a'\nkey_file = 'k'\n", "certificate_file and key_file go together"),
        ("[mqtt]\ncertificate_file = 'c'\nkey_file = 'k'\n", "needs ca_file"),
        ("[mqtt]\nca_file = 'a'\n[broker]\nembedded = true\n", "the embedded broker speaks no TLS"),
    ],
)
def test_half_a_tls_link_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        _load(tmp_path, text)


def test_a_password_file_without_a_password_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("")
    with pytest.raises(ConfigError, match="no password"):
        _load(tmp_path, "[mqtt]\npassword_file = 'secret'\n").password()


@pytest.mark.parametrize(
    ("limits", "window"),
    [("picture_bytes = '1MB'", 64), ("picture_bytes = '4MB'", 16), ("", 4)],
)
def test_the_broker_sends_ahead_what_the_inbox_holds(tmp_path: Path, limits: str, window: int) -> None:
    assert _load(tmp_path, f"[limits]\n{limits}\n").receive_window == window
    assert _load(tmp_path, f"[mqtt]\nreceive_maximum = 2\n[limits]\n{limits}\n").receive_window == 2


def test_a_watchdog_meant_for_another_process_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    assert settings.watchdog_seconds() == 30.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert settings.watchdog_seconds() is None


def _load(folder: Path, text: str) -> Config:
    path = folder / "appliance.toml"
    path.write_text(text)
    return settings.load(path)
