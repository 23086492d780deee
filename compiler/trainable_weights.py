"""Weights as functions of the few numbers that a task trains: alphas, a codebook, or the scales of columns.

    W[k, n]  =  sum_i alpha_i[g(k), n] b_i[k, n],   b_i in {-1, +1} frozen           alpha1: alpha_1 alone; alphas: all
    W[k, n]  =  centroid[code[k, n], n]                                              codebooks
    W[k, n]  =  scale[n] integer[k, n]                                               scales (PEQA, Kim et al. 2023)

All numbers trained are of the size of weights, so that one learning rate serves: of a scale, 127 times it is trained.

torch is an optional package: import this module only where something is to be learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scalefold.compiler.errors import GraphError
from scalefold.compiler.saturation import INT8_MAX, largest_pair, level_limits, saturating
from scalefold.compiler.schemes import SMALLEST_SCALE, column_sums
from scalefold.compiler.solve_bcq import ROUNDING_SCALES
from scalefold.compiler.tunable_weights import Coding, Train, TunableWeight
from scalefold.compiler.weight_formats import Float, Int8, bit_signs

NEEDED = {
    "alpha1": "binary-coded weights (weights: {format: bcq})",
    "alphas": "binary-coded weights (weights: {format: bcq})",
    "scales": "quantized linear layers",
    "codebooks": "k-means weights (weights: {format: kmeans})",
}

Arrays = dict[str, npt.NDArray[Any]]
Half = npt.NDArray[np.float16]


class _LookUp(torch.autograd.Function):
    """W[k, n] = levels[g(k), code[k, n], n]; a level's gradient is the sum of those of the weights that chose it.

    Only the codes, a byte for each weight, are kept for the way back.
    """

    @staticmethod
    def forward(ctx: Any, levels: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.shape = levels.shape
        groups, _, columns = levels.shape
        index = codes.long()
        if columns == 1:
            return levels.reshape(-1)[index]
        return torch.gather(levels, 1, index.reshape(groups, -1, columns)).reshape(codes.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (codes,) = ctx.saved_tensors
        groups, count, columns = ctx.shape
        index, wide = codes.long(), gradients[0]
        if columns == 1:
            sums = torch.zeros(count, dtype=wide.dtype).index_add_(0, index.reshape(-1), wide.reshape(-1))
            return sums.reshape(ctx.shape), None
        sums = torch.zeros(ctx.shape, dtype=wide.dtype)
        return sums.scatter_add_(1, index.reshape(groups, -1, columns), wide.reshape(groups, -1, columns)), None


def look_up(levels: Tensor, codes: Tensor) -> Tensor:
    """A weight [K, N] from levels [G, L, N], or [1, L, 1], and codes uint8 [K, N]."""
    return cast(Tensor, _LookUp.apply(levels, codes))  # type: ignore[no-untyped-call]


def binary_levels(alphas: Tensor) -> Tensor:
    """The sums of signed alphas [q, G, N]: [G, 2^q, N]."""
    signs = torch.from_numpy(bit_signs(len(alphas))).to(alphas.dtype)
    return torch.einsum("ci,ign->gcn", signs, alphas)


class TrainableWeight:
    """One weight, and the numbers of it that are trained.

    Args:
        weight: where it is in the graph.
        train: which numbers.
        activation_bits: of the activations it meets, which bound its integers; None for float ones.
    """

    def __init__(self, weight: TunableWeight, train: Train, activation_bits: int | None) -> None:
        self.weight, self._bits = weight, activation_bits
        self._scales = weight.scale_array()
        self._coding = None if train == "scales" else weight.coding
        if self._coding is None:
            self._integers = torch.from_numpy(weight.integers())
            self.group_size = self._integers.shape[0]
            self.parameter = torch.from_numpy(self._scales * np.float32(INT8_MAX)).requires_grad_()
            return
        coding = self._coding
        self._codes = torch.from_numpy(coding.codes)
        self.group_size = coding.group_size if coding.binary else coding.codes.size // coding.entries.size
        # of one codebook for all columns, each with a scale of its own, the mean scale gives the size of a weight
        per_column = coding.entries.shape[2] == len(self._scales)
        self._unit = self._scales if per_column else self._scales.mean(keepdims=True)
        self._factor = torch.from_numpy(self._scales / (self._unit if per_column else self._unit[0]))
        values = torch.from_numpy(coding.entries * self._unit)
        trained = 1 if train == "alpha1" else len(values)
        self.parameter = values[:trained].clone().requires_grad_()
        self._frozen = values[trained:]

    def value(self) -> Tensor:
        """The weight [K, N] as it is now, with gradients."""
        if self._coding is None:
            return self._integers * (self.parameter / INT8_MAX)
        entries = torch.cat([self.parameter, self._frozen])
        levels = binary_levels(entries) if self._coding.binary else entries.transpose(0, 1)
        found = look_up(levels, self._codes)
        return found if levels.shape[2] == found.shape[1] else found * self._factor

    def arrays(self) -> Arrays:
        """What the graph's constants become, by name; those that did not change are left out.

        Beside alphas or a codebook, scales are float16 factors of what they were.
        """
        values = self.parameter.detach().numpy()
        if self._coding is None:
            integers = self._integers.numpy()
            # a scale that training made negative would turn the signs of its column
            scales = np.maximum(values / INT8_MAX, SMALLEST_SCALE).astype(np.float32)
            found: Arrays = {}
        else:
            entries = np.concatenate([values, self._frozen.numpy()])
            if np.array_equal(entries, self._coding.entries * self._unit):
                return {}
            rounded, steps = round_entries((entries / self._unit).astype(np.float32), self._coding, self._bits)
            steps = np.broadcast_to(steps, self._scales.shape)
            integers, scales = self._coding.integers(rounded), self._scales * steps.astype(np.float32)
            found = {self._coding.constant: self._coding.stored(rounded)}
            if np.array_equal(rounded, self._coding.entries):
                found = {}
        if np.array_equal(scales, self._scales):
            return found
        found[self.weight.scales.name or ""] = scales if self._coding is None else steps
        sums = column_sums(integers, scales)
        return found | {entry.name or "": sums for entry in self.weight.sums}


def trainable_weights(weights: Sequence[TunableWeight], train: Train, bits: int | None) -> list[TrainableWeight]:
    """The weights of which there is something to train.

    Raises:
        GraphError: there is none.
    """
    binary = train in ("alpha1", "alphas")
    chosen = [
        weight
        for weight in weights
        if train == "scales" or (weight.coding is not None and weight.coding.binary is binary)
    ]
    if not chosen:
        raise GraphError(
            f"it has no {NEEDED[train]}, so there is nothing to train",
            where=f"--train {train}",
            remedy="compile it with such weights, packed, or train something else",
        )
    return [TrainableWeight(weight, train, bits) for weight in chosen]


def round_entries(entries: Float, coding: Coding, activation_bits: int | None) -> tuple[Int8, Half]:
    """Entries [R, G, C], in units of their column's scale, as int8 of a new scale, and that scale in the old one [C].

    The new scale is one that float16 can tell: the integers are rounded to suit it, so half the bytes cost nothing.

    Of several scales that with the smallest error is taken, the old one among them: it leaves what is frozen as it was.
    A scale that lets a pair of integers saturate is raised until none does.
    """
    reach = np.maximum(np.abs(coding.levels(entries)).max(axis=(0, 1)), np.float32(SMALLEST_SCALE))
    widest = coding.integers(_rounded(entries, reach / INT8_MAX))
    limits = level_limits(largest_pair(widest), activation_bits)
    least = reach / (limits if len(limits) == len(reach) else limits.min())
    best, best_error = _halved(least), np.full(reach.shape, np.inf)
    for exact in (np.maximum(least, 1), *(least * factor for factor in ROUNDING_SCALES)):
        steps = _halved(exact)
        error = ((_rounded(entries, steps) * steps - entries) ** 2).sum(axis=(0, 1))
        best, best_error = np.where(error < best_error, steps, best), np.minimum(error, best_error)
    while (bad := _unsafe(_rounded(entries, best), coding, activation_bits)).any():
        best = np.where(bad, _halved(best * 1.02), best)
    return _rounded(entries, best), best.astype(np.float16)


def _halved(steps: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    return steps.astype(np.float16).astype(np.float32)


def _rounded(entries: Float, steps: npt.NDArray[np.floating[Any]]) -> Int8:
    return np.clip(np.rint(entries / steps), -INT8_MAX, INT8_MAX).astype(np.int8)


def _unsafe(entries: Int8, coding: Coding, activation_bits: int | None) -> npt.NDArray[np.bool_]:
    """Which columns have levels that are no int8, or a pair that can saturate."""
    wide = np.abs(coding.levels(entries).astype(np.int32)).max(axis=(0, 1)) > INT8_MAX
    pairs = saturating(coding.integers(entries), activation_bits)
    return np.asarray(wide | (pairs if len(pairs) == len(wide) else pairs.any()))
