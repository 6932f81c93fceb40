"""A catalogue of one trained expert, made of the shipped ones, with real published pictures of its component."""

from __future__ import annotations

import io
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from appliance import catalog as catalogs
from appliance.catalog import Bundle
from appliance.lab.boards import parts_of
from export.variants import VariantJob

SHIPPED = Path(__file__).parents[1] / "models_onnx"
EXPERT = "pcb-12100-03"
PRODUCT = "12100003"


@dataclass(frozen=True, slots=True)
class Line:
    """What lies in a folder: `catalog`, and below `pictures` a folder for the expert."""

    folder: Path

    @property
    def catalog(self) -> Path:
        return self.folder / "catalog"

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures" / EXPERT

    @property
    def job(self) -> VariantJob:
        return VariantJob(self.catalog / EXPERT / "1", self.pictures)

    @property
    def bundle(self) -> Bundle:
        return catalogs.read_bundle(self.catalog / EXPERT / "1")

    @property
    def variant_path(self) -> Path:
        found = self.bundle.in_int8
        assert found is not None
        return found.model_path

    def copied(self, folder: Path) -> Line:
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return Line(folder)


def write_line(folder: Path, *, boards: int = 14) -> Line:
    """The pictures are of the products' test tiles, sound boards among them, in folders named after what is true."""
    line = Line(folder)
    shutil.copytree(SHIPPED / EXPERT, line.catalog / EXPERT)
    shutil.copytree(SHIPPED / "products" / PRODUCT, line.catalog / "products" / PRODUCT)
    shipped = catalogs.load(SHIPPED)
    products = [product for name, product in shipped.products.items() if name[:5] == PRODUCT[:5]][:boards]
    for product in products:
        _write_pictures(line.pictures, product)
    components = sorted({placement.component for placement in products[0].recipe.placements})
    lines = ["schema = 1", "name = 'test'", "[components]", *(f"{name} = '{EXPERT}'" for name in components)]
    (line.catalog / "graph.toml").write_text("\n".join(lines), "utf-8")
    return line


def _write_pictures(folder: Path, product: catalogs.Product) -> None:
    assert product.golden_path is not None
    with Image.open(product.golden_path) as opened:
        golden = opened.convert("L")
    for is_sound in (False, True):
        for part in parts_of(product, "line1", "", sound=is_sound):
            if part.component != EXPERT or part.truth is None:
                continue
            home = folder / part.truth
            home.mkdir(parents=True, exist_ok=True)
            stem = f"{product.recipe.product}-{part.part}-{'golden' if is_sound else 'sample'}"
            (home / f"{stem}.jpg").write_bytes(part.picture)
            x, y, width, height = part.rect
            golden.crop((x, y, x + width, y + height)).save(home / f"{stem}.reference.png")


def blacken(path: Path) -> None:
    """The picture, its lens covered."""
    with Image.open(path) as opened:
        size = opened.size
    encoded = io.BytesIO()
    Image.new("L", size).save(encoded, "JPEG")
    path.write_bytes(encoded.getvalue())
