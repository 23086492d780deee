"""Graph diff: names do not count, every kind of change is found as one difference, QDQ and lowered form are one recipe."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import compile_model, graph
from scalefold.compiler.diff import Diff, Difference, diff_models
from scalefold.compiler.golden import golden_text
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.quantization import linear_quantization
from scalefold.compiler.recipe import Target
from scalefold.compiler.runtime import Array, Feed
from scalefold.compiler.testing import parse

Mutation = Callable[[ir.Model], None]
Cli = Callable[..., subprocess.CompletedProcess[str]]
QUERY, KEY, VALUE = (f"encoder.layer.0.attention.self.{name}" for name in ("query", "key", "value"))
UP, DOWN, POOLER = "encoder.layer.0.intermediate.dense", "encoder.layer.1.output.dense", "pooler.dense"


@pytest.fixture(scope="module")
def folders(float_model: Path, feeds: list[Feed], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny BERT compiled with `w8a8-naive` for each target. Not to be written to."""
    folder = tmp_path_factory.mktemp("naive")
    targets: dict[str, Target] = {"qdq": "qdq", "cpu": "onnxruntime-cpu"}
    for name, target in targets.items():
        compile_model(float_model, folder / name, recipe="w8a8-naive", calibration=feeds[:24], samples=8, target=target)
    return {name: folder / name for name in targets}


@pytest.fixture
def qdq(folders: dict[str, Path]) -> ir.Model:
    return read_onnx(folders["qdq"] / "model.onnx")


@pytest.fixture
def lowered(folders: dict[str, Path]) -> ir.Model:
    return read_onnx(folders["cpu"] / "model.onnx")


def node_named(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def edit(model: ir.Model, name: str, change: Callable[[Array], Array]) -> None:
    """Replace a constant by a changed copy."""
    value = model.graph.initializers[name]
    array = graph.constant(value)
    assert array is not None
    value.const_value = ir.tensor(change(array.copy()), name=name)


def put(index: tuple[int, ...], step: float) -> Callable[[Array], Array]:
    """A change of one element."""

    def change(array: Array) -> Array:
        array[index] += np.asarray(step).astype(array.dtype)
        return array

    return change


def scale_of_input(model: ir.Model) -> None:
    edit(model, f"{UP}.input_scale", lambda array: np.asarray(array * np.float32(1.5)))


def zero_point_of_input(model: ir.Model) -> None:
    edit(model, f"{QUERY}.input_zero_point", lambda array: np.asarray(array - np.uint8(1)))


def scale_of_quantizer_alone(model: ir.Model) -> None:
    quantize = node_named(model, f"{UP}.input_q")
    quantize.replace_input_with(1, graph.add_initializer(model, "another", np.array(0.5, dtype=np.float32)))


def scale_of_column(model: ir.Model) -> None:
    edit(model, f"{DOWN}.weight_scales", put((7,), 0.25))


def code_of_weight(model: ir.Model) -> None:
    edit(model, f"{KEY}.weight_codes", put((3, 5), 1))


def zero_point_of_weight(model: ir.Model) -> None:
    edit(model, f"{POOLER}.weight_dq_zero_points", put((2,), 1))


def code_of_bias(model: ir.Model) -> None:
    edit(model, f"{POOLER}.bias_codes", put((4,), 1))


def float_bias(model: ir.Model) -> None:
    edit(model, f"{UP}.bias", put((0,), 1))


def dropped_quantizer(model: ir.Model) -> None:
    dequantize = node_named(model, f"{UP}.input_dq")
    x = node_named(model, f"{UP}.input_q").inputs[0]
    assert x is not None
    graph.bypass(dequantize.outputs[0], x)
    graph.sweep(model)


def dropped_quantizer_of_one_reader(model: ir.Model) -> None:
    x = node_named(model, f"{QUERY}.input_q").inputs[0]
    node_named(model, VALUE).replace_input_with(0, x)


def dropped_quantizer_of_all_readers(model: ir.Model) -> None:
    for name in (QUERY, KEY, VALUE):
        node_named(model, name).replace_input_with(0, node_named(model, f"{QUERY}.input_q").inputs[0])
    graph.sweep(model)


def six_bits(model: ir.Model) -> None:
    edit(model, f"{DOWN}.weight_codes", lambda array: np.clip(np.rint(array / 4), -31, 31).astype(np.int8))
    edit(model, f"{DOWN}.weight_scales", lambda array: array * np.float32(4))


def per_tensor_weight(model: ir.Model) -> None:
    edit(model, f"{DOWN}.weight_scales", lambda array: np.asarray(array.max()))


def float_weight(model: ir.Model) -> None:
    dequantize = node_named(model, f"{DOWN}.weight_dq")
    weight = graph.add_initializer(model, "weight", np.ones((128, 64), dtype=np.float32))
    graph.bypass(dequantize.outputs[0], weight)
    graph.sweep(model)


def code_of_embedding(model: ir.Model) -> None:
    edit(model, "embeddings.word_embeddings.weight_codes", put((9, 9), 1))


def swapped_inputs(model: ir.Model) -> None:
    where = graph.nodes(model, "Where")[0]
    first, second = where.inputs[1], where.inputs[2]
    where.replace_input_with(1, second)
    where.replace_input_with(2, first)


def swapped_edges(model: ir.Model) -> None:
    product = next(node for node in graph.nodes(model, "MatMul") if graph.producer(node.inputs[1], "Mul"))
    first, second = product.inputs
    product.replace_input_with(0, second)
    product.replace_input_with(1, first)


def attribute(model: ir.Model) -> None:
    node_named(model, "node_layer_norm_2").attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-5)


def gain(model: ir.Model) -> None:
    norm = node_named(model, "node_layer_norm_2")  # onnx-graphsurgeon stores equal gains once
    array = graph.constant(norm.inputs[1])
    assert array is not None
    norm.replace_input_with(1, graph.add_initializer(model, "gain", put((0,), 0.5)(array.copy())))


def size(model: ir.Model) -> None:
    concat = next(node for node in graph.nodes(model, "Concat") if len(node.inputs) == 4)
    concat.replace_input_with(3, graph.add_initializer(model, "size", np.array([32], dtype=np.int64)))


def added_node(model: ir.Model) -> None:
    gelu = graph.nodes(model, "Gelu")[0]
    relu = ir.node("Relu", [gelu.outputs[0]])
    gelu.outputs[0].replace_all_uses_with(relu.outputs[0])
    relu.replace_input_with(0, gelu.outputs[0])
    graph.insert_after(gelu, [relu])


def removed_node(model: ir.Model) -> None:
    gelu = graph.nodes(model, "Gelu")[1]
    assert gelu.inputs[0] is not None
    graph.bypass(gelu.outputs[0], gelu.inputs[0])
    graph.sweep(model)


def another_operator(model: ir.Model) -> None:
    gelu = graph.nodes(model, "Gelu")[0]
    relu = ir.node("Relu", [gelu.inputs[0]])
    graph.insert_after(gelu, [relu])
    graph.bypass(gelu.outputs[0], relu.outputs[0])
    graph.sweep(model)


def rewired_edge(model: ir.Model) -> None:
    second, first = node_named(model, "node_layer_norm_2"), node_named(model, "node_layer_norm_1")
    add = next(node for node in graph.consumers(second.outputs[0]) if node.op_type == "Add")
    add.replace_input_with(add.inputs.index(second.outputs[0]), first.outputs[0])


def opset(model: ir.Model) -> None:
    model.graph.opset_imports[""] = 21


def output_name(model: ir.Model) -> None:
    model.graph.outputs[0].name = "embeddings"


def output_dropped(model: ir.Model) -> None:
    model.graph.outputs.pop(0)


def input_type(model: ir.Model) -> None:
    model.graph.inputs[0].type = ir.TensorType(ir.DataType.INT32)


def producer(model: ir.Model) -> None:
    model.producer_name = "someone"


MUTATIONS: dict[Mutation, tuple[str, str, str]] = {
    scale_of_input: ("quantization", UP, "activation scale"),
    zero_point_of_input: ("quantization", f"{QUERY} and 2 more readers", "activation zero point"),
    scale_of_quantizer_alone: ("quantization", f"{UP}.input_q", "activation scale"),
    scale_of_column: ("quantization", DOWN, "weight scale, 1 of 64, at [7]"),
    code_of_weight: ("quantization", KEY, "weight codes, 1 of 4096, at [3, 5]"),
    zero_point_of_weight: ("quantization", POOLER, "weight zero point, 1 of 64, at [2]"),
    code_of_bias: ("quantization", POOLER, "bias codes, 1 of 64, at [4]"),
    float_bias: ("bias", UP, "bias, 1 of 128, at [0]"),
    dropped_quantizer: ("quantization", UP, "activation"),
    dropped_quantizer_of_one_reader: ("quantization", VALUE, "activation"),
    dropped_quantizer_of_all_readers: ("quantization", f"{QUERY} and 2 more readers", "activation"),
    six_bits: ("quantization", DOWN, "weight bits"),
    per_tensor_weight: ("quantization", DOWN, "weight granularity"),
    float_weight: ("quantization", DOWN, "weight"),
    code_of_embedding: ("constant", "node_embedding_codes", "Gather input 0, 1 of 12800, at [9, 9]"),
    swapped_inputs: ("edge", r"node_\w+", "Where inputs"),
    swapped_edges: ("edge", r"node_\w+", "MatMul inputs"),
    attribute: ("attribute", "node_layer_norm_2", "LayerNormalization attribute epsilon"),
    gain: ("constant", "node_layer_norm_2", "LayerNormalization input 1, 1 of 64, at [0]"),
    size: ("constant", r"node_Concat_\d+", "Concat input 3"),
    added_node: ("added", r"node_Relu_\d+", "operators"),
    removed_node: ("removed", "node_gelu_1", "operators"),
    another_operator: ("replaced", "node_gelu", "operators"),
    rewired_edge: ("edge", r"node_add_\d+", "Add input 1"),
    opset: ("opset", "ai.onnx", "version"),
    output_name: ("output", "last_hidden_state", "name"),
    output_dropped: ("output", "last_hidden_state", "output"),
    input_type: ("input", "input_ids", "type"),
    producer: ("metadata", "producer_name", "metadata"),
}


def renamed(model: ir.Model) -> ir.Model:
    """Another export of the same model: every name inside is another one, and nodes stand in another order."""
    copy = model.clone()
    ends = {value.name for value in (*copy.graph.inputs, *copy.graph.outputs)}
    for index, value in enumerate(list(copy.graph.initializers.values())):
        value.name = f"constant_{index}"
    for index, node in enumerate(copy.graph):
        node.name = f"n{index}"
        for place, out in enumerate(node.outputs):
            if out.name not in ends:
                out.name = f"v{index}_{place}"
    for node in reversed(list(copy.graph)):
        successors = [reader for out in node.outputs for reader in graph.consumers(out)]
        if successors:
            first = min(successors, key=lambda reader: list(copy.graph).index(reader))
            copy.graph.remove(node)
            copy.graph.insert_before(first, node)
    return copy


@pytest.mark.parametrize("form", ["qdq", "lowered"])
def test_two_exports_under_different_names_are_equal(form: str, request: pytest.FixtureRequest) -> None:
    model: ir.Model = request.getfixturevalue(form)
    other = renamed(model)
    assert [node.op_type for node in model.graph] != [node.op_type for node in other.graph]
    found = diff_models(model, other)
    assert found.equal, found.summary()
    assert found.same_quantization
    assert len(found.layers) == 13


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_a_mutation_is_found_as_one_difference_and_named(mutate: Mutation, qdq: ir.Model) -> None:
    kind, where, what = MUTATIONS[mutate]
    mutant = qdq.clone()
    mutate(mutant)
    found = diff_models(qdq, mutant)
    assert len(found.differences) == 1, found.summary()
    (difference,) = found.differences
    assert (difference.kind, difference.what) == (kind, what)
    assert re.fullmatch(where, difference.where)
    assert difference.before != difference.after
    assert found.same_quantization == (kind != "quantization")
    assert str(difference) in found.summary()
    back = diff_models(renamed(mutant), renamed(qdq))
    assert len(back.differences) == 1, back.summary()


@pytest.mark.parametrize("mutate", [code_of_weight, scale_of_column, float_bias], ids=lambda mutate: mutate.__name__)
def test_a_mutation_of_a_lowered_layer_is_named_alike(mutate: Mutation, lowered: ir.Model) -> None:
    mutant = lowered.clone()
    mutate(mutant)
    found = diff_models(lowered, mutant)
    (difference,) = found.differences
    assert (difference.kind, difference.where, difference.what) == MUTATIONS[mutate]


def test_two_mutations_far_apart_are_two_differences(qdq: ir.Model) -> None:
    mutant = qdq.clone()
    removed_node(mutant)
    added_node(mutant)
    found = diff_models(qdq, renamed(mutant))
    assert sorted(entry.kind for entry in found.differences) == ["added", "removed"], found.summary()


def test_qdq_and_lowered_form_of_a_recipe_are_the_same_quantization(qdq: ir.Model, lowered: ir.Model) -> None:
    found = diff_models(qdq, renamed(lowered))
    assert not found.equal
    assert found.same_quantization, found.summary()
    assert {layer.forms for layer in found.layers} == {("QDQ", "MatMulIntegerToFloat")}
    assert {layer.quantization for layer in found.layers} == {("w8 per-column, a8 per-tensor",) * 2}
    assert {entry.kind for entry in found.differences} == {"form", "opset", "constant", "replaced"}


@pytest.mark.parametrize(
    "mutate", [scale_of_input, zero_point_of_input, scale_of_column, code_of_weight], ids=lambda mutate: mutate.__name__
)
def test_another_quantization_is_seen_across_forms(mutate: Mutation, qdq: ir.Model, lowered: ir.Model) -> None:
    mutate(qdq)
    found = diff_models(qdq, lowered).only_quantization()
    (difference,) = found.differences
    assert (difference.where, difference.what) == MUTATIONS[mutate][1:]


def test_a_tolerance_forgives_floats_but_no_codes(qdq: ir.Model) -> None:
    mutant = qdq.clone()
    scale_of_input(mutant)
    edit(mutant, f"{UP}.input_scale", lambda array: np.asarray(array / np.float32(1.5001)))
    assert len(diff_models(qdq, mutant).differences) == 1
    assert diff_models(qdq, mutant, tolerance=1e-3).equal
    code_of_weight(mutant)
    assert [entry.what for entry in diff_models(qdq, mutant, tolerance=0.5).differences] == [
        MUTATIONS[code_of_weight][2]
    ]


IF = """
<ir_version: 10, opset_import: ["" : 20]>
g (bool[1] c, float[N] x) => (float[N] y) {
    [n] two = Add(x, x)
    y = If(c) <then_branch = t () => (float[N] a) { a = %s(two) }, else_branch = e () => (float[N] b) { b = Neg(x) }>
}
"""


def test_branches_are_compared_and_what_they_read_from_outside() -> None:
    first, second = (ir.from_onnx_text(IF % op) for op in ("Relu", "Abs"))
    assert diff_models(first, ir.from_onnx_text((IF % "Relu").replace("two", "other"))).equal
    (difference,) = diff_models(first, second).differences
    assert difference.what == "If attribute then_branch"
    rewired = ir.from_onnx_text((IF % "Relu").replace("Relu(two)", "Relu(x)"))
    assert not diff_models(first, rewired).equal


TWO = """
<ir_version: 10, opset_import: ["" : 20]>
g (bool[1] c, float[N] a, float[N] b) => (float[N] y) {
    y = If(c) <then_branch = t () => (float[N] r) { s = Add(a, b) r = Sub(s, %s) },
               else_branch = e () => (float[N] r) { r = Identity(%s) }>
}
"""


def test_which_outer_value_a_branch_reads_counts_and_the_order_of_branches_does_not() -> None:
    first = ir.from_onnx_text(TWO % ("a", "b"))
    for others in (("b", "b"), ("a", "a")):
        other = ir.from_onnx_text(TWO % others)
        assert not diff_models(first, other).equal
        assert golden_text(first) != golden_text(other)
    turned = ir.from_onnx_text(TWO % ("a", "b"))
    (node,) = turned.graph
    attributes = dict(node.attributes)
    node.attributes.clear()
    for name in reversed(list(attributes)):
        node.attributes[name] = attributes[name]
    assert diff_models(first, turned).equal


def test_an_output_that_is_another_constant_is_found() -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[N] x) => (float[N] y, float k) <float k = {%s}> {y = Neg(x)}'
    first, second = (ir.from_onnx_text(text % number) for number in (3, 7))
    assert diff_models(first, ir.from_onnx_text(text % 3)).equal
    (difference,) = diff_models(first, second).differences
    assert (difference.what, difference.before, difference.after) == ("output", "3.0", "7.0")


def test_words_are_compared() -> None:
    def model(word: str) -> ir.Model:
        words = ir.tensor([b"a", word.encode()] * 10, dtype=ir.DataType.STRING, name="w")
        found = ir.from_onnx_text(
            '<ir_version: 10, opset_import: ["" : 20]> g (string[20] x, string[20] w) => (bool[20] y) { y = Equal(x, w) }'
        )
        value = found.graph.inputs.pop()
        value.const_value = words
        found.graph.register_initializer(value)
        return found

    assert diff_models(model("b"), model("b")).equal
    assert not diff_models(model("b"), model("c")).equal
    assert golden_text(model("b")) != golden_text(model("c"))


def test_an_attribute_at_its_default_and_one_left_out_are_equal() -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[N] x) => (float[N] y) { y = Softmax%s(x) }'
    first, second, third = (ir.from_onnx_text(text % entry) for entry in ("", "<axis = -1>", "<axis = 0>"))
    assert diff_models(first, second).equal
    assert not diff_models(first, third).equal


def test_the_order_of_an_addition_has_no_meaning_and_that_of_a_subtraction_has() -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[N] x, float[N] z) => (float[N] y) { y = %s }'

    def compared(op: str) -> Diff:
        return diff_models(ir.from_onnx_text(text % f"{op}(x, z)"), ir.from_onnx_text(text % f"{op}(z, x)"))

    assert compared("Add").equal
    (difference,) = compared("Sub").differences
    assert difference == Difference("edge", "", "Sub", "Sub inputs", "in order", "0 and 1 swapped")


def test_the_command_says_equal_or_what_differs(
    folders: dict[str, Path], qdq: ir.Model, tmp_path: Path, cli: Cli
) -> None:
    code_of_weight(qdq)
    ir.save(qdq, tmp_path / "mutant.onnx", external_data="mutant.data")
    same = cli("diff", folders["qdq"], folders["qdq"] / "model.onnx")
    assert (same.returncode, same.stderr) == (0, "")
    assert same.stdout == "equal: 160 nodes, 13 linear layers\n"
    other = cli("diff", folders["qdq"], "mutant.onnx")
    assert (other.returncode, other.stderr) == (1, "")
    assert f"{KEY}: weight codes, 1 of 4096, at [3, 5]" in other.stdout
    told = cli("diff", folders["qdq"], "mutant.onnx", "--json")
    facts = json.loads(told.stdout)
    assert (told.returncode, facts["equal"], facts["same_quantization"]) == (1, False, False)
    assert [entry["what"] for entry in facts["differences"]] == ["weight codes, 1 of 4096, at [3, 5]"]
    forms = cli("diff", folders["qdq"], folders["cpu"], "--quantization")
    assert forms.returncode == 0, forms.stdout


def test_the_command_refuses_what_is_no_model(folders: dict[str, Path], tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    done = cli("diff", folders["qdq"], "text.onnx")
    assert (done.returncode, done.stdout) == (2, "")
    assert "text.onnx: it is not an ONNX model" in done.stderr
    assert cli("diff", folders["qdq"], "nowhere").returncode == 2
    assert cli("diff", folders["qdq"]).returncode == 2


def test_the_bias_behind_two_codes_is_the_first_products() -> None:
    model = parse("""<ir_version: 10, opset_import: ["" : 20]>
        model (float[b, s, 2] x) => (float[b, s, 2] y)
        <float t = {0.1}, float f = {0.001}, uint8 n = {128}, int8[2, 2] w = {1, 2, 3, 4}, float[2] ws = {0.5, 0.25},
         float[2] bias = {1.0, 2.0}>
        { d = DequantizeLinear<axis = 1>(w, ws)  q = QuantizeLinear(x, t, n)  a = DequantizeLinear(q, t, n)
          o = Sub(x, a)  k = QuantizeLinear(o, f, n)  e = DequantizeLinear(k, f, n)  p = MatMul(a, d)
          r = MatMul(e, d)  h = Add(p, r)  y = Add(h, bias) }""")
    coarse, fine = linear_quantization(model)
    assert coarse.bias is not None and coarse.bias.tolist() == [1.0, 2.0] and fine.bias is None
