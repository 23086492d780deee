from __future__ import annotations

import pytest

from scalefold.compiler.testing import check_pass
from scalefold.passes.recover_rms_norm import RecoverRmsNorm

HEAD = """<ir_version: 10, opset_import: ["" : %d]>
model (float[b, s, 4] x, float[4] free) => (float[b, s, 4] y)
<float[4] gain = {1.0, 0.5, -2.0, 3.0}, float two = {2.0}, float one = {1.0}, float eps = {0.000001},
 int64[1] last = {-1}, int64[1] first = {1}>
"""
ROOT = "m = ReduceMean(q, last)  v = Add(m, eps)  r = Sqrt(v)"
AFTER = HEAD % 23 + "{ y = RMSNormalization<axis = -1, epsilon = 0.000001>(x, gain) }"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(f"q = Pow(x, two)  {ROOT}  i = Reciprocal(r)  n = Mul(x, i)  y = Mul(gain, n)", id="transformers"),
        pytest.param(f"q = Mul(x, x)  {ROOT}  n = Div(x, r)  y = Mul(n, gain)", id="division"),
        pytest.param(f"q = Pow(x, two)  {ROOT}  i = Div(one, r)  n = Mul(i, x)  y = Mul(n, gain)", id="one over"),
        pytest.param(
            "q = Mul(x, x)  m = ReduceMean(q, last)  v = Add(eps, m)  r = Sqrt(v)  n = Div(x, r)  y = Mul(n, gain)",
            id="epsilon first",
        ),
    ],
)
def test_every_spelling_becomes_one_node(body: str) -> None:
    result = check_pass(RecoverRmsNorm(), before=HEAD % 20 + f"{{ {body} }}", after=AFTER)
    assert len(result.rewrites) == 1


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            "q = Mul(x, x)  m = ReduceMean(q, first)  v = Add(m, eps)  r = Sqrt(v)  n = Div(x, r)  y = Mul(n, gain)",
            id="another axis",
        ),
        pytest.param(
            "q = Abs(x)  m = ReduceMean(q, last)  v = Add(m, eps)  r = Sqrt(v)  n = Div(x, r)  y = Mul(n, gain)",
            id="no square",
        ),
        pytest.param(f"q = Mul(x, x)  {ROOT}  n = Div(gain, r)  y = Mul(n, x)", id="divides something else"),
    ],
)
def test_other_functions_are_left_alone(body: str) -> None:
    result = check_pass(RecoverRmsNorm(), before=HEAD % 20 + f"{{ {body} }}")
    assert not result.changed


def test_a_gain_that_is_fed_is_declined_with_its_reason() -> None:
    body = f"q = Mul(x, x)  {ROOT}  n = Div(x, r)  y = Mul(n, free)"
    result = check_pass(RecoverRmsNorm(), before=HEAD % 20 + f"{{ {body} }}")
    assert [event.reason for event in result.declined] == ["no constant gain of the last axis behind it"]
