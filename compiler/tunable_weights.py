"""Coded weights read back from a compiled graph, with the names of the constants that a task may have values of its own for.

    MatMulIntegerToFloat(q, integers, s, scales, z, -, b)      lowered
    MatMul(x, DequantizeLinear(integers, scales))              QDQ
    integers = decode(codes, alphas or codebook)               compiler/decode_chain.py

What else is made of a weight must follow it: behind an activation with a range for each token stand the sums of the
weight's columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from scalefold.compiler import decode_chain, graph
from scalefold.compiler.facts import restored_rows, weight_array
from scalefold.compiler.weight_formats import Float, Int8, UInt8, bit_signs, chosen_levels

Train = Literal["alpha1", "alphas", "scales", "codebooks"]
"""What of weights a task trains: see `trainable_weights`."""

AXES = {"MatMulIntegerToFloat": (1, 3), "DequantizeLinear": (0, 1)}
"""Which inputs of a node are the integers [K, N] and the scales [N]."""


@dataclass(frozen=True, eq=False)
class Coding:
    """What a weight's integers were decoded from.

    Attributes:
        codes: uint8 [K, N].
        constant: name of the constant that holds the alphas or the codebook.
        shape: of that constant.
        by_rows: whether its first axis, and not its last, is the weight's columns.
        entries: its numbers, int8: alphas [q, G, N], or a codebook [2**bits, 1, N or 1].
        binary: whether they are alphas.
    """

    codes: UInt8
    constant: str
    shape: tuple[int, ...]
    entries: Int8
    binary: bool
    by_rows: bool = False

    @property
    def group_size(self) -> int:
        """Rows of a column that one alpha stands for."""
        return int(self.codes.shape[0] // self.entries.shape[1])

    def levels(self, entries: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """What each code stands for when the constant holds `entries`: [G, 2**bits, N], or [1, 2**bits, N or 1]."""
        if not self.binary:
            return entries.transpose(1, 0, 2)
        signs = bit_signs(len(entries)).astype(entries.dtype if entries.dtype.kind == "f" else np.int32)
        return np.asarray(np.einsum("ci,ign->gcn", signs, entries.astype(signs.dtype)))

    def integers(self, entries: Int8) -> Int8:
        """The weight's integers [K, N] when the constant holds `entries`."""
        return chosen_levels(self.codes, self.levels(entries).astype(np.int8))

    def stored(self, entries: Int8) -> Int8:
        """`entries` as the constant holds them."""
        if self.binary:
            order = (2, 1, 0) if self.by_rows else (1, 0, 2)
            return np.ascontiguousarray(entries.transpose(order)).reshape(self.shape)
        table = entries[:, 0]
        return np.ascontiguousarray(table.T if self.by_rows else table).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class TunableWeight:
    """One weight of linear layers, and the constants that it is made of.

    Attributes:
        name: the first layer that reads it.
        value: its integers, [K, N].
        readers: the nodes that read the integers: fused products, or DequantizeLinear.
        scales: the value of the scales [N].
        sums: values of the sums of its columns [N].
        coding: what it was decoded from; None for a weight of other integers, of which the scales alone can be tuned.
    """

    name: str
    value: ir.Value
    readers: tuple[ir.Node, ...]
    scales: ir.Value
    sums: tuple[ir.Value, ...]
    coding: Coding | None

    def integers(self) -> Int8:
        """int8 [K, N]; to be read before the graph is rewritten."""
        return np.asarray(weight_array(self.value), dtype=np.int8)

    def scale_array(self) -> Float:
        """float32 [N]."""
        return np.asarray(graph.constant(self.scales), dtype=np.float32)


def tunable_weights(model: ir.Model) -> list[TunableWeight]:
    """The quantized weights of linear layers, in graph order; those that embeddings are looked up in are left out."""
    readers: dict[tuple[ir.Value, ir.Value], list[ir.Node]] = {}
    for node in model.graph:
        if (found := _weight_and_scales(node)) is not None:
            readers.setdefault(found, []).append(node)
    weights = [_weight(value, scales, nodes) for (value, scales), nodes in readers.items()]
    return [weight for weight in weights if weight is not None]


def _weight_and_scales(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """The integers and scales of a linear layer; None for another node."""
    if node.op_type not in AXES:
        return None
    value, scales = (node.inputs[place] for place in AXES[node.op_type])
    if value is None or scales is None or not scales.is_initializer() or graph.rank(scales) != 1:
        return None
    if node.op_type == "DequantizeLinear" and not all(
        reader.op_type == "MatMul" and reader.inputs[1] is node.outputs[0]
        for reader in graph.consumers(node.outputs[0])
    ):
        return None
    return (value, scales) if decode_chain.is_constant(value) or graph.constant(value) is not None else None


def _weight(value: ir.Value, scales: ir.Value, readers: list[ir.Node]) -> TunableWeight | None:
    array = weight_array(value)
    if array is None or array.dtype != np.int8 or array.ndim != 2 or graph.whole_shape(scales) != array.shape[1:]:
        return None
    if any(reader not in readers for leaf in (scales, value) for reader in graph.consumers(leaf)):
        return None
    products = [product for node in readers for product in _products(node)]
    sums = {sums for product in products if (sums := _column_sums(product)) is not None}
    ordered = tuple(sorted(sums, key=lambda entry: entry.name or ""))
    name = products[0].name or products[0].outputs[0].name or ""
    return TunableWeight(name, value, tuple(readers), scales, ordered, _coding(value))


def _products(node: ir.Node) -> Iterator[ir.Node]:
    if node.op_type == "MatMulIntegerToFloat":
        yield node
    else:
        yield from graph.consumers(node.outputs[0])


def _column_sums(product: ir.Node) -> ir.Value | None:
    """The constant [N] that the minimum of each row is multiplied with behind a per-token product."""
    restore = restored_rows(product)
    if restore is None:
        return None
    for entry in restore.inputs:
        offset = graph.producer(entry, "Mul")
        for factor in offset.inputs if offset is not None else ():
            if factor is not None and factor.is_initializer() and graph.rank(factor) == 1:
                return factor
    return None


def _coding(value: ir.Value) -> Coding | None:
    """What a chain decodes, when its levels are a constant that nothing else reads."""
    node, by_rows = graph.producer(value), False
    while node is not None and node.op_type in ("Transpose", "Reshape"):
        by_rows = by_rows or node.op_type == "Transpose"
        node = graph.producer(node.inputs[0])
    paired = node is not None and node.op_type == "Concat"
    lookups = [graph.producer(half) for half in node.inputs] if node is not None and paired else [node]
    levels = [_levels(lookup) for lookup in lookups if lookup is not None]
    if not levels or levels[0] is None or lookups[0] is None:
        return None
    constant, binary = levels[0].constant, levels[0].binary
    index, array = decode_chain.evaluate(lookups[0].inputs[1]), graph.constant(constant)
    if index is None or array is None or {*graph.consumers(constant)} != {found.reader for found in levels if found}:
        return None
    entries = _alpha_entries(array, by_rows) if binary else _codebook_entries(array, by_rows)
    codes = index.astype(np.uint8)
    if paired:
        bits = np.uint8(len(entries) if binary else len(entries).bit_length() - 1)
        codes = np.concatenate([codes & np.uint8((1 << bits) - 1), codes >> bits], axis=-2)
    codes = codes.reshape(len(codes), -1).T if by_rows else codes.reshape(-1, codes.shape[-1])
    return Coding(np.ascontiguousarray(codes), constant.name or "", array.shape, entries, binary, by_rows)


@dataclass(frozen=True, eq=False)
class _Levels:
    """The constant that levels are made of, the node of the chain that reads it, and whether it holds alphas."""

    constant: ir.Value
    reader: ir.Node
    binary: bool


def _levels(lookup: ir.Node) -> _Levels | None:
    """Codebook, or alphas of Cast(MatMulInteger(signs, alphas)) or Cast(ReduceSum(Cast(alphas * signs)))."""
    if lookup.op_type not in ("Gather", "GatherElements"):
        return None
    reader, place = lookup, 0
    while (node := graph.producer(reader.inputs[place])) is not None and node.op_type in _OF_LEVELS:
        reader, place = node, 1 if node.op_type == "MatMulInteger" else 0
    constant = reader.inputs[place]
    if constant is None or not constant.is_initializer():
        return None
    return _Levels(constant, reader, reader.op_type in ("MatMulInteger", "Mul"))


_OF_LEVELS = ("Cast", "Expand", "Gather", "MatMulInteger", "Mul", "ReduceSum")
"""What stands between a look-up and the constant that its levels are made of."""


def _alpha_entries(array: npt.NDArray[np.generic], by_rows: bool) -> Int8:
    """Alphas [N, (G,) 1, q] or [(G,) q, N] as [q, G, N]."""
    alphas = np.asarray(array, dtype=np.int8)
    if by_rows:
        return np.ascontiguousarray(alphas.reshape(len(alphas), -1, alphas.shape[-1]).transpose(2, 1, 0))
    return np.ascontiguousarray(alphas.reshape(-1, *alphas.shape[-2:]).transpose(1, 0, 2))


def _codebook_entries(array: npt.NDArray[np.generic], by_rows: bool) -> Int8:
    """A codebook [2**bits], [N, 2**bits] or [2**bits, N] as [2**bits, 1, N or 1]."""
    table = np.asarray(array, dtype=np.int8)
    return np.ascontiguousarray(
        (table.T if by_rows else table).reshape(table.shape[-1] if by_rows else len(table), 1, -1)
    )
