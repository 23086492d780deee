"""How long onnxruntime spends in each node of a model."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from scalefold.compiler.runtime import Feed, session_options

SUFFIX = "_kernel_time"


@dataclass(frozen=True)
class NodeTime:
    """One node of the graph that onnxruntime made of a model.

    Attributes:
        name: the node; a fused one has a name that onnxruntime made up.
        kernel: its operator.
        seconds: of its fastest run.
    """

    name: str
    kernel: str
    seconds: float


def node_times(path: Path, feed: Feed, runs: int = 5) -> list[NodeTime]:
    """Time every node of a model file on one sample with onnxruntime's profiler, in the order of execution.

    A run before them warms up. The fastest run is kept node by node: one that was interrupted does not count.

    Args:
        path: the model file.
        feed: the sample.
        runs: how often it is run.
    """
    with tempfile.TemporaryDirectory(prefix="scalefold-profile-") as folder:
        options = session_options()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        taken = {entry.name: feed[entry.name] for entry in session.get_inputs() if entry.name in feed}
        for _ in range(runs + 1):
            session.run(None, taken)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    durations: dict[tuple[str, str, str], list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(SUFFIX):
            name, facts = event["name"].removesuffix(SUFFIX), event["args"]
            durations.setdefault((name, facts["op_name"], facts["node_index"]), []).append(event["dur"] / 1e6)
    return [NodeTime(name, kernel, min(seconds[1:] or seconds)) for (name, kernel, _), seconds in durations.items()]
