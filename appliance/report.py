"""What commands found, as tables and plain words for people. `--json` prints the same dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

COLOURS = {"pass": "green", "fail": "bold red", "error": "magenta", "late": "yellow", "rejected": "magenta"}


def print_check(found: Mapping[str, Any], console: Console) -> None:
    table = _facts()
    table.add_row("catalogue", escape(found["catalog"]))
    table.add_row("experts", f"{found['experts']} of {found['architectures']} architectures")
    table.add_row("components, products", f"{found['components']}, {found['products']}")
    table.add_row("weights", megabytes(found["weights_bytes"]))
    table.add_row("budget", f"{megabytes(found['budget_bytes'])} ({found['budget_share']:.0%} of the weights)")
    table.add_row("executors", ", ".join(found["executors"]))
    table.add_row("compiled experts", escape(found["store"]))
    console.print(table)
    console.print(escape(found["graph"]), soft_wrap=True, highlight=False)
    for name in found["too_large"]:
        console.print(f"[red]{name} alone is larger than the budget: raise memory.weights[/red]")
    for name, why in found["unavailable"].items():
        console.print(f"[red]{name} cannot serve[/red] ({why['reason']}): {escape(why['detail'])}")
    for path, reason in found["damaged"].items():
        console.print(f"[yellow]put into quarantine:[/yellow] {escape(path)} {escape(reason)}")
    if not found["unavailable"]:
        console.print("[green]Everything in the catalogue can serve.[/green]")


def print_answers(found: Mapping[str, Any], console: Console) -> None:
    table = Table("picture", "verdict", "findings", "ms")
    for answer in found["answers"]:
        table.add_row(escape(answer["file"]), *verdict_cells(answer["body"]), f"{answer['seconds'] * 1000:.0f}")
    console.print(table)
    for name in found["unanswered"]:
        console.print(f"[red]{escape(name)} got no verdict[/red]: is a box serving this site and root?")


def print_simulation(found: Mapping[str, Any], console: Console) -> None:
    table = _facts()
    for name, value in found.items():
        shown = f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        table.add_row(name.replace("_", " "), escape(shown))
    console.print(table)


def verdict_cells(body: Mapping[str, Any]) -> tuple[str, str]:
    """A verdict's outcome in its colour, and its findings in a few words."""
    if "outcome" not in body:
        return f"[magenta]refused: {escape(body['reason'])}[/magenta]", escape(body["what"])
    outcome = body["outcome"]
    words = [f"{f['label']} {f['score']:.2f}" for f in body["findings"]]
    if body["reason"]:
        words.append(f"{body['reason']}: {body['detail']}")
    return f"[{COLOURS[outcome]}]{outcome}[/]", escape(", ".join(words))


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def _facts() -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    return table
