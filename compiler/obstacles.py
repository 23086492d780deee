"""What keeps a quantized layer off a fast integer kernel, or makes it wrong on one, as the written graph shows it.

Every obstacle was seen in onnxruntime's CPU kernels and optimizer; runtime_tests/test_verify.py and test_sabotage.py
keep a model of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from scalefold.compiler import decode_chain, graph
from scalefold.compiler.facts import weight_dequantizer

Effect = Literal["missed", "slow", "wrong", "fails"]
"""No integer kernel; one that is slower than float; one that gives wrong numbers; one that stops with an error."""

EIGHT_BITS = (ir.DataType.UINT8, ir.DataType.INT8)
ACCURACY_LEVEL = 4
"""The accuracy_level at which MatMulNBits multiplies integers; below it, and where it is not set, it multiplies floats."""


@dataclass(frozen=True)
class Obstacle:
    """What stands in the way of one layer.

    Attributes:
        reason: what follows "because".
        remedy: what to do about it.
        effect: what comes of it; `missed` leaves a layer alone that reached an integer kernel all the same.
    """

    reason: str
    remedy: str
    effect: Effect = "missed"


INT8_ACTIVATION = Obstacle(
    "of its int8 activation, for which onnxruntime only has a reference kernel slower than float",
    "quantize activations to uint8",
    "slow",
)
FLOAT_ACTIVATION = Obstacle("its activation is not quantized", "quantize its input, or exclude it from the recipe")
OPEN_SCALES = Obstacle(
    "its scales are not constants, and at accuracy_level 4 onnxruntime packs the weight before it knows them",
    "make them constants, and train a scale per column behind the product instead",
    "wrong",
)
ROW_SCALES = Obstacle(
    "its weight has a scale for each row, which onnxruntime applies to the columns",
    "quantize the weight per column: DequantizeLinear with axis 1 of [K, N], and with axis 0 before a transB",
    "wrong",
)
CHANNEL_SCALES = Obstacle(
    "its activation has a scale for each channel, and the kernel takes one for all",
    "quantize activations per tensor, and fold scales of channels into the layer before",
    "fails",
)
BLOCK_SCALES = Obstacle(
    "its weight has a scale for each block of a column, and the kernel takes one for the column",
    "give each column one scale, or leave its activation in float",
    "fails",
)
UNEQUAL_PAIR = Obstacle(
    "the QuantizeLinear and the DequantizeLinear of its activation have different scales or zero points",
    "give both the same scale and zero point",
    "wrong",
)
BIAS_REMEDY = "quantize its bias to int32 with scale = activation scale x weight scale, or use --target onnxruntime-cpu"


def obstacle_of(node: ir.Node, kernel: str, *, weight_only: bool = False) -> Obstacle | None:
    """The first known obstacle of a layer whose weight is integer codes.

    Args:
        node: its product, of QDQ form or fused.
        kernel: what onnxruntime runs it with.
        weight_only: whether its activation is float on purpose.
    """
    if node.op_type == "MatMulNBits":
        return _block_obstacle(node)
    if (weight := weight_dequantizer(node)) is None:
        zero = node.inputs[4] if node.op_type == "MatMulIntegerToFloat" and len(node.inputs) > 4 else None
        int8 = ir.DataType.INT8
        return INT8_ACTIVATION if any(value and value.dtype == int8 for value in (node.inputs[0], zero)) else None
    weight_only = weight_only or is_block_product(node)
    activation = None if weight_only else _activation_obstacle(node)
    found = activation or _weight_obstacle(node, weight, weight_only)
    return found or _gemm_obstacle(node, kernel, weight) or _shared(weight)


def is_block_product(node: ir.Node) -> bool:
    """Whether a layer is meant for MatMulNBits: a weight of fewer than 8 bits, and an activation in float."""
    if (weight := weight_dequantizer(node)) is None:
        return node.op_type == "MatMulNBits"
    codes = weight.inputs[0]
    narrow = codes is not None and codes.dtype is not None and codes.dtype.bitwidth < 8
    return narrow and graph.producer(node.inputs[0], "DequantizeLinear") is None


def _block_obstacle(node: ir.Node) -> Obstacle | None:
    level = graph.attribute(node, "accuracy_level", 0)
    if level != ACCURACY_LEVEL:
        reason = f"its accuracy_level is {level}, at which onnxruntime multiplies in float"
        return Obstacle(reason, f"set accuracy_level to {ACCURACY_LEVEL}", "slow")
    # scales, and zero points where there are any
    parameters = [value for value in node.inputs[2:4] if value is not None]
    return None if all(map(decode_chain.is_constant, parameters)) else OPEN_SCALES


def _activation_obstacle(node: ir.Node) -> Obstacle | None:
    dequantize = graph.producer(node.inputs[0], "DequantizeLinear")
    if dequantize is None:
        moved = graph.producer(node.inputs[0], "Reshape", "Transpose", "Squeeze", "Unsqueeze")
        if moved is not None and graph.producer(moved.inputs[0], "DequantizeLinear") is not None:
            reason = f"a {moved.op_type} stands between its QDQ pair and the product"
            return Obstacle(reason, "quantize right before the product")
        return FLOAT_ACTIVATION
    types = [value.dtype for value in (dequantize.inputs[0], _input(dequantize, 2)) if value is not None]
    if ir.DataType.INT8 in types:
        return INT8_ACTIVATION
    if any(dtype is not None and dtype not in EIGHT_BITS for dtype in types):
        name = next(dtype.name.lower() for dtype in types if dtype is not None and dtype not in EIGHT_BITS)
        reason = f"of its {name} activation, for which onnxruntime has no integer kernel"
        return Obstacle(reason, "quantize activations to uint8")
    scale = graph.constant(dequantize.inputs[1])
    if scale is not None and scale.size > 1:
        return CHANNEL_SCALES
    return UNEQUAL_PAIR if _unequal(dequantize) else None


def _weight_obstacle(node: ir.Node, dequantize: ir.Node, weight_only: bool) -> Obstacle | None:
    codes, scales = dequantize.inputs[0], dequantize.inputs[1]
    assert codes is not None and scales is not None
    columns = 0 if graph.attribute(node, "transB", 0) else 1
    axis = int(str(graph.attribute(dequantize, "axis", 1))) % 2
    if weight_only:
        if graph.attribute(dequantize, "block_size", 0) and axis == columns:
            return Obstacle("the blocks of its weight lie along the columns", "cut blocks along axis 0 of [K, N]")
    else:
        if codes.dtype is not None and codes.dtype.bitwidth < 8:
            return Obstacle(
                f"its weight is {codes.dtype.name.lower()} behind an 8-bit activation", "store it as int8 codes"
            )
        if graph.attribute(dequantize, "block_size", 0):
            return BLOCK_SCALES
        if graph.whole_shape(scales) not in ((), (1,)) and axis != columns:
            return ROW_SCALES
    return None


def _shared(dequantize: ir.Node) -> Obstacle | None:
    if len(graph.consumers(dequantize.outputs[0])) < 2:
        return None
    reason = "its weight's DequantizeLinear is shared with another layer"
    return Obstacle(reason, "give each layer a DequantizeLinear of its own")


def _gemm_obstacle(node: ir.Node, kernel: str, weight: ir.Node) -> Obstacle | None:
    """What becomes of a product with a bias, which onnxruntime makes a Gemm of where it can."""
    if node.op_type == "Gemm" and {graph.attribute(node, name, 1.0) for name in ("alpha", "beta")} != {1.0}:
        return Obstacle(
            "its Gemm has an alpha or beta other than 1", "fold alpha and beta into the weight and the bias"
        )
    add = graph.only_consumer(node.outputs[0], "Add")
    bias = graph.other_input(add, node.outputs[0]) if add is not None else None
    bias = _input(node, 2) if node.op_type == "Gemm" else bias
    if bias is None:
        return None
    if graph.producer(bias, "DequantizeLinear") is not None:
        reason = "its weight's DequantizeLinear has no zero point, which QGemm needs"
        return Obstacle(reason, "write the zero point 0 out") if len(weight.inputs) < 3 else None
    if not bias.is_initializer() or kernel not in ("Gemm", "FusedGemm"):
        return None
    if node.op_type == "Gemm" or graph.rank(node.inputs[0]) == 2:
        reason = "it is a two-dimensional product with a float bias, which onnxruntime fuses to a float Gemm first"
        return Obstacle(reason, BIAS_REMEDY)
    # with more dimensions it does that only where it can work out every size
    reason = "its shapes are static and its bias is float, which onnxruntime fuses to a float Gemm first"
    return Obstacle(reason, f"{BIAS_REMEDY}, or keep batch and length dynamic")


def _unequal(dequantize: ir.Node) -> bool:
    """Whether a DequantizeLinear undoes another scale or zero point than the QuantizeLinear before it applied."""
    quantize = graph.producer(dequantize.inputs[0], "QuantizeLinear")
    if quantize is None:
        return False
    pairs = [(_input(quantize, index), _input(dequantize, index)) for index in (1, 2)]
    return any(first is not second and _differ(first, second) for first, second in pairs)


def _differ(first: ir.Value | None, second: ir.Value | None) -> bool:
    # a zero point that is not there is 0; scales that are computed cannot be told apart
    one, other = (np.zeros(1) if value is None else graph.constant(value) for value in (first, second))
    return one is not None and other is not None and not np.array_equal(one.reshape(-1), other.reshape(-1))


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None
