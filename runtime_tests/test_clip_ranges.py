from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import schemes
from scalefold.compiler.protocol import Context
from scalefold.compiler.runtime import Array, Feed
from scalefold.compiler.testing import check_pass, context_on, parse
from scalefold.passes import clip_ranges
from scalefold.passes.clip_ranges import ClipRanges
from scalefold.passes.insert_qdq import InsertQdq

GENERATOR = np.random.default_rng(11)
HEAD = """<ir_version: 10, opset_import: ["" : 20]>
model (float[b, s, 4] x) => (float[b, s, 3] y)
<int8[4, 3] codes = {100, 2, 33, -47, -5, 127, 11, 90, -8, 64, 7, -99}, float[3] scales = {0.01, 0.02, 0.01},
 float[3] c = {0.5, -1.0, 0.25}, float s = {%s}, uint8 z = {%s}, float bottom = {-6.0}, float top = {6.0}>
"""
LAYER = "d = DequantizeLinear<axis = 1>(codes, scales)  [fc] y = MatMul(r, d)"
QDQ = "q = QuantizeLinear(x, s, z)  r = DequantizeLinear(q, s, z) " + LAYER


def tokens(largest: float, count: int = 100) -> Array:
    """Tokens in [-1, 1], each of which reaches both ends, and in the first one the smallest and largest value."""
    rows = GENERATOR.uniform(-1, 1, (1, count, 4)).astype(np.float32)
    rows[0, :, 0], rows[0, :, 1] = 1, -1
    rows[0, 0, :2] = largest, -largest
    return rows


def head(affine: schemes.Affine) -> str:
    return HEAD % (repr(affine.scale), affine.zero_point)


CALM: list[Feed] = [{"x": tokens(1.0)}, {"x": tokens(1.0)}]
SHARP: list[Feed] = [{"x": tokens(4.0)}, {"x": tokens(1.0)}]
"""One token of two hundred reaches four times as far."""
WIDE, NARROW = schemes.activation_grid(-4, 4), schemes.activation_grid(-1, 1)


def float_model() -> ir.Model:
    return parse(head(WIDE) + "{ r = Identity(x) " + LAYER + "}")


def sharp_context() -> Context:
    """Ranges from calibration with a sharp token, a search on samples without one, and the float model's outputs."""
    return Context(
        measure=context_on(float_model(), SHARP).measure,
        search=CALM,
        reference=context_on(float_model(), CALM).reference,
    )


def test_the_ratio_that_helps_the_outputs_most_is_set_on_the_quantizer() -> None:
    result = check_pass(
        ClipRanges(),
        before=head(WIDE) + f"{{ {QDQ} }}",
        after=head(NARROW) + f"{{ {QDQ} }}",
        feeds=CALM,
        context=sharp_context(),
    )
    (event,) = result.rewrites
    assert event.reason == "clipped"
    assert event.figures["ratio"] == 0.99
    assert float(event.figures["error"]) < 0.25 * float(event.figures["error_unclipped"])
    assert event.figures["high"] == NARROW.high


def test_with_refinement_each_quantizer_finds_the_ratio_that_suits_it() -> None:
    # The first layer's sharp tokens are noise of calibration; the second's are in the search samples and count.
    two = """<ir_version: 10, opset_import: ["" : 20]>
    model (float[b, s, 4] x, float[b, s, 4] v) => (float[b, s, 3] y, float[b, s, 3] w)
    <int8[4, 3] codes = {100, 2, 33, -47, -5, 127, 11, 90, -8, 64, 7, -99}, float[3] scales = {0.01, 0.02, 0.01}>
    { d = DequantizeLinear<axis = 1>(codes, scales)  [noisy] y = MatMul(x, d)
      e = DequantizeLinear<axis = 1>(codes, scales)  [sharp] w = MatMul(v, e) }"""
    sharp = tokens(4.0)
    search: list[Feed] = [{"x": tokens(1.0), "v": sharp}]
    original = parse(two)
    context = Context(
        measure=context_on(original, [{"x": tokens(4.0), "v": sharp}]).measure,
        search=search,
        reference=context_on(original, search).reference,
    )
    model = original.clone()
    InsertQdq().run(model, context)
    assert not check_pass(ClipRanges(), before=model, feeds=search, context=context).changed
    result = check_pass(ClipRanges(refine=True), before=model, feeds=search, context=context)
    assert [(event.where, event.figures["ratio"]) for event in result.rewrites] == [("noisy.input_q", 0.99)]
    assert [(event.where, event.figures["ratio"]) for event in result.declined] == [("sharp.input_q", 1.0)]


def test_of_equal_ratios_the_largest_wins() -> None:
    result = check_pass(
        ClipRanges(largest=0.3, step=0.1), before=head(WIDE) + f"{{ {QDQ} }}", feeds=CALM, context=sharp_context()
    )
    assert [event.figures["ratio"] for event in result.rewrites] == [0.9]


def test_where_the_sharp_tokens_count_no_clipping_is_best_and_it_is_declined() -> None:
    before = head(WIDE) + f"{{ {QDQ} }}"
    context = Context(
        measure=context_on(float_model(), SHARP).measure,
        search=SHARP,
        reference=context_on(float_model(), SHARP).reference,
    )
    result = check_pass(ClipRanges(), before=before, after=before, feeds=SHARP, context=context)
    (event,) = result.declined
    assert event.reason == "best as it is"
    assert event.figures["ratio"] == 1.0
    assert event.figures["error"] == event.figures["error_unclipped"]


@pytest.mark.parametrize("bits", [4, 6])
def test_below_8_bits_the_bounds_of_the_clip_move_with_the_grid(bits: int) -> None:
    model = float_model()
    context = sharp_context()
    InsertQdq(bits=bits).run(model, context)
    narrow = schemes.activation_grid(-1, 1, bits)
    (event,) = check_pass(ClipRanges(bits=bits), before=model, feeds=CALM, context=context).rewrites
    clip = event.node.inputs[0].producer() if event.node.inputs[0] is not None else None
    assert clip is not None
    assert clip.op_type == "Clip"
    constants = [value.const_value.numpy() for value in clip.inputs[1:] if value is not None and value.const_value]
    assert [float(constant) for constant in constants] == [narrow.low, narrow.high]


def test_a_clip_of_the_model_itself_keeps_its_bounds() -> None:
    own = QDQ.replace("QuantizeLinear(x", "QuantizeLinear(t")
    check_pass(
        ClipRanges(),
        before=head(WIDE) + f"{{ t = Clip(x, bottom, top)  {own} }}",
        after=head(NARROW) + f"{{ t = Clip(x, bottom, top)  {own} }}",
        feeds=CALM,
        context=sharp_context(),
    )


def test_two_layers_in_a_row_are_clipped_by_one_ratio_and_settle() -> None:
    square = """<ir_version: 10, opset_import: ["" : 20]>
    model (float[b, s, 4] x) => (float[b, s, 4] y)
    <int8[4, 4] codes = {100, 2, 33, -47, -5, 127, 11, 90, -8, 64, 7, -99, 1, 2, 3, 4},
     float[4] scales = {0.01, 0.02, 0.01, 0.02}>
    { d = DequantizeLinear<axis = 1>(codes, scales)  [first] h = MatMul(x, d)
      e = DequantizeLinear<axis = 1>(codes, scales)  [second] y = MatMul(h, e) }"""
    original = parse(square)
    context = Context(
        measure=context_on(original, SHARP).measure, search=CALM, reference=context_on(original, CALM).reference
    )
    model = original.clone()
    InsertQdq().run(model, context)
    result = check_pass(ClipRanges(), before=model, feeds=CALM, context=context)
    assert [event.where for event in result.rewrites] == ["first.input_q", "second.input_q"]
    assert len({event.figures["ratio"] for event in result.rewrites}) == 1


def test_padding_does_not_count() -> None:
    masked = (head(WIDE) + f"{{ {QDQ} used = Identity(attention_mask) }}").replace(
        "x)", "x, int64[b, s] attention_mask)"
    )
    masked = masked.replace("y)\n", "y, int64[b, s] used)\n")
    mask = np.ones((1, 100), np.int64)
    mask[0, 0] = 0  # the sharp token is padding, in calibration and in the search
    feeds: list[Feed] = [{"x": tokens(4.0), "attention_mask": mask}]
    plain = parse(masked.replace("q = QuantizeLinear(x, s, z)  r = DequantizeLinear(q, s, z)", "r = Identity(x)"))
    model = plain.clone()
    context = context_on(plain, feeds)
    InsertQdq().run(model, context)
    result = check_pass(ClipRanges(), before=model, feeds=feeds, context=context)
    assert [event.reason for event in result.declined] == ["best as it is"]


def test_a_graph_that_only_dequantizes_has_nothing_to_clip() -> None:
    before = (head(WIDE) + f"{{ r = DequantizeLinear(x, s, z)  {LAYER} }}").replace("float[b, s, 4]", "uint8[b, s, 4]")
    result = check_pass(ClipRanges(), before=before, after=before)
    assert not result.declined


def test_a_quantizer_whose_scale_is_computed_is_left_alone() -> None:
    before = head(WIDE) + f"{{ m = ReduceMax<keepdims = 0>(x)  t = Mul(m, s)  {QDQ.replace('s, z', 't, z')} }}"
    result = check_pass(ClipRanges(), before=before, after=before, feeds=CALM)
    assert not result.declined


@pytest.mark.parametrize(
    "own",
    [
        "h = QuantizeLinear(x, s, z)  r = DequantizeLinear(h, t, z)",
        "h = QuantizeLinear(x, s)  r = DequantizeLinear(h, s)",
        "h = QuantizeLinear(x, s, i)  r = DequantizeLinear(h, s, i)",
    ],
)
def test_a_quantizer_of_the_source_for_something_else_is_left_alone(own: str) -> None:
    start = head(WIDE).replace("float bottom", "float t = {0.5}, int8 i = {0}, float bottom")
    before = start + f"{{ {own} {LAYER} }}"
    result = check_pass(ClipRanges(), before=before, after=before, feeds=CALM)
    assert not result.declined


def test_the_largest_share_is_tried_and_none_beyond_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []
    best = clip_ranges._best_common

    def noted(quantizers: Any, shares: Any, error: Any, advance: Any) -> Any:
        tried[:] = shares
        return best(quantizers, shares, error, advance)

    monkeypatch.setattr(clip_ranges, "_best_common", noted)
    for largest, step, wanted in ((0.15, 0.1, [0, 0.1, 0.15]), (0.9, 0.6, [0, 0.6, 0.9]), (0.1, 0.05, [0, 0.05, 0.1])):
        check_pass(ClipRanges(largest, step), before=head(WIDE) + f"{{ {QDQ} }}", feeds=CALM, context=sharp_context())
        assert tried == pytest.approx(wanted)


def test_without_a_float_output_there_is_nothing_to_judge_by() -> None:
    before = head(WIDE).replace("=> (float[b, s, 3] y)", "=> (int64[b, s] w)")
    before += f"{{ {QDQ}  w = ArgMax<axis = 2, keepdims = 0>(y) }}"
    result = check_pass(ClipRanges(), before=before, after=before, feeds=CALM)
    assert [event.reason for event in result.declined] == ["no output says how large its error is"]


def test_a_per_token_quantizer_has_no_range_to_clip() -> None:
    model = float_model()
    InsertQdq(granularity="per-token").run(model, Context())
    result = check_pass(ClipRanges(), before=model, after=model, feeds=CALM, context=Context())
    assert not result.declined


def test_beside_per_token_layers_the_static_ones_are_clipped() -> None:
    both = parse(
        head(WIDE).replace("y)", "y, float[b, s, 3] o)")
        + f"{{ r = Identity(x)  {LAYER}  e = DequantizeLinear<axis = 1>(codes, scales)  [rows] o = MatMul(r, e) }}"
    )
    context = Context(measure=context_on(both, SHARP).measure, search=CALM, reference=context_on(both, CALM).reference)
    model = both.clone()
    InsertQdq(per_token=("rows",)).run(model, context)
    result = check_pass(ClipRanges(), before=model, feeds=CALM, context=context)
    assert [(event.where, event.reason) for event in (*result.rewrites, *result.declined)] == [
        ("fc.input_q", "clipped")
    ]


def test_a_quotient_of_the_model_itself_is_clipped() -> None:
    # From the mean, not the minimum: nothing keeps the quotient within [0, 1].
    own = "a = ReduceMean<keepdims = 1>(x)  o = Sub(x, a)  n = Max(a, top)  u = Div(o, n)"
    before = head(WIDE) + f"{{ {own} {QDQ.replace('QuantizeLinear(x', 'QuantizeLinear(u')} }}"
    plain = parse(before.replace("q = QuantizeLinear(u, s, z)  r = DequantizeLinear(q, s, z)", "r = Identity(u)"))
    result = check_pass(ClipRanges(), before=before, feeds=CALM, context=context_on(plain, CALM))
    assert len(result.rewrites) == 1
