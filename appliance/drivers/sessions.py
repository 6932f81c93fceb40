"""The session cache: one template session per architecture, one binding of weights per expert, lent out by lease.

It decides nothing about residency: it holds what the controller said is ready, and refuses to drop what is lent.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance import catalog
from appliance.drivers import runtime
from appliance.drivers.place import Place, SegmentMemory
from appliance.drivers.store import Compiled, TensorSlot
from appliance.errors import ModelError, RunError, StoreError

_SHRINK_EVERY = 32
"""Runs after which the shared arena gives back what it gathered. Every run would cost a small net a tenth of its time;
never would let pieces of all sizes pile up over months."""

_UNUSED_TEMPLATES = 16
"""Sessions kept although no expert of their architecture is active: 0.1 to 1.5 MB each, 2 to 10 ms to open again."""


@dataclass(slots=True)
class _Resident:
    """An expert with its bindings: those at rest, and how many are lent."""

    compiled: Compiled
    session: Any
    idle: list[Any] = field(default_factory=list)
    lent: int = 0


class Lease:
    """One expert, lent to one thread."""

    def __init__(
        self, compiled: Compiled, session: Any, binding: Any, place: Place, shrinks_next: Callable[[], bool]
    ) -> None:
        self._compiled, self._session, self._binding = compiled, session, binding
        self._place, self._shrinks_next = place, shrinks_next

    def run(self, feeds: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[Any]]:
        """Outputs by the portable graph's names; `feeds` has its input names, arrays of shape (N, C, H, W).

        Raises RunError that names the expert when a feed is missing or the runtime refuses or fails.
        """
        missing = [name for name in self._compiled.inputs if name not in feeds]
        if missing:
            raise RunError(f"{self._compiled.expert} was run without its input {missing[0]}")
        shrink = self._shrinks_next()
        try:
            for number, name in enumerate(self._compiled.inputs):
                array = np.ascontiguousarray(feeds[name], np.float32)
                self._binding.bind_cpu_input(f"x{number}", _filled(array, self._place.batch_sizes))
            self._session.run_with_iobinding(self._binding, self._place.run_options(shrink=shrink))
            outputs = self._binding.copy_outputs_to_cpu()
        except runtime.ERRORS as error:
            raise RunError(f"{self._compiled.expert} failed: {str(error)[:400]}") from error
        finally:
            _unbind(self._binding, self._compiled)
        if shrink:
            runtime.trim()
        count = len(feeds[self._compiled.inputs[0]])
        return {name: output[:count] for name, output in zip(self._compiled.outputs, outputs, strict=True)}


def _filled(array: NDArray[np.float32], sizes: Sequence[int]) -> NDArray[np.float32]:
    """The array (N, …) with N raised to the next of `sizes` by repeating its last row.

    A picture that is real keeps the expert on the paths it was measured on; zeros may divide by nothing.
    """
    missing = next((size - len(array) for size in sizes if size >= len(array)), 0)
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing else array


class Sessions:
    """The experts that can run now. Safe to use from several threads."""

    def __init__(self, weights: SegmentMemory, place: Place, *, activation_bytes: int) -> None:
        self._weights, self._place = weights, place
        self._lock = Lock()
        self._templates: dict[str, Future[Any]] = {}  # those out of use in the order in which they fell out of it
        self._users: Counter[str] = Counter()
        self._residents: dict[str, _Resident] = {}
        self._runs = itertools.count(1)

    def activate(self, compiled: Compiled) -> None:
        """Make an expert ready whose segments are in memory. Activating it again does nothing.

        Raises LoadError when a segment is not in memory, StoreError when the template's file is damaged, ModelError
        when the runtime refuses it, RunError when another version of the expert is still active.
        """
        with self._lock:
            resident = self._residents.get(compiled.expert)
        if resident is not None:
            if resident.compiled != compiled:
                raise RunError(f"another version of {compiled.expert} is active", "drop that first")
            return
        # Bindings are bare addresses, so the weights must stay where they are until the expert is dropped.
        self._weights.hold(compiled.segments)
        is_kept = False
        try:
            session = self._template(compiled)
            is_kept = self._keep(_Resident(compiled, session, [self._bound(compiled, session)]))
        finally:
            if not is_kept:
                self._let_go(compiled)

    def drop(self, expert: str) -> None:
        """Forget an expert's bindings; only then may its segments be dropped. Raises RunError while it is lent."""
        with self._lock:
            resident = self._residents.get(expert)
            if resident is None:
                raise RunError(f"{expert} is not active")
            if resident.lent:
                raise RunError(f"{expert} is running", "drop it when its run has ended")
            del self._residents[expert]
        self._let_go(resident.compiled)

    @contextmanager
    def lease(self, expert: str) -> Iterator[Lease]:
        """Within, the expert cannot be dropped. A second lease at the same time gets a binding of its own.

        Raises RunError when the expert is not active.
        """
        with self._lock:
            resident = self._residents.get(expert)
            if resident is None:
                raise RunError(f"{expert} is not active", "load it first")
            resident.lent += 1
            binding = resident.idle.pop() if resident.idle else None
        try:
            binding = binding or self._bound(resident.compiled, resident.session)
            yield Lease(resident.compiled, resident.session, binding, self._place, self._shrinks_next)
        finally:
            with self._lock:
                resident.lent -= 1
                if binding is not None:
                    resident.idle.append(binding)

    def _keep(self, fresh: _Resident) -> bool:
        """Whether it is now the expert's residency; not if another thread was first."""
        with self._lock:
            return self._residents.setdefault(fresh.compiled.expert, fresh) is fresh

    def _shrinks_next(self) -> bool:
        return next(self._runs) % _SHRINK_EVERY == 0

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
            except (StoreError, ModelError) as error:
                promised.set_exception(error)
            finally:
                # Without effect on a settled promise; an unexpected error must not leave the others waiting for ever.
                promised.cancel()
                if promised.cancelled() or promised.exception() is not None:
                    with self._lock:
                        del self._templates[compiled.architecture]
        return promised.result()

    def _let_go(self, compiled: Compiled) -> None:
        """The reverse of `hold` and `_template`; sessions long out of use are closed."""
        self._weights.release(compiled.segments)
        with self._lock:
            self._users[compiled.architecture] -= 1
            promised = self._templates.pop(compiled.architecture, None)
            if promised is not None:
                self._templates[compiled.architecture] = promised
            unused = [architecture for architecture in self._templates if not self._users[architecture]]
            for architecture in unused[:-_UNUSED_TEMPLATES]:
                del self._templates[architecture], self._users[architecture]

    def _bound(self, compiled: Compiled, session: Any) -> Any:
        """A binding of every weight to its place in memory. It owns none of it: what is resident is held."""
        starts = [self._weights.address(segment.id) for segment in compiled.segments]
        binding = session.io_binding()
        for slot in compiled.tensors:
            _check_inside(slot, compiled)
            address = starts[slot.segment] + slot.offset
            binding.bind_input(slot.name, *self._place.device, np.dtype(slot.dtype), slot.shape, address)
        _bind_outputs(binding, compiled)
        return binding


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
    try:
        found = catalog.sha256_of(compiled.template_path)
    except OSError as error:
        raise StoreError(
            f"{compiled.template_path} cannot be read: {error.strerror}", "restart: it is compiled again"
        ) from error
    if found != compiled.architecture:
        raise StoreError(f"{compiled.template_path} is damaged", "restart: it is put away and compiled again")
    try:
        return place.open_template(compiled.template_path)
    except runtime.ERRORS as error:
        raise ModelError(f"{compiled.expert}: the runtime refuses its template: {str(error)[:400]}") from error
