"""A site to measure on and to break: brokers of both kinds and the service, each a real child process on loopback."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol

from appliance.drivers.broker import Broker, answers, free_port
from appliance.errors import BrokerError

PICTURE_BYTES = 1_000_000
"""The largest picture that these sites take."""
WAIT_SECONDS = 60.0
STOP_SECONDS = 30.0
_POLL_SECONDS = 0.02

MOSQUITTO_SETTINGS = (
    "persistence true",
    "autosave_interval 1",
    "max_queued_messages 0",
    "set_tcp_nodelay true",
    "allow_anonymous true",
)


class SiteBroker(Protocol):
    """A broker of either kind. `start` again keeps port and files."""

    name: str
    port: int

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def kill(self) -> None:
        """SIGKILL."""


class Nats:
    """The embedded broker, as the service would run it, but of a life of its own."""

    name = "embedded"

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._broker = Broker(folder, self.port, picture_bytes=PICTURE_BYTES, ack_wait_seconds=5.0)

    def start(self) -> None:
        self._broker.start()

    def stop(self) -> None:
        self._broker.stop()

    def kill(self) -> None:
        if self._broker.is_alive and self._broker.pid is not None:
            os.kill(self._broker.pid, signal.SIGKILL)
        self._broker.stop()


class Mosquitto:
    """mosquitto with persistence: what a site has, and what PUBACK does not mean `on disk` for."""

    name = "mosquitto"

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Raises BrokerError when it does not come up."""
        self._folder.mkdir(parents=True, exist_ok=True)
        lines = [f"listener {self.port} 127.0.0.1", *MOSQUITTO_SETTINGS, f"persistence_location {self._folder}/"]
        if os.geteuid() == 0:
            lines.append("user root")  # else it becomes a user that cannot read this folder
        settings = self._folder / "mosquitto.conf"
        settings.write_text("\n".join(lines) + "\n", "utf-8")
        with (self._folder / "mosquitto.log").open("ab") as log:
            self._process = subprocess.Popen([find_mosquitto() or "mosquitto", "-c", settings], stdout=log, stderr=log)
        if not until(lambda: answers("127.0.0.1", self.port)):
            raise BrokerError(f"mosquitto does not answer on port {self.port}", f"see {self._folder}/mosquitto.log")

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(STOP_SECONDS)
            self._process = None


KINDS: Mapping[str, Callable[[Path], SiteBroker]] = {Nats.name: Nats, Mosquitto.name: Mosquitto}


def kinds_here(asked: str | None = None) -> list[str]:
    """The brokers of this machine, or the one that is asked for. Raises BrokerError for one that is not here."""
    there = [name for name in KINDS if name != Mosquitto.name or find_mosquitto() is not None]
    if asked is None:
        return there
    if asked not in there:
        raise BrokerError(f"there is no broker {asked} here", f"choose from {', '.join(there)}")
    return [asked]


def find_mosquitto() -> str | None:
    """Daemons lie in /usr/sbin, which is not on everyone's path."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/local/sbin:/usr/sbin")


@contextmanager
def running(broker: SiteBroker) -> Iterator[SiteBroker]:
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()


class Service:
    """The service of one box as a child process. `settings` are further lines of appliance.toml, after `[mqtt]`'s."""

    def __init__(self, folder: Path, catalog: Path, store: Path, port: int, settings: str = "") -> None:
        profile = Path(__file__).parents[2] / "profiles" / "default.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.state, self.config, self.log = folder / "state", folder / "appliance.toml", folder / "service.log"
        self.config.write_text(
            f"[paths]\ncatalog = '{catalog}'\nstate = 'state'\nstore = '{store}'\nprofile = '{profile}'\n"
            f"[mqtt]\nport = {port}\nkeepalive_seconds = 5\n{settings}",
            "utf-8",
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns at once."""
        command = [sys.executable, "-m", "appliance.cli", "serve", "--config", str(self.config)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> int:
        """In order, or else by force; the exit code."""
        assert self._process is not None
        self._process.terminate()
        try:
            return self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise BrokerError("the service did not end in time", f"see {self.log}") from None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait_online(self) -> None:
        """Raises BrokerError when it ends, or does not come up."""
        if not until(lambda: not self.is_running or "mqtt state=ready" in self.log.read_text("utf-8", "replace")):
            raise BrokerError("the service did not come up", f"see {self.log}")
        if not self.is_running:
            raise BrokerError("the service ended at its start", f"see {self.log}")

    def __enter__(self) -> Service:
        self.start()
        try:
            self.wait_online()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.is_running:
            self.kill() if kind else self.stop()


def until(condition: Callable[[], bool], seconds: float = WAIT_SECONDS) -> bool:
    """Whether the condition came true in time."""
    ends = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > ends:
            return False
        time.sleep(_POLL_SECONDS)
    return True
