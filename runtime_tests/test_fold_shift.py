from __future__ import annotations

import pytest

from scalefold.compiler.testing import check_pass
from scalefold.passes.fold_shift import FoldShift

HEAD = """<ir_version: 10, opset_import: ["" : 20]>
model (float[b, s, 2] r, float[b, s, 2] x) => (float[b, s, 2] h)
<float[2] z = {1.0, 2.0}, float[2, 2] w = {1.0, 2.0, 3.0, 4.0}, float[2] b0 = {0.5, 0.25}, float[2] b1 = {1.5, 2.25},
 float[2] b2 = {1.0, 0.5}, float number = {2.0}>
"""
FOLDED = HEAD + "{ p = MatMul(x, w)  y = Add(p, b1)  h = Add(r, y) }"


@pytest.mark.parametrize(
    "before",
    [
        pytest.param("shifted = Add(r, z)  p = MatMul(x, w)  y = Add(p, b0)  h = Add(shifted, y)", id="shift first"),
        pytest.param("p = MatMul(x, w)  y = Add(p, b0)  shifted = Add(r, z)  h = Add(shifted, y)", id="shift last"),
        pytest.param("shifted = Add(z, r)  p = MatMul(x, w)  y = Add(b0, p)  h = Add(shifted, y)", id="vectors first"),
    ],
)
def test_the_shift_of_a_residual_goes_into_the_bias_it_meets(before: str) -> None:
    after = FOLDED.replace("Add(p, b1)", "Add(b1, p)") if "Add(b0, p)" in before else FOLDED
    result = check_pass(FoldShift(), before=HEAD + f"{{ {before} }}", after=after)
    assert len(result.rewrites) == 1
    assert not result.declined


def test_a_bias_that_another_layer_shares_stays_for_it() -> None:
    check_pass(
        FoldShift(),
        before=HEAD
        + """{ shifted = Add(r, z)  p = MatMul(x, w)  y = Add(p, b0)  t = Add(shifted, y)  q = MatMul(t, w)
               h = Add(q, b0) }""",
        after=HEAD + "{ p = MatMul(x, w)  y = Add(p, b1)  t = Add(r, y)  q = MatMul(t, w)  h = Add(q, b0) }",
    )


TWO = """q = QuantizeLinear(x, t, n)  a = DequantizeLinear(q, t, n)  o = Sub(x, a)  k = QuantizeLinear(o, f, n)
         e = DequantizeLinear(k, f, n)  p0 = MatMul(a, w)  p1 = MatMul(e, w)  p = Add(p0, p1)"""


def test_a_shift_goes_into_the_bias_behind_two_codes() -> None:
    head = HEAD.replace("float number", "float t = {0.1}, float f = {0.001}, uint8 n = {128}, float number")
    check_pass(
        FoldShift(),
        before=head + f"{{ shifted = Add(r, z)  {TWO}  y = Add(p, b0)  h = Add(shifted, y) }}",
        after=head + f"{{ {TWO}  y = Add(p, b1)  h = Add(r, y) }}",
    )


def test_a_layer_read_elsewhere_is_declined() -> None:
    before = HEAD + "{ shifted = Add(r, z)  p = MatMul(x, w)  y = Add(p, b0)  t = Add(shifted, y)  h = Add(t, y) }"
    result = check_pass(FoldShift(), before=before, after=before)
    assert [event.reason for event in result.declined] == ["the layer's output is read elsewhere too"]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("shifted = Add(r, z)  p = MatMul(x, w)  h = Add(shifted, p)", id="a layer without bias"),
        pytest.param("shifted = Add(r, z)  y = Add(x, b0)  h = Add(shifted, y)", id="no layer"),
        pytest.param("shifted = Add(r, z)  p = MatMul(x, w)  y = Add(p, b0)  h = Mul(shifted, y)", id="a product"),
        pytest.param("shifted = Add(r, number)  p = MatMul(x, w)  y = Add(p, b0)  h = Add(shifted, y)", id="a number"),
        pytest.param(
            "shifted = Add(r, z)  p = MatMul(x, w)  y = Add(p, b0)  t = Add(shifted, y)  h = Mul(t, shifted)",
            id="a residual read elsewhere",
        ),
        pytest.param(
            "q = MatMul(r, w)  k = Add(q, z)  p = MatMul(x, w)  y = Add(p, b0)  h = Add(k, y)", id="two biased layers"
        ),
    ],
)
def test_a_shift_that_meets_no_bias_of_its_own_is_left(body: str) -> None:
    before = HEAD + f"{{ {body} }}"
    result = check_pass(FoldShift(), before=before, after=before)
    assert not result.declined
