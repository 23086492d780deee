"""What each linear layer could become, and what that costs in error, bytes and time, each measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph, schemes
from scalefold.compiler.block_timing import faster_in_blocks
from scalefold.compiler.choice_solver import Option
from scalefold.compiler.decode_chain import CODED, origin_of, remember
from scalefold.compiler.decoder import first_tokens
from scalefold.compiler.facts import Fact, quantized_matmuls, weight_array, weight_dequantizer
from scalefold.compiler.graph import Linear
from scalefold.compiler.kernel_timing import BLOCK_BITS, Kernel, Product, column_block, kernel_seconds
from scalefold.compiler.output_error import OutputError
from scalefold.compiler.protocol import Context, Measure, Pipeline, Requests
from scalefold.compiler.recipe import Granularity, Recipe, WeightFormat, Weights
from scalefold.compiler.runtime import Array, Feed, Session
from scalefold.compiler.schemes import Float
from scalefold.compiler.stats import SecondMoment, Statistic, TokenRange
from scalefold.compiler.weight_formats import CodedWeight

CANDIDATES = (
    WeightFormat(bits=6),
    WeightFormat(format="kmeans", bits=4, codebook="column", compensation=True),
    WeightFormat(format="kmeans", bits=3, codebook="column", weighting="hessian", compensation=True),
)
"""The formats offered to every layer beside that of the base recipe."""

IN_BLOCKS = WeightFormat(bits=4, group_size=32, compensation=True)
"""Offered as well where the profile lets linear weights run in blocks."""

GRANULARITIES: tuple[Granularity, ...] = ("per-tensor", "per-token")

DELTA = "scalefold.delta."
"""Begins the names of the inputs that are added to a layer's product."""

TOKENS = 128
"""Most tokens of a sample that single layers are measured on."""

OPERATIONS = 1e13
"""Multiply-adds that measuring single layers may take, which is some minutes; fewer samples are run to keep to it."""

CHAIN_BYTES = {8: 0, 4: 500}
"""What the nodes that decode a layer's weight take in the graph, about, by its bits; `OTHER_CHAIN_BYTES` for others."""

OTHER_CHAIN_BYTES = 1700
ROW_BYTES = 1200
"""The same for the nodes of a range per token."""

SPILLED = 1 << 16
"""Arrays larger than this, in bytes, are kept in a file, not in memory."""

Build = Callable[[Recipe], Pipeline]


@dataclass(frozen=True)
class Choice:
    """What one layer could become.

    Attributes:
        weights: how its weight is stored.
        granularity: what has a scale in its input; None where the kernel rounds it in blocks.
    """

    weights: WeightFormat
    granularity: Granularity | None

    def __str__(self) -> str:
        return f"{self.weights}, {self.granularity or 'in blocks'}"


@dataclass(frozen=True)
class StoredWeight:
    """A weight in one format, its arrays in files.

    Attributes:
        integers: int8 [K, N], what the kernel gets.
        scales: float32 [N].
        coded: the codes that the integers were decoded from; None where these are stored themselves.
    """

    integers: ir.TensorProtocol
    scales: Float
    coded: CodedWeight | None

    @property
    def bytes(self) -> int:
        """What it takes in a file."""
        if self.coded is None:
            return self.integers.nbytes + self.scales.nbytes
        return self.coded.code_bytes + self.coded.overhead_bytes

    def values(self) -> Float:
        """The weight as the kernel sees it, float32 [K, N]."""
        return self.integers.numpy().astype(np.float32) * self.scales


@dataclass(frozen=True)
class Item:
    """Layers that share one weight, and so one choice.

    Attributes:
        layers: their names.
        shape: (K, N) of the weight.
        choices: what they could become.
        stored: the weight in the format of each choice.
    """

    layers: tuple[str, ...]
    shape: tuple[int, int]
    choices: tuple[Choice, ...]
    stored: tuple[StoredWeight, ...]

    @property
    def formats(self) -> tuple[int, ...]:
        """For each choice the number of its format: choices that differ in the input alone have the same."""
        found = list(dict.fromkeys(choice.weights for choice in self.choices))
        return tuple(found.index(choice.weights) for choice in self.choices)


class Candidates:
    """The weights of a model in every format that is offered, made by the passes that a compilation would run.

    Args:
        model: the float graph, ready to be quantized.
        recipe: the base recipe.
        build: gives the passes of a recipe.
        ctx: calibrates.
        folder: for the weights.

    Attributes:
        base: the model with the weights of all layers as the base recipe wants them.
        items: what can be chosen.
    """

    def __init__(self, model: ir.Model, recipe: Recipe, build: Build, ctx: Context, folder: Path) -> None:
        self._folder = folder
        self._spilled = 0
        layers = {layer.name: layer for layer in graph.linear_layers(model)}
        packed = recipe.model_copy(update={"weights": recipe.weights.model_copy(update={"packed": True})})
        self.base = self._quantized(model, packed, build, ctx)
        matmuls = {node.name or "": node for node in quantized_matmuls(self.base)}
        own = {name: self._stored(node) for name, node in matmuls.items()}
        # A table that is looked up too has one format for both uses.
        tied = {name for name, node in matmuls.items() if not _codes(node).is_initializer()}
        free = [name for name in matmuls if name not in tied]
        ctx = replace(ctx, measure=_Moments(ctx.measure, folder))
        offered = [] if not free else [*CANDIDATES, *([IN_BLOCKS] if recipe.profile != "throughput" else [])]
        made = {wanted: self._in_format(model, recipe, wanted, free, build, ctx) for wanted in offered}
        self.items = tuple(
            _item(recipe, [layers[name] for name in names], own, {} if names[0] in tied else made)
            for names in _sharing(layers, matmuls)
        )

    @property
    def names(self) -> frozenset[str]:
        """The layers that there is a choice for."""
        return frozenset(name for item in self.items for name in item.layers)

    def assembled(self, picked: Sequence[int]) -> ir.Model:
        """The model with the weights of the choices picked, its activations in float."""
        model = self.base.clone()
        matmuls = {node.name or "": node for node in quantized_matmuls(model)}
        for item, index in zip(self.items, picked, strict=True):
            chosen = item.stored[index]
            if chosen is item.stored[0]:
                continue
            for name in item.layers:
                dequantize = weight_dequantizer(matmuls[name])
                assert dequantize is not None
                codes, scales = dequantize.inputs[0], dequantize.inputs[1]
                assert codes is not None and scales is not None
                codes.const_value = chosen.integers
                scales.const_value = ir.tensor(chosen.scales, name=scales.name)
                codes.meta.pop(CODED, None)
                if chosen.coded is not None:
                    remember(codes, chosen.coded)
        return model

    def _in_format(
        self, model: ir.Model, recipe: Recipe, wanted: WeightFormat, names: Sequence[str], build: Build, ctx: Context
    ) -> dict[str, StoredWeight]:
        """The weights of some layers in one format."""
        weights = Weights(**wanted.model_dump())
        include = tuple(exactly(name) for name in names)
        plan = recipe.model_copy(update={"weights": weights, "embeddings": None, "include": include, "exclude": ()})
        quantized = self._quantized(model, plan, build, ctx)
        return {node.name or "": self._stored(node) for node in quantized_matmuls(quantized)}

    def _quantized(self, model: ir.Model, recipe: Recipe, build: Build, ctx: Context) -> ir.Model:
        copy = model.clone()
        for entry in build(recipe).quantize:
            if Fact.QUANTIZED_WEIGHTS in entry.provides:
                entry.run(copy, ctx)
        made = [
            value
            for value in copy.graph.initializers.values()
            if value.const_value is not None
            and not isinstance(value.const_value, ir.ExternalTensor)
            and value.const_value.nbytes > SPILLED
        ]
        for value, tensor in zip(made, self._outside([value.const_value for value in made]), strict=True):
            value.const_value = tensor
        return copy

    def _stored(self, matmul: ir.Node) -> StoredWeight:
        node = weight_dequantizer(matmul)
        assert node is not None
        codes, origin = _codes(matmul), origin_of(_codes(matmul))
        scales = np.asarray(graph.constant(node.inputs[1]), dtype=np.float32)
        if not codes.is_initializer():
            array = weight_array(codes)
            assert array is not None
            return StoredWeight(ir.tensor(array), scales, None)
        assert codes.const_value is not None
        if origin is None:
            return StoredWeight(codes.const_value, scales, None)
        outside = self._outside([ir.tensor(origin.coded.codes)])[0]
        return StoredWeight(codes.const_value, scales, replace(origin.coded, codes=outside.numpy()))

    def _outside(self, tensors: Sequence[ir.TensorProtocol | None]) -> list[ir.ExternalTensor]:
        """The same tensors in a file of their own."""
        self._spilled += 1
        named = []
        for number, tensor in enumerate(tensors):
            assert tensor is not None
            named.append(ir.tensor(tensor.numpy(), name=f"tensor_{number}"))
        return list(ir.external_data.convert_tensors_to_external(named, self._folder, f"weights_{self._spilled}.data"))


class _Moments:
    """Measures second moments once for all formats: they are of the float graph, whatever a weight becomes.

    Args:
        measure: streams the calibration samples.
        folder: for the moments, which together are larger than the weights.
    """

    def __init__(self, measure: Measure, folder: Path) -> None:
        self._measure = measure
        self._folder = folder
        self._known: dict[tuple[str, ...], tuple[Path, int]] = {}

    def __call__(self, model: ir.Model, requests: Requests) -> dict[str, Statistic]:
        """Fill in the statistics that are known, and measure the others."""
        found = {name: factory() for name, factory in requests.items()}
        names: dict[int, list[str]] = {}
        for name, statistic in found.items():  # layers that share a weight share a statistic
            names.setdefault(id(statistic), []).append(name)
        fresh = {name: entry for name, entry in found.items() if not self._recall(entry, names[id(entry)])}
        if fresh:
            self._measure(model, {name: lambda entry=entry: entry for name, entry in fresh.items()})  # type: ignore[misc]
        for entry in {id(entry): entry for entry in fresh.values()}.values():
            if isinstance(entry, SecondMoment) and not entry.diagonal and entry.total is not None:
                path = self._folder / f"moment_{len(self._known)}.npy"
                np.save(path, entry.total)
                self._known[tuple(names[id(entry)])] = path, entry.count
        return found

    def _recall(self, statistic: Statistic, names: Sequence[str]) -> bool:
        known = self._known.get(tuple(names))
        if known is None or not isinstance(statistic, SecondMoment) or statistic.diagonal:
            return False
        statistic.total, statistic.count = np.load(known[0], mmap_mode="r"), known[1]
        return True


def _codes(matmul: ir.Node) -> ir.Value:
    node = weight_dequantizer(matmul)
    assert node is not None and node.inputs[0] is not None
    return node.inputs[0]


def _sharing(layers: Mapping[str, Linear], names: Iterable[str]) -> list[list[str]]:
    """The names of layers, those that read one weight together."""
    found: dict[ir.Value, list[str]] = {}
    for name in names:
        found.setdefault(layers[name].weight, []).append(name)
    return list(found.values())


def _item(
    recipe: Recipe,
    layers: Sequence[Linear],
    own: Mapping[str, StoredWeight],
    made: Mapping[WeightFormat, Mapping[str, StoredWeight]],
) -> Item:
    """The choices of layers that share a weight, the base recipe's own format first."""
    name, shape = layers[0].name, layers[0].shape
    stored = {recipe.weights.of(name): own[name]}
    stored |= {wanted: weights[name] for wanted, weights in made.items() if wanted not in stored}
    choices = [
        (Choice(wanted, granularity), weight)
        for wanted, weight in stored.items()
        for granularity in ((None,) if in_blocks(recipe, wanted, shape) else GRANULARITIES)
    ]
    every, weights = zip(*choices, strict=True)
    return Item(tuple(layer.name for layer in layers), shape, every, weights)


def in_blocks(recipe: Recipe, wanted: WeightFormat, shape: tuple[int, int]) -> bool:
    """Whether a weight of this format runs in blocks; see lower-block-matmul."""
    linear = wanted.format == "linear" and wanted.bits in BLOCK_BITS
    if recipe.profile == "throughput" or not (linear or wanted.bits == 8):
        return False
    return recipe.profile == "decode" or faster_in_blocks(*shape, _in_blocks(wanted, shape[0]), recipe.rows)


def _in_blocks(wanted: WeightFormat, k: int) -> Kernel:
    """What runs a weight [K, N] of this format in blocks; there are groups at fewer than 8 bits alone."""
    block = wanted.group_size if wanted.bits < 8 else None
    return Kernel(None, block or column_block(k, wanted.bits), wanted.bits)


def measured_options(
    model: ir.Model,
    items: Sequence[Item],
    recipe: Recipe,
    ranges: Mapping[str, TokenRange],
    samples: Sequence[Feed],
    ctx: Context,
) -> list[list[Option]]:
    """What each choice costs when its layers alone take it.

    Rounding of the weight and of the input are measured apart, and their errors added.

    Args:
        model: the float graph.
        items: the layers and their choices.
        recipe: the base recipe.
        ranges: of what each layer reads, by value name.
        samples: errors are measured on these, or as many as there is time for.
        ctx: opens progress bars.
    """
    errors = _Alone(model, items, recipe, ranges, samples).errors(ctx)
    with ctx.progress("timing kernels", len(items)) as advance:
        found = []
        for item, (weight_errors, input_errors) in zip(items, errors, strict=True):
            found.append(
                [
                    Option(
                        weight_errors[stored_index] + input_errors.get(choice.granularity, 0.0),
                        item.stored[index].bytes + _graph_bytes(item, choice),
                        _seconds(item, index, recipe),
                    )
                    for index, (choice, stored_index) in enumerate(zip(item.choices, item.formats, strict=True))
                ]
            )
            advance()
    return found


def _graph_bytes(item: Item, choice: Choice) -> int:
    """What a choice takes beside the weight: nodes, and with ranges per token the sums of the weight's columns."""
    chain = CHAIN_BYTES.get(choice.weights.bits, OTHER_CHAIN_BYTES)
    rows = (4 * item.shape[1] + ROW_BYTES) * len(item.layers) if choice.granularity == "per-token" else 0
    return chain + rows


def _seconds(item: Item, index: int, recipe: Recipe) -> float:
    """The time of an item's products by one of its choices, the mean over the numbers of rows."""
    kernels = [
        Kernel(choice.granularity) if choice.granularity else _in_blocks(choice.weights, item.shape[0])
        for choice in item.choices
    ]
    seconds = 0.0
    for rows in recipe.rows:
        products = [Product(kernel, *item.shape, rows) for kernel in kernels]
        seconds += kernel_seconds(products)[products[index]]
    return len(item.layers) * seconds / len(recipe.rows)


class _Alone:
    """Runs the float model with one item's rounding error added to its product.

    before:  y = MatMul(x, W)
    after:   y = MatMul(x, W) + delta        delta = x (Q(W) - W)  or  (Q(x) - x) W

    A layer that alone is quantized reads its float input, so that delta is known before the run, and one graph serves
    every layer and choice. One sample's activations are in memory at a time.
    """

    def __init__(
        self,
        model: ir.Model,
        items: Sequence[Item],
        recipe: Recipe,
        ranges: Mapping[str, TokenRange],
        samples: Sequence[Feed],
    ) -> None:
        assert recipe.activations is not None
        self._layers = {layer.name: layer for layer in graph.linear_layers(model)}
        self._items = items
        self._bits = recipe.activations.bits
        self._grids = {name: schemes.activation_grid(seen.low, seen.high, self._bits) for name, seen in ranges.items()}
        self._runs = sum(len(set(item.formats)) + len(GRANULARITIES) for item in items)
        self._error = OutputError(model, self._affordable(model, samples), stride=1)
        chosen = [name for item in items for name in item.layers]
        read = {self._layers[name].x.name or "" for name in chosen}
        self._capture = Session(model, outputs=sorted(read), lean=True)
        self._session = Session(_with_deltas(model, chosen), outputs=[self._error.output], lean=True)
        self._zeros: dict[str, Array] = {DELTA + name: np.zeros((1,), dtype=np.float32) for name in chosen}

    def errors(self, ctx: Context) -> list[tuple[list[float], dict[Granularity | None, float]]]:
        """For each item the mean error of each of its formats, and of each granularity."""
        weights = [np.zeros(max(item.formats) + 1) for item in self._items]
        inputs: list[dict[Granularity | None, float]] = [dict.fromkeys(GRANULARITIES, 0.0) for _ in self._items]
        tokens = 0
        with ctx.progress("single layers", self._runs * len(self._error.feeds)) as advance:
            for index, feed in enumerate(self._error.feeds):
                values = self._capture.run(feed)
                count = 0
                for item, of_weights, of_inputs in zip(self._items, weights, inputs, strict=True):
                    for number, stored in dict(zip(item.formats, item.stored, strict=True)).items():
                        deltas = self._weight_deltas(item, stored, values)
                        found = self._error.of(self._session, index, {**self._zeros, **deltas})
                        of_weights[number] += found.sum()
                        count = len(found)
                        advance()
                    for granularity in GRANULARITIES:
                        deltas = self._input_deltas(item, granularity, values)
                        found = self._error.of(self._session, index, {**self._zeros, **deltas})
                        of_inputs[granularity] += float(found.sum())
                        advance()
                tokens += count
        return [
            ((of_weights / tokens).tolist(), {name: error / tokens for name, error in of_inputs.items()})
            for of_weights, of_inputs in zip(weights, inputs, strict=True)
        ]

    def _weight_deltas(self, item: Item, stored: StoredWeight, values: Mapping[str, Array]) -> dict[str, Array]:
        lost = stored.values() - self._layers[item.layers[0]].weights()
        return {DELTA + name: values[self._layers[name].x.name or ""] @ lost for name in item.layers}

    def _input_deltas(self, item: Item, granularity: Granularity, values: Mapping[str, Array]) -> dict[str, Array]:
        weight = self._layers[item.layers[0]].weights()
        found = {}
        for name in item.layers:
            value = self._layers[name].x.name or ""
            x = values[value]
            if granularity == "per-token":
                rounded = schemes.round_trip_rows(x, self._bits)
            else:
                rounded = self._grids[value].round_trip(x)
            found[DELTA + name] = (rounded - x) @ weight
        return found

    def _affordable(self, model: ir.Model, feeds: Sequence[Feed]) -> list[Feed]:
        """As many samples, cut to a few tokens, as can be run for every choice of every layer in good time."""
        operations = sum(layer.shape[0] * layer.shape[1] for layer in self._layers.values())
        count = int(OPERATIONS / max(operations * self._runs * TOKENS, 1))
        length = TOKENS if count else max(TOKENS // 4, int(OPERATIONS / (operations * self._runs)))
        return [first_tokens(feed, length, model) for feed in feeds[: max(count, 1)]]


def _with_deltas(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy of a model in which a further input is added to the product of each named layer."""
    copy, wanted = model.clone(), set(names)
    for layer in graph.linear_layers(copy):
        if layer.name not in wanted:
            continue
        delta = ir.Value(name=DELTA + layer.name, type=ir.TensorType(ir.DataType.FLOAT))
        copy.graph.inputs.append(delta)
        out = layer.matmul.outputs[0]
        add = ir.node("Add", [out, delta], name=f"{layer.name}.with_delta")
        graph.like(add.outputs[0], out)
        graph.insert_after(layer.matmul, [add])
        graph.bypass(out, add.outputs[0])
        add.replace_input_with(0, out)
    return copy


def exactly(name: str) -> str:
    """The pattern that only this name matches."""
    return f"^{re.escape(name)}$"
