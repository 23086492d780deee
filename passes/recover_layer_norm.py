"""Recover LayerNormalization from the operators that old exporters spell it with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.facts import Fact
from scalefold.compiler.protocol import Context, Contract, Event, PassResult


@dataclass(frozen=True)
class _Match:
    x: ir.Value
    gamma: ir.Value
    beta: ir.Value
    epsilon: float
    end: ir.Value


@dataclass(frozen=True)
class RecoverLayerNorm:
    """Write a decomposed layer normalization over the last axis as one LayerNormalization.

    before:  d = Sub(x, ReduceMean(x));  v = ReduceMean(Pow(d, 2) or Mul(d, d))
             y = Add(Mul(Div(d, Sqrt(Add(v, epsilon))), gamma), beta)
    after:   y = LayerNormalization(x, gamma, beta)

    x is [..., C]; gamma and beta are constants [C]. Source: Ba, Kiros, Hinton 2016, eq. 4.
    """

    name: ClassVar[str] = "recover-layer-norm"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.REASSOCIATED

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Rewrite each match; decline a normalization that has no constant gain and bias."""
        rewrites, declined = [], []
        for divide in graph.nodes(model, "Div"):
            if (core := _normalized(divide)) is None:
                continue
            match = _affine(divide, *core)
            if match is None:
                declined.append(Event(divide, "no constant gain and bias of the last axis behind it"))
                continue
            attributes = {"axis": -1, "epsilon": match.epsilon}
            node = ir.node("LayerNormalization", [match.x, match.gamma, match.beta], attributes, name=divide.name)
            graph.like(node.outputs[0], match.end)
            end = match.end.producer()
            assert end is not None
            graph.insert_after(end, [node])
            name = match.end.name
            graph.bypass(match.end, node.outputs[0])
            match.end.name, node.outputs[0].name = f"{name}_decomposed", name
            rewrites.append(Event(node, "mean, variance, division, gain and bias"))
        if rewrites:
            graph.sweep(model)
            graph.require_opset(model, "", 17)
        return PassResult(tuple(rewrites), tuple(declined))


def _normalized(divide: ir.Node) -> tuple[ir.Value, float] | None:
    """(x, epsilon) when `divide` is (x - mean) / sqrt(variance + epsilon)."""
    centred, deviation = divide.inputs
    sub = graph.producer(centred, "Sub")
    root = graph.producer(deviation, "Sqrt")
    add = graph.producer(root.inputs[0], "Add") if root is not None else None
    if sub is None or add is None:
        return None
    variance = next((entry for entry in add.inputs if graph.producer(entry, "ReduceMean") is not None), None)
    if variance is None:
        return None
    epsilon = graph.scalar(graph.other_input(add, variance))
    reduce = graph.producer(variance, "ReduceMean")
    mean = graph.producer(sub.inputs[1], "ReduceMean")
    x = sub.inputs[0]
    if reduce is None or mean is None or x is None or epsilon is None or mean.inputs[0] is not x:
        return None
    over_last = graph.reduces_last_axis(reduce, x) and graph.reduces_last_axis(mean, x)
    if not (over_last and _squares(reduce.inputs[0], x, mean.outputs[0])):
        return None
    return x, epsilon


def _squares(value: ir.Value | None, x: ir.Value, mean: ir.Value) -> bool:
    """Whether `value` is (x - mean) squared; exporters may subtract twice."""
    node = graph.producer(value, "Pow", "Mul")
    if node is None:
        return False
    base, second = node.inputs
    if node.op_type == "Pow" and graph.scalar(second) != 2.0:
        return False
    if node.op_type == "Mul" and base is not second:
        return False
    sub = graph.producer(base, "Sub")
    return sub is not None and sub.inputs[0] is x and _same_mean(sub.inputs[1], mean, x)


def _same_mean(value: ir.Value | None, mean: ir.Value, x: ir.Value) -> bool:
    node = graph.producer(value, "ReduceMean")
    return value is mean or (node is not None and node.inputs[0] is x and graph.reduces_last_axis(node, x))


def _affine(divide: ir.Node, x: ir.Value, epsilon: float) -> _Match | None:
    scaled = graph.only_consumer(divide.outputs[0], "Mul")
    shifted = graph.only_consumer(scaled.outputs[0], "Add") if scaled is not None else None
    if scaled is None or shifted is None:
        return None
    gamma = graph.other_input(scaled, divide.outputs[0])
    beta = graph.other_input(shifted, scaled.outputs[0])
    if gamma is None or beta is None or graph.constant(gamma) is None or graph.constant(beta) is None:
        return None
    if graph.rank(gamma) != 1 or graph.rank(beta) != 1:
        return None
    return _Match(x, gamma, beta, epsilon, shifted.outputs[0])
