"""Quadapter: learn a scale for each channel of an activation, and fold it away."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.blocks import Group, leads_on
from scalefold.compiler.calibrate import padding_mask
from scalefold.compiler.errors import needing_packages
from scalefold.compiler.facts import Fact
from scalefold.compiler.protocol import Context, Contract, Event, PassResult, refusals
from scalefold.compiler.sites import Kind, Producer, Site, find_producer, find_sites, fold, group_sites, obstacle
from scalefold.compiler.value_columns import find_value
from scalefold.compiler.walk import Walk
from scalefold.passes.insert_qdq import LEARNED_RANGE

if TYPE_CHECKING:
    from scalefold.compiler.learning import Schedule
    from scalefold.compiler.scale_learning import Figures, ScaleLearner

LEARNED = "scalefold.learned"
"""Marks a layer in memory: a second run would start from other weights, and never settle."""


@dataclass(frozen=True)
class LearnScales:
    """Learn scales a of channels where they are made; undo them exactly in the layers that read them.

    before:  X = LayerNormalization(h; gamma, beta);          y = X W + b;         r = X + ...
    after:   X~ = LayerNormalization(h; a gamma, a beta);     y = X~ (W / a) + b;  r = X~ / a + ...

    X is [..., C], a [C], W [C, N]. Quadapter (arXiv 2211.16912) puts x~ = Q(a x) / a around the quantizer of an activation
    and learns a, with the model's own weights untouched: far too few numbers to learn a data set by heart. What is learned
    is what ships: weights are rounded as W / a, an activation has one static range, and that range follows a, from the
    extremes of each channel in calibration. a = exp(theta) is positive, and theta begins at 0, where nothing is scaled.

    1. Each transformer block alone: squared error of its quantized output against its float output, on float inputs. One
       block's inputs and outputs are in memory at a time.
    2. End to end: cross entropy of the next token (objective `task`, decoders), or what divides the outputs from float
       (`float`): Kullback-Leibler divergence of logits, squared error of other outputs. With `ranges` every activation that
       will be quantized, scaled or not, learns both ends of its range here, which begin at min-max and may then leave
       outliers out; insert-qdq takes them from the activation, and per-token quantizers have no use for them:

       before:  [min(a x), max(a x)]
       after:   [exp(rho_0) min(a x), exp(rho_1) max(a x)]

    Everything is frozen but theta and rho. A share of the search samples only judges; the best they have seen are kept,
    none if none are better. The paper's places are behind the normalizations of a block; the others are those of
    migrate-outliers, which may run first: then this learns on from there. The last normalization, behind which no block
    follows, is left.

    Attributes:
        weight_bits: bits of the weights.
        activation_bits: bits of the activations.
        steps: steps for each block; 0 leaves the blocks out.
        rate: learning rate for blocks.
        end_to_end_steps: steps for the whole model; 0 leaves them out.
        end_to_end_rate: learning rate for the whole model.
        decay: how rates fall to 0.
        objective: what is learned end to end.
        ranges: learn the static ranges of activations end to end too.
        held_out: share of the search samples that only judge.
        patience: judgements without a better loss before learning stops; there are eight.
        seed: of the order of samples.
        checkpoint: folder for the state of the run, from which an interrupted one goes on; none when empty.
        include: regular expressions of layers to quantize; all when empty.
        exclude: regular expressions of layers to leave in float.
        norm: learn behind normalizations.
        linear: learn between two linear layers with nothing between.
        value: learn from the values of attention to its output projection.
        relu: learn through a Relu.
        gate: learn through a product with a gate.
    """

    name: ClassVar[str] = "learn-scales"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.NORMAL_FORM, Fact.NAMED_LAYERS})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.REASSOCIATED

    weight_bits: int = 8
    activation_bits: int = 8
    steps: int = 192
    rate: float = 0.2
    end_to_end_steps: int = 128
    end_to_end_rate: float = 0.003
    decay: Literal["cosine", "linear"] = "cosine"
    objective: Literal["task", "float"] = "task"
    ranges: bool = False
    held_out: float = 0.25
    patience: int = 3
    seed: int = 0
    checkpoint: str = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    norm: bool = True
    linear: bool = False
    value: bool = False
    relu: bool = False
    gate: bool = False

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Learn at every site that can be scaled, and fold what is better than nothing; leave ranges on activations."""
        left = refusals([layer.name for layer in graph.linear_layers(model)], self.include, self.exclude)
        groups, declined = self._groups(model, ctx, left)
        ranged = self._ranged(model, left)
        if not groups and not ranged:
            return PassResult((), tuple(declined))
        learner = _scale_learner(self, model, ctx, groups, left)
        figures, whole = self._learn(learner, groups, ranges=bool(ranged))
        rewrites = []
        for group, divisor, found in zip(groups, learner.divisors(), figures, strict=True):
            node = group.producers[0].node
            for reader in group.readers:
                reader.meta[LEARNED] = True
            if (divisor == 1).all():
                declined.append(Event(node, "no scales that were learned are better than none", found))
                continue
            fold(model, group.sites, group.producers, np.zeros_like(divisor), divisor)
            rewrites.append(Event(node, "scales learned", found))
        if ranged:
            event = _leave_ranges(learner, ranged, whole)
            (rewrites if event.figures["ranges"] else declined).append(event)
        return PassResult(tuple(rewrites), tuple(declined))

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of sites to learn at."""
        chosen = {
            Kind.NORM: self.norm,
            Kind.LINEAR: self.linear,
            Kind.VALUE: self.value,
            Kind.RELU: self.relu,
            Kind.GATE: self.gate,
        }
        return frozenset(kind for kind, wanted in chosen.items() if wanted)

    def _groups(self, model: ir.Model, ctx: Context, left: Collection[str]) -> tuple[list[Group], list[Event]]:
        """What is to be scaled, and what cannot be."""
        sites, walk = find_sites(model), Walk(model, ctx.search[:1])
        masks = [padding_mask(feed) for feed in ctx.search[:1]]
        found: dict[Site, Producer | str | None] = {}
        for site in sites:
            found[site] = find_producer(site, self.kinds)
            if found[site] is None and Kind.VALUE in self.kinds:
                found[site] = find_value(walk, site, masks)
        groups, declined = [], []
        for leader, members in group_sites(sites).items():
            if members[0] is not leader or all(found[site] is None for site in members):
                continue
            producers = [entry for entry in map(found.__getitem__, members) if isinstance(entry, Producer)]
            group = Group(members, tuple(producers))
            reason = next((entry for entry in map(found.__getitem__, members) if isinstance(entry, str)), None)
            if reason := reason or _reason(group, left):
                declined.append(Event(producers[0].node if producers else leader.readers[0], reason))
            else:
                groups.append(group)
        return groups, declined

    def _ranged(self, model: ir.Model, left: Collection[str]) -> list[ir.Node]:
        """The layers to learn input ranges for: none, or all that are quantized; and none a second time."""
        if not self.ranges or not self.end_to_end_steps:
            return []
        readers = [layer.matmul for layer in graph.linear_layers(model) if layer.name not in left]
        return [] if any(LEARNED in node.meta for node in readers) else readers

    def _learn(self, learner: ScaleLearner, groups: Sequence[Group], *, ranges: bool) -> tuple[list[Figures], Figures]:
        """The figures of each group, and those of ranges: what is learned end to end is told once."""
        figures: list[Figures] = [{"scales": group.width} for group in groups]
        whole: Figures = {}
        if self.steps:
            for found, more in zip(figures, learner.learn_blocks(self._schedule(self.steps, self.rate)), strict=True):
                found |= more
        if self.end_to_end_steps:
            schedule = self._schedule(self.end_to_end_steps, self.end_to_end_rate)
            found = learner.learn_end_to_end(schedule, self.objective, ranges=ranges)
            (whole if ranges else figures[0]).update(found)
        for found, divisor in zip(figures, learner.divisors(), strict=True):
            found |= {"smallest": 1 / float(divisor.max()), "largest": 1 / float(divisor.min())}
        return figures, whole

    def _schedule(self, steps: int, rate: float) -> Schedule:
        from scalefold.compiler.learning import Schedule

        return Schedule(
            steps=steps,
            rate=rate,
            decay=self.decay,
            held_out=self.held_out,
            patience=self.patience,
            seed=self.seed,
        )


def _reason(group: Group, left: Collection[str]) -> str | None:
    """Why a group cannot be learned, or None."""
    if any(LEARNED in node.meta for node in group.readers):
        return "learned already"
    if len(group.producers) < len(group.sites):
        return "a weight is shared with a layer whose input cannot be scaled"
    if all(node.name in left for node in group.readers):
        return "all its readers stay in float"
    if not any(map(leads_on, group.sites)):
        return "no block lies behind it"
    return obstacle(group.sites, group.producers)


def _leave_ranges(learner: ScaleLearner, readers: Sequence[ir.Node], figures: Figures) -> Event:
    """Put the ranges that were learned on the activations; the event counts them."""
    for node in readers:
        node.meta[LEARNED] = True
    learned = list(learner.ranges())
    for reader, low, high in learned:
        x = reader.inputs[0]
        assert x is not None
        x.meta[LEARNED_RANGE] = (low, high)
    reason = "ranges learned" if learned else "no ranges that were learned are better than min-max"
    return Event(readers[0], reason, {"ranges": len(learned), **figures})


def _scale_learner(
    options: LearnScales, model: ir.Model, ctx: Context, groups: Sequence[Group], left: Collection[str]
) -> ScaleLearner:
    """Opened here, for it needs torch, which is optional."""
    with needing_packages("learning scales", "pip install 'scalefold[hf]', or leave learning out of the recipe"):
        from scalefold.compiler.scale_learning import Bits, ScaleLearner
    folder = Path(options.checkpoint) if options.checkpoint else None
    key = repr(replace(options, checkpoint=""))
    bits = Bits(options.weight_bits, options.activation_bits)
    return ScaleLearner(model, ctx, groups, bits, left=left, folder=folder, options=key)
