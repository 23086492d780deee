"""Recover rotary position embeddings that were exported as slices, a negation and a concatenation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.facts import Fact
from scalefold.compiler.protocol import Context, Contract, Event, PassResult

OLDEST_OPSET = 20
"""From here to 23 no operator that transformers use changes its meaning."""


@dataclass(frozen=True)
class RecoverRotary:
    """Write the rotation of queries and keys by their positions as one operator.

    before:  x * Unsqueeze(Cos(Concat(a, a)), 1) + Concat(-x[..., D/2:], x[..., :D/2]) * Unsqueeze(Sin(Concat(a, a)), 1)
    after:   RotaryEmbedding(x, Cos(a), Sin(a))

    x is [B, H, S, D], the angles a are [B, S, D/2]; cosine and sine may carry a number as factor. Both halves of a vector
    turn by the same angles (Su et al. 2021, arXiv 2104.09864, in the layout of GPT-NeoX and Llama). Six operators a vector
    become one. Needs opset 23 (onnxruntime 1.23).
    """

    name: ClassVar[str] = "recover-rotary"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.REASSOCIATED

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Recover every rotation that matches; decline one whose angles cannot be shown to be twice the same."""
        if model.graph.opset_imports.get("", 0) < OLDEST_OPSET:
            return PassResult()
        rewrites, declined = [], []
        halves: dict[ir.Value, ir.Value] = {}
        for add in graph.nodes(model, "Add"):
            found = _rotation(add)
            if found is None:
                continue
            x, tables = found
            if any(_angles(table) is None for table in tables):
                declined.append(Event(add, "the angles of its two halves are not the same value"))
                continue
            if any(_is_shared(table, x) for table in tables):
                declined.append(
                    Event(add, "its angles are one row for all sequences, where the operator wants one each")
                )
                continue
            cos, sin = (_half(table, halves) for table in tables)
            rotary = ir.node("RotaryEmbedding", [x, cos, sin], name=f"{add.name or add.outputs[0].name}.rotary")
            graph.insert_after(add, [rotary])
            graph.stand_in(add.outputs[0], rotary.outputs[0])
            rewrites.append(Event(rotary, "rotated by halves"))
        if rewrites:
            graph.sweep(model)
            graph.require_opset(model, "", 23)
        return PassResult(tuple(rewrites), tuple(declined))


def _rotation(add: ir.Node) -> tuple[ir.Value, tuple[ir.Value, ir.Value]] | None:
    """(x, (cosine [B, S, D], sine [B, S, D])) of x * cosine + rotated(x) * sine."""
    products = [graph.producer(value, "Mul") for value in add.inputs]
    for straight, turned in (products, products[::-1]):
        if straight is None or turned is None:
            continue
        for index in (0, 1):
            x = _unrotated(turned.inputs[index])
            if x is None or x not in straight.inputs:
                continue
            cosine, sine = _table(graph.other_input(straight, x)), _table(turned.inputs[1 - index])
            if cosine is not None and sine is not None:
                return x, (cosine, sine)
    return None


def _unrotated(value: ir.Value | None) -> ir.Value | None:
    """The x of Concat(Neg(x[..., D/2:]), x[..., :D/2])."""
    concat = graph.producer(value, "Concat")
    if concat is None or len(concat.inputs) != 2 or graph.attribute(concat, "axis") not in (-1, 3):
        return None
    negated = graph.producer(concat.inputs[0], "Neg")
    second = graph.producer(negated.inputs[0], "Slice") if negated is not None else None
    first = graph.producer(concat.inputs[1], "Slice")
    if first is None or second is None or first.inputs[0] is not second.inputs[0]:
        return None
    x = first.inputs[0]
    width = x.shape[3] if x is not None and x.shape is not None and len(x.shape) == 4 else None
    if not isinstance(width, int) or width % 2:
        return None
    whole = _bounds(first) == (0, width // 2) and _bounds(second, width) == (width // 2, width)
    return x if whole else None


def _bounds(piece: ir.Node, width: int | None = None) -> tuple[int, int] | None:
    """(start, end) of a Slice of the last of four axes with step 1, its end at most `width`."""
    numbers = [graph.scalar(value) for value in piece.inputs[1:]]
    if len(numbers) < 3 or None in numbers or numbers[2] not in (3, -1) or (len(numbers) == 4 and numbers[3] != 1):
        return None
    start, end = int(numbers[0] or 0), int(numbers[1] or 0)
    return start, end if width is None else min(end, width)


def _table(value: ir.Value | None) -> ir.Value | None:
    """The c [B, S, D] of Unsqueeze(c, 1)."""
    lifted = graph.producer(value, "Unsqueeze")
    return lifted.inputs[0] if lifted is not None and graph.scalar(lifted.inputs[1]) == 1 else None


def _factored(table: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """(c, number) of c * number; number is None where there is no such factor."""
    product = graph.producer(table, "Mul")
    if product is not None:
        for value in product.inputs:
            other = graph.other_input(product, value) if value is not None else None
            if value is not None and other is not None and graph.scalar(value) is not None:
                return other, value
    return table, None


def _angles(table: ir.Value) -> ir.Value | None:
    """The a [B, S, D/2] of Cos(Concat(a, a)) or Sin(Concat(a, a)), with or without a factor."""
    wave = graph.producer(_factored(table)[0], "Cos", "Sin")
    concat = graph.producer(wave.inputs[0], "Concat") if wave is not None else None
    if concat is None or len(concat.inputs) != 2 or graph.attribute(concat, "axis") not in (-1, 2):
        return None
    return concat.inputs[0] if concat.inputs[0] is concat.inputs[1] else None


def _is_shared(table: ir.Value, x: ir.Value) -> bool:
    """Whether the angles of a table are broadcast over the batch of x [B, H, S, D]."""
    angles = _angles(table)
    sizes = [value.shape[0] if value is not None and value.shape is not None else None for value in (angles, table, x)]
    return 1 in sizes[:2] and sizes[2] != 1


def _half(table: ir.Value, halves: dict[ir.Value, ir.Value]) -> ir.Value:
    """The first half [B, S, D/2] of a table of cosines or sines, made once for all vectors it turns."""
    if table not in halves:
        wave, factor = _factored(table)
        node, angles = wave.producer(), _angles(table)
        assert node is not None and angles is not None
        new = [ir.node(node.op_type, [angles], name=f"{node.name}.half")]
        if factor is not None:
            new.append(ir.node("Mul", [new[0].outputs[0], factor], name=f"{node.name}.half_scaled"))
        for each in new:
            graph.like(each.outputs[0], angles)
        last = table.producer()
        assert last is not None
        graph.insert_after(last, new)
        halves[table] = new[-1].outputs[0]
    return halves[table]
