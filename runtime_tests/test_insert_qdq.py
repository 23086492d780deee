from __future__ import annotations

import numpy as np
import pytest

from scalefold.compiler import schemes
from scalefold.compiler.errors import CalibrationError
from scalefold.compiler.protocol import Context
from scalefold.compiler.runtime import Feed
from scalefold.compiler.testing import check_pass
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
