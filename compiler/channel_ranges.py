"""How far each channel of what linear layers read reaches, before and after migration."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.calibrate import padding_mask, rows_of
from scalefold.compiler.facts import row_range
from scalefold.compiler.layer_names import parts
from scalefold.compiler.runtime import Feed, Session
from scalefold.compiler.schemes import Float
from scalefold.compiler.stats import ChannelRange

FILE = "ranges.npz"
PRODUCTS = ("MatMul", "Gemm", "MatMulIntegerToFloat", "MatMulNBits")

Ranges = Mapping[str, Float]
"""For the first layer that reads a value: smallest and largest of each of its channels, [2, K]."""


def measure(model: ir.Model, names: Collection[str], feeds: Sequence[Feed]) -> dict[str, Float]:
    """The range of each channel that linear layers read, in a float graph or in any form a compiled one has.

    Args:
        model: the graph.
        names: its linear layers; of several that read the same value the first stands for all.
        feeds: the samples; one sample's activations are in memory at a time.
    """
    inputs = {
        node.name: value
        for node in graph.nodes(model, *PRODUCTS)
        if node.name in names and (value := float_input(node)) is not None and not value.is_graph_input()
    }
    values = {value.name or "": ChannelRange() for value in inputs.values()}
    if not values:
        return {}
    session = Session(model, outputs=list(values), lean=True)
    for sample, feed in enumerate(feeds):
        for name, array in session.run(feed).items():
            values[name].update(rows_of(array, padding_mask(feed)), sample)
    found: dict[str, Float] = {}
    for layer, value in inputs.items():
        seen = values.pop(value.name or "", None)
        if seen is not None and seen.low is not None and seen.high is not None:
            found[layer or ""] = np.stack([seen.low, seen.high])
    return found


def paired(before: Ranges, after: Ranges) -> tuple[dict[str, Float], dict[str, Float]]:
    """The ranges of values that both graphs have; what a merged layer reads was read by its first part before."""
    read = {name: before[first] for name in after if (first := parts(name)[0]) in before}
    both = {name: extremes for name, extremes in read.items() if extremes.shape == after[name].shape}
    return both, {name: after[name] for name in both}


def write(folder: Path, before: Ranges, after: Ranges) -> None:
    """Save the ranges of values that both graphs have."""
    before, after = paired(before, after)
    # names go in as an array: numpy makes file names of keys, and layers may have slashes in theirs
    arrays = {str(index): np.stack([before[name], after[name]]) for index, name in enumerate(before)}
    np.savez_compressed(folder / FILE, names=np.array(list(before), dtype=np.str_), **arrays)  # type: ignore[arg-type]


def read(folder: Path) -> tuple[dict[str, Float], dict[str, Float]]:
    """The ranges (before, after) that a compiled folder was saved with; empty when it has none."""
    path = folder / FILE
    if not path.is_file():
        return {}, {}
    with np.load(path) as archive:
        pairs = {str(name): archive[str(index)] for index, name in enumerate(archive["names"])}
    return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}


def spread(extremes: Float) -> float:
    """Reach of the largest channel over that of the median channel, from [2, K]."""
    reach = np.abs(extremes).max(axis=0)
    return float(reach.max() / max(float(np.median(reach)), 1e-12))


def float_input(node: ir.Node) -> ir.Value | None:
    """What a layer reads, before it is quantized."""
    value = node.inputs[0]
    if (dequantize := graph.producer(value, "DequantizeLinear")) is not None:
        value = dequantize.inputs[0]
    quantize = graph.producer(value, "QuantizeLinear")
    if quantize is None:
        return value
    if row_range(quantize) is None:
        return quantize.inputs[0]
    divide = graph.producer(quantize.inputs[0], "Div")
    shift = graph.producer(divide.inputs[0], "Sub") if divide is not None else None
    return shift.inputs[0] if shift is not None else None
