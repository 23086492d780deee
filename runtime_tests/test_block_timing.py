from __future__ import annotations

from collections.abc import Iterable

import pytest

from scalefold.compiler import block_timing
from scalefold.compiler.kernel_timing import Kernel, Product

BLOCKS = Kernel(None, 32, 8)


def test_every_number_of_rows_has_the_same_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures are made up: which kernel is faster is the machine's business."""

    def seconds(products: Iterable[Product]) -> dict[Product, float]:
        ratios = {1: 0.5, 8: 1.9, 9: 2.1}
        found = {entry: 1.0 if entry.kernel.activation else ratios[entry.rows] for entry in products}
        assert {entry.kernel for entry in found} == {Kernel(), BLOCKS}
        return found

    monkeypatch.setattr(block_timing, "kernel_seconds", seconds)
    assert block_timing.faster_in_blocks(80, 24, BLOCKS, rows=(1, 8))
    assert not block_timing.faster_in_blocks(80, 24, BLOCKS, rows=(1, 9))
