"""Whether a layer's product is faster on this machine with its weight in blocks than on the integer kernel."""

from __future__ import annotations

from collections.abc import Sequence

from scalefold.compiler.kernel_timing import Kernel, Product, kernel_seconds


def faster_in_blocks(k: int, n: int, blocks: Kernel, rows: Sequence[int]) -> bool:
    """Whether MatMulNBits beats QuantizeLinear and MatMulIntegerToFloat for a layer [K, N].

    Every number of rows has the same say: the ratios are multiplied.

    Args:
        k: inner size.
        n: output columns.
        blocks: MatMulNBits with blocks of some size and bits.
        rows: numbers of rows of x.
    """
    ratio = 1.0
    for count in rows:
        one, other = Product(Kernel(), k, n, count), Product(blocks, k, n, count)
        seconds = kernel_seconds((one, other))
        ratio *= seconds[other] / seconds[one]
    return ratio < 1
