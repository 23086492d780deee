from __future__ import annotations

import pytest

from scalefold.compiler.testing import check_pass
from scalefold.passes.recover_layer_norm import RecoverLayerNorm

HEAD = """<ir_version: 10, opset_import: ["" : 17]>
model (float[b, s, 4] x) => (float[b, s, 4] y)
<float[4] gamma = {1.0, 0.5, -2.0, 3.0}, float[4] beta = {0.5, 0.0, 1.0, -1.0},
 float[1] narrow = {1.5}, float[1, 1, 4] wide = {1.0, 0.5, -2.0, 3.0},
 float two = {2.0}, float four = {4.0}, float epsilon = {1e-5}>
"""
MEAN = "m = ReduceMean<axes = [-1]>(x)  d = Sub(x, m)"
VARIANCE = "q = Pow(d, two)  v = ReduceMean<axes = [-1]>(q)  e = Add(v, epsilon)"
DIVIDE = "r = Sqrt(e)  n = Div(d, r)"
AFFINE = "g = Mul(n, gamma)  y = Add(g, beta)"
WHOLE = HEAD + "{ y = LayerNormalization<axis = -1, epsilon = 1e-5>(x, gamma, beta) }"
NO_AFFINE = "no constant gain and bias of the last axis behind it"


def spelled(mean: str = MEAN, variance: str = VARIANCE, divide: str = DIVIDE, affine: str = AFFINE) -> str:
    return HEAD + "{" + "  ".join((mean, variance, divide, affine)) + "}"


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(spelled(), id="the square as Pow"),
        pytest.param(spelled(variance=VARIANCE.replace("Pow(d, two)", "Mul(d, d)")), id="the square as Mul"),
        pytest.param(
            spelled(mean=MEAN + "  d2 = Sub(x, m)", variance=VARIANCE.replace("Pow(d, two)", "Pow(d2, two)")),
            id="the mean subtracted twice",
        ),
        pytest.param(
            spelled(
                mean=MEAN + "  m2 = ReduceMean<axes = [-1]>(x)  d2 = Sub(x, m2)",
                variance=VARIANCE.replace("Pow(d, two)", "Mul(d2, d2)"),
            ),
            id="the mean computed twice",
        ),
        pytest.param(spelled().replace("axes = [-1]", "axes = [2]"), id="the last axis counted from the front"),
        pytest.param(spelled().replace("Add(v, epsilon)", "Add(epsilon, v)"), id="epsilon first"),
        pytest.param(spelled(affine="g = Mul(gamma, n)  y = Add(beta, g)"), id="gain and bias first"),
        pytest.param(
            spelled(variance="c = Constant<value = float {2.0}>()  " + VARIANCE.replace("two)", "c)")),
            id="the exponent as a Constant node",
        ),
    ],
)
def test_every_spelling_becomes_one_layer_normalization(before: str) -> None:
    result = check_pass(RecoverLayerNorm(), before=before, after=WHOLE)
    assert [event.reason for event in result.rewrites] == ["mean, variance, division, gain and bias"]
    assert not result.declined


def test_axes_given_as_an_input_are_read() -> None:
    newer = spelled().replace('"" : 17', '"" : 18').replace("ReduceMean<axes = [-1]>(x)", "ReduceMean(x, last)")
    newer = newer.replace("ReduceMean<axes = [-1]>(q)", "ReduceMean(q, last)").replace(
        "float two", "int64[1] last = {-1}, float two"
    )
    check_pass(RecoverLayerNorm(), before=newer, after=WHOLE.replace('"" : 17', '"" : 18'))


def test_each_of_two_normalizations_in_a_row_is_recovered_with_its_own_epsilon() -> None:
    second = (
        "m2 = ReduceMean<axes = [-1]>(h)  d2 = Sub(h, m2)  q2 = Mul(d2, d2)  v2 = ReduceMean<axes = [-1]>(q2)"
        "  e2 = Add(v2, two)  r2 = Sqrt(e2)  n2 = Div(d2, r2)  g2 = Mul(n2, beta)  y = Add(g2, gamma)"
    )
    result = check_pass(
        RecoverLayerNorm(),
        before=spelled(affine="g = Mul(n, gamma)  h = Add(g, beta)  " + second),
        after=HEAD
        + """{ h = LayerNormalization<axis = -1, epsilon = 1e-5>(x, gamma, beta)
               y = LayerNormalization<axis = -1, epsilon = 2.0>(h, beta, gamma) }""",
    )
    assert len(result.rewrites) == 2


def test_what_else_reads_the_centred_value_keeps_it() -> None:
    check_pass(
        RecoverLayerNorm(),
        before=spelled(affine="g = Mul(n, gamma)  h = Add(g, beta)  y = Add(h, d)"),
        after=HEAD
        + """{ m = ReduceMean<axes = [-1]>(x)  d = Sub(x, m)
               h = LayerNormalization<axis = -1, epsilon = 1e-5>(x, gamma, beta)  y = Add(h, d) }""",
    )


@pytest.mark.parametrize(
    "affine",
    [
        pytest.param("y = Add(n, beta)", id="no gain"),
        pytest.param("y = Mul(n, gamma)", id="no bias"),
        pytest.param("g = Mul(n, x)  y = Add(g, beta)", id="a gain that is not constant"),
        pytest.param("g = Mul(n, gamma)  y = Add(g, x)", id="a bias that is not constant"),
        pytest.param("g = Mul(n, wide)  y = Add(g, beta)", id="a gain that is not a vector"),
        pytest.param("g = Mul(n, gamma)  h = Add(g, beta)  y = Add(h, n)", id="the quotient read elsewhere"),
        pytest.param("g = Mul(n, gamma)  h = Add(g, beta)  y = Add(h, g)", id="the product read elsewhere"),
    ],
)
def test_a_normalization_without_constant_gain_and_bias_is_declined(affine: str) -> None:
    before = spelled(affine=affine)
    result = check_pass(RecoverLayerNorm(), before=before, after=before)
    assert [event.reason for event in result.declined] == [NO_AFFINE]


def test_a_gain_of_one_number_stays_the_same_function() -> None:
    check_pass(RecoverLayerNorm(), before=spelled(affine="g = Mul(n, narrow)  y = Add(g, beta)"))


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(spelled().replace("axes = [-1]", "axes = [1]"), id="over another axis"),
        pytest.param(spelled().replace("axes = [-1]", "axes = [1, 2]"), id="over two axes"),
        pytest.param(spelled(variance=VARIANCE.replace("two", "four")), id="a fourth power"),
        pytest.param(spelled(variance=VARIANCE.replace("Pow(d, two)", "Mul(d, x)")), id="no square"),
        pytest.param(spelled(variance=VARIANCE.replace("Pow(d, two)", "Pow(x, two)")), id="a second moment"),
        pytest.param(
            spelled(variance="xx = Mul(x, x)  " + VARIANCE.replace("Add(v, epsilon)", "Add(v, xx)")),
            id="epsilon not a constant",
        ),
        pytest.param(spelled(divide="r = Sqrt(e)  n = Div(x, r)"), id="the numerator not centred"),
        pytest.param(spelled(divide="r = Exp(e)  n = Div(d, r)"), id="no square root"),
        pytest.param(
            spelled(
                mean=MEAN + "  m2 = ReduceMean<axes = [1]>(x)  d2 = Sub(x, m2)",
                variance=VARIANCE.replace("Pow(d, two)", "Pow(d2, two)"),
            ),
            id="variance about a mean over another axis",
        ),
    ],
)
def test_a_look_alike_is_left_alone_in_silence(before: str) -> None:
    result = check_pass(RecoverLayerNorm(), before=before, after=before)
    assert not result.declined


def test_means_that_drop_their_axis_are_not_a_layer_normalization() -> None:
    square = spelled().replace("axes = [-1]", "axes = [-1], keepdims = 0").replace("float[b, s, 4]", "float[4, 4]")
    check_pass(RecoverLayerNorm(), before=square, after=square)
