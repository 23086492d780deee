from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import graph, schemes
from scalefold.compiler.calibrate import collect
from scalefold.compiler.decoder import LOGITS, decoder_of, divergence
from scalefold.compiler.facts import row_range, summed_codes
from scalefold.compiler.protocol import Context, Requests
from scalefold.compiler.runtime import Feed, Session
from scalefold.compiler.stats import Statistic
from scalefold.passes.clip_ranges import current_grid, set_grid
from scalefold.passes.fit_activations import FitActivations
from scalefold.passes.insert_qdq import InsertQdq
from scalefold.passes.lower_integer_matmul import LowerIntegerMatmul
from scalefold.passes.quantize_weights import QuantizeWeights

SPIKED = "model.layers.0.mlp.down_proj"


@pytest.fixture
def quantized(decoder_models: dict[str, ir.Model]) -> tuple[ir.Model, Context]:
    """A Llama with a channel that only some tokens drive high, quantized by extremes, and what it was calibrated with."""
    return by_extremes(decoder_models["llama"].clone())


def by_extremes(model: ir.Model) -> tuple[ir.Model, Context]:
    up = next(layer for layer in graph.linear_layers(model) if layer.name == "model.layers.0.mlp.up_proj")
    weight = up.weights().copy()
    weight[:, 3] *= 400
    graph.replace_constant(model, up.matmul, 1, f"{up.name}.weight", weight)
    generator = np.random.default_rng(2)
    decoder = decoder_of(model)
    feeds: list[Feed] = [decoder.prompt_feed(generator.integers(0, 200, (1, 24))) for _ in range(6)]
    original = model.clone()

    def measure(current: ir.Model, requests: Requests) -> dict[str, Statistic]:
        return collect(current, requests, feeds)

    context = Context(measure=measure, search=feeds, float_model=original)
    QuantizeWeights().run(model, context)
    InsertQdq().run(model, context)
    return model, context


@pytest.mark.parametrize(("rows", "codes"), [(1.0, 0.0), (0.0, 1.0)], ids=["per token", "two codes"])
def test_a_layer_right_behind_another_reads_all_of_what_that_makes(
    decoder_models: dict[str, ir.Model], rows: float, codes: float
) -> None:
    model = decoder_models["llama"].clone()
    layer = next(layer for layer in graph.linear_layers(model) if layer.name == SPIKED)
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((layer.shape[0],) * 2))[0].astype(np.float32)
    weight = graph.add_initializer(model, "turn.weight", turn)
    first = ir.node("MatMul", [layer.x, weight], name="turn")
    graph.like(first.outputs[0], layer.x).name = "turned"
    graph.insert_before(layer.matmul, [first])
    layer.matmul.replace_input_with(0, first.outputs[0])
    graph.replace_constant(model, layer.matmul, 1, f"{layer.name}.turned", turn.T @ layer.weights())
    model, context = by_extremes(model)
    before = loss(model, context)
    FitActivations(target=1e-9, float_share=0, per_token_share=rows, two_codes_share=codes).run(model, context)
    assert {"turn", SPIKED} <= {*per_token(model), *in_two_codes(model)}
    assert loss(model, context) < 0.5 * before


def loss(model: ir.Model, context: Context) -> float:
    assert context.float_model is not None
    expected, actual = (Session(entry, outputs=[LOGITS]) for entry in (context.float_model, model))
    return float(
        np.mean([divergence(expected.run(feed)[LOGITS][0], actual.run(feed)[LOGITS][0]) for feed in context.search])
    )


def sizes_of(model: ir.Model) -> dict[str | None, int]:
    """The multiply-adds per token of each quantized layer."""
    return {
        node.name: int(np.prod(graph.whole_shape(node.inputs[1])))
        for node in graph.nodes(model, "MatMul")
        if graph.producer(node.inputs[1]) and node.inputs[1]
    }


def per_token(model: ir.Model) -> list[str]:
    return [
        (node.name or "").removesuffix(".input_q") for node in graph.nodes(model, "QuantizeLinear") if row_range(node)
    ]


def test_at_eight_bits_a_static_range_stays_that_of_all_tokens(quantized: tuple[ir.Model, Context]) -> None:
    model, context = quantized
    before = {node.name: current_grid(node, 8) for node in graph.nodes(model, "QuantizeLinear")}
    result = FitActivations().run(model, context)
    assert not result.changed
    assert {event.reason for event in result.declined} == {"best as it is"}
    assert before == {node.name: current_grid(node, 8) for node in graph.nodes(model, "QuantizeLinear")}


def test_ranges_per_token_bring_the_logits_closer(quantized: tuple[ir.Model, Context]) -> None:
    model, context = quantized
    before = loss(model, context)
    FitActivations(target=1e-9).run(model, context)
    assert loss(model, context) < before


def test_below_eight_bits_shares_of_tokens_are_clipped(quantized: tuple[ir.Model, Context]) -> None:
    model, context = quantized
    for node in graph.nodes(model, "QuantizeLinear"):
        grid = current_grid(node, 8)
        set_grid(model, node, schemes.activation_grid(grid.low, grid.high, 4))
    result = FitActivations(bits=4).run(model, context)
    assert any(event.reason == "clipped" for event in result.rewrites)


def test_the_layer_that_no_static_range_holds_is_per_token(quantized: tuple[ir.Model, Context]) -> None:
    model, context = quantized
    result = FitActivations(target=1e-9, per_token_share=0.3).run(model, context)
    relaxed = {event.where: event.figures for event in result.rewrites if "per token" in event.reason}
    assert set(relaxed) == set(per_token(model)) and SPIKED in relaxed
    for figures in relaxed.values():
        assert float(figures["sqnr_db"]) > float(figures["sqnr_db_static"])


def test_a_target_that_is_met_leaves_every_range_static(quantized: tuple[ir.Model, Context]) -> None:
    model, context = quantized
    FitActivations(target=100.0).run(model, context)
    assert not per_token(model)


def test_no_more_than_the_share_becomes_per_token(quantized: tuple[ir.Model, Context]) -> None:
    model, context = quantized
    sizes = sizes_of(model)
    FitActivations(target=1e-9, per_token_share=0.2).run(model, context)
    read = [
        node
        for node in graph.nodes(model, "MatMul")
        if (dq := graph.producer(node.inputs[0], "DequantizeLinear")) is not None
        and row_range(graph.producer(dq.inputs[0], "QuantizeLinear"))
    ]
    share = sum(sizes[node.name] for node in read) / sum(sizes.values())
    assert 0 < share <= 0.2


def test_a_second_run_changes_nothing(quantized: tuple[ir.Model, Context]) -> None:
    model, context = quantized
    FitActivations(target=1e-9).run(model, context)
    assert not FitActivations(target=1e-9).run(model, context).changed


def in_two_codes(model: ir.Model) -> list[str]:
    return [node.name or "" for node in graph.nodes(model, "MatMul") if summed_codes(node) is not None]


def test_two_codes_come_before_ranges_per_token_and_do_better(quantized: tuple[ir.Model, Context]) -> None:
    model, context = quantized
    per_token_loss = loss_of(FitActivations(target=1e-9, per_token_share=0.3), model.clone(), context)
    before = loss(model, context)
    named = {node.name: node.outputs[0].name for node in graph.nodes(model, "MatMul")}
    result = FitActivations(target=1e-9, per_token_share=0, two_codes_share=0.3).run(model, context)
    changed = {event.where for event in result.rewrites if "two codes" in event.reason}
    assert SPIKED in changed and changed == set(in_two_codes(model)) and not per_token(model)
    assert loss(model, context) < min(before, 1.05 * per_token_loss)
    sums = {node.name: total for node in graph.nodes(model, "MatMul") if (total := summed_codes(node)) is not None}
    assert all(total.outputs[0].name == named[layer] for layer, total in sums.items())


def loss_of(candidate: FitActivations, model: ir.Model, context: Context) -> float:
    candidate.run(model, context)
    return loss(model, context)


def test_no_more_than_the_share_is_done_twice(quantized: tuple[ir.Model, Context]) -> None:
    model, context = quantized
    sizes = sizes_of(model)
    FitActivations(target=1e-9, per_token_share=0, two_codes_share=0.2).run(model, context)
    assert 0 < sum(sizes[name] for name in in_two_codes(model)) <= 0.2 * sum(sizes.values())


def test_ranges_per_token_follow_where_two_codes_are_not_enough(quantized: tuple[ir.Model, Context]) -> None:
    model, context = quantized
    FitActivations(target=1e-9, per_token_share=0.3, two_codes_share=0.2).run(model, context)
    assert in_two_codes(model) and per_token(model) and not set(in_two_codes(model)) & set(per_token(model))
    assert not FitActivations(target=1e-9, per_token_share=0.3, two_codes_share=0.2).run(model, context).changed


def test_below_eight_bits_there_is_one_code(quantized: tuple[ir.Model, Context]) -> None:
    model, context = quantized
    FitActivations(bits=6, target=1e-9, per_token_share=0, two_codes_share=1.0, float_share=0).run(model, context)
    assert not in_two_codes(model)


def test_both_products_become_integer_kernels_and_give_what_was_written(quantized: tuple[ir.Model, Context]) -> None:
    model, context = quantized
    FitActivations(target=1e-9, per_token_share=0, two_codes_share=0.3, float_share=0).run(model, context)
    written = in_two_codes(model)
    feed = context.search[0]
    wanted = Session(model, optimize=False).run(feed)[LOGITS]
    LowerIntegerMatmul().run(model, Context())
    fused = {node.name: node for node in graph.nodes(model, "MatMulIntegerToFloat")}
    assert set(written) | {f"{name}.remainder" for name in written} <= set(fused)
    assert all(summed_codes(fused[name]) is not None for name in written)
    assert np.abs(Session(model).run(feed)[LOGITS] - wanted).max() < 1e-3 * np.abs(wanted).max()


def in_float(model: ir.Model) -> list[str]:
    return [layer.name for layer in graph.linear_layers(model)]


def test_layers_stay_in_float_where_even_ranges_per_token_are_not_enough(quantized: tuple[ir.Model, Context]) -> None:
    model, context = quantized
    before = loss(model, context)
    result = FitActivations(target=1e-9, per_token_share=0, float_target=1e-9, float_share=0.5).run(model, context)
    left = [event.where for event in result.rewrites if "float" in event.reason]
    assert SPIKED in left and set(left) <= set(in_float(model))
    assert loss(model, context) < before


def test_no_more_than_the_share_stays_in_float(quantized: tuple[ir.Model, Context]) -> None:
    model, context = quantized
    sizes = sizes_of(model)
    FitActivations(target=1e-9, per_token_share=0, float_target=1e-9, float_share=0.2).run(model, context)
    assert 0 < sum(sizes[name] for name in in_float(model)) <= 0.2 * sum(sizes.values())


def test_no_layer_stays_in_float_where_the_logits_are_close_enough(quantized: tuple[ir.Model, Context]) -> None:
    model, context = quantized
    FitActivations(target=1e-9, float_target=100.0).run(model, context)
    assert not in_float(model)
