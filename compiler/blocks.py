"""Parts of a graph that are learned one at a time: transformer blocks, and activations that are scaled alike."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.sites import NORMS, Columns, Producer, Site, find_sites
from scalefold.compiler.value_columns import ATTENTION


@dataclass(frozen=True)
class Group:
    """Activations that are scaled alike, because their readers share a weight; mostly one.

    Attributes:
        sites: where.
        producers: what makes each.
    """

    sites: tuple[Site, ...]
    producers: tuple[Producer, ...]

    @property
    def readers(self) -> list[ir.Node]:
        """The MatMul nodes that read them."""
        return [node for site in self.sites for node in site.readers]

    @property
    def columns(self) -> Columns | None:
        """For each channel the column that makes it, which is what has a scale; None when they are one to one."""
        return self.producers[0].columns

    @property
    def width(self) -> int:
        """How many scales there are."""
        if self.columns is not None:
            return int(self.columns.max()) + 1
        return self.sites[0].layers[0].shape[0]


@dataclass(frozen=True)
class Block:
    """A part of the graph between two values of the residual stream.

    Attributes:
        start: the value it begins with.
        end: the value it ends with.
        nodes: what lies between.
    """

    start: ir.Value
    end: ir.Value
    nodes: frozenset[ir.Node]

    @property
    def given(self) -> list[ir.Value]:
        """The values that it reads and does not make: its start, masks, positions, caches."""
        made = {out for node in self.nodes for out in node.outputs}
        read = (entry for node in self.nodes for entry in node.inputs if entry is not None)
        outer = {entry.name or "": entry for entry in read if entry not in made and graph.constant(entry) is None}
        return [outer[name] for name in sorted(outer)]


def leads_on(site: Site) -> bool:
    """Whether another linear layer lies behind the readers of a site."""
    behind = {node for reader in site.readers for node in graph.descendants(reader.outputs[0])}
    return any(graph.linear_at(node) is not None for node in behind)


def find_blocks(model: ir.Model) -> list[Block]:
    """The transformer blocks: from the input of one normalization ahead of attention to that of the next.

    The input of a normalization that linear layers read is a value of the residual stream. Where there is no attention,
    each stretch between two such values is a block.
    """
    norms = [site.norm for site in find_sites(model) if site.norm is not None and leads_on(site)]
    streams = list(dict.fromkeys(norm.inputs[0] for norm in norms if norm.inputs[0] is not None))
    if not streams:
        return []
    cuts = [*streams, _stream_behind(model, streams[-1])]
    stretches = [_between(start, end) for start, end in itertools.pairwise(cuts)]
    attentive = [any(node.op_type in ATTENTION for node in stretch) for stretch in stretches]
    starts = [index for index, found in enumerate(attentive) if found or not any(attentive)]
    return [
        Block(cuts[first], cuts[last], _between(cuts[first], cuts[last]))
        for first, last in itertools.pairwise([*starts, len(streams)])
    ]


def _between(start: ir.Value, end: ir.Value) -> frozenset[ir.Node]:
    return frozenset(graph.descendants(start) & graph.ancestors(end, lambda value: value is start))


def _stream_behind(model: ir.Model, last: ir.Value) -> ir.Value:
    """The end of the last block: the input of the first normalization behind its linear layers, or an output."""
    norms = [node for node in graph.consumers(last) if node.op_type in NORMS]
    readers = [node for norm in norms for node in graph.consumers(norm.outputs[0]) if graph.linear_at(node) is not None]
    behind = {node for reader in readers for node in graph.descendants(reader.outputs[0])}
    for node in model.graph:
        if node in behind and node.op_type in NORMS and node.inputs[0] is not None:
            return node.inputs[0]
    return next(value for value in model.graph.outputs if value.producer() in behind)
