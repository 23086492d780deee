from __future__ import annotations

import numpy as np
import pytest

from scalefold.compiler import schemes
from scalefold.compiler.errors import PatternError
from scalefold.compiler.testing import check_pass
from scalefold.passes.quantize_weights import QuantizeWeights

# Each column's largest weight is 127 steps, and no pair of rows can saturate: the codes are the weights over the step.
HEAD = """<ir_version: 10, opset_import: ["" : 20]>
model (float[b, s, 3] x) => (float[b, s, 2] y)
<float[3, 2] w = {127.0, 0.5, -0.4, -63.5, -100.0, 0.25}, int8[3, 2] codes = {127, 1, 0, -127, -100, 0},
 float[2] scales = {1.0, 0.5}, float[2, 2] u = {127.0, 0.0, -1.0, 127.0}, int8[2, 2] u_codes = {127, 0, -1, 127},
 float[2] ones = {1.0, 1.0}, float[2] c = {1.0, -1.0}>
"""
LAYER = "[first] p = MatMul(x, w)  h = Add(p, c)  [second] y = MatMul(h, u)"
QUANTIZED = "d = DequantizeLinear<axis = 1>(codes, scales)  [first] p = MatMul(x, d)  h = Add(p, c)"
NARROW = HEAD.replace(
    "float[2] scales", "int8[3, 2] four = {7, 0, 0, -7, -6, 0}, float[2] four_scales = %s, float[2] scales"
)


def test_each_layer_reads_codes_through_a_dequantizer_of_its_columns() -> None:
    result = check_pass(
        QuantizeWeights(),
        before=HEAD + f"{{ {LAYER} }}",
        after=HEAD + f"{{ {QUANTIZED} e = DequantizeLinear<axis = 1>(u_codes, ones)  [second] y = MatMul(h, e) }}",
    )
    assert [(event.where, event.reason) for event in result.rewrites] == [
        ("first", "int8 per column"),
        ("second", "int8 per column"),
    ]
    assert not result.declined


def test_fewer_bits_leave_fewer_codes_in_the_same_container() -> None:
    scales = f"{{{127 / 7!r}, {63.5 / 7!r}}}"
    check_pass(
        QuantizeWeights(bits=4),
        before=NARROW % scales + "{ [first] y = MatMul(x, w) }",
        after=NARROW % scales + "{ d = DequantizeLinear<axis = 1>(four, four_scales)  [first] y = MatMul(x, d) }",
    )


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_figures_say_how_close_the_weight_is(bits: int) -> None:
    array = np.random.default_rng(bits).standard_normal((64, 8)).astype(np.float32)
    text = ", ".join(repr(float(value)) for value in array.ravel())
    model = f"""<ir_version: 10, opset_import: ["" : 20]>
    model (float[m, 64] x) => (float[m, 8] y) <float[64, 8] w = {{{text}}}> {{ [fc] y = MatMul(x, w) }}"""
    (event,) = check_pass(QuantizeWeights(bits=bits), before=model).rewrites
    noise = array - schemes.weight_round_trip(array, bits)
    expected = 10 * np.log10(np.square(array).sum() / np.square(noise).sum())
    assert event.figures["weight_sqnr_db"] == pytest.approx(expected, rel=1e-3)


def test_a_pair_of_neighbours_that_would_saturate_gets_a_wider_scale() -> None:
    model = """<ir_version: 10, opset_import: ["" : 20]>
    model (float[m, 2] x) => (float[m, 1] y) <float[2, 1] w = {127.0, 127.0}> { [fc] y = MatMul(x, w) }"""
    (event,) = check_pass(QuantizeWeights(), before=model).rewrites
    dequantize = event.node.inputs[1]
    assert dequantize is not None
    node = dequantize.producer()
    assert node is not None
    assert node.inputs[0] is not None
    assert node.inputs[0].const_value is not None
    assert node.inputs[0].const_value.numpy().sum() <= 128
    (narrow,) = check_pass(QuantizeWeights(activation_bits=7), before=model).rewrites
    assert narrow.figures != event.figures


def test_a_weight_that_layers_share_is_stored_once_and_dequantized_for_each() -> None:
    shared = "[first] h = MatMul(x, w)  [second] k = MatMul(x, w)  y = Add(h, k)"
    result = check_pass(
        QuantizeWeights(),
        before=HEAD + f"{{ {shared} }}",
        after=HEAD
        + """{ d = DequantizeLinear<axis = 1>(codes, scales)  [first] h = MatMul(x, d)
               e = DequantizeLinear<axis = 1>(codes, scales)  [second] k = MatMul(x, e)  y = Add(h, k) }""",
    )
    graph = result.rewrites[0].node.graph
    assert graph is not None
    assert sorted(graph.initializers) == ["first.weight_codes", "first.weight_scales"]


def test_a_table_that_is_looked_up_too_stays_beside_the_codes() -> None:
    tied = HEAD.replace("x)", "x, int64[b, s] ids)")
    check_pass(
        QuantizeWeights(),
        before=tied + "{ [first] p = MatMul(x, w)  e = Gather(w, ids)  y = Add(p, e) }",
        after=tied
        + """{ d = DequantizeLinear<axis = 1>(codes, scales)  [first] p = MatMul(x, d)
               e = Gather(w, ids)  y = Add(p, e) }""",
    )


def test_excluded_layers_are_declined_and_stay_float() -> None:
    result = check_pass(
        QuantizeWeights(exclude=("^sec",)),
        before=HEAD + f"{{ {LAYER} }}",
        after=HEAD + f"{{ {QUANTIZED} [second] y = MatMul(h, u) }}",
    )
    assert [(event.where, event.reason) for event in result.declined] == [("second", "excluded by the recipe")]


def test_layers_that_are_not_included_are_declined_and_stay_float() -> None:
    result = check_pass(
        QuantizeWeights(include=("first",)),
        before=HEAD + f"{{ {LAYER} }}",
        after=HEAD + f"{{ {QUANTIZED} [second] y = MatMul(h, u) }}",
    )
    assert [(event.where, event.reason) for event in result.declined] == [("second", "not included by the recipe")]


def test_a_layer_that_is_included_and_excluded_is_left() -> None:
    before = HEAD + f"{{ {LAYER} }}"
    result = check_pass(QuantizeWeights(include=("first",), exclude=("first",)), before=before, after=before)
    assert [event.reason for event in result.declined] == ["excluded by the recipe", "not included by the recipe"]


def test_a_pattern_that_excludes_nothing_is_an_error() -> None:
    with pytest.raises(PatternError, match="matches none of the 2 linear layers"):
        check_pass(QuantizeWeights(exclude=("third",)), before=HEAD + f"{{ {LAYER} }}")


def test_a_pattern_that_is_no_regular_expression_is_an_error() -> None:
    with pytest.raises(PatternError, match="not a regular expression"):
        check_pass(QuantizeWeights(exclude=("(",)), before=HEAD + f"{{ {LAYER} }}")


def test_products_of_activations_are_left_alone() -> None:
    before = HEAD.replace("float[b, s, 2] y", "float[b, s, s] y") + (
        "{ t = Transpose<perm = [0, 2, 1]>(x)  [scores] y = MatMul(x, t) }"
    )
    assert not check_pass(QuantizeWeights(), before=before, after=before).changed
