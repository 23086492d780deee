from __future__ import annotations

import numpy as np
import pytest

from scalefold.compiler.nearest_level import nearest_codes
from scalefold.compiler.recipe import WeightFormat
from scalefold.compiler.saturation import saturating
from scalefold.compiler.schemes import Float, column_scales, weight_codes
from scalefold.compiler.solve import solve
from scalefold.compiler.solve_linear import LinearFit
from scalefold.compiler.weight_formats import CodedWeight

SAFE = 64.0
NORMAL = np.random.default_rng(0).standard_normal((100_000, 1)).astype(np.float32)
MIXED = (np.random.default_rng(1).standard_t(5, (256, 24)) + np.linspace(-1, 1, 24)).astype(np.float32)

# Mean squared error on N(0, 1), by bits.
CLIPPED = {1: 0.3638, 2: 0.1191, 3: 0.0376, 4: 0.0116, 5: 0.0035}


def coded(weight: Float, fit: LinearFit, limit: float = SAFE) -> CodedWeight:
    grid, scales = fit.rounded(np.full(weight.shape[1], limit, np.float32))
    return CodedWeight(nearest_codes(weight, grid.levels(fit.bits), scales), fit.bits, grid, scales)


def error(weight: Float, fit: LinearFit) -> float:
    return float(((weight - coded(weight, fit).dequantized()) ** 2).mean())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", CLIPPED)
def test_the_clip_search_finds_the_best_uniform_grid_of_normal_weights(bits: int, symmetric: bool) -> None:
    fit = LinearFit.of(NORMAL, bits, symmetric=symmetric)
    assert fit.errors().sum() / NORMAL.size == pytest.approx(CLIPPED[bits], rel=0.02)
    assert error(NORMAL, fit) == pytest.approx(CLIPPED[bits], rel=0.02)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_round_to_nearest_has_the_step_of_the_span(bits: int) -> None:
    fit = LinearFit.of(MIXED, bits, solver="rtn", symmetric=False)
    span = MIXED.max(axis=0) - MIXED.min(axis=0)
    np.testing.assert_allclose(fit.step[0], span / (2**bits - 1), rtol=1e-6)
    np.testing.assert_array_equal(fit.low[0], MIXED.min(axis=0))
    # In integers both ends stay within half a unit, of which the grid has at least 64.
    grid, scales = fit.rounded(np.full(MIXED.shape[1], SAFE, np.float32))
    levels = grid.levels(bits)[0] * scales
    assert (np.abs(levels[[0, -1]] - fit.levels()[0][[0, -1]]) < 0.012 * span).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_round_to_nearest_is_that_of_the_schemes(bits: int) -> None:
    found = coded(MIXED, LinearFit.of(MIXED, bits, solver="rtn"))
    scales = column_scales(MIXED, bits)
    np.testing.assert_array_equal(found.scales, scales)
    np.testing.assert_array_equal(found.integers(), weight_codes(MIXED, scales, bits))
    assert found.overhead_bytes == scales.nbytes


@pytest.mark.parametrize("bits", range(1, 8))
def test_the_best_asymmetric_grid_is_never_worse_than_the_best_symmetric_one(bits: int) -> None:
    symmetric = LinearFit.of(MIXED, bits)
    free = LinearFit.of(MIXED, bits, symmetric=False)
    assert (free.errors() <= symmetric.errors() * (1 + 1e-5)).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_groups_lower_the_error_and_keep_their_multipliers_in_int8(bits: int, symmetric: bool) -> None:
    whole = error(MIXED, LinearFit.of(MIXED, bits, symmetric=symmetric))
    fit = LinearFit.of(MIXED, bits, groups=8, symmetric=symmetric)
    assert error(MIXED, fit) < 0.9 * whole
    assert np.abs(coded(MIXED, fit).integers().astype(int)).max() <= SAFE
    assert coded(MIXED, fit).decoder.levels(bits).shape == (8, 2**bits, 24)


def test_a_symmetric_group_stores_a_multiplier_and_nothing_else() -> None:
    found = coded(MIXED, LinearFit.of(MIXED, 4, groups=8))
    assert found.overhead_bytes == 24 * 4 + 8 * 24


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_moves_the_zero_point_to_a_smaller_mean_absolute_error(bits: int) -> None:
    nearest = LinearFit.of(MIXED, bits, groups=4, solver="rtn", symmetric=False)
    moved = LinearFit.of(MIXED, bits, groups=4, solver="hqq", symmetric=False)
    np.testing.assert_array_equal(moved.step, nearest.step)

    def distance(fit: LinearFit) -> Float:
        values = fit.cells[:, :, None] - fit.levels()[:, None]
        return np.asarray(np.abs(values).min(axis=2).mean(axis=1))

    assert (distance(moved) <= distance(nearest) + 1e-7).all()
    assert distance(moved).mean() < 0.99 * distance(nearest).mean()


def test_weights_midway_between_two_levels_do_not_keep_the_search_from_ending() -> None:
    column = np.zeros((512, 1), np.float32)
    column[:4, 0] = 127, 0, 64.5, 63.5
    column[4:, 0] = np.random.default_rng(0).integers(-20, 21, 508)
    solved = solve(column, WeightFormat(format="linear", bits=8, solver="mse"), activation_bits=8)
    assert not saturating(solved.integers(), 8).any()


def test_unimportant_rows_do_not_count() -> None:
    importance = np.ones(len(MIXED), np.float32)
    importance[::2] = 0
    weighted, halved = LinearFit.of(MIXED, 3, importance=importance), LinearFit.of(MIXED[1::2].copy(), 3)
    np.testing.assert_allclose(weighted.errors(), halved.errors(), rtol=0.02)
