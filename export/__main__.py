"""`python -m export`: one expert, a foreign ONNX file, or hundreds at once. `appliance export` is the same command."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from appliance.errors import ApplianceError, ExportError
from export import manifest, many
from export.many import Job, Outcome

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_MAX_FAILURES_SHOWN = 50


@app.command()
def main(
    all_of: Annotated[
        Path | None, typer.Option("--all", metavar="MANIFEST", help="Export every expert that this manifest lists.")
    ] = None,
    one_of: Annotated[
        Path | None, typer.Option("--manifest", metavar="MANIFEST", help="Export one expert of this manifest.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Which one, when the manifest lists several.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A PyTorch state dictionary (.pt), in place of the manifest's.")
    ] = None,
    architecture: Annotated[str | None, typer.Option(help="Its architecture: a name, or module:Class.")] = None,
    from_onnx: Annotated[
        Path | None, typer.Option("--from-onnx", help="Register this foreign ONNX file; needs no PyTorch.")
    ] = None,
    samples: Annotated[Path | None, typer.Option(help="Folder of real published pictures to prove it on.")] = None,
    out: Annotated[Path, typer.Option(help="The catalogue's folder.")] = Path("models_onnx"),
    jobs: Annotated[int, typer.Option(min=1, help="Worker processes.")] = max(1, (os.cpu_count() or 2) // 2),
    resume: Annotated[bool, typer.Option("--resume", help="Skip what is complete and up to date.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report for machines, on standard output.")] = False,
) -> None:
    """Turn PyTorch experts, or foreign ONNX files, into verified bundles."""
    try:
        if (all_of is None) == (one_of is None):
            raise ExportError("nothing to export", "give --all MANIFEST or --manifest MANIFEST")
        if all_of is not None:
            todo = [Job(entry, all_of.parent, out) for entry in manifest.read(all_of).experts]
            outcomes = _export_many(todo, jobs, resume, as_json)
        else:
            assert one_of is not None
            outcomes = [_export_one(one_of, name, checkpoint, architecture, from_onnx, samples, out, resume)]
    except ApplianceError as error:
        typer.echo(f"export: {error}", err=True)
        raise typer.Exit(1) from error
    _report(outcomes, as_json)
    if not all(outcome.passed for outcome in outcomes):
        raise typer.Exit(1)


def _export_one(
    path: Path,
    name: str | None,
    checkpoint: Path | None,
    architecture: str | None,
    from_onnx: Path | None,
    samples: Path | None,
    out: Path,
    resume: bool,
) -> Outcome:
    entry = manifest.entry_of(
        path,
        name,
        checkpoint=_absolute(checkpoint),
        architecture=architecture,
        onnx=_absolute(from_onnx),
        samples=_absolute(samples),
    )
    job = Job(entry, path.parent, out)
    if resume and many.is_done(job):
        return Outcome(entry.name, entry.version, True, 0.0, was_there=True)
    out.mkdir(parents=True, exist_ok=True)
    return many.export_one(job)


def _absolute(path: Path | None) -> str | None:
    """Flags are relative to where the command runs, a manifest's paths to the manifest."""
    return None if path is None else str(path.resolve())


def _export_many(todo: Sequence[Job], workers: int, resume: bool, is_quiet: bool) -> list[Outcome]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]} failed"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=is_quiet) as progress:
        bar = progress.add_task("exporting", total=len(todo), failed=0)
        failed = 0

        def done(outcome: Outcome) -> None:
            nonlocal failed
            failed += not outcome.passed
            progress.update(bar, advance=1, failed=failed)

        return many.export_all(todo, workers, resume, done)


def _report(outcomes: Sequence[Outcome], as_json: bool) -> None:
    passed = [outcome for outcome in outcomes if outcome.passed]
    failed = [outcome for outcome in outcomes if not outcome.passed]
    if as_json:
        summary = {
            "passed": len(passed),
            "failed": len(failed),
            "already_there": sum(outcome.was_there for outcome in passed),
            "experts": [asdict(outcome) for outcome in outcomes],
        }
        typer.echo(json.dumps(summary, indent=2))
        return
    table = Table("experts", "exported", "already there", "failed", "model MB", "seconds each")
    fresh = [outcome for outcome in passed if not outcome.was_there]
    seconds = sum(outcome.seconds for outcome in fresh) / max(len(fresh), 1)
    megabytes = sum(outcome.model_bytes for outcome in fresh) / 1e6
    counts = (len(outcomes), len(fresh), len(passed) - len(fresh), len(failed))
    table.add_row(*map(str, counts), f"{megabytes:.1f}", f"{seconds:.1f}")
    console = Console()
    console.print(table)
    for outcome in failed[:_MAX_FAILURES_SHOWN]:
        console.print(f"{outcome.expert} {outcome.version}: {outcome.why}", style="red", markup=False, soft_wrap=True)


if __name__ == "__main__":
    app()
