"""Write what a decoder does between its products as operators of scalefold's own kernel library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.facts import Fact
from scalefold.compiler.kernel_library import DOMAIN, HEAD_LANES, LARGEST_HEAD, VERSION, to_bfloat
from scalefold.compiler.protocol import Context, Contract, Event, PassResult


@dataclass(frozen=True)
class FuseDecoder:
    """Fuse attention behind a cache, and gated units; see compiler/kernels.cpp.

    before:  q, k, v = Split(x);  Attention(RotaryEmbedding(q, cos, sin), RotaryEmbedding(k, cos, sin), v, mask, pk, pv)
    after:   CachedAttention(x, pk, pv, mask, cos, sin)                                  or without angles

    before:  Attention(.., Concat(fk, pk), Concat(fv, pv)) -> Slice(n:) of keys and of values      n rows baked in
    after:   CachedAttention(x, pk, pv, mask, cos, sin, fk, fv)                      and nothing is joined or cut

    before:  g, u = Split(x);  Mul(Mul(g, Sigmoid(g)), u)                                or QuickGelu of alpha 1
    after:   GatedSilu(x)

    x is [B, S, (H + 2 G) D] in the first, a cache [B, G, P, D], and one head of keys and values serves H / G of queries.
    A step of a decoder is hundreds of nodes that take as long to start as to run: with fuse-kernels this leaves a third
    of them. Queries, keys, values and the shares of attention are rounded to bfloat16, in a prompt and one by one, and
    the cache holds keys and values so; prompts leave out the keys that no query of a block sees.
    """

    name: ClassVar[str] = "fuse-decoder"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Fuse each pattern where it stands; decline attention behind a cache that is another."""
        declined: list[Event] = []
        rewrites = [*_attentions(model, declined), *_gates(model)]
        if rewrites:
            graph.require_opset(model, DOMAIN, VERSION)
            graph.sweep(model)
        return PassResult(tuple(rewrites), tuple(declined))


def _attentions(model: ir.Model, declined: list[Event]) -> Iterator[Event]:
    for attention in graph.nodes(model, "Attention"):
        if len(attention.outputs) < 3 or len(attention.inputs) < 6:
            continue
        heads, groups = (_integer(attention, name) for name in ("q_num_heads", "kv_num_heads"))
        mask, past = attention.inputs[3], attention.inputs[4:6]
        split = _origin(attention)
        reason = _obstacle(attention, split, heads, groups)
        if reason or split is None:
            declined.append(Event(attention, reason))
            continue
        rotary = graph.producer(attention.inputs[0], "RotaryEmbedding")
        angles = list(rotary.inputs[1:3]) if rotary is not None else []
        attributes = {"heads": heads, "groups": groups, "scale": _scale(attention, _sizes(split)[0] // heads)}
        inputs, outputs = [split.inputs[0], *past, mask, *angles], list(attention.outputs[:3])
        keys, values = (_front(value, out) for value, out in zip(past, outputs[1:], strict=True))
        if keys is not None and values is not None and keys.rows.shape == values.rows.shape:
            inputs[1:3], outputs[1:] = [keys.past, values.past], [keys.present, values.present]
            inputs += [None] * (6 - len(inputs))
            for front, kind in ((keys, "keys"), (values, "values")):
                inputs.append(graph.add_initializer(model, f"{attention.name}.{kind}_in_front", to_bfloat(front.rows)))
        fused = ir.node("CachedAttention", inputs, attributes, num_outputs=3, domain=DOMAIN, name=attention.name)
        graph.insert_after(outputs[0].producer() or attention, [fused])
        for old, new in zip(outputs, fused.outputs, strict=True):
            graph.stand_in(old, new)
        yield Event(fused, "attention and its cache by one operator")


@dataclass(frozen=True)
class _Front:
    """What stands in front of every cache: its rows [1, G, n, D], and what comes in and goes out without it."""

    rows: npt.NDArray[np.float32]
    past: ir.Value
    present: ir.Value


def _front(whole: ir.Value | None, grown: ir.Value) -> _Front | None:
    """The rows that bake-prefix joins to a cache and cuts from what attention gives back; None where it is not so."""
    join, cut = graph.producer(whole, "Concat"), graph.only_consumer(grown, "Slice")
    if join is None or cut is None or whole is None or graph.only_consumer(whole) is None or len(cut.inputs) != 4:
        return None
    rows, past = _same_for_all(join.inputs[0]), join.inputs[1]
    if rows is None or past is None or len(join.inputs) != 2 or graph.attribute(join, "axis", 0) != 2:
        return None
    start, end, axis = map(graph.scalar, cut.inputs[1:])
    if start != rows.shape[2] or axis != 2 or end is None or end < np.iinfo(np.int32).max:
        return None
    return _Front(rows, past, cut.outputs[0])


def _same_for_all(value: ir.Value | None) -> npt.NDArray[np.float32] | None:
    """Rows [1, G, n, D] that are repeated for each sequence of a batch, or a part of such; None for anything else."""
    split = graph.producer(value, "Split")
    expand = graph.producer(value if split is None else split.inputs[0], "Expand")
    found = graph.constant(expand.inputs[0]) if expand is not None else None
    if expand is None or found is None or found.dtype != np.float32 or found.ndim != 4 or len(found) != 1:
        return None
    array = np.asarray(found, dtype=np.float32)
    shape = expand.outputs[0].shape
    if shape is None or list(shape[1:]) != list(array.shape[1:]):
        return None
    if split is None or value is None:
        return array
    sizes, place = _sizes(split, axis=1), list(split.outputs).index(value)
    if graph.attribute(split, "axis", 0) != 1 or not sizes:
        return None
    return array[:, sum(sizes[:place]) : sum(sizes[: place + 1])]


def _integer(node: ir.Node, name: str) -> int:
    found = graph.attribute(node, name, 0)
    return found if isinstance(found, int) else 0


def _scale(attention: ir.Node, size: int) -> float:
    """What the products of queries and keys are multiplied by in all."""
    scale, (_, factor) = graph.attribute(attention, "scale"), _unscaled(_unrotated(attention.inputs[0]))
    return factor * (scale if isinstance(scale, float) else size**-0.5)


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """Queries before they are multiplied by one constant, and that constant; 1 where there is none."""
    product = graph.producer(value, "Mul")
    for x, other in (product.inputs[:2], product.inputs[1::-1]) if product is not None else ():
        if (factor := graph.scalar(other)) is not None and factor > 0:
            return x, factor
    return value, 1.0


def _sizes(split: ir.Node, axis: int = -1) -> list[int]:
    """How many numbers each output of a Split has, where that is known."""
    sizes = graph.constant(split.inputs[1]) if len(split.inputs) > 1 else None
    if sizes is not None:
        return [int(size) for size in sizes]
    x = split.inputs[0]
    width = x.shape[axis] if x is not None and x.shape is not None else None
    parts = len(split.outputs)
    return [width // parts] * parts if isinstance(width, int) and width % parts == 0 else []


def _origin(attention: ir.Node) -> ir.Node | None:
    """The Split that queries, keys and values come from, rotated or scaled or as they are."""
    values = [_unscaled(_unrotated(attention.inputs[0]))[0], _unrotated(attention.inputs[1]), attention.inputs[2]]
    splits = {graph.producer(value, "Split") for value in values}
    split = splits.pop() if len(splits) == 1 else None
    return split if split is not None and list(split.outputs) == values else None


def _unrotated(value: ir.Value | None) -> ir.Value | None:
    rotary = graph.producer(value, "RotaryEmbedding")
    return value if rotary is None else rotary.inputs[0]


def _obstacle(attention: ir.Node, split: ir.Node | None, heads: int, groups: int) -> str:
    if split is None or graph.attribute(split, "axis", 0) not in (-1, 2):
        return "its queries, keys and values do not lie side by side"
    if set(attention.attributes) - {"q_num_heads", "kv_num_heads", "scale", "is_causal", "softcap"} or any(
        graph.attribute(attention, name, 0) for name in ("is_causal", "softcap")
    ):
        return "it is no plain attention"
    mask, sizes = attention.inputs[3], _sizes(split)
    if mask is None or mask.dtype != ir.DataType.FLOAT or graph.rank(mask) != 4 or any(attention.inputs[6:]):
        return "it has no mask of floats [batch, heads, tokens, keys]"
    if any(value is None or value.dtype != ir.DataType.FLOAT for value in attention.inputs[4:6]):
        return "its cache is not float"
    if not sizes or not heads or not groups or heads % groups:
        return "its heads are not known"
    size = sizes[0] // heads
    if sizes != [heads * size, groups * size, groups * size] or size % HEAD_LANES or size > LARGEST_HEAD:
        return f"its heads are of {size} numbers, no multiple of {HEAD_LANES} up to {LARGEST_HEAD}"
    rotaries = [graph.producer(value, "RotaryEmbedding") for value in attention.inputs[:2]]
    if rotaries == [None, None]:
        return ""
    queries, keys = rotaries
    if queries is None or keys is None or any(queries.inputs[i] is not keys.inputs[i] for i in (1, 2)):
        return "queries and keys are rotated by different angles"
    plain = all(
        len(node.inputs) == 3
        and not _integer(node, "interleaved")
        and _integer(node, "rotary_embedding_dim") in (0, size)
        and _integer(node, "num_heads") == count
        for node, count in ((queries, heads), (keys, groups))
    )
    return "" if plain else "it is rotated in another way"


def _gates(model: ir.Model) -> Iterator[Event]:
    for product in graph.nodes(model, "Mul"):
        for gated, up in (product.inputs[:2], product.inputs[1::-1]):
            gate = _silu_input(gated)
            split = graph.producer(gate, "Split")
            if split is None or up is None or list(split.outputs) != [gate, up] or not _halves(split):
                continue
            fused = ir.node("GatedSilu", [split.inputs[0]], domain=DOMAIN, name=product.name)
            graph.insert_after(product, [fused])
            graph.stand_in(product.outputs[0], fused.outputs[0])
            yield Event(fused, "gated unit by one operator")
            break


def _silu_input(value: ir.Value | None) -> ir.Value | None:
    """X where a value is x Sigmoid(x), or None."""
    node = graph.producer(value, "Mul", "QuickGelu")
    if node is None or value is None or graph.only_consumer(value) is None:
        return None
    if node.op_type == "QuickGelu":
        return node.inputs[0] if graph.attribute(node, "alpha", 1.702) == 1.0 else None
    for x, other in (node.inputs[:2], node.inputs[1::-1]):
        sigmoid = graph.producer(other, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is x:
            return x
    return None


def _halves(split: ir.Node) -> bool:
    x = split.inputs[0]
    rank = graph.rank(x) or 0
    if x is None or x.dtype != ir.DataType.FLOAT:
        return False
    return len(set(_sizes(split))) == 1 and graph.attribute(split, "axis", 0) in (-1, rank - 1)
