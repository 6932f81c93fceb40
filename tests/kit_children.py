"""Compilers that one test leaves to the next: each is a process of its own, and starting takes most of a second.

Import the fixtures into the test's module and mark it with `usefixtures("kept_children")`. A test that kills, starves
or measures its compilers asks for `own_children`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from appliance.sandbox import Child

LEAST_BYTES = 4 << 30
"""Of address space, so that who comes next may compile a larger model."""


class Children:
    """Stands in for the class `Child`: what is closed in good order is handed out again, with the room that it has."""

    def __init__(self) -> None:
        self._idle: list[_Kept] = []

    def __call__(self, module: str, *, memory_bytes: int) -> Child:
        priority = os.getpriority(os.PRIO_PROCESS, 0)  # a child has that of the thread that starts it
        for child in list(self._idle):
            if (child.module, child.priority) == (module, priority) and child.memory_bytes >= memory_bytes:
                self._idle.remove(child)
                if child.is_alive:
                    return child
                child.end()
        return _Kept(self._idle, module, priority, max(memory_bytes, LEAST_BYTES))

    def end(self) -> None:
        while self._idle:
            self._idle.pop().end()


class _Kept(Child):
    def __init__(self, idle: list[_Kept], module: str, priority: int, memory_bytes: int) -> None:
        super().__init__(module, memory_bytes=memory_bytes)
        self.module, self.priority = module, priority
        self._idle, self._is_asked = idle, False

    def ask(self, request: dict[str, Any], *, seconds: float) -> dict[str, Any]:
        self._is_asked = True
        try:
            return super().ask(request, seconds=seconds)
        finally:
            self._is_asked = False

    def close(self) -> None:
        """Within `ask` it is closed because something became of it."""
        if self._is_asked or not self.is_alive:
            self.end()
        else:
            self._idle.append(self)

    def end(self) -> None:
        super().close()


@pytest.fixture(scope="module")
def kept_children() -> Iterator[None]:
    """Whatever this module compiles is compiled by a child that was there, if there is one."""
    children = Children()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("appliance.store.compile.Child", children)
        yield
    children.end()


@pytest.fixture
def own_children(kept_children: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """This test's compilers are its own."""
    monkeypatch.setattr("appliance.store.compile.Child", Child)
