"""Runs a module in a child process that may crash, hang or eat memory without harm to us; speaks JSON lines with it.

The parent sets every limit from outside (`prlimit`), so that nothing has to run between fork and exec of a process
with threads. It knows neither models nor ONNX Runtime: a module under test calls `serve` with one function.
"""

from __future__ import annotations

import json
import math
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from appliance.errors import ApplianceError, GoldenMismatch, ModelError, StoreError, UnsafeModel

MAX_REQUEST_BYTES = 60_000
"""A request must fit a pipe's buffer (64 KiB), so that writing it to a child that never reads cannot block."""
MAX_REPLY_BYTES = 16 << 20
_DISTRUST = "do not serve this model; ask where it came from"
_KINDS: dict[str, type[ApplianceError]] = {kind.reason: kind for kind in (StoreError, GoldenMismatch)}
"""What a child may say beside ModelError."""
_BREATH_SECONDS = 5  # for a child that closed its pipe to end by itself


def run_limited(module: str, request: dict[str, Any], *, memory_bytes: int, seconds: float) -> dict[str, Any]:
    """Answer one request by `python -m module` in a process of its own.

    Raises UnsafeModel naming the signal or limit when the child dies, and ModelError or StoreError when it reports one.
    """
    with Child(module, memory_bytes=memory_bytes) as child:
        return child.ask(request, seconds=seconds)


class Child:
    """A process with limits that answers requests one by one. Once it died, `is_alive` is False and so it stays."""

    def __init__(self, module: str, *, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 (closed with us; a pipe nobody reads would block the child)
        self._process = subprocess.Popen(
            ["env", *_settings(), sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            start_new_session=True,
        )
        # It waits for its first request, so these are in force before it sees anything foreign.
        _limit(self._process.pid, memory_bytes)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: dict[str, Any], *, seconds: float) -> dict[str, Any]:
        """The child's reply.

        Raises UnsafeModel when the child died or was killed for it, ModelError for its own, StoreError when it could
        not write.
        """
        line = json.dumps(request).encode() + b"\n"
        if len(line) > MAX_REQUEST_BYTES:
            raise ValueError(f"a request of {len(line)} bytes; at most {MAX_REQUEST_BYTES}")
        _limit_cpu(self._process.pid, seconds)
        reply = self._exchange(line, time.monotonic() + seconds)
        if reply is None:
            self.close()
            raise UnsafeModel(f"it took longer than {seconds:g} s", _DISTRUST)
        if not reply.endswith(b"\n"):
            raise UnsafeModel(self._cause_of_death(), _DISTRUST)
        return self._opened(reply)

    def kill(self) -> None:
        """From any thread: end the child, so that whoever waits for its reply finds it dead, and closes it."""
        if self.is_alive:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill the child and everything it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # not yet waited for, so the number is still its own
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self._complaints.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _exchange(self, line: bytes, deadline: float) -> bytes | None:
        """The reply's line; less than a line when the child died; None at the deadline."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(line)
            self._process.stdin.flush()
        return _read_line(self._process.stdout.fileno(), deadline)

    def _opened(self, reply: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(reply)
        except ValueError as error:
            self.close()
            raise UnsafeModel(f"its child answered {reply[:80]!r}", _DISTRUST) from error
        if not isinstance(answer, dict):
            self.close()
            raise UnsafeModel(f"its child answered {reply[:80]!r}", _DISTRUST)
        if "limit" in answer:
            raise UnsafeModel(f"it broke the {answer['limit']} limit of {self.memory_bytes} bytes", _DISTRUST)
        if "error" in answer:
            kind = _KINDS.get(str(answer.get("reason")), ModelError)
            raise kind(str(answer["error"]), str(answer.get("remedy", "")))
        return answer

    def _cause_of_death(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_BREATH_SECONDS)
        last = self._last_complaint()
        self.close()
        code = self._process.returncode
        said = f": {last}" if last else ""
        if code == -signal.SIGXCPU:
            return f"it broke the processor time limit (SIGXCPU){said}"
        if code < 0:
            return f"it ended by {signal.Signals(-code).name} under a memory limit of {self.memory_bytes} bytes{said}"
        if "MemoryError" in last:
            return f"it broke the memory limit of {self.memory_bytes} bytes{said}"
        return f"it ended with exit status {code} and no answer{said}"

    def _last_complaint(self) -> str:
        end = self._complaints.seek(0, os.SEEK_END)
        self._complaints.seek(max(0, end - 2000))
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The child's side: answer each line on stdin until it ends. Whatever libraries print goes to stderr instead."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_reader, args=(replies.fileno(),), daemon=True).start()
    for line in sys.stdin.buffer:
        replies.write(json.dumps(_answered(answer, json.loads(line))).encode() + b"\n")
        replies.flush()


def _end_with_reader(pipe: int) -> None:
    """Who asked was killed: nobody wants the answer, and what serves or is measured next lacks the processors."""
    poll = select.poll()
    poll.register(pipe, 0)  # that nobody reads any more is told unasked
    poll.poll()
    os._exit(1)


def _answered(answer: Callable[[dict[str, Any]], dict[str, Any]], request: dict[str, Any]) -> dict[str, Any]:
    try:
        return answer(request)
    except MemoryError:
        return {"limit": "memory"}
    except ApplianceError as error:
        return {"error": error.what, "remedy": error.remedy, "reason": error.reason}


def _settings() -> list[str]:
    """Our import path, and one thread each for the libraries that start threads when imported."""
    return [
        f"PYTHONPATH={os.pathsep.join(os.path.abspath(entry) for entry in sys.path)}",
        "MALLOC_ARENA_MAX=2",  # every further arena reserves 64 MiB of address space, which the limit counts
        "OMP_NUM_THREADS=1",
        "OPENBLAS_NUM_THREADS=1",
    ]


def _limit(pid: int, memory_bytes: int) -> None:
    with suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (memory_bytes, memory_bytes))
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError), open(f"/proc/{pid}/oom_score_adj", "w") as file:
        file.write("900")  # if the box runs out of memory, this child goes first


def _limit_cpu(pid: int, seconds: float) -> None:
    """Processor time is a limit too, so that a child whose parent died does not run for ever."""
    with suppress(ProcessLookupError):
        soft = math.ceil(_cpu_seconds(pid) + seconds) + 1
        resource.prlimit(pid, resource.RLIMIT_CPU, (soft, resource.prlimit(pid, resource.RLIMIT_CPU)[1]))


def _cpu_seconds(pid: int) -> float:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            user, system = file.read().rpartition(b")")[2].split()[11:13]
    except OSError:
        return 0.0
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _read_line(descriptor: int, deadline: float) -> bytes | None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    received = bytearray()
    while not received.endswith(b"\n") and len(received) < MAX_REPLY_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            return None
        piece = os.read(descriptor, 1 << 16)
        if not piece:
            break
        received += piece
    return bytes(received)
