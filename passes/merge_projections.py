"""Let the projections of one activation be a single product where a model decodes token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.decoder import is_decoder
from scalefold.compiler.facts import Fact
from scalefold.compiler.graph import Linear
from scalefold.compiler.layer_names import joined, matches
from scalefold.compiler.protocol import Context, Contract, Event, PassResult
from scalefold.compiler.recipe import Weights


@dataclass(frozen=True)
class MergeProjections:
    """Compute what several linear layers make of one activation by one product, and split the result.

    before:  q = x Wq (+ bq);  k = x Wk (+ bk);  v = x Wv (+ bv)
    after:   q, k, v = Split(x [Wq Wk Wv] (+ [bq bk bv]))

    x is [..., K], each W [K, N_i]. A bias that is missing is 0 where another is there: values that were shifted have one.
    Columns do not mix, so the numbers are those of the layers apart; with a scale per column the codes are too. With a
    single row, what a product costs beside its weights is a large part of it: fewer of them decode faster, q, k, v and
    gate, up alike. Encoders gain nothing from it. Figures: docs/decisions/0015.

    The new layer is named after its parts, `self_attn.q_proj+k_proj+v_proj`, and a pattern that finds a part finds it.
    Layers that a recipe treats differently, or whose weight something else reads, stay apart.

    Attributes:
        weights: the recipe's formats.
        alike: further patterns that must find all layers of a group or none.
    """

    name: ClassVar[str] = "merge-projections"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.NORMAL_FORM, Fact.NAMED_LAYERS})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.REASSOCIATED

    weights: Weights = field(default_factory=Weights)
    alike: tuple[str, ...] = ()

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Merge every group of projections; decline one that has to stay apart, with the reason."""
        if not is_decoder(model):
            return PassResult()
        rewrites, declined = [], []
        groups: dict[ir.Value, list[Linear]] = {}
        for layer in graph.linear_layers(model):
            groups.setdefault(layer.x, []).append(layer)
        for group in groups.values():
            if len(group) == 1:
                continue
            name = joined([layer.name for layer in group])
            if name is None:
                declined.append(Event(group[0].matmul, "layers of several modules read its input"))
            elif (obstacle := self._obstacle(group)) is not None:
                declined.append(Event(group[0].matmul, obstacle))
            else:
                rewrites.append(Event(_merge(model, group, name), f"{len(group)} products in one"))
        return PassResult(tuple(rewrites), tuple(declined))

    def _obstacle(self, group: Sequence[Linear]) -> str | None:
        if any(len(layer.weight.uses()) > 1 or layer.weight.is_graph_output() for layer in group):
            return "something else reads one of the weights"
        formats = [self.weights.of(layer.name) for layer in group]
        if any(first != second for first, second in pairwise(formats)):
            return "the recipe gives the layers different formats"
        if formats[0].format == "kmeans" and formats[0].codebook == "tensor":
            return "each layer has a codebook of its own"
        for pattern in self.alike:
            if len({matches(pattern, layer.name) for layer in group}) > 1:
                return f"the recipe's pattern {pattern!r} finds only some of the layers"
        return None


def _merge(model: ir.Model, group: Sequence[Linear], name: str) -> ir.Node:
    """Put one product and a Split where the first of the layers was."""
    first = group[0]
    sizes = [layer.shape[1] for layer in group]
    weight = graph.add_initializer(model, f"{name}.weight", np.concatenate([one.weights() for one in group], axis=1))
    x = first.matmul.inputs[0]  # what it reads may have been merged since the layers were found
    matmul = ir.node("MatMul", [x, weight], name=name)
    made = [matmul]
    biases = [layer.biases() for layer in group]
    if any(bias is not None for bias in biases):
        filled = [
            np.zeros(size, np.float32) if bias is None else bias for bias, size in zip(biases, sizes, strict=True)
        ]
        together = graph.add_initializer(model, f"{name}.bias", np.concatenate(filled))
        made.append(ir.node("Add", [matmul.outputs[0], together], name=f"{name}.biased"))
    for node in made:
        node.outputs[0].type = first.y.type
        if (shape := first.y.shape) is not None:
            node.outputs[0].shape = ir.Shape([*shape[:-1], sum(sizes)])
    lengths = graph.add_initializer(model, f"{name}.sizes", np.array(sizes, dtype=np.int64))
    split = ir.node("Split", [made[-1].outputs[0], lengths], {"axis": -1}, num_outputs=len(group), name=f"{name}.apart")
    graph.insert_before(first.matmul, [*made, split])
    made[-1].outputs[0].name = f"{name}.out"
    for layer, piece in zip(group, split.outputs, strict=True):
        graph.stand_in(layer.y, piece)
    graph.sweep(model)
    return matmul
