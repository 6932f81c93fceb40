"""Which numbers of a graph's shapes may differ between experts of one architecture: how many results its last layers
give. Fine-tunes of one trunk mostly differ in nothing else.

Only where nothing but the length of a row of results can follow from it. A layer whose results anything else reads, or
a bias that broadcasts, keeps its numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from onnx import NodeProto, helper

_LAYERS = frozenset({"Gemm", "FusedGemm", "MatMul"})
_BY_ELEMENT = frozenset({"Identity", "Sigmoid", "Cast"})
_BY_ROW = frozenset({"Softmax", "LogSoftmax"})


@dataclass(frozen=True, slots=True)
class Tail:
    """The end of a graph: nodes in order, what each reads (from within subgraphs too), and what leaves."""

    nodes: Sequence[NodeProto]
    reads: Sequence[Sequence[str]]
    outputs: Set[str]
    weights: Mapping[str, Sequence[int]]
    """The dimensions of what may be given from outside."""


def free_axes(tail: Tail) -> dict[str, tuple[int, str]]:
    """For each weight with a free dimension, which it is, and a name that all dimensions of the same length have."""
    found: dict[str, tuple[int, str]] = {}
    layers = 0
    for node in tail.nodes:
        axes = _axes(node, tail)
        found.update((name, (axis, f"h{layers}")) for name, axis in axes.items())
        layers += bool(axes)
    return found


def _axes(layer: NodeProto, tail: Tail) -> dict[str, int]:
    """The axis along which results lie, of the layer's weights and of all that is added to it; empty if not free."""
    if layer.op_type not in _LAYERS or len(tail.weights.get(layer.input[1], ())) != 2:
        return {}
    axis = 0 if _attribute(layer, "transB", 0) else 1
    width = tail.weights[layer.input[1]][axis]
    axes = {layer.input[1]: axis}
    if len(layer.input) > 2 and layer.input[2]:
        bias = tail.weights.get(layer.input[2], ())
        if not bias or bias[-1] != width:
            return {}
        axes[layer.input[2]] = len(bias) - 1
    rank = 2 if layer.op_type != "MatMul" else None
    return axes if _ends_in_outputs(layer.output[0], width, rank, axes, tail) and _are_read_once(axes, tail) else {}


def _ends_in_outputs(value: str, width: int, rank: int | None, axes: dict[str, int], tail: Tail) -> bool:
    """Whether all that is made of the value keeps its shape and leaves; adds the biases on the way to `axes`."""
    readers = [node for node, names in zip(tail.nodes, tail.reads, strict=True) if value in names]
    for node in readers:
        if node.op_type == "Add" and (bias := _bias(node, value, width, tail)):
            axes[bias] = 0
        elif not (node.op_type in _BY_ELEMENT or (node.op_type in _BY_ROW and _is_by_row(node, rank))):
            return False
    return (bool(readers) or value in tail.outputs) and all(
        _ends_in_outputs(node.output[0], width, rank, axes, tail) for node in readers
    )


def _bias(node: NodeProto, value: str, width: int, tail: Tail) -> str | None:
    """The weight that an addition adds to each row, number by number."""
    [other] = [name for name in node.input if name != value] or [value]
    return other if list(tail.weights.get(other, ())) == [width] else None


def _is_by_row(node: NodeProto, rank: int | None) -> bool:
    """Of an unknown rank only the last axis by name is sure; before operator set 13 the default was another."""
    axis = _attribute(node, "axis", None)
    return axis == -1 or (rank == 2 and axis in (None, 1))


def _are_read_once(axes: Mapping[str, int], tail: Tail) -> bool:
    """A weight that serves twice is as long as both want it."""
    times = Counter(name for names in tail.reads for name in names)
    return all(times[name] == 1 and name not in tail.outputs for name in axes)


def _attribute(node: NodeProto, name: str, default: int | None) -> int | None:
    found = [helper.get_attribute_value(a) for a in node.attribute if a.name == name]
    return found[0] if found else default
