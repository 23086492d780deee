"""The output folder: written beside its place and renamed, so that it is there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    NameFixPass,
    RemoveUnusedOpsetsPass,
    ShapeInferencePass,
)

from scalefold.compiler import graph
from scalefold.compiler.decode_chain import leaves, stored_codes
from scalefold.compiler.errors import OutputError
from scalefold.compiler.facts import weight_array, weight_dequantizer
from scalefold.compiler.intake import read_onnx

MODEL = "model.onnx"
DATA = "model.onnx.data"
RECORD = "scalefold.json"
MANIFEST = "export.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(output: Path, *marks: str) -> None:
    """Refuse a place that holds something else.

    Args:
        output: a folder that is to be written.
        marks: the files by which one of ours is known; the record of a compiled model when none is given.

    Raises:
        OutputError: `output` is a file, a folder with files in it and none of these, or the root of a mounted disk.
    """
    if output.is_mount():
        raise OutputError(
            "a disk is mounted there, and a finished folder cannot be moved to its place",
            where=str(output),
            remedy="give a folder below it",
        )
    known = marks or (RECORD,)
    if output.is_dir() and (not any(output.iterdir()) or any((output / name).is_file() for name in known)):
        return
    if output.exists():
        what = "the folder holds other files" if output.is_dir() else "it is not a folder"
        raise OutputError(
            f"{what}, and nothing was written", where=str(output), remedy="give a new folder, or remove this one"
        )


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A scratch folder beside `output`, on the same disk; removed on the way out, whatever happens.

    Raises:
        OutputError: the disk is full, or the place cannot be written to.
    """
    scratch: Path | None = None
    try:
        place = output.resolve()  # a link to a folder stays one
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{place.name}.partial-", dir=place.parent))
        yield scratch
    except OSError as error:
        # numpy writes arrays itself, and says only how much of one went through
        full = error.errno in FULL or (error.errno is None and str(error).endswith(" written"))
        reason = "the disk is full" if full else error.strerror or str(error)
        raise OutputError(
            f"it cannot be written ({reason}), and any earlier output is untouched",
            where=str(output),
            remedy="free some space or give another folder",
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def publish(stage: Path, output: Path) -> None:
    """Put a finished folder in its place; an earlier one is there until the moment the new one is."""
    for path in stage.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    output = output.resolve()
    if not output.exists():
        stage.rename(output)
        return
    retired = stage.with_name(f"{stage.name}-retired")
    try:
        output.rename(retired)
        stage.rename(output)
    except BaseException:  # an interrupt between the two must not cost the user the earlier result
        if retired.exists() and not output.exists():
            retired.rename(output)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def save_model(model: ir.Model, folder: Path) -> None:
    """Write `model.onnx` and, beside it, `model.onnx.data` with all large tensors; the same graph gives the same bytes."""
    ClearMetadataAndDocStringPass()(model)
    NameFixPass()(model)
    RemoveUnusedOpsetsPass()(model)
    ir.save(model, folder / MODEL, external_data=DATA)
    (folder / DATA).touch()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with sorted keys, so that equal content gives equal bytes."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a compiled folder.

    Raises:
        OutputError: there is none, or it is not readable.
    """
    path = folder / RECORD
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(
            f"there is no readable {RECORD} in it",
            where=str(folder),
            remedy="give a folder that `scalefold compile` wrote",
        ) from error
    assert isinstance(content, dict)
    return content


def manifest(model: ir.Model, file: str = MODEL) -> dict[str, Any]:
    """The manifest that `transformers.exporters.ExportedModel.from_pretrained` reads, for a graph from anywhere.

    Inputs are keyword arguments by name; the outputs come back as a dictionary by name.
    """
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}

    def mapping(names: list[str]) -> dict[str, Any]:
        return {"type": "builtins.dict", "context": json.dumps(names), "children_spec": [leaf] * len(names)}

    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    empty = {"type": "builtins.tuple", "context": "null", "children_spec": []}
    arguments = {
        "type": "builtins.tuple",
        "context": "null",
        "children_spec": [empty, mapping([value.name or "" for value in inputs])],
    }
    kwargs = {
        value.name or "": {
            "rank": len(value.shape) if value.shape is not None else 0,
            "dtype": _torch_name(value.dtype),
        }
        for value in inputs
    }
    metadata = {
        "export_dtype": "float32",
        "export_device": "cpu",
        "kwargs": kwargs,
        "in_spec": json.dumps([1, arguments]),
        "out_spec": json.dumps([1, mapping([value.name or "" for value in model.graph.outputs])]),
    }
    return {"schema_version": 1, "export_format": "onnx", "components": {"model": {"file": file, "metadata": metadata}}}


def _torch_name(dtype: ir.DataType | None) -> str:
    names = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.DOUBLE: "float64"}
    return "float32" if dtype is None else names.get(dtype, dtype.name.lower())


def size_of(folder: Path) -> int:
    """Bytes of the model: the graph and its external data."""
    return sum(path.stat().st_size for path in (folder / MODEL, folder / DATA) if path.is_file())


@dataclass(frozen=True)
class Part:
    """What one kind of content takes up in a model file, read from its constants.

    Attributes:
        elements: weights or table entries; 0 where that means nothing.
        code_bytes: bytes of their values or codes.
        overhead_bytes: bytes of scales, codebooks, sub-scales and alphas.
    """

    elements: int = 0
    code_bytes: int = 0
    overhead_bytes: int = 0

    @property
    def bits_per_element(self) -> float:
        """Bits on disk per element, the overhead included."""
        return 8 * (self.code_bytes + self.overhead_bytes) / max(self.elements, 1)

    def plus(self, elements: int, codes: int, overhead: int) -> Part:
        """This part with more in it."""
        return Part(self.elements + elements, self.code_bytes + codes, self.overhead_bytes + overhead)


def parts(folder: Path) -> dict[str, Part]:
    """What the bytes of a compiled model are: `linear`, `embeddings`, `other` constants, and the `graph` itself.

    A table that is tied to an output layer counts as embeddings.
    """
    model = read_onnx(folder / MODEL)
    ShapeInferencePass()(model)
    found = {"linear": Part(), "embeddings": Part(), "other": Part()}
    left = {value: value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value}

    def take(values: Iterable[ir.Value]) -> int:
        return sum(left.pop(value, 0) for value in values)

    rows: set[ir.Value] = set()
    for gather in graph.nodes(model, "Gather"):
        if (is_codes := _looks_up_codes(gather)) is not None and gather.inputs[0] is not None:
            size = take(gather.inputs[:1])  # type: ignore[arg-type]
            end = _decoded_rows(gather)
            fresh = _entries(gather, end) if is_codes and size and end not in rows else 0
            found["embeddings"] = found["embeddings"].plus(fresh, size * is_codes, size * (not is_codes))
            rows.add(end)
    for node in model.graph:
        weight, scales = _weight_of(node)
        if weight is not None:
            codes = take(stored_codes(weight))
            overhead = take([*leaves(weight), *scales])
            found["linear"] = found["linear"].plus(_elements(node, weight) if codes else 0, codes, overhead)
    found["other"] = Part(code_bytes=sum(left.values()))
    return found | {"graph": Part(code_bytes=size_of(folder) - sum(_bytes(part) for part in found.values()))}


def _bytes(part: Part) -> int:
    return part.code_bytes + part.overhead_bytes


def _looks_up_codes(gather: ir.Node) -> bool | None:
    """Whether a Gather looks up rows of values or codes at run time, or what belongs to them; None for other Gathers."""
    table, ids = gather.inputs[:2]
    if table is None or not table.is_initializer() or ids is None or graph.constant(ids) is not None:
        return None
    shape, readers = graph.whole_shape(table), graph.consumers(gather.outputs[0])
    if len(shape) < 2 or graph.attribute(gather, "axis", 0) != 0:
        return None
    if table.dtype == ir.DataType.FLOAT:
        return shape[1] > 1
    return bool(readers) and readers[0].op_type in ("BitShift", "Cast")


def _decoded_rows(gather: ir.Node) -> ir.Value:
    """The float rows that what a Gather looks up ends in."""
    value = gather.outputs[0]
    while value.dtype != ir.DataType.FLOAT and (readers := graph.consumers(value)):
        value = readers[0].outputs[0]
    return value


def _entries(gather: ir.Node, rows: ir.Value) -> int:
    table, width = gather.inputs[0], rows.shape[-1] if rows.shape is not None else None
    return graph.whole_shape(table)[0] * width if table is not None and isinstance(width, int) else 0


def _weight_of(node: ir.Node) -> tuple[ir.Value | None, list[ir.Value]]:
    """The constant weight of a linear layer, or what decodes to it, and its scales and zero points."""
    if node.op_type in ("MatMulIntegerToFloat", "MatMulNBits"):
        places = (3,) if node.op_type == "MatMulIntegerToFloat" else (2, 3)
        found = [node.inputs[place] for place in places if place < len(node.inputs)]
        return node.inputs[1], [entry for entry in found if entry is not None]
    if node.op_type not in ("MatMul", "Gemm"):
        return None, []
    if (dequantize := weight_dequantizer(node)) is not None:
        return dequantize.inputs[0], [entry for entry in dequantize.inputs[1:] if entry is not None]
    weight = node.inputs[1]
    return (weight if weight is not None and weight.is_initializer() and graph.rank(weight) == 2 else None), []


def _elements(node: ir.Node, weight: ir.Value) -> int:
    if node.op_type == "MatMulNBits":
        return int(str(graph.attribute(node, "K"))) * int(str(graph.attribute(node, "N")))
    array = weight_array(weight)
    return 0 if array is None else int(array.size)
