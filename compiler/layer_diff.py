"""What differs in the quantization of one linear layer between two graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from scalefold.compiler.quantization import Grid, LinearLayer

Array = npt.NDArray[Any]
OTHER_CODES = 0.1
"""From this share of changed codes on a weight is taken for rounded anew, and not for edited."""


@dataclass(frozen=True)
class FactDifference:
    """One fact of a layer that differs.

    Attributes:
        kind: whether it belongs to the quantization.
        fact: the fact, as `LinearLayer.places` and `members` name it.
        what: the fact and where in it.
        before: how it is in the first graph.
        after: how it is in the second.
        implied: facts that differ because of it.
    """

    kind: Literal["quantization", "form", "bias", "constant"]
    fact: str
    what: str
    before: str
    after: str
    implied: tuple[str, ...] = ()


def layer_differences(mine: LinearLayer, theirs: LinearLayer, tolerance: float) -> Iterator[FactDifference]:
    """What differs in a layer: its form, its weight, its input and its bias.

    Args:
        mine: the layer in one graph.
        theirs: the same in another.
        tolerance: see `change_of`.
    """
    if mine.form != theirs.form and (mine.weight is None) == (theirs.weight is None):
        yield FactDifference("form", "form", "form", mine.form, theirs.form)
    yield from _of_weights(mine, theirs, tolerance)
    yield from _of_activations(mine.activation, theirs.activation, tolerance)
    yield from _of_biases(mine, theirs, tolerance)


def _of_weights(mine: LinearLayer, theirs: LinearLayer, tolerance: float) -> Iterator[FactDifference]:
    if mine.shape != theirs.shape:
        facts = ("weight", "weight codes", "weight scale", "weight zero point")
        yield FactDifference("constant", "weight values", "weight shape", str(mine.shape), str(theirs.shape), facts)
    elif mine.weight is None or theirs.weight is None:
        if mine.weight is not theirs.weight:
            yield FactDifference("quantization", "weight", "weight", _text(mine.weight), _text(theirs.weight))
        elif mine.content != theirs.content and (found := change_of(mine.codes, theirs.codes, tolerance)):
            yield found.of("constant", "weight values")
    else:
        rounded_anew = _share(mine.codes, theirs.codes) > OTHER_CODES
        grids = list(_of_grids("weight", mine.weight, theirs.weight, rounded_anew))
        yield from grids or _of_numbers("weight", mine.weight, theirs.weight, tolerance)
        if not grids:
            yield from _of_codes(mine, theirs)


def _of_codes(mine: LinearLayer, theirs: LinearLayer) -> Iterator[FactDifference]:
    if mine.codes is None or theirs.codes is None:
        if mine.content != theirs.content:
            sides = mine.content[:12], theirs.content[:12]
            yield FactDifference("quantization", "weight codes", "weight codes", *sides)
    elif found := change_of(mine.codes, theirs.codes, 0.0):
        yield found.of("quantization", "weight codes")


def _of_activations(one: Grid | None, other: Grid | None, tolerance: float) -> Iterator[FactDifference]:
    if one is None or other is None:
        if one is not other:
            facts = ("activation scale", "activation zero point")
            yield FactDifference("quantization", "activation", "activation", _text(one), _text(other), facts)
        return
    yield from list(_of_grids("activation", one, other, True)) or _of_numbers("activation", one, other, tolerance)


def _of_grids(side: str, one: Grid, other: Grid, bits: bool) -> Iterator[FactDifference]:
    """What two grids differ in besides scale and zero point, which follow from that; bits only where they count."""
    implied = (side, f"{side} scale", f"{side} zero point", f"{side} codes")
    found = [("granularity", one.granularity, other.granularity)]
    found += [("bits", str(one.bits), str(other.bits))] if bits else []
    if not bits or one.bits == other.bits:
        found.append(("type", one.container, other.container))
    for what, before, after in found:
        if before != after:
            yield FactDifference("quantization", f"{side} {what}", f"{side} {what}", before, after, implied)


def _of_numbers(side: str, one: Grid, other: Grid, tolerance: float) -> Iterator[FactDifference]:
    if found := change_of(one.scale, other.scale, tolerance):
        yield found.of("quantization", f"{side} scale")
    if found := change_of(one.zero_point, other.zero_point, tolerance):
        yield found.of("quantization", f"{side} zero point")


def _of_biases(mine: LinearLayer, theirs: LinearLayer, tolerance: float) -> Iterator[FactDifference]:
    """Bias codes are the same as the float bias that they are the nearest codes of."""
    one, other = mine.bias, theirs.bias
    if one is None or other is None:
        if one is not other:
            before, after = ("" if side is None else str(side.dtype) for side in (one, other))
            yield FactDifference("bias", "bias", "bias", before, after)
    elif mine.bias_scale is None and theirs.bias_scale is None:
        if found := change_of(one, other, tolerance):
            yield found.of("bias", "bias")
    elif mine.bias_scale is not None and theirs.bias_scale is not None:
        if found := change_of(mine.bias_scale, theirs.bias_scale, tolerance):
            yield found.of("quantization", "bias scale")
        if found := change_of(one, other, 0.0):
            yield found.of("quantization", "bias codes")
    elif not _rounded_alike(mine, theirs):
        yield FactDifference("bias", "bias", "bias", str(one.dtype), str(other.dtype))


def _rounded_alike(mine: LinearLayer, theirs: LinearLayer) -> bool:
    """Whether a float bias is within half a step of the bias codes of the other layer."""
    step = np.asarray(mine.bias_scale if mine.bias_scale is not None else theirs.bias_scale, dtype=np.float64)
    one, other = (
        np.asarray(layer.bias, dtype=np.float64).reshape(-1) * (step if layer.bias_scale is not None else 1.0)
        for layer in (mine, theirs)
    )
    return one.shape == other.shape and bool((np.abs(one - other) <= 0.51 * step + 1e-6 * np.abs(one)).all())


def _share(one: Array | None, other: Array | None) -> float:
    """The share of codes that differ."""
    if one is None or other is None or one.shape != other.shape:
        return 1.0
    return float(np.mean(one != other)) if one.size else 0.0


def _text(grid: Grid | None) -> str:
    return "float" if grid is None else f"{grid.bits} bits {grid.granularity}"


@dataclass(frozen=True)
class Change:
    """Elements that differ: how many and where the first is, and its two values."""

    place: str
    before: str
    after: str

    def of(self, kind: Literal["quantization", "bias", "constant"], fact: str) -> FactDifference:
        """The same as a fact of a layer."""
        return FactDifference(kind, fact, fact + self.place, self.before, self.after)


def change_of(one: Array | None, other: Array | None, tolerance: float) -> Change | None:
    """Which elements of two constants differ; None when they are equal, a missing one is computed at run time.

    Args:
        one: a constant; one number stands for as many as the other has.
        other: another.
        tolerance: how far floats may be apart, relative to the largest of both.
    """
    if one is None or other is None:
        before, after = ("at run time" if side is None else "constant" for side in (one, other))
        return None if one is other else Change("", before, after)
    if 1 in (one.size, other.size):
        one, other = np.broadcast_arrays(*(side.reshape(()) if side.size == 1 else side for side in (one, other)))
    elif one.size == other.size:
        one = one.reshape(other.shape)
    if one.shape != other.shape:
        return Change(" shape", str(one.shape), str(other.shape))
    apart = _apart(one, other, tolerance)
    count = int(np.count_nonzero(apart))
    if not count:
        return None
    if one.size == 1:
        return Change("", str(one.reshape(-1)[0]), str(other.reshape(-1)[0]))
    index = np.unravel_index(int(np.argmax(apart)), one.shape)
    place = ", ".join(str(int(entry)) for entry in index)
    return Change(f", {count} of {one.size}, at [{place}]", str(one[index]), str(other[index]))


def _apart(one: Array, other: Array, tolerance: float) -> Array:
    """Which elements differ."""
    if one.dtype.kind != "f" or other.dtype.kind != "f" or tolerance == 0:
        return np.asarray((one != other) & ~((one != one) & (other != other)))
    largest = max(float(np.abs(one).max(initial=0)), float(np.abs(other).max(initial=0)))
    return np.asarray(~np.isclose(one, other, rtol=0, atol=tolerance * largest, equal_nan=True))
