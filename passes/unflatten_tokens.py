"""Keep batch and length apart where a model merges them around its linear layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.facts import Fact
from scalefold.compiler.protocol import Context, Contract, Event, PassResult
from scalefold.compiler.sites import NORMS

ROW_WISE = frozenset({
    "Add", "Sub", "Mul", "Div", "Pow", "Neg", "Abs", "Exp", "Sqrt", "Reciprocal", "Erf", "Tanh", "Sigmoid", "Relu",
    "Gelu", "FastGelu", "QuickGelu", "Softplus", "Clip", "Min", "Max", "Where", "Cast", "Identity",
    "LayerNormalization", "RMSNormalization", "MatMul",
})  # fmt: skip
"""Operators that do to each token what they do, however tokens are laid out."""


@dataclass(frozen=True)
class UnflattenTokens:
    """Take out pairs of Reshape that merge batch and length in front of row-wise operators and part them behind.

    before:  y = Reshape(f(Reshape(x, [-1, C])), [B, S, N])
    after:   y = f(x)

    x is [B, S, C], or [B, S, H, D] with H * D = C, of which one Reshape to [B, S, C] stays; y is [B, S, N]. f is made of
    linear layers, normalizations over the last axis and element-wise operators, with constants that broadcast along the
    last axis. GPT-2's Conv1D and OPT's feed-forward are written so. Behind a two-dimensional MatMul + Add onnxruntime
    makes a float Gemm before it looks at QuantizeLinear, and statistics could not leave padding out.
    """

    name: ClassVar[str] = "unflatten-tokens"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.NORMAL_FORM})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.REASSOCIATED

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Take out every such pair; decline a merge behind which something is not row-wise."""
        rewrites, declined = [], []
        for entry in graph.nodes(model, "Reshape"):
            if entry.graph is None or not _merges(entry):
                continue
            region = _Region(entry)
            if (reason := region.obstacle()) is not None:
                declined.append(Event(entry, reason))
                continue
            region.unflatten(model)
            rewrites.append(Event(entry, f"{len(region.inside)} operators, {len(region.exits)} ends"))
        if rewrites:
            graph.sweep(model)
        return PassResult(tuple(rewrites), tuple(declined))


def _merges(reshape: ir.Node) -> bool:
    """Whether it makes [B * S, C] of [B, S, C] or [B, S, H, D]."""
    x, y = reshape.inputs[0], reshape.outputs[0]
    if x is None or x.shape is None or y.shape is None or len(x.shape) not in (3, 4) or len(y.shape) != 2:
        return False
    tail = [size for size in list(x.shape)[2:] if isinstance(size, int)]
    return len(tail) == len(x.shape) - 2 and math.prod(tail) == y.shape[1]


class _Region:
    """What is computed on merged tokens between one or more merges and the Reshapes that part them again."""

    def __init__(self, entry: ir.Node) -> None:
        self.lead = _lead(entry)
        self.entries = [entry]
        self.inside: list[ir.Node] = []
        self.exits: list[ir.Node] = []
        self._flat = {entry.outputs[0]}
        pending = [entry.outputs[0]]
        while pending:
            for node in graph.consumers(pending.pop()):
                pending += self._visit(node)

    def _visit(self, node: ir.Node) -> list[ir.Value]:
        """Take in a reader of merged tokens; the values that it adds to them."""
        if node in self.inside or node in self.exits:
            return []
        shape = node.outputs[0].shape
        if node.op_type == "Reshape" and shape is not None and len(shape) == 3 and tuple(shape)[:2] == self.lead:
            self.exits.append(node)
            return []
        self.inside.append(node)
        if node.op_type not in ROW_WISE:
            return []
        merges = [
            producer
            for entry in node.inputs
            if (producer := graph.producer(entry, "Reshape")) is not None
            and producer not in self.entries
            and _merges(producer)
            and _lead(producer) == self.lead
        ]
        self.entries += merges
        added = [*node.outputs, *(merge.outputs[0] for merge in merges)]
        self._flat.update(added)
        return added

    def obstacle(self) -> str | None:
        """Why the region cannot be unflattened, or None."""
        if any(value.is_graph_output() for value in self._flat):
            return "the merged tokens are an output of the graph"
        for node in self.inside:
            if node.op_type not in ROW_WISE:
                return f"they are read by {node.op_type}, which is not row-wise"
            if node.op_type in NORMS and graph.attribute(node, "axis", -1) not in (-1, 1):
                return f"{node.op_type} is not over the last axis alone"
            if graph.rank(node.outputs[0]) != 2:
                return f"the result of {node.op_type} has no two dimensions"
            for index, value in enumerate(node.inputs):
                if value is not None and value not in self._flat and not _means_the_same(node, index, value):
                    return f"{node.op_type} reads {value.name} beside them"
        return None

    def unflatten(self, model: ir.Model) -> None:
        """Compute the region on [B, S, C]."""
        for value in [out for node in self.inside for out in node.outputs]:
            assert value.shape is not None
            value.shape = ir.Shape([*self.lead, *list(value.shape)[1:]])
        for node in self.inside:
            if node.op_type in NORMS:
                node.attributes["axis"] = ir.AttrInt64("axis", -1)
        for entry in self.entries:
            x, merged = entry.inputs[0], entry.outputs[0]
            assert x is not None and merged.shape is not None
            if graph.rank(x) == 3:
                graph.bypass(merged, x)
            else:
                shape = np.array([0, 0, -1], dtype=np.int64)
                graph.replace_constant(model, entry, 1, f"{entry.name}.shape", shape)
                entry.attributes.pop("allowzero", None)
                merged.shape = ir.Shape([*self.lead, merged.shape[1]])
        for node in self.exits:
            source = node.inputs[0]
            assert source is not None
            graph.bypass(node.outputs[0], source)


def _lead(entry: ir.Node) -> tuple[ir.SymbolicDim | int, ...]:
    """(B, S) of what a merge reads."""
    x = entry.inputs[0]
    assert x is not None and x.shape is not None
    return tuple(x.shape)[:2]


def _means_the_same(node: ir.Node, index: int, value: ir.Value) -> bool:
    """Whether a constant broadcasts beside [B, S, C] as it does beside [B * S, C]: a vector, or a weight."""
    rank = graph.rank(value)
    if rank is None or graph.constant(value) is None:
        return False
    return rank <= 1 or (node.op_type == "MatMul" and index == 1 and rank == 2)
