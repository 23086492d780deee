"""Recover RMSNormalization from the operators that exporters spell it with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.facts import Fact
from scalefold.compiler.protocol import Context, Contract, Event, PassResult


@dataclass(frozen=True)
class RecoverRmsNorm:
    """Write a decomposed root-mean-square normalization over the last axis as one RMSNormalization.

    before:  r = Sqrt(Add(ReduceMean(Pow(x, 2) or Mul(x, x)), epsilon))
             y = Mul(Mul(x, Reciprocal(r)) or Div(x, r), gain)
    after:   y = RMSNormalization(x, gain)

    x is [..., C]; gain is a constant [C]. Source: Zhang and Sennrich 2019 (arXiv 1910.07467), eq. 4.
    """

    name: ClassVar[str] = "recover-rms-norm"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.REASSOCIATED

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Rewrite each match; decline a normalization that has no constant gain behind it."""
        rewrites, declined = [], []
        for root in graph.nodes(model, "Sqrt"):
            core = _normalized(root)
            if core is None:
                continue
            x, epsilon, normalized = core
            scaled = graph.only_consumer(normalized, "Mul")
            gain = graph.other_input(scaled, normalized) if scaled is not None else None
            if scaled is None or gain is None or graph.constant(gain) is None or graph.rank(gain) != 1:
                declined.append(Event(root, "no constant gain of the last axis behind it"))
                continue
            end = scaled.outputs[0]
            node = ir.node("RMSNormalization", [x, gain], {"axis": -1, "epsilon": epsilon}, name=scaled.name)
            graph.like(node.outputs[0], end)
            graph.insert_after(scaled, [node])
            name = end.name
            graph.bypass(end, node.outputs[0])
            end.name, node.outputs[0].name = f"{name}_decomposed", name
            rewrites.append(Event(node, "mean of squares, root, division and gain"))
        if rewrites:
            graph.sweep(model)
            graph.require_opset(model, "", 23)
        return PassResult(tuple(rewrites), tuple(declined))


def _normalized(root: ir.Node) -> tuple[ir.Value, float, ir.Value] | None:
    """(x, epsilon, x / root) when `root` is the root of mean(x * x) + epsilon and divides x."""
    add = graph.producer(root.inputs[0], "Add")
    mean = (
        next((entry for entry in add.inputs if graph.producer(entry, "ReduceMean") is not None), None) if add else None
    )
    if add is None or mean is None:
        return None
    epsilon = graph.scalar(graph.other_input(add, mean))
    reduce = graph.producer(mean, "ReduceMean")
    x = _squared(reduce.inputs[0]) if reduce is not None else None
    if reduce is None or x is None or epsilon is None or not graph.reduces_last_axis(reduce, x):
        return None
    out = root.outputs[0]
    inverse = graph.only_consumer(out, "Reciprocal", "Div")
    if inverse is None:
        return None
    if inverse.op_type == "Div":
        if inverse.inputs[0] is x:
            return x, epsilon, inverse.outputs[0]
        if graph.scalar(inverse.inputs[0]) != 1.0:
            return None
    product = graph.only_consumer(inverse.outputs[0], "Mul")
    if product is None or graph.other_input(product, inverse.outputs[0]) is not x:
        return None
    return x, epsilon, product.outputs[0]


def _squared(value: ir.Value | None) -> ir.Value | None:
    """The x of Pow(x, 2) or Mul(x, x)."""
    node = graph.producer(value, "Pow", "Mul")
    if node is None:
        return None
    base, second = node.inputs
    squares = graph.scalar(second) == 2.0 if node.op_type == "Pow" else base is second
    return base if squares else None
