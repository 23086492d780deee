"""Places where channels can be shifted and scaled: what makes an activation, who reads it, and folding into both.

X = s X~ + z, per channel: X is [..., C], z and s are [C]. What makes X absorbs the left side, every linear layer that
reads X the right side, so the function stays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.graph import Linear
from scalefold.compiler.runtime import Feed
from scalefold.compiler.schemes import Float

MIGRATED = "scalefold.migrated"
"""Marks a layer in memory: a second search would start from a smaller threshold and never settle."""

CACHE = "scalefold.cache"
"""Marks a graph input in memory: the (shift, scale) by which its contents are kept, in its shape but for the length."""

NORMS = ("LayerNormalization", "RMSNormalization")

Columns = npt.NDArray[np.intp]
Exact = npt.NDArray[np.float64]


class Kind(Enum):
    """What makes an activation, and so what may be folded into it."""

    NORM = "a normalization"
    LINEAR = "a linear layer"
    VALUE = "the values of attention"
    RELU = "a linear layer and a Relu"
    GATE = "a linear layer and a gate"


@dataclass(frozen=True)
class Memory:
    """A cache of values between the producer of an activation and the activation.

    Attributes:
        past: what holds earlier tokens: a graph input, behind constants of a prefix where there is one.
        columns: the producer's column behind each of its entries, in its shape with 1 for batch and length.
    """

    past: ir.Value
    columns: Columns


@dataclass(frozen=True)
class Producer:
    """The node that can absorb a shift and a scale of an activation's channels.

    Attributes:
        kind: what it is.
        node: the normalization, or the MatMul of a linear layer.
        columns: for each channel of the activation the column of the linear layer that makes it; None for a
            normalization, whose channels are its own.
        memories: the caches that hold the same columns.
    """

    kind: Kind
    node: ir.Node
    columns: Columns | None = None
    memories: tuple[Memory, ...] = ()

    @property
    def shifts(self) -> bool:
        """Whether a shift can be absorbed, and not only a positive scale."""
        return self.kind in (Kind.LINEAR, Kind.VALUE) or self.node.op_type == "LayerNormalization"


@dataclass(frozen=True)
class Site:
    """An activation that linear layers read.

    Attributes:
        readers: the MatMul nodes of the layers; what they read stays the site's activation whatever is folded.
    """

    readers: tuple[ir.Node, ...]

    @property
    def x(self) -> ir.Value:
        """The activation [..., C]."""
        x = self.readers[0].inputs[0]
        assert x is not None
        return x

    @property
    def layers(self) -> tuple[Linear, ...]:
        """The linear layers that read it, as they are now."""
        return tuple(_linear(node) for node in self.readers)

    @property
    def others(self) -> tuple[ir.Node, ...]:
        """The other nodes that read its values: a residual connection."""
        return tuple(node for node in graph.consumers(self.x) if node not in self.readers and node.op_type != "Shape")

    @property
    def norm(self) -> ir.Node | None:
        """The normalization that makes it, or None."""
        return graph.producer(self.x, *NORMS)


def find_sites(model: ir.Model) -> list[Site]:
    """The activations that linear layers read, in graph order."""
    readers: dict[ir.Value, list[ir.Node]] = {}
    for layer in graph.linear_layers(model):
        readers.setdefault(layer.x, []).append(layer.matmul)
    return [Site(tuple(matmuls)) for matmuls in readers.values()]


def group_sites(sites: Sequence[Site]) -> dict[Site, tuple[Site, ...]]:
    """For each site those that must be migrated alike, because their readers share a weight; each in graph order."""
    leader: dict[Site, Site] = {site: site for site in sites}
    first_with: dict[ir.Value, Site] = {}
    for site in sites:
        for weight in (layer.weight for layer in site.layers):
            old, new = leader[site], leader[first_with.setdefault(weight, site)]
            leader = {member: new if of is old else of for member, of in leader.items()} if old is not new else leader
    return {site: tuple(other for other in sites if leader[other] is leader[site]) for site in sites}


def find_producer(site: Site, kinds: Collection[Kind]) -> Producer | str | None:
    """What makes a site's activation, without attention between.

    Args:
        site: where.
        kinds: the kinds to look for.

    Returns:
        the producer, why it cannot absorb anything, or None when it is of none of these kinds.
    """
    node = site.x.producer()
    if node is None:
        return None
    if Kind.NORM in kinds and node.op_type in NORMS:
        return _norm_obstacle(site, node) or Producer(Kind.NORM, node)
    if Kind.RELU in kinds and node.op_type == "Relu":
        return _through(site.x, node, node.inputs[:1], Kind.RELU)
    if Kind.GATE in kinds and node.op_type == "Mul":
        return _through(site.x, node, node.inputs[::-1], Kind.GATE)
    if Kind.LINEAR in kinds and (layer := layer_of(site.x)) is not None:
        return _columns(layer, Kind.LINEAR)
    return None


def layer_of(y: ir.Value | None) -> Linear | None:
    """The linear layer whose output is `y`, or None."""
    node = graph.producer(y, "MatMul", "Add")
    if node is not None and node.op_type == "Add":
        products = (graph.linear_at(graph.producer(entry, "MatMul")) for entry in node.inputs)
        return next((layer for layer in products if layer is not None and layer.y is y), None)
    layer = graph.linear_at(node)
    return layer if layer is not None and layer.y is y else None


def _linear(matmul: ir.Node) -> Linear:
    layer = graph.linear_at(matmul)
    assert layer is not None
    return layer


def _columns(layer: Linear, kind: Kind) -> Producer:
    return Producer(kind, layer.matmul, np.arange(layer.shape[1]))


def _norm_obstacle(site: Site, norm: ir.Node) -> str | None:
    if any(graph.constant(entry) is None for entry in norm.inputs[1:] if entry is not None):
        return "gain or bias of the normalization is not a constant"
    if graph.attribute(norm, "axis", -1) not in (-1, (graph.rank(site.x) or 0) - 1):
        return "the normalization is not over the last axis alone"
    return None


def _through(x: ir.Value, node: ir.Node, operands: Sequence[ir.Value | None], kind: Kind) -> Producer | str | None:
    """A layer whose output goes into nothing but `node`, a Relu or a product with a gate."""
    layers = [layer for layer in map(layer_of, operands) if layer is not None]
    if not layers:
        return None
    for layer in layers:
        if graph.only_consumer(layer.y) is node and list(node.inputs).count(layer.y) == 1 and _as_wide(x, layer):
            return _columns(layer, kind)
    return "the output of the layer that makes it is read by something else too"


def _as_wide(x: ir.Value, layer: Linear) -> bool:
    """Whether a product with a gate did not widen a layer of one column."""
    return x.shape is None or x.shape[-1] == layer.shape[1]


def obstacle(sites: Sequence[Site], producers: Sequence[Producer]) -> str | None:
    """Why a group of sites cannot be migrated in one, or None when it can."""
    if any(site.x.is_graph_output() for site in sites):
        return "the activation is an output of the graph"
    readers = {node for site in sites for node in site.readers}
    weights = {layer.weight for site in sites for layer in site.layers}
    if any(use.node not in readers or use.idx != 1 for weight in weights for use in weight.uses()):
        return "a weight is shared with something that is not a linear layer"
    made_by = [_linear(producer.node) for producer in producers if producer.kind is not Kind.NORM]
    makers = {layer.matmul for layer in made_by}
    if any(layer.weight in weights for layer in made_by):
        return "a layer both makes and reads the activation"
    if any(use.node not in makers or use.idx != 1 for layer in made_by for use in layer.weight.uses()):
        return "the weight of the layer that makes it is shared with another layer"
    maps = [producer.columns for producer in producers if producer.columns is not None]
    if any(not np.array_equal(maps[0], other) for other in maps[1:]):
        return "the channels come from other columns in another use of the weight"
    return None


def fold(model: ir.Model, sites: Sequence[Site], producers: Sequence[Producer], z: Float, s: Float) -> None:
    """Write a migration into the graph: what makes the activations, what reads them, and residual connections.

    A constant that several nodes share is written once and stays shared.

    Args:
        model: edited in place.
        sites: where; `obstacle` has found none.
        producers: what makes each.
        z: shift [C]; zero where a producer cannot shift.
        s: scale [C], positive.
    """
    swap = _Swap(model)
    for node in dict.fromkeys(node for site in sites for node in site.readers):
        _fold_into_reader(swap, _linear(node), z, s)
    for producer in producers:
        if producer.columns is None:
            _fold_into_norm(swap, producer.node, z, s)
        else:
            _fold_into_columns(swap, producer, z, s)
    for site, producer in zip(sites, producers, strict=True):
        _restore(swap, site, producer.node.name or site.x.name or "site", z, s)
        for node in site.readers:
            node.meta[MIGRATED] = True


class _Swap:
    """Puts new constants in the place of old ones, one new for each old."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._new: dict[Hashable, ir.Value] = {}

    def constant(self, key: Hashable, name: str, array: Callable[[], Exact | Float]) -> ir.Value:
        """The new constant of `key`, made on first use."""
        if key not in self._new:
            self._new[key] = graph.add_initializer(self._model, name, np.asarray(array(), dtype=np.float32))
        return self._new[key]

    def input(self, node: ir.Node, index: int, new: ir.Value) -> None:
        """Let `node` read a new constant; the old one goes when nothing else reads it."""
        old = node.inputs[index]
        node.replace_input_with(index, new)
        if old is not None and old.is_initializer() and not old.uses() and not old.is_graph_output():
            self._model.graph.initializers.pop(old.name or "", None)
            graph.unmap(old)  # other graphs may have it too

    def bias(self, layer: Linear, change: Callable[[Exact], Exact]) -> None:
        """Give `layer` another bias, and an Add where it had none."""
        before = layer.biases()
        old = np.zeros(layer.shape[1]) if before is None else before.astype(np.float64)
        new = self.constant(("bias", layer.bias, layer.weight), f"{layer.name}.bias", lambda: change(old))
        if layer.add is not None:
            self.input(layer.add, 0 if layer.add.inputs[0] is layer.bias else 1, new)
            return
        out = layer.matmul.outputs[0]
        add = ir.node("Add", [out, new])
        graph.like(add.outputs[0], out)
        graph.bypass(out, add.outputs[0])
        add.replace_input_with(0, out)
        graph.insert_after(layer.matmul, [add])

    def weight(self, layer: Linear, array: Callable[[], Float]) -> None:
        """Give `layer` another weight."""
        self.input(layer.matmul, 1, self.constant(("weight", layer.weight), f"{layer.name}.weight", array))


def _fold_into_reader(swap: _Swap, layer: Linear, z: Float, s: Float) -> None:
    """X W + b = X~ (s W) + (b + z W)."""
    weight = layer.weights()
    if z.any():
        swap.bias(layer, lambda bias: bias + z.astype(np.float64) @ weight.astype(np.float64))
    if (s != 1).any():
        swap.weight(layer, lambda: weight * s[:, None])


def _fold_into_norm(swap: _Swap, norm: ir.Node, z: Float, s: Float) -> None:
    """The gain becomes gamma / s and the bias (beta - z) / s."""
    name = norm.name or norm.outputs[0].name or "norm"
    gain, bias = norm.inputs[1], norm.inputs[2] if len(norm.inputs) > 2 else None
    gamma, beta = np.asarray(graph.constant(gain), dtype=np.float32), graph.constant(bias)
    swap.input(norm, 1, swap.constant(("gain", gain), f"{name}.gain", lambda: gamma / s))
    if beta is None and not z.any():
        return
    if len(norm.inputs) < 3:
        norm.resize_inputs(3)
    old = np.zeros_like(gamma) if beta is None else np.asarray(beta, dtype=np.float32)
    swap.input(norm, 2, swap.constant(("shift", bias, gain), f"{name}.shift", lambda: (old - z) / s))


def _fold_into_columns(swap: _Swap, producer: Producer, z: Float, s: Float) -> None:
    """The columns of the weight become W / s and their bias (b - z) / s; caches of these columns are marked."""
    layer, columns = _linear(producer.node), producer.columns
    assert columns is not None
    weight = layer.weights()
    shift, scale = np.zeros(layer.shape[1], np.float32), np.ones(layer.shape[1], np.float32)
    shift[columns], scale[columns] = z, s
    if z.any() or layer.bias is not None:
        swap.bias(layer, lambda bias: (bias - shift) / scale)
    if (s != 1).any():
        swap.weight(_linear(producer.node), lambda: weight / scale)
    for memory in producer.memories:
        _fold_into_memory(swap, memory.past, shift[memory.columns], scale[memory.columns])


def is_memory(value: ir.Value) -> bool:
    """Whether a value is made of nothing but graph inputs and constants, and can be folded into."""
    node = value.producer()
    if node is None or graph.constant(value) is not None:
        return True
    return all(entry is not None and is_memory(entry) for entry in _parts(node)) and bool(_parts(node))


def _parts(node: ir.Node) -> Sequence[ir.Value | None]:
    return {"Concat": node.inputs, "Expand": node.inputs[:1]}.get(node.op_type, ())


def _fold_into_memory(swap: _Swap, past: ir.Value, z: Float, s: Float) -> None:
    """Constants become (c - z) / s; a graph input is marked, for its contents are the caller's."""
    node = past.producer()
    if node is None:
        past.meta[CACHE] = (z, s)
        return
    for index, entry in enumerate(_parts(node)):
        assert entry is not None
        if graph.constant(entry) is None:
            _fold_into_memory(swap, entry, z, s)
        else:
            swap.input(
                node, index, swap.constant(("memory", entry), f"{entry.name}.migrated", partial(_moved, entry, z, s))
            )


def _moved(constant: ir.Value, z: Float, s: Float) -> Float:
    return np.asarray((np.asarray(graph.constant(constant), dtype=np.float32) - z) / s, dtype=np.float32)


def migrated_feed(model: ir.Model, feed: Feed) -> Mapping[str, npt.NDArray[np.generic]]:
    """A feed of the model before migration, its cached values as the migrated model keeps them."""
    kept = {value.name or "": value.meta[CACHE] for value in model.graph.inputs if CACHE in value.meta}
    changed = {name: ((feed[name] - z) / s).astype(np.float32) for name, (z, s) in kept.items() if name in feed}
    return {**feed, **changed}


def _restore(swap: _Swap, site: Site, name: str, z: Float, s: Float) -> None:
    """X = s X~ + z for the readers that are not linear layers."""
    others, node = site.others, site.x.producer()
    if not others:
        return
    assert node is not None
    restored, new = site.x, []
    for op_type, vector, neutral in (("Mul", s, 1.0), ("Add", z, 0.0)):
        if (vector != neutral).any():
            label = f"{name}.restore_{op_type.lower()}"
            new.append(ir.node(op_type, [restored, swap.constant(op_type, label, vector.copy)], name=label))
            restored = graph.like(new[-1].outputs[0], site.x)
    graph.insert_after(node, new)
    for reader in others:
        for index, entry in enumerate(reader.inputs):
            if entry is site.x:
                reader.replace_input_with(index, restored)
