"""`python -m export`: one expert, a foreign ONNX file, or hundreds at once. `appliance export` is the same command."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from appliance.errors import ApplianceError, ExportError
from export import manifest, many
from export.many import Job, Outcome, Work
from export.variants import AGREEMENT, VariantJob

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
    samples: Annotated[
        Path | None,
        typer.Option(
            help="Folder of real published pictures to prove it on; with --int8 and no manifest, of a folder for each "
            "expert."
        ),
    ] = None,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="Make an int8 variant of each beside its network, from 32 pictures or more; without a manifest, of "
            "every bundle that is in --out.",
        ),
    ] = False,
    agreement: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Share of the pictures of which a variant has to find what the network finds."
        ),
    ] = AGREEMENT,
    out: Annotated[Path, typer.Option(help="The catalogue's folder.")] = Path("models_onnx"),
    jobs: Annotated[int, typer.Option(min=1, help="Worker processes.")] = max(1, (os.cpu_count() or 2) // 2),
    resume: Annotated[bool, typer.Option("--resume", help="Skip what is complete and up to date.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report for machines, on standard output.")] = False,
) -> None:
    """Turn PyTorch experts, or foreign ONNX files, into verified bundles."""
    try:
        todo: list[Job] = []
        if all_of is not None and one_of is None:
            todo += [Job(entry, all_of.parent, out) for entry in manifest.read(all_of).experts]
            _check_samples(todo, int8)
            outcomes = _export_many(todo, jobs, resume, as_json)
        elif one_of is not None and all_of is None:
            todo += [_one_of(one_of, name, checkpoint, architecture, from_onnx, samples, out)]
            _check_samples(todo, int8)
            outcomes = [_export_one(todo[0], resume)]
        elif all_of is not None or not int8:
            raise ExportError("nothing to export", "give --all MANIFEST or --manifest MANIFEST, or --int8 alone")
        else:
            outcomes = []
        if int8:
            wanted = _of_exported(todo, outcomes, agreement) if todo else _of_all(out, name, samples, agreement)
            outcomes += _export_many(wanted, jobs, resume, as_json)
    except ApplianceError as error:
        typer.echo(f"export: {error}", err=True)
        raise typer.Exit(1) from error
    _report(outcomes, as_json)
    if not all(outcome.passed for outcome in outcomes):
        raise typer.Exit(1)


def _one_of(
    path: Path,
    name: str | None,
    checkpoint: Path | None,
    architecture: str | None,
    from_onnx: Path | None,
    samples: Path | None,
    out: Path,
) -> Job:
    entry = manifest.entry_of(
        path,
        name,
        checkpoint=_absolute(checkpoint),
        architecture=architecture,
        onnx=_absolute(from_onnx),
        samples=_absolute(samples),
    )
    return Job(entry, path.parent, out)


def _export_one(job: Job, resume: bool) -> Outcome:
    if resume and many.is_done(job):
        return Outcome(*job.key, True, 0.0, was_there=True)
    job.out.mkdir(parents=True, exist_ok=True)
    return many.export_one(job)


def _check_samples(todo: Sequence[Job], int8: bool) -> None:
    """Before an hour of exporting, not after it."""
    for job in todo:
        if int8 and job.entry.samples is None:
            raise ExportError(
                f"--int8 needs pictures, and {job.entry.name} names none", "give a folder of them: samples = …"
            )


def _of_exported(todo: Sequence[Job], outcomes: Sequence[Outcome], agreement: float) -> list[VariantJob]:
    """Of the bundles that were exported, with the samples that the manifest names."""
    return [
        VariantJob(job.out / job.entry.name / str(job.entry.version), job.root / job.entry.samples, agreement)
        for job, outcome in zip(todo, outcomes, strict=True)
        if outcome.passed and job.entry.samples is not None
    ]


def _of_all(out: Path, name: str | None, samples: Path | None, agreement: float) -> list[VariantJob]:
    """Of the bundles that lie there, of one name if it is given."""
    if samples is None:
        raise ExportError("--int8 needs pictures", "give --samples FOLDER, in which FOLDER/<expert>/ holds each one's")
    folders = sorted(path.parent for path in out.glob(f"{name or '*'}/*/expert.toml") if path.parent.name.isdecimal())
    if not folders:
        raise ExportError(f"{out} holds no bundle{f' of {name}' if name else ''}", "give the catalogue with --out")
    return [VariantJob(folder, samples / folder.parent.name, agreement) for folder in folders]


def _absolute(path: Path | None) -> str | None:
    """Flags are relative to where the command runs, a manifest's paths to the manifest."""
    return None if path is None else str(path.resolve())


def _export_many(todo: Sequence[Work], workers: int, resume: bool, is_quiet: bool) -> list[Outcome]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]} failed"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=is_quiet) as progress:
        what = "making int8 variants" if any(isinstance(job, VariantJob) for job in todo) else "exporting"
        bar = progress.add_task(what, total=len(todo), failed=0)
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
    console = Console()
    for table in _tables(outcomes):
        console.print(table)
    for outcome in failed[:_MAX_FAILURES_SHOWN]:
        console.print(f"{outcome.expert} {outcome.version}: {outcome.why}", style="red", markup=False, soft_wrap=True)


def _tables(outcomes: Sequence[Outcome]) -> Iterator[Table]:
    """One of the bundles and one of the int8 variants, each where there are any."""
    for precision, what, extra in (("full", "experts", ()), ("int8", "int8 variants", ("MB before", "agree"))):
        of_it = [outcome for outcome in outcomes if outcome.precision == precision]
        if of_it:
            table = Table(what, "exported", "already there", "failed", "MB", "seconds each", *extra)
            table.add_row(*_row(of_it), *(_beside(of_it) if extra else ()))
            yield table


def _row(outcomes: Sequence[Outcome]) -> list[str]:
    fresh = [outcome for outcome in outcomes if outcome.passed and not outcome.was_there]
    there = sum(outcome.was_there for outcome in outcomes)
    counts = (len(outcomes), len(fresh), there, len(outcomes) - len(fresh) - there)
    megabytes = sum(outcome.model_bytes for outcome in fresh) / 1e6
    seconds = sum(outcome.seconds for outcome in fresh) / max(len(fresh), 1)
    return [*map(str, counts), f"{megabytes:.1f}", f"{seconds:.1f}"]


def _beside(outcomes: Sequence[Outcome]) -> list[str]:
    """What the networks have that the variants stand for, and how far the least agreeing of these agrees."""
    agreements = [outcome.agreement for outcome in outcomes if outcome.agreement is not None]
    least = f"{min(agreements):.2%}" if agreements else ""
    return [f"{sum(outcome.full_bytes for outcome in outcomes) / 1e6:.1f}", least]


if __name__ == "__main__":
    app()
