"""Letting whoever runs a decoder ask for the logits of the last tokens alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.channel_ranges import PRODUCTS, float_input
from scalefold.compiler.decoder import LOGITS, is_decoder

KEPT = "logits_to_keep"
"""The input that says for how many of the last tokens there are logits; it need not be fed."""

ALL = np.iinfo(np.int64).max


def cut_logits(model: ir.Model) -> bool:
    """Let a decoder compute the logits of its last n tokens, and say whether that can be done.

    before:  logits [B,S,V] = head(x)                 x [B,S,H]
    after:   logits [B,n,V] = head(x[:, -n:])         n: `logits_to_keep`, int64 [1]; all tokens where it is not fed

    The name is the one that transformers' models have for it. n is a graph input with an initializer. A file with such an
    input makes onnxruntime warn whenever it is opened, so this is done in memory. Why: docs/decisions/0016.

    Args:
        model: a float or a lowered graph; left as it was where the output layer cannot be told, what it reads makes other
            outputs too, or there is such an input.
    """
    logits = next((value for value in model.graph.outputs if value.name == LOGITS), None)
    if logits is None or not is_decoder(model) or any(value.name == KEPT for value in model.graph.inputs):
        return False
    head = next((node for node in reversed(graph.nodes(model, *PRODUCTS)) if _makes(node, logits)), None)
    x = float_input(head) if head is not None else None
    if x is None or x.producer() is None or x.is_graph_output() or graph.rank(x) != 3:
        return False
    behind = graph.descendants(x)
    if {value for node in behind for value in node.outputs if value.is_graph_output()} != {logits}:
        return False
    _cut(model, x, behind)
    return True


def _makes(product: ir.Node, logits: ir.Value) -> bool:
    """Whether logits come from a product, and no other one in between."""
    made = product.outputs[0]
    return made is logits or any(logits in node.outputs for node in graph.descendants(made))


def _cut(model: ir.Model, x: ir.Value, behind: set[ir.Node]) -> None:
    readers = list(x.uses())
    kept = graph.add_initializer(model, KEPT, np.array([ALL], dtype=np.int64))
    model.graph.inputs.append(kept)
    end = graph.add_initializer(model, f"{KEPT}.end", np.array([ALL], dtype=np.int64))
    axis = graph.add_initializer(model, f"{KEPT}.axis", np.array([1], dtype=np.int64))
    start = ir.node("Neg", [kept], name=f"{KEPT}.start")
    cut = ir.node("Slice", [x, start.outputs[0], end, axis], name=f"{KEPT}.rows")
    graph.like(start.outputs[0], kept)
    graph.like(cut.outputs[0], x)
    made = x.producer()
    assert made is not None
    graph.insert_after(made, [start, cut])
    for use in readers:
        use.node.replace_input_with(use.idx, cut.outputs[0])
    for value in (cut.outputs[0], *(value for node in behind for value in node.outputs)):
        # onnxruntime shares buffers of equal shape, and tells by the names of dimensions
        if value.shape is not None and len(value.shape) == 3:
            value.shape = ir.Shape([value.shape[0], KEPT, value.shape[2]])
