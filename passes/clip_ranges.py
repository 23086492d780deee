"""Token-wise clipping: narrow activation ranges where a few sharp tokens widen them for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph, schemes
from scalefold.compiler.calibrate import padding_mask, rows_of
from scalefold.compiler.decoder import is_decoder
from scalefold.compiler.facts import Fact, coarse_quantizer, row_range, weight_dequantizer
from scalefold.compiler.protocol import Context, Contract, Event, PassResult
from scalefold.compiler.runtime import Array, Feed, Session
from scalefold.compiler.schemes import Affine
from scalefold.compiler.stats import TokenRange
from scalefold.passes.insert_qdq import LEARNED_RANGE

REFINED_SHARES = (0.0, 0.01, 0.05, 0.12)
"""Shares of tokens to clip that the refinement tries at each quantizer, besides the one that all share."""

SEARCHED = "scalefold.clip-ranges"
"""Marks a quantizer in memory: behind clipped layers a second search measures other ranges, and never settles."""


@dataclass(frozen=True)
class ClipRanges:
    """Choose how much each activation quantizer clips, by the error of the graph's outputs.

    before:  QuantizeLinear(x, s, z)      s, z from the extremes of all tokens
    after:   QuantizeLinear(x, s', z')    s', z' from the quantiles of the tokens' extremes at the best ratio

    First one ratio for all, the coarse stage of token-wise clipping (Outlier Suppression, arXiv 2209.13325, section 4.2):
    1, 1 - step, 1 - 2 step, ... down to 1 - largest; the winner has the least squared error of the outputs against the
    float model on the search samples, and the largest ratio wins a tie. Then, in place of the paper's learned fine stage,
    one sweep over the quantizers in graph order, each trying a few ratios of its own with the others held. Per-token
    quantizers have no static range and are left; so are those of activations whose range was learned.

    Attributes:
        largest: largest share of tokens whose extremes may be clipped by the ratio that all share.
        step: step between ratios.
        bits: bits of the activations.
        refine: whether to sweep over the quantizers.
    """

    name: ClassVar[str] = "clip-ranges"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.QDQ})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.LOSSY

    largest: float = 0.1
    step: float = 0.01
    bits: int = 8
    refine: bool = False

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Search the ratios and set them; declines the quantizers that are best left as they are."""
        if is_decoder(model):  # fit-activations does it layer by layer: whole runs for each range would take hours
            return PassResult()
        found = [node for node in graph.nodes(model, "QuantizeLinear") if _is_static(node)]
        quantizers = [node for node in found if SEARCHED not in node.meta and LEARNED_RANGE not in source_of(node).meta]
        if not quantizers:
            return PassResult()
        if not _has_float_output(model):
            return PassResult((), tuple(Event(node, "no output says how large its error is") for node in quantizers))
        tokens = _token_ranges(model, quantizers, ctx)
        reference = ctx.reference()
        session = Session(_with_free_grids(model, quantizers))

        def error(ratios: Mapping[ir.Node, float]) -> float:
            grids = {node: self._grid(tokens[node], ratio) for node, ratio in ratios.items()}
            return _error(session, _fed(grids), ctx.search, reference)

        shares = [k * self.step for k in range(math.floor(self.largest / self.step + 1e-9) + 1)]
        shares += [self.largest] if shares[-1] < self.largest - 1e-9 else []
        with ctx.progress("clipping ranges", len(shares)) as advance:
            unclipped, least, ratios = _best_common(quantizers, shares, error, advance)
        if self.refine:
            with ctx.progress("refining ranges", len(quantizers)) as advance:
                least, ratios = _refined(ratios, least, error, advance)
        return self._set(model, tokens, ratios, {"error": least, "error_unclipped": unclipped})

    def _set(
        self,
        model: ir.Model,
        tokens: Mapping[ir.Node, TokenRange],
        ratios: Mapping[ir.Node, float],
        figures: Mapping[str, float],
    ) -> PassResult:
        rewrites, declined = [], []
        for node, ratio in ratios.items():
            node.meta[SEARCHED] = True
            affine = self._grid(tokens[node], ratio)
            if affine == current_grid(node, self.bits):
                declined.append(Event(node, "best as it is", {"ratio": ratio, **figures}))
            else:
                set_grid(model, node, affine)
                rewrites.append(
                    Event(node, "clipped", {"ratio": ratio, "low": affine.low, "high": affine.high, **figures})
                )
        return PassResult(tuple(rewrites), tuple(declined))

    def _grid(self, tokens: TokenRange, ratio: float) -> Affine:
        return schemes.activation_grid(*tokens.quantiles(ratio), self.bits)


def _token_ranges(model: ir.Model, quantizers: Sequence[ir.Node], ctx: Context) -> dict[ir.Node, TokenRange]:
    ranges = ctx.measure(model, {source_of(node).name or "": TokenRange for node in quantizers})
    found = {}
    for node in quantizers:
        seen = ranges[source_of(node).name or ""]
        assert isinstance(seen, TokenRange)
        found[node] = seen
    return found


def _best_common(
    quantizers: Sequence[ir.Node],
    shares: Sequence[float],
    error: Callable[[Mapping[ir.Node, float]], float],
    advance: Callable[[], None],
) -> tuple[float, float, dict[ir.Node, float]]:
    """(error unclipped, least error, ratios) of the best ratio for all."""
    errors = []
    for share in shares:
        errors.append(error(dict.fromkeys(quantizers, 1.0 - share)))
        advance()
    best = int(np.argmin(errors))
    return errors[0], errors[best], dict.fromkeys(quantizers, 1.0 - shares[best])


def _refined(
    ratios: dict[ir.Node, float],
    least: float,
    error: Callable[[Mapping[ir.Node, float]], float],
    advance: Callable[[], None],
) -> tuple[float, dict[ir.Node, float]]:
    """(least error, ratios) after one sweep of coordinate descent."""
    for node in list(ratios):
        for share in REFINED_SHARES:
            candidate = {**ratios, node: 1.0 - share}
            found = error(candidate)
            if found < least:
                least, ratios = found, candidate
        advance()
    return least, ratios


def _is_static(node: ir.Node) -> bool:
    """Whether its range is a property of the activation that a quantized layer reads; it may be set anew then.

    That of a per-token quantizer is [0, 1] by construction. A graph may have come with quantizers for something else.
    """
    return bool(layers_of(node)) and graph.constant(node.inputs[0]) is None and row_range(node) is None


def layers_of(quantize: ir.Node) -> list[ir.Node]:
    """The products of quantized layers that read what a quantizer makes, and nothing but they; else none.

    None too where its grid is not one uint8 grid of constants that the DequantizeLinear behind it share, and for the
    second of two codes.
    """
    if (
        coarse_quantizer(quantize) is not None
        or len(quantize.inputs) < 3
        or any(graph.scalar(value) is None for value in quantize.inputs[1:3])
    ):
        return []
    zero, readers = quantize.inputs[2], graph.consumers(quantize.outputs[0])
    same = all(node.op_type == "DequantizeLinear" and node.inputs[1:] == quantize.inputs[1:] for node in readers)
    if zero is None or zero.dtype != ir.DataType.UINT8 or not same:
        return []
    products = [reader for node in readers for reader in graph.consumers(node.outputs[0])]
    own = all(node.op_type == "MatMul" and weight_dequantizer(node) is not None for node in products)
    return products if own else []


def source_of(quantize: ir.Node) -> ir.Value:
    """The activation in front of a quantizer and of the Clip that belongs to it."""
    clip = graph.producer(quantize.inputs[0], "Clip")
    source = clip.inputs[0] if clip is not None and (clip.name or "").endswith(".input_clip") else quantize.inputs[0]
    assert source is not None
    return source


def _grid_constants(quantize: ir.Node) -> list[ir.Value]:
    """Scale and zero point, and the bounds of the Clip in front when there is one."""
    constants = [quantize.inputs[1], quantize.inputs[2]]
    if quantize.inputs[0] is not source_of(quantize):
        clip = graph.producer(quantize.inputs[0], "Clip")
        assert clip is not None
        constants += [clip.inputs[1], clip.inputs[2]]
    return [value for value in constants if value is not None]


def _fed(grids: Mapping[ir.Node, Affine]) -> dict[str, Array]:
    """The constants of all grids as arrays, by name."""
    fed: dict[str, Array] = {}
    for node, affine in grids.items():
        arrays = (
            np.float32(affine.scale),
            np.uint8(affine.zero_point),
            np.float32(affine.low),
            np.float32(affine.high),
        )
        fed |= {
            value.name or "": np.asarray(array) for value, array in zip(_grid_constants(node), arrays, strict=False)
        }
    return fed


def _with_free_grids(model: ir.Model, quantizers: Sequence[ir.Node]) -> ir.Model:
    """A copy of the model in which the constants of the quantizers are inputs."""
    copy = model.clone()
    for node in quantizers:
        for value in _grid_constants(node):
            twin = copy.graph.initializers.pop(value.name or "", None)
            if twin is not None:
                twin.const_value = None
                copy.graph.inputs.append(twin)
    return copy


def current_grid(quantize: ir.Node, bits: int) -> Affine:
    """The grid of a static quantizer."""
    scale, zero = graph.scalar(quantize.inputs[1]), graph.scalar(quantize.inputs[2])
    assert scale is not None and zero is not None
    return Affine(scale, int(zero), bits)


def set_grid(model: ir.Model, quantize: ir.Node, affine: Affine) -> None:
    """Give a static quantizer, and the Clip that belongs to it, another grid."""
    for name, array in _fed({quantize: affine}).items():
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)


def _error(
    session: Session, grids: Mapping[str, Array], feeds: Sequence[Feed], reference: Sequence[Mapping[str, Array]]
) -> float:
    """Mean over outputs of the squared error relative to the float output's power."""
    noise: dict[str, float] = {}
    power: dict[str, float] = {}
    for feed, expected in zip(feeds, reference, strict=True):
        mask = padding_mask(feed)
        for name, result in session.run({**feed, **grids}).items():
            if result.dtype.kind == "f":
                wanted = rows_of(expected[name], mask)
                noise[name] = noise.get(name, 0.0) + float(np.square(rows_of(result, mask) - wanted).sum())
                power[name] = power.get(name, 0.0) + float(np.square(wanted).sum())
    return float(np.mean([noise[name] / max(power[name], 1e-30) for name in noise]))


def _has_float_output(model: ir.Model) -> bool:
    return any(value.dtype is None or value.dtype.is_floating_point() for value in model.graph.outputs)
