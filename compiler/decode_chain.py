"""Decode chains: a coded weight as constants of its true width and the integer operators that make int8 of them.

A weight that only products read is decoded as they read it, a column for each output:

    codes        uint8 [1, P, N] -> BitShift -> BitShift -> Reshape [K, N]     b bits each, packed; fields of 4, 2, 1 bits
                 fields of 4 bits: INT4 or UINT4 [K, N] instead, which needs no unpacking
    Grid         Cast(codes) * multipliers + offsets                           in groups as [G, g, N]
    Codebook     GatherElements(table [2^b, N], codes), of the whole weight: Expand(table [2^b], [K, 2^b])
    BinaryCoding GatherElements(signs [2^b, b] x alphas [G, b, N], codes)      the sums of +-alpha, made in the chain

Up to 3 bits two codes are looked up at once, p = c[k] + 2^b c[k + K / 2], which halves the indices; in groups, of one group:

    Concat(GatherElements(Gather(table, p mod 2^b), codes), GatherElements(Gather(table, p / 2^b), codes))

A table that is looked up has a row for each entry, so that a look-up decodes just the rows it reads; a product that
reads it as well transposes it:

    codes        uint8 [N, 1, P] ..., Grid in groups as [N, G, g], Codebook [N, 2^b]
    BinaryCoding GatherElements(ReduceSum(alphas * signs) [N, G, 2^b], codes)

Everything in it is a constant, and an integer: onnxruntime folds it once, at load, to the int8 weight that its kernel
packs, where a float codebook would be folded to a float weight. Products in int8 may wrap around before the offset
brings them back: integer arithmetic modulo 256 is exact. Needs opset 17.

Loading takes as long as a chain's operators write bytes: onnxruntime keeps all they give until the whole graph is folded,
and most of the time is the kernel's, for pages that are new.
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

PAIRED_BITS = 3
"""Codes of up to so many bits are looked up two at once: tables of 4 bits, 256 entries a column, cost what indices do."""

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


@dataclass(frozen=True)
class _Stored:
    """Codes [K, N] of b bits in G groups, or two codes in one, and the way the chain has them."""

    codes: npt.NDArray[np.uint8]
    bits: int
    groups: int
    by_rows: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """[K, N] or [G, g, N], by rows [N, K] or [N, G, g]."""
        size, outputs = self.codes.shape
        length = (size,) if self.groups == 1 else (self.groups, size // self.groups)
        return (outputs, *length) if self.by_rows else (*length, outputs)

    def field(self, width: int, place: int) -> npt.NDArray[np.uint8]:
        """Bits `place` to `place + width` of every code: [K, N], by rows [N, K]."""
        field = self.codes >> np.uint8(place) & np.uint8((1 << width) - 1)
        return field.T if self.by_rows else field


class DecodeChain:
    """Writes one chain into a graph: that of a whole weight, of a table, or of the rows of a table that `ids` name.

    Args:
        model: the graph; constants are added to it, nodes are not.
        coded: the weight.
        name: what constants and nodes are named after.
        constants: the weight's constants so far by name; chains that share them store them once.
        common: the same for small constants that belong to no weight, such as shapes.
        by_rows: whether a row of the chain, and not a column, is an output column of the weight.
        ids: the rows to decode; all when None.
        rank: number of dimensions of `ids`.
        four_bit: whether fields of 4 bits may be a tensor of a 4-bit type, whose rows cannot be looked up.
    """

    def __init__(
        self,
        model: ir.Model,
        coded: CodedWeight,
        name: str,
        constants: dict[str, ir.Value],
        common: dict[str, ir.Value],
        *,
        by_rows: bool = False,
        ids: ir.Value | None = None,
        rank: int = 1,
        four_bit: bool = False,
    ) -> None:
        self._model = model
        self._coded = coded
        self._name = name
        self._constants = constants
        self._common = common
        self._by_rows = by_rows
        self._ids = ids
        self._lead = rank
        self._four_bit = four_bit
        self._inputs, self._outputs = coded.codes.shape
        self._nodes: list[ir.Node] = []

    def nodes(self) -> list[ir.Node]:
        """The nodes in order; the last one's output is int8 [K, N], by rows [N, K] or [*ids, K]."""
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
        signed = central and self._four_bit and bits == 4
        grouped = groups > 1 and not (_uniform(steps) and (central or _uniform(grid.offsets)))
        if not grouped:
            groups = 1
        codes = self._nibbles(self._stored(groups), lowest=8) if signed else self._codes(self._stored(groups))
        found = self._cast(codes, ir.DataType.INT8)
        if central and not signed:
            found = self._add("Add", found, self._per_group("zero", zero))
        if not (steps == 1).all():
            found = self._add("Mul", found, self._per_group("multipliers", steps))
        if not central:
            found = self._add("Add", found, self._per_group("offsets", grid.offsets))
        self._ungrouped(found, groups)

    def _codebook(self, codebook: Codebook) -> None:
        table = codebook.table
        if table.shape[1] > 1:
            levels = self._per_output("codebook", lambda: table.T if self._by_rows else table)
            self._look_up(levels, 1)
            return
        levels = self._constant("codebook", lambda: table[:, 0])
        if self._ids is not None:
            self._add("Gather", levels, self._cast(self._codes(self._stored(1)), ir.DataType.INT32), axis=0)
        else:
            self._look_up(levels, 1, shared=True)

    def _binary_coding(self, coding: BinaryCoding) -> None:
        groups = coding.alphas.shape[1]
        table = self._sums_by_rows(coding) if self._by_rows else self._sums(coding)
        self._ungrouped(self._look_up(table, groups), groups)

    def _look_up(self, table: ir.Value, groups: int, *, shared: bool = False) -> ir.Value:
        """What codes stand for in a table for each output, or group of it, or in one [2^b] that all of them share."""
        bits, size = self._coded.bits, self._inputs // groups
        paired = not self._by_rows and bits <= PAIRED_BITS and size % 2 == 0
        stored = self._stored(groups, paired=paired)
        index = self._cast(self._codes(stored), ir.DataType.INT32)
        axis = -1 if self._by_rows else 1 if groups > 1 else 0
        if not paired:
            levels = self._for_each_row(table, stored.shape[0], 1 << bits) if shared else table
            return self._add("GatherElements", levels, index, axis=-1 if shared else axis)
        halves = []
        for name, codes in (("low", self._low_codes), ("high", self._high_codes)):
            repeated = self._add("Gather", table, self._shared(f"{name}_code{bits}", codes), axis=axis)
            if shared:
                repeated = self._for_each_row(repeated, stored.shape[0], 1 << 2 * bits)
            halves.append(self._add("GatherElements", repeated, index, axis=-1 if shared else axis))
        return self._add("Concat", *halves, axis=axis)

    def _low_codes(self) -> npt.NDArray[np.int32]:
        return np.arange(1 << 2 * self._coded.bits, dtype=np.int32) % (1 << self._coded.bits)

    def _high_codes(self) -> npt.NDArray[np.int32]:
        return np.arange(1 << 2 * self._coded.bits, dtype=np.int32) >> self._coded.bits

    def _for_each_row(self, table: ir.Value, *shape: int) -> ir.Value:
        """A copy for each row of the indices: a look-up along a row takes half the time of one that has no rows."""
        rows = self._shared("rows_{}_{}".format(*shape), lambda: np.array(shape, dtype=np.int64))
        return self._add("Expand", table, rows)

    def _sums(self, coding: BinaryCoding) -> ir.Value:
        """The sum that each code stands for, [G, 2^b, N] or [2^b, N]."""
        bits = self._coded.bits
        alphas = self._constant("alphas", lambda: _without_one_group(coding.alphas.transpose(1, 0, 2)))
        # 2, 0 and the zero point 1 in place of 1, -1 and none: products of signed integers have no fast kernel
        signs = self._shared(f"shifted_signs{bits}", lambda: (bit_signs(bits) + 1).astype(np.uint8))
        return self._cast(self._add("MatMulInteger", signs, alphas, self._byte(1)), ir.DataType.INT8)

    def _sums_by_rows(self, coding: BinaryCoding) -> ir.Value:
        """The sum that each code stands for, [N, G, 2^b] or [N, 2^b]."""
        groups = coding.alphas.shape[1]
        shape = (self._outputs, groups, 1, -1) if groups > 1 else (self._outputs, 1, -1)
        alphas = self._per_output("alphas", lambda: coding.alphas.transpose(2, 1, 0).reshape(shape))
        signed = self._add("Mul", alphas, self._shared(f"signs{self._coded.bits}", lambda: bit_signs(self._coded.bits)))
        sums = self._add("ReduceSum", self._cast(signed, ir.DataType.INT32), self._index(-1), keepdims=0)
        return self._cast(sums, ir.DataType.INT8)

    def _stored(self, groups: int, *, paired: bool = False) -> _Stored:
        """The codes, or two of a group in one, as the chain decodes them."""
        codes, bits = self._coded.codes, self._coded.bits
        if not paired:
            return _Stored(codes, bits, groups, self._by_rows)
        first, second = np.moveaxis(codes.reshape(groups, 2, -1, self._outputs), 1, 0)
        pairs = (first | second << np.uint8(bits)).reshape(-1, self._outputs)
        return _Stored(pairs, 2 * bits, groups, self._by_rows)

    def _codes(self, stored: _Stored) -> ir.Value:
        """The codes unpacked: uint8, or UINT4 where they are stored so."""
        if self._four_bit and stored.bits == 4:
            return self._nibbles(stored)
        found, place = None, 0
        for width in FIELDS[stored.bits]:
            field = self._field(stored, width, place)
            if found is not None:
                raised = self._add("BitShift", field, self._byte(place), direction="LEFT")
                field = self._add("Add", raised, found)
            found, place = field, place + width
        assert found is not None
        return found

    def _nibbles(self, stored: _Stored, place: int = 0, lowest: int = 0) -> ir.Value:
        """The 4 bits of the codes from `place` on: INT4 that begin at -`lowest`, or UINT4."""
        dtype = (ir.DataType.INT4 if lowest else ir.DataType.UINT4).numpy()
        return self._constant(
            "codes4", lambda: ((stored.field(4, place).astype(np.int8) - lowest).astype(dtype)).reshape(stored.shape)
        )

    def _field(self, stored: _Stored, width: int, place: int) -> ir.Value:
        """Bits `place` to `place + width` of the codes: what lies above them in a byte is shifted out, then what below."""
        if self._four_bit and width == 4:
            return self._cast(self._nibbles(stored, place), ir.DataType.UINT8)
        each, axis = 8 // width, 1 if self._by_rows else 0
        packed = self._per_output(f"codes{width}", lambda: pack(stored.field(width, place), width, axis=axis))
        column = (each, 1) if self._by_rows else (each, 1, 1)
        above = self._shared(
            f"above{width}_{len(column)}", lambda: np.arange(8 - width, -1, -width, dtype=np.uint8).reshape(column)
        )
        high = self._add("BitShift", packed, above, direction="LEFT")
        low = self._add("BitShift", high, self._byte(8 - width), direction="RIGHT")
        size = len(stored.codes)
        padded = -(-size // each) * each
        if padded == size:
            return self._reshape(low, stored.shape)
        whole = self._reshape(low, (self._outputs, padded) if self._by_rows else (padded, self._outputs))
        cut = self._add("Slice", whole, self._index(0), self._index(size), self._index(-1 if self._by_rows else 0))
        return self._reshape(cut, stored.shape) if stored.groups > 1 else cut

    def _ungrouped(self, value: ir.Value, groups: int) -> None:
        if groups > 1:
            self._reshape(value, self._stored(1).shape)

    def _index(self, number: int) -> ir.Value:
        return self._shared(f"index{number}", lambda: np.array([number], dtype=np.int64))

    def _byte(self, number: int) -> ir.Value:
        return self._shared(f"byte{number}", lambda: np.array(number, dtype=np.uint8))

    def _per_group(self, suffix: str, values: npt.NDArray[np.int8]) -> ir.Value:
        """int8 [G, N] as it broadcasts against values in groups; one number where all are equal."""
        if _uniform(values):
            return self._constant(suffix, lambda: np.array(values.flat[0]))
        if self._by_rows:
            return self._per_output(suffix, lambda: values.T[:, :, None] if values.shape[0] > 1 else values.T)
        return self._constant(suffix, lambda: values[:, None, :] if values.shape[0] > 1 else values)

    def _per_output(self, suffix: str, make: Callable[[], Array]) -> ir.Value:
        """A constant with an entry for each output column, or the entries of the rows `ids`."""
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

    def _reshape(self, value: ir.Value, wanted: tuple[int, ...]) -> ir.Value:
        shape = [*[0] * self._lead, *wanted[1:]] if self._by_rows else list(wanted)
        name = "shape_" + "_".join(map(str, shape))
        return self._add("Reshape", value, self._shared(name, lambda: np.array(shape, dtype=np.int64)))

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self._add("Cast", value, to=dtype)

    def _add(self, op_type: str, *inputs: ir.Value, **attributes: int | str) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=f"{self._name}_decode_{len(self._nodes)}")
        self._nodes.append(node)
        return node.outputs[0]


def pack(codes: npt.NDArray[np.uint8], width: int, *, axis: int) -> npt.NDArray[np.uint8]:
    """Codes of 1, 2 or 4 bits as bytes: byte p holds codes p, P + p, 2 P + p ... along `axis`, lowest first.

    An axis of 1 is added in front of that one, to be unpacked to: rows [N, K] to [N, 1, P], columns [K, N] to [1, P, N].
    """
    each = 8 // width
    rows = codes if axis else codes.T
    fields = np.pad(rows, ((0, 0), (0, -rows.shape[1] % each))).reshape(len(rows), each, -1)
    places = np.arange(0, 8, width, dtype=np.uint8).reshape(each, 1)
    packed = np.bitwise_or.reduce(fields << places, axis=1, keepdims=True)
    return np.ascontiguousarray(packed if axis else packed.transpose(1, 2, 0), dtype=np.uint8)


def evaluate(value: ir.Value | None, given: Mapping[ir.Value, Array] | None = None) -> Array | None:
    """The array of a constant, or of what a chain makes of constants and of `given` values; None for anything else."""
    if value is not None and given is not None and value in given:
        return given[value]
    if value is None or value.is_graph_input():
        return None
    found = graph.constant(value)
    node = graph.producer(value)
    if found is not None or node is None or node.op_type not in _NUMPY or node.domain not in ("", "ai.onnx"):
        return found
    inputs = []
    for entry in node.inputs:
        array = evaluate(entry, given)
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
    elif node.op_type == "Concat":
        chosen = list(node.inputs[:1])
    else:
        chosen = [node.inputs[1 if node.op_type in ("Gather", "GatherElements") else 0]]
    return [leaf for entry in chosen if entry is not None for leaf in stored_codes(entry)]


def _without_one_group(alphas: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    return alphas[0] if len(alphas) == 1 else alphas


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


def _matmul_integer(node: ir.Node, inputs: list[Array]) -> Array:
    left, right, zero_point = (np.asarray(entry, dtype=np.int32) for entry in inputs)
    return np.asarray(np.matmul(left - zero_point, right))


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
    "Concat": lambda node, inputs: np.concatenate(inputs, axis=_axis(node)),
    "Expand": lambda node, inputs: np.broadcast_to(inputs[0], tuple(np.asarray(inputs[1]).tolist())),
    "Gather": lambda node, inputs: np.take(inputs[0], np.asarray(inputs[1], dtype=np.int64), axis=_axis(node)),
    "GatherElements": _gather_elements,
    "MatMulInteger": _matmul_integer,
    "Mul": lambda node, inputs: np.asarray(np.multiply(*inputs)),
    "ReduceSum": _reduce_sum,
    "Reshape": _reshape,
    "Slice": _slice,
    "Transpose": lambda node, inputs: np.transpose(inputs[0], _permutation(node)),
}
"""What the operators of a chain do, without a runtime."""
