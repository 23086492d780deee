from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from scalefold.compiler.nearest_level import nearest_codes
from scalefold.compiler.solve_kmeans import KMeansFit, companded, exact, lloyd, plus_plus
from scalefold.compiler.sorted_columns import Double, SortedColumns

NORMAL = SortedColumns.of(np.random.default_rng(0).standard_normal((1, 100_000)))
# Mean squared error on N(0, 1) by bits: what 100 rounds of Lloyd reach, and the optimum (Max 1960).
LLOYD = {1: 0.3638, 2: 0.1178, 3: 0.0346, 4: 0.0095, 5: 0.0028}
OPTIMUM = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}


def grid(columns: SortedColumns, bits: int) -> Double:
    low, high = columns.points[:, :1], columns.points[:, -1:]
    return np.asarray(low + (high - low) * np.arange(1 << bits) / ((1 << bits) - 1))


def integer_error(columns: SortedColumns, fit: KMeansFit, limit: float) -> Double:
    codebook, scales = fit.rounded(np.full(columns.count, limit, np.float32), [])
    return columns.error(codebook.table.T.astype(np.float64) * scales[:, None])


@pytest.mark.parametrize("beyond", [0.0, 1.0, 10.0])
def test_the_error_of_levels_is_that_of_the_nearest_level_for_each_point(beyond: float) -> None:
    generator = np.random.default_rng(2)
    points, importance = generator.standard_normal((30, 50)), generator.random((30, 50))
    points[4], points[5, 10:] = 0.3, points[5, 0]
    levels = np.sort(generator.standard_normal((30, 9)) * 2 + beyond, axis=1)
    wanted = (importance * np.abs(points[:, :, None] - levels[:, None]).min(axis=2) ** 2).sum(axis=1)
    np.testing.assert_allclose(SortedColumns.of(points, importance).error(levels), wanted, rtol=1e-9)


@pytest.mark.parametrize("bits", LLOYD)
def test_lloyd_reaches_the_known_error_of_normal_weights(bits: int) -> None:
    size = NORMAL.points.size
    fit = KMeansFit.of(NORMAL, [grid(NORMAL, bits)], "lloyd")
    found = NORMAL.error(fit.levels)[0] / size
    assert found <= 1.02 * LLOYD[bits]
    assert found == pytest.approx(OPTIMUM[bits], rel=0.02)
    seeded = NORMAL.error(lloyd(NORMAL, plus_plus(NORMAL, 1 << bits, 0), 100)[0])[0] / size
    assert seeded <= 1.02 * LLOYD[bits]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_in_int8_cost_less_than_two_percent_up_to_four_bits(bits: int) -> None:
    fit = KMeansFit.of(NORMAL, [grid(NORMAL, bits)], "lloyd")
    assert integer_error(NORMAL, fit, 64) < 1.02 * NORMAL.error(fit.levels)


@pytest.mark.parametrize("weighted", [False, True])
def test_exact_is_the_best_of_all_partitions(weighted: bool) -> None:
    generator = np.random.default_rng(3)
    points = generator.standard_normal((5, 13))
    points[3, :6] = points[3, 6]
    importance = generator.random((5, 13)) if weighted else None
    columns = SortedColumns.of(points, importance)
    mass, moment = columns.mass, columns.moment
    for count in (1, 2, 4):
        found = columns.error(exact(columns, count))
        for column in range(5):
            gains = []
            for inner in combinations(range(1, 13), count - 1):
                edges = np.array([0, *inner, 13])
                gains.append((np.diff(moment[column][edges]) ** 2 / np.diff(mass[column][edges])).sum())
            assert found[column] == pytest.approx(columns.energy[column] - max(gains), abs=1e-12)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_exact_is_never_worse_than_lloyd_and_lloyd_comes_close(bits: int) -> None:
    columns = SortedColumns.of(np.random.default_rng(4).standard_t(5, (12, 384)))
    best = columns.error(exact(columns, 1 << bits))
    near = columns.error(KMeansFit.of(columns, [grid(columns, bits)], "lloyd").levels)
    assert (best <= near * (1 + 1e-9)).all()
    assert near.sum() < 1.25 * best.sum()


def test_more_levels_than_points_are_no_error() -> None:
    columns = SortedColumns.of(np.array([[1.0, 2.0, 5.0], [4.0, 4.0, 4.0]]))
    for solver in ("exact", "lloyd"):
        fit = KMeansFit.of(columns, [grid(columns, 3)], solver)
        assert columns.error(fit.levels) == pytest.approx([0, 0], abs=1e-12)


def test_importance_moves_the_levels() -> None:
    points = np.array([[0.0, 1.0, 10.0, 11.0]])
    columns = SortedColumns.of(points, np.array([[3.0, 1.0, 1.0, 1.0]]))
    assert exact(columns, 2)[0] == pytest.approx([0.25, 10.5])
    assert KMeansFit.of(columns, [grid(columns, 1)], "lloyd").levels[0] == pytest.approx([0.25, 10.5])


def test_the_companded_start_is_already_close() -> None:
    assert NORMAL.error(companded(NORMAL, 32))[0] / NORMAL.points.size < 1.1 * OPTIMUM[5]


def test_a_histogram_stands_for_the_values_it_is_made_of() -> None:
    values = np.random.default_rng(5).standard_normal((300, 40))
    importance = np.random.default_rng(6).random((300, 1))
    low, high = float(values.min()), float(values.max())
    pooled = SortedColumns.histogram([(values[:, :25], importance), (values[:, 25:], importance)], low, high)
    whole = SortedColumns.of(values.reshape(1, -1), np.repeat(importance, 40, axis=1).reshape(1, -1))
    levels = exact(SortedColumns.of(values[:, :1].T), 8)
    assert pooled.error(levels) == pytest.approx(whole.error(levels), rel=1e-3)


def test_integers_of_a_codebook_are_found_again_by_the_nearest_level() -> None:
    weight = np.random.default_rng(7).standard_normal((200, 6)).astype(np.float32)
    columns = SortedColumns.of(weight.T)
    fit = KMeansFit.of(columns, [grid(columns, 3)], "lloyd")
    codebook, scales = fit.rounded(np.full(6, 100, np.float32), [])
    levels = codebook.table * scales
    codes = nearest_codes(weight, codebook.levels(3), scales)
    found = np.take_along_axis(levels, codes, axis=0)
    np.testing.assert_allclose(np.abs(weight - found), np.abs(weight[:, None] - levels).min(axis=1), atol=1e-6)
