"""Named claims about a graph that can be checked on it; passes require and provide them."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import onnx_ir as ir

from scalefold.compiler import graph


class Fact(Enum):
    """A claim about a graph; `holds` checks it."""

    NORMAL_FORM = "every linear layer is MatMul(x, W[K, N]) with an optional Add of a bias[N]"
    NAMED_LAYERS = "every linear layer's MatMul has a name, and no two the same"
    QUANTIZED_WEIGHTS = "some linear layer reads its weight through a DequantizeLinear of integers"
    QDQ = "some linear layer reads both its activation and its weight through DequantizeLinear"

    def holds(self, model: ir.Model) -> bool:
        """Check the claim on `model`."""
        return _CHECKS[self](model)


def weight_dequantizer(matmul: ir.Node) -> ir.Node | None:
    """The DequantizeLinear of a constant that feeds the right-hand side of a MatMul or Gemm, or None."""
    node = graph.producer(matmul.inputs[1], "DequantizeLinear")
    return node if node is not None and graph.constant(node.inputs[0]) is not None else None


def quantized_matmuls(model: ir.Model) -> list[ir.Node]:
    """The MatMul nodes whose weight is a DequantizeLinear of a constant, in graph order."""
    return [node for node in graph.nodes(model, "MatMul", "Gemm") if weight_dequantizer(node) is not None]


def _normal_form(model: ir.Model) -> bool:
    return all(graph.gemm_obstacle(node) for node in graph.nodes(model, "Gemm"))


def _named_layers(model: ir.Model) -> bool:
    names = [layer.name for layer in graph.linear_layers(model)]
    return all(names) and len(set(names)) == len(names)


def _qdq(model: ir.Model) -> bool:
    return any(graph.producer(node.inputs[0], "DequantizeLinear") for node in quantized_matmuls(model))


_CHECKS: dict[Fact, Callable[[ir.Model], bool]] = {
    Fact.NORMAL_FORM: _normal_form,
    Fact.NAMED_LAYERS: _named_layers,
    Fact.QUANTIZED_WEIGHTS: lambda model: bool(quantized_matmuls(model)),
    Fact.QDQ: _qdq,
}
