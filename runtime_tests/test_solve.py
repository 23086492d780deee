from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from scalefold.compiler import saturation
from scalefold.compiler import solve as solve_module
from scalefold.compiler.errors import ScalefoldError
from scalefold.compiler.recipe import WeightFormat
from scalefold.compiler.schemes import Float
from scalefold.compiler.solve import solve
from scalefold.compiler.weight_formats import Codebook

GENERATOR = np.random.default_rng(0)
ROWS, COLUMNS = 64, 18
WEIGHT: Float = (GENERATOR.standard_t(5, (ROWS, COLUMNS)) * GENERATOR.uniform(0.01, 1, COLUMNS)).astype(np.float32)
INPUTS = GENERATOR.standard_normal((200, 12)) @ GENERATOR.standard_normal((12, ROWS)) + GENERATOR.standard_normal(
    (200, ROWS)
)
HESSIAN: npt.NDArray[np.float64] = INPUTS.T @ INPUTS / 200

FORMATS: dict[str, dict[str, Any]] = {
    "linear rtn": {"solver": "rtn"},
    "linear rtn asymmetric": {"solver": "rtn", "symmetric": False},
    "linear mse": {"solver": "mse"},
    "linear mse asymmetric": {"solver": "mse", "symmetric": False},
    "linear hqq": {"solver": "hqq", "symmetric": False},
    "linear groups": {"solver": "mse", "group_size": 16},
    "linear groups asymmetric": {"solver": "mse", "group_size": 16, "symmetric": False},
    "linear groups rtn": {"solver": "rtn", "group_size": 32},
    "linear compensated": {"solver": "mse", "compensation": True},
    "kmeans tensor": {"format": "kmeans", "codebook": "tensor"},
    "kmeans tensor exact": {"format": "kmeans", "codebook": "tensor", "solver": "exact"},
    "kmeans tensor weighted": {"format": "kmeans", "codebook": "tensor", "weighting": "hessian"},
    "kmeans column": {"format": "kmeans", "codebook": "column"},
    "kmeans column exact": {"format": "kmeans", "codebook": "column", "solver": "exact"},
    "kmeans column weighted": {"format": "kmeans", "codebook": "column", "weighting": "hessian"},
    "kmeans column compensated": {"format": "kmeans", "codebook": "column", "compensation": True},
    "kmeans tensor compensated": {"format": "kmeans", "codebook": "tensor", "compensation": True},
    "bcq greedy": {"format": "bcq", "solver": "greedy"},
    "bcq": {"format": "bcq"},
    "bcq groups": {"format": "bcq", "group_size": 16},
    "bcq compensated": {"format": "bcq", "compensation": True},
}  # fmt: skip


def wanted(name: str, bits: int) -> WeightFormat:
    return WeightFormat(bits=bits, **FORMATS[name])


def legal(name: str, bits: int) -> bool:
    limit = {"hqq": 7, "exact": 6}.get(FORMATS[name].get("solver", ""), 8)
    return bits <= (min(limit, 6) if name.startswith("linear groups") else limit)


def relative_error(weight: Float, found: Float) -> float:
    return float(((weight - found) ** 2).sum() / (weight**2).sum())


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_at_every_width_is_close_and_cannot_saturate(name: str) -> None:
    errors = {}
    for bits in (bits for bits in (1, 2, 3, 4, 5, 6, 7, 8) if legal(name, bits)):
        found = solve(WEIGHT, wanted(name, bits), HESSIAN)
        assert saturation.can_saturate(found.integers()) == 0
        assert found.bits == bits and found.codes.shape == WEIGHT.shape
        errors[bits] = relative_error(WEIGHT, found.dequantized())
    assert errors[4] < 0.12
    assert errors[2] < errors[1] and errors[3] < errors[2] and errors[4] < errors[3] and errors[5] < errors[4]


@pytest.mark.parametrize("activation_bits", [6, 7, 8, None])
def test_activations_of_fewer_bits_leave_levels_up_to_127(activation_bits: int | None) -> None:
    pairs = np.ones((64, 6), np.float32) + GENERATOR.uniform(0, 0.5, (64, 6)).astype(np.float32)
    found = solve(pairs, WeightFormat(format="kmeans", codebook="column", bits=4), None, activation_bits)
    assert saturation.can_saturate(found.integers(), activation_bits or 1) == 0
    assert bool(found.integers().max() > 64) is (activation_bits != 8)


def test_a_column_whose_pairs_leave_room_uses_it() -> None:
    lone = WEIGHT.copy()
    lone[1::2] *= -np.sign(lone[1::2] * lone[0::2])
    found = solve(lone, WeightFormat(format="kmeans", codebook="column", bits=4))
    assert (np.abs(found.integers().astype(int)).max(axis=0) > 100).all()
    assert saturation.can_saturate(found.integers()) == 0


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_k_means_per_column_is_at_least_as_good_as_either_linear_baseline(bits: int) -> None:
    weight = np.concatenate([WEIGHT, np.random.default_rng(1).standard_normal((ROWS, 30)).astype(np.float32)], axis=1)
    weight[:, 3] = np.linspace(-1, 1, ROWS)
    weight[:, 4] = np.linspace(0.5, 1, ROWS)
    errors = {
        name: ((weight - solve(weight, wanted(name, bits)).dequantized()) ** 2).sum(axis=0)
        for name in ("kmeans column", "linear mse", "linear mse asymmetric", "linear rtn", "linear rtn asymmetric")
    }
    for name, error in errors.items():
        assert (errors["kmeans column"] <= error * (1 + 1e-5)).all(), name


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_one_codebook_is_at_least_as_good_as_the_symmetric_grids_of_normal_columns(bits: int) -> None:
    weight = (GENERATOR.standard_normal((256, 40)) * GENERATOR.uniform(0.01, 1, 40)).astype(np.float32)
    found = solve(weight, wanted("kmeans tensor", bits))
    assert isinstance(found.decoder, Codebook) and found.decoder.table.shape == (1 << bits, 1)
    grid = relative_error(weight, solve(weight, wanted("linear mse", bits)).dequantized())
    assert relative_error(weight, found.dequantized()) <= grid * 1.001


@pytest.mark.parametrize(
    "name", ["kmeans column", "kmeans tensor", "bcq", "linear mse asymmetric", "linear compensated"]
)
def test_the_number_of_threads_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve_module, "POINTS_PER_BLOCK", 5 * ROWS)
    one, many = (solve(WEIGHT, wanted(name, 3), HESSIAN, threads=threads) for threads in (1, 3))
    assert one.codes.tobytes() == many.codes.tobytes()
    assert one.scales.tobytes() == many.scales.tobytes()
    assert one.levels.tobytes() == many.levels.tobytes()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_columns_of_zeros_and_constants_come_out_as_they_went_in(name: str, bits: int) -> None:
    weight = WEIGHT.copy()
    weight[:, 2], weight[:, 7], weight[:, 11] = 0, 0.37, -1e-3
    found = solve(weight, wanted(name, bits), HESSIAN).dequantized()
    assert np.abs(found[:, 2]).max() < 1e-30
    # A shared codebook and a span that is rounded come close; what rows make up for need not stay constant.
    if name.startswith(("kmeans column", "linear mse", "bcq")) and "compensated" not in name:
        np.testing.assert_allclose(found[:, 7], weight[:, 7], rtol=1e-5)
        np.testing.assert_allclose(found[:, 11], weight[:, 11], rtol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_of_zeros_and_one_of_a_single_row_are_solved(name: str) -> None:
    options = wanted(name, 3)
    assert np.abs(solve(np.zeros_like(WEIGHT), options, HESSIAN).dequantized()).max() < 1e-30
    if options.group_size is None:
        row = solve(WEIGHT[:1], options, HESSIAN[:1, :1]).dequantized()
        np.testing.assert_allclose(row, WEIGHT[:1], rtol=0.4)


@pytest.mark.parametrize("name", ["kmeans column weighted", "kmeans tensor weighted"])
def test_rows_without_input_do_not_draw_levels(name: str) -> None:
    weight, diagonal = WEIGHT.copy(), np.diagonal(HESSIAN).copy()
    weight[10:20] *= 30
    diagonal[10:20] = 0
    live = np.delete(np.arange(ROWS), np.arange(10, 20))
    found = solve(weight, wanted(name, 3), diagonal).dequantized()
    assert relative_error(weight[live], found[live]) < 0.1
    plain = wanted(name.removesuffix(" weighted"), 3)
    assert relative_error(weight[live], solve(weight, plain).dequantized()[live]) > 0.2
    without = solve(WEIGHT, wanted(name, 3), np.zeros(ROWS)).dequantized()
    np.testing.assert_array_equal(without, solve(WEIGHT, plain).dequantized())


@pytest.mark.parametrize(
    "name", ["linear compensated", "kmeans column compensated", "kmeans tensor compensated", "bcq compensated"]
)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_compensation_lowers_the_error_of_the_output(name: str, bits: int) -> None:
    def output_error(options: WeightFormat) -> float:
        lost = WEIGHT - solve(WEIGHT, options, HESSIAN).dequantized()
        return float((lost * (HESSIAN @ lost)).sum())

    options = wanted(name, bits)
    assert output_error(options) < 0.9 * output_error(options.model_copy(update={"compensation": False}))


BROKEN = WEIGHT.copy()
BROKEN[3, 5], BROKEN[0, 9] = np.nan, np.inf
FAULTS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "2 of its columns, the first of them 5, hold NaN or infinity": (BROKEN, {}, None),
    "a weight of shape (64,) is not a matrix": (WEIGHT[:, 0], {}, None),
    "a weight of shape (0, 18) is not a matrix": (WEIGHT[:0], {}, None),
    "groups of 24 do not divide its 64 rows": (WEIGHT, {"bits": 4, "group_size": 24}, None),
    "compensation and weighting need a Hessian": (WEIGHT, {"compensation": True}, None),
    "a Hessian of shape (64,) is not (64, 64)": (WEIGHT, {"compensation": True}, np.ones(ROWS)),
    "a Hessian of shape (3, 3) is not (64, 64) or (64,)": (
        WEIGHT, {"format": "kmeans", "weighting": "hessian"}, np.ones((3, 3)),
    ),
    "its Hessian holds NaN": (WEIGHT, {"compensation": True}, np.full((ROWS, ROWS), np.nan)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_refused_in_one_sentence_that_names_the_weight(fault: str) -> None:
    weight, options, hessian = FAULTS[fault]
    with pytest.raises(ScalefoldError) as caught:
        solve(weight, WeightFormat(**options), hessian, name="layer.0.query")
    assert fault in caught.value.what
    assert caught.value.where == "layer.0.query"
