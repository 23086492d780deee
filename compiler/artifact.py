"""The output folder: written beside its place and renamed, so that it is there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, NameFixPass, RemoveUnusedOpsetsPass

from scalefold.compiler.errors import OutputError

MODEL = "model.onnx"
DATA = "model.onnx.data"
RECORD = "scalefold.json"
MANIFEST = "export.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(output: Path) -> None:
    """Refuse a place that holds something else.

    Raises:
        OutputError: `output` is a file, or a folder with files in it and no record of ours.
    """
    if output.is_dir() and (not any(output.iterdir()) or (output / RECORD).is_file()):
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
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
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
