"""Store the weights of linear layers as integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph, schemes, verify
from scalefold.compiler.facts import Fact, quantized_matmuls
from scalefold.compiler.protocol import Context, Contract, Event, PassResult, refusals


@dataclass(frozen=True)
class QuantizeWeights:
    """Replace each linear layer's float weight by int8 codes and a DequantizeLinear per output column.

    before:  MatMul(x, W)
    after:   MatMul(x, DequantizeLinear(codes, scales; axis=1))

    W and codes are [K, N], scales [N]. The scale keeps every pair of neighbouring codes within what a 16-bit accumulator
    holds, so that the integer kernel gives one answer on every CPU (`schemes.column_scales`).

    Attributes:
        bits: 2 to 8, in an 8-bit container.
        activation_bits: bits of the activations that the weights will meet.
        include: regular expressions of layers to quantize; all when empty.
        exclude: regular expressions of layers to leave in float.
    """

    name: ClassVar[str] = "quantize-weights"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.NORMAL_FORM, Fact.NAMED_LAYERS})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED_WEIGHTS})
    contract: ClassVar[Contract] = Contract.LOSSY

    bits: int = 8
    activation_bits: int = 8
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Quantize every linear layer; decline the excluded ones."""
        layers = graph.linear_layers(model)
        names = [layer.name for layer in layers] + [node.name or "" for node in quantized_matmuls(model)]
        left = refusals(names, self.include, self.exclude)
        shared: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        rewrites, declined = [], []
        with ctx.progress("quantizing weights", len(layers)) as advance:
            for layer in layers:
                if layer.name in left:
                    declined.append(Event(layer.matmul, left[layer.name]))
                else:
                    figures = self._quantize(model, layer, shared)
                    rewrites.append(Event(layer.matmul, f"int{self.bits} per column", figures))
                advance()
        graph.sweep(model)
        return PassResult(tuple(rewrites), tuple(declined))

    def _quantize(
        self, model: ir.Model, layer: graph.Linear, shared: dict[ir.Value, tuple[ir.Value, ir.Value]]
    ) -> dict[str, float]:
        """A weight that several layers share is stored once; each layer gets a DequantizeLinear of its own."""
        if layer.weight not in shared:
            weight = layer.weights()
            scales = schemes.column_scales(weight, self.bits, self.activation_bits)
            codes = schemes.weight_codes(weight, scales, self.bits)
            shared[layer.weight] = (
                graph.add_initializer(model, f"{layer.name}.weight_codes", codes),
                graph.add_initializer(model, f"{layer.name}.weight_scales", scales),
            )
        codes_value, scales_value = shared[layer.weight]
        dequantize = ir.node(
            "DequantizeLinear", [codes_value, scales_value], {"axis": 1}, name=f"{layer.name}.weight_dq"
        )
        graph.like(dequantize.outputs[0], layer.weight)
        graph.insert_before(layer.matmul, [dequantize])
        layer.matmul.replace_input_with(1, dequantize.outputs[0])
        rounded = np.asarray(graph.constant(codes_value), dtype=np.float32) * np.asarray(graph.constant(scales_value))
        return {"weight_sqnr_db": verify.sqnr(layer.weights(), rounded)}
