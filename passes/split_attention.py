"""Attention that adds up in one order: at once, one by one, padded, in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.facts import Fact
from scalefold.compiler.protocol import Context, Contract, Event, PassResult

COLUMNS = 16
"""Columns of ones behind the probabilities. One column would be a product of a vector, which adds in another order."""


@dataclass(frozen=True)
class SplitAttention:
    """Write Attention with a cache as products whose every row is added up in the same order, whatever stands beside it.

    before:  y, keys, values = Attention(q, k, v, mask, past, past'; q_num_heads = H, kv_num_heads = G)
    after:   keys = Concat(past, heads(k)),   values = Concat(past', heads(v))
             e = Exp(s - ReduceMax(s)),       s = groups(q) * c @ keys^T + mask
             y = join((e @ values) / (e @ 1))

    q [B, S, H*D] is multiplied as groups(q) [B, G, S*H/G, D], so that not even one token makes a product of one row: that
    has a kernel of its own in onnxruntime, and it adds in another order. Where H = G the first token's row stands there
    once more, [B, G, 1 + S, D], and is dropped from the result. The sum under the softmax is a product as well:
    Softmax adds in lanes that move with the number of keys. A masked key adds an exact zero. So a model whose linear
    layers are integer and whose ranges are static gives the same bits with and without a cache; padded on the left
    as long as past and new tokens are at most 256 (products of more are added in blocks, which padding moves).
    Needs a mask that leaves each query a key, as a causal one does. Figures: docs/decisions/0019.
    """

    name: ClassVar[str] = "split-attention"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.REASSOCIATED

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Split every Attention that has a cache; decline with a reason what has no mask, or not a known form."""
        rewrites, declined = [], []
        shared = _Shared(model)
        for attention in graph.nodes(model, "Attention"):
            heads, groups = _heads(attention)
            if groups and not any(
                attention.inputs[4:]
            ):  # an encoder's; keys in 8 bits have four dimensions and no groups
                continue
            if obstacle := _obstacle(attention):
                declined.append(Event(attention, obstacle))
                continue
            _split(attention, shared)
            rewrites.append(Event(attention, f"{heads} heads over {groups}"))
        return PassResult(tuple(rewrites), tuple(declined))


def _heads(attention: ir.Node) -> tuple[int, int]:
    """(H, G) of Attention on three dimensions, (0, 0) on four."""
    heads, groups = graph.attribute(attention, "q_num_heads", 0), graph.attribute(attention, "kv_num_heads", 0)
    assert isinstance(heads, int) and isinstance(groups, int)
    return heads, groups


def _obstacle(attention: ir.Node) -> str | None:
    """Why this one is left as it is, or None."""
    heads, groups = _heads(attention)
    if len(attention.inputs) != 6 or None in attention.inputs or len(attention.outputs) < 3:
        return "it has no mask or no cache of floats"
    if not groups:
        return "its queries, keys and values have four dimensions"
    if set(attention.attributes) - {"q_num_heads", "kv_num_heads", "scale"}:
        return "it has attributes besides heads and scale"
    mask = attention.inputs[3].shape if attention.inputs[3] is not None else None
    if mask is not None and (len(mask) != 4 or mask[2] == 1 or (heads > groups and mask[1] != 1)):
        return f"its mask is {mask}, not one row a query for all heads that share keys"
    return "the width of its heads is not known" if _width(attention) is None else None


def _width(attention: ir.Node) -> int | None:
    """D, from the past keys [B, G, P, D] or from what they are joined of."""
    past = attention.inputs[4]
    joined = graph.producer(past, "Concat")
    for value in (past, *(() if joined is None else joined.inputs)):
        width = value.shape[3] if value is not None and value.shape is not None and len(value.shape) == 4 else None
        if isinstance(width, int):
            return width
    return None


@dataclass(frozen=True)
class _Masked:
    """What follows from a mask [B, 1, S, T] alone, for G groups of R queries that share keys. S' is S, or 1 + S where R = 1.

    Attributes:
        mask: [B, 1, S', 1, T].
        by_token: the sizes [0, G, S', R, T] of a Reshape.
        by_row: the sizes [0, G, -1, T] of a Reshape.
        ones: [T, COLUMNS].
    """

    mask: ir.Value
    by_token: ir.Value
    by_row: ir.Value
    ones: ir.Value


@dataclass
class _Shared:
    """Constants, and what follows from a mask: made once, for all layers."""

    model: ir.Model
    constants: dict[str, ir.Value] = field(default_factory=dict)
    masked: dict[tuple[ir.Value, int, int], _Masked] = field(default_factory=dict)

    def whole(self, *numbers: int) -> ir.Value:
        """An initializer int64[n]."""
        return self.constant("_".join(map(str, numbers)).replace("-", "m"), np.array(numbers, dtype=np.int64))

    def constant(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        """An initializer, made once under its name."""
        if name not in self.constants:
            self.constants[name] = graph.add_initializer(self.model, f"split_attention.{name}", array)
        return self.constants[name]


@dataclass(frozen=True)
class _Nodes:
    """New nodes of one layer, in order."""

    prefix: str
    made: list[ir.Node] = field(default_factory=list)

    def make(
        self, op_type: str, inputs: Sequence[ir.Value | None], /, **attributes: int | float | Sequence[int]
    ) -> ir.Value:
        """The output of a new node."""
        self.made.append(ir.node(op_type, inputs, attributes, name=f"{self.prefix}.split_{len(self.made)}"))
        return self.made[-1].outputs[0]


def _masked(mask: ir.Value, groups: int, queries: int, shared: _Shared, nodes: _Nodes) -> _Masked:
    """What follows from a mask; made by the first layer that has it, in front of all others."""
    key = (mask, groups, queries)
    if key not in shared.masked:
        make, whole = nodes.make, shared.whole
        if queries == 1:
            mask = _first_twice(mask, shared, nodes)
        lengths = make("Shape", [mask], start=2)
        new, seen = make("Gather", [lengths, whole(0)]), make("Gather", [lengths, whole(1)])
        one = shared.constant("ones", np.ones((1, COLUMNS), dtype=np.float32))
        shared.masked[key] = _Masked(
            mask=make("Unsqueeze", [mask, whole(3)]),
            by_token=make("Concat", [whole(0, groups), new, whole(queries), seen], axis=0),
            by_row=make("Concat", [whole(0, groups, -1), seen], axis=0),
            ones=make("Expand", [one, make("Concat", [seen, whole(COLUMNS)], axis=0)]),
        )
    return shared.masked[key]


def _first_twice(x: ir.Value, shared: _Shared, nodes: _Nodes) -> ir.Value:
    """[B, G, 1 + S, X] of [B, G, S, X]: its first row stands there twice."""
    first = nodes.make("Slice", [x, shared.whole(0), shared.whole(1), shared.whole(2)])
    return nodes.make("Concat", [first, x], axis=2)


def _split(attention: ir.Node, shared: _Shared) -> None:
    query, key, value, mask, past_keys, past_values = attention.inputs
    heads, groups = _heads(attention)
    queries, size = heads // groups, _width(attention)
    assert mask is not None and size is not None and attention.graph is not None
    scale = graph.attribute(attention, "scale", size**-0.5)
    factor = shared.constant(f"scale_{scale}", np.array(scale, dtype=np.float32))
    nodes = _Nodes(attention.name or "attention")
    make, whole = nodes.make, shared.whole
    sizes = _masked(mask, groups, queries, shared, nodes)

    def split(x: ir.Value | None) -> ir.Value:
        return make("Transpose", [make("Reshape", [x, whole(0, 0, groups, size)])], perm=[0, 2, 1, 3])

    keys = make("Concat", [past_keys, split(key)], axis=2)
    values = make("Concat", [past_values, split(value)], axis=2)

    grouped = make("Transpose", [make("Reshape", [query, whole(0, 0, groups, queries, size)])], perm=[0, 2, 1, 3, 4])
    rows = make("Mul", [make("Reshape", [grouped, whole(0, 0, -1, size)]), factor])
    if queries == 1:
        rows = _first_twice(rows, shared, nodes)
    scores = make("MatMul", [rows, make("Transpose", [keys], perm=[0, 1, 3, 2])])
    masked = make("Add", [make("Reshape", [scores, sizes.by_token]), sizes.mask])
    scores = make("Reshape", [masked, sizes.by_row])

    largest = make("ReduceMax", [scores, whole(-1)], keepdims=1)
    weights = make("Exp", [make("Sub", [scores, largest])])
    total = make("Slice", [make("MatMul", [weights, sizes.ones]), whole(0), whole(1), whole(3)])
    mean = make("Div", [make("MatMul", [weights, values]), total])

    if queries == 1:
        mean = make("Slice", [mean, whole(1), whole(np.iinfo(np.int64).max), whole(2)])
    back = make("Transpose", [make("Reshape", [mean, whole(0, groups, -1, queries, size)])], perm=[0, 2, 1, 3, 4])
    result = make("Reshape", [back, whole(0, 0, heads * size)])
    graph.insert_before(attention, nodes.made)
    for old, made in zip(attention.outputs[:3], (result, keys, values), strict=True):
        graph.stand_in(old, made)
    attention.graph.remove(attention, safe=True)
