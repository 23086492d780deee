from __future__ import annotations

import pytest

from scalefold.compiler.testing import check_pass
from scalefold.passes.quantize_bias import QuantizeBias

# Bias steps are the activation's 0.5 times the columns' 0.5, 0.25 and 2: 0.25, 0.125 and 1.
CONSTANTS = """
<int8[2, 3] codes = {1, 2, 3, 4, -5, 6}, float[3] scales = {0.5, 0.25, 2.0}, float s = {0.5}, uint8 z = {3},
 float[3] c = {1.0, -1.0, 7.0}, int32[3] bias_codes = {4, -8, 7}, float[3] steps = {0.25, 0.125, 1.0},
 int8[3] zeros = {0, 0, 0}, float number = {1.0}, int64[1] axes = {-1}, float[2, 3] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}>
"""
FLAT = '<ir_version: 10, opset_import: ["" : 20]>\nmodel (uint8[m, 2] q) => (float[m, 3] y)' + CONSTANTS
STATIC = '<ir_version: 10, opset_import: ["" : 20]>\nmodel (uint8[2, 64, 2] q) => (float[2, 64, 3] y)' + CONSTANTS
DYNAMIC = '<ir_version: 10, opset_import: ["" : 20]>\nmodel (uint8[b, s, 2] q) => (float[b, s, 3] y)' + CONSTANTS
PRODUCT = "x = DequantizeLinear(q, s, z)  d = DequantizeLinear<axis = 1>(codes, scales)  [fc] p = MatMul(x, d)"
EXPLICIT = PRODUCT.replace("scales)", "scales, zeros)")
"""The same with the zero point of the weight written out."""
ROWS = """a = ReduceMin(f, axes)  l = ReduceMax(f, axes)  n = Sub(l, a)  r = Max(n, number)  b = Sub(f, a)  u = Div(b, r)
          q = QuantizeLinear(u, s, z)"""
"""Rows of a float input, each brought to [0, 1]; `number` is the least span."""
BIAS = "k = DequantizeLinear<axis = 0>(bias_codes, steps)"


@pytest.mark.parametrize("head", [FLAT, STATIC], ids=["two dimensions", "static"])
@pytest.mark.parametrize("add", ["y = Add(p, %s)", "y = Add(%s, p)"], ids=["bias last", "bias first"])
def test_a_bias_that_would_be_fused_to_float_gemm_becomes_int32(head: str, add: str) -> None:
    result = check_pass(
        QuantizeBias(),
        before=head + f"{{ {PRODUCT} {add % 'c'} }}",
        after=head + f"{{ {EXPLICIT} {BIAS} {add % 'k'} }}",
    )
    assert [(event.where, event.reason) for event in result.rewrites] == [("fc", "int32 bias")]


def test_a_bias_too_large_for_int32_steps_stays_the_same_function() -> None:
    # Dead columns: the weights step by 1e-9, so that a bias of 7 is 1.4e10 of its steps.
    dead = FLAT.replace("scales = {0.5, 0.25, 2.0}", "scales = {1.0e-9, 1.0e-9, 1.0e-9}")
    check_pass(QuantizeBias(), before=dead + f"{{ {PRODUCT} y = Add(p, c) }}")


def test_a_bias_that_another_node_reads_too_stays_for_it() -> None:
    check_pass(
        QuantizeBias(),
        before=FLAT + f"{{ {PRODUCT} h = Add(p, c)  y = Mul(h, c) }}",
        after=FLAT + f"{{ {EXPLICIT} {BIAS} h = Add(p, k)  y = Mul(h, c) }}",
    )


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(DYNAMIC + f"{{ {PRODUCT} y = Add(p, c) }}", id="three dimensions, some of them dynamic"),
        pytest.param(FLAT.replace("q)", "q, float[3] v)") + f"{{ {PRODUCT} y = Add(p, v) }}", id="a bias that is fed"),
        pytest.param(FLAT + f"{{ {PRODUCT} y = Identity(p) }}", id="no bias"),
        pytest.param(
            FLAT.replace("float number", "float[1, 3] row = {1.0, 2.0, 3.0}, float number")
            + f"{{ {PRODUCT} y = Add(p, row) }}",
            id="a row of a matrix",
        ),
        pytest.param(
            FLAT.replace("float number", "float[1] one = {1.0}, float number") + f"{{ {PRODUCT} y = Add(p, one) }}",
            id="one number for all columns",
        ),
        pytest.param(FLAT + f"{{ {PRODUCT} h = Add(p, c)  y = Mul(h, p) }}", id="a product read elsewhere"),
        pytest.param(
            (FLAT + f"{{ {ROWS} {PRODUCT} o = Mul(p, r)  e = Mul(a, c)  h = Add(o, e)  y = Add(h, c) }}").replace(
                "uint8[m, 2] q", "float[m, 2] f"
            ),
            id="a per-token product",
        ),
    ],
)
def test_other_biases_stay_float(before: str) -> None:
    assert not check_pass(QuantizeBias(), before=before, after=before).changed


def test_a_float_layer_beside_a_quantized_one_keeps_its_bias() -> None:
    float_layer = "f = MatMul(x, w)  g = Add(f, c)"
    check_pass(
        QuantizeBias(),
        before=FLAT + f"{{ {PRODUCT} h = Add(p, c) {float_layer} y = Add(h, g) }}",
        after=FLAT + f"{{ {EXPLICIT} {BIAS} h = Add(p, k) {float_layer} y = Add(h, g) }}",
    )


def test_a_layer_whose_activation_is_float_keeps_its_bias() -> None:
    more = "a = Cast<to = 1>(q)  e = DequantizeLinear<axis = 1>(codes, scales)  f = MatMul(a, e)  g = Add(f, c)"
    check_pass(
        QuantizeBias(),
        before=FLAT + f"{{ {PRODUCT} h = Add(p, c) {more} y = Add(h, g) }}",
        after=FLAT + f"{{ {EXPLICIT} {BIAS} h = Add(p, k) {more} y = Add(h, g) }}",
    )


def test_a_bias_of_one_number_stays_the_same_function() -> None:
    check_pass(QuantizeBias(), before=FLAT + f"{{ {PRODUCT} y = Add(p, number) }}")


def test_a_weight_with_one_scale_stays_the_same_function() -> None:
    per_tensor = PRODUCT.replace("DequantizeLinear<axis = 1>(codes, scales)", "DequantizeLinear(codes, s)")
    check_pass(QuantizeBias(), before=FLAT + f"{{ {per_tensor} y = Add(p, c) }}")


def test_a_bias_of_zero_in_one_column_leaves_the_others_as_they_are() -> None:
    check_pass(
        QuantizeBias(),
        before=FLAT.replace("c = {1.0, -1.0, 7.0}", "c = {0.0, -1.0, 7.0}") + f"{{ {PRODUCT} y = Add(p, c) }}",
    )


@pytest.mark.parametrize("activation", ["Relu", "Tanh", "Sigmoid"])
def test_an_activation_behind_the_sum_makes_no_difference(activation: str) -> None:
    check_pass(
        QuantizeBias(),
        before=FLAT + f"{{ {PRODUCT} h = Add(p, c)  y = {activation}(h) }}",
        after=FLAT + f"{{ {EXPLICIT} {BIAS} h = Add(p, k)  y = {activation}(h) }}",
    )


def test_two_layers_without_names_are_both_rewritten() -> None:
    first = PRODUCT.replace("[fc] ", "")
    second = "v = DequantizeLinear(q, s, z)  e = DequantizeLinear<axis = 1>(codes, scales)  o = MatMul(v, e)"
    result = check_pass(
        QuantizeBias(),
        before=FLAT + f"{{ {first} h = Add(p, c)  a = Tanh(h) {second} g = Add(o, c)  b = Relu(g)  y = Add(a, b) }}",
    )
    assert len(result.rewrites) == 2
