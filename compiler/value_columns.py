"""Finding which column of a linear layer each channel of an attention output comes from, whatever reshapes lie between.

Attention mixes tokens: out[t, c] = sum_u p[t, u] v[u, c], and the p of a row sum to 1. So where every token has the
same values v[c], the output is v[c], whatever the scores: with the number of its column as the value of each column,
the output shows the numbers. Reshapes, transposes, Split, interleaved heads, a cache and repeated heads (grouped
queries) need no pattern each. That V~ = (V - z) / s then gives out~ = (out - z) / s is tried on random values before
it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.calibrate import rows_of
from scalefold.compiler.graph import Linear
from scalefold.compiler.runtime import Array, Session
from scalefold.compiler.schemes import Float
from scalefold.compiler.sites import Columns, Kind, Memory, Producer, Site, is_memory, layer_of
from scalefold.compiler.walk import Walk

ATTENTION = frozenset({"Softmax", "Attention", "MultiHeadAttention", "GroupQueryAttention"})

TOLERANCE = 1e-4
"""Largest difference that float rounding may make, relative to the largest value."""


def find_value(walk: Walk, site: Site, masks: Sequence[Array | None]) -> Producer | str | None:
    """The layer whose columns reach a site through attention.

    Args:
        walk: not yet advanced to the site's activation.
        site: where.
        masks: the padding mask of each feed; fully masked rows show nothing.

    Returns:
        the layer with its columns, why there is none, or None when no attention lies before the site.
    """
    behind = graph.ancestors(site.x, lambda value: layer_of(value) is not None)
    if site.x.producer() not in behind or not any(node.op_type in ATTENTION for node in behind):
        return None
    layers = {layer.y: layer for node in behind for layer in map(layer_of, node.inputs) if layer is not None}
    if not layers:
        return "no linear layer makes the values of attention"
    assert site.readers[0].graph is not None
    order = [layers[out] for node in site.readers[0].graph for out in node.outputs if out in layers]
    return _Region(walk, order, site.x, behind, masks).producer()


@dataclass(frozen=True)
class _Store:
    """A Concat of cached tokens with new ones."""

    past: ir.Value
    whole: ir.Value
    axis: int


class _Region:
    """What lies between linear layers and an attention output, to be run with values of one's own.

    Columns are numbered through all layers here, in their order.

    Args:
        walk: gives what else is read: masks and positions.
        layers: the layers whose outputs are replaced.
        x: the attention output.
        behind: the nodes that make `x` from linear layers.
        masks: the padding mask of each feed.
    """

    def __init__(
        self,
        walk: Walk,
        layers: Sequence[Linear],
        x: ir.Value,
        behind: set[ir.Node],
        masks: Sequence[Array | None],
    ) -> None:
        self._layers, self._walk, self._behind, self._end = layers, walk, behind, x
        inside = {node for layer in layers for node in _between(layer.y, behind)}
        assert layers[0].matmul.graph is not None
        self._nodes = [node for node in layers[0].matmul.graph if node in inside]
        self._stores = _stores(self._nodes)
        shapes = [[y.shape for y in walk.value(layer.y)] for layer in layers]
        self._feed = max(range(len(masks)), key=lambda index: shapes[0][index])
        self._shapes, self._mask = [each[self._feed] for each in shapes], masks[self._feed]
        self._pasts = {store.past: walk.value(store.past)[self._feed] for store in self._stores}
        self._ends = np.cumsum([shape[-1] for shape in self._shapes])
        self._generator = np.random.default_rng(0)
        self._x = self._piece(x)

    def producer(self) -> Producer | str:
        """The layer with the column behind each channel, or why its columns do not simply pass through."""
        numbers = (np.arange(1, self._ends[-1] + 1) / self._ends[-1]).astype(np.float32)
        fed = {**self._everywhere(numbers), **self._pasts}
        kept: dict[_Store, Columns] = {}
        for store in self._stores:
            newest = np.take(self._piece(store.whole)(fed), [-1], axis=store.axis)
            columns = self._gathered(newest)
            if columns is not None and (columns == columns[:1]).all():
                kept[store] = columns[:1]
        fed |= {
            store.past: np.broadcast_to(numbers[columns], self._pasts[store.past].shape).astype(np.float32)
            for store, columns in kept.items()
        }
        shown = self._gathered(rows_of(self._x(fed), self._mask))
        if shown is None or (shown != shown[0]).any():
            return "the values do not reach it unchanged through attention whose rows sum to 1"
        return self._proven(shown[0], kept)

    def _proven(self, columns: Columns, kept: Mapping[_Store, Columns]) -> Producer | str:
        """Shift and scale random values by random amounts, and see whether that is all that happens to the output."""
        chosen = int(np.searchsorted(self._ends, columns[0], side="right"))
        layer, first = self._layers[chosen], int(self._ends[chosen]) - self._shapes[chosen][-1]
        if columns.min() < first or columns.max() >= self._ends[chosen]:
            return "several layers make the values of attention"
        wide = (int(self._ends[-1]),)
        z, s = np.zeros(wide, np.float32), np.ones(wide, np.float32)
        z[columns] = self._generator.standard_normal(wide)[columns]
        s[columns] = self._generator.uniform(0.5, 2, wide)[columns]
        held = {store: where for store, where in kept.items() if np.isin(where, columns).any()}
        fed = {value: self._random(array.shape) for value, array in self._everywhere(z).items()}
        fed |= self._pasts | {store.past: self._random(self._pasts[store.past].shape) for store in kept}
        moved = fed | {store.past: (fed[store.past] - z[where]) / s[where] for store, where in held.items()}
        own = slice(first, int(self._ends[chosen]))
        moved[layer.y] = (fed[layer.y] - z[own]) / s[own]
        wanted = (rows_of(self._x(fed), self._mask) - z[columns]) / s[columns]
        if not _close(rows_of(self._x(moved), self._mask), wanted):
            return "a shift and a scale of the values change more than the output of attention"
        inside = _between(layer.y, self._behind)
        served = {store.whole for store in held if _serves_only(store, inside)}
        for leak in _leaks(layer.y, self._end, inside) - served:
            run = None if leak is layer.y else self._piece(leak)
            if run is None or not _close(run(moved), run(fed)):
                return "the values are read by something else too"
        memories = tuple(Memory(store.past, where - first) for store, where in held.items())
        return Producer(Kind.VALUE, layer.matmul, columns - first, memories)

    def _everywhere(self, row: Float) -> dict[ir.Value, Array]:
        """The same row of all columns at every token, cut into the outputs of the layers."""
        parts = np.split(row, self._ends[:-1])
        return {
            layer.y: np.broadcast_to(part, shape).astype(np.float32)
            for layer, part, shape in zip(self._layers, parts, self._shapes, strict=True)
        }

    def _random(self, shape: tuple[int, ...]) -> Array:
        return self._generator.standard_normal(shape).astype(np.float32)

    def _piece(self, end: ir.Value) -> _Run:
        free = [*(layer.y for layer in self._layers), *(store.past for store in self._stores)]
        session, others = self._walk.piece(self._nodes, free, end)
        return _Run(session, end, others[self._feed])

    def _gathered(self, shown: Float) -> Columns | None:
        """The columns whose numbers are shown, or None where something else is."""
        found = np.rint(shown * self._ends[-1])
        exact = shown.size and np.isfinite(shown).all() and (np.abs(shown * self._ends[-1] - found) < 0.1).all()
        inside = exact and found.min() >= 1 and found.max() <= self._ends[-1]
        return np.asarray(found - 1, dtype=np.intp) if inside else None


@dataclass(frozen=True)
class _Run:
    """A session of the region for one of its values."""

    session: Session
    end: ir.Value
    others: Mapping[str, Array]

    def __call__(self, fed: Mapping[ir.Value, Array]) -> Float:
        named = {value.name or "": array for value, array in fed.items()}
        return np.asarray(self.session.run({**self.others, **named})[self.end.name or ""], dtype=np.float32)


def _between(y: ir.Value, behind: set[ir.Node]) -> set[ir.Node]:
    """The nodes among `behind` that are computed from `y`."""
    found: set[ir.Node] = set()
    pending = [node for node in graph.consumers(y) if node in behind]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(reader for out in node.outputs for reader in graph.consumers(out) if reader in behind)
    return found


def _stores(nodes: Sequence[ir.Node]) -> tuple[_Store, ...]:
    """The Concats of earlier tokens with something computed here."""
    made = {out for node in nodes for out in node.outputs}
    found = []
    for node in nodes:
        past = node.inputs[0] if node.op_type == "Concat" and len(node.inputs) == 2 else None
        if past is not None and past not in made and is_memory(past):
            found.append(_Store(past, node.outputs[0], int(str(graph.attribute(node, "axis")))))
    return tuple(found)


def _serves_only(store: _Store, inside: set[ir.Node]) -> bool:
    """Whether a cache is read by its attention alone, and given out."""
    others = [node for node in graph.consumers(store.whole) if node not in inside and node.op_type != "Shape"]
    given = all(node.op_type == "Slice" and node.outputs[0].is_graph_output() for node in others)
    readers = [node for node in graph.consumers(store.past) if node.op_type != "Shape"]
    return (
        given and readers == [store.whole.producer()] and not any(graph.consumers(node.outputs[0]) for node in others)
    )


def _leaks(y: ir.Value, x: ir.Value, inside: set[ir.Node]) -> set[ir.Value]:
    """The values of the region that are read outside it."""
    values = {y, *(out for node in inside for out in node.outputs)} - {x}
    return {
        value
        for value in values
        if value.is_graph_output()
        or any(node not in inside and node.op_type != "Shape" for node in graph.consumers(value))
    }


def _close(first: Array, second: Array) -> bool:
    limit = TOLERANCE * float(np.abs(second).max(initial=1e-30))
    return first.shape == second.shape and bool((np.abs(first - second) <= limit).all())
