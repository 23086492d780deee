"""Fit each activation of a decoder: the range it is clipped to, and something finer where no static range will do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from scalefold.compiler import graph, schemes
from scalefold.compiler.calibrate import padding_mask, rows_of
from scalefold.compiler.decoder import LOGITS, divergence, is_decoder
from scalefold.compiler.facts import Fact, row_range, weight_array, weight_dequantizer
from scalefold.compiler.protocol import Context, Contract, Event, PassResult
from scalefold.compiler.runtime import Feed, Session
from scalefold.compiler.schemes import Affine, Float
from scalefold.compiler.stats import TokenRange
from scalefold.passes.clip_ranges import current_grid, layers_of, set_grid, source_of
from scalefold.passes.insert_qdq import LEARNED_RANGE, quantize_rows, quantize_twice

SHARES = (0.0, 0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Shares of tokens whose extremes may be clipped, tried below 8 bits, where rounding weighs more than clipping. At 8 bits
ranges that are clipped to the search samples fit their domain and lose in others (docs/decisions/0007)."""

STRIDE = 8
"""The logits of every n-th token are compared: each is as wide as the vocabulary."""

PROBES = 32
"""Random directions that the error of a product is looked at along; its square is kept in expectation."""

FITTED = "scalefold.fit-activations"
"""Marks a quantizer in memory: behind fitted layers a second search sees other activations, and never settles."""


@dataclass
class _Quantizer:
    """A static quantizer, the layers behind it, and the squared errors that candidates make in their products."""

    node: ir.Node
    x: ir.Value
    readers: list[ir.Node]
    weight: Float
    grids: list[Affine] = field(default_factory=list)
    errors: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    error_per_token: float = 0.0
    power: float = 1e-30

    @property
    def operations(self) -> int:
        """Multiply-adds per token."""
        return sum(int(np.prod(_shape(reader))) for reader in self.readers)

    def take_away(self) -> None:
        """Let the layers read the activation as it is; that of another layer may have been completed since it was found."""
        x = source_of(self.node)
        for reader in self.readers:
            reader.replace_input_with(0, x)

    def least(self) -> float:
        """Squared error of the best static grid, relative to the product's power."""
        return float(self.errors.min()) / self.power


class _Step(NamedTuple):
    """One way to bring the logits closer.

    Attributes:
        good: the divergence at which nothing more is done.
        share: largest share of the linear multiply-adds that it may be done to.
        what: for people who wait.
        gains: whether a layer has anything to gain by it.
        change: does it, given the divergence before.
    """

    good: float
    share: float
    what: str
    gains: Callable[[_Quantizer], bool]
    change: Callable[[ir.Model, _Quantizer, float], Event]


@dataclass(frozen=True)
class FitActivations:
    """Choose clipped ranges by the error of each layer's product, and what is finer by the error of the logits.

    before:  MatMul(dq(QuantizeLinear(x, s, z)), dq(W))      s, z from the extremes of all tokens
    after:   the same with s', z' from the quantiles of the tokens' extremes; or, where that is not enough,
             h = dq(QuantizeLinear(x, 256 t, z));  MatMul(h, dq(W)) + MatMul(dq(QuantizeLinear(x - h, t)), dq(W)), or
             MatMul(dq(QuantizeLinear((x - m) / r)), dq(W)) * r + m c, per token (see insert-qdq)

    x is [..., K], W [K, N]. Below 8 bits a range is chosen by the least |(Q(x) - x) W|^2, estimated along random
    directions (Johnson and Lindenstrauss 1984), which costs a small part of a product; at 8 bits it stays that of all
    tokens. Then, while the logits diverge from the float model's by more than the target, the layers whose products lose
    most get a finer input, worst first and twice as many at each step, within the shares of multiply-adds that may be so:
    two codes of 8 bits, coarse and fine, static still, with a product each; and a range per token. Where they diverge by
    more than a second, larger target even then, the worst of the other layers stay in float:

    after:   MatMul(x, W)

    Attributes:
        bits: bits of the activations.
        target: Kullback-Leibler divergence of the logits, in nats per token, that is good enough; None makes nothing
            finer.
        per_token_share: largest share of the linear multiply-adds that may get a range per token.
        float_target: divergence above which layers are left in float, once ranges per token are given out.
        float_share: largest share of the linear multiply-adds that may be left in float.
        two_codes_share: largest share of the linear multiply-adds that may read their input in two codes.
    """

    name: ClassVar[str] = "fit-activations"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.QDQ})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.LOSSY

    bits: int = 8
    target: float | None = None
    per_token_share: float = 0.25
    float_target: float = 0.1
    float_share: float = 0.05
    two_codes_share: float = 0.0

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Fit every static quantizer of a decoder; another model is left alone."""
        quantizers = _static_quantizers(model) if is_decoder(model) else []
        if not quantizers:
            return PassResult()
        self._judge(model, quantizers, ctx)
        rewrites, declined = self._clip(model, quantizers)
        if self.target is not None:
            rewrites += self._relax(model, quantizers, ctx, self.target)
        return PassResult(tuple(rewrites), tuple(declined))

    def _judge(self, model: ir.Model, quantizers: Sequence[_Quantizer], ctx: Context) -> None:
        """Fill in each quantizer's candidates and their errors."""
        names = list(dict.fromkeys(entry.x.name or "" for entry in quantizers))
        session = Session(ctx.fused(model), outputs=names, lean=True)
        ranges = {entry.x.name or "": TokenRange() for entry in quantizers}
        shares = SHARES if self.bits < 8 else ()
        looked_at = ctx.search if shares else ()
        with ctx.progress("fitting activations", len(looked_at) + len(ctx.search)) as advance:
            for sample, feed in enumerate(looked_at):
                for name, array in session.run(feed).items():
                    ranges[name].update(rows_of(array, padding_mask(feed)), sample)
                advance()
            for entry in quantizers:
                seen = ranges[entry.x.name or ""]
                tried = () if LEARNED_RANGE in entry.x.meta else shares
                clipped = [schemes.activation_grid(*seen.quantiles(1 - share), self.bits) for share in tried]
                entry.grids = list(dict.fromkeys([current_grid(entry.node, self.bits), *clipped]))
                entry.errors = np.zeros(len(entry.grids))
            for feed in ctx.search:
                found = session.run(feed)
                for entry in quantizers:
                    self._add_errors(entry, rows_of(found[entry.x.name or ""], padding_mask(feed)))
                advance()

    def _add_errors(self, entry: _Quantizer, rows: Float) -> None:
        entry.power += float(np.square(rows @ entry.weight, dtype=np.float64).sum())
        for index, grid in enumerate(entry.grids):
            error = (grid.round_trip(rows) - rows) @ entry.weight
            entry.errors[index] += float(np.square(error, dtype=np.float64).sum())
        error = (schemes.round_trip_rows(rows, self.bits) - rows) @ entry.weight
        entry.error_per_token += float(np.square(error, dtype=np.float64).sum())

    def _clip(self, model: ir.Model, quantizers: Sequence[_Quantizer]) -> tuple[list[Event], list[Event]]:
        rewrites, declined = [], []
        for entry in quantizers:
            entry.node.meta[FITTED] = True
            best = int(np.argmin(entry.errors))
            figures = {
                "sqnr_db": _decibels(entry.least()),
                "sqnr_db_unclipped": _decibels(entry.errors[0] / entry.power),
            }
            if best == 0:
                declined.append(Event(entry.readers[0], "best as it is", figures))
                continue
            set_grid(model, entry.node, entry.grids[best])
            figures |= {"low": entry.grids[best].low, "high": entry.grids[best].high}
            rewrites.append(Event(entry.readers[0], "clipped", figures))
        return rewrites, declined

    def _relax(self, model: ir.Model, quantizers: Sequence[_Quantizer], ctx: Context, target: float) -> list[Event]:
        """Make the inputs finer that lose most, then leave layers in float, until the logits are close."""
        logits, operations = _Logits(ctx), _all_operations(model)
        events: list[Event] = []
        found = logits.divergence(model)
        for good, share, what, gains, change in self._steps(ctx, target):
            changed = {event.node for event in events}
            waiting = [entry for entry in quantizers if entry.readers[0] not in changed and gains(entry)]
            with ctx.progress(what, len(waiting)) as advance:
                for chosen in _batches(waiting, len(quantizers), share * operations, advance):
                    if found <= good:
                        break
                    events += [change(model, entry, found) for entry in chosen]
                    found = logits.divergence(model)
        return events

    def _steps(self, ctx: Context, target: float) -> tuple[_Step, ...]:
        """What is done to the layers that lose most, in order."""
        return (
            _Step(
                target,
                self.two_codes_share,
                "choosing layers of two codes",
                lambda entry: self.bits == 8,
                _in_two_codes,
            ),
            _Step(
                target,
                self.per_token_share,
                "choosing layers per token",
                lambda entry: entry.error_per_token < 0.5 * entry.errors.min(),
                self._per_token,
            ),
            _Step(
                self.float_target,
                self.float_share,
                "choosing float layers",
                lambda entry: True,
                partial(_leave_in_float, ctx),
            ),
        )

    def _per_token(self, model: ir.Model, entry: _Quantizer, before: float) -> Event:
        entry.take_away()
        quantize_rows(model, entry.readers, self.bits)
        graph.sweep(model)
        figures = {
            "sqnr_db_static": _decibels(entry.least()),
            "sqnr_db": _decibels(entry.error_per_token / entry.power),
            "divergence_before": before,
        }
        return Event(entry.readers[0], "no static range holds it: per token", figures)


def _batches(
    entries: Sequence[_Quantizer], count: int, allowed: float, advance: Callable[[], None]
) -> Iterator[list[_Quantizer]]:
    """The entries worst first, twice as many each time, as long as their multiply-adds are within what is allowed."""
    waiting = sorted(entries, key=lambda entry: -entry.least())
    step = max(1, count // 32)
    while waiting:
        chosen: list[_Quantizer] = []
        while waiting and len(chosen) < step:
            entry = waiting.pop(0)
            advance()
            if entry.operations <= allowed:
                allowed -= entry.operations
                chosen.append(entry)
        if chosen:
            yield chosen
        step *= 2


def _in_two_codes(model: ir.Model, entry: _Quantizer, before: float) -> Event:
    grid = current_grid(entry.node, 8)
    coarse, fine = schemes.two_code_grids(grid.low, grid.high)
    entry.take_away()
    graph.sweep(model)
    quantize_twice(model, entry.readers, coarse, fine)
    figures = {"sqnr_db_static": _decibels(entry.least()), "scale": fine.scale, "divergence_before": before}
    return Event(entry.readers[0], "no range of 8 bits holds it: in two codes", figures)


def _leave_in_float(ctx: Context, model: ir.Model, entry: _Quantizer, before: float) -> Event:
    assert ctx.float_model is not None
    weights = {layer.name: layer for layer in graph.linear_layers(ctx.float_model)}
    entry.take_away()
    for reader in entry.readers:
        layer = weights[reader.name or ""]
        reader.replace_input_with(1, graph.add_initializer(model, f"{layer.name}.float_weight", layer.weights()))
    graph.sweep(model)
    figures = {"sqnr_db_static": _decibels(entry.least()), "divergence_before": before}
    return Event(entry.readers[0], "no integers hold it: in float", figures)


def _static_quantizers(model: ir.Model) -> list[_Quantizer]:
    found = []
    rng = np.random.default_rng(0)
    for node in graph.nodes(model, "QuantizeLinear"):
        readers = [] if row_range(node) is not None or FITTED in node.meta else layers_of(node)
        if readers:
            weight = np.concatenate([_probed(reader, rng) for reader in readers], axis=1)
            found.append(_Quantizer(node, source_of(node), readers, weight))
    return found


def _probed(matmul: ir.Node, rng: np.random.Generator) -> Float:
    """The layer's weight along random directions, [K, PROBES]."""
    dequantize = weight_dequantizer(matmul)
    assert dequantize is not None
    codes, scales = weight_array(dequantize.inputs[0]), graph.constant(dequantize.inputs[1])
    assert codes is not None and scales is not None
    probes = rng.choice(np.array([-1, 1], dtype=np.float32), (codes.shape[1], PROBES)) / np.float32(PROBES**0.5)
    return np.asarray(codes.astype(np.float32) @ (probes * np.asarray(scales).reshape(-1, 1)), dtype=np.float32)


def _shape(matmul: ir.Node) -> tuple[int, ...]:
    dequantize = weight_dequantizer(matmul)
    assert dequantize is not None
    return graph.whole_shape(dequantize.outputs[0])


def _all_operations(model: ir.Model) -> int:
    return sum(
        int(np.prod(_shape(node))) for node in graph.nodes(model, "MatMul") if weight_dequantizer(node) is not None
    )


class _Logits:
    """How far a model's logits are from the float model's on the search samples."""

    def __init__(self, ctx: Context) -> None:
        assert ctx.float_model is not None
        self._feeds = ctx.search
        # opened for each sample: one session for all took 100 MB more at the peak of a compilation (SmolLM2)
        wanted = ctx.fused(ctx.float_model)
        self._wanted = [self._of(Session(wanted, outputs=[LOGITS], lean=True), feed) for feed in ctx.search]
        self._fused = ctx.fused

    def divergence(self, model: ir.Model) -> float:
        """Mean divergence per token, in nats."""
        session = Session(self._fused(model), outputs=[LOGITS])
        pairs = [(wanted, self._of(session, feed)) for wanted, feed in zip(self._wanted, self._feeds, strict=True)]
        total = sum(divergence(wanted, got) * len(wanted) for wanted, got in pairs)
        return total / max(sum(len(wanted) for wanted in self._wanted), 1)

    def _of(self, session: Session, feed: Feed) -> Float:
        return rows_of(session.run(feed)[LOGITS], padding_mask(feed))[::STRIDE].copy()


def _decibels(ratio: float) -> float:
    return -10 * float(np.log10(max(ratio, 1e-20)))
