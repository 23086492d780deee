"""onnxruntime sessions over in-memory graphs, without a second copy of the weights."""

from __future__ import annotations

import ctypes
import gc
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import NameFixPass

from scalefold.compiler import graph, kernel_library
from scalefold.compiler.errors import CalibrationError, GraphError, ScalefoldError

Array = npt.NDArray[Any]
Feed = Mapping[str, Array]

NUMPY_TYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8,
}  # fmt: skip
"""The numbers of an input of each type that sessions name."""

INLINE_BYTES = 1024
"""Initializers larger than this are handed to onnxruntime by reference instead of through protobuf."""


@dataclass(frozen=True)
class Message:
    """A model as protobuf.

    Attributes:
        content: the message.
        folder: where its external data is.
    """

    content: bytes
    folder: Path


class Session:
    """An onnxruntime session whose outputs come back by name.

    Args:
        source: a graph, the path of a model file, or what such a file holds.
        outputs: names of extra values of the graph to return; all of the graph's own outputs when None.
        optimize: False runs the graph as it is written, without onnxruntime's fusions.
        threads: intra-op threads; 0 lets onnxruntime choose.
        lean: reads weights where they lie instead of packing a copy; slower, for a few runs of a big model.
        quiet: see `session_options`.
    """

    def __init__(
        self,
        source: ir.Model | Path | Message,
        *,
        outputs: Sequence[str] | None = None,
        optimize: bool = True,
        threads: int = 0,
        lean: bool = False,
        quiet: bool = True,
    ) -> None:
        options = session_options(optimize=optimize, threads=threads, quiet=quiet)
        if lean:
            options.add_session_config_entry("session.disable_prepacking", "1")
        _register(options, source)
        with faults_become(partial(_cannot_load, source if isinstance(source, Path) else "the graph")):
            if isinstance(source, Path):
                self._session = onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
            else:
                arrays: dict[str, Array] = {}
                folder: Path | None
                if isinstance(source, Message):
                    payload, folder = source.content, source.folder
                else:
                    payload, arrays, folder = serialize(source, outputs)
                if folder is not None:
                    options.add_session_config_entry(
                        "session.model_external_initializers_file_folder_path", str(folder)
                    )
                if arrays:  # onnxruntime copies what it needs while it opens the session
                    values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
                    options.add_external_initializers(list(arrays), values)
                self._session = onnxruntime.InferenceSession(payload, options, providers=["CPUExecutionProvider"])
        self.inputs: dict[str, str] = {entry.name: entry.type for entry in self._session.get_inputs()}
        self.outputs: list[str] = (
            list(outputs) if outputs is not None else [entry.name for entry in self._session.get_outputs()]
        )

    def run(self, feed: Feed) -> dict[str, Array]:
        """Run one feed; inputs that the graph does not take are left out.

        What holds no numbers, an empty cache, fits whatever type the graph keeps its cache in.

        Raises:
            CalibrationError: it has not all the inputs that the graph needs, or does not fit them.
        """
        missing = [name for name, kind in self.inputs.items() if name not in feed and not kind.startswith("optional")]
        if missing:
            raise _cannot_run(f"it has no {', '.join(missing[:3])}")
        feeds = {name: _typed(feed[name], kind) for name, kind in self.inputs.items() if name in feed}
        with faults_become(_cannot_run):
            return dict(zip(self.outputs, self._session.run(self.outputs, feeds), strict=True))


def _register(options: onnxruntime.SessionOptions, source: ir.Model | Path | Message) -> None:
    """Make scalefold's own operators known where they are needed: the library lies beside a file, or is built."""
    if isinstance(source, ir.Model):
        if kernel_library.DOMAIN in source.graph.opset_imports:
            kernel_library.register(options)
    else:
        kernel_library.register_beside(options, source.parent if isinstance(source, Path) else source.folder)


def _typed(array: Array, kind: str) -> Array:
    """An array without numbers in the type of an input, any other as it is."""
    return array if array.size or kind not in NUMPY_TYPES else array.astype(NUMPY_TYPES[kind], copy=False)


def session_options(*, optimize: bool = True, threads: int = 0, quiet: bool = True) -> onnxruntime.SessionOptions:
    """Options of a session that runs now and then.

    Args:
        optimize: False runs a graph as it is written.
        threads: intra-op threads; 0 lets onnxruntime choose.
        quiet: whether threads do not spin between nodes, and memory is given back after a run. False is onnxruntime's
            default, the quicker one: a step of a decoder is hundreds of nodes of microseconds, and the pages of a
            prompt's logits take as long to get as a tenth of the run.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if quiet:
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def serialize(model: ir.Model, outputs: Sequence[str] | None = None) -> tuple[bytes, dict[str, Array], Path | None]:
    """A model as protobuf bytes that leave large initializers out.

    Args:
        model: left as it was.
        outputs: names of the values that become the graph's outputs; the graph's own when None. What they do not need
            is left out.

    Returns:
        the bytes, the arrays of large initializers in memory by name, and the folder of those that stay on disk.
    """
    if outputs is not None:
        work = ir.convenience.extract(model.graph, list(model.graph.inputs), list(outputs))
        copy = ir.Model(work, ir_version=model.ir_version, functions=list(model.functions.values()))
    else:
        copy = model.clone()
    NameFixPass()(copy)
    arrays: dict[str, Array] = {}
    folder: Path | None = None
    for name, value in copy.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        inline = tensor.nbytes <= INLINE_BYTES or tensor.dtype.bitwidth < 8 or tensor.dtype == ir.DataType.BFLOAT16
        if inline and not isinstance(tensor, ir.ExternalTensor):  # onnxruntime takes no such arrays from numpy
            continue
        if isinstance(tensor, ir.ExternalTensor):
            path = Path(tensor.path).resolve()
            folder = folder or path.parent
            if path.parent == folder:
                # onnxruntime maps the file itself, and holds no copy of what it packs anew; it follows no link out of
                # the folder, and the cache of Hugging Face is made of links
                value.const_value = ir.ExternalTensor(
                    path.name,
                    tensor.offset,
                    tensor.length,
                    tensor.dtype,
                    shape=tensor.shape,
                    name=name,
                    base_dir=folder,
                )
                continue
        arrays[name] = np.asarray(tensor.numpy())
        value.const_value = ir.ExternalTensor(
            "by-reference", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.numpy().shape), name=name
        )
    proto = ir.to_proto(copy)
    assert isinstance(proto, onnx.ModelProto)
    return proto.SerializeToString(), arrays, folder


def optimized_graph(path: Path) -> ir.Model:
    """The graph that onnxruntime makes of a model file at its default settings, on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimized.onnx"
        options = session_options()
        _register(options, path)
        options.optimized_model_filepath = str(target)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "optimized.onnx.data"
        )
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        with faults_become(partial(_cannot_load, path)):
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        # Weights are not read: only the structure matters here, and the folder goes away.
        return ir.from_proto(onnx.load(str(target), load_external_data=False))


def give_back_memory() -> None:
    """Give back memory that nothing holds: graphs are full of cycles, and glibc keeps what is freed to itself."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def inputs_of(model: ir.Model) -> dict[str, ir.Value]:
    """The inputs that a caller must feed, by name."""
    return {value.name or "": value for value in model.graph.inputs if not value.is_initializer()}


def unsupported_ops(model: ir.Model) -> list[str]:
    """Domain-qualified op types that belong to no operator set known to onnx or onnxruntime."""
    known = {"", "ai.onnx", "ai.onnx.ml", graph.MICROSOFT, kernel_library.DOMAIN}
    functions = {(key[0], key[1]) for key in model.functions}
    return sorted(
        {
            f"{node.domain}::{node.op_type}"
            for node in model.graph
            if node.domain not in known and (node.domain, node.op_type) not in functions
        }
    )


@contextmanager
def faults_become(error_of: Callable[[str], ScalefoldError]) -> Iterator[None]:
    """Turn what onnxruntime raises into an error of ours; what others raise passes.

    Each of its status codes has a private class, and those have no common one.

    Args:
        error_of: given what onnxruntime said, in one line.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise error_of(" ".join(str(error).split())[:300].rstrip(". ")) from error


def _cannot_load(where: Path | str, said: str) -> GraphError:
    return GraphError(
        f"onnxruntime {onnxruntime.__version__} cannot load the graph ({said})",
        where=str(where),
        remedy="check that its operators and opset are ones this onnxruntime has",
    )


def _cannot_run(said: str) -> CalibrationError:
    return CalibrationError(
        f"onnxruntime cannot run the model on it ({said})",
        where="a sample",
        remedy="check that its token ids, shapes and types are ones the model takes",
    )
