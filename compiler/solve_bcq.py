"""Binary coding: a weight as a sum of q signed alphas.

    w  ~  sum_i alpha_i b_i,   b_i in {-1, +1},   alpha_i >= 0,   per column or per group of g rows of a column

* `greedy` (Guo et al. 2017): r = w; then q times b = sign(r), alpha = mean |r|, r = r - alpha b. Exact for q = 1.
* `alternating` (Xu et al. 2018): in turn the least-squares alphas for given signs, B^T B alpha = B^T w, and for given
  alphas the nearest of the 2^q sums. Started from greedy and from the best uniform grid, the better kept: from greedy
  alone it may end worse than the grid (0.0120 against 0.0116 at 4 bits on normal weights).

A uniform grid is a binary coding: with code = sum_i 2^i bit_i and b_i = 2 bit_i - 1,

    s (code - z)  =  sum_i (s 2^(i-1)) b_i  +  s ((2^q - 1) / 2 - z)

so one whose 0 lies midway between two levels, z = (2^q - 1) / 2, needs no offset.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from scalefold.compiler.schemes import SMALLEST_SCALE
from scalefold.compiler.sorted_columns import Double, SortedColumns
from scalefold.compiler.weight_formats import BinaryCoding, Float, bit_signs

ROUNDS = 15
TOLERANCE = 1e-5
COARSE_STEPS = tuple(0.82**power for power in range(22))
FINE_STEPS = (0.92, 0.96, 1.04, 1.08)
ROUNDING_SCALES = (1.0, 1.02, 1.04, 1.06, 1.09, 1.12, 1.16, 1.2)
SWEEPS = 2


@dataclass(frozen=True)
class BinaryFit:
    """Alphas in float for C = G * N cells, those of the first group of rows first.

    Attributes:
        cells: the sorted cells.
        alphas: [C, q], descending, not negative.
        groups: G.
        uniform: alphas of the best uniform grid, [C, q], that the integers must not be worse than; None for greedy.
    """

    cells: SortedColumns
    alphas: Double
    groups: int
    uniform: Double | None = None

    @classmethod
    def of(
        cls, weight: Float, bits: int, *, groups: int = 1, solver: str = "alternating", importance: Double | None = None
    ) -> BinaryFit:
        """Solve for the alphas of a weight [K, N].

        Args:
            weight: [K, N].
            bits: q, 1 to 8.
            groups: G, which divides K.
            solver: greedy or alternating.
            importance: of each row, [K]; 1 when None.
        """
        size = weight.shape[0] // groups
        points = weight.reshape(groups, size, -1).transpose(0, 2, 1).reshape(-1, size)
        mass = None
        if importance is not None:
            mass = np.repeat(importance.reshape(groups, 1, size), weight.shape[1], axis=1).reshape(-1, size)
        first = greedy(points.astype(np.float64), bits, mass)
        cells = SortedColumns.of(points, mass)
        if solver == "greedy":
            return cls(cells, first, groups)
        uniform = uniform_start(cells, bits)
        refined = [alternate(cells, start) for start in (first, uniform)]
        errors = [binary_error(cells, alphas) for alphas in refined]
        return cls(cells, np.where((errors[0] <= errors[1])[:, None], *refined), groups, uniform)

    def levels(self) -> Double:
        """The values of the codes, [G, 2^q, N]."""
        found = self.alphas @ bit_signs(self.alphas.shape[1]).T.astype(np.float64)
        return found.reshape(self.groups, -1, found.shape[1]).transpose(0, 2, 1)

    def rounded(self, limits: Float) -> tuple[BinaryCoding, Float]:
        """The alphas in integers of a scale per column, and the scales.

        Several scales are tried; with the best, single alphas move by one while that lowers the error, then the scale is
        fitted once more.

        Args:
            limits: [N], the largest sum of a column's alphas, 64 to 127.
        """
        bounds = np.tile(limits.astype(np.float64), self.groups)
        best = _IntegerAlphas(np.zeros_like(self.alphas), np.ones(len(limits)))
        best_error = np.full(len(limits), np.inf)
        for start in (self.alphas,) if self.uniform is None else (self.alphas, self.uniform):
            for scales in self._scales(start, limits):
                alphas = _within(np.rint(start / np.tile(scales, self.groups)[:, None]), bounds)
                found = _IntegerAlphas(alphas, scales)
                error = self._by_column(found.errors(self.cells)).sum(axis=0)
                best = found.where(error < best_error, best)
                best_error = np.minimum(error, best_error)
        best = best.fitted(self.cells)
        for _ in range(SWEEPS):
            best = best.moved(self.cells, bounds).fitted(self.cells)
        alphas = -np.sort(-best.alphas, axis=1)
        decoder = alphas.reshape(self.groups, -1, alphas.shape[1]).transpose(2, 0, 1).astype(np.int8)
        return BinaryCoding(decoder), best.scales.astype(np.float32)

    def _scales(self, alphas: Double, limits: Float) -> Iterator[Double]:
        """Scales [N] to try: from the smallest that the limits allow; without groups, also one that the last alpha fits."""
        ends = np.maximum(self._by_column(alphas.sum(axis=1)).max(axis=0), SMALLEST_SCALE)
        yield from (ends / limits * factor for factor in ROUNDING_SCALES)
        if self.groups == 1:
            last = np.maximum(alphas[:, -1], SMALLEST_SCALE)
            yield np.maximum(last / np.maximum(np.floor(last * limits / ends + 1e-6), 1), ends / limits)

    def _by_column(self, values: Double) -> Double:
        return values.reshape(self.groups, -1)


@dataclass(frozen=True)
class _IntegerAlphas:
    """Integers [C, q] and scales [N]."""

    alphas: Double
    scales: Double

    def errors(self, cells: SortedColumns) -> Double:
        return binary_error(cells, self.alphas * self._cell_scales(cells)[:, None])

    def where(self, chosen: npt.NDArray[np.bool_], other: _IntegerAlphas) -> _IntegerAlphas:
        cells = np.resize(chosen, len(self.alphas))[:, None]
        return _IntegerAlphas(np.where(cells, self.alphas, other.alphas), np.where(chosen, self.scales, other.scales))

    def moved(self, cells: SortedColumns, bounds: Double) -> _IntegerAlphas:
        """One sweep: each alpha one up or one down where that lowers the error of its cell."""
        best, best_error = self, self.errors(cells)
        for index in range(self.alphas.shape[1]):
            for change in (1.0, -1.0):
                alphas = best.alphas.copy()
                alphas[:, index] = np.maximum(alphas[:, index] + change, 0)
                trial = replace(best, alphas=alphas)
                error = np.where(alphas.sum(axis=1) <= bounds, trial.errors(cells), np.inf)
                best = replace(best, alphas=np.where((error < best_error)[:, None], alphas, best.alphas))
                best_error = np.minimum(error, best_error)
        return best

    def fitted(self, cells: SortedColumns) -> _IntegerAlphas:
        """The same integers with the scale of least squares, where it lowers the error of the column."""
        levels, mass, moment = _nearest(cells, self.alphas * self._cell_scales(cells)[:, None])
        integers = levels / self._cell_scales(cells)[:, None]
        shape = (-1, len(self.scales))
        above = (integers * moment).sum(axis=1).reshape(shape).sum(axis=0)
        below = (integers**2 * mass).sum(axis=1).reshape(shape).sum(axis=0)
        scales = np.divide(above, below, out=self.scales.copy(), where=below > 0)
        found = _IntegerAlphas(self.alphas, np.where(scales > SMALLEST_SCALE, scales, self.scales))
        old, new = (each.errors(cells).reshape(shape).sum(axis=0) for each in (self, found))
        return found.where(new < old, self)

    def _cell_scales(self, cells: SortedColumns) -> Double:
        return np.resize(self.scales, cells.count)


def greedy(points: Double, bits: int, mass: Double | None = None) -> Double:
    """The greedy alphas of cells: points [C, P], their importance [C, P] or None: [C, q], descending."""
    residual, alphas = points.copy(), np.empty((len(points), bits))
    total = None if mass is None else mass.sum(axis=1)
    for index in range(bits):
        size = np.abs(residual)
        alphas[:, index] = size.mean(axis=1) if mass is None else (size * mass).sum(axis=1) / total
        # The sign of 0 counts as +1: a binary code has no 0.
        residual -= np.where(residual >= 0, 1.0, -1.0) * alphas[:, index : index + 1]
    return -np.sort(-alphas, axis=1)


def alternate(cells: SortedColumns, alphas: Double) -> Double:
    """Alternating minimisation from alphas [C, q], the best met: [C, q], descending."""
    signs = bit_signs(alphas.shape[1]).astype(np.float64)
    outer = (signs[:, :, None] * signs[:, None, :]).reshape(len(signs), -1)
    best, best_error = alphas, binary_error(cells, alphas)
    for _ in range(ROUNDS):
        levels = best @ signs.T
        order = levels.argsort(axis=1, kind="stable")
        mass, moment = (_unsorted(each, order) for each in cells.intervals(np.take_along_axis(levels, order, axis=1)))
        normal = (mass @ outer).reshape(-1, alphas.shape[1], alphas.shape[1])
        # A code that no point takes leaves an alpha undetermined; a trace of damping then keeps it.
        damping = 1e-9 * np.maximum(mass.sum(axis=1), SMALLEST_SCALE)[:, None]
        normal[:, np.arange(alphas.shape[1]), np.arange(alphas.shape[1])] += damping
        solved = np.linalg.solve(normal, (moment @ signs + damping * best)[:, :, None])[:, :, 0]
        found = -np.sort(-np.abs(solved), axis=1)
        error = binary_error(cells, found)
        gained = best_error - error > TOLERANCE * best_error
        best = np.where((error < best_error)[:, None], found, best)
        best_error = np.minimum(error, best_error)
        if not gained.any():
            break
    return best


def uniform_start(cells: SortedColumns, bits: int) -> Double:
    """The alphas of the best uniform grid with 0 midway between two levels: [C, q], descending."""
    ratios = alphas_of_uniform(np.ones(1), (2.0**bits - 1) / 2, bits)[0][::-1].T
    whole = np.maximum(np.abs(cells.points[:, [0, -1]]).max(axis=1), SMALLEST_SCALE) / ratios.sum()
    best, best_error = whole, np.full(cells.count, np.inf)
    for steps in (COARSE_STEPS, FINE_STEPS):
        start = whole if steps is COARSE_STEPS else best
        for factor in steps:
            error = binary_error(cells, start[:, None] * factor * ratios)
            best = np.where(error < best_error, start * factor, best)
            best_error = np.minimum(error, best_error)
    return np.asarray(best[:, None] * ratios, dtype=np.float64)


def alphas_of_uniform(step: Double, zero_point: float | Double, bits: int) -> tuple[Double, Double]:
    """The binary coding that equals a uniform grid, step * (code - zero_point), with the same codes.

    Args:
        step: the grid's step, any shape.
        zero_point: of that shape, or one.
        bits: q.

    Returns:
        alphas [q, ...], where alphas[i] = step 2^(i-1) belongs to bit i, and the offset [...] to add to their sum.
    """
    powers = 2.0 ** (np.arange(bits) - 1)
    alphas = powers.reshape(-1, *([1] * np.ndim(step))) * step
    return alphas, np.asarray(step * (((1 << bits) - 1) / 2 - zero_point), dtype=np.float64)


def binary_error(cells: SortedColumns, alphas: Double) -> Double:
    """Squared error of the nearest sums of alphas [C, q]: [C]."""
    return cells.error_of(*_nearest(cells, alphas))


def _nearest(cells: SortedColumns, alphas: Double) -> tuple[Double, Double, Double]:
    """The sums in ascending order, and the mass and moment of what is nearest to each: [C, 2^q] all."""
    levels = np.sort(alphas @ bit_signs(alphas.shape[1]).T.astype(np.float64), axis=1)
    return levels, *cells.intervals(levels)


def _unsorted(values: Double, order: npt.NDArray[np.intp]) -> Double:
    found = np.empty_like(values)
    np.put_along_axis(found, order, values, axis=1)
    return found


def _within(alphas: Double, bounds: Double) -> Double:
    """Integers [C, q] whose sum stays within bounds [C]: what rounding added too much is taken from the largest."""
    excess = np.maximum(alphas.sum(axis=1) - bounds, 0)
    return np.concatenate([np.maximum(alphas[:, :1] - excess[:, None], 0), alphas[:, 1:]], axis=1)
