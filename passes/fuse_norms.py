"""Write an addition and the normalization behind it as one operator of scalefold's own kernel library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.facts import Fact
from scalefold.compiler.kernel_library import DOMAIN, VERSION
from scalefold.compiler.protocol import Context, Contract, Event, PassResult


@dataclass(frozen=True)
class FuseNorms:
    """Fuse additions with the normalizations that read them; see compiler/kernels.cpp.

    before:  h = Add(a, b);  RMSNormalization(h, gain)                   or LayerNormalization(h, gain, shift)
    after:   h, norm = AddNorm(a, b, gain)                               or with shift

    a and b are [..., C] of one shape, gain and shift [C]. Behind fuse-kernels, which takes in what it can: this is for the
    layers that stay on kernels of onnxruntime, such as those in blocks.
    """

    name: ClassVar[str] = "fuse-norms"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.REASSOCIATED

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Fuse every such pair."""
        rewrites = tuple(_norms(model))
        if rewrites:
            graph.require_opset(model, DOMAIN, VERSION)
            graph.sweep(model)
        return PassResult(rewrites)


def _norms(model: ir.Model) -> Iterator[Event]:
    for norm in graph.nodes(model, "RMSNormalization", "LayerNormalization"):
        add = graph.producer(norm.inputs[0], "Add")
        gain, *shift = (graph.constant(value) for value in norm.inputs[1:])
        if add is None or gain is None or any(array is None for array in shift):
            continue
        a, b = add.inputs[:2]
        rank = graph.rank(norm.inputs[0])
        if a is None or b is None or a.shape is None or a.shape != b.shape or rank is None:
            continue
        if (
            graph.attribute(norm, "axis", -1) not in (-1, rank - 1)
            or len(norm.outputs) > 1
            or a.dtype != ir.DataType.FLOAT
        ):
            continue
        size = a.shape[-1]
        if not isinstance(size, int) or any(
            array is None or array.size != size or array.dtype != np.float32 for array in (gain, *shift)
        ):
            continue
        epsilon = graph.attribute(norm, "epsilon", 1e-5)
        assert isinstance(epsilon, float)
        inputs = [a, b, *norm.inputs[1:]]
        if norm.op_type == "LayerNormalization" and not shift:  # without one AddNorm takes no mean off
            inputs.append(graph.add_initializer(model, f"{norm.name or 'norm'}.shift", np.zeros(size, np.float32)))
        fused = ir.node("AddNorm", inputs, {"epsilon": epsilon}, num_outputs=2, domain=DOMAIN, name=norm.name)
        graph.insert_after(add, [fused])
        graph.stand_in(add.outputs[0], fused.outputs[0])
        graph.stand_in(norm.outputs[0], fused.outputs[1])
        yield Event(fused, "addition and normalization by one operator")
