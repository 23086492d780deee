"""Quantize the biases that onnxruntime would otherwise fuse into a float Gemm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph, schemes
from scalefold.compiler.facts import Fact, quantized_matmuls, weight_dequantizer
from scalefold.compiler.protocol import Context, Contract, Event, PassResult


@dataclass(frozen=True)
class QuantizeBias:
    """Store the bias of a two-dimensional or statically shaped product as int32.

    before:  Add(MatMul(dq(x), dq(W)), b)
    after:   Add(MatMul(dq(x), dq(W, zero point 0)), DequantizeLinear(codes, s_x * s_W; axis=0))

    b, codes and s_W are [N]. onnxruntime fuses MatMul and Add of such shapes to Gemm before it looks for QDQ. Only with an
    int32 bias, and a zero point written out at the weight, does that Gemm become QGemm, the integer kernel. With three
    dynamic dimensions a float bias is best. Behind a per-token product the Mul by the rows' span keeps Gemm away, and a
    static int32 bias could not stand in front of it: such layers are left.
    """

    name: ClassVar[str] = "quantize-bias"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.QDQ})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Quantize the biases of such layers; the others are left in float."""
        rewrites, declined = [], []
        for matmul in quantized_matmuls(model):
            activation, weight = graph.producer(matmul.inputs[0], "DequantizeLinear"), weight_dequantizer(matmul)
            add = graph.only_consumer(matmul.outputs[0], "Add")
            bias = graph.other_input(add, matmul.outputs[0]) if add is not None else None
            if activation is None or weight is None or add is None or bias is None or not bias.is_initializer():
                continue
            if not _fuses_to_gemm(matmul.inputs[0]):
                continue
            columns = graph.constant(weight.inputs[0])
            if columns is None or graph.whole_shape(bias) != columns.shape[1:]:
                continue  # something else than a bias is added
            scales = np.asarray(graph.constant(activation.inputs[1])) * np.asarray(graph.constant(weight.inputs[1]))
            if np.abs(np.asarray(graph.constant(bias), dtype=np.float64) / scales).max() > np.iinfo(np.int32).max:
                declined.append(Event(matmul, "its bias is too large for int32 at the scale of its weights"))
                continue
            codes = schemes.bias_codes(np.asarray(graph.constant(bias), dtype=np.float32), scales)
            dequantize = ir.node(
                "DequantizeLinear",
                [
                    graph.add_initializer(model, f"{matmul.name}.bias_codes", codes),
                    graph.add_initializer(model, f"{matmul.name}.bias_scales", scales.astype(np.float32)),
                ],
                {"axis": 0},
                name=f"{matmul.name}.bias_dq",
            )
            graph.like(dequantize.outputs[0], bias)
            graph.insert_before(add, [dequantize])
            add.replace_input_with(add.inputs.index(bias), dequantize.outputs[0])
            _write_zero_point_out(model, weight)
            rewrites.append(Event(matmul, "int32 bias"))
        if rewrites:
            graph.sweep(model)
        return PassResult(tuple(rewrites), tuple(declined))


def _write_zero_point_out(model: ir.Model, weight: ir.Node) -> None:
    if len(weight.inputs) < 3:
        scales = graph.constant(weight.inputs[1])
        assert scales is not None
        weight.resize_inputs(3)
        zeros = np.zeros(scales.shape, dtype=np.int8)
        weight.replace_input_with(2, graph.add_initializer(model, f"{weight.name}_zero_points", zeros))


def _fuses_to_gemm(x: ir.Value | None) -> bool:
    if x is None or x.shape is None:
        return True
    return len(x.shape) == 2 or all(isinstance(size, int) for size in x.shape)
