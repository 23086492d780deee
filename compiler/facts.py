"""Named claims about a graph that can be checked on it; passes require and provide them."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from scalefold.compiler import decode_chain, graph


class Fact(Enum):
    """A claim about a graph; `holds` checks it."""

    NORMAL_FORM = "every linear layer is MatMul(x, W[K, N]) with an optional Add of a bias[N]"
    NAMED_LAYERS = "every linear layer's MatMul has a name, and no two the same"
    QUANTIZED_WEIGHTS = "some linear layer reads its weight through a DequantizeLinear of integers, or in blocks"
    QDQ = "some linear layer reads activation and weight through DequantizeLinear, or its weight in blocks"

    def holds(self, model: ir.Model) -> bool:
        """Check the claim on `model`."""
        return _CHECKS[self](model)


def weight_array(value: ir.Value | None) -> npt.NDArray[np.generic] | None:
    """The array of a constant, of a two-dimensional constant behind a Transpose, of a decode chain's int8, or None.

    A language model's head reads the embedding table [N, K] through a Transpose: one copy of the codes serves both.
    """
    if (found := graph.constant(value)) is not None:
        return found
    transpose = graph.producer(value, "Transpose")
    stored = graph.constant(transpose.inputs[0]) if transpose is not None else None
    if transpose is not None and stored is not None:
        return stored.T if stored.ndim == 2 and graph.attribute(transpose, "perm", (1, 0)) == (1, 0) else None
    decoded = decode_chain.evaluate(value)
    return decoded if decoded is not None and decoded.dtype == np.int8 and decoded.ndim == 2 else None


def weight_dequantizer(matmul: ir.Node) -> ir.Node | None:
    """The DequantizeLinear of a constant, or of a chain that decodes constants, that feeds a MatMul or Gemm; or None."""
    node = graph.producer(matmul.inputs[1], "DequantizeLinear")
    return node if node is not None and decode_chain.is_constant(node.inputs[0]) else None


def quantized_matmuls(model: ir.Model) -> list[ir.Node]:
    """The MatMul nodes whose weight is a DequantizeLinear of a constant, in graph order."""
    return [node for node in graph.nodes(model, "MatMul", "Gemm") if weight_dequantizer(node) is not None]


def row_range(quantize: ir.Node | None) -> tuple[ir.Value, ir.Value] | None:
    """(minimum, span) of each row, [..., 1], that a per-token quantizer brings rows to [0, 1] by; None for another node."""
    divide = graph.producer(quantize.inputs[0], "Div") if quantize is not None else None
    shift = graph.producer(divide.inputs[0], "Sub") if divide is not None else None
    minimum = graph.producer(shift.inputs[1], "ReduceMin") if shift is not None else None
    span = graph.producer(divide.inputs[1], "Max") if divide is not None else None
    if minimum is None or span is None or shift is None or minimum.inputs[0] is not shift.inputs[0]:
        return None
    return minimum.outputs[0], span.outputs[0]


def restored_rows(product: ir.Node) -> ir.Node | None:
    """The Add that ends what gives the rows of a per-token product their range back, or None; `product` may be fused."""
    dequantize = graph.producer(product.inputs[0], "DequantizeLinear")
    found = row_range(
        graph.producer(dequantize.inputs[0] if dequantize is not None else product.inputs[0], "QuantizeLinear")
    )
    scaled = graph.only_consumer(product.outputs[0], "Mul")
    restore = graph.only_consumer(scaled.outputs[0], "Add") if scaled is not None else None
    if found is None or scaled is None or restore is None or found[1] not in scaled.inputs:
        return None
    offset = graph.producer(graph.other_input(restore, scaled.outputs[0]), "Mul")
    return restore if offset is not None and found[0] in offset.inputs else None


def summed_codes(product: ir.Node) -> ir.Node | None:
    """The Add of the products of the two codes of one activation with one weight, or None.

    `product` is that of the coarse code, and may be fused.
    """
    total = graph.only_consumer(product.outputs[0], "Add")
    other = graph.producer(graph.other_input(total, product.outputs[0]), product.op_type) if total is not None else None
    same = other is not None and other.inputs[1] is product.inputs[1]
    coarse = coarse_quantizer(_quantizer_of(other)) if other is not None else None
    return total if same and coarse is not None and coarse is _quantizer_of(product) else None


def completed(product: ir.Node) -> ir.Node:
    """What ends a product: the Add that restores its rows, or that sums those of two codes, or the product itself."""
    return restored_rows(product) or summed_codes(product) or product


def is_of_second_code(product: ir.Node) -> bool:
    """Whether a product, fused or not, is that of the fine code of an activation in two."""
    return coarse_quantizer(_quantizer_of(product)) is not None


def coarse_quantizer(fine: ir.Node | None) -> ir.Node | None:
    """The quantizer whose error a second one rounds: QuantizeLinear(x) for QuantizeLinear(x - dq(QuantizeLinear(x)))."""
    left_over = graph.producer(fine.inputs[0], "Sub") if fine is not None else None
    read = graph.producer(left_over.inputs[1], "DequantizeLinear") if left_over is not None else None
    coarse = graph.producer(read.inputs[0], "QuantizeLinear") if read is not None else None
    return coarse if coarse and left_over and coarse.inputs[0] is left_over.inputs[0] else None


def _quantizer_of(product: ir.Node) -> ir.Node | None:
    """What rounds the input of a product, fused or not."""
    read = graph.producer(product.inputs[0], "DequantizeLinear")
    return graph.producer(read.inputs[0] if read is not None else product.inputs[0], "QuantizeLinear")


def _normal_form(model: ir.Model) -> bool:
    return all(graph.gemm_obstacle(node) for node in graph.nodes(model, "Gemm"))


def _named_layers(model: ir.Model) -> bool:
    names = [layer.name for layer in graph.linear_layers(model)]
    return all(names) and len(set(names)) == len(names)


def _quantized_weights(model: ir.Model) -> bool:
    return bool(quantized_matmuls(model) or graph.nodes(model, "MatMulNBits"))


def _qdq(model: ir.Model) -> bool:
    return bool(graph.nodes(model, "MatMulNBits")) or any(
        graph.producer(node.inputs[0], "DequantizeLinear") for node in quantized_matmuls(model)
    )


_CHECKS: dict[Fact, Callable[[ir.Model], bool]] = {
    Fact.NORMAL_FORM: _normal_form,
    Fact.NAMED_LAYERS: _named_layers,
    Fact.QUANTIZED_WEIGHTS: _quantized_weights,
    Fact.QDQ: _qdq,
}
