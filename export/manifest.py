"""What is to be exported: a TOML file of experts, each a checkpoint with its architecture or a foreign ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from appliance import catalog
from appliance.catalog import ExpertManifest, Head, InputSpec, Manifest, ModelFile, Name
from appliance.errors import ExportError
from export import toml


class Entry(Manifest):
    """One expert to export. Paths are relative to the manifest's folder."""

    name: Name
    version: Annotated[int, Field(ge=1)] = 1
    description: str = ""
    architecture: str | None = Field(None, description="A registered name, or module:Class; with checkpoint.")
    checkpoint: str | None = Field(None, description="A PyTorch state dictionary, opened with weights_only.")
    onnx: str | None = Field(None, description="A foreign ONNX file, in place of architecture and checkpoint.")
    samples: str | None = Field(
        None, description="Folder of published pictures; `<stem>.reference.<suffix>` beside a picture is its reference."
    )
    max_batch: Annotated[int, Field(ge=1, le=1024)] = 16
    tolerance: Annotated[float, Field(gt=0)] = 1e-3
    inputs: Annotated[tuple[InputSpec, ...], Field(min_length=1, max_length=4)]
    head: Head
    provenance: Mapping[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_one_origin(self) -> Entry:
        is_torch = self.architecture is not None and self.checkpoint is not None
        is_partial = (self.architecture is None) != (self.checkpoint is None)
        if is_partial or (is_torch and self.onnx is not None):
            raise ValueError("give architecture and checkpoint, or onnx")
        return self

    @property
    def source(self) -> str:
        """The file that the expert is made from. Raises ExportError when none was named."""
        named = self.checkpoint or self.onnx
        if named is None:
            raise ExportError(f"{self.name} has no checkpoint and no ONNX file", "give --checkpoint or --from-onnx")
        return named

    @property
    def output_names(self) -> tuple[str, ...]:
        return output_names(self.head)

    @property
    def draft(self) -> ExpertManifest:
        """The manifest that the bundle will have, before there is a model to tell the digest of."""
        unproven = ModelFile(sha256="0" * 64, bytes=1, opset=7, ir_version=3, max_batch=self.max_batch)
        return ExpertManifest(
            schema=1, name=self.name, version=self.version, model=unproven, inputs=self.inputs, head=self.head
        )


class ExportManifest(Manifest):
    """A list of experts."""

    schema_: Literal[1] = Field(alias="schema")
    experts: Annotated[tuple[Entry, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_are_unique(self) -> ExportManifest:
        seen: set[tuple[str, int]] = set()
        for entry in self.experts:
            if (entry.name, entry.version) in seen:
                raise ValueError(f"{entry.name} version {entry.version} is listed twice")
            seen.add((entry.name, entry.version))
        return self


def output_names(head: Head) -> tuple[str, ...]:
    """The graph outputs that a head reads, in the order in which a network returns them."""
    return (head.output,) if head.kind == "classification" else (head.boxes, head.scores)


def read(path: Path) -> ExportManifest:
    """Raises CatalogError naming file, key and what was expected."""
    return catalog.read(path, ExportManifest)


def entry_of(path: Path, name: str | None, **replacing: object) -> Entry:
    """One expert of a manifest, the only one when no name is given, with some values replaced from the command line."""
    experts = read(path).experts
    chosen = [entry for entry in experts if name in (None, entry.name)]
    if len(chosen) != 1:
        raise ExportError(
            f"{path} lists {', '.join(entry.name for entry in experts[:5])}{'…' if len(experts) > 5 else ''}",
            "name one of them with --name, or use --all",
        )
    given = {key: value for key, value in replacing.items() if value is not None}
    try:
        return Entry.model_validate({**chosen[0].model_dump(exclude_none=True), **given})
    except ValidationError as error:
        raise ExportError(f"{path}: {catalog.explain(error)}", "correct the manifest or the flags") from error


def write(entries: tuple[Entry, ...], path: Path) -> None:
    document = {"schema": 1, "experts": [_plain(entry) for entry in entries]}
    path.write_text(toml.dumps(document), encoding="utf-8")


def _plain(entry: Entry) -> dict[str, object]:
    return {
        **entry.model_dump(exclude_none=True),
        "inputs": [spec.model_dump(exclude_none=True) for spec in entry.inputs],
    }
