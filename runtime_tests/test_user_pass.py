"""Passes of the user's own, by dotted name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import ScalefoldError, compile_model, graph, load_recipe
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.protocol import Context, Contract
from scalefold.compiler.runtime import Feed, Session
from scalefold.compiler.user_pass import BY_CONTRACT, ExactUserPass, Takes, UserPass

SURGERY = """
import functools
import onnx_graphsurgeon as gs
import onnx_ir as ir

number = 3

def negate(model: ir.Model) -> None:
    last = model.graph.outputs[0]
    node = ir.node("Neg", [last])
    node.outputs[0].shape, node.outputs[0].type = last.shape, last.type
    model.graph.insert_after(last.producer(), [node])
    name, last.name = last.name, "before"
    node.outputs[0].name = name
    model.graph.outputs[0] = node.outputs[0]

def drop_identities(graph: gs.Graph) -> gs.Graph:
    for node in [node for node in graph.nodes if node.op == "Identity"]:
        source = node.i()
        source.outputs = node.outputs
        node.outputs = []
    return graph.cleanup()

def halve(model: ir.Model) -> None:
    for value in model.graph.initializers.values():
        value.const_value = ir.tensor(value.const_value.numpy() / 2, name=value.name)

def not_annotated(model):
    return None

def nothing_useful(model: ir.Model) -> int:
    return 3

partly = functools.partial(halve)

def broken(model: ir.Model) -> ir.Model:
    raise KeyError("weights")
"""

RECIPE = """
user_passes:
  - {function: "surgery:drop_identities", place: before-quantization, contract: exact}
"""

BEFORE = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[N, 2] x) => (float[N, 2] y) <float[2] b = {1.0, 2.0}> { s = Add(x, b)  i = Identity(s)  y = Relu(i) }
"""
AFTER = BEFORE.replace("i = Identity(s)  y = Relu(i)", "y = Relu(s)")


@pytest.fixture(autouse=True)
def surgery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "surgery.py").write_text(SURGERY)
    (tmp_path / "unfinished.py").write_text("def function(:")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("surgery", None)


def bias_of(model: ir.Model) -> list[float]:
    array = graph.constant(next(iter(model.graph.initializers.values())))
    assert array is not None
    return [float(value) for value in array]


@pytest.mark.parametrize("name", ["surgery.drop_identities", "surgery:drop_identities"])
@pytest.mark.parametrize("takes", [None, "graphsurgeon"])
def test_a_graphsurgeon_function_by_its_annotation_or_as_declared(name: str, takes: Takes | None) -> None:
    model = ir.from_onnx_text(BEFORE)
    result = ExactUserPass(name, takes).run(model, Context())
    assert [node.op_type for node in model.graph] == ["Add", "Relu"]
    assert [event.reason for event in result.rewrites] == [f"by {name}"]
    assert model.graph.outputs[0].shape is not None
    assert bias_of(model) == [1.0, 2.0]


def test_its_result_is_an_equal_graph() -> None:
    model = ir.from_onnx_text(BEFORE)
    ExactUserPass("surgery.drop_identities").run(model, Context())
    feed = {"x": np.array([[-3.0, 4.0]], dtype=np.float32)}
    np.testing.assert_array_equal(Session(model).run(feed)["y"], Session(ir.from_onnx_text(AFTER)).run(feed)["y"])


def test_an_onnx_ir_function_may_change_the_model_in_place() -> None:
    model = ir.from_onnx_text(BEFORE)
    UserPass("surgery.halve").run(model, Context())
    assert bias_of(model) == [0.5, 1.0]


def test_weights_outside_the_file_are_given_to_graphsurgeon(float_model: Path) -> None:
    model = read_onnx(float_model)
    wanted = {name: graph.constant(value) for name, value in model.graph.initializers.items()}
    UserPass("surgery.drop_identities").run(model, Context())
    kept = {name: graph.constant(value) for name, value in model.graph.initializers.items()}
    assert len(kept) > 30
    for name, array in kept.items():
        np.testing.assert_array_equal(array, wanted[name])


def test_the_contract_is_lossy_unless_declared() -> None:
    assert {name: entry("f").contract for name, entry in BY_CONTRACT.items()} == {
        "exact": Contract.EXACT,
        "reassociated": Contract.REASSOCIATED,
        "lossy": Contract.LOSSY,
    }
    assert UserPass("f").contract is Contract.LOSSY


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("surgery.missing", "'surgery.missing' cannot be imported"),
        ("nowhere.at.all", "'nowhere.at.all' cannot be imported"),
        ("alone", "'alone' cannot be imported"),
        ("unfinished.function", "'unfinished.function' cannot be imported"),
        (".surgery.halve", "'.surgery.halve' cannot be imported"),
        ("surgery.partly", "annotate its parameter"),
        ("surgery.number", "'surgery.number' is not a function"),
        ("surgery.not_annotated", "annotate its parameter"),
        ("surgery.nothing_useful", "it returned a int, not a Model"),
        ("surgery.broken", r"user pass surgery.broken: it failed \(KeyError: 'weights'\)"),
    ],
)
def test_faults_are_told_in_one_sentence(name: str, message: str) -> None:
    with pytest.raises(ScalefoldError, match=message):
        UserPass(name).run(ir.from_onnx_text(BEFORE), Context())


def test_a_recipe_names_functions_and_where_they_run(float_model: Path, feeds: list[Feed], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE)
    report = compile_model(
        float_model, tmp_path / "o", recipe=tmp_path / "mine.yaml", calibration=feeds[:24], samples=8
    )
    done = {entry.name: entry for entry in report.passes}
    assert [event["reason"] for event in done["user-pass"].rewrites] == ["by surgery:drop_identities"]
    assert done["user-pass"].contract == "EXACT"
    assert report.integer_layers == 13
    assert report.outputs[0].mean_cosine > 0.98
    (tmp_path / "negated.yaml").write_text(
        'user_passes: [{function: "surgery:negate", place: before-migration}]\nmigration: {}\n'
    )
    negated = compile_model(
        float_model, tmp_path / "n", recipe=tmp_path / "negated.yaml", calibration=feeds[:24], samples=8
    )
    assert negated.outputs[0].mean_cosine > 0.98  # against what the pass made of the model
    (tmp_path / "broken.yaml").write_text(RECIPE.replace("exact", "perhaps"))
    with pytest.raises(ScalefoldError, match=r"user_passes.0.contract: input should be 'exact'"):
        load_recipe(tmp_path / "broken.yaml")
