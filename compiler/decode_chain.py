"""Decode chains: a coded weight as constants of its true width and the integer operators that make int8 of them.

One row of a chain is one output column of the weight, so that a look-up of embeddings can decode just the rows it reads:

    codes        uint8 [N, 1, P] -> BitShift -> BitShift -> Reshape [N, K]     b bits each, packed; fields of 4, 2, 1 bits
                 4 bits: INT4 or UINT4 [N, K] instead, which needs no unpacking
    Grid         Cast(codes) * multipliers + offsets                           in groups as [N, G, g]
    Codebook     GatherElements(table [N, 2^b], codes), of the whole weight: Expand(table [2^b], [N, 2^b])
    BinaryCoding GatherElements(ReduceSum(alphas * signs) [N, G, 2^b], codes)  the sums of +-alpha, made in the chain
    weight       Transpose [K, N], int8

Everything in it is a constant, and an integer: onnxruntime folds it once, at load, to the int8 weight that its kernel
packs, where a float codebook would be folded to a float weight. Products in int8 may wrap around before the offset
brings them back: integer arithmetic modulo 256 is exact. Needs opset 17.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.weight_formats import BinaryCoding, Codebook, CodedWeight, Grid, bit_signs

Array = npt.NDArray[np.generic]

CODED = "scalefold.coded-weight"
"""Marks an int8 constant in memory with the codes it was decoded from."""

FIELDS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
"""Widths that codes of so many bits are cut into, lowest bits first: only those fill bytes without a gap."""

FOUR_BIT_OPSET = 21
"""INT4 and UINT4 exist from here on. 2-bit tensors, from opset 25, are younger than the oldest onnxruntime supported."""


@dataclass(frozen=True)
class Origin:
    """What an int8 constant was decoded from.

    Attributes:
        coded: codes [K, N] and their decoder.
        by_rows: whether the constant is [N, K], a table whose rows are looked up, instead of [K, N].
    """

    coded: CodedWeight
    by_rows: bool = False


def remember(value: ir.Value, coded: CodedWeight, *, by_rows: bool = False) -> None:
    """Note what an int8 constant was decoded from; 8-bit codes have nothing to gain and are not noted."""
    if coded.bits < 8:
        value.meta[CODED] = Origin(coded, by_rows)


def origin_of(value: ir.Value | None) -> Origin | None:
    """What an int8 constant was decoded from, or None."""
    found = value.meta.get(CODED) if value is not None else None
    return found if isinstance(found, Origin) else None


class DecodeChain:
    """Writes one chain into a graph: that of a whole weight, or of the rows that `ids` name.

    Args:
        model: the graph; constants are added to it, nodes are not.
        coded: the weight.
        name: what constants and nodes are named after.
        constants: the weight's constants so far by name; chains that share them store them once.
        common: the same for small constants that belong to no weight, such as shapes.
        ids: the rows to decode; all when None.
        rank: number of dimensions of `ids`.
        four_bit: whether 4-bit codes may be a tensor of a 4-bit type, whose rows cannot be looked up.
    """

    def __init__(
        self,
        model: ir.Model,
        coded: CodedWeight,
        name: str,
        constants: dict[str, ir.Value],
        common: dict[str, ir.Value],
        *,
        ids: ir.Value | None = None,
        rank: int = 1,
        four_bit: bool = False,
    ) -> None:
        self._model = model
        self._coded = coded
        self._name = name
        self._constants = constants
        self._common = common
        self._ids = ids
        self._lead = rank
        self._four_bit = four_bit and coded.bits == 4
        self._rows, self._columns = coded.codes.shape[1], coded.codes.shape[0]
        self._nodes: list[ir.Node] = []

    def nodes(self) -> list[ir.Node]:
        """The nodes in order; the last one's output is int8 [N, K], or [*ids, K]."""
        decoder = self._coded.decoder
        if isinstance(decoder, Grid):
            self._grid(decoder)
        elif isinstance(decoder, Codebook):
            self._codebook(decoder)
        else:
            self._binary_coding(decoder)
        return self._nodes

    def _grid(self, grid: Grid) -> None:
        bits, groups = self._coded.bits, grid.offsets.shape[0]
        central = grid.is_central(bits)
        steps = np.array([[1]], dtype=np.int8) if grid.multipliers is None else grid.multipliers
        zero = np.array([[-(1 << (bits - 1))]], dtype=np.int8)
        signed = central and self._four_bit
        found = self._cast(self._nibbles(ir.DataType.INT4) if signed else self._codes(), ir.DataType.INT8)
        grouped = groups > 1 and not (_uniform(steps) and (central or _uniform(grid.offsets)))
        if grouped:
            found = self._reshape(found, groups, self._columns // groups)
        if central and not signed:
            found = self._add("Add", found, self._per_group("zero", zero))
        if not (steps == 1).all():
            found = self._add("Mul", found, self._per_group("multipliers", steps))
        if not central:
            found = self._add("Add", found, self._per_group("offsets", grid.offsets))
        if grouped:
            self._reshape(found, self._columns)

    def _codebook(self, codebook: Codebook) -> None:
        index = self._cast(self._codes(), ir.DataType.INT32)
        if codebook.table.shape[1] > 1:
            self._add("GatherElements", self._per_row("codebook", lambda: codebook.table.T), index, axis=-1)
            return
        table = self._constant("codebook", lambda: codebook.table[:, 0])
        if self._ids is not None:
            self._add("Gather", table, index, axis=0)
            return
        # each row has a copy: a look-up along a row takes half the time of one that has no rows
        shape = (self._rows, len(codebook.table))
        rows = self._shared("rows_{}_{}".format(*shape), lambda: np.array(shape, dtype=np.int64))
        self._add("GatherElements", self._add("Expand", table, rows), index, axis=-1)

    def _binary_coding(self, coding: BinaryCoding) -> None:
        groups = coding.alphas.shape[1]
        shape = (self._rows, groups, 1, -1) if groups > 1 else (self._rows, 1, -1)
        alphas = self._per_row("alphas", lambda: coding.alphas.transpose(2, 1, 0).reshape(shape))
        signed = self._add("Mul", alphas, self._shared(f"signs{self._coded.bits}", lambda: bit_signs(self._coded.bits)))
        sums = self._add("ReduceSum", self._cast(signed, ir.DataType.INT32), self._index(-1), keepdims=0)
        table = self._cast(sums, ir.DataType.INT8)
        index = self._cast(self._codes(), ir.DataType.INT32)
        if groups > 1:
            index = self._reshape(index, groups, self._columns // groups)
        found = self._add("GatherElements", table, index, axis=-1)
        if groups > 1:
            self._reshape(found, self._columns)

    def _codes(self) -> ir.Value:
        """The codes [N, K], or [*ids, K]: uint8, or UINT4."""
        if self._four_bit:
            return self._nibbles(ir.DataType.UINT4)
        found, place = None, 0
        for width in FIELDS[self._coded.bits]:
            field = self._field(width, place)
            if found is not None:
                raised = self._add("BitShift", field, self._byte(place), direction="LEFT")
                field = self._add("Add", raised, found)
            found, place = field, place + width
        assert found is not None
        return found

    def _nibbles(self, dtype: ir.DataType) -> ir.Value:
        lowest = 8 if dtype == ir.DataType.INT4 else 0
        return self._constant("codes4", lambda: (self._coded.codes.T.astype(np.int8) - lowest).astype(dtype.numpy()))

    def _field(self, width: int, place: int) -> ir.Value:
        """Bits `place` to `place + width` of the codes: what lies above them in a byte is shifted out, then what below."""
        each, mask = 8 // width, np.uint8((1 << width) - 1)
        packed = self._per_row(f"codes{width}", lambda: pack(self._coded.codes.T >> np.uint8(place) & mask, width))
        above = self._shared(f"above{width}", lambda: np.arange(8 - width, -1, -width, dtype=np.uint8).reshape(each, 1))
        high = self._add("BitShift", packed, above, direction="LEFT")
        low = self._add("BitShift", high, self._byte(8 - width), direction="RIGHT")
        padded = -(-self._columns // each) * each
        row = self._reshape(low, padded)
        if padded == self._columns:
            return row
        start, end, axis = self._index(0), self._index(self._columns), self._index(-1)
        return self._add("Slice", row, start, end, axis)

    def _index(self, number: int) -> ir.Value:
        return self._shared(f"index{number}", lambda: np.array([number], dtype=np.int64))

    def _byte(self, number: int) -> ir.Value:
        return self._shared(f"byte{number}", lambda: np.array(number, dtype=np.uint8))

    def _per_group(self, suffix: str, values: npt.NDArray[np.int8]) -> ir.Value:
        """int8 [G, N] as it broadcasts against rows in groups; one number where all are equal."""
        if _uniform(values):
            return self._constant(suffix, lambda: np.array(values.flat[0]))
        return self._per_row(suffix, lambda: values.T[:, :, None] if values.shape[0] > 1 else values.T)

    def _per_row(self, suffix: str, make: Callable[[], Array]) -> ir.Value:
        """A constant with an entry for each row of the chain, or the entries of the rows `ids`."""
        value = self._constant(suffix, make)
        return value if self._ids is None else self._add("Gather", value, self._ids, axis=0)

    def _shared(self, name: str, make: Callable[[], Array]) -> ir.Value:
        if name not in self._common:
            self._common[name] = graph.add_initializer(self._model, f"decode_{name}", make())
        return self._common[name]

    def _constant(self, suffix: str, make: Callable[[], Array]) -> ir.Value:
        if suffix not in self._constants:
            self._constants[suffix] = graph.add_initializer(self._model, f"{self._name}_{suffix}", make())
        return self._constants[suffix]

    def _reshape(self, value: ir.Value, *row: int) -> ir.Value:
        shape = [*[0] * self._lead, *row]
        name = "shape_" + "_".join(map(str, shape))
        return self._add("Reshape", value, self._shared(name, lambda: np.array(shape, dtype=np.int64)))

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self._add("Cast", value, to=dtype)

    def _add(self, op_type: str, *inputs: ir.Value, **attributes: int | str) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=f"{self._name}_decode_{len(self._nodes)}")
        self._nodes.append(node)
        return node.outputs[0]


def pack(codes: npt.NDArray[np.uint8], width: int) -> npt.NDArray[np.uint8]:
    """Codes [N, K] of 1, 2 or 4 bits as bytes [N, 1, P]: byte p of a row holds codes p, P + p, 2 P + p ..., lowest first."""
    each = 8 // width
    fields = np.pad(codes, ((0, 0), (0, -codes.shape[1] % each))).reshape(len(codes), each, -1)
    places = np.arange(0, 8, width, dtype=np.uint8).reshape(each, 1)
    return np.asarray(np.bitwise_or.reduce(fields << places, axis=1, keepdims=True), dtype=np.uint8)


def evaluate(value: ir.Value | None) -> Array | None:
    """The array of a constant, or of what a chain makes of constants; None for anything else."""
    if value is None or value.is_graph_input():
        return None
    found = graph.constant(value)
    node = graph.producer(value)
    if found is not None or node is None or node.op_type not in _NUMPY or node.domain not in ("", "ai.onnx"):
        return found
    inputs = []
    for entry in node.inputs:
        array = evaluate(entry)
        if array is None:
            return None
        inputs.append(array)
    return _NUMPY[node.op_type](node, inputs)


def is_constant(value: ir.Value | None) -> bool:
    """Whether `evaluate` would give an array; nothing is computed."""
    node = graph.producer(value)
    if value is None or value.is_graph_input() or node is None or node.op_type == "Constant":
        return graph.constant(value) is not None
    if node.op_type not in _NUMPY or node.domain not in ("", "ai.onnx"):
        return False
    return all(is_constant(entry) for entry in node.inputs)


def leaves(value: ir.Value) -> list[ir.Value]:
    """The constants that a chain is made of; the constant itself when there is no chain."""
    node = graph.producer(value)
    if node is None:
        return [value]
    return [leaf for entry in node.inputs if entry is not None for leaf in leaves(entry)]


def stored_codes(value: ir.Value) -> list[ir.Value]:
    """The constants that hold the codes of a chain, or the constant itself: what is left are its decoder and shapes."""
    node = graph.producer(value)
    if node is None:
        return [value]
    if node.op_type == "Add" and graph.producer(node.inputs[1]) is not None:
        chosen = list(node.inputs)
    else:
        chosen = [node.inputs[1 if node.op_type in ("Gather", "GatherElements") else 0]]
    return [leaf for entry in chosen if entry is not None for leaf in stored_codes(entry)]


def _uniform(values: Array) -> bool:
    return bool((values == values.flat[0]).all())


def _reduce_sum(node: ir.Node, inputs: list[Array]) -> Array:
    axes = tuple(np.asarray(inputs[1]).tolist())
    return np.asarray(
        np.sum(inputs[0], axis=axes, keepdims=bool(graph.attribute(node, "keepdims", 1)), dtype=inputs[0].dtype)
    )


def _bit_shift(node: ir.Node, inputs: list[Array]) -> Array:
    shift = np.left_shift if graph.attribute(node, "direction") == "LEFT" else np.right_shift
    return np.asarray(shift(inputs[0], inputs[1]))


def _reshape(node: ir.Node, inputs: list[Array]) -> Array:
    array, wanted = inputs[0], np.asarray(inputs[1]).tolist()
    return array.reshape([size or array.shape[place] for place, size in enumerate(wanted)])


def _slice(node: ir.Node, inputs: list[Array]) -> Array:
    start, end, axis = (int(np.asarray(entry).reshape(())) for entry in inputs[1:4])
    return np.take(inputs[0], np.arange(start, end), axis=axis)


def _gather_elements(node: ir.Node, inputs: list[Array]) -> Array:
    return np.take_along_axis(inputs[0], np.asarray(inputs[1], dtype=np.int64), axis=_axis(node))


def _axis(node: ir.Node) -> int:
    axis = graph.attribute(node, "axis", 0)
    assert isinstance(axis, int)
    return axis


def _permutation(node: ir.Node) -> tuple[int, ...] | None:
    found = graph.attribute(node, "perm")
    return found if isinstance(found, tuple) else None


def _cast(node: ir.Node, inputs: list[Array]) -> Array:
    to = graph.attribute(node, "to")
    assert isinstance(to, int)
    return inputs[0].astype(ir.DataType(to).numpy())


_NUMPY: Mapping[str, Callable[[ir.Node, list[Array]], Array]] = {
    "Add": lambda node, inputs: np.asarray(np.add(*inputs)),
    "BitShift": _bit_shift,
    "Cast": _cast,
    "Expand": lambda node, inputs: np.broadcast_to(inputs[0], tuple(np.asarray(inputs[1]).tolist())),
    "Gather": lambda node, inputs: np.take(inputs[0], np.asarray(inputs[1], dtype=np.int64), axis=_axis(node)),
    "GatherElements": _gather_elements,
    "Mul": lambda node, inputs: np.asarray(np.multiply(*inputs)),
    "ReduceSum": _reduce_sum,
    "Reshape": _reshape,
    "Slice": _slice,
    "Transpose": lambda node, inputs: np.transpose(inputs[0], _permutation(node)),
}
"""What the operators of a chain do, without a runtime."""
