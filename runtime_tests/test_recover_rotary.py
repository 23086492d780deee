from __future__ import annotations

import numpy as np
import pytest

from scalefold.compiler.runtime import Feed
from scalefold.compiler.testing import check_pass
from scalefold.passes.recover_rotary import RecoverRotary

TABLES = """
  twice = Concat<axis = -1>(a, a)
  c = Cos(twice)  s = Sin(twice)
"""
ROTATED = """
  cos = Unsqueeze(c, one)  sin = Unsqueeze(s, one)
  straight = Mul(x, cos)
  first = Slice(x, zero, two, last, one)  second = Slice(x, two, end, last, one)
  negated = Neg(second)  turned = Concat<axis = -1>(negated, first)
  across = Mul(turned, sin)
"""
SUM = "y = Add(straight, across)"


def text(body: str, opset: int = 20, constants: str = "") -> str:
    return (
        f'<ir_version: 10, opset_import: ["" : {opset}]>\n'
        "model (float[b, 3, s, 4] x, float[b, s, 2] a) => (float[b, 3, s, 4] y)"
        "<int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3}, int64[1] last = {3},"
        f" int64[1] end = {{9223372036854775807}}, float half = {{0.5}}{constants}> {{{body}}}"
    )


def feeds() -> list[Feed]:
    generator = np.random.default_rng(4)
    shapes = {"x": (2, 3, 5, 4), "a": (2, 5, 2)}
    return [{name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}]


def test_a_rotation_by_halves_becomes_one_operator() -> None:
    after = text("c = Cos(a)  s = Sin(a)  y = RotaryEmbedding(x, c, s)", opset=23)
    result = check_pass(RecoverRotary(), before=text(TABLES + ROTATED + SUM), after=after, feeds=feeds())
    assert [event.reason for event in result.rewrites] == ["rotated by halves"]


def test_angles_that_all_sequences_share_are_declined() -> None:
    before = text(TABLES + ROTATED + SUM).replace("float[b, s, 2] a", "float[1, s, 2] a")
    shared = [{**feed, "a": feed["a"][:1]} for feed in feeds()]
    result = check_pass(RecoverRotary(), before=before, after=before, feeds=shared)
    assert [event.reason for event in result.declined] == [
        "its angles are one row for all sequences, where the operator wants one each"
    ]


@pytest.mark.parametrize("total", ["y = Add(across, straight)"])
def test_the_order_of_the_sum_does_not_matter(total: str) -> None:
    result = check_pass(RecoverRotary(), before=text(TABLES + ROTATED + total), feeds=feeds())
    assert len(result.rewrites) == 1


def test_a_factor_on_the_waves_stays() -> None:
    tables = TABLES.replace(
        "c = Cos(twice)  s = Sin(twice)", "w = Cos(twice)  c = Mul(w, half)  v = Sin(twice)  s = Mul(half, v)"
    )
    after = text("w = Cos(a)  c = Mul(w, half)  v = Sin(a)  s = Mul(v, half)  y = RotaryEmbedding(x, c, s)", opset=23)
    check_pass(RecoverRotary(), before=text(tables + ROTATED + SUM), after=after, feeds=feeds())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("negated = Neg(second)", "negated = Abs(second)"),
        ("second = Slice(x, two, end, last, one)", "second = Slice(x, one, three, last, one)"),
        ("turned = Concat<axis = -1>(negated, first)", "turned = Concat<axis = -1>(first, negated)"),
        ("straight = Mul(x, cos)", "straight = Mul(a2, cos)"),
    ],
)
def test_what_is_no_rotation_stays(old: str, new: str) -> None:
    body = (TABLES + "a2 = Neg(x)" + ROTATED + SUM).replace(old, new)
    result = check_pass(RecoverRotary(), before=text(body), after=text(body), feeds=feeds())
    assert not result.changed


def test_angles_that_differ_between_the_halves_are_declined() -> None:
    body = TABLES.replace("Concat<axis = -1>(a, a)", "Concat<axis = -1>(a, b2)") + ROTATED + SUM
    body = "b2 = Neg(a)" + body
    result = check_pass(RecoverRotary(), before=text(body), after=text(body), feeds=feeds())
    assert [event.reason for event in result.declined] == ["the angles of its two halves are not the same value"]


def test_an_opset_that_cannot_be_raised_stays() -> None:
    body = text(TABLES + ROTATED + SUM, opset=17)
    assert not check_pass(RecoverRotary(), before=body, after=body, feeds=feeds()).changed
