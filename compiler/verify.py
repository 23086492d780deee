"""Proof of what came out: which kernel each layer got, and how close the numbers are."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from scalefold.compiler import graph, saturation
from scalefold.compiler.calibrate import padding_mask, rows_of
from scalefold.compiler.errors import KernelError
from scalefold.compiler.facts import restored_rows, weight_array, weight_dequantizer
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.protocol import select
from scalefold.compiler.runtime import Array, Feed, Session, optimized_graph

INTEGER_KERNELS = frozenset(
    {"MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulNBits"}
)
LINEAR_OPS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", *sorted(INTEGER_KERNELS))
Activation = Literal["per-tensor", "per-token", "float"]
WEIGHT_INPUT = {"QLinearMatMul": 3, "QGemm": 3}
"""Which input of a kernel is the weight, where it is not the second."""


@dataclass(frozen=True)
class LayerKernel:
    """What one linear layer became.

    Attributes:
        name: the layer.
        shape: (K, N) of its weight.
        planned: whether the written graph has it quantized.
        kernel: the operator onnxruntime runs it with; `none` when it was not found.
        integer: whether that is a fast integer kernel.
        reason: why it missed one; empty when it did not.
        remedy: what to do about that.
        activation: what has a scale of its own in the layer's input: the tensor, each token, or nothing.
    """

    name: str
    shape: tuple[int, int]
    planned: bool
    kernel: str
    integer: bool
    reason: str = ""
    remedy: str = ""
    activation: Activation = "per-tensor"


@dataclass(frozen=True)
class Fidelity:
    """How close one output is to the float model's, over held-out feeds.

    Attributes:
        name: the output.
        mean_cosine: mean over tokens (rows of the last axis) of the cosine.
        min_cosine: the smallest of them.
        max_error: largest absolute difference.
        sqnr_db: 10 log10 of signal power over error power.
    """

    name: str
    mean_cosine: float
    min_cosine: float
    max_error: float
    sqnr_db: float


def layer_kernels(path: Path, *, weight_only: bool = False) -> list[LayerKernel]:
    """The kernel that every linear layer of a model file gets from onnxruntime on this machine.

    Loads the file with onnxruntime at its default settings, reads the graph it optimises it to, and follows each weight.

    Args:
        path: the file.
        weight_only: whether activations are float on purpose: then a kernel that rounds them itself is no miss.
    """
    written = read_onnx(path)
    ShapeInferencePass()(written)
    optimized = optimized_graph(path)
    by_weight = _kernels_by_weight(optimized)
    kernels = []
    for node in graph.nodes(written, *LINEAR_OPS):
        weight, codes = _weight_of(node)
        if weight is None:
            continue
        shape = _shape_of(node, weight)
        if len(shape) != 2 or graph.consumers(weight)[0].op_type in ("Gather",):
            continue
        found = _of_layer(by_weight.get(weight.name or "", []), node) or _by_node_name(optimized, node)
        kernel = found.op_type if found is not None else "none"
        obstacle = _diagnose(node) if codes else None
        misses = (_INT8_ACTIVATION,) if weight_only else (_INT8_ACTIVATION, _FLOAT_ACTIVATION)
        integer = kernel in INTEGER_KERNELS and obstacle not in misses
        reason, remedy = ("", "") if integer or not codes else obstacle or _unknown(kernel)
        size, activation = (shape[0], shape[1]), _activation_of(node)
        kernels.append(
            LayerKernel(node.name or weight.name or "", size, codes, kernel, integer, reason, remedy, activation)
        )
    return kernels


def rounds_rows(kernels: Sequence[LayerKernel]) -> bool:
    """Whether any layer's input is rounded by what is in each row: per token, or by a kernel in blocks."""
    return any(entry.activation == "per-token" or entry.kernel == "MatMulNBits" for entry in kernels)


def quantized_layers(model: ir.Model) -> list[str]:
    """The names of the layers whose weights are integer codes in the written graph."""
    return [node.name or "" for node in graph.nodes(model, *LINEAR_OPS) if _weight_of(node)[1]]


def require_integer_kernels(kernels: Sequence[LayerKernel], allow_float: Sequence[str] = ()) -> None:
    """Raise unless every layer that is planned as an integer product became one, or is allowed to be float.

    Raises:
        KernelError: names the first such layer, why it missed, and what to do; counts the others.
        PatternError: a pattern matches no layer.
    """
    allowed = select(allow_float, [kernel.name for kernel in kernels], what="allow-float")
    missed = [kernel for kernel in kernels if kernel.planned and not kernel.integer and kernel.name not in allowed]
    if missed:
        first, more = missed[0], f" (and {len(missed) - 1} other layers)" if len(missed) > 1 else ""
        raise KernelError(
            f"onnxruntime runs it as {first.kernel}, not as an integer kernel, because {first.reason}{more}",
            where=f"layer {first.name}",
            remedy=f"{first.remedy}, or accept it with --allow-float '{re.escape(first.name)}'",
        )


def _weight_of(node: ir.Node) -> tuple[ir.Value | None, bool]:
    """The constant that holds a layer's weight, and whether it is integer codes."""
    value = node.inputs[WEIGHT_INPUT.get(node.op_type, 1)]
    dequantize = weight_dequantizer(node) if node.op_type in ("MatMul", "Gemm", "FusedMatMul") else None
    if dequantize is not None:
        return dequantize.inputs[0], True
    array = weight_array(value)
    if value is None or (array is None and not value.is_initializer()):
        return None, False
    return value, array is not None and array.dtype != np.float32


def _shape_of(node: ir.Node, weight: ir.Value) -> tuple[int, ...]:
    if node.op_type == "MatMulNBits":
        return int(str(graph.attribute(node, "K"))), int(str(graph.attribute(node, "N")))
    array = weight_array(weight)
    return graph.whole_shape(weight) if array is None else array.shape


def _activation_of(node: ir.Node) -> Activation:
    if restored_rows(node) is not None:
        return "per-token"
    quantized = node.op_type in INTEGER_KERNELS - {"MatMulNBits"} or (
        graph.producer(node.inputs[0], "DequantizeLinear") is not None
    )
    return "per-tensor" if quantized else "float"


def _kernels_by_weight(optimized: ir.Model) -> dict[str, list[ir.Node]]:
    """For each weight's name the linear operators that read it, directly or through a DequantizeLinear, in order."""
    found: dict[str, list[ir.Node]] = {}
    for node in graph.nodes(optimized, *LINEAR_OPS):
        for value in node.inputs:
            through = graph.producer(value, "DequantizeLinear")
            source = through.inputs[0] if through is not None else value
            if source is not None and source.is_initializer():
                found.setdefault(source.name or "", []).append(node)
    return found


def _of_layer(readers: list[ir.Node], node: ir.Node) -> ir.Node | None:
    """The reader that stands for `node`: layers that share a weight are told apart by name, else by order."""
    if not readers:
        return None
    named = [reader for reader in readers if node.name and node.name in _names(reader)]
    chosen = (named or readers)[0]
    readers.remove(chosen)
    return chosen


def _names(fused: ir.Node) -> tuple[str, ...]:
    """A node's name, and those that onnxruntime has made it up from."""
    name = fused.name or ""
    return name, *name.replace("/", " ").split()


def _by_node_name(optimized: ir.Model, node: ir.Node) -> ir.Node | None:
    """The optimised node of the same name: onnxruntime renames weights it lays out anew."""
    readers = graph.nodes(optimized, *LINEAR_OPS)
    return next((entry for entry in readers if node.name and node.name in _names(entry)), None)


def _diagnose(node: ir.Node) -> tuple[str, str] | None:
    """(reason, remedy) of the first known obstacle to an integer kernel, as the written graph shows it."""
    fused = node.op_type not in ("MatMul", "Gemm")
    if fused:
        zero = node.inputs[4] if node.op_type == "MatMulIntegerToFloat" and len(node.inputs) > 4 else None
        return _INT8_ACTIVATION if _is_int8(node.inputs[0]) or _is_int8(zero) else None
    activation, weight = graph.producer(node.inputs[0], "DequantizeLinear"), weight_dequantizer(node)
    assert weight is not None
    if activation is None:
        moved = graph.producer(node.inputs[0], "Reshape", "Transpose", "Squeeze", "Unsqueeze")
        if moved is not None and graph.producer(moved.inputs[0], "DequantizeLinear") is not None:
            return f"a {moved.op_type} stands between its QDQ pair and the product", "quantize right before the product"
        return _FLOAT_ACTIVATION
    if any(_is_int8(activation.inputs[index]) for index in (0, 2) if index < len(activation.inputs)):
        return _INT8_ACTIVATION
    if weight.inputs[0] is not None and weight.inputs[0].dtype in (ir.DataType.INT4, ir.DataType.UINT4):
        return "its weight is int4 behind an 8-bit activation", "store it as int8 codes"
    if (obstacle := _bias_obstacle(node)) is not None:
        return obstacle
    if len(graph.consumers(weight.outputs[0])) > 1:
        return (
            "its weight's DequantizeLinear is shared with another layer",
            "give each layer a DequantizeLinear of its own",
        )
    return None


def _bias_obstacle(node: ir.Node) -> tuple[str, str] | None:
    add = graph.only_consumer(node.outputs[0], "Add")
    bias = graph.other_input(add, node.outputs[0]) if add is not None else None
    if node.op_type == "Gemm":
        bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return None
    weight = weight_dequantizer(node)
    if graph.producer(bias, "DequantizeLinear") is not None:
        if weight is not None and len(weight.inputs) < 3:
            return "its weight's DequantizeLinear has no zero point, which QGemm needs", "write the zero point 0 out"
        return None
    if not bias.is_initializer():
        return None
    remedy = "quantize its bias to int32 with scale = activation scale x weight scale, or use --target onnxruntime-cpu"
    if node.op_type == "Gemm" or graph.rank(node.inputs[0]) == 2:
        return (
            "it is a two-dimensional product with a float bias, which onnxruntime fuses to a float Gemm first",
            remedy,
        )
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is not None and all(isinstance(size, int) for size in shape):
        return "its shapes are static and its bias is float, which onnxruntime fuses to a float Gemm first", remedy
    return None


def _is_int8(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.INT8


_FLOAT_ACTIVATION = ("its activation is not quantized", "quantize its input, or exclude it from the recipe")
_INT8_ACTIVATION = (
    "of its int8 activation, for which onnxruntime only has a reference kernel slower than float",
    "quantize activations to uint8",
)


def _unknown(kernel: str) -> tuple[str, str]:
    return (
        f"onnxruntime's optimizer chose {kernel} for a reason scalefold does not know",
        "compare versions of onnxruntime",
    )


def fidelity(expected: Session, actual: Session, feeds: Iterable[Feed]) -> list[Fidelity]:
    """Compare the float outputs of two models over feeds, padding left out; one feed's outputs are held at a time."""
    sums: dict[str, _Sums] = {}
    for feed in feeds:
        mask = padding_mask(feed)
        wanted, got = expected.run(feed), actual.run(feed)
        for name in wanted:
            if name in got and got[name].dtype.kind == "f":
                sums.setdefault(name, _Sums()).add(rows_of(wanted[name], mask), rows_of(got[name], mask))
    return [entry.fidelity(name) for name, entry in sums.items()]


class _Sums:
    """What `Fidelity` is made of, gathered feed by feed."""

    def __init__(self) -> None:
        self._cosines: list[Array] = []
        self._largest = self._noise = self._signal = 0.0

    def add(self, wanted: Array, got: Array) -> None:
        """Take in rows [tokens, channels]."""
        norms = np.linalg.norm(wanted, axis=-1) * np.linalg.norm(got, axis=-1)
        self._cosines.append(np.einsum("tc,tc->t", wanted, got) / np.maximum(norms, 1e-30))
        difference = wanted - got
        self._largest = max(self._largest, float(np.abs(difference).max(initial=0)))
        self._noise += float(np.einsum("tc,tc->t", difference, difference).sum(dtype=np.float64))
        self._signal += float(np.einsum("tc,tc->t", wanted, wanted).sum(dtype=np.float64))

    def fidelity(self, name: str) -> Fidelity:
        """The figures over all rows."""
        cosines = np.concatenate(self._cosines)
        decibels = _decibels(self._signal, self._noise)
        return Fidelity(name, float(cosines.mean()), float(cosines.min()), self._largest, decibels)


def sqnr(wanted: Array, got: Array) -> float:
    """Signal to quantization noise ratio in dB; 200 for equal arrays."""
    noise = float(np.square(wanted - got, dtype=np.float64).sum())
    signal = float(np.square(wanted, dtype=np.float64).sum())
    return _decibels(signal, noise)


def _decibels(signal: float, noise: float) -> float:
    return 200.0 if noise == 0 else min(200.0, 10 * float(np.log10(max(signal, 1e-30) / noise)))


def layer_sqnr(original: ir.Model, quantized: ir.Model, feeds: Sequence[Feed]) -> dict[str, float]:
    """SQNR in dB of every linear layer's output in a graph of QDQ form against the float graph.

    Values are matched by name, which the passes up to the QDQ form keep.
    """
    outputs = {
        matmul.name or "": _layer_output(matmul)
        for matmul in graph.nodes(quantized, "MatMul")
        if weight_dequantizer(matmul) is not None
    }
    known = {out.name for node in original.graph for out in node.outputs}
    outputs = {layer: value for layer, value in outputs.items() if value in known}
    if not outputs:
        return {}
    names = sorted(set(outputs.values()))
    expected, actual = Session(original, outputs=names, lean=True), Session(quantized, outputs=names, lean=True)
    signal, noise = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for feed in feeds:
        mask = padding_mask(feed)
        wanted, got = expected.run(feed), actual.run(feed)
        for name in names:
            reference = rows_of(wanted[name], mask)
            signal[name] += float(np.square(reference, dtype=np.float64).sum())
            noise[name] += float(np.square(rows_of(got[name], mask) - reference, dtype=np.float64).sum())
    return {layer: _decibels(signal[value], noise[value]) for layer, value in outputs.items()}


def _layer_output(matmul: ir.Node) -> str:
    out = (restored_rows(matmul) or matmul).outputs[0]
    add = graph.only_consumer(out, "Add")
    bias = graph.other_input(add, out) if add is not None else None
    last = add.outputs[0] if add is not None and bias is not None and bias.is_initializer() else out
    return last.name or ""


def saturating_layers(model: ir.Model) -> list[str]:
    """The layers whose codes could saturate a 16-bit accumulator on CPUs without VNNI, by the constant codes alone."""
    found = []
    for node in graph.nodes(model, *LINEAR_OPS):
        weight, codes = _weight_of(node)
        array = weight_array(weight) if codes else None
        if (
            array is not None
            and array.dtype == np.int8
            and array.ndim == 2
            and saturation.can_saturate(array.astype(np.int8))
        ):
            found.append(node.name or "")
    return found


def load_seconds(path: Path) -> float:
    """Seconds that onnxruntime takes to open a model file, once."""
    start = time.perf_counter()
    Session(path)
    return time.perf_counter() - start
