"""Outlier Suppression+: shift and scale the channels behind a LayerNormalization, and undo both in what follows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph, schemes
from scalefold.compiler.calibrate import padding_mask, require_finite, rows_of
from scalefold.compiler.facts import Fact
from scalefold.compiler.graph import Linear
from scalefold.compiler.protocol import Context, Contract, Event, PassResult
from scalefold.compiler.runtime import Array, Session
from scalefold.compiler.schemes import Float
from scalefold.compiler.walk import Walk

MIGRATED = "scalefold.migrated"
"""Marks a normalization in memory: a second search would start from a smaller threshold and never settle."""


@dataclass(frozen=True)
class Site:
    """A value that linear layers read, and what the migration may do there.

    Attributes:
        x: the activation [..., C].
        norm: the LayerNormalization that makes it, or None.
        readers: the linear layers that read it.
        others: the other nodes that read it: a residual connection.
    """

    x: ir.Value
    norm: ir.Node | None
    readers: tuple[Linear, ...]
    others: tuple[ir.Node, ...]


@dataclass(frozen=True)
class MigrateOutliers:
    """Shift channels by z and scale them by 1/s behind a LayerNormalization; undo both exactly in its readers.

    before:  X = LayerNormalization(h; gamma, beta);  y = X W + b;                         r = X + ...
    after:   X~ = LayerNormalization(h; gamma/s, (beta-z)/s);  y = X~ (s W) + (b + z W);   r = (X~ s + z) + ...

    X is [..., C]; z and s are [C]; W is [C, N]. X = s X~ + z, so every reader computes what it did. Post-LN models read X
    in a residual connection too: there it is restored by Mul and Add, left out where s is 1 or z is 0.

    z is the middle of each channel's range (Outlier Suppression+, arXiv 2304.09145, eq. 5). s scales down just the
    channels beyond a threshold t, to t (eq. 8). t is searched (sections 4.2 and Alg. 1): quantized activation and weight,
    squared error after attention for layers that meet in one (eq. 7), after the product for others (eq. 6). Layers
    before the site are quantized already while it is searched.

    Attributes:
        weight_bits: bits of the weights in the search.
        activation_bits: bits of the activations in the search.
        shift: whether to shift.
        scale: whether to search a scale.
        grid: fewest thresholds; the grid has max(grid, max|X - z| / 0.5) of them, as in the authors' code.
        stride: the search first tries every n-th threshold, then those around the best.
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

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Migrate at every site in graph order; decline those where the algebra does not hold."""
        rewrites, declined = [], []
        sites = find_sites(model)
        walk = Walk(model, ctx.search)
        masks = [padding_mask(feed) for feed in ctx.search]
        with ctx.progress("migrating outliers", len(sites)) as advance:
            for site in sites:
                for sample, (x, mask) in enumerate(zip(walk.value(site.x), masks, strict=True)):
                    require_finite(site.x.name or "", rows_of(x, mask), sample)
                if reason := _obstacle(site):
                    if site.norm is not None:
                        declined.append(Event(site.norm, reason))
                elif (event := self._migrate(model, walk, site, masks)) is not None:
                    rewrites.append(event)
                self._quantize(walk, site, masks)
                advance()
        return PassResult(tuple(rewrites), tuple(declined))

    def _migrate(self, model: ir.Model, walk: Walk, site: Site, masks: Sequence[Array | None]) -> Event | None:
        batches = walk.value(site.x)
        low, high = channel_range(batches, masks)
        z = np.asarray((low + high) / 2 if self.shift else np.zeros_like(low), dtype=np.float32)
        centred_low, centred_high = low - z, high - z
        largest = float(max(centred_high.max(), -centred_low.min()))
        s = np.ones_like(z)
        figures: dict[str, float | int | str] = {"largest_before": float(max(high.max(), -low.min()))}
        if self.scale:
            loss = _loss(walk, site, masks, z, self)
            thresholds = threshold_grid(largest, self.grid)
            best = search(lambda t: loss(scales_for(t, centred_low, centred_high), t), thresholds, self.stride)
            s = scales_for(thresholds[best], centred_low, centred_high)
            figures["threshold"] = float(thresholds[best])
        if not (z.any() or (s != 1).any()):
            return None
        fold(model, site, z, s)
        walk.set_value(site.x, [((x - z) / s).astype(np.float32) for x in batches])
        figures |= {"largest_after": float(np.maximum(centred_high / s, -centred_low / s).max())}
        figures |= {"channels_scaled": int((s != 1).sum()), "readers": len(site.readers)}
        assert site.norm is not None
        site.norm.meta[MIGRATED] = True
        return Event(site.norm, "shifted and scaled", figures)

    def _quantize(self, walk: Walk, site: Site, masks: Sequence[Array | None]) -> None:
        """Let the rest of the walk see these layers quantized."""
        batches = walk.value(site.x)
        low, high = channel_range(batches, masks)
        affine = schemes.activation_grid(float(low.min()), float(high.max()), self.activation_bits)
        seen = [affine.round_trip(x) for x in batches]
        for layer in site.readers:
            current = graph.linear_at(layer.matmul)
            assert current is not None
            walk.set_input(current.matmul, site.x, seen)
            rounded = schemes.weight_round_trip(current.weights(), self.weight_bits, self.activation_bits)
            walk.set_weight(current.weight, rounded)


def find_sites(model: ir.Model) -> list[Site]:
    """The activations that linear layers read, in graph order, with everything else that reads them."""
    readers: dict[ir.Value, list[Linear]] = {}
    for layer in graph.linear_layers(model):
        readers.setdefault(layer.x, []).append(layer)
    sites = []
    for x, layers in readers.items():
        matmuls = {layer.matmul for layer in layers}
        others = tuple(node for node in graph.consumers(x) if node not in matmuls)
        sites.append(Site(x, graph.producer(x, "LayerNormalization"), tuple(layers), others))
    return sites


def _obstacle(site: Site) -> str | None:
    if site.norm is None:
        return "not made by a LayerNormalization"
    if MIGRATED in site.norm.meta:
        return "migrated already"
    parameters = [entry for entry in site.norm.inputs[1:] if entry is not None]
    if any(graph.constant(entry) is None for entry in parameters):
        return "gain or bias of the normalization is not a constant"
    if graph.attribute(site.norm, "axis", -1) not in (-1, (graph.rank(site.x) or 0) - 1):
        return "the normalization is not over the last axis alone"
    if site.x.is_graph_output():
        return "the activation is an output of the graph"
    if any(len(layer.weight.uses()) > 1 for layer in site.readers):
        return "a weight is shared with another layer"
    return None


def channel_range(batches: Iterable[Array], masks: Iterable[Array | None]) -> tuple[Float, Float]:
    """Smallest and largest value of each channel over all tokens that are not padding: two arrays [C]."""
    pairs = [rows_of(batch, mask) for batch, mask in zip(batches, masks, strict=True)]
    low = np.stack([rows.min(axis=0) for rows in pairs]).min(axis=0)
    high = np.stack([rows.max(axis=0) for rows in pairs]).max(axis=0)
    return low.astype(np.float32), high.astype(np.float32)


def threshold_grid(largest: float, fewest: int) -> Float:
    """Thresholds from the largest value down to 1, or to a tenth of it when it is below 2.

    The authors' code walks from max|X - z| down to 1 in max(100, max|X - z| / 0.5) steps (systems 1.3).
    """
    lowest = 1.0 if largest > 2.0 else 0.1 * largest
    return np.linspace(largest, lowest, max(fewest, int(largest / 0.5)), dtype=np.float32)


def scales_for(threshold: float, low: Float, high: Float) -> Float:
    """S [C] that brings every channel's range within the threshold and leaves the others at 1 (eq. 8, both signs)."""
    return np.maximum(1.0, np.maximum(high, -low) / np.float32(threshold)).astype(np.float32)


def search(loss: Callable[[float], float], thresholds: Float, stride: int) -> int:
    """The index of the best threshold: every `stride`-th first, then all around the best of those.

    On a tie the larger threshold wins, as in the authors' code.
    """
    losses: dict[int, float] = {}

    def best_of(indices: Iterable[int]) -> int:
        for index in indices:
            if index not in losses:
                losses[index] = loss(float(thresholds[index]))
        return min(losses, key=lambda index: (losses[index], index))

    last = len(thresholds)
    centre = best_of(range(0, last, stride))
    return best_of(range(max(0, centre - stride + 1), min(last, centre + stride)))


def _loss(
    walk: Walk, site: Site, masks: Sequence[Array | None], z: Float, options: MigrateOutliers
) -> Callable[[Float, float], float]:
    """The squared error of a site's output for given scales s and threshold t, with everything that does not change."""
    inspected = _inspected(walk, site)
    batches = walk.value(site.x)
    weights = [layer.weights() for layer in site.readers]
    shifts = [z @ weight for weight in weights]
    product = _product_session()
    targets = [
        inspected(
            index,
            [_product(product, x, weight, np.zeros_like(shift)) for weight, shift in zip(weights, shifts, strict=True)],
        )
        for index, x in enumerate(batches)
    ]

    def loss(s: Float, t: float) -> float:
        affine = schemes.activation_grid(-t, t, options.activation_bits)
        rounded = [
            schemes.weight_round_trip(weight * s[:, None], options.weight_bits, options.activation_bits)
            for weight in weights
        ]
        total, tokens = 0.0, 0
        for index, (x, target, mask) in enumerate(zip(batches, targets, masks, strict=True)):
            seen = affine.round_trip(((x - z) / s).astype(np.float32))
            products = [_product(product, seen, weight, shift) for weight, shift in zip(rounded, shifts, strict=True)]
            error = rows_of(inspected(index, products) - target, mask)
            total += float(np.square(error, dtype=np.float64).sum())
            tokens += error.shape[0]
        return total / max(tokens, 1)

    return loss


def _product_session() -> Session:
    """X W + shift by onnxruntime, whose float product is several times faster than some builds of numpy's."""
    x, weight, shift = (ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT)) for name in ("x", "weight", "shift"))
    matmul = ir.node("MatMul", [x, weight])
    add = ir.node("Add", [matmul.outputs[0], shift])
    add.outputs[0].name, add.outputs[0].type = "y", x.type
    opsets = {"": 20}
    return Session(
        ir.Model(ir.Graph([x, weight, shift], add.outputs, nodes=[matmul, add], opset_imports=opsets), ir_version=10)
    )


def _product(session: Session, x: Array, weight: Float, shift: Float) -> Array:
    return session.run({"x": x, "weight": weight, "shift": shift})["y"]


def _inspected(walk: Walk, site: Site) -> Callable[[int, list[Array]], Array]:
    """What the error is measured on, from the number of a feed and the readers' products x W."""
    end = _meeting_point(site)
    if end is None:
        return lambda index, products: np.concatenate(products, axis=-1)
    outs = [layer.matmul.outputs[0] for layer in site.readers]
    behind = {node for out in outs for node in graph.descendants(out)}
    chosen = behind & graph.ancestors(end, lambda value: value in outs)
    graph_ = site.readers[0].matmul.graph
    assert graph_ is not None
    session, others = walk.piece([node for node in graph_ if node in chosen], outs, end)
    names = [out.name or "" for out in outs]
    return lambda index, products: session.run({**dict(zip(names, products, strict=True)), **others[index]})[
        end.name or ""
    ]


def _meeting_point(site: Site) -> ir.Value | None:
    """The input of the next linear layer that all readers flow into, when that is worth inspecting.

    For several readers it is the output of attention, or of a gated unit. A single reader is inspected there only when
    a Softmax lies between, as in a fused QKV projection; else the error is measured right behind the product.
    """
    reached = [graph.descendants(layer.matmul.outputs[0]) for layer in site.readers]
    common = set.intersection(*reached)
    graph_ = site.readers[0].matmul.graph
    assert graph_ is not None
    for node in graph_:
        if node not in common or (layer := graph.linear_at(node)) is None:
            continue
        between = graph.ancestors(layer.x, lambda value: value is site.x)
        if not all(member.matmul in between for member in site.readers):
            continue
        attention = any(node.op_type in ("Softmax", "Attention") for node in between & common)
        return layer.x if len(site.readers) > 1 or attention else None
    return None


def fold(model: ir.Model, site: Site, z: Float, s: Float) -> None:
    """Write the migration into the graph: normalization, readers, and the residual connection.

    Args:
        model: edited in place.
        site: where; its normalization must have constant parameters.
        z: shift [C].
        s: scale [C], positive.
    """
    assert site.norm is not None
    name = site.norm.name or site.x.name or "norm"
    gamma = np.asarray(graph.constant(site.norm.inputs[1]), dtype=np.float32)
    has_beta = len(site.norm.inputs) > 2 and site.norm.inputs[2] is not None
    beta = np.asarray(graph.constant(site.norm.inputs[2]), dtype=np.float32) if has_beta else np.zeros_like(gamma)
    graph.replace_constant(model, site.norm, 1, f"{name}.gain", gamma / s)
    if has_beta or z.any():
        if len(site.norm.inputs) < 3:
            site.norm.resize_inputs(3)
        graph.replace_constant(model, site.norm, 2, f"{name}.shift", (beta - z) / s)
    for layer in site.readers:
        _absorb(model, layer, z, s)
    _restore(model, site, z, s, name)


def _absorb(model: ir.Model, layer: Linear, z: Float, s: Float) -> None:
    weight, bias = layer.weights(), layer.biases()
    if z.any():
        moved = (z.astype(np.float64) @ weight.astype(np.float64)).astype(np.float32)
        if layer.add is not None and bias is not None:
            index = 0 if layer.add.inputs[0] is layer.bias else 1
            graph.replace_constant(model, layer.add, index, f"{layer.name}.bias", bias + moved)
        else:
            out = layer.matmul.outputs[0]
            add = ir.node("Add", [out, graph.add_initializer(model, f"{layer.name}.bias", moved)])
            graph.like(add.outputs[0], out)
            graph.bypass(out, add.outputs[0])
            add.replace_input_with(0, out)
            graph.insert_after(layer.matmul, [add])
    if (s != 1).any():
        graph.replace_constant(model, layer.matmul, 1, f"{layer.name}.weight", weight * s[:, None])


def _restore(model: ir.Model, site: Site, z: Float, s: Float, name: str) -> None:
    """X = s X~ + z for the readers that are not linear layers."""
    assert site.norm is not None
    if not site.others:
        return
    restored, new = site.x, []
    for op_type, vector, neutral in (("Mul", s, 1.0), ("Add", z, 0.0)):
        if (vector != neutral).any():
            constant = graph.add_initializer(model, f"{name}.restore_{op_type.lower()}", vector)
            new.append(ir.node(op_type, [restored, constant], name=f"{name}.restore_{op_type.lower()}"))
            restored = graph.like(new[-1].outputs[0], site.x)
    graph.insert_after(site.norm, new)
    for node in site.others:
        for index, entry in enumerate(node.inputs):
            if entry is site.x:
                node.replace_input_with(index, restored)
