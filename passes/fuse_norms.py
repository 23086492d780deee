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
        if add is None or not _fits(add, norm):
            continue
        epsilon, gain = float(str(graph.attribute(norm, "epsilon", 1e-5))), norm.inputs[1]
        inputs = [*add.inputs[:2], *norm.inputs[1:]]
        if norm.op_type == "LayerNormalization" and len(norm.inputs) == 2:  # without a shift AddNorm takes no mean off
            size = 0 if gain is None else graph.whole_shape(gain)[-1]
            inputs.append(graph.add_initializer(model, f"{norm.name or 'norm'}.shift", np.zeros(size, np.float32)))
        fused = ir.node("AddNorm", inputs, {"epsilon": epsilon}, num_outputs=2, domain=DOMAIN, name=norm.name)
        graph.insert_after(add, [fused])
        graph.stand_in(add.outputs[0], fused.outputs[0])
        graph.stand_in(norm.outputs[0], fused.outputs[1])
        yield Event(fused, "addition and normalization by one operator")


def _fits(add: ir.Node, norm: ir.Node) -> bool:
    """Whether floats of one shape are added and normalized over the last axis, by constants along it."""
    a, b = add.inputs[:2]
    if a is None or b is None or not graph.same_shape(a, b) or a.dtype != ir.DataType.FLOAT or a.shape is None:
        return False
    if len(norm.outputs) > 1 or graph.attribute(norm, "axis", -1) not in (-1, len(a.shape) - 1):
        return False
    constants = [graph.constant(value) for value in norm.inputs[1:]]
    return all(array is not None and array.size == a.shape[-1] and array.dtype == np.float32 for array in constants)
