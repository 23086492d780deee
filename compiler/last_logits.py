"""Letting whoever runs a decoder ask for the logits of the last tokens alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from scalefold.compiler import graph
from scalefold.compiler.channel_ranges import PRODUCTS, float_input
from scalefold.compiler.decoder import LOGITS, is_decoder

KEPT = "logits_to_keep"
"""The input that says for how many of the last tokens there are logits; it need not be fed."""

ALL = np.iinfo(np.int64).max


def output_layer_input(model: ir.Model) -> str | None:
    """The name of what the output layer of a decoder reads, [B,S,H], where that can be cut to fewer tokens.

    Args:
        model: a float or a lowered graph.

    Returns:
        None where the output layer cannot be told, what it reads makes other outputs too, or there is such an input.
    """
    logits = next((value for value in model.graph.outputs if value.name == LOGITS), None)
    if logits is None or not is_decoder(model) or any(value.name == KEPT for value in model.graph.inputs):
        return None
    head = next((node for node in reversed(graph.nodes(model, *PRODUCTS)) if _makes(node, logits)), None)
    x = float_input(head) if head is not None else None
    if x is None or x.producer() is None or x.is_graph_output() or graph.rank(x) != 3:
        return None
    made = {value for node in graph.descendants(x) for value in node.outputs if value.is_graph_output()}
    return x.name if made == {logits} else None


def _makes(product: ir.Node, logits: ir.Value) -> bool:
    """Whether logits come from a product, and no other one in between."""
    made = product.outputs[0]
    return made is logits or any(logits in node.outputs for node in graph.descendants(made))


def cut_logits(model: onnx.ModelProto, reads: str) -> bool:
    """Let a decoder compute the logits of its last n tokens, and say whether the graph has what they are computed from.

    before:  logits [B,S,V] = head(x)                 x [B,S,H]
    after:   logits [B,n,V] = head(x[:, -n:])         n: `logits_to_keep`, int64 [1]; all tokens where it is not fed

    The name is the one that transformers' models have for it. n is a graph input with an initializer. A file with such an
    input makes onnxruntime warn whenever it is opened, so this is done in memory, and to the message that the file holds:
    it is done whenever the model is loaded for generation. Why: docs/decisions/0016.

    Args:
        model: a graph.
        reads: x, from `output_layer_input`.
    """
    nodes = model.graph.node
    place = next((index for index, node in enumerate(nodes) if reads in node.output), None)
    if place is None:
        return False
    start, rows, end, axis = (f"{KEPT}.{part}" for part in ("start", "rows", "end", "axis"))
    behind = {rows}
    for node in nodes[place + 1 :]:
        node.input[:] = [rows if name == reads else name for name in node.input]
        if behind & set(node.input):
            behind |= set(node.output)
    nodes.insert(place + 1, onnx.helper.make_node("Slice", [reads, start, end, axis], [rows], name=rows))
    nodes.insert(place + 1, onnx.helper.make_node("Neg", [KEPT], [start], name=start))
    constants = {KEPT: ALL, end: ALL, axis: 1}
    model.graph.initializer.extend(numpy_helper.from_array(np.array([n]), name) for name, n in constants.items())
    model.graph.input.append(onnx.helper.make_tensor_value_info(KEPT, onnx.TensorProto.INT64, [1]))
    for value in (*model.graph.value_info, *model.graph.output):
        # onnxruntime shares buffers of equal shape, and tells by the names of dimensions
        if value.name in behind and len(value.type.tensor_type.shape.dim) == 3:
            value.type.tensor_type.shape.dim[1].dim_param = KEPT
    return True
