"""The deciding thread's inbox."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from appliance.core.types import Loaded, Tick
from appliance.drivers.inbox import Inbox

STUCK_SECONDS = 5.0


def test_events_and_wake_ups_come_in_order() -> None:
    inbox = Inbox()
    inbox.tell(Tick())
    inbox.wake()
    inbox.tell(Loaded("cpu", "a"))
    assert [inbox.wait(1.0) for _ in range(3)] == [Tick(), None, Loaded("cpu", "a")]


def test_wake_ups_before_anybody_looked_are_one() -> None:
    inbox = Inbox()
    inbox.wake()
    inbox.wake()
    assert inbox.wait(1.0) is None
    inbox.wake()
    assert inbox.wait(1.0) is None
    with pytest.raises(TimeoutError):
        inbox.wait(0.01)


def test_nothing_in_time_is_said() -> None:
    with pytest.raises(TimeoutError):
        Inbox().wait(0.01)


def test_a_signal_whose_handler_outlasts_the_time_out_does_not_make_it_wait_for_ever() -> None:
    inbox = Inbox()
    ends = threading.Timer(STUCK_SECONDS, inbox.wake)  # without it a faulty inbox would hang the test
    ends.start()
    with _interrupted(after_seconds=0.02, for_seconds=0.1), pytest.raises(TimeoutError):
        inbox.wait(0.05)
    ends.cancel()


@contextmanager
def _interrupted(after_seconds: float, for_seconds: float) -> Iterator[None]:
    """A signal comes, and its handler works for a while."""

    def handle(*_: object) -> None:
        until = time.monotonic() + for_seconds
        while time.monotonic() < until:
            pass

    former = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, after_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
