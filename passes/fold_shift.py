"""Fold the shift that restores a residual connection into the bias of the layer it is added to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.facts import Fact, completed
from scalefold.compiler.protocol import Context, Contract, Event, PassResult


@dataclass(frozen=True)
class FoldShift:
    """Save an addition where a shifted residual meets a linear layer.

    before:  Add(Add(r, z), Add(y, b))
    after:   Add(r, Add(y, b + z))

    r and y are [..., C], z and b constants [C]; y is a product, so that the integer kernel applies b + z at no cost, or a
    per-token product with its rows restored or the sum of two, whose bias is added anyway.
    """

    name: ClassVar[str] = "fold-shift"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.REASSOCIATED

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Fold each shift that only such a sum reads; the others are left."""
        rewrites, declined = [], []
        for shift in graph.nodes(model, "Add"):
            vector = _vector_of(shift)
            if vector is None or _is_product(graph.other_input(shift, vector)):
                continue
            total = graph.only_consumer(shift.outputs[0], "Add")
            partner = graph.other_input(total, shift.outputs[0]) if total is not None else None
            biased = graph.producer(partner, "Add")
            bias = _vector_of(biased) if biased is not None else None
            if total is None or biased is None or bias is None:
                continue
            if not _is_product(graph.other_input(biased, bias)):
                continue
            if graph.only_consumer(biased.outputs[0]) is None:
                declined.append(Event(shift, "the layer's output is read elsewhere too"))
                continue
            rewrites.append(Event(shift, f"into the bias of {biased.name}"))
            both = np.asarray(graph.constant(bias)) + np.asarray(graph.constant(vector))
            graph.replace_constant(model, biased, biased.inputs.index(bias), bias.name or "bias", both)
            source = graph.other_input(shift, vector)
            assert source is not None
            graph.bypass(shift.outputs[0], source)
        if rewrites:
            graph.sweep(model)
        return PassResult(tuple(rewrites), tuple(declined))


def _vector_of(add: ir.Node) -> ir.Value | None:
    """The constant vector that an Add adds, or None."""
    return next((v for v in add.inputs if v is not None and v.is_initializer() and graph.rank(v) == 1), None)


def _is_product(value: ir.Value | None) -> bool:
    """Whether a MatMul makes `value`, or the Add that restores the rows of a per-token one, or sums those of two codes."""
    end = graph.producer(value, "MatMul", "Add")
    product = end
    while product is not None and product.op_type != "MatMul":
        product = graph.producer(product.inputs[0], "MatMul", "Mul")
    return product is not None and end in (product, completed(product))
