"""Keep LayerNormalization apart from the addition in front of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.facts import Fact
from scalefold.compiler.protocol import Context, Contract, Event, PassResult


@dataclass(frozen=True)
class ShieldLayerNorm:
    """Store gain and bias as [1, 1, C], which onnxruntime runs as they are but does not fuse.

    before:  LayerNormalization(Add(a, b), gamma[C], beta[C])
    after:   LayerNormalization(Add(a, b), gamma[1, 1, C], beta[1, 1, C])

    Both are the same function: the operator broadcasts its parameters. Left as vectors, onnxruntime fuses the pair to
    SkipLayerNormalization, which takes three times as long on the CPU. Figures: docs/decisions/0004.
    """

    name: ClassVar[str] = "shield-layer-norm"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Reshape the parameters of every LayerNormalization behind an Add of three-dimensional values."""
        rewrites, declined = [], []
        for norm in graph.nodes(model, "LayerNormalization"):
            if graph.producer(norm.inputs[0], "Add") is None or graph.rank(norm.inputs[0]) != 3:
                continue
            if graph.attribute(norm, "axis", -1) not in (-1, 2):
                declined.append(Event(norm, "not over the last axis alone"))
                continue
            changed = [_widen(model, norm, index) for index in range(1, len(norm.inputs))]
            if any(changed):
                rewrites.append(Event(norm, "parameters stored as [1, 1, C]"))
        return PassResult(tuple(rewrites), tuple(declined))


def _widen(model: ir.Model, norm: ir.Node, index: int) -> bool:
    value = norm.inputs[index]
    array = graph.constant(value)
    if value is None or array is None or array.ndim != 1:
        return False
    graph.replace_constant(model, norm, index, value.name or "parameter", np.asarray(array).reshape(1, 1, -1))
    return True
