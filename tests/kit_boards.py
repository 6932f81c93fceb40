"""Products for tests: parts in a row, SIDE pixels each, and pictures of whole boards and of their parts."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, ValueInfoProto, helper
from PIL import Image

from appliance.lab.shapes import manifest_text
from tests.kit_box import write_catalog
from tests.kit_models import SIDE, conv_net, write_bundle

BOARDS = "coe/v1/plant/board/#"


def write_board_catalog(folder: Path) -> Path:
    """Components that always pass (c-good), always fail (c-bad), and one that passes beside its golden picture."""
    write_catalog(folder, {"good": conv_net(0), "bad": conv_net(1)})
    for name, threshold in (("good", "1.0"), ("bad", "0.0")):
        manifest = folder / name / "1" / "expert.toml"
        manifest.write_text(manifest.read_text().replace("threshold = 0.5", f"threshold = {threshold}"))
    inputs = [
        {"name": "image", "size": (SIDE, SIDE)},
        {"name": "reference", "size": (SIDE, SIDE), "source": "reference"},
    ]
    bundle = write_bundle(folder, "compared", two_inputs(), inputs=inputs)
    (bundle.folder / "expert.toml").write_text(manifest_text(bundle).replace("threshold = 0.5", "threshold = 1.0"))
    graph = folder / "graph.toml"
    graph.write_text(graph.read_text() + "\nc-compared = 'compared'\n")
    return folder


def two_inputs() -> ModelProto:
    """A network of a picture and its reference: their difference goes through `conv_net`."""
    net = conv_net(2)
    graph = net.graph
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name == "image":
                node.input[position] = "difference"
    graph.node.insert(0, helper.make_node("Sub", ["image", "reference"], ["difference"], "subtract"))
    reference = ValueInfoProto()
    reference.CopyFrom(graph.input[0])
    reference.name = "reference"
    graph.input.append(reference)
    return net


def write_product(catalog: Path, name: str, parts: Mapping[str, str], *, golden: bool = False) -> Path:
    """A recipe of these designators and components; returns its file."""
    home = catalog / "products" / name
    home.mkdir(parents=True, exist_ok=True)
    lines = ["schema = 1", f"product = '{name}'", f"size = [{SIDE * len(parts)}, {SIDE}]"]
    if golden:
        (home / "golden.png").write_bytes(encoded(np.full((SIDE, SIDE * len(parts), 3), 90, np.uint8)))
        lines.append("golden = 'golden.png'")
    for number, (designator, component) in enumerate(parts.items()):
        lines += ["[[placements]]", f"designator = '{designator}'", f"component = '{component}'"]
        lines.append(f"rect = [{SIDE * number}, 0, {SIDE}, {SIDE}]")
    (home / "recipe.toml").write_text("\n".join(lines), "utf-8")
    return home / "recipe.toml"


def board_pixels(parts: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE * parts, 3), np.uint8)


def part_of(board: NDArray[np.uint8], number: int) -> bytes:
    """The picture that a camera would take of one part."""
    return encoded(board[:, SIDE * number : SIDE * (number + 1)])


def encoded(pixels: NDArray[np.uint8]) -> bytes:
    """As PNG: what is cut from it is what was there."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def infer(product: str, serial: str, part: str, line: str = "line1") -> str:
    return f"coe/v1/plant/infer/{line}/{product}/{serial}/{part}"
