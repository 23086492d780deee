from __future__ import annotations

import pytest

from scalefold.compiler.testing import check_pass
from scalefold.passes.lower_integer_matmul import LowerIntegerMatmul

HEAD = """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
model (uint8[b, s, 2] q) => (float[b, s, 3] y)
<int8[2, 3] codes = {1, 2, 3, 4, -5, 6}, float[3] scales = {0.5, 0.25, 2.0}, float s = {0.5}, uint8 z = {3},
 float[3] c = {1.0, -1.0, 7.0}, float[1] one = {1.5}, float number = {1.5}, float[2] rows = {0.5, 0.25},
 uint8[2, 3] unsigned = {1, 2, 3, 4, 5, 6}, int8[3] zeros = {1, -1, 0}, int8 signed_zero = {3},
 int8 flat = {0}, float[2, 3] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}>
"""
X = "x = DequantizeLinear(q, s, z)"
W = "d = DequantizeLinear<axis = 1>(codes, scales)"
BESIDE = f"{X} {W} g = MatMul(x, d) "
"""A layer that makes the graph a QDQ graph, as the pass requires."""
FUSED = "com.microsoft.MatMulIntegerToFloat(q, codes, s, scales, z"


@pytest.mark.parametrize("add", ["y = Add(p, c)", "y = Add(c, p)"], ids=["bias last", "bias first"])
def test_a_layer_with_bias_becomes_one_node(add: str) -> None:
    result = check_pass(
        LowerIntegerMatmul(),
        before=HEAD + f"{{ {X} {W} [fc] p = MatMul(x, d)  {add} }}",
        after=HEAD + f"{{ y = {FUSED}, , c) }}",
    )
    assert [(event.where, event.reason) for event in result.rewrites] == [("fc", "MatMulIntegerToFloat")]


def test_a_layer_without_bias_becomes_one_node() -> None:
    check_pass(
        LowerIntegerMatmul(),
        before=HEAD + f"{{ {X} {W} y = MatMul(x, d) }}",
        after=HEAD + f"{{ y = {FUSED}) }}",
    )


def test_the_quantizer_in_front_stays() -> None:
    text = HEAD.replace("uint8[b, s, 2] q", "float[b, s, 2] f")
    check_pass(
        LowerIntegerMatmul(),
        before=text + f"{{ q = QuantizeLinear(f, s, z)  {X} {W} y = MatMul(x, d) }}",
        after=text + f"{{ q = QuantizeLinear(f, s, z)  y = {FUSED}) }}",
    )


def test_a_weight_with_one_scale_is_lowered_too() -> None:
    check_pass(
        LowerIntegerMatmul(),
        before=HEAD + f"{{ {X} d = DequantizeLinear(codes, number)  y = MatMul(x, d) }}",
        after=HEAD + f"{{ y = {FUSED.replace('scales', 'number')}) }}",
    )


def test_layers_that_share_a_quantizer_are_each_lowered() -> None:
    result = check_pass(
        LowerIntegerMatmul(),
        before=HEAD
        + f"""{{ {X} {W} a = MatMul(x, d)  e = DequantizeLinear<axis = -1>(codes, scales)  p = MatMul(x, e)
                 t = Add(p, c)  y = Add(a, t) }}""",
        after=HEAD + f"{{ a = {FUSED})  t = {FUSED}, , c)  y = Add(a, t) }}",
    )
    assert len(result.rewrites) == 2


@pytest.mark.parametrize(
    ("rest", "after"),
    [
        pytest.param("p = MatMul(x, d)  y = Add(p, p)", "y = Add(p, p)", id="no constant is added"),
        pytest.param("p = MatMul(x, d)  h = Add(p, c)  y = Mul(h, p)", "h = Add(p, c)  y = Mul(h, p)", id="read twice"),
        pytest.param("p = MatMul(x, d)  y = Add(p, number)", "y = Add(p, number)", id="a number is added"),
    ],
)
def test_an_addition_that_is_no_bias_stays(rest: str, after: str) -> None:
    check_pass(
        LowerIntegerMatmul(),
        before=HEAD + f"{{ {X} {W} {rest} }}",
        after=HEAD + f"{{ p = {FUSED})  {after} }}",
    )


def test_a_vector_of_one_number_is_added_as_before() -> None:
    check_pass(LowerIntegerMatmul(), before=HEAD + f"{{ {X} {W} p = MatMul(x, d)  y = Add(p, one) }}")


def test_a_product_that_the_graph_returns_keeps_its_value() -> None:
    text = HEAD.replace("y)", "y, float[b, s, 3] p)")
    check_pass(
        LowerIntegerMatmul(),
        before=text + f"{{ {X} {W} p = MatMul(x, d)  y = Add(p, c) }}",
        after=text + f"{{ p = {FUSED})  y = Add(p, c) }}",
    )


@pytest.mark.parametrize("zero", ["zeros", "flat"], ids=["of each column", "of zero"])
def test_a_weight_with_a_zero_point_stays_the_same_function(zero: str) -> None:
    dequantized = W.replace("scales)", "scales, zeros)" if zero == "zeros" else "scales)")
    check_pass(LowerIntegerMatmul(), before=HEAD + f"{{ {X} {dequantized} y = MatMul(x, d) }}")


def test_an_activation_with_a_scale_for_each_channel_stays_the_same_function() -> None:
    more = "t = DequantizeLinear<axis = 2>(q, rows)  e = DequantizeLinear<axis = 1>(codes, scales)  k = MatMul(t, e)"
    check_pass(LowerIntegerMatmul(), before=HEAD + f"{{ {X} {W} p = MatMul(x, d)  {more}  y = Add(p, k) }}")


ROW_TEXT = HEAD.replace("uint8[b, s, 2] q", "float[b, s, 2] f").replace(
    "float s = {0.5}", "int64[1] axes = {-1}, float s = {0.5}"
)
ROWS = """a = ReduceMin(f, axes)  l = ReduceMax(f, axes)  n = Sub(l, a)  r = Max(n, number)  b = Sub(f, a)  u = Div(b, r)
          q = QuantizeLinear(u, s, z)"""
"""Rows of a float input, each brought to [0, 1]; `number` is the least span."""
RESTORED = "m = Mul(p, r)  v = Mul(a, c)  h = Add(m, v)"


def test_a_per_token_layer_keeps_what_restores_its_rows_and_its_bias() -> None:
    result = check_pass(
        LowerIntegerMatmul(),
        before=ROW_TEXT + f"{{ {ROWS} {X} {W} [fc] p = MatMul(x, d)  {RESTORED}  y = Add(h, c) }}",
        after=ROW_TEXT + f"{{ {ROWS} p = {FUSED})  {RESTORED}  y = Add(h, c) }}",
    )
    assert [(event.where, event.reason) for event in result.rewrites] == [("fc", "MatMulIntegerToFloat")]


def test_layers_of_both_kinds_on_one_value_are_each_lowered() -> None:
    check_pass(
        LowerIntegerMatmul(),
        before=ROW_TEXT
        + f"""{{ {ROWS} {X} {W} p = MatMul(x, d)  {RESTORED}
                 i = QuantizeLinear(f, s, z)  j = DequantizeLinear(i, s, z)  e = DequantizeLinear<axis = 1>(codes, scales)
                 k = MatMul(j, e)  o = Add(k, c)  y = Add(h, o) }}""",
        after=ROW_TEXT
        + f"""{{ {ROWS} p = {FUSED})  {RESTORED}  i = QuantizeLinear(f, s, z)
                 o = {FUSED.replace("(q", "(i")}, , c)  y = Add(h, o) }}""",
    )


TURNED = HEAD.replace("int8[2, 3] codes = {1, 2, 3, 4, -5, 6}", "int8[3, 2] codes = {1, 4, 2, -5, 3, 6}")
"""The same weight as it lies in an embedding table."""


@pytest.mark.parametrize("transpose", ["Transpose", "Transpose<perm = [1, 0]>"], ids=["by default", "by permutation"])
def test_a_weight_stored_as_rows_is_read_through_its_transpose(transpose: str) -> None:
    turned = f"t = {transpose}(codes)"
    check_pass(
        LowerIntegerMatmul(),
        before=TURNED + f"{{ {X} {turned} {W.replace('codes', 't')} [fc] p = MatMul(x, d)  y = Add(p, c) }}",
        after=TURNED + f"{{ {turned} y = {FUSED.replace('codes', 't')}, , c) }}",
    )


def test_a_transpose_that_moves_nothing_is_no_weight_stored_as_rows() -> None:
    kept = "t = Transpose<perm = [0, 1]>(codes)  e = DequantizeLinear<axis = 1>(t, scales)  o = MatMul(x, e)"
    result = check_pass(LowerIntegerMatmul(), before=HEAD + f"{{ {BESIDE} {kept}  y = Add(g, o) }}")
    assert len(result.rewrites) == 1


@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [
        pytest.param("[odd] o = MatMul(f, e)", "its activation is not quantized", id="a float activation"),
        pytest.param(
            "i = QuantizeLinear(f, s, signed_zero)  v = DequantizeLinear(i, s, signed_zero)  [odd] o = MatMul(v, e)",
            "its activation is not uint8",
            id="an int8 activation",
        ),
        pytest.param(
            "u = DequantizeLinear<axis = 1>(unsigned, scales)  [odd] o = MatMul(x, u)",
            "its weight is not int8",
            id="a uint8 weight",
        ),
        pytest.param(
            "u = DequantizeLinear<axis = 0>(codes, rows)  [odd] o = MatMul(x, u)",
            "its weight is not quantized per column",
            id="a scale for each row",
        ),
    ],
)
def test_a_layer_that_is_no_integer_product_is_declined(obstacle: str, reason: str) -> None:
    odd = f"e = DequantizeLinear<axis = 1>(codes, scales)  f = Cast<to = 1>(q)  {obstacle}  y = Add(g, o)"
    result = check_pass(LowerIntegerMatmul(), before=HEAD + f"{{ {BESIDE} {odd} }}")
    assert [(event.where, event.reason) for event in result.declined] == [("odd", reason)]
    assert len(result.rewrites) == 1


def test_a_gemm_is_declined() -> None:
    flat = HEAD.replace("b, s, ", "m, ")
    odd = "e = DequantizeLinear<axis = 1>(codes, scales)  [odd] o = Gemm(x, e)  y = Add(g, o)"
    result = check_pass(LowerIntegerMatmul(), before=flat + f"{{ {BESIDE} {odd} }}")
    assert [(event.where, event.reason) for event in result.declined] == [("odd", "not in normal form")]


def test_a_float_layer_is_passed_over() -> None:
    result = check_pass(LowerIntegerMatmul(), before=HEAD + f"{{ {BESIDE} [float] o = MatMul(x, w)  y = Add(g, o) }}")
    assert len(result.rewrites) == 1
    assert not result.declined
