"""Store embedding tables as integers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.decode_chain import remember
from scalefold.compiler.facts import Fact
from scalefold.compiler.protocol import Context, Contract, Event, PassResult
from scalefold.compiler.recipe import WeightFormat
from scalefold.passes.quantize_weights import quantized


@dataclass(frozen=True)
class QuantizeEmbeddings:
    """Look up int8 rows and dequantize just those.

    before:  Gather(table, ids)
    after:   Mul(Cast(Gather(codes, ids)), Gather(scales, ids))

    table and codes are [V, H], scales [V, 1]. DequantizeLinear in front of Gather would dequantize the whole table on
    every run, and behind it has no form for a scale per looked-up row.

    Below 8 bits the table is solved as a weight whose columns are its rows, and pack-weights stores what it was decoded
    from: then only the rows that are looked up are decoded.

    Attributes:
        table: the format of a table's transpose [H, V].
        smallest: tables with fewer entries stay float: there is nothing to save.
    """

    name: ClassVar[str] = "quantize-embeddings"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.LOSSY

    table: WeightFormat = field(default_factory=WeightFormat)
    smallest: int = 4096

    @property
    def bits(self) -> int:
        """Bits per entry."""
        return self.table.bits

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Quantize each table that a Gather of rows reads; decline the others with a reason."""
        rewrites, declined = [], []
        tables: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        for gather in graph.nodes(model, "Gather"):
            table = gather.inputs[0]
            if table is None or not table.is_initializer() or table.dtype != ir.DataType.FLOAT:
                continue
            if reason := self._obstacle(gather, table):
                declined.append(Event(gather, reason))
                continue
            if table not in tables:
                tables[table] = self._store(model, table)
            graph.look_up(gather, *tables[table])
            rewrites.append(Event(gather, f"{self.table} of {table.name}".replace("per column", "per row")))
        if rewrites:
            graph.sweep(model)
        return PassResult(tuple(rewrites), tuple(declined))

    def _obstacle(self, gather: ir.Node, table: ir.Value) -> str | None:
        if graph.rank(table) != 2 or graph.attribute(gather, "axis", 0) != 0:
            return "not a look-up of rows"
        if any(node.op_type != "Gather" for node in graph.consumers(table)):
            return "the table is read by other operators too"
        if graph.whole_shape(table)[1] == 1:
            return "its rows are single numbers, such as the scales of a table that is stored already"
        if table.const_value is not None and table.const_value.size < self.smallest:
            return f"the table has fewer than {self.smallest} entries"
        return None

    def _store(self, model: ir.Model, table: ir.Value) -> tuple[ir.Value, ir.Value]:
        array = np.asarray(graph.constant(table), dtype=np.float32)
        integers, steps, coded = quantized(array.T, self.table, None, None, f"embedding table {table.name}")
        codes = graph.add_initializer(model, f"{table.name}_codes", integers.T)
        if coded is not None:
            remember(codes, coded, by_rows=True)
        return codes, graph.add_initializer(model, f"{table.name}_scales", steps[:, None])
