"""What systemd is to the service, without systemd: the notification socket, and the unit's limits on system calls.

under_unit(unit, command)  the command as systemd would start it: its system call filter, address families and
                           refusal of writable code, made from the unit file's own lines with libseccomp
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self


class NotifySocket:
    """systemd's end of NOTIFY_SOCKET: a real datagram socket that keeps every message it was sent."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify"
        self.messages: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self.path.unlink()

    def environment(self, watchdog_seconds: float | None = None) -> dict[str, str]:
        """What systemd adds to the environment of the service. The watchdog is for whichever process reads this."""
        watchdog = {} if watchdog_seconds is None else {"WATCHDOG_USEC": str(int(watchdog_seconds * 1e6))}
        return {"NOTIFY_SOCKET": str(self.path), **watchdog}

    def wait_for(self, line: str, seconds: float) -> bool:
        """Whether a message with this line (`READY=1`; `STATUS=` for any status) comes within the time.

        Each call looks only at messages that no earlier call has taken, so that a second WATCHDOG=1 is a new one.
        """
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                message = self._socket.recv(65536).decode()
            except TimeoutError:
                return False
            self.messages.append(message)
            if any(_is_said(line, said) for said in message.splitlines()):
                return True
        return False


def settings(*files: Path) -> dict[str, list[str]]:
    """The assignments of unit files, in order: a key may be given several times."""
    found: dict[str, list[str]] = {}
    for line in "\n".join(file.read_text("utf-8") for file in files).splitlines():
        if match := re.fullmatch(r"([A-Za-z]+)=(.*)", line):
            found.setdefault(match[1], []).append(match[2])
    return found


def can_filter() -> bool:
    """Whether this machine has what `under_unit` needs."""
    try:
        ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return False
    return sys.platform == "linux"


def under_unit(unit: Path, command: Sequence[str]) -> list[str]:
    return [sys.executable, __file__, str(unit), *command]


def _is_said(line: str, said: str) -> bool:
    return said.startswith(line) if line.endswith("=") else said == line


def _allowed_calls(lines: Iterable[str]) -> set[str]:
    allowed: set[str] = set()
    for line in lines:
        calls = {call for word in line.lstrip("~").split() for call in _calls(word)}
        allowed = allowed - calls if line.startswith("~") else allowed | calls
    return allowed


def _calls(word: str) -> set[str]:
    """A system call, or those of a set such as `@system-service`, as this systemd knows it."""
    if not word.startswith("@"):
        return {word}
    listing = subprocess.run(["systemd-analyze", "syscall-filter", word], check=True, capture_output=True, text=True)
    words = [line.strip() for line in listing.stdout.splitlines()[1:]]
    return {call for inner in words if inner and not inner.startswith("#") for call in _calls(inner)}


class _Comparison(ctypes.Structure):
    """libseccomp's scmp_arg_cmp."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


_ALLOW, _EQUAL, _MASKED_EQUAL = 0x7FFF0000, 4, 7
_EXECUTABLE_SHARE = 0o100000  # SHM_EXEC


def _refuse(error: int) -> int:
    return 0x00050000 | error


def _limit_this_process(unit: Mapping[str, list[str]]) -> None:
    seccomp = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    seccomp.seccomp_init.restype = ctypes.c_void_p
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint
    seccomp.seccomp_rule_add_array.argtypes = (
        pointer,
        ctypes.c_uint32,
        number,
        size,
        ctypes.POINTER(_Comparison),
    )
    seccomp.seccomp_load.argtypes = (pointer,)

    def load(default: int, rules: Iterable[tuple[str, int, list[_Comparison]]]) -> None:
        context = seccomp.seccomp_init(default)
        for name, action, comparisons in rules:
            call = seccomp.seccomp_syscall_resolve_name(name.encode())
            array = (_Comparison * len(comparisons))(*comparisons)
            if call >= 0 and seccomp.seccomp_rule_add_array(context, action, call, len(comparisons), array) != 0:
                raise OSError(f"libseccomp refuses the rule for {name}")
        if seccomp.seccomp_load(context) != 0:
            raise OSError("the kernel refuses the filter")

    load(_ALLOW, [*_writable_code(unit), *_foreign_families(unit)])
    load(_refuse(errno.EPERM), [(call, _ALLOW, []) for call in sorted(_allowed_calls(unit["SystemCallFilter"]))])


def _writable_code(unit: Mapping[str, list[str]]) -> list[tuple[str, int, list[_Comparison]]]:
    """The four rules of MemoryDenyWriteExecute."""
    if unit["MemoryDenyWriteExecute"][-1] != "yes":
        return []
    both = mmap.PROT_WRITE | mmap.PROT_EXEC
    return [
        ("mmap", _refuse(errno.EPERM), [_Comparison(2, _MASKED_EQUAL, both, both)]),
        ("mprotect", _refuse(errno.EPERM), [_Comparison(2, _MASKED_EQUAL, mmap.PROT_EXEC, mmap.PROT_EXEC)]),
        ("pkey_mprotect", _refuse(errno.EPERM), [_Comparison(2, _MASKED_EQUAL, mmap.PROT_EXEC, mmap.PROT_EXEC)]),
        ("shmat", _refuse(errno.EPERM), [_Comparison(2, _MASKED_EQUAL, _EXECUTABLE_SHARE, _EXECUTABLE_SHARE)]),
    ]


def _foreign_families(unit: Mapping[str, list[str]]) -> list[tuple[str, int, list[_Comparison]]]:
    allowed = {int(getattr(socket, name)) for name in unit["RestrictAddressFamilies"][-1].split()}
    return [
        ("socket", _refuse(errno.EAFNOSUPPORT), [_Comparison(0, _EQUAL, family, 0)])
        for family in range(64)
        if family not in allowed
    ]


if __name__ == "__main__":
    _limit_this_process(settings(Path(sys.argv[1])))
    os.execvp(sys.argv[2], sys.argv[2:])
