"""Token-wise clipping: narrow activation ranges where a few sharp tokens widen them for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph, schemes
from scalefold.compiler.calibrate import padding_mask, rows_of
from scalefold.compiler.facts import Fact
from scalefold.compiler.protocol import Context, Contract, Event, PassResult
from scalefold.compiler.runtime import Array, Feed, Session
from scalefold.compiler.schemes import Affine
from scalefold.compiler.stats import TokenRange


@dataclass(frozen=True)
class ClipRanges:
    """Choose one clipping ratio for all activation quantizers by the error of the graph's outputs.

    before:  QuantizeLinear(x, s, z)      s, z from the extremes of all tokens
    after:   QuantizeLinear(x, s', z')    s', z' from the quantiles of the tokens' extremes at the best ratio

    The coarse stage of token-wise clipping (Outlier Suppression, arXiv 2209.13325, section 4.2): ratios 1, 1 - step,
    1 - 2 step, ... down to 1 - largest; the winner has the least squared error of the outputs against the float model on
    the search samples. The largest ratio wins a tie.

    Attributes:
        largest: largest share of tokens whose extremes may be clipped.
        step: step between ratios.
        bits: bits of the activations.
    """

    name: ClassVar[str] = "clip-ranges"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.QDQ})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.LOSSY

    largest: float = 0.1
    step: float = 0.01
    bits: int = 8

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Search the ratio and set it; declines when no clipping is best."""
        quantizers = [node for node in graph.nodes(model, "QuantizeLinear") if _is_static(node)]
        if not quantizers:
            return PassResult()
        sources = {node: _source(node) for node in quantizers}
        ranges = ctx.measure(model, {value.name or "": TokenRange for value in sources.values()})
        tokens: dict[ir.Node, TokenRange] = {}
        for node, value in sources.items():
            seen = ranges[value.name or ""]
            assert isinstance(seen, TokenRange)
            tokens[node] = seen
        reference = ctx.reference()
        session = Session(_with_free_grids(model, quantizers))
        ratios = [1.0 - k * self.step for k in range(round(self.largest / self.step) + 1)]
        errors = []
        with ctx.progress("clipping ranges", len(ratios)) as advance:
            for ratio in ratios:
                grids = {node: self._grid(tokens[node], ratio) for node in quantizers}
                errors.append(_error(session, _fed(grids), ctx.search, reference))
                advance()
        best = int(np.argmin(errors))
        figures: dict[str, float | int | str] = {
            "ratio": ratios[best],
            "error": errors[best],
            "error_unclipped": errors[0],
        }
        if best == 0:
            return PassResult((), (Event(quantizers[0], "no clipping is best", figures),))
        events = []
        for node in quantizers:
            affine = self._grid(tokens[node], ratios[best])
            _set_grid(model, node, affine)
            events.append(Event(node, "clipped", {**figures, "low": affine.low, "high": affine.high}))
        return PassResult(tuple(events))

    def _grid(self, tokens: TokenRange, ratio: float) -> Affine:
        return schemes.activation_grid(*tokens.quantiles(ratio), self.bits)


def _is_static(node: ir.Node) -> bool:
    return graph.constant(node.inputs[1]) is not None and graph.constant(node.inputs[0]) is None


def _source(quantize: ir.Node) -> ir.Value:
    """The activation in front of a quantizer and of the Clip that belongs to it."""
    clip = graph.producer(quantize.inputs[0], "Clip")
    source = clip.inputs[0] if clip is not None and (clip.name or "").endswith(".input_clip") else quantize.inputs[0]
    assert source is not None
    return source


def _grid_constants(quantize: ir.Node) -> list[ir.Value]:
    """Scale and zero point, and the bounds of the Clip in front when there is one."""
    constants = [quantize.inputs[1], quantize.inputs[2]]
    if quantize.inputs[0] is not _source(quantize):
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


def _set_grid(model: ir.Model, quantize: ir.Node, affine: Affine) -> None:
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
