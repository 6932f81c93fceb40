"""The documents say what is so: keys, commands, rooms, version and links. `make docs` writes the generated page."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import appliance
from tests.test_imports import project_files

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def test_what_is_made_from_the_code_is_what_it_would_be_made_now() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "build.py"))["files"]()
    written = {name: (ROOT / "docs" / name).read_text("utf-8") for name in made}
    assert written == made, "appliance/config.py or appliance/contract.py changed: run `make docs`"


def test_every_reference_of_the_topics_leads_somewhere() -> None:
    path = ROOT / "docs" / "asyncapi.json"
    document = json.loads(path.read_text("utf-8"))
    for reference in _references(document):
        file, _, inside = reference.partition("#")
        found = json.loads((path.parent / file).read_text("utf-8")) if file else document
        for name in inside.split("/")[1:]:
            found = found[name]
    for channel in document["channels"].values():
        assert set(re.findall(r"{(\w+)}", channel["address"])) == channel["parameters"].keys()


def test_every_setting_has_a_description() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert rows
    assert [row for row in rows if row.endswith("|  |")] == []


def test_the_readme_names_every_command_and_no_other() -> None:
    found, commands = _shown_commands(_readme()), _commands()
    assert commands - found == set(), "README.md does not show these commands as `appliance <command>`"
    assert found - commands == set(), "README.md shows commands that `appliance --help` does not have"


def test_no_document_shows_a_command_that_is_not_there() -> None:
    documents = [path for path in project_files() if path.suffix == ".md"]
    shown = {str(path.relative_to(ROOT)): _shown_commands(path.read_text("utf-8")) for path in documents}
    commands = _commands()
    assert {name: found - commands for name, found in shown.items() if found - commands} == {}


def test_the_readme_names_every_room_and_no_other() -> None:
    section = _section(_readme(), "rooms")
    named = set(re.findall(r"(?<![\w./-])([a-z_]+/|[a-z_]+\.py)(?![\w/])", section))
    rooms = _top_folders() | _modules_of_appliance()
    assert rooms - named == set(), "the section on rooms in README.md does not name these"
    inner = {path.name for path in project_files()}
    assert named - rooms - inner == set(), "the section on rooms in README.md names what is not there"


def test_the_table_of_who_decides_names_every_module_of_the_core_and_no_other() -> None:
    section = _section(ARCHITECTURE.read_text("utf-8"), "decides")
    named = re.findall(r"`(\w+\.py)`", "".join(line.split("|")[1] for line in section.splitlines() if "|" in line))
    modules = {path.name for path in (ROOT / "appliance" / "core").glob("*.py")} - {"__init__.py"}
    assert sorted(named) == sorted(modules)


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    versions = re.findall(r"^## \[?(\d+\.\d+\.\d+)", changelog, re.MULTILINE)
    assert project["version"] == appliance.__version__
    assert versions[0] == appliance.__version__, "the newest version in CHANGELOG.md is not the one in pyproject.toml"


def test_relative_links_lead_somewhere() -> None:
    documents = [path for path in project_files() if path.suffix == ".md"]
    broken = [f"{path.relative_to(ROOT)}: {link}" for path in documents for link in _broken_links(path)]
    assert broken == []


def test_every_test_that_a_document_names_is_there() -> None:
    """Numbers that a test holds are told with its name."""
    documents = [path for path in project_files() if path.suffix == ".md"]
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named = {name for path in documents for name in re.findall(r"`(test_\w+)`", path.read_text("utf-8"))}
    assert {name for name in named if f"def {name}(" not in tests} == set()


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `title`, here\n[a](page.md#a-title-here) [b](gone.md) [c](#nowhere) [d](https://x.org)\n")
    assert list(_broken_links(page)) == ["gone.md", "#nowhere"]


def _references(value: object) -> Iterator[str]:
    """Every `$ref` in a JSON document."""
    if isinstance(value, dict):
        if isinstance(target := value.get("$ref"), str):
            yield target
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _references(inner)


def _readme() -> str:
    assert README.is_file(), "README.md is missing"
    return README.read_text("utf-8")


def _commands() -> set[str]:
    try:
        cli = importlib.import_module("appliance.cli")
    except ModuleNotFoundError as error:
        pytest.fail(f"the command line cannot be imported: {error}")
    app = next((value for value in vars(cli).values() if isinstance(value, typer.Typer)), None)
    assert app is not None, "appliance/cli.py has no Typer application"
    group = typer.main.get_group(app)
    return {name for name, command in group.commands.items() if not command.hidden}


def _shown_commands(text: str) -> set[str]:
    return set(re.findall(r"(?:^|[`/$ ])appliance ([a-z][a-z-]+)(?=[\s`])", _code_of(text), re.MULTILINE))


def _code_of(text: str) -> str:
    """What stands in backticks and code blocks, a piece per line: prose may say `appliance` with any word after it."""
    blocks = FENCED.findall(text)
    return "\n".join([*blocks, *re.findall(r"`[^`\n]+`", FENCED.sub("", text))])


def _section(text: str, word: str) -> str:
    """A section of a page, from the heading that has this word to the next of its level or above."""
    heading = re.search(rf"^(#+) .*\b{word}\b.*$", text, re.MULTILINE | re.IGNORECASE)
    assert heading, f"README.md has no heading with the word “{word}”"
    rest = text[heading.end() :]
    end = re.search(rf"^#{{1,{len(heading[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def _top_folders() -> set[str]:
    parts = (path.relative_to(ROOT).parts for path in project_files())
    return {f"{p[0]}/" for p in parts if len(p) > 1 and not p[0].startswith(".")}


def _modules_of_appliance() -> set[str]:
    inside = [
        path.relative_to(ROOT / "appliance").parts for path in project_files() if ROOT / "appliance" in path.parents
    ]
    folders = {f"{p[0]}/" for p in inside if len(p) > 1}
    return folders | {p[0] for p in inside if len(p) == 1 and p[0].endswith(".py") and not p[0].startswith("__")}


def _broken_links(page: Path) -> Iterator[str]:
    for link in LINK.findall(FENCED.sub("", page.read_text("utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            yield link


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to headings: lower case, punctuation dropped, blanks become dashes."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
