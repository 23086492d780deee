"""Proof of what came out: which kernel each layer got, and how close the numbers are."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from scalefold.compiler import artifact, decode_chain, graph, saturation
from scalefold.compiler.calibrate import padding_mask, rows_of
from scalefold.compiler.decoder import ROWS
from scalefold.compiler.errors import KernelError, SourceError
from scalefold.compiler.facts import (
    completed,
    is_of_second_code,
    restored_rows,
    summed_codes,
    weight_array,
    weight_dequantizer,
)
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.kernel_library import DOMAIN, FLOAT_PRODUCT, PRODUCTS, input_channels
from scalefold.compiler.obstacles import Effect, Obstacle, is_block_product, obstacle_of
from scalefold.compiler.protocol import select
from scalefold.compiler.runtime import Array, Feed, Session, give_back_memory, optimized_graph

INTEGER_KERNELS = frozenset(
    {"MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulNBits"}
    | PRODUCTS
)
LINEAR_OPS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", FLOAT_PRODUCT, *sorted(INTEGER_KERNELS))
Activation = Literal["per-tensor", "two codes", "per-token", "float"]
EFFECTS: dict[Effect, str] = {
    "missed": "not as an integer kernel",
    "slow": "not as a fast integer kernel",
    "wrong": "which gives wrong numbers",
    "fails": "which stops with an error",
}
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
        effect: what comes of the reason, where there is one.
    """

    name: str
    shape: tuple[int, int]
    planned: bool
    kernel: str
    integer: bool
    reason: str = ""
    remedy: str = ""
    activation: Activation = "per-tensor"
    effect: Effect = "missed"


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
    A layer that the record beside the file has as integer is held to that, and so is a table that is looked up quantized.
    The second product of a layer in two codes is listed only where it missed.

    Args:
        path: the file.
        weight_only: whether activations are float on purpose: then a kernel that rounds them itself is no miss.
    """
    written = read_onnx(path)
    optimized = optimized_graph(path)  # refuses what is no valid graph, which would trip up what follows
    ShapeInferencePass()(written)
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
        entry = LayerKernel(
            node.name or weight.name or "",
            (shape[0], shape[1]),
            codes,
            found.op_type if found is not None else "none",
            found is not None and _is_integer(found.op_type, node, weight_only=weight_only),
            activation=_activation_of(node),
        )
        judged = _judged(entry, obstacle_of(node, entry.kernel, weight_only=weight_only)) if codes else entry
        if not (judged.integer and is_of_second_code(node)):  # the product of the first code stands for both
            kernels.append(judged)
    return _held_to_record(kernels, path.parent) + _whole_tables(written, optimized)


def _is_integer(kernel: str, written: ir.Node, *, weight_only: bool) -> bool:
    """Whether a kernel does what was written with integers; MatMulNBits in place of a QDQ pair rounds all over again."""
    if kernel == "MatMulNBits":
        return weight_only or is_block_product(written)
    return kernel in INTEGER_KERNELS


def _judged(entry: LayerKernel, obstacle: Obstacle | None) -> LayerKernel:
    """A quantized layer with what is wrong with it, if anything is."""
    if entry.integer and (obstacle is None or obstacle.effect == "missed"):
        return entry
    found = obstacle or Obstacle(
        f"onnxruntime's optimizer chose {entry.kernel} for a reason scalefold does not know",
        "compare versions of onnxruntime",
    )
    effect = found.effect if entry.integer else "missed"
    return replace(entry, integer=False, reason=found.reason, remedy=found.remedy, effect=effect)


def _held_to_record(kernels: list[LayerKernel], folder: Path) -> list[LayerKernel]:
    """The layers, with those missed that were integer when the folder was compiled and are float or not there now."""
    if not (folder / artifact.RECORD).is_file():
        return kernels
    recorded = {layer["name"]: layer for layer in artifact.read_record(folder).get("layers", []) if layer["integer"]}
    remedy = "compile the model again, or take the file that scalefold wrote"
    reason = f"{artifact.RECORD} has it as an integer product and its weight is float"
    held = [
        replace(entry, planned=True, integer=False, reason=reason, remedy=remedy)
        if entry.name in recorded and not entry.planned
        else entry
        for entry in kernels
    ]
    absent = [layer for name, layer in recorded.items() if name not in {entry.name for entry in kernels}]
    reason = f"{artifact.RECORD} has it and the graph has no product of that name with a constant weight"
    return held + [
        LayerKernel(layer["name"], tuple(layer["shape"]), True, "none", False, reason, remedy) for layer in absent
    ]


def _whole_tables(written: ir.Model, optimized: ir.Model) -> list[LayerKernel]:
    """The quantized tables of embeddings that onnxruntime dequantizes whole on every run, to look up a few rows."""
    kept = {node.inputs[0].name for node in graph.nodes(optimized, "DequantizeLinear") if node.inputs[0] is not None}
    found = []
    for node in graph.nodes(written, "Gather"):
        dequantize = graph.producer(node.inputs[0], "DequantizeLinear")
        codes = dequantize.inputs[0] if dequantize is not None else None
        array = weight_array(codes)
        if codes is None or array is None or array.ndim != 2 or codes.name not in kept:
            continue
        reason = "a DequantizeLinear of the whole table comes before its Gather, on every run"
        remedy = "look up codes and scales first, and dequantize the rows"
        size = array.shape[0], array.shape[1]
        found.append(LayerKernel(node.name or codes.name or "", size, True, "DequantizeLinear", False, reason, remedy))
    return found


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
        ran = f"runs it as {first.kernel}, {EFFECTS[first.effect]}"
        raise KernelError(
            f"onnxruntime {'runs no kernel for it' if first.kernel == 'none' else ran}, because {first.reason}{more}",
            where=f"layer {first.name}",
            remedy=f"{first.remedy}, or accept it with --allow-float '{re.escape(first.name)}'",
        )


def _weight_of(node: ir.Node) -> tuple[ir.Value | None, bool]:
    """The constant of a layer's weight, and whether it is integer codes; None for a product inside a decode chain."""
    if decode_chain.is_constant(node.outputs[0]):
        return None, False
    value = node.inputs[WEIGHT_INPUT.get(node.op_type, 1)]
    dequantize = weight_dequantizer(node) if node.op_type in ("MatMul", "Gemm", "FusedMatMul") else None
    if dequantize is not None:
        return dequantize.inputs[0], True
    array = weight_array(value)
    if value is None or (array is None and not value.is_initializer()):
        return None, False
    return value, array is not None and array.dtype != np.float32 and node.op_type != FLOAT_PRODUCT


def _shape_of(node: ir.Node, weight: ir.Value) -> tuple[int, ...]:
    if node.op_type == "MatMulNBits":
        return int(str(graph.attribute(node, "K"))), int(str(graph.attribute(node, "N")))
    if node.domain == DOMAIN:
        return input_channels(graph.whole_shape(weight)), int(str(graph.attribute(node, "N")))
    array = weight_array(weight)
    return graph.whole_shape(weight) if array is None else array.shape


def _activation_of(node: ir.Node) -> Activation:
    if restored_rows(node) is not None:
        return "per-token"
    if summed_codes(node) is not None:
        return "two codes"
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


def fidelity(expected: Iterable[Mapping[str, Array]], actual: Session, feeds: Iterable[Feed]) -> list[Fidelity]:
    """Compare the float outputs of two models over feeds, padding left out; one feed's outputs are held at a time.

    Args:
        expected: the outputs of the one for each feed, by name.
        actual: the other.
        feeds: what both are run on.

    Raises:
        SourceError: an output has another shape.
    """
    sums: dict[str, _Sums] = {}
    for wanted, feed in zip(expected, feeds, strict=True):
        mask, got = padding_mask(feed), actual.run(feed)
        for name in wanted:
            if name in got and got[name].dtype.kind == "f":
                require_same_shape(wanted[name], got[name])
                sums.setdefault(name, _Sums()).add(rows_of(wanted[name], mask), rows_of(got[name], mask))
        del wanted, got  # logits are as wide as a vocabulary: not those of two feeds at a time
    return [entry.fidelity(name) for name, entry in sums.items()]


def require_same_shape(wanted: Array, got: Array) -> None:
    """Refuse to compare the output of a float model with that of a compiled one in another shape.

    Raises:
        SourceError: the shapes differ.
    """
    if wanted.shape != got.shape:
        raise other_model(f"its output has shape {list(wanted.shape)}, and the compiled model's {list(got.shape)}")


def other_model(what: str) -> SourceError:
    """The float model to compare with is not the one that was compiled."""
    return SourceError(what, where="the float model", remedy="give the model that the folder was compiled from")


def kept_outputs(
    model: ir.Model, names: Sequence[str], feeds: Sequence[Feed], folder: Path
) -> Iterator[dict[str, Array]]:
    """Run a float model, close it, and give what it gave, feed by feed: two models need not be open at a time.

    Args:
        model: the graph.
        names: the values to return.
        feeds: what it is run on, at once.
        folder: where the outputs lie until they are asked for.
    """
    session, paths = Session(model, outputs=names, lean=True), []
    for index, feed in enumerate(feeds):
        paths.append(folder / f"outputs{index}.npz")
        # by number: numpy makes file names of keys, and values may have slashes in theirs
        np.savez(paths[-1], *session.run(feed).values())
    del session
    give_back_memory()
    return _given(paths, names)


def _given(paths: Sequence[Path], names: Sequence[str]) -> Iterator[dict[str, Array]]:
    for path in paths:
        with np.load(path) as archive:
            arrays = list(archive.values())
        path.unlink()
        yield dict(zip(names, arrays, strict=True))
        del arrays


class _Sums:
    """What `Fidelity` is made of, gathered feed by feed."""

    def __init__(self) -> None:
        self._cosines: list[Array] = []
        self._largest = self._noise = self._signal = 0.0

    def add(self, all_wanted: Array, all_got: Array) -> None:
        """Take in rows [tokens, channels], a few at a time: logits are as wide as a vocabulary."""
        for start in range(0, max(len(all_wanted), 1), ROWS):
            wanted, got = all_wanted[start : start + ROWS], all_got[start : start + ROWS]
            norms = np.linalg.norm(wanted, axis=-1) * np.linalg.norm(got, axis=-1)
            self._cosines.append(np.einsum("tc,tc->t", wanted, got) / np.maximum(norms, 1e-30))
            difference = wanted - got
            self._largest = float(np.maximum(self._largest, np.abs(difference).max(initial=0)))  # carries NaN on
            self._noise += float(np.einsum("tc,tc->t", difference, difference).sum(dtype=np.float64))
            self._signal += float(np.einsum("tc,tc->t", wanted, wanted).sum(dtype=np.float64))

    def fidelity(self, name: str) -> Fidelity:
        """The figures over all rows."""
        cosines = np.concatenate(self._cosines)
        decibels = _decibels(self._signal, self._noise)
        return Fidelity(name, float(cosines.mean()), float(cosines.min()), self._largest, decibels)


def sqnr(wanted: Array, got: Array) -> float:
    """Signal to quantization noise ratio in dB; 200 for equal arrays, -200 where one is not finite."""
    noise = float(np.square(wanted - got, dtype=np.float64).sum())
    signal = float(np.square(wanted, dtype=np.float64).sum())
    return _decibels(signal, noise)


def _decibels(signal: float, noise: float) -> float:
    if not np.isfinite(noise):
        return -200.0
    return 200.0 if noise == 0 else min(200.0, 10 * float(np.log10(max(signal, 1e-30) / noise)))


def layer_sqnr(original: ir.Model, quantized: ir.Model, feeds: Sequence[Feed], folder: Path) -> dict[str, float]:
    """SQNR in dB of every linear layer's output in a graph of QDQ form against the float graph.

    Values are matched by name, which the passes up to the QDQ form keep.

    Args:
        original: the float graph.
        quantized: the QDQ graph.
        feeds: what both are run on.
        folder: see `kept_outputs`.
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
    expected = kept_outputs(original, names, feeds, folder)
    actual = Session(quantized, outputs=names, lean=True)
    signal, noise = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for wanted, feed in zip(expected, feeds, strict=True):
        mask, got = padding_mask(feed), actual.run(feed)
        for name in names:
            reference = rows_of(wanted[name], mask)
            signal[name] += float(np.square(reference, dtype=np.float64).sum())
            noise[name] += float(np.square(rows_of(got[name], mask) - reference, dtype=np.float64).sum())
        del wanted, got
    return {layer: _decibels(signal[value], noise[value]) for layer, value in outputs.items()}


def _layer_output(matmul: ir.Node) -> str:
    out = completed(matmul).outputs[0]
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
