"""The differences between two ONNX models by structure and meaning, and how the quantization of each layer compares."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from scalefold.compiler import artifact
from scalefold.compiler.canonical import Constant, Edge, Form, Port, Slot, Vertex, text_of
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.layer_diff import FactDifference, change_of, layer_differences
from scalefold.compiler.matching import Matching
from scalefold.compiler.quantization import LinearLayer, linear_quantization

Kind = Literal[
    "input", "output", "opset", "metadata", "quantization", "form", "bias", "constant", "attribute", "added", "removed",
    "replaced", "edge",
]  # fmt: skip
LISTED = 6
"""So many operators of a changed region are named one by one."""


@dataclass(frozen=True)
class Difference:
    """One difference.

    Attributes:
        kind: what sort of thing differs.
        layer: the linear layer it is part of, or the next one behind it; empty where there is none.
        where: the node, input, output or key.
        what: what of it differs.
        before: how it is in the first model; empty where it is not there.
        after: how it is in the second.
    """

    kind: Kind
    layer: str
    where: str
    what: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}: {self.before or 'none'} -> {self.after or 'none'}"


@dataclass(frozen=True)
class LayerPair:
    """One linear layer in both models; a name is empty where a model does not have it."""

    first: str
    second: str
    shape: tuple[int, int]
    forms: tuple[str, str]
    quantization: tuple[str, str]
    differs_in: tuple[str, ...]


@dataclass(frozen=True)
class Diff:
    """How two models compare.

    Attributes:
        differences: all of them.
        layers: every linear layer.
        nodes: the number of nodes of each model.
    """

    differences: tuple[Difference, ...]
    layers: tuple[LayerPair, ...]
    nodes: tuple[int, int]

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    @property
    def same_quantization(self) -> bool:
        """Whether every linear layer is there in both and computes with the same integers, in whatever form."""
        return not any(entry.kind == "quantization" for entry in self.differences) and all(
            layer.first and layer.second for layer in self.layers
        )

    def only_quantization(self) -> Diff:
        """The same without what has nothing to do with the quantization of linear layers."""
        missing = tuple(
            Difference("quantization", name, name, "linear layer", *(("there", "") if layer.first else ("", "there")))
            for layer in self.layers
            if not (layer.first and layer.second) and (name := layer.first or layer.second)
        )
        kept = tuple(entry for entry in self.differences if entry.kind == "quantization")
        return Diff(kept + missing, self.layers, self.nodes)

    def facts(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {"equal": self.equal, "same_quantization": self.same_quantization, **asdict(self)}

    def summary(self) -> str:
        """A few lines for people: the verdict, then the differences by layer."""
        if self.equal:
            return f"equal: {self.nodes[0]} nodes, {len(self.layers)} linear layers"
        same = "the same quantization" if self.same_quantization else "another quantization"
        lines = [f"different: {len(self.differences)} differences, {same} of {len(self.layers)} linear layers"]
        groups: dict[str, list[Difference]] = defaultdict(list)
        for entry in self.differences:
            groups[entry.layer].append(entry)
        for layer, entries in groups.items():
            lines += [layer or "the model", *(f"  {entry.kind:<12} {entry}" for entry in entries)]
        return "\n".join(lines)


def diff_files(first: Path, second: Path, *, tolerance: float = 0.0, metadata: bool = True) -> Diff:
    """Compare two model files, or folders with `model.onnx` in them; see `diff_models`.

    Raises:
        SourceError: one of them is not there, or is not an ONNX model.
    """
    paths = [path / artifact.MODEL if path.is_dir() else path for path in (first, second)]
    return diff_models(read_onnx(paths[0]), read_onnx(paths[1]), tolerance=tolerance, metadata=metadata)


def diff_models(first: ir.Model, second: ir.Model, *, tolerance: float = 0.0, metadata: bool = True) -> Diff:
    """Compare two models: nodes are matched by what they compute, and names count only at inputs and outputs.

    Args:
        first: a model.
        second: the model that is to be told apart from it.
        tolerance: how far float constants may be apart, relative to the largest of each; integers must be equal.
        metadata: whether producer, documentation and metadata of the models count.
    """
    comparison = _Comparison(Form(first), Form(second), tolerance)
    differences = chain(
        _of_signatures(comparison),
        _of_opsets(comparison),
        _of_metadata(first, second) if metadata else (),
        comparison.of_layers(),
        comparison.of_nodes(),
        comparison.of_regions(),
        comparison.of_results(),
    )
    found = tuple(differences)
    return Diff(found, tuple(comparison.pairs), (len(comparison.first.vertices), len(comparison.second.vertices)))


@dataclass(eq=False)
class _Side:
    """One model: its graph, its layers, and what of a layer each node and input is."""

    form: Form
    layers: list[LinearLayer]
    near: dict[Vertex, str] = field(default_factory=dict)
    places: dict[tuple[Vertex, int], list[tuple[LinearLayer, str]]] = field(default_factory=lambda: defaultdict(list))
    members: dict[Vertex, list[tuple[LinearLayer, str]]] = field(default_factory=lambda: defaultdict(list))

    @staticmethod
    def of(form: Form) -> _Side:
        """Read the layers of a graph."""
        side = _Side(form, linear_quantization(form.model))
        for layer in side.layers:
            for (node, slot), fact in layer.places.items():
                side.places[form.of_node[node], slot].append((layer, fact))
            for node, fact in layer.members.items():
                side.members[form.of_node[node]].append((layer, fact))
        side.near = layer_names(form, side.layers)
        return side


def layer_names(form: Form, layers: Iterable[LinearLayer]) -> dict[Vertex, str]:
    """For each node the linear layer that it is part of, leads to or, at the end of the graph, comes from."""
    found: dict[Vertex, str] = {}
    rank: dict[str, int] = {}
    for layer in layers:
        rank[layer.name] = len(rank)
        for node in layer.members:
            found.setdefault(form.of_node[node], layer.name)
    for vertex in reversed(form.vertices):
        behind = [found[reader] for reader, _, _ in vertex.readers if reader in found]
        if vertex not in found and behind:
            found[vertex] = min(behind, key=rank.__getitem__)
    for vertex in form.vertices:
        if vertex not in found:
            found[vertex] = next((found[source] for source in vertex.sources if found.get(source)), "")
    return found


class _Comparison:
    """Two graphs whose nodes and layers have been matched."""

    def __init__(self, first: Form, second: Form, tolerance: float) -> None:
        self.first = first
        self.second = second
        self.tolerance = tolerance
        self.matching = Matching(first, second)
        self.sides = (_Side.of(first), _Side.of(second))
        self.twins = self._twins()
        self.matching.join(
            [(_end(first, layer), _end(second, twin)) for layer, twin in self.twins.items()],
            [
                (one.vertex, other.vertex)
                for layer, twin in self.twins.items()
                if isinstance(one := first.slot(layer.source), Edge)
                and isinstance(other := second.slot(twin.source), Edge)
            ],
        )
        self.pairs: list[LayerPair] = []
        self.told: set[tuple[LinearLayer, str]] = set()
        """The facts of layers that have been reported, of both sides."""

    def of_layers(self) -> Iterator[Difference]:
        """What differs in the linear layers; several that read one quantizer are told together."""
        grouped: dict[tuple[FactDifference, tuple[int, ...]], list[LinearLayer]] = defaultdict(list)
        for mine, theirs in self._layer_pairs():
            found = list(layer_differences(mine, theirs, self.tolerance)) if mine and theirs else []
            self.pairs.append(_pair(mine, theirs, tuple(entry.fact for entry in found)))
            if mine is None or theirs is None:
                continue
            facts = {fact for entry in found for fact in (entry.fact, *entry.implied)}
            facts |= {"form"} if mine.form != theirs.form else set()
            self.told |= {(layer, fact) for layer in (mine, theirs) for fact in facts}
            for entry in found:
                shared = (id(mine.source), id(theirs.source)) if entry.fact.startswith("activation") else (id(mine),)
                grouped[entry, shared].append(mine)
        for (entry, _), layers in grouped.items():
            others = f" and {len(layers) - 1} more readers" if len(layers) > 1 else ""
            where = layers[0].name + others
            yield Difference(entry.kind, layers[0].name, where, entry.what, entry.before, entry.after)

    def _twins(self) -> dict[LinearLayer, LinearLayer]:
        """The layers that belong together: by their matched nodes, then by weight, by name, and by shape, in order."""
        mine, theirs = (side.layers for side in self.sides)
        of_vertex = {self.second.of_node[layer.node]: layer for layer in theirs}
        twins: dict[LinearLayer, LinearLayer] = {}
        for layer in mine:
            twin = self.matching.forward.get(self.first.of_node[layer.node])
            if twin is not None and twin in of_vertex:
                twins[layer] = of_vertex[twin]
        for key in (_content_and_name, _content, _name, _shape):
            _pair_by(key, mine, theirs, twins)
        return twins

    def _layer_pairs(self) -> Iterator[tuple[LinearLayer | None, LinearLayer | None]]:
        mine, theirs = (side.layers for side in self.sides)
        yield from ((layer, self.twins.get(layer)) for layer in mine)
        taken = set(self.twins.values())
        yield from ((None, layer) for layer in theirs if layer not in taken)

    def of_nodes(self) -> Iterator[Difference]:
        """What differs in matched nodes: attributes, constants and where their inputs come from; one constant once."""
        seen: dict[tuple[int, int], None] = {}
        for vertex, twin in sorted(self.matching.forward.items(), key=lambda pair: self.first.vertices.index(pair[0])):
            layer = self.sides[0].near.get(vertex, "")
            where = vertex.node.name or vertex.op
            for name in sorted(vertex.attributes.keys() | twin.attributes.keys()):
                one, other = vertex.attributes.get(name, "default"), twin.attributes.get(name, "default")
                if one != other:
                    yield Difference("attribute", layer, where, f"{vertex.op} attribute {name}", one, other)
            slots = list(self._slots(vertex, twin))
            if swapped := self._swapped(slots):
                yield Difference("edge", layer, where, f"{vertex.op} inputs", "in order", f"{swapped} swapped")
                continue
            for index, one_slot, other_slot in slots:
                if self._is_told(vertex, twin, index):
                    continue
                if isinstance(one_slot, Constant) and isinstance(other_slot, Constant):
                    if (pair := (id(one_slot), id(other_slot))) not in seen:
                        seen[pair] = None
                        yield from self._constants(vertex, index, one_slot, other_slot)
                elif self._is_rewired(one_slot, other_slot):
                    before, after = _slot_text(self.first, one_slot), _slot_text(self.second, other_slot)
                    yield Difference("edge", layer, where, f"{vertex.op} input {index}", before, after)

    def _slots(self, vertex: Vertex, twin: Vertex) -> Iterator[tuple[int, Slot, Slot]]:
        """The inputs that two matched nodes read in the same place; those that may change places, as they fit best."""
        count = max(len(vertex.slots), len(twin.slots))
        mine, theirs = (list(entry.slots) + [None] * (count - len(entry.slots)) for entry in (vertex, twin))
        if vertex.commutative and twin.commutative:
            crossed = theirs[::-1]
            if sum(map(self._fits, mine, crossed)) > sum(map(self._fits, mine, theirs)):
                theirs = crossed
        return ((index, one, other) for index, (one, other) in enumerate(zip(mine, theirs, strict=True)))

    def _swapped(self, slots: list[tuple[int, Slot, Slot]]) -> str:
        """Which two inputs have changed places; empty when it is something else that differs."""
        apart = [(index, one, other) for index, one, other in slots if not self._fits(one, other)]
        if len(apart) != 2:
            return ""
        (first, one, other), (second, two, another) = apart
        return f"{first} and {second}" if self._fits(one, another) and self._fits(two, other) else ""

    def _fits(self, one: Slot, other: Slot) -> bool:
        if isinstance(one, Constant) and isinstance(other, Constant):
            return one.digest == other.digest
        return not self._is_rewired(one, other, strict=True)

    def _is_rewired(self, one: Slot, other: Slot, *, strict: bool = False) -> bool:
        """Whether an input comes from elsewhere; what an added or removed node explains is no such case."""
        if isinstance(one, Edge) and isinstance(other, Edge) and self.matching.forward.get(one.vertex) is other.vertex:
            return one.output != other.output
        if isinstance(one, Port) and isinstance(other, Port):
            return (one.index, other.index) not in self.matching.inputs
        if one is None and other is None:
            return False
        if isinstance(one, Constant) and isinstance(other, Constant):
            return False
        removed = isinstance(one, Edge) and one.vertex not in self.matching.forward
        added = isinstance(other, Edge) and other.vertex not in self.matching.backward
        return strict or not (removed or added)

    def _is_told(self, vertex: Vertex, twin: Vertex, index: int) -> bool:
        """Whether an input is a fact of a layer that has been reported already."""
        facts = (*self.sides[0].places.get((vertex, index), ()), *self.sides[1].places.get((twin, index), ()))
        return any(fact in self.told for fact in facts)

    def _constants(self, vertex: Vertex, index: int, one: Constant, other: Constant) -> Iterator[Difference]:
        if one.digest == other.digest:
            return
        layer = self.sides[0].near.get(vertex, "")
        fact = next((fact for _, fact in self.sides[0].places.get((vertex, index), ())), "")
        name = fact or f"{vertex.op} input {index}"
        kind: Kind = "quantization" if fact and fact not in ("bias", "weight values") else "constant"
        told = change_of(one.array(), other.array(), self.tolerance) if one.size == other.size else None
        if one.dtype == other.dtype and one.size == other.size and one.shape != other.shape and told is None:
            yield Difference(
                kind, layer, vertex.node.name or vertex.op, f"{name} shape", str(one.shape), str(other.shape)
            )
        elif (one.dtype, one.shape) != (other.dtype, other.shape):
            yield Difference(kind, layer, vertex.node.name or vertex.op, name, text_of(one), text_of(other))
        elif told is not None:
            where = vertex.node.name or vertex.op
            yield Difference(kind, layer, where, name + told.place, told.before, told.after)

    def of_regions(self) -> Iterator[Difference]:
        """Connected nodes that only one of the graphs has; those in the same place of both are one replacement."""
        removed = [self._region(nodes, 0) for nodes in _connected(self._unmatched(0))]
        added = [self._region(nodes, 1) for nodes in _connected(self._unmatched(1))]
        for region in removed:
            instead = [other for other in added if region.border & other.border]
            added = [other for other in added if other not in instead]
            kind: Kind = "replaced" if instead else "removed"
            text = ", ".join(other.text for other in instead)
            yield Difference(kind, region.layer, region.where, "operators", region.text, text)
        for region in added:
            yield Difference("added", region.layer, region.where, "operators", "", region.text)

    def _unmatched(self, side: int) -> list[Vertex]:
        """The nodes of one graph that have no twin and do not belong to a reported fact of a layer."""
        matched = self.matching.backward if side else self.matching.forward
        members = self.sides[side].members
        return [
            vertex
            for vertex in self.sides[side].form.vertices
            if vertex not in matched and not any(self._explains(fact) for fact in members.get(vertex, ()))
        ]

    def _explains(self, fact: tuple[LinearLayer, str]) -> bool:
        layer, name = fact
        return any(
            told is layer and (name == what or what.startswith(f"{name} ") or what == "form")
            for told, what in self.told
        )

    def _region(self, nodes: Sequence[Vertex], side: int) -> _Region:
        inside = set(nodes)
        twin_of = self.matching.backward if side else {vertex: vertex for vertex in self.matching.forward}
        border: set[object] = set()
        for vertex in nodes:
            border |= {("from", twin_of.get(source)) for source in vertex.sources if source not in inside}
            border |= {("to", twin_of.get(reader), slot) for reader, slot, _ in vertex.readers if reader not in inside}
            border |= {("out", index) for index, _ in vertex.results}
        border -= {entry for entry in border if isinstance(entry, tuple) and entry[1] is None}
        first = nodes[0]
        return _Region(self.sides[side].near.get(first, ""), first.node.name or first.op, _operators(nodes), border)

    def of_results(self) -> Iterator[Difference]:
        """Graph outputs that are read from another node."""
        for one, other in self.matching.outputs:
            mine, theirs = self.first.results[one], self.second.results[other]
            if isinstance(mine, Constant) and isinstance(theirs, Constant):
                if told := change_of(mine.array(), theirs.array(), self.tolerance):
                    name = self.first.outputs[one].name
                    yield Difference("constant", "", name, "output" + told.place, told.before, told.after)
            elif self._is_rewired(mine, theirs):
                before, after = _slot_text(self.first, mine), _slot_text(self.second, theirs)
                yield Difference("edge", "", self.first.outputs[one].name, "output is made by", before, after)


@dataclass(frozen=True, eq=False)
class _Region:
    layer: str
    where: str
    text: str
    border: set[object]


def _pair(mine: LinearLayer | None, theirs: LinearLayer | None, facts: tuple[str, ...]) -> LayerPair:
    known = mine or theirs
    assert known is not None
    sides = (mine, theirs)
    return LayerPair(
        mine.name if mine else "",
        theirs.name if theirs else "",
        known.shape,
        (mine.form if mine else "", theirs.form if theirs else ""),
        (mine.summary if mine else "", theirs.summary if theirs else ""),
        facts if all(sides) else ("presence",),
    )


def _end(form: Form, layer: LinearLayer) -> Vertex:
    """The last node of a layer: the addition of its bias, or the product."""
    return form.of_node[next((node for node in layer.members if node.op_type == "Add"), layer.node)]


def _content_and_name(layer: LinearLayer) -> object:
    return layer.content, layer.name


def _content(layer: LinearLayer) -> object:
    return layer.content


def _name(layer: LinearLayer) -> object:
    return layer.name


def _shape(layer: LinearLayer) -> object:
    return layer.shape


def _pair_by(
    key: Callable[[LinearLayer], object],
    mine: Sequence[LinearLayer],
    theirs: Sequence[LinearLayer],
    twins: dict[LinearLayer, LinearLayer],
) -> None:
    """Pair layers of equal key that are still alone, in order."""
    taken = set(twins.values())
    waiting: dict[object, list[LinearLayer]] = defaultdict(list)
    for layer in theirs:
        if layer not in taken:
            waiting[key(layer)].append(layer)
    for layer in mine:
        if layer not in twins and waiting[key(layer)]:
            twins[layer] = waiting[key(layer)].pop(0)


def _connected(vertices: Sequence[Vertex]) -> list[list[Vertex]]:
    """The connected parts of some nodes, each in the graph's order."""
    rank = {vertex: index for index, vertex in enumerate(vertices)}
    left = dict.fromkeys(vertices)
    parts = []
    while left:
        pending, part = [next(iter(left))], []
        while pending:
            vertex = pending.pop()
            if vertex not in left:
                continue
            del left[vertex]
            part.append(vertex)
            pending += [*vertex.sources, *(reader for reader, _, _ in vertex.readers)]
        parts.append(sorted(part, key=rank.__getitem__))
    return parts


def _operators(nodes: Sequence[Vertex]) -> str:
    """The operators of a region: one by one when they are few, else counted."""
    if len(nodes) <= LISTED:
        return ", ".join(vertex.op for vertex in nodes)
    counts = Counter(vertex.op for vertex in nodes)
    return f"{len(nodes)} nodes: " + ", ".join(f"{count} {op}" for op, count in counts.most_common())


def _slot_text(form: Form, slot: Slot) -> str:
    if isinstance(slot, Edge):
        return f"{slot.vertex.op} {slot.vertex.node.name or ''}".strip()
    if isinstance(slot, Port):
        return f"input {form.inputs[slot.index].name}"
    return "" if slot is None else text_of(slot)


def _of_signatures(comparison: _Comparison) -> Iterator[Difference]:
    matching = comparison.matching
    kinds: tuple[tuple[Kind, Any, Any, list[tuple[int, int]]], ...] = (
        ("input", matching.first.inputs, matching.second.inputs, matching.inputs),
        ("output", matching.first.outputs, matching.second.outputs, matching.outputs),
    )
    for kind, mine, theirs, pairs in kinds:
        order = [other for _, other in sorted(pairs)]
        for one, other in pairs:
            moved = order.index(other) != sorted(order).index(other)
            for what, before, after in (
                ("name", mine[one].name, theirs[other].name),
                ("type", mine[one].type, theirs[other].type),
                ("place", str(one), str(other) if moved else str(one)),
            ):
                if before != after:
                    yield Difference(kind, "", mine[one].name, what, before, after)
        for index in set(range(len(mine))) - {one for one, _ in pairs}:
            yield Difference(kind, "", mine[index].name, kind, mine[index].type, "")
        for index in set(range(len(theirs))) - {other for _, other in pairs}:
            yield Difference(kind, "", theirs[index].name, kind, "", theirs[index].type)


def _of_opsets(comparison: _Comparison) -> Iterator[Difference]:
    mine, theirs = comparison.first.opsets, comparison.second.opsets
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            yield Difference("opset", "", name, "version", str(mine.get(name, "")), str(theirs.get(name, "")))


def _of_metadata(first: ir.Model, second: ir.Model) -> Iterator[Difference]:
    keys = ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string")
    sides = [
        {key: str(getattr(model, key) or "") for key in keys} | dict(model.metadata_props) for model in (first, second)
    ]
    for name in sorted(sides[0].keys() | sides[1].keys()):
        before, after = sides[0].get(name, ""), sides[1].get(name, "")
        if before != after:
            yield Difference("metadata", "", name, "metadata", before, after)
