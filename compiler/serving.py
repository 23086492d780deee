"""Adapters: what a task changes in a compiled model, and sessions that apply it.

per session   `load(base, adapter)`: constants are replaced before onnxruntime sees the graph, which folds them as always
per request   `AdapterSession(base)`: the scales are inputs with defaults, and each request names its adapter

Constants are replaced in the graph that is handed over, not by SessionOptions.add_initializer: what onnxruntime folds at
load, the alphas, it folds from the file, and the replacement is silently ignored.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from scalefold.compiler.artifact import DATA, MODEL, write_json
from scalefold.compiler.errors import OutputError, SourceError, needing_packages
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.kernel_library import LIBRARY, register_beside
from scalefold.compiler.runtime import Array, Feed, session_options
from scalefold.compiler.tunable_weights import tunable_weights

ADAPTER = "adapter.safetensors"
RECORD = "adapter.json"
SCALES = "scales.onnx_adapter"
OVERRIDABLE = "model.overridable.onnx"
FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class Adapter:
    """What a task changes in a compiled model.

    Attributes:
        base: digest of the model it belongs to.
        arrays: new values of the model's constants, by name; of a float constant, float16 factors stand for them.
        record: the rest of adapter.json: task, settings and figures.
        scales: the file of onnxruntime's own format, where only scales were tuned.
    """

    base: str
    arrays: Mapping[str, Array]
    record: Mapping[str, Any]
    scales: Path | None = None


def base_digest(base: Path) -> str:
    """SHA-256 of a compiled model: the graph and its data."""
    digest = hashlib.sha256()
    for name in (MODEL, DATA):
        path = base / name
        if path.is_file():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def write_adapter(folder: Path, arrays: Mapping[str, Array], record: Mapping[str, Any], *, scales_only: bool) -> None:
    """Write adapter.safetensors and adapter.json and, where scales alone were tuned, scales.onnx_adapter.

    Raises:
        OutputError: one of them cannot be written.
    """
    try:
        _write_arrays(folder, arrays, scales_only=scales_only)
    except OSError:
        raise  # whoever made the folder says what it is for
    except Exception as error:  # of safetensors' own class, or a bare RuntimeError of onnxruntime
        raise OutputError(
            f"it cannot be written ({' '.join(str(error).split())[:200]})",
            where=str(folder),
            remedy="free some space or give another folder",
        ) from error
    write_json(folder / RECORD, record)


def _write_arrays(folder: Path, arrays: Mapping[str, Array], *, scales_only: bool) -> None:
    _safetensors().save_file({name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}, folder / ADAPTER)
    if scales_only and arrays:
        native = onnxruntime.AdapterFormat()
        native.set_adapter_version(1)
        native.set_model_version(1)
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(arrays[name]) for name in sorted(arrays)}
        native.set_parameters(values)
        native.export_adapter(str(folder / SCALES))


def _unreadable(folder: Path, files: str, error: Exception) -> OutputError:
    return OutputError(
        f"there is no readable {files} in it ({' '.join(str(error).split())[:200]})",
        where=str(folder),
        remedy="give a folder that `scalefold tune` wrote",
    )


def read_adapter(folder: Path) -> Adapter:
    """Read a folder that `scalefold tune` wrote.

    Raises:
        OutputError: it is none.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        base, arrays = str(record["base"]), _safetensors().load_file(folder / ADAPTER)
    except SourceError:
        raise
    except Exception as error:  # safetensors raises a class of its own
        raise _unreadable(folder, f"{ADAPTER} and {RECORD}", error) from error
    native = folder / SCALES
    return Adapter(base, arrays, record, native if native.is_file() else None)


def load(
    base: str | Path, adapter: str | Path | None = None, *, options: onnxruntime.SessionOptions | None = None
) -> onnxruntime.InferenceSession:
    """A session of a compiled model as an adapter changes it; the same kernels at the same speed.

    Args:
        base: the compiled folder, or a fused one.
        adapter: a folder that `scalefold tune` wrote; None for the model as it is.
        options: of onnxruntime; a fused folder's library has to be registered in them. None registers it.

    Raises:
        SourceError: the folder holds no model, or the adapter belongs to another one.
        OutputError: the adapter cannot be read.
    """
    arrays = {} if adapter is None else _of_base(Path(adapter), Path(base)).arrays
    return load_with(Path(base), arrays, options=options)


def load_with(
    base: Path, arrays: Mapping[str, Array], *, options: onnxruntime.SessionOptions | None = None
) -> onnxruntime.InferenceSession:
    """A session of a compiled model some of whose constants have other values, or float16 factors of theirs.

    Raises:
        SourceError: the folder holds no model, or one without such constants.
    """
    model = _open(base)
    _override(model, arrays)
    return _session(model, base, options)


def _override(model: ir.Model, arrays: Mapping[str, Array]) -> None:
    for name, array in arrays.items():
        value = model.graph.initializers.get(name)
        tensor = None if value is None else value.const_value
        factors = array.dtype == np.float16 and tensor is not None and tensor.dtype == ir.DataType.FLOAT
        fits = tensor is not None and tuple(tensor.shape) == array.shape
        if value is None or tensor is None or not fits or not (factors or tensor.dtype.numpy() == array.dtype):
            raise SourceError(
                f"the model has no constant {name} of the type {array.dtype} and shape {list(array.shape)}",
                where="the adapter",
                remedy="tune the model again",
            )
        value.const_value = ir.tensor(tensor.numpy() * array.astype(np.float32) if factors else array, name=name)


class AdapterSession:
    """One session for many tasks: the scales are inputs with defaults, and a request names its adapter.

    Args:
        base: the compiled folder.
        options: of onnxruntime.

    Raises:
        SourceError: the folder holds no model, or one without scales to tune.
    """

    def __init__(self, base: str | Path, *, options: onnxruntime.SessionOptions | None = None) -> None:
        self._base = Path(base)
        self._adapters: dict[str, onnxruntime.LoraAdapter | None] = {}
        self.session = _session(_overridable(self._base), self._base, options)

    def add(self, name: str, adapter: str | Path) -> None:
        """Make an adapter known under a name.

        Raises:
            SourceError: it belongs to another model, or holds more than scales.
            OutputError: it cannot be read.
        """
        found = _of_base(Path(adapter), self._base)
        if found.arrays and found.scales is None:
            raise SourceError(
                "it holds alphas or codebooks, which onnxruntime folds into the weights when it loads the model",
                where=str(adapter),
                remedy="open a session of its own with scalefold.compiler.load, or tune with --train scales",
            )
        native: onnxruntime.LoraAdapter | None = None
        if found.scales is not None:
            native = onnxruntime.LoraAdapter()
            try:
                native.Load(str(found.scales))
            except Exception as error:  # onnxruntime raises a bare RuntimeError
                raise _unreadable(Path(adapter), SCALES, error) from error
        self._adapters[name] = native

    def run(self, outputs: Sequence[str] | None, feed: Feed, adapter: str | None = None) -> list[Array]:
        """Run one request; without an adapter the model is as it was compiled.

        Raises:
            SourceError: no adapter of that name is known.
        """
        if adapter is not None and adapter not in self._adapters:
            raise SourceError("no adapter of that name was added", where=adapter, remedy="add it first")
        active = None if adapter is None else self._adapters[adapter]
        settings = onnxruntime.RunOptions()
        if active is not None:
            settings.add_active_adapter(active)
        found: list[Array] = self.session.run(None if outputs is None else list(outputs), dict(feed), settings)
        return found


def write_overridable(base: str | Path) -> Path:
    """Write `model.overridable.onnx` beside the model: the same graph over the same data, its scales inputs with defaults.

    For servers of other languages; `RunOptions` of onnxruntime take `scales.onnx_adapter` there too.

    Raises:
        SourceError: the folder holds no model, or one without scales to tune.
    """
    path = Path(base) / OVERRIDABLE
    path.write_bytes(_bytes(_overridable(Path(base))))
    return path


def _overridable(base: Path) -> ir.Model:
    model = _open(base)
    weights = tunable_weights(model)
    if not weights:
        fused = (base / LIBRARY).is_file()
        raise SourceError(
            "it has no scales to tune: no linear layer of it is quantized per column, its embeddings apart",
            where=str(base),
            remedy="give the folder it was fused from"
            if fused
            else "compile it with a recipe that quantizes its linear layers",
        )
    for weight in weights:
        model.graph.inputs.extend([weight.scales, *weight.sums])
    return model


def _open(base: Path) -> ir.Model:
    if not (base / MODEL).is_file():
        raise SourceError(f"there is no {MODEL} in it", where=str(base), remedy="give a compiled folder")
    return read_onnx(base / MODEL)


def _of_base(folder: Path, base: Path) -> Adapter:
    adapter = read_adapter(folder)
    if adapter.base != base_digest(base):
        raise SourceError(
            f"it was tuned on another model than {base}", where=str(folder), remedy="give the base it was tuned on"
        )
    return adapter


def _session(model: ir.Model, base: Path, options: onnxruntime.SessionOptions | None) -> onnxruntime.InferenceSession:
    chosen = session_options() if options is None else options
    if options is None:
        register_beside(chosen, base)  # onnxruntime refuses options in which a library is registered twice
    chosen.add_session_config_entry(FOLDER, str(base.absolute()))
    return onnxruntime.InferenceSession(_bytes(model), chosen, providers=["CPUExecutionProvider"])


def _bytes(model: ir.Model) -> bytes:
    """The graph alone; large constants stay in the base's data file."""
    proto = ir.to_proto(model)
    assert isinstance(proto, onnx.ModelProto)
    return bytes(proto.SerializeToString())


def _safetensors() -> Any:
    with needing_packages("reading and writing adapters", "pip install safetensors, or 'scalefold[hf]'"):
        return importlib.import_module("safetensors.numpy")
