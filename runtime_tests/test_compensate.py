from __future__ import annotations

import numpy as np
import pytest

from scalefold.compiler import saturation
from scalefold.compiler.compensate import Double, InverseFactor, compensated_codes, fitted_scales
from scalefold.compiler.nearest_level import nearest_codes
from scalefold.compiler.schemes import Float
from scalefold.compiler.weight_formats import BinaryCoding, Codebook, CodedWeight, Decoder, Grid, Int8

ROWS, COLUMNS = 96, 20
GENERATOR = np.random.default_rng(0)
WEIGHT: Float = GENERATOR.standard_normal((ROWS, COLUMNS)).astype(np.float32)


def hessian_of(rows: int, samples: int = 400) -> Double:
    inputs = GENERATOR.standard_normal((samples, 24)) @ GENERATOR.standard_normal((24, rows))
    inputs += 0.5 * GENERATOR.standard_normal((samples, rows))
    return np.asarray(inputs.T @ inputs / samples)


HESSIAN = hessian_of(ROWS)
SCALES: Float = np.full(COLUMNS, 0.05, np.float32)


def free_levels() -> Int8:
    return np.sort(GENERATOR.choice(np.arange(-60, 61), (8, COLUMNS)), axis=0).astype(np.int8)


DECODERS: dict[str, tuple[int, Decoder]] = {
    "grid": (3, Grid(np.full((1, COLUMNS), -56, np.int8), np.full((1, COLUMNS), 16, np.int8))),
    "grid in groups": (
        3, Grid(GENERATOR.integers(-60, -40, (4, COLUMNS)).astype(np.int8), np.full((4, COLUMNS), 14, np.int8)),
    ),
    "mirrored grid": (3, Grid(np.full((1, COLUMNS), 56, np.int8), np.full((1, COLUMNS), -14, np.int8))),
    "one codebook": (3, Codebook(np.array([-56, -33, -17, -5, 6, 18, 34, 57], np.int8)[:, None])),
    "a codebook per column": (3, Codebook(free_levels())),
    "binary in groups": (
        3, BinaryCoding(np.array([[32], [16], [9]], np.int8)[:, :, None] * np.ones((1, 2, COLUMNS), np.int8)),
    ),
}  # fmt: skip


def output_error(coded: CodedWeight, weight: Float = WEIGHT, hessian: Double = HESSIAN) -> float:
    lost = weight - coded.dequantized()
    return float((lost * (hessian @ lost)).sum())


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    upper = InverseFactor.of(HESSIAN, damping=0.02).upper
    damped = HESSIAN + 0.02 * np.diagonal(HESSIAN).mean() * np.eye(ROWS)
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(ROWS), atol=1e-9)
    np.testing.assert_array_equal(upper, np.triu(upper))


@pytest.mark.parametrize("rows", [1, 63, 64, 130])
def test_codes_are_those_of_optimal_brain_surgeon_row_by_row(rows: int) -> None:
    """Against the method as it is defined: invert the Hessian of the rows that are left, anew for every row."""
    weight, hessian = GENERATOR.standard_normal((rows, 5)), hessian_of(rows)
    hessian += 0.01 * np.diagonal(hessian).mean() * np.eye(rows)
    levels = np.array([-40, -9, 1, 20, 45], np.int8)
    rest, wanted = weight / 0.05, np.empty((rows, 5), np.uint8)
    for row in range(rows):
        wanted[row] = np.abs(rest[row][:, None] - levels).argmin(axis=1)
        inverse = np.linalg.inv(hessian[row:, row:])
        rest[row:] -= np.outer(inverse[:, 0] / inverse[0, 0], rest[row] - levels[wanted[row]])
    found = compensated_codes(
        weight.astype(np.float32), levels[None, :, None], SCALES[:5], InverseFactor.of(hessian, damping=0), None
    )
    assert (found == wanted).mean() > 0.995


@pytest.mark.parametrize("name", DECODERS)
def test_the_error_of_the_output_falls_for_every_kind_of_level(name: str) -> None:
    bits, decoder = DECODERS[name]
    levels = decoder.levels(bits)
    nearest = CodedWeight(nearest_codes(WEIGHT, levels, SCALES), bits, decoder, SCALES)
    codes = compensated_codes(WEIGHT, levels, SCALES, InverseFactor.of(HESSIAN))
    compensated = CodedWeight(codes, bits, decoder, SCALES)
    assert output_error(compensated) < 0.7 * output_error(nearest)
    scales = fitted_scales(WEIGHT, compensated.integers(), SCALES, HESSIAN)
    assert output_error(CodedWeight(codes, bits, decoder, scales)) < output_error(compensated)


def test_inputs_that_are_independent_leave_nothing_to_compensate() -> None:
    bits, decoder = DECODERS["a codebook per column"]
    levels = decoder.levels(bits)
    found = compensated_codes(WEIGHT, levels, SCALES, InverseFactor.of(np.diag(GENERATOR.uniform(1, 2, ROWS))))
    np.testing.assert_array_equal(found, nearest_codes(WEIGHT, levels, SCALES))


@pytest.mark.parametrize("dead", [[5], [0, 40, 41, 95], list(range(ROWS))])
def test_rows_without_input_are_rounded_as_they_are(dead: list[int]) -> None:
    hessian = HESSIAN.copy()
    hessian[dead, :] = 0
    hessian[:, dead] = 0
    bits, decoder = DECODERS["grid"]
    levels = decoder.levels(bits)
    codes = compensated_codes(WEIGHT, levels, SCALES, InverseFactor.of(hessian))
    nearest = nearest_codes(WEIGHT, levels, SCALES)
    np.testing.assert_array_equal(codes[dead], nearest[dead])
    found = fitted_scales(WEIGHT, CodedWeight(codes, bits, decoder, SCALES).integers(), SCALES, hessian)
    assert (found > 0).all()
    if len(dead) < ROWS:
        first, second = (
            output_error(CodedWeight(each, bits, decoder, SCALES), hessian=hessian) for each in (codes, nearest)
        )
        assert first < 0.7 * second
    else:
        np.testing.assert_array_equal(found, SCALES)


def test_a_hessian_of_fewer_samples_than_rows_is_factored() -> None:
    inputs = GENERATOR.standard_normal((3, ROWS))
    assert np.isfinite(InverseFactor.of(inputs.T @ inputs).upper).all()


@pytest.mark.parametrize("activation_bits", [8, 7, None])
def test_pairs_that_could_saturate_are_avoided(activation_bits: int | None) -> None:
    levels = np.arange(-127, 128, dtype=np.int8)[None, ::5, None]
    weight = np.abs(WEIGHT) + np.float32(4)
    codes = compensated_codes(weight, levels, SCALES, InverseFactor.of(HESSIAN), activation_bits)
    integers = levels[0, :, 0][codes]
    assert (saturation.can_saturate(integers, 8) == 0) is (activation_bits == 8)
