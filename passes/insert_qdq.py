"""Quantize the inputs of linear layers, as the QDQ form says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph, schemes
from scalefold.compiler.facts import Fact, quantized_matmuls
from scalefold.compiler.protocol import Context, Contract, Event, PassResult
from scalefold.compiler.schemes import Affine
from scalefold.compiler.stats import TokenRange


@dataclass(frozen=True)
class InsertQdq:
    """Put QuantizeLinear and DequantizeLinear in front of every linear layer whose weight is quantized.

    before:  MatMul(x, dq(W))                MatMul(x, dq(W'))
    after:   q = DequantizeLinear(QuantizeLinear(x, s, z), s, z);   MatMul(q, dq(W))   MatMul(q, dq(W'))

    x is [..., K]; s and z are one number each: uint8, asymmetric, static, from the extremes of calibration. Layers that
    read one x share its quantizer. Below 8 bits a Clip in front keeps the codes within 2**bits - 1.

    Attributes:
        bits: 2 to 8, in an 8-bit container.
    """

    name: ClassVar[str] = "insert-qdq"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED_WEIGHTS})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.QDQ})
    contract: ClassVar[Contract] = Contract.LOSSY

    bits: int = 8

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Quantize each activation once; decline those that are quantized already."""
        readers: dict[ir.Value, list[ir.Node]] = {}
        declined = []
        for matmul in quantized_matmuls(model):
            x = matmul.inputs[0]
            if x is None or graph.producer(x, "DequantizeLinear") is not None:
                declined.append(Event(matmul, "its input is quantized already"))
                continue
            readers.setdefault(x, []).append(matmul)
        if not readers:
            return PassResult((), tuple(declined))
        ranges = ctx.measure(model, {x.name or "": TokenRange for x in readers})
        rewrites = []
        for x, matmuls in readers.items():
            seen = ranges[x.name or ""]
            assert isinstance(seen, TokenRange)
            affine = schemes.activation_grid(seen.low, seen.high, self.bits)
            quantize_input(model, x, matmuls, affine)
            figures = {"low": seen.low, "high": seen.high, "scale": affine.scale, "zero_point": affine.zero_point}
            rewrites.append(Event(matmuls[0], f"uint{self.bits} per tensor, {len(matmuls)} readers", figures))
        return PassResult(tuple(rewrites), tuple(declined))


def quantize_input(model: ir.Model, x: ir.Value, readers: list[ir.Node], affine: Affine) -> None:
    """Let `readers` read `x` through a quantizer of their own; its constants are named after the first reader."""
    name = readers[0].name or x.name or "activation"
    scale = graph.add_initializer(model, f"{name}.input_scale", np.array(affine.scale, dtype=np.float32))
    zero = graph.add_initializer(model, f"{name}.input_zero_point", np.array(affine.zero_point, dtype=np.uint8))
    source, new = x, []
    if affine.bits < 8:
        bounds = [
            graph.add_initializer(model, f"{name}.input_{side}", np.array(bound, dtype=np.float32))
            for side, bound in (("low", affine.low), ("high", affine.high))
        ]
        new.append(ir.node("Clip", [x, *bounds], name=f"{name}.input_clip"))
        source = graph.like(new[0].outputs[0], x)
    quantize = ir.node("QuantizeLinear", [source, scale, zero], name=f"{name}.input_q")
    graph.like(quantize.outputs[0], x, ir.DataType.UINT8)
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero], name=f"{name}.input_dq")
    graph.like(dequantize.outputs[0], x)
    graph.insert_before(readers[0], [*new, quantize, dequantize])
    for reader in readers:
        reader.replace_input_with(0, dequantize.outputs[0])
