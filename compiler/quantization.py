"""How every linear layer of a graph is quantized, read from QDQ form and from onnxruntime's operators alike."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.facts import completed, row_range

Array = npt.NDArray[np.generic]
Place = tuple[ir.Node, int]
"""An input of a node."""


@dataclass(frozen=True)
class _Operands:
    """Which input of a fused operator is what; None for what it does not have."""

    scale: int | None
    zero_point: int | None
    weight: int
    weight_scale: int
    weight_zero_point: int
    bias: int | None


FUSED = {
    "MatMulIntegerToFloat": _Operands(2, 4, 1, 3, 5, 6),
    "DynamicQuantizeMatMul": _Operands(None, None, 1, 2, 3, 4),
    "QLinearMatMul": _Operands(1, 2, 3, 4, 5, None),
    "QGemm": _Operands(1, 2, 3, 4, 5, 6),
    "MatMulNBits": _Operands(None, None, 1, 2, 3, 5),
}
PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm")


@dataclass(frozen=True, eq=False)
class Grid:
    """The integers that a tensor is rounded to.

    Attributes:
        container: type the codes are stored in, such as uint8.
        bits: bits in use: what the largest code, or a clip in front of the quantizer, needs.
        granularity: what has a scale of its own: per-tensor, per-column, per-row, per-token, groups of n, dynamic.
        scale: the scales; None where they are computed at run time.
        zero_point: the zero points, one number where all are equal; None where they are computed at run time.
    """

    container: str
    bits: int
    granularity: str
    scale: Array | None
    zero_point: Array | None


@dataclass(eq=False)
class LinearLayer:
    """One linear layer of a graph, of any form.

    Attributes:
        name: its node's name, or a number.
        node: the product.
        shape: (K, N) of the weight.
        form: `float`, `QDQ`, or the fused operator.
        weight: how the weight is rounded; None when it is float.
        codes: the constant weight, codes or floats [K, N]; None when integer operators make it from constants.
        content: a digest of the weight as it is stored.
        activation: how the input is rounded; None when it is float.
        bias: the bias, codes or floats; None without one.
        bias_scale: the scale of bias codes; None for a float bias.
        source: the value that the product's input is quantized from.
        places: which input of which node holds what of it: `weight scale`, `activation zero point` and so on.
        members: the nodes it is made of, each with `form` or the fact it stands for.
    """

    name: str
    node: ir.Node
    shape: tuple[int, int]
    form: str = "float"
    weight: Grid | None = None
    codes: Array | None = None
    content: str = ""
    activation: Grid | None = None
    bias: Array | None = None
    bias_scale: Array | None = None
    source: ir.Value | None = None
    places: dict[Place, str] = field(default_factory=dict)
    members: dict[ir.Node, str] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """Weight and activation in a few words."""
        sides = (("w", self.weight), ("a", self.activation))
        return ", ".join(f"{side}{grid.bits} {grid.granularity}" if grid else f"{side} float" for side, grid in sides)


def linear_quantization(model: ir.Model) -> list[LinearLayer]:
    """Every linear layer of the main graph, in graph order: a product with a weight made of constants alone."""
    constants = _constant_values(model)
    found = [
        _fused(node) if node.op_type in FUSED else _product(node)
        for node in model.graph
        if (weight := _weight_value(node)) is not None and weight in constants
    ]
    layers = [layer for layer in found if layer is not None]
    for index, layer in enumerate(layers):
        layer.name = layer.name or f"linear.{index}"
    return layers


def _weight_value(node: ir.Node) -> ir.Value | None:
    """The input of a product that would be its weight."""
    if node.op_type in FUSED:
        return _input(node, FUSED[node.op_type].weight)
    return _input(node, 1) if node.op_type in PRODUCTS else None


def _constant_values(model: ir.Model) -> set[ir.Value]:
    """The values that follow from constants alone."""
    found = {value for value in model.graph.initializers.values() if not value.is_graph_input()}
    for node in model.graph:
        if node.inputs and all(value is None or value in found for value in node.inputs):
            found.update(node.outputs)
    return found


def _product(node: ir.Node) -> LinearLayer | None:
    """A MatMul or Gemm, with a float weight or in QDQ form."""
    value, flipped = _behind_transpose(node.inputs[1], bool(graph.attribute(node, "transB", 0)))
    dequantize = graph.producer(value, "DequantizeLinear")
    if dequantize is None:
        array = graph.constant(value)
        if array is None or array.ndim != 2:
            return None
        layer = _layer(node, array.T if flipped else array)
        layer.places[node, 1] = "weight values"
    else:
        layer = _dequantized(node, dequantize, flipped)
    layer.members[node] = "form"
    _read_activation(layer)
    _read_bias(layer)
    return layer


def _dequantized(node: ir.Node, dequantize: ir.Node, flipped: bool) -> LinearLayer:
    """A product whose weight is read through `dequantize`, transposed behind it when `flipped`."""
    stored, turned = _behind_transpose(dequantize.inputs[0], flipped)
    codes = graph.constant(stored)
    scale = _required(dequantize.inputs[1])
    size = graph.constant(dequantize.inputs[0])
    shape = size.shape if size is not None else tuple(dequantize.outputs[0].shape or (0, 0))
    layer = _layer(node, codes.T if codes is not None and turned else codes, shape[::-1] if flipped else shape)
    axis = graph.attribute(dequantize, "axis", 1)
    group = graph.attribute(dequantize, "block_size", 0)
    granularity = "per-tensor" if scale.size == 1 else f"groups of {group}" if group else _axis(axis, flipped)
    layer.form = "QDQ"
    zero = _zero_point(dequantize.inputs[2] if len(dequantize.inputs) > 2 else None)
    layer.weight = _weight_grid(layer, dequantize.inputs[0], granularity, scale, zero)
    layer.places |= {
        (dequantize, 0): "weight codes",
        (dequantize, 1): "weight scale",
        (dequantize, 2): "weight zero point",
    }
    layer.members[dequantize] = "weight"
    for chained in _chain(dequantize.inputs[0]):
        layer.members[chained] = "weight codes"
        layer.places |= {(chained, index): "weight codes" for index in range(len(chained.inputs))}
    layer.content = _content(dequantize.inputs[0])
    return layer


def _fused(node: ir.Node) -> LinearLayer:
    """An operator of onnxruntime that multiplies codes."""
    operands = FUSED[node.op_type]
    value = node.inputs[operands.weight]
    assert value is not None
    stored, flipped = _behind_transpose(value, bool(graph.attribute(node, "transB", 0)))
    codes = graph.constant(stored)
    shape = (graph.attribute(node, "K", 0), graph.attribute(node, "N", 0)) if node.op_type == "MatMulNBits" else None
    layer = _layer(node, codes.T if codes is not None and flipped else codes, shape or tuple(value.shape or (0, 0)))
    scale = _required(node.inputs[operands.weight_scale])
    group = graph.attribute(node, "block_size", 0)
    granularity = "per-tensor" if scale.size == 1 else f"groups of {group}" if group else "per-column"
    layer.form = node.op_type
    layer.members[node] = "form"
    zero = _zero_point(_input(node, operands.weight_zero_point))
    layer.weight = _weight_grid(layer, value, granularity, scale, zero)
    layer.content = _content(value)
    layer.places |= {
        (node, operands.weight): "weight codes",
        (node, operands.weight_scale): "weight scale",
        (node, operands.weight_zero_point): "weight zero point",
    }
    for chained in _chain(value):
        layer.members[chained] = "weight codes"
    _read_fused_activation(layer, operands)
    if operands.bias is not None and (bias := graph.constant(_input(node, operands.bias))) is not None:
        layer.bias = bias
        layer.places[node, operands.bias] = "bias codes" if bias.dtype.kind == "i" else "bias"
        if bias.dtype.kind == "i" and layer.activation is not None and layer.activation.scale is not None:
            layer.bias_scale = np.asarray(layer.activation.scale, np.float32) * np.asarray(scale, np.float32)
    else:
        _read_bias(layer)
    return layer


def _layer(node: ir.Node, weight: Array | None, shape: tuple[object, ...] | None = None) -> LinearLayer:
    sizes = weight.shape if weight is not None and weight.ndim == 2 else shape or (0, 0)
    known = tuple(int(size) if isinstance(size, int) else 0 for size in sizes)
    content = "" if weight is None else _content(node.inputs[1])
    return LinearLayer(node.name or "", node, (known[0], known[1]), codes=weight, content=content)


def _read_activation(layer: LinearLayer) -> None:
    """The quantizer in front of a product of QDQ form."""
    value = layer.node.inputs[0]
    dequantize = graph.producer(value, "DequantizeLinear")
    layer.source = value
    if dequantize is None:
        return
    layer.members[dequantize] = "activation"
    layer.places |= {(dequantize, 1): "activation scale", (dequantize, 2): "activation zero point"}
    layer.places[layer.node, 0] = "activation"
    zero = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
    _quantized_by(layer, dequantize.inputs[0], dequantize.inputs[1], zero)


def _read_fused_activation(layer: LinearLayer, operands: _Operands) -> None:
    """The quantizer in front of, or within, a fused operator."""
    node = layer.node
    layer.source = node.inputs[0]
    if node.op_type == "DynamicQuantizeMatMul":
        layer.activation = Grid("uint8", 8, "dynamic", None, None)
    if operands.scale is None or operands.zero_point is None:
        return
    layer.places[node, 0] = "activation"
    layer.places |= {(node, operands.scale): "activation scale", (node, operands.zero_point): "activation zero point"}
    _quantized_by(layer, node.inputs[0], node.inputs[operands.scale], _input(node, operands.zero_point))


def _quantized_by(layer: LinearLayer, codes: ir.Value | None, scale: ir.Value | None, zero: ir.Value | None) -> None:
    quantize = graph.producer(codes, "QuantizeLinear", "DynamicQuantizeLinear")
    layer.source = codes
    container = codes.dtype.name.lower() if codes is not None and codes.dtype is not None else "uint8"
    steps, zeros = graph.constant(scale), _zero_point(zero)
    if zero is not None and zero.dtype is not None:
        container = zero.dtype.name.lower()
    bits = _width(container)
    granularity = "dynamic" if steps is None else "per-tensor" if steps.size == 1 else "per-channel"
    if quantize is not None:
        layer.members[quantize] = "activation"
        layer.places |= {(quantize, 1): "activation scale", (quantize, 2): "activation zero point"}
        if row_range(quantize) is not None:
            granularity = "per-token"
            bits = round(float(np.log2(1 / float(np.asarray(steps).reshape(())) + 1))) if steps is not None else bits
        elif (clip := graph.producer(quantize.inputs[0], "Clip")) is not None and steps is not None:
            low, high = (graph.scalar(_input(clip, index)) for index in (1, 2))
            if low is not None and high is not None:
                bits = round(float(np.log2((high - low) / float(np.asarray(steps).reshape(-1)[0]) + 1)))
                layer.members[clip] = "activation"
                layer.places |= {(clip, 1): "activation scale", (clip, 2): "activation scale"}
    layer.activation = Grid(container, bits, granularity, steps, zeros if zero is None or steps is not None else None)


def _read_bias(layer: LinearLayer) -> None:
    """The bias of a product: the third input of a Gemm, or an Add of a constant behind it."""
    if layer.node.op_type in ("Gemm", "FusedGemm"):
        place: Place | None = (layer.node, 2)
    else:
        out = completed(layer.node).outputs[0]
        add = graph.only_consumer(out, "Add")
        place = (add, 1 - add.inputs.index(out)) if add is not None else None
    bias = _input(*place) if place is not None else None
    if place is None or bias is None:
        return
    dequantize = graph.producer(bias, "DequantizeLinear")
    array = graph.constant(dequantize.inputs[0] if dequantize is not None else bias)
    if array is None or array.size != layer.shape[1]:
        return
    layer.bias = array
    if place[0] is not layer.node:
        layer.members[place[0]] = "form"
    if dequantize is None:
        layer.places[place] = "bias"
        return
    layer.bias_scale = _required(dequantize.inputs[1])
    layer.members[dequantize] = "bias codes"
    layer.places |= {(dequantize, 0): "bias codes", (dequantize, 1): "bias scale"}


def _weight_grid(layer: LinearLayer, stored: ir.Value | None, granularity: str, scale: Array, zero: Array) -> Grid:
    if layer.codes is None:
        constants = [array for array in _constants(stored) if array.dtype.kind not in "fb" or array.dtype.itemsize == 1]
        largest = max(constants, key=lambda array: array.size)
        container = str(largest.dtype)
        return Grid(container, _width(container), granularity, scale, zero)
    container = str(layer.codes.dtype)
    bits = _width(container)
    if layer.node.op_type == "MatMulNBits":
        bits = int(str(graph.attribute(layer.node, "bits", 4)))
    elif container == "int8" and layer.codes.size:
        extremes = -int(layer.codes.min()), int(layer.codes.max())
        bits = min(bits, int(max(*extremes, 1)).bit_length() + 1)
    return Grid(container, bits, granularity, scale, zero)


def _axis(axis: object, flipped: bool) -> str:
    columns = axis in (1, -1)
    return "per-column" if columns != flipped else "per-row"


def _width(container: str) -> int:
    digits = "".join(character for character in container if character.isdigit())
    return int(digits) if digits else 8


def _zero_point(value: ir.Value | None) -> Array:
    """Zero points; one number where all are equal, 0 where none is written."""
    array = graph.constant(value)
    if array is None:
        return np.zeros((), dtype=np.int32)
    numbers = np.asarray(array).astype(np.int32).reshape(-1)
    return numbers[:1].reshape(()) if numbers.size and (numbers == numbers[0]).all() else numbers


def _required(value: ir.Value | None) -> Array:
    array = graph.constant(value)
    return np.zeros((), dtype=np.float32) if array is None else array


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _behind_transpose(value: ir.Value | None, flipped: bool) -> tuple[ir.Value | None, bool]:
    """What a two-dimensional Transpose turns, and whether the result is flipped an odd number of times."""
    transpose = graph.producer(value, "Transpose")
    if transpose is None or graph.attribute(transpose, "perm", (1, 0)) not in ((1, 0), [1, 0]):
        return value, flipped
    return transpose.inputs[0], not flipped


def _chain(value: ir.Value | None) -> Iterator[ir.Node]:
    """The nodes that a constant is computed by."""
    node = value.producer() if value is not None else None
    if node is not None:
        yield node
        for entry in node.inputs:
            yield from _chain(entry)


def _constants(value: ir.Value | None) -> Iterator[Array]:
    """The arrays that a constant is computed from."""
    node = value.producer() if value is not None else None
    if node is None:
        array = graph.constant(value)
        if array is not None:
            yield array
    else:
        for entry in node.inputs:
            yield from _constants(entry)


def _content(value: ir.Value | None) -> str:
    """A digest of what a constant is computed from, and how."""
    found = hashlib.blake2b(digest_size=12)
    for node in _chain(value):
        found.update(node.op_type.encode())
    for array in _constants(value):
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()
