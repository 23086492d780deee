"""Write integer layers and the float steps around them as operators of scalefold's own kernel library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from scalefold.compiler import graph, layer_names
from scalefold.compiler.facts import Fact, weight_array
from scalefold.compiler.kernel_library import ACTIVATIONS, DOMAIN, HEAD_LANES, LARGEST_HEAD, VERSION, packed_panels
from scalefold.compiler.protocol import Context, Contract, Event, PassResult

Vector = npt.NDArray[np.float32]

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
        packed: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        for product in graph.nodes(model, "MatMulIntegerToFloat"):
            if reason := _obstacle(product):
                declined.append(Event(product, reason))
            else:
                made.append(_linear(model, product, packed))
        rewrites = [*attentions, *norms, *made]
        if rewrites:
            graph.require_opset(model, DOMAIN, VERSION)
            graph.sweep(model)
        return PassResult(tuple(event for event in rewrites if event.node.graph is not None), tuple(declined))


def _obstacle(product: ir.Node) -> str | None:
    codes = weight_array(product.inputs[1])
    if codes is None or codes.dtype != np.int8:
        return "its weight is no constant of int8"
    if codes.shape[0] % 4:
        return f"its {codes.shape[0]} input channels are no multiple of 4"
    if any(reader.op_type == "Gather" for reader in _readers_of_table(product.inputs[1])):
        return "its weight is a table that is looked up too, and stored once"
    if graph.scalar(product.inputs[2]) is None or len(product.inputs) < 5 or graph.scalar(product.inputs[4]) is None:
        return "its activation has no constant scale and zero point"
    if graph.constant(product.inputs[3]) is None or (len(product.inputs) > 5 and product.inputs[5] is not None):
        return "its weight has scales that are no constants, or zero points"
    return None


def _readers_of_table(weight: ir.Value | None) -> list[ir.Node]:
    transpose = graph.producer(weight, "Transpose")
    source = transpose.inputs[0] if transpose is not None else weight
    return [] if source is None else graph.consumers(source)


def _attentions(model: ir.Model) -> Iterator[Event]:
    """Let attention read its three projections side by side, and write codes."""
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
        if any(_width(layer) != width for layer in layers) or width % (heads * HEAD_LANES) or width > heads * LARGEST_HEAD:
            continue
        joined = _side_by_side(model, layers)
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


def _side_by_side(model: ir.Model, layers: list[ir.Node]) -> ir.Node:
    """One product of what several make of one input, their columns behind one another."""
    names = [layer.name or "" for layer in layers]
    name = layer_names.joined(names) or "+".join(names)
    arrays = [weight_array(layer.inputs[1]) for layer in layers]
    weight = graph.add_initializer(model, f"{name}.weight_codes", np.concatenate([a for a in arrays if a is not None], 1))
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
            {"epsilon": graph.attribute(norm, "epsilon", 1e-5)},
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


def _vector(value: ir.Value | None, size: int | None = None) -> Vector | None:
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


def _linear(model: ir.Model, product: ir.Node, packed: dict[ir.Value, tuple[ir.Value, ir.Value]]) -> Event:
    """Replace a product, and what only it leads to, by one operator."""
    name, weight = product.name or "linear", product.inputs[1]
    assert weight is not None
    if weight not in packed:
        codes = np.asarray(weight_array(weight), dtype=np.int8)
        packed[weight] = (
            graph.add_initializer(model, f"{name}.weight_panels", packed_panels(codes)),
            graph.add_initializer(model, f"{name}.weight_sums", codes.sum(axis=0, dtype=np.int32)),
        )
    scales = graph.add_initializer(model, f"{name}.column_scales", _scales(product))
    bias = graph.add_initializer(model, f"{name}.column_bias", _bias(product))
    inputs = [product.inputs[0], *packed[weight], scales, product.inputs[2], product.inputs[4], bias]
    attributes: dict[str, int | float] = {"N": _width(product)}
    last, words = product, []
    if (activation := graph.only_consumer(product.outputs[0])) is not None and (kind := _activation(activation)):
        attributes["activation"] = ACTIVATIONS.index(kind)
        last = activation
        words.append(kind)
    out, operator = last.outputs[0], "Linear"
    follower = graph.only_consumer(out)
    if follower is not None and follower.op_type == "QuantizeLinear" and _is_per_tensor(follower):
        operator, last = "LinearUint8", follower
        inputs += follower.inputs[1:3]
    elif follower is not None and follower.op_type == "AttentionUint8":
        operator = "LinearBfloat16"
    elif follower is not None and follower.op_type == "Add":
        residual = graph.other_input(follower, out)
        if residual is not None and _same_shape(residual, out):
            last = follower
            inputs.append(residual)
            words.append("residual added")
            norm = graph.only_consumer(last.outputs[0], "LayerNormUint8")
            if norm is not None:
                return Event(_with_norm(product, inputs, attributes, norm), ", ".join(["LinearNormUint8", *words]))
    fused = _operator(operator, product, inputs, attributes)
    graph.insert_after(last, [fused])
    graph.stand_in(last.outputs[0], fused.outputs[0])
    if operator == "LinearBfloat16":
        fused.outputs[0].type = ir.TensorType(ir.DataType.BFLOAT16)
    return Event(fused, ", ".join([operator, *words]))


def _with_norm(
    product: ir.Node, inputs: Sequence[ir.Value | None], attributes: Mapping[str, int | float], norm: ir.Node
) -> ir.Node:
    """One operator of a product, the residual and the normalization behind them."""
    epsilon = graph.attribute(norm, "epsilon", 1e-5)
    assert isinstance(epsilon, float)
    fused = _operator("LinearNormUint8", product, [*inputs, *norm.inputs[1:]], {**attributes, "epsilon": epsilon}, 2)
    graph.insert_after(norm, [fused])
    for old, new in zip(norm.outputs, fused.outputs, strict=True):
        graph.stand_in(old, new)
    return fused


def _operator(
    kind: str, product: ir.Node, inputs: Sequence[ir.Value | None], attributes: Mapping[str, int | float], outputs: int = 1
) -> ir.Node:
    fused = ir.node(kind, inputs, dict(attributes), domain=DOMAIN, name=product.name, num_outputs=outputs)
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


def _same_shape(value: ir.Value, other: ir.Value) -> bool:
    """Whether two values have the same known shape and neither is a constant that is broadcast."""
    return value is not other and value.shape is not None and value.shape == other.shape
