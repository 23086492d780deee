"""Which weights 4 bits are enough for, and that their codes stand for the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scalefold.compiler.coded_panels import coded_panels, decoded_panels
from scalefold.compiler.kernel_library import input_channels, packed_panels
from scalefold.compiler.testing import coded_weight

KINDS = ("steps", "grouped steps", "values", "grouped values")
Array = np.ndarray[Any, Any]


@pytest.mark.parametrize("outputs", [1, 64, 65, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_stand_for_the_weight(kind: str, outputs: int) -> None:
    weight = coded_weight(kind, 192, outputs)
    panels = coded_panels(weight)
    assert panels is not None
    np.testing.assert_array_equal(decoded_panels(panels, outputs), weight)
    groups = 3 if "grouped" in kind else 1
    last = (16, 64) if "values" in kind else (64,)
    assert panels.levels.shape == (-(-outputs // 64), groups, *last)
    assert panels.codes.shape == (-(-outputs // 64), 6, 16, 64)
    assert input_channels(panels.codes.shape) == input_channels(packed_panels(weight).shape) == 192


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codes_of_every_width_fit(bits: int) -> None:
    generator = np.random.default_rng(bits)
    codebook = generator.choice(np.arange(-128, 128), (50, 1 << bits)).astype(np.int8)
    weight = codebook[np.arange(50), generator.integers(0, 1 << bits, (96, 50))]
    panels = coded_panels(weight)
    assert panels is not None
    np.testing.assert_array_equal(decoded_panels(panels, 50), weight)


def spread(inputs: int, values: int) -> Array:
    """A column with so many different numbers, which are no multiples of one step."""
    return np.resize(np.arange(-7, -7 + values), inputs).astype(np.int8)[:, None]


def test_where_4_bits_are_not_enough() -> None:
    assert coded_panels(spread(64, 16)) is not None
    assert coded_panels(spread(64, 17)) is None
    wide = np.ones((64, 100), np.int8)
    wide[:, 99:] = spread(64, 17)  # beyond the first panel
    assert coded_panels(wide) is None
    wide[:, 99] = 0
    assert coded_panels(wide) is not None
    assert coded_panels(np.ones((36, 4), np.int8)) is None  # no whole blocks
    assert coded_panels(np.zeros((0, 4), np.int8)) is None


def test_values_of_a_group_are_stored_where_they_pay() -> None:
    generator = np.random.default_rng(1)

    def weight(size: int) -> Array:
        values = generator.choice(np.arange(-128, 128), (256 // size, 16)).astype(np.int8)
        return np.concatenate([row[generator.integers(0, 16, (size, 3))] for row in values])

    assert coded_panels(weight(64)) is not None
    assert coded_panels(weight(32)) is None


def test_the_ends_of_int8() -> None:
    for numbers in ([-128, 0], [-128, 127], [127, 0], [0, 0], [-128, -128], [112, -128], [1, -1]):
        weight = np.resize(np.array(numbers, np.int8), (32, 1))
        panels = coded_panels(weight)
        assert panels is not None
        np.testing.assert_array_equal(decoded_panels(panels, 1), weight)
