"""From a weight and the format a recipe asks for to a coded weight: the one door to the solvers.

    weight [K, N]  ->  levels in float  ->  the same as integers of a scale per column  ->  codes  ->  CodedWeight
                       solve_linear,        `rounded` of each                              nearest level, or
                       solve_kmeans,                                                       compensate
                       solve_bcq

Columns are independent, so they are solved in blocks on all cores. A block's size depends on K alone, and what is drawn
at random is seeded by the block's first column: the result does not depend on the number of threads.

Levels may be as large as 127 where a column's neighbouring weights leave room (`saturation.level_limits`). Where the
codes that come out saturate nevertheless, the column's levels are rounded again with less room, at 64 at the latest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from scalefold.compiler.compensate import InverseFactor, compensated_codes, fitted_scales
from scalefold.compiler.errors import ScalefoldError
from scalefold.compiler.nearest_level import nearest_codes
from scalefold.compiler.recipe import WeightFormat
from scalefold.compiler.saturation import INT8_MAX, largest_pair, level_limits, pair_limit, saturating
from scalefold.compiler.schemes import SMALLEST_SCALE
from scalefold.compiler.solve_bcq import BinaryFit
from scalefold.compiler.solve_kmeans import KMeansFit
from scalefold.compiler.solve_linear import LinearFit
from scalefold.compiler.sorted_columns import Double, SortedColumns
from scalefold.compiler.weight_formats import BinaryCoding, Codebook, CodedWeight, Decoder, Float, Grid, chosen_levels

POINTS_PER_BLOCK = 1 << 18
"""Weights in a block of columns: small enough for a core's cache, large enough that numpy's calls do not count."""
LIMIT_SHRINK = 0.9
"""By how much the largest level of a column falls when its codes saturate."""
SHARED_ROUNDS = 3
"""How often a codebook of the whole weight and the scales of its columns are fitted in turn."""

Rounded = Callable[[Float], tuple[Decoder, Float]]
_Result = TypeVar("_Result")


def solve(
    weight: Float,
    options: WeightFormat,
    hessian: npt.NDArray[np.floating] | None = None,
    activation_bits: int | None = 8,
    *,
    name: str = "weight",
    threads: int | None = None,
) -> CodedWeight:
    """Quantize a weight.

    Args:
        weight: [K, N], K the inner (reduced) dimension.
        options: format, bits, groups and solver.
        hessian: H = X^T X of the layer's inputs [K, K], or its diagonal [K] where only a weighting is asked for.
        activation_bits: of the layer's inputs, 1 to 8, or None for float: decides which integers cannot saturate.
        name: what messages call the weight.
        threads: how many to use; all cores when None.

    Raises:
        ScalefoldError: the weight, the options and the Hessian do not fit one another.
    """
    if fault := _fault(weight, options, hessian):
        raise ScalefoldError(fault[0], where=name, remedy=fault[1])
    job = _Job.of(np.asarray(weight, dtype=np.float32), options, hessian, activation_bits, threads)
    if options.format == "kmeans" and options.codebook == "tensor":
        return _with_shared_codebook(job)
    return _joined(job.in_parallel(lambda columns: _solved(job, columns)))


@dataclass(frozen=True)
class _Job:
    """What every block of columns is solved with."""

    weight: Float
    options: WeightFormat
    hessian: npt.NDArray[np.floating] | None
    inverse: InverseFactor | None
    importance: Double | None
    activation_bits: int | None
    threads: int | None

    @classmethod
    def of(
        cls,
        weight: Float,
        options: WeightFormat,
        hessian: npt.NDArray[np.floating] | None,
        activation_bits: int | None,
        threads: int | None,
    ) -> _Job:
        compensating = options.compensation and hessian is not None
        inverse = InverseFactor.of(hessian) if compensating and hessian is not None else None
        importance = None
        if options.weighting == "hessian" and hessian is not None:
            diagonal = (np.diagonal(hessian) if hessian.ndim == 2 else hessian).astype(np.float64)
            # As SqueezeLLM does where all gradients are 0: then every weight counts alike.
            importance = diagonal / diagonal.mean() if diagonal.any() else None
        return cls(weight, options, hessian if compensating else None, inverse, importance, activation_bits, threads)

    @property
    def groups(self) -> int:
        return 1 if self.options.group_size is None else self.weight.shape[0] // self.options.group_size

    def blocks(self) -> list[slice]:
        rows, columns = self.weight.shape
        width = max(1, POINTS_PER_BLOCK // rows)
        return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]

    def in_parallel(self, function: Callable[[slice], _Result]) -> list[_Result]:
        """The function's results for every block of columns, in order."""
        blocks = self.blocks()
        workers = min(self.threads or _cores(), len(blocks))
        if workers == 1:
            return [function(block) for block in blocks]
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(function, blocks))

    def coded(self, columns: slice, decoder: Decoder, scales: Float) -> CodedWeight:
        """Codes of a block of columns for given levels."""
        weight, bits = self.weight[:, columns], self.options.bits
        levels = decoder.levels(bits)
        if self.inverse is None or self.hessian is None:
            return CodedWeight(nearest_codes(weight, levels, scales), bits, decoder, scales)
        codes = compensated_codes(weight, levels, scales, self.inverse, self.activation_bits)
        found = CodedWeight(codes, bits, decoder, scales)
        return CodedWeight(codes, bits, decoder, fitted_scales(weight, found.integers(), scales, self.hessian))

    def limits(self, weight: Float, levels: npt.NDArray[np.floating]) -> Float:
        """How large the integers of each column may become, to begin with, for a weight [K, n] and levels [G, L, n]."""
        unit = np.maximum(np.abs(levels).max(axis=(0, 1)), SMALLEST_SCALE) / INT8_MAX
        integers = np.rint(levels / unit).astype(np.int8)
        codes = nearest_codes(weight, integers, unit)
        return level_limits(largest_pair(chosen_levels(codes, integers)), self.activation_bits)

    def less(self, limits: Float, chosen: npt.NDArray[np.bool_]) -> Float:
        """The limits with less room for the chosen columns."""
        safe = np.float32(min(pair_limit(self.activation_bits) // 2, 127))
        return np.where(chosen, np.maximum(np.floor(limits * np.float32(LIMIT_SHRINK)), safe), limits)


def _solved(job: _Job, columns: slice) -> CodedWeight:
    """A block of columns, with levels of its own for each."""
    weight = job.weight[:, columns]
    rounded, levels = _fitted(job, weight, columns.start)
    limits = job.limits(weight, levels)
    while True:
        coded = job.coded(columns, *rounded(limits))
        bad = saturating(coded.integers(), job.activation_bits)
        if not bad.any():
            return coded
        limits = job.less(limits, bad)


def _fitted(job: _Job, weight: Float, seed: int) -> tuple[Rounded, npt.NDArray[np.floating]]:
    """The solver's levels [G, L, n] of a block of columns, and what makes integers of them."""
    options = job.options
    if options.format == "linear":
        linear = LinearFit.of(
            weight,
            options.bits,
            groups=job.groups,
            solver=options.chosen_solver,
            symmetric=options.symmetric,
            activation_bits=job.activation_bits or 1,
        )
        return linear.rounded, linear.levels()
    if options.format == "bcq":
        binary = BinaryFit.of(weight, options.bits, groups=job.groups, solver=options.chosen_solver)
        return binary.rounded, binary.levels()
    return _fitted_codebooks(job, weight, seed)


def _fitted_codebooks(job: _Job, weight: Float, seed: int) -> tuple[Rounded, Double]:
    """k-means per column, with the best linear grids among its starts and among what it may be rounded to."""
    options, importance = job.options, job.importance
    symmetric = LinearFit.of(
        weight,
        options.bits,
        importance=None if importance is None else importance.astype(np.float32),
        activation_bits=job.activation_bits or 1,
    )
    grids = [symmetric, symmetric.freed()] if options.bits < 8 else [symmetric]
    mass = None if importance is None else np.tile(importance, (weight.shape[1], 1))
    columns = SortedColumns.of(weight.T, mass)
    starts = [grid.levels()[0].T.astype(np.float64) for grid in grids]
    fit = KMeansFit.of(columns, starts, options.chosen_solver, seed)

    def rounded(limits: Float) -> tuple[Decoder, Float]:
        candidates = [_integer_levels(grid.rounded(limits), options.bits) for grid in grids]
        return fit.rounded(limits, candidates)

    return rounded, fit.levels.T[None]


def _integer_levels(rounded: tuple[Grid, Float], bits: int) -> tuple[Double, Double]:
    """Levels [n, L] in ascending order and scales of a grid, as k-means takes them."""
    decoder, scales = rounded
    return np.sort(decoder.levels(bits)[0].T.astype(np.float64), axis=1), scales.astype(np.float64)


def _with_shared_codebook(job: _Job) -> CodedWeight:
    """k-means of the whole weight: one codebook, and a scale per column, fitted in turn.

    Columns are brought together by the step of their best linear grid, so that the grid is one of the starts: then the
    codebook is no worse than the grid. A column's weights count by the square of its scale, as they do in the error.
    """
    bits = job.options.bits
    scales = np.concatenate(job.in_parallel(lambda columns: _linear_steps(job, columns)))
    codes = np.arange(1 << bits, dtype=np.float64)
    levels = (codes - codes.mean())[None]
    for _ in range(SHARED_ROUNDS):
        pooled = _pooled(job, scales)
        fit = KMeansFit.of(pooled, [levels, codes[None] - (1 << (bits - 1))], job.options.chosen_solver)
        levels = fit.levels
        scales = _refitted(job, levels[0], scales)
    pooled = _pooled(job, scales)
    fit = KMeansFit(pooled, levels)
    limits = np.concatenate(job.in_parallel(lambda columns: _shared_limits(job, columns, levels, scales))).min(
        keepdims=True
    )
    while True:
        codebook, unit = fit.rounded(limits, [])
        table = codebook.table[:, 0].astype(np.float64)
        fitted = _refitted(job, table, scales * unit[0]).astype(np.float32)
        coded = _coded_alike(job, codebook, fitted)
        bad = saturating(coded.integers(), job.activation_bits)
        if not bad.any():
            return coded
        limits = job.less(limits, np.array([bad.any()]))


def _coded_alike(job: _Job, codebook: Codebook, scales: Float) -> CodedWeight:
    return _joined(job.in_parallel(lambda columns: job.coded(columns, codebook, scales[columns])))


def _shared_limits(job: _Job, columns: slice, levels: Double, scales: Double) -> Float:
    return job.limits((job.weight[:, columns] / scales[columns]).astype(np.float32), levels[:, :, None])


def _linear_steps(job: _Job, columns: slice) -> Double:
    weight = job.weight[:, columns]
    return np.asarray(LinearFit.of(weight, min(job.options.bits, 6)).step[0], dtype=np.float64)


def _pooled(job: _Job, scales: Double) -> SortedColumns:
    """All weights in units of their column's scale, as one column."""
    return SortedColumns.histogram(
        (
            (job.weight[:, block] / scales[block], _row_importance(job) * scales[block] ** 2 / (scales**2).mean())
            for block in job.blocks()
        ),
        *_ends(job, scales),
    )


def _ends(job: _Job, scales: Double) -> tuple[float, float]:
    """The smallest and the largest weight in units of its column's scale."""
    return float((job.weight.min(axis=0) / scales).min()), float((job.weight.max(axis=0) / scales).max())


def _row_importance(job: _Job) -> Double:
    return np.ones((job.weight.shape[0], 1)) if job.importance is None else job.importance[:, None]


def _refitted(job: _Job, levels: Double, scales: Double) -> Double:
    """The least-squares scale of each column when its weights take the nearest of shared ascending levels [L]."""
    borders, importance = (levels[1:] + levels[:-1]) / 2, _row_importance(job)

    def fitted(columns: slice) -> Double:
        weight = job.weight[:, columns]
        taken = levels[np.searchsorted(borders, weight / scales[columns])]
        above, below = (importance * weight * taken).sum(axis=0), (importance * taken**2).sum(axis=0)
        return np.asarray(np.divide(above, below, out=np.zeros_like(above), where=below > 0), dtype=np.float64)

    found = np.concatenate(job.in_parallel(fitted))
    # A column of zeros that has no level at 0 is made as small as a scale can be.
    return np.where(found > SMALLEST_SCALE, found, np.where(job.weight.any(axis=0), scales, SMALLEST_SCALE))


def _joined(parts: Sequence[CodedWeight]) -> CodedWeight:
    """Blocks of columns side by side; a codebook that all share stays one."""
    if len(parts) == 1:
        return parts[0]
    decoder: Decoder
    decoders = [part.decoder for part in parts]
    first = decoders[0]
    if isinstance(first, Grid):
        decoder = _joined_grids([each for each in decoders if isinstance(each, Grid)])
    elif isinstance(first, BinaryCoding):
        decoder = BinaryCoding(
            np.concatenate([each.alphas for each in decoders if isinstance(each, BinaryCoding)], axis=2)
        )
    elif all(each is first for each in decoders):
        decoder = first
    else:
        decoder = Codebook(np.concatenate([each.table for each in decoders if isinstance(each, Codebook)], axis=1))
    codes, scales = np.concatenate([part.codes for part in parts], axis=1), np.concatenate([p.scales for p in parts])
    return CodedWeight(codes, parts[0].bits, decoder, scales)


def _joined_grids(grids: Sequence[Grid]) -> Grid:
    offsets = np.concatenate([grid.offsets for grid in grids], axis=1)
    if all(grid.multipliers is None for grid in grids):
        return Grid(offsets)
    steps = [np.ones_like(grid.offsets) if grid.multipliers is None else grid.multipliers for grid in grids]
    return Grid(offsets, np.concatenate(steps, axis=1))


def _fault(weight: Float, options: WeightFormat, hessian: npt.NDArray[np.floating] | None) -> tuple[str, str] | None:
    """What is wrong and what would help."""
    if weight.ndim != 2 or not weight.size:
        return f"a weight of shape {weight.shape} is not a matrix with rows and columns", "leave it in float"
    bad = ~np.isfinite(weight).all(axis=0)
    if bad.any():
        found = f"{int(bad.sum())} of its columns, the first of them {int(bad.argmax())}, hold NaN or infinity"
        return found, "mend the model, or exclude the layer"
    rows, size = weight.shape[0], options.group_size
    if size is not None and rows % size:
        return f"groups of {size} do not divide its {rows} rows", "set group_size to a divisor, or to null"
    return _hessian_fault(rows, options, hessian)


def _hessian_fault(
    rows: int, options: WeightFormat, hessian: npt.NDArray[np.floating] | None
) -> tuple[str, str] | None:
    if not options.needs_hessian:
        return None
    if hessian is None:
        return "compensation and weighting need a Hessian and there is none", "calibrate, or turn them off"
    shapes = ((rows, rows),) if options.compensation else ((rows, rows), (rows,))
    if hessian.shape not in shapes:
        wanted = " or ".join(str(shape) for shape in shapes)
        return f"a Hessian of shape {hessian.shape} is not {wanted}", "collect it at this layer's input"
    diagonal = np.diagonal(hessian) if hessian.ndim == 2 else hessian
    if not np.isfinite(hessian).all() or (diagonal < 0).any():
        return "its Hessian holds NaN, infinity or a negative square", "look for NaN in the calibration samples"
    return None


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
