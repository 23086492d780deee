"""Let a caller ask a decoder for the logits of the last tokens alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.channel_ranges import PRODUCTS, float_input
from scalefold.compiler.decoder import KEPT, LOGITS, is_decoder
from scalefold.compiler.facts import Fact
from scalefold.compiler.protocol import Context, Contract, Event, PassResult

ALL = np.iinfo(np.int64).max


@dataclass(frozen=True)
class KeepLogits:
    """Take the last n tokens out of what the output layer reads; n is an input that need not be fed.

    before:  logits [B,S,V] = head(x)                 x [B,S,H]
    after:   logits [B,n,V] = head(x[:, -n:])         n: `logits_to_keep`, int64 [1]; all tokens where it is not fed

    The name is the one that transformers' models have for it. n is a graph input with an initializer, which onnxruntime
    lists apart from the inputs that must be fed: whoever does not know of it gets all logits, as before. A prompt needs
    only those of its last token; the others of 512 tokens of SmolLM2 are 100 MB. Figures: docs/decisions/0016.
    """

    name: ClassVar[str] = "keep-logits"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Cut what the output layer of a decoder reads; decline where that makes more than the logits."""
        logits = next((value for value in model.graph.outputs if value.name == LOGITS), None)
        if logits is None or not is_decoder(model) or any(value.name == KEPT for value in model.graph.inputs):
            return PassResult()
        head = next((node for node in reversed(graph.nodes(model, *PRODUCTS)) if _makes(node, logits)), None)
        x = float_input(head) if head is not None else None
        if head is None or x is None or x.producer() is None or graph.rank(x) != 3:
            return PassResult(
                (), (Event(logits.producer() or model.graph[-1], "no product makes the logits of [B,S,H]"),)
            )
        behind = graph.descendants(x)
        if x.is_graph_output() or {value for node in behind for value in node.outputs if value.is_graph_output()} != {
            logits
        }:
            return PassResult((), (Event(head, "what it reads makes other outputs too"),))
        _cut(model, x, behind)
        return PassResult((Event(head, f"{KEPT} of its rows"),))


def _makes(product: ir.Node, logits: ir.Value) -> bool:
    """Whether logits come from a product, and no other one in between."""
    made = product.outputs[0]
    return made is logits or any(logits in node.outputs for node in graph.descendants(made))


def _cut(model: ir.Model, x: ir.Value, behind: set[ir.Node]) -> None:
    kept = graph.add_initializer(model, KEPT, np.array([ALL], dtype=np.int64))
    model.graph.inputs.append(kept)
    end = graph.add_initializer(model, f"{KEPT}.end", np.array([ALL], dtype=np.int64))
    axis = graph.add_initializer(model, f"{KEPT}.axis", np.array([1], dtype=np.int64))
    start = ir.node("Neg", [kept], name=f"{KEPT}.start")
    cut = ir.node("Slice", [x, start.outputs[0], end, axis], name=f"{KEPT}.rows")
    start.outputs[0].type, start.outputs[0].shape = kept.type, kept.shape
    cut.outputs[0].type = x.type
    readers = [use for use in x.uses() if use.node in behind]
    made = x.producer()
    assert made is not None
    graph.insert_after(made, [start, cut])
    for use in readers:
        use.node.replace_input_with(use.idx, cut.outputs[0])
    cut.outputs[0].shape = x.shape
    for value in (cut.outputs[0], *(value for node in behind for value in node.outputs)):
        # onnxruntime shares buffers of equal shape, and tells by the names of dimensions
        if value.shape is not None and len(value.shape) == 3:
            value.shape = ir.Shape([value.shape[0], KEPT, value.shape[2]])
