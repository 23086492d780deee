"""How long onnxruntime spends in each node of a model."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from scalefold.compiler.kernel_library import register_beside
from scalefold.compiler.runtime import Feed, session_options

SUFFIX = "_kernel_time"


@dataclass(frozen=True)
class Operand:
    """A tensor that a node read or wrote.

    Attributes:
        dtype: its type by onnxruntime's name: float, uint8, int64.
        shape: its sizes.
    """

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class NodeTime:
    """One node of the graph that onnxruntime made of a model.

    Attributes:
        name: the node; a fused one has a name that onnxruntime made up.
        kernel: its operator.
        seconds: of its fastest run.
        inputs: what it read; a weight that its kernel has laid out anew is not among them.
        outputs: what it wrote.
    """

    name: str
    kernel: str
    seconds: float
    inputs: tuple[Operand, ...] = ()
    outputs: tuple[Operand, ...] = ()


def node_times(path: Path, feed: Feed, runs: int = 5, threads: int = 0) -> list[NodeTime]:
    """Time every node of a model file on one sample with onnxruntime's profiler, in the order of execution.

    A run before them warms up. The fastest run is kept node by node: one that was interrupted does not count.

    Args:
        path: the model file.
        feed: the sample.
        runs: how often it is run.
        threads: intra-op threads; 0 lets onnxruntime choose.
    """
    with tempfile.TemporaryDirectory(prefix="scalefold-profile-") as folder:
        options = session_options(threads=threads)
        register_beside(options, path.parent)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        taken = {entry.name: feed[entry.name] for entry in session.get_inputs() if entry.name in feed}
        for _ in range(runs + 1):
            session.run(None, taken)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    durations: dict[tuple[str, str, str], list[float]] = {}
    operands: dict[tuple[str, str, str], tuple[tuple[Operand, ...], tuple[Operand, ...]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(SUFFIX):
            facts = event["args"]
            key = event["name"].removesuffix(SUFFIX), facts["op_name"], facts["node_index"]
            durations.setdefault(key, []).append(event["dur"] / 1e6)
            operands[key] = _operands(facts.get("input_type_shape")), _operands(facts.get("output_type_shape"))
    return [NodeTime(key[0], key[1], min(seconds[1:] or seconds), *operands[key]) for key, seconds in durations.items()]


def _operands(listed: list[dict[str, list[int]]] | None) -> tuple[Operand, ...]:
    return tuple(Operand(dtype, tuple(shape)) for entry in listed or () for dtype, shape in entry.items())
