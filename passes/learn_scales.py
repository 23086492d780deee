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
from scalefold.compiler.errors import SourceError
from scalefold.compiler.facts import Fact
from scalefold.compiler.protocol import Context, Contract, Event, PassResult, refusals
from scalefold.compiler.schemes import Float
from scalefold.compiler.sites import Kind, Producer, Site, find_producer, find_sites, fold, group_sites, obstacle
from scalefold.compiler.value_columns import find_value
from scalefold.compiler.walk import Walk

if TYPE_CHECKING:
    from scalefold.compiler.learning import Schedule
    from scalefold.compiler.scale_learning import ScaleLearner

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
       (`float`): Kullback-Leibler divergence of logits, squared error of other outputs.

    Everything is frozen but theta. A share of the search samples only judges; the best scales they have seen are kept, none
    if none are better. The paper's places are behind the normalizations of a block; the others are those of
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
        """Learn at every site that can be scaled, and fold what is better than nothing."""
        left = refusals([layer.name for layer in graph.linear_layers(model)], self.include, self.exclude)
        groups, declined = self._groups(model, ctx, left)
        if not groups:
            return PassResult((), tuple(declined))
        divisors, figures = self._learn(model, ctx, groups, left)
        rewrites = []
        for group, divisor, found in zip(groups, divisors, figures, strict=True):
            node = group.producers[0].node
            for reader in group.readers:
                reader.meta[LEARNED] = True
            if (divisor == 1).all():
                declined.append(Event(node, "no scales that were learned are better than none", found))
                continue
            fold(model, group.sites, group.producers, np.zeros_like(divisor), divisor)
            rewrites.append(Event(node, "scales learned", found))
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

    def _learn(
        self, model: ir.Model, ctx: Context, groups: Sequence[Group], left: Collection[str]
    ) -> tuple[list[Float], list[dict[str, float | int | str]]]:
        """What to divide each group's activation by, and its figures."""
        learner = _scale_learner(self, model, ctx, groups, left)
        figures: list[dict[str, float | int | str]] = [{"scales": group.width} for group in groups]
        if self.steps:
            for found, more in zip(figures, learner.learn_blocks(self._schedule(self.steps, self.rate)), strict=True):
                found |= more
        if self.end_to_end_steps:
            schedule = self._schedule(self.end_to_end_steps, self.end_to_end_rate)
            figures[0] |= learner.learn_end_to_end(schedule, self.objective)
        divisors = list(learner.divisors())
        for found, divisor in zip(figures, divisors, strict=True):
            found |= {"smallest": 1 / float(divisor.max()), "largest": 1 / float(divisor.min())}
        return divisors, figures

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


def _scale_learner(
    options: LearnScales, model: ir.Model, ctx: Context, groups: Sequence[Group], left: Collection[str]
) -> ScaleLearner:
    """Opened here, for it needs torch, which is optional."""
    try:
        from scalefold.compiler.scale_learning import Bits, ScaleLearner
    except ImportError as error:
        raise SourceError(
            f"learning scales needs the package {error.name or 'torch'}",
            where="the Python installation",
            remedy="pip install 'scalefold[hf]', or leave learning out of the recipe",
        ) from error
    folder = Path(options.checkpoint) if options.checkpoint else None
    key = repr(replace(options, checkpoint=""))
    bits = Bits(options.weight_bits, options.activation_bits)
    return ScaleLearner(model, ctx, groups, bits, left=left, folder=folder, options=key)
