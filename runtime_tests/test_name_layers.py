from __future__ import annotations

import onnx_ir as ir
import pytest

from scalefold.compiler.testing import check_pass, parse
from scalefold.passes.name_layers import SCOPES, NameLayers

HEAD = """<ir_version: 10, opset_import: ["" : 20]>
model (float[b, s, 2] x) => (float[b, s, 2] y)
<float[2, 2] w = {1.0, 2.0, 3.0, 4.0}, float[2, 2] w2 = {1.0, 0.0, 3.0, 4.0}, float[2] c = {0.5, 1.5}>
"""
LAYER = HEAD + "{ [%s] p = MatMul(x, w)  y = Add(p, c) }"
TWO = HEAD + "{ [%s] h = MatMul(x, w)  [%s] y = MatMul(h, w2) }"


def renamed(text: str, **names: str) -> ir.Model:
    """The model of a text, some of whose constants get names that text cannot spell."""
    model = parse(text)
    for old, new in names.items():
        value = model.graph.initializers[old]
        value.name = new
        assert value.const_value is not None
        value.const_value.name = new
    return model


def with_scopes(model: ir.Model, *scopes: str) -> ir.Model:
    layers = [node for node in model.graph if node.op_type == "MatMul"]
    for node, scope in zip(layers, scopes, strict=True):
        node.metadata_props[SCOPES] = scope
    return model


def named(model: str | ir.Model) -> list[str]:
    """The names of layers, weights and biases that the pass gives, in graph order."""
    result = check_pass(NameLayers(), before=model, after=model)
    graph = result.rewrites[0].node.graph
    assert graph is not None
    layers = [node.name or "" for node in graph if node.op_type == "MatMul"]
    return layers + [name for name in graph.initializers if graph.initializers[name].uses()]


def test_the_scopes_in_the_metadata_come_first() -> None:
    scopes = "['', 'encoder', 'encoder.layer.0.attention.self.query', 'linear']"
    model = with_scopes(renamed(LAYER % "node_MatMul_69", c="other.bias"), scopes)
    assert sorted(named(model)) == [
        "encoder.layer.0.attention.self.query",
        "encoder.layer.0.attention.self.query.bias",
        "encoder.layer.0.attention.self.query.weight",
    ]


def test_without_scopes_the_name_of_the_bias_gives_the_path() -> None:
    model = renamed(LAYER % "other", c="encoder.query.bias", w="onnx::MatMul_12")
    assert named(model)[0] == "encoder.query"


def test_without_scopes_and_bias_the_name_of_the_weight_gives_the_path() -> None:
    model = renamed(LAYER % "other", w="encoder.query.weight")
    assert named(model)[0] == "encoder.query"


@pytest.mark.parametrize(
    ("node", "name"),
    [
        ("/encoder/layer.0/attention/self/query/MatMul", "encoder.layer.0.attention.self.query"),
        ("/encoder/layer.11/output/dense/MatMul_3", "encoder.layer.11.output.dense"),
        ("/classifier/Gemm", "classifier"),
        ("node_MatMul_69", "node_MatMul_69"),
        ("/MatMul_2", "linear.0"),
        ("", "linear.0"),
    ],
)
def test_without_any_of_these_the_node_gives_the_name(node: str, name: str) -> None:
    model = parse(LAYER % "unnamed")
    next(iter(model.graph)).name = node
    assert named(model) == [name, f"{name}.weight", f"{name}.bias"]


def test_scopes_that_name_no_module_are_passed_over() -> None:
    assert named(with_scopes(parse(LAYER % "fallback"), "['', 'linear']"))[0] == "fallback"


def test_one_module_that_is_called_twice_gets_a_number() -> None:
    model = with_scopes(parse(TWO % ("a", "b")), "['', 'shared', 'm']", "['', 'shared', 'm']")
    assert named(model)[:2] == ["shared", "shared.2"]


def test_a_number_that_is_taken_is_not_given_again() -> None:
    model = with_scopes(parse(TWO % ("a", "b")), "['', 'shared.2', 'm']", "['', 'shared.2', 'm']")
    assert named(model)[:2] == ["shared.2", "shared.2.2"]


def test_a_shared_weight_keeps_its_name() -> None:
    model = with_scopes(
        parse((TWO % ("a", "b")).replace("(h, w2)", "(h, w)")), "['', 'first', 'm']", "['', 'second', 'm']"
    )
    assert named(model) == ["first", "second", "w"]


def test_a_name_that_another_constant_has_already_is_not_given_again() -> None:
    text = (LAYER % "a").replace("y = Add(p, c)", "h = Add(p, c)  y = Mul(h, taken)")
    text = text.replace("float[2] c", "float[2] taken = {2.0, 3.0}, float[2] c")
    model = with_scopes(renamed(text, taken="query.weight"), "['', 'query', 'm']")
    assert sorted(named(model)) == ["query", "query.bias", "query.weight", "w"]


def test_a_graph_that_is_named_already_is_left_alone() -> None:
    model = renamed(LAYER % "query", w="query.weight", c="query.bias")
    assert not check_pass(NameLayers(), before=model, after=model).changed


def test_products_of_activations_keep_their_names() -> None:
    square = HEAD.replace("float[b, s, 2] y", "float[b, s, s] y")
    before = square + "{ t = Transpose<perm = [0, 2, 1]>(x)  [scores] y = MatMul(x, t) }"
    assert not check_pass(NameLayers(), before=before, after=before).changed
