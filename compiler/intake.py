"""From an ONNX file of any origin to a graph that the passes can read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx import version_converter
from onnx_ir.passes.common import (
    InlinePass,
    LiftConstantsToInitializersPass,
    RemoveInitializersFromInputsPass,
    ShapeInferencePass,
)

from scalefold.compiler import graph
from scalefold.compiler.errors import GraphError, SourceError

OLDEST_OPSET = 17
"""LayerNormalization exists from here on; a file that is older and cannot be converted is refused."""

MODERN_OPSET = 20
"""What older files are converted to: it has Gelu, and later opsets only add to it what passes here use."""

LARGE = 4096
"""Initializers with more bytes are kept out of constant folding: nothing is gained, and they are not copied."""


def read_onnx(path: Path) -> ir.Model:
    """Read an ONNX file; weights in external data stay on disk until read.

    Raises:
        SourceError: no such file, not ONNX, cut short, or its external data is missing or too short.
    """
    if not path.is_file():
        raise SourceError("there is no such file", where=str(path), remedy="check the path")
    try:
        model = ir.load(path)
    except OSError as error:
        raise SourceError(
            f"it cannot be read ({error.strerror or error})",
            where=str(path),
            remedy="check its permissions and its disk",
        ) from error
    except (DecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _not_onnx(path) from error
    if not len(model.graph) or not model.graph.outputs:
        raise _not_onnx(path)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            data = Path(tensor.path)
            end = (tensor.offset or 0) + (tensor.length if tensor.length is not None else tensor.nbytes)
            if not data.is_file() or data.stat().st_size < end:
                found = "is missing" if not data.is_file() else "is cut short"
                raise SourceError(
                    f"its external data file {data.name} {found}",
                    where=str(path),
                    remedy=f"put the whole {data.name} into {data.parent}",
                )
    return model


def clean(model: ir.Model, where: str) -> ir.Model:
    """Bring a foreign graph into shape: functions inlined, a recent opset, constants folded, dead nodes gone.

    onnx-graphsurgeon folds and cleans; large weights wait outside, so that it neither copies nor folds them. It drops the
    metadata of nodes, which is put back by node name.

    Raises:
        GraphError: the opset is too old to be converted, or folding fails.
    """
    InlinePass()(model)
    LiftConstantsToInitializersPass()(model)
    RemoveInitializersFromInputsPass()(model)
    for node in graph.nodes(model, "Identity"):  # TorchScript shares parameters so
        source, out = node.inputs[0], node.outputs[0]
        if source is not None and source.is_initializer() and not out.is_graph_output():
            graph.bypass(out, source)
    hollow, large = _without_large(model)
    metadata = {node.name: dict(node.metadata_props) for node in model.graph if node.name and node.metadata_props}
    proto = _modern(ir.to_proto(hollow), where)
    try:
        surgeon = gs.import_onnx(proto)
        surgeon.fold_constants(error_ok=True).cleanup(remove_unused_graph_inputs=False).toposort()
        cleaned: ir.Model = ir.from_proto(gs.export_onnx(surgeon))
    except Exception as error:  # graphsurgeon lets errors of any kind through
        raise GraphError(
            f"onnx-graphsurgeon cannot clean the graph up ({' '.join(str(error).split())[:200]})",
            where=where,
            remedy="check it with onnx.checker, or simplify it with its exporter's own optimizer",
        ) from error
    ShapeInferencePass()(cleaned)
    _put_back(cleaned, large)
    for node in cleaned.graph:
        node.metadata_props.update(metadata.get(node.name or "", {}))
    return cleaned


def _not_onnx(path: Path) -> SourceError:
    return SourceError(
        "it is not an ONNX model, or it is cut short", where=str(path), remedy="export or download it again"
    )


def _without_large(model: ir.Model) -> tuple[ir.Model, dict[str, ir.TensorProtocol]]:
    """A copy whose large initializers are inputs, and those initializers' tensors by name."""
    copy = model.clone()
    large: dict[str, ir.TensorProtocol] = {}
    for name, value in list(copy.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > LARGE:
            large[name] = tensor
            del copy.graph.initializers[name]
            value.const_value = None
            copy.graph.inputs.append(value)
        elif isinstance(tensor, ir.ExternalTensor):  # protobuf would keep the file's name and forget its folder
            value.const_value = ir.tensor(np.array(tensor.numpy()), name=name)
    return copy, large


def _put_back(model: ir.Model, large: dict[str, ir.TensorProtocol]) -> None:
    for value in [entry for entry in model.graph.inputs if entry.name in large]:
        model.graph.inputs.remove(value)
        if value.uses():
            value.const_value = large[value.name or ""]
            model.graph.register_initializer(value)


def _modern(proto: onnx.ModelProto, where: str) -> onnx.ModelProto:
    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset >= MODERN_OPSET:
        return proto
    try:
        return version_converter.convert_version(proto, MODERN_OPSET)
    except Exception as error:  # the converter raises RuntimeError and C++ errors of its own
        if opset >= OLDEST_OPSET:
            return proto
        raise GraphError(
            f"opset {opset} is too old and onnx cannot convert it to {MODERN_OPSET}"
            f" ({' '.join(str(error).split())[:200]})",
            where=where,
            remedy=f"export the model again with opset {OLDEST_OPSET} or later",
        ) from error
