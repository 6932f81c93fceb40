"""A TCP proxy on loopback that does to a connection what a bad network does. It knows nothing of MQTT."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from enum import StrEnum
from types import TracebackType

_PIECE_BYTES = 65_536
_LARGE_BYTES = 1024
"""A piece of this size is full of a picture: a bit in its middle is no header's."""


class Weather(StrEnum):
    """What becomes of what is sent. Connections that are there feel it too."""

    FAIR = "fair"
    HOLE = "hole"
    """Nothing arrives while it lasts, and all of it afterwards: a short break that TCP repairs."""
    DEAF = "deaf"
    """Nothing arrives, ever, and nobody hangs up: a half-open connection."""
    CUT = "cut"
    """Half of the next piece arrives, then the connection ends."""
    REFUSED = "refused"
    """The other side's first answer arrives, then a reset."""
    NOISE = "noise"
    """One bit of every large piece is flipped."""


class Proxy:
    """Listens on `port` and passes on to `to_port`. Set `weather` and `bytes_per_second` at any time."""

    def __init__(self, to_port: int) -> None:
        self._to_port = to_port
        self.bytes_per_second: float | None = None
        self._weather = Weather.FAIR
        self._passing = threading.Event()
        self._passing.set()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self.connections = 0
        """Made so far."""
        self.held_bytes = 0
        """That wait for a hole to close."""
        self._thread = threading.Thread(target=self._serve, name="proxy", daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join()
        self.weather = Weather.FAIR
        self.reset()

    @property
    def weather(self) -> Weather:
        return self._weather

    @weather.setter
    def weather(self, weather: Weather) -> None:
        self._weather = weather
        self._passing.clear() if weather is Weather.HOLE else self._passing.set()

    def reset(self) -> None:
        """End every connection with a RST, both ways."""
        with self._lock:
            ending, self._open = self._open, set()
        for connection in ending:
            _reset(connection)

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._to_port), timeout=5.0)
            except OSError:
                _reset(near)
                continue
            self.connections += 1
            for connection in (near, far):
                connection.settimeout(None)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open |= {near, far}
            for source, to, is_answer in ((near, far, False), (far, near, True)):
                pump = threading.Thread(target=self._pump, args=(source, to, is_answer), name="proxy-pump", daemon=True)
                pump.start()

    def _pump(self, source: socket.socket, to: socket.socket, is_answer: bool) -> None:
        with contextlib.suppress(OSError):
            while (piece := source.recv(_PIECE_BYTES)) and self._pass_on(piece, to, is_answer):
                pass
        self._hang_up(source, to)

    def _pass_on(self, piece: bytes, to: socket.socket, is_answer: bool) -> bool:
        """False when this was the connection's last."""
        with self._lock:
            self.held_bytes += len(piece)
        self._passing.wait()
        with self._lock:
            self.held_bytes -= len(piece)
        match self._weather:
            case Weather.DEAF:
                return True
            case Weather.CUT:
                to.sendall(piece[: len(piece) // 2])
                return False
            case Weather.NOISE if len(piece) >= _LARGE_BYTES:
                piece = _flipped(piece)
        to.sendall(piece)
        if self._weather is Weather.REFUSED and is_answer:
            _reset(to)
            return False
        if self.bytes_per_second is not None:
            time.sleep(len(piece) / self.bytes_per_second)
        return True

    def _hang_up(self, *ends: socket.socket) -> None:
        with self._lock:
            self._open -= set(ends)
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def _flipped(piece: bytes) -> bytes:
    middle = len(piece) // 2
    return piece[:middle] + bytes([piece[middle] ^ 1]) + piece[middle + 1 :]


def _reset(connection: socket.socket) -> None:
    """Closing with nothing to linger for sends a RST. A pump that reads from it is woken first."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
    connection.close()
