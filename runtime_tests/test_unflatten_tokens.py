from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import graph
from scalefold.compiler.testing import check_pass, parse
from scalefold.passes.unflatten_tokens import UnflattenTokens

FEED = [{"x": np.arange(24, dtype=np.float32).reshape(2, 3, 4) / 7}]
HEAD = """<ir_version: 10, opset_import: ["" : 20]>
model (float[b, s, 4] x) => (float[b, s, 2] y)
<int64[2] merged = {-1, 4}, int64[3] parted = {2, 3, 2}, int64[3] whole = {2, 3, 4}, float[4] gain = {1.0, 2.0, 3.0, 4.0},
 float[4] v = {0.5, 1.0, -1.0, 2.0}, float[4, 2] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0},
 float[4, 4] u = {1.0, 0.0, 2.0, 0.0, 0.0, 1.0, 0.0, 1.0, 3.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0},
 float[2] c = {0.5, -1.0}, float[6, 1] column = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}>
"""


def graph_of(body: str) -> ir.Model:
    """A graph whose parting Reshapes say that they restore [b, s], as exporters' shapes do."""
    model = parse(HEAD + f"{{ {body} }}")
    for node in graph.nodes(model, "Reshape"):
        out = node.outputs[0]
        if out.name in ("y", "z"):
            out.shape = ir.Shape(["b", "s", 2 if out.name == "y" else 4])
    return model


def test_a_linear_layer_between_a_pair_reads_whole_sequences() -> None:
    result = check_pass(
        UnflattenTokens(),
        before=graph_of("m = Reshape(x, merged)  p = MatMul(m, w)  a = Add(p, c)  y = Reshape(a, parted)"),
        after=HEAD + "{ p = MatMul(x, w)  y = Add(p, c) }",
        feeds=FEED,
    )
    assert [event.reason for event in result.rewrites] == ["2 operators, 1 ends"]


def test_a_norm_over_the_second_of_two_axes_is_one_over_the_last() -> None:
    check_pass(
        UnflattenTokens(),
        before=graph_of(
            "m = Reshape(x, merged)  n = LayerNormalization<axis = 1>(m, v)  p = MatMul(n, w)  y = Reshape(p, parted)"
        ),
        after=HEAD + "{ n = LayerNormalization<axis = -1>(x, v)  y = MatMul(n, w) }",
        feeds=FEED,
    )


def test_a_residual_inside_the_region_stays_one() -> None:
    check_pass(
        UnflattenTokens(),
        before=graph_of(
            "m = Reshape(x, merged)  n = LayerNormalization<axis = -1>(m, gain, v)  p = MatMul(n, u)  r = Relu(p)"
            "  a = Add(m, r)  q = MatMul(a, w)  y = Reshape(q, parted)"
        ),
        after=HEAD + "{ n = LayerNormalization<axis = -1>(x, gain, v)  p = MatMul(n, u)  r = Relu(p)"
        "  a = Add(x, r)  y = MatMul(a, w) }",
        feeds=FEED,
    )


def test_two_merges_that_meet_are_taken_out_together() -> None:
    check_pass(
        UnflattenTokens(),
        before=graph_of(
            "t = Tanh(x)  m = Reshape(x, merged)  k = Reshape(t, merged)  a = Add(m, k)  p = MatMul(a, w)"
            "  y = Reshape(p, parted)"
        ),
        after=HEAD + "{ t = Tanh(x)  a = Add(x, t)  y = MatMul(a, w) }",
        feeds=FEED,
    )


def test_heads_are_merged_into_three_dimensions() -> None:
    before = HEAD.replace("float[b, s, 4] x", "float[b, s, 2, 2] x")
    model = parse(before + "{ m = Reshape(x, merged)  p = MatMul(m, w)  y = Reshape(p, parted) }")
    graph.nodes(model, "Reshape")[1].outputs[0].shape = ir.Shape(["b", "s", 2])
    graph.nodes(model, "Reshape")[0].outputs[0].shape = ir.Shape(["b * s", 4])
    after = before.replace("int64[2] merged = {-1, 4}", "int64[3] merged = {0, 0, -1}")
    check_pass(
        UnflattenTokens(),
        before=model,
        after=after + "{ m = Reshape(x, merged)  y = MatMul(m, w) }",
        feeds=[{"x": FEED[0]["x"].reshape(2, 3, 2, 2)}],
    )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param(
            "m = Reshape(x, merged)  t = CumSum(m, zero)  p = MatMul(t, w)  y = Reshape(p, parted)",
            "they are read by CumSum, which is not row-wise",
            id="across tokens",
        ),
        pytest.param(
            "m = Reshape(x, merged)  a = Add(m, column)  p = MatMul(a, w)  y = Reshape(p, parted)",
            "Add reads column beside them",
            id="a constant per token",
        ),
        pytest.param(
            "m = Reshape(x, merged)  n = LayerNormalization<axis = 0>(m, every)  p = MatMul(n, w)  y = Reshape(p, parted)",
            "LayerNormalization is not over the last axis alone",
            id="a norm over tokens",
        ),
    ],
)
def test_what_is_not_row_wise_is_declined_with_its_reason(body: str, reason: str) -> None:
    every = ", ".join(["1.0"] * 24)
    more = f"int64 zero = {{0}}, float[6, 4] every = {{{every}}}, float[2] c"
    model = parse(HEAD.replace("float[2] c", more) + f"{{ {body} }}")
    for node in graph.nodes(model, "Reshape"):
        if node.outputs[0].name == "y":
            node.outputs[0].shape = ir.Shape(["b", "s", 2])
    result = check_pass(UnflattenTokens(), before=model, feeds=FEED)
    assert [event.reason for event in result.declined] == [reason]


def test_merged_tokens_that_go_out_are_declined() -> None:
    before = HEAD.replace("float[b, s, 2] y", "float[n, 2] y")
    result = check_pass(
        UnflattenTokens(), before=parse(before + "{ m = Reshape(x, merged)  y = MatMul(m, w) }"), feeds=FEED
    )
    assert [event.reason for event in result.declined] == ["the merged tokens are an output of the graph"]
