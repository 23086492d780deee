"""Learning the scales of activations: block by block on float inputs, then end to end, where their ranges may join.

torch is an optional package: import this module only where something is to be learned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from scalefold.compiler.blocks import Block, Group, find_blocks
from scalefold.compiler.calibrate import padding_mask
from scalefold.compiler.decoder import LOGITS, cache_pairs, is_decoder
from scalefold.compiler.learning import Checkpoint, Outcome, Schedule, learn
from scalefold.compiler.protocol import Context
from scalefold.compiler.runtime import Array, Feed, inputs_of
from scalefold.compiler.schemes import Float
from scalefold.compiler.sites import find_sites
from scalefold.compiler.stats import ChannelRange
from scalefold.compiler.straight_through import Observed, operands
from scalefold.compiler.torch_graph import TorchGraph, tensor_from
from scalefold.compiler.walk import Walk

Objective = Literal["task", "float"]

Figures = dict[str, float | int | str]

RANGE_SPEED = 10.0
"""How much faster the logarithm of an end of a range learns than that of a scale: it has farther to go. Of 3, 10, 30 and 100
this is the best outside the domain for gpt2-tiny-outliers at 6 bits."""


@dataclass(frozen=True)
class Bits:
    """Widths of what is quantized while scales are learned."""

    weights: int
    activations: int


class ScaleLearner:
    """The scales a = exp(theta) of some activations, 1 at first.

    Args:
        model: the float graph in normal form; left as it was.
        ctx: calibrates the range of each channel, and holds the samples to learn from.
        groups: the activations.
        bits: of weights and activations.
        left: names of the layers that stay in float.
        folder: for the state of the run; None keeps none.
        options: all that the result depends on beside model and samples, as text.
    """

    def __init__(
        self,
        model: ir.Model,
        ctx: Context,
        groups: Sequence[Group],
        bits: Bits,
        *,
        left: Collection[str] = (),
        folder: Path | None = None,
        options: str = "",
    ) -> None:
        self._model, self._ctx, self._groups, self._bits = model, ctx, groups, bits
        self._masks = [padding_mask(feed) for feed in ctx.search]
        self._thetas = [torch.zeros(group.width, requires_grad=True) for group in groups]
        ranges = channel_ranges(model, ctx)
        self._observed = list(self._observe(ranges, left))
        self._checkpoint = Checkpoint(folder, _digest(options, ranges, ctx.search))

    def learn_blocks(self, schedule: Schedule) -> list[Figures]:
        """Learn each block alone: squared error of its quantized output, on float inputs; the figures of each group.

        Blocks that share a weight are learned together.
        """
        figures: list[Figures] = [{} for _ in self._groups]
        walk = Walk(self._model, self._ctx.search)
        parts = _joined(find_blocks(self._model), self._groups)
        for number, (blocks, chosen) in enumerate(parts, 1):
            loss = _together([self._block_loss(walk, block) for block in blocks])
            thetas = [self._thetas[index] for index in chosen]
            outcome = self._train(thetas, loss, schedule, f"learning scales, block {number} of {len(parts)}")
            for index in chosen:
                figures[index] = _figures(outcome, "block")
        return figures

    def learn_end_to_end(self, schedule: Schedule, objective: Objective, *, ranges: bool = False) -> Figures:
        """Learn all scales by what the whole model gives, and with `ranges` both ends of each activation's range too.

        The ranges begin at min-max under the scales as they are, and go on following the scales.
        """
        if ranges:
            self._observed = [_with_free_ends(entry) for entry in self._observed if entry.readers]
        names = [value.name or "" for value in self._model.graph.outputs]
        cache = set(cache_pairs(inputs_of(self._model), names).values())
        outputs = [value for value in self._model.graph.outputs if value.name not in cache]
        task = is_decoder(self._model) and objective == "task"
        whole = TorchGraph(self._model, [value for value in outputs if not task or value.name == LOGITS])
        wanted = [] if task else self._ctx.reference()

        def loss(index: int) -> Tensor:
            feed = self._ctx.search[index]
            given = {name: tensor_from(array) for name, array in feed.items()}
            got = whole.run(given, operands=operands(self._observed, self._bits.weights, self._bits.activations))
            if task:
                return next_token_loss(got[LOGITS], feed)
            return sum_of(
                departure(name, found, wanted[index][name], self._masks[index]) for name, found in got.items()
            )

        rhos = [entry.rho for entry in self._observed if entry.rho is not None]
        outcome = self._train([*self._thetas, *rhos], loss, schedule, "learning scales end to end")
        return _figures(outcome, "end_to_end")

    def divisors(self) -> Iterator[Float]:
        """S = 1 / a of each group's activation [C]."""
        for group, theta in zip(self._groups, self._thetas, strict=True):
            divisor = np.exp(-theta.detach().numpy()).astype(np.float32)
            yield divisor if group.columns is None else divisor[group.columns]

    def ranges(self) -> Iterator[tuple[ir.Node, float, float]]:
        """A reader, low and high of each activation whose range was learned, in units of the scaled activation.

        Nothing where no ranges that were learned are better than min-max.
        """
        if not any(entry.rho is not None and bool(entry.rho.any()) for entry in self._observed):
            return
        for entry in self._observed:
            low, high = entry.ends(entry.scale())
            yield entry.readers[0], float(low.detach()), float(high.detach())

    def _observe(self, ranges: Mapping[str, ChannelRange], left: Collection[str]) -> Iterator[Observed]:
        scaled = {site: index for index, group in enumerate(self._groups) for site in group.sites}
        for site in find_sites(self._model):
            found, index = ranges[site.x.name or ""], scaled.get(site)
            assert found.low is not None and found.high is not None
            columns = None if index is None else self._groups[index].columns
            yield Observed(
                readers=tuple(node for node in site.readers if node.name not in left),
                low=torch.from_numpy(found.low),
                high=torch.from_numpy(found.high),
                theta=None if index is None else self._thetas[index],
                columns=None if columns is None else torch.from_numpy(columns),
            )

    def _block_loss(self, walk: Walk, block: Block) -> Callable[[int], Tensor]:
        """The squared error of a block's output for a sample, relative to what the block adds to the stream."""
        part = TorchGraph(self._model, [block.end], block.given)
        captured = {value.name or "": walk.value(value) for value in block.given}  # before the walk forgets them
        begun, wanted = captured[block.start.name or ""], walk.value(block.end)
        powers = [
            float(squared_error(tensor_from(end), tensor_from(start), mask))
            for end, start, mask in zip(wanted, begun, self._masks, strict=True)
        ]
        power = max(sum(powers) / len(powers), 1e-30)
        observed = [entry for entry in self._observed if block.nodes.intersection(entry.readers)]

        def loss(index: int) -> Tensor:
            given = {name: tensor_from(arrays[index]) for name, arrays in captured.items()}
            seen = operands(observed, self._bits.weights, self._bits.activations)
            got = part.run(given, operands=seen)[block.end.name or ""]
            return squared_error(got, tensor_from(wanted[index]), self._masks[index]) / power

        return loss

    def _train(
        self, parameters: Sequence[Tensor], loss: Callable[[int], Tensor], schedule: Schedule, title: str
    ) -> Outcome:
        return learn(
            parameters,
            loss,
            len(self._ctx.search),
            schedule,
            title=title,
            progress=self._ctx.progress,
            checkpoint=self._checkpoint,
        )


def channel_ranges(model: ir.Model, ctx: Context) -> dict[str, ChannelRange]:
    """The extremes in calibration of each channel that linear layers read, by value name."""
    names = [site.x.name or "" for site in find_sites(model)]
    found = ctx.measure(model, dict.fromkeys(names, ChannelRange))
    return {name: entry for name, entry in found.items() if isinstance(entry, ChannelRange)}


def kept_rows(x: Tensor, mask: Array | None) -> Tensor:
    """The tokens of `x` as rows, padding left out."""
    if mask is not None and x.ndim == mask.ndim + 1 and tuple(x.shape[:-1]) == mask.shape:
        return x[torch.from_numpy(mask != 0)]
    return x.reshape(-1, x.shape[-1])


def squared_error(got: Tensor, wanted: Tensor, mask: Array | None) -> Tensor:
    """Mean over the entries that are not padding."""
    return (kept_rows(got, mask) - kept_rows(wanted, mask)).square().mean()


def departure(name: str, got: Tensor, wanted: Array, mask: Array | None) -> Tensor:
    """What divides an output from the float model's: divergence of logits, relative squared error of others."""
    target = tensor_from(wanted)
    if name != LOGITS:
        return squared_error(got, target, mask) / max(float(kept_rows(target, mask).square().mean()), 1e-30)
    p, q = (torch.log_softmax(kept_rows(logits, mask), -1) for logits in (target, got))
    return (p.exp() * (p - q)).sum(-1).mean()


def next_token_loss(logits: Tensor, feed: Feed) -> Tensor:
    """Mean cross entropy of the tokens that follow one that is not padding, and are not padding themselves."""
    mask, ids = padding_mask(feed), torch.from_numpy(np.asarray(feed["input_ids"], dtype=np.int64))
    kept = np.ones(ids.shape, dtype=bool) if mask is None else mask != 0
    both = torch.from_numpy(kept[:, 1:] & kept[:, :-1])
    return functional.cross_entropy(logits[:, :-1][both], ids[:, 1:][both])


def sum_of(losses: Iterator[Tensor]) -> Tensor:
    """The sum of at least one loss."""
    return torch.stack(list(losses)).sum()


def _with_free_ends(entry: Observed) -> Observed:
    return replace(entry, rho=torch.zeros(2, requires_grad=True), speed=RANGE_SPEED)


def _together(losses: Sequence[Callable[[int], Tensor]]) -> Callable[[int], Tensor]:
    return lambda index: sum_of(loss(index) for loss in losses)


def _joined(blocks: Sequence[Block], groups: Sequence[Group]) -> list[tuple[list[Block], list[int]]]:
    """The blocks that hold groups, those that share one together; each with the numbers of its groups."""
    parts: list[tuple[list[Block], list[int]]] = []
    for block in blocks:
        inside = [index for index, group in enumerate(groups) if block.nodes.intersection(group.readers)]
        shared = next((part for part in parts if set(part[1]) & set(inside)), None)
        if shared is not None:
            shared[0].append(block)
            shared[1].extend(index for index in inside if index not in shared[1])
        elif inside:
            parts.append(([block], inside))
    return parts


def _figures(outcome: Outcome, phase: str) -> Figures:
    found: Figures = {
        f"{phase}_loss_before": outcome.before,
        f"{phase}_loss": outcome.after,
        f"{phase}_steps": outcome.steps,
    }
    return found | ({f"{phase}_remark": outcome.remark} if outcome.remark else {})


def _digest(options: str, ranges: Mapping[str, ChannelRange], feeds: Sequence[Feed]) -> str:
    """Of all that the result depends on; the extremes stand for the weights and the calibration samples."""
    digest = hashlib.sha256(options.encode())
    for name, found in ranges.items():
        assert found.low is not None and found.high is not None
        digest.update(name.encode() + found.low.tobytes() + found.high.tobytes())
    for feed in feeds:
        for name in sorted(feed):
            digest.update(name.encode() + np.ascontiguousarray(feed[name]).tobytes())
    return digest.hexdigest()
