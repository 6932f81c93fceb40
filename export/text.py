"""Other libraries' errors as one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """What the error says first, or its kind when it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
