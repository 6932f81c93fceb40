"""A portable ONNX graph to a template: the optimised graph with its weights lifted out to graph inputs.

Pure: graphs in, graphs and packed weights out. Two exports of one architecture must give byte-identical templates, so
everything that an exporter chooses freely is chosen anew: names, the order of nodes (from the outputs backwards),
attributes, version notes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from appliance.errors import ModelError
from appliance.store.widths import Tail, free_axes

INSIDE_SLOTS: Mapping[str, frozenset[int]] = {
    "Resize": frozenset({1, 2}),
    "Upsample": frozenset({1}),
    "Clip": frozenset({1, 2}),
    "Pad": frozenset({2}),
    "OneHot": frozenset({2}),
    "Dropout": frozenset({1}),
    "Range": frozenset({0, 1, 2}),
    "NonMaxSuppression": frozenset({3, 4}),
}
"""Float inputs that say how to compute rather than what was learned; kernels may want them constant."""
_LIFTED_TYPES = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT8, TensorProto.UINT8}
_NOWHERE = 1 << 40
"""An offset beyond the end of every file."""


@dataclass(frozen=True, slots=True)
class Template:
    """`weights[i]` is what the template's input `w{i}` wants; pictures enter as `x{i}`, results leave as `y{i}`."""

    model: bytes
    weights: tuple[TensorProto, ...]
    outputs: tuple[str, ...]

    @property
    def signature(self) -> str:
        """Names the architecture. Whatever was left inside the graph is part of it."""
        return hashlib.sha256(self.model).hexdigest()


def plain_form(template: Template) -> bytes:
    """The same graph for a session of one expert, to which its weights `w{i}` are given as initializers when it opens.

    It lies beside a file `template.onnx`, which it says holds the weights. They are not there: the runtime (1.31.1)
    insists on a file that exists, and whoever forgets a weight shall hear of it when it opens.
    """
    model = ModelProto.FromString(template.model)
    pictures = [value for value in model.graph.input if not value.name.startswith("w")]
    del model.graph.input[:]
    model.graph.input.extend(pictures)
    for number, weight in enumerate(template.weights):
        tensor = model.graph.initializer.add(name=f"w{number}", data_type=weight.data_type, dims=weight.dims)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": "template.onnx", "offset": str(_NOWHERE)}.items():
            tensor.external_data.add(key=key, value=value)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def lift(optimised: ModelProto, inputs: Sequence[str]) -> Template:
    """The canonical template of an optimised graph whose pictures enter by `inputs`.

    Raises ModelError for a graph of which an output is a constant, or that has sparse weights.
    """
    graph = optimised.graph
    if graph.sparse_initializer:
        raise ModelError("the graph has sparse weights", "export them dense")
    canon = _Canon(graph, inputs)
    order = canon.order()
    nodes = [canon.renamed(node) for node in order]
    free = free_axes(_tail(order, canon))
    value_types = {value.name: value.type for value in (*graph.input, *graph.output)}
    dimensions: dict[str, str] = {}
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "template",
            [_picture(canon.names[name], value_types[name], dimensions) for name in inputs]
            + [_weight(canon.names[t.name], t, free.get(t.name)) for t in canon.lifted],
            # Without shapes: the runtime infers them, and an exporter's dimension names mean nothing here.
            [helper.make_tensor_value_info(canon.names[v.name], _element_type(v), None) for v in graph.output],
            [_constant(canon.names[tensor.name], tensor) for tensor in canon.kept],
        ),
        ir_version=optimised.ir_version,
        opset_imports=_imports(optimised, nodes),
        producer_name="",
    )
    return Template(
        model.SerializeToString(deterministic=True), tuple(canon.lifted), tuple(value.name for value in graph.output)
    )


@dataclass(slots=True)
class _Canon:
    """Canonical names, given out in the order in which a walk back from the outputs comes upon things."""

    graph: GraphProto
    inputs: Sequence[str]
    names: dict[str, str] = field(default_factory=lambda: {"": ""})
    lifted: list[TensorProto] = field(default_factory=list)
    kept: list[TensorProto] = field(default_factory=list)
    _tensors: dict[str, TensorProto] = field(init=False)
    _stays: set[str] = field(init=False)
    _count: int = 0

    def __post_init__(self) -> None:
        self._tensors = {tensor.name: tensor for tensor in self.graph.initializer}
        self._stays = _inside(self.graph)
        self.names.update((name, f"x{i}") for i, name in enumerate(self.inputs))
        self.names.update((value.name, f"y{i}") for i, value in enumerate(self.graph.output))

    def order(self) -> list[NodeProto]:
        """The nodes that the outputs need, each after those it needs itself; always the same for the same graph."""
        makers = {name: node for node in self.graph.node for name in node.output if name}
        ordered: list[NodeProto] = []
        begun: set[int] = set()
        for value in self.graph.output:
            if value.name not in makers:
                raise ModelError(f"output {value.name} is not computed from the picture", "export the expert again")
            stack = [(makers[value.name], False)]
            while stack:
                node, is_ready = stack.pop()
                if is_ready:
                    ordered.append(node)
                elif id(node) not in begun:
                    begun.add(id(node))
                    stack.append((node, True))
                    needed = [makers[name] for name in _reads(node) if name in makers]
                    stack += [(maker, False) for maker in reversed(needed) if id(maker) not in begun]
        return ordered

    def renamed(self, node: NodeProto) -> NodeProto:
        """The node under canonical names. Called in order, this is what gives the names out."""
        for name in _reads(node):
            if name in self._tensors and name not in self.names:
                self._admit(self._tensors[name])
        for name in node.output:
            self.names.setdefault(name, f"v{len(self.names)}")
        self._count += 1
        return _rewritten(node, self.names, f"n{self._count}")

    def _admit(self, tensor: TensorProto) -> None:
        if tensor.name in self._stays:
            self.names[tensor.name] = f"c{len(self.kept)}"
            self.kept.append(tensor)
        else:
            self.names[tensor.name] = f"w{len(self.lifted)}"
            self.lifted.append(tensor)


def _tail(order: Sequence[NodeProto], canon: _Canon) -> Tail:
    outputs = {value.name for value in canon.graph.output}
    return Tail(order, [_reads(node) for node in order], outputs, {t.name: list(t.dims) for t in canon.lifted})


def _inside(graph: GraphProto) -> set[str]:
    """Initializers that stay in the graph: not numbers that were learned, or wanted constant by who reads them."""
    quantised = _quantised(graph)
    stays = {
        t.name
        for t in graph.initializer
        if 0 in t.dims or (t.name not in quantised and (t.data_type not in _LIFTED_TYPES or not t.dims))
    }
    for node in graph.node:
        slots = INSIDE_SLOTS.get(node.op_type, frozenset())
        stays.update(name for slot, name in enumerate(node.input) if slot in slots)
    return stays


def _quantised(graph: GraphProto) -> set[str]:
    """What only quantised operators read: scales, zero points and biases (of 32 bits) are each network's own."""
    others = {name for node in graph.node if not _is_quantised(node) for name in _reads(node)}
    return {name for node in graph.node if _is_quantised(node) for name in node.input} - others


def _is_quantised(node: NodeProto) -> bool:
    return node.op_type.startswith(("QLinear", "QGemm", "QuantizeLinear", "DequantizeLinear"))


def _reads(node: NodeProto) -> list[str]:
    """Every value of the enclosing graph that a node reads, also from within its subgraphs, in order."""
    names = [name for name in node.input if name]
    for graph in _subgraphs(node):
        own = {v.name for v in graph.input} | {t.name for t in graph.initializer}
        own |= {name for inner in graph.node for name in inner.output}
        within = [name for inner in graph.node for name in _reads(inner)] + [v.name for v in graph.output]
        names += [name for name in within if name not in own]
    return names


def _subgraphs(node: NodeProto) -> list[GraphProto]:
    attributes = sorted(node.attribute, key=lambda a: a.name)
    return [graph for a in attributes for graph in ([a.g] if a.type == AttributeProto.GRAPH else a.graphs)]


def _rewritten(node: NodeProto, names: Mapping[str, str], own_name: str) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.name, copy.doc_string = own_name, ""
    copy.ClearField("metadata_props")
    copy.input[:] = [names[name] for name in node.input]
    copy.output[:] = [names[name] for name in node.output]
    del copy.attribute[:]
    for attribute in sorted(node.attribute, key=lambda a: a.name):
        kept = copy.attribute.add()
        kept.CopyFrom(attribute)
        kept.doc_string = ""
        for graph in [kept.g] if kept.type == AttributeProto.GRAPH else kept.graphs:
            _rename_subgraph(graph, names, own_name)
        if kept.type == AttributeProto.TENSOR:
            kept.t.CopyFrom(_constant("", kept.t))
    return copy


def _rename_subgraph(graph: GraphProto, outer: Mapping[str, str], prefix: str) -> None:
    names = dict(outer)
    own = [v.name for v in graph.input] + [t.name for t in graph.initializer]
    own += [name for node in graph.node for name in node.output if name]
    names.update((name, f"{prefix}_{i}") for i, name in enumerate(own))
    nodes = [_rewritten(node, names, f"{prefix}_n{i}") for i, node in enumerate(graph.node)]
    tensors = [_constant(names[tensor.name], tensor) for tensor in graph.initializer]
    graph.name, graph.doc_string = prefix, ""
    for member in ("node", "initializer", "value_info", "metadata_props"):
        graph.ClearField(member)
    graph.node.extend(nodes)
    graph.initializer.extend(tensors)
    for value in (*graph.input, *graph.output):
        value.name, value.doc_string = names[value.name], ""
        value.ClearField("metadata_props")


def _constant(name: str, tensor: TensorProto) -> TensorProto:
    """A tensor in the one encoding that we use for its value."""
    return numpy_helper.from_array(numpy_helper.to_array(tensor), name)


def _picture(name: str, declared: Any, dimensions: dict[str, str]) -> ValueInfoProto:
    shape: list[int | str | None] = []
    for d in declared.tensor_type.shape.dim:
        if d.dim_param:
            shape.append(dimensions.setdefault(d.dim_param, f"d{len(dimensions)}"))
        else:
            shape.append(d.dim_value if d.HasField("dim_value") else None)
    return helper.make_tensor_value_info(name, declared.tensor_type.elem_type, shape)


def _weight(name: str, tensor: TensorProto, free: tuple[int, str] | None) -> ValueInfoProto:
    shape: list[int | str] = list(tensor.dims)
    if free is not None:
        axis, symbol = free
        shape[axis] = symbol
    return helper.make_tensor_value_info(name, tensor.data_type, shape)


def _element_type(value: ValueInfoProto) -> int:
    return value.type.tensor_type.elem_type


def _imports(model: ModelProto, nodes: Sequence[NodeProto]) -> list[onnx.OperatorSetIdProto]:
    """Operator sets in use; the runtime lists all that it knows."""
    used = set(_domains(nodes))
    imports = {o.domain: o.version for o in model.opset_import if o.domain in used or o.domain == ""}
    return [helper.make_opsetid(domain, imports[domain]) for domain in sorted(imports)]


def _domains(nodes: Sequence[NodeProto]) -> Iterator[str]:
    for node in nodes:
        yield node.domain
        for graph in _subgraphs(node):
            yield from _domains(graph.node)


def dtype_of(tensor: TensorProto) -> np.dtype[Any]:
    return np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))


def content(tensor: TensorProto) -> bytes:
    """The numbers as they lie in a segment."""
    return numpy_helper.to_array(tensor).tobytes()


def packed(contents: Sequence[bytes], offsets: Sequence[int], size: int) -> NDArray[np.uint8]:
    pack = np.zeros(size, np.uint8)
    for piece, offset in zip(contents, offsets, strict=True):
        pack[offset : offset + len(piece)] = np.frombuffer(piece, np.uint8)
    return pack


def views(weights: Sequence[TensorProto], offsets: Sequence[int], pack: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """The tensors as they lie in the segment, by the template's names for them."""
    return {
        f"w{i}": pack[offset : offset + _size(tensor)].view(dtype_of(tensor)).reshape(tuple(tensor.dims))
        for i, (tensor, offset) in enumerate(zip(weights, offsets, strict=True))
    }


def _size(tensor: TensorProto) -> int:
    return int(math.prod(tensor.dims) * dtype_of(tensor).itemsize)
