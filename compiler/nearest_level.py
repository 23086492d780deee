"""The nearest of a column's levels, for every weight, in time that does not depend on how many levels there are.

Levels are integers a <= b, so the border between two neighbours, (a + b) / 2, is a multiple of one half: the bucket
floor(2 w / s) decides which level is nearest to w / s, exactly. A table of the 512 buckets of int8 per column holds the
answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scalefold.compiler.weight_formats import Float, Int8, UInt8, row_blocks

BUCKETS = 512


@dataclass(frozen=True)
class NearestLevel:
    """The levels of one group of rows, ready to be looked up.

    Attributes:
        ascending: int8 [L, C], the levels in ascending order; C is 1 when all columns share them.
        codes: uint8 [L, C], the code of each.
        table: uint8 [512, C], the rank in `ascending` of the level nearest to bucket i, that is to i / 2 - 128.
    """

    ascending: Int8
    codes: UInt8
    table: UInt8

    @classmethod
    def of(cls, levels: Int8) -> NearestLevel:
        """Make the table of levels [L, C] in any order."""
        order = np.argsort(levels, axis=0, kind="stable")
        ascending = np.take_along_axis(levels, order, axis=0)
        columns = ascending.shape[1]
        borders = ascending[1:].astype(np.int64) + ascending[:-1] + BUCKETS // 2
        places = (borders * columns + np.arange(columns)).ravel()
        passed = np.bincount(places, minlength=BUCKETS * columns).reshape(BUCKETS, columns)
        return cls(ascending, order.astype(np.uint8), np.cumsum(passed, axis=0).astype(np.uint8))

    def ranks(self, values: npt.NDArray[np.floating]) -> UInt8:
        """Ranks in `ascending` of the levels nearest to values [rows, N] in units of the scale; a tie goes up."""
        buckets = np.clip(np.floor(values * 2), -BUCKETS // 2, BUCKETS // 2 - 1).astype(np.int16) + BUCKETS // 2
        return np.asarray(self._of(self.table, buckets), dtype=np.uint8)

    def at(self, ranks: UInt8) -> Int8:
        """The levels of ranks [rows, N]."""
        return np.asarray(self._of(self.ascending, ranks), dtype=np.int8)

    def codes_at(self, ranks: UInt8) -> UInt8:
        """The codes of ranks [rows, N]."""
        return np.asarray(self._of(self.codes, ranks), dtype=np.uint8)

    def _of(self, values: npt.NDArray[np.generic], places: npt.NDArray[np.integer]) -> npt.NDArray[np.generic]:
        columns = values.shape[1]
        found: npt.NDArray[np.generic] = values[:, 0][places] if columns == 1 else values[places, np.arange(columns)]
        return found


def nearest_codes(weight: Float, levels: Int8, scales: Float) -> UInt8:
    """The code of the level nearest to each weight.

    Args:
        weight: [K, N].
        levels: int8 [G, L, N] or [G, L, 1], of G groups of K / G rows.
        scales: [N].

    Returns:
        uint8 [K, N].
    """
    found = np.empty(weight.shape, dtype=np.uint8)
    group_of_lookup, lookup = -1, None
    for rows, group in row_blocks(weight.shape[0], levels.shape[0]):
        if lookup is None or group != group_of_lookup:
            group_of_lookup, lookup = group, NearestLevel.of(levels[group])
        found[rows] = lookup.codes_at(lookup.ranks(weight[rows] / scales))
    return found
