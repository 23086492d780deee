from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import graph
from scalefold.compiler.errors import GraphError
from scalefold.compiler.runtime import Array, Feed, Session
from scalefold.compiler.testing import parse
from scalefold.compiler.walk import Walk

TEXT = """<ir_version: 10, opset_import: ["" : 20]>
model (float[m, 2] x, float[m, 2] r) => (float[m, 2] y, float[m, 2] side)
<float[2, 2] w = {1.0, 2.0, 3.0, 4.0}, float[2, 2] u = {0.5, -1.0, 2.0, 1.0}, float[2] c = {1.0, -1.0}>
{ [relu] a = Relu(x)  [first] b = MatMul(a, w)  [bias] d = Add(b, c)  [second] e = MatMul(d, u)  [skip] f = Add(e, a)
  [twice] g = Add(d, d)  [end] y = Add(f, r)  [aside] side = Add(g, r) }
"""
BRANCHES = """<ir_version: 10, opset_import: ["" : 20]>
model (bool c, float[m, 2] x) => (float[m, 2] y) <float[2, 2] w = {1.0, 2.0, 3.0, 4.0}>
{ n = Neg(x)
  [fork] b = If(c) <then_branch = t () => (float[m, 2] r) {r = Relu(n)}, else_branch = e () => (float[m, 2] s) {s = Neg(n)}>
  y = MatMul(b, w) }
"""
GENERATOR = np.random.default_rng(4)
FEEDS: list[Feed] = [
    {name: GENERATOR.standard_normal((tokens, 2)).astype(np.float32) for name in ("x", "r")} for tokens in (3, 5)
]
VALUES = ("a", "b", "d", "e", "f", "g", "y", "side")
W, U = np.array([[1, 2], [3, 4]], np.float32), np.array([[0.5, -1], [2, 1]], np.float32)


def value(model: ir.Model, name: str) -> ir.Value:
    return next(out for node in model.graph for out in node.outputs if out.name == name)


def node(model: ir.Model, name: str) -> ir.Node:
    return next(entry for entry in model.graph if entry.name == name)


def assert_all_close(got: list[Array], wanted: list[Array]) -> None:
    assert len(got) == len(wanted)
    for left, right in zip(got, wanted, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)


def expected(name: str) -> list[Array]:
    session = Session(parse(TEXT), outputs=[name])
    return [session.run(feed)[name] for feed in FEEDS]


def held(walk: Walk) -> set[str]:
    return {entry.name or "" for entry in walk._live}


def test_every_value_on_the_way_equals_a_plain_run() -> None:
    model = parse(TEXT)
    walk = Walk(model, FEEDS)
    for name in VALUES:
        assert_all_close(walk.value(value(model, name)), expected(name))


@pytest.mark.parametrize("name", VALUES)
def test_a_value_far_ahead_equals_a_plain_run(name: str) -> None:
    model = parse(TEXT)
    assert_all_close(Walk(model, FEEDS).value(value(model, name)), expected(name))


def test_an_input_is_a_value_too() -> None:
    model = parse(TEXT)
    assert_all_close(Walk(model, FEEDS).value(model.graph.inputs[0]), [feed["x"] for feed in FEEDS])


def test_what_is_set_on_a_value_every_later_reader_sees() -> None:
    model = parse(TEXT)
    walk = Walk(model, FEEDS)
    before = walk.value(value(model, "d"))
    walk.set_value(value(model, "d"), [np.zeros_like(array) for array in before])
    assert_all_close(walk.value(value(model, "e")), [np.zeros_like(array) for array in before])
    assert_all_close(walk.value(value(model, "side")), [feed["r"] for feed in FEEDS])
    assert_all_close(walk.value(value(model, "f")), expected("a"))


def test_what_is_set_on_an_input_of_a_node_that_node_alone_sees() -> None:
    model = parse(TEXT)
    walk = Walk(model, FEEDS)
    d = value(model, "d")
    arrays = walk.value(d)
    walk.set_input(node(model, "second"), d, [np.zeros_like(array) for array in arrays])
    assert_all_close(walk.value(value(model, "f")), expected("a"))
    assert_all_close(walk.value(value(model, "g")), expected("g"))


def test_what_is_set_on_an_input_is_seen_whichever_reader_runs_first() -> None:
    model = parse(TEXT)
    walk = Walk(model, FEEDS)
    d = value(model, "d")
    arrays = walk.value(d)
    walk.set_input(node(model, "second"), d, [np.zeros_like(array) for array in arrays])
    assert_all_close(walk.value(value(model, "g")), expected("g"))
    assert_all_close(walk.value(value(model, "f")), expected("a"))


def test_two_nodes_can_see_different_stand_ins_of_one_value() -> None:
    model = parse(TEXT)
    walk = Walk(model, FEEDS)
    d = value(model, "d")
    arrays = walk.value(d)
    walk.set_input(node(model, "second"), d, [np.zeros_like(array) for array in arrays])
    walk.set_input(node(model, "twice"), d, [np.ones_like(array) for array in arrays])
    assert_all_close(walk.value(value(model, "e")), [np.zeros_like(array) for array in arrays])
    assert_all_close(walk.value(value(model, "g")), [np.full_like(array, 2) for array in arrays])


def test_a_weight_that_is_set_is_used_and_the_graph_keeps_its_own() -> None:
    model = parse(TEXT)
    walk = Walk(model, FEEDS)
    initializer = model.graph.initializers["w"]
    walk.set_weight(initializer, 2 * W)
    assert_all_close(walk.value(value(model, "b")), [2 * array for array in expected("b")])
    np.testing.assert_array_equal(graph.constant(initializer), W)


def test_a_weight_that_is_set_late_changes_only_what_runs_later() -> None:
    model = parse(TEXT)
    walk = Walk(model, FEEDS)
    assert_all_close(walk.value(value(model, "b")), expected("b"))
    walk.set_weight(model.graph.initializers["u"], np.zeros_like(U))
    assert_all_close(walk.value(value(model, "d")), expected("d"))
    assert_all_close(walk.value(value(model, "f")), expected("a"))


def test_values_that_nobody_will_read_are_dropped() -> None:
    model = parse(TEXT)
    walk = Walk(model, FEEDS)
    walk.value(value(model, "a"))
    assert held(walk) == {"r", "a"}
    walk.value(value(model, "d"))
    assert held(walk) == {"r", "a", "d"}
    walk.value(value(model, "f"))
    assert held(walk) == {"r", "d", "f"}
    walk.value(value(model, "y"))
    assert held(walk) == {"r", "d", "y"}
    walk.value(value(model, "side"))
    assert held(walk) == {"y", "side"}


def test_a_stand_in_is_dropped_with_the_node_that_reads_it() -> None:
    model = parse(TEXT)
    walk = Walk(model, FEEDS)
    d = value(model, "d")
    walk.set_input(node(model, "second"), d, [np.zeros_like(array) for array in walk.value(d)])
    assert "d.for.second" in held(walk)
    walk.value(value(model, "g"))
    assert "d.for.second" in held(walk)
    walk.value(value(model, "e"))
    assert "d.for.second" not in held(walk)


def test_each_node_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parse(TEXT)
    walk = Walk(model, FEEDS)
    seen: list[str] = []
    plain = Walk._run

    def counting(self: Walk, pending: list[ir.Node]) -> None:
        seen.extend(entry.name or "" for entry in pending)
        plain(self, pending)

    monkeypatch.setattr(Walk, "_run", counting)
    for name in VALUES:
        walk.value(value(model, name))
    assert sorted(seen) == sorted(entry.name or "" for entry in model.graph)


def test_the_graph_ahead_can_be_edited_on_the_way() -> None:
    model = parse(TEXT)
    walk = Walk(model, FEEDS)
    b = walk.value(value(model, "b"))
    doubled = ir.node("Add", [value(model, "b"), value(model, "b")], name="doubled")
    graph.insert_before(node(model, "bias"), [doubled])
    doubled.outputs[0].name = "b_doubled"
    node(model, "bias").replace_input_with(0, doubled.outputs[0])
    assert_all_close(walk.value(value(model, "d")), [2 * array + np.array([1, -1], np.float32) for array in b])


def test_a_value_that_is_rewritten_behind_the_walk_goes_on_as_it_was_set() -> None:
    # What the migration does: the node that made a value is edited, the value set anew, and its readers adapted.
    model = parse(TEXT)
    walk = Walk(model, FEEDS)
    d = value(model, "d")
    halves = [array / 2 for array in walk.value(d)]
    graph.replace_constant(model, node(model, "second"), 1, "u_doubled", 2 * U)
    walk.set_value(d, halves)
    assert_all_close(walk.value(value(model, "y")), expected("y"))


def test_a_piece_takes_free_values_and_gives_the_others_of_each_feed() -> None:
    model = parse(TEXT)
    walk = Walk(model, FEEDS)
    d, a = value(model, "d"), expected("a")
    session, others = walk.piece([node(model, "second"), node(model, "skip")], [d], value(model, "f"))
    assert [sorted(other) for other in others] == [["a"], ["a"]]
    for index, other in enumerate(others):
        free = GENERATOR.standard_normal((len(a[index]), 2)).astype(np.float32)
        np.testing.assert_allclose(session.run({"d": free, **other})["f"], free @ U + a[index], rtol=1e-5, atol=1e-5)


def test_a_piece_keeps_the_weights_of_the_graph() -> None:
    model = parse(TEXT)
    walk = Walk(model, FEEDS)
    session, _ = walk.piece([node(model, "second")], [value(model, "d")], value(model, "e"))
    np.testing.assert_allclose(session.run({"d": np.eye(2, dtype=np.float32)})["e"], U)


def test_a_piece_in_another_form_gives_the_same_and_computes_what_no_layer_is_behind_once() -> None:
    model = parse(TEXT)
    walk = Walk(model, FEEDS)
    walk.value(value(model, "d"))
    d, a = value(model, "d"), expected("a")
    seen: list[list[str | None]] = []

    def turned(cut: ir.Model) -> ir.Model:
        seen.append([entry.name for entry in cut.graph])
        skip = graph.nodes(cut, "Add")[0]
        skip.replace_input_with(0, skip.inputs[1])
        skip.replace_input_with(1, graph.nodes(cut, "MatMul")[0].outputs[0])
        return cut

    nodes = [node(model, "second"), node(model, "skip")]
    session, others = walk.piece(nodes, [d], value(model, "f"), fused=turned)
    assert seen == [["relu", "second", "skip"]]
    assert [sorted(other) for other in others] == [["a"], ["a"]]
    for index, other in enumerate(others):
        free = GENERATOR.standard_normal((len(a[index]), 2)).astype(np.float32)
        np.testing.assert_allclose(session.run({"d": free, **other})["f"], free @ U + a[index], rtol=1e-5, atol=1e-5)


def test_a_piece_in_another_form_reads_what_a_layer_is_behind_as_the_walk_has_it() -> None:
    model = parse(TEXT)
    walk = Walk(model, FEEDS)
    walk.set_value(value(model, "f"), [np.full_like(array, 7) for array in walk.value(value(model, "f"))])
    seen: list[list[str | None]] = []

    def noted(cut: ir.Model) -> ir.Model:
        seen.append([entry.name for entry in cut.graph])
        return cut

    r = model.graph.inputs[1]
    session, others = walk.piece([node(model, "end")], [r], value(model, "y"), fused=noted)
    assert seen == [["end"]]
    for other, feed in zip(others, FEEDS, strict=True):
        np.testing.assert_allclose(session.run({"r": feed["r"], **other})["y"], feed["r"] + 7)


def test_a_walk_without_feeds_gives_no_arrays() -> None:
    model = parse(TEXT)
    assert Walk(model, []).value(value(model, "y")) == []


def test_branches_that_read_from_outside_are_refused_with_a_sentence() -> None:
    model = parse(BRANCHES)
    feed: Feed = {"c": np.array(True), "x": np.ones((3, 2), np.float32)}
    walk = Walk(model, [feed])
    (product,) = graph.nodes(model, "MatMul")
    wanted = product.inputs[0]
    assert wanted is not None
    with pytest.raises(GraphError, match=r"fork: its branches read values from outside.*w8a8-naive"):
        walk.value(wanted)
