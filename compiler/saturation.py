"""Which columns of a weight could overflow the 16 bits in which a CPU without VNNI adds two neighbouring products.

Rows 2k and 2k + 1 of a column are multiplied and added together; their integers a, b of one sign are safe when
(|a| + |b|) * largest activation code <= 32767 (docs/decisions/0002). Integers up to half that limit are safe in any order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

INT8_MAX = 127
INT16_MAX = 32767


def pair_limit(activation_bits: int | None) -> int:
    """The largest |a| + |b| that is safe with an activation of 1 to 8 bits, or in float (None), where any is."""
    return 2 * INT8_MAX + 2 if activation_bits is None else INT16_MAX // ((1 << activation_bits) - 1)


def largest_pair(weight: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """Per column of [K, N], the largest |a| + |b| over neighbouring rows of one sign: [N]."""
    even, odd = (np.asarray(weight[start::2], dtype=np.float32) for start in (0, 1))
    even = even[: odd.shape[0]]
    # of two of one sign the sum is the largest in magnitude, of others one of the two
    candidates = (even, odd, even + odd)
    highest = [rows.max(axis=0, initial=0) for rows in candidates]
    lowest = [rows.min(axis=0, initial=0) for rows in candidates]
    return np.asarray(np.maximum(np.maximum.reduce(highest), -np.minimum.reduce(lowest)), dtype=np.float32)


def saturating(integers: npt.NDArray[np.generic], activation_bits: int | None) -> npt.NDArray[np.bool_]:
    """Which columns of integers [K, N] hold a pair that is not safe: [N]."""
    return np.asarray(largest_pair(integers) > pair_limit(activation_bits))


def can_saturate(integers: npt.NDArray[np.generic], activation_bits: int | None = 8) -> int:
    """How many columns of integers [K, N] hold a pair that is not safe."""
    return int(saturating(integers, activation_bits).sum())


def level_limits(pairs: npt.NDArray[np.float32], activation_bits: int | None) -> npt.NDArray[np.float32]:
    """How large the largest integer of each column may become: 64 to 127.

    Args:
        pairs: the largest pair of each column when its largest integer is 127, [N]. With m instead of 127 it becomes
            pair * m / 127, and at most 1 more by rounding.
        activation_bits: of the activation, or None for float.
    """
    limit = pair_limit(activation_bits)
    fitting = np.divide(INT8_MAX * (limit - 1), pairs, out=np.full(pairs.shape, np.float32(INT8_MAX)), where=pairs > 0)
    return np.clip(np.floor(fitting), min(limit // 2, INT8_MAX), INT8_MAX).astype(np.float32)
