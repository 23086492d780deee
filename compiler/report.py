"""The facts of a compiled folder that people want to see: what went in, what was done, what came out, how fast it is."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from scalefold.compiler import artifact, channel_ranges, layer_names, verify
from scalefold.compiler.calibrate import calibration_from
from scalefold.compiler.decoder import cache_pairs, is_decoder, position_limit
from scalefold.compiler.driver import open_source
from scalefold.compiler.errors import CalibrationError
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.node_timing import NodeTime, node_times
from scalefold.compiler.protocol import Progress, silent
from scalefold.compiler.runtime import Feed, Session, inputs_of
from scalefold.compiler.schemes import Float

TOKENS = 128
"""Length of the sample that is timed and, where ranges were not recorded, measured on."""

RUNS = 3


@dataclass(frozen=True)
class FloatModel:
    """The float model beside the compiled one, on the same sample.

    Attributes:
        name: what was given as --against.
        seconds: median of a few runs of it.
        compiled_seconds: the same of the compiled model.
        outputs: the compiled model's outputs against its own.
    """

    name: str
    seconds: float
    compiled_seconds: float
    outputs: tuple[verify.Fidelity, ...]


@dataclass(frozen=True)
class Report:
    """What is known of a compiled folder.

    Attributes:
        folder: the folder.
        record: what the compiler wrote down.
        parts: what its bytes are.
        times: seconds in each node, in the order of execution; empty when there is no sample to run.
        tokens: length of that sample.
        before: range of each channel that layers read, in the float graph; by the first layer that reads it.
        after: the same after migration.
        ranges_origin: where the ranges come from; empty when there are none.
        against: the float model, when given.
    """

    folder: Path
    record: dict[str, Any]
    parts: dict[str, artifact.Part]
    times: tuple[NodeTime, ...] = ()
    tokens: int = 0
    before: dict[str, Float] = field(default_factory=dict)
    after: dict[str, Float] = field(default_factory=dict)
    ranges_origin: str = ""
    against: FloatModel | None = None

    @property
    def layer_names(self) -> list[str]:
        """The linear layers, in the order of the graph."""
        return [layer["name"] for layer in self.record.get("layers", [])]

    def seconds_by_kernel(self) -> dict[str, float]:
        """Seconds in the nodes of each operator, largest first."""
        return _summed((entry.kernel, entry.seconds) for entry in self.times)

    def seconds_by_layer(self) -> dict[str, float]:
        """Seconds in each linear layer's product; what is not one is under the name `everything else`."""
        names = set(self.layer_names)
        return _summed(
            (next((part for part in _names(entry.name) if part in names), "everything else"), entry.seconds)
            for entry in self.times
        )

    def sites(self) -> list[dict[str, Any]]:
        """For each value that layers read, how far it reaches before and after migration, in graph order."""
        return [
            {
                "layer": name,
                "channels": self.before[name].shape[1],
                "largest_before": float(abs(self.before[name]).max()),
                "largest_after": float(abs(self.after[name]).max()),
                "spread_before": channel_ranges.spread(self.before[name]),
                "spread_after": channel_ranges.spread(self.after[name]),
            }
            for name in self.before
            if name in self.after
        ]

    def facts(self) -> dict[str, Any]:
        """The report as plain data."""
        total = sum(entry.seconds for entry in self.times)
        return {
            **self.record,
            "folder": str(self.folder),
            "parts": {name: asdict(part) for name, part in self.parts.items()},
            "ranges": {"origin": self.ranges_origin, "sites": self.sites()},
            "latency": {
                "tokens": self.tokens,
                "seconds": total,
                "kernels": self.seconds_by_kernel(),
                "layers": self.seconds_by_layer(),
            },
            "against": None if self.against is None else asdict(self.against),
        }


def gather_report(folder: Path, against: str | None = None, progress: Progress = silent) -> Report:
    """Read a compiled folder, time its nodes on one sample, and compare it with the float model where one is given.

    Args:
        folder: what `scalefold compile` wrote.
        against: the float model, as `compile_model` takes its source.
        progress: opens progress bars.

    Raises:
        OutputError: the folder has no record.
        CalibrationError: there is a float model to compare with, and no sample to compare on.
        SourceError: the float model is another one.
    """
    record = artifact.read_record(folder)
    model = read_onnx(folder / artifact.MODEL)
    feed = _sample(folder, model, needed=against is not None)
    with progress("timing nodes", 1) as advance:
        times = node_times(folder / artifact.MODEL, feed, RUNS) if feed is not None else []
        advance()
    tokens = 0 if feed is None else max((array.shape[1] for array in feed.values() if array.ndim == 2), default=0)
    before, after = channel_ranges.read(folder)
    origin = "held-out samples, when it was compiled" if before else ""
    compared = None
    if against is not None and feed is not None:
        with progress("comparing with float", 1) as advance, open_source(against, progress=progress) as source:
            if not before:
                names = [layer["name"] for layer in record.get("layers", [])]
                float_names = [part for name in names for part in layer_names.parts(name)]
                before, after = channel_ranges.paired(
                    channel_ranges.measure(source, float_names, [feed]), channel_ranges.measure(model, names, [feed])
                )
                origin = f"one sample of {tokens} tokens, in the float model and in the compiled one"
            compared = _compare(against, source, folder / artifact.MODEL, feed)
            advance()
    parts = artifact.parts(folder)
    return Report(folder, record, parts, tuple(times), tokens, before, after, origin, compared)


def kind_of(layer: str) -> tuple[str, int]:
    """A layer's name without the number of its block, and that number: layers of one kind are compared block by block."""
    base, _, number = layer.rpartition(".")
    if not number.isdigit():
        base, number = layer, next(iter(re.findall(r"\.(\d+)\.", layer)), "0")
    return re.sub(r"\.\d+(?=\.)", ".*", base), int(number)


def _sample(folder: Path, model: ir.Model, *, needed: bool) -> Feed | None:
    """One sample of the default text; None for a model that text cannot fill, unless it is needed."""
    tokenizer, length = folder / "tokenizer.json", min(TOKENS, position_limit(folder) or TOKENS)
    try:
        samples = calibration_from(
            None, model, tokenizer_file=tokenizer if tokenizer.is_file() else None, samples=32, max_length=length
        )
    except CalibrationError:
        if needed:
            raise
        return None
    feeds = samples.head(samples.count)
    return feeds[0] if is_decoder(model) else max(feeds, key=lambda feed: max(array.size for array in feed.values()))


def _compare(name: str, source: ir.Model, path: Path, feed: Feed) -> FloatModel:
    every = [value.name or "" for value in source.graph.outputs]
    cache = set(cache_pairs(inputs_of(source), every).values())
    compiled = Session(path)
    results = [entry for entry in every if entry in compiled.outputs and entry not in cache]
    if not results:
        raise verify.other_model("it has no output of a name that the compiled model has")
    original = Session(source, outputs=results)
    outputs = verify.fidelity([original.run(feed)], compiled, [feed])
    return FloatModel(name, _seconds(original, feed), _seconds(compiled, feed), tuple(outputs))


def _seconds(session: Session, feed: Feed) -> float:
    taken = []
    for _ in range(RUNS):
        start = time.perf_counter()
        session.run(feed)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _names(node: str) -> tuple[str, ...]:
    """A node's name, and those that onnxruntime has made it up from."""
    return node, *node.replace("/", " ").split()


def _summed(entries: Iterable[tuple[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, seconds in entries:
        sums[name] = sums.get(name, 0.0) + seconds
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
