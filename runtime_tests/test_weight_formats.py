from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scalefold.compiler.errors import ScalefoldError
from scalefold.compiler.weight_formats import BinaryCoding, Codebook, CodedWeight, Decoder, Grid

CODES = np.array([[0, 3], [1, 2], [2, 1], [3, 0]], np.uint8)
SCALES = np.array([0.5, 0.1], np.float32)


def int8(values: object) -> np.ndarray[tuple[int, ...], np.dtype[np.int8]]:
    return np.array(values, np.int8)


def coded(decoder: Decoder, **changes: Any) -> CodedWeight:
    parts: dict[str, Any] = {"codes": CODES, "bits": 2, "decoder": decoder, "scales": SCALES}
    return CodedWeight(**parts | changes)


DECODED: dict[str, tuple[Decoder, list[list[int]]]] = {
    "grid": (Grid(int8([[-2, -1]])), [[-2, 2], [-1, 1], [0, 0], [1, -1]]),
    "grid with multipliers": (Grid(int8([[-3, -40]]), int8([[2, 30]])), [[-3, 50], [-1, 20], [1, -10], [3, -40]]),
    "grid in groups": (
        Grid(int8([[-2, 4], [-8, 10]]), int8([[1, -2], [4, -5]])),
        [[-2, -2], [-1, 0], [0, 5], [4, 10]],
    ),
    "codebook": (Codebook(int8([[-9], [-1], [2], [7]])), [[-9, 7], [-1, 2], [2, -1], [7, -9]]),
    "codebooks": (Codebook(int8([[-9, -4], [-1, 0], [2, 0], [7, 6]])), [[-9, 6], [-1, 0], [2, 0], [7, -4]]),
    "binary": (BinaryCoding(int8([[[5, 6]], [[2, 0]]])), [[-7, 6], [3, -6], [-3, 6], [7, -6]]),
    "binary in groups": (
        BinaryCoding(int8([[[5, 6], [10, 20]], [[2, 1], [3, 4]]])),
        [[-7, 7], [3, -5], [-7, 16], [13, -24]],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("decoder", "integers"), DECODED.values(), ids=DECODED)
def test_integers_follow_the_equation_of_the_decoder(decoder: Decoder, integers: list[list[int]]) -> None:
    weight = coded(decoder)
    assert weight.integers().dtype == np.int8
    assert weight.integers().tolist() == integers
    assert weight.dequantized().tobytes() == (np.array(integers, np.float32) * SCALES).tobytes()


def test_rows_beyond_one_block_are_decoded_like_the_others() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (1000, 3)).astype(np.uint8)
    table = np.arange(-24, 24, dtype=np.int8).reshape(16, 3)
    weight = CodedWeight(codes, 4, Codebook(table), np.ones(3, np.float32))
    np.testing.assert_array_equal(weight.integers(), np.take_along_axis(table, codes, axis=0))


def test_bytes_are_those_of_a_file_without_gaps() -> None:
    scales = 8
    assert coded(DECODED["grid"][0]).code_bytes == 2
    overheads = {name: coded(decoder).overhead_bytes - scales for name, (decoder, _) in DECODED.items()}
    assert overheads == {
        "grid": 2, "grid with multipliers": 4, "grid in groups": 4, "codebook": 4, "codebooks": 8, "binary": 4,
        "binary in groups": 8,
    }  # fmt: skip
    assert coded(Grid(int8([[-2, -2]]))).overhead_bytes == scales  # central: the offset follows from the bits
    assert coded(Grid(int8([[-2, 4]]), int8([[1, -2]]))).overhead_bytes == scales + 2  # follows from the multipliers
    assert coded(Grid(int8([[-3, -3]]), int8([[2, 2]]))).overhead_bytes == scales + 2  # constants, once each
    assert coded(Grid(int8([[-2, -2]]))).bits_per_weight == 8 * (2 + 8) / 8


FAULTS: dict[str, dict[str, Any]] = {
    "0 bits per code are not 1 to 8": {"bits": 0},
    "codes are int64 of 2 dimensions": {"codes": CODES.astype(np.int64)},
    "code 3 does not fit 1 bits": {"bits": 1, "decoder": Codebook(int8([[0], [1]]))},
    "scales are float64": {"scales": SCALES.astype(np.float64)},
    "a scale is not a positive number": {"scales": np.array([1, np.nan], np.float32)},
    "offsets are int8 (1, 3), not int8 (groups, 2)": {"decoder": Grid(int8([[0, 0, 0]]))},
    "3 groups do not divide 4 rows": {"decoder": Grid(np.zeros((3, 2), np.int8))},
    "multipliers are not int8 of the shape": {"decoder": Grid(int8([[0, 0]]), int8([[1]]))},
    "a multiplier is 0": {"decoder": Grid(int8([[0, 0]]), int8([[1, 0]]))},
    "a level of the grid is not an int8": {"decoder": Grid(int8([[0, 0]]), int8([[1, 100]]))},
    "the codebook is float32, not int8": {"decoder": Codebook(np.zeros((4, 1), np.float32))},
    "the codebook has shape (4, 3)": {"decoder": Codebook(np.zeros((4, 3), np.int8))},
    "alphas have shape (1, 1, 2), not (2, groups, 2)": {"decoder": BinaryCoding(np.ones((1, 1, 2), np.int8))},
    "alphas are negative or not in descending order": {"decoder": BinaryCoding(int8([[[1, 1]], [[2, 1]]]))},
    "the alphas add up to more than int8 holds": {"decoder": BinaryCoding(int8([[[100, 1]], [[50, 1]]]))},
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_parts_that_do_not_fit_are_refused_in_one_sentence(fault: str) -> None:
    with pytest.raises(ScalefoldError) as caught:
        coded(**{"decoder": Grid(int8([[-2, -2]]))} | FAULTS[fault])
    assert fault in caught.value.what
