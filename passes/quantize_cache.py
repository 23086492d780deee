"""Keep the keys and values of earlier tokens in 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph, schemes
from scalefold.compiler.decoder import decoder_of, is_decoder
from scalefold.compiler.facts import Fact
from scalefold.compiler.protocol import Context, Contract, Event, PassResult
from scalefold.compiler.schemes import Affine
from scalefold.compiler.stats import TokenRange

POSITIONS = (-2, 2)
"""The axis of a cache [B, H, P, D] that grows, counted from either end."""


@dataclass(frozen=True)
class _Join:
    """Where the keys, or the values, of a step are put behind those of earlier tokens.

    Attributes:
        past: the input, [B, H, P, D].
        prefix: what bake-prefix puts in front of it, [B, H, n, D]; None without one.
        concat: makes the whole of it.
        new: those of the step, [B, H, S, D].
        present: the output that gives the cache back, [B, H, P+S, D].
    """

    past: ir.Value
    prefix: ir.Value | None
    concat: ir.Node
    new: ir.Value
    present: ir.Value


@dataclass(frozen=True)
class QuantizeCache:
    """Round keys and values to uint8 as they enter the cache; attention reads what the cache holds.

    before:  present = Concat(past, k)                                                       -> attention
    after:   present = Concat(past, QuantizeLinear(k, s, z));   DequantizeLinear(present)    -> attention

    before:  whole = Concat(K, past, k);   present = Slice(whole, n:)                        -> attention reads whole
    after:   present = Concat(past, QuantizeLinear(k, s, z));   Concat(K, DequantizeLinear(present))

    past and present, the graph's own input and output, become uint8 [B, H, P, D] and [B, H, P+S, D]: a quarter of the
    memory, and of what is copied from step to step. s and z are one number for all keys, or values, of a layer: static,
    asymmetric, from the extremes of calibration. A token is read rounded from the beginning, so tokens one by one give
    what they give at once. A prefix K, whose keys are the massive ones, stays float. Figures: docs/decisions/0017.
    """

    name: ClassVar[str] = "quantize-cache"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Quantize every key and value that matches; decline the others with a reason."""
        if not is_decoder(model):
            return PassResult()
        joins, declined = [], []
        ports = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
        for name, paired in decoder_of(model).outputs.items():
            past, present = ports[name], ports[paired]
            used = any(feed[name].size for feed in ctx.search)
            found = "the calibration samples come with a cache of floats" if used else _join(past, present)
            if isinstance(found, _Join):
                joins.append(found)
            elif (maker := present.producer()) is not None:
                declined.append(Event(maker, found))
        measured = ctx.measure(model, {entry.new.name or "": TokenRange for entry in joins}) if joins else {}
        rewrites = []
        for entry in joins:
            seen = measured[entry.new.name or ""]
            assert isinstance(seen, TokenRange)
            affine = schemes.activation_grid(seen.low, seen.high)
            figures = {"low": seen.low, "high": seen.high, "scale": affine.scale, "zero_point": affine.zero_point}
            rewrites.append(Event(_quantize(model, entry, affine), "uint8 per tensor", figures))
        if rewrites:
            graph.sweep(model)
        return PassResult(tuple(rewrites), tuple(declined))


def _join(past: ir.Value, present: ir.Value) -> _Join | str:
    if past.dtype != ir.DataType.FLOAT:
        return "it is not of 32-bit floats"
    cut = graph.producer(present, "Slice")
    concat = _concat(present if cut is None else cut.inputs[0])
    if concat is None:
        return "it is not Concat(past, new) along the positions"
    before, new = concat.inputs
    if before is past and cut is None and new is not None:
        return _Join(past, None, concat, new, present)
    behind = _concat(before)
    if cut is None or behind is None or behind.inputs[1] is not past or new is None:
        return "it is not the past alone, behind a prefix or not, that the new keys or values are joined to"
    return _Join(past, behind.inputs[0], concat, new, present)


def _concat(value: ir.Value | None) -> ir.Node | None:
    """The Concat of two along the positions that makes a value."""
    found = graph.producer(value, "Concat")
    return found if found and len(found.inputs) == 2 and graph.attribute(found, "axis") in POSITIONS else None


def _quantize(model: ir.Model, entry: _Join, affine: Affine) -> ir.Node:
    past, whole, present = entry.past, entry.concat.outputs[0], entry.present
    name, output = past.name or "cache", present.name
    scale = graph.add_initializer(model, f"{name}.scale", np.array(affine.scale, dtype=np.float32))
    zero = graph.add_initializer(model, f"{name}.zero_point", np.array(affine.zero_point, dtype=np.uint8))
    rounded = ir.node("QuantizeLinear", [entry.new, scale, zero], name=f"{name}.new_q")
    graph.like(rounded.outputs[0], entry.new, ir.DataType.UINT8)
    kept = ir.node("Concat", [past, rounded.outputs[0]], {"axis": 2}, name=f"{name}.kept")
    read = ir.node("DequantizeLinear", [kept.outputs[0], scale, zero], name=f"{name}.dq")
    graph.like(kept.outputs[0], present, ir.DataType.UINT8)
    graph.like(read.outputs[0], present)
    new = [rounded, kept, read]
    if entry.prefix is not None:
        new.append(ir.node("Concat", [entry.prefix, read.outputs[0]], {"axis": 2}, name=f"{name}.behind_prefix"))
        longer = graph.like(new[-1].outputs[0], present)
        if present.shape is not None:
            longer.shape = ir.Shape([None if axis == 2 else size for axis, size in enumerate(present.shape)])
    graph.insert_after(entry.concat, new)
    graph.read_instead(whole, new[-1].outputs[0], new)
    present.name, kept.outputs[0].name = f"{output}.float", output
    model.graph.outputs[list(model.graph.outputs).index(present)] = kept.outputs[0]
    before = ir.node("DequantizeLinear", [past, scale, zero], name=f"{name}.past_dq")
    lengths = [node for node in graph.consumers(past) if node.op_type == "Shape"]
    graph.read_instead(past, graph.like(before.outputs[0], past), [before, kept, *lengths])
    graph.insert_before(model.graph[0], [before])
    past.type = ir.TensorType(ir.DataType.UINT8)
    return kept
