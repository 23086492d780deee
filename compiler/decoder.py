"""Decoders with a KV cache: which inputs carry the cache, and the feeds of a prompt and of every step after it.

One graph serves both: a prompt comes with an empty cache (P = 0), a later step with the cache that the step before gave.

    input_ids [B,S]  attention_mask [B,P+S]  position_ids [B,S]  input.*.keys|values [B,H,P,D]
        -> logits [B,S,V]  output.*.keys|values [B,H,P+S,D]
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from scalefold.compiler.errors import SourceError
from scalefold.compiler.runtime import NUMPY_TYPES, Array, Feed, Session, inputs_of

LOGITS = "logits"
ROWS = 8
"""Tokens whose logits are looked at at a time: each is as wide as the vocabulary, and these few stay in a cache."""
TOKEN_INPUTS = frozenset({"input_ids", "attention_mask", "position_ids"})
TOKEN_FEEDS = TOKEN_INPUTS | {"token_type_ids"}
PREFIX = ".prefix"
"""Ends the names of constants that are joined to a decoder's inputs; see the pass bake-prefix."""
PAIRED_PREFIXES = (("input.", "output."), ("past_key_values.", "present."))
"""How exporters name the cache on its way in and out: transformers' own, and the older one of optimum."""
POSITION_KEYS = ("max_position_embeddings", "n_positions")


@dataclass(frozen=True)
class Port:
    """One input of a graph: its numbers, and its shape with None where a size is free."""

    dtype: np.dtype[np.generic]
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Decoder:
    """What a decoder's graph takes and gives back.

    Attributes:
        tokens: the inputs made of token ids: input_ids, and attention_mask and position_ids where the graph takes them.
        cache: the inputs of the cache, [B,H,P,D] each.
        outputs: for each input of the cache the output that holds it one step later, [B,H,P+S,D].
    """

    tokens: Mapping[str, Port]
    cache: Mapping[str, Port]
    outputs: Mapping[str, str]

    def empty_cache(self, batch: int = 1) -> dict[str, Array]:
        """A cache of no positions: arrays [batch,H,0,D]."""
        return {
            name: np.zeros((batch, port.shape[1] or 0, 0, port.shape[3] or 0), dtype=port.dtype)
            for name, port in self.cache.items()
        }

    def next_cache(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
        """The cache for the next step, out of a step's outputs."""
        return {name: outputs[paired] for name, paired in self.outputs.items()}

    def prompt_feed(self, ids: Array, mask: Array | None = None, past: Feed | None = None) -> dict[str, Array]:
        """The feed of one step: of a prompt, or of what follows a cache.

        Args:
            ids: integers [B,S].
            mask: [B,P+S], 0 where a token, or a position of the cache, is padding; all ones when None.
            past: the cache, P positions; empty when None.

        Raises:
            SourceError: the cache or the mask has a wrong shape, or the graph takes no mask and needs one.
        """
        cache = self.empty_cache(len(ids)) if past is None else {name: past[name] for name in self.cache}
        length = self.check_cache({name: array.shape for name, array in cache.items()}, len(ids))
        return {**self.token_feed(ids, mask, length), **cache}

    def token_feed(self, ids: Array, mask: Array | None, past_length: int) -> dict[str, Array]:
        """The part of `prompt_feed` that is not the cache, which is `past_length` positions long."""
        shape = (len(ids), past_length + ids.shape[1])
        mask = np.ones(shape, dtype=np.int64) if mask is None else mask
        if mask.shape != shape:
            raise SourceError(
                f"the attention mask has shape {list(mask.shape)}, not {list(shape)}",
                where="the feed",
                remedy="give one entry for every position of the cache and of the new tokens",
            )
        if "attention_mask" not in self.tokens and not mask.all():
            raise SourceError(
                "its graph takes no attention_mask, so padding cannot be left out",
                where="the decoder",
                remedy="run one sequence at a time, or export the model again",
            )
        every = {
            "input_ids": ids,
            "attention_mask": mask,
            # padding before a sequence takes no positions of its own; what it is given is never attended to
            "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0)[:, past_length:],
        }
        return {name: np.asarray(every[name], dtype=port.dtype) for name, port in self.tokens.items()}

    def check_cache(self, shapes: Mapping[str, tuple[int, ...]], batch: int) -> int:
        """The number of positions in a cache of these shapes.

        Raises:
            SourceError: an array is of another shape than the graph takes, or they differ in length.
        """
        lengths = {shape[2] if len(shape) == 4 else -1 for shape in shapes.values()}
        for name, port in self.cache.items():
            wanted = (batch, port.shape[1], min(lengths), port.shape[3])
            if shapes[name] != wanted:
                raise SourceError(
                    f"{name} has shape {list(shapes[name])}, not [{batch}, {port.shape[1]}, positions, {port.shape[3]}]"
                    " with as many positions as the others",
                    where="the cache",
                    remedy="give the cache that the last step returned, and as many sequences as it was made of",
                )
        return lengths.pop()


def decoder_of(source: Session | ir.Model, where: str = "the model") -> Decoder:
    """What the graph of a decoder takes and gives back.

    Args:
        source: an open session, or a graph.
        where: the model's name, for errors.

    Raises:
        SourceError: it is not a decoder with a cache, or takes what neither tokens nor a cache can fill.
    """
    if isinstance(source, Session):
        ports, outputs = _session_ports(source), source.outputs
    else:
        ports, outputs = _graph_ports(source), [value.name or "" for value in source.graph.outputs]
    pairs = cache_pairs(ports, outputs)
    unknown = sorted(set(ports) - set(pairs) - TOKEN_INPUTS)
    reason = None
    if not pairs or "input_ids" not in ports or LOGITS not in outputs:
        reason = "it is not a decoder: it must take input_ids and a KV cache, and give logits and the cache"
    elif unknown:
        reason = f"neither tokens nor the cache can fill its inputs {', '.join(unknown)}"
    elif odd := next((name for name in pairs if not _is_cache(ports[name])), None):
        reason = f"its cache {odd} is not of the shape [batch, heads, positions, width]"
    if reason is not None:
        raise SourceError(reason, where=where, remedy="export a causal language model with --task causal-lm")
    return Decoder(
        tokens={name: port for name, port in ports.items() if name not in pairs},
        cache={name: ports[name] for name in pairs},
        outputs=pairs,
    )


def is_decoder(model: ir.Model) -> bool:
    """Whether a graph takes and gives back a KV cache."""
    return bool(cache_pairs(inputs_of(model), [value.name or "" for value in model.graph.outputs]))


def cache_pairs(inputs: Iterable[str], outputs: Iterable[str]) -> dict[str, str]:
    """For each input that carries a cache the output that gives it back; empty for a model without one."""
    known = set(outputs)
    candidates = (
        (name, ahead + name.removeprefix(behind))
        for name in inputs
        for behind, ahead in PAIRED_PREFIXES
        if name.startswith(behind)
    )
    return {name: paired for name, paired in candidates if paired in known}


def result_names(model: ir.Model) -> list[str]:
    """The names of the outputs that are results: of a decoder, not the cache."""
    names = [value.name or "" for value in model.graph.outputs]
    cache = set(cache_pairs(inputs_of(model), names).values())
    return [name for name in names if name not in cache]


def prefix_length(model: ir.Model) -> int:
    """Positions that a prefix baked into the cache takes up; 0 without one."""
    shapes = [value.shape for name, value in model.graph.initializers.items() if name.endswith(PREFIX)]
    return next((int(str(shape[2])) for shape in shapes if shape is not None and len(shape) == 4), 0)


def first_tokens(feed: Feed, count: int, model: ir.Model) -> Feed:
    """The feed cut to its first tokens; what comes with a cache keeps all of it.

    It stays whole where the graph takes one length alone, or something else that may have a number for every token.
    """
    ids = feed.get("input_ids")
    if ids is None or ids.ndim != 2 or ids.shape[1] <= count or is_fixed(model, 1):
        return feed
    if not is_decoder(model) and any(name not in TOKEN_FEEDS or array.ndim != 2 for name, array in feed.items()):
        return feed
    length = ids.shape[1]
    cut = {}
    for name, array in feed.items():
        behind = array.shape[1] - length if name in TOKEN_FEEDS and array.ndim == 2 else -1
        cut[name] = array[:, : behind + count] if behind >= 0 else array
    return cut


def is_fixed(model: ir.Model, *axes: int) -> bool:
    """Whether a graph takes ids [B, S] of one size alone along any of these axes."""
    ids = next((value for value in model.graph.inputs if value.name == "input_ids"), None)
    return ids is not None and ids.shape is not None and any(isinstance(ids.shape[axis], int) for axis in axes)


def log_softmax(logits: Array) -> npt.NDArray[np.float64]:
    """Logarithms of the probabilities over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def divergence(wanted: Array, got: Array) -> float:
    """Mean over tokens of the Kullback-Leibler divergence of two sets of logits [tokens, V], in nats."""
    total = 0.0
    for start in range(0, len(wanted), ROWS):
        p, q = log_softmax(wanted[start : start + ROWS]), log_softmax(got[start : start + ROWS])
        total += float((np.exp(p) * (p - q)).sum())
    return total / max(len(wanted), 1)


def position_limit(folder: Path) -> int | None:
    """The length of the position table that a folder's config.json states; None where it states none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = (config.get(key) for key in POSITION_KEYS) if isinstance(config, dict) else ()
    return next((size for size in found if isinstance(size, int)), None)


def _is_cache(port: Port) -> bool:
    return len(port.shape) == 4 and None not in (port.shape[1], port.shape[3])


def _size(size: int | str | None) -> int | None:
    """A size that is known; the exporter writes some of those as text."""
    text = str(size)
    return int(text) if text.isdigit() else None


def _session_ports(session: Session) -> dict[str, Port]:
    return {
        entry.name: Port(
            np.dtype(NUMPY_TYPES.get(entry.type, np.float32)),
            tuple(_size(size) for size in entry.shape),
        )
        for entry in session._session.get_inputs()
    }


def _graph_ports(model: ir.Model) -> dict[str, Port]:
    return {
        name: Port(
            np.dtype(np.float32) if value.dtype is None else value.dtype.numpy(),
            tuple(_size(size if isinstance(size, int) else size.value) for size in value.shape or ()),
        )
        for name, value in inputs_of(model).items()
    }
