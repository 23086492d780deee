"""Coded weights: how a linear layer's weight is stored, and the integers that the kernel gets from it.

    weight [K, N]  ~  integers [K, N] (int8)  x  scales [N],      integers = decode(codes)

Codes hold b bits each. Every decoder ends in int8 with one scale per output column, so every format runs on the u8s8
kernel; what differs is the bytes on disk and the levels a weight can take:

| decoder        | integer of a code                             | levels of a column          | source           |
| -------------- | --------------------------------------------- | --------------------------- | ---------------- |
| `Grid`         | code * multiplier + offset, per group of rows | evenly spaced               | linear           |
| `Codebook`     | levels[code]                                  | free                        | Zhao et al. 2020 |
| `BinaryCoding` | sum of +-alphas[i], sign by bit i of the code | 2^q sums, symmetric about 0 | Guo et al. 2017  |

Why a grid adds an offset in the kernel's integers instead of subtracting a zero point from the code: a multiplier of 8,
say, then places the grid in eighths of its step. The grid with 0 midway between two levels (multiplier 2, offset
-(2^b - 1)), the best one at 1 to 4 bits, has no integer zero point at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scalefold.compiler.errors import ScalefoldError

Float = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]
UInt8 = npt.NDArray[np.uint8]

ROWS_AT_ONCE = 256
"""Rows that are decoded at once, which bounds the indices that numpy makes of them."""


@dataclass(frozen=True)
class Grid:
    """Evenly spaced levels: integer = code * multiplier + offset, in G groups of g = K / G rows.

    Attributes:
        offsets: int8 [G, N]. The integer of code 0.
        multipliers: int8 [G, N], never 0, or None for 1 everywhere. The step of the group in units of the column's scale.
    """

    offsets: Int8
    multipliers: Int8 | None = None

    def levels(self, bits: int) -> Int8:
        """The integer of every code, [G, 2**bits, N]."""
        return self._wide_levels(bits).astype(np.int8)

    def is_central(self, bits: int) -> bool:
        """Whether code 2**(bits-1) stands for 0 everywhere: integer = (code - 2**(bits-1)) * multiplier."""
        steps = np.int32(1) if self.multipliers is None else self.multipliers.astype(np.int32)
        return bool((self.offsets == -steps * (1 << (bits - 1))).all())

    def nbytes(self, bits: int) -> int:
        """Bytes of offsets and multipliers in a file, where what is central is left out and a constant is held once."""
        multipliers = 0 if self.multipliers is None else _stored(self.multipliers)
        return multipliers + (0 if self.is_central(bits) else _stored(self.offsets))

    def fault(self, bits: int, rows: int, columns: int) -> str | None:
        """What makes this no decoder of a [rows, columns] weight."""
        if fault := _grouping_fault("offsets", self.offsets, rows, columns):
            return fault
        if self.multipliers is not None:
            if self.multipliers.shape != self.offsets.shape or self.multipliers.dtype != np.int8:
                return "multipliers are not int8 of the shape of the offsets"
            if not self.multipliers.all():
                return "a multiplier is 0"
        levels = self._wide_levels(bits)
        return "a level of the grid is not an int8" if levels.min() < -128 or levels.max() > 127 else None

    def _wide_levels(self, bits: int) -> npt.NDArray[np.int32]:
        codes = np.arange(1 << bits, dtype=np.int32)[None, :, None]
        steps = np.int32(1) if self.multipliers is None else self.multipliers.astype(np.int32)[:, None, :]
        return np.asarray(codes * steps + self.offsets.astype(np.int32)[:, None, :], dtype=np.int32)


@dataclass(frozen=True)
class Codebook:
    """Free levels: integer = levels[code, column].

    Attributes:
        table: int8 [2**bits, C] in ascending order, C = 1 for one codebook of the whole weight or N for one per column.
    """

    table: Int8

    def levels(self, bits: int) -> Int8:
        """The integer of every code, [1, 2**bits, C]."""
        return self.table[None]

    def nbytes(self, bits: int) -> int:
        """Bytes of the codebook in a file."""
        return self.table.nbytes

    def fault(self, bits: int, rows: int, columns: int) -> str | None:
        """What makes this no decoder of a [rows, columns] weight."""
        if self.table.dtype != np.int8:
            return f"the codebook is {self.table.dtype}, not int8"
        if self.table.shape not in ((1 << bits, 1), (1 << bits, columns)):
            return f"the codebook has shape {self.table.shape}, not ({1 << bits}, 1 or {columns})"
        return None


@dataclass(frozen=True)
class BinaryCoding:
    """Sums of signed alphas: integer = sum_i (2 * bit_i(code) - 1) * alphas[i], in G groups of g = K / G rows.

    Attributes:
        alphas: int8 [q, G, N], not negative, the largest first; bit i of a code (bit 0 the lowest) belongs to alphas[i].
    """

    alphas: Int8

    def levels(self, bits: int) -> Int8:
        """The integer of every code, [G, 2**bits, N]; not in ascending order."""
        sums = np.einsum("ci,ign->gcn", bit_signs(bits), self.alphas, dtype=np.int32)
        return np.asarray(sums, dtype=np.int8)

    def nbytes(self, bits: int) -> int:
        """Bytes of the alphas in a file."""
        return self.alphas.nbytes

    def fault(self, bits: int, rows: int, columns: int) -> str | None:
        """What makes this no decoder of a [rows, columns] weight."""
        if self.alphas.ndim != 3 or self.alphas.shape[0] != bits:
            return f"alphas have shape {self.alphas.shape}, not ({bits}, groups, {columns})"
        if fault := _grouping_fault("alphas", self.alphas[0], rows, columns):
            return fault
        if (self.alphas < 0).any() or (np.diff(self.alphas.astype(np.int16), axis=0) > 0).any():
            return "alphas are negative or not in descending order"
        return "the alphas add up to more than int8 holds" if self.alphas.sum(axis=0, dtype=int).max() > 127 else None


Decoder = Grid | Codebook | BinaryCoding


@dataclass(frozen=True)
class CodedWeight:
    """A weight as codes of b bits, what decodes them to int8, and the scale of each output column.

    Attributes:
        codes: uint8 [K, N], each below 2**bits.
        bits: 1 to 8.
        decoder: what makes int8 of a code.
        scales: float32 [N], positive.

    Raises:
        ScalefoldError: when the parts do not fit one another.
    """

    codes: UInt8
    bits: int
    decoder: Decoder
    scales: Float

    def __post_init__(self) -> None:
        if fault := self._fault():
            raise ScalefoldError(
                fault, where=f"coded weight {self.codes.shape}", remedy="make it with scalefold.compiler.solve"
            )

    @property
    def levels(self) -> Int8:
        """The integer of every code in every group of rows and column: [G, 2**bits, N], or [1, 2**bits, 1] when shared."""
        return self.decoder.levels(self.bits)

    def integers(self) -> Int8:
        """What the kernel multiplies with: int8 [K, N]."""
        return chosen_levels(self.codes, self.levels)

    def dequantized(self) -> Float:
        """float32 [K, N]: integers * scales, bit for bit what DequantizeLinear gives."""
        return self.integers().astype(np.float32) * self.scales

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes at b bits each, without a gap."""
        return -(-self.codes.size * self.bits // 8)

    @property
    def overhead_bytes(self) -> int:
        """Bytes of all that is stored beside the codes: scales and decoder."""
        return self.scales.nbytes + self.decoder.nbytes(self.bits)

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk per weight, the overhead included."""
        return 8 * (self.code_bytes + self.overhead_bytes) / self.codes.size

    def _fault(self) -> str | None:
        if not 1 <= self.bits <= 8:
            return f"{self.bits} bits per code are not 1 to 8"
        if self.codes.ndim != 2 or self.codes.dtype != np.uint8 or not self.codes.size:
            return f"codes are {self.codes.dtype} of {self.codes.ndim} dimensions, not uint8 [K, N]"
        if int(self.codes.max()) >> self.bits:
            return f"code {int(self.codes.max())} does not fit {self.bits} bits"
        if self.scales.shape != self.codes.shape[1:] or self.scales.dtype != np.float32:
            return f"scales are {self.scales.dtype} {self.scales.shape}, not float32 ({self.codes.shape[1]},)"
        if not (np.isfinite(self.scales).all() and (self.scales > 0).all()):
            return "a scale is not a positive number"
        return self.decoder.fault(self.bits, *self.codes.shape)


def bit_signs(bits: int) -> npt.NDArray[np.int8]:
    """The sign that bit i of each code stands for: +1 or -1, [2**bits, bits]."""
    codes = np.arange(1 << bits)[:, None]
    return (2 * (codes >> np.arange(bits) & 1) - 1).astype(np.int8)


def chosen_levels(codes: UInt8, levels: Int8) -> Int8:
    """The levels [G, L, N] or [G, L, 1] that codes [K, N] stand for: int8 [K, N]."""
    found = np.empty(codes.shape, dtype=np.int8)
    for rows, group in row_blocks(codes.shape[0], levels.shape[0]):
        if levels.shape[2] == 1:
            found[rows] = levels[group, :, 0][codes[rows]]
        else:
            found[rows] = np.take_along_axis(levels[group], codes[rows], axis=0)
    return found


def row_blocks(rows: int, groups: int) -> Iterator[tuple[slice, int]]:
    """Slices of at most `ROWS_AT_ONCE` of `rows` rows that do not cross a group's border, each with its group."""
    size = rows // groups
    for group in range(groups):
        for start in range(group * size, (group + 1) * size, ROWS_AT_ONCE):
            yield slice(start, min(start + ROWS_AT_ONCE, (group + 1) * size)), group


def _grouping_fault(what: str, values: npt.NDArray[np.generic], rows: int, columns: int) -> str | None:
    if values.ndim != 2 or values.shape[1] != columns or values.dtype != np.int8:
        return f"{what} are {values.dtype} {values.shape}, not int8 (groups, {columns})"
    if not values.shape[0] or rows % values.shape[0]:
        return f"{values.shape[0]} groups do not divide {rows} rows"
    return None


def _stored(values: Int8) -> int:
    return 1 if (values == values.flat[0]).all() else values.nbytes
