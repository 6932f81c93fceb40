"""Imports point down. The table says who may know whom; every rule is shown to go red on a small bad source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = (
    *("appliance", "appliance.core", "appliance.drivers", "appliance.store", "appliance.engine", "appliance.lab"),
    *("appliance.profiler", "export"),
)

FRONT = tuple(
    f"appliance.{room}" for room in ("config", "catalog", "profile", "sandbox", "contract", "samples", "client", "tls")
)
CORE_VALUES = ("appliance.core.types", "appliance.core.costs", "appliance.core.graph")
WORLD = ("appliance.engine", "appliance.store", "appliance.drivers")
EVERYWHERE = ("appliance.errors", "appliance.__version__")

# Who may import what of our own; the longest name that fits a module is its room.
MAY_IMPORT: Mapping[str, tuple[str, ...]] = {
    "appliance": (),
    "appliance.__main__": ("appliance.cli",),
    "appliance.errors": (),
    "appliance.core": ("appliance.core",),
    **dict.fromkeys(FRONT, (*FRONT, *CORE_VALUES)),
    "appliance.drivers": ("appliance.drivers", *FRONT, *CORE_VALUES),
    "appliance.store": ("appliance.store", "appliance.drivers", *FRONT, *CORE_VALUES),
    "appliance.engine": (*WORLD, *FRONT, *CORE_VALUES, "appliance.core.slab"),
    "appliance.promise": (*WORLD, *FRONT),
    "appliance.startup": ("appliance.promise", *WORLD, *FRONT, "appliance.core"),
    "appliance.health": ("appliance.promise", *WORLD, *FRONT, "appliance.core"),
    "appliance.boards": (*WORLD, *FRONT, "appliance.core"),
    "appliance.feed": ("appliance.boards", *WORLD, *FRONT, "appliance.core"),
    "appliance.inspections": (
        "appliance.boards",
        "appliance.feed",
        "appliance.startup",
        *WORLD,
        *FRONT,
        "appliance.core",
    ),
    "appliance.orders": ("appliance.inspections", "appliance.health", *WORLD, *FRONT, "appliance.core"),
    "appliance.telemetry": (
        "appliance.boards",
        "appliance.inspections",
        "appliance.startup",
        "appliance.health",
        "appliance.promise",
        *WORLD,
        *FRONT,
        "appliance.core",
    ),
    "appliance.service": (
        "appliance.boards",
        "appliance.feed",
        "appliance.inspections",
        "appliance.orders",
        "appliance.telemetry",
        "appliance.startup",
        "appliance.health",
        "appliance.promise",
        *WORLD,
        *FRONT,
        "appliance.core",
    ),
    "appliance.logs": (),
    "appliance.report": (),
    "appliance.lab": (
        "appliance.lab",
        "appliance.report",
        "appliance.service",
        "appliance.startup",
        *WORLD,
        *FRONT,
        "appliance.core",
    ),
    "appliance.profiler": (
        "appliance.profiler",
        "appliance.lab",
        "appliance.report",
        "appliance.startup",
        *WORLD,
        *FRONT,
        "appliance.core",
    ),
    "appliance.cli": ("appliance", "export"),
    "export": (
        "export",
        "appliance.catalog",
        "appliance.samples",
        "appliance.sandbox",
        "appliance.core.types",
        "appliance.drivers.images",
        "appliance.drivers.heads",
    ),
}

# A decision has no clock, no chance, no log, no lock and no file.
NOT_IN_CORE = {
    *("asyncio", "concurrent", "contextvars", "multiprocessing", "queue", "threading"),
    *("datetime", "random", "secrets", "time", "uuid"),
    *("io", "logging", "os", "pathlib", "shutil", "sqlite3", "tempfile"),
    *("selectors", "signal", "socket", "subprocess"),
}
NOT_CALLED_IN_CORE = {"open", "print", "input"}


@dataclass(frozen=True, slots=True)
class Import:
    """One name that a module imports, in full; `at_start` if it does so when it is imported itself."""

    name: str
    line: int
    at_start: bool


@dataclass(frozen=True, slots=True)
class Source:
    module: str
    text: str
    is_package: bool = False


def sources() -> list[Source]:
    found = []
    for path in sorted(p for package in ("appliance", "export") for p in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        found.append(Source(".".join(parts[:-1] if is_package else parts), path.read_text("utf-8"), is_package))
    return found


@cache
def parsed(text: str) -> ast.Module:
    """Each rule looks at the same tree."""
    return ast.parse(text)


def violations(source: Source) -> list[str]:
    """What one module does against the rules, each as `module:line: why`."""
    problems = [*_wrong_imports(source), *_environment_uses(source), *_effects_in_core(source)]
    return [f"{source.module}:{line}: {why}" for line, why in problems]


def imports(source: Source) -> list[Import]:
    """Every import of a module, also those inside functions and those for type checkers alone."""
    tree = parsed(source.text)
    late = {id(inner) for outer in ast.walk(tree) if _is_function(outer) for inner in ast.walk(outer)}
    return [
        Import(name, node.lineno, id(node) not in late)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in _imported_names(node, source)
    ]


def cycles(modules: Iterable[Source]) -> list[str]:
    """A loop among modules that import each other, wherever in them the imports stand; empty if there is none."""
    by_name = {source.module: source for source in modules}
    graph = {
        name: {target for i in imports(source) if (target := _module_of(i.name, by_name)) not in (None, name)}
        for name, source in by_name.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def _wrong_imports(source: Source) -> Iterator[tuple[int, str]]:
    room = _room(source.module)
    if room is None:
        yield 1, "has no place in the table of rooms"
        return
    for i in imports(source):
        top = i.name.split(".")[0]
        if _below(i.name, PACKAGES):
            if not _below(i.name, (*MAY_IMPORT[room], *EVERYWHERE)):
                yield i.line, f"{room} must not know {i.name}"
            elif room == "appliance.cli" and i.at_start and not _below(i.name, EVERYWHERE):
                yield i.line, f"the command line imports {i.name} inside the command only"
        elif room == "appliance.cli" and i.at_start and top not in {*sys.stdlib_module_names, "typer", "rich"}:
            yield i.line, f"the command line imports {i.name} inside the command only"
        elif room == "appliance.core":
            if top in NOT_IN_CORE or top not in sys.stdlib_module_names:
                yield i.line, f"the core must not import {i.name}"
        elif top == "torch" and room != "export":
            yield i.line, "torch is imported under export/ only"


def _effects_in_core(source: Source) -> Iterator[tuple[int, str]]:
    if _room(source.module) != "appliance.core":
        return
    for node in ast.walk(parsed(source.text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NOT_CALLED_IN_CORE:
            yield node.lineno, f"the core must not call {node.func.id}"


def _environment_uses(source: Source) -> Iterator[tuple[int, str]]:
    if source.module == "appliance.config":
        return
    tree = parsed(source.text)
    written = {id(node) for node in _telemetry_writes(tree)} if source.module == "appliance" else set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name("os"), attr=attribute) if id(node) not in written:
                names = {attribute}
            case ast.ImportFrom(module="os"):
                names = {alias.name for alias in node.names}
            case _:
                continue
        if names & {"environ", "environb", "getenv", "getenvb"}:
            yield node.lineno, "the environment is read in appliance/config.py only"


def _telemetry_writes(tree: ast.Module) -> Iterator[ast.expr]:
    """The `os.environ` of `os.environ.setdefault("ORT_DISABLE_TELEMETRY", …)` and `os.environ["ORT_…"] = …`."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Attribute(value=target, attr="setdefault"), args=[ast.Constant("ORT_DISABLE_TELEMETRY"), _]
            ):
                yield target
            case ast.Assign(targets=[ast.Subscript(value=target, slice=ast.Constant("ORT_DISABLE_TELEMETRY"))]):
                yield target


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def _imported_names(node: ast.Import | ast.ImportFrom, source: Source) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    home = source.module.split(".")
    up = node.level - 1 if source.is_package else node.level
    base = ".".join([*home[: len(home) - up], *([node.module] if node.module else [])]) if node.level else node.module
    assert base
    return [f"{base}.{alias.name}" for alias in node.names] if base in PACKAGES else [base]


def _module_of(name: str, known: Mapping[str, Source]) -> str | None:
    """The module that an imported name lies in: itself, or the module that defines it; None for other people's."""
    parts = name.split(".")
    candidates = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((candidate for candidate in candidates if candidate in known), None)


def _room(module: str) -> str | None:
    if module.startswith("appliance.") and "." not in module.removeprefix("appliance."):
        return module if module in MAY_IMPORT else None
    fitting = [room for room in MAY_IMPORT if _below(module, (room,))]
    return max(fitting, key=len, default=None)


def _below(name: str, rooms: Iterable[str]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


BAD = [
    ("appliance.core.memory", "import time", "core must not import time"),
    ("appliance.core.memory", "from random import choice", "core must not import random"),
    ("appliance.core.memory", "import logging", "core must not import logging"),
    ("appliance.core.memory", "from threading import Lock", "core must not import threading"),
    ("appliance.core.memory", "import os.path", "core must not import os.path"),
    ("appliance.core.memory", "import asyncio", "core must not import asyncio"),
    ("appliance.core.memory", "def f() -> None:\n    import time", "core must not import time"),
    ("appliance.core.memory", "import numpy as np", "core must not import numpy"),
    ("appliance.core.memory", "import networkx", "core must not import networkx"),
    ("appliance.core.memory", "from appliance.catalog import Catalog", "must not know appliance.catalog"),
    ("appliance.core.memory", "from ..drivers import images", "must not know appliance.drivers.images"),
    ("appliance.core.memory", "print(1)", "core must not call print"),
    ("appliance.errors", "from appliance.core.types import Outcome", "must not know appliance.core.types"),
    ("appliance.catalog", "from appliance.core.scheduler import Scheduler", "must not know appliance.core.scheduler"),
    ("appliance.config", "from appliance.drivers import mqtt", "must not know appliance.drivers.mqtt"),
    ("appliance.client", "import appliance.service", "must not know appliance.service"),
    ("appliance.drivers.mqtt", "from appliance.core import controller", "must not know appliance.core.controller"),
    ("appliance.drivers.mqtt", "from appliance.core.controller import Controller", "appliance.core.controller"),
    ("appliance.drivers.mqtt", "from appliance.core.memory import Ledger", "must not know appliance.core.memory"),
    ("appliance.drivers.mqtt", "from appliance.lab import measure", "must not know appliance.lab.measure"),
    ("appliance.drivers.mqtt", "if TYPE_CHECKING:\n    import appliance.service", "must not know appliance.service"),
    ("appliance.service", "def f() -> None:\n    from appliance.lab import bench", "must not know appliance.lab.bench"),
    ("appliance.startup", "from appliance.service import serve", "must not know appliance.service"),
    ("appliance.startup", "from appliance.lab import measure", "must not know appliance.lab.measure"),
    ("appliance.contract", "from appliance.drivers.mqtt import Door", "must not know appliance.drivers.mqtt"),
    ("appliance.report", "from appliance.core.types import Outcome", "must not know appliance.core.types"),
    ("appliance.drivers.mqtt", "import appliance.startup", "must not know appliance.startup"),
    ("appliance.service", "import appliance.cli", "must not know appliance.cli"),
    ("appliance.lab.demo", "from appliance import cli", "must not know appliance.cli"),
    ("appliance.lab.demo", "from export import teach", "must not know export.teach"),
    ("appliance.lab.demo", "from appliance.profiler import measure", "must not know appliance.profiler.measure"),
    ("appliance.profiler.measure", "from appliance.service import serve", "must not know appliance.service"),
    ("appliance.cli", "from appliance.service import serve", "inside the command only"),
    ("appliance.cli", "import numpy", "inside the command only"),
    ("export.bundle", "from appliance.service import serve", "must not know appliance.service"),
    ("export.bundle", "from appliance.drivers.mqtt import Link", "must not know appliance.drivers.mqtt"),
    ("export.bundle", "import appliance", "must not know appliance"),
    ("appliance.engine.sessions", "def f() -> None:\n    import torch", "torch is imported under export/ only"),
    ("appliance.service", "from torch.nn import Module", "torch is imported under export/ only"),
    ("appliance.helpers", "", "no place in the table"),
    ("appliance.drivers.gpu", "import os\nos.environ.get('X')", "environment is read in appliance/config.py only"),
    ("appliance.drivers.gpu", "import os\nos.getenv('X')", "environment is read in appliance/config.py only"),
    ("appliance.drivers.gpu", "from os import environ", "environment is read in appliance/config.py only"),
    ("export.bundle", "import os\nos.environ['X'] = '1'", "environment is read in appliance/config.py only"),
    ("appliance", "import os\nos.environ.get('ORT_DISABLE_TELEMETRY')", "environment is read"),
    ("appliance", "import os\nos.environ.setdefault('OTHER', '1')", "environment is read"),
]


@pytest.mark.parametrize(("module", "text", "why"), BAD)
def test_the_rules_go_red_on_bad_sources(module: str, text: str, why: str) -> None:
    found = violations(Source(module, text, is_package=module in PACKAGES))
    assert len(found) == 1
    assert why in found[0]


GOOD = [
    ("appliance", "import os\nos.environ.setdefault('ORT_DISABLE_TELEMETRY', '1')"),
    ("appliance", "import os\nos.environ['ORT_DISABLE_TELEMETRY'] = '1'"),
    ("appliance.config", "import os\nos.environ.get('NOTIFY_SOCKET')"),
    ("appliance.core.graph", "import graphlib\nfrom appliance.errors import GraphError\nfrom .types import Step"),
    ("appliance.core.memory", "from appliance.core import types\nfrom collections import deque"),
    ("appliance.drivers.images", "import time\nfrom PIL import Image\nfrom appliance.core.types import Box"),
    ("appliance.cli", "import typer\nfrom appliance.errors import ApplianceError\nfrom appliance import __version__"),
    ("appliance.cli", "def serve() -> None:\n    import export\n    from appliance.service import serve"),
    ("appliance.lab.bench", "from appliance.core.controller import Controller\nimport appliance.service"),
    ("export.bundle", "import torch\nfrom appliance.sandbox import run\nfrom appliance.drivers import images"),
]


@pytest.mark.parametrize(("module", "text"), GOOD)
def test_the_rules_stay_green_on_what_the_table_allows(module: str, text: str) -> None:
    assert violations(Source(module, text, is_package=module in PACKAGES)) == []


def test_a_loop_of_imports_is_found_even_inside_functions() -> None:
    first = Source("appliance.core.a", "from appliance.core.b import f")
    second = Source("appliance.core.b", "def f() -> None:\n    from .a import g")
    assert cycles([first, second]) in (
        ["appliance.core.a -> appliance.core.b -> appliance.core.a"],
        ["appliance.core.b -> appliance.core.a -> appliance.core.b"],
    )
    assert cycles([first]) == []


def test_every_import_points_down() -> None:
    assert [problem for source in sources() for problem in violations(source)] == []


def test_imports_do_not_loop() -> None:
    assert cycles(sources()) == []


# Written in pieces, so that this file does not name them itself.
NOT_IN_TEXT = re.compile(rb"\b(TO" + rb"DO|FIX" + rb"ME|XX" + rb"X)\b|(?i:\bplace" + rb"holder)")
BUILD_PATH = re.compile(rb"(?<![\w.-])/(work|tmp/dev|root)/(?=\w)")


def leftovers(content: bytes) -> list[str]:
    """What must not stay in a file: notes to ourselves in a text, and in any file the folder that it was built in."""
    is_text = b"\0" not in content[:8192]
    patterns = (NOT_IN_TEXT, BUILD_PATH) if is_text else (BUILD_PATH,)
    return [match.group().decode() for pattern in patterns for match in pattern.finditer(content)]


@pytest.mark.parametrize(
    "content",
    [
        b"# TO" + b"DO later",
        b"FIX" + b"ME",
        b"a Place" + b"holder",
        b"see /wo" + b"rk/main/x",
        b"\0 /wo" + b"rk/main/x.py",
    ],
)
def test_leftovers_are_found(content: bytes) -> None:
    assert len(leftovers(content)) == 1


def test_addresses_and_other_words_are_no_leftovers() -> None:
    assert leftovers(b"https://example.org/wo" + b"rk/item mastodon TO" + b"DOs") == []


def test_no_file_has_leftovers() -> None:
    found = {str(path.relative_to(ROOT)): leftovers(path.read_bytes()) for path in project_files()}
    assert {name: words for name, words in found.items() if words} == {}


def project_files() -> list[Path]:
    """Every file that git tracks or would track."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [path for name in names if name and (path := ROOT / name).is_file()]
