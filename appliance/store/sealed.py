"""Small files that know whether they are whole: JSON beside its own SHA-256, put in place by one rename."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """What a file of ours says. Raises OSError, or ValueError when a single bit of it is not as it was written."""
    found = json.loads(path.read_bytes())
    try:
        content: dict[str, Any] = found["content"]
        is_whole = found["sha256"] == _seal(content)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged") from error
    if not is_whole:
        raise ValueError(f"{path} is damaged")
    return content


def write(content: Mapping[str, Any], workshop: Path, target: Path) -> None:
    """Make the file in `workshop`, on the same disk, and rename it to `target`. Raises OSError."""
    source = workshop / target.name
    source.write_text(json.dumps({"sha256": _seal(content), "content": content}), "utf-8")
    place(source, target)


def place(source: Path, target: Path) -> None:
    """Rename a file to its place, whole or not at all, also across a power cut. Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _flush(source)
    source.replace(target)
    _flush(target.parent)


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
