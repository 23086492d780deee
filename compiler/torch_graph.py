"""A graph as a differentiable function of torch tensors: the graph that ships is the graph that learns.

Values are computed in the order of the graph and dropped after their last use. Integers that a quantizer makes are held
in float32, for gradients pass through its rounding as if it were not there (straight-through, Bengio et al. 2013); its
clamp stops them. What QuantizeLinear and DequantizeLinear compute forward is what ONNX says.

torch is an optional package: import this module only where something is to be learned.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from scalefold.compiler import graph
from scalefold.compiler.errors import GraphError
from scalefold.compiler.runtime import Array

Entries = Sequence[Tensor]
"""The inputs of a node; one that is left out and lies before others is an empty tensor."""

Operands = Callable[[Entries], Entries]
"""What a node computes with in place of its inputs."""

Operator = Callable[[ir.Node, Entries], Tensor | Sequence[Tensor]]


class TorchGraph:
    """The part of a graph between some values and others, to be run again and again.

    Args:
        model: the graph; constants are read where they lie, without a copy. Not to be edited afterwards.
        outputs: the values to compute.
        given: values to start from, besides the graph's inputs; what lies before them is left out.

    Raises:
        GraphError: an operator is not known here.
    """

    def __init__(self, model: ir.Model, outputs: Sequence[ir.Value], given: Collection[ir.Value] = ()) -> None:
        start = frozenset(given)
        chosen: set[ir.Node] = set()
        for value in outputs:
            chosen |= graph.ancestors(value, lambda entry: entry in start)
        self.nodes = [node for node in model.graph if node in chosen]
        self.outputs = tuple(outputs)
        self._operators = [_operator(node) for node in self.nodes]
        made = {out for node in self.nodes for out in node.outputs}
        read = [entry for node in self.nodes for entry in node.inputs if entry is not None]
        outer = dict.fromkeys(entry for entry in (*read, *outputs) if entry not in made)
        self._constants = {
            entry: tensor_of(entry) for entry in outer if entry.const_value is not None and entry not in start
        }
        self.inputs = tuple(entry for entry in outer if entry not in self._constants)
        last_use = {entry: index for index, node in enumerate(self.nodes) for entry in node.inputs if entry is not None}
        self._dead: list[list[ir.Value]] = [[] for _ in self.nodes]
        for entry, index in last_use.items():
            if entry not in self.outputs and entry not in self._constants:
                self._dead[index].append(entry)

    def run(
        self,
        feed: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor] | None = None,
        operands: Mapping[ir.Node, Operands] | None = None,
    ) -> dict[str, Tensor]:
        """The outputs by name.

        Args:
            feed: the values to start from, by name; others are left out.
            parameters: what to take in place of constants, by name.
            operands: what some nodes compute with in place of their inputs.

        Raises:
            GraphError: the feed lacks a value, or a node cannot be computed from it.
        """
        parameters, operands = parameters or {}, operands or {}
        live = {value: parameters.get(value.name or "", held) for value, held in self._constants.items()}
        for value in self.inputs:
            name = value.name or ""
            if name not in feed:
                raise GraphError(
                    "it is not in the feed", where=f"the value {name}", remedy="give every input that is read"
                )
            live[value] = feed[name]
        nothing = torch.empty(0)
        for node, operator, dead in zip(self.nodes, self._operators, self._dead, strict=True):
            entries: Entries = [nothing if entry is None else live[entry] for entry in node.inputs]
            if node in operands:
                entries = operands[node](entries)
            live.update(zip(node.outputs, _apply(node, operator, entries), strict=False))
            for value in dead:
                live.pop(value, None)
        return {value.name or "": live[value] for value in self.outputs}


def tensor_of(value: ir.Value) -> Tensor:
    """A constant as a tensor over the same memory; integers narrower than a byte are widened to int8."""
    array = graph.constant(value)
    assert array is not None
    return tensor_from(array)


def tensor_from(array: Array) -> Tensor:
    """An array as a tensor over the same memory where torch knows its type."""
    if array.dtype.kind not in "fiub" or array.dtype.name in ("bfloat16", "uint16", "uint32", "uint64"):
        array = array.astype(np.float32 if array.dtype.name == "bfloat16" else np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # weights on disk are mapped for reading, and nothing writes to them
        return torch.from_numpy(np.ascontiguousarray(array) if array.ndim else array)


class _Round(torch.autograd.Function):
    """Rounding half to even, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def round_through(x: Tensor) -> Tensor:
    """`x` rounded half to even; gradients pass as if it were not."""
    return cast(Tensor, _Round.apply(x))  # type: ignore[no-untyped-call]


def _operator(node: ir.Node) -> Operator:
    found = OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if found is None:
        raise GraphError(
            f"the operator {node.domain or 'ai.onnx'}::{node.op_type} has no gradient here",
            where=f"the node {node.name or node.outputs[0].name}",
            remedy="learn on the float or QDQ graph, before it is lowered, or leave learning out of the recipe",
        )
    return found


def _apply(node: ir.Node, operator: Operator, entries: Entries) -> Sequence[Tensor]:
    try:
        made = operator(node, entries)
    except (RuntimeError, IndexError, ValueError, NotImplementedError) as error:
        raise GraphError(
            f"{node.op_type} cannot be computed ({' '.join(str(error).split())[:200]})",
            where=f"the node {node.name or node.outputs[0].name}",
            remedy="check that the feed is one that onnxruntime runs",
        ) from error
    return [made] if isinstance(made, Tensor) else made


def _has(entries: Entries, index: int, node: ir.Node) -> bool:
    return index < len(entries) and node.inputs[index] is not None


def _integer(node: ir.Node, name: str, default: int) -> int:
    value = graph.attribute(node, name, default)
    assert isinstance(value, int)
    return value


def _number(node: ir.Node, name: str, default: float) -> float:
    value = graph.attribute(node, name, default)
    assert isinstance(value, int | float)
    return value


def _integers(node: ir.Node, entries: Entries, index: int, name: str) -> list[int] | None:
    """What newer operator sets take as an input and older ones as an attribute; None where neither is given."""
    if _has(entries, index, node):
        return [int(number) for number in entries[index].reshape(-1).tolist()]
    value = graph.attribute(node, name)
    return None if value is None else [int(number) for number in cast(Sequence[int], value)]


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda node, entries: function(entries[0])


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda node, entries: function(entries[0], entries[1])


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def run(node: ir.Node, entries: Entries) -> Tensor:
        made = entries[0]
        for entry in entries[1:]:
            made = function(made, entry)
        return made

    return run


def _divide(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y) if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _mod(node: ir.Node, entries: Entries) -> Tensor:
    return torch.fmod(*entries) if _integer(node, "fmod", 0) else torch.remainder(*entries)


def _cast(node: ir.Node, entries: Entries) -> Tensor:
    to = ir.DataType(_integer(node, "to", int(ir.DataType.FLOAT)))
    wanted = torch.from_numpy(np.empty(0, to.numpy())).dtype if to.bitwidth >= 8 else torch.int8
    return entries[0].to(wanted)


def _clip(node: ir.Node, entries: Entries) -> Tensor:
    low = entries[1] if _has(entries, 1, node) else graph.attribute(node, "min")
    high = entries[2] if _has(entries, 2, node) else graph.attribute(node, "max")
    x = entries[0]
    for bound, function in ((low, torch.maximum), (high, torch.minimum)):
        x = x if bound is None else function(x, torch.as_tensor(bound, dtype=x.dtype))
    return x


def _gelu(node: ir.Node, entries: Entries) -> Tensor:
    return functional.gelu(entries[0], approximate=str(graph.attribute(node, "approximate", "none")))


def _layer_norm(node: ir.Node, entries: Entries) -> Tensor:
    x, gain = entries[:2]
    shape = x.shape[_integer(node, "axis", -1) :]
    bias = entries[2].expand(shape) if _has(entries, 2, node) else None
    return functional.layer_norm(x, shape, gain.expand(shape), bias, _number(node, "epsilon", 1e-5))


def _rms_norm(node: ir.Node, entries: Entries) -> Tensor:
    x, gain = entries[:2]
    axes = list(range(_integer(node, "axis", -1) % x.ndim, x.ndim))
    power = x.square().mean(axes, keepdim=True)
    return x * torch.rsqrt(power + _number(node, "epsilon", 1e-5)) * gain


def _gemm(node: ir.Node, entries: Entries) -> Tensor:
    a = entries[0].T if _integer(node, "transA", 0) else entries[0]
    b = entries[1].T if _integer(node, "transB", 0) else entries[1]
    product = _number(node, "alpha", 1.0) * (a @ b)
    return product + _number(node, "beta", 1.0) * entries[2] if _has(entries, 2, node) else product


def _transpose(node: ir.Node, entries: Entries) -> Tensor:
    last_first = range(entries[0].ndim - 1, -1, -1)
    return entries[0].permute(tuple(cast(Sequence[int], graph.attribute(node, "perm", tuple(last_first)))))


def _reshape(node: ir.Node, entries: Entries) -> Tensor:
    sizes = [int(size) for size in entries[1].tolist()]
    if not _integer(node, "allowzero", 0):
        sizes = [entries[0].shape[index] if size == 0 else size for index, size in enumerate(sizes)]
    return entries[0].reshape(sizes)


def _flatten(node: ir.Node, entries: Entries) -> Tensor:
    axis = _integer(node, "axis", 1) % (entries[0].ndim + 1)
    rows = int(np.prod(entries[0].shape[:axis], dtype=int))
    return entries[0].reshape(rows, -1)


def _squeeze(node: ir.Node, entries: Entries) -> Tensor:
    axes = _integers(node, entries, 1, "axes")
    return entries[0].squeeze() if axes is None else entries[0].squeeze(tuple(axes))


def _unsqueeze(node: ir.Node, entries: Entries) -> Tensor:
    x, axes = entries[0], _integers(node, entries, 1, "axes") or []
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _concat(node: ir.Node, entries: Entries) -> Tensor:
    return torch.cat(list(entries), _integer(node, "axis", 0))


def _split(node: ir.Node, entries: Entries) -> Sequence[Tensor]:
    x, axis = entries[0], _integer(node, "axis", 0)
    sizes = _integers(node, entries, 1, "split")
    if sizes is None:
        pieces = len(node.outputs)
        sizes = [-(-x.shape[axis] // pieces)] * (pieces - 1)
        sizes.append(x.shape[axis] - sum(sizes))
    return torch.split(x, sizes, axis)


def _slice(node: ir.Node, entries: Entries) -> Tensor:
    x = entries[0]
    starts, ends = _integers(node, entries, 1, "starts") or [], _integers(node, entries, 2, "ends") or []
    axes = _integers(node, entries, 3, "axes") or list(range(len(starts)))
    steps = _integers(node, entries, 4, "steps") or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        chosen = range(x.shape[axis])[slice(start, None if step < 0 and end < -x.shape[axis] else end, step)]
        if step == 1:
            x = x.narrow(axis, chosen.start, len(chosen))
        else:
            x = x.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64))
    return x


def _shape(node: ir.Node, entries: Entries) -> Tensor:
    start, end = graph.attribute(node, "start"), graph.attribute(node, "end")
    return torch.tensor(entries[0].shape[start:end], dtype=torch.int64)


def _range(node: ir.Node, entries: Entries) -> Tensor:
    start, end, step = (entry.item() for entry in entries)
    return torch.arange(start, end, step, dtype=entries[0].dtype)


def _expand(node: ir.Node, entries: Entries) -> Tensor:
    sizes = [int(size) for size in entries[1].tolist()]
    shape = torch.broadcast_shapes(entries[0].shape, sizes)  # type: ignore[no-untyped-call]
    return entries[0].broadcast_to(shape)


def _constant_of_shape(node: ir.Node, entries: Entries) -> Tensor:
    attribute = node.attributes.get("value")
    filling = torch.zeros(1) if attribute is None else tensor_from(attribute.as_tensor().numpy())
    return filling.reshape(()).expand([int(size) for size in entries[0].tolist()])


def _constant(node: ir.Node, entries: Entries) -> Tensor:
    value = graph.attribute(node, next(iter(node.attributes)))
    return tensor_from(np.asarray(value.numpy() if isinstance(value, ir.TensorProtocol) else value))


def _gather(node: ir.Node, entries: Entries) -> Tensor:
    axis = _integer(node, "axis", 0) % entries[0].ndim
    return entries[0][(slice(None),) * axis + (entries[1].long(),)]


def _gather_nd(node: ir.Node, entries: Entries) -> Tensor:
    x, chosen = entries[0], entries[1].long()
    behind = _integer(node, "batch_dims", 0)
    ahead = [
        torch.arange(size).reshape([-1 if axis == index else 1 for axis in range(chosen.ndim - 1)])
        for index, size in enumerate(x.shape[:behind])
    ]
    return x[(*ahead, *chosen.unbind(-1))]


def _gather_elements(node: ir.Node, entries: Entries) -> Tensor:
    axis = _integer(node, "axis", 0)
    chosen = entries[1].long()
    return torch.gather(entries[0], axis, torch.where(chosen < 0, chosen + entries[0].shape[axis], chosen))


def _cumulative_sum(node: ir.Node, entries: Entries) -> Tensor:
    x, axis = entries[0], int(entries[1].item())
    turned = x.flip(axis) if _integer(node, "reverse", 0) else x
    made = turned.cumsum(axis, dtype=x.dtype)
    made = made - turned if _integer(node, "exclusive", 0) else made
    return made.flip(axis) if _integer(node, "reverse", 0) else made


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    def run(node: ir.Node, entries: Entries) -> Tensor:
        axes = _integers(node, entries, 1, "axes")
        if not axes and _integer(node, "noop_with_empty_axes", 0):
            return entries[0]
        chosen = axes or list(range(entries[0].ndim))
        return function(entries[0], chosen, bool(_integer(node, "keepdims", 1)))

    return run


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep, dtype=x.dtype)


def _tile(node: ir.Node, entries: Entries) -> Tensor:
    return entries[0].repeat([int(size) for size in entries[1].tolist()])


def _triangle(node: ir.Node, entries: Entries) -> Tensor:
    diagonal = int(entries[1].item()) if _has(entries, 1, node) else 0
    return torch.triu(entries[0], diagonal) if _integer(node, "upper", 1) else torch.tril(entries[0], diagonal)


def _along(node: ir.Node, vector: Tensor, x: Tensor) -> Tensor:
    """A scale or zero point in a shape that broadcasts against what it belongs to: one number, per axis, or in blocks."""
    axis = _integer(node, "axis", 1)
    if vector.ndim == 1 and x.ndim > 1:
        return vector.reshape([-1 if index == axis % x.ndim else 1 for index in range(x.ndim)])
    if vector.ndim == x.ndim and vector.ndim and vector.shape != x.shape:
        block = _integer(node, "block_size", 0) or 1
        return vector.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return vector


def _quantize(node: ir.Node, entries: Entries) -> Tensor:
    """The codes, in float32."""
    x, scale = entries[0], _along(node, entries[1], entries[0])
    zero = _along(node, entries[2], x) if _has(entries, 2, node) else torch.zeros(())
    named = node.inputs[2].dtype if len(node.inputs) > 2 and node.inputs[2] is not None else None
    dtype = named or ir.DataType(_integer(node, "output_dtype", 0) or ir.DataType.UINT8)
    bits, signed = dtype.bitwidth, dtype.is_signed()
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    return torch.clamp(round_through(x / scale) + zero, low, high)


def _dequantize(node: ir.Node, entries: Entries) -> Tensor:
    codes, scale = entries[0], _along(node, entries[1], entries[0])
    moved = codes.to(scale.dtype)
    return (moved - _along(node, entries[2], codes) if _has(entries, 2, node) else moved) * scale


OPERATORS: Mapping[str, Operator] = {
    "Abs": _unary(torch.abs), "Ceil": _unary(torch.ceil), "Cos": _unary(torch.cos), "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp), "Floor": _unary(torch.floor), "Identity": _unary(lambda x: x), "IsNaN": _unary(torch.isnan),
    "Log": _unary(torch.log), "Neg": _unary(torch.neg), "Not": _unary(torch.logical_not),
    "Reciprocal": _unary(torch.reciprocal), "Relu": _unary(torch.relu), "Round": _unary(round_through),
    "Sigmoid": _unary(torch.sigmoid), "Sin": _unary(torch.sin), "Softplus": _unary(functional.softplus),
    "Sqrt": _unary(torch.sqrt), "Tanh": _unary(torch.tanh),
    "Add": _binary(torch.add), "And": _binary(torch.logical_and), "Div": _binary(_divide), "Equal": _binary(torch.eq),
    "Greater": _binary(torch.gt), "GreaterOrEqual": _binary(torch.ge), "Less": _binary(torch.lt),
    "LessOrEqual": _binary(torch.le), "MatMul": _binary(torch.matmul), "Mul": _binary(torch.mul),
    "Or": _binary(torch.logical_or), "Pow": _binary(torch.pow), "Sub": _binary(torch.sub), "Xor": _binary(torch.logical_xor),
    "Max": _variadic(torch.maximum), "Min": _variadic(torch.minimum), "Sum": _variadic(torch.add),
    "Where": lambda node, entries: torch.where(*entries),
    "Softmax": lambda node, entries: torch.softmax(entries[0], _integer(node, "axis", -1)),
    "LogSoftmax": lambda node, entries: torch.log_softmax(entries[0], _integer(node, "axis", -1)),
    "ReduceMax": _reduction(torch.amax), "ReduceMean": _reduction(torch.mean), "ReduceMin": _reduction(torch.amin),
    "ReduceSum": _reduction(_sum),
    "Cast": _cast, "Clip": _clip, "Concat": _concat, "Constant": _constant, "ConstantOfShape": _constant_of_shape,
    "CumSum": _cumulative_sum, "DequantizeLinear": _dequantize, "Expand": _expand, "Flatten": _flatten,
    "Gather": _gather, "GatherElements": _gather_elements, "GatherND": _gather_nd, "Gelu": _gelu, "Gemm": _gemm,
    "LayerNormalization": _layer_norm, "Mod": _mod, "QuantizeLinear": _quantize, "RMSNormalization": _rms_norm,
    "Range": _range, "Reshape": _reshape, "Shape": _shape, "Slice": _slice, "Split": _split, "Squeeze": _squeeze,
    "Tile": _tile, "Transpose": _transpose, "Trilu": _triangle, "Unsqueeze": _unsqueeze,
}  # fmt: skip
