"""How fast a model runs, and for every layer and operator how much of this machine it reaches.

The time of a node is held against the least it could take,

    floor = max(operations / peak, bytes of weights / memory, bytes of activations / cache, one node)

where the four ceilings are this machine's own (ceilings.py). The largest term names what bounds the node; what is left
between floor and time is the kernel's.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from scalefold.compiler import artifact, graph, verify
from scalefold.compiler.ceilings import Ceilings
from scalefold.compiler.decoder import cache_pairs, decoder_of
from scalefold.compiler.errors import SourceError
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.kernel_library import FLOAT_PRODUCT, PANEL, PRODUCTS, input_channels
from scalefold.compiler.node_timing import NodeTime, Operand, node_times
from scalefold.compiler.report import kind_of
from scalefold.compiler.runtime import Feed, Session

VOCABULARY = 100
"""Token ids are drawn below it where the config does not state a vocabulary."""
BYTES = {"float": 4, "float16": 2, "bfloat16": 2, "double": 8, "int64": 8, "int32": 4}
ATTENTION = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention"})
OWN = PRODUCTS | {FLOAT_PRODUCT}
PICKING = frozenset({"Gather", "GatherND", "GatherElements", "GatherBlockQuantized", "Slice", "Split", "Expand"})
"""They read no more of their input than they write."""


@dataclass(frozen=True)
class Shape:
    """The size of one run.

    Attributes:
        batch: sequences.
        tokens: of each.
        past: positions of a decoder's cache in front of them.
    """

    batch: int
    tokens: int
    past: int = 0

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}" + (f" behind {self.past}" if self.past else "")


@dataclass(frozen=True)
class Latency:
    """How long whole runs of one shape take.

    Attributes:
        shape: of the runs.
        load_seconds: until the session is ready.
        seconds: the fastest run, lower quartile, median and upper quartile.
        runs: how many were timed.
    """

    shape: Shape
    load_seconds: float
    seconds: tuple[float, float, float, float]
    runs: int


@dataclass(frozen=True)
class Work:
    """What a node does at least.

    Attributes:
        operations: multiplications and additions of its matrix products; 0 without any.
        integer: whether those are of integers.
        weight_bytes: of constants that it streams.
        activation_bytes: of everything else it reads or writes.
        size: its sizes, for people.
    """

    operations: float
    integer: bool
    weight_bytes: float
    activation_bytes: float
    size: str

    def floor(self, best: Ceilings) -> tuple[float, str]:
        """The least seconds it could take, and what bounds it."""
        peak = "integer peak" if self.integer else "float peak"
        terms = {
            peak: self.operations / (best.integer if self.integer else best.floating),
            "memory": self.weight_bytes / best.memory,
            "cache": self.activation_bytes / best.cache,
            "node": best.node,
        }
        name = max(terms, key=lambda term: terms[term])
        return terms[name], name


@dataclass(frozen=True)
class Line:
    """Nodes of one kind of layer, one operator and one size.

    Attributes:
        layer: the linear layers, the number of the block as `*`; empty for what belongs to none.
        kernel: the operator.
        size: rows x inner size x columns of a product; empty for everything else.
        nodes: how many.
        seconds: of all of them.
        share: of the time of a run.
        rate: achieved, in billions of operations (products) or bytes (everything else) a second.
        unit: GOPS or GB/s.
        ceiling: the rate at which the floor would be reached.
        reached: floor over time.
        bound: what the floor is made of: integer peak, float peak, memory, cache or node.
    """

    layer: str
    kernel: str
    size: str
    nodes: int
    seconds: float
    share: float
    rate: float
    unit: str
    ceiling: float
    reached: float
    bound: str


@dataclass(frozen=True)
class Profile:
    """Where the time of a run goes.

    Attributes:
        shape: of the run.
        seconds: of the fastest whole run without profiling.
        between: of those, seconds that are in no node.
        ceilings: of this machine.
        lines: largest first; layers that differ only in their block are one.
        layers: the same with every block by itself, in the order of execution.
    """

    shape: Shape
    seconds: float
    between: float
    ceilings: Ceilings
    lines: tuple[Line, ...]
    layers: tuple[Line, ...]

    def facts(self) -> dict[str, Any]:
        """The profile as plain data."""
        return asdict(self)


def model_file(folder: Path) -> Path:
    """The model of a compiled folder, or the file itself.

    Raises:
        SourceError: there is none.
    """
    path = folder / artifact.MODEL if folder.is_dir() else folder
    if not path.is_file():
        raise SourceError("there is no model.onnx in it", where=str(folder), remedy="give a compiled folder")
    return path


def parse_shape(text: str, past: int = 0) -> Shape:
    """BATCHxTOKENS.

    Raises:
        SourceError: it is not of that form.
    """
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise SourceError(f"{text!r} is no shape", where="--shape", remedy="give BATCHxTOKENS, such as 8x128")
    return Shape(int(parts[0]), int(parts[1]), past)


def sample(session: Session, shape: Shape, folder: Path) -> Feed:
    """A feed of random tokens, without padding; a decoder's cache holds zeros.

    Raises:
        SourceError: the model takes something that tokens cannot fill.
    """
    ids = np.random.default_rng(0).integers(0, _vocabulary(folder), (shape.batch, shape.tokens))
    if cache_pairs(session.inputs, session.outputs):
        decoder = decoder_of(session, str(folder))
        empty = decoder.empty_cache(shape.batch)
        widths = {name: (array.shape[0], array.shape[1], shape.past, array.shape[3]) for name, array in empty.items()}
        return decoder.prompt_feed(ids, past={name: np.zeros(widths[name], empty[name].dtype) for name in empty})
    every = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
        "position_ids": np.tile(np.arange(shape.tokens), (shape.batch, 1)),
    }
    if shape.past or (unknown := sorted(set(session.inputs) - set(every))):
        what = "it keeps no cache" if shape.past else f"tokens cannot fill its inputs {', '.join(unknown)}"
        raise SourceError(what, where=str(folder), remedy="give a text model, and --past only for a decoder")
    wide = {name for name, kind in session.inputs.items() if kind == "tensor(int64)"}
    return {name: every[name].astype(np.int64 if name in wide else np.int32) for name in session.inputs}


def latency(folder: Path, shape: Shape, *, threads: int = 0, runs: int = 20) -> Latency:
    """Time whole runs of one shape, after one that warms up.

    Raises:
        SourceError: there is no model, or tokens cannot fill its inputs.
    """
    path, start = model_file(folder), time.perf_counter()
    session = Session(path, threads=threads)
    loaded = time.perf_counter() - start
    feed = sample(session, shape, path.parent)
    taken = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        session.run(feed)
        taken.append(time.perf_counter() - start)
    low, middle, high = np.quantile(taken[1:], [0.25, 0.5, 0.75])
    return Latency(shape, loaded, (min(taken[1:]), float(low), float(middle), float(high)), runs)


def profile(folder: Path, timed: Latency, best: Ceilings, *, threads: int = 0) -> Profile:
    """Hold every node of one run against this machine's ceilings.

    Args:
        folder: a compiled folder, or a model file.
        timed: the whole run.
        best: what the machine can do.
        threads: intra-op threads; 0 lets onnxruntime choose.
    """
    path = model_file(folder)
    feed = sample(Session(path, threads=threads), timed.shape, path.parent)
    times = node_times(path, feed, threads=threads)
    model = read_onnx(path)
    names = {*verify.quantized_layers(model), *(layer.name for layer in graph.linear_layers(model))}
    total = max(timed.seconds[0], sum(entry.seconds for entry in times))
    bits = _stored_bits(model)
    layers = [_layer_of(entry.name, names) for entry in times]
    works = [work_of(entry, bits.get(layer)) for entry, layer in zip(times, layers, strict=True)]
    by_block = _lines(times, works, layers, best, total)
    kinds = [kind_of(layer)[0] if layer else "" for layer in layers]
    lines = sorted(_lines(times, works, kinds, best, total), key=lambda line: -line.seconds)
    between = total - sum(entry.seconds for entry in times)
    return Profile(timed.shape, total, between, best, tuple(lines), tuple(by_block))


def work_of(entry: NodeTime, bits: float | None = None) -> Work:
    """What a node does at least, by what it read and wrote.

    A product of x [...,M,K] with a constant [K,N] is 2 M K N operations and streams K N weights; with another activation,
    or as attention over T positions (4 times elements of the query times T), it streams none.

    Args:
        entry: the node.
        bits: of a weight as it is stored, scales included; what the kernel says when None.
    """
    written, read = _bytes(entry.outputs), _bytes(entry.inputs)
    if not entry.outputs or not entry.inputs or entry.kernel in PICKING:
        return Work(0, False, 0, 2 * written, _sizes(entry.outputs))
    x, y = entry.inputs[0].shape, entry.outputs[0].shape
    if entry.kernel in verify.LINEAR_OPS and x and y:
        integer = entry.kernel in verify.INTEGER_KERNELS
        k, n, rows = x[-1], y[-1], math.prod(y[:-1])
        streams, width = _reads_constant(entry, k, n), (bits or (8 if integer else 32)) / 8
        if entry.kernel in OWN and len(entry.inputs) > 1:
            panels = entry.inputs[1].shape  # rows that are gated are twice as wide as what is multiplied
            k, streams = input_channels(panels), True
            width = math.prod(panels) * BYTES.get(entry.inputs[1].dtype, 1) / (panels[0] * PANEL * k)
        weight = k * n * width if streams else 0.0
        moved = _bytes(entry.inputs[:1]) + written if streams else read + written
        return Work(2.0 * rows * k * n, integer, weight, moved, f"{rows} x {k} x {n}")
    if entry.kernel in ATTENTION and len(entry.inputs) >= 3:
        positions = max(operand.shape[-2] for operand in (*entry.inputs[:5], *entry.outputs) if len(operand.shape) > 2)
        return Work(
            4.0 * math.prod(x) * positions, False, 0, read + written, f"{_sizes(entry.inputs[:1])}, {positions}"
        )
    return Work(0, False, 0, read + written, _sizes(entry.outputs))


def _lines(
    times: Sequence[NodeTime], works: Sequence[Work], layers: Sequence[str], best: Ceilings, total: float
) -> list[Line]:
    """One line for each layer, operator and size of product."""
    grouped: dict[tuple[str, str, str], list[tuple[NodeTime, Work]]] = {}
    for entry, work, layer in zip(times, works, layers, strict=True):
        key = layer, entry.kernel, work.size if work.operations else ""
        grouped.setdefault(key, []).append((entry, work))
    return [_line(key, entries, best, total) for key, entries in grouped.items()]


def _line(key: tuple[str, str, str], entries: Sequence[tuple[NodeTime, Work]], best: Ceilings, total: float) -> Line:
    seconds = sum(entry.seconds for entry, _ in entries)
    floors = [work.floor(best) for _, work in entries]
    floor = sum(least for least, _ in floors)
    bounds = {name: sum(least for least, other in floors if other == name) for _, name in floors}
    product = any(work.operations for _, work in entries)
    amount = sum(work.operations if product else work.activation_bytes + work.weight_bytes for _, work in entries)
    return Line(
        layer=key[0],
        kernel=key[1],
        size=key[2],
        nodes=len(entries),
        seconds=seconds,
        share=seconds / total,
        rate=amount / max(seconds, 1e-9) / 1e9,
        unit="GOPS" if product else "GB/s",
        ceiling=amount / floor / 1e9,
        reached=floor / max(seconds, 1e-9),
        bound=max(bounds, key=lambda name: bounds[name]),
    )


def _layer_of(node: str, names: set[str]) -> str:
    """The linear layer that a node is, or belongs to by its name; empty for none."""
    for part in (node, *node.replace("/", " ").split()):
        while part:
            if part in names:
                return part
            part = part.rpartition(".")[0]
    return ""


def _stored_bits(model: ir.Model) -> dict[str, float]:
    """Bits of each weight that is stored in blocks, with its share of a block's float32 scale."""
    return {
        node.name or "": int(str(graph.attribute(node, "bits"))) + 32 / int(str(graph.attribute(node, "block_size")))
        for node in graph.nodes(model, "MatMulNBits")
    }


def _reads_constant(entry: NodeTime, k: int, n: int) -> bool:
    """Whether the second factor is a constant: one that was laid out anew is not listed, another one has two axes."""
    others = [
        operand.shape for operand in entry.inputs[1:] if len(operand.shape) >= 2 and set(operand.shape[-2:]) == {k, n}
    ]
    return not others or len(others[0]) == 2


def _bytes(operands: Sequence[Operand]) -> int:
    return sum(math.prod(operand.shape) * BYTES.get(operand.dtype, 1) for operand in operands)


def _sizes(operands: Sequence[Operand]) -> str:
    return " x ".join(map(str, operands[0].shape)) if operands else ""


def _vocabulary(folder: Path) -> int:
    try:
        return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return VOCABULARY
