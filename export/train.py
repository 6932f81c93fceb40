"""`python -m export.train`: teaches the shipped experts and writes what `python -m export --all` turns into bundles.

    <out>/checkpoints/*.pt          one state dictionary per expert
    <out>/samples/<expert>/*.jpg    published pictures with their references, for the proof of each export
    <out>/manifest.toml             every expert, with inputs, head and threshold
    <out>/models_onnx/              graph.toml and products/, to which the export adds the bundles

The same seed on the same machine gives the same weights. Only train tiles are learned from, and the last eight of
each board choose the thresholds instead.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from torch import nn

from appliance.errors import ApplianceError
from appliance.samples import SOUND
from export import calibrate, chain, figure, manifest, products, teach
from export.calibrate import Thresholds
from export.components import Family, find_family
from export.convert import compute
from export.entries import cell_entry, detector_entry, figure_entry
from export.manifest import Entry
from export.nets import CellClassifier
from export.quality import truth_of
from export.samples import Pairs
from export.teach import Say
from export.tiles import SHIPPED_BOARDS, Cell, Picture, Split, Tile, read_boards, window

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

TYPES = 16
ALL_TYPES = 26
SAMPLES = 6
"""Published pictures per expert, for the proof of its export."""

Place = tuple[Tile, Cell]


@dataclass(frozen=True, slots=True)
class Sample:
    """A published picture as its encoded bytes, with the reference where there is one."""

    encoded: bytes
    suffix: str
    reference: Picture | None


@dataclass(frozen=True, slots=True)
class Trained:
    """A network, what the manifest says of it, and a few published pictures of what it is for."""

    entry: Entry
    net: nn.Module
    samples: tuple[Sample, ...]


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="A clone of DeepPCB, or any folder with its tiles.")],
    out: Annotated[Path, typer.Option(help="Where checkpoints, samples, manifest and products go.")],
    figures: Annotated[
        Path | None, typer.Option(help="Folder with normal/ and anomaly/ pictures of the moulded figure to learn from.")
    ] = None,
    is_all: Annotated[bool, typer.Option("--all", help="All nine boards with 26 types each: 234 experts.")] = False,
    seed: Annotated[int, typer.Option(help="Same seed, same weights.")] = 0,
) -> None:
    """Teach the experts and write checkpoints, export manifest, graph and recipes."""
    started = time.monotonic()

    def say(line: str) -> None:
        typer.echo(f"{time.monotonic() - started:6.0f} s  {line}", err=True)

    torch.use_deterministic_algorithms(True)
    try:
        splits = read_boards(data)
        shipped = [split for split in splits if is_all or split.board in SHIPPED_BOARDS]
        families = _families(shipped, ALL_TYPES if is_all else TYPES, seed)
        trained = _teach_boards(splits, families, seed, say)
        if figures is not None:
            trained.append(_teach_figure(figures, seed, say))
        _save(trained, out)
        _write_catalogue(shipped, families, figures is not None, out / "models_onnx")
    except ApplianceError as error:
        typer.echo(f"train: {error}", err=True)
        raise typer.Exit(1) from error
    say(f"{len(trained)} experts are taught; next: python -m export --all {out}/manifest.toml --out {out}/models_onnx")


def _families(shipped: Sequence[Split], types: int, seed: int) -> dict[str, Family]:
    generator = np.random.default_rng(seed)
    return {split.board: find_family(split.board, [*split.fit, *split.held_out], types, generator) for split in shipped}


def _teach_boards(splits: Sequence[Split], families: Mapping[str, Family], seed: int, say: Say) -> list[Trained]:
    """The experts of every component type, and the detector behind them."""
    fit = [tile for split in splits for tile in split.fit]
    shared = teach.teach_classifier(fit, seed, say)
    nets = _fine_tuned(shared, splits, families, teach.common_lesson(fit, seed), seed, say)
    detector = teach.teach_detector(fit, seed, say)
    thresholds = _thresholds(splits, families, nets, shared, detector)
    say(f"thresholds from held-out train tiles: classifier {thresholds.classifier}, detector {thresholds.detector}")
    held_out = [(tile, cell) for split in splits for tile in split.held_out for cell in tile.cells]
    return [
        *_cell_experts(splits, families, nets, thresholds),
        Trained(detector_entry(thresholds), detector, _samples(held_out)),
    ]


def _fine_tuned(
    shared: CellClassifier,
    splits: Sequence[Split],
    families: Mapping[str, Family],
    common: Pairs,
    seed: int,
    say: Say,
) -> dict[str, nn.Module]:
    nets: dict[str, nn.Module] = {}
    for split in splits:
        if (family := families.get(split.board)) is not None:
            for number, name in enumerate(family.names):
                nets[name] = teach.fine_tune(shared, _places(split.fit, family, number), common, seed + number)
            say(f"board {split.board}: {len(family.names)} experts fine-tuned")
    return nets


def _thresholds(
    splits: Sequence[Split],
    families: Mapping[str, Family],
    nets: Mapping[str, nn.Module],
    shared: nn.Module,
    detector: nn.Module,
) -> Thresholds:
    """From the held-out train tiles of all boards; the shared expert stands in where a board has none of its own."""
    low = Thresholds(classifier=0.5, detector=calibrate.LOWEST)
    last = _expert(detector_entry(low), detector)
    inspections = []
    for split in splits:
        for tile in split.held_out:
            names = _expert_names(tile, families.get(split.board))
            experts = {
                name: _expert(cell_entry(name, split.board, low), nets.get(name, shared)) for name in names.values()
            }
            inspections += chain.inspect(tile, {cell: experts[name] for cell, name in names.items()}, last)
    return calibrate.choose(inspections)


def _expert_names(tile: Tile, family: Family | None) -> dict[Cell, str]:
    if family is None:
        return dict.fromkeys(tile.cells, "shared")
    return {cell: family.names[family.type_of(tile, cell)] for cell in tile.cells}


def _expert(entry: Entry, net: nn.Module) -> chain.Expert:
    return chain.Expert(entry.draft, partial(compute, net, entry))


def _cell_experts(
    splits: Sequence[Split], families: Mapping[str, Family], nets: Mapping[str, nn.Module], thresholds: Thresholds
) -> list[Trained]:
    trained = []
    for split in splits:
        if (family := families.get(split.board)) is not None:
            for number, name in enumerate(family.names):
                # Held-out places first: what the expert has not seen proves more.
                places = _places([*split.held_out, *split.fit], family, number)
                trained.append(Trained(cell_entry(name, split.board, thresholds), nets[name], _samples(places)))
    return trained


def _places(tiles: Sequence[Tile], family: Family, number: int) -> list[Place]:
    return [(tile, cell) for tile in tiles for cell in tile.cells if family.type_of(tile, cell) == number]


def _samples(places: Sequence[Place]) -> tuple[Sample, ...]:
    """Some placements as published, every second one defective as far as there are such."""
    defective = [place for place in places if truth_of(*place) not in (SOUND, None)]
    sound = [place for place in places if truth_of(*place) == SOUND]
    alternating = [place for pair in zip(defective, sound, strict=False) for place in pair]
    chosen = [*alternating, *sound[len(defective) :]][:SAMPLES]
    return tuple(
        Sample(chain.published_bytes(tile.inspected, cell), ".jpg", window(tile.golden, cell.corner))
        for tile, cell in chosen
    )


def _teach_figure(folder: Path, seed: int, say: Say) -> Trained:
    photographs = figure.read_pictures(folder)
    pictures = np.stack([figure.reduced(one.picture) for one in photographs])
    labels = np.array([figure.LABELS.index(one.label) for one in photographs], dtype=np.int64)
    net = teach.teach_figure(pictures, labels, seed, say)
    files = [one.path for one in photographs]
    shown = [*files[: SAMPLES // 2], *files[-SAMPLES // 2 :]]
    return Trained(figure_entry(), net, tuple(Sample(path.read_bytes(), path.suffix, None) for path in shown))


def _save(trained: Sequence[Trained], out: Path) -> None:
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    for one in trained:
        torch.save(one.net.state_dict(), out / str(one.entry.checkpoint))
        folder = out / str(one.entry.samples)
        folder.mkdir(parents=True, exist_ok=True)
        for number, sample in enumerate(one.samples):
            (folder / f"{number}{sample.suffix}").write_bytes(sample.encoded)
            if sample.reference is not None:
                Image.fromarray(sample.reference).save(folder / f"{number}.reference.png")
    manifest.write(tuple(one.entry for one in trained), out / "manifest.toml")


def _write_catalogue(shipped: Sequence[Split], families: Mapping[str, Family], has_figure: bool, folder: Path) -> None:
    for split in shipped:
        for tile in split.test:
            products.write_product(tile, families[split.board], folder / "products")
    products.write_graph(list(families.values()), has_figure, folder / "graph.toml")


if __name__ == "__main__":
    app()
