"""Lower QDQ linear layers to onnxruntime's fused integer product, bias included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.facts import Fact, quantized_matmuls, weight_array, weight_dequantizer
from scalefold.compiler.protocol import Context, Contract, Event, PassResult


@dataclass(frozen=True)
class LowerIntegerMatmul:
    """Write a linear layer of QDQ form as one MatMulIntegerToFloat.

    before:  Add(MatMul(DequantizeLinear(q, s, z), DequantizeLinear(codes, scales; axis=1)), b)
    after:   MatMulIntegerToFloat(q, codes, s, scales, z, -, b)

    before:  Mul(MatMul(DequantizeLinear(q, s, z), DequantizeLinear(codes, scales; axis=1)), r) + ...        per token
    after:   Mul(MatMulIntegerToFloat(q, codes, s, scales, z), r) + ...

    q is uint8 [..., K], codes int8 [K, N] or Transpose(codes [N, K]), scales and b [N], r [..., 1]. Nothing is left to
    onnxruntime's own pattern matching, which misses a float bias behind two-dimensional or static shapes and then runs the
    layer in float. It transposes constant codes once, at load.
    """

    name: ClassVar[str] = "lower-integer-matmul"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.QDQ})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.REASSOCIATED

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Lower every layer that has both sides quantized; decline the others with a reason."""
        rewrites, declined = [], []
        for matmul in quantized_matmuls(model):
            if reason := _obstacle(matmul):
                declined.append(Event(matmul, reason))
                continue
            rewrites.append(Event(_lower(matmul), "MatMulIntegerToFloat"))
        if rewrites:
            graph.require_opset(model, graph.MICROSOFT, 1)
            graph.sweep(model)
        return PassResult(tuple(rewrites), tuple(declined))


def _obstacle(matmul: ir.Node) -> str | None:
    activation = graph.producer(matmul.inputs[0], "DequantizeLinear")
    weight = weight_dequantizer(matmul)
    if matmul.op_type != "MatMul":
        return "not in normal form"
    if activation is None:
        return "its activation is not quantized"
    if activation.inputs[0] is None or activation.inputs[0].dtype != ir.DataType.UINT8:
        return "its activation is not uint8"
    codes = weight_array(weight.inputs[0]) if weight is not None else None
    if weight is None or codes is None or codes.dtype != np.int8:
        return "its weight is not int8"
    if graph.attribute(weight, "axis", 1) not in (1, -1):
        return "its weight is not quantized per column"
    if (zero := graph.constant(weight.inputs[2]) if len(weight.inputs) > 2 else None) is not None and zero.any():
        return "its weight has a zero point"
    step = graph.constant(activation.inputs[1])
    if step is not None and step.size != 1:
        return "its activation is not quantized per tensor"
    return None


def _fits(bias: ir.Value, weight: ir.Node) -> bool:
    codes = weight_array(weight.inputs[0])
    return codes is not None and graph.whole_shape(bias) == codes.shape[1:]


def _lower(matmul: ir.Node) -> ir.Node:
    activation, weight = graph.producer(matmul.inputs[0], "DequantizeLinear"), weight_dequantizer(matmul)
    assert activation is not None and weight is not None
    out = matmul.outputs[0]
    add = graph.only_consumer(out, "Add")
    bias = graph.other_input(add, out) if add is not None else None
    if add is not None and (bias is None or not bias.is_initializer() or not _fits(bias, weight)):
        add, bias = None, None
    inputs = [
        activation.inputs[0], weight.inputs[0], activation.inputs[1], weight.inputs[1],
        activation.inputs[2] if len(activation.inputs) > 2 else None, None, bias,
    ]  # fmt: skip
    fused = ir.node(
        "MatMulIntegerToFloat", inputs if bias is not None else inputs[:5], domain=graph.MICROSOFT, name=matmul.name,
        metadata_props=dict(matmul.metadata_props),
    )  # fmt: skip
    last = add or matmul
    end = last.outputs[0]
    name = end.name
    graph.like(fused.outputs[0], end)
    graph.insert_after(last, [fused])
    graph.bypass(end, fused.outputs[0])
    end.name, fused.outputs[0].name = f"{name}_qdq", name
    return fused
