"""k-means in one dimension: 2^b free levels for the weights of a column, or of the whole weight.

    minimise  sum_k h_k (w_k - l_c(k))^2   over levels l and codes c

h is 1, or the diagonal of the calibration Hessian, as SqueezeLLM (Kim et al. 2023) weights by the Fisher information.

* `lloyd` (Lloyd 1982): levels become the centroids of their intervals until that changes nothing, from several starts of
  which the best is kept: k-means++ (Arthur & Vassilvitskii 2007), the best linear grids, and the companded start.
* `exact`: the global optimum, by dynamic programming over the sorted column (Wu 1991; Wang & Song 2011),
      F_l(j) = max over i <= j of F_(l-1)(i) + S(i, j)^2 / M(i, j),   S, M the moment and mass of points i .. j - 1,
  whose best i grows with j, which gives O(L P log P) by divide and conquer, here for all columns at once.

Levels become int8 of the column's scale by the same objective: scales are tried, levels rounded, and the result refined
by Lloyd steps that stay on the integers. The rounded linear grids are candidates too, so k-means never loses to them.

Why no library: docs/decisions/0009-weight-solvers.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scalefold.compiler.schemes import SMALLEST_SCALE
from scalefold.compiler.sorted_columns import Double, Index, SortedColumns
from scalefold.compiler.weight_formats import Codebook, Float

ROUNDS = 100
ROUNDS_PER_START = 8
TOLERANCE = 1e-5
"""Relative gain of a Lloyd step below which a column is done."""
LARGEST_SEEDED = 32
"""Levels up to which k-means++ is among the starts; its cost grows with levels * points."""
ROUNDING_SCALES = tuple(1 + 0.018 * step for step in range(8))
INTEGER_ROUNDS = 10


@dataclass(frozen=True)
class KMeansFit:
    """Levels in float for C columns.

    Attributes:
        columns: the sorted columns.
        levels: [C, L], ascending.
    """

    columns: SortedColumns
    levels: Double

    @classmethod
    def of(cls, columns: SortedColumns, starts: list[Double], solver: str, seed: int = 0) -> KMeansFit:
        """Solve for the levels.

        Args:
            columns: the sorted columns.
            starts: level sets [C, L] to begin from, ascending.
            solver: lloyd or exact.
            seed: of k-means++.
        """
        if solver == "exact":
            return cls(columns, exact(columns, starts[0].shape[1]))
        return cls(columns, best_of_starts(columns, starts, seed))

    def rounded(self, limits: Float, grids: list[tuple[Double, Double]]) -> tuple[Codebook, Float]:
        """The levels as integers and the scale of each column.

        Args:
            limits: [C], the largest level of each column, 64 to 127.
            grids: levels [C, L] in integers and scales [C] that the result must not be worse than.

        Returns:
            A codebook of C columns, and scales [C].
        """
        bounds = limits.astype(np.float64)[:, None]
        ends = np.maximum(np.abs(self.levels).max(axis=1), SMALLEST_SCALE)
        best = _IntegerLevels(np.zeros_like(self.levels), np.ones(len(ends)))
        best_error = np.full(len(ends), np.inf)
        candidates = [(np.rint(self.levels / scale[:, None]), scale) for scale in self._scales(ends, limits)]
        for levels, scales in [*candidates, *grids]:
            found, error = _IntegerLevels(np.clip(levels, -bounds, bounds), scales).fitted(self.columns)
            best, best_error = found.where(error < best_error, best), np.minimum(error, best_error)
        best = best.refined(self.columns, bounds)
        return Codebook(best.levels.T.astype(np.int8)), best.scales.astype(np.float32)

    @staticmethod
    def _scales(ends: Double, limits: Float) -> list[Double]:
        return [ends / limits * factor for factor in ROUNDING_SCALES]


@dataclass(frozen=True)
class _IntegerLevels:
    """Ascending integers [C, L] and scales [C]."""

    levels: Double
    scales: Double

    def error(self, columns: SortedColumns) -> Double:
        return columns.error(self.levels * self.scales[:, None])

    def where(self, chosen: npt.NDArray[np.bool_], other: _IntegerLevels) -> _IntegerLevels:
        levels = np.where(chosen[:, None], self.levels, other.levels)
        return _IntegerLevels(levels, np.where(chosen, self.scales, other.scales))

    def fitted(self, columns: SortedColumns) -> tuple[_IntegerLevels, Double]:
        """The same integers with the least-squares scale of their intervals, and what the error then is at most."""
        mass, moment = columns.intervals(self.levels * self.scales[:, None])
        found = self._with_scale(mass, moment)
        return found, columns.error_of(found.levels * found.scales[:, None], mass, moment)

    def _with_scale(self, mass: Double, moment: Double) -> _IntegerLevels:
        above, below = (self.levels * moment).sum(axis=1), (self.levels**2 * mass).sum(axis=1)
        scales = np.divide(above, below, out=self.scales.copy(), where=below > 0)
        return _IntegerLevels(self.levels, np.where(scales > SMALLEST_SCALE, scales, self.scales))

    def refined(self, columns: SortedColumns, bounds: Double) -> _IntegerLevels:
        """Lloyd steps on the integers: each level to the integer nearest to its centroid, then the scale."""
        best, best_error = self, self.error(columns)
        for _ in range(INTEGER_ROUNDS):
            mass, moment = columns.intervals(best.levels * best.scales[:, None])
            centroids = np.divide(moment, mass, out=best.levels * best.scales[:, None], where=mass > 0)
            levels = np.clip(np.rint(centroids / best.scales[:, None]), -bounds, bounds)
            moved = _IntegerLevels(np.sort(levels, axis=1), best.scales)._with_scale(mass, moment)
            error = moved.error(columns)
            better = error < best_error
            if not better.any():
                break
            best, best_error = moved.where(better, best), np.minimum(error, best_error)
        return best


def best_of_starts(columns: SortedColumns, starts: list[Double], seed: int) -> Double:
    """Lloyd's algorithm from every start for a few rounds, then from the best of each column to the end: [C, L]."""
    count = starts[0].shape[1]
    made = [companded(columns, count), *([plus_plus(columns, count, seed)] if count <= LARGEST_SEEDED else [])]
    best, best_error = starts[0], np.full(columns.count, np.inf)
    for start in [*made, *starts]:
        levels, error = lloyd(columns, start, ROUNDS_PER_START)
        best = np.where((error < best_error)[:, None], levels, best)
        best_error = np.minimum(error, best_error)
    return lloyd(columns, best, ROUNDS)[0]


def lloyd(columns: SortedColumns, levels: Double, rounds: int) -> tuple[Double, Double]:
    """Lloyd's algorithm from ascending levels [C, L]; a level without points stays where it is.

    Returns:
        The levels, and the squared error of the last intervals, [C].
    """
    last = np.full(columns.count, np.inf)
    moving = np.full(columns.count, True)
    for _ in range(rounds):
        mass, moment = columns.intervals(levels)
        centroids = np.divide(moment, mass, out=levels.copy(), where=mass > 0)
        error = columns.error_of(centroids, mass, moment)
        levels = np.where(moving[:, None], np.sort(centroids, axis=1), levels)
        moving &= last - error > TOLERANCE * error
        last = error
        if not moving.any():
            break
    return levels, last


def companded(columns: SortedColumns, count: int) -> Double:
    """Levels as dense as the cube root of the weights' density (Panter & Dite 1951), the optimum for many levels: [C, L].

    Between sorted neighbours at distance d with mass m the density is m / d, so its cube root integrates to
    m^(1/3) d^(2/3) there; levels are the (j + 1/2) / L quantiles of the running sum.
    """
    gaps, mass = np.diff(columns.points, axis=1), np.diff(columns.mass, axis=1)
    share = np.zeros_like(columns.points)
    np.cumsum(np.cbrt((mass[:, 1:] + mass[:, :-1]) / 2 * gaps**2), axis=1, out=share[:, 1:])
    wanted = (np.arange(count) + 0.5) / count * share[:, -1:]
    places = [np.searchsorted(row, needle) for row, needle in zip(share, wanted, strict=True)]
    return np.take_along_axis(columns.points, np.stack(places), axis=1)


def plus_plus(columns: SortedColumns, count: int, seed: int) -> Double:
    """k-means++: each next level is a point, drawn by importance times squared distance to the nearest level: [C, L]."""
    generator = np.random.default_rng(seed)
    mass = np.diff(columns.mass, axis=1)
    chance, nearest = mass.copy(), np.full(mass.shape, np.inf)
    levels = np.empty((columns.count, count))
    for index in range(count):
        running = np.cumsum(chance, axis=1)
        drawn = (running <= generator.random((columns.count, 1)) * running[:, -1:]).sum(axis=1, keepdims=True)
        levels[:, index : index + 1] = np.take_along_axis(columns.points, np.minimum(drawn, mass.shape[1] - 1), axis=1)
        np.minimum(nearest, (columns.points - levels[:, index : index + 1]) ** 2, out=nearest)
        chance = mass * nearest
    return np.sort(levels, axis=1)


def exact(columns: SortedColumns, count: int) -> Double:
    """The levels of least squared error: [C, L], ascending; levels that are not needed repeat a neighbour."""
    size = columns.points.shape[1]
    gain = _gain(columns, np.zeros((columns.count, size + 1), np.intp), np.arange(size + 1)[None])
    origins = []
    for _ in range(count - 1):
        gain, origin = _next_layer(columns, gain)
        origins.append(origin)
    ends = np.full((columns.count, 1), size, dtype=np.intp)
    edges = [ends]
    for origin in reversed(origins):
        edges.append(np.take_along_axis(origin, edges[-1], axis=1))
    edges.append(np.zeros_like(ends))
    borders = np.concatenate(edges[::-1], axis=1)
    mass = np.diff(np.take_along_axis(columns.mass, borders, axis=1), axis=1)
    moment = np.diff(np.take_along_axis(columns.moment, borders, axis=1), axis=1)
    inside = np.take_along_axis(columns.points, np.minimum(borders[:, :-1], size - 1), axis=1)
    return np.sort(np.divide(moment, mass, out=inside, where=mass > 0), axis=1)


def _gain(columns: SortedColumns, begin: Index, end: Index) -> Double:
    """S(i, j)^2 / M(i, j) for points begin .. end - 1 of each column [C, X]; 0 for none."""
    end = np.broadcast_to(end, begin.shape)
    mass = np.take_along_axis(columns.mass, end, axis=1) - np.take_along_axis(columns.mass, begin, axis=1)
    moment = np.take_along_axis(columns.moment, end, axis=1) - np.take_along_axis(columns.moment, begin, axis=1)
    return np.divide(moment**2, mass, out=np.zeros_like(mass), where=mass > 0)


def _next_layer(columns: SortedColumns, before: Double) -> tuple[Double, Index]:
    """One more level: the best gain of the first j points, [C, P + 1], and where its last interval begins.

    The begin that is best for j lies between those of its neighbours that are known: ends are solved from coarse to fine,
    and what is to be tried for one end of one column is one segment of a flat array.
    """
    size = columns.points.shape[1]
    gain, origin = np.zeros_like(before), np.zeros(before.shape, dtype=np.intp)
    stride = 1 << size.bit_length()
    while stride > 1:
        ends = np.arange(stride // 2, size + 1, stride)
        left = origin[:, ends - stride // 2]
        after = ends + stride // 2
        right = np.minimum(np.where(after <= size, origin[:, np.minimum(after, size)], ends), ends)
        gain[:, ends], origin[:, ends] = _best_begin(columns, before, ends, left, right)
        stride //= 2
    return gain, origin


def _best_begin(columns: SortedColumns, before: Double, ends: Index, left: Index, right: Index) -> tuple[Double, Index]:
    """For each end and column, the best begin from `left` to `right`, [C, E] all: its gain and itself."""
    width = before.shape[1]
    lengths = (right - left + 1).ravel()
    first = np.cumsum(lengths) - lengths
    begin = np.arange(lengths.sum()) + np.repeat(left.ravel() - first, lengths)
    row = np.repeat(np.arange(columns.count) * width, len(ends))
    place, end = begin + np.repeat(row, lengths), np.repeat(row + np.tile(ends, columns.count), lengths)
    mass = columns.mass.ravel()[end] - columns.mass.ravel()[place]
    moment = columns.moment.ravel()[end] - columns.moment.ravel()[place]
    value = before.ravel()[place] + np.divide(moment**2, mass, out=np.zeros_like(mass), where=mass > 0)
    best = np.maximum.reduceat(value, first)
    is_best = value == np.repeat(best, lengths)
    found = np.minimum.reduceat(np.where(is_best, begin, width), first)
    return best.reshape(left.shape), found.reshape(left.shape)
