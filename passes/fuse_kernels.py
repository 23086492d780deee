"""Write integer layers and the float steps around them as operators of scalefold's own kernel library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from scalefold.compiler import graph, layer_names
from scalefold.compiler.coded_panels import coded_panels
from scalefold.compiler.decode_chain import evaluate
from scalefold.compiler.facts import Fact, restored_rows, row_range, weight_array
from scalefold.compiler.kernel_library import (
    ACTIVATIONS,
    DOMAIN,
    FLOAT_PRODUCT,
    HEAD_LANES,
    LARGEST_HEAD,
    VERSION,
    packed_pairs,
    packed_panels,
)
from scalefold.compiler.last_logits import output_layer_input
from scalefold.compiler.protocol import Context, Contract, Event, PassResult

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Weight:
    """A weight as the library reads it: panels and column sums, and what codes in the panels stand for, if they are such."""

    panels: ir.Value
    sums: ir.Value
    levels: ir.Value | None


_Packed = dict[ir.Value, _Weight]
"""By the weight that it is made of: layers that share one share it."""

LEVELS = {"Linear": 8, "LinearUint8": 9, "LinearBfloat16": 7, "LinearNormUint8": 14, "RowLinear": 10}
"""Which input of an operator has the levels of its weight."""


@dataclass(frozen=True)
class FuseKernels:
    """Fuse products with what stands before and behind them; see compiler/kernels.cpp for the operators.

    before:  Add(MatMulIntegerToFloat(q, W, s, t, z, -, b), r)                     r [..., N], the residual
    after:   Linear(q, panels of W, sums of W, t, s, z, b, r)

    before:  QuantizeLinear(Gelu(MatMulIntegerToFloat(q, W, s, t, z, -, b)), u, v)        or Relu, or nothing between
    after:   LinearUint8(q, panels of W, sums of W, t, s, z, b, u, v; activation)

    before:  Attention(q Wq, q Wk, q Wv, mask) -> QuantizeLinear(u, v)             three products of one q
    after:   AttentionUint8(LinearBfloat16(q, [Wq Wk Wv]), u, v, mask)

    before:  h = LayerNormalization(x);  QuantizeLinear(h, u, v);  h * m + a
    after:   LayerNormUint8(x, gain, shift, m, a, u, v), or, where x is Linear(..., r), LinearNormUint8 of all

    before:  MatMulIntegerToFloat(QuantizeLinear(f, s, z), W, s, t, z)             f float, with its own range per row too
    after:   RowLinear(f, panels of W, sums of W, t, b, s, z)

    before:  f = RMSNormalization(x, gain), or GatedSilu(x), and nothing else reads f
    after:   RowLinear of x, which does that first

    before:  Add(MatMul(f, W) + b, r)                                              W float [K, N]: what no integers hold
    after:   FloatLinear(f, panels of W in bfloat16, b, gain, -, r; activation)    with the steps of a RowLinear around it

    before:  Mul(Cast(a chain of integers that decodes rows ids of a table), Gather(scales, ids))
    after:   LookUp(codes of the table, scales, ids, levels)                       and for a table that is a W, its codes

    where 16 numbers a column, or a step times 4 bits, is all that a weight has:
    after:   Linear(q, codes of W, sums of W, t, s, z, b, r, levels)               and so for every product above

    q is uint8 [..., K] with one scale, W int8 [K, N]; m and a are [N] and restore what was migrated, 1 and 0 where nothing
    was. Steps on floats happen while a product's sums are in registers, so what they read and write does not go through
    memory, and weights lie in the file as the kernel reads them. A rounding may fall to the other side where a value lies
    between two codes. Queries, keys, values and the shares of attention are rounded to bfloat16, which is finer than the
    codes around them, and halves what attention reads and multiplies.
    """

    name: ClassVar[str] = "fuse-kernels"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Fuse attention, normalizations and products; decline products that the library does not know, with the reason."""
        attentions = list(_attentions(model))
        norms = list(_norms(model))
        graph.sweep(model)
        made, declined = [], []
        packed: _Packed = {}
        kept = _named(model, output_layer_input(model))
        for product in graph.nodes(model, "MatMulIntegerToFloat"):
            if reason := _obstacle(product):
                declined.append(Event(product, reason))
            else:
                made.append(_linear(model, product, packed, kept))
        if made:
            floats = [product for product in graph.nodes(model, "MatMul") if _is_float(product)]
            made += [_float_linear(model, product, kept) for product in floats]
            made += _tables(model)
        rewrites = [*attentions, *norms, *made]
        if rewrites:
            graph.require_opset(model, DOMAIN, VERSION)
            graph.sweep(model)
        return PassResult(tuple(event for event in rewrites if event.node.graph is not None), tuple(declined))


def _named(model: ir.Model, name: str | None) -> ir.Value | None:
    """What some node makes under a name."""
    if name is None:
        return None
    return next((value for node in model.graph for value in node.outputs if value.name == name), None)


def _obstacle(product: ir.Node) -> str | None:
    codes = weight_array(product.inputs[1])
    if codes is None or codes.dtype != np.int8 or codes.ndim != 2:
        return "its weight is no constant of int8"
    if codes.shape[0] % 4:
        return f"its {codes.shape[0]} input channels are no multiple of 4"
    if _look_ups(product.inputs[1]) is None:
        return "its weight is a table that is looked up in a way the library does not know, and stored once"
    if graph.scalar(product.inputs[2]) is None or len(product.inputs) < 5 or graph.scalar(product.inputs[4]) is None:
        return "its activation has no constant scale and zero point"
    if product.inputs[4] is None or product.inputs[4].dtype != ir.DataType.UINT8:
        return "its activation is not uint8"
    if len(product.inputs) > 6 and product.inputs[6] is not None and graph.constant(product.inputs[6]) is None:
        return "its bias is no constant"
    if graph.constant(product.inputs[3]) is None or (len(product.inputs) > 5 and product.inputs[5] is not None):
        return "its weight has scales that are no constants, or zero points"
    return None


@dataclass(frozen=True)
class _LookUp:
    """Where rows of a table of codes are looked up: their product with their scales, those [V], and the ids."""

    rows: ir.Value
    scales: Vector
    ids: ir.Value


def _look_ups(weight: ir.Value | None) -> list[_LookUp] | None:
    """Every place where a weight is looked up as a table too; None where one is not as quantize-embeddings writes it."""
    transpose = graph.producer(weight, "Transpose")
    table = transpose.inputs[0] if transpose is not None else weight
    if table is None:
        return None
    found = [_look_up(gather) for gather in graph.consumers(table) if gather.op_type == "Gather"]
    known = [entry for entry in found if entry is not None]
    return known if len(known) == len(found) and (transpose is not None or not found) else None


def _look_up(gather: ir.Node) -> _LookUp | None:
    """Mul(Cast(Gather(codes, ids)), Gather(scales, ids)) from its first Gather, or None."""
    cast = graph.only_consumer(gather.outputs[0], "Cast")
    product = graph.only_consumer(cast.outputs[0], "Mul") if cast is not None else None
    scales = graph.producer(graph.other_input(product, cast.outputs[0]), "Gather") if product and cast else None
    if scales is None or graph.attribute(gather, "axis", 0) != 0 or scales.inputs[1] is not gather.inputs[1]:
        return None
    return _scaled_rows(scales)


def _scaled_rows(gather: ir.Node) -> _LookUp | None:
    """Rows of a table of codes, from the Gather of their scales."""
    array, ids = graph.constant(gather.inputs[0]), gather.inputs[1]
    product = graph.only_consumer(gather.outputs[0], "Mul")
    if array is None or array.shape[1:] != (1,) or graph.attribute(gather, "axis", 0) != 0:
        return None
    if product is None or ids is None or ids.dtype != ir.DataType.INT64:
        return None
    return _LookUp(product.outputs[0], np.asarray(array, dtype=np.float32).reshape(-1), ids)


def _decoded_look_ups(model: ir.Model, outputs: int | None = None) -> Iterator[tuple[_LookUp, npt.NDArray[np.int8]]]:
    """Every place where rows of a table of few bits are decoded as they are looked up, and that table [V, K].

    Args:
        model: the graph.
        outputs: V, where only such a table is wanted.
    """
    for gather in graph.nodes(model, "Gather"):
        place = _scaled_rows(gather)
        rank = None if place is None else graph.rank(place.ids)
        if place is None or not rank or outputs not in (None, len(place.scales)) or not _is_read(place.rows):
            continue
        cast = graph.producer(graph.other_input(graph.consumers(gather.outputs[0])[0], gather.outputs[0]), "Cast")
        # int8 that is looked up as it is stays so: a row lies in one piece
        if cast is None or graph.producer(cast.inputs[0], "Gather") is not None:
            continue
        ids = np.arange(len(place.scales)).reshape([1] * (rank - 1) + [-1])
        rows = evaluate(cast.inputs[0], {place.ids: ids})
        if rows is not None and rows.dtype == np.int8 and rows.shape[:-1] == ids.shape:
            yield place, np.asarray(rows, dtype=np.int8).reshape(ids.size, -1)


def _is_read(value: ir.Value) -> bool:
    return bool(graph.consumers(value)) or value.is_graph_output()


def _tables(model: ir.Model) -> Iterator[Event]:
    """Look tables of few bits up by one operator."""
    for place, table in list(_decoded_look_ups(model)):
        coded = coded_panels(np.ascontiguousarray(table.T))
        made = place.rows.producer()
        if coded is not None and made is not None:
            name = made.name or "table"
            panels = graph.add_initializer(model, f"{name}.panels", coded.codes)
            levels = graph.add_initializer(model, f"{name}.levels", coded.levels)
            yield Event(_looked_up(model, name, panels, levels, place), "LookUp, codes of 4 bits")


def _looked_up(model: ir.Model, name: str, panels: ir.Value, levels: ir.Value | None, place: _LookUp) -> ir.Node:
    """The operator that stands for the rows of a table."""
    scales = graph.add_initializer(model, f"{name}.row_scales", place.scales)
    inputs = [panels, scales, place.ids, *([levels] if levels is not None else [])]
    rows = ir.node("LookUp", inputs, domain=DOMAIN, name=f"{name}.look_up")
    made = place.rows.producer()
    assert made is not None
    graph.insert_after(made, [rows])
    graph.stand_in(place.rows, rows.outputs[0])
    return rows


def _attentions(model: ir.Model) -> Iterator[Event]:
    """Let attention read its three projections side by side, and write codes."""
    shared: dict[tuple[ir.Value | None, ...], ir.Value] = {}
    for attention in graph.nodes(model, "Attention"):
        products = [graph.producer(value, "MatMulIntegerToFloat") for value in attention.inputs[:3]]
        quantize = graph.only_consumer(attention.outputs[0], "QuantizeLinear")
        heads = graph.attribute(attention, "q_num_heads")
        if quantize is None or not isinstance(heads, int) or not _is_plain(attention, heads):
            continue
        layers = [product for product in products if product is not None and _feeds_only(product, attention)]
        if len(layers) < 3 or len({layer.inputs[0] for layer in layers}) > 1 or any(map(_obstacle, layers)):
            continue
        width = _width(layers[0])
        if (
            any(_width(layer) != width for layer in layers)
            or width % (heads * HEAD_LANES)
            or width > heads * LARGEST_HEAD
        ):
            continue
        joined = _side_by_side(model, layers, shared)
        mask = attention.inputs[3] if len(attention.inputs) > 3 else None
        fused = ir.node(
            "AttentionUint8",
            [joined.outputs[0], *quantize.inputs[1:3], *([mask] if mask is not None else [])],
            {"heads": heads},
            domain=DOMAIN,
            name=attention.name,
        )
        graph.insert_after(quantize, [fused])
        graph.stand_in(quantize.outputs[0], fused.outputs[0])
        yield Event(fused, "three projections in one product, codes as its output")


def _is_plain(attention: ir.Node, heads: int) -> bool:
    """Whether attention is softmax(q k^T / sqrt(D) + mask) v, with no cache and no grouped queries."""
    known = {"q_num_heads", "kv_num_heads"}
    mask = attention.inputs[3] if len(attention.inputs) > 3 else None
    return (
        set(attention.attributes) <= known
        and graph.attribute(attention, "kv_num_heads") == heads
        and not any(attention.inputs[4:])
        and len(attention.outputs) == 1
        and (mask is None or (mask.dtype == ir.DataType.FLOAT and graph.rank(mask) == 4))
        and graph.rank(attention.inputs[0]) == 3
    )


def _feeds_only(product: ir.Node, reader: ir.Node) -> bool:
    return graph.only_consumer(product.outputs[0]) is reader


def _width(product: ir.Node) -> int:
    codes = weight_array(product.inputs[1])
    assert codes is not None
    return int(codes.shape[1])


def _side_by_side(
    model: ir.Model, layers: list[ir.Node], shared: dict[tuple[ir.Value | None, ...], ir.Value]
) -> ir.Node:
    """One product of what several make of one input, their columns behind one another; `shared` has weights made so."""
    names = [layer.name or "" for layer in layers]
    name = layer_names.joined(names) or "+".join(names)
    weights = tuple(layer.inputs[1] for layer in layers)
    if weights not in shared:
        codes = np.concatenate([array for value in weights if (array := weight_array(value)) is not None], 1)
        shared[weights] = graph.add_initializer(model, f"{name}.weight_codes", codes)
    weight = shared[weights]
    scales = graph.add_initializer(model, f"{name}.weight_scales", np.concatenate([_scales(layer) for layer in layers]))
    bias = graph.add_initializer(model, f"{name}.bias", np.concatenate([_bias(layer) for layer in layers]))
    first = layers[0]
    inputs = [first.inputs[0], weight, first.inputs[2], scales, first.inputs[4], None, bias]
    joined = ir.node("MatMulIntegerToFloat", inputs, domain=graph.MICROSOFT, name=name)
    out = first.outputs[0]
    joined.outputs[0].type = out.type
    if out.shape is not None:
        joined.outputs[0].shape = ir.Shape([*out.shape[:-1], weight.shape[1] if weight.shape else None])
    graph.insert_after(first, [joined])
    return joined


def _scales(product: ir.Node) -> Vector:
    """The scale of each column [N]."""
    scales = np.asarray(graph.constant(product.inputs[3]), dtype=np.float32).reshape(-1)
    return np.ascontiguousarray(np.broadcast_to(scales, _width(product)))


def _bias(product: ir.Node) -> Vector:
    """The bias [N], zeros where there is none."""
    bias = graph.constant(product.inputs[6]) if len(product.inputs) > 6 else None
    return np.zeros(_width(product), np.float32) if bias is None else np.asarray(bias, dtype=np.float32).reshape(-1)


def _norms(model: ir.Model) -> Iterator[Event]:
    """Let normalizations that are quantized write codes, and what was migrated restored."""
    for norm in graph.nodes(model, "LayerNormalization"):
        out = norm.outputs[0]
        quantizers = [reader for reader in graph.consumers(out) if reader.op_type == "QuantizeLinear"]
        gain, shift = (_vector(norm.inputs[index] if len(norm.inputs) > index else None) for index in (1, 2))
        if len(quantizers) != 1 or gain is None or shift is None or not _is_per_tensor(quantizers[0]):
            continue
        if graph.attribute(norm, "axis", -1) not in (-1, (graph.rank(out) or 0) - 1):
            continue
        quantize, size, name = quantizers[0], gain.size, norm.name or "norm"
        end, multiply, add = _restored(out, quantize, size)
        constants = {"gain": gain, "shift": shift, "multiply": multiply, "add": add}
        values = [graph.add_initializer(model, f"{name}.{key}", array) for key, array in constants.items()]
        fused = ir.node(
            "LayerNormUint8",
            [norm.inputs[0], *values, *quantize.inputs[1:3]],
            {"epsilon": _epsilon(norm)},
            num_outputs=2,
            domain=DOMAIN,
            name=norm.name,
        )
        graph.insert_after(norm, [fused])
        graph.stand_in(quantize.outputs[0], fused.outputs[1])
        graph.stand_in(end, fused.outputs[0])
        yield Event(fused, "codes and floats by one operator")


def _restored(out: ir.Value, quantize: ir.Node, size: int) -> tuple[ir.Value, Vector, Vector]:
    """The value that stands for a normalization's floats, and the factors and offsets [C] that lead to it."""
    ones, zeros = np.ones(size, np.float32), np.zeros(size, np.float32)
    others = [reader for reader in graph.consumers(out) if reader is not quantize]
    if len(others) != 1 or out.is_graph_output():
        return out, ones, zeros
    end, factors, offsets = out, ones, zeros
    if others[0].op_type == "Mul" and (found := _vector(graph.other_input(others[0], out), size)) is not None:
        end, factors = others[0].outputs[0], found
        follower = graph.only_consumer(end, "Add")
    else:
        follower = others[0] if others[0].op_type == "Add" else None
    if follower is not None and (found := _vector(graph.other_input(follower, end), size)) is not None:
        end, offsets = follower.outputs[0], found
    return end, factors, offsets


def _vector(value: ir.Value | None, size: float | None = None) -> Vector | None:
    """A constant along the last axis, as [C]; None for anything else."""
    array = graph.constant(value)
    if array is None or array.dtype != np.float32 or array.ndim == 0 or array.size != array.shape[-1]:
        return None
    return None if size is not None and array.size != size else np.asarray(array, dtype=np.float32).reshape(-1)


def _is_per_tensor(quantize: ir.Node) -> bool:
    """Whether a quantizer makes uint8 by one constant step."""
    codes = quantize.outputs[0]
    return (
        codes.dtype == ir.DataType.UINT8
        and len(quantize.inputs) > 2
        and graph.scalar(quantize.inputs[1]) is not None
        and graph.scalar(quantize.inputs[2]) is not None
    )


@dataclass(frozen=True)
class _FloatInput:
    """What a product's input is before it is quantized.

    Attributes:
        x: the float rows.
        readers: the nodes that read them to quantize them.
        parameters: scale and zero point; none where each row has its own range.
        end: the product, with the range of its rows restored.
    """

    x: ir.Value
    readers: frozenset[ir.Node]
    parameters: tuple[ir.Value | None, ...]
    end: ir.Value


def _float_input(product: ir.Node) -> _FloatInput | None:
    """The float input of a product that alone reads its codes, or None."""
    quantize = graph.producer(product.inputs[0], "QuantizeLinear")
    if quantize is None or graph.only_consumer(quantize.outputs[0]) is not product:
        return None
    restore, found = restored_rows(product), row_range(quantize)
    if [graph.scalar(value) for value in quantize.inputs[1:3]] != [graph.scalar(product.inputs[i]) for i in (2, 4)]:
        return None
    if restore is not None and len(product.inputs) > 6 and product.inputs[6] is not None:
        return None  # its bias is multiplied by the range of a row
    if restore is None or found is None:
        x = quantize.inputs[0]
        return _FloatInput(x, frozenset([quantize]), tuple(quantize.inputs[1:3]), product.outputs[0]) if x else None
    least = graph.producer(found[0], "ReduceMin")
    x = least.inputs[0] if least is not None else None
    if x is None:
        return None
    ranges = [reader for reader in graph.consumers(x) if reader.op_type in ("ReduceMin", "ReduceMax", "Sub")]
    return _FloatInput(x, frozenset(ranges), (None, None), restore.outputs[0])


def _first_step(source: _FloatInput, kept: ir.Value | None) -> tuple[ir.Node | None, dict[str, int | float]]:
    """The normalization or gated unit that only this product reads, and the attributes that say so."""
    node = graph.producer(source.x, "RMSNormalization", "GatedSilu")
    if (
        node is None
        or source.x is kept
        or source.x.is_graph_output()
        or set(graph.consumers(source.x)) - source.readers
    ):
        return None, {}
    if node.op_type == "GatedSilu":
        return node, {"gated": 1}
    last = graph.attribute(node, "axis", -1) in (-1, (graph.rank(source.x) or 0) - 1)
    return (node, {"epsilon": _epsilon(node)}) if last and _vector(node.inputs[1]) is not None else (None, {})


def _epsilon(norm: ir.Node) -> float:
    found = graph.attribute(norm, "epsilon", 1e-5)
    return found if isinstance(found, float) else 1e-5


def _linear(model: ir.Model, product: ir.Node, packed: _Packed, kept: ir.Value | None) -> Event:
    """Replace a product, what only it leads to, and what only leads to it, by one operator."""
    name, weight = product.name or "linear", product.inputs[1]
    assert weight is not None
    if weight not in packed:
        packed[weight] = _pack(model, name, weight)
    scales = graph.add_initializer(model, f"{name}.column_scales", _scales(product))
    attributes: dict[str, int | float] = {"N": _width(product)}
    source, bias, stored = _float_input(product), _bias(product), packed[weight]
    words = [] if stored.levels is None else ["codes of 4 bits"]
    out = product.outputs[0] if source is None else source.end
    if source is not None:
        bias, out = _biased(out, bias)
    out = _activated(out, attributes, words)
    biases = graph.add_initializer(model, f"{name}.column_bias", bias)
    follower = graph.only_consumer(out)
    ends_in_codes = follower is not None and follower.op_type == "QuantizeLinear" and _is_per_tensor(follower)
    to_attention = follower is not None and follower.op_type == "AttentionUint8"
    by_row = source is not None and source.parameters[0] is None  # only a RowLinear gives rows their range again
    if source is not None and (by_row or not (ends_in_codes or to_attention)):
        constants = [stored.panels, stored.sums, scales, biases, *source.parameters]
        return _row_linear("RowLinear", product, source, constants, stored.levels, attributes, words, out, kept)
    inputs = [product.inputs[0], stored.panels, stored.sums, scales, product.inputs[2], product.inputs[4], biases]
    operator, residual = "Linear", _residual(out)
    if follower is not None and ends_in_codes:
        operator, out = "LinearUint8", follower.outputs[0]
        inputs += follower.inputs[1:3]
    elif to_attention:
        operator = "LinearBfloat16"
    elif follower is not None and residual is not None:
        out = follower.outputs[0]
        inputs.append(residual)
        words.append("residual added")
        norm = graph.only_consumer(out, "LayerNormUint8")
        if norm is not None:
            return Event(
                _with_norm(product, inputs, stored.levels, attributes, norm), ", ".join(["LinearNormUint8", *words])
            )
    fused = _in_place(operator, product, inputs, stored.levels, attributes, out)
    if operator == "LinearBfloat16":
        fused.outputs[0].type = ir.TensorType(ir.DataType.BFLOAT16)
    return Event(fused, ", ".join([operator, *words]))


def _pack(model: ir.Model, name: str, weight: ir.Value) -> _Weight:
    """Panels and column sums of a weight; where it is looked up as a table too, that is done in the panels."""
    codes = np.asarray(weight_array(weight), dtype=np.int8)
    places = _look_ups(weight) or [
        place for place, table in _decoded_look_ups(model, codes.shape[1]) if np.array_equal(table, codes.T)
    ]
    coded = coded_panels(codes)
    array = packed_panels(codes) if coded is None else coded.codes
    panels = graph.add_initializer(model, f"{name}.weight_panels", array)
    levels = None if coded is None else graph.add_initializer(model, f"{name}.weight_levels", coded.levels)
    for place in places:
        _looked_up(model, name, panels, levels, place)
    sums = graph.add_initializer(model, f"{name}.weight_sums", codes.sum(axis=0, dtype=np.int32))
    return _Weight(panels, sums, levels)


def _residual(out: ir.Value) -> ir.Value | None:
    """What is added to a value, and nothing else done with it; None where that is broadcast."""
    add = graph.only_consumer(out, "Add")
    other = graph.other_input(add, out) if add is not None else None
    return other if other is not None and other is not out and graph.same_shape(other, out) else None


def _biased(out: ir.Value, bias: Vector) -> tuple[Vector, ir.Value]:
    """A bias with what else is added to each column, and the value behind that."""
    add = graph.only_consumer(out, "Add")
    other = graph.other_input(add, out) if add is not None else None
    offset = _vector(other, bias.size) if (graph.rank(other) or 0) <= (graph.rank(out) or 1) else None
    return (bias, out) if add is None or offset is None else (bias + offset, add.outputs[0])


def _activated(out: ir.Value, attributes: dict[str, int | float], words: list[str]) -> ir.Value:
    """The value behind an activation function that the library has, which is noted; `out` where there is none."""
    activation = graph.only_consumer(out)
    kind = _activation(activation) if activation is not None else None
    if activation is None or kind is None:
        return out
    attributes["activation"] = ACTIVATIONS.index(kind)
    words.append(kind)
    return activation.outputs[0]


def _row_linear(
    operator: str,
    product: ir.Node,
    source: _FloatInput,
    constants: Sequence[ir.Value | None],
    levels: ir.Value | None,
    attributes: dict[str, int | float],
    words: list[str],
    out: ir.Value,
    kept: ir.Value | None,
) -> Event:
    """A product of float rows, and what comes right before them."""
    step, more = _first_step(source, kept)
    x, gain = source.x, None
    if step is not None:
        assert step.inputs[0] is not None
        x, gain = step.inputs[0], step.inputs[1] if step.op_type == "RMSNormalization" else None
        words.append("gated" if gain is None else "normalized")
    residual = _residual(out)
    if residual is not None:
        out = graph.consumers(out)[0].outputs[0]
        words.append("residual added")
    inputs = [x, *constants, gain, None, residual]
    fused = _in_place(operator, product, inputs, levels, {**attributes, **more}, out)
    return Event(fused, ", ".join([operator, *words]))


def _is_float(product: ir.Node) -> bool:
    """Whether a product has a constant float weight of its own, and rows of an even number of floats."""
    x, weight = product.inputs[:2]
    array = graph.constant(weight)
    if x is None or weight is None or array is None or array.dtype != np.float32 or array.ndim != 2:
        return False
    alone = all(reader.op_type == "MatMul" for reader in graph.consumers(weight)) and (graph.rank(x) or 0) > 1
    return alone and x.dtype == ir.DataType.FLOAT and array.shape[0] % 2 == 0 and graph.constant(x) is None


def _float_linear(model: ir.Model, product: ir.Node, kept: ir.Value | None) -> Event:
    """A product of floats, what comes right before it, and what comes behind."""
    weight = np.asarray(graph.constant(product.inputs[1]), dtype=np.float32)
    name, words, x = product.name or "linear", list[str](), product.inputs[0]
    assert x is not None
    attributes: dict[str, int | float] = {"N": weight.shape[1]}
    bias, out = _biased(product.outputs[0], np.zeros(weight.shape[1], np.float32))
    out = _activated(out, attributes, words)
    constants = [
        graph.add_initializer(model, f"{name}.weight_pairs", packed_pairs(weight)),
        graph.add_initializer(model, f"{name}.column_bias", bias),
    ]
    source = _FloatInput(x, frozenset([product]), (), product.outputs[0])
    return _row_linear(FLOAT_PRODUCT, product, source, constants, None, attributes, words, out, kept)


def _in_place(
    kind: str,
    product: ir.Node,
    inputs: Sequence[ir.Value | None],
    levels: ir.Value | None,
    attributes: Mapping[str, int | float],
    out: ir.Value,
) -> ir.Node:
    """The operator whose output stands for `out`, where that was made."""
    fused, last = _operator(kind, product, inputs, levels, attributes), out.producer()
    assert last is not None
    graph.insert_after(last, [fused])
    graph.stand_in(out, fused.outputs[0])
    return fused


def _with_norm(
    product: ir.Node,
    inputs: Sequence[ir.Value | None],
    levels: ir.Value | None,
    attributes: Mapping[str, int | float],
    norm: ir.Node,
) -> ir.Node:
    """One operator of a product, the residual and the normalization behind them."""
    more = {**attributes, "epsilon": _epsilon(norm)}
    fused = _operator("LinearNormUint8", product, [*inputs, *norm.inputs[1:]], levels, more, 2)
    graph.insert_after(norm, [fused])
    for old, new in zip(norm.outputs, fused.outputs, strict=True):
        graph.stand_in(old, new)
    return fused


def _operator(
    kind: str,
    product: ir.Node,
    inputs: Sequence[ir.Value | None],
    levels: ir.Value | None,
    attributes: Mapping[str, int | float],
    outputs: int = 1,
) -> ir.Node:
    given = list(inputs) if levels is None else [*inputs, *[None] * (LEVELS[kind] - len(inputs)), levels]
    while given[-1] is None:
        given.pop()
    fused = ir.node(kind, given, dict(attributes), domain=DOMAIN, name=product.name, num_outputs=outputs)
    fused.metadata_props.update(product.metadata_props)
    return fused


def _activation(node: ir.Node) -> str | None:
    """The name that the library has for an activation function, or None."""
    if node.op_type == "Relu":
        return "relu"
    if node.op_type == "Gelu" and node.domain == "":
        return "gelu_tanh" if graph.attribute(node, "approximate", "none") == "tanh" else "gelu"
    if node.op_type == "QuickGelu" and graph.attribute(node, "alpha", 1.702) == 1.0:
        return "silu"
    return None
