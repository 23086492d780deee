"""Let linear layers of equal weight read one constant."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.facts import Fact
from scalefold.compiler.protocol import Context, Contract, Event, PassResult


@dataclass(frozen=True)
class ShareWeights:
    """Merge the equal weights of linear layers, which exporters write once per use.

    before:  MatMul(x, W);  MatMul(y, W')   where W' = W
    after:   MatMul(x, W);  MatMul(y, W)

    W and W' are [K, N]. ALBERT (Lan et al. 2019, arXiv 1909.11942) uses the weights of one layer in all of its layers: one
    set of codes in the file serves them, and what migrates outliers must see that they are one.
    """

    name: ClassVar[str] = "share-weights"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.NORMAL_FORM})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Merge every weight with the first that equals it."""
        rewrites = []
        first: dict[tuple[tuple[int, int], bytes], ir.Value] = {}
        shapes = [layer.shape for layer in graph.linear_layers(model)]
        for layer in graph.linear_layers(model):
            if shapes.count(layer.shape) == 1:
                continue
            digest = hashlib.sha256(layer.weights().tobytes()).digest()
            kept = first.setdefault((layer.shape, digest), layer.weight)
            if kept is layer.weight:
                continue
            dropped = layer.weight
            layer.matmul.replace_input_with(1, kept)
            if not dropped.uses() and not dropped.is_graph_output():
                model.graph.initializers.pop(dropped.name or "", None)
            rewrites.append(Event(layer.matmul, f"reads {kept.name} too"))
        return PassResult(tuple(rewrites))
