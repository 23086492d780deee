from __future__ import annotations

import re

import numpy as np
import pytest

from scalefold.compiler.runtime import Array, Feed
from scalefold.compiler.testing import check_pass
from scalefold.passes.fuse_attention import FuseAttention

LOWEST = float(np.finfo(np.float32).min)
INPUTS = "float[b, s, 8] q, float[b, s, 8] k, float[b, s, 8] v"
CONSTANTS = f"""
<int64[4] split = {{0, 0, 2, 4}}, int64[3] join = {{0, 0, 8}}, int64[1] last = {{-1}},
 int64[1] two = {{2}}, int64[1] four = {{4}}, int64[3] loose = {{0, -1, 8}}, int64[1] back = {{-1}},
 float root = {{0.70710677}}, float half = {{0.5}}, float third = {{0.25}}, float width = {{2.0}},
 float lowest = {{{LOWEST!r}}}, float raised = {{-1e38}}, float infinite = {{-inf}},
 float one = {{1.0}}, float zero = {{0.0}},
 int64[1] unit = {{1}}>
"""


def text(body: str, inputs: str = "", outputs: str = "", opset: int = 20) -> str:
    return (
        f'<ir_version: 10, opset_import: ["" : {opset}]>\nmodel ({INPUTS}{inputs}) => (float[b, s, 8] y{outputs})'
        f"{CONSTANTS}{{{body}}}"
    )


FUSED = "y = Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v)"
MASKED = "y = Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v, %s)"

# TorchScript: the key transposed to [0, 2, 3, 1], the scores divided, an additive mask.
QUERY = "qr = Reshape(q, split)  qh = Transpose<perm = [0, 2, 1, 3]>(qr) "
KEY = "kr = Reshape(k, split)  kh = Transpose<perm = [0, 2, 3, 1]>(kr) "
VALUE = "vr = Reshape(v, split)  vh = Transpose<perm = [0, 2, 1, 3]>(vr) "
SCORES = "scores = MatMul(qh, kh)  scaled = Div(scores, width) "
SOFTMAX = "p = Softmax<axis = -1>(scaled) "
WEIGHTED = "m = MatMul(p, vh) "
JOIN = "t = Transpose<perm = [0, 2, 1, 3]>(m)  y = Reshape(t, join)"
HEADS = QUERY + KEY + VALUE
TORCHSCRIPT = HEADS + SCORES + SOFTMAX + WEIGHTED + JOIN
ADDED = HEADS + SCORES + "total = Add(scaled, mask) " + SOFTMAX.replace("scaled", "total") + WEIGHTED + JOIN
FROM_INTEGERS = "f = Cast<to = 1>(attention_mask)  g = Unsqueeze(f, axes)  n = Sub(one, g)  mask = Mul(n, lowest) "

# transformers' OnnxExporter: both sides scaled, the key transposed in three dimensions, a boolean mask, a guard.
EXPORTED_HEADS = (
    QUERY
    + "qs = Mul(qh, root)  kr = Reshape(k, split)  kh = Transpose<perm = [0, 2, 1, 3]>(kr)"
    + "  k3 = Reshape(kh, merged)  kt = Transpose<perm = [0, 2, 1]>(k3)  k4 = Reshape(kt, apart)  ks = Mul(k4, root) "
    + VALUE
)
SHAPES = (
    "b = Shape<start = 0, end = 1>(q)  l = Shape<start = 1, end = 2>(q)"
    "  merged = Concat<axis = 0>(back, l, four)  apart = Concat<axis = 0>(b, two, four, l) "
)
BOOLEAN = "barred = Not(allowed)  counted = Cast<to = 1>(barred)  mask = Mul(counted, lowest) "
GUARD = (
    "number = Cast<to = 1>(allowed)  sum = ReduceSum<keepdims = 1>(number, last)  none = Less(sum, one)"
    "  guarded = Where(none, zero, m) "
)
EXPORTED = (
    SHAPES
    + BOOLEAN
    + EXPORTED_HEADS
    + "scores = MatMul(qs, ks)  total = Add(scores, mask) "
    + SOFTMAX.replace("scaled", "total")
    + WEIGHTED
    + GUARD
    + JOIN.replace("(m)", "(guarded)")
)
ALLOWED = ", bool[b, 1, s, s] allowed"


def feeds(**more: Array) -> list[Feed]:
    generator = np.random.default_rng(5)
    return [{**{name: generator.standard_normal((2, 5, 8)).astype(np.float32) for name in "qkv"}, **more}]


def allowed(*, every_row: bool = True) -> Array:
    """Which key each query may look at: at random, at least one each, or in two rows none."""
    mask = np.random.default_rng(6).integers(0, 2, (2, 1, 5, 5)).astype(bool)
    mask[..., 0] = True
    if not every_row:
        mask[0, 0, 1], mask[1, 0, 4] = False, False
    return mask


def padded(*, every_row: bool = True) -> Array:
    """An integer mask [batch, length] with some keys off; in the second sample all, if wanted."""
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    if not every_row:
        mask[1] = 0
    return mask


def additive(mask: Array) -> Array:
    return ((1.0 - mask[:, None, None, :]) * np.float32(LOWEST)).astype(np.float32)


def second_layer(body: str) -> str:
    """The same layer once more, with other names for the values inside it."""
    return re.sub(r"\b(qr|qh|kr|kh|vr|vh|scores|scaled|total|p|m|t)\b", r"\1_again", body)


def test_attention_without_a_mask_becomes_one_operator() -> None:
    result = check_pass(FuseAttention(), before=text(TORCHSCRIPT), after=text(FUSED, opset=23), feeds=feeds())
    assert [event.reason for event in result.rewrites] == ["2 heads of 4"]
    assert not result.declined


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(TORCHSCRIPT.replace("Div(scores, width)", "Mul(scores, half)"), id="scores multiplied"),
        pytest.param(TORCHSCRIPT.replace("Div(scores, width)", "Mul(half, scores)"), id="number first"),
        pytest.param(TORCHSCRIPT.replace("axis = -1", "axis = 3"), id="the last axis counted from the front"),
        pytest.param(
            TORCHSCRIPT.replace("MatMul(qh, kh)  scaled = Div(scores, width)", "MatMul(qs, kh)").replace(
                "kr =", "qs = Mul(qh, half)  kr =", 1
            ).replace("(scaled)", "(scores)"),
            id="queries scaled",
        ),
        pytest.param(
            TORCHSCRIPT.replace("MatMul(qh, kh)  scaled = Div(scores, width)", "MatMul(qh, ks)").replace(
                "vr =", "ks = Mul(kh, half)  vr =", 1
            ).replace("(scaled)", "(scores)"),
            id="keys scaled",
        ),
        pytest.param(
            TORCHSCRIPT.replace(
                "kh = Transpose<perm = [0, 2, 3, 1]>(kr)",
                "k2 = Transpose<perm = [0, 2, 1, 3]>(kr)  kh = Transpose<perm = [0, 1, 3, 2]>(k2)",
            ),
            id="keys transposed twice",
        ),
        pytest.param(
            SHAPES
            + EXPORTED_HEADS
            + "scores = MatMul(qs, ks) "
            + SOFTMAX.replace("scaled", "scores")
            + WEIGHTED
            + JOIN,
            id="the exporter's layout without a mask",
        ),
    ],
)  # fmt: skip
def test_every_spelling_of_the_scores_is_read(body: str) -> None:
    check_pass(FuseAttention(), before=text(body), after=text(FUSED, opset=23), feeds=feeds())


def test_another_scale_than_the_usual_becomes_an_attribute() -> None:
    check_pass(
        FuseAttention(),
        before=text(TORCHSCRIPT.replace("Div(scores, width)", "Mul(scores, third)")),
        after=text(FUSED.replace("kv_num_heads = 2", "kv_num_heads = 2, scale = 0.25"), opset=23),
        feeds=feeds(),
    )


def test_scores_without_any_scale_get_a_scale_of_one() -> None:
    check_pass(
        FuseAttention(),
        before=text(HEADS + "scaled = MatMul(qh, kh) " + SOFTMAX + WEIGHTED + JOIN),
        after=text(FUSED.replace("kv_num_heads = 2", "kv_num_heads = 2, scale = 1.0"), opset=23),
        feeds=feeds(),
    )


@pytest.mark.parametrize("every_row", [True, False], ids=["every row sees a key", "two rows see none"])
def test_the_layout_of_the_transformers_exporter_keeps_its_numbers(every_row: bool) -> None:
    result = check_pass(
        FuseAttention(),
        before=text(EXPORTED, ALLOWED),
        after=text(BOOLEAN + MASKED % "mask", ALLOWED, opset=23),
        feeds=feeds(allowed=allowed(every_row=every_row)),
    )
    assert len(result.rewrites) == 1


EXPANDED = """
r = Max(mask, raised)  l = Shape<start = 1, end = 2>(q)  shape = Concat<axis = 0>(unit, unit, l, unit)
e = Expand(r, shape)
"""


@pytest.mark.parametrize("every_row", [True, False], ids=["every sample sees a key", "one sample sees none"])
def test_the_layout_of_the_torchscript_exporter_keeps_its_numbers(every_row: bool) -> None:
    result = check_pass(
        FuseAttention(),
        before=text(ADDED, ", float[b, 1, 1, s] mask"),
        after=text(EXPANDED + MASKED % "e", ", float[b, 1, 1, s] mask", opset=23),
        feeds=feeds(mask=additive(padded(every_row=every_row))),
    )
    assert len(result.rewrites) == 1


def test_a_mask_first_in_the_sum_is_read_too() -> None:
    check_pass(
        FuseAttention(),
        before=text(ADDED.replace("Add(scaled, mask)", "Add(mask, scaled)"), ", float[b, 1, 1, s] mask"),
        after=text(EXPANDED + MASKED % "e", ", float[b, 1, 1, s] mask", opset=23),
        feeds=feeds(mask=additive(padded())),
    )


def test_a_mask_made_of_integers_in_the_graph_keeps_its_numbers() -> None:
    body = FROM_INTEGERS.replace("axes", "between") + ADDED
    inputs = ", int64[b, s] attention_mask"
    whole = text(body, inputs).replace("int64[1] unit", "int64[2] between = {1, 2}, int64[1] unit")
    for every_row in (True, False):
        result = check_pass(FuseAttention(), before=whole, feeds=feeds(attention_mask=padded(every_row=every_row)))
        assert len(result.rewrites) == 1


@pytest.mark.parametrize("every_row", [True, False], ids=["every row sees a key", "two rows see none"])
def test_a_whole_mask_that_no_guard_protects_keeps_the_mean_of_the_values(every_row: bool) -> None:
    check_pass(
        FuseAttention(),
        before=text(BOOLEAN + ADDED, ALLOWED),
        after=text(BOOLEAN + "r = Max(mask, raised) " + MASKED % "r", ALLOWED, opset=23),
        feeds=feeds(allowed=allowed(every_row=every_row)),
    )


def test_layers_that_share_a_mask_prepare_it_once() -> None:
    second = ADDED.replace("y = Reshape(t, join)", "first = Reshape(t, join) ")
    again = second_layer(ADDED).replace("(q, split)", "(first, split)")
    check_pass(
        FuseAttention(),
        before=text(second + again, ", float[b, 1, 1, s] mask"),
        after=text(
            EXPANDED + (MASKED % "e").replace("y =", "first =") + (MASKED % "e").replace("(q,", "(first,"),
            ", float[b, 1, 1, s] mask",
            opset=23,
        ),
        feeds=feeds(mask=additive(padded(every_row=False))),
    )


def test_probabilities_that_are_cleared_of_nan_behind_an_infinite_mask_keep_their_numbers() -> None:
    cleared = (
        SOFTMAX.replace("p =", "raw =").replace("scaled", "total") + "odd = IsNaN(raw)  p = Where(odd, zero, raw) "
    )
    body = (
        "mask = Where(allowed, zero, infinite) "
        + HEADS
        + SCORES
        + "total = Add(scaled, mask) "
        + cleared
        + WEIGHTED
        + JOIN
    )
    for every_row in (True, False):
        result = check_pass(
            FuseAttention(), before=text(body, ALLOWED), feeds=feeds(allowed=allowed(every_row=every_row))
        )
        assert len(result.rewrites) == 1


def test_probabilities_that_are_cleared_of_nan_behind_another_mask_are_declined() -> None:
    cleared = (
        SOFTMAX.replace("p =", "raw =").replace("scaled", "total") + "odd = IsNaN(raw)  p = Where(odd, zero, raw) "
    )
    body = HEADS + SCORES + "total = Add(scaled, mask) " + cleared + WEIGHTED + JOIN
    before = text(body, ", float[b, 1, s, s] mask")
    result = check_pass(
        FuseAttention(), before=before, after=before, feeds=feeds(mask=np.zeros((2, 1, 5, 5), np.float32))
    )
    assert [event.reason for event in result.declined] == [
        "NaN is cleared from its probabilities, but the mask is not made of 0 and minus infinity"
    ]


def test_layers_with_masks_of_their_own_prepare_each() -> None:
    again = second_layer(ADDED.replace("mask", "other")).replace("(q, split)", "(first, split)")
    masks = ", float[b, 1, 1, s] mask, float[b, 1, 1, s] other"
    check_pass(
        FuseAttention(),
        before=text(ADDED.replace("y =", "first =") + " " + again, masks),
        feeds=feeds(mask=additive(padded()), other=additive(padded(every_row=False))),
    )


HEADS_DIFFER = "queries, keys and values differ in heads"
NOT_HEADS = "queries, keys and values are not heads of three-dimensional activations"
NO_VALUES = "no product of probabilities and values behind it"
NO_KEYS = "no product of queries and keys in front of it"
NOT_JOINED = "the heads are not joined behind it"
OTHER_GUARD = "its output is selected by a condition other than `every key is masked`"


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        pytest.param(text(TORCHSCRIPT.replace("MatMul(p, vh)", "Mul(p, p)").replace(
            JOIN, "z = Identity(m)  y = Identity(v)"), outputs=", float[b, 2, s, s] z"), NO_VALUES, id="no product behind"),
        pytest.param(text(TORCHSCRIPT, outputs=", float[b, 2, s, s] p"), NO_VALUES, id="probabilities returned"),
        pytest.param(text(TORCHSCRIPT.replace("axis = -1", "axis = 2")), NO_VALUES, id="another axis"),
        pytest.param(text("y = Softmax(q)"), NO_VALUES, id="a softmax alone"),
        pytest.param(text(TORCHSCRIPT.replace("Div(scores, width)", "Tanh(scores)")), NO_KEYS, id="scores bent"),
        pytest.param(text(ADDED.replace("Add(scaled, mask)", "Add(mask, mask)"), ", float[b, 1, s, s] mask"), NO_KEYS,
                     id="no scores in the sum"),
        pytest.param(text(TORCHSCRIPT.replace("MatMul(qh, kh)", "MatMul(qn, kh)").replace(
            "kr =", "qn = Neg(qh)  kr =", 1)), NOT_HEADS, id="queries turned"),
        pytest.param(text(TORCHSCRIPT.replace("[0, 2, 3, 1]>(kr)", "[0, 2, 3, 1]>(kq)").replace(
            "kr =", "kq = Neg(qr)  kr =", 1)), NOT_HEADS, id="keys of something else"),
        pytest.param(text(TORCHSCRIPT.replace("MatMul(p, vh)", "MatMul(p, vn)").replace(
            "scores =", "vn = Neg(vh)  scores =", 1)), NOT_HEADS, id="values turned"),
        pytest.param(text(TORCHSCRIPT.replace("t = Transpose<perm = [0, 2, 1, 3]>(m)  y = Reshape(t, join)",
                                              "y = Reshape(m, loose)")), NOT_JOINED, id="not transposed back"),
        pytest.param(text(TORCHSCRIPT, outputs=", float[b, 2, s, 4] m"), NOT_JOINED, id="heads returned"),
        pytest.param(text(EXPORTED.replace("Less(sum, one)", "Less(sum, width)"), ALLOWED), OTHER_GUARD,
                     id="fewer than two keys"),
        pytest.param(text(EXPORTED.replace("Where(none, zero, m)", "Where(none, one, m)"), ALLOWED), OTHER_GUARD,
                     id="one in place of zero"),
        pytest.param(text(EXPORTED.replace("Where(none, zero, m)", "Where(none, m, zero)"), ALLOWED), OTHER_GUARD,
                     id="the other way round"),
        pytest.param(text(EXPORTED.replace("(counted, lowest)", "(counted, raised)"), ALLOWED), OTHER_GUARD,
                     id="another lowest score"),
        pytest.param(text(EXPORTED.replace("number = Cast<to = 1>(allowed)", "number = Cast<to = 1>(barred)"), ALLOWED),
                     OTHER_GUARD, id="counts what is barred"),
        pytest.param(text(ADDED, ", float[s, s] mask"), "the mask is not four-dimensional", id="a flat mask"),
        pytest.param(text(TORCHSCRIPT.replace("MatMul(p, vh)", "MatMul(p, vw)").replace(
            "scores =", "vw = Mul(vh, width)  scores =", 1)), "values are scaled", id="values scaled"),
        pytest.param(text(TORCHSCRIPT.replace("Div(scores, width)", "Mul(scores, lowest)")), "its scale is not positive",
                     id="a negative scale"),
        pytest.param(text(ADDED, ", float[b, 1, s, 1] mask"), "the mask has not a number for every key",
                     id="a mask of queries"),
        pytest.param(text(TORCHSCRIPT, opset=17), "opset 17 cannot be raised to 23 as it is", id="an old opset"),
    ],
)  # fmt: skip
def test_what_is_not_attention_is_declined(before: str, reason: str) -> None:
    more: dict[str, Array] = {}
    if "allowed)" in before:
        more["allowed"] = allowed(every_row=False)
    if "float[s, s] mask" in before:
        more["mask"] = np.zeros((5, 5), np.float32)
    if "float[b, 1, s, s] mask" in before:
        more["mask"] = np.zeros((2, 1, 5, 5), np.float32)
    if "float[b, 1, s, 1] mask" in before:
        more["mask"] = np.zeros((2, 1, 5, 1), np.float32)
    result = check_pass(FuseAttention(), before=before, after=before, feeds=feeds(**more))
    assert [event.reason for event in result.declined] == [reason]


def test_values_in_other_heads_than_queries_are_declined() -> None:
    # One sample of width 8 whose values are split in two heads of 4 for 2-head scores, but keys and queries in 2 of 2.
    inputs = "float[b, s, 4] q, float[b, s, 4] k, float[b, s, 8] v"
    before = text(TORCHSCRIPT.replace("(q, split)", "(q, pairs)").replace("(k, split)", "(k, pairs)"))
    before = before.replace(INPUTS, inputs).replace("int64[1] unit", "int64[4] pairs = {0, 0, 2, 2}, int64[1] unit")
    result = check_pass(FuseAttention(), before=before, after=before)
    assert [event.reason for event in result.declined] == [HEADS_DIFFER]


def test_a_guard_whose_sum_is_over_queries_keeps_its_numbers() -> None:
    # [b, 1, s, s] summed over queries is [b, 1, 1, s]; for a width of s it still broadcasts, to another function.
    body = EXPORTED.replace("ReduceSum<keepdims = 1>(number, last)", "ReduceSum<keepdims = 1>(number, two)")
    before = text(body, ALLOWED).replace("b, s, 8", "b, 4, 8").replace("b, 1, s, s", "b, 1, 4, 4")
    mask = np.tril(np.ones((1, 1, 4, 4), bool))
    mask[..., 3] = False
    generator = np.random.default_rng(8)
    single: Feed = {
        **{name: generator.standard_normal((1, 4, 8)).astype(np.float32) for name in "qkv"},
        "allowed": mask,
    }
    check_pass(FuseAttention(), before=before, feeds=[single])


def test_cross_attention_with_an_additive_mask_keeps_its_numbers() -> None:
    inputs = INPUTS.replace("float[b, s, 8] k, float[b, s, 8] v", "float[b, n, 8] k, float[b, n, 8] v")
    before = text(ADDED, ", float[b, 1, 1, n] mask").replace(INPUTS, inputs)
    generator = np.random.default_rng(9)
    feed: Feed = {
        "q": generator.standard_normal((2, 3, 8)).astype(np.float32),
        "k": generator.standard_normal((2, 5, 8)).astype(np.float32),
        "v": generator.standard_normal((2, 5, 8)).astype(np.float32),
        "mask": additive(padded()),
    }
    result = check_pass(FuseAttention(), before=before, feeds=[feed])
    assert len(result.rewrites) == 1


def test_one_prepared_mask_serves_layers_with_other_numbers_of_queries() -> None:
    # Two layers share a mask over keys, [b, 1, 1, n]; the first has s queries, the second n.
    inputs = "float[b, s, 8] q, float[b, n, 8] k, float[b, n, 8] v"
    again = second_layer(ADDED).replace("(q, split)", "(k, split)").replace("y =", "z =")
    before = text(ADDED + " " + again, ", float[b, 1, 1, n] mask", ", float[b, n, 8] z").replace(INPUTS, inputs)
    generator = np.random.default_rng(9)
    feed: Feed = {
        "q": generator.standard_normal((2, 3, 8)).astype(np.float32),
        "k": generator.standard_normal((2, 5, 8)).astype(np.float32),
        "v": generator.standard_normal((2, 5, 8)).astype(np.float32),
        "mask": additive(padded()),
    }
    check_pass(FuseAttention(), before=before, feeds=[feed])


# A decoder: keys turned by position, behind those of earlier tokens, each of two for two of the four queries.
DECODER_INPUTS = (
    "float[b, s, 16] q, float[b, s, 8] k, float[b, s, 8] v, float[b, s, 2] c, float[b, s, 2] n,"
    " float[b, 2, p, 4] past_k, float[b, 2, p, 4] past_v, float[b, 1, s, t] mask"
)
TURNED = (
    "q4 = Reshape(q, split_q)  qh = Transpose<perm = [0, 2, 1, 3]>(q4)  qt = RotaryEmbedding(qh, c, n) "
    "k4 = Reshape(k, split)  kh = Transpose<perm = [0, 2, 1, 3]>(k4)  kt = RotaryEmbedding(kh, c, n) "
    "v4 = Reshape(v, split)  vh = Transpose<perm = [0, 2, 1, 3]>(v4) "
)
CACHED = "keys = Concat<axis = -2>(past_k, kt)  values = Concat<axis = -2>(past_v, vh) "
REPEATED = (
    "b1 = Shape<start = 0, end = 1>(keys)  t1 = Shape<start = 2, end = 3>(keys)"
    "  wide = Concat<axis = 0>(b1, two, two, t1, four)  flat = Concat<axis = 0>(b1, four, t1, four)"
    "  ku = Unsqueeze(keys, two)  ke = Expand(ku, wide)  kr = Reshape(ke, flat)"
    "  vu = Unsqueeze(values, two)  ve = Expand(vu, wide)  vr = Reshape(ve, flat) "
)
SCORED = (
    "kx = Transpose<perm = [0, 1, 3, 2]>(kr)  scores = MatMul(qt, kx)  scaled = Div(scores, width)"
    "  total = Add(scaled, mask)  p = Softmax<axis = -1>(total)  m = MatMul(p, vr)"
    "  tr = Transpose<perm = [0, 2, 1, 3]>(m)  y = Reshape(tr, join_q)"
)
DECODER_CONSTANTS = (
    "<int64[4] split = {0, 0, 2, 4}, int64[4] split_q = {0, 0, 4, 4}, int64[3] join_q = {0, 0, 16},"
    " int64[1] two = {2}, int64[1] four = {4}, float width = {2.0}, float lowest = {-1e38}>"
)


def decoder(body: str) -> str:
    return (
        f'<ir_version: 10, opset_import: ["" : 23]>\nmodel ({DECODER_INPUTS}) => (float[b, s, 16] y,'
        " float[b, 2, t, 4] keys, float[b, 2, t, 4] values)"
        f"{DECODER_CONSTANTS.replace('>', ', float[b, 2, 2, t, 4] ke, float[b, 2, 2, t, 4] ve,')}"
        f" float[b, 4, t, 4] kr, float[b, 4, t, 4] vr>{{{body}}}"
    )


def decoder_feeds() -> list[Feed]:
    generator = np.random.default_rng(8)
    found: list[Feed] = []
    for s, p in ((5, 0), (1, 4), (3, 2)):
        shapes = {"q": (2, s, 16), "k": (2, s, 8), "v": (2, s, 8), "c": (2, s, 2), "n": (2, s, 2)}
        feed = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        for name in ("past_k", "past_v"):
            feed[name] = generator.standard_normal((2, 2, p, 4)).astype(np.float32)
        later = np.arange(s + p)[None, :] > np.arange(s)[:, None] + p
        feed["mask"] = np.broadcast_to(np.where(later, np.float32(LOWEST), np.float32(0)), (2, 1, s, s + p)).copy()
        found.append(feed)
    return found


def test_attention_with_a_cache_and_repeated_rotated_keys_becomes_one_operator() -> None:
    after = (
        "raised = Max(mask, lowest)  turned_q = RotaryEmbedding<num_heads = 4>(q, c, n)"
        "  turned_k = RotaryEmbedding<num_heads = 2>(k, c, n)"
        "  y, keys, values = Attention<q_num_heads = 4, kv_num_heads = 2>(turned_q, turned_k, v, raised, past_k, past_v)"
    )
    check_pass(
        FuseAttention(),
        before=decoder(TURNED + CACHED + REPEATED + SCORED),
        after=decoder(after),
        feeds=decoder_feeds(),
    )


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("values = Concat<axis = -2>(past_v, vh)", "values = Neg(vh)", "queries, keys and values are not heads"),
        ("values = Concat<axis = -2>(past_v, vh)", "values = Concat<axis = -2>(past_v, kt)", "values are rotated"),
        ("axis = -2>(past_k, kt)", "axis = -2>(past_k, kt, past_v)", "queries, keys and values are not heads"),
        ("qt = RotaryEmbedding(qh, c, n)", "qt = Concat<axis = 2>(past_q, qh)", "not keys and values both"),
    ],
)
def test_caches_that_the_operator_does_not_have_are_declined(old: str, new: str, reason: str) -> None:
    body = (TURNED + CACHED + REPEATED + SCORED).replace(old, new)
    before = decoder("past_q = Concat<axis = 1>(past_k, past_v)" + body)
    result = check_pass(FuseAttention(), before=before, after=before, feeds=[])
    assert len(result.declined) == 1 and result.declined[0].reason.startswith(reason)


def test_a_mask_that_is_computed_from_the_cache_is_declined() -> None:
    body = TURNED + CACHED + REPEATED + SCORED.replace("Add(scaled, mask)", "Add(scaled, seen)")
    seen = (
        "tail = ReduceMean<keepdims = 1>(keys, two)  zero = Sub(tail, tail)"
        "  less = ReduceSum<keepdims = 0>(zero)  seen = Add(mask, less) "
    )
    before = decoder(body.replace("kx = ", seen + "kx = "))
    result = check_pass(FuseAttention(), before=before, after=before, feeds=[])
    assert [event.reason for event in result.declined] == ["its mask is computed from its cache"]
