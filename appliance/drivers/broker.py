"""The embedded broker: nats-server, with its MQTT listener and its store on disk, as a child process.

It is for the demo, the tests and a box without a site broker. It knows nothing of topics or pictures; it answers
PUBACK only when a message is on disk (`sync_interval: always`), and it never outlives the process that started it.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from appliance.config import Config
from appliance.errors import BrokerError

log = logging.getLogger(__name__)

ACK_WAIT_SECONDS = 30.0
"""An unacknowledged picture is delivered again after this long: longer than any commit to the spool takes."""

HEADROOM_BYTES = 65_536
PAYLOAD_LIMIT_BYTES = 64 * 1024 * 1024
"""nats-server refuses a larger max_payload."""

START_SECONDS = 15.0
STOP_SECONDS = 10.0
_PORTS = range(20_000, 32_000)
"""Beneath those that Linux gives to outgoing connections."""
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)  # loaded here: after fork only async-signal-safe work is allowed


class Broker:
    """nats-server as a child process, listening for MQTT 3.1.1 on `host:port`, its files below `folder`.

    Start it from a thread that lives as long as it should: the kernel ends the child when that thread ends.
    """

    def __init__(
        self,
        folder: Path,
        port: int,
        *,
        host: str = "127.0.0.1",
        picture_bytes: int,
        max_ack_pending: int = 64,
        ack_wait_seconds: float = ACK_WAIT_SECONDS,
        username: str | None = None,
        password: str | None = None,
    ) -> None:
        """`picture_bytes` is the largest payload; `max_ack_pending` the pictures sent ahead of acknowledgement."""
        self.folder, self.host, self.port = folder, host, port
        self._picture_bytes, self._max_ack_pending = picture_bytes, max_ack_pending
        self._ack_wait_seconds = ack_wait_seconds
        self._username, self._password = username, password
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def embedded(cls, config: Config) -> Broker:
        """That of a box with these settings."""
        password = config.password()
        return cls(
            config.broker_folder,
            config.mqtt.port,
            host=config.mqtt.host,
            picture_bytes=int(config.limits.picture_bytes),
            max_ack_pending=config.receive_window,
            username=config.mqtt.username,
            password=password.get_secret_value() if password else None,
        )

    def start(self) -> None:
        """Start and wait until MQTT answers.

        Raises BrokerError: no nats-server, the port is in use, the folder cannot be written, or it does not come up.
        """
        if self.is_alive:
            raise BrokerError(f"the embedded broker already runs on port {self.port}", "stop it first")
        binary = find_server()
        _refuse_used_port(self.host, self.port)
        configuration = self._write_configuration()
        with (self.folder / "nats-server.out").open("wb") as output:
            self._process = subprocess.Popen(
                [binary, "-c", str(configuration)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent,
            )
        try:
            self._await_answer(time.monotonic() + START_SECONDS)
        except BaseException:
            self.stop()
            raise
        log.info("broker started pid=%d host=%s port=%d", self._process.pid, self.host, self.port)

    def stop(self) -> None:
        """End the child: politely, then not. Nothing happens when it has ended already."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def __enter__(self) -> Broker:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The child's process id while it is known, also after it died by itself."""
        return self._process.pid if self._process else None

    def _write_configuration(self) -> Path:
        path = self.folder / "nats-server.conf"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(self._configuration())
        except OSError as error:
            raise BrokerError(
                f"the broker's folder {self.folder} cannot be written: {error.strerror}", "make it writable"
            ) from error
        return path

    def _configuration(self) -> str:
        max_payload = self._picture_bytes + HEADROOM_BYTES
        if max_payload > PAYLOAD_LIMIT_BYTES:
            raise BrokerError(
                f"pictures of {self._picture_bytes} bytes are too large for nats-server",
                f"set limits.picture_bytes to {PAYLOAD_LIMIT_BYTES - HEADROOM_BYTES} or less, or use a site broker",
            )
        settings = {
            "server_name": "appliance",
            "host": "127.0.0.1",  # the NATS listener, which nobody uses and nobody outside shall reach
            "port": -1,
            "max_payload": max_payload,
            "max_pending": max(64 * 1024 * 1024, 4 * max_payload),
            "log_file": str((self.folder / "nats-server.log").resolve()),
            "logfile_size_limit": 4 * 1024 * 1024,
            "logfile_max_num": 3,
            "jetstream": {"store_dir": str(self.folder.resolve()), "sync_interval": "always"},
            "mqtt": {
                "host": self.host,
                "port": self.port,
                "ack_wait": f"{self._ack_wait_seconds}s",
                "max_ack_pending": self._max_ack_pending,
            },
        }
        if self._username is not None:
            settings["authorization"] = {"user": self._username, "password": self._password or ""}
        return json.dumps(settings, indent=2) + "\n"  # its configuration language is a superset of JSON

    def _await_answer(self, until: float) -> None:
        while time.monotonic() < until:
            assert self._process is not None
            if (code := self._process.poll()) is not None:
                raise BrokerError(f"nats-server ended with code {code}: {self._last_words()}", f"see {self.folder}")
            if answers(self.host, self.port, self._username, self._password):
                return
            time.sleep(0.02)
        raise BrokerError(
            f"nats-server did not answer on port {self.port} within {START_SECONDS:.0f} s: {self._last_words()}",
            f"see {self.folder}",
        )

    def _last_words(self) -> str:
        lines: list[str] = []
        for name in ("nats-server.out", "nats-server.log"):
            path = self.folder / name
            if path.exists():
                lines += path.read_text("utf-8", "replace").splitlines()
        worst = [line for line in lines if "[FTL]" in line or "[ERR]" in line or line.startswith("nats-server:")]
        return (worst or lines or ["it said nothing"])[-1]


def find_server() -> str:
    """The nats-server binary: beside this Python, else on the path. Raises BrokerError with what to install."""
    beside = Path(sys.executable).parent / "nats-server"
    if beside.is_file():
        return str(beside)
    if (found := shutil.which("nats-server")) is not None:
        return found
    raise BrokerError("nats-server is not installed", "pip install coe-appliance[broker]")


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on just now, and that no outgoing connection is given before somebody does."""
    while True:
        port = random.choice(_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((host, port))
            return port


def answers(host: str, port: int, username: str | None = None, password: str | None = None) -> bool:
    """Whether an MQTT broker takes a CONNECT there, within a second."""
    fields = [b"appliance-probe"]
    flags = 0x02
    if username is not None:
        fields += [username.encode(), (password or "").encode()]
        flags |= 0xC0
    packet = struct.pack("!H4sBBH", 4, b"MQTT", 4, flags, 10)
    packet += b"".join(struct.pack("!H", len(field)) + field for field in fields)
    try:
        with socket.create_connection((host, port), timeout=1.0) as connection:
            connection.sendall(bytes((0x10, len(packet))) + packet)
            return connection.recv(4) == b"\x20\x02\x00\x00"
    except OSError:
        return False


def _refuse_used_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise BrokerError(
                f"port {port} on {host} cannot be used: {error.strerror}",
                "set mqtt.port to a free one, or use the broker that is there with broker.embedded = false",
            ) from error


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
