from __future__ import annotations

import numpy as np
import pytest

from scalefold.compiler import schemes
from scalefold.compiler.errors import CalibrationError, PatternError
from scalefold.compiler.protocol import Context
from scalefold.compiler.runtime import Array, Feed, Session
from scalefold.compiler.testing import check_pass, parse
from scalefold.passes.insert_qdq import InsertQdq

# The feeds reach from -51 to 204: a step of exactly 1 and a zero point of 51.
FEEDS: list[Feed] = [
    {"x": np.array([[[-51.0, 2.0], [3.0, 4.0]]], np.float32)},
    {"x": np.array([[[1.0, 204.0]]], np.float32)},
]
HEAD = """<ir_version: 10, opset_import: ["" : 20]>
model (float[b, s, 2] x) => (float[b, s, 3] y)
<int8[2, 3] codes = {1, 2, 3, 4, -5, 6}, float[3] scales = {0.5, 0.25, 1.0}, float[2, 3] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0},
 float s = {1.0}, uint8 z = {51}, float s6 = {%s}, uint8 z6 = {13}, float low = {%s}, float high = {%s}>
"""
SIX = schemes.activation_grid(-51, 204, 6)
HEAD = HEAD % (repr(SIX.scale), repr(SIX.low), repr(SIX.high))
WEIGHT = "d = DequantizeLinear<axis = 1>(codes, scales)"


def test_the_input_of_a_quantized_layer_is_quantized() -> None:
    result = check_pass(
        InsertQdq(),
        before=HEAD + f"{{ {WEIGHT} [fc] y = MatMul(x, d) }}",
        after=HEAD
        + f"{{ {WEIGHT} q = QuantizeLinear(x, s, z)  r = DequantizeLinear(q, s, z)  [fc] y = MatMul(r, d) }}",
        feeds=FEEDS,
    )
    (event,) = result.rewrites
    assert (event.where, event.reason) == ("fc", "uint8 per tensor, 1 readers")
    assert dict(event.figures) == {"low": -51.0, "high": 204.0, "scale": 1.0, "zero_point": 51}


def test_below_8_bits_a_clip_keeps_the_codes_in_range() -> None:
    check_pass(
        InsertQdq(bits=6),
        before=HEAD + f"{{ {WEIGHT} [fc] y = MatMul(x, d) }}",
        after=HEAD
        + f"""{{ {WEIGHT} c = Clip(x, low, high)  q = QuantizeLinear(c, s6, z6)  r = DequantizeLinear(q, s6, z6)
                 [fc] y = MatMul(r, d) }}""",
        feeds=FEEDS,
    )


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_stays_within_what_its_bits_can_hold(bits: int) -> None:
    spread = np.random.default_rng(bits).standard_normal((4, 50, 2)).astype(np.float32)
    check_pass(InsertQdq(bits=bits), before=HEAD + f"{{ {WEIGHT} [fc] y = MatMul(x, d) }}", feeds=[{"x": spread - 1}])


def test_layers_that_read_one_value_share_its_quantizer() -> None:
    result = check_pass(
        InsertQdq(),
        before=HEAD
        + f"""{{ {WEIGHT} [first] a = MatMul(x, d)  e = DequantizeLinear<axis = 1>(codes, scales)
                 [second] b = MatMul(x, e)  y = Add(a, b) }}""",
        after=HEAD
        + f"""{{ {WEIGHT} q = QuantizeLinear(x, s, z)  r = DequantizeLinear(q, s, z)  [first] a = MatMul(r, d)
                 e = DequantizeLinear<axis = 1>(codes, scales)  [second] b = MatMul(r, e)  y = Add(a, b) }}""",
        feeds=FEEDS,
    )
    assert [event.reason for event in result.rewrites] == ["uint8 per tensor, 2 readers"]


def test_other_readers_keep_the_float_value() -> None:
    check_pass(
        InsertQdq(),
        before=HEAD + f"{{ {WEIGHT} [fc] p = MatMul(x, d)  [float] f = MatMul(x, w)  y = Add(p, f) }}",
        after=HEAD
        + f"""{{ {WEIGHT} q = QuantizeLinear(x, s, z)  r = DequantizeLinear(q, s, z)  [fc] p = MatMul(r, d)
                 [float] f = MatMul(x, w)  y = Add(p, f) }}""",
        feeds=FEEDS,
    )


def test_a_layer_whose_input_is_quantized_already_is_declined() -> None:
    before = HEAD + f"{{ {WEIGHT} q = QuantizeLinear(x, s, z)  r = DequantizeLinear(q, s, z)  [fc] y = MatMul(r, d) }}"
    result = check_pass(InsertQdq(), before=before, after=before, feeds=FEEDS)
    assert [(event.where, event.reason) for event in result.declined] == [("fc", "its input is quantized already")]


def test_two_values_get_the_ranges_of_their_own() -> None:
    result = check_pass(
        InsertQdq(),
        before=HEAD.replace("y)", "y, float[b, s, 3] t)")
        + f"""{{ {WEIGHT} [first] y = MatMul(x, d)  h = Neg(x)  e = DequantizeLinear<axis = 1>(codes, scales)
                 [second] t = MatMul(h, e) }}""",
        feeds=FEEDS,
    )
    assert [event.figures["zero_point"] for event in result.rewrites] == [51, 204]


def test_without_calibration_the_error_says_what_is_missing() -> None:
    with pytest.raises(CalibrationError, match="needs calibration samples"):
        check_pass(InsertQdq(), before=HEAD + f"{{ {WEIGHT} [fc] y = MatMul(x, d) }}", feeds=FEEDS, context=Context())


ROWS_HEAD = """<ir_version: 10, opset_import: ["" : %d]>
model (float[b, s, 4] x) => (float[b, s, 3] y)
<int8[4, 3] codes = {100, 2, 33, -47, -5, 90, 11, 90, -8, 64, 7, -99}, float[3] scales = {0.01, 0.02, 0.01},
 float[3] c = {0.5, -1.0, 0.25}, float[3] k = {1.28, 1.88, 0.16},
 float[4, 3] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0},
 int64[1] axes = {-1}, float tiny = {%s}, float t = {%s}, uint8 m = {%d}, float s = {1.0}, uint8 z = {51}>
"""
TOKEN = InsertQdq(granularity="per-token")
ROWS = """a = ReduceMin(x, axes)  l = ReduceMax(x, axes)  n = Sub(l, a)  r = Max(n, tiny)  o = Sub(x, a)  u = Div(o, r)
          q = QuantizeLinear(u, t, m)  v = DequantizeLinear(q, t, m)"""


def restored(product: str, out: str) -> str:
    """What gives the rows of `product` their range back; k are the sums of the columns of the weight."""
    return f"{product}0 = Mul({product}, r)  {product}1 = Mul(a, k)  {out} = Add({product}0, {product}1)"


def rows_head(bits: int = 8, opset: int = 20) -> str:
    grid = schemes.row_grid(bits)
    return ROWS_HEAD % (opset, repr(schemes.SMALLEST_SCALE), repr(grid.scale), grid.zero_point)


def spread_rows(seed: int = 0) -> Array:
    """Twelve tokens whose sizes lie between 0.001 and 1000."""
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((2, 6, 4)) * 10 ** generator.uniform(-3, 3, (2, 6, 1))
    return np.asarray(rows, dtype=np.float32)


@pytest.mark.parametrize(("bits", "step", "middle"), [(8, 1 / 255, 0), (6, 1 / 63, 0), (4, 1 / 15, 0), (2, 1 / 3, 0)])
def test_per_token_each_row_is_brought_to_its_range_and_back(bits: int, step: float, middle: int) -> None:
    head = ROWS_HEAD % (20, repr(schemes.SMALLEST_SCALE), repr(step), middle)
    result = check_pass(
        InsertQdq(bits, "per-token"),
        before=head + f"{{ {WEIGHT} [fc] p = MatMul(x, d)  y = Add(p, c) }}",
        after=head + f"{{ {WEIGHT} {ROWS} [fc] p = MatMul(v, d)  {restored('p', 'h')}  y = Add(h, c) }}",
        feeds=[{"x": spread_rows()}],
    )
    assert [(event.where, event.reason) for event in result.rewrites] == [("fc", f"uint{bits} per token, 1 readers")]


def test_per_token_needs_no_calibration() -> None:
    check_pass(
        TOKEN,
        before=rows_head() + f"{{ {WEIGHT} [fc] y = MatMul(x, d) }}",
        after=rows_head() + f"{{ {WEIGHT} {ROWS} [fc] p = MatMul(v, d)  {restored('p', 'y')} }}",
        feeds=[{"x": spread_rows()}],
        context=Context(),
    )


def test_before_opset_18_the_axis_is_an_attribute() -> None:
    check_pass(
        TOKEN,
        before=rows_head(opset=17) + f"{{ {WEIGHT} [fc] y = MatMul(x, d) }}",
        after=rows_head(opset=17)
        + f"{{ {WEIGHT} {ROWS.replace('(x, axes)', '<axes = [-1]>(x)')}"
        + f"[fc] p = MatMul(v, d)  {restored('p', 'y')} }}",
        feeds=[{"x": spread_rows()}],
    )


def test_per_token_layers_that_read_one_value_share_its_rows() -> None:
    second = "e = DequantizeLinear<axis = 1>(codes, scales)  [second]"
    result = check_pass(
        TOKEN,
        before=rows_head() + f"{{ {WEIGHT} [first] f = MatMul(x, d)  {second} g = MatMul(x, e)  y = Sub(f, g) }}",
        after=rows_head()
        + f"""{{ {WEIGHT} {ROWS} [first] h = MatMul(v, d)  {restored("h", "f")}  {second} i = MatMul(v, e)
                 {restored("i", "g")}  y = Sub(f, g) }}""",
        feeds=[{"x": spread_rows()}],
    )
    assert [event.reason for event in result.rewrites] == ["uint8 per token, 2 readers"]


def test_a_value_that_layers_of_both_kinds_read_gets_both_quantizers() -> None:
    second = "e = DequantizeLinear<axis = 1>(codes, scales)  [second]"
    feed = {"x": np.array([[[-51.0, 2.0, 7.0, 11.0], [3.0, 4.0, 204.0, 3.0]]], np.float32)}
    result = check_pass(
        InsertQdq(per_token=("^second$",)),
        before=rows_head() + f"{{ {WEIGHT} [first] f = MatMul(x, d)  {second} g = MatMul(x, e)  y = Add(f, g) }}",
        after=rows_head()
        + f"""{{ {WEIGHT} kq = QuantizeLinear(x, s, z)  j = DequantizeLinear(kq, s, z)  [first] f = MatMul(j, d)
                 e = DequantizeLinear<axis = 1>(codes, scales) {ROWS} [second] i = MatMul(v, e)  {restored("i", "g")}
                 y = Add(f, g) }}""",
        feeds=[feed],
    )
    assert [event.reason for event in result.rewrites] == ["uint8 per tensor, 1 readers", "uint8 per token, 1 readers"]


SQUARE = """<ir_version: 10, opset_import: ["" : 20]>
model (float[b, s, 3] x) => (float[b, s, 3] y)
<int8[3, 3] codes = {100, 2, 33, -47, -5, 90, 11, 90, -8}, float[3] scales = {0.01, 0.02, 0.01}>
{ d = DequantizeLinear<axis = 1>(codes, scales)  [first] h = MatMul(x, d)
  e = DequantizeLinear<axis = 1>(codes, scales)  [second] y = MatMul(h, e) }"""


@pytest.mark.parametrize("named", [("first",), ("second",), ("first", "second")], ids=" and ".join)
def test_a_layer_right_behind_another_reads_its_rescaled_rows(named: tuple[str, ...]) -> None:
    check_pass(InsertQdq(per_token=named), before=SQUARE, feeds=[{"x": spread_rows()[..., :3]}])


def test_layers_keep_the_names_of_their_outputs() -> None:
    model = parse(SQUARE)
    TOKEN.run(model, Context())
    assert [(node.name, node.outputs[0].name) for node in model.graph if node.op_type == "Add"] == [
        ("first.restore_rows", "h"),
        ("second.restore_rows", "y"),
    ]


def test_a_pattern_of_per_token_layers_that_matches_none_is_an_error() -> None:
    before = rows_head() + f"{{ {WEIGHT} [fc] y = MatMul(x, d) }}"
    with pytest.raises(PatternError, match="per-token pattern 'down_proj': it matches none of the 1 linear layers"):
        check_pass(InsertQdq(per_token=("fc", "down_proj")), before=before, feeds=[{"x": spread_rows()}])


def test_a_pattern_may_name_a_layer_that_stays_float() -> None:
    before = rows_head() + f"{{ {WEIGHT} [fc] p = MatMul(x, d)  [float] f = MatMul(x, w)  y = Add(p, f) }}"
    result = check_pass(InsertQdq(per_token=("float",)), before=before, feeds=[{"x": spread_rows()}])
    assert [event.reason for event in result.rewrites] == ["uint8 per tensor, 1 readers"]


def test_a_gemm_cannot_be_per_token() -> None:
    flat = rows_head().replace("b, s, ", "n, ")
    before = flat + f"{{ {WEIGHT} [odd] y = Gemm(x, d, c) }}"
    result = check_pass(TOKEN, before=before, after=before, feeds=[{"x": spread_rows()[0]}])
    assert [(event.where, event.reason) for event in result.declined] == [
        ("odd", "its rows cannot be restored before its bias: not in normal form")
    ]


@pytest.fixture(scope="module", params=[8, 6, 3, 2])
def rows_session(request: pytest.FixtureRequest) -> tuple[int, Session]:
    """A layer whose rows are quantized to some bits, which returns its codes too."""
    model = parse(rows_head(request.param) + f"{{ {WEIGHT} [fc] p = MatMul(x, d)  y = Add(p, c) }}")
    InsertQdq(request.param, "per-token").run(model, Context())
    codes = next(node for node in model.graph if node.op_type == "QuantizeLinear").outputs[0]
    return request.param, Session(model, outputs=["y", codes.name or ""])


def run_rows(session: tuple[int, Session], x: Array) -> tuple[Array, Array]:
    y, codes = session[1].run({"x": np.asarray(x, dtype=np.float32)}).values()
    return y, codes


def test_a_row_gets_the_same_bits_alone_and_beside_any_other(rows_session: tuple[int, Session]) -> None:
    batch = spread_rows(5).reshape(-1, 1, 4)
    batch[3] *= 1e6
    y, codes = run_rows(rows_session, batch)
    for index, row in enumerate(batch):
        alone = run_rows(rows_session, row[None])
        np.testing.assert_array_equal(codes[index], alone[1][0])
        np.testing.assert_array_equal(y[index], alone[0][0])


def test_codes_use_all_that_the_bits_hold_and_no_more(rows_session: tuple[int, Session]) -> None:
    bits, _ = rows_session
    rows = np.concatenate([spread_rows(seed) for seed in range(40)])
    codes = run_rows(rows_session, rows)[1]
    assert (codes.min(axis=-1) == 0).all()
    assert (codes.max(axis=-1) == 2**bits - 1).all()


def test_a_row_of_zeros_is_the_bias_exactly(rows_session: tuple[int, Session]) -> None:
    y, codes = run_rows(rows_session, np.stack([np.zeros((1, 4)), np.full((1, 4), 3385.0)]))
    assert y[0, 0].tolist() == [0.5, -1.0, 0.25]
    assert not codes.any()
    np.testing.assert_allclose(y[1, 0], 3385 * np.array([1.28, 1.88, 0.16]) + [0.5, -1.0, 0.25], rtol=1e-6)


def test_a_massive_row_leaves_the_small_one_its_precision() -> None:
    small = np.array([[1.0, -0.5, 0.25, 0.75]], np.float32)
    massive = np.array([[3385.0, 1.0, -2.0, 0.5]], np.float32)
    model = parse(rows_head() + f"{{ {WEIGHT} [fc] y = MatMul(x, d) }}")
    wanted = Session(model, optimize=False).run({"x": np.stack([small, massive])})["y"]
    TOKEN.run(model, Context())
    got = Session(model).run({"x": np.stack([small, massive])})["y"]
    # Each entry of a row is off by at most half a step of that row, its span / 510, and columns' magnitudes sum up to 2.3.
    limits = np.ptp([small, massive], axis=-1, keepdims=True) / 510 * 2.4
    assert (np.abs(got - wanted) <= limits).all()


def test_rows_far_from_zero_are_as_precise_as_their_span_allows() -> None:
    rows = 5 + np.random.default_rng(2).uniform(0, 0.1, (2, 6, 4)).astype(np.float32)
    model = parse(rows_head() + f"{{ {WEIGHT} [fc] y = MatMul(x, d) }}")
    wanted = Session(model, optimize=False).run({"x": rows})["y"]
    TOKEN.run(model, Context())
    assert np.abs(Session(model).run({"x": rows})["y"] - wanted).max() <= 0.1 / 510 * 2.4 + 1e-5


@pytest.mark.parametrize(
    "weight",
    ["DequantizeLinear<axis = 0>(codes, rows)", "DequantizeLinear<axis = 1>(codes, scales, zeros)"],
    ids=["a scale for each row", "a zero point"],
)
def test_a_weight_that_is_not_per_column_cannot_be_per_token(weight: str) -> None:
    head = rows_head().replace(
        "int64[1] axes", "float[4] rows = {1.0, 2.0, 3.0, 4.0}, int8[3] zeros = {1, 2, 0}, int64[1] axes"
    )
    before = head + f"{{ d = {weight} [odd] y = MatMul(x, d) }}"
    result = check_pass(TOKEN, before=before, after=before, feeds=[{"x": spread_rows()}])
    assert [(event.where, event.reason) for event in result.declined] == [
        ("odd", "its weight is not int8 per column with zero point 0")
    ]


@pytest.mark.parametrize("weight", ["DequantizeLinear(codes, s)", "DequantizeLinear<axis = 1>(t0, scales)"])
def test_other_forms_of_a_weight_are_restored_by_sums_of_their_own(weight: str) -> None:
    turned = "t0 = Transpose(turned)"
    head = rows_head().replace(
        "int64[1] axes", "int8[3, 4] turned = {100, -47, 11, 64, 2, -5, 90, 7, 33, 90, -8, -99}, int64[1] axes"
    )
    check_pass(
        TOKEN, before=head + f"{{ {turned} d = {weight} [fc] y = MatMul(x, d) }}", feeds=[{"x": spread_rows() + 1}]
    )


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e30])
def test_rows_of_any_size_are_as_precise(size: float) -> None:
    check_pass(
        TOKEN,
        before=rows_head() + f"{{ {WEIGHT} [fc] y = MatMul(x, d) }}",
        feeds=[{"x": np.asarray(np.random.default_rng(1).standard_normal((2, 3, 4)) * size, dtype=np.float32)}],
    )
