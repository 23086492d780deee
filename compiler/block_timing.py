"""Whether a layer's product is faster on this machine with 4-bit weights in blocks than on the integer kernel."""

from __future__ import annotations

from collections.abc import Sequence

from scalefold.compiler.kernel_timing import Kernel, Product, kernel_seconds


def faster_in_blocks(k: int, n: int, block: int, rows: Sequence[int]) -> bool:
    """Whether MatMulNBits of 4 bits beats QuantizeLinear and MatMulIntegerToFloat for a layer [K, N].

    Every number of rows has the same say: the ratios are multiplied.

    Args:
        k: inner size.
        n: output columns.
        block: rows of W that share a scale.
        rows: numbers of rows of x.
    """
    ratio = 1.0
    for count in rows:
        integers, blocks = Product(Kernel(), k, n, count), Product(Kernel(None, block), k, n, count)
        seconds = kernel_seconds((integers, blocks))
        ratio *= seconds[blocks] / seconds[integers]
    return ratio < 1
