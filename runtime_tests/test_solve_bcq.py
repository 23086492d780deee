from __future__ import annotations

import numpy as np
import pytest

from scalefold.compiler.solve_bcq import BinaryFit, alphas_of_uniform, alternate, binary_error, greedy, uniform_start
from scalefold.compiler.solve_kmeans import exact
from scalefold.compiler.solve_linear import LinearFit
from scalefold.compiler.sorted_columns import Double, SortedColumns
from scalefold.compiler.weight_formats import bit_signs

NORMAL = np.random.default_rng(0).standard_normal((400_000, 1)).astype(np.float32)
CELLS = SortedColumns.of(NORMAL.T)
MIXED = np.random.default_rng(1).standard_t(5, (256, 24)).astype(np.float32)

# Mean squared error on N(0, 1), by bits.
GREEDY = {1: 0.3638, 2: 0.1308, 3: 0.0585, 4: 0.0330, 5: 0.0227}
ALTERNATING = {1: 0.3638, 2: 0.1178, 3: 0.0371, 4: 0.0115, 5: 0.0049}


def greedy_residual(points: Double, alphas: Double) -> Double:
    rest = points.copy()
    for alpha in alphas.T:
        rest -= np.where(rest >= 0, 1, -1) * alpha[:, None]
    return rest


def integer_errors(weight: np.ndarray[tuple[int, ...], np.dtype[np.float32]], fit: BinaryFit, limit: float) -> float:
    coding, scales = fit.rounded(np.full(weight.shape[1], limit, np.float32))
    levels = coding.levels(fit.alphas.shape[1]) * scales
    cells = weight.reshape(fit.groups, -1, 1, weight.shape[1])
    return float((np.abs(cells - levels[:, None]).min(axis=2) ** 2).mean())


@pytest.mark.parametrize("bits", GREEDY)
def test_greedy_has_the_known_error_of_normal_weights_and_nearest_codes_lower_it(bits: int) -> None:
    alphas = greedy(NORMAL.T.astype(np.float64), bits)
    own = (greedy_residual(NORMAL.T.astype(np.float64), alphas) ** 2).mean()
    assert own == pytest.approx(GREEDY[bits], rel=0.02)
    assert binary_error(CELLS, alphas)[0] / NORMAL.size <= own + 1e-9


@pytest.mark.parametrize("bits", ALTERNATING)
def test_alternating_has_at_most_the_known_error_of_normal_weights(bits: int) -> None:
    fit = BinaryFit.of(NORMAL, bits)
    found = binary_error(CELLS, fit.alphas)[0] / NORMAL.size
    assert found <= 1.02 * ALTERNATING[bits]
    assert found <= 1.001 * float(LinearFit.of(NORMAL, bits).errors().sum()) / NORMAL.size
    assert integer_errors(NORMAL, fit, 64) < 1.02 * found


def test_from_greedy_alone_four_bits_end_worse_than_from_the_uniform_grid() -> None:
    from_greedy = binary_error(CELLS, alternate(CELLS, greedy(NORMAL.T.astype(np.float64), 4)))
    from_uniform = binary_error(CELLS, alternate(CELLS, uniform_start(CELLS, 4)))
    assert from_greedy / NORMAL.size == pytest.approx(0.0120, rel=0.02)
    assert from_uniform / NORMAL.size == pytest.approx(0.0115, rel=0.02)
    assert binary_error(CELLS, BinaryFit.of(NORMAL, 4).alphas) == min(from_greedy, from_uniform)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_uniform_grid_is_a_binary_coding_and_an_offset(bits: int) -> None:
    generator = np.random.default_rng(bits)
    step, zero_point = generator.uniform(0.01, 1, 50), generator.uniform(0, 2**bits, 50)
    alphas, offset = alphas_of_uniform(step, zero_point, bits)
    sums = bit_signs(bits).astype(np.float64) @ alphas + offset
    np.testing.assert_allclose(sums, step * (np.arange(2**bits)[:, None] - zero_point), rtol=0, atol=1e-12)
    midway = alphas_of_uniform(step, (2**bits - 1) / 2, bits)[1]
    np.testing.assert_array_equal(midway, 0)


def test_two_bits_of_symmetric_weights_are_the_best_codebook_of_four_levels() -> None:
    mirrored = np.concatenate([MIXED, -MIXED])
    fit = BinaryFit.of(mirrored, 2)
    columns = SortedColumns.of(mirrored.T)
    np.testing.assert_allclose(binary_error(columns, fit.alphas), columns.error(exact(columns, 4)), rtol=0.05)


def test_one_bit_is_the_mean_absolute_weight() -> None:
    fit = BinaryFit.of(MIXED, 1, groups=4)
    wanted = np.abs(MIXED).reshape(4, 64, 24).mean(axis=1).reshape(-1, 1)
    np.testing.assert_allclose(fit.alphas, wanted, rtol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_groups_lower_the_error_in_integers_too(bits: int) -> None:
    assert integer_errors(MIXED, BinaryFit.of(MIXED, bits, groups=8), 64) < integer_errors(
        MIXED, BinaryFit.of(MIXED, bits), 64
    )


@pytest.mark.parametrize("solver", ["greedy", "alternating"])
def test_zeros_need_no_alpha(solver: str) -> None:
    weight = MIXED.copy()
    weight[:, 3] = 0
    coding, scales = BinaryFit.of(weight, 3, solver=solver).rounded(np.full(24, 64, np.float32))
    assert not coding.alphas[:, :, 3].any()
    assert np.isfinite(scales).all() and (scales > 0).all()
