"""Store the weights of linear layers as integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from scalefold.compiler import graph, schemes, verify
from scalefold.compiler.decode_chain import remember
from scalefold.compiler.errors import GraphError
from scalefold.compiler.facts import Fact, quantized_matmuls
from scalefold.compiler.layer_formats import formats_of
from scalefold.compiler.protocol import Context, Contract, Event, PassResult, refusals
from scalefold.compiler.recipe import WeightFormat, Weights
from scalefold.compiler.schemes import Float
from scalefold.compiler.solve import solve
from scalefold.compiler.stats import SecondMoment
from scalefold.compiler.weight_formats import CodedWeight, Grid

HESSIAN_BYTES = 300_000_000
"""Hessians that are held at once; the calibration samples are streamed again for the next so many layers."""

UNBOUND = 7
"""Activation bits at which no pair of codes can saturate: what float activations, and rows that are looked up, stand for."""

Hessian = npt.NDArray[np.float64]


@dataclass
class _Weight:
    """A weight and the layers that read it: their inputs' second moments add up."""

    value: ir.Value
    layers: list[graph.Linear]
    format: WeightFormat

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the tensors that the weight is multiplied with."""
        return tuple(dict.fromkeys(layer.x.name or "" for layer in self.layers))

    @property
    def hessian_bytes(self) -> int:
        """Bytes of what its solver looks at: x x^T, or its diagonal alone."""
        rows = self.layers[0].shape[0]
        return 8 * rows * (rows if self.format.compensation else 1)

    @property
    def name(self) -> str:
        """The first layer's name."""
        return self.layers[0].name


@dataclass(frozen=True)
class QuantizeWeights:
    """Replace each linear layer's float weight by int8 codes and a DequantizeLinear per output column.

    before:  MatMul(x, W)
    after:   MatMul(x, DequantizeLinear(integers, scales; axis=1))

    W and the integers are [K, N], scales [N]. Every format ends in such integers (compiler/weight_formats.py); which codes
    of b bits they were decoded from is noted beside them, for pack-weights to store. The solver keeps every pair of
    neighbouring integers within what a 16-bit accumulator holds, so that the integer kernel gives one answer on every CPU
    (`schemes.column_scales`). Where a solver looks at the layer's inputs, their second moment x x^T [K, K] is streamed from
    the float graph; layers that share a weight add theirs up.

    Attributes:
        weights: the format of each layer.
        activation_bits: bits of the activations that the weights will meet; None for float.
        include: regular expressions of layers to quantize; all when empty.
        exclude: regular expressions of layers to leave in float.
    """

    name: ClassVar[str] = "quantize-weights"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.NORMAL_FORM, Fact.NAMED_LAYERS})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED_WEIGHTS})
    contract: ClassVar[Contract] = Contract.LOSSY

    weights: Weights = field(default_factory=Weights)
    activation_bits: int | None = 8
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @property
    def bits(self) -> int:
        """The fewest bits of any layer."""
        return min([self.weights.bits, *(entry.bits for entry in self.weights.layers.values())])

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Quantize every linear layer; decline the excluded ones."""
        layers = graph.linear_layers(model)
        others = [node.name or "" for node in quantized_matmuls(model)]
        left = refusals([layer.name for layer in layers] + others, self.include, self.exclude)
        chosen = [layer for layer in layers if layer.name not in left]
        weights = _grouped(chosen, formats_of(self.weights, chosen, [*left, *others]))
        events: dict[str, Event] = {}
        with ctx.progress("quantizing weights", len(weights)) as advance:
            for weight, hessian in _with_hessians(model, weights, ctx):
                events |= self._quantize(model, weight, hessian)
                advance()
        graph.sweep(model)
        declined = tuple(Event(layer.matmul, left[layer.name]) for layer in layers if layer.name in left)
        return PassResult(tuple(events[layer.name] for layer in chosen), declined)

    def _quantize(self, model: ir.Model, weight: _Weight, hessian: Hessian | None) -> dict[str, Event]:
        """A weight that several layers share is stored once; each layer gets a DequantizeLinear of its own."""
        array = weight.layers[0].weights()
        integers, scales, coded = quantized(array, weight.format, hessian, self.activation_bits, weight.name)
        codes = graph.add_initializer(model, f"{weight.name}.weight_codes", integers)
        steps = graph.add_initializer(model, f"{weight.name}.weight_scales", scales)
        if coded is not None:
            remember(codes, coded)
        figures = {"weight_sqnr_db": verify.sqnr(array, integers.astype(np.float32) * scales)}
        for layer in weight.layers:
            dequantize = ir.node("DequantizeLinear", [codes, steps], {"axis": 1}, name=f"{layer.name}.weight_dq")
            graph.like(dequantize.outputs[0], layer.weight)
            graph.insert_before(layer.matmul, [dequantize])
            layer.matmul.replace_input_with(1, dequantize.outputs[0])
        return {layer.name: Event(layer.matmul, str(weight.format), figures) for layer in weight.layers}


def quantized(
    weight: Float, wanted: WeightFormat, hessian: Hessian | None, activation_bits: int | None, where: str
) -> tuple[npt.NDArray[np.int8], Float, CodedWeight | None]:
    """A weight [K, N] as integers [K, N], scales [N], and the codes that the integers were decoded from.

    Args:
        weight: float32.
        wanted: its format.
        hessian: second moment of its inputs, [K, K] or its diagonal [K]; None when the format needs none.
        activation_bits: bits of the activations that it will meet; None for float.
        where: the layer or table, for the error.

    Raises:
        GraphError: the weight holds NaN or infinity.
    """
    if not np.isfinite(weight).all():
        column = int(np.flatnonzero(~np.isfinite(weight).all(axis=0))[0])
        raise GraphError(
            f"column {column} of its weight holds NaN or infinity", where=where, remedy="mend the model, or exclude it"
        )
    # Rounding a column to the nearest needs no search, only what `schemes` does, at a tenth of the solvers' time.
    nearest = wanted.format == "linear" and wanted.chosen_solver == "rtn" and wanted.bits > 1
    if nearest and wanted.symmetric and wanted.group_size is None and not wanted.compensation:
        scales = schemes.column_scales(weight, wanted.bits, activation_bits or UNBOUND)
        integers = schemes.weight_codes(weight, scales, wanted.bits)
        return integers, scales, _symmetric(integers, scales, wanted.bits) if wanted.bits < 8 else None
    coded = solve(weight, wanted, hessian, activation_bits, name=where)
    return coded.integers(), coded.scales, coded


def _symmetric(integers: npt.NDArray[np.int8], scales: Float, bits: int) -> CodedWeight:
    half = 1 << (bits - 1)
    offsets = np.full((1, len(scales)), -half, dtype=np.int8)
    return CodedWeight((integers + np.int8(half)).astype(np.uint8), bits, Grid(offsets), scales)


def _grouped(layers: Sequence[graph.Linear], formats: Mapping[str, WeightFormat]) -> list[_Weight]:
    """The weights of layers, each once a format."""
    found: dict[tuple[ir.Value, str], _Weight] = {}
    for layer in layers:
        wanted = formats[layer.name]
        entry = found.setdefault((layer.weight, wanted.model_dump_json()), _Weight(layer.weight, [], wanted))
        entry.layers.append(layer)
    return list(found.values())


def _with_hessians(
    model: ir.Model, weights: Sequence[_Weight], ctx: Context
) -> Iterator[tuple[_Weight, Hessian | None]]:
    """Each weight with the second moment of its inputs, where its format asks for it; few of these are held at once.

    The samples run through a copy of the graph as it is before any weight is rounded; constants are not copied.
    """
    unrounded = model.clone() if any(weight.format.needs_hessian for weight in weights) else model
    for batch in _batches(weights):
        moments: dict[tuple[str, ...], SecondMoment] = {}
        requests: dict[str, Callable[[], SecondMoment]] = {}
        for weight in batch:
            if weight.format.needs_hessian:
                moment = moments.setdefault(weight.inputs, SecondMoment(diagonal=not weight.format.compensation))
                moment.diagonal &= not weight.format.compensation
                # One statistic for all inputs of a shared weight: their rows add up.
                requests |= {name: lambda moment=moment: moment for name in weight.inputs}  # type: ignore[misc]
        if requests:
            ctx.measure(unrounded, requests)
        for weight in batch:
            yield weight, moments[weight.inputs].mean if weight.format.needs_hessian else None


def _batches(weights: Sequence[_Weight]) -> Iterator[list[_Weight]]:
    """Weights in order, cut so that their Hessians fit the budget and no tensor is asked for by two of them at odds."""
    batch: list[_Weight] = []
    held: dict[tuple[str, ...], int] = {}
    for weight in weights:
        if not weight.format.needs_hessian:
            batch.append(weight)
            continue
        clash = any(weight.inputs != other and set(weight.inputs) & set(other) for other in held)
        size = max(weight.hessian_bytes, held.get(weight.inputs, 0))
        full = held and sum(held.values()) - held.get(weight.inputs, 0) + size > HESSIAN_BYTES
        if clash or full:
            yield batch
            batch, held, size = [], {}, weight.hessian_bytes
        batch.append(weight)
        held[weight.inputs] = size
    if batch:
        yield batch
