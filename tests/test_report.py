"""What commands tell people while they work and when they are done."""

from __future__ import annotations

import io

from rich.console import Console

from appliance.report import progress


def test_a_terminal_sees_a_bar_for_each_thing_that_is_counted() -> None:
    shown = io.StringIO()
    with progress(Console(file=shown, force_terminal=True, width=100)) as tell:
        tell("bytes", 50_000_000, 100_000_000)
        tell("experts", 2, 3)
    for text in ("reading the store", "50.0 MB of 100.0 MB", "compiling experts", "2 of 3"):
        assert text in shown.getvalue()


def test_a_file_and_a_machine_see_no_bar() -> None:
    shown = io.StringIO()
    for console in (Console(file=shown), Console(file=shown, force_terminal=True, quiet=True)):
        with progress(console) as tell:
            tell("bytes", 1, 2)
    assert shown.getvalue() == ""
