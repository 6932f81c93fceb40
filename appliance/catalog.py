"""Reads `models_onnx/`: expert manifests, the expert graph and product recipes, each checked once as it enters.

    models_onnx/graph.toml                            components, edges, usage
    models_onnx/<expert>/<version>/expert.toml        one bundle: manifest, model.onnx, golden.npz, perhaps a variant
    models_onnx/products/<product>/recipe.toml        placements of a product and its golden picture

A catalogue knows which experts exist, not which are loaded. It opens no model and decodes no picture.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from appliance.core.graph import Condition, Edge, ExpertGraph, Table, compile_graph
from appliance.core.types import Precision
from appliance.errors import CatalogError, DigestMismatch, GraphError, VariantError

MAX_MANIFEST_BYTES = 4 << 20  # a recipe of 10,000 placements has 1.2 MB

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
TopicLevel = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Label = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Positive = Annotated[int, Field(gt=0, le=65535)]
Share = Annotated[float, Field(ge=0, le=1)]


class Manifest(BaseModel):
    """Text that entered: frozen, and a key that we do not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelFile(Manifest):
    file: FileName = "model.onnx"
    sha256: Sha256
    bytes: Annotated[int, Field(gt=0)]
    opset: Annotated[int, Field(ge=7)]
    ir_version: Annotated[int, Field(ge=3)]
    max_batch: Annotated[int, Field(ge=1, le=1024)] = Field(description="Largest batch proven at export; 1 if fixed.")


class GoldenFile(Manifest):
    """Real samples with the outputs that the original framework computed; arrays named like the graph's tensors."""

    file: FileName = "golden.npz"
    sha256: Sha256
    tolerance: Annotated[float, Field(gt=0)] = Field(description="Largest absolute difference of an output.")


class Variant(ModelFile):
    """The network once more in another precision, made from the bundle's own, and what it showed beside that."""

    file: FileName
    made_from: Sha256 = Field(description="SHA-256 of the network that it was made from.")
    scope: Literal["all", "layers"] = Field(description="Quantised: every operator that can be, or inner layers only.")
    tolerance: Mapping[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="By output, the largest absolute difference from the golden one."
    )
    agreement: Share = Field(description="With the network that it was made from, over the pictures that judged it.")
    judged: Annotated[int, Field(ge=1)] = Field(description="Pictures that judged it, none of which calibrated it.")
    calibrated: Annotated[int, Field(ge=1)] = Field(description="Pictures that calibrated it.")
    samples_sha256: Sha256 = Field(description="Of all these pictures.")
    runtime: str = Field(description="What made it: name and version.")


class Variants(Manifest):
    int8: Variant | None = None


class InputSpec(Manifest):
    """How a picture becomes one float32 graph input of shape (N, C, height, width)."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    source: Literal["picture", "reference"] = "picture"
    color: Literal["grey", "rgb", "bgr"] = "rgb"
    size: tuple[Positive, Positive] = Field(description="Width and height that the net takes.")
    crop: tuple[Positive, Positive] | None = Field(None, description="Centred crop in picture pixels before resizing.")
    scale: float = Field(1.0, description="Factor on the 0..255 value, applied first.")
    mean: tuple[float, ...] = Field((0.0,), description="Subtracted after scaling; one for all channels or one each.")
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field((1.0,), description="Divides after the mean is subtracted.")

    @property
    def channels(self) -> int:
        return 1 if self.color == "grey" else 3

    @model_validator(mode="after")
    def _channel_counts_agree(self) -> InputSpec:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(f"{name} has {len(values)} values for {self.channels} channels")
        return self


class ClassificationHead(Manifest):
    """One label per picture from an (N, labels) output.

    With `normal`, the part fails when 1 - P(normal) reaches `threshold`; without it, when any label reaches it
    that is listed in `failing`.
    """

    kind: Literal["classification"]
    output: Label
    activation: Literal["softmax", "sigmoid", "none"] = "softmax"
    labels: Annotated[tuple[Label, ...], Field(min_length=2)]
    normal: Label | None = None
    failing: tuple[Label, ...] = ()
    threshold: Share = 0.5

    @model_validator(mode="after")
    def _labels_exist(self) -> ClassificationHead:
        for label in (*self.failing, *([self.normal] if self.normal is not None else [])):
            if label not in self.labels:
                raise ValueError(f"{label!r} is not among the labels {', '.join(self.labels)}")
        return self


class DetectionHead(Manifest):
    """Boxes from outputs (N, A, 4) and (N, A, labels): x1, y1, x2, y2 in pixels of the input, or relative to it."""

    kind: Literal["detection"]
    boxes: Label
    scores: Label
    coordinates: Literal["pixels", "relative"] = "pixels"
    labels: Annotated[tuple[Label, ...], Field(min_length=1)]
    background: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Score column that means nothing is there."
    )
    threshold: Share = 0.5
    iou: Share = Field(0.5, description="Boxes of one label that overlap more are one finding.")
    max_findings: Annotated[int, Field(ge=1, le=1000)] = 100
    region: tuple[float, float, float, float] | None = Field(
        None, description="Only findings centred in this rectangle of the picture count: the rest is a neighbour's."
    )
    fails: bool = Field(True, description="Whether a finding fails the part.")


Head = Annotated[ClassificationHead | DetectionHead, Field(discriminator="kind")]


class ExpertManifest(Manifest):
    """expert.toml: everything about one version of one expert but its weights."""

    schema_: Literal[1] = Field(alias="schema")
    name: Name
    version: Annotated[int, Field(ge=1)]
    description: str = ""
    model: ModelFile
    golden: GoldenFile | None = None
    inputs: Annotated[tuple[InputSpec, ...], Field(min_length=1, max_length=4)]
    head: Head
    variants: Variants = Variants()
    provenance: Mapping[str, str] = Field(default_factory=dict)

    @property
    def needs_reference(self) -> bool:
        return any(i.source == "reference" for i in self.inputs)


class ConditionSpec(Manifest):
    """When an edge is taken: every key given must hold for one finding."""

    label: Label | None = None
    not_label: Label | None = None
    score_at_least: Share | None = None
    score_below: Share | None = None


class EdgeSpec(Manifest):
    from_: Annotated[str, Field(alias="from", description="An expert, or a pattern such as `pcb-*`.")]
    to: Name
    when: tuple[ConditionSpec, ...] = Field((), description="Taken when any of these holds; always when empty.")


class TableSpec(Manifest):
    from_: Annotated[Name, Field(alias="from")]
    to: Annotated[Mapping[Label, Name], Field(min_length=1, description="By the label that was found.")]
    score_at_least: Share = 0.0


class GraphManifest(Manifest):
    """graph.toml: which expert a component asks first, and who is asked next."""

    schema_: Literal[1] = Field(alias="schema")
    name: Name
    components: Mapping[TopicLevel, Name]
    edges: tuple[EdgeSpec, ...] = ()
    tables: tuple[TableSpec, ...] = ()
    usage: Mapping[TopicLevel, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="Relative frequency of components, such as their count on a board."
    )
    limits: Mapping[Name, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="How many pictures may wait for an expert before those who lead to it pause."
    )
    stand_ins: Mapping[Name, Name] = Field(
        default_factory=dict, description="Who is asked while an expert cannot serve; the verdict says so."
    )
    versions: Mapping[Name, int] = Field(default_factory=dict, description="Pins an expert to a version.")


class Placement(Manifest):
    designator: TopicLevel
    component: TopicLevel
    rect: tuple[int, int, int, int] = Field(description="x, y, width, height in pixels of the board's picture.")


class Recipe(Manifest):
    """recipe.toml: what sits where on a product, and its golden picture to compare with."""

    schema_: Literal[1] = Field(alias="schema")
    product: TopicLevel
    size: tuple[Positive, Positive]
    golden: FileName | None = None
    placements: Annotated[tuple[Placement, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _placements_are_inside_and_unique(self) -> Recipe:
        seen = set()
        for p in self.placements:
            x, y, width, height = p.rect
            if min(x, y) < 0 or min(width, height) < 1 or x + width > self.size[0] or y + height > self.size[1]:
                raise ValueError(
                    f"placement {p.designator} reaches outside the {self.size[0]} x {self.size[1]} picture"
                )
            if p.designator in seen:
                raise ValueError(f"placement {p.designator} is listed twice")
            seen.add(p.designator)
        return self


@dataclass(frozen=True, slots=True)
class Bundle:
    """An expert version on disk.

    Of a bundle `in_int8` the manifest's network is the variant, whose outputs may be off the golden ones by as much as
    `tolerances` say; all else is as before.
    """

    folder: Path
    manifest: ExpertManifest
    precision: Precision = "full"
    tolerances: Mapping[str, float] = field(default_factory=dict)

    @property
    def model_path(self) -> Path:
        return self.folder / self.manifest.model.file

    @property
    def golden_path(self) -> Path | None:
        return self.folder / self.manifest.golden.file if self.manifest.golden else None

    @property
    def mark(self) -> str:
        """Names this version of this expert: made from all that its manifest says, the digests of its files too.

        A variant has its own, and does not change that of the network that it was made from.
        """
        return hashlib.sha256(self.manifest.model_dump_json(exclude={"variants"}).encode()).hexdigest()[:14]

    @property
    def in_int8(self) -> Bundle | None:
        """The bundle with its int8 variant in place of its network; None if it has none."""
        variant = self.manifest.variants.int8
        if variant is None:
            return None
        model = ModelFile.model_validate(variant.model_dump(include=set(ModelFile.model_fields)))
        manifest = self.manifest.model_copy(update={"model": model, "variants": Variants()})
        return Bundle(self.folder, manifest, "int8", variant.tolerance)


@dataclass(frozen=True, slots=True)
class Product:
    """A recipe, and of its golden picture the digest of the bytes that were there when it was read."""

    folder: Path
    recipe: Recipe
    placements: Mapping[str, Placement]
    golden_sha256: str | None = None

    @property
    def golden_path(self) -> Path | None:
        return self.folder / self.recipe.golden if self.recipe.golden else None


@dataclass(frozen=True, slots=True)
class Catalog:
    """Everything under `models_onnx/`, checked against each other.

    `broken` holds the experts whose bundle cannot serve and why: the others serve without them.
    """

    folder: Path
    graph: ExpertGraph
    bundles: Mapping[str, Bundle]
    broken: Mapping[str, CatalogError]
    versions: Mapping[str, tuple[int, ...]]
    products: Mapping[str, Product]
    usage: Mapping[str, float]


def load(folder: Path) -> Catalog:
    """Read and check the whole catalogue. Raises CatalogError (GraphError for the graph) naming file and remedy.

    A bundle that cannot be read breaks its own expert only.
    """
    if not folder.is_dir():
        raise CatalogError(f"{folder} is not a folder", "set catalog = … in appliance.toml to the models_onnx folder")
    manifest = read(folder / "graph.toml", GraphManifest)
    found = {name: versions for name, versions in _expert_versions(folder).items() if versions}
    bundles, broken = _bundles(folder, found, manifest.versions)
    names = tuple(found)
    tables, limits = _tables(manifest), manifest.limits
    graph = compile_graph(manifest.components, _edges(manifest, names), names, tables, limits, manifest.stand_ins)
    _check_stand_ins(graph, bundles)
    products = _products(folder / "products", graph)
    for component in manifest.usage.keys() - manifest.components.keys():
        raise GraphError(f"[usage] names the unknown component {component}", "correct it, or add it to [components]")
    return Catalog(folder, graph, bundles, broken, found, products, dict(manifest.usage))


def read_bundle(folder: Path) -> Bundle:
    """One expert version. Its folder's names must agree with its manifest."""
    manifest = read(folder / "expert.toml", ExpertManifest)
    if (manifest.name, str(manifest.version)) != (folder.parent.name, folder.name):
        raise CatalogError(
            f"{folder}/expert.toml says {manifest.name} version {manifest.version}",
            "name and version must be those of the folder",
        )
    bundle = Bundle(folder, manifest)
    if not bundle.model_path.is_file():
        raise CatalogError(f"{bundle.model_path} is missing", f"export {manifest.name} again, or remove its folder")
    return bundle


def verify(bundle: Bundle) -> None:
    """Compare the bytes of a bundle with the digests in its manifest. Raises DigestMismatch or CatalogError."""
    files = [(bundle.model_path, bundle.manifest.model.sha256)]
    if bundle.manifest.golden is not None and bundle.golden_path is not None:
        files.append((bundle.golden_path, bundle.manifest.golden.sha256))
    for path, expected in files:
        try:
            found = sha256_of(path)
        except OSError as error:
            raise CatalogError(f"{path} cannot be read: {error.strerror}", "export the expert again") from error
        if found != expected:
            raise DigestMismatch(str(path), expected, found)


def verified_int8(bundle: Bundle) -> Bundle | None:
    """The bundle in int8, if it has such a variant. Raises VariantError when that cannot serve."""
    variant, found = bundle.manifest.variants.int8, bundle.in_int8
    if variant is None or found is None:
        return None
    try:
        if variant.made_from != bundle.manifest.model.sha256:
            raise VariantError(f"{found.model_path} was made from another {bundle.manifest.model.file}")
        verify(found)
    except CatalogError as error:
        raise VariantError(error.what) from error
    return found


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


ManifestType = TypeVar("ManifestType", bound=Manifest)


def read(path: Path, model: type[ManifestType]) -> ManifestType:
    """A TOML file as a checked manifest. Raises CatalogError that names the file, the key and what was expected."""
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise CatalogError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes", "a manifest holds no weights")
        return model.model_validate(tomllib.loads(path.read_text("utf-8")))
    except OSError as error:
        raise CatalogError(f"{path} cannot be read: {error.strerror}", "see docs/experts.md for the layout") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CatalogError(f"{path} is not TOML: {error}", "correct that line") from error
    except ValidationError as error:
        raise CatalogError(f"{path}: {explain(error)}", "see docs/experts.md for the keys") from error


def explain(error: ValidationError) -> str:
    """What pydantic found, as `key: problem` in one line."""
    return "; ".join(f"{'.'.join(str(part) for part in e['loc']) or 'file'}: {e['msg']}" for e in error.errors())


def _expert_versions(folder: Path) -> dict[str, tuple[int, ...]]:
    return {
        entry.name: tuple(sorted(int(v.name) for v in entry.iterdir() if v.name.isdecimal() and v.is_dir()))
        for entry in sorted(folder.iterdir())
        if entry.is_dir() and entry.name != "products"
    }


def _bundles(
    folder: Path, found: Mapping[str, tuple[int, ...]], pinned: Mapping[str, int]
) -> tuple[dict[str, Bundle], dict[str, CatalogError]]:
    """Of each expert its pinned version, else the newest."""
    bundles, broken = dict[str, Bundle](), dict[str, CatalogError]()
    for name in pinned.keys() - found.keys():
        raise CatalogError(
            f"graph.toml pins a version of {name}, which has no bundle", f"add {folder / name}/<version>/"
        )
    for name, versions in found.items():
        version = pinned.get(name, versions[-1])
        if version not in versions:
            there = ", ".join(map(str, versions))
            raise CatalogError(f"graph.toml pins {name} to version {version}, there is {there}", "pin one of these")
        try:
            bundles[name] = read_bundle(folder / name / str(version))
        except CatalogError as error:
            broken[name] = error
    return bundles, broken


def _edges(manifest: GraphManifest, experts: tuple[str, ...]) -> list[Edge]:
    edges = []
    for spec in manifest.edges:
        sources = [name for name in experts if fnmatchcase(name, spec.from_) and name != spec.to]
        if not sources:
            raise GraphError(f"the edge from {spec.from_!r} matches no expert", "correct the name or the pattern")
        conditions = tuple(Condition(c.label, c.not_label, c.score_at_least, c.score_below) for c in spec.when)
        edges += [Edge(source, spec.to, conditions) for source in sources]
    return edges


def _tables(manifest: GraphManifest) -> list[Table]:
    return [Table(spec.from_, dict(spec.to), spec.score_at_least) for spec in manifest.tables]


def _check_stand_ins(graph: ExpertGraph, bundles: Mapping[str, Bundle]) -> None:
    """Raises GraphError for one that could not answer what the other is asked, where both bundles can be read."""
    for expert, stand_in in graph.stand_ins.items():
        if expert not in bundles or stand_in not in bundles:
            continue
        asked, instead = bundles[expert].manifest, bundles[stand_in].manifest
        if instead.needs_reference and not asked.needs_reference:
            what = f"{stand_in} compares with a golden picture, which those for {expert} need not have"
            raise GraphError(f"[stand_ins] {expert}: {what}", "name one that looks at the picture alone")
        if instead.head.kind != asked.head.kind:
            what = f"{stand_in} gives {instead.head.kind}, and {expert} {asked.head.kind}"
            raise GraphError(f"[stand_ins] {expert}: {what}", "name one of the same kind")


def _products(folder: Path, graph: ExpertGraph) -> dict[str, Product]:
    products = {}
    for path in sorted(folder.glob("*/recipe.toml")):
        recipe = read(path, Recipe)
        if recipe.product != path.parent.name:
            raise CatalogError(f"{path} says product {recipe.product}", "its folder must have the same name")
        for p in recipe.placements:
            if p.component not in graph.entries:
                raise CatalogError(
                    f"{path}: {p.designator} is an unknown component {p.component}", "add it to graph.toml"
                )
        products[recipe.product] = product_of(path.parent, recipe, _golden_digest(path, recipe))
    return products


def product_of(folder: Path, recipe: Recipe, golden_sha256: str | None) -> Product:
    return Product(folder, recipe, {p.designator: p for p in recipe.placements}, golden_sha256)


def _golden_digest(path: Path, recipe: Recipe) -> str | None:
    """Of a golden picture of the recipe's size, by its header. Raises CatalogError for any other."""
    if recipe.golden is None:
        return None
    golden = path.with_name(recipe.golden)
    try:
        with Image.open(golden) as opened:
            size = opened.size
        digest = sha256_of(golden)
    except FileNotFoundError as error:
        raise CatalogError(f"{golden} is missing", f"add it, or remove golden from {path}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise CatalogError(f"{golden} is no picture that can be read: {error}", "restore it") from error
    if size != recipe.size:
        what = f"{golden} is {size[0]} x {size[1]} pixels, and size in {path} says {recipe.size[0]} x {recipe.size[1]}"
        raise CatalogError(what, "correct one of them")
    return digest


def check_places(catalog: Catalog, most: int | None) -> None:
    """Raise CatalogError for a recipe with more placements than so many.

    Each is a picture that waits: of a whole board there would always be some that are turned away.
    """
    for name, product in catalog.products.items():
        if most is not None and (count := len(product.placements)) > most:
            raise CatalogError(
                f"{name} has {count} placements, and limits.waiting_pictures is {most}: no whole board has room",
                f'raise it to {count} at least, or set limits.overflow to "block"',
            )
