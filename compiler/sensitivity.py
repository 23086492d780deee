"""Which linear layers quantization hurts, alone and together with all others, and the outliers that explain it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from scalefold.compiler import charts, graph, schemes
from scalefold.compiler.calibrate import padding_mask, require_finite, rows_of
from scalefold.compiler.charts import BLUE, GREY, RED, Chart
from scalefold.compiler.decoder import first_tokens
from scalefold.compiler.driver import COMPARED, open_with_samples
from scalefold.compiler.errors import GraphError, SourceError
from scalefold.compiler.graph import Linear
from scalefold.compiler.output_error import OutputError
from scalefold.compiler.protocol import Progress, silent
from scalefold.compiler.runtime import Feed, Session
from scalefold.compiler.schemes import Affine, Float

SAMPLES = 4
"""Samples that single layers are measured on; whole models run on the first two."""

PROBES = 32
"""Random directions that the error of a product is looked at along; its square is kept in expectation."""

GATE = "scalefold.gate."
"""Begins the names of the inputs that switch a layer between integers and float."""


@dataclass
class Outliers:
    """Statistics of what a layer reads, gathered sample by sample.

    Attributes:
        low: smallest value of each channel.
        high: largest value of each channel.
        moments: sums of x, x^2, x^3 and x^4.
        count: values seen.
    """

    low: Float | None = None
    high: Float | None = None
    moments: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(4))
    count: int = 0

    def update(self, rows: Float) -> None:
        """Take in rows [tokens, channels]."""
        low, high = rows.min(axis=0), rows.max(axis=0)
        self.low = low if self.low is None else np.minimum(self.low, low)
        self.high = high if self.high is None else np.maximum(self.high, high)
        wide = rows.astype(np.float64)
        square = wide * wide
        self.moments += [wide.sum(), square.sum(), (square * wide).sum(), (square * square).sum()]
        self.count += rows.size

    @property
    def range(self) -> tuple[float, float]:
        """(low, high) of all channels."""
        assert self.low is not None and self.high is not None
        return float(self.low.min()), float(self.high.max())

    @property
    def spread(self) -> float:
        """Reach of the largest channel over that of the median channel."""
        assert self.low is not None and self.high is not None
        reach = np.maximum(-self.low, self.high)
        return float(reach.max() / max(float(np.median(reach)), 1e-12))

    @property
    def kurtosis(self) -> float:
        """Fourth central moment over the squared variance; 3 for a normal distribution."""
        m1, m2, m3, m4 = self.moments / max(self.count, 1)
        variance = m2 - m1 * m1
        return float((m4 - 4 * m1 * m3 + 6 * m1 * m1 * m2 - 3 * m1**4) / max(variance * variance, 1e-30))


@dataclass(frozen=True)
class BitError:
    """What one layer loses at one bit width.

    Attributes:
        bits: of its weight and its input.
        sqnr_db: its output when both are quantized, in dB; estimated along random directions. Each token's noise counts by
            that token's own power: a massive token must not hide that all others are rounded away.
        weight_sqnr_db: the same when its weight alone is.
        input_sqnr_db: the same when its input alone is.
        alone: error of the whole model when this layer alone is quantized; None for layers not measured so.
        gain: how much smaller the error of the whole quantized model is when this layer alone is kept float.
    """

    bits: int
    sqnr_db: float
    weight_sqnr_db: float
    input_sqnr_db: float
    alone: float | None = None
    gain: float | None = None


@dataclass(frozen=True)
class LayerSensitivity:
    """One linear layer.

    Attributes:
        name: the layer.
        shape: (K, N) of its weight.
        largest: largest |x| that it reads.
        spread: reach of the largest channel over that of the median channel.
        kurtosis: of what it reads; 3 for a normal distribution.
        errors: for each bit width, in the order they were asked for.
    """

    name: str
    shape: tuple[int, int]
    largest: float
    spread: float
    kurtosis: float
    errors: tuple[BitError, ...]


@dataclass(frozen=True)
class Sensitivity:
    """The layers of a model, the most sensitive first.

    Attributes:
        source: the model.
        measure: what the error of the whole model is.
        whole: that error with all layers quantized, for each bit width.
        layers: sorted by their SQNR at the largest bit width, worst first.
    """

    source: str
    measure: str
    whole: dict[int, float]
    layers: tuple[LayerSensitivity, ...]


@dataclass(frozen=True)
class _Grids:
    """A layer and the grid of its input at one bit width."""

    layer: Linear
    grid: Affine

    @property
    def bits(self) -> int:
        return self.grid.bits


def measure_sensitivity(
    source: object,
    *,
    recipe: str | Path | None = None,
    bits: Sequence[int] = (8, 6, 4),
    top: int = 16,
    calibration: object = None,
    progress: Progress = silent,
) -> Sensitivity:
    """Measure every linear layer on its own, and the worst of them within the whole model.

    The float graph runs twice over a few samples, one sample's activations in memory at a time: for the ranges, then for
    the errors of each layer's product on its float input. The whole model runs with switches: one graph in which the
    chosen layers are quantized where their switch is on, and one in which all layers are and theirs can be switched off.

    Args:
        source: the float model, as `compile_model` takes it.
        recipe: its float passes, such as migration, come first; None measures the model as it is.
        bits: bit widths of weights and inputs, 2 to 8.
        top: how many layers the whole model is run for.
        calibration: as `compile_model` takes it.
        progress: opens progress bars.

    Raises:
        ScalefoldError: the source cannot be read, has no linear layers, or a bit width is none.
    """
    if not bits or any(not 2 <= width <= 8 for width in bits):
        raise SourceError("bit widths are whole numbers from 2 to 8", where="--bits", remedy="give some, such as 8,6,4")
    with open_with_samples(source, recipe, calibration, progress) as (model, samples):
        layers = graph.linear_layers(model)
        if not layers:
            raise GraphError("it has no linear layer", where=str(source), remedy="give a float transformer")
        feeds = [first_tokens(feed, COMPARED, model) for feed in samples[:SAMPLES]]
        outliers = _outliers(model, layers, feeds)
        found = _layer_errors(model, layers, outliers, feeds, bits, progress)
        order = sorted(layers, key=lambda layer: min(found[layer.name], key=lambda error: -error.bits).sqnr_db)
        whole = OutputError(model, feeds[:2])
        totals: dict[int, float] = {}
        with progress("whole model", len(bits) * 2 * min(top, len(layers))) as advance:
            for index, width in enumerate(bits):
                plan = {
                    layer.name: _Grids(layer, schemes.activation_grid(*outliers[layer.x.name or ""].range, width))
                    for layer in layers
                }
                chosen = [layer.name for layer in order[:top]]
                only = {name: plan[name] for name in chosen}
                alone = _whole_errors(model, whole, only, chosen, on=True, advance=advance)
                without = _whole_errors(model, whole, plan, chosen, on=False, advance=advance)
                totals[width] = without.pop("")
                for name in chosen:
                    entry = found[name][index]
                    found[name][index] = BitError(
                        entry.bits,
                        entry.sqnr_db,
                        entry.weight_sqnr_db,
                        entry.input_sqnr_db,
                        alone[name],
                        totals[width] - without[name],
                    )
        described = tuple(_described(layer, outliers[layer.x.name or ""], found[layer.name]) for layer in order)
        return Sensitivity(str(source), whole.measure, totals, described)


def plot(found: Sensitivity) -> Chart:
    """SQNR of each layer at each bit width, and what explains it, the most sensitive layers first."""
    widths = [error.bits for error in found.layers[0].errors]
    drawn = [
        charts.bars(
            f"{width} bits: SQNR of each layer alone",
            [layer.name for layer in found.layers],
            [layer.errors[index].sqnr_db for layer in found.layers],
            "dB",
        )
        for index, width in enumerate(widths)
    ]
    series = {"largest": (RED, [layer.largest for layer in found.layers]), "spread": (BLUE, [
        layer.spread for layer in found.layers])}  # fmt: skip
    drawn.append(charts.log_marks("what it reads", series, "the most sensitive first"))
    kurtosis = {"kurtosis": (GREY, [max(layer.kurtosis, 1e-3) for layer in found.layers])}
    drawn.append(charts.log_marks("kurtosis of it", kurtosis, "the most sensitive first"))
    for index, width in enumerate(widths):
        measured = [layer for layer in found.layers if layer.errors[index].alone is not None]
        entries = [
            (layer.name, value, f"{value:.3g}")
            for layer in measured
            if (value := layer.errors[index].alone) is not None
        ]
        if entries:
            drawn.append(charts.shares(f"{width} bits: {found.measure}, alone", entries))
    return charts.side_by_side(drawn)


def _described(layer: Linear, seen: Outliers, errors: Sequence[BitError]) -> LayerSensitivity:
    low, high = seen.range
    return LayerSensitivity(layer.name, layer.shape, max(-low, high), seen.spread, seen.kurtosis, tuple(errors))


def _outliers(model: ir.Model, layers: Sequence[Linear], feeds: Sequence[Feed]) -> dict[str, Outliers]:
    """The statistics of every value that layers read, by its name."""
    seen = {layer.x.name or "": Outliers() for layer in layers}
    session = Session(model, outputs=list(seen), lean=True)
    for sample, feed in enumerate(feeds):
        for name, array in session.run(feed).items():
            rows = rows_of(array, padding_mask(feed))
            require_finite(name, rows, sample)
            seen[name].update(rows)
    return seen


def _layer_errors(
    model: ir.Model,
    layers: Sequence[Linear],
    outliers: dict[str, Outliers],
    feeds: Sequence[Feed],
    bits: Sequence[int],
    progress: Progress,
) -> dict[str, list[BitError]]:
    """The errors of each layer's product on its float input."""
    rng = np.random.default_rng(0)
    with progress("single layers", len(layers) + len(feeds)) as advance:
        probed = {}
        for layer in layers:
            probed[layer.name] = _probed(layer.weights(), bits, rng)
            advance()
        tokens = dict.fromkeys(probed, 0)
        noise = {name: np.zeros((len(bits), 3)) for name in probed}
        session = Session(model, outputs=list(outliers), lean=True)
        for feed in feeds:
            values = session.run(feed)
            for layer in layers:
                value = layer.x.name or ""
                rows, (weight, rounded) = rows_of(values[value], padding_mask(feed)), probed[layer.name]
                exact = rows @ weight
                tokens[layer.name] += len(rows)
                for index, width in enumerate(bits):
                    steps = schemes.activation_grid(*outliers[value].range, width).round_trip(rows)
                    products = steps @ rounded[index], rows @ rounded[index], steps @ weight
                    noise[layer.name][index] += [noise_by_token(exact, product) for product in products]
            advance()
    return {
        name: [BitError(width, *(_decibels(tokens[name], found) for found in noise[name][index].tolist()))
               for index, width in enumerate(bits)]
        for name in probed
    }  # fmt: skip


def _probed(weight: Float, bits: Sequence[int], rng: np.random.Generator) -> tuple[Float, list[Float]]:
    """A weight [K, N] and what it is rounded to at each bit width, along random directions: [K, PROBES] each."""
    signs = rng.choice(np.array([-1, 1]), (weight.shape[1], PROBES)) / PROBES**0.5
    probes: Float = np.asarray(signs, dtype=np.float32)
    return weight @ probes, [schemes.weight_round_trip(weight, width, width) @ probes for width in bits]


def noise_by_token(wanted: Float, got: Float) -> float:
    """Sum over tokens, rows of [tokens, N], of the noise relative to the token's own power."""
    noise = np.square(got - wanted, dtype=np.float64).sum(axis=-1)
    return float((noise / np.maximum(np.square(wanted, dtype=np.float64).sum(axis=-1), 1e-30)).sum())


def _decibels(power: float, noise: float) -> float:
    return 200.0 if noise == 0 else min(200.0, 10 * float(np.log10(max(power, 1e-30) / noise)))


def _whole_errors(
    model: ir.Model,
    wanted: OutputError,
    quantized: dict[str, _Grids],
    chosen: Sequence[str],
    *,
    on: bool,
    advance: Callable[[], None],
) -> dict[str, float]:
    """The error of the whole model with each chosen layer switched the way that all others are not.

    Args:
        model: the float model.
        wanted: compares results with the float model's.
        quantized: the layers that have integers in the graph; those that are not chosen are never float.
        chosen: the layers to switch.
        on: True switches one layer to integers and the other chosen ones to float; False the other way round, and
            then "" is the error with all in integers.
        advance: called after each.
    """
    session = Session(_switched(model, quantized, chosen), outputs=[wanted.output], lean=True)
    found = {}
    for name in [*chosen, *([] if on else [""])]:
        found[name] = wanted.mean(session, {GATE + other: np.array((other == name) == on) for other in chosen})
        advance()
    return found


def _switched(model: ir.Model, quantized: dict[str, _Grids], chosen: Sequence[str]) -> ir.Model:
    """A copy of a model with integers in some layers, that chosen ones can be switched from and to.

    before:  y = MatMul(x, W)
    after:   y = Where(gate, MatMul(dq(q(clip(x))), dq(codes)), MatMul(x, W))      chosen
             y = MatMul(dq(q(clip(x))), dq(codes))                                  others

    Weights are codes, not a second float copy.
    """
    copy = model.clone()
    for layer in graph.linear_layers(copy):
        if (entry := quantized.get(layer.name)) is None:
            continue
        product = _integers(copy, layer, entry.grid)
        out = layer.matmul.outputs[0]
        if layer.name not in chosen:
            graph.bypass(out, product)
            continue
        gate = ir.Value(name=GATE + layer.name, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
        copy.graph.inputs.append(gate)
        choice = ir.node("Where", [gate, product, out], name=f"{layer.name}.choice")
        graph.like(choice.outputs[0], out)
        graph.insert_after(layer.matmul, [choice])
        graph.bypass(out, choice.outputs[0])
        choice.replace_input_with(2, out)
    graph.sweep(copy)
    return copy


def _integers(model: ir.Model, layer: Linear, grid: Affine) -> ir.Value:
    """The layer's product in QDQ form, put in front of its MatMul."""
    weight = layer.weights()
    scales = schemes.column_scales(weight, grid.bits, grid.bits)
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "codes": schemes.weight_codes(weight, scales, grid.bits),
        "scales": scales,
        "scale": np.array(grid.scale, dtype=np.float32),
        "zero": np.array(grid.zero_point, dtype=np.uint8),
        "low": np.array(grid.low, dtype=np.float32),
        "high": np.array(grid.high, dtype=np.float32),
    }
    values = {name: graph.add_initializer(model, f"{layer.name}.{name}", array) for name, array in arrays.items()}
    step, zero = values["scale"], values["zero"]
    clip = ir.node("Clip", [layer.x, values["low"], values["high"]])
    quantize = ir.node("QuantizeLinear", [clip.outputs[0], step, zero])
    restore = ir.node("DequantizeLinear", [quantize.outputs[0], step, zero])
    decode = ir.node("DequantizeLinear", [values["codes"], values["scales"]], {"axis": 1})
    product = ir.node("MatMul", [restore.outputs[0], decode.outputs[0]], name=f"{layer.name}.integers")
    made = [clip, quantize, restore, decode, product]
    for node in made:
        node.outputs[0].name = f"{layer.name}.{node.op_type.lower()}_{made.index(node)}"
    graph.like(product.outputs[0], layer.matmul.outputs[0])
    graph.insert_before(layer.matmul, made)
    return product.outputs[0]
