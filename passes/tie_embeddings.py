"""Let one quantized table serve as the embedding and as the output layer that are tied to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.decode_chain import remember
from scalefold.compiler.facts import Fact
from scalefold.compiler.graph import Linear
from scalefold.compiler.protocol import Context, Contract, Event, PassResult, refusals
from scalefold.compiler.recipe import WeightFormat, Weights
from scalefold.compiler.schemes import Float
from scalefold.passes.quantize_weights import quantized

ROWS = 4096
"""Rows of a table that are compared at a time."""


@dataclass(frozen=True)
class TieEmbeddings:
    """Store a table and the weight that is its transpose as one array of codes.

    before:  e = Gather(T, ids);   y = MatMul(x, W)   where W = (T / u)^T
    after:   e = Mul(Mul(Cast(Gather(codes, ids)), Gather(scales, ids)), u)
             y = MatMul(x, DequantizeLinear(Transpose(codes), scales; axis=1))

    T and codes are [V, H], W is [H, V]; the scale of an output column of W is that of a row of T, [V]. u [H] is what a
    migration in front of the output layer has divided out of its rows; the product with it is left out where it is 1.
    onnxruntime transposes the codes once, when it loads the file. A format of fewer bits is that of the output layer, and
    is solved without regard to what the layer is fed, since the table is read by its rows too.

    Attributes:
        weights: the format of each layer.
        bits: bits of the tables; output layers of other bits are not tied.
        activation_bits: bits of the activations that the output layer will meet.
        include: regular expressions of layers to quantize; all when empty.
        exclude: regular expressions of layers to leave in float.
    """

    name: ClassVar[str] = "tie-embeddings"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.NORMAL_FORM, Fact.NAMED_LAYERS})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED_WEIGHTS})
    contract: ClassVar[Contract] = Contract.LOSSY

    weights: Weights = field(default_factory=Weights)
    bits: int = 8
    activation_bits: int | None = 8
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Store each tied pair once; a layer that is to stay float keeps its weight, and the table too."""
        rewrites, declined = [], []
        layers = graph.linear_layers(model)
        left = refusals([layer.name for layer in layers], self.include, self.exclude)
        for table in _tables(model):
            for layer in layers:
                if layer.shape != graph.whole_shape(table)[::-1]:
                    continue
                if (factors := channel_factors(table, layer)) is None:
                    continue
                if layer.name in left:
                    declined.append(Event(layer.matmul, left[layer.name]))
                    continue
                wanted = self.weights.of(layer.name)
                if wanted.bits != self.bits:
                    declined.append(Event(layer.matmul, f"the layer has {wanted.bits} bits and the table {self.bits}"))
                    continue
                self._tie(model, table, layer, factors, wanted)
                rewrites.append(Event(layer.matmul, f"{wanted}, one copy with {table.name}"))
                break
        if rewrites:
            graph.sweep(model)
        return PassResult(tuple(rewrites), tuple(declined))

    def _tie(self, model: ir.Model, table: ir.Value, layer: Linear, factors: Float, wanted: WeightFormat) -> None:
        blind = wanted.model_copy(update={"compensation": False, "weighting": "none"})
        codes, scales, coded = quantized(layer.weights(), blind, None, self.activation_bits, layer.name)
        stored = graph.add_initializer(model, f"{layer.name}.weight_codes", codes.T)
        if coded is not None:
            remember(stored, coded, by_rows=True)
        steps = graph.add_initializer(model, f"{layer.name}.weight_scales", scales)
        transpose = ir.node("Transpose", [stored], {"perm": [1, 0]}, name=f"{layer.name}.weight_columns")
        columns = graph.like(transpose.outputs[0], layer.weight, ir.DataType.INT8)
        dequantize = ir.node("DequantizeLinear", [columns, steps], {"axis": 1}, name=f"{layer.name}.weight_dq")
        graph.like(dequantize.outputs[0], layer.weight)
        graph.insert_before(layer.matmul, [transpose, dequantize])
        layer.matmul.replace_input_with(1, dequantize.outputs[0])
        rows = graph.add_initializer(model, f"{table.name}_scales", scales[:, None])
        for gather in graph.consumers(table):
            looked_up = graph.look_up(gather, stored, rows)
            if (factors != 1).any():
                vector = graph.add_initializer(model, f"{table.name}_channels", factors)
                product = ir.node("Mul", [looked_up, vector], name=f"{gather.name}_channels")
                graph.like(product.outputs[0], looked_up)
                graph.bypass(looked_up, product.outputs[0])
                product.replace_input_with(0, looked_up)
                producer = looked_up.producer()
                assert producer is not None
                graph.insert_after(producer, [product])


def _tables(model: ir.Model) -> list[ir.Value]:
    """Float tables [V, H] that nothing but Gather of rows reads."""
    found: dict[ir.Value, None] = {}
    for gather in graph.nodes(model, "Gather"):
        table = gather.inputs[0]
        if table is None or not table.is_initializer() or table.dtype != ir.DataType.FLOAT or graph.rank(table) != 2:
            continue
        if all(node.op_type == "Gather" and graph.attribute(node, "axis", 0) == 0 for node in graph.consumers(table)):
            found[table] = None
    return list(found)


def channel_factors(table: ir.Value, layer: Linear) -> Float | None:
    """The u [H] for which the table is the layer's weight, transposed, times u per channel; None where there is none."""
    rows, columns = graph.constant(table), graph.constant(layer.weight)
    if rows is None or columns is None:
        return None
    first, across = np.asarray(rows[:ROWS], dtype=np.float64), np.asarray(columns[:, :ROWS], dtype=np.float64)
    power = np.square(across).sum(axis=1)
    factors = np.where(power > 0, (first.T * across).sum(axis=1) / np.where(power > 0, power, 1.0), 1.0)
    factors = np.where(np.abs(factors - 1) < 1e-6, 1.0, factors).astype(np.float32)
    for start in range(0, rows.shape[0], ROWS):
        part = rows[start : start + ROWS]
        if not np.allclose(columns[:, start : start + ROWS].T * factors, part, rtol=1e-4, atol=1e-7):
            return None
    return factors
