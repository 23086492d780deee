"""Evenly spaced levels: where they begin and how far apart they are.

    w  ~  low + step * code,   code = clip(round((w - low) / step), 0, 2^b - 1)

per column, or per group of rows of a column (together: cells). Solvers:

* `rtn`, round to nearest: the grid spans the weights. Symmetric: step = max|w| / (2^(b-1) - 1), a level at 0. Asymmetric:
  step = (max - min) / (2^b - 1), low = min.
* `mse`, clip search: the grid with the least sum h (w - w^)^2. A coarse search over steps, a fine one around the best, then
  least squares in turn: codes for given low and step, low and step for given codes.
* `hqq`, Half-Quadratic Quantization (Badri & Shaji 2023, https://mobiusml.github.io/hqq_blog): rtn's step, and the zero
  point z that minimises |w - w^|_p, p = 0.7, without calibration data. In turn, with w^ = (code - z) step:
      e = sign(r) max(|r| - |r|^(p-1) / beta, 0),  r = w - w^;     z = mean(code - (w - e) / step);     beta *= 1.01

Symmetric grids of the clip search have one of three places of 0, each column the best of them: low = -2^(b-1) step,
low = -(2^(b-1) - 1) step, or 0 midway between two levels, low = -(2^b - 1) / 2 step. The last is best for bell-shaped
weights, the only one at 1 bit, and the one that binary coding contains.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from scalefold.compiler.saturation import saturating
from scalefold.compiler.schemes import SMALLEST_SCALE, column_scales
from scalefold.compiler.weight_formats import Float, Grid

COARSE_STEPS = tuple(0.78**power for power in range(18))
FINE_STEPS = (0.88, 0.92, 0.96, 1.0, 1.04, 1.08, 1.13)
ROUNDING_SCALES = (1.0, 1.015, 1.035, 1.06, 1.1, 1.15, 1.22)
"""Scales that are tried for a grid in integers, relative to the smallest that its largest level allows."""
NEAR_MULTIPLES = (1.0, 0.98, 0.99, 1.01, 1.02)
SQUARES_ROUNDS = 8
SQUARES_GAIN = 1e-4
"""Relative gain that another round of least squares must bring to any cell."""

HQQ_NORM = 0.7
HQQ_BETA = 10.0
HQQ_GROWTH = 1.01
HQQ_ROUNDS = 20


@dataclass(frozen=True)
class LinearFit:
    """Grids in float for the cells of a weight [K, N]: G groups of g = K / G rows.

    Attributes:
        cells: float32 [G, g, N], the weight.
        importance: float32 [G, g, 1], h of each row.
        bits: 1 to 8.
        activation_bits: bits of the activation.
        low: float32 [G, N], the value of code 0.
        step: float32 [G, N], positive.
        symmetric: whether a group's offset follows from its multiplier.
        span_kept: whether integers are to keep the grid's ends (rtn, hqq), rather than to minimise the error.
    """

    cells: Float
    importance: Float
    bits: int
    activation_bits: int
    low: Float
    step: Float
    symmetric: bool
    span_kept: bool = False

    @classmethod
    def of(
        cls,
        weight: Float,
        bits: int,
        *,
        groups: int = 1,
        solver: str = "mse",
        symmetric: bool = True,
        importance: Float | None = None,
        activation_bits: int = 8,
    ) -> LinearFit:
        """Solve for the grids of a weight.

        Args:
            weight: [K, N].
            bits: 1 to 8.
            groups: G, which divides K.
            solver: rtn, mse or hqq.
            symmetric: as in the recipe; hqq moves the zero point whatever it says.
            importance: h of each row, [K]; 1 when None.
            activation_bits: of the activation; at 8 bits of weight it decides how far a grid must reach.
        """
        cells = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1])
        weights = np.ones(weight.shape[0], np.float32) if importance is None else importance.astype(np.float32)
        shaped = weights.reshape(*cells.shape[:2], 1)
        unsolved = cls(cells, shaped, bits, activation_bits, cells[:, 0], cells[:, 0], symmetric)
        covering = replace(unsolved, symmetric=symmetric and solver != "hqq")._covering()
        if solver == "rtn":
            return replace(covering, span_kept=True)
        if solver == "hqq":
            return replace(covering._half_quadratic(), symmetric=False, span_kept=True)
        clipped = replace(unsolved, symmetric=True)._clipped()
        if bits == 8:
            return clipped._safe(replace(unsolved, symmetric=True)._covering())
        return clipped if symmetric else clipped.freed()

    @property
    def top(self) -> int:
        """The largest code, 2^b - 1."""
        return (1 << self.bits) - 1

    def levels(self) -> Float:
        """The values of the codes in ascending order, [G, 2^b, N]."""
        codes = np.arange(1 << self.bits, dtype=np.float32)[None, :, None]
        return np.asarray(self.low[:, None] + self.step[:, None] * codes, dtype=np.float32)

    def errors(self) -> Float:
        """Sum h (w - w^)^2 of each cell, [G, N]."""
        offset = self.cells - self.low[:, None]
        offset /= self.step[:, None]
        found = np.rint(offset)
        np.clip(found, 0, self.top, out=found)
        found -= offset
        found *= found
        found *= self.importance
        return np.asarray(found.sum(axis=1) * self.step**2, dtype=np.float32)

    def best_of(self, others: Iterable[LinearFit]) -> LinearFit:
        """Of this fit and others, the one with the smallest error in each cell; the first on a tie."""
        low, step, least = self.low, self.step, self.errors()
        for other in others:
            error = other.errors()
            better = error < least
            low, step = np.where(better, other.low, low), np.where(better, other.step, step)
            least = np.minimum(error, least)
        return replace(self, low=low, step=step)

    def freed(self) -> LinearFit:
        """Clip search over asymmetric grids, from a symmetric one and from the span of the weights."""
        covering = replace(self, symmetric=False)._covering()
        shrunk = (
            replace(covering, low=covering.low * np.float32(factor), step=covering.step * np.float32(factor))
            for factor in COARSE_STEPS
        )
        return replace(self, symmetric=False).best_of(shrunk)._least_squares()

    def _codes(self) -> Float:
        codes = np.rint((self.cells - self.low[:, None]) / self.step[:, None])
        return np.asarray(np.clip(codes, 0, self.top, out=codes), dtype=np.float32)

    def _zero_places(self) -> tuple[float, ...]:
        """-low / step of the symmetric grids, the best for a coarse search first."""
        half = 1 << (self.bits - 1)
        midway = self.top / 2
        if self.bits == 1:
            return (midway,)
        # Levels of a grid with 0 midway are odd numbers up to 2^b - 1, which fill int8's safe half up to 6 bits.
        return (midway, half, half - 1) if self.bits <= 6 else (half, half - 1)[: 9 - self.bits]

    def _covering(self) -> LinearFit:
        """Round to nearest: the grid that spans the weights."""
        if self.symmetric and self.bits == 1:
            return self._at(0.5, _positive(2 * np.abs(self.cells).max(axis=1)))
        half = float(1 << (self.bits - 1))
        if self.symmetric:
            return self._at(
                half, np.stack([column_scales(cell, self.bits, self.activation_bits) for cell in self.cells])
            )
        low, high = self.cells.min(axis=1), self.cells.max(axis=1)
        # A constant has no span; a step of its own size keeps it on the grid.
        span = np.where(high > low, high - low, np.abs(low))
        return replace(self, step=_positive(span / np.float32(self.top)), low=low)

    def _clipped(self) -> LinearFit:
        """Clip search over symmetric grids."""
        largest = np.abs(self.cells).max(axis=1)
        first, *others = self._zero_places()
        whole = _positive(largest / np.float32(min(first, self.top - first)))
        coarse = self._at(first, whole).best_of(self._at(first, whole * np.float32(each)) for each in COARSE_STEPS[1:])
        fine = (self._at(zero, coarse.step * np.float32(factor)) for zero in (first, *others) for factor in FINE_STEPS)
        # What is constant, or has its largest member alone, is met by the grid that ends there.
        ending = (self._at(zero, _positive(largest / np.float32(self.top - zero))) for zero in (first, *others))
        return coarse.best_of([*fine, *ending])._least_squares()

    def _safe(self, covering: LinearFit) -> LinearFit:
        """At 8 bits: the clipped grid where no pair of its codes can saturate, and the covering one elsewhere.

        A weight midway between two levels counts as the farther one from 0, whichever its code will be.
        """
        places = (self.cells - self.low[:, None]) / self.step[:, None] - np.float32(1 << (self.bits - 1))
        farther = np.sign(places) * np.floor(np.abs(places) + np.float32(0.5 + 1e-4))
        half = np.float32(1 << (self.bits - 1))
        integers = np.clip(farther, -half, half - 1).reshape(-1, self.cells.shape[2])
        safe = ~saturating(integers, self.activation_bits)
        step, low = np.where(safe, self.step, covering.step), np.where(safe, self.low, covering.low)
        return replace(self, step=step, low=low)

    def _at(self, zero: float, step: Float) -> LinearFit:
        return replace(self, step=step, low=-np.float32(zero) * step)

    def _least_squares(self) -> LinearFit:
        """Codes for the grid, then the grid for the codes, while that helps."""
        best, least = self, self.errors()
        for _ in range(SQUARES_ROUNDS):
            codes = best._codes()
            if self.symmetric:
                zero = -best.low / best.step
                codes -= zero[:, None]
                step = _ratio(_sum(self.importance, codes, self.cells), _sum(self.importance, codes, codes), best.step)
                step = np.where(step > SMALLEST_SCALE, step, best.step)
                moved = replace(best, step=step, low=-zero * step)
            else:
                moved = best._regression(codes)
            error = moved.errors()
            better = error < least
            if not (least - error > SQUARES_GAIN * least).any():
                break
            best = replace(
                best, low=np.where(better, moved.low, best.low), step=np.where(better, moved.step, best.step)
            )
            least = np.minimum(error, least)
        return best

    def _regression(self, codes: Float) -> LinearFit:
        """The line w ~ low + step * code of each cell; the grid as it is where all codes are equal."""
        ones = np.ones_like(codes)
        mass, first, second = (_sum(self.importance, *pair) for pair in ((ones, ones), (ones, codes), (codes, codes)))
        moment, product = _sum(self.importance, ones, self.cells), _sum(self.importance, codes, self.cells)
        step = _ratio(mass * product - first * moment, mass * second - first**2, self.step)
        step = np.where(step > SMALLEST_SCALE, step, self.step)
        low = _ratio(moment - step * first, mass, self.low)
        return replace(self, low=low, step=step)

    def _half_quadratic(self) -> LinearFit:
        """HQQ: the zero point that makes the error sparse, from that of rtn; the best by mean |w - w^| is kept."""
        best, current, beta = self, self, HQQ_BETA
        distance = np.full(self.step.shape, np.inf)
        for _ in range(HQQ_ROUNDS):
            codes = current._codes()
            residual = self.cells - (current.low[:, None] + current.step[:, None] * codes)
            size = np.abs(residual)
            closer = size.mean(axis=1) < distance
            if not closer.any():
                break
            distance = np.where(closer, size.mean(axis=1), distance)
            best = replace(best, low=np.where(closer, current.low, best.low))
            with np.errstate(divide="ignore"):
                kept = np.maximum(size - size ** np.float32(HQQ_NORM - 1) / np.float32(beta), 0)
            target = self.cells - np.sign(residual) * kept
            low = (target - current.step[:, None] * codes).mean(axis=1)
            current, beta = replace(current, low=low.astype(np.float32)), beta * HQQ_GROWTH
        return best

    def rounded(self, limits: Float) -> tuple[Grid, Float]:
        """The grids in integers of a scale per column, chosen by the same error, and the scales.

        A symmetric grid per column is in integers as it is. Otherwise a scale s must suit both low / s = offset and
        step / s = multiplier, of all groups of the column: several s are tried, each with the multipliers below and
        above and the offset that centres the grid, and the best is refined by least squares.

        Args:
            limits: [N], the largest level of each column, 64 to 127.

        Returns:
            The decoder, and scales [N].
        """
        if self.cells.shape[0] == 1 and self.symmetric:
            return self._whole_multiples()
        if self.bits == 8:
            return replace(self, symmetric=True)._covering()._whole_multiples()
        best, best_error = None, np.full(self.step.shape[1], np.inf)
        for scales in self._scales(limits):
            found = self._in_integers(scales, limits)
            error = found.error(self)
            best = found if best is None else found.where(error < best_error, best)
            best_error = np.minimum(error, best_error)
        assert best is not None
        return best.refined(self).grid(self)

    def _scales(self, limits: Float) -> Iterator[Float]:
        """Scales [N] to try: without groups, such that the step is close to a multiple of them."""
        ends = np.maximum(np.abs(self.low), np.abs(self.low + self.top * self.step)).max(axis=0)
        smallest = _positive(ends / limits)
        if self.cells.shape[0] > 1:
            yield from (smallest * np.float32(factor) for factor in ROUNDING_SCALES)
            return
        step = self.step[0]
        most = np.maximum(np.floor(step / smallest * np.float32(1 + 1e-6)), 1)
        for fewer in (0, 1):
            multiple = step / np.maximum(most - fewer, 1)
            yield from (np.maximum(multiple * np.float32(factor), smallest) for factor in NEAR_MULTIPLES)

    def _whole_multiples(self) -> tuple[Grid, Float]:
        midway = np.rint(-2 * self.low / self.step) == self.top
        multipliers = np.where(midway, 2, 1)
        offsets = np.rint(self.low / self.step * multipliers)
        scales = (self.step / multipliers.astype(np.float32))[0]
        # Two levels around 0 have none at 0: nothing but 0 takes the first level, which is then 0 itself.
        offsets[:, ~self.cells.any(axis=(0, 1))] *= self.bits > 1
        grid = Grid(offsets.astype(np.int8), None if (multipliers == 1).all() else multipliers.astype(np.int8))
        return grid, scales

    def _in_integers(self, scales: Float, limits: Float) -> _IntegerGrid:
        """The best multiplier and offset of each cell for given scales [N]."""
        best, best_error = None, np.full(self.step.shape, np.inf)
        for multipliers, offsets in self._integer_candidates(scales, limits):
            found = _IntegerGrid(multipliers, offsets, scales)
            error = found.cell_errors(self)
            better = error < best_error
            best = (
                found
                if best is None
                else replace(
                    best,
                    multipliers=np.where(better, found.multipliers, best.multipliers),
                    offsets=np.where(better, found.offsets, best.offsets),
                )
            )
            best_error = np.minimum(error, best_error)
        assert best is not None
        return best

    def _integer_candidates(self, scales: Float, limits: Float) -> Iterator[tuple[Float, Float]]:
        half = np.float32(1 << (self.bits - 1))
        central = self.symmetric and self.bits > 1
        largest = np.floor(limits / half) if central else np.floor(2 * limits / np.float32(self.top))
        empty = ~self.cells.any(axis=1)
        for rounding in (np.floor, np.ceil):
            multipliers = np.where(empty, 1, np.clip(rounding(self.step / scales), 1, np.clip(largest, 1, 127)))
            if central:
                yield multipliers, -half * multipliers
                yield multipliers, -(half - 1) * multipliers
            else:
                middle = (self.low + self.step * np.float32(self.top / 2)) / scales
                span = multipliers * np.float32(self.top)
                offsets = np.clip(np.rint(middle - span / 2), -limits, np.maximum(limits - span, -limits))
                offsets = np.where(empty, 0, offsets)
                yield multipliers, offsets
                zero = np.clip(np.rint(-self.low / self.step), 0, self.top)
                within = ~empty & (multipliers * np.maximum(zero, self.top - zero) <= limits)
                yield multipliers, np.where(within, -multipliers * zero, offsets)


@dataclass(frozen=True)
class _IntegerGrid:
    """A grid in integers: multipliers [G, N], offsets [G, N], scales [N], all as float32."""

    multipliers: Float
    offsets: Float
    scales: Float

    def as_fit(self, fit: LinearFit) -> LinearFit:
        return replace(fit, low=self.offsets * self.scales, step=self.multipliers * self.scales)

    def cell_errors(self, fit: LinearFit) -> Float:
        found = self.as_fit(fit)
        if not fit.span_kept:
            return found.errors()
        high = found.low - fit.low + fit.top * (found.step - fit.step)
        return np.asarray((found.low - fit.low) ** 2 + high**2, dtype=np.float32)

    def error(self, fit: LinearFit) -> npt.NDArray[np.float64]:
        return np.asarray(self.cell_errors(fit).sum(axis=0), dtype=np.float64)

    def where(self, chosen: npt.NDArray[np.bool_], other: _IntegerGrid) -> _IntegerGrid:
        return _IntegerGrid(
            np.where(chosen, self.multipliers, other.multipliers),
            np.where(chosen, self.offsets, other.offsets),
            np.where(chosen, self.scales, other.scales),
        )

    def refined(self, fit: LinearFit) -> _IntegerGrid:
        """The same integers with the scales that fit them best."""
        best = self
        for _ in range(0 if fit.span_kept else 2):
            integers = best.as_fit(fit)._codes() * best.multipliers[:, None] + best.offsets[:, None]
            products = _sum(fit.importance, integers, fit.cells).sum(axis=0)
            scales = _ratio(products, _sum(fit.importance, integers, integers).sum(axis=0), best.scales)
            moved = replace(best, scales=np.where(scales > SMALLEST_SCALE, scales, best.scales))
            best = moved.where(moved.error(fit) < best.error(fit), best)
        return best

    def grid(self, fit: LinearFit) -> tuple[Grid, Float]:
        """As int8; a symmetric grid that reaches higher than low gets a negative multiplier: its offset still follows."""
        half = np.float32(1 << (fit.bits - 1))
        mirrored = (self.offsets == -(half - 1) * self.multipliers) if fit.symmetric and fit.bits > 1 else False
        multipliers = np.where(mirrored, -self.multipliers, self.multipliers)
        offsets = np.where(mirrored, half * self.multipliers, self.offsets)
        return Grid(offsets.astype(np.int8), multipliers.astype(np.int8)), self.scales


def _sum(importance: Float, first: Float, second: Float) -> Float:
    """Sum h a b over the rows of each cell: [G, N]."""
    products = first * second
    products *= importance
    return np.asarray(products.sum(axis=1), dtype=np.float32)


def _ratio(above: Float, below: Float, otherwise: Float) -> Float:
    """Above / below, or `otherwise` where nothing is below."""
    return np.divide(above, below, out=otherwise.copy(), where=below > 0)


def _positive(steps: Float) -> Float:
    """The steps, with 1 for those of cells that hold nothing but 0."""
    return np.where(steps > SMALLEST_SCALE, steps, np.float32(1)).astype(np.float32)
