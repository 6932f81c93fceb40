"""Events to a file and back: one JSON line each, with the monotonic second at which it was decided upon.

The first line holds what the controller was made of, so that a journal alone can be replayed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from pydantic import TypeAdapter, ValidationError

from appliance.core.graph import ExpertGraph
from appliance.core.types import (
    Arrived,
    Command,
    Device,
    Event,
    Executor,
    Expert,
    Finished,
    Heard,
    Loaded,
    LoadFailed,
    Overflow,
    Refusal,
    RunFailed,
    Tick,
)
from appliance.errors import ConfigError, RecordsError

log = logging.getLogger(__name__)

MAX_BYTES = 256 << 20  # then the journal ends; some 500,000 pictures
EVENTS: dict[str, type[Event]] = {
    kind.__name__: kind for kind in (Arrived, Loaded, LoadFailed, Finished, RunFailed, Command, Tick)
}


@dataclass(frozen=True, slots=True)
class Opening:
    """What the controller was made of."""

    version: str
    graph: ExpertGraph
    experts: tuple[Expert, ...]
    devices: tuple[Device, ...]
    executors: tuple[Executor, ...]
    unavailable: Mapping[str, Refusal]
    pinned: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    policy: str = "appliance"
    priorities: Mapping[str, int] = field(default_factory=dict)
    most_waiting: int | None = None
    overflow: Overflow = Overflow.BLOCK
    products: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    hold_share: float | None = None


class Journal:
    """Appends events to a fresh file, and gives up, once and for all, when the disk does not take them.

    Not a record to rely on after a crash: that is `records`.
    """

    def __init__(self, path: Path, opening: Opening) -> None:
        """Raises ConfigError when the file cannot be made."""
        self._path, self._left = path, MAX_BYTES
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: TextIO | None = path.open("w", encoding="utf-8", buffering=1 << 16)
        except OSError as error:
            why = error.strerror or error
            raise ConfigError(
                f"paths.journal {path} cannot be written: {why}", "choose another place, or none"
            ) from error
        self._write(_plain(opening))

    def note(self, heard: Heard) -> None:
        more = [True] if heard.more else []
        self._write([heard.seconds, type(heard.event).__name__, _plain(heard.event), *more])

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except OSError as error:
                log.error("journal incomplete path=%s why=%s", self._path, error.strerror)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, value: object) -> None:
        if self._file is None:
            return
        line = json.dumps(value, separators=(",", ":")) + "\n"
        self._left -= len(line)
        if self._left < 0:
            log.warning("journal full path=%s: it ends here", self._path)
            self.close()
            return
        try:
            self._file.write(line)
        except OSError:  # inspecting goes on without a journal; `close` says why
            self.close()


def read(path: Path) -> tuple[Opening, Iterator[Heard]]:
    """The opening and the events. Raises RecordsError naming the file and the line."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecordsError(f"{path} cannot be read: {error}", "set paths.journal and run the service") from error
    if not lines:
        raise RecordsError(f"{path} is empty", "stop the service first: it writes its journal as it goes")
    try:
        first = json.loads(lines[0])
    except ValueError as error:
        raise RecordsError(f"{path} line 1 is not a journal's opening", "it was not written by us") from error
    return _value(path, 1, TypeAdapter(Opening), first), _events(path, lines)


def _events(path: Path, lines: list[str]) -> Iterator[Heard]:
    adapters = {name: TypeAdapter[Event](kind) for name, kind in EVENTS.items()}
    for number, line in enumerate(lines[1:], 2):
        try:
            now, kind, value, *more = json.loads(line)
            adapter = adapters[kind]
        except (ValueError, KeyError) as error:
            if number == len(lines):  # the line that a kill cut short
                return
            raise RecordsError(f"{path} line {number} is not an event: {error}", "it was not written by us") from error
        yield Heard(float(now), _value(path, number, adapter, value), bool(more))


def _value(path: Path, number: int, adapter: TypeAdapter[Any], value: object) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first, *others = error.errors()
        where = ".".join(map(str, first["loc"]))
        why = f"{where}: {first['msg']}" + (f", and {len(others)} more" if others else "")
        raise RecordsError(f"{path} line {number}: {why}", "it was written by another version") from error


def _plain(value: object) -> object:
    assert is_dataclass(value)
    assert not isinstance(value, type)
    return asdict(value)
