from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import saturation, schemes
from scalefold.compiler.runtime import Array, Session
from scalefold.compiler.schemes import Affine, Codes, Float

GENERATOR = np.random.default_rng(3)


def parse(inputs: str, outputs: str, body: str) -> Session:
    text = (
        f'<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>\nmodel ({inputs}) => ({outputs}) {{ {body} }}'
    )
    return Session(ir.from_onnx_text(text), optimize=False)


QUANTIZE = parse("float[n] x, float s, uint8 z", "uint8[n] q", "q = QuantizeLinear(x, s, z)")
DEQUANTIZE = parse("uint8[n] q, float s, uint8 z", "float[n] x", "x = DequantizeLinear(q, s, z)")
WEIGHTS = parse("float[k, n] w, float[n] s, int8[n] z", "int8[k, n] q", "q = QuantizeLinear<axis = 1>(w, s, z)")
GRIDS = [
    Affine(0.5, 0), Affine(0.25, 255), Affine(1.0, 128), Affine(0.1, 7), Affine(3.0e-3, 200), Affine(1.7e5, 31),
    Affine(0.3, 9, 4),
]  # fmt: skip


def grid_constants(grid: Affine) -> dict[str, Array]:
    return {"s": np.array(grid.scale, np.float32), "z": np.array(grid.zero_point, np.uint8)}


def runtime_codes(x: Float, grid: Affine) -> Codes:
    found: Codes = QUANTIZE.run({"x": x, **grid_constants(grid)})["q"]
    return found


@pytest.mark.parametrize("grid", GRIDS[:-1])
def test_codes_are_those_of_onnxruntime_for_every_code_every_tie_and_beyond_the_range(grid: Affine) -> None:
    steps = np.arange(-20, 276, dtype=np.float32) - np.float32(grid.zero_point)
    for offset in (0.0, 0.5, -0.5, 0.49999997, 0.25):
        x = ((steps + np.float32(offset)) * np.float32(grid.scale)).astype(np.float32)
        np.testing.assert_array_equal(grid.quantize(x), runtime_codes(x, grid))


def test_exact_ties_go_to_the_even_step_before_the_zero_point_is_added() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5], np.float32)
    assert Affine(1.0, 101).quantize(x).tolist() == [101, 103, 103, 101, 99, 99]


@pytest.mark.parametrize("grid", GRIDS)
def test_random_numbers_get_the_codes_and_values_of_onnxruntime(grid: Affine) -> None:
    x = (GENERATOR.standard_normal(20000) * 80 * grid.scale).astype(np.float32)
    codes = grid.quantize(x)
    np.testing.assert_array_equal(codes, np.minimum(runtime_codes(x, grid), grid.largest_code))
    values = DEQUANTIZE.run({"q": codes, **grid_constants(grid)})["x"]
    np.testing.assert_array_equal(grid.dequantize(codes), values)
    np.testing.assert_array_equal(grid.round_trip(x), grid.dequantize(codes))


@pytest.mark.parametrize("grid", GRIDS)
def test_a_round_trip_leaves_its_input_as_it_was(grid: Affine) -> None:
    x = GENERATOR.standard_normal(100).astype(np.float32)
    copy = x.copy()
    grid.round_trip(x)
    np.testing.assert_array_equal(x, copy)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_grid_holds_zero_exactly_and_covers_its_range_to_half_a_step(bits: int) -> None:
    for _ in range(200):
        low, high = np.sort(GENERATOR.standard_normal(2) * 10.0 ** GENERATOR.integers(-6, 6))
        grid = schemes.activation_grid(low, high, bits)
        assert 0 <= grid.zero_point <= grid.largest_code == 2**bits - 1
        assert grid.round_trip(np.zeros(1, np.float32)).tolist() == [0.0]
        tolerance = grid.scale * 0.5001
        assert grid.low <= min(low, 0.0) + tolerance
        assert grid.high >= max(high, 0.0) - tolerance
        ends = np.array([min(low, 0.0), max(high, 0.0)], np.float32)
        assert (np.abs(grid.round_trip(ends) - ends) <= tolerance).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("low", "high"), [(3.0, 3.0), (-2.0, -2.0), (1.0, 4.0), (-4.0, -1.0)])
def test_a_grid_of_one_sign_reaches_from_zero(low: float, high: float, bits: int) -> None:
    grid = schemes.activation_grid(low, high, bits)
    assert grid.zero_point == (0 if high > 0 else grid.largest_code)
    np.testing.assert_allclose([grid.low, grid.high], [min(low, 0), max(high, 0)], rtol=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_tensor_of_zeros_gets_a_grid_that_divides_by_no_zero(bits: int) -> None:
    grid = schemes.activation_grid(0.0, 0.0, bits)
    assert grid.scale > 0
    assert np.isfinite(grid.round_trip(np.zeros(3, np.float32))).all()
    assert grid.quantize(np.zeros(3, np.float32)).tolist() == [0, 0, 0]


def test_the_widest_range_of_float32_stays_finite() -> None:
    largest = float(np.finfo(np.float32).max) / 4
    grid = schemes.activation_grid(-largest, largest)
    assert np.isfinite([grid.scale, grid.low, grid.high]).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_grid_of_a_row_reaches_from_0_to_1_and_never_needs_its_ends_clipped(bits: int) -> None:
    grid = schemes.row_grid(bits)
    assert grid.quantize(np.array([0, 1], np.float32)).tolist() == [0, 2**bits - 1]
    np.testing.assert_allclose(grid.round_trip(np.array([0, 1], np.float32)), [0, 1], rtol=1e-6)
    rows = GENERATOR.standard_normal((500, 7)).astype(np.float32)
    low = rows.min(axis=1, keepdims=True)
    codes = np.rint((rows - low) / (rows.max(axis=1, keepdims=True) - low) / np.float32(grid.scale))
    assert (codes.min(), codes.max()) == (0, grid.largest_code)


@pytest.mark.parametrize(("low", "high"), [(-3.0, 5.0), (0.0, 7.0), (-2.0, 0.0), (-1e-30, 3000.0)])
def test_two_codes_hold_a_range_to_a_64th_of_what_one_does_and_four_times_as_far(low: float, high: float) -> None:
    coarse, fine = schemes.two_code_grids(low, high)
    assert fine.zero_point == 128 and fine.scale * 256 == pytest.approx(coarse.scale, rel=1e-6)
    inside = np.linspace(4 * low, 4 * high, 4001).astype(np.float32)
    rough = coarse.dequantize(coarse.quantize(inside))
    error = np.abs(rough + fine.dequantize(fine.quantize(inside - rough)) - inside)
    one = schemes.activation_grid(low, high)
    assert error.max() <= fine.scale * 1.01 <= one.scale / 63
    assert not (coarse.dequantize(coarse.quantize(np.zeros(1, np.float32)))).any()


def test_column_sums_are_those_of_the_weight_the_graph_sees() -> None:
    weight = GENERATOR.standard_normal((600, 9)).astype(np.float32)
    scales = schemes.column_scales(weight)
    found = schemes.column_sums(schemes.weight_codes(weight, scales), scales)
    expected = schemes.weight_round_trip(weight).sum(axis=0, dtype=np.float64)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "largest"), [(2, 1), (3, 3), (4, 7), (5, 15), (6, 31), (7, 63), (8, 127)])
def test_weight_codes_are_narrow_and_symmetric(bits: int, largest: int) -> None:
    assert schemes.largest_weight_code(bits) == largest
    weight = GENERATOR.standard_normal((40, 6)).astype(np.float32)
    for sign in (1, -1):
        codes = schemes.weight_codes(sign * weight, schemes.column_scales(weight, bits), bits)
        assert np.abs(codes).max() <= largest
        np.testing.assert_array_equal(
            codes, sign * schemes.weight_codes(weight, schemes.column_scales(weight, bits), bits)
        )


def test_weight_codes_are_those_of_onnxruntime() -> None:
    weight = GENERATOR.standard_normal((64, 10)).astype(np.float32)
    scales = schemes.column_scales(weight)
    feed: dict[str, Array] = {"w": weight, "s": scales, "z": np.zeros(10, np.int8)}
    np.testing.assert_array_equal(schemes.weight_codes(weight, scales), WEIGHTS.run(feed)["q"])


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_weight_round_trip_is_its_codes_times_their_scales(bits: int) -> None:
    weight = GENERATOR.standard_normal((33, 7)).astype(np.float32)
    scales = schemes.column_scales(weight, bits)
    expected = schemes.weight_codes(weight, scales, bits).astype(np.float32) * scales
    np.testing.assert_array_equal(schemes.weight_round_trip(weight, bits), expected)


def test_a_column_or_row_of_zeros_has_a_scale_of_one_and_codes_of_zero() -> None:
    weight = GENERATOR.standard_normal((6, 4)).astype(np.float32)
    weight[:, 2] = 0
    assert schemes.column_scales(weight)[2] == 1
    assert not schemes.weight_codes(weight, schemes.column_scales(weight))[:, 2].any()
    assert schemes.row_scales(weight.T)[2] == 1
    assert schemes.column_scales(np.zeros((1, 1), np.float32)).tolist() == [1]


def test_each_row_of_a_table_has_a_scale_of_its_own() -> None:
    table = np.array([[1.27, -0.5], [0.0, -254.0]], np.float32)
    np.testing.assert_allclose(schemes.row_scales(table), [0.01, 2.0], rtol=1e-6)
    np.testing.assert_allclose(schemes.row_scales(table, 4), [1.27 / 7, 254 / 7], rtol=1e-6)


def test_bias_codes_round_half_to_even_and_stay_within_int32() -> None:
    bias, scales = np.array([2.5, 3.5, -2.5, 1e30, -1e30, 0.0], np.float32), np.ones(6, np.float32)
    assert schemes.bias_codes(bias, scales).tolist() == [2, 4, -2, 2**31 - 1, -(2**31), 0]
    assert schemes.bias_codes(bias[:2], np.array([0.5, 2.0], np.float32)).tolist() == [5, 2]


# ---- saturation: what onnxruntime's u8s8 kernel computes must be the integer product on every CPU


def adversarial(rows: int) -> Float:
    """Columns that a kernel of 16-bit pairs gets wrong most easily."""
    alternating = np.where(np.arange(rows) % 2, -1.0, 1.0)
    columns = [
        np.ones(rows),
        -np.ones(rows),
        alternating,
        np.where(np.arange(rows) % 4 < 2, 1.0, -1.0),
        np.where(np.arange(rows) < 2, 1.0, 1e-3),
        np.where(np.arange(rows) >= rows - 2, 1.0, 1e-3),
        np.where(np.arange(rows) % 2, 0.0155, 1.0),
        np.linspace(0.4, 1.0, rows),
        np.full(rows, 0.505) + 0.495 * (np.arange(rows) % 2),
    ]
    return np.stack(columns, axis=1).astype(np.float32)


def weights_of(kind: str, rows: int) -> Float:
    if kind == "random":
        return np.random.default_rng(rows).standard_normal((rows, 48)).astype(np.float32)
    if kind == "heavy-tailed":
        return np.random.default_rng(rows).standard_t(2, (rows, 48)).astype(np.float32)
    return adversarial(rows)


@pytest.mark.parametrize("kind", ["random", "heavy-tailed", "adversarial"])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 64, 65, 129, 384])
@pytest.mark.parametrize("bits", [7, 8])
def test_the_integer_kernel_gives_the_exact_product(kind: str, rows: int, bits: int) -> None:
    weight = weights_of(kind, rows)
    columns = weight.shape[1]
    codes = schemes.weight_codes(weight, schemes.column_scales(weight, bits), bits)
    fused = parse(
        "uint8[m, k] a, int8[k, n] b, float s, float[n] t, uint8 z",
        "float[m, n] y",
        "y = com.microsoft.MatMulIntegerToFloat(a, b, s, t, z)",
    )
    for activations in (
        np.full((9, rows), 255, np.uint8),
        np.random.default_rng(1).integers(0, 256, (9, rows)).astype(np.uint8),
    ):
        feed: dict[str, Array] = {
            "a": activations,
            "b": codes,
            "s": np.array(1, np.float32),
            "t": np.ones(columns, np.float32),
            "z": np.array(0, np.uint8),
        }
        product = activations.astype(np.int64) @ codes.astype(np.int64)
        assert np.abs(product).max() < 2**24  # float32 holds it exactly
        np.testing.assert_array_equal(fused.run(feed)["y"], product.astype(np.float32))


@pytest.mark.parametrize("kind", ["random", "heavy-tailed", "adversarial"])
@pytest.mark.parametrize("rows", [2, 3, 64, 65])
def test_no_column_of_safe_codes_can_saturate(kind: str, rows: int) -> None:
    weight = weights_of(kind, rows)
    codes = schemes.weight_codes(weight, schemes.column_scales(weight))
    assert saturation.can_saturate(codes) == 0
    even, odd = codes[0 : rows - rows % 2 : 2].astype(np.int64), codes[1::2].astype(np.int64)
    assert np.abs(255 * (even + odd)).max() <= 32767


def test_columns_that_can_saturate_are_counted() -> None:
    codes = np.array(
        [[127, 64, 127, -127, 1, 127], [2, 64, -127, -2, 127, 1], [0, 0, 0, 0, 127, 127], [0, 1, 0, 0, 0, 0]], np.int8
    )
    # 129, 128 (safe), opposite signs (safe), -129, 128 (safe) with its pair (1, 127), and 128
    assert saturation.can_saturate(codes) == 2
    assert saturation.can_saturate(codes, activation_bits=7) == 0
    assert saturation.can_saturate(codes[:1]) == 0


def test_an_odd_last_row_meets_nobody_and_is_not_widened() -> None:
    weight = np.array([[0.5], [0.25], [127.0]], np.float32)
    assert schemes.column_scales(weight).tolist() == [1.0]


def test_neighbours_of_opposite_sign_and_weights_of_7_bits_are_not_widened() -> None:
    opposite = np.array([[127.0], [-127.0]], np.float32)
    assert schemes.column_scales(opposite).tolist() == [1.0]
    same = np.array([[63.0], [63.0]], np.float32)
    assert schemes.column_scales(same, bits=7).tolist() == [1.0]
    assert schemes.column_scales(np.array([[127.0], [127.0]], np.float32), activation_bits=7).tolist() == [1.0]
