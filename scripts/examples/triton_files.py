"""Lay a compiled or fused folder out as a Triton model repository: `triton_files.py FOLDER REPOSITORY NAME`.

    REPOSITORY/NAME/config.pbtxt        inputs, outputs and sizes, read from the graph
    REPOSITORY/NAME/1/model.onnx        copies: onnxruntime and onnx refuse weights behind links that lead elsewhere
    REPOSITORY/NAME/1/model.onnx.data
    REPOSITORY/NAME/1/scalefold_kernels.so    of a fused folder

config.pbtxt names that library, and Triton hands the name to the system's loader as it is: it has to be its path where
the server runs, below `--served-from`, the repository's path there.

KServe's Triton runtime takes the same layout. Tokenizing stays with the client: Triton gets ids and gives tensors.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import onnx_ir as ir

from scalefold.compiler.artifact import DATA, MODEL
from scalefold.compiler.errors import OutputError, ScalefoldError, SourceError
from scalefold.compiler.kernel_library import LIBRARY
from scalefold.compiler.runtime import inputs_of

VERSION = "1"
MAX_BATCH = 64
TYPES = {
    ir.DataType.INT64: "TYPE_INT64",
    ir.DataType.INT32: "TYPE_INT32",
    ir.DataType.FLOAT: "TYPE_FP32",
    ir.DataType.FLOAT16: "TYPE_FP16",
    ir.DataType.UINT8: "TYPE_UINT8",
    ir.DataType.INT8: "TYPE_INT8",
}


def write(
    folder: Path,
    repository: Path,
    name: str,
    *,
    max_batch: int = MAX_BATCH,
    threads: int = 0,
    served_from: Path | None = None,
) -> Path:
    """Write the model's folder of the repository and return its path.

    Args:
        folder: a compiled or fused folder.
        repository: may hold other models.
        name: of the model in requests.
        max_batch: Triton refuses larger batches.
        threads: intra-op threads of onnxruntime; 0 lets it choose.
        served_from: the repository's absolute path where the server runs; the same as here when None.

    Raises:
        SourceError: the folder holds no model.
        OutputError: the repository holds a model of this name.
    """
    if not (folder / MODEL).is_file():
        raise SourceError(f"there is no {MODEL} in it", where=str(folder), remedy="give a compiled folder")
    target = repository / name
    if target.exists():
        raise OutputError("a model of this name is there already", where=str(target), remedy="give another name")
    (target / VERSION).mkdir(parents=True)
    for file in (MODEL, DATA):
        shutil.copyfile(folder / file, target / VERSION / file)
    text = config(ir.load(folder / MODEL), name, max_batch=max_batch, threads=threads)
    if (folder / LIBRARY).is_file():
        shutil.copyfile(folder / LIBRARY, target / VERSION / LIBRARY)
        place = (served_from or repository.absolute()) / name / VERSION / LIBRARY
        text += f'model_operations {{ op_library_filename: "{place}" }}\n'
    (target / "config.pbtxt").write_text(text, encoding="utf-8")
    return target


def config(model: ir.Model, name: str, *, max_batch: int, threads: int) -> str:
    """The content of config.pbtxt; the batch, the first size of every tensor, is left out as Triton wants it."""
    ports = [("input", value) for value in inputs_of(model).values()]
    ports += [("output", value) for value in model.graph.outputs]
    lines = [f'name: "{name}"', 'backend: "onnxruntime"', f"max_batch_size: {max_batch}"]
    lines += [_port(kind, value) for kind, value in ports]
    lines += ["instance_group [ { kind: KIND_CPU count: 1 } ]"]
    if threads:
        lines += [f'parameters {{ key: "intra_op_thread_count" value {{ string_value: "{threads}" }} }}']
    return "\n".join(lines) + "\n"


def _port(kind: str, value: ir.Value) -> str:
    assert value.shape is not None and value.dtype is not None
    sizes = ", ".join(str(size) if str(size).isdigit() else "-1" for size in map(_size, list(value.shape)[1:]))
    return f'{kind} [ {{ name: "{value.name}" data_type: {TYPES[value.dtype]} dims: [ {sizes} ] }} ]'


def _size(size: int | ir.SymbolicDim) -> str:
    """A size as text; the exporter writes some known ones as symbols."""
    return str(size if isinstance(size, int) else size.value)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("repository", type=Path)
    parser.add_argument("name")
    parser.add_argument("--max-batch", type=int, default=MAX_BATCH)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--served-from", type=Path)
    options = parser.parse_args(arguments)
    try:
        print(write(options.folder, options.repository, options.name,
                    max_batch=options.max_batch, threads=options.threads, served_from=options.served_from))  # fmt: skip
    except ScalefoldError as error:
        sys.exit(f"error {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
