"""Write the float attention core as one Attention operator, the form that onnxruntime's CPU runs fastest."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.facts import Fact
from scalefold.compiler.protocol import Context, Contract, Event, PassResult

LOWEST = float(np.finfo(np.float32).min)
OLDEST_OPSET = 20
"""From here to 23 no operator that transformers use changes its meaning."""

NEARLY_LOWEST = -1e38
"""A masked score that the operator does not take for `no key at all`: a row with every key masked keeps its mean."""


@dataclass(frozen=True)
class _Heads:
    """A [B, S, H*D] activation that is split into heads, the number it is multiplied with, and what is done to the heads.

    Attributes:
        x: [B, S, H*D].
        heads: H.
        size: D.
        factor: what the heads are multiplied with.
        rotary: the RotaryEmbedding that turns them.
        cache: the Concat that puts them behind those of earlier tokens.
        whole: x is all heads already, [B, H, T, D], read out of a cache of integers.
    """

    x: ir.Value
    heads: int
    size: int
    factor: float
    rotary: ir.Node | None = None
    cache: ir.Node | None = None
    whole: bool = False


@dataclass(frozen=True)
class _Core:
    """An attention core.

    Attributes:
        turned: the queries as they are multiplied, [B, H, S, D], before they are scaled.
        heads: the result before its heads are joined, [B, H, S, D].
        end: the result, [B, S, H*D].
    """

    query: _Heads
    key: _Heads
    value: _Heads
    turned: ir.Value
    mask: ir.Value | None
    factor: float
    guarded: bool
    heads: ir.Value
    end: ir.Value


@dataclass(frozen=True)
class FuseAttention:
    """Replace products, softmax and the transposes around them by Attention on three-dimensional inputs.

    before:  Reshape(Transpose(MatMul(Softmax(MatMul(heads(q), heads(k)^T) * c + mask), heads(v))))
             heads(x) = Transpose(Reshape(x, [B, S, H, D]), [0, 2, 1, 3])
    after:   Attention(q, k, v, mask; q_num_heads = H, kv_num_heads = H, scale = c)

    before:  keys = Concat(past, RotaryEmbedding(heads(k))),  values = Concat(past', heads(v)), both repeated H / G times
    after:   y, keys, values = Attention(RotaryEmbedding(q), RotaryEmbedding(k), v, mask, past, past'; kv_num_heads = G)

    before:  keys, values as quantize-cache reads them, [B, G, T, D], both repeated H / G times
    after:   Attention(heads(q), keys, values, mask), on four dimensions; the heads are joined as before

    q, k, v and the result are [B, S, H*D]; the mask is additive, [B, 1, S, T], expanded once when it is [B, 1, 1, T];
    T = P + S where P earlier tokens are in the cache, [B, G, P, D]. The
    operator gives zero for a row whose every key carries the lowest float32; that is what the exporter's Where around
    the core does, which goes. Without such a Where the mask is raised to -1e38, so that the row stays the mean of the
    values. The same holds for a mask of minus infinity whose NaN probabilities are set to zero, as the TorchScript exporter
    writes it. Needs opset 23 (onnxruntime 1.23). Figures: docs/decisions/0004.
    """

    name: ClassVar[str] = "fuse-attention"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.REASSOCIATED

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Fuse every attention core that matches; decline a Softmax between products that does not, with a reason."""
        rewrites, declined = [], []
        masks: dict[tuple[ir.Value, bool, object], ir.Value] = {}
        opset = model.graph.opset_imports.get("", 0)
        for softmax in graph.nodes(model, "Softmax"):
            core = _match(softmax) if opset >= OLDEST_OPSET else f"opset {opset} cannot be raised to 23 as it is"
            if isinstance(core, str):
                declined.append(Event(softmax, core))
                continue
            rewrites.append(Event(_fuse(model, softmax, core, masks), f"{core.query.heads} heads of {core.query.size}"))
        if rewrites:
            graph.sweep(model)
            graph.require_opset(model, "", 23)
            assert isinstance(model.graph, ir.Graph)
            model.graph.sort()  # the cache now comes out of the operator, behind some of its readers
        return PassResult(tuple(rewrites), tuple(declined))


def _match(softmax: ir.Node) -> _Core | str:
    probabilities, cleared = _without_nan(softmax)
    weighted = graph.only_consumer(probabilities, "MatMul")
    scores = softmax.inputs[0]
    if weighted is None or scores is None or graph.attribute(softmax, "axis", -1) not in (-1, 3):
        return "no product of probabilities and values behind it"
    product, mask, factor = _scores(scores)
    if product is None:
        return "no product of queries and keys in front of it"
    query, key = _heads(product.inputs[0]), _keys(product.inputs[1])
    value = _heads(weighted.inputs[1])
    if query is None or key is None or value is None:
        return "queries, keys and values are not heads of three-dimensional activations"
    if obstacle := _mismatch(query, key, value):
        return obstacle
    if mask is not None and (mask.shape is None or len(mask.shape) != 4):
        return "the mask is not four-dimensional"
    if mask is not None and mask.shape is not None and mask.shape[3] == 1:
        return "the mask has not a number for every key"
    if factor * query.factor * key.factor <= 0:
        return "its scale is not positive"
    if mask is not None and key.cache in graph.ancestors(mask, lambda _: False):
        return "its mask is computed from its cache"
    if cleared:
        barrier = _barrier(mask)
        if barrier is None:
            return "NaN is cleared from its probabilities, but the mask is not made of 0 and minus infinity"
        cleared = barrier == -math.inf  # a finite barrier never makes NaN: there is nothing to clear
    guard = graph.only_consumer(weighted.outputs[0], "Where")
    if guard is not None and (mask is None or not _zeroes_unattended(guard, weighted.outputs[0], mask)):
        return "its output is selected by a condition other than `every key is masked`"
    core = _reshaped_to_itself(guard.outputs[0] if guard is not None else weighted.outputs[0], product, weighted)
    end = _joined(core, query.heads * query.size)
    if end is None:
        return "the heads are not joined behind it"
    turned = _unscaled(product.inputs[0])[0]
    assert turned is not None
    factor *= query.factor * key.factor
    return _Core(query, key, value, turned, mask, factor, cleared or guard is not None, core, end)


def _mismatch(query: _Heads, key: _Heads, value: _Heads) -> str | None:
    """Why these cannot meet in one operator, or None."""
    if len({part.size for part in (query, key, value)}) > 1 or key.heads != value.heads or query.heads % key.heads:
        return "queries, keys and values differ in heads"
    if query.whole or query.cache is not None or (key.cache is None) != (value.cache is None):
        return "not keys and values both, and they alone, have a cache"
    if key.whole != value.whole:
        return "not keys and values both have a cache of integers"
    if key.cache is None and not key.whole and key.heads != query.heads:
        return "keys and values are repeated, but not from a cache"
    if value.factor != 1.0:
        return "values are scaled"
    return "values are rotated" if value.rotary is not None else None


def _without_nan(softmax: ir.Node) -> tuple[ir.Value, bool]:
    """What Where(IsNaN(p), 0, p) makes of the probabilities p, and whether it is there."""
    out = softmax.outputs[0]
    for choice in graph.consumers(out):
        test = graph.producer(choice.inputs[0], "IsNaN") if choice.op_type == "Where" else None
        if (
            test is not None
            and test.inputs[0] is out
            and choice.inputs[2] is out
            and graph.scalar(choice.inputs[1]) == 0.0
        ):
            return choice.outputs[0], True
    return out, False


def _barrier(mask: ir.Value | None) -> float | None:
    """The negative number in a mask that is made of 0 and it by Where, or None."""
    choice = graph.producer(mask, "Where")
    first, second = map(graph.scalar, choice.inputs[1:]) if choice is not None else (None, None)
    if first is None or second is None or max(first, second) != 0.0:
        return None
    return min(first, second)


def _scores(value: ir.Value) -> tuple[ir.Node | None, ir.Value | None, float]:
    """(product, mask, factor) of factor * product + mask."""
    add = graph.producer(value, "Add")
    candidates: list[tuple[ir.Value | None, ir.Value | None]] = [(value, None)]
    if add is not None:
        candidates = [(add.inputs[0], add.inputs[1]), (add.inputs[1], add.inputs[0])]
    for scaled, mask in candidates:
        inner, factor = _unscaled(scaled)
        product = graph.producer(inner, "MatMul")
        if product is not None:
            return product, mask, factor
    return None, None, 1.0


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    node = graph.producer(value, "Mul", "Div")
    if node is None:
        return value, 1.0
    number = graph.scalar(node.inputs[1])
    if number is not None:
        return node.inputs[0], 1.0 / number if node.op_type == "Div" else number
    number = graph.scalar(node.inputs[0])
    return (node.inputs[1], number) if number is not None and node.op_type == "Mul" else (value, 1.0)


def _heads(value: ir.Value | None) -> _Heads | None:
    """heads(x), possibly scaled, rotated, behind a cache and repeated."""
    inner, factor = _unscaled(value)
    inner = _unrepeated(inner)
    if inner is not None and _is_read_from_integers(inner):
        sizes = list(inner.shape) if inner.shape is not None else []
        heads, size = (sizes[1], sizes[3]) if len(sizes) == 4 else (None, None)
        return (
            _Heads(inner, heads, size, factor, whole=True) if isinstance(heads, int) and isinstance(size, int) else None
        )
    cache = graph.producer(inner, "Concat")
    if cache is not None:
        if len(cache.inputs) != 2 or graph.attribute(cache, "axis") not in (-2, 2):
            return None
        inner = cache.inputs[1]
    rotary = graph.producer(inner, "RotaryEmbedding")
    if rotary is not None:
        if len(rotary.inputs) != 3 or rotary.attributes:
            return None
        inner = rotary.inputs[0]
    transpose = graph.producer(inner, "Transpose")
    if transpose is None or _permutation(transpose) != (0, 2, 1, 3):
        return None
    found = _split(transpose.inputs[0], factor)
    return None if found is None else replace(found, rotary=rotary, cache=cache)


def _is_read_from_integers(value: ir.Value) -> bool:
    """Whether it is a cache that quantize-cache made, possibly behind a prefix."""
    behind = graph.producer(value, "Concat")
    return graph.producer(behind.inputs[-1] if behind is not None else value, "DequantizeLinear") is not None


def _unrepeated(value: ir.Value | None) -> ir.Value | None:
    """The x [B, G, T, D] of x whose heads are each repeated in place: Reshape(Expand(Unsqueeze(x, 2)), [B, H, T, D])."""
    merge = graph.producer(value, "Reshape")
    expand = graph.producer(merge.inputs[0], "Expand") if merge is not None else None
    lift = graph.producer(expand.inputs[0], "Unsqueeze") if expand is not None else None
    if merge is None or expand is None or lift is None or graph.scalar(lift.inputs[1]) != 2:
        return value
    x, wide, flat = lift.inputs[0], expand.outputs[0].shape, merge.outputs[0].shape
    shape = x.shape if x is not None else None
    if wide is None or flat is None or len(wide) != 5 or len(flat) != 4 or (shape is not None and len(shape) != 4):
        return value
    groups, repeats = wide[1], wide[2]
    whole = isinstance(groups, int) and isinstance(repeats, int) and flat[1] == groups * repeats and wide[4] == flat[3]
    return x if whole else value


def _keys(value: ir.Value | None) -> _Heads | None:
    """heads(x) with the last two axes exchanged, by one Transpose, by two, or by way of three dimensions."""
    inner, factor = _unscaled(value)
    node = graph.producer(inner, "Transpose", "Reshape")
    if node is not None and node.op_type == "Reshape":  # [B, H, S, D] -> [B*H, S, D] -> [B*H, D, S] -> [B, H, D, S]
        swap = graph.producer(node.inputs[0], "Transpose")
        merge = graph.producer(swap.inputs[0], "Reshape") if swap is not None else None
        if swap is None or merge is None or _permutation(swap) != (0, 2, 1):
            return None
        found = _heads(merge.inputs[0])
    elif node is not None and _permutation(node) == (0, 2, 3, 1):
        found = _split(node.inputs[0], 1.0)
    elif node is not None and _permutation(node) == (0, 1, 3, 2):
        found = _heads(node.inputs[0])
    else:
        return None
    return None if found is None else replace(found, factor=found.factor * factor)


def _split(value: ir.Value | None, factor: float) -> _Heads | None:
    reshape = graph.producer(value, "Reshape")
    if reshape is None or value is None:
        return None
    x, pieces = reshape.inputs[0], _pieces(reshape)
    width = x.shape[2] if x is not None and x.shape is not None and len(x.shape) == 3 else None
    if x is None or not isinstance(width, int) or len(pieces) != 4 or pieces[3] is None or width % pieces[3]:
        return None
    heads = pieces[2] or width // pieces[3]
    return _Heads(x, heads, pieces[3], factor) if heads * pieces[3] == width else None


def _pieces(reshape: ir.Node) -> list[int | None]:
    """The sizes a Reshape makes, None where unknown: from its result's shape, else from the pieces of its shape input."""
    shape = reshape.outputs[0].shape
    array, concat = graph.constant(reshape.inputs[1]), graph.producer(reshape.inputs[1], "Concat")
    found: list[object] = list(shape) if shape is not None else []
    if array is not None and not all(isinstance(size, int) for size in found[2:]):
        found = array.tolist()
    elif concat is not None and not all(isinstance(size, int) for size in found[2:]):
        found = [graph.scalar(entry) for entry in concat.inputs]
    return [int(size) if isinstance(size, int | float) and size > 0 else None for size in found]


def _permutation(transpose: ir.Node) -> tuple[int, ...]:
    found = graph.attribute(transpose, "perm", ())
    return tuple(found) if isinstance(found, tuple | list) else ()


def _reshaped_to_itself(core: ir.Value, product: ir.Node, weighted: ir.Node) -> ir.Value:
    """What is behind Reshape(core, [B, -1, S, D]), which changes nothing: the TorchScript exporter writes it for sdpa.

    B is read from the core itself, S from the queries and D from the values, all of them [B, H, S, D].
    """
    readers = [node for node in graph.consumers(core) if node.op_type != "Shape"]
    reshape = readers[0] if len(readers) == 1 and readers[0].op_type == "Reshape" else None
    concat = graph.producer(reshape.inputs[1], "Concat") if reshape is not None else None
    if reshape is None or concat is None or len(concat.inputs) != 4 or graph.scalar(concat.inputs[1]) != -1:
        return core
    owners = (core, None, _unscaled(product.inputs[0])[0], weighted.inputs[1])
    same = all(
        owner is None or _is_size(piece, owner, axis)
        for axis, (piece, owner) in enumerate(zip(concat.inputs, owners, strict=True))
    )
    return reshape.outputs[0] if same else core


def _is_size(value: ir.Value | None, owner: ir.Value, axis: int) -> bool:
    """Whether `value` is Unsqueeze(Gather(Shape(owner), axis))."""
    lifted = graph.producer(value, "Unsqueeze")
    gather = graph.producer(lifted.inputs[0], "Gather") if lifted is not None else None
    shape = graph.producer(gather.inputs[0], "Shape") if gather is not None else None
    return (
        gather is not None and shape is not None and shape.inputs[0] is owner and graph.scalar(gather.inputs[1]) == axis
    )


def _joined(value: ir.Value, width: int) -> ir.Value | None:
    """[B, H, S, D] brought back to [B, S, H*D]."""
    transpose = graph.only_consumer(value, "Transpose")
    if transpose is None or _permutation(transpose) != (0, 2, 1, 3):
        return None
    reshape = graph.only_consumer(transpose.outputs[0], "Reshape")
    if reshape is None:
        return None
    pieces = _pieces(reshape)
    return reshape.outputs[0] if len(pieces) == 3 and pieces[2] in (width, None) else None


def _zeroes_unattended(guard: ir.Node, core: ir.Value, mask: ir.Value) -> bool:
    """Whether `guard` is Where(sum(allowed) < 1, 0, core) for the mask Not(allowed) * lowest float32."""
    condition, zero, chosen = guard.inputs
    less = graph.producer(condition, "Less")
    total = graph.producer(less.inputs[0], "ReduceSum") if less is not None else None
    counted = graph.producer(total.inputs[0], "Cast") if total is not None and _over_keys(total) else None
    barred = graph.producer(_unscaled(mask)[0], "Cast")
    negated = graph.producer(barred.inputs[0], "Not") if barred is not None else None
    return (
        chosen is core
        and graph.scalar(zero) == 0.0
        and less is not None
        and graph.scalar(less.inputs[1]) == 1.0
        and counted is not None
        and negated is not None
        and counted.inputs[0] is negated.inputs[0]
        and _unscaled(mask)[1] == LOWEST
    )


def _over_keys(total: ir.Node) -> bool:
    """Whether a sum is over the last axis alone and keeps it."""
    axes = graph.constant(total.inputs[1]) if len(total.inputs) > 1 else None
    return axes is not None and axes.tolist() in ([-1], [3]) and graph.attribute(total, "keepdims", 1) == 1


def _fuse(
    model: ir.Model, softmax: ir.Node, core: _Core, masks: dict[tuple[ir.Value, bool, object], ir.Value]
) -> ir.Node:
    last = core.end.producer()
    assert last is not None
    name = softmax.name or core.end.name
    if core.key.whole:
        return _fuse_heads(model, f"{name}.attention", core, masks)
    turned = [_turned(part, f"{name}.{kind}") for kind, part in (("query", core.query), ("key", core.key))]
    inputs: list[ir.Value | None] = [*(value for value, _ in turned), core.value.x]
    caches = [cache for cache in (core.key.cache, core.value.cache) if cache is not None]
    if core.mask is not None or caches:
        inputs.append(None if core.mask is None else _prepared(model, core, masks))
    inputs += [cache.inputs[0] for cache in caches]
    attributes = {"q_num_heads": core.query.heads, "kv_num_heads": core.key.heads, **_scale(core)}
    fused = ir.node("Attention", inputs, attributes, num_outputs=1 + len(caches), name=f"{name}.attention")
    graph.insert_after(last, [*(node for _, node in turned if node is not None), fused])
    for old, new in zip([core.end, *(cache.outputs[0] for cache in caches)], fused.outputs, strict=True):
        _take_over(old, new)
    return fused


def _fuse_heads(
    model: ir.Model, name: str, core: _Core, masks: dict[tuple[ir.Value, bool, object], ir.Value]
) -> ir.Node:
    """The operator on four dimensions; queries are split, and the result is joined, by the nodes that are there."""
    inputs: list[ir.Value | None] = [core.turned, core.key.x, core.value.x]
    if core.mask is not None:
        inputs.append(_prepared(model, core, masks))
    fused = ir.node("Attention", inputs, _scale(core), name=name)
    last = core.heads.producer()
    assert last is not None
    graph.insert_after(last, [fused])
    _take_over(core.heads, fused.outputs[0])
    return fused


def _scale(core: _Core) -> dict[str, int | float]:
    """The factor as an attribute, unless it is the operator's own."""
    return {} if math.isclose(core.factor, core.query.size**-0.5, rel_tol=1e-6) else {"scale": core.factor}


def _turned(part: _Heads, name: str) -> tuple[ir.Value, ir.Node | None]:
    """The x [B, S, H*D] as the operator takes it, and the RotaryEmbedding that turns it there, if any."""
    if part.rotary is None:
        return part.x, None
    rotary = ir.node("RotaryEmbedding", [part.x, *part.rotary.inputs[1:]], {"num_heads": part.heads}, name=name)
    return graph.like(rotary.outputs[0], part.x), rotary


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Let `new` stand for `old`, under its name."""
    graph.like(new, old)
    name = old.name
    graph.bypass(old, new)
    old.name, new.name = f"{name}_joined", name


def _prepared(model: ir.Model, core: _Core, masks: dict[tuple[ir.Value, bool, object], ir.Value]) -> ir.Value:
    """The mask as the operator takes it, made once for all layers that share it."""
    mask = core.mask
    assert mask is not None
    key = (mask, core.guarded, _queries(core.query.x))
    if key in masks:
        return masks[key]
    result, new = mask, []
    if not core.guarded:
        lowest = graph.add_initializer(model, "attention_mask.lowest", np.array(NEARLY_LOWEST, dtype=np.float32))
        new.append(ir.node("Max", [mask, lowest], name=f"{core.end.name}.mask_raised"))
        result = graph.like(new[-1].outputs[0], mask)
    if mask.shape is None or mask.shape[2] == 1:
        one = graph.add_initializer(model, "attention_mask.one", np.ones(1, dtype=np.int64))
        length = ir.node("Shape", [core.query.x], {"start": 1, "end": 2}, name=f"{core.end.name}.mask_length")
        shape = ir.node("Concat", [one, one, length.outputs[0], one], {"axis": 0}, name=f"{core.end.name}.mask_shape")
        expand = ir.node("Expand", [result, shape.outputs[0]], name=f"{core.end.name}.mask_expanded")
        new += [length, shape, expand]
        result = expand.outputs[0]
        result.type = mask.type
    first = core.query.x.producer()
    anchor = _later(mask.producer(), first)
    if anchor is None:
        assert isinstance(model.graph, ir.Graph)
        model.graph.insert_before(model.graph[0], new)
    elif new:
        graph.insert_after(anchor, new)
    masks[key] = result
    return result


def _queries(x: ir.Value) -> object:
    """What tells numbers of queries apart: the size or symbol of [B, S, C], or the value itself when S has none."""
    size = x.shape[1] if x.shape is not None else None
    known = size if isinstance(size, int) else size.value if size is not None else None
    return x if known is None else known


def _later(first: ir.Node | None, second: ir.Node | None) -> ir.Node | None:
    """Whichever of two nodes of one graph comes later in it."""
    if first is None or second is None:
        return first or second
    assert first.graph is not None
    return next(node for node in reversed(first.graph) if node in (first, second))
