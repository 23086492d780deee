from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import graph
from scalefold.compiler.coded_panels import coded_panels
from scalefold.compiler.kernel_library import packed_pairs, packed_panels
from scalefold.compiler.protocol import Context
from scalefold.compiler.runtime import Array, Feed
from scalefold.compiler.testing import check_pass, coded_weight, parse
from scalefold.passes.fuse_kernels import FuseKernels

pytestmark = pytest.mark.usefixtures("kernel_cache")

K, N = 8, 16


def weight(seed: int) -> Array:
    return np.random.default_rng(seed).integers(-128, 128, (K, N)).astype(np.int8)


W, V, T = weight(1), weight(2), weight(3)
CONSTANTS: dict[str, Any] = {
    "W": W, "V": V, "T": T, "s": np.float32(0.02), "z": np.uint8(120), "u": np.float32(0.05), "o": np.uint8(128),
    "t": np.linspace(0.01, 0.02, N, dtype=np.float32), "b": np.linspace(-1, 1, N, dtype=np.float32),
    "one": np.ones(1, np.float32), "gain": np.linspace(1, 2, N, dtype=np.float32),
    "shift": np.linspace(0.5, 0, N, dtype=np.float32), "m": np.linspace(0.5, 3, N, dtype=np.float32),
    "a": np.linspace(-2, 2, N, dtype=np.float32), "narrow": np.linspace(1, 2, K, dtype=np.float32),
    "WP": packed_panels(W), "WS": W.sum(0, dtype=np.int32), "VP": packed_panels(V), "VS": V.sum(0, dtype=np.int32),
    "zeros": np.zeros(N, np.float32), "ones": np.ones(N, np.float32), "ab": np.linspace(-3, 3, N, dtype=np.float32),
    "three": np.concatenate([np.linspace(0.01, 0.02, N, dtype=np.float32)] * 3),
    "bbb": np.concatenate([np.linspace(-1, 1, N, dtype=np.float32)] * 3), "full": np.float32(1 / 255), "nil": np.uint8(0),
    "Q": packed_panels(np.concatenate([W, V, T], 1)), "QS": np.concatenate([W, V, T], 1).sum(0, dtype=np.int32),
    "odd": W[:6], "wide": W.astype(np.uint8), "back": np.array([-1]), "tiny": np.float32(1e-30),
    "table": np.ascontiguousarray(W.T), "steps": np.linspace(0.1, 0.2, N, dtype=np.float32)[:, None],
    "flat": np.linspace(0.1, 0.2, N, dtype=np.float32),
    "weighed": W.sum(0, dtype=np.float32) * np.linspace(0.01, 0.02, N, dtype=np.float32),
}  # fmt: skip
KINDS = {"float32": "float", "int8": "int8", "uint8": "uint8", "int32": "int32", "int64": "int64"}


def constants(body: str) -> str:
    """The constants whose names a body has, and the types of what products of another domain make, as ONNX text."""
    words = set(body.replace(",", " ").replace("(", " ").replace(")", " ").split())
    found = [f"float[b, s, {N}] {name}" for name in re.findall(r"(\w+) = com.microsoft.MatMulIntegerToFloat", body)]
    found = [entry for entry in found if not entry.endswith(" y")]
    for name, array in CONSTANTS.items():
        if name in words:
            array = np.asarray(array)
            size = f"[{', '.join(map(str, array.shape))}]" if array.ndim else ""
            numbers = ", ".join(repr(value.item()) for value in array.reshape(-1))
            found.append(f"{KINDS[array.dtype.name]}{size} {name} = {{{numbers}}}")
    return f"<{', '.join(found)}>" if found else ""


def text(body: str, inputs: str = f"uint8[b, s, {K}] q", outputs: str = f"float[b, s, {N}] y") -> str:
    opsets = '"" : 23, "com.microsoft" : 1, "scalefold" : 1'
    return f"<ir_version: 10, opset_import: [{opsets}]>\nmodel ({inputs}) => ({outputs})\n{constants(body)}{{ {body} }}"


def feeds(names: str = "q") -> list[Feed]:
    """Two sequences of three tokens: codes q, residuals r [.., N], floats f [.., K], doubled d [.., 2 K]."""
    generator = np.random.default_rng(4)
    made: dict[str, Array] = {"q": generator.integers(0, 256, (2, 3, K)).astype(np.uint8)}
    for name, width in (("r", N), ("f", K), ("d", 2 * K), ("h", N)):
        made[name] = generator.standard_normal((2, 3, width)).astype(np.float32)
    made["broad"] = made["r"][:1]
    made["mask"] = np.where(generator.random((2, 1, 3, 3)) < 0.3, -1e4, 0).astype(np.float32)
    made["ids"] = np.array([[0, 5], [-1, 15]])
    return [{name: made[name] for name in names.split()}]


Q, R, F = f"uint8[b, s, {K}] q", f"float[b, s, {N}] r", f"float[b, s, {K}] f"
P = "p = com.microsoft.MatMulIntegerToFloat(q, W, s, t, z, , b)  "
WITHOUT = "p = com.microsoft.MatMulIntegerToFloat(q, W, s, t, z)  "
BODY = "WP, WS, t, s, z, b"


@pytest.mark.parametrize("add", ["y = Add(p, r)", "y = Add(r, p)"])
def test_a_product_takes_in_its_residual(add: str) -> None:
    result = check_pass(
        FuseKernels(),
        before=text(P + add, f"{Q}, {R}"),
        after=text(f"y = scalefold.Linear<N = 16>(q, {BODY}, r)", f"{Q}, {R}"),
        feeds=feeds("q r"),
    )
    assert [event.reason for event in result.rewrites] == ["Linear, residual added"]


def test_a_product_without_a_bias_gets_zeros() -> None:
    check_pass(
        FuseKernels(),
        before=text(WITHOUT.replace("p =", "y =")),
        after=text("y = scalefold.Linear<N = 16>(q, WP, WS, t, s, z, zeros)"),
        feeds=feeds(),
    )


@pytest.mark.parametrize(
    ("function", "number", "word"),
    [
        ("Relu", 1, "relu"),
        ("Gelu", 2, "gelu"),
        ('Gelu<approximate = "tanh">', 3, "gelu_tanh"),
        ("com.microsoft.QuickGelu<alpha = 1.0>", 4, "silu"),
    ],
)
def test_an_activation_and_codes_behind_a_product(function: str, number: int, word: str) -> None:
    alone = check_pass(
        FuseKernels(),
        before=text(f"{P} y = {function}(p)"),
        after=text(f"y = scalefold.Linear<N = 16, activation = {number}>(q, {BODY})"),
        feeds=feeds(),
    )
    assert [event.reason for event in alone.rewrites] == [f"Linear, {word}"]
    result = check_pass(
        FuseKernels(),
        before=text(f"{P} g = {function}(p)  c = QuantizeLinear(g, u, o)  y = DequantizeLinear(c, u, o)"),
        after=text(
            f"c = scalefold.LinearUint8<N = 16, activation = {number}>(q, {BODY}, u, o)  y = DequantizeLinear(c, u, o)"
        ),
        feeds=feeds(),
    )
    assert [event.reason for event in result.rewrites] == [f"LinearUint8, {word}"]


def test_codes_right_behind_a_product() -> None:
    check_pass(
        FuseKernels(),
        before=text(f"{P} c = QuantizeLinear(p, u, o)  y = DequantizeLinear(c, u, o)"),
        after=text(f"c = scalefold.LinearUint8<N = 16>(q, {BODY}, u, o)  y = DequantizeLinear(c, u, o)"),
        feeds=feeds(),
    )


@pytest.mark.parametrize("kind", ["steps", "grouped steps", "values", "grouped values"])
def test_a_weight_that_4_bits_are_enough_for_is_stored_in_codes(kind: str) -> None:
    weight = coded_weight(kind, 128, N)
    stored = coded_panels(weight)
    assert stored is not None
    CONSTANTS.update(C=weight, CC=stored.codes, CL=stored.levels, CS=weight.sum(0, dtype=np.int32))
    codes = np.random.default_rng(5).integers(0, 256, (2, 3, 128)).astype(np.uint8)
    rows = codes.astype(np.float32) / 50 - 2
    feed: dict[str, Array] = {"q": codes, "f": rows, **feeds("r")[0]}
    product, q, f = P.replace("W", "C"), "uint8[b, s, 128] q", "float[b, s, 128] f"
    for before, after, inputs in (
        (product + "y = Add(p, r)", "y = scalefold.Linear<N = 16>(q, CC, CS, t, s, z, b, r, CL)", f"{q}, {R}"),
        (product + "y = Relu(p)", "y = scalefold.Linear<N = 16, activation = 1>(q, CC, CS, t, s, z, b, , CL)", q),
        (
            product + "c = QuantizeLinear(p, u, o)  y = DequantizeLinear(c, u, o)",
            "c = scalefold.LinearUint8<N = 16>(q, CC, CS, t, s, z, b, u, o, CL)  y = DequantizeLinear(c, u, o)",
            q,
        ),
        (
            QUANTIZED + product.replace("p =", "y ="),
            "y = scalefold.RowLinear<N = 16>(f, CC, CS, t, b, s, z, , , , CL)",
            f,
        ),
    ):
        given = {name: feed[name] for name in ("q", "f", "r") if f" {name}" in inputs}
        result = check_pass(FuseKernels(), before=text(before, inputs), after=text(after, inputs), feeds=[given])
        assert ["codes of 4 bits" in event.reason for event in result.rewrites] == [True]


@pytest.mark.parametrize(
    ("body", "inputs", "outputs", "names"),
    [
        pytest.param(
            "y = Add(p, broad)", f"{Q}, float[1, s, {N}] broad", "", "q broad", id="a residual that is broadcast"
        ),
        pytest.param("y = Add(p, p)", Q, "", "q", id="the sum with itself"),
        pytest.param("y = Add(p, r)", f"{Q}, {R}", f", float[b, s, {N}] p", "q r", id="a product that is an output"),
        pytest.param("x = Add(p, r)  y = Mul(x, p)", f"{Q}, {R}", "", "q r", id="a product that is read twice"),
        pytest.param("g = Relu(p)  y = Mul(g, p)", Q, "", "q", id="an activation beside another reader"),
        pytest.param("y = com.microsoft.QuickGelu(p)", Q, "", "q", id="an activation of another alpha"),
        pytest.param(
            "c = QuantizeLinear<axis = -1>(p, ones, many)  y = DequantizeLinear<axis = -1>(c, ones, many)",
            Q,
            "",
            "q",
            id="codes by channel",
        ),
    ],
)
def test_what_is_another_function_stays_behind_the_product(body: str, inputs: str, outputs: str, names: str) -> None:
    CONSTANTS["many"] = np.full(N, 128, np.uint8)
    result = check_pass(
        FuseKernels(),
        before=text(P + body, inputs, f"float[b, s, {N}] y{outputs}"),
        after=text(f"p = scalefold.Linear<N = 16>(q, {BODY})  {body}", inputs, f"float[b, s, {N}] y{outputs}"),
        feeds=feeds(names),
    )
    assert [event.reason for event in result.rewrites] == ["Linear"]


PROJECTIONS = "".join(
    f"{name} = com.microsoft.MatMulIntegerToFloat(q, {codes}, s, t, z, , b)  "
    for name, codes in zip(("i", "j", "k"), "WVT", strict=True)
)
CODES = "c = QuantizeLinear(x, u, o)  y = DequantizeLinear(c, u, o)"
MASK = ", float[b, 1, s, s] mask"
HEADS = "q_num_heads = 1, kv_num_heads = 1"
JOINED = "w = scalefold.LinearBfloat16<N = 48>(q, Q, QS, three, s, z, bbb)  "


@pytest.mark.parametrize("mask", ["", ", mask"])
def test_attention_reads_its_projections_side_by_side(mask: str) -> None:
    inputs = Q + (MASK if mask else "")
    result = check_pass(
        FuseKernels(),
        before=text(f"{PROJECTIONS} x = Attention<{HEADS}>(i, j, k{mask})  {CODES}", inputs),
        after=text(
            f"{JOINED} c = scalefold.AttentionUint8<heads = 1>(w, u, o{mask})  y = DequantizeLinear(c, u, o)", inputs
        ),
        feeds=feeds("q mask" if mask else "q"),
    )
    assert [event.reason for event in result.rewrites] == [
        "three projections in one product, codes as its output",
        "LinearBfloat16",
    ]


def test_projections_of_floats_that_are_quantized_for_them_alone() -> None:
    before = f"q = QuantizeLinear(f, s, z)  {PROJECTIONS} x = Attention<{HEADS}>(i, j, k)  {CODES}"
    after = f"q = QuantizeLinear(f, s, z)  {JOINED} c = scalefold.AttentionUint8<heads = 1>(w, u, o)"
    check_pass(
        FuseKernels(),
        before=text(before, F),
        after=text(f"{after}  y = DequantizeLinear(c, u, o)", F),
        feeds=feeds("f"),
    )


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(f"x = Attention<{HEADS}, scale = 0.5>(i, j, k)", id="a scale"),
        pytest.param(f"x = Attention<{HEADS}, is_causal = 1>(i, j, k)", id="causal"),
        pytest.param("x = Attention<q_num_heads = 2, kv_num_heads = 2>(i, j, k)", id="small heads"),
        pytest.param(f"x = Attention<{HEADS}>(i, j, k, flat)", id="a mask of two dimensions"),
        pytest.param(f"e = Exp(k)  x = Attention<{HEADS}>(i, j, e)", id="values that are changed"),
        pytest.param(f"e = Attention<{HEADS}>(i, j, k)  x = Add(e, j)", id="keys that are read on"),
    ],
)
def test_attention_of_another_kind_stays(body: str) -> None:
    square = "flat = Squeeze(rows)  " if "flat" in body else ""
    inputs = Q + (", float[s, s] flat" if square else "")
    feed = feeds()[0] | ({"flat": np.zeros((3, 3), np.float32)} if square else {})  # type: ignore[operator]
    given = f"{PROJECTIONS} {body}  {CODES}"
    hidden = {"flat": CONSTANTS.pop("flat")} if square else {}
    try:
        result = check_pass(FuseKernels(), before=text(given, inputs), feeds=[feed])
    finally:
        CONSTANTS.update(hidden)
    assert [event.node.op_type for event in result.rewrites if event.node.op_type != "LinearUint8"] == ["Linear"] * 3


NORM = "n = LayerNormalization<epsilon = 0.001>(%s, gain, shift)  "
ENDS = f"float[b, s, {N}] y, float[b, s, {N}] v"
H = f"float[b, s, {N}] h"


@pytest.mark.parametrize(
    ("restored", "constants_of_it"),
    [
        pytest.param("x = Mul(n, m)  v = Add(x, a)", "m, a", id="scaled and shifted"),
        pytest.param("v = Mul(m, n)", "m, zeros", id="scaled"),
        pytest.param("v = Add(n, a)", "ones, a", id="shifted"),
    ],
)
def test_a_normalization_makes_codes_and_restored_floats(restored: str, constants_of_it: str) -> None:
    result = check_pass(
        FuseKernels(),
        before=text(f"{NORM % 'h'} {restored}  c = QuantizeLinear(n, u, o)  y = DequantizeLinear(c, u, o)", H, ENDS),
        after=text(
            f"v, c = scalefold.LayerNormUint8<epsilon = 0.001>(h, gain, shift, {constants_of_it}, u, o)"
            "  y = DequantizeLinear(c, u, o)", H, ENDS,
        ),
        feeds=feeds("h"),
    )  # fmt: skip
    assert [event.reason for event in result.rewrites] == ["codes and floats by one operator"]


def test_a_normalization_that_is_read_in_two_ways_keeps_its_floats() -> None:
    rest = "c = QuantizeLinear(n, u, o)  x = DequantizeLinear(c, u, o)  y = Mul(x, n)  v = Mul(n, m)"
    check_pass(
        FuseKernels(),
        before=text(f"{NORM % 'h'} {rest}", H, ENDS),
        after=text(
            "n, c = scalefold.LayerNormUint8<epsilon = 0.001>(h, gain, shift, ones, zeros, u, o)"
            "  x = DequantizeLinear(c, u, o)  y = Mul(x, n)  v = Mul(n, m)", H, ENDS,
        ),
        feeds=feeds("h"),
    )  # fmt: skip


def test_a_product_its_residual_and_its_normalization_are_one_operator() -> None:
    tail = "c = QuantizeLinear(n, u, o)  y = DequantizeLinear(c, u, o)"
    result = check_pass(
        FuseKernels(),
        before=text(f"{P} x = Add(p, r)  {NORM % 'x'} v = Mul(n, m)  {tail}", f"{Q}, {R}", ENDS),
        after=text(
            f"v, c = scalefold.LinearNormUint8<N = 16, epsilon = 0.001>(q, {BODY}, r, gain, shift, m, zeros, u, o)"
            "  y = DequantizeLinear(c, u, o)", f"{Q}, {R}", ENDS,
        ),
        feeds=feeds("q r"),
    )  # fmt: skip
    assert [event.reason for event in result.rewrites] == ["LinearNormUint8, residual added"]


@pytest.mark.parametrize(
    "norm",
    [
        pytest.param("n = LayerNormalization(h, gain)", id="no shift"),
        pytest.param("n = LayerNormalization<axis = 1>(h, tall, tall)", id="two axes"),
        pytest.param("n = LayerNormalization(h, gain, g)", id="a shift that is computed"),
    ],
)
def test_a_normalization_of_another_kind_stays(norm: str) -> None:
    CONSTANTS["tall"] = np.linspace(1, 2, 3 * N, dtype=np.float32).reshape(3, N)
    given = f"{norm}  c = QuantizeLinear(n, u, o)  y = DequantizeLinear(c, u, o)"
    inputs = f"float[b, 3, {N}] h" + (f", float[{N}] g" if "g)" in norm else "")
    feed = {**feeds("h")[0], **({"g": np.ones(N, np.float32)} if "g)" in norm else {})}
    assert not check_pass(FuseKernels(), before=text(given, inputs, f"float[b, 3, {N}] y"), feeds=[feed]).changed


QUANTIZED = "q = QuantizeLinear(f, s, z)  "
ROWS = "WP, WS, t, b"


def test_a_product_of_floats_brings_them_to_codes_itself() -> None:
    result = check_pass(
        FuseKernels(),
        before=text(QUANTIZED + P + "y = Add(p, r)", f"{F}, {R}"),
        after=text(f"y = scalefold.RowLinear<N = 16>(f, {ROWS}, s, z, , , r)", f"{F}, {R}"),
        feeds=feeds("f r"),
    )
    assert [event.reason for event in result.rewrites] == ["RowLinear, residual added"]


def test_a_normalization_that_only_the_product_reads_goes_in() -> None:
    norm = f"f = RMSNormalization<epsilon = 0.001>(e, narrow)  {QUANTIZED}{P.replace('p =', 'y =')}"
    (feed,) = feeds("f")
    result = check_pass(
        FuseKernels(),
        before=text(norm, F.replace(" f", " e")),
        after=text(f"y = scalefold.RowLinear<N = 16, epsilon = 0.001>(e, {ROWS}, s, z, narrow)", F.replace(" f", " e")),
        feeds=[{"e": feed["f"]}],
    )
    assert [event.reason for event in result.rewrites] == ["RowLinear, normalized"]
    twice = text(norm + "  v = Exp(f)", F.replace(" f", " e"), f"float[b, s, {N}] y, float[b, s, {K}] v")
    kept = check_pass(FuseKernels(), before=twice, feeds=[{"e": feed["f"]}])
    assert [event.reason for event in kept.rewrites] == ["RowLinear"]


def test_a_gated_unit_that_only_the_product_reads_goes_in() -> None:
    inputs = f"float[b, s, {2 * K}] d"
    result = check_pass(
        FuseKernels(),
        before=text(f"f = scalefold.GatedSilu(d)  {QUANTIZED}{P.replace('p =', 'y =')}", inputs),
        after=text(f"y = scalefold.RowLinear<N = 16, gated = 1>(d, {ROWS}, s, z)", inputs),
        feeds=feeds("d"),
    )
    assert [event.reason for event in result.rewrites] == ["RowLinear, gated"]


PER_ROW = """low = ReduceMin<keepdims = 1>(f, back)  high = ReduceMax<keepdims = 1>(f, back)  range = Sub(high, low)
 span = Max(range, tiny)  above = Sub(f, low)  part = Div(above, span)  q = QuantizeLinear(part, full, nil)
 p = com.microsoft.MatMulIntegerToFloat(q, W, full, t, nil)  scaled = Mul(p, span)  offset = Mul(low, weighed)
 restored = Add(scaled, offset)  """


def test_rows_with_a_range_of_their_own() -> None:
    result = check_pass(
        FuseKernels(),
        before=text(PER_ROW + "x = Add(restored, b)  y = Relu(x)", F),
        after=text(f"y = scalefold.RowLinear<N = 16, activation = 1>(f, {ROWS})", F),
        feeds=feeds("f"),
    )
    assert [event.reason for event in result.rewrites] == ["RowLinear, relu"]


@pytest.mark.parametrize("function", ["e = Relu(x)", "e = Add(x, r)", "e = Identity(x)"])
def test_rows_with_a_range_of_their_own_before_codes(function: str) -> None:
    inputs = f"{F}, {R}" if "r)" in function else F
    body = PER_ROW + f"x = Add(restored, b)  {function}  c = QuantizeLinear(e, u, o)  y = DequantizeLinear(c, u, o)"
    result = check_pass(FuseKernels(), before=text(body, inputs), feeds=feeds("f r" if "r)" in function else "f"))
    assert [event.node.op_type for event in result.rewrites] == ["RowLinear"]


def test_a_bias_that_the_range_of_a_row_multiplies_stays() -> None:
    body = PER_ROW.replace("full, t, nil)", "full, t, nil, , b)") + "y = Relu(restored)"
    result = check_pass(FuseKernels(), before=text(body, F), feeds=feeds("f"))
    assert [event.node.op_type for event in result.rewrites] == ["Linear"]


def test_a_bias_of_more_axes_stays() -> None:
    CONSTANTS["deep"] = np.linspace(-1, 1, N, dtype=np.float32)[None, None, None]
    body = QUANTIZED + P.replace(", , b)", ")") + "y = Add(p, deep)"
    result = check_pass(FuseKernels(), before=text(body, F, f"float[1, b, s, {N}] y"), feeds=feeds("f"))
    assert [event.reason for event in result.rewrites] == ["RowLinear"]


def test_codes_by_another_step_than_the_product_reads_them_by_stay() -> None:
    result = check_pass(
        FuseKernels(), before=text(f"q = QuantizeLinear(f, u, z)  {P.replace('p =', 'y =')}", F), feeds=feeds("f")
    )
    assert [event.reason for event in result.rewrites] == ["Linear"]


def test_codes_that_others_read_too_stay() -> None:
    given = QUANTIZED + P.replace("p =", "y =") + "v = DequantizeLinear(q, s, z)"
    outputs = f"float[b, s, {N}] y, float[b, s, {K}] v"
    result = check_pass(FuseKernels(), before=text(given, F, outputs), feeds=feeds("f"))
    assert [event.reason for event in result.rewrites] == ["Linear"]


def test_layers_that_share_a_weight_share_its_panels() -> None:
    other = P.replace("p =", "x =").replace("(q,", "(e,").replace(", s,", ", u,")
    model = parse(text(f"{P}{other} y = Mul(p, x)", f"{Q}, uint8[b, s, {K}] e"))
    (feed,) = feeds()
    check_pass(FuseKernels(), before=model, feeds=[{**feed, "e": feed["q"][::-1]}])
    FuseKernels().run(model, None)  # type: ignore[arg-type]
    first, second = graph.nodes(model, "Linear")
    assert first.inputs[1] is second.inputs[1] and first.inputs[2] is second.inputs[2]


def test_a_layer_that_stays_float_runs_in_bfloat16_beside_integer_ones() -> None:
    weight = np.random.default_rng(7).standard_normal((N, N)).astype(np.float32)
    pairs = packed_pairs(weight)
    CONSTANTS.update(E=weight)
    head = text(P + "e = MatMul(p, E)  l = Add(e, b)  g = Relu(l)  y = Add(g, r)", f"{Q}, {R}")
    model = parse(head)
    result = check_pass(FuseKernels(), before=model, feeds=feeds("q r"))
    assert [event.reason for event in result.rewrites] == ["Linear", "FloatLinear, relu, residual added"]
    fused = model.clone()
    FuseKernels().run(fused, Context())
    (node,) = graph.nodes(fused, "FloatLinear")
    stored = graph.constant(node.inputs[1])
    assert stored is not None
    np.testing.assert_array_equal(stored, pairs)
    np.testing.assert_array_equal(graph.constant(node.inputs[2]), CONSTANTS["b"])
    assert node.inputs[5] is not None and node.inputs[5].name == "r"
    for kept in ("y = MatMul(f, E)", P + "t2 = Gather<axis = 1>(E, ids)  z2 = MatMul(p, E)  y = Add(z2, p)"):
        inputs = f"float[b, s, {N}] f" if "Gather" not in kept else f"{Q}, int64[n] ids"
        outputs = f"float[b, s, {N}] y" + (", float[16, n] t2" if "Gather" in kept else "")
        alone = parse(text(kept, inputs, outputs))  # nothing integer beside it; a table that is looked up
        FuseKernels().run(alone, Context())
        assert not graph.nodes(alone, "FloatLinear")


TABLE = "WT = Transpose<perm = [1, 0]>(table)  " + P.replace("W,", "WT,").replace("p =", "y =")
ROW = "codes = Gather(table, ids)  number = Cast<to = 1>(codes)  step = Gather(steps, ids)  v = Mul(number, step)"
IDS = f"{Q}, int64[b, n] ids"
BOTH = f"float[b, s, {N}] y, float[b, n, {K}] v"


def test_a_table_that_is_a_weight_too_is_looked_up_in_the_panels() -> None:
    check_pass(
        FuseKernels(),
        before=text(TABLE + ROW, IDS, BOTH),
        after=text(f"y = scalefold.Linear<N = 16>(q, {BODY})  v = scalefold.LookUp(WP, flat, ids)", IDS, BOTH),
        feeds=feeds("q ids"),
    )


def test_a_table_of_few_bits_that_is_a_weight_too_is_looked_up_in_its_codes() -> None:
    generator = np.random.default_rng(6)
    few, factors = generator.integers(0, 16, (N, 128)).astype(np.uint8), np.arange(1, N + 1, dtype=np.int8)[:, None]
    few[:, :2] = 0, 15
    weight = ((few.astype(np.int8) - 8) * (factors % 9 + 1)).T.astype(np.int8)
    stored = coded_panels(weight)
    assert stored is not None
    CONSTANTS.update(few=few, factors=(factors % 9 + 1).astype(np.int8), eight=np.int8(-8))
    CONSTANTS.update(CC=stored.codes, CL=stored.levels, CS=weight.sum(0, dtype=np.int32))
    decoded = "low{0} = Cast<to = 3>({1})  low{0}8 = Add(low{0}, eight)  d{0} = Mul(low{0}8, {2})  "
    table = decoded.format("", "few", "factors") + "WT = Transpose<perm = [1, 0]>(d)  "
    table += P.replace("W,", "WT,").replace("p =", "y =")
    rows = "some = Gather(few, ids)  those = Gather(factors, ids)  " + decoded.format("r", "some", "those")
    rows += "number = Cast<to = 1>(dr)  step = Gather(steps, ids)  v = Mul(number, step)"
    inputs, outputs = "uint8[b, s, 128] q, int64[b, n] ids", f"float[b, s, {N}] y, float[b, n, 128] v"
    feed = {"q": generator.integers(0, 256, (2, 3, 128)).astype(np.uint8), **feeds("ids")[0]}
    product = "y = scalefold.Linear<N = 16>(q, CC, CS, t, s, z, b, , CL)"
    after = text(f"{product}  v = scalefold.LookUp(CC, flat, ids, CL)", inputs, outputs)
    check_pass(FuseKernels(), before=text(table + rows, inputs, outputs), after=after, feeds=[feed])
    other = text(table + rows.replace("Gather(factors, ids)", "Gather(factors, back)"), inputs, outputs)
    result = check_pass(FuseKernels(), before=other, feeds=[feed])  # rows of another table, which has its own codes
    assert [event.reason for event in result.rewrites] == ["Linear, codes of 4 bits", "LookUp, codes of 4 bits"]
    model = parse(other)
    FuseKernels().run(model, Context())
    (linear,), (look_up,) = graph.nodes(model, "Linear"), graph.nodes(model, "LookUp")
    assert linear.inputs[1] is not look_up.inputs[0]


UNKNOWN_TABLE = "its weight is a table that is looked up in a way the library does not know, and stored once"
NO_STEP = "its activation has no constant scale and zero point"


@pytest.mark.parametrize(
    ("body", "more", "reason"),
    [
        pytest.param(P.replace("W,", "w,"), {"w": W}, "its weight is no constant of int8", id="a computed weight"),
        pytest.param(P.replace("W,", "wide,"), {}, "its weight is no constant of int8", id="a weight of uint8"),
        pytest.param(
            P.replace("q,", "c,").replace("W,", "odd,"),
            {"c": feeds()[0]["q"][..., :6]},
            "its 6 input channels are no multiple of 4",
            id="six channels",
        ),
        pytest.param(P.replace("s,", "e,"), {"e": np.float32(0.5)}, NO_STEP, id="a computed step"),
        pytest.param(WITHOUT.replace(", z)", ")"), {}, NO_STEP, id="no zero point"),
        pytest.param(
            P.replace("t,", "e,"),
            {"e": CONSTANTS["t"]},
            "its weight has scales that are no constants, or zero points",
            id="computed scales",
        ),
        pytest.param(
            P.replace(", , b", ", level, b"),
            {},
            "its weight has scales that are no constants, or zero points",
            id="a zero point of the weight",
        ),
        pytest.param(P.replace(", b)", ", e)"), {"e": CONSTANTS["b"]}, "its bias is no constant", id="a computed bias"),
        pytest.param(
            P.replace("q,", "c,").replace("z,", "signed,"),
            {"c": feeds()[0]["q"].view(np.int8)},
            "its activation is not uint8",
            id="int8",
        ),
    ],
)
def test_a_product_that_the_library_does_not_know_is_declined(
    body: str, more: Mapping[str, Array], reason: str
) -> None:
    CONSTANTS.update(level=np.int8(0), signed=np.int8(3))
    given = {**({} if "c" in more else feeds()[0]), **more}
    shapes = {name: str(np.asarray(value).shape).strip("(),") for name, value in given.items()}
    inputs = ", ".join(
        f"{KINDS[np.asarray(value).dtype.name]}{f'[{shapes[name]}]' if shapes[name] else ''} {name}"
        for name, value in given.items()
    )
    result = check_pass(
        FuseKernels(),
        before=text(body.replace("p =", "y ="), inputs),
        feeds=[{name: np.asarray(value) for name, value in given.items()}],
    )
    assert not result.changed
    assert [event.reason for event in result.declined] == [reason]


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(ROW.replace("Mul(number, step)", "Add(number, step)"), id="added"),
        pytest.param(ROW.replace("Gather(steps, ids)", "Gather(steps, others)"), id="the steps of others"),
        pytest.param("v = Gather(table, ids)", id="codes"),
    ],
)
def test_a_table_that_is_looked_up_in_another_way_is_declined(rows: str) -> None:
    outputs = (
        BOTH.replace("n, 8] v", "n, 8] v")
        if "number" in rows
        else BOTH.replace(f"float[b, n, {K}]", f"int8[b, n, {K}]")
    )
    inputs = IDS + (", int64[b, n] others" if "others" in rows else "")
    feed = {**feeds("q ids")[0], **({"others": feeds("ids")[0]["ids"]} if "others" in rows else {})}
    result = check_pass(FuseKernels(), before=text(TABLE + rows, inputs, outputs), feeds=[feed])
    assert not result.changed
    assert [event.reason for event in result.declined] == [UNKNOWN_TABLE]


def test_rows_of_a_weight_as_it_is_are_not_those_of_a_table() -> None:
    CONSTANTS["down"] = np.linspace(0.1, 0.2, K, dtype=np.float32)[:, None]
    rows = ROW.replace("table", "W").replace("steps", "down")
    given = text(P.replace("p =", "y =") + rows, IDS, BOTH.replace(f"n, {K}] v", f"n, {N}] v"))
    (feed,) = feeds("q ids")
    result = check_pass(FuseKernels(), before=given, feeds=[{**feed, "ids": np.array([[0, 5], [7, 1]])}])
    assert [event.reason for event in result.declined] == [UNKNOWN_TABLE]


def test_what_was_fused_says_which_layer_it_is() -> None:
    model = parse(text("[fc] " + P.replace("p =", "y =")))
    (node,) = graph.nodes(model, "MatMulIntegerToFloat")
    node.metadata_props["module"] = "fc"
    result = FuseKernels().run(model, None)  # type: ignore[arg-type]
    assert [event.where for event in result.rewrites] == ["fc"]
    (fused,) = graph.nodes(model, "Linear")
    assert fused.name == "fc" and fused.metadata_props["module"] == "fc"
    assert isinstance(fused.outputs[0].type, ir.TensorType)
