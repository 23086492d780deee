"""Store integer weights as the codes they were decoded from, at their width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.decode_chain import FOUR_BIT_OPSET, DecodeChain, Origin, origin_of
from scalefold.compiler.facts import Fact
from scalefold.compiler.protocol import Context, Contract, Event, PassResult

RAISED_FROM = 20
"""Models of this opset or later are declared to be of the one that 4-bit tensors need: it only adds to what they use."""

IR_VERSION = 10
"""The version of the file format that has 4-bit tensors."""


@dataclass(frozen=True)
class PackWeights:
    """Replace int8 constants that were decoded from fewer bits by the codes and a chain that decodes them.

    before:  integers [K, N]                                 after:  decode(codes [K, N])
    before:  Gather(integers [V, H], ids), integers          after:  decode(Gather(codes [V, H], ids)), decode(codes)

    The chains are drawn in compiler/decode_chain.py. onnxruntime folds that of a weight once, when it loads the file, so
    that the kernel and the memory are those of int8; of an embedding table only the rows that are looked up are decoded,
    in every run, and the table stays packed in memory.
    """

    name: ClassVar[str] = "pack-weights"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Pack every constant whose codes are known; decline tables that are looked up in a way that is not known."""
        rewrites, declined = [], []
        common: dict[str, ir.Value] = {}
        origins = {value: origin for value in model.graph.initializers.values() if (origin := origin_of(value))}
        with ctx.progress("packing weights", len(origins)) as advance:
            for value, origin in origins.items():
                readers = graph.consumers(value)
                if readers and (reason := _obstacle(value, readers)):
                    declined.append(Event(readers[0], reason))
                elif readers:
                    _pack(model, value, origin, common)
                    rewrites.append(Event(readers[0], f"{origin.coded.bits} bits", _figures(origin)))
                advance()
        if rewrites:
            graph.sweep(model)
        return PassResult(tuple(rewrites), tuple(declined))


def _obstacle(table: ir.Value, readers: list[ir.Node]) -> str | None:
    for gather in readers:
        if gather.op_type == "Gather" and gather.inputs[0] is table and graph.rank(gather.inputs[1]) is None:
            return "it is looked up by ids of unknown rank"
    return None


def _figures(origin: Origin) -> dict[str, float | int]:
    coded = origin.coded
    return {"bits_per_weight": coded.bits_per_weight, "overhead_bytes": coded.overhead_bytes}


def _pack(model: ir.Model, value: ir.Value, origin: Origin, common: dict[str, ir.Value]) -> None:
    constants: dict[str, ir.Value] = {}
    name = value.name or ""
    gathers = [node for node in graph.consumers(value) if node.op_type == "Gather" and node.inputs[0] is value]
    for gather in gathers:
        ids = gather.inputs[1]
        rank = graph.rank(ids) or 0
        chain = DecodeChain(model, origin.coded, name, constants, common, by_rows=True, ids=ids, rank=rank)
        nodes = chain.nodes()
        graph.like(nodes[-1].outputs[0], gather.outputs[0])
        graph.insert_before(gather, nodes)
        graph.bypass(gather.outputs[0], nodes[-1].outputs[0])
        model.graph.remove(gather, safe=True)
    if not value.uses():
        return
    modern = model.graph.opset_imports.get("", 0) >= RAISED_FROM
    if modern and not gathers and origin.coded.bits > 1:
        graph.require_opset(model, "", FOUR_BIT_OPSET)
        model.ir_version = max(model.ir_version, IR_VERSION)
    by_rows = origin.by_rows or bool(gathers)
    four_bit = modern and not gathers
    nodes = DecodeChain(model, origin.coded, name, constants, common, by_rows=by_rows, four_bit=four_bit).nodes()
    if by_rows and not origin.by_rows:
        nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": [1, 0]}, name=f"{name}_columns"))
    decoded = graph.like(nodes[-1].outputs[0], value)
    graph.insert_before(model.graph[0], nodes)
    value.replace_all_uses_with(decoded)
    model.graph.initializers.pop(name)
    decoded.name = name
