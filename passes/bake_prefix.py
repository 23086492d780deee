"""Put a token in front of every sequence, as constants in the KV cache, where it takes massive activations away."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.decoder import LOGITS, PREFIX, Decoder, decoder_of, divergence, is_decoder, prefix_length
from scalefold.compiler.errors import CalibrationError
from scalefold.compiler.facts import Fact
from scalefold.compiler.protocol import Context, Contract, Event, PassResult
from scalefold.compiler.runtime import Array, Session
from scalefold.compiler.schemes import Float

LOOK = 64
"""Tokens of a piece of text that candidates are judged on: massive activations sit at the beginning."""

APART = 128
"""Tokens from the beginning of one piece of a search sample to that of the next."""

AT_ONCE = 4
"""Candidates that are run in one batch: each has logits of a piece of text, and a batch reads the weights once."""

LEFT = 4
"""Candidates that are tried on all pieces, if so many take the massive activations away."""


@dataclass
class _Trial:
    """What a token did so far: the largest input of a linear layer behind it, and how far it moved the logits."""

    largest: float = 0.0
    divergence: float = 0.0


@dataclass(frozen=True)
class BakePrefix:
    """Let every sequence begin behind a fixed token whose keys and values are constants of the graph.

    before:  past [B,H,P,D];  mask [B,P+S];  positions [B,S]           -> attention;  present [B,H,P+S,D]
    after:   Concat(K, past);  Concat(1, mask);  positions + n          -> attention;  Slice(present', n:)

    K [1,H,n,D] are the keys or values that the float model computes for the n tokens of the prefix. Callers see no
    difference: the cache that goes in and out is without it. Massive activations (Sun et al. 2024, arXiv 2402.17762)
    sit on the first token of a sequence, whatever it is; behind a prefix there is no first token any more. (The idea is
    that of CushionCache, Son et al. 2024, arXiv 2406.12016, and PrefixQuant, Chen et al. 2024, arXiv 2410.05265.)

    Candidates are the tokens that are most frequent in the search samples. Taken is, of those that bring the largest
    input of any linear layer down enough, the one whose logits diverge least from those without a prefix; after an
    eighth of the samples, and after a quarter, the worse half of the candidates is left out. The function changes, which is
    why the result is compared with the original model.

    Attributes:
        candidates: how many tokens are tried.
        reduction: by what factor the largest input of a linear layer must fall.
    """

    name: ClassVar[str] = "bake-prefix"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.NORMAL_FORM})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.LOSSY

    candidates: int = 16
    reduction: float = 4.0

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Search the token and bake it; decline where there is nothing massive, or no token takes it away."""
        if not is_decoder(model) or _has_prefix(model):
            return PassResult()
        decoder = decoder_of(model)
        anchor = graph.consumers(_inputs(model)[next(iter(decoder.cache))])[0]
        names = list(dict.fromkeys(layer.x.name or "" for layer in graph.linear_layers(model)))
        session = Session(ctx.fused(model), outputs=[LOGITS, *names])
        prompts = [
            feed["input_ids"][:1, start : start + LOOK]
            for feed in ctx.search
            for start in range(0, max(1, feed["input_ids"].shape[1] - LOOK + 1), APART)
        ]
        trials = {token: _Trial() for token in _frequent(prompts, self.candidates)}
        with (
            tempfile.TemporaryDirectory(prefix="scalefold-logits-") as folder,
            ctx.progress("searching a prefix", len(prompts)) as advance,
        ):
            # the logits of all prompts together are larger than most models
            paths = [Path(folder) / f"{index}.npy" for index in range(len(prompts))]
            before = max(map(partial(_look_before, session, decoder, names), prompts, paths), default=0.0)
            enough = before / self.reduction
            for index, (ids, path) in enumerate(zip(prompts, paths, strict=True)):
                wanted = np.load(path)
                trying = [(token,) for token in _holding(trials, enough)]
                for start in range(0, len(trying), AT_ONCE):
                    some = trying[start : start + AT_ONCE]
                    for (token,), (largest, got) in zip(some, _look(session, decoder, names, ids, some), strict=True):
                        trials[token].largest = max(trials[token].largest, largest)
                        trials[token].divergence += divergence(wanted, got) / len(prompts)
                if (index + 1) * 8 in (len(prompts), 2 * len(prompts)):
                    trials = _better_half(trials, enough)
                advance()
        found = _holding(trials, enough)
        if not found:
            figures = {"largest": before, "enough": enough}
            return PassResult((), (Event(anchor, "no prefix is called for", figures),))
        token, trial = min(found.items(), key=lambda item: item[1].divergence)
        longest = max(ctx.search, key=lambda feed: feed["input_ids"].shape[1])["input_ids"][:1]
        if not _has_room(model, decoder, longest, token):
            return PassResult((), (Event(anchor, "the samples leave no room for it in the position table"),))
        bake(model, (token,))
        figures = {"largest_before": before, "largest_after": trial.largest, "divergence": trial.divergence}
        return PassResult((Event(anchor, f"token {token} in front of every sequence", figures),))


def bake(model: ir.Model, tokens: Sequence[int]) -> None:
    """Bake the keys and values of these tokens into a decoder's graph, which must have no prefix yet."""
    decoder, inputs = decoder_of(model), _inputs(model)
    n = len(tokens)
    states = Session(model, outputs=list(decoder.outputs.values()), lean=True).run(
        decoder.prompt_feed(np.array([tokens]))
    )
    new = _Builder(model, inputs["input_ids"])
    bounds = [
        graph.add_initializer(model, f"prefix.{name}", np.array([number], dtype=np.int64))
        for name, number in (("length", n), ("end", np.iinfo(np.int64).max), ("axis", 2))
    ]
    for name, output in decoder.outputs.items():
        past, present = inputs[name], next(value for value in model.graph.outputs if value.name == output)
        constant = graph.add_initializer(model, f"{name}{PREFIX}", states[output])
        new.expand_and_join(constant, past, axis=2)
        _hide(model, present, bounds)
    if (mask := inputs.get("attention_mask")) is not None:
        ones = np.ones((1, n), dtype=mask.dtype.numpy() if mask.dtype is not None else np.int64)
        new.expand_and_join(graph.add_initializer(model, f"attention_mask{PREFIX}", ones), mask, axis=1)
    if (positions := inputs.get("position_ids")) is not None:
        dtype = positions.dtype.numpy() if positions.dtype is not None else np.int64
        shift = graph.add_initializer(model, f"position_ids{PREFIX}", np.array(n, dtype=dtype))
        new.replace(positions, ir.node("Add", [positions, shift], name="position_ids.behind_prefix"))
    new.insert()


class _Builder:
    """The nodes that prefix a graph's inputs, put in front of everything else."""

    def __init__(self, model: ir.Model, ids: ir.Value) -> None:
        self._model = model
        self._batch = ir.node("Shape", [ids], {"start": 0, "end": 1}, name="prefix.batch")
        self._nodes = [self._batch]
        self._sizes: dict[int, ir.Value] = {}

    def expand_and_join(self, constant: ir.Value, value: ir.Value, axis: int) -> None:
        """Let the readers of an input [B, ...] read it behind a constant [1, ...], along `axis`."""
        rank = graph.rank(constant) or 0
        if rank not in self._sizes:
            ones = graph.add_initializer(self._model, f"prefix.ones_{rank}", np.ones(rank - 1, dtype=np.int64))
            sizes = ir.node("Concat", [self._batch.outputs[0], ones], {"axis": 0}, name=f"prefix.sizes_{rank}")
            self._nodes.append(sizes)
            self._sizes[rank] = sizes.outputs[0]
        expand = ir.node("Expand", [constant, self._sizes[rank]], name=f"{value.name}.prefix_of_all")
        expand.outputs[0].type = value.type
        self._nodes.append(expand)
        self.replace(
            value, ir.node("Concat", [expand.outputs[0], value], {"axis": axis}, name=f"{value.name}.prefixed")
        )

    def replace(self, value: ir.Value, node: ir.Node) -> None:
        """Let the readers of an input read what `node` makes of it."""
        result = node.outputs[0]
        result.type = value.type
        result.name = f"{node.name}.out"
        graph.read_instead(value, result, [node])
        self._nodes.append(node)

    def insert(self) -> None:
        """Put the nodes in front."""
        graph.insert_before(self._model.graph[0], self._nodes)


def _hide(model: ir.Model, present: ir.Value, bounds: Sequence[ir.Value]) -> None:
    """Leave all but these bounds of a Slice out of a cache that goes out; readers inside keep the whole."""
    index = list(model.graph.outputs).index(present)
    name = present.name
    present.name = f"{name}.with_prefix"
    visible = ir.node("Slice", [present, *bounds], name=f"{name}.visible")
    graph.like(visible.outputs[0], present).name = name
    present.shape = None
    model.graph.outputs[index] = visible.outputs[0]
    producer = present.producer()
    assert producer is not None
    graph.insert_after(producer, [visible])


def _has_room(model: ir.Model, decoder: Decoder, ids: Array, token: int) -> bool:
    """Whether the model takes ids [1, S] behind one token more."""
    longer = np.concatenate([np.array([[token]], dtype=ids.dtype), ids], axis=1)
    try:
        Session(model, outputs=[next(iter(decoder.outputs.values()))], lean=True).run(decoder.prompt_feed(longer))
    except CalibrationError:
        return False
    return True


def _inputs(model: ir.Model) -> dict[str, ir.Value]:
    return {value.name or "": value for value in model.graph.inputs}


def _has_prefix(model: ir.Model) -> bool:
    return prefix_length(model) > 0


def _frequent(prompts: Sequence[Array], count: int) -> list[int]:
    """The most frequent tokens, of equally frequent ones the smallest."""
    tokens, counts = np.unique(np.concatenate([ids.ravel() for ids in prompts]), return_counts=True)
    return [int(token) for token in tokens[np.lexsort((tokens, -counts))[:count]]]


def _holding(trials: Mapping[int, _Trial], enough: float) -> dict[int, _Trial]:
    """The tokens that took the massive activations away so far."""
    return {token: trial for token, trial in trials.items() if trial.largest <= enough}


def _better_half(trials: Mapping[int, _Trial], enough: float) -> dict[int, _Trial]:
    """Of the tokens that take the massive activations away those that moved the logits least, `LEFT` at least."""
    holding = _holding(trials, enough)
    kept = sorted(holding, key=lambda token: holding[token].divergence)[: max(LEFT, len(trials) // 2)]
    return {token: trial for token, trial in holding.items() if token in kept}


def _look_before(session: Session, decoder: Decoder, names: Sequence[str], ids: Array, path: Path) -> float:
    """The largest magnitude of the named values on a prompt behind no prefix; its logits are saved."""
    [(largest, logits)] = _look(session, decoder, names, ids, [()])
    np.save(path, logits)
    return largest


def _look(
    session: Session, decoder: Decoder, names: Sequence[str], ids: Array, prefixes: Sequence[Sequence[int]]
) -> list[tuple[float, Float]]:
    """The largest magnitude of the named values, and the logits of one prompt, both behind each of some prefixes.

    The prefixes are of one length.
    """
    before = np.array(prefixes, dtype=ids.dtype).reshape(len(prefixes), -1)
    feed = decoder.prompt_feed(np.concatenate([before, np.repeat(ids, len(prefixes), axis=0)], axis=1))
    found: Mapping[str, Array] = session.run(feed)
    behind = {name: found[name][:, before.shape[1] :] for name in (LOGITS, *names)}
    return [
        (
            max(float(np.abs(behind[name][row]).max()) for name in names),
            np.asarray(behind[LOGITS][row], dtype=np.float32),
        )
        for row in range(len(prefixes))
    ]
