"""Repeat the prefix of all layers for the batch by one node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.decoder import PREFIX
from scalefold.compiler.facts import Fact
from scalefold.compiler.protocol import Context, Contract, Event, PassResult


@dataclass(frozen=True)
class MergeExpands:
    """Expand the keys and values that bake-prefix puts before every sequence together, and split them.

    before:  p_i = Expand(c_i, [B, 1, 1, 1])                 c_i [1, H, n, D], constants
    after:   p_1, p_2, ... = Split(Expand([c_1 c_2 ...], [B, 1, 1, 1]), axis = 1)

    There are two for each layer, each so small that its node costs more than what it does. Figures: docs/decisions/0015.
    """

    name: ClassVar[str] = "merge-expands"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Merge all that are expanded alike; nothing is declined."""
        groups: dict[tuple[object, ...], list[ir.Node]] = {}
        for node in graph.nodes(model, "Expand"):
            constant, sizes = node.inputs
            if constant is not None and _is_prefix(constant) and _expands_the_batch(constant, sizes):
                groups.setdefault((sizes, constant.dtype, graph.whole_shape(constant)), []).append(node)
        merged = [(_merge(model, group), group) for group in groups.values() if len(group) > 1]
        if merged:
            graph.sweep(model)
        return PassResult(tuple(Event(split, f"{len(group)} constants expanded at once") for split, group in merged))


def _is_prefix(constant: ir.Value) -> bool:
    return constant.is_initializer() and (constant.name or "").endswith(PREFIX)


def _expands_the_batch(constant: ir.Value, sizes: ir.Value | None) -> bool:
    """Whether a [1, H, n, D] is expanded to [B, H, n, D] by a list of sizes that says so."""
    concat = graph.producer(sizes, "Concat")
    if concat is None or len(concat.inputs) != 2 or graph.rank(constant) != 4 or graph.whole_shape(constant)[0] != 1:
        return False
    ones = graph.constant(concat.inputs[1])
    return ones is not None and ones.tolist() == [1, 1, 1]


def _merge(model: ir.Model, group: Sequence[ir.Node]) -> ir.Node:
    """Put one Expand and a Split where the first of the nodes was."""
    first = group[0]
    arrays = [array for node in group if (array := graph.constant(node.inputs[0])) is not None]
    together = graph.add_initializer(model, f"past{PREFIX}", np.concatenate(arrays, axis=1))
    expand = ir.node("Expand", [together, first.inputs[1]], name="past.prefix_of_all")
    expand.outputs[0].type = first.outputs[0].type
    split = ir.node(
        "Split",
        [expand.outputs[0]],
        {"axis": 1, "num_outputs": len(group)},
        num_outputs=len(group),
        name="past.prefix_by_layer",
    )
    graph.insert_before(first, [expand, split])
    for node, piece in zip(group, split.outputs, strict=True):
        graph.stand_in(node.outputs[0], piece)
    return split
