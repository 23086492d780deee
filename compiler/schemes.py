"""Quantization schemes: the only code that rounds, clamps or computes a range.

Truth table (b is the number of bits, held in an 8-bit container):

| tensor     | container | codes                      | scale           | zero point        | symmetric |
| ---------- | --------- | -------------------------- | --------------- | ----------------- | --------- |
| activation | uint8     | 0 .. 2^b - 1               | one per tensor  | one, in the codes | no        |
| same, rows | uint8     | 0 .. 2^b - 1               | one per row     | the row's minimum | no        |
| same, two  | 2 x uint8 | 0 .. 255 each              | 256 t and t     | one, and 128      | no        |
| weight     | int8      | -(2^(b-1)-1) .. 2^(b-1)-1  | one per column  | 0                 | yes       |
| embedding  | int8      | -(2^(b-1)-1) .. 2^(b-1)-1  | one per row     | 0                 | yes       |
| bias       | int32     | all                        | act. x weight   | 0                 | yes       |

Rounding is to the nearest, ties to even, and arithmetic is float32: what ONNX QuantizeLinear defines.

Saturation. On x86 without VNNI the u8s8 kernel multiplies pairs of neighbouring rows and adds the two products in a
signed 16-bit register that saturates (vpmaddubsw), so the answer would depend on the CPU. A pair of codes a, b of one
sign is safe when (|a| + |b|) * largest activation code <= 32767. `column_scales` widens a column's scale just enough to
make every pair safe: bit-exact on every CPU, at about 2 dB of weight noise where 7-bit weights would cost 6 dB.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scalefold.compiler.saturation import largest_pair, pair_limit

Float = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8] | npt.NDArray[np.int8]

ROOM = 4
"""How much further than its extremes in calibration an activation in two codes may reach: a bit or two of sixteen."""

SMALLEST_SCALE = float(np.finfo(np.float32).tiny) * 1024


@dataclass(frozen=True)
class Affine:
    """A per-tensor affine grid: x ~ scale * (code - zero_point), codes in [0, 2**bits - 1].

    Attributes:
        scale: step of the grid, in units of x; positive.
        zero_point: the code that stands for 0.
        bits: 2 to 8; the container is uint8.
    """

    scale: float
    zero_point: int
    bits: int = 8

    @property
    def largest_code(self) -> int:
        """The largest code, 2**bits - 1."""
        return (1 << self.bits) - 1

    @property
    def low(self) -> float:
        """The smallest value the grid holds."""
        return float(np.float32(self.scale) * np.float32(-self.zero_point))

    @property
    def high(self) -> float:
        """The largest value the grid holds."""
        return float(np.float32(self.scale) * np.float32(self.largest_code - self.zero_point))

    def quantize(self, x: Float) -> npt.NDArray[np.uint8]:
        """Codes of `x`, any shape, rounded half to even and clamped."""
        codes = np.rint(x / np.float32(self.scale)) + np.float32(self.zero_point)
        return np.asarray(np.clip(codes, 0, self.largest_code), dtype=np.uint8)

    def dequantize(self, codes: npt.NDArray[np.uint8]) -> Float:
        """The float32 values that `codes` stand for."""
        return (codes.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)

    def round_trip(self, x: Float) -> Float:
        """`x` as the quantized graph sees it, without a detour through integers."""
        scale, zero = np.float32(self.scale), np.float32(self.zero_point)
        codes = np.divide(x, scale, dtype=np.float32)
        np.rint(codes, out=codes)
        np.clip(codes, -zero, np.float32(self.largest_code) - zero, out=codes)
        codes *= scale
        return codes


def activation_grid(low: float, high: float, bits: int = 8) -> Affine:
    """The uint8 asymmetric grid that covers [low, high] and holds 0 exactly.

    Args:
        low: smallest value to represent; taken as 0 when positive.
        high: largest value to represent; taken as 0 when negative.
        bits: 2 to 8.
    """
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    codes = (1 << bits) - 1
    scale = float(np.float32(max((high - low) / codes, SMALLEST_SCALE)))
    zero_point = int(np.clip(np.rint(-low / scale), 0, codes))
    return Affine(scale=scale, zero_point=zero_point, bits=bits)


def two_code_grids(low: float, high: float) -> tuple[Affine, Affine]:
    """The coarse grid of an activation in two uint8 codes, and the fine one of what the coarse code leaves over.

    A coarse step is 256 fine ones, so the two together are a code of 16 bits; there is room for `ROOM` times the range.

    Args:
        low: smallest value that calibration saw.
        high: largest value that it saw.
    """
    coarse = activation_grid(ROOM * low, ROOM * high)
    return coarse, Affine(float(np.float32(max(coarse.scale / 256, SMALLEST_SCALE))), 128)


def row_grid(bits: int = 8) -> Affine:
    """The uint8 grid of a row that was brought to [0, 1] by its minimum and span: codes 0 .. 2**bits - 1, zero point 0.

    Args:
        bits: 2 to 8.
    """
    return Affine(scale=float(np.float32(1 / ((1 << bits) - 1))), zero_point=0, bits=bits)


def round_trip_rows(x: Float, bits: int = 8) -> Float:
    """`x` [rows, K] as a graph sees it that quantizes each row by its own minimum and span."""
    low = x.min(axis=-1, keepdims=True)
    span = np.maximum(x.max(axis=-1, keepdims=True) - low, np.float32(SMALLEST_SCALE))
    return np.asarray(row_grid(bits).round_trip((x - low) / span) * span + low, dtype=np.float32)


def column_sums(codes: npt.NDArray[np.int8], scales: Float) -> Float:
    """The sum of each column of a weight with int8 codes [K, N] and scales [N] or (): float32 of shape [N]."""
    return np.asarray(codes.sum(axis=0, dtype=np.int64) * scales.astype(np.float64), dtype=np.float32)


def largest_weight_code(bits: int) -> int:
    """2**(bits-1) - 1: the narrow symmetric range."""
    return (1 << (bits - 1)) - 1


def column_scales(weight: Float, bits: int = 8, activation_bits: int = 8) -> Float:
    """Symmetric scale of each output column of a weight, free of int16 saturation.

    Args:
        weight: float32 of shape [K, N], K the inner (reduced) dimension.
        bits: 2 to 8, of the weight.
        activation_bits: 2 to 8, of the activation it is multiplied with.

    Returns:
        float32 of shape [N]; 1 for a column of zeros.
    """
    largest = largest_weight_code(bits)
    scales = np.abs(weight).max(axis=0) / np.float32(largest)
    limit = pair_limit(activation_bits)
    if 2 * largest > limit and weight.shape[0] > 1:
        # Rounding may lift each member of a pair by half a step, hence the 1.
        scales = np.maximum(scales, largest_pair(weight) / np.float32(limit - 1))
    return np.where(scales > SMALLEST_SCALE, scales, np.float32(1)).astype(np.float32)


def row_scales(table: Float, bits: int = 8) -> Float:
    """Symmetric scale of each row of an embedding table [V, H]: float32 of shape [V], 1 for a row of zeros."""
    scales = np.abs(table).max(axis=1) / np.float32(largest_weight_code(bits))
    return np.where(scales > SMALLEST_SCALE, scales, np.float32(1)).astype(np.float32)


def weight_codes(weight: Float, scales: Float, bits: int = 8) -> npt.NDArray[np.int8]:
    """int8 codes of `weight` for `scales` that broadcast against it, rounded half to even and clamped."""
    largest = largest_weight_code(bits)
    codes = np.divide(weight, scales, dtype=np.float32)
    np.rint(codes, out=codes)
    np.clip(codes, -largest, largest, out=codes)
    return codes.astype(np.int8)


def weight_round_trip(weight: Float, bits: int = 8, activation_bits: int = 8) -> Float:
    """`weight` [K, N] as the quantized graph sees it."""
    scales = column_scales(weight, bits, activation_bits)
    largest = largest_weight_code(bits)
    values = np.divide(weight, scales, dtype=np.float32)
    np.rint(values, out=values)
    np.clip(values, -largest, largest, out=values)
    values *= scales
    return values


def bias_codes(bias: Float, scales: Float) -> npt.NDArray[np.int32]:
    """int32 codes of `bias` [N] for `scales` [N] = activation scale x weight scales."""
    limits = np.iinfo(np.int32)
    return np.clip(np.rint(bias.astype(np.float64) / scales), limits.min, limits.max).astype(np.int32)
