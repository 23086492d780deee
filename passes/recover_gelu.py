"""Recover Gelu from the operators that old exporters spell it with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.facts import Fact
from scalefold.compiler.protocol import Context, Contract, Event, PassResult

TOLERANCE = 1e-4


@dataclass(frozen=True)
class RecoverGelu:
    """Write a decomposed GELU, by erf or by tanh, as one Gelu.

    before:  y = x * 0.5 * (1 + Erf(x / sqrt(2)))                            in any order of the products
             y = x * 0.5 * (1 + Tanh(sqrt(2/pi) * (x + 0.044715 * x**3)))     or with x taken out of the bracket
    after:   y = Gelu(x)                                                     approximate = none or tanh

    x is of any shape. Source: Hendrycks and Gimpel 2016, section 2.
    """

    name: ClassVar[str] = "recover-gelu"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.REASSOCIATED

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Rewrite each match; an Erf or Tanh whose surroundings are another function is left alone."""
        rewrites, declined = [], []
        for core in graph.nodes(model, "Erf", "Tanh"):
            x = _erf_argument(core) if core.op_type == "Erf" else _tanh_argument(core)
            if x is None:
                continue
            end = _gate(core, x)
            if end is None:
                declined.append(Event(core, "the products around it are not those of a GELU"))
                continue
            node = _gelu(model, x, approximate="none" if core.op_type == "Erf" else "tanh")
            graph.like(node.outputs[0], end)
            last = end.producer()
            assert last is not None
            graph.insert_after(last, [node])
            name = end.name
            graph.bypass(end, node.outputs[0])
            end.name, node.outputs[0].name = f"{name}_decomposed", name
            rewrites.append(Event(node, f"{core.op_type.lower()} form"))
        if rewrites:
            graph.sweep(model)
        return PassResult(tuple(rewrites), tuple(declined))


def _gelu(model: ir.Model, x: ir.Value, approximate: str) -> ir.Node:
    """The standard Gelu where the model's opset has it, else onnxruntime's operator of the same function."""
    if model.graph.opset_imports.get("", 0) >= 20:
        return ir.node("Gelu", [x], {"approximate": approximate})
    graph.require_opset(model, graph.MICROSOFT, 1)
    return ir.node("Gelu" if approximate == "none" else "FastGelu", [x], domain=graph.MICROSOFT)


def _close(value: float | None, target: float) -> bool:
    return value is not None and math.isclose(value, target, rel_tol=TOLERANCE)


def _scaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """(u, c) when `value` is u * c or u / c' for a constant; (value, 1) otherwise."""
    node = graph.producer(value, "Mul", "Div")
    if node is None:
        return value, 1.0
    for entry in node.inputs[::-1]:
        number = graph.scalar(entry)
        if entry is not None and number:
            if node.op_type == "Div":
                return (node.inputs[0], 1.0 / number) if entry is node.inputs[1] else (value, 1.0)
            return graph.other_input(node, entry), number
    return value, 1.0


def _erf_argument(core: ir.Node) -> ir.Value | None:
    x, factor = _scaled(core.inputs[0])
    return x if _close(factor, math.sqrt(0.5)) else None


def _tanh_argument(core: ir.Node) -> ir.Value | None:
    inner, factor = _scaled(core.inputs[0])
    add = graph.producer(inner, "Add")
    if add is None:
        return _factored_argument(core)
    if not _close(factor, math.sqrt(2 / math.pi)):
        return None
    for cubic in add.inputs:
        x = graph.other_input(add, cubic) if cubic is not None else None
        cube, weight = _scaled(cubic)
        if x is not None and _close(weight, 0.044715) and _is_cube(cube, x):
            return x
    return None


def _factored_argument(core: ir.Node) -> ir.Value | None:
    """The x of tanh(sqrt(2/pi) x (1 + 0.044715 x x)), as BLOOM and `gelu_fast` write it."""
    product = graph.producer(core.inputs[0], "Mul")
    for bracket in product.inputs if product is not None else ():
        one = graph.producer(bracket, "Add")
        square = next((entry for entry in one.inputs if graph.scalar(entry) is None), None) if one is not None else None
        if product is None or bracket is None or one is None or square is None:
            continue
        x, factor = _scaled(graph.other_input(product, bracket))
        if x is None or not _close(factor, math.sqrt(2 / math.pi)):
            continue
        leaves = _factors(square, x)
        numbers = [float(leaf) for leaf in leaves if leaf not in ("x", "?")]
        if (
            _close(graph.scalar(graph.other_input(one, square)), 1.0)
            and sorted(leaves)[-2:] == ["x", "x"]
            and len(leaves) == len(numbers) + 2
            and _close(math.prod(numbers), 0.044715)
        ):
            return x
    return None


def _is_cube(value: ir.Value | None, x: ir.Value) -> bool:
    node = graph.producer(value, "Pow", "Mul")
    if node is None:
        return False
    if node.op_type == "Pow":
        return node.inputs[0] is x and _close(graph.scalar(node.inputs[1]), 3.0)
    return sorted(_factors(value, x)) == ["x", "x", "x"]


def _gate(core: ir.Node, x: ir.Value) -> ir.Value | None:
    """The value x * 0.5 * (1 + core), however its products are nested."""
    one = graph.only_consumer(core.outputs[0], "Add")
    if one is None or not _close(graph.scalar(graph.other_input(one, core.outputs[0])), 1.0):
        return None
    end = one.outputs[0]
    collected: list[str] = []
    while (product := graph.only_consumer(end, "Mul")) is not None:
        collected += _factors(graph.other_input(product, end), x)
        end = product.outputs[0]
        if sorted(collected) == ["0.5", "x"]:
            return end
    return None


def _factors(value: ir.Value | None, x: ir.Value) -> list[str]:
    """The leaves of a product: `x`, a number, or `?`."""
    if value is x:
        return ["x"]
    number = graph.scalar(value)
    if number is not None:
        return [str(number)]
    node = graph.producer(value, "Mul")
    if node is None:
        return ["?"]
    return [leaf for entry in node.inputs for leaf in _factors(entry, x)]
