"""Undo the merging of batch and heads in attention with ALiBi, so that it reads like any other attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.facts import Fact
from scalefold.compiler.protocol import Context, Contract, Event, PassResult


@dataclass(frozen=True)
class _Merged:
    """Attention on [B*H, S, D]: what it is made of, and the two values that are [B, H, ...] again."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    factor: ir.Value | None
    bias: ir.Value
    mask: ir.Value
    total: ir.Value
    out: ir.Value
    heads: int


@dataclass(frozen=True)
class UnmergeHeads:
    """Compute BLOOM's attention on four dimensions, its ALiBi slopes added to the mask.

    before:  a = Reshape(Reshape(q) Reshape(k)^T * c + alibi, [B, H, S, T]) + mask;   Reshape(Reshape(Softmax(a)) Reshape(v))
    after:   a = q k^T * c + (Reshape(alibi, [B, H, 1, T]) + mask);                    Softmax(a) v

    q, k and v are [B, H, S or T, D], merged to [B*H, ., D] before; alibi is [B*H, 1, T], the mask [B, 1, S, T]. (ALiBi:
    Press et al. 2021, arXiv 2108.12409.) Slopes and mask are added once for all layers; fuse-attention takes the rest.
    Heads that were picked out of a fused projection go by way of [B, S, H*D], which moves nothing.
    """

    name: ClassVar[str] = "unmerge-heads"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.REASSOCIATED

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Rewrite every attention core that is written this way."""
        rewrites = []
        sums: dict[tuple[ir.Value, ir.Value], ir.Value] = {}
        for softmax in graph.nodes(model, "Softmax"):
            found = _match(softmax)
            if found is not None:
                _rewrite(model, softmax, found, sums)
                rewrites.append(Event(softmax, f"{found.heads} heads apart"))
        if rewrites:
            graph.sweep(model)
        return PassResult(tuple(rewrites))


def _match(softmax: ir.Node) -> _Merged | None:
    total = graph.producer(softmax.inputs[0], "Add")
    for index in (0, 1):
        scores = graph.producer(total.inputs[index], "Reshape") if total is not None else None
        biased = graph.producer(scores.inputs[0], "Add") if scores is not None else None
        if total is None or scores is None or biased is None:
            continue
        mask, shape = total.inputs[1 - index], scores.outputs[0].shape
        heads = shape[1] if shape is not None and len(shape) == 4 else None
        product, factor = _product(biased.inputs[0])
        bias = biased.inputs[1]
        outer = _outer(softmax)
        if product is None or outer is None or mask is None or bias is None or not isinstance(heads, int):
            continue
        query, key = _apart(product.inputs[0], heads), _apart_transposed(product.inputs[1], heads)
        value = _apart(outer[0], heads)
        if query is None or key is None or value is None or graph.rank(bias) != 3:
            continue
        return _Merged(query, key, value, factor, bias, mask, total.outputs[0], outer[1], heads)
    return None


def _product(value: ir.Value | None) -> tuple[ir.Node | None, ir.Value | None]:
    """(MatMul, c) of MatMul(...) * c, c a number."""
    scaled = graph.producer(value, "Mul")
    if scaled is None:
        return graph.producer(value, "MatMul"), None
    for index in (0, 1):
        if graph.scalar(scaled.inputs[1 - index]) is not None:
            return graph.producer(scaled.inputs[index], "MatMul"), scaled.inputs[1 - index]
    return None, None


def _outer(softmax: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """(v, out) of out = Reshape(MatMul(Reshape(p), v)), out four-dimensional."""
    merge = graph.only_consumer(softmax.outputs[0], "Reshape")
    weighted = graph.only_consumer(merge.outputs[0], "MatMul") if merge is not None else None
    split = graph.only_consumer(weighted.outputs[0], "Reshape") if weighted is not None else None
    if merge is None or weighted is None or split is None or weighted.inputs[0] is not merge.outputs[0]:
        return None
    values, out = weighted.inputs[1], split.outputs[0]
    return (values, out) if values is not None and graph.rank(out) == 4 else None


def _apart(value: ir.Value | None, heads: int) -> ir.Value | None:
    """The x [B, H, S, D] of Reshape(x) [B*H, S, D]."""
    merge = graph.producer(value, "Reshape")
    x = merge.inputs[0] if merge is not None else None
    if value is None or x is None or x.shape is None or len(x.shape) != 4 or graph.rank(value) != 3:
        return None
    return x if x.shape[1] == heads and value.shape is not None and x.shape[3] == value.shape[2] else None


def _apart_transposed(value: ir.Value | None, heads: int) -> ir.Value | None:
    swap = graph.producer(value, "Transpose")
    if swap is None or tuple(graph.attribute(swap, "perm", ())) != (0, 2, 1):  # type: ignore[arg-type]
        return None
    return _apart(swap.inputs[0], heads)


def _rewrite(model: ir.Model, softmax: ir.Node, core: _Merged, sums: dict[tuple[ir.Value, ir.Value], ir.Value]) -> None:
    name = softmax.name or softmax.outputs[0].name or "attention"
    for state in (core.query, core.key, core.value):
        _flatten_picked(model, state, core.heads)
    if (core.bias, core.mask) not in sums:
        sums[core.bias, core.mask] = _biased_mask(model, core, name)
    swap = ir.node("Transpose", [core.key], {"perm": [0, 1, 3, 2]}, name=f"{name}.keys")
    nodes = [swap, ir.node("MatMul", [core.query, swap.outputs[0]], name=f"{name}.scores")]
    if core.factor is not None:
        nodes.append(ir.node("Mul", [nodes[-1].outputs[0], core.factor], name=f"{name}.scaled"))
    nodes.append(ir.node("Add", [nodes[-1].outputs[0], sums[core.bias, core.mask]], name=f"{name}.biased"))
    swap.outputs[0].type = core.key.type
    for node in nodes[1:]:
        graph.like(node.outputs[0], core.total)
    graph.insert_before(softmax, nodes)
    softmax.replace_input_with(0, nodes[-1].outputs[0])
    weighted = ir.node("MatMul", [softmax.outputs[0], core.value], name=f"{name}.weighted")
    graph.like(weighted.outputs[0], core.out)
    last = core.out.producer()
    assert last is not None
    graph.insert_after(last, [weighted])
    graph.bypass(core.out, weighted.outputs[0])


def _biased_mask(model: ir.Model, core: _Merged, name: str) -> ir.Value:
    """Slopes and mask in one [B, H, S, T], behind whichever is computed last."""
    outer = graph.add_initializer(model, "alibi.batch_and_heads", np.array([-1, core.heads], dtype=np.int64))
    inner = ir.node("Shape", [core.bias], {"start": 1}, name=f"{name}.alibi_inner")
    shape = ir.node("Concat", [outer, inner.outputs[0]], {"axis": 0}, name=f"{name}.alibi_shape")
    split = ir.node("Reshape", [core.bias, shape.outputs[0]], name=f"{name}.alibi")
    total = ir.node("Add", [split.outputs[0], core.mask], name=f"{name}.alibi_and_mask")
    split.outputs[0].type = core.bias.type
    graph.like(total.outputs[0], core.total)
    made = core.total.producer()
    assert made is not None
    graph.insert_before(made, [inner, shape, split, total])
    return total.outputs[0]


def _flatten_picked(model: ir.Model, state: ir.Value, heads: int) -> None:
    """Let heads [B, S, H, D] that a Gather picked go by way of [B, S, H*D], where there is a Transpose behind it."""
    cache = graph.producer(state, "Concat")
    transpose = graph.producer(cache.inputs[1] if cache is not None else state, "Transpose")
    picked = transpose.inputs[0] if transpose is not None else None
    if transpose is None or picked is None or graph.producer(picked, "Gather") is None or picked.shape is None:
        return
    size = picked.shape[3]
    if len(picked.shape) != 4 or not isinstance(size, int):
        return
    name = transpose.name or picked.name
    sizes = [
        graph.add_initializer(model, f"{name}.{kind}", np.array(numbers, dtype=np.int64))
        for kind, numbers in (("joined", [0, 0, heads * size]), ("split", [0, 0, heads, size]))
    ]
    join = ir.node("Reshape", [picked, sizes[0]], name=f"{name}.join")
    join.outputs[0].type, join.outputs[0].shape = picked.type, ir.Shape([*picked.shape[:2], heads * size])
    split = ir.node("Reshape", [join.outputs[0], sizes[1]], name=f"{name}.split")
    graph.like(split.outputs[0], picked)
    graph.insert_before(transpose, [join, split])
    transpose.replace_input_with(0, split.outputs[0])
