"""How fast this machine's kernels are for the shape of a layer: 8-bit integers against 4-bit blocks."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.runtime import Feed, Session

TURNS = 15
REPEATS = 4
"""Copies of a weight that are read in turn, so that none of them waits in a cache as it would not in a whole model."""


def faster_in_blocks(k: int, n: int, block: int, rows: Sequence[int]) -> bool:
    """Whether MatMulNBits of 4 bits beats QuantizeLinear and MatMulIntegerToFloat for a layer [K, N].

    Each is timed in turn with the other, the median counts, and every number of rows has the same say: the ratios are
    multiplied.

    Args:
        k: inner size.
        n: output columns.
        block: rows of W that share a scale.
        rows: numbers of rows of x.
    """
    sessions = [Session(_integers(k, n)), Session(_blocks(k, n, block))]
    ratio = 1.0
    for count in rows:
        integers, blocks = _medians(sessions, {"x": np.full((1, count, k), 0.5, dtype=np.float32)})
        ratio *= blocks / integers
    return ratio < 1


def _medians(sessions: Sequence[Session], feed: Feed) -> list[float]:
    seconds: list[list[float]] = [[] for _ in sessions]
    for turn in range(TURNS + 1):
        for session, taken in zip(sessions, seconds, strict=True):
            start = time.perf_counter()
            session.run(feed)
            if turn:  # the first turn warms up
                taken.append(time.perf_counter() - start)
    return [float(np.median(taken)) for taken in seconds]


def _integers(k: int, n: int) -> ir.Model:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, "rows", k]))
    constants: dict[str, np.ndarray] = {
        "scale": np.array(1 / 255, dtype=np.float32),
        "zero": np.array(0, dtype=np.uint8),
        "column_scales": np.ones(n, dtype=np.float32),
        "weight_zero": np.zeros(n, dtype=np.int8),
    }
    constants |= {f"codes_{copy}": np.full((k, n), copy + 1, dtype=np.int8) for copy in range(REPEATS)}
    values = {name: _constant(name, array) for name, array in constants.items()}
    nodes, outputs = [], []
    for copy in range(REPEATS):
        q = ir.node("QuantizeLinear", [x, values["scale"], values["zero"]])
        inputs = [q.outputs[0], values[f"codes_{copy}"], values["scale"], values["column_scales"], values["zero"]]
        matmul = ir.node("MatMulIntegerToFloat", [*inputs, values["weight_zero"]], domain=graph.MICROSOFT)
        nodes += [q, matmul]
        outputs.append(_output(matmul, f"y_{copy}"))
    return _model(x, nodes, outputs, list(values.values()))


def _blocks(k: int, n: int, block: int) -> ir.Model:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, "rows", k]))
    blocks = -(-k // block)
    scales = _constant("scales", np.ones(n * blocks, dtype=np.float32))
    values, nodes, outputs = [scales], [], []
    for copy in range(REPEATS):
        codes = _constant(f"codes_{copy}", np.full((n, blocks, block // 2), copy, dtype=np.uint8))
        attributes = {"K": k, "N": n, "bits": 4, "block_size": block, "accuracy_level": 4}
        nodes.append(ir.node("MatMulNBits", [x, codes, scales], attributes, domain=graph.MICROSOFT))
        values.append(codes)
        outputs.append(_output(nodes[-1], f"y_{copy}"))
    return _model(x, nodes, outputs, values)


def _constant(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))


def _output(node: ir.Node, name: str) -> ir.Value:
    node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(ir.DataType.FLOAT)
    return node.outputs[0]


def _model(
    x: ir.Value, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value], constants: Sequence[ir.Value]
) -> ir.Model:
    opsets = {"": 21, graph.MICROSOFT: 1}
    return ir.Model(ir.Graph([x], outputs, nodes=nodes, initializers=constants, opset_imports=opsets), ir_version=10)
