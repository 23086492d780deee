"""Which format the weight of each layer gets by a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scalefold.compiler.errors import RecipeError
from scalefold.compiler.graph import Linear
from scalefold.compiler.protocol import select
from scalefold.compiler.recipe import WeightFormat, Weights


def formats_of(weights: Weights, layers: Sequence[Linear], names: Iterable[str] = ()) -> dict[str, WeightFormat]:
    """The format of each layer, by name.

    Args:
        weights: the recipe's section.
        layers: the layers to be quantized.
        names: other layers that its patterns may match, such as those that stay float.

    Raises:
        PatternError: a pattern is not a regular expression, or matches nothing.
        RecipeError: groups do not divide the rows of a weight; all such layers are counted.
    """
    every = [*(layer.name for layer in layers), *names]
    for pattern in weights.layers:
        select((pattern,), every, what="weights.layers")
    formats = {layer.name: weights.of(layer.name) for layer in layers}
    faults: dict[str, list[str]] = {}
    for layer in layers:
        size, rows = formats[layer.name].group_size, layer.shape[0]
        if size is not None and rows % size:
            faults.setdefault(f"weights.group_size: {size} does not divide the {rows} rows", []).append(layer.name)
    if faults:
        raise RecipeError([f"{fault} of {_some(found)}" for fault, found in faults.items()], where="weights")
    return formats


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} other layers"
