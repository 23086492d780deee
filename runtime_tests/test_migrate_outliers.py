from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import verify
from scalefold.compiler.protocol import Event
from scalefold.compiler.recipe import Recipe
from scalefold.compiler.runtime import Array, Feed, Session
from scalefold.compiler.schemes import Float, activation_grid
from scalefold.compiler.testing import check_pass, context_on, parse
from scalefold.passes import pipeline
from scalefold.passes.insert_qdq import InsertQdq
from scalefold.passes.migrate_outliers import (
    BEHIND,
    CODES,
    MigrateOutliers,
    channel_range,
    scales_for,
    search,
    threshold_grid,
)
from scalefold.passes.name_layers import NameLayers
from scalefold.passes.quantize_weights import QuantizeWeights


def floats(values: object) -> Float:
    return np.asarray(values, dtype=np.float32)


SHIFT_ONLY = MigrateOutliers(scale=False)


def constant(name: str, array: object) -> str:
    """A float32 initializer as ONNX text."""
    values = np.asarray(array, dtype=np.float32)
    sizes = ", ".join(map(str, values.shape))
    return f"float[{sizes}] {name} = {{{', '.join(repr(float(value)) for value in values.ravel())}}}"


# A normalization over two channels gives plus or minus 1, so ranges are beta - gamma and beta + gamma exactly.
GAMMA, BETA, BIAS = floats([2, 1]), floats([10, -3]), floats([1, 0, -1])
WEIGHT = floats([[1, 2, 3], [4, 5, 6]])
HAND = """<ir_version: 10, opset_import: ["" : 20]>
model (float[b, s, 2] x%s) => (float[b, s, %s] y%s)
"""
TOKENS: list[Feed] = [{"x": floats([[[0, 1], [1, 0]]])}, {"x": floats([[[3, 4], [7, 2]]])}]
NORM = "n = LayerNormalization<axis = -1, epsilon = 0.0>(x, gamma, beta)"
PLAIN_NORM = "n = LayerNormalization<axis = -1, epsilon = 0.0>(x, gamma)"
LAYER = "[fc] p = MatMul(n, w)  y = Add(p, c)"


def hand(
    body: str,
    *,
    inputs: str = "",
    width: object = 3,
    outputs: str = "",
    constants: Mapping[str, object] | None = None,
) -> str:
    """A graph of two channels, with other constants than the usual ones where given."""
    every = {"gamma": GAMMA, "beta": BETA, "w": WEIGHT, "c": BIAS, **(constants or {})}
    text = HAND % (inputs, width, outputs)
    return text + f"<{', '.join(constant(name, array) for name, array in every.items())}>{{{body}}}"


def test_a_shift_moves_the_middle_of_each_channel_into_the_bias() -> None:
    result = check_pass(
        SHIFT_ONLY,
        before=hand(f"{NORM} {LAYER}"),
        after=hand(f"{NORM} {LAYER}", constants={"beta": [0, 0], "c": BIAS + BETA @ WEIGHT}),
        feeds=TOKENS,
    )
    assert dict(result.rewrites[0].figures) == {
        "largest_before": 12.0,
        "largest_after": 2.0,
        "channels_scaled": 0,
        "readers": 1,
    }


def test_a_scale_divides_the_gain_and_multiplies_the_rows_of_the_weight() -> None:
    before = hand(f"{NORM} {LAYER}")
    (event,) = check_pass(MigrateOutliers(), before=before, feeds=TOKENS).rewrites
    s = scales_for(float(event.figures["threshold"]), floats([-2, -1]), floats([2, 1]))
    assert s[0] > 1
    assert event.figures["channels_scaled"] == int((s > 1).sum())
    changed = {"gamma": GAMMA / s, "beta": [0, 0], "w": WEIGHT * s[:, None], "c": BIAS + BETA @ WEIGHT}
    check_pass(MigrateOutliers(), before=before, after=hand(f"{NORM} {LAYER}", constants=changed), feeds=TOKENS)


def test_without_a_shift_only_the_scale_is_moved() -> None:
    before = hand(f"{NORM} {LAYER}", constants={"beta": [0, 0], "gamma": [50, 1]})
    (event,) = check_pass(MigrateOutliers(shift=False), before=before, feeds=TOKENS).rewrites
    s = scales_for(float(event.figures["threshold"]), floats([-50, -1]), floats([50, 1]))
    changed = {"beta": [0, 0], "gamma": floats([50, 1]) / s, "w": WEIGHT * s[:, None]}
    check_pass(
        MigrateOutliers(shift=False), before=before, after=hand(f"{NORM} {LAYER}", constants=changed), feeds=TOKENS
    )


def test_neither_shift_nor_scale_changes_nothing() -> None:
    before = hand(f"{NORM} {LAYER}")
    assert not check_pass(MigrateOutliers(shift=False, scale=False), before=before, feeds=TOKENS).changed


def test_a_layer_without_bias_gets_one() -> None:
    body = f"{NORM} [fc] y = MatMul(n, w)"
    check_pass(
        SHIFT_ONLY,
        before=hand(body),
        after=hand(f"{NORM} {LAYER}", constants={"beta": [0, 0], "c": BETA @ WEIGHT}),
        feeds=TOKENS,
    )
    check_pass(MigrateOutliers(), before=hand(body), feeds=TOKENS)


def test_a_normalization_without_bias_gets_one() -> None:
    # The second feed's outlier is needed: without a bias two channels alone are centred already.
    feeds: list[Feed] = [{"x": floats([[[0, 1], [0, 3]]])}]
    check_pass(
        SHIFT_ONLY,
        before=hand(f"{PLAIN_NORM} {LAYER}"),
        after=hand(f"{NORM} {LAYER}", constants={"beta": [2, -1], "c": BIAS + floats([-2, 1]) @ WEIGHT}),
        feeds=feeds,
    )


def test_a_normalization_without_bias_that_is_only_scaled_stays_without() -> None:
    before = hand(f"{PLAIN_NORM} {LAYER}", constants={"gamma": [50, 1]})
    (event,) = check_pass(MigrateOutliers(shift=False), before=before, feeds=TOKENS).rewrites
    assert len(event.node.inputs) == 2


def test_a_residual_connection_gets_the_shift_back() -> None:
    square = floats([[1, 2], [4, 5]])
    body = f"{NORM} [fc] p = MatMul(n, w)  q = Add(p, c) "
    check_pass(
        SHIFT_ONLY,
        before=hand(body + "y = Add(n, q)", width=2, constants={"w": square, "c": [1, 0]}),
        after=hand(
            f"{NORM} back = Add(n, z)  [fc] p = MatMul(n, w)  q = Add(p, c)  y = Add(back, q)",
            width=2,
            constants={"w": square, "c": floats([1, 0]) + BETA @ square, "beta": [0, 0], "z": BETA},
        ),
        feeds=TOKENS,
    )


def test_a_residual_connection_gets_scale_and_shift_back() -> None:
    square, gamma = floats([[1, 2], [4, 5]]), floats([50, 1])
    usual = {"w": square, "c": [1, 0], "gamma": gamma}
    before = hand(f"{NORM} [fc] p = MatMul(n, w)  q = Add(p, c)  y = Add(n, q)", width=2, constants=usual)
    (event,) = check_pass(MigrateOutliers(), before=before, feeds=TOKENS).rewrites
    s = scales_for(float(event.figures["threshold"]), -gamma, gamma)
    assert (s > 1).any()
    changed = {
        "gamma": gamma / s,
        "beta": [0, 0],
        "w": square * s[:, None],
        "c": floats([1, 0]) + BETA @ square,
        "s1": s,
        "z": BETA,
    }
    after = hand(
        f"{NORM} m = Mul(n, s1)  back = Add(m, z)  [fc] p = MatMul(n, w)  q = Add(p, c)  y = Add(back, q)",
        width=2,
        constants=changed,
    )
    check_pass(MigrateOutliers(), before=before, after=after, feeds=TOKENS)


def test_a_reader_that_reads_the_value_twice_gets_both_restored() -> None:
    outputs = ", float[b, s, 2] t"
    check_pass(
        SHIFT_ONLY,
        before=hand(f"{NORM} {LAYER} t = Mul(n, n)", outputs=outputs),
        after=hand(
            f"{NORM} back = Add(n, z) {LAYER} t = Mul(back, back)",
            outputs=outputs,
            constants={"beta": [0, 0], "c": BIAS + BETA @ WEIGHT, "z": BETA},
        ),
        feeds=TOKENS,
    )


def test_padding_counts_neither_for_the_shift_nor_for_the_scale() -> None:
    inputs = ", int64[b, s] attention_mask"
    body = f"{NORM} {LAYER} used = Identity(attention_mask)"
    text = hand(body, inputs=inputs, outputs=", int64[b, s] used")
    padded = floats([[[0, 1], [1, 0], [5, 5]]])  # the last token normalizes to 0, so its output is beta
    feeds: list[Feed] = [{"x": padded, "attention_mask": np.array([[1, 0, 1]])}]
    (event,) = check_pass(SHIFT_ONLY, before=text.replace("epsilon = 0.0", "epsilon = 1e-12"), feeds=feeds).rewrites
    shift = event.node.inputs[2]
    assert shift is not None
    assert shift.const_value is not None
    # Tokens give (8, -2) and (10, -3); with padding the middle would be (10, -3).
    np.testing.assert_allclose(shift.const_value.numpy(), BETA - floats([9, -2.5]), atol=1e-5)


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        pytest.param(
            hand(
                "[ln] n = LayerNormalization<axis = -1>(x, v, beta) " + LAYER,
                inputs=", float[2] v",
            ),
            "gain or bias of the normalization is not a constant",
            id="a gain that is fed",
        ),
        pytest.param(
            hand(
                "[ln] n = LayerNormalization<axis = -1>(x, gamma, v) " + LAYER,
                inputs=", float[2] v",
            ),
            "gain or bias of the normalization is not a constant",
            id="a bias that is fed",
        ),
        pytest.param(
            hand(
                f"[ln] n = LayerNormalization<axis = 1>(x, gamma, beta) {LAYER}",
                constants={"gamma": np.ones((4, 2)), "beta": np.ones((4, 2))},
            ).replace("b, s, ", "2, 4, "),
            "the normalization is not over the last axis alone",
            id="two axes",
        ),
        pytest.param(
            hand(f"[ln] {NORM} {LAYER}", outputs=", float[b, s, 2] n"),
            "the activation is an output of the graph",
            id="a graph output",
        ),
        pytest.param(
            hand(f"[ln] {NORM} {LAYER} [other] z = MatMul(x, w)", outputs=", float[b, s, 3] z"),
            "a weight is shared with a layer whose input cannot be migrated",
            id="a shared weight",
        ),
    ],
)
def test_a_site_where_the_algebra_does_not_hold_is_declined(before: str, reason: str) -> None:
    result = check_pass(MigrateOutliers(), before=before, after=before)
    assert [(event.where, event.reason) for event in result.declined] == [("ln", reason)]


def test_a_layer_behind_anything_else_than_a_normalization_is_passed_over() -> None:
    before = hand(f"n = Relu(x) {LAYER}")
    assert not check_pass(MigrateOutliers(), before=before, after=before).declined


def test_the_range_of_a_channel_leaves_padding_out() -> None:
    batches: list[Array] = [floats([[[1, -5], [3, 2]], [[0, 0], [99, -99]]]), floats([[[2, 7]]])]
    low, high = channel_range(batches, [np.array([[1, 1], [1, 0]]), None])
    assert low.tolist() == [0, -5]
    assert high.tolist() == [3, 7]


@pytest.mark.parametrize(
    ("threshold", "low", "high", "expected"),
    [
        (2.0, [-1, -1], [1, 2], [1, 1]),
        (2.0, [-1, -1], [1, 8], [1, 4]),
        (2.0, [-6, -1], [1, 1], [3, 1]),
        (0.5, [-1, -2], [3, 0.25], [6, 4]),
    ],
)
def test_scales_follow_equation_8_on_both_sides(
    threshold: float, low: list[float], high: list[float], expected: list[float]
) -> None:
    assert scales_for(threshold, floats(low), floats(high)).tolist() == expected


@pytest.mark.parametrize(
    ("largest", "end", "count", "lowest"),
    [(80.0, 1.0, 160, 1.0), (3.0, 1.0, 100, 1.0), (0.5, 1.0, 100, 0.05), (80.0, 0.1, 160, 0.1), (0.5, 0.1, 100, 0.1)],
)
def test_thresholds_walk_down_from_the_largest_value(largest: float, end: float, count: int, lowest: float) -> None:
    thresholds = threshold_grid(largest, 100, end)
    assert len(thresholds) == count
    assert thresholds[0] == largest
    assert thresholds[-1] == np.float32(lowest)
    assert (np.diff(thresholds) < 0).all()


def nothing(t: float) -> float:
    """The loss on the rest of the samples where there is no rest."""
    return 0.0


def test_of_equal_losses_the_larger_threshold_wins() -> None:
    assert search(lambda t: 1.0, nothing, floats([4, 3, 2, 1]), stride=1) == (0, 1.0)
    assert search(lambda t: abs(t - 2.5), nothing, floats([4, 3, 2, 1]), stride=1) == (1, 0.5)


@pytest.mark.parametrize("stride", [1, 8])
def test_thresholds_far_behind_on_the_first_samples_are_not_tried_on_the_rest(stride: int) -> None:
    thresholds, losses = np.arange(100, 0, -1, dtype=np.float32), np.random.default_rng(3).uniform(1, 4, 101)
    tried: list[int] = []

    def rest(t: float) -> float:
        tried.append(int(t))
        return 3 * float(losses[int(t)])

    found = search(lambda t: float(losses[int(t)]), rest, thresholds, stride)
    assert found == search(lambda t: 4 * float(losses[int(t)]), nothing, thresholds, stride)
    assert len(tried) == len(set(tried)) < len(thresholds) / 2
    assert max(losses[tried]) <= BEHIND * min(losses[thresholds[::stride].astype(int)])


def test_the_rest_of_the_samples_decides_among_those_close_on_the_first() -> None:
    firsts, rests = {4.0: 1.0, 3.0: 1.2, 2.0: 1.4, 1.0: 9.0}, {4.0: 5.0, 3.0: 4.0, 2.0: 3.0, 1.0: 0.0}
    assert search(firsts.__getitem__, rests.__getitem__, floats([4, 3, 2, 1]), stride=1) == (2, 4.4)


@pytest.mark.parametrize("stride", [1, 3, 8, 200])
def test_a_coarse_search_finds_the_bottom_of_a_valley_with_fewer_tries(stride: int) -> None:
    thresholds = np.linspace(100, 1, 100, dtype=np.float32)
    tried: list[float] = []

    def loss(t: float) -> float:
        tried.append(t)
        return (t - 42.0) ** 2 if stride < 100 else (t - 92.0) ** 2

    assert thresholds[search(loss, nothing, thresholds, stride)[0]] == (42.0 if stride < 100 else 92.0)
    assert len(tried) == len(set(tried))
    assert stride == 1 or stride >= 100 or len(tried) < 55


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_codes_of_a_migrated_activation_are_those_of_its_grid(bits: int) -> None:
    x = np.random.default_rng(2).standard_normal((2, 40, 3)).astype(np.float32) * 3
    z, s, grid = floats([0.5, -1, 0]), floats([1, 2.5, 1]), activation_grid(-2.0, 3.0, bits)
    numbers: dict[str, Array] = {"x_scale": floats(grid.scale), "zero": np.array(grid.zero_point, np.uint8)}
    session = Session(ir.from_onnx_text(CODES))
    got = session.run({"x": x, "z": z, "s": s, "largest": np.array(grid.largest_code, np.uint8), **numbers})["codes"]
    np.testing.assert_array_equal(got, grid.quantize((x - z) / s))
    assert {0, grid.largest_code} <= set(np.unique(got).tolist())


# ---- whole blocks, width 8, two heads of four

GENERATOR = np.random.default_rng(7)
WIDE, HIDDEN = 8, 16
BLOCK = """<ir_version: 10, opset_import: ["" : 20]>
model (float[b, s, 8] x) => (float[b, s, 8] y)
"""
CORE = """
qr = Reshape(q, split)  qh = Transpose<perm = [0, 2, 1, 3]>(qr)
kr = Reshape(k, split)  kh = Transpose<perm = [0, 2, 3, 1]>(kr)
vr = Reshape(v, split)  vh = Transpose<perm = [0, 2, 1, 3]>(vr)
scores = MatMul(qh, kh)  scaled = Mul(scores, half)  probs = Softmax<axis = -1>(scaled)
mixed = MatMul(probs, vh)  mt = Transpose<perm = [0, 2, 1, 3]>(mixed)  a = Reshape(mt, join)
[out] op = MatMul(a, wo)  o = Add(op, bo)
"""
ATTENTION = (
    """
[query] qp = MatMul(n, wq)  q = Add(qp, bq)
[key] kp = MatMul(n, wk)  k = Add(kp, bk)
[value] vp = MatMul(n, wv)  v = Add(vp, bv)
"""
    + CORE
)
FEED_FORWARD = """
[fc1] fp = MatMul(m, w1)  f = Add(fp, b1)  g = Gelu(f)  [fc2] dp = MatMul(g, w2)  d = Add(dp, b2)
"""
PRE_LN = (
    "n = LayerNormalization(x, ga, ba)"
    + ATTENTION
    + "r = Add(x, o)  m = LayerNormalization(r, gb, bb)"
    + FEED_FORWARD
    + "y = Add(r, d)"
)
POST_LN = (
    "n = LayerNormalization(x, ga, ba)"
    + ATTENTION
    + "r = Add(n, o)  m = LayerNormalization(r, gb, bb)"
    + FEED_FORWARD
    + "e = Add(m, d)  y = LayerNormalization(e, gc, bc)"
)
ATTENTION_ONLY = f"n = LayerNormalization(x, ga, ba) {ATTENTION} y = Add(x, o)"
PARAMETERS: dict[str, Float] = {
    name: GENERATOR.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(shape[0]))
    for name, shape in {
        **{f"w{part}": (WIDE, WIDE) for part in "qkvo"},
        **{f"b{part}": (WIDE,) for part in "qkvo2c"},
        "w1": (WIDE, HIDDEN),
        "b1": (HIDDEN,),
        "w2": (HIDDEN, WIDE),
    }.items()
}
GAIN_A, GAIN_B = np.ones(WIDE, np.float32), np.ones(WIDE, np.float32)
GAIN_A[3], GAIN_B[6] = 25, 30
OFFSET_A, OFFSET_B = np.zeros(WIDE, np.float32), np.zeros(WIDE, np.float32)
OFFSET_A[5], OFFSET_B[1] = -40, 50
PARAMETERS |= {"ga": GAIN_A, "ba": OFFSET_A, "gb": GAIN_B, "bb": OFFSET_B, "gc": np.ones(WIDE, np.float32)}
SAMPLES: list[Feed] = [{"x": GENERATOR.standard_normal((2, 12, WIDE)).astype(np.float32)} for _ in range(4)]


def block(body: str, **changed: object) -> ir.Model:
    every = {**PARAMETERS, **changed}
    constants = [constant(name, array) for name, array in every.items()]
    constants += ["int64[4] split = {0, 0, 2, 4}", "int64[3] join = {0, 0, 8}", "float half = {0.5}"]
    model = parse(f"{BLOCK}<{', '.join(constants)}>{{{body}}}")
    for value in [value for value in model.graph.initializers.values() if not value.uses()]:
        del model.graph.initializers[value.name or ""]
    return model


def migrated(model: ir.Model, candidate: MigrateOutliers | None = None) -> tuple[ir.Model, tuple[Event, ...]]:
    changed = model.clone()
    result = (candidate or MigrateOutliers()).run(changed, context_on(model, SAMPLES))
    return changed, result.rewrites


def quantized_error(model: ir.Model, reference: ir.Model) -> float:
    """The squared error of the output when all layers are quantized."""
    quantized = model.clone()
    context = context_on(model, SAMPLES)
    for candidate in (NameLayers(), QuantizeWeights(), InsertQdq()):
        candidate.run(quantized, context)
    wanted, got = Session(reference), Session(quantized)
    return float(np.mean([np.square(wanted.run(feed)["y"] - got.run(feed)["y"]).mean() for feed in SAMPLES]))


@pytest.mark.parametrize("body", [PRE_LN, POST_LN], ids=["pre-LN", "post-LN"])
def test_planted_outliers_of_a_block_shrink_and_the_function_stays(body: str) -> None:
    result = check_pass(MigrateOutliers(), before=block(body), feeds=SAMPLES)
    assert [event.figures["readers"] for event in result.rewrites] == [3, 1]
    for event in result.rewrites:
        assert float(event.figures["largest_after"]) < float(event.figures["largest_before"]) / 2
        assert int(event.figures["channels_scaled"]) >= 1


def test_the_values_that_layers_read_shrink_as_the_figures_say() -> None:
    model = block(PRE_LN)
    changed, events = migrated(model)
    for name, event in zip(("n", "m"), events, strict=True):
        session = Session(changed, outputs=[name])
        seen = max(float(np.abs(session.run(feed)[name]).max()) for feed in SAMPLES)
        # the second site is searched on inputs that the quantized first layers have moved a little
        assert seen == pytest.approx(float(event.figures["largest_after"]), rel=0.05)


def test_only_a_post_ln_block_is_restored_behind_the_normalization() -> None:
    pre, _ = migrated(block(PRE_LN))
    post, _ = migrated(block(POST_LN))
    assert not [node.name for node in pre.graph if "restore" in (node.name or "")]
    assert [node.name for node in post.graph if "restore" in (node.name or "")] == [
        "n.restore_mul",
        "n.restore_add",
        "m.restore_mul",
        "m.restore_add",
    ]


@pytest.mark.parametrize("body", [PRE_LN, POST_LN], ids=["pre-LN", "post-LN"])
def test_a_block_of_layers_without_bias_is_migrated_too(body: str) -> None:
    bare = body
    for name in "qkv":
        bare = bare.replace(
            f"{name}p = MatMul(n, w{name})  {name} = Add({name}p, b{name})", f"{name} = MatMul(n, w{name})"
        )
    bare = bare.replace("fp = MatMul(m, w1)  f = Add(fp, b1)", "f = MatMul(m, w1)")
    result = check_pass(MigrateOutliers(), before=block(bare), feeds=SAMPLES)
    assert len(result.rewrites) == 2


@pytest.mark.parametrize("body", [PRE_LN, POST_LN], ids=["pre-LN", "post-LN"])
def test_the_quantized_error_falls(body: str) -> None:
    model = block(body)
    changed, _ = migrated(model)
    shifted, _ = migrated(model, MigrateOutliers(scale=False))
    plain = quantized_error(model, model)
    assert quantized_error(changed, model) < 0.25 * plain
    assert quantized_error(shifted, model) < 0.5 * plain


def test_the_error_of_the_layer_behind_a_site_falls() -> None:
    body = "n = LayerNormalization(x, ga, ba)  [fc] p = MatMul(n, wq)  y = Add(p, bq)"
    model = block(body)
    changed, _ = migrated(model)
    assert quantized_error(changed, model) < 0.25 * quantized_error(model, model)


def test_queries_keys_and_values_are_searched_by_what_attention_makes_of_them() -> None:
    # Values of zero make attention zero: no threshold is better than another, so the largest wins.
    (first, _) = migrated(block(PRE_LN, wv=np.zeros((WIDE, WIDE)), bv=np.zeros(WIDE)))[1]
    assert first.figures["channels_scaled"] == 0
    apart = "n = LayerNormalization(x, ga, ba)  [query] p = MatMul(n, wq)  y = Add(p, bq)"
    (alone,) = migrated(block(apart))[1]
    assert int(alone.figures["channels_scaled"]) >= 1


def test_attention_is_searched_in_the_form_that_measurements_run() -> None:
    model = block(PRE_LN)
    seen: list[list[str]] = []

    def noted(piece: ir.Model) -> ir.Model:
        fused = pipeline(Recipe()).fused(piece)
        seen.append([node.op_type for node in fused.graph])
        return fused

    for shown in (noted, lambda piece: piece):
        changed = model.clone()
        result = MigrateOutliers().run(changed, replace(context_on(model, SAMPLES), fused=shown))
        assert [event.figures["threshold"] for event in result.rewrites] == [
            event.figures["threshold"] for event in migrated(model)[1]
        ]
    assert any("Attention" in types and "Softmax" not in types for types in seen)


def test_one_fused_projection_is_searched_by_what_attention_makes_of_it() -> None:
    fused = "[qkv] p = MatMul(n, wqkv)  q, k, v = Split<axis = -1, num_outputs = 3>(p)" + CORE
    body = f"n = LayerNormalization(x, ga, ba) {fused} y = Add(x, o)"
    parts = [PARAMETERS["wq"], PARAMETERS["wk"]]
    blind = block(body, wqkv=np.concatenate([*parts, np.zeros((WIDE, WIDE), np.float32)], axis=1))
    seeing = block(body, wqkv=np.concatenate([*parts, PARAMETERS["wv"]], axis=1))
    assert [event.figures["channels_scaled"] for event in migrated(blind)[1]] == [0]
    assert [int(event.figures["channels_scaled"]) > 0 for event in migrated(seeing)[1]] == [True]
    check_pass(MigrateOutliers(), before=seeing, feeds=SAMPLES)


def test_a_feed_forward_layer_is_searched_by_its_product() -> None:
    # Were the error measured behind fc2, a weight of zero there would leave nothing to choose by.
    (_, second) = migrated(block(PRE_LN, w2=np.zeros((HIDDEN, WIDE))))[1]
    assert int(second.figures["channels_scaled"]) >= 1


def test_layers_that_share_one_bias_are_searched_as_if_each_had_its_own() -> None:
    shared = block(ATTENTION_ONLY.replace("bk", "bq").replace("bv", "bq"))
    apart = block(ATTENTION_ONLY, bk=PARAMETERS["bq"], bv=PARAMETERS["bq"])
    assert [event.figures for event in migrated(shared)[1]] == [event.figures for event in migrated(apart)[1]]
    check_pass(MigrateOutliers(), before=shared, feeds=SAMPLES)


def test_a_site_sees_the_layers_before_it_quantized() -> None:
    _, fine = migrated(block(PRE_LN), MigrateOutliers(scale=False))
    _, coarse = migrated(block(PRE_LN), MigrateOutliers(scale=False, weight_bits=3, activation_bits=3))
    assert fine[0].figures == coarse[0].figures
    assert fine[1].figures != coarse[1].figures


def test_each_bit_width_searches_a_threshold_of_its_own() -> None:
    _, eight = migrated(block(PRE_LN))
    _, three = migrated(block(PRE_LN), MigrateOutliers(weight_bits=3, activation_bits=3))
    assert eight[0].figures["threshold"] != three[0].figures["threshold"]


def test_a_search_with_a_stride_is_about_as_good_as_a_full_one() -> None:
    model = block(PRE_LN)
    coarse, _ = migrated(model, MigrateOutliers(stride=8))
    full, _ = migrated(model, MigrateOutliers(stride=1))
    assert quantized_error(coarse, model) < 1.5 * quantized_error(full, model)


def test_the_float_function_is_kept_to_rounding_on_samples_that_were_not_searched_on() -> None:
    model = block(POST_LN)
    changed, _ = migrated(model)
    fresh: list[Feed] = [{"x": np.random.default_rng(99).standard_normal((3, 5, WIDE)).astype(np.float32)}]
    (fidelity,) = verify.fidelity(map(Session(model).run, fresh), Session(changed), fresh)
    assert fidelity.sqnr_db > 90


def test_a_layer_as_wide_as_a_vocabulary_is_searched_on_some_of_its_columns() -> None:
    body = f"{NORM} [head] y = MatMul(n, w)"
    few = np.random.default_rng(1).standard_normal((2, 8)).astype(np.float32)
    narrow, wide = few[:, ::2], np.tile(few, (1, 1024))
    thresholds = [
        check_pass(MigrateOutliers(), before=hand(body, width=weight.shape[1], constants={"w": weight}), feeds=TOKENS)
        .rewrites[0]
        .figures["threshold"]
        for weight in (narrow, wide)
    ]
    assert thresholds[0] == thresholds[1]


def test_values_in_the_thousands_are_searched_in_a_few_hundred_steps() -> None:
    thresholds = threshold_grid(4000.0, 100, 0.1)
    tried: list[float] = []

    def loss(t: float) -> float:
        tried.append(t)
        return abs(t - 7.3)

    index, least = search(loss, nothing, thresholds, 8)
    assert least == min(abs(float(t) - 7.3) for t in thresholds)
    assert thresholds[index] == pytest.approx(7.3, abs=0.5)
    assert len(thresholds) == 8000
    assert len(tried) < 100
