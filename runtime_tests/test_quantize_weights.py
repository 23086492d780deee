from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import graph, schemes
from scalefold.compiler.calibrate import collect
from scalefold.compiler.decode_chain import origin_of
from scalefold.compiler.errors import GraphError, PatternError, RecipeError
from scalefold.compiler.protocol import Context, Requests
from scalefold.compiler.recipe import Format, Weights
from scalefold.compiler.runtime import Feed
from scalefold.compiler.solve import solve
from scalefold.compiler.stats import Statistic
from scalefold.compiler.testing import check_pass, context_on
from scalefold.passes.quantize_weights import QuantizeWeights

# Each column's largest weight is 127 steps, and no pair of rows can saturate: the codes are the weights over the step.
HEAD = """<ir_version: 10, opset_import: ["" : 20]>
model (float[b, s, 3] x) => (float[b, s, 2] y)
<float[3, 2] w = {127.0, 0.5, -0.4, -63.5, -100.0, 0.25}, int8[3, 2] codes = {127, 1, 0, -127, -100, 0},
 float[2] scales = {1.0, 0.5}, float[2, 2] u = {127.0, 0.0, -1.0, 127.0}, int8[2, 2] u_codes = {127, 0, -1, 127},
 float[2] ones = {1.0, 1.0}, float[2] c = {1.0, -1.0}>
"""
LAYER = "[first] p = MatMul(x, w)  h = Add(p, c)  [second] y = MatMul(h, u)"
QUANTIZED = "d = DequantizeLinear<axis = 1>(codes, scales)  [first] p = MatMul(x, d)  h = Add(p, c)"
NARROW = HEAD.replace(
    "float[2] scales", "int8[3, 2] four = {7, 0, 0, -7, -6, 0}, float[2] four_scales = %s, float[2] scales"
)


def test_each_layer_reads_codes_through_a_dequantizer_of_its_columns() -> None:
    result = check_pass(
        QuantizeWeights(),
        before=HEAD + f"{{ {LAYER} }}",
        after=HEAD + f"{{ {QUANTIZED} e = DequantizeLinear<axis = 1>(u_codes, ones)  [second] y = MatMul(h, e) }}",
    )
    assert [(event.where, event.reason) for event in result.rewrites] == [
        ("first", "int8 per column"),
        ("second", "int8 per column"),
    ]
    assert not result.declined


def test_fewer_bits_leave_fewer_codes_in_the_same_container() -> None:
    scales = f"{{{127 / 7!r}, {63.5 / 7!r}}}"
    check_pass(
        QuantizeWeights(Weights(bits=4, solver="rtn")),
        before=NARROW % scales + "{ [first] y = MatMul(x, w) }",
        after=NARROW % scales + "{ d = DequantizeLinear<axis = 1>(four, four_scales)  [first] y = MatMul(x, d) }",
    )


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_figures_say_how_close_the_weight_is(bits: int) -> None:
    array = np.random.default_rng(bits).standard_normal((64, 8)).astype(np.float32)
    text = ", ".join(repr(float(value)) for value in array.ravel())
    model = f"""<ir_version: 10, opset_import: ["" : 20]>
    model (float[m, 64] x) => (float[m, 8] y) <float[64, 8] w = {{{text}}}> {{ [fc] y = MatMul(x, w) }}"""
    (event,) = check_pass(QuantizeWeights(Weights(bits=bits, solver="rtn")), before=model).rewrites
    noise = array - schemes.weight_round_trip(array, bits)
    expected = 10 * np.log10(np.square(array).sum() / np.square(noise).sum())
    assert event.figures["weight_sqnr_db"] == pytest.approx(expected, rel=1e-3)


def test_a_pair_of_neighbours_that_would_saturate_gets_a_wider_scale() -> None:
    model = """<ir_version: 10, opset_import: ["" : 20]>
    model (float[m, 2] x) => (float[m, 1] y) <float[2, 1] w = {127.0, 127.0}> { [fc] y = MatMul(x, w) }"""
    (event,) = check_pass(QuantizeWeights(), before=model).rewrites
    dequantize = event.node.inputs[1]
    assert dequantize is not None
    node = dequantize.producer()
    assert node is not None
    assert node.inputs[0] is not None
    assert node.inputs[0].const_value is not None
    assert node.inputs[0].const_value.numpy().sum() <= 128
    (narrow,) = check_pass(QuantizeWeights(activation_bits=7), before=model).rewrites
    assert narrow.figures != event.figures


def test_a_weight_that_layers_share_is_stored_once_and_dequantized_for_each() -> None:
    shared = "[first] h = MatMul(x, w)  [second] k = MatMul(x, w)  y = Add(h, k)"
    result = check_pass(
        QuantizeWeights(),
        before=HEAD + f"{{ {shared} }}",
        after=HEAD
        + """{ d = DequantizeLinear<axis = 1>(codes, scales)  [first] h = MatMul(x, d)
               e = DequantizeLinear<axis = 1>(codes, scales)  [second] k = MatMul(x, e)  y = Add(h, k) }""",
    )
    rewritten = result.rewrites[0].node.graph
    assert rewritten is not None
    assert sorted(rewritten.initializers) == ["first.weight_codes", "first.weight_scales"]


def test_a_table_that_is_looked_up_too_stays_beside_the_codes() -> None:
    tied = HEAD.replace("x)", "x, int64[b, s] ids)")
    check_pass(
        QuantizeWeights(),
        before=tied + "{ [first] p = MatMul(x, w)  e = Gather(w, ids)  y = Add(p, e) }",
        after=tied
        + """{ d = DequantizeLinear<axis = 1>(codes, scales)  [first] p = MatMul(x, d)
               e = Gather(w, ids)  y = Add(p, e) }""",
    )


def test_excluded_layers_are_declined_and_stay_float() -> None:
    result = check_pass(
        QuantizeWeights(exclude=("^sec",)),
        before=HEAD + f"{{ {LAYER} }}",
        after=HEAD + f"{{ {QUANTIZED} [second] y = MatMul(h, u) }}",
    )
    assert [(event.where, event.reason) for event in result.declined] == [("second", "excluded by the recipe")]


def test_layers_that_are_not_included_are_declined_and_stay_float() -> None:
    result = check_pass(
        QuantizeWeights(include=("first",)),
        before=HEAD + f"{{ {LAYER} }}",
        after=HEAD + f"{{ {QUANTIZED} [second] y = MatMul(h, u) }}",
    )
    assert [(event.where, event.reason) for event in result.declined] == [("second", "not included by the recipe")]


def test_a_layer_that_is_included_and_excluded_is_left() -> None:
    before = HEAD + f"{{ {LAYER} }}"
    result = check_pass(QuantizeWeights(include=("first",), exclude=("first",)), before=before, after=before)
    assert [event.reason for event in result.declined] == ["excluded by the recipe", "not included by the recipe"]


def test_a_pattern_that_excludes_nothing_is_an_error() -> None:
    with pytest.raises(PatternError, match="matches none of the 2 linear layers"):
        check_pass(QuantizeWeights(exclude=("third",)), before=HEAD + f"{{ {LAYER} }}")


def test_a_pattern_that_is_no_regular_expression_is_an_error() -> None:
    with pytest.raises(PatternError, match="not a regular expression"):
        check_pass(QuantizeWeights(exclude=("(",)), before=HEAD + f"{{ {LAYER} }}")


def test_products_of_activations_are_left_alone() -> None:
    before = HEAD.replace("float[b, s, 2] y", "float[b, s, s] y") + (
        "{ t = Transpose<perm = [0, 2, 1]>(x)  [scores] y = MatMul(x, t) }"
    )
    assert not check_pass(QuantizeWeights(), before=before, after=before).changed


def layers(weight: schemes.Float, *names: str) -> ir.Model:
    """Layers of the same shape side by side, each of an input and a weight of its own; the float weights are known."""
    rows, columns = weight.shape
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        model ({", ".join(f"float[b, s, {rows}] {name}_x" for name in names)})
        => ({", ".join(f"float[b, s, {columns}] {name}_y" for name in names)})
        {{ {"  ".join(f"[{name}] {name}_y = MatMul({name}_x, {name}_w)" for name in names)} }}"""
    )
    for number, name in enumerate(names):
        value = graph.add_initializer(model, f"{name}_w", weight * np.float32(1 + number))
        graph.nodes(model, "MatMul")[number].replace_input_with(1, value)
    return model


def drawn(rows: int = 32, columns: int = 6) -> schemes.Float:
    return np.random.default_rng(5).standard_normal((rows, columns)).astype(np.float32)


def decoded(model: ir.Model, name: str) -> schemes.Float:
    node = graph.producer(next(node for node in model.graph if node.name == name).inputs[1], "DequantizeLinear")
    assert node is not None
    integers, scales = graph.constant(node.inputs[0]), graph.constant(node.inputs[1])
    assert integers is not None and integers.dtype == np.int8 and scales is not None
    return np.asarray(integers.astype(np.float32) * np.asarray(scales), dtype=np.float32)


@pytest.mark.parametrize("format", ["linear", "kmeans", "bcq"])
def test_a_weight_is_what_its_solver_says_and_its_codes_are_noted(format: Format) -> None:
    wanted = Weights(format=format, bits=3)
    model = layers(drawn(), "fc")
    result = QuantizeWeights(wanted).run(model, Context())
    coded = solve(drawn(), wanted.base, None, 8)
    np.testing.assert_array_equal(decoded(model, "fc"), coded.dequantized())
    origin = origin_of(model.graph.initializers["fc.weight_codes"])
    assert origin is not None and origin.coded.bits == 3 and not origin.by_rows
    assert float(result.rewrites[0].figures["weight_sqnr_db"]) > 10


def test_each_layer_gets_the_format_of_its_pattern() -> None:
    weights = Weights.model_validate({"bits": 4, "layers": {"^b$": {"format": "kmeans", "bits": 2}, "c": {"bits": 8}}})
    model = layers(drawn(), "a", "b", "c")
    result = QuantizeWeights(weights).run(model, Context())
    assert [event.reason for event in result.rewrites] == [
        "int4 per column",
        "2-bit kmeans per tensor",
        "int8 per column",
    ]
    assert [len(np.unique(decoded(model, name)[:, 0])) for name in "ab"] == [pytest.approx(12, abs=4), 4]
    assert origin_of(model.graph.initializers["c.weight_codes"]) is None


@pytest.mark.parametrize("patterns", [{"nothing": {"bits": 4}}, {"^a$": {"bits": 4}, "d": {}}])
def test_a_format_for_layers_that_are_not_there_is_an_error(patterns: dict[str, dict[str, int]]) -> None:
    weights = Weights.model_validate({"layers": patterns})
    with pytest.raises(PatternError, match=r"weights.layers pattern .* matches none of the 1 linear layers"):
        QuantizeWeights(weights).run(layers(drawn(), "a"), Context())


def test_groups_that_do_not_divide_the_rows_are_an_error_that_names_a_layer() -> None:
    with pytest.raises(RecipeError, match="24 does not divide the 32 rows of a and 1 other layers"):
        QuantizeWeights(Weights(bits=4, group_size=24)).run(layers(drawn(), "a", "b"), Context())


@pytest.mark.parametrize("bits", [8, 4])
def test_a_column_with_nan_is_an_error_that_names_the_layer(bits: int) -> None:
    weight = drawn()
    weight[3, 2] = np.nan
    with pytest.raises(GraphError, match="fc: column 2 of its weight holds NaN or infinity"):
        QuantizeWeights(Weights(bits=bits)).run(layers(weight, "fc"), Context())


@pytest.mark.parametrize("format", ["linear", "kmeans", "bcq"])
def test_columns_of_one_value_and_of_zeros_come_out_right(format: Format) -> None:
    weight = drawn()
    weight[:, 1], weight[:, 2] = 0.0, 0.75
    model = layers(weight, "fc")
    QuantizeWeights(Weights.model_validate({"format": format, "bits": 4, "codebook": "column"})).run(model, Context())
    assert np.abs(decoded(model, "fc")[:, 1]).max() <= 1e-30
    np.testing.assert_allclose(decoded(model, "fc")[:, 2], 0.75, rtol=0.01)


def correlated(names: Sequence[str], rows: int, loud: int = 0) -> list[Feed]:
    """Inputs whose channels follow each other, one of them much louder than the rest."""
    generator = np.random.default_rng(9)
    mix = generator.standard_normal((rows, rows)) / rows**0.5 + 1
    scale = np.where(np.arange(rows) == loud, 20, 1)
    return [
        {f"{name}_x": (generator.standard_normal((1, 40, rows)) @ mix * scale).astype(np.float32) for name in names}
        for _ in range(4)
    ]


def output_error(model: ir.Model, name: str, weight: schemes.Float, feeds: Sequence[Feed]) -> float:
    error = decoded(model, name) - weight
    return float(sum(np.square(feed[f"{name}_x"] @ error).sum() for feed in feeds))


@pytest.mark.parametrize(
    "option", [{"compensation": True}, {"format": "kmeans", "codebook": "column", "weighting": "hessian"}], ids=str
)
def test_a_solver_that_looks_at_the_inputs_loses_less_at_the_output(option: dict[str, object]) -> None:
    blind = option | {"compensation": False, "weighting": "none"}
    feeds = correlated(["fc"], 32)
    errors = []
    for given in (blind, option):
        model = layers(drawn(), "fc")
        QuantizeWeights(Weights.model_validate({"bits": 3} | given)).run(model, context_on(model.clone(), feeds))
        errors.append(output_error(model, "fc", drawn(), feeds))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({"compensation": True}, [["a_x", "b_x"], ["c_x", "d_x"], ["e_x"]]),
        ({"format": "kmeans", "weighting": "hessian"}, [["a_x", "b_x", "c_x", "d_x", "e_x"]]),
    ],
    ids=["whole", "diagonal"],
)
def test_hessians_are_held_a_few_at_a_time_and_always_of_the_float_graph(
    option: dict[str, object], expected: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scalefold.passes.quantize_weights.HESSIAN_BYTES", 2 * 8 * 32**2)
    names = ["a", "b", "c", "d", "e"]
    model, feeds = layers(drawn(), *names), correlated(names, 32)
    asked: list[list[str]] = []
    quantized_then: list[bool] = []

    def measure(current: ir.Model, requests: Requests) -> dict[str, Statistic]:
        asked.append(sorted(requests))
        quantized_then.append(graph.is_quantized(current))
        return collect(current, requests, feeds)

    QuantizeWeights(Weights.model_validate({"bits": 3} | option)).run(model, Context(measure=measure))
    assert asked == expected
    assert not any(quantized_then)


def test_the_inputs_of_layers_that_share_a_weight_add_up() -> None:
    model, feeds = layers(drawn(), "a", "b"), correlated(["a", "b"], 32)
    second = graph.nodes(model, "MatMul")[1]
    second.replace_input_with(1, graph.nodes(model, "MatMul")[0].inputs[1])
    options = Weights(bits=3, compensation=True)
    QuantizeWeights(options).run(model, context_on(model.clone(), feeds))
    rows = np.concatenate([feed[f"{name}_x"].reshape(-1, 32) for feed in feeds for name in "ab"]).astype(np.float64)
    expected = solve(drawn(), options.base, rows.T @ rows / len(rows), 8).dequantized()
    np.testing.assert_allclose(decoded(model, "a"), expected, rtol=1e-6)
    np.testing.assert_array_equal(decoded(model, "a"), decoded(model, "b"))


def test_a_loud_or_dead_channel_of_the_inputs_does_no_harm() -> None:
    feeds = correlated(["fc"], 32, loud=5)
    for feed in feeds:
        feed["fc_x"][..., 7] = 0
    model = layers(drawn(), "fc")
    QuantizeWeights(Weights(bits=4, compensation=True)).run(model, context_on(model.clone(), feeds))
    assert np.isfinite(decoded(model, "fc")).all()
    assert np.abs(decoded(model, "fc")[7] - drawn()[7]).max() < 1
