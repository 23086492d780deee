from __future__ import annotations

import numpy as np
import pytest

from scalefold.compiler import block_timing
from scalefold.compiler.runtime import Feed, Session


def test_both_kernels_run_for_every_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures are made up: which kernel is faster is the machine's business."""
    shapes = []

    def medians(sessions: list[Session], feed: Feed) -> list[float]:
        shapes.append([session.run(feed)["y_0"].shape for session in sessions])
        return {1: [1.0, 0.5], 8: [1.0, 1.9], 9: [1.0, 2.1]}[feed["x"].shape[1]]

    monkeypatch.setattr(block_timing, "_medians", medians)
    assert block_timing.faster_in_blocks(80, 24, 32, rows=(1, 8))
    assert not block_timing.faster_in_blocks(80, 24, 32, rows=(1, 9))
    assert shapes[0] == [(1, 1, 24)] * 2 and shapes[1] == [(1, 8, 24)] * 2


def test_medians_are_of_the_turns_behind_the_first() -> None:
    ticks = iter(np.cumsum([0.0] + [10.0, 1.0] * 40).tolist())

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            return float(next(ticks))

    class Still:
        def run(self, feed: Feed) -> None:
            del feed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_timing, "time", Clock)
        assert block_timing._medians([Still(), Still()], {}) == [10.0, 10.0]  # type: ignore[list-item]
