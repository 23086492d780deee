"""Weights that 4 bits each are enough for, as the kernel library multiplies by them without making int8 of them first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scalefold.compiler.kernel_library import BLOCK, PANEL

LEVELS = 16
"""What 4 bits tell apart."""

OFFSET = 8
"""The code that stands for 0 where codes are multiplied by a step."""

GROUPS = (256, 128, 64, 32)
"""Rows of a group with steps of its own, where one for all rows does not do."""

LEAST_TABLED = 64
"""Rows of a group with values of its own: those take 16 bytes a column, as much as 32 codes."""

Weight = npt.NDArray[np.int8]


@dataclass(frozen=True)
class CodedPanels:
    """A weight [K, N] as codes, two a byte.

    Attributes:
        codes: [ceil(N / 64), K / 32, 16, 64]; kernels.cpp says in which order.
        levels: what codes stand for in each of G groups of rows: steps [ceil(N / 64), G, 64], which code - 8 is multiplied
            by, or 16 values for each column, [ceil(N / 64), G, 16, 64].
    """

    codes: Weight
    levels: Weight


@dataclass(frozen=True)
class _Coding:
    """Codes [K, N] of 0 to 15, and levels [G, N], the steps, or [G, N, 16]."""

    codes: npt.NDArray[np.uint8]
    levels: Weight


def coded_panels(weight: Weight) -> CodedPanels | None:
    """The codes of a weight [K, N], which stand for exactly the same numbers; None where 4 bits are not enough.

    They are where every column is a step, or one for each group of rows, times integers from -8 to 7 (the step may be
    negative); or where it has at most 16 different numbers, all in all or in each group of rows. How the weight came to be
    does not matter.
    """
    inputs, outputs = weight.shape
    if inputs % BLOCK or inputs == 0 or (outputs > PANEL and _coding(weight[:, :PANEL]) is None):
        return None
    found = _coding(weight)
    return None if found is None else CodedPanels(_packed(found.codes), _packed_levels(found.levels))


def decoded_panels(panels: CodedPanels, outputs: int) -> Weight:
    """The weight [K, N] that codes stand for."""
    count, blocks = panels.codes.shape[:2]
    bytes_ = panels.codes.view(np.uint8).reshape(count, blocks, 4, 4, 4, 16)
    halves = np.stack([bytes_ & 15, bytes_ >> 4]).transpose(2, 0, 6, 1, 3, 5, 4)  # block, half, row, panel, q, l, i
    codes = halves.reshape(blocks * BLOCK, count * PANEL)
    groups = panels.levels.shape[1]
    if panels.levels.ndim == 3:
        steps = panels.levels.transpose(1, 0, 2).reshape(groups, -1).repeat(len(codes) // groups, 0)
        found = (codes.astype(np.int16) - OFFSET) * steps
    else:
        ordered = (
            panels.levels.reshape(count, groups, 4, 4, 4, 16).transpose(1, 0, 2, 4, 3, 5).reshape(groups, -1, LEVELS)
        )
        rows = np.arange(len(codes))[:, None] // (len(codes) // groups)
        found = ordered[rows, np.arange(count * PANEL), codes]
    return found[:, :outputs].astype(np.int8)


def _coding(weight: Weight) -> _Coding | None:
    """The cheapest coding that there is: steps before values, few groups before many."""
    inputs = len(weight)
    sizes = [inputs, *(size for size in GROUPS if size < inputs and inputs % size == 0)]
    steps = _steps(weight, sizes[:1]) or _values(weight, inputs) or _steps(weight, sizes[1:])
    if steps is not None:
        return steps
    tabled = (_values(weight, size) for size in sizes[1:] if size >= LEAST_TABLED)
    return next((coding for coding in tabled if coding is not None), None)


def _steps(weight: Weight, sizes: list[int]) -> _Coding | None:
    """Codes that are multiplied by steps, for the largest groups that have such."""
    if not sizes:
        return None
    blocks = weight.reshape(-1, BLOCK, weight.shape[1]).astype(np.int16)
    common, low, high = np.gcd.reduce(blocks, axis=1), blocks.min(axis=1), blocks.max(axis=1)
    for size in sizes:
        count = size // BLOCK
        step = np.maximum(np.gcd.reduce(_grouped(common, count), axis=1), 1)
        step[step > np.iinfo(np.int8).max] //= 2
        least, most = _grouped(low, count).min(axis=1), _grouped(high, count).max(axis=1)
        down = most >= OFFSET * step  # there are 8 codes below 0 and 7 above it: this one counts downwards
        least, most = np.where(down, -most, least), np.where(down, -least, most)
        if (least >= -OFFSET * step).all() and (most < OFFSET * step).all():
            step = np.where(down, -step, step).astype(np.int8)
            codes = weight.reshape(-1, size, weight.shape[1]) // step[:, None] + OFFSET
            return _Coding(codes.reshape(weight.shape).astype(np.uint8), step)
    return None


def _values(weight: Weight, size: int) -> _Coding | None:
    """Codes that number the different values of a column in each group of `size` rows."""
    grouped = _grouped(weight, size)
    groups, _, outputs = grouped.shape
    places = (np.arange(groups)[:, None, None], np.arange(outputs), grouped.astype(np.int16) + 128)
    present = np.zeros((groups, outputs, 256), dtype=np.bool_)
    present[places] = True
    if present.sum(axis=-1).max() > LEVELS:
        return None
    ranks = np.cumsum(present, axis=-1, dtype=np.uint8) - np.uint8(1)
    levels = np.zeros((groups, outputs, LEVELS), dtype=np.int8)
    group, column, value = np.nonzero(present)
    levels[group, column, ranks[group, column, value]] = value - 128
    return _Coding(ranks[places].reshape(weight.shape), levels)


def _grouped(array: npt.NDArray[np.signedinteger], size: int) -> npt.NDArray[np.signedinteger]:
    return array.reshape(-1, size, array.shape[1])


def _packed(codes: npt.NDArray[np.uint8]) -> Weight:
    inputs, outputs = codes.shape
    filled = np.pad(codes, ((0, 0), (0, -outputs % PANEL)))
    rows = filled.reshape(inputs // BLOCK, 2, 16, -1, 4, 4, 4)  # block, half, row, panel, q, l, i
    both = rows[:, 0] | rows[:, 1] << np.uint8(4)
    packed = both.transpose(2, 0, 3, 5, 4, 1).reshape(both.shape[2], -1, 16, 64)
    return np.ascontiguousarray(packed).view(np.int8)


def _packed_levels(levels: Weight) -> Weight:
    groups, outputs = levels.shape[:2]
    filled = np.pad(levels, ((0, 0), (0, -outputs % PANEL), *[(0, 0)] * (levels.ndim - 2)))
    if levels.ndim == 2:
        return np.ascontiguousarray(filled.reshape(groups, -1, PANEL).transpose(1, 0, 2))
    ordered = filled.reshape(groups, -1, 4, 4, 4, LEVELS).transpose(1, 0, 2, 4, 3, 5)
    return np.ascontiguousarray(ordered.reshape(-1, groups, 16, 64))
