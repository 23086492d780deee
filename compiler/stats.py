"""Statistics of activations, gathered in one stream and mergeable in any order (a commutative monoid).

Every statistic sees rows: float32 of shape [tokens, channels], padding already left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from scalefold.compiler.schemes import Float


class Statistic(Protocol):
    """What a pass can ask to be gathered about one tensor."""

    def update(self, rows: Float, sample: int) -> None:
        """Take in the rows [tokens, channels] of one sample, numbered from 0."""

    def merge(self, other: Self) -> Self:
        """The statistic of both streams together; neither operand changes."""


@dataclass
class ChannelRange:
    """Smallest and largest value of each channel.

    Attributes:
        low: [channels], None before the first update.
        high: [channels].
    """

    low: Float | None = None
    high: Float | None = None

    def update(self, rows: Float, sample: int) -> None:
        """Widen the range by `rows`."""
        if rows.shape[0]:
            self._widen(rows.min(axis=0), rows.max(axis=0))

    def merge(self, other: Self) -> Self:
        """The range that covers both."""
        merged = type(self)(self.low, self.high)
        if other.low is not None and other.high is not None:
            merged._widen(other.low, other.high)
        return merged

    def _widen(self, low: Float, high: Float) -> None:
        self.low = low if self.low is None else np.minimum(self.low, low)
        self.high = high if self.high is None else np.maximum(self.high, high)


@dataclass
class AverageRange:
    """Mean over samples of each sample's smallest and largest value (OS+'s AvgMinMax).

    Attributes:
        low_sum: sum of the samples' minima.
        high_sum: sum of the samples' maxima.
        count: samples seen.
    """

    low_sum: float = 0.0
    high_sum: float = 0.0
    count: int = 0

    def update(self, rows: Float, sample: int) -> None:
        """Add one sample."""
        if rows.size:
            self.low_sum += float(rows.min())
            self.high_sum += float(rows.max())
            self.count += 1

    def merge(self, other: Self) -> Self:
        """Sums add up."""
        return type(self)(self.low_sum + other.low_sum, self.high_sum + other.high_sum, self.count + other.count)

    @property
    def range(self) -> tuple[float, float]:
        """(low, high), averaged."""
        return self.low_sum / max(self.count, 1), self.high_sum / max(self.count, 1)


@dataclass
class TokenRange:
    """Each token's smallest and largest value, as a bounded bottom-k sample: exact up to `capacity` tokens.

    A token's priority is a hash of its sample and position, so the sample kept does not depend on the order of updates
    and merges. The extremes of the whole stream are kept exactly beside it.

    Attributes:
        capacity: most tokens held.
        entries: [n, 3] float64, rows of (priority, low, high), sorted by priority.
        low: smallest value of all.
        high: largest value of all.
        count: tokens seen.
    """

    capacity: int = 65536
    entries: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 3)))
    low: float = 0.0
    high: float = 0.0
    count: int = 0

    def update(self, rows: Float, sample: int) -> None:
        """Take in the tokens of one sample."""
        if not rows.shape[0]:
            return
        lows, highs = rows.min(axis=1), rows.max(axis=1)
        fresh = np.stack([_priorities(sample, rows.shape[0]), lows, highs], axis=1)
        self._absorb(fresh, float(lows.min()), float(highs.max()), rows.shape[0])

    def merge(self, other: Self) -> Self:
        """The bottom-k sample of both."""
        merged = type(self)(self.capacity, self.entries, self.low, self.high, self.count)
        merged._absorb(other.entries, other.low, other.high, other.count)
        return merged

    def quantiles(self, ratio: float) -> tuple[float, float]:
        """The range that keeps a share `ratio` of the tokens unclipped on either side: (low, high).

        Token-wise clipping (Outlier Suppression, Wei et al. 2022, eq. 8): quantiles are of the tokens' extremes, so one
        sharp token counts once however many channels it has. A ratio of 1 gives the exact extremes.
        """
        if ratio >= 1.0 or not len(self.entries):
            return self.low, self.high
        return (
            float(np.quantile(self.entries[:, 1], 1.0 - ratio)),
            float(np.quantile(self.entries[:, 2], ratio)),
        )

    def _absorb(self, entries: npt.NDArray[np.float64], low: float, high: float, count: int) -> None:
        both = np.concatenate([self.entries, entries])
        # a stable sort merges what is sorted already; a whole one took longer than running the model
        order = np.argsort(both[:, 0], kind="stable")
        self.entries = both[order[: self.capacity]]
        self.low = min(self.low, low) if self.count else low
        self.high = max(self.high, high) if self.count else high
        self.count += count


@dataclass
class RowSample:
    """A bounded bottom-k sample of whole rows, for searches that need real activations.

    Attributes:
        capacity: most rows held.
        priorities: [n], sorted.
        rows: [n, channels].
    """

    capacity: int = 512
    priorities: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    rows: Float | None = None

    def update(self, rows: Float, sample: int) -> None:
        """Take in the rows of one sample."""
        self._absorb(_priorities(sample, rows.shape[0]), rows)

    def merge(self, other: Self) -> Self:
        """The bottom-k sample of both."""
        merged = type(self)(self.capacity, self.priorities, self.rows)
        if other.rows is not None:
            merged._absorb(other.priorities, other.rows)
        return merged

    def _absorb(self, priorities: npt.NDArray[np.float64], rows: Float) -> None:
        if self.rows is not None:
            priorities = np.concatenate([self.priorities, priorities])
            rows = np.concatenate([self.rows, rows])
        order = np.argsort(priorities, kind="stable")[: self.capacity]
        self.priorities, self.rows = priorities[order], rows[order]


@dataclass
class SecondMoment:
    """Mean of x x^T over all rows x, in float64, or of its diagonal alone.

    It is half the Hessian of a linear layer's squared output error with respect to one column of its weight.

    Attributes:
        diagonal: whether only the squares are kept.
        total: the sum, [channels, channels] or [channels]; None before the first update.
        count: rows seen.
    """

    diagonal: bool = False
    total: npt.NDArray[np.float64] | None = None
    count: int = 0

    def update(self, rows: Float, sample: int) -> None:
        """Add the products of `rows`."""
        wide = rows.astype(np.float64)
        self._add(np.square(wide).sum(axis=0) if self.diagonal else wide.T @ wide, rows.shape[0])

    def merge(self, other: Self) -> Self:
        """Sums add up."""
        merged = type(self)(self.diagonal, None if self.total is None else self.total.copy(), self.count)
        if other.total is not None:
            merged._add(other.total, other.count)
        return merged

    @property
    def mean(self) -> npt.NDArray[np.float64] | None:
        """The mean over the rows seen; None before the first."""
        return None if self.total is None else self.total / max(self.count, 1)

    def _add(self, products: npt.NDArray[np.float64], count: int) -> None:
        if self.total is None:
            self.total = np.zeros_like(products)
        self.total += products
        self.count += count


def _priorities(sample: int, count: int) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1) that depend on the sample's number and the token's position only."""
    return np.random.Generator(np.random.Philox(key=sample)).random(count)
