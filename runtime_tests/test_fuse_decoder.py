from __future__ import annotations

import numpy as np
import pytest

from scalefold.compiler.kernel_library import to_bfloat
from scalefold.compiler.runtime import Feed
from scalefold.compiler.testing import check_pass
from scalefold.passes.fuse_decoder import FuseDecoder

pytestmark = pytest.mark.usefixtures("kernel_cache")

HEAD = """<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1, "scalefold" : 1]>
model (float[b, s, 64] x, float[b, 1, p, 16] pk, float[b, 1, p, 16] pv, float[b, 1, s, t] mask, float[b, s, 8] cos,
 float[b, s, 8] sin%s) => (float[b, s, 32] y, float[b, 1, t, 16] k2, float[b, 1, t, 16] v2)
<int64[3] sizes = {32, 16, 16}, int64[3] others = {16, 16, 32}, int64[3] eights = {48, 8, 8}, float half = {0.5},
 float minus = {-0.5}, int64[1] first = {0}>
"""
SPLIT = "q, k, v = Split<axis = 2>(x, sizes) "
TURNED = """qr = RotaryEmbedding<num_heads = 2>(q, cos, sin)  kr = RotaryEmbedding<num_heads = 1>(k, cos, sin) """
HEADS = "q_num_heads = 2, kv_num_heads = 1"
PLAIN = SPLIT + f"y, k2, v2 = Attention<{HEADS}>(q, k, v, mask, pk, pv)"
ROTATED = SPLIT + TURNED + f"y, k2, v2 = Attention<{HEADS}>(qr, kr, v, mask, pk, pv)"
FUSED = "y, k2, v2 = scalefold.CachedAttention<groups = 1, heads = 2, scale = %s>(x, pk, pv, mask%s)"


def text(body: str, inputs: str = "") -> str:
    return HEAD % inputs + f"{{ {body} }}"


def feeds(tokens: int = 3) -> list[Feed]:
    """Two sequences of new tokens behind five in a cache, masked causally."""
    generator = np.random.default_rng(2)
    shapes = {"x": (2, tokens, 64), "pk": (2, 1, 5, 16), "pv": (2, 1, 5, 16)}
    feed = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name in ("pk", "pv"):
        feed[name] = (feed[name].view(np.uint32) & 0xFFFF0000).view(np.float32)
    angles = generator.uniform(0, 6, (2, tokens, 8))
    lowest = np.finfo(np.float32).min
    mask = np.where(np.tri(tokens, 5 + tokens, 5) > 0, 0, lowest).astype(np.float32)
    feed |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    return [{**feed, "mask": np.broadcast_to(mask, (2, 1, *mask.shape))}]


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_rotated_attention_behind_a_cache_becomes_one_operator(tokens: int) -> None:
    result = check_pass(
        FuseDecoder(), before=text(ROTATED), after=text(FUSED % (0.25, ", cos, sin")), feeds=feeds(tokens)
    )
    assert [event.reason for event in result.rewrites] == ["attention and its cache by one operator"]
    assert not result.declined


@pytest.mark.parametrize("tokens", [1, 20])
def test_attention_without_angles_becomes_one_operator(tokens: int) -> None:
    check_pass(FuseDecoder(), before=text(PLAIN), after=text(FUSED % (0.25, "")), feeds=feeds(tokens))


@pytest.mark.parametrize("attributes", ["scale = 0.4", "scale = 0.4, softcap = 0.0, is_causal = 0"])
def test_a_scale_is_kept(attributes: str) -> None:
    body = PLAIN.replace(HEADS, f"{HEADS}, {attributes}")
    check_pass(FuseDecoder(), before=text(body), after=text(FUSED % (0.4, "")), feeds=feeds())


def test_queries_that_are_multiplied_by_a_constant_make_the_scale() -> None:
    scaled = PLAIN.replace("y, k2", "z = Mul(half, q)  y, k2").replace("(q, k, v,", "(z, k, v,")
    check_pass(FuseDecoder(), before=text(scaled), after=text(FUSED % (0.125, "")), feeds=feeds())


def test_queries_that_are_multiplied_and_then_rotated_make_the_scale() -> None:
    scaled = ROTATED.replace("qr =", "z = Mul(q, half)  qr =").replace("num_heads = 2>(q,", "num_heads = 2>(z,")
    check_pass(FuseDecoder(), before=text(scaled), after=text(FUSED % (0.125, ", cos, sin")), feeds=feeds())


def test_parts_of_one_size_need_not_be_listed() -> None:
    head = HEAD.replace("float[b, s, 64] x", "float[b, s, 48] x").replace("float[b, s, 32] y", "float[b, s, 16] y") % ""
    body = "q, k, v = Split<axis = -1, num_outputs = 3>(x)  y, k2, v2 = Attention<q_num_heads = 1, kv_num_heads = 1>"
    feed = feeds()[0]
    check_pass(
        FuseDecoder(),
        before=f"{head}{{ {body}(q, k, v, mask, pk, pv) }}",
        after=f"{head}{{ {(FUSED % (0.25, '')).replace('heads = 2', 'heads = 1')} }}",
        feeds=[{**feed, "x": feed["x"][..., :48]}],
    )


FRONT = """<float[1, 2, 1, 16] front = {%s}, int64[1] one = {1}, int64[1] many = {9223372036854775807}, int64[1] two = {2},
 int64[3] ones = {1, 1, 1}, float[1, 1, 1, 16] fk = {%s}, float[1, 1, 1, 16] fv = {%s}>"""
JOINED = """n = Shape<start = 0, end = 1>(x)  size = Concat<axis = 0>(n, ones)  all = Expand(front, size)
 ek, ev = Split<axis = 1, num_outputs = 2>(all)  wk = Concat<axis = 2>(ek, pk)  wv = Concat<axis = 2>(ev, pv)  """
CUT = "  k2 = Slice(gk, one, many, two)  v2 = Slice(gv, one, many, two)"


def with_front(body: str) -> str:
    """Text of a graph with rows in front of its cache, which are the same in bfloat16."""
    rows = [np.linspace(-2, 2, 16), np.linspace(1, -1, 16)]
    keys, values = (", ".join(map(repr, to_bfloat(row.astype(np.float32)).tolist())) for row in rows)
    head = HEAD % ""
    return (
        head.replace("<int64[3] sizes", FRONT[:-1] % (f"{keys}, {values}", keys, values) + ", int64[3] sizes")
        + f"{{ {body} }}"
    )


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_what_stands_in_front_of_every_cache_goes_in(tokens: int) -> None:
    attention = PLAIN.replace("y, k2, v2", "y, gk, gv").replace("pk, pv", "wk, wv")
    (feed,) = feeds(tokens)
    feed = {**feed, "mask": np.concatenate([np.zeros((2, 1, tokens, 1), np.float32), feed["mask"]], axis=3)}
    result = check_pass(
        FuseDecoder(),
        before=with_front(JOINED + attention + CUT),
        after=with_front(FUSED % (0.25, ", , , fk, fv")),
        feeds=[feed],
    )
    assert [event.reason for event in result.rewrites] == ["attention and its cache by one operator"]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(CUT.replace("(gv, one", "(gv, two"), id="cut elsewhere"),
        pytest.param(CUT + "  more = Exp(gk)", id="read whole too"),
        pytest.param(CUT.replace("k2 = Slice(gk, one, many, two)", "k2 = Identity(gk)"), id="not cut"),
    ],
)
def test_a_cache_that_is_joined_and_cut_otherwise_stays_so(body: str) -> None:
    attention = PLAIN.replace("y, k2, v2", "y, gk, gv").replace("pk, pv", "wk, wv")
    (feed,) = feeds(1)
    feed = {**feed, "mask": np.concatenate([np.zeros((2, 1, 1, 1), np.float32), feed["mask"]], axis=3)}
    given = with_front(JOINED + attention + body)
    if "more" in body:
        given = given.replace("16] v2)", "16] v2, float[b, 1, w, 16] more)")
    after = given.replace("y, gk, gv = Attention<q_num_heads = 2, kv_num_heads = 1>(q, k, v, mask, wk, wv)", "")
    fused = (FUSED % (0.25, "")).replace("y, k2, v2", "y, gk, gv").replace("pk, pv", "wk, wv")
    check_pass(FuseDecoder(), before=given, after=after.replace(SPLIT, fused), feeds=[feed])


NOT_BESIDE = "its queries, keys and values do not lie side by side"
NO_MASK = "it has no mask of floats [batch, heads, tokens, keys]"
ANOTHER = "it is rotated in another way"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param(PLAIN.replace("(q, k, v,", "(q, v, k,"), NOT_BESIDE, id="another order"),
        pytest.param(
            PLAIN.replace("y, k2", "w = Exp(v)  y, k2").replace("k, v,", "k, w,"), NOT_BESIDE, id="values changed"
        ),
        pytest.param(
            PLAIN.replace("y, k2", "w = Mul(q, minus)  y, k2").replace("(q, k", "(w, k"),
            NOT_BESIDE,
            id="negative factor",
        ),
        pytest.param(PLAIN.replace(HEADS, f"{HEADS}, softcap = 30.0"), "it is no plain attention", id="capped"),
        pytest.param(PLAIN.replace("v, mask", "v, "), NO_MASK, id="no mask"),
        pytest.param(
            "flat = Squeeze(mask, first)  " + PLAIN.replace("v, mask", "v, flat"),
            NO_MASK,
            id="a mask of three dimensions",
        ),
        pytest.param(
            ROTATED.replace("num_heads = 1>(k, cos, sin)", "num_heads = 1>(k, sin, cos)"),
            "queries and keys are rotated by different angles",
            id="other angles",
        ),
        pytest.param(
            ROTATED.replace("(qr, kr,", "(q, kr,"),
            "queries and keys are rotated by different angles",
            id="keys alone rotated",
        ),
        pytest.param(ROTATED.replace("<num_heads =", "<interleaved = 1, num_heads ="), ANOTHER, id="interleaved"),
        pytest.param(
            SPLIT.replace("sizes", "eights")
            + "y, k2, v2 = Attention<q_num_heads = 6, kv_num_heads = 1>(q, k, v, mask, pk, pv)",
            "its heads are of 8 numbers, no multiple of 16 up to 256",
            id="small heads",
        ),
    ],
)
def test_attention_of_another_kind_is_declined_with_its_reason(body: str, reason: str) -> None:
    given, feed = text(body), dict(feeds()[0])
    if "eights" in body:
        given = given.replace("1, p, 16]", "1, p, 8]").replace("1, t, 16]", "1, t, 8]").replace("32] y", "48] y")
        feed |= {name: feed[name][..., :8] for name in ("pk", "pv")}
    if "flat" in body:  # read as [heads, tokens, keys]
        feed = {name: value[:1] for name, value in feed.items()}
    result = check_pass(FuseDecoder(), before=given, feeds=[feed])
    assert not result.changed
    assert [event.reason for event in result.declined] == [reason]


GATED = """<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1, "scalefold" : 1]>
model (float[b, s, 8] x) => (float[b, s, 4] y) <int64[2] two = {4, 4}, int64[2] uneven = {6, 2}, int64[1] last = {-1}>
"""
UNIT = "g, u = Split<axis = -1>(x, two)  sg = Sigmoid(g)  a = Mul(g, sg)  y = Mul(a, u)"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(UNIT, id="silu"),
        pytest.param(
            UNIT.replace("Mul(g, sg)", "Mul(sg, g)").replace("Mul(a, u)", "Mul(u, a)"), id="the other way round"
        ),
        pytest.param(UNIT.replace("axis = -1>(x, two)", "axis = 2, num_outputs = 2>(x)"), id="halves"),
        pytest.param(
            "g, u = Split<axis = -1>(x, two)  a = com.microsoft.QuickGelu<alpha = 1.0>(g)  y = Mul(a, u)",
            id="one operator",
        ),
    ],
)
def test_a_gated_unit_becomes_one_operator(body: str) -> None:
    result = check_pass(FuseDecoder(), before=f"{GATED}{{ {body} }}", after=f"{GATED}{{ y = scalefold.GatedSilu(x) }}")
    assert [event.reason for event in result.rewrites] == ["gated unit by one operator"]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(UNIT.replace("Sigmoid(g)", "Sigmoid(u)"), id="the other half's sigmoid"),
        pytest.param(UNIT.replace("g, u =", "u, g ="), id="halves exchanged"),
        pytest.param(UNIT.replace("Sigmoid", "Tanh"), id="another function"),
        pytest.param(UNIT.replace("Mul(a, u)", "Mul(a, a)"), id="not the other half"),
        pytest.param(
            "g, u = Split<axis = -1>(x, two)  a = com.microsoft.QuickGelu(g)  y = Mul(a, u)", id="another alpha"
        ),
    ],
)
def test_another_gate_stays(body: str) -> None:
    assert not check_pass(FuseDecoder(), before=f"{GATED}{{ {body} }}").changed


def test_a_unit_of_half_floats_stays() -> None:
    assert not check_pass(FuseDecoder(), before=f"{GATED.replace('float[', 'float16[')}{{ {UNIT} }}").changed


def test_an_activated_gate_that_is_read_twice_stays() -> None:
    head = GATED.replace("(float[b, s, 4] y)", "(float[b, s, 4] y, float[b, s, 4] a)")
    assert not check_pass(FuseDecoder(), before=f"{head}{{ {UNIT} }}").changed
