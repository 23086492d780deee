"""Run 4-bit weights as they are stored, in blocks, where streaming fewer bytes beats the integer kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.block_timing import faster_in_blocks
from scalefold.compiler.decode_chain import origin_of
from scalefold.compiler.facts import Fact, weight_dequantizer
from scalefold.compiler.protocol import Context, Contract, Event, PassResult
from scalefold.compiler.weight_formats import CodedWeight, Grid

BITS = 4
SMALLEST_BLOCK = 16
BLOCK = 32
"""Rows of a block where a whole column has one scale; of the sizes the kernel has, the one it packs best."""

INT8_COMPUTE = 4
"""The accuracy level at which the kernel rounds activations to int8, a scale each block of a row. Others multiply floats."""


@dataclass(frozen=True)
class LowerBlockMatmul:
    """Turn linear layers with 4-bit weights on float activations into MatMulNBits.

    before:  MatMul(x, DequantizeLinear(integers, scales))         integers = (code - z) * multiplier, in groups of g rows
    after:   MatMulNBits(x, codes, scales * multipliers, z; block_size = g, accuracy_level = 4)

    x is [..., K], the codes [N, K/g, g/2] bytes, two to a byte, the scales [N * K/g]. A column with one scale has it
    repeated for blocks of 32 rows. At batch 1 a product is as fast as its weight is read, and this kernel reads 4 bits
    where the integer kernel reads the 8 that codes are decoded to; with more rows the integer kernel is the faster one
    (docs/decisions/0011). The kernel rounds activations itself, each block of a row by its largest
    value, so these layers take no part in calibration. Its scales must be constants, or its answers are wrong.

    Attributes:
        choice: `all` takes every layer that can; `measured` those where it is faster on this machine at `rows`.
        rows: numbers of rows (batch times tokens) that `measured` times, each counting the same.
    """

    name: ClassVar[str] = "lower-block-matmul"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED_WEIGHTS})
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.LOSSY

    choice: Literal["all", "measured"] = "all"
    rows: tuple[int, ...] = (1,)

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Lower the layers that can be, and decline the others with a reason."""
        rewrites, declined = [], []
        faster: dict[tuple[int, int, int], bool] = {}
        matmuls = [node for node in graph.nodes(model, "MatMul") if weight_dequantizer(node) is not None]
        with ctx.progress("choosing block kernels", len(matmuls)) as advance:
            for matmul in matmuls:
                coded, reason = _coded(matmul)
                if coded is not None and self.choice == "measured":
                    k, n = coded.codes.shape
                    shape = (k, n, _block(coded))
                    if shape not in faster:
                        faster[shape] = faster_in_blocks(*shape, rows=self.rows)
                    reason = "" if faster[shape] else f"the integer kernel is faster at {_listed(self.rows)} rows"
                if coded is None or reason:
                    declined.append(Event(matmul, reason))
                else:
                    rewrites.append(Event(_lower(model, matmul, coded), f"blocks of {_block(coded)}"))
                advance()
        if rewrites:
            graph.sweep(model)
            graph.require_opset(model, graph.MICROSOFT, 1)
        return PassResult(tuple(rewrites), tuple(declined))


def _listed(rows: tuple[int, ...]) -> str:
    return " and ".join(str(number) for number in rows)


def _coded(matmul: ir.Node) -> tuple[CodedWeight | None, str]:
    """The layer's coded weight, or why the kernel cannot take it."""
    if graph.producer(matmul.inputs[0], "DequantizeLinear") is not None:
        return None, "its input is quantized already"
    dequantize = weight_dequantizer(matmul)
    codes = dequantize.inputs[0] if dequantize is not None else None
    origin = origin_of(codes)
    if codes is not None and any(reader.op_type == "Gather" for reader in graph.consumers(codes)):
        return None, "its weight is a table that is looked up too, and stored once"
    if origin is None or origin.coded.bits != BITS or not isinstance(origin.coded.decoder, Grid):
        return None, "its weight is not 4-bit and linear"
    if (block := _block(origin.coded)) < SMALLEST_BLOCK or block & (block - 1):
        return None, f"groups of {block} rows are no blocks of the kernel: they must be a power of two from 16"
    if _zero_points(origin.coded.decoder) is None:
        return None, "its zero is not one of its codes"
    return origin.coded, ""


def _block(coded: CodedWeight) -> int:
    assert isinstance(coded.decoder, Grid)
    groups = coded.decoder.offsets.shape[0]
    return BLOCK if groups == 1 else coded.codes.shape[0] // groups


def _zero_points(grid: Grid) -> npt.NDArray[np.uint8] | None:
    """The code of 0 in each group [G, N], or None where some group has none."""
    steps = np.ones_like(grid.offsets) if grid.multipliers is None else grid.multipliers
    zero, rest = np.divmod(-grid.offsets.astype(np.int16), steps.astype(np.int16))
    return None if rest.any() or zero.min() < 0 or zero.max() >= 1 << BITS else zero.astype(np.uint8)


def _lower(model: ir.Model, matmul: ir.Node, coded: CodedWeight) -> ir.Node:
    name, x, out = matmul.name or "", matmul.inputs[0], matmul.outputs[0]
    (k, n), block = coded.codes.shape, _block(coded)
    grid = coded.decoder
    assert isinstance(grid, Grid)
    zero = _zero_points(grid)
    assert zero is not None
    steps = np.float32(1) if grid.multipliers is None else grid.multipliers.astype(np.float32)
    blocks = -(-k // block)
    scales = np.broadcast_to(coded.scales * steps, (blocks if len(grid.offsets) == 1 else len(grid.offsets), n))
    zeros = np.broadcast_to(zero, scales.shape)
    inputs = [
        x,
        graph.add_initializer(model, f"{name}.weight_blocks", _packed_codes(coded.codes, block)),
        graph.add_initializer(model, f"{name}.block_scales", np.ascontiguousarray(scales.T).reshape(-1)),
    ]
    if (zeros != 1 << (BITS - 1)).any():
        packed = _nibbles(np.ascontiguousarray(zeros.T)).reshape(-1)
        inputs.append(graph.add_initializer(model, f"{name}.block_zero_points", packed))
    attributes = {"K": k, "N": n, "bits": BITS, "block_size": block, "accuracy_level": INT8_COMPUTE}
    lowered = ir.node("MatMulNBits", inputs, attributes, domain=graph.MICROSOFT, name=name)
    graph.like(lowered.outputs[0], out)
    graph.insert_after(matmul, [lowered])
    result = out.name
    graph.bypass(out, lowered.outputs[0])
    out.name, lowered.outputs[0].name = f"{result}_whole", result
    matmul.name = f"{name}_whole"
    return lowered


def _packed_codes(codes: npt.NDArray[np.uint8], block: int) -> npt.NDArray[np.uint8]:
    """Codes [K, N] as [N, blocks, block / 2], the last block filled up with the code of 0."""
    k, n = codes.shape
    blocks = -(-k // block)
    rows = np.full((n, blocks * block), 1 << (BITS - 1), dtype=np.uint8)
    rows[:, :k] = codes.T
    return _nibbles(rows).reshape(n, blocks, block // 2)


def _nibbles(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Two codes of a row to a byte, the first in the low half: [N, L] to [N, ceil(L / 2)]."""
    if rows.shape[1] % 2:
        rows = np.pad(rows, ((0, 0), (0, 1)))
    return np.asarray(rows[:, 0::2] | rows[:, 1::2] << 4, dtype=np.uint8)
