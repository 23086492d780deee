"""Motions on an `onnx_ir.Model`: finding constants, linear layers and producers, and rewiring around a node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

MICROSOFT = "com.microsoft"


def nodes(model: ir.Model, *op_types: str) -> list[ir.Node]:
    """The nodes of the main graph with one of these op types, in graph order; safe to edit while looping."""
    return [node for node in model.graph if node.op_type in op_types]


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes `value`, when there is one and its op type is among `op_types` (any when none is given)."""
    node = value.producer() if value is not None else None
    if node is None or (op_types and node.op_type not in op_types):
        return None
    return node


def consumers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read `value`, each once, in graph order of their uses."""
    return list(dict.fromkeys(use.node for use in value.uses()))


def only_consumer(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The one node that reads `value`, unless there are others, or it is a graph output, or of another op type."""
    readers = consumers(value)
    if len(readers) != 1 or value.is_graph_output() or (op_types and readers[0].op_type not in op_types):
        return None
    return readers[0]


def constant(value: ir.Value | None) -> npt.NDArray[np.generic] | None:
    """The array of a constant value (an initializer or a Constant node's output), or None."""
    if value is None or value.is_graph_input():
        return None
    tensor = value.const_value
    if tensor is None and (node := producer(value, "Constant")) is not None:
        attribute = node.attributes.get("value")
        tensor = attribute.as_tensor() if attribute is not None else None
    return None if tensor is None else tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The number in a constant of one element, or None."""
    array = constant(value) if value is not None and _elements(value) in (1, None) else None
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def _elements(value: ir.Value) -> int | None:
    return None if value.const_value is None else int(value.const_value.size)


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The input of a two-input node that is not `value`."""
    first, second = node.inputs[0], node.inputs[1]
    return second if first is value else first


def attribute(node: ir.Node, name: str, default: object = None) -> object:
    """The plain value of an attribute, or `default` when the node does not set it."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def whole_shape(value: ir.Value) -> tuple[int, ...]:
    """The shape of a constant."""
    assert value.shape is not None
    return tuple(size for size in value.shape if isinstance(size, int))


def rank(value: ir.Value | None) -> int | None:
    """The number of dimensions of a value, when known."""
    return None if value is None or value.shape is None else len(value.shape)


def same_shape(value: ir.Value, other: ir.Value) -> bool:
    """Whether two values are known to have the same shape; dimensions without a name are not known."""
    if value.shape is None or other.shape is None or value.shape != other.shape:
        return False
    return all(isinstance(size, int) or size.value is not None for size in value.shape)


def reduces_last_axis(reduce: ir.Node, x: ir.Value) -> bool:
    """Whether a reduction of `x` is over the last axis alone and keeps it."""
    if attribute(reduce, "keepdims", 1) != 1:
        return False
    axes = attribute(reduce, "axes")
    if axes is None and len(reduce.inputs) > 1 and (array := constant(reduce.inputs[1])) is not None:
        axes = array.tolist()
    last = rank(x)
    return isinstance(axes, tuple | list) and list(axes) in ([-1], [(last or 0) - 1])


def is_quantized(model: ir.Model) -> bool:
    """Whether anything in it has been rounded to integers."""
    return bool(nodes(model, "DequantizeLinear"))


def add_initializer(model: ir.Model, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    """Register a constant under `name` (made unique when taken) and return its value."""
    name = unique_name(model, name)
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(np.ascontiguousarray(array) if array.ndim else array, name=name),
    )
    model.graph.register_initializer(value)
    return value


def unmap(value: ir.Value) -> None:
    """Give back the memory of a constant that lies in a file and has been read; it is read again when it is needed."""
    if isinstance(value.const_value, ir.ExternalTensor):
        with suppress(BufferError):  # still in use: it goes with the array that uses it
            value.const_value.release()


def unique_name(model: ir.Model, name: str) -> str:
    """`name`, or `name_2`, `name_3` ... when an initializer has it already."""
    candidate, count = name, 1
    while candidate in model.graph.initializers:
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def replace_constant(model: ir.Model, node: ir.Node, index: int, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    """Point input `index` of `node` at a new constant; the old one goes when nothing else reads it."""
    old = node.inputs[index]
    new = add_initializer(model, name, array)
    node.replace_input_with(index, new)
    if old is not None and old.is_initializer() and not old.uses() and not old.is_graph_output():
        model.graph.initializers.pop(old.name or "", None)
    return new


def insert_after(node: ir.Node, new: Sequence[ir.Node]) -> None:
    """Put `new` right behind `node`."""
    assert node.graph is not None
    node.graph.insert_after(node, new)


def insert_before(node: ir.Node, new: Sequence[ir.Node]) -> None:
    """Put `new` right in front of `node`."""
    assert node.graph is not None
    node.graph.insert_before(node, new)


def like(value: ir.Value, of: ir.Value, dtype: ir.DataType | None = None) -> ir.Value:
    """Give `value` the shape of `of`, and its type unless `dtype` says another."""
    value.shape = of.shape
    value.type = ir.TensorType(dtype) if dtype is not None else of.type
    return value


def look_up(gather: ir.Node, codes: ir.Value, scales: ir.Value) -> ir.Value:
    """Let the readers of Gather(table, ids) read the rows of int8 codes [V, H] times their scales [V, 1] instead."""
    out, ids = gather.outputs[0], gather.inputs[1]
    name = gather.name or out.name
    rows = ir.node("Gather", [codes, ids], {"axis": 0}, name=f"{name}_codes")
    steps = ir.node("Gather", [scales, ids], {"axis": 0}, name=f"{name}_scales")
    cast = ir.node("Cast", [rows.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{name}_cast")
    product = ir.node("Mul", [cast.outputs[0], steps.outputs[0]], name=f"{name}_dequantized")
    like(rows.outputs[0], out, ir.DataType.INT8)
    like(cast.outputs[0], out, ir.DataType.FLOAT)
    like(product.outputs[0], out)
    insert_after(gather, [rows, steps, cast, product])
    bypass(out, product.outputs[0])
    return product.outputs[0]


def bypass(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of `old`, the graph's outputs included, read `new`; a graph output keeps its name."""
    if old.is_graph_output():
        old.name, new.name = f"{old.name}_before", old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def read_instead(old: ir.Value, new: ir.Value, kept: Sequence[ir.Node]) -> None:
    """Let the nodes that read `old` read `new`, but for those that are kept; a graph output stays what it is."""
    for use in list(old.uses()):
        if use.node not in kept:
            use.node.replace_input_with(use.idx, new)


def stand_in(old: ir.Value, new: ir.Value) -> None:
    """Let `new` take the place of `old`: its readers, its shape and type, and its name."""
    like(new, old)
    name = old.name
    bypass(old, new)
    old.name, new.name = f"{name}_before", name


def sweep(model: ir.Model) -> None:
    """Remove nodes and initializers that nothing reads."""
    RemoveUnusedNodesPass()(model)


def require_opset(model: ir.Model, domain: str, version: int) -> None:
    """Declare an operator set, raising its version when the model imports an older one."""
    model.graph.opset_imports[domain] = max(model.graph.opset_imports.get(domain, 0), version)


@dataclass(frozen=True)
class Linear:
    """A linear layer of the normal form: y = MatMul(x, W) (+ Add b).

    Attributes:
        name: the layer's name, the MatMul's node name.
        matmul: the MatMul node.
        add: the Add node that applies the bias, or None.
        x: the activation, [..., K].
        weight: the constant weight, [K, N].
        bias: the constant bias, [N], or None.
        y: the layer's output, [..., N].
    """

    name: str
    matmul: ir.Node
    add: ir.Node | None
    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    y: ir.Value

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N) of the weight."""
        k, n = whole_shape(self.weight)
        return k, n

    def weights(self) -> npt.NDArray[np.float32]:
        """The weight as a float32 array [K, N]."""
        array = constant(self.weight)
        assert array is not None
        return np.asarray(array, dtype=np.float32)

    def biases(self) -> npt.NDArray[np.float32] | None:
        """The bias as a float32 array [N], or None."""
        array = constant(self.bias)
        return None if array is None else np.asarray(array, dtype=np.float32)


def linear_layers(model: ir.Model) -> list[Linear]:
    """Every linear layer of the normal form, in graph order: float MatMul with a constant two-dimensional weight."""
    return [layer for node in nodes(model, "MatMul") if (layer := linear_at(node)) is not None]


def linear_at(node: ir.Node | None) -> Linear | None:
    """The linear layer whose MatMul is `node`, or None."""
    if node is None or node.op_type != "MatMul" or node.domain not in ("", "ai.onnx"):
        return None
    x, weight = node.inputs
    if x is None or weight is None or not weight.is_initializer() or rank(weight) != 2 or x.is_initializer():
        return None
    if weight.dtype != ir.DataType.FLOAT:
        return None
    out = node.outputs[0]
    add = only_consumer(out, "Add")
    bias = other_input(add, out) if add is not None else None
    if add is None or bias is None or not bias.is_initializer() or not _is_vector(bias, weight):
        add, bias = None, None
    return Linear(node.name or "", node, add, x, weight, bias, (add or node).outputs[0])


def gemm_obstacle(gemm: ir.Node) -> str | None:
    """Why a Gemm is not a linear layer, or None when it is one."""
    if constant(gemm.inputs[1]) is None:
        return "its right-hand side is not a constant"
    if any(value is not None and value.dtype not in (ir.DataType.FLOAT, None) for value in gemm.inputs[1:]):
        return "its weight or bias is not float32"
    if attribute(gemm, "transA", 0):
        return "its left-hand side is transposed"
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    if bias is None:
        return None
    array = constant(bias)
    if array is None:
        return "its bias is not a constant"
    if array.size > 1 and array.shape[-1] != array.size:
        return "its bias is not a vector"
    return None


def _is_vector(bias: ir.Value, weight: ir.Value) -> bool:
    assert weight.shape is not None
    return bias.shape is not None and len(bias.shape) == 1 and bias.shape[0] == weight.shape[1]


def captured(node: ir.Node) -> tuple[ir.Value, ...]:
    """The values of the main graph that the subgraphs of a node read, in order of first use, attributes by name."""
    found: dict[ir.Value, None] = {}
    bodies = [
        body
        for _, attribute in sorted(node.attributes.items())
        for body in (
            [attribute.value]
            if attribute.type == ir.AttributeType.GRAPH
            else list(attribute.value)
            if attribute.type == ir.AttributeType.GRAPHS
            else []
        )
    ]
    for body in bodies:
        for inner in body.all_nodes():
            for value in inner.inputs:
                if value is not None and value.graph is node.graph:
                    found[value] = None
        found.update(dict.fromkeys(value for value in body.outputs if value.graph is node.graph))
    return tuple(found)


def ancestors(value: ir.Value, stop: Callable[[ir.Value], bool]) -> set[ir.Node]:
    """The nodes that `value` is computed from, not looking behind values for which `stop` holds."""
    found: set[ir.Node] = set()
    pending = [value]
    while pending:
        current = pending.pop()
        node = current.producer()
        if stop(current) or node is None or node in found:
            continue
        found.add(node)
        pending.extend(entry for entry in node.inputs if entry is not None)
    return found


def descendants(value: ir.Value) -> set[ir.Node]:
    """The nodes that are computed from `value`."""
    found: set[ir.Node] = set()
    pending = consumers(value)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            for out in node.outputs:
                pending.extend(consumers(out))
    return found
