"""Outlier Suppression+: shift and scale the channels of activations, and undo both exactly in what reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph, schemes
from scalefold.compiler.calibrate import padding_mask, require_finite, rows_of
from scalefold.compiler.facts import Fact
from scalefold.compiler.protocol import Context, Contract, Event, Fused, PassResult
from scalefold.compiler.runtime import Array, Feed, Session
from scalefold.compiler.schemes import Float
from scalefold.compiler.sites import (
    MIGRATED,
    Kind,
    Producer,
    Site,
    find_producer,
    find_sites,
    fold,
    group_sites,
    obstacle,
)
from scalefold.compiler.value_columns import ATTENTION, find_value
from scalefold.compiler.walk import Walk

COARSEST = 64
"""Most thresholds that are tried before the search closes in."""

BEHIND = 1.5
"""How many times the least loss on a quarter of the samples the loss of a threshold may be there to be tried on all."""

MOST_COLUMNS = 4096
"""Most columns of a layer that a search looks at."""

LOWEST_THRESHOLD = {"LayerNormalization": 1.0}
"""Where the threshold grid ends, by the op type of what makes the activation."""

LOWEST_ELSEWHERE = 0.1
"""Where it ends for all others; the authors' code takes it for LLaMA."""

FLOAT = """<ir_version: 10, opset_import: ["" : 20]>
product (float[] x, float[k, n] weight) => (float[] y) { y = MatMul(x, weight) }"""
"""A product by onnxruntime, several times faster than some builds of numpy's."""

CODES = """<ir_version: 10, opset_import: ["" : 20]>
codes (float[] x, float[k] z, float[k] s, float x_scale, uint8 zero, uint8 largest) => (uint8[] codes) {
  shifted = Sub(x, z)  scaled = Div(shifted, s)
  of_8_bits = QuantizeLinear(scaled, x_scale, zero)  codes = Clip(of_8_bits, , largest) }"""
"""The codes of an activation behind a migration, in a third of numpy's time."""

INTEGER = """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
product (uint8[] x, int8[k, n] weight, float x_scale, float[n] weight_scales, uint8 zero, float[n] shift) => (float[] y)
{ y = com.microsoft.MatMulIntegerToFloat(x, weight, x_scale, weight_scales, zero, "", shift) }"""
"""The product of codes by the integer kernel: what the layer will compute, in a third of float's time."""


@dataclass(frozen=True)
class Plan:
    """A migration: shift z [C], scale s [C], the threshold that gives s, and the loss with both."""

    z: Float
    s: Float
    threshold: float
    loss: float


@dataclass(frozen=True)
class Use:
    """One site of a group, ready for a search.

    Attributes:
        site: where.
        producer: what makes the activation.
        batches: the activation, one array [..., C] per feed.
        inspected: what the error is measured on, from the number of a feed and the readers' products; None for the
            products themselves.
    """

    site: Site
    producer: Producer
    batches: list[Array]
    inspected: Callable[[int, list[Array]], Array] | None


@dataclass(frozen=True)
class MigrateOutliers:
    """Shift channels by z and scale them by 1/s where they are made; undo both exactly in the layers that read them.

    before:  X = LayerNormalization(h; gamma, beta);  y = X W + b;                         r = X + ...
    after:   X~ = LayerNormalization(h; gamma/s, (beta-z)/s);  y = X~ (s W) + (b + z W);   r = (X~ s + z) + ...

    X is [..., C]; z and s are [C]; W is [C, N]. X = s X~ + z, so every reader computes what it did. Post-LN models read
    X in a residual connection too: there it is restored by Mul and Add, left out where s is 1 or z is 0.

    Other makers of X absorb the same, each its own option; U [K, C] and a [C] are weight and bias of a layer V:

    norm    RMSNormalization(h; gamma)     gamma/s                          no shift
    linear  X = V h                        U/s, (a-z)/s                     an embedding projection
    value   X = softmax(...) V h           U/s, (a-z)/s of V's columns      rows of softmax sum to 1
    relu    X = relu(V h)                  U/s, a/s                         no shift; s is positive
    gate    X = act(G h) * (V h)           U/s, a/s                         no shift

    A cache of values then holds them migrated. Tokens that attend to nothing, which are padding, give another padding.
    Grouped queries read one column of V in several channels, whose z and s are then one.

    z is the middle of each channel's range (Outlier Suppression+, arXiv 2304.09145, eq. 5). s scales down just the
    channels beyond a threshold t, to t (eq. 8). t is searched (sections 4.2 and Alg. 1): quantized activation and
    weight, squared error after attention for layers that meet in one (eq. 7), after the product for others (eq. 6).
    Layers before the site are quantized already while it is searched.

    Sites whose readers share a weight (ALBERT) are one group and get one z, of the union of their ranges, and one t, of
    the sum of their losses: weights stay shared. Where z = 0 gives a smaller loss there, it is 0. A group is searched
    on activations of the float model, as its uses lie behind one another.

    Attributes:
        weight_bits: bits of the weights in the search.
        activation_bits: bits of the activations in the search.
        shift: whether to shift.
        scale: whether to search a scale.
        grid: fewest thresholds; the grid has max(grid, max|X - z| / 0.5) of them, as in the authors' code.
        stride: the search first tries every n-th threshold, then closes in on the best.
        norm: migrate behind normalizations.
        linear: migrate between two linear layers with nothing between.
        value: migrate from the values of attention to its output projection.
        relu: migrate through a Relu.
        gate: migrate through a product with a gate.
    """

    name: ClassVar[str] = "migrate-outliers"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.NORMAL_FORM, Fact.NAMED_LAYERS})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.REASSOCIATED

    weight_bits: int = 8
    activation_bits: int = 8
    shift: bool = True
    scale: bool = True
    grid: int = 100
    stride: int = 8
    norm: bool = True
    linear: bool = True
    value: bool = False
    relu: bool = False
    gate: bool = False

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Migrate at every site in graph order; decline those where the algebra does not hold."""
        rewrites, declined = [], []
        sites = find_sites(model)
        groups = group_sites(sites)
        walk = Walk(model, ctx.search)
        masks = [padding_mask(feed) for feed in ctx.search]
        with ctx.progress("migrating outliers", len(sites)) as advance:
            for site in sites:
                if groups[site][0] is site:
                    alone = len(groups[site]) == 1
                    uses = self._uses(walk if alone else Walk(model, ctx.search), groups[site], masks, ctx.fused)
                    if isinstance(uses, Event):
                        declined.append(uses)
                    elif uses and (event := self._migrate(model, walk, uses, masks)) is not None:
                        rewrites.append(event)
                if site is not sites[-1]:  # nothing is searched behind the last, often as wide as a vocabulary
                    self._quantize(walk, site, masks)
                advance()
        return PassResult(tuple(rewrites), tuple(declined))

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of sites to migrate at."""
        chosen = {
            Kind.NORM: self.norm,
            Kind.LINEAR: self.linear,
            Kind.VALUE: self.value,
            Kind.RELU: self.relu,
            Kind.GATE: self.gate,
        }
        return frozenset(kind for kind, wanted in chosen.items() if wanted)

    def _uses(
        self, walk: Walk, group: Sequence[Site], masks: Sequence[Array | None], fused: Fused
    ) -> list[Use] | Event:
        """A group ready for a search; nothing when it is not one to migrate, or why it cannot be."""
        at = group[0].norm or group[0].readers[0]
        if any(node.meta.get(MIGRATED) for site in group for node in site.readers):
            return Event(at, "migrated already")
        uses: list[Use] = []
        reasons: list[str] = []
        for site in group:
            found = find_producer(site, self.kinds)
            if found is None and Kind.VALUE in self.kinds:
                found = find_value(walk, site, masks)
            if isinstance(found, Producer):
                # what lies behind the activation is cut out before the walk goes on and forgets what it needs
                inspected = _inspected(walk, site, found.kind, fused)
                uses.append(Use(site, found, _activation(walk, site, masks), inspected))
            elif found is not None:
                reasons.append(found)
        if not uses and not reasons:
            return []
        if len(uses) + len(reasons) < len(group):
            reasons.append("a weight is shared with a layer whose input cannot be migrated")
        reason = next(iter(reasons), None) or obstacle(group, [use.producer for use in uses])
        return Event(uses[0].producer.node if uses else at, reason) if reason else uses

    def _migrate(self, model: ir.Model, walk: Walk, uses: Sequence[Use], masks: Sequence[Array | None]) -> Event | None:
        first, (low, high) = uses[0], _joint_range(uses, masks)
        shifts = self.shift and all(use.producer.shifts for use in uses)
        middle = np.asarray((low + high) / 2, dtype=np.float32)
        plan = self._plan(uses, masks, middle if shifts else np.zeros_like(low))
        if shifts and len(uses) > 1:
            # the middle of all uses may lie far from that of one
            plan = min(plan, self._plan(uses, masks, np.zeros_like(low)), key=lambda plan: plan.loss)
        z, s = plan.z, plan.s
        if not (z.any() or (s != 1).any()):
            return None
        seen = _activation(walk, first.site, masks)
        fold(model, [use.site for use in uses], [use.producer for use in uses], z, s)
        walk.set_value(first.site.x, [((x - z) / s).astype(np.float32) for x in seen])
        figures: dict[str, float | int | str] = {"largest_before": float(max(high.max(), -low.min()))}
        figures |= {"threshold": plan.threshold} if self.scale else {}
        figures |= {"largest_after": float(np.maximum((high - z) / s, (z - low) / s).max())}
        figures |= {"channels_scaled": int((s != 1).sum()), "readers": len(first.site.readers)}
        figures |= {"uses": len(uses)} if len(uses) > 1 else {}
        return Event(first.producer.node, "shifted and scaled" if z.any() else "scaled", figures)

    def _plan(self, uses: Sequence[Use], masks: Sequence[Array | None], z: Float) -> Plan:
        """The best scale for a shift."""
        low, high = (np.asarray(bound - z, dtype=np.float32) for bound in _joint_range(uses, masks))
        largest = float(max(high.max(), -low.min()))
        lowest = max(LOWEST_THRESHOLD.get(use.producer.node.op_type, LOWEST_ELSEWHERE) for use in uses)
        thresholds = threshold_grid(largest, self.grid, lowest) if self.scale else np.array([largest], np.float32)
        everything = range(len(masks))
        first = -(-len(masks) // 4)
        loss = _loss(uses, masks, z, self)
        best, least = search(
            lambda t: loss(scales_for(t, low, high), everything[:first]),
            lambda t: loss(scales_for(t, low, high), everything[first:]),
            thresholds,
            self.stride,
        )
        return Plan(z, scales_for(thresholds[best], low, high), float(thresholds[best]), least)

    def _quantize(self, walk: Walk, site: Site, masks: Sequence[Array | None]) -> None:
        """Let the rest of the walk see these layers quantized."""
        batches = _activation(walk, site, masks)
        low, high = channel_range(batches, masks)
        affine = schemes.activation_grid(float(low.min()), float(high.max()), self.activation_bits)
        seen = [affine.round_trip(x) for x in batches]
        for layer in site.layers:
            walk.set_input(layer.matmul, site.x, seen)
            rounded = schemes.weight_round_trip(layer.weights(), self.weight_bits, self.activation_bits)
            walk.set_weight(layer.weight, rounded)
            graph.unmap(layer.weight)


def _activation(walk: Walk, site: Site, masks: Sequence[Array | None]) -> list[Array]:
    """The activation, one array per feed; raises when it is not finite."""
    batches = walk.value(site.x)
    for sample, (x, mask) in enumerate(zip(batches, masks, strict=True)):
        require_finite(site.x.name or "", rows_of(x, mask), sample)
    return batches


def _joint_range(uses: Sequence[Use], masks: Sequence[Array | None]) -> tuple[Float, Float]:
    """The range of each channel over all uses; channels of one column have one range."""
    ranges = [channel_range(use.batches, masks) for use in uses]
    low = np.minimum.reduce([low for low, _ in ranges])
    high = np.maximum.reduce([high for _, high in ranges])
    columns = next((use.producer.columns for use in uses if use.producer.columns is not None), None)
    if columns is None:
        return low, high
    lows, highs = np.full(columns.max() + 1, np.inf, np.float32), np.full(columns.max() + 1, -np.inf, np.float32)
    np.minimum.at(lows, columns, low)
    np.maximum.at(highs, columns, high)
    return lows[columns], highs[columns]


def channel_range(batches: Iterable[Array], masks: Iterable[Array | None]) -> tuple[Float, Float]:
    """Smallest and largest value of each channel over all tokens that are not padding: two arrays [C]."""
    pairs = [rows_of(batch, mask) for batch, mask in zip(batches, masks, strict=True)]
    low = np.stack([rows.min(axis=0) for rows in pairs]).min(axis=0)
    high = np.stack([rows.max(axis=0) for rows in pairs]).max(axis=0)
    return low.astype(np.float32), high.astype(np.float32)


def threshold_grid(largest: float, fewest: int, lowest: float = 1.0) -> Float:
    """Thresholds from the largest value down to `lowest`, or to a tenth of it when it is below twice that.

    The authors' code walks from max|X - z| down to 1, or 0.1 for LLaMA, in max(100, max|X - z| / 0.5) steps.
    """
    last = lowest if largest > 2 * lowest else 0.1 * largest
    return np.linspace(largest, last, max(fewest, int(largest / 0.5)), dtype=np.float32)


def scales_for(threshold: float, low: Float, high: Float) -> Float:
    """S [C] that brings every channel's range within the threshold and leaves the others at 1 (eq. 8, both signs)."""
    divisor = np.float32(max(threshold, schemes.SMALLEST_SCALE))  # all channels are constant where it is 0
    return np.maximum(1.0, np.maximum(high, -low) / divisor).astype(np.float32)


def search(
    first: Callable[[float], float], rest: Callable[[float], float], thresholds: Float, stride: int
) -> tuple[int, float]:
    """The index of the best threshold and its loss: every `stride`-th first, then on both sides of the best so far.

    On a tie the larger threshold wins, as in the authors' code. Values in the thousands make thousands of thresholds: a
    stride above 1 grows until it leaves at most `COARSEST`. Around the best it is halved until it is 1.

    Args:
        first: the loss of a threshold on some of the samples.
        rest: the loss on all others, which is added; not asked for where the threshold is `BEHIND` on the first.
        thresholds: all of them, from the largest down.
        stride: how many apart those are that are tried first.
    """
    firsts: dict[int, float] = {}
    losses: dict[int, float] = {}

    def best_of(indices: Iterable[int]) -> int:
        new = [index for index in indices if index not in firsts]
        firsts.update({index: first(float(thresholds[index])) for index in new})
        enough = min(firsts.values()) * BEHIND
        losses.update(
            {index: firsts[index] + rest(float(thresholds[index])) for index in new if firsts[index] <= enough}
        )
        return min(losses, key=lambda index: (losses[index], index))

    last, step = len(thresholds), stride
    while stride > 1 and last / step > COARSEST:
        step *= stride
    centre = best_of(range(0, last, step))
    while step > 1:
        step = -(-step // 2)
        centre = best_of(index for index in (centre - step, centre + step) if 0 <= index < last)
    return centre, losses[centre]


def _loss(
    uses: Sequence[Use], masks: Sequence[Array | None], z: Float, options: MigrateOutliers
) -> Callable[[Float, Sequence[int]], float]:
    """The squared error per token of all that scales s make on some of the samples; each use has a range of its own."""
    ranges = [channel_range(use.batches, masks) for use in uses]
    weights = {layer.weight: _some_columns(layer.weights(), use) for use in uses for layer in use.site.layers}
    shifts = {value: z @ weight for value, weight in weights.items()}
    in_float, in_codes, in_integers = (Session(ir.from_onnx_text(text)) for text in (FLOAT, CODES, INTEGER))
    largest = np.array((1 << options.activation_bits) - 1, dtype=np.uint8)

    def output(use: Use, index: int, product: Callable[[ir.Value], Array]) -> Array:
        products = [product(layer.weight) for layer in use.site.layers]
        return np.concatenate(products, axis=-1) if use.inspected is None else use.inspected(index, products)

    def wanted(x: Array) -> Callable[[ir.Value], Array]:
        return lambda value: in_float.run({"x": x, "weight": weights[value]})["y"]

    targets = [[output(use, index, wanted(x)) for index, x in enumerate(use.batches)] for use in uses]
    tokens = max(1, sum(len(rows_of(x, mask)) for use in uses for x, mask in zip(use.batches, masks, strict=True)))

    def quantized(
        x: Array, s: Float, affine: schemes.Affine, codes: Mapping[ir.Value, Feed]
    ) -> Callable[[ir.Value], Array]:
        grid: dict[str, Array] = {
            "x_scale": np.array(affine.scale, np.float32),
            "zero": np.array(affine.zero_point, np.uint8),
        }
        x_codes = in_codes.run({"x": x, "z": z, "s": s, "largest": largest, **grid})["codes"]
        return lambda value: in_integers.run({"x": x_codes, **grid, **codes[value]})["y"]

    def loss(s: Float, samples: Sequence[int]) -> float:
        codes = {value: _coded(weight * s[:, None], shifts[value], options) for value, weight in weights.items()}
        total = 0.0
        for use, aims, (low, high) in zip(uses, targets, ranges, strict=True):
            bounds = float(((low - z) / s).min()), float(((high - z) / s).max())
            affine = schemes.activation_grid(*bounds, options.activation_bits)
            for index in samples:
                got = output(use, index, quantized(use.batches[index], s, affine, codes))
                error = rows_of(np.subtract(got, aims[index], out=got), masks[index])
                total += float(np.einsum("tc,tc->t", error, error).sum(dtype=np.float64))
        return total / tokens

    return loss


def _coded(weight: Float, shift: Float, options: MigrateOutliers) -> dict[str, Array]:
    """A weight [K, N] in codes, and what its products are shifted by."""
    scales = schemes.column_scales(weight, options.weight_bits, options.activation_bits)
    return {
        "weight": schemes.weight_codes(weight, scales, options.weight_bits),
        "weight_scales": scales,
        "shift": shift,
    }


def _some_columns(weight: Float, use: Use) -> Float:
    """Evenly spaced columns of a weight as wide as a vocabulary, which stand for all where they are not mixed."""
    return weight[:, :: -(-weight.shape[1] // MOST_COLUMNS)] if use.inspected is None else weight


def _inspected(walk: Walk, site: Site, kind: Kind, fused: Fused) -> Callable[[int, list[Array]], Array] | None:
    """What the error is measured on, from the number of a feed and the readers' products x W; None for these."""
    end = _meeting_point(site) if kind in (Kind.NORM, Kind.LINEAR) else None
    if end is None:
        return None
    outs = [node.outputs[0] for node in site.readers]
    behind = {node for out in outs for node in graph.descendants(out)}
    chosen = behind & graph.ancestors(end, lambda value: value in outs)
    graph_ = site.readers[0].graph
    assert graph_ is not None
    session, others = walk.piece([node for node in graph_ if node in chosen], outs, end, fused=fused)
    names = [out.name or "" for out in outs]
    return lambda index, products: session.run({**dict(zip(names, products, strict=True)), **others[index]})[
        end.name or ""
    ]


def _meeting_point(site: Site) -> ir.Value | None:
    """The input of the next linear layer that all readers flow into, when that is worth inspecting.

    For several readers it is the output of attention, or of a gated unit. A single reader is inspected there only when
    a Softmax lies between, as in a fused QKV projection; else the error is measured right behind the product.
    """
    reached = [graph.descendants(node.outputs[0]) for node in site.readers]
    common = set.intersection(*reached)
    graph_ = site.readers[0].graph
    assert graph_ is not None
    for node in graph_:
        if node not in common or (layer := graph.linear_at(node)) is None:
            continue
        between = graph.ancestors(layer.x, lambda value: value is site.x)
        if not all(reader in between for reader in site.readers):
            continue
        attention = any(node.op_type in ATTENTION for node in between & common)
        return layer.x if len(site.readers) > 1 or attention else None
    return None
