"""What a test asks of a process: that it is nobody else's, or how much work it has done."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")

BETWEEN_LOOKS_SECONDS = 0.005


def alone(test: Callable[P, None], *given: P.args, **named: P.kwargs) -> None:
    """Run it in a process of its own: what this one's other tests left, its threads and its limits do not matter there.

    `test` is a function of a module, and what it is given can be pickled.
    """
    process = multiprocessing.get_context("spawn").Process(target=test, args=given, kwargs=named)
    process.start()
    process.join()
    assert process.exitcode == 0


def amid_work(do: Callable[[], object], seconds: float = 0.2) -> threading.Thread:
    """Do it once this process has worked for so long from now on: amid a run, however slow the machine is."""
    ends = time.process_time() + seconds

    def wait() -> None:
        while time.process_time() < ends:
            threading.Event().wait(BETWEEN_LOOKS_SECONDS)
        do()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread
