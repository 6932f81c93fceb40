"""`python -m export.evaluate`: the shipped experts on the shipped test tiles, from published JPEG to verdict.

Needs the catalogue only: every product carries an inspected sample and its true defects; none was learned from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated

import onnxruntime
import typer
from rich.console import Console
from rich.table import Table

from appliance import catalog, samples
from appliance.catalog import Bundle, Catalog, Product
from appliance.errors import ApplianceError, ExportError
from appliance.samples import DEFECTS, SOUND, Count, Judged, Localisation
from export import chain, proof
from export.chain import Expert
from export.figure import LABELS, read_pictures
from export.manifest import output_names
from export.products import DETECTOR, FIGURE
from export.proof import Arrays
from export.quality import Inspection, count, inspected_defects, localise
from export.tiles import CELL, Cell, Tile

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_ANY_FINDING = 0.0
"""The detector's own threshold has been applied when its findings arrive here."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: verdicts of a group of placements."""

    name: str
    placements: int
    defective: int
    missed: int
    sound: int
    false_alarms: int
    recall: float
    false_alarm_rate: float


@dataclass(frozen=True, slots=True)
class Report:
    """Everything measured. `outside`: boxes whose centre lies in no inspected cell, so that nobody could find them."""

    onnxruntime: str
    tiles: int
    chain: Row
    classifiers_alone: Row
    sound_boards: Row
    detector_runs: float
    localisation: dict[str, float]
    boxes_outside: int
    by_board: tuple[Row, ...]
    by_expert: tuple[Row, ...]
    recall_by_type: dict[str, float]
    figures: Row | None


@app.command()
def main(
    folder: Annotated[Path, typer.Option("--catalog", help="The catalogue's folder.")] = Path("models_onnx"),
    figures: Annotated[
        Path | None, typer.Option(help="Folder with normal/ and anomaly/ test pictures of the moulded figure.")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Judge the int8 variants of those that have one.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report for machines.")] = False,
) -> None:
    """Missed defects, false alarms and localisation of the shipped experts."""
    try:
        report = evaluate(_in_int8(catalog.load(folder)) if int8 else catalog.load(folder), figures)
    except ApplianceError as error:
        typer.echo(f"evaluate: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
    else:
        _print(report)


def evaluate(shipped: Catalog, figures: Path | None) -> Report:
    """Every placement of every product, as inspected, and as a sound board that lies a pixel off."""
    experts = {name: _expert(bundle) for name, bundle in shipped.bundles.items()}
    if DETECTOR not in experts or not shipped.products:
        raise ExportError(
            f"{shipped.folder} holds no circuit-board products", "point --catalog at the shipped models_onnx"
        )
    inspected = _inspect_all(shipped, experts, is_golden=False)
    golden = _inspect_all(shipped, experts, is_golden=True)
    whole = partial(_row, experts, is_chain=True)
    tiles = {one.tile.id: one.tile for one in inspected}.values()
    located = localise(inspected, _ANY_FINDING)
    return Report(
        onnxruntime=onnxruntime.__version__,
        tiles=len(tiles),
        chain=whole("whole chain", inspected),
        classifiers_alone=_row(experts, "classifiers alone", inspected, is_chain=False),
        sound_boards=whole("sound boards", golden),
        detector_runs=sum(one.found is not None for one in inspected) / len(inspected),
        localisation=_rounded(located),
        boxes_outside=sum(len(tile.defects) - len(inspected_defects(tile)) for tile in tiles),
        by_board=_grouped(inspected, lambda one: one.tile.board, whole),
        by_expert=_grouped(inspected, lambda one: one.expert, whole),
        recall_by_type={
            kind: round(whole(kind, [one for one in inspected if one.truth == kind]).recall, 4) for kind in DEFECTS
        },
        figures=_judge_figures(experts[FIGURE], figures) if figures is not None and FIGURE in experts else None,
    )


def _in_int8(shipped: Catalog) -> Catalog:
    return replace(shipped, bundles={name: bundle.in_int8 or bundle for name, bundle in shipped.bundles.items()})


def _expert(bundle: Bundle) -> Expert:
    session = proof.open_session(bundle.model_path, bundle.manifest.name)
    names = output_names(bundle.manifest.head)

    def compute(feeds: Arrays) -> Arrays:
        return dict(zip(names, session.run(list(names), dict(feeds)), strict=True))

    return Expert(bundle.manifest, compute)


def _inspect_all(shipped: Catalog, experts: dict[str, Expert], *, is_golden: bool) -> list[Inspection]:
    inspections = []
    for product in shipped.products.values():
        expert_of = {
            _cell(placement.rect): experts[shipped.graph.entries[placement.component]]
            for placement in product.recipe.placements
        }
        inspections += chain.inspect(_tile(product), expert_of, experts[DETECTOR], is_golden=is_golden)
    return inspections


def _tile(product: Product) -> Tile:
    return Tile(
        product.recipe.product,
        product.folder / "golden.jpg",
        product.folder / "sample.jpg",
        product.folder / "sample.txt",
    )


def _cell(rect: tuple[int, int, int, int]) -> Cell:
    return Cell(row=rect[1] // CELL, column=rect[0] // CELL)


def _grouped(
    inspections: Sequence[Inspection],
    key: Callable[[Inspection], str],
    row: Callable[[str, Sequence[Inspection]], Row],
) -> tuple[Row, ...]:
    return tuple(row(name, list(members)) for name, members in groupby(sorted(inspections, key=key), key=key))


def _row(experts: dict[str, Expert], name: str, inspections: Sequence[Inspection], *, is_chain: bool) -> Row:
    """Each expert's verdicts by its own threshold, and with the chain the detector's findings too."""
    counts = [
        count(members, experts[expert].manifest.head.threshold, _ANY_FINDING if is_chain else float("inf"))
        for expert, members in groupby(sorted(inspections, key=lambda one: one.expert), key=lambda one: one.expert)
    ]
    return _as_row(name, len(inspections), sum(counts, start=Count(0, 0, 0, 0)))


def _as_row(name: str, placements: int, total: Count) -> Row:
    return Row(
        name,
        placements,
        total.defective,
        total.missed,
        total.sound,
        total.false_alarms,
        round(total.recall, 4),
        round(total.false_alarm_rate, 5),
    )


def _rounded(located: Localisation) -> dict[str, float]:
    return {
        "boxes": located.boxes,
        "findings": located.findings,
        "right": located.right,
        "precision": round(located.precision, 4),
        "recall": round(located.recall, 4),
        "f": round(located.f, 4),
    }


def _judge_figures(expert: Expert, folder: Path) -> Row:
    pictures = read_pictures(folder)
    feeds = {spec.name: proof.prepared([one.picture for one in pictures], spec) for spec in expert.manifest.inputs}
    failed = chain.defective_share(expert.manifest.head, expert.compute(feeds)) >= expert.manifest.head.threshold
    truths = [SOUND if one.label == LABELS[0] else one.label for one in pictures]
    judged = [Judged(truth, bool(fails)) for truth, fails in zip(truths, failed, strict=True)]
    return _as_row("moulded figure", len(pictures), samples.count(judged))


def _print(report: Report) -> None:
    console = Console()
    console.print(f"{report.tiles} test tiles, ONNX Runtime {report.onnxruntime}")
    groups = [
        report.chain,
        report.classifiers_alone,
        report.sound_boards,
        *([report.figures] if report.figures else []),
    ]
    console.print(_table("chain", groups))
    console.print(_table("by board", report.by_board))
    console.print(_table("by expert", report.by_expert))
    console.print("recall by type:", ", ".join(f"{kind} {value:.3f}" for kind, value in report.recall_by_type.items()))
    console.print("localisation (IoU 0.33, type right):", ", ".join(f"{k} {v}" for k, v in report.localisation.items()))
    console.print(f"the detector ran for {report.detector_runs:.1%} of the placements")
    console.print(f"{report.boxes_outside} boxes have their centre in no inspected cell and count nowhere above")


def _table(title: str, rows: Sequence[Row]) -> Table:
    table = Table("what", "placements", "defective", "missed", "sound", "false alarms", "recall", "rate", title=title)
    for row in rows:
        values = (row.placements, row.defective, row.missed, row.sound, row.false_alarms)
        table.add_row(row.name, *map(str, values), f"{row.recall:.3f}", f"{row.false_alarm_rate:.4f}")
    return table


if __name__ == "__main__":
    app()
