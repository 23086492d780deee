"""Run 4-bit and 8-bit weights in blocks, by the kernel that is the faster one where few rows share their reading."""

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
from scalefold.compiler.kernel_timing import BLOCK_BITS, Kernel, column_block
from scalefold.compiler.protocol import Context, Contract, Event, PassResult
from scalefold.compiler.weight_formats import CodedWeight, Grid

SMALLEST_BLOCK = 16

INT8_COMPUTE = 4
"""The accuracy level at which the kernel rounds activations to int8, a scale each block of a row. Others multiply floats."""


@dataclass(frozen=True)
class LowerBlockMatmul:
    """Turn linear layers with 4-bit or 8-bit weights on float activations into MatMulNBits.

    before:  MatMul(x, DequantizeLinear(integers, scales))         integers = (code - z) * multiplier, in groups of g rows
    after:   MatMulNBits(x, codes, scales * multipliers, z; block_size = g, accuracy_level = 4)

    x is [..., K], the codes [N, K/g, g * bits/8] bytes, those of 4 bits two to a byte, the scales [N * K/g]. A column
    with one scale has it repeated for every block (`column_block`). At batch 1 a product is as fast as its weight is
    read: this kernel reads 4 bits where the integer kernel reads the 8 that codes are decoded to, and 8 bits nearer to
    the speed of memory; with more rows the integer kernel is the faster one (docs/decisions/0011). The kernel rounds
    activations itself, each block of a row by its largest value, so these layers take no part in calibration. Its scales
    must be constants, or its answers are wrong.

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
        faster: dict[tuple[int, int, Kernel], bool] = {}
        matmuls = [node for node in graph.nodes(model, "MatMul") if weight_dequantizer(node) is not None]
        with ctx.progress("choosing block kernels", len(matmuls)) as advance:
            for matmul in matmuls:
                coded, reason = _coded(matmul)
                if coded is not None and self.choice == "measured":
                    k, n = coded.codes.shape
                    shape = (k, n, Kernel(None, _block(coded), coded.bits))
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
    assert dequantize is not None and dequantize.inputs[0] is not None
    codes = dequantize.inputs[0]
    if not codes.is_initializer() or any(reader.op_type == "Gather" for reader in graph.consumers(codes)):
        return None, "its weight is a table that is looked up too, and stored once"
    origin = origin_of(codes)
    coded = origin.coded if origin is not None else _whole_bytes(dequantize)
    if coded is None or coded.bits not in BLOCK_BITS or not isinstance(coded.decoder, Grid):
        return None, "its weight is neither 4-bit and linear nor 8-bit"
    if (block := _block(coded)) < SMALLEST_BLOCK or block & (block - 1):
        return None, f"groups of {block} rows are no blocks of the kernel: they must be a power of two from 16"
    if _zero_points(coded) is None:
        return None, "its zero is not one of its codes"
    return coded, ""


def _whole_bytes(dequantize: ir.Node) -> CodedWeight | None:
    """An int8 weight with a scale per column as codes of 8 bits; None for any other."""
    integers, scales = (graph.constant(value) for value in dequantize.inputs[:2])
    if integers is None or scales is None or integers.dtype != np.int8 or scales.shape != integers.shape[1:]:
        return None
    offsets = np.full((1, len(scales)), -128, dtype=np.int8)
    return CodedWeight(integers.view(np.uint8) ^ np.uint8(128), 8, Grid(offsets), np.asarray(scales, dtype=np.float32))


def _block(coded: CodedWeight) -> int:
    assert isinstance(coded.decoder, Grid)
    groups, k = coded.decoder.offsets.shape[0], coded.codes.shape[0]
    return column_block(k, coded.bits) if groups == 1 else k // groups


def _zero_points(coded: CodedWeight) -> npt.NDArray[np.uint8] | None:
    """The code of 0 in each group [G, N], or None where some group has none."""
    grid = coded.decoder
    assert isinstance(grid, Grid)
    steps = np.ones_like(grid.offsets) if grid.multipliers is None else grid.multipliers
    zero, rest = np.divmod(-grid.offsets.astype(np.int16), steps.astype(np.int16))
    return None if rest.any() or zero.min() < 0 or zero.max() >= 1 << coded.bits else zero.astype(np.uint8)


def _lower(model: ir.Model, matmul: ir.Node, coded: CodedWeight) -> ir.Node:
    name, x, out = matmul.name or "", matmul.inputs[0], matmul.outputs[0]
    (k, n), block, bits = coded.codes.shape, _block(coded), coded.bits
    grid, zero = coded.decoder, _zero_points(coded)
    assert isinstance(grid, Grid) and zero is not None
    steps = np.float32(1) if grid.multipliers is None else grid.multipliers.astype(np.float32)
    blocks = -(-k // block)
    scales = np.broadcast_to(coded.scales * steps, (blocks if len(grid.offsets) == 1 else len(grid.offsets), n))
    zeros = np.broadcast_to(zero, scales.shape)
    inputs = [
        x,
        graph.add_initializer(model, f"{name}.weight_blocks", _packed_codes(coded, block)),
        graph.add_initializer(model, f"{name}.block_scales", np.ascontiguousarray(scales.T).reshape(-1)),
    ]
    if (zeros != 1 << (bits - 1)).any():
        packed = _packed(np.ascontiguousarray(zeros.T), bits).reshape(-1)
        inputs.append(graph.add_initializer(model, f"{name}.block_zero_points", packed))
    attributes = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": INT8_COMPUTE}
    lowered = ir.node("MatMulNBits", inputs, attributes, domain=graph.MICROSOFT, name=name)
    graph.like(lowered.outputs[0], out)
    graph.insert_after(matmul, [lowered])
    result = out.name
    graph.bypass(out, lowered.outputs[0])
    out.name, lowered.outputs[0].name = f"{result}_whole", result
    matmul.name = f"{name}_whole"
    return lowered


def _packed_codes(coded: CodedWeight, block: int) -> npt.NDArray[np.uint8]:
    """Codes [K, N] as bytes [N, blocks, bytes of a block], the last block filled up with the code of 0."""
    k, n = coded.codes.shape
    blocks = -(-k // block)
    rows = np.full((n, blocks * block), 1 << (coded.bits - 1), dtype=np.uint8)
    rows[:, :k] = coded.codes.T
    return _packed(rows, coded.bits).reshape(n, blocks, -1)


def _packed(rows: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Codes of 4 bits [N, L] two of a row to a byte, the first in the low half: [N, ceil(L / 2)]; those of 8 as they are."""
    if bits == 8:
        return rows
    if rows.shape[1] % 2:
        rows = np.pad(rows, ((0, 0), (0, 1)))
    return np.asarray(rows[:, 0::2] | rows[:, 1::2] << 4, dtype=np.uint8)
