"""The canonical form of a graph: what it computes, without the names and the order it happens to be written in."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass

from scalefold.compiler.graph import captured

COMMUTATIVE = frozenset({"Add", "Mul", "And", "Or", "Xor", "Equal"})
"""Operators of two inputs that give the same bits in either order."""

SPELLED_OUT = 4
"""Float constants of so many elements are written out in text; larger ones by digest or by figures."""

SPELLED_OUT_INTEGERS = 16
"""The same for integers, which are shapes and axes."""


class Constant:
    """A constant of a graph; its bytes are read when they are asked for.

    Args:
        tensor: where the values lie.
    """

    def __init__(self, tensor: ir.TensorProtocol) -> None:
        self.tensor = tensor
        self.dtype: ir.DataType = tensor.dtype
        self.shape: tuple[int, ...] = tuple(tensor.shape.numpy())

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @cached_property
    def digest(self) -> str:
        """Of type, shape and bytes."""
        found = hashlib.blake2b(f"{self.dtype.name}{self.shape}".encode(), digest_size=16)
        found.update(
            repr(self.array().tolist()).encode() if self.dtype == ir.DataType.STRING else self.tensor.tobytes()
        )
        return found.hexdigest()

    def array(self) -> npt.NDArray[Any]:
        """The values."""
        return np.asarray(self.tensor.numpy())


@dataclass(frozen=True, eq=False)
class Edge:
    """An input that another node makes."""

    vertex: Vertex
    output: int


@dataclass(frozen=True)
class Port:
    """An input that the graph is fed, by its place in the graph's signature."""

    index: int


Slot = Edge | Port | Constant | None


@dataclass(eq=False)
class Vertex:
    """A node of the graph.

    Attributes:
        node: the node.
        op: its operator, with the domain where that is not ONNX's own.
        attributes: those that are not at the operator's default, in plain values.
        slots: what it reads: its inputs, then what its subgraphs take from outside.
        readers: the nodes that read it, each with the slot it reads in and the output it reads.
        results: the graph outputs it makes, by place.
    """

    node: ir.Node
    op: str
    attributes: dict[str, str]
    slots: tuple[Slot, ...] = ()
    readers: list[tuple[Vertex, int, int]] = field(default_factory=list)
    results: list[tuple[int, int]] = field(default_factory=list)

    @property
    def commutative(self) -> bool:
        """Whether the order of its inputs has no meaning."""
        return self.op in COMMUTATIVE and len(self.slots) == 2

    @property
    def sources(self) -> Iterator[Vertex]:
        """The nodes it reads."""
        return (slot.vertex for slot in self.slots if isinstance(slot, Edge))


@dataclass(frozen=True)
class Signature:
    """An input or output of the graph, or the type of one."""

    name: str
    type: str


class Form:
    """The canonical form of a model; the model is left as it was.

    Functions are inlined and Constant nodes are constants like any other. Weights are not read.

    Args:
        model: the model.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model.clone()
        InlinePass()(self.model)
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(self.model)
        self.model.graph.sort()
        self._constants: dict[ir.Value, Constant] = {}
        fed = [value for value in self.model.graph.inputs if not value.is_initializer()]
        self._ports = {value: Port(index) for index, value in enumerate(fed)}
        self.inputs = _signatures(fed)
        self.outputs = _signatures(self.model.graph.outputs)
        self.opsets = {name or "ai.onnx": version for name, version in self.model.graph.opset_imports.items()}
        self.vertices: list[Vertex] = []
        """In a topological order."""
        self.of_node: dict[ir.Node, Vertex] = {}
        self.results: list[Slot] = []
        """What each graph output is."""
        self._build()

    def _build(self) -> None:
        for node in self.model.graph:
            vertex = Vertex(node, _operator(node), self._attributes(node))
            self.of_node[node] = vertex
            self.vertices.append(vertex)
            vertex.slots = tuple(self.slot(value) for value in (*_trimmed(node.inputs), *captured(node)))
            for index, slot in enumerate(vertex.slots):
                if isinstance(slot, Edge):
                    slot.vertex.readers.append((vertex, index, slot.output))
        for index, value in enumerate(self.model.graph.outputs):
            found = self.slot(value)
            self.results.append(found)
            if isinstance(found, Edge):
                found.vertex.results.append((index, found.output))

    def slot(self, value: ir.Value | None) -> Slot:
        """What a value of the main graph is."""
        if value is None:
            return None
        if value in self._ports:
            return self._ports[value]
        producer = value.producer()
        if producer is not None:
            return Edge(self.of_node[producer], value.index() or 0)
        if value not in self._constants:
            assert value.const_value is not None, f"{value.name} is neither fed, made nor constant"
            self._constants[value] = Constant(value.const_value)
        return self._constants[value]

    def _attributes(self, node: ir.Node) -> dict[str, str]:
        version = self.model.graph.opset_imports.get(node.domain, 1)
        defaults = _defaults(node.op_type, node.domain, version)
        outer = {value: f"outer{index}" for index, value in enumerate(captured(node))}
        plain = {name: _plain(attribute, outer) for name, attribute in sorted(node.attributes.items())}
        return {name: text for name, text in plain.items() if defaults.get(name) != text}


def _trimmed(inputs: Sequence[ir.Value | None]) -> tuple[ir.Value | None, ...]:
    """Inputs without those left out at the end."""
    count = len(inputs)
    while count and inputs[count - 1] is None:
        count -= 1
    return tuple(inputs[:count])


def _operator(node: ir.Node) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def _signatures(values: Sequence[ir.Value]) -> list[Signature]:
    """Names and types; symbolic sizes are numbered, so that only which of them are equal counts."""
    symbols: dict[str, str] = {}
    found = []
    for value in values:
        sizes = []
        for size in value.shape if value.shape is not None else ():
            symbolic = not isinstance(size, int)
            sizes.append(symbols.setdefault(str(size), f"d{len(symbols)}") if symbolic else str(size))
        dtype = value.dtype.name.lower() if value.dtype is not None else "unknown"
        found.append(Signature(value.name or "", dtype + (f"[{', '.join(sizes)}]" if value.shape is not None else "")))
    return found


@cache
def _defaults(op_type: str, domain: str, version: int) -> dict[str, str]:
    """The default of each attribute that has one, as plain text; empty for an operator that onnx does not know."""
    try:
        schema = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return {}
    protos = [entry.default_value for entry in schema.attributes.values() if entry.default_value.name]
    return {proto.name: _plain(ir.serde.deserialize_attribute(proto)) for proto in protos}


def _plain(attribute: ir.Attr, outer: Mapping[ir.Value, str] | None = None) -> str:
    """The value of an attribute as text that says all of it.

    Args:
        attribute: the attribute.
        outer: what the values are called that a subgraph may take from outside.
    """
    value = attribute.value
    if attribute.type == ir.AttributeType.FLOAT:
        return str(np.float32(value))
    if attribute.type == ir.AttributeType.FLOATS:
        return "[" + ", ".join(str(np.float32(entry)) for entry in value) + "]"
    if attribute.type == ir.AttributeType.INTS:
        return str([int(entry) for entry in value])
    if attribute.type == ir.AttributeType.STRINGS:
        return str(list(value))
    if attribute.type == ir.AttributeType.TENSOR:
        return text_of(Constant(value))
    if attribute.type == ir.AttributeType.GRAPH:
        return _body(value, outer or {})
    if attribute.type == ir.AttributeType.GRAPHS:
        return "; ".join(_body(entry, outer or {}) for entry in value)
    return str(value)


def _body(graph: ir.Graph, outer: Mapping[ir.Value, str]) -> str:
    """A subgraph as text: its values numbered, what it takes from outside by the place among the node's slots."""
    numbers = dict(outer)
    for value in graph.inputs:
        numbers[value] = f"%{len(numbers)}"

    def named(value: ir.Value | None) -> str:
        if value is None:
            return "-"
        if value.is_initializer() and value.const_value is not None:
            return text_of(Constant(value.const_value))
        return numbers[value]

    lines = []
    for node in graph:
        attributes = {name: _plain(attribute, numbers) for name, attribute in sorted(node.attributes.items())}
        read = ", ".join(named(value) for value in node.inputs)
        lines.append(f"{_operator(node)}({read}){attributes or ''}")
        for out in node.outputs:
            numbers[out] = f"%{len(numbers)}"
    return f"{{{'; '.join(lines)} -> {', '.join(named(value) for value in graph.outputs)}}}"


def reading_order(form: Form) -> list[Vertex]:
    """The nodes in an order that follows from the structure alone: each right behind what it reads, outputs in turn.

    Nodes that nothing reads are left out.
    """
    ordered: dict[Vertex, None] = {}
    for result in form.results:
        pending = [(result.vertex, False)] if isinstance(result, Edge) else []
        while pending:
            vertex, ready = pending.pop()
            if vertex in ordered:
                continue
            if ready:
                ordered[vertex] = None
            else:
                pending.append((vertex, True))
                pending.extend((source, False) for source in reversed(list(vertex.sources)) if source not in ordered)
    return list(ordered)


def text_of(constant: Constant, *, figures: bool = False) -> str:
    """A constant as text: small ones by value, large ones by digest, or by rounded figures marked with `~`.

    Args:
        constant: the constant.
        figures: write what calibration decides, floats and integers of up to 32 bits that are not shapes, as figures to be
            compared within a tolerance: one value, or root mean square and largest magnitude of all.
    """
    kind = constant.dtype.name.lower() + (f"[{', '.join(map(str, constant.shape))}]" if constant.shape else "")
    exact = constant.dtype in (ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.STRING)
    floating = constant.dtype.is_floating_point()
    limit = SPELLED_OUT if floating or not exact else SPELLED_OUT_INTEGERS
    if figures and not exact:
        return f"{kind} {_figures(constant)}"
    if constant.size > limit:
        return f"{kind} sha:{constant.digest[:12]}"
    return f"{kind} {', '.join(map(str, constant.array().reshape(-1)))}".rstrip()


def _figures(constant: Constant) -> str:
    values = constant.array().astype(np.float64).reshape(-1)
    if values.size <= SPELLED_OUT:
        return ", ".join(f"~{value:.4g}" for value in values)
    with np.errstate(over="ignore", invalid="ignore"):
        return f"rms ~{np.sqrt(np.mean(np.square(values))):.4g}, largest ~{np.abs(values).max():.4g}"


def canonical_text(form: Form, names: dict[Vertex, str], *, figures: bool = False) -> str:
    """A graph as text for people to read and compare, in an order of its own and without the names of values.

    Args:
        form: the graph.
        names: what part of the model each node belongs to; nodes are named by it and their operator.
        figures: see `text_of`.
    """
    labels: dict[Vertex, str] = {}
    taken: Counter[str] = Counter()
    opsets = ", ".join(f"{name} {version}" for name, version in sorted(form.opsets.items()))
    lines = [f"opset {opsets}"]
    lines += [f"input {entry.name}: {entry.type}" for entry in form.inputs]

    def named(slot: Slot) -> str:
        if isinstance(slot, Edge):
            return labels[slot.vertex] + (f":{slot.output}" if slot.output else "")
        if isinstance(slot, Port):
            return form.inputs[slot.index].name
        return "-" if slot is None else f"<{text_of(slot, figures=figures)}>"

    scope = ""
    for vertex in reading_order(form):
        name = names.get(vertex, "")
        if name != scope:
            lines += ["", f"# {name}"]
            scope = name
        label = ".".join(part for part in (name, vertex.op.rpartition(".")[2]) if part)
        taken[label] += 1
        labels[vertex] = label if taken[label] == 1 else f"{label}.{taken[label]}"
        attributes = "".join(f" {key}={text}" for key, text in vertex.attributes.items())
        lines.append(f"{labels[vertex]} = {vertex.op}({', '.join(map(named, vertex.slots))}){attributes}")
    lines.append("")
    results = zip(form.outputs, form.results, strict=True)
    lines += [f"output {entry.name}: {entry.type} = {named(slot)}" for entry, slot in results]
    return "\n".join(lines) + "\n"
