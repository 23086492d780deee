"""How long this machine's kernels take for the shape of a linear layer; measured once, and kept on disk."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph, machine
from scalefold.compiler.recipe import Granularity
from scalefold.compiler.runtime import Feed, Session

KIND = "streamed kernels"
"""Of the figures that are kept."""

TURNS = 15
BUDGET = 2.0
"""Seconds after which no further turn begins; three are taken in any case."""

WORKING_SET = 48 << 20
"""Bytes of int8 weights that are read in turn, so that none of them waits in a cache, as it would not in a whole model."""

COPIES = (4, 128)
"""Fewest and most copies of a weight that make them up."""


BLOCK_BITS = (4, 8)
"""Bits of weights that MatMulNBits multiplies as integers in all releases of onnxruntime that are supported."""

BLOCK = 32
"""Rows of a block where nothing asks for another size."""

WIDE_BLOCKS = (128, 64)
"""Sizes that 8 bits are read faster in."""


def column_block(k: int, bits: int) -> int:
    """Rows of a block of MatMulNBits where a whole column [K] has one scale.

    At 8 bits the largest that leaves no block part empty: the fewer scales to read, the faster. At 4 bits speed is the
    same, and the smallest holds the range of an activation best.
    """
    wide = WIDE_BLOCKS if bits == 8 else ()
    return next((size for size in wide if k % size == 0), BLOCK)


@dataclass(frozen=True)
class Kernel:
    """What runs a product of x [rows, K] with a quantized weight [K, N], its rounding of x included.

    Attributes:
        activation: per tensor, QuantizeLinear and MatMulIntegerToFloat; per token, also what finds each row's range and
            gives it back. None for MatMulNBits, which rounds x itself.
        block: for MatMulNBits, the rows of W that share a scale.
        bits: for MatMulNBits, those of W.
    """

    activation: Granularity | None = "per-tensor"
    block: int = BLOCK
    bits: int = 4

    def __str__(self) -> str:
        return self.activation or f"{self.bits} bits in blocks of {self.block}"


@dataclass(frozen=True)
class Product:
    """A kernel at work on [rows, K] x [K, N]."""

    kernel: Kernel
    k: int
    n: int
    rows: int

    def __str__(self) -> str:
        return f"{self.kernel} {self.rows} x {self.k} x {self.n}"


def kernel_seconds(products: Iterable[Product]) -> dict[Product, float]:
    """The median time of each product on this machine, from the cache where it is there.

    Kernels for one shape that are asked for together are timed in turn with one another, which takes other work on the
    machine out of the comparison.
    """
    wanted = list(dict.fromkeys(products))
    threads = machine.cores()
    known = machine.recall(KIND, threads)
    by_shape: dict[tuple[int, int, int], list[Product]] = {}
    for product in wanted:
        by_shape.setdefault((product.k, product.n, product.rows), []).append(product)
    for shape, entries in by_shape.items():
        if all(str(entry) in known for entry in entries):
            continue
        copies = _copies(*shape[:2])
        sessions = [Session(_repeated(entry.kernel, *shape[:2], copies)) for entry in entries]
        feed = {"x": np.full((1, shape[2], shape[0]), 0.5, dtype=np.float32)}
        for entry, seconds in zip(entries, _medians(sessions, feed), strict=True):
            known[str(entry)] = seconds / copies
        machine.keep(KIND, threads, known)
    return {entry: known[str(entry)] for entry in wanted}


def _medians(sessions: Sequence[Session], feed: Feed) -> list[float]:
    seconds: list[list[float]] = [[] for _ in sessions]
    begin = time.perf_counter()
    for turn in range(TURNS + 1):
        if turn > 3 and time.perf_counter() - begin > BUDGET:
            break
        for session, taken in zip(sessions, seconds, strict=True):
            start = time.perf_counter()
            session.run(feed)
            if turn:  # the first turn warms up
                taken.append(time.perf_counter() - start)
    return [float(np.median(taken)) for taken in seconds]


def _copies(k: int, n: int) -> int:
    fewest, most = COPIES
    return min(max(-(-WORKING_SET // (k * n)), fewest), most)


def _repeated(kernel: Kernel, k: int, n: int, copies: int) -> ir.Model:
    """A graph of so many products of one x, each with a weight of its own."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, "rows", k]))
    if kernel.activation is None:
        return _blocks(x, k, n, kernel, copies)
    constants: dict[str, np.ndarray] = {
        "scale": np.array(1 / 255, dtype=np.float32),
        "zero": np.array(0, dtype=np.uint8),
        "column_scales": np.ones(n, dtype=np.float32),
        "column_sums": np.ones(n, dtype=np.float32),
        "axes": np.array([-1], dtype=np.int64),
        "tiny": np.array(1e-30, dtype=np.float32),
    }
    constants |= {f"codes_{copy}": np.full((k, n), copy % 100 + 1, dtype=np.int8) for copy in range(copies)}
    values = {name: _constant(name, array) for name, array in constants.items()}
    nodes, outputs = [], []
    for copy in range(copies):
        nodes += _integers(x, values, f"codes_{copy}", per_token=kernel.activation == "per-token")
        outputs.append(_output(nodes[-1], f"y_{copy}"))
    used = {value for node in nodes for value in node.inputs}
    return _model(x, nodes, outputs, [value for value in values.values() if value in used])


def _integers(x: ir.Value, values: Mapping[str, ir.Value], codes: str, *, per_token: bool) -> list[ir.Node]:
    """QuantizeLinear and MatMulIntegerToFloat on x, between what brings rows to [0, 1] and back; see insert-qdq."""
    scale, zero, columns = values["scale"], values["zero"], values["column_scales"]
    before: list[ir.Node] = []
    source = x
    if per_token:
        low, high = (ir.node(name, [x, values["axes"]]) for name in ("ReduceMin", "ReduceMax"))
        width = ir.node("Sub", [high.outputs[0], low.outputs[0]])
        span = ir.node("Max", [width.outputs[0], values["tiny"]])
        shift = ir.node("Sub", [x, low.outputs[0]])
        divide = ir.node("Div", [shift.outputs[0], span.outputs[0]])
        before = [low, high, width, span, shift, divide]
        source = divide.outputs[0]
    q = ir.node("QuantizeLinear", [source, scale, zero])
    inputs = [q.outputs[0], values[codes], scale, columns, zero]
    matmul = ir.node("MatMulIntegerToFloat", inputs, domain=graph.MICROSOFT)
    if not per_token:
        return [q, matmul]
    scaled = ir.node("Mul", [matmul.outputs[0], before[3].outputs[0]])
    offset = ir.node("Mul", [before[0].outputs[0], values["column_sums"]])
    restore = ir.node("Add", [scaled.outputs[0], offset.outputs[0]])
    return [*before, q, matmul, scaled, offset, restore]


def _blocks(x: ir.Value, k: int, n: int, kernel: Kernel, copies: int) -> ir.Model:
    block, bits = kernel.block, kernel.bits
    blocks = -(-k // block)
    scales = _constant("scales", np.ones(n * blocks, dtype=np.float32))
    values, nodes, outputs = [scales], [], []
    for copy in range(copies):
        codes = _constant(f"codes_{copy}", np.full((n, blocks, block * bits // 8), copy, dtype=np.uint8))
        attributes = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": 4}
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
