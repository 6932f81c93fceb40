"""The session cache: one template session per architecture, one binding of weights per expert, lent out by lease.

It decides nothing about residency: it holds what the controller said is ready, and refuses to drop what is lent. What
has its own way on each device is asked of the place. An expert of the plain kind has a session of its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance import catalog
from appliance.drivers import runtime
from appliance.engine.arena import Arena
from appliance.engine.cancellation import Cancellation
from appliance.engine.place import Place, SegmentMemory
from appliance.errors import ApplianceError, Cancelled, DeviceError, ModelError, OutOfMemory, RunError, StoreError
from appliance.store.store import Compiled, TensorSlot

_FAILURES: tuple[type[Exception], ...] = (*runtime.ERRORS, MemoryError)
_SHORT_SECONDS = 0.02
_UNUSED_TEMPLATES = 16
"""Sessions kept although no expert of their architecture is active: 0.1 to 1.5 MB each, 2 to 10 ms to open again."""


@dataclass(slots=True)
class _Resident:
    """An expert with its bindings: those at rest, and how many are lent."""

    compiled: Compiled
    session: Any
    idle: list[Any] = field(default_factory=list)
    lent: int = 0
    values: dict[str, Any] = field(default_factory=dict)

    def close(self) -> None:
        """Let go in the order that the runtime wants: who reads the weights goes before what points at them.

        Whoever still holds this object, such as the traceback of a failed run, then holds nothing.
        """
        self.idle.clear()
        self.session = None
        self.values.clear()


class Lease:
    """One expert, lent to one thread."""

    def __init__(
        self, compiled: Compiled, session: Any, binding: Any, place: Place, arena: Arena, cancellation: Cancellation
    ) -> None:
        self.compiled = compiled
        self._session, self._binding = session, binding
        self._place, self._arena, self._cancellation = place, arena, cancellation

    def run(self, feeds: Mapping[str, NDArray[np.float32]], *, size: int = 0) -> dict[str, NDArray[Any]]:
        """Outputs by the portable graph's names; `feeds` has its input names, arrays of shape (N, C, H, W).

        A batch of less than `size` pictures is filled up to so many; nothing is answered for what fills it.
        Raises RunError that names the expert when a feed is missing or the runtime refuses or fails, OutOfMemory when
        the device has not enough for it, and Cancelled when nobody wants the run any more. Another run may follow all.
        """
        missing = [name for name in self.compiled.inputs if name not in feeds]
        if missing:
            raise RunError(f"{self.compiled.expert} was run without its input {missing[0]}")
        if self._session is None:
            raise RunError(f"{self.compiled.expert} was run after its lease had ended")
        self._cancellation.check(f"the run of {self.compiled.expert}")
        count = len(feeds[self.compiled.inputs[0]])
        size = max(size, count)
        kind = (self.compiled.architecture, size)
        size_bytes = self.compiled.activation_fixed_bytes + size * self.compiled.activation_item_bytes
        shrink, has_ended = self._arena.begin(kind, size_bytes), False
        try:
            outputs = self._run(feeds, size - count, self._options(size, shrink))
            has_ended = True
        except Cancelled:
            has_ended = True
            raise
        except OutOfMemory:
            self._arena.left_behind()
            raise
        finally:
            self._arena.end(kind, has_shrunk=shrink and has_ended)
            if shrink and has_ended:
                runtime.trim()
        return {name: output[:count] for name, output in zip(self.compiled.outputs, outputs, strict=True)}

    def end(self) -> None:
        """From now on it runs nothing: the weights that it would read may be gone."""
        self._session = self._binding = None

    def _options(self, size: int, shrink: bool) -> Any:
        """None for a run that is over before anybody could end it: what ending takes is a hundredth of 4 ms."""
        seconds = self.compiled.fixed_seconds + size * self.compiled.item_seconds
        return self._place.run_options(shrink=shrink) if shrink or seconds > _SHORT_SECONDS else None

    def _run(self, feeds: Mapping[str, NDArray[np.float32]], missing: int, options: Any) -> list[NDArray[Any]]:
        try:
            for number, name in enumerate(self.compiled.inputs):
                array = np.ascontiguousarray(feeds[name], np.float32)
                self._binding.bind_cpu_input(f"x{number}", _filled(array, missing))
            if options is None:
                self._session.run_with_iobinding(self._binding)
            else:
                with self._cancellation.ended_by(lambda: _terminate(options)):
                    self._session.run_with_iobinding(self._binding, options)
            found: list[NDArray[Any]] = self._binding.copy_outputs_to_cpu()
            return found
        except _FAILURES as error:
            error.__traceback__ = None  # the runtime's own frames would keep a dropped expert's session alive
            self._cancellation.check(f"the run of {self.compiled.expert}")
            raise _named(error, self.compiled, self._place, RunError, "failed") from error
        finally:
            _unbind(self._binding, self.compiled)


def _terminate(options: Any) -> None:
    """The runtime looks before each node. It stays said, so no two runs share their options."""
    options.terminate = True


def _filled(array: NDArray[np.float32], missing: int) -> NDArray[np.float32]:
    """The array (N, …) with so many rows more, each like its last.

    A real picture keeps the expert to the paths that it was measured on; an empty one may make it divide by nothing.
    """
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing else array


class Sessions:
    """The experts that can run now. Safe to use from several threads.

    `activation_bytes` bounds what the runtime keeps of past runs' activations for the next.
    """

    def __init__(self, weights: SegmentMemory, place: Place, *, activation_bytes: int) -> None:
        self._weights, self._place = weights, place
        self._lock = Lock()
        self._templates: dict[str, Future[Any]] = {}  # those out of use in the order in which they fell out of it
        self._users: Counter[str] = Counter()
        self._residents: dict[str, _Resident] = {}
        self._arena = Arena(activation_bytes, is_shared=place.shares_arena)

    def activate(self, compiled: Compiled) -> None:
        """Make an expert ready whose segments are in memory. Activating it again does nothing.

        Raises LoadError when a segment is not in memory, StoreError when the graph's file is damaged, ModelError when
        the runtime refuses it, OutOfMemory, DeviceError when the expert cannot be served on this device, RunError when
        another version of it is still active.
        """
        with self._lock:
            resident = self._residents.get(compiled.expert)
        if resident is not None:
            if resident.compiled != compiled:
                raise RunError(f"another version of {compiled.expert} is active", "drop that first")
            return
        # Bindings are bare addresses, so the weights must stay where they are until the expert is dropped.
        self._weights.hold(compiled.segments)
        fresh = _Resident(compiled, None)
        is_kept = False
        try:
            self._open(fresh)
            is_kept = self._keep(fresh)
        finally:
            if not is_kept:
                self._let_go(fresh)

    def drop(self, expert: str) -> None:
        """Forget an expert's bindings; only then may its segments be dropped. Raises RunError while it is lent."""
        with self._lock:
            resident = self._residents.get(expert)
            if resident is None:
                raise RunError(f"{expert} is not active")
            if resident.lent:
                raise RunError(f"{expert} is running", "drop it when its run has ended")
            del self._residents[expert]
        self._let_go(resident)

    @contextmanager
    def lease(self, expert: str, cancellation: Cancellation | None = None) -> Iterator[Lease]:
        """Within, the expert cannot be dropped. A second lease at the same time gets a binding of its own.

        Cancelling ends the run that goes on, and refuses others. Raises RunError when the expert is not active.
        """
        with self._lock:
            resident = self._residents.get(expert)
            if resident is None:
                raise RunError(f"{expert} is not active", "load it first")
            resident.lent += 1
            binding = resident.idle.pop() if resident.idle else None
        lease = None
        try:
            binding = binding or self._bound(resident.compiled, resident.session)
            lease = Lease(
                resident.compiled, resident.session, binding, self._place, self._arena, cancellation or Cancellation()
            )
            yield lease
        finally:
            if lease is not None:
                lease.end()
            with self._lock:
                if binding is not None:
                    resident.idle.append(binding)
                binding = None  # a binding that a traceback keeps alive keeps its session, too
                resident.lent -= 1

    def _keep(self, fresh: _Resident) -> bool:
        """Whether it is now the expert's residency; not if another thread was first."""
        with self._lock:
            return self._residents.setdefault(fresh.compiled.expert, fresh) is fresh

    def _open(self, fresh: _Resident) -> None:
        """Give it its session, and a first binding. Whatever fails, `_let_go` undoes it."""
        compiled = fresh.compiled
        if compiled.plain_path is None:
            fresh.session = self._template(compiled)
        else:
            fresh.values = self._values(compiled)
            fresh.session = _open_plain(compiled, compiled.plain_path, self._place, fresh.values)
        fresh.idle.append(self._bound(compiled, fresh.session))

    def _template(self, compiled: Compiled) -> Any:
        """The architecture's session, with one user more; whoever asks first creates it and the others wait."""
        with self._lock:
            self._users[compiled.architecture] += 1
            promised = self._templates.get(compiled.architecture)
            is_mine = promised is None
            if promised is None:
                promised = self._templates[compiled.architecture] = Future()
        if is_mine:
            try:
                promised.set_result(_open_template(compiled, self._place))
            except ApplianceError as error:
                promised.set_exception(error)
            finally:
                # Without effect on a settled promise; an unexpected error must not leave the others waiting for ever.
                promised.cancel()
                if promised.cancelled() or promised.exception() is not None:
                    with self._lock:
                        del self._templates[compiled.architecture]
        return promised.result()

    def _let_go(self, resident: _Resident) -> None:
        """The reverse of `hold` and `_open`; templates out of use are closed, in the end or if they hold too much."""
        compiled = resident.compiled
        resident.close()
        self._weights.release(compiled.segments)
        if compiled.plain_path is not None:
            self._arena.left_behind()
            return
        with self._lock:
            self._users[compiled.architecture] -= 1
            promised = self._templates.pop(compiled.architecture, None)
            if promised is not None:
                self._templates[compiled.architecture] = promised
            unused = [architecture for architecture in self._templates if not self._users[architecture]]
            long_unused = unused[:-_UNUSED_TEMPLATES]
            for architecture in unused:
                if architecture in long_unused or self._arena.is_due(architecture):
                    del self._templates[architecture], self._users[architecture]
                    self._arena.closed(architecture)

    def _bound(self, compiled: Compiled, session: Any) -> Any:
        """A binding of every weight to its place in memory. It owns none of it: what is resident is held."""
        with _named_errors(compiled, self._place, "cannot be bound to its weights"):
            binding = session.io_binding()
            if compiled.plain_path is None:
                for slot, address in self._addresses(compiled):
                    binding.bind_input(slot.name, *self._place.device, np.dtype(slot.dtype), slot.shape, address)
            _bind_outputs(binding, compiled)
            return binding

    def _values(self, compiled: Compiled) -> dict[str, Any]:
        """Every weight as an OrtValue that points to its place in memory, and owns as little of it as a binding."""
        kind, _ = self._place.device
        if kind != "cpu":
            raise DeviceError(f"{compiled.expert} cannot be served on {kind}: it needs a session of its own")
        with _named_errors(compiled, self._place, "cannot be bound to its weights"):
            return {
                slot.name: runtime.value_at(address, np.dtype(slot.dtype), slot.shape)
                for slot, address in self._addresses(compiled)
            }

    def _addresses(self, compiled: Compiled) -> Iterator[tuple[TensorSlot, int]]:
        starts = [self._weights.address(segment.id) for segment in compiled.segments]
        for slot in compiled.tensors:
            _check_inside(slot, compiled)
            yield slot, starts[slot.segment] + slot.offset


def _check_inside(slot: TensorSlot, compiled: Compiled) -> None:
    """The runtime would read whatever lies at the address, so a wrong offset must be found here."""
    end = slot.offset + math.prod(slot.shape) * np.dtype(slot.dtype).itemsize
    if slot.offset < 0 or end > compiled.segments[slot.segment].bytes:
        raise StoreError(f"{compiled.expert}: {slot.name} lies outside its segment", "compile the expert again")


def _bind_outputs(binding: Any, compiled: Compiled) -> None:
    for number in range(len(compiled.outputs)):
        binding.bind_output(f"y{number}", "cpu")


def _unbind(binding: Any, compiled: Compiled) -> None:
    """A kept binding would hold its last pictures and results, for every resident expert, until its next run."""
    for number in range(len(compiled.inputs)):
        binding.bind_cpu_input(f"x{number}", _NOTHING)
    binding.clear_binding_outputs()
    _bind_outputs(binding, compiled)


_NOTHING = np.zeros((0, 1, 1, 1), np.float32)


def _open_template(compiled: Compiled, place: Place) -> Any:
    with _named_errors(compiled, place, "is refused by the runtime as a template"):
        _check_digest(compiled.template_path, compiled.architecture)
        return place.open_template(compiled.template_path)


def _open_plain(compiled: Compiled, path: Path, place: Place, values: Mapping[str, Any]) -> Any:
    with _named_errors(compiled, place, "is refused by the runtime as a plain session"):
        _check_digest(path, path.stem.removeprefix("plain-"))
        return place.open_plain(path, values)


def _check_digest(path: Path, expected: str) -> None:
    try:
        found = catalog.sha256_of(path)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}", "restart: it is compiled again") from error
    if found != expected:
        raise StoreError(f"{path} is damaged", "restart: it is put away and compiled again")


@contextmanager
def _named_errors(compiled: Compiled, place: Place, what: str) -> Iterator[None]:
    """What the runtime raises becomes ModelError or OutOfMemory with the expert's name."""
    try:
        yield
    except _FAILURES as error:
        raise _named(error, compiled, place, ModelError, what) from error


def _named(
    error: Exception, compiled: Compiled, place: Place, kind: Callable[[str], ApplianceError], what: str
) -> ApplianceError:
    said = f": {str(error)[:400]}" if str(error) else ""
    if runtime.says_out_of_memory(error):
        device = "{}:{}".format(*place.device)
        return OutOfMemory(
            f"{compiled.expert} needs more memory than {device} has{said}",
            "lower memory.weights, or the expert's max_batch",
        )
    return kind(f"{compiled.expert} {what}{said}")
