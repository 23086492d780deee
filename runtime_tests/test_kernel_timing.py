from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from scalefold.compiler import kernel_timing, machine
from scalefold.compiler.kernel_timing import KIND, Kernel, Product, column_block, kernel_seconds
from scalefold.compiler.runtime import Feed, Session

STATIC, ROWS, BLOCKS, BYTES = Kernel(), Kernel("per-token"), Kernel(None, 32), Kernel(None, 16, 8)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own."""
    monkeypatch.setenv("SCALEFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


COPIES = kernel_timing.COPIES[1]
"""Copies of a weight as small as the ones here."""


def cache_file() -> Path:
    return machine.figures_file(KIND, machine.cores())


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many kernels were timed together, each time; the times are made up, the kernels do run."""
    calls: list[int] = []

    def medians(sessions: list[Session], feed: Feed) -> list[float]:
        shapes = {session.run(feed)["y_3"].shape for session in sessions}
        assert len(shapes) == 1
        calls.append(len(sessions))
        return [float(index + 1) for index in range(len(sessions))]

    monkeypatch.setattr(kernel_timing, "_medians", medians)
    return calls


def test_kernels_of_one_shape_are_timed_together_and_then_never_again(measured: list[int]) -> None:
    products = [Product(kernel, 80, 24, rows) for rows in (1, 8) for kernel in (STATIC, ROWS, BLOCKS, BYTES)]
    found = kernel_seconds(products)
    assert measured == [4, 4]
    assert [found[entry] for entry in products] == [1 / COPIES, 2 / COPIES, 3 / COPIES, 4 / COPIES] * 2
    assert kernel_seconds(reversed(products)) == found
    assert kernel_seconds(products[:1]) == {products[0]: 1 / COPIES}
    assert measured == [4, 4]


def test_the_cache_is_of_a_cpu_and_a_version_of_onnxruntime(
    cache: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    product = Product(STATIC, 16, 8, 1)
    kernel_seconds([product])
    content = json.loads(cache_file().read_text(encoding="utf-8"))
    assert cache_file().parent == cache
    assert content["onnxruntime"] == onnxruntime.__version__
    assert content["figures"] == {"per-tensor 1 x 16 x 8": 1 / COPIES}
    for name in ("cpu_model", "onnxruntime"):
        with monkeypatch.context() as patch:
            if name == "cpu_model":
                patch.setattr(machine, "cpu_model", lambda: "another")
            else:
                patch.setattr(onnxruntime, "__version__", "0.0")
            kernel_seconds([product])
    assert measured == [1, 1, 1]
    assert len(list(cache_file().parent.iterdir())) == 3


def test_a_damaged_cache_is_measured_anew(measured: list[int]) -> None:
    product = Product(STATIC, 16, 8, 1)
    cache_file().parent.mkdir(parents=True)
    for text in ("{", "[]", '{"figures": {"per-tensor 1 x 16 x 8": "soon"}}'):
        cache_file().write_text(text, encoding="utf-8")
        assert kernel_seconds([product]) == {product: 1 / COPIES}
    assert measured == [1, 1, 1]


def test_a_cache_that_cannot_be_written_is_done_without(cache: Path, measured: list[int]) -> None:
    cache.write_text("a file where the folder would be", encoding="utf-8")
    product = Product(STATIC, 16, 8, 1)
    assert kernel_seconds([product]) == kernel_seconds([product])
    assert measured == [1, 1]


def test_weights_are_too_many_for_a_cache_and_not_more_than_that() -> None:
    assert kernel_timing._copies(576, 576) * 576 * 576 > 40e6
    assert kernel_timing._copies(576, 49152) == kernel_timing.COPIES[0]
    assert kernel_timing._copies(8, 8) == kernel_timing.COPIES[1]


def test_per_token_gives_rows_their_range_back() -> None:
    """The graph that is timed does the whole work: with a weight of ones and scales of 1, a row's sum."""
    model = kernel_timing._repeated(ROWS, 4, 3, copies=2)
    model.graph.initializers["column_sums"].const_value = ir.tensor(np.full(3, 4, dtype=np.float32))
    x = np.array([[[0.0, 1.0, 2.0, 5.0], [-3.0, -3.0, 0.0, 1.0]]], dtype=np.float32)
    found = Session(model).run({"x": x})["y_0"]
    np.testing.assert_allclose(found, np.broadcast_to(x.sum(axis=-1, keepdims=True), (1, 2, 3)), atol=0.05)


def test_medians_are_of_the_turns_behind_the_first() -> None:
    class Clock:
        now = 0.0

        @classmethod
        def perf_counter(cls) -> float:
            return cls.now

    class Still:
        def __init__(self, seconds: float) -> None:
            self.seconds = [seconds, *[seconds / 10] * kernel_timing.TURNS]

        def run(self, feed: Feed) -> None:
            del feed
            Clock.now += self.seconds.pop(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_timing, "time", Clock)
        first, second, slow = Still(0.1), Still(0.1), Still(5.0)
        assert kernel_timing._medians([first, second], {}) == pytest.approx([0.01, 0.01])  # type: ignore[list-item]
        assert kernel_timing._medians([slow], {}) == pytest.approx([0.5])  # type: ignore[list-item]
        assert len(slow.seconds) == kernel_timing.TURNS - 3


@pytest.mark.parametrize(
    ("k", "bits", "block"), [(1536, 8, 128), (576, 8, 64), (96, 8, 32), (80, 8, 32), (1536, 4, 32), (576, 4, 32)]
)
def test_a_column_of_8_bits_has_the_largest_block_that_is_filled(k: int, bits: int, block: int) -> None:
    assert column_block(k, bits) == block
