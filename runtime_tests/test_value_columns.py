"""Values of attention in the shapes that exporters give them: two heads of four channels, width eight."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import graph
from scalefold.compiler.protocol import PassResult
from scalefold.compiler.runtime import Array, Feed, Session
from scalefold.compiler.schemes import Float
from scalefold.compiler.sites import Kind, Producer, find_sites, migrated_feed
from scalefold.compiler.testing import check_pass, context_on, parse
from scalefold.compiler.value_columns import find_value
from scalefold.compiler.walk import Walk
from scalefold.passes.migrate_outliers import MigrateOutliers

GENERATOR = np.random.default_rng(5)
ONLY_VALUES = MigrateOutliers(norm=False, linear=False, value=True)


def normal(*shape: int) -> Float:
    return np.asarray(GENERATOR.standard_normal(shape) / np.sqrt(shape[0]), dtype=np.float32)


def constant(name: str, array: object) -> str:
    """A float32 initializer as ONNX text."""
    values = np.asarray(array, dtype=np.float32)
    sizes = ", ".join(map(str, values.shape))
    return f"float[{sizes}] {name} = {{{', '.join(repr(float(value)) for value in values.ravel())}}}"


VALUE, BIAS = normal(8, 8), normal(8)
VALUE[:, 3] *= 40
BIAS[5] = -60
QUERY, KEY, OUT = normal(8, 8), normal(8, 8), normal(8, 8)
# four columns to each of the two heads of queries: one head of keys and values serves both
NARROW_KEY, NARROW_VALUE, NARROW_BIAS = KEY[:, :4], VALUE[:, 2:6], BIAS[2:6]
FUSED, FUSED_BIAS = np.concatenate([QUERY, KEY, VALUE], axis=1), np.concatenate([normal(16), BIAS])
BY_HEAD = np.arange(24).reshape(3, 2, 4).transpose(1, 0, 2).ravel()
CONSTANTS = {
    "wq": QUERY, "wk": KEY, "wv": VALUE, "bv": BIAS, "wo": OUT, "wkn": NARROW_KEY, "wvn": NARROW_VALUE,
    "bvn": NARROW_BIAS, "wf": FUSED, "bf": FUSED_BIAS, "wi": FUSED[:, BY_HEAD], "bi": FUSED_BIAS[BY_HEAD],
    "prefix_k": normal(1, 2, 2, 4), "prefix_v": 9 * normal(1, 2, 2, 4),
}  # fmt: skip
NUMBERS = """int64[4] split = {0, 0, -1, 4}, int64[3] join = {0, 0, -1}, int64[5] parts = {0, 0, 2, 3, 4},
int64 first = {0}, int64 second = {1}, int64 third = {2}, int64[1] two = {2},
int64[5] twice = {1, 1, 2, 1, 1}, int64[4] heads = {0, 2, -1, 4},
int64[2] by_row = {1, 3}, float half = {0.5}, float zero = {0.0},
int64[3] ones = {1, 1, 1}, int64[1] from = {2}, int64[1] to = {1000}, int64[1] along = {2}"""

SEPARATE = """
[query] q = MatMul(x, wq)  [key] k = MatMul(x, wk)  [value] vp = MatMul(x, wv)  v = Add(vp, bv)
qr = Reshape(q, split)  qh = Transpose<perm = [0, 2, 1, 3]>(qr)
kr = Reshape(k, split)  kh = Transpose<perm = [0, 2, 1, 3]>(kr)
vr = Reshape(v, split)  vh = Transpose<perm = [0, 2, 1, 3]>(vr)
"""
NO_BIAS = SEPARATE.replace("vp = MatMul(x, wv)  v = Add(vp, bv)", "v = MatMul(x, wv)")
SPLIT = """
[qkv] p = MatMul(x, wf)  f = Add(p, bf)  q, k, v = Split<axis = 2, num_outputs = 3>(f)
qr = Reshape(q, split)  qh = Transpose<perm = [0, 2, 1, 3]>(qr)
kr = Reshape(k, split)  kh = Transpose<perm = [0, 2, 1, 3]>(kr)
vr = Reshape(v, split)  vh = Transpose<perm = [0, 2, 1, 3]>(vr)
"""
INTERLEAVED = """
[qkv] p = MatMul(x, wi)  f = Add(p, bi)  r = Reshape(f, parts)
qr = Gather<axis = 3>(r, first)   qh = Transpose<perm = [0, 2, 1, 3]>(qr)
kr = Gather<axis = 3>(r, second)  kh = Transpose<perm = [0, 2, 1, 3]>(kr)
vr = Gather<axis = 3>(r, third)   vh = Transpose<perm = [0, 2, 1, 3]>(vr)
"""
GROUPED = """
[query] q = MatMul(x, wq)  [key] k = MatMul(x, wkn)  [value] vp = MatMul(x, wvn)  v = Add(vp, bvn)
qr = Reshape(q, split)  qh = Transpose<perm = [0, 2, 1, 3]>(qr)
kr = Reshape(k, split)  kh = Transpose<perm = [0, 2, 1, 3]>(kr)
vr = Reshape(v, split)  vh = Transpose<perm = [0, 2, 1, 3]>(vr)
"""
PLAIN = "ka = Identity(kh)  va = Identity(vh)"
CACHED = "present_k = Concat<axis = -2>(past_k, kh)  present_v = Concat<axis = -2>(past_v, vh)"
READ = "ka = Identity(present_k)  va = Identity(present_v)"
REPEATED = """
ku = Unsqueeze(present_k, two)  ke = Expand(ku, twice)  ka = Reshape(ke, heads)
vu = Unsqueeze(present_v, two)  ve = Expand(vu, twice)  va = Reshape(ve, heads)
"""
CORE = """
kt = Transpose<perm = [0, 1, 3, 2]>(ka)  scores = MatMul(qh, kt)  scaled = Mul(scores, half)
probs = Softmax<axis = -1>(scaled)  mixed = MatMul(probs, va)
"""
END = "mt = Transpose<perm = [0, 2, 1, 3]>(mixed)  a = Reshape(mt, join)  [out] y = MatMul(a, wo)"
BEHIND_PREFIX = """
batch = Shape<start = 0, end = 1>(x)  sizes = Concat<axis = 0>(batch, ones)
pk = Expand(prefix_k, sizes)  held_k = Concat<axis = 2>(pk, past_k)  whole_k = Concat<axis = -2>(held_k, kh)
pv = Expand(prefix_v, sizes)  held_v = Concat<axis = 2>(pv, past_v)  whole_v = Concat<axis = -2>(held_v, vh)
present_k = Slice(whole_k, from, to, along)  present_v = Slice(whole_v, from, to, along)
ka = Identity(whole_k)  va = Identity(whole_v)
"""
FAMILIES = {
    "behind a prefix": SEPARATE + BEHIND_PREFIX,
    "separate": SEPARATE + CACHED + READ,
    "separate, no bias": NO_BIAS + CACHED + READ,
    "fused, split": SPLIT + CACHED + READ,
    "fused, by head": INTERLEAVED + CACHED + READ,
    "grouped queries": GROUPED + CACHED + REPEATED,
}


def attention(body: str, *, inputs: str = "", outputs: str = "", **changed: object) -> ir.Model:
    """A model of one attention, with or without a cache."""
    cached = "past_k" in body
    kept = 1 if "wvn" in body else 2
    if cached:
        inputs += f", float[b, {kept}, p, 4] past_k, float[b, {kept}, p, 4] past_v"
        outputs += f", float[b, {kept}, t, 4] present_k, float[b, {kept}, t, 4] present_v"
    constants = ", ".join([*(constant(name, array) for name, array in {**CONSTANTS, **changed}.items()), NUMBERS])
    model = parse(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        model (float[b, s, 8] x{inputs}) => (float[b, s, 8] y{outputs}) <{constants}> {{{body}}}"""
    )
    for value in [value for value in model.graph.initializers.values() if not value.uses()]:
        del model.graph.initializers[value.name or ""]
    return model


def prompts(model: ir.Model, count: int = 2) -> list[Feed]:
    """Prompts with an empty cache where the model has one."""
    feeds: list[Feed] = []
    for length in range(6, 6 + count):
        feed: dict[str, Array] = {"x": GENERATOR.standard_normal((2, length, 8)).astype(np.float32)}
        for value in model.graph.inputs[1:]:
            assert value.shape is not None
            feed[value.name or ""] = np.zeros((2, int(str(value.shape[1])), 0, 4), np.float32)
        feeds.append(feed)
    return feeds


def migrated(model: ir.Model, feeds: list[Feed]) -> tuple[ir.Model, PassResult]:
    changed = model.clone()
    return changed, ONLY_VALUES.run(changed, context_on(model, feeds))


def continued(model: ir.Model, prompt: Feed, token: Array) -> Array:
    """What a model says to one token after a prompt, by its own cache."""
    session = Session(model)
    first = session.run(prompt)
    return session.run({"x": token, "past_k": first["present_k"], "past_v": first["present_v"]})["y"]


@pytest.mark.parametrize("family", FAMILIES)
def test_outliers_of_the_values_shrink_and_prompt_and_next_token_stay(family: str) -> None:
    model = attention(FAMILIES[family] + CORE + END)
    feeds = prompts(model)
    changed, result = migrated(model, feeds)
    (event,) = result.rewrites
    assert event.reason == "shifted and scaled"
    assert float(event.figures["largest_after"]) < float(event.figures["largest_before"]) / 3
    token = GENERATOR.standard_normal((2, 1, 8)).astype(np.float32)
    for prompt in feeds:
        wanted, got = (Session(each).run(prompt)["y"] for each in (model, changed))
        np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())
        wanted, got = (continued(each, prompt, token) for each in (model, changed))
        np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())
    assert not ONLY_VALUES.run(changed, context_on(changed, feeds)).changed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_search_on_a_cache_that_is_not_empty_finds_the_same_columns(family: str) -> None:
    model = attention(FAMILIES[family] + CORE + END)
    (prompt,) = prompts(model, 1)
    first = Session(model).run(prompt)
    token = GENERATOR.standard_normal((2, 3, 8)).astype(np.float32)
    later: Feed = {"x": token, "past_k": first["present_k"], "past_v": first["present_v"]}
    changed, result = migrated(model, [later])
    assert len(result.rewrites) == 1
    wanted = Session(model).run(later)["y"]
    got = Session(changed).run(migrated_feed(changed, later))["y"]
    np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())
    assert np.abs(Session(changed).run(later)["y"] - wanted).max() > 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("body", "weight", "columns"),
    [
        pytest.param(SEPARATE + PLAIN, "wv", range(8), id="separate"),
        pytest.param(SPLIT + PLAIN, "wf", range(16, 24), id="fused, split"),
        pytest.param(INTERLEAVED + PLAIN, "wi", [*range(8, 12), *range(20, 24)], id="fused, by head"),
    ],
)
def test_only_the_columns_of_the_values_change(body: str, weight: str, columns: range) -> None:
    model = attention(body + CORE + END)
    result = check_pass(ONLY_VALUES, before=model, feeds=prompts(model))
    (event,) = result.rewrites
    layer = graph.linear_at(event.node)
    assert layer is not None
    changed = np.flatnonzero((layer.weights() != CONSTANTS[weight]).any(axis=0))
    assert 0 < len(changed) == event.figures["channels_scaled"]
    assert set(changed) <= set(columns)


def test_channels_of_one_column_are_found_as_one() -> None:
    model = attention(FAMILIES["grouped queries"] + CORE + END)
    site = next(site for site in find_sites(model) if site.x.name == "a")
    found = find_value(Walk(model, prompts(model)), site, [None, None])
    assert isinstance(found, Producer)
    assert found.kind is Kind.VALUE
    assert found.columns is not None
    assert found.columns.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    (memory,) = found.memories
    assert memory.past.name == "past_v"
    assert memory.columns.tolist() == [[[[0, 1, 2, 3]]]]


GUARD = CORE.replace("mixed =", "core =") + "mixed = Where(masked, zero, core)"


def test_a_guard_for_rows_that_attend_to_nothing_changes_padding_alone() -> None:
    masked = "rows = Unsqueeze(attention_mask, by_row)  kept = Cast<to = 9>(rows)  masked = Not(kept)"
    model = attention(SEPARATE + PLAIN + masked + GUARD + END, inputs=", int64[b, s] attention_mask")
    mask = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    feed: Feed = {"x": GENERATOR.standard_normal((2, 6, 8)).astype(np.float32), "attention_mask": mask}
    changed, result = migrated(model, [feed])
    assert len(result.rewrites) == 1
    wanted, got = (Session(each).run(feed)["y"] for each in (model, changed))
    np.testing.assert_allclose(got[mask != 0], wanted[mask != 0], atol=1e-4 * np.abs(wanted).max())


UNCHANGED = "the values do not reach it unchanged through attention whose rows sum to 1"
MORE = "a shift and a scale of the values change more than the output of attention"
ELSEWHERE = "the values are read by something else too"


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        pytest.param(
            SEPARATE
            + PLAIN
            + CORE.replace("probs = Softmax<axis = -1>(scaled)", "sm = Softmax(scaled)  probs = Mul(sm, half)")
            + END,
            "",
            UNCHANGED,
            id="rows sum to a half",
        ),
        pytest.param(SEPARATE + "ka = Identity(kh)  va = Relu(vh)" + CORE + END, "", MORE, id="a Relu on the values"),
        pytest.param(
            SEPARATE + "ka = Identity(vh)  va = Identity(vh)" + CORE + END,
            "",
            MORE,
            id="keys that are the values",
        ),
        pytest.param(
            SEPARATE + PLAIN + CORE + END + "u = Relu(vh)",
            ", float[b, h, s, 4] u",
            ELSEWHERE,
            id="values that are read elsewhere",
        ),
        pytest.param(
            SEPARATE + PLAIN + CORE + END,
            ", float[b, s, 8] v",
            ELSEWHERE,
            id="values that are an output",
        ),
        pytest.param(
            SEPARATE + PLAIN + CORE + END,
            ", float[b, s, 8] a",
            "the activation is an output of the graph",
            id="an output of attention that is one of the graph",
        ),
    ],
)
def test_attention_where_the_algebra_does_not_hold_is_declined(body: str, outputs: str, reason: str) -> None:
    model = attention(body, outputs=outputs)
    result = check_pass(ONLY_VALUES, before=model, after=model, feeds=prompts(model))
    assert [event.reason for event in result.declined] == [reason]


def test_a_cache_that_something_else_reads_is_declined() -> None:
    model = attention(SEPARATE + CACHED + READ + CORE + END + "u = Relu(present_v)", outputs=", float[b, 2, t, 4] u")
    _, result = migrated(model, prompts(model))
    assert not result.changed
    assert [event.reason for event in result.declined] == [ELSEWHERE]


def test_attention_without_a_layer_for_its_values_is_declined() -> None:
    body = "[key] k = MatMul(x, wk)  scores = MatMul(x, k2)  probs = Softmax(scores)  a = MatMul(probs, x)"
    body = body.replace("scores", "k2 = Transpose<perm = [0, 2, 1]>(k)  scores", 1) + "  [out] y = MatMul(a, wo)"
    model = attention(body)
    result = check_pass(ONLY_VALUES, before=model, after=model, feeds=prompts(model))
    assert [(event.where, event.reason) for event in result.declined] == [("out", UNCHANGED)]


def test_values_are_left_alone_unless_they_are_asked_for() -> None:
    model = attention(SEPARATE + PLAIN + CORE + END)
    result = check_pass(MigrateOutliers(), before=model, after=model, feeds=prompts(model))
    assert not result.declined


def test_keys_that_are_read_elsewhere_are_no_obstacle() -> None:
    model = attention(SPLIT + PLAIN + CORE + END + "u = Relu(kh)", outputs=", float[b, h, s, 4] u")
    result = check_pass(ONLY_VALUES, before=model, feeds=prompts(model))
    assert len(result.rewrites) == 1


def test_values_of_two_layers_are_declined() -> None:
    body = SEPARATE.replace(
        "vr = Reshape(v, split)", "[other] vl = MatMul(x, wk)  vx = Concat<axis = 2>(v, vl)  vr = Reshape(vx, split)"
    )
    body = body.replace("qh =", "qg =").replace("kh =", "kg =")
    body += "qh = Concat<axis = 1>(qg, qg)  kh = Concat<axis = 1>(kg, kg)" + PLAIN + CORE + END.replace("wo", "wide")
    model = attention(body, wide=normal(16, 8))
    result = check_pass(ONLY_VALUES, before=model, after=model, feeds=prompts(model))
    assert [event.reason for event in result.declined] == ["several layers make the values of attention"]


def test_attention_over_the_inputs_of_the_graph_is_declined() -> None:
    body = "xt = Transpose<perm = [0, 2, 1]>(x)  scores = MatMul(x, xt)  probs = Softmax(scores)"
    model = attention(body + "  a = MatMul(probs, x)  [out] y = MatMul(a, wo)")
    result = check_pass(ONLY_VALUES, before=model, after=model, feeds=prompts(model))
    assert [event.reason for event in result.declined] == ["no linear layer makes the values of attention"]


def test_one_weight_whose_columns_are_values_here_and_keys_there_is_declined() -> None:
    names = ("p", "f", "q", "k", "v", "qr", "qh", "kr", "kh", "vr", "vh", "ka", "va", "kt", "scores", "scaled", "probs")
    first = (
        SPLIT
        + PLAIN
        + CORE
        + "mt = Transpose<perm = [0, 2, 1, 3]>(mixed)  a = Reshape(mt, join)  [out] o = MatMul(a, wo)"
    )
    second = first.replace("q, k, v = Split", "q, v, k = Split").replace("[qkv]", "[qkv2]").replace("[out]", "[out2]")
    words = re.compile(r"\b(" + "|".join([*names, "mixed", "mt", "a", "o"]) + r")\b(?! =\s*[\[0-9])")
    second = words.sub(lambda match: match.group(1) + "2", second).replace("MatMul(x,", "MatMul(o,")
    model = attention(first + second + "y = Identity(o2)")
    result = check_pass(ONLY_VALUES, before=model, after=model, feeds=prompts(model))
    assert [event.reason for event in result.declined] == [
        "the channels come from other columns in another use of the weight"
    ]
