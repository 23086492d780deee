"""Quantize the inputs of linear layers, as the QDQ form says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph, schemes
from scalefold.compiler.facts import Fact, quantized_matmuls, weight_array, weight_dequantizer
from scalefold.compiler.protocol import Context, Contract, Event, PassResult, select
from scalefold.compiler.recipe import Granularity
from scalefold.compiler.schemes import Affine
from scalefold.compiler.stats import Statistic, TokenRange

AXES_ARE_INPUTS = 18
"""The opset from which ReduceMin and ReduceMax take their axes as an input."""

LEARNED_RANGE = "scalefold.learned-range"
"""Marks an activation in memory: the (low, high) that were learned for it and stand in for its extremes."""


@dataclass(frozen=True)
class InsertQdq:
    """Put QuantizeLinear and DequantizeLinear in front of every linear layer whose weight is quantized.

    before:  Add(MatMul(x, dq(W)), b)
    after:   Add(MatMul(DequantizeLinear(QuantizeLinear(x, s, z), s, z), dq(W)), b)            per tensor
    after:   m = ReduceMin(x);   r = Max(ReduceMax(x) - m, tiny);   u = (x - m) / r            per token
             Add(MatMul(DequantizeLinear(QuantizeLinear(u, 1/255, 0), 1/255, 0), dq(W)) * r + m * c, b)

    x is [..., K], W [K, N], b [N]. Per tensor, s and z are one number each: uint8, asymmetric, static, from the extremes of
    calibration, or from the range that learn-scales left on x; below 8 bits a Clip in front keeps the codes within
    2**bits - 1. Per token, m and r are [..., 1], computed from the row itself: no calibration, and no row sees another. u is
    within [0, 1], so one constant grid serves every row and the integer kernel stays. c are the column sums of W [N]:
    x W = (r u + m) W = r (u W) + m c holds row by row.
    Figures: docs/decisions/0006.

    Layers that read one x share its quantizer; a per-tensor and a per-token layer have one each.

    Attributes:
        bits: 2 to 8, in an 8-bit container.
        granularity: what the layers have that `per_token` does not name.
        per_token: regular expressions of layers that are per token in any case.
    """

    name: ClassVar[str] = "insert-qdq"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED_WEIGHTS})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.QDQ})
    contract: ClassVar[Contract] = Contract.LOSSY

    bits: int = 8
    granularity: Granularity = "per-tensor"
    per_token: tuple[str, ...] = ()

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Quantize each activation once a granularity; decline those that are quantized already."""
        rows = self._layers_per_token(model)
        static: dict[ir.Value, list[ir.Node]] = {}
        dynamic: dict[ir.Value, list[ir.Node]] = {}
        declined = []
        for matmul in quantized_matmuls(model):
            x, per_token = matmul.inputs[0], (matmul.name or "") in rows
            if x is None or graph.producer(x, "DequantizeLinear") is not None:
                declined.append(Event(matmul, "its input is quantized already"))
            elif per_token and matmul.op_type != "MatMul":
                declined.append(Event(matmul, "its rows cannot be restored before its bias: not in normal form"))
            elif per_token and _column_sums(matmul) is None:
                declined.append(Event(matmul, "its weight is not int8 per column with zero point 0"))
            else:
                (dynamic if per_token else static).setdefault(x, []).append(matmul)
        rewrites = [*self._insert_static(model, static, ctx), *self._insert_dynamic(model, dynamic)]
        return PassResult(tuple(rewrites), tuple(declined))

    def _layers_per_token(self, model: ir.Model) -> frozenset[str]:
        quantized = [node.name or "" for node in quantized_matmuls(model)]
        named = select(
            self.per_token, quantized + [layer.name for layer in graph.linear_layers(model)], what="per-token"
        )
        return frozenset(quantized) if self.granularity == "per-token" else named

    def _insert_static(self, model: ir.Model, readers: dict[ir.Value, list[ir.Node]], ctx: Context) -> list[Event]:
        if not readers:
            return []
        unknown = {x.name or "": TokenRange for x in readers if LEARNED_RANGE not in x.meta}
        measured = ctx.measure(model, unknown) if unknown else {}
        events = []
        for x, matmuls in readers.items():
            low, high = _range(x, measured)
            affine = schemes.activation_grid(low, high, self.bits)
            quantize_input(model, x, matmuls, affine)
            figures = {"low": low, "high": high, "scale": affine.scale, "zero_point": affine.zero_point}
            learned = ", range learned" if LEARNED_RANGE in x.meta else ""
            events.append(Event(matmuls[0], f"uint{self.bits} per tensor, {len(matmuls)} readers{learned}", figures))
        return events

    def _insert_dynamic(self, model: ir.Model, readers: dict[ir.Value, list[ir.Node]]) -> list[Event]:
        for matmuls in readers.values():
            quantize_rows(model, matmuls, self.bits)
        return [Event(matmuls[0], f"uint{self.bits} per token, {len(matmuls)} readers") for matmuls in readers.values()]


def _range(x: ir.Value, measured: Mapping[str, Statistic]) -> tuple[float, float]:
    """The ends of an activation's range: learned, or else its extremes."""
    if LEARNED_RANGE in x.meta:
        low, high = x.meta[LEARNED_RANGE]
        return float(low), float(high)
    seen = measured[x.name or ""]
    assert isinstance(seen, TokenRange)
    return seen.low, seen.high


def quantize_input(model: ir.Model, x: ir.Value, readers: Sequence[ir.Node], affine: Affine) -> None:
    """Let `readers` read `x` through a static quantizer of their own; its constants are named after the first reader."""
    name = readers[0].name or x.name or "activation"
    source, new = x, []
    if affine.bits < 8:
        bounds = [
            graph.add_initializer(model, f"{name}.input_{side}", np.array(bound, dtype=np.float32))
            for side, bound in (("low", affine.low), ("high", affine.high))
        ]
        new.append(ir.node("Clip", [x, *bounds], name=f"{name}.input_clip"))
        source = graph.like(new[0].outputs[0], x)
    pair = _round_trip(model, name, source, affine)
    graph.insert_before(readers[0], [*new, *pair])
    for reader in readers:
        reader.replace_input_with(0, pair[-1].outputs[0])


def quantize_rows(model: ir.Model, readers: Sequence[ir.Node], bits: int) -> None:
    """Let `readers` read each row of their input brought to [0, 1] and rounded; undo that behind them."""
    # Asked for only now: where the input is the product of another per-token layer, that was restored meanwhile.
    x = readers[0].inputs[0]
    assert x is not None
    name = readers[0].name or x.name or "activation"
    low, high = _reduction(model, "ReduceMin", x, name), _reduction(model, "ReduceMax", x, name)
    width = ir.node("Sub", [high.outputs[0], low.outputs[0]], name=f"{name}.input_row_width")
    # A row of one value is divided by this instead: 0 / tiny = 0.
    tiny = graph.add_initializer(model, f"{name}.input_smallest", np.array(schemes.SMALLEST_SCALE, dtype=np.float32))
    span = ir.node("Max", [width.outputs[0], tiny], name=f"{name}.input_row_span")
    shift = ir.node("Sub", [x, low.outputs[0]], name=f"{name}.input_from_zero")
    divide = ir.node("Div", [graph.like(shift.outputs[0], x), span.outputs[0]], name=f"{name}.input_to_one")
    for node in (low, high, width, span):
        node.outputs[0].shape = None if x.shape is None else ir.Shape([*list(x.shape)[:-1], 1])
        node.outputs[0].type = x.type
    pair = _round_trip(model, name, graph.like(divide.outputs[0], x), schemes.row_grid(bits))
    graph.insert_before(readers[0], [low, high, width, span, shift, divide, *pair])
    for reader in readers:
        reader.replace_input_with(0, pair[-1].outputs[0])
        _restore_rows(model, reader, low.outputs[0], span.outputs[0])


def quantize_twice(model: ir.Model, readers: Sequence[ir.Node], coarse: Affine, fine: Affine) -> None:
    """Let `readers` read their input in two codes: a product with each, and the sum of the two.

    before:  MatMul(x, dq(W))
    after:   h = dq(QuantizeLinear(x, 256 t, z));  MatMul(h, dq(W)) + MatMul(dq(QuantizeLinear(x - h, t, 128)), dq(W))

    Args:
        model: the graph.
        readers: products of one input x [..., K] with quantized weights [K, N], biases behind them.
        coarse: scale 256 t and zero point z.
        fine: scale t and zero point 128.
    """
    x = readers[0].inputs[0]
    assert x is not None
    name = readers[0].name or x.name or "activation"
    above = _round_trip(model, name, x, coarse)
    left_over = ir.node("Sub", [x, above[-1].outputs[0]], name=f"{name}.input_left_over")
    below = _round_trip(model, f"{name}.remainder", graph.like(left_over.outputs[0], x), fine)
    graph.insert_before(readers[0], [*above, left_over, *below])
    for reader in readers:
        out = reader.outputs[0]
        reader.replace_input_with(0, above[-1].outputs[0])
        second = ir.node("MatMul", [below[-1].outputs[0], reader.inputs[1]], name=f"{reader.name}.remainder")
        total = ir.node("Add", [out, graph.like(second.outputs[0], out)], name=f"{reader.name}.both_codes")
        graph.insert_after(reader, [second, total])
        graph.like(total.outputs[0], out)
        _complete(out, total, total, "coarse")


def _reduction(model: ir.Model, op_type: str, x: ir.Value, name: str) -> ir.Node:
    if model.graph.opset_imports.get("", 0) < AXES_ARE_INPUTS:
        return ir.node(op_type, [x], {"axes": [-1]}, name=f"{name}.input_{op_type}")
    axes = graph.add_initializer(model, f"{name}.input_axes", np.array([-1], dtype=np.int64))
    return ir.node(op_type, [x, axes], name=f"{name}.input_{op_type}")


def _restore_rows(model: ir.Model, matmul: ir.Node, low: ir.Value, span: ir.Value) -> None:
    """Give the product its rows' range back; the result takes the product's name, by which layers are compared."""
    out, sums = matmul.outputs[0], _column_sums(matmul)
    assert sums is not None
    scaled = ir.node("Mul", [out, span], name=f"{matmul.name}.row_span")
    column_sums = graph.add_initializer(model, f"{matmul.name}.column_sums", sums)
    offset = ir.node("Mul", [low, column_sums], name=f"{matmul.name}.row_offset")
    restore = ir.node("Add", [scaled.outputs[0], offset.outputs[0]], name=f"{matmul.name}.restore_rows")
    for node in (scaled, offset, restore):
        graph.like(node.outputs[0], out)
    graph.insert_after(matmul, [scaled, offset, restore])
    _complete(out, scaled, restore, "unit_rows")


def _complete(out: ir.Value, first: ir.Node, last: ir.Node, said: str) -> None:
    """Let what `last` makes stand for a product's result, name included; `first` alone reads the product on."""
    name = out.name
    graph.bypass(out, last.outputs[0])
    first.replace_input_with(0, out)
    out.name, last.outputs[0].name = f"{name}_{said}", name


def _column_sums(matmul: ir.Node) -> schemes.Float | None:
    """The sums of the columns of a layer's weight [N], unless it is quantized in another way than per column."""
    weight = weight_dequantizer(matmul)
    assert weight is not None
    codes, scales = weight_array(weight.inputs[0]), graph.constant(weight.inputs[1])
    zero = graph.constant(weight.inputs[2]) if len(weight.inputs) > 2 else None
    if (
        codes is None
        or codes.dtype != np.int8
        or scales is None
        or scales.ndim > 1
        or (zero is not None and zero.any())
    ):
        return None
    if scales.ndim == 1 and graph.attribute(weight, "axis", 1) not in (1, -1):
        return None
    sums = schemes.column_sums(codes.astype(np.int8, copy=False), np.asarray(scales, dtype=np.float32))
    return np.broadcast_to(sums, codes.shape[1:])


def _round_trip(model: ir.Model, name: str, x: ir.Value, affine: Affine) -> tuple[ir.Node, ir.Node]:
    """QuantizeLinear and DequantizeLinear of one grid; their constants are named after the layer `name`."""
    scale = graph.add_initializer(model, f"{name}.input_scale", np.array(affine.scale, dtype=np.float32))
    zero = graph.add_initializer(model, f"{name}.input_zero_point", np.array(affine.zero_point, dtype=np.uint8))
    quantize = ir.node("QuantizeLinear", [x, scale, zero], name=f"{name}.input_q")
    graph.like(quantize.outputs[0], x, ir.DataType.UINT8)
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero], name=f"{name}.input_dq")
    graph.like(dequantize.outputs[0], x)
    return quantize, dequantize
