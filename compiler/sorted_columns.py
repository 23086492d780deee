"""Columns of a weight sorted once, so that the error of any set of levels is a few look-ups.

A weight w quantized to the nearest of levels l_0 <= l_1 <= ... falls into the interval between two midpoints. With the
column sorted, an interval is a slice, and prefix sums of h, h w (h the importance of a weight) give its mass m_j and its
moment s_j. Everything a one-dimensional solver asks for follows, without a look at the weights:

    centroid of interval j   c_j = s_j / m_j
    squared error            sum h w^2  -  2 sum_j l_j s_j  +  sum_j l_j^2 m_j

A step of Lloyd's algorithm thus takes O(L log K) per column instead of O(L K). All columns are searched in one call: each is
mapped to an interval of its own, [2c, 2c + 1], so that together they are one sorted array.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Double = npt.NDArray[np.float64]
Index = npt.NDArray[np.intp]

HISTOGRAM_BINS = 1 << 16


@dataclass(frozen=True)
class SortedColumns:
    """C columns of P sorted points with prefix sums.

    Attributes:
        points: [C, P], ascending.
        mass: [C, P + 1], sums of the importances of the points before each index.
        moment: [C, P + 1], the same of importance * point.
        energy: [C], sum of importance * point^2.
        keys: [C * P], the points of column c mapped to [2c, 2c + 1].
    """

    points: Double
    mass: Double
    moment: Double
    energy: Double
    keys: Double

    @classmethod
    def of(cls, columns: npt.NDArray[np.floating], importance: Double | None = None) -> SortedColumns:
        """Sort columns [C, P] whose points have an importance [C, P], or the same one where None."""
        points = columns.astype(np.float64)
        if importance is None:
            points.sort(axis=1)
            weights = np.ones_like(points)
        else:
            order = points.argsort(axis=1, kind="stable")
            points = np.take_along_axis(points, order, axis=1)
            weights = np.take_along_axis(importance.astype(np.float64), order, axis=1)
        return cls._made(points, weights, weights * points, (weights * points**2).sum(axis=1))

    @classmethod
    def histogram(cls, blocks: Iterable[tuple[Double, Double]], low: float, high: float) -> SortedColumns:
        """One column that stands for very many values: `HISTOGRAM_BINS` bins, each its centroid; the energy is exact.

        Args:
            blocks: values and their importances, of shapes that broadcast.
            low: the smallest of all values.
            high: the largest.
        """
        mass, moment, energy = np.zeros(HISTOGRAM_BINS), np.zeros(HISTOGRAM_BINS), 0.0
        width = (high - low) / HISTOGRAM_BINS or 1.0
        for values, importance in blocks:
            weights = np.broadcast_to(importance, values.shape)
            bins = np.clip((values - low) / width, 0, HISTOGRAM_BINS - 1).astype(np.int64).ravel()
            mass += np.bincount(bins, weights.ravel(), HISTOGRAM_BINS)
            moment += np.bincount(bins, (weights * values).ravel(), HISTOGRAM_BINS)
            energy += float((weights * values**2).sum())
        filled = mass > 0
        points = moment[filled] / mass[filled]
        return cls._made(points[None], mass[filled][None], moment[filled][None], np.array([energy]))

    @classmethod
    def _made(cls, points: Double, mass: Double, moment: Double, energy: Double) -> SortedColumns:
        def prefix(values: Double) -> Double:
            sums = np.zeros((values.shape[0], values.shape[1] + 1))
            np.cumsum(values, axis=1, out=sums[:, 1:])
            return sums

        return cls(points, prefix(mass), prefix(moment), energy, _keys(points, points).ravel())

    @property
    def count(self) -> int:
        """The number of columns, C."""
        return len(self.points)

    def intervals(self, levels: Double) -> tuple[Double, Double]:
        """Mass and moment of the points nearest to each of the ascending levels [C, L]: both [C, L]."""
        count, size = self.points.shape
        borders = _keys(self.points, (levels[:, 1:] + levels[:, :-1]) / 2)
        row = np.arange(count)[:, None]
        # Sums have one entry more per column than the points, so that an index into the points grows by its column.
        edges = np.empty((count, levels.shape[1] + 1), dtype=np.intp)
        edges[:, 1:-1] = np.searchsorted(self.keys, borders.ravel()).reshape(borders.shape) + row
        edges[:, :1], edges[:, -1:] = row * (size + 1), row * (size + 1) + size
        return np.diff(self.mass.ravel()[edges], axis=1), np.diff(self.moment.ravel()[edges], axis=1)

    def error(self, levels: Double) -> Double:
        """Squared error of rounding to the nearest of the ascending levels [C, L]: [C]."""
        return self.error_of(levels, *self.intervals(levels))

    def error_of(self, levels: Double, mass: Double, moment: Double) -> Double:
        """Squared error when level j [C, L] stands for points of that mass and moment: [C], never below 0."""
        found = self.energy - 2 * (levels * moment).sum(axis=1) + (levels**2 * mass).sum(axis=1)
        return np.asarray(np.maximum(found, 0.0), dtype=np.float64)


def _keys(points: Double, values: Double) -> Double:
    """`values` [C, V] on the intervals that hold the sorted columns `points` [C, P]."""
    low, span = points[:, :1], points[:, -1:] - points[:, :1]
    # A border beyond the points stays beyond them, and short of the next column's.
    mapped = np.clip((values - low) / np.where(span > 0, span, 1.0), -0.25, 1.25)
    return np.asarray(mapped + 2.0 * np.arange(points.shape[0])[:, None], dtype=np.float64)
