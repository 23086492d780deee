from __future__ import annotations

import pytest

from scalefold.compiler.testing import check_pass
from scalefold.passes.recover_gelu import RecoverGelu

HEAD = """<ir_version: 10, opset_import: ["" : 20]>
model (float[b, s, 8] x) => (float[b, s, 8] y)
<float root2 = {1.4142135}, float rough_root2 = {1.4142}, float inverse = {0.70710677}, float rough = {0.7071},
 float half = {0.5}, float one = {1.0}, float two = {2.0}, float three = {3.0},
 float cubic = {0.044715}, float slope = {0.7978846}>
"""
ERF = "a = Div(x, root2)  e = Erf(a)  p = Add(e, one)"
FACTORED = (
    "k = Mul(x, cubic)  s = Mul(k, x)  b = Add(s, one)  e = Mul(x, slope)  a = Mul(e, b)  t = Tanh(a)  p = Add(t, one)"
)
POW = "c = Pow(x, three)  k = Mul(c, cubic)  i = Add(x, k)  a = Mul(i, slope)  t = Tanh(a)  p = Add(t, one)"
CUBES = POW.replace("c = Pow(x, three)", "xx = Mul(x, x)  c = Mul(xx, x)")
HALF_FIRST = "h = Mul(half, x)  y = Mul(h, p)"
HALF_LAST = "h = Mul(x, p)  y = Mul(h, half)"
HALF_INSIDE = "h = Mul(p, half)  y = Mul(x, h)"
REASON = "the products around it are not those of a GELU"


def spelled(*parts: str) -> str:
    return HEAD + "{" + "  ".join(parts) + "}"


@pytest.mark.parametrize(
    "core",
    [
        pytest.param(ERF, id="Div by sqrt 2"),
        pytest.param(ERF.replace("root2", "rough_root2"), id="Div by 1.4142"),
        pytest.param(ERF.replace("Div(x, root2)", "Mul(x, inverse)"), id="Mul by sqrt 0.5"),
        pytest.param(ERF.replace("Div(x, root2)", "Mul(rough, x)"), id="Mul by 0.7071, number first"),
        pytest.param(ERF.replace("Add(e, one)", "Add(one, e)"), id="one first"),
    ],
)
@pytest.mark.parametrize("gate", [HALF_FIRST, HALF_LAST, HALF_INSIDE], ids=["half first", "half last", "half inside"])
def test_every_erf_spelling_becomes_gelu(core: str, gate: str) -> None:
    result = check_pass(RecoverGelu(), before=spelled(core, gate), after=spelled('y = Gelu<approximate = "none">(x)'))
    assert [event.reason for event in result.rewrites] == ["erf form"]
    assert not result.declined


@pytest.mark.parametrize(
    "core",
    [
        pytest.param(POW, id="Pow 3"),
        pytest.param(CUBES, id="x x x"),
        pytest.param(FACTORED, id="x taken out"),
        pytest.param(CUBES.replace("Mul(xx, x)", "Mul(x, xx)"), id="x times x x"),
        pytest.param(POW.replace("Mul(c, cubic)", "Mul(cubic, c)"), id="number first"),
        pytest.param(POW.replace("Add(x, k)", "Add(k, x)"), id="cube first"),
        pytest.param(POW.replace("Mul(i, slope)", "Mul(slope, i)"), id="slope first"),
    ],
)
@pytest.mark.parametrize("gate", [HALF_FIRST, HALF_LAST, HALF_INSIDE], ids=["half first", "half last", "half inside"])
def test_every_tanh_spelling_becomes_gelu(core: str, gate: str) -> None:
    result = check_pass(RecoverGelu(), before=spelled(core, gate), after=spelled('y = Gelu<approximate = "tanh">(x)'))
    assert [event.reason for event in result.rewrites] == ["tanh form"]
    assert not result.declined


@pytest.mark.parametrize(("core", "op_type"), [(ERF, "Gelu"), (POW, "FastGelu")], ids=["erf", "tanh"])
def test_before_opset_20_it_is_the_operator_of_onnxruntime(core: str, op_type: str) -> None:
    result = check_pass(
        RecoverGelu(),
        before=spelled(core, HALF_LAST).replace('"" : 20', '"" : 17'),
        after=spelled(f"y = com.microsoft.{op_type}(x)").replace('"" : 20', '"" : 17, "com.microsoft" : 1'),
    )
    graph = result.rewrites[0].node.graph
    assert graph is not None
    assert graph.opset_imports["com.microsoft"] == 1


def test_a_gelu_inside_a_graph_keeps_its_readers() -> None:
    check_pass(
        RecoverGelu(),
        before=spelled(ERF, "h = Mul(x, p)  g = Mul(h, half)  n = Neg(g)  y = Add(g, n)"),
        after=spelled('g = Gelu<approximate = "none">(x)  n = Neg(g)  y = Add(g, n)'),
    )


@pytest.mark.parametrize(
    ("core", "gate"),
    [
        pytest.param(ERF, "y = Mul(x, p)", id="no half"),
        pytest.param(ERF, "h = Mul(x, p)  y = Mul(h, two)", id="doubled"),
        pytest.param(ERF, "n = Neg(x)  h = Mul(n, p)  y = Mul(h, half)", id="another value is gated"),
        pytest.param(ERF, "h = Mul(x, p)  k = Mul(h, x)  y = Mul(k, half)", id="x twice"),
        pytest.param(ERF.replace("Add(e, one)", "Add(e, two)"), HALF_LAST, id="two plus erf"),
        pytest.param(ERF, "h = Mul(x, p)  k = Mul(h, half)  y = Add(k, p)", id="the sum read elsewhere"),
        pytest.param(POW, "h = Mul(x, p)  y = Add(h, half)", id="tanh with a sum"),
    ],
)
def test_other_products_around_the_core_are_declined(core: str, gate: str) -> None:
    before = spelled(core, gate)
    result = check_pass(RecoverGelu(), before=before, after=before)
    assert [event.reason for event in result.declined] == [REASON]


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(spelled(ERF.replace("Div(x, root2)", "Div(x, two)"), HALF_LAST), id="erf of half of x"),
        pytest.param(spelled(ERF.replace("Div(x, root2)", "Div(root2, x)"), HALF_LAST), id="erf of the reciprocal"),
        pytest.param(spelled(ERF.replace("Div(x, root2)", "Mul(x, root2)"), HALF_LAST), id="erf of x sqrt 2"),
        pytest.param(spelled(POW.replace("three", "two"), HALF_LAST), id="tanh with a square"),
        pytest.param(spelled(CUBES.replace("Mul(xx, x)", "Mul(xx, xx)"), HALF_LAST), id="tanh with a fourth power"),
        pytest.param(spelled(POW.replace("cubic", "half"), HALF_LAST), id="tanh with another weight"),
        pytest.param(spelled(POW.replace("slope", "one"), HALF_LAST), id="tanh with another slope"),
        pytest.param(spelled("t = Tanh(x)  p = Add(t, one)", HALF_LAST), id="a plain tanh gate"),
    ],
)
def test_a_look_alike_is_left_alone_in_silence(before: str) -> None:
    result = check_pass(RecoverGelu(), before=before, after=before)
    assert not result.declined
