"""A compiled graph in operators that have gradients, its weights as values to be given.

before:  y = MatMulIntegerToFloat(q, integers, s, scales, z, -, b)
after:   y = MatMul(DequantizeLinear(q, s, z), W) + b

before:  y = Attention(q, k, v, ...)                       after:  the function body that ONNX defines for it
before:  BitShift(codes, n; LEFT), BitShift(codes, n; RIGHT)
after:   codes * 2^n mod 256,      codes / 2^n             in int32

before:  LayerNormalization(x, gain [1, 1, C])             after:  LayerNormalization(x, gain [C])
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import inliner
from onnx_ir.passes.common import ShapeInferencePass

from scalefold.compiler import decode_chain, graph
from scalefold.compiler.errors import GraphError
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.tunable_weights import TunableWeight, tunable_weights

FUNCTIONS = ("Attention", "RotaryEmbedding")
"""Operators that onnx itself can write in simpler ones."""


def open_differentiable(path: Path) -> tuple[ir.Model, list[TunableWeight]]:
    """A model file in operators that have gradients, and its weights.

    Only the graph is rewritten; constants stay on disk.

    Raises:
        SourceError: the file cannot be read.
        GraphError: its attention cannot be written in simpler operators.
    """
    model = _without_functions(read_onnx(path), path.parent)
    ShapeInferencePass()(model)
    weights = tunable_weights(model)
    for node in graph.nodes(model, "CastLike"):
        _replace(node, [ir.node("Cast", node.inputs[:1], {"to": _dtype_of(node.inputs[1])})])
    for node in graph.nodes(model, "BitShift"):
        if not decode_chain.is_constant(node.outputs[0]):
            _replace(node, _shifted(model, node))
    for node in graph.nodes(model, "LayerNormalization"):
        _flatten_vectors(model, node)
    return model, weights


def give_weights(model: ir.Model, weights: list[TunableWeight]) -> Mapping[TunableWeight, ir.Value]:
    """Let linear layers read float weights [K, N], one new value for each of `weights`; all others stay as they are.

    Fused products are written out for every layer.
    """
    given = {weight: ir.Value(name=f"{weight.name}.tuned_weight") for weight in weights}
    floats = {reader: value for weight, value in given.items() for reader in weight.readers}
    for node in graph.nodes(model, "MatMulIntegerToFloat"):
        _write_out(node, floats.get(node))
    for node in graph.nodes(model, "DequantizeLinear"):
        if node in floats:
            node.outputs[0].replace_all_uses_with(floats[node])
    for node in list(model.graph):
        for index, entry in enumerate(node.inputs):
            if entry is not None and graph.producer(entry) is not None and decode_chain.is_constant(entry):
                node.replace_input_with(index, _folded(model, entry))
    graph.sweep(model)
    return given


def _without_functions(model: ir.Model, folder: Path) -> ir.Model:
    proto = ir.to_proto(model)
    assert isinstance(proto, onnx.ModelProto)
    try:
        plain = inliner.inline_selected_functions(proto, [("", name) for name in FUNCTIONS], False, True)
    except RuntimeError as error:  # onnx 1.23 cannot, where an optional input between others is left out
        raise GraphError(
            f"onnx cannot write its attention in simpler operators ({' '.join(str(error).split())[:200]})",
            where=str(folder),
            remedy="compile it with --target qdq, which keeps attention in simple operators",
        ) from error
    inlined = ir.from_proto(plain)
    for value in inlined.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value.base_dir = folder
    return inlined


def _dtype_of(value: ir.Value | None) -> ir.DataType:
    return ir.DataType.FLOAT if value is None or value.dtype is None else value.dtype


def _replace(node: ir.Node, new: list[ir.Node]) -> None:
    graph.insert_before(node, new)
    graph.like(new[-1].outputs[0], node.outputs[0])
    graph.bypass(node.outputs[0], new[-1].outputs[0])
    assert node.graph is not None
    node.graph.remove(node, safe=True)


def _shifted(model: ir.Model, node: ir.Node) -> list[ir.Node]:
    """A shift of uint8 as a product or quotient."""
    places = np.asarray(decode_chain.evaluate(node.inputs[1]), dtype=np.int32)
    left = graph.attribute(node, "direction") == "LEFT"
    factor = graph.add_initializer(model, "power_of_two", np.left_shift(np.int32(1), places))
    nodes = [ir.node("Cast", node.inputs[:1], {"to": ir.DataType.INT32})]
    nodes.append(ir.node("Mul" if left else "Div", [nodes[-1].outputs[0], factor]))
    if left:
        byte = graph.add_initializer(model, "byte", np.array(256, dtype=np.int32))
        nodes.append(ir.node("Mod", [nodes[-1].outputs[0], byte]))
    return [*nodes, ir.node("Cast", nodes[-1].outputs[:1], {"to": ir.DataType.UINT8})]


def _flatten_vectors(model: ir.Model, norm: ir.Node) -> None:
    """Gain and bias [1, 1, C], the form that keeps onnxruntime from fusing a norm, as [C]."""
    for index, entry in enumerate(norm.inputs[1:], start=1):
        array = graph.constant(entry)
        if entry is not None and array is not None and array.ndim > 1 and array.size == array.shape[-1]:
            graph.replace_constant(model, norm, index, f"{entry.name}.vector", array.reshape(-1))


def _write_out(node: ir.Node, weight: ir.Value | None) -> None:
    """A fused product as DequantizeLinear, MatMul and Add."""
    entries = [*node.inputs, None, None][:7]
    dequantize = ir.node("DequantizeLinear", [entries[0], entries[2], *([] if entries[4] is None else [entries[4]])])
    nodes = [dequantize]
    if weight is None:
        nodes.append(ir.node("DequantizeLinear", [entries[1], entries[3]], {"axis": 1}))
        weight = nodes[-1].outputs[0]
    nodes.append(ir.node("MatMul", [dequantize.outputs[0], weight], name=node.name))
    if entries[6] is not None:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], entries[6]]))
    _replace(node, nodes)


def _folded(model: ir.Model, value: ir.Value) -> ir.Value:
    """A constant in place of the chain that makes it."""
    name = f"{value.name}.decoded"
    found = model.graph.initializers.get(name)
    array = decode_chain.evaluate(value) if found is None else None
    return graph.add_initializer(model, name, array) if array is not None else found or value
