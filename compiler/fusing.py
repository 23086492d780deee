"""Turn a compiled folder into one that runs on scalefold's own kernel library, and prove that it computes the same."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from scalefold.compiler import artifact, calibrate, graph, verify
from scalefold.compiler.decoder import position_limit, result_names
from scalefold.compiler.errors import GraphError, SourceError
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.kernel_library import LIBRARY, PRODUCTS, is_fast, library
from scalefold.compiler.protocol import Context, Event, Pass, Progress, silent
from scalefold.compiler.runtime import Feed, Session

PASSES = "scalefold.passes"
"""The module that has the passes of fusing, as FUSE."""

MAIN = PRODUCTS | {"CachedAttention"}
"""Operators one of which has to come of it: a normalization alone is not worth a library."""

SAMPLES = 8
TOKENS = 128
LEAST_COSINE = 0.98
"""Of a token's outputs by both folders: below it something else than rounding has changed."""


@dataclass(frozen=True)
class FuseReport:
    """What fusing a folder came to.

    Attributes:
        output: the folder.
        fused: what was fused, by a description: how many times.
        declined: products that stayed on onnxruntime's kernels, each with the reason.
        outputs: how close the outputs are to those of the folder that was fused; empty where there was nothing to run.
        held_out: what both were run on.
        bytes: of the model.
        load_seconds: to open it.
    """

    output: Path
    fused: dict[str, int]
    declined: dict[str, str]
    outputs: tuple[verify.Fidelity, ...]
    held_out: str
    bytes: int
    load_seconds: float


def fuse_folder(
    source: str | Path, output: str | Path, *, any_cpu: bool = False, data: object = None, progress: Progress = silent
) -> FuseReport:
    """Write a folder that runs on scalefold's kernels from one that `compile_model` wrote.

    The library that runs them is in the folder; see `kernel_library.register`.

    Args:
        source: the compiled folder; stays as it is.
        output: the folder to write; an earlier one of scalefold's is replaced whole.
        any_cpu: whether to go on where this machine's processor has none of the instructions that make it fast.
        data: what both folders are compared on, as for calibration; English text when None.
        progress: opens progress bars.

    Raises:
        ScalefoldError: it is no compiled folder, has nothing to fuse, or gives something else; nothing is written then.
    """
    folder, place = Path(source), Path(output).absolute()
    record = artifact.read_record(folder)
    if not (folder / artifact.MODEL).is_file():
        raise SourceError(f"there is no {artifact.MODEL} in it", where=str(folder), remedy="give a compiled folder")
    if place.resolve() == folder.resolve():
        raise SourceError("it is the folder to be fused", where=str(place), remedy="give another output folder")
    if folder.resolve() in place.resolve().parents or place.resolve() in folder.resolve().parents:
        what = "it and the folder to be fused lie one in the other"
        raise SourceError(what, where=str(place), remedy="give an output folder elsewhere")
    artifact.check_output(place)
    built = library()
    if not is_fast(built) and not any_cpu:
        raise SourceError(
            "its processor has no AVX512-VNNI, without which the compiled folder as it is runs faster",
            where="this machine",
            remedy="serve that folder here, or fuse for another machine with --any-cpu",
        )
    model = read_onnx(folder / artifact.MODEL)
    ShapeInferencePass()(model)
    with progress("fusing", 3) as advance, artifact.staged(place) as scratch:
        rewrites, declined = _run(model)
        if not MAIN & {event.node.op_type for event in rewrites}:
            reasons = "; ".join(sorted({event.reason for event in declined})) or "it has no MatMulIntegerToFloat"
            raise GraphError(
                f"nothing in it can be fused ({reasons})",
                where=str(folder),
                remedy="compile it for the target onnxruntime-cpu with activations of 8 bits, such as recipe w8a8",
            )
        stage = scratch / "result"
        shutil.copytree(folder, stage, ignore=shutil.ignore_patterns(f"{artifact.MODEL}*", artifact.RECORD))
        _align(model)
        artifact.save_model(model, stage)
        shutil.copyfile(built, stage / LIBRARY)
        advance()
        kernels = verify.layer_kernels(stage / artifact.MODEL)
        verify.require_integer_kernels(kernels)
        outputs, held_out = _compared(folder, stage, model, data)
        advance()
        report = FuseReport(
            output=place,
            fused=_counted(rewrites),
            declined={event.where: event.reason for event in declined},
            outputs=outputs,
            held_out=held_out,
            bytes=artifact.size_of(stage),
            load_seconds=verify.load_seconds(stage / artifact.MODEL),
        )
        artifact.write_json(stage / artifact.RECORD, _record(record, report, kernels))
        artifact.publish(stage, place)
        advance()
    return report


def _run(model: ir.Model) -> tuple[list[Event], list[Event]]:
    passes: Sequence[Pass] = importlib.import_module(PASSES).FUSE
    rewrites: list[Event] = []
    declined: list[Event] = []
    for entry in passes:
        result = entry.run(model, Context())
        rewrites += result.rewrites
        declined += result.declined
    return rewrites, declined


def _align(model: ir.Model) -> None:
    """Let panels come first in the file of weights, one behind another: then all lie at multiples of a cache line."""
    initializers, panels = model.graph.initializers, (ir.DataType.INT8, ir.DataType.BFLOAT16)
    aside = [value for value in initializers.values() if value.dtype not in panels or graph.rank(value) != 4]
    for value in aside:
        initializers.pop(value.name or "")
    for value in aside:
        initializers.add(value)


def _counted(events: Sequence[Event]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for event in events:
        counts[event.reason] = counts.get(event.reason, 0) + 1
    return counts


def _compared(folder: Path, stage: Path, model: ir.Model, data: object) -> tuple[tuple[verify.Fidelity, ...], str]:
    """How close the outputs of both folders are on a few samples.

    Raises:
        GraphError: they are too far apart for another rounding to be the cause.
    """
    tokenizer = folder / "tokenizer.json"
    samples = calibrate.calibration_from(
        data,
        model,
        tokenizer_file=tokenizer if tokenizer.is_file() else None,
        samples=SAMPLES,
        max_length=min(TOKENS, position_limit(folder) or TOKENS),
    )
    feeds: list[Feed] = samples.head(SAMPLES)
    before, after, names = Session(folder / artifact.MODEL), Session(stage / artifact.MODEL), result_names(model)
    expected = ({name: given[name] for name in names} for given in map(before.run, feeds))
    outputs = tuple(verify.fidelity(expected, after, feeds))
    worst = min(outputs, key=lambda entry: entry.mean_cosine, default=None)
    if worst is not None and not worst.mean_cosine >= LEAST_COSINE:
        raise GraphError(
            f"fused, its output {worst.name} has a cosine of {worst.mean_cosine:.4f} with what it was",
            where=str(folder),
            remedy="serve the folder as it is, and report the model to scalefold",
        )
    return outputs, f"{len(feeds)} samples of {samples.origin}"


def _record(record: dict[str, Any], report: FuseReport, kernels: Sequence[verify.LayerKernel]) -> dict[str, Any]:
    """The record of the folder that was fused, with its layers as they are now."""
    content = asdict(report)
    for name in ("output", "load_seconds"):
        del content[name]
    known = {layer["name"]: layer.get("sqnr_db") for layer in record.get("layers", [])}
    layers = [
        {"name": entry.name, "shape": entry.shape, "kernel": entry.kernel, "integer": entry.integer,
         "sqnr_db": known.get(entry.name), "activation": entry.activation}
        for entry in kernels
    ]  # fmt: skip
    return {**record, "layers": layers, "bytes": report.bytes, "fused": content}
