"""Error compensation: what rounding one row of a weight loses, the rows after it make up for (GPTQ, Frantar et al. 2023).

The layer's output X W should stay, so the objective is not |W - W^|^2 but, with the Hessian H = X^T X [K, K] of the
calibration inputs,

    sum over columns n of (w_n - w^_n)^T H (w_n - w^_n)

Rows are rounded in order. After row i the best change of the rows j > i not rounded yet is

    W[j] -= U[i, j] / U[i, i] * (W[i] - W^[i]),      H^-1 = U^T U, U upper triangular

(Optimal Brain Surgeon, all later rows at once; equation 3 and the Cholesky form of the paper). Here rounding is to the
nearest of any levels a column may have in that group of rows: grids, codebooks and binary codings alike. The levels are
fixed before and do not follow the changed weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scalefold.compiler.nearest_level import NearestLevel
from scalefold.compiler.saturation import pair_limit
from scalefold.compiler.weight_formats import Float, Int8, UInt8

Double = npt.NDArray[np.float64]

DAMPING = 0.01
ROWS_PER_BLOCK = 64


@dataclass(frozen=True)
class InverseFactor:
    """U of H^-1 = U^T U, for a damped Hessian.

    Attributes:
        upper: [K, K], upper triangular.
    """

    upper: Double

    @classmethod
    def of(cls, hessian: npt.NDArray[np.floating], damping: float = DAMPING) -> InverseFactor:
        """Factor H + damping * mean(diag H) * I in float64.

        A row without input (H[i, i] = 0) has nothing to compensate and gets nothing: it stands alone, with 1 on the
        diagonal, and is rounded as it is. H = M M^T with M upper triangular is the Cholesky factor of H turned upside
        down, and U = M^-1: one factorization and one inverse where the paper's code has two and one.

        Args:
            hessian: [K, K], symmetric, positive semi-definite.
            damping: share of the mean diagonal that is added to it.
        """
        damped = hessian.astype(np.float64)
        diagonal = np.diagonal(damped).copy()
        dead = diagonal <= 0
        damped[dead, :] = 0
        damped[:, dead] = 0
        added = damping * diagonal[~dead].mean() if not dead.all() else 0.0
        np.fill_diagonal(damped, np.where(dead, 1.0, diagonal + added))
        factor = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
        return cls(np.triu(np.linalg.inv(factor)))


def compensated_codes(
    weight: Float, levels: Int8, scales: Float, inverse: InverseFactor, activation_bits: int | None = 8
) -> UInt8:
    """Codes of a weight, row by row, each row making up for those before it.

    Args:
        weight: [K, N].
        levels: int8 [G, L, N] or [G, L, 1], the levels of G groups of K / G rows.
        scales: [N].
        inverse: of the Hessian of the layer's inputs, [K, K].
        activation_bits: of the layer's inputs; the second row of a pair keeps to the levels that cannot saturate.

    Returns:
        uint8 [K, N].
    """
    rest = weight.astype(np.float64) / scales
    codes = np.empty(weight.shape, dtype=np.uint8)
    group_size = weight.shape[0] // levels.shape[0]
    rounding = _Rounding(pair_limit(activation_bits))
    for start in range(0, len(rest), ROWS_PER_BLOCK):
        stop = min(start + ROWS_PER_BLOCK, len(rest))
        errors = np.empty((stop - start, rest.shape[1]))
        for row in range(start, stop):
            if row % group_size == 0:
                rounding.use(levels[row // group_size])
            codes[row], integers = rounding.round(rest[row], second=bool(row % 2))
            errors[row - start] = (rest[row] - integers) / inverse.upper[row, row]
            rest[row + 1 : stop] -= inverse.upper[row, row + 1 : stop, None] * errors[row - start]
        rest[stop:] -= inverse.upper[start:stop, stop:].T @ errors
    return codes


def fitted_scales(weight: Float, integers: Int8, scales: Float, hessian: npt.NDArray[np.floating]) -> Float:
    """The scale of each column that is best under the Hessian, z^T H w / z^T H z: [N]; as it was where that says nothing.

    Args:
        weight: w, [K, N].
        integers: z, [K, N].
        scales: [N].
        hessian: H, [K, K].
    """
    products = hessian @ integers.astype(np.float64)
    above, below = (products * weight).sum(axis=0), (products * integers).sum(axis=0)
    found = np.divide(above, below, out=scales.astype(np.float64), where=below > 0).astype(np.float32)
    return np.where(found > 0, found, scales)


class _Rounding:
    """Rounds one row after another to the nearest levels, the second of a pair within what the first leaves."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._nearest: NearestLevel | None = None
        self._before: npt.NDArray[np.int16] | None = None

    def use(self, levels: Int8) -> None:
        """Round to levels [L, C] from now on."""
        self._nearest = NearestLevel.of(levels)

    def round(self, values: Double, *, second: bool) -> tuple[UInt8, npt.NDArray[np.int16]]:
        """Codes and integers of one row [N] in units of the scale."""
        assert self._nearest is not None
        ranks = self._nearest.ranks(values[None])
        if second and self._before is not None:
            high = self._limit - np.maximum(self._before, 0)
            low = -self._limit - np.minimum(self._before, 0)
            ranks = self._nearest.ranks(np.clip(values, low, high)[None])
            integers = self._nearest.at(ranks)[0]
            # The level nearest to a bound may lie one beyond it.
            ranks = ranks - ((integers > high) & (ranks[0] > 0)) + ((integers < low) & (ranks[0] < self._last))
        integers = self._nearest.at(ranks)[0].astype(np.int16)
        self._before = integers
        return self._nearest.codes_at(ranks)[0], integers

    @property
    def _last(self) -> int:
        assert self._nearest is not None
        return len(self._nearest.ascending) - 1
