"""What this machine can do at best: integer and float operations, bytes from memory and from caches, and one small node.

Each is measured once and kept in a file of the user's cache, by processor, threads and onnxruntime version. The two peaks
are the best that onnxruntime's own kernels reach on products large enough for it, so a layer that reaches its ceiling
has nothing left to gain but a better kernel.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial

import numpy as np
import onnx_ir as ir

from scalefold.compiler import machine
from scalefold.compiler.runtime import Array, Session

KIND = "ceilings"
"""Of the figures that are kept."""
TURNS = 12
SIZES = ((512, 768, 3072), (512, 3072, 768), (512, 2048, 2048))
"""Rows, inner size and columns of the products whose best is a peak."""
MEMORY_BYTES = 128 * 2**20
CACHE_BYTES = 2 * 2**20
"""Of each thread's buffer: far more than any cache holds, and less than the last one does."""
CHAIN = 64
FLOAT = """<ir_version: 10, opset_import: ["" : 20]>
peak (float[1, m, k] x) => (float[1, m, n] y) <int64[2] shape = {%d, %d}>
{ w = ConstantOfShape<value = float[1] {0.5}>(shape)  y = MatMul(x, w) }"""
INTEGER = """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
peak (uint8[1, m, k] x) => (float[1, m, n] y) <int64[2] shape = {%d, %d}, float s = {0.1}, uint8 z = {1}>
{ w = ConstantOfShape<value = int8[1] {1}>(shape)  y = com.microsoft.MatMulIntegerToFloat(x, w, s, s, z) }"""
NODES = """<ir_version: 10, opset_import: ["" : 20]>
chain (float[n] x0) => (float[n] x%d) { %s }"""


@dataclass(frozen=True)
class Ceilings:
    """The best of this machine.

    Attributes:
        integer: operations a second of the product u8 x s8; a multiplication and an addition are two.
        floating: the same of float32.
        memory: bytes a second from memory.
        cache: bytes a second between buffers that a cache holds.
        node: seconds that the smallest node takes.
    """

    integer: float
    floating: float
    memory: float
    cache: float
    node: float


def ceilings(threads: int = 0, *, fresh: bool = False) -> Ceilings:
    """The ceilings of this machine, from the cache where they were measured before.

    Args:
        threads: intra-op threads; 0 for as many as there are cores.
        fresh: measure again.
    """
    kept = machine.recall(KIND, threads)
    if set(kept) == {field.name for field in fields(Ceilings)} and not fresh:
        return Ceilings(**kept)
    found = measure(threads)
    machine.keep(KIND, threads, asdict(found))
    return found


def measure(threads: int = 0) -> Ceilings:
    """Measure them now, in some seconds."""
    count = threads or machine.cores()
    return Ceilings(
        integer=_peak(INTEGER, np.uint8, threads),
        floating=_peak(FLOAT, np.float32, threads),
        memory=_bandwidth(MEMORY_BYTES, count),
        cache=_bandwidth(CACHE_BYTES, count),
        node=_node(threads),
    )


def _peak(text: str, dtype: type[np.generic], threads: int) -> float:
    best = 0.0
    for rows, k, n in SIZES:
        session = Session(ir.from_onnx_text(text % (k, n)), threads=threads)
        feed = {"x": np.ones((1, rows, k), dtype=dtype)}
        best = max(best, 2 * rows * k * n / _fastest(partial(session.run, feed)))
    return best


def _bandwidth(size: int, threads: int) -> float:
    """The better of reading, and of copying, which reads and writes."""
    sources = [np.ones(size // 4, dtype=np.float32) for _ in range(threads)]
    targets = [np.empty_like(source) for source in sources]
    repeats = max(1, MEMORY_BYTES // size // 4)

    def read(index: int) -> None:
        for _ in range(repeats):
            sources[index].max()

    def copy(index: int) -> None:
        for _ in range(repeats):
            np.copyto(targets[index], sources[index])

    total = size * threads * repeats
    with ThreadPoolExecutor(threads) as pool:
        reading = _fastest(lambda: list(pool.map(read, range(threads))))
        copying = _fastest(lambda: list(pool.map(copy, range(threads))))
    return max(total / reading, 2 * total / copying)


def _node(threads: int) -> float:
    steps = " ".join(f"x{index + 1} = Sin(x{index})" for index in range(CHAIN))
    session = Session(ir.from_onnx_text(NODES % (CHAIN, steps)), threads=threads)
    feed: dict[str, Array] = {"x0": np.ones(1, dtype=np.float32)}
    return _fastest(lambda: session.run(feed)) / CHAIN


def _fastest(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(TURNS):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)
