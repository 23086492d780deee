"""The torch executor computes what onnxruntime computes, and gradients pass through its quantizers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from scalefold.compiler import graph
from scalefold.compiler.decoder import decoder_of
from scalefold.compiler.errors import GraphError
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.runtime import Array, Feed, Session
from scalefold.compiler.testing import made_up_feeds, parse
from scalefold.compiler.torch_graph import TorchGraph, tensor_from

FAMILIES = ("gpt2", "opt", "bloom", "llama")


def run(model: ir.Model, feed: Feed) -> dict[str, Array]:
    executor = TorchGraph(model, list(model.graph.outputs))
    with torch.no_grad():
        found = executor.run({name: tensor_from(array) for name, array in feed.items()})
    return {name: value.numpy() for name, value in found.items()}


def assert_close(got: Array, wanted: Array, name: str) -> None:
    assert got.shape == wanted.shape, name
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * float(np.abs(wanted).max(initial=1e-30)), err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_gives_what_onnxruntime_gives_behind_padding_and_a_cache(
    decoder_models: dict[str, ir.Model], family: str
) -> None:
    model = decoder_models[family]
    decoder = decoder_of(model)
    ids = np.random.default_rng(0).integers(5, 200, (2, 14))
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    session = Session(model)
    first = session.run(decoder.prompt_feed(ids[:, :9], mask[:, :9]))
    for feed in (
        decoder.prompt_feed(ids, mask),
        decoder.prompt_feed(ids[:, 9:], mask, decoder.next_cache(first)),
    ):
        got, wanted = run(model, feed), session.run(feed)
        assert got.keys() == wanted.keys()
        for name in wanted:
            kept = mask[:, -wanted[name].shape[1] :] != 0 if name == "logits" else ...
            assert_close(got[name][kept], wanted[name][kept], name)


def test_an_encoder_gives_what_onnxruntime_gives(float_model: Path, fresh_feeds: list[Feed]) -> None:
    model = read_onnx(float_model)
    session = Session(model)
    for feed in fresh_feeds[:3]:
        wanted = session.run(feed)
        for name, got in run(model, feed).items():
            assert_close(got, wanted[name], name)


QDQ = """
<ir_version: 10, opset_import: ["" : 21]>
m (float[2, 4] x) => (float[2, 3] y)
<float s = {0.02}, uint8 z = {120}, float low = {-1.5}, float high = {1.4},
 int8[4, 3] codes = {1, -127, 3, 4, 5, -6, 7, 80, 9, 10, 11, 12}, float[3] scales = {0.1, 0.01, 0.5}>
{
    c = Clip(x, low, high)
    q = QuantizeLinear(c, s, z)
    d = DequantizeLinear(q, s, z)
    w = DequantizeLinear<axis = 1>(codes, scales)
    y = MatMul(d, w)
}
"""


def test_a_quantized_graph_gives_what_onnxruntime_gives_for_every_code() -> None:
    model = parse(QDQ)
    session = Session(model, optimize=False)
    for start in range(0, 256, 8):
        x = (np.arange(start, start + 8, dtype=np.float32).reshape(2, 4) - 128) * np.float32(0.0151)
        np.testing.assert_allclose(run(model, {"x": x})["y"], session.run({"x": x})["y"], rtol=1e-5, atol=1e-6)


def test_gradients_pass_through_rounding_and_stop_at_the_clamp() -> None:
    model = parse(QDQ)
    x = torch.tensor([[0.013, -0.5, 9.0, -9.0], [0.3, 0.2, 0.1, 0.0]], requires_grad=True)
    executor = TorchGraph(model, list(model.graph.outputs))
    torch.autograd.backward(executor.run({"x": x})["y"].sum())
    weight = np.array([[1, -127, 3], [4, 5, -6], [7, 80, 9], [10, 11, 12]]) * np.array([0.1, 0.01, 0.5])
    inside = np.array([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), inside * weight.sum(axis=1), rtol=1e-5)


def test_gradients_reach_scales_and_codes_that_stand_in_for_constants() -> None:
    model = parse(QDQ)
    scales = torch.tensor([0.1, 0.01, 0.5], requires_grad=True)
    executor = TorchGraph(model, list(model.graph.outputs))
    x = torch.ones(2, 4)
    found = executor.run({"x": x}, {"scales": scales})["y"]
    torch.autograd.backward(found.sum())
    assert scales.grad is not None
    np.testing.assert_allclose(scales.grad.numpy() * scales.detach().numpy(), found.detach().sum(0).numpy(), rtol=1e-5)


def test_part_of_a_graph_runs_from_values_captured_before(decoder_models: dict[str, ir.Model]) -> None:
    model = decoder_models["gpt2"]
    norms = [node.inputs[0] for node in graph.nodes(model, "LayerNormalization")]
    start, end = norms[2], norms[4]
    assert start is not None and end is not None
    part = TorchGraph(model, [end], [start])
    feed = decoder_of(model).prompt_feed(np.arange(5, 17)[None])
    captured = Session(model, outputs=[start.name or "", end.name or ""]).run(feed)
    given = {name: tensor_from(array) for name, array in {**feed, **captured}.items()}
    assert start in part.inputs
    assert sum(node.op_type == "Softmax" for node in part.nodes) == 1
    assert_close(part.run(given)[end.name or ""].numpy(), captured[end.name or ""], "the block")


def test_what_a_node_computes_with_can_be_replaced() -> None:
    model = parse(QDQ)
    executor = TorchGraph(model, list(model.graph.outputs))
    (matmul,) = graph.nodes(model, "MatMul")
    x = torch.ones(2, 4)
    doubled = executor.run({"x": x}, operands={matmul: lambda entries: [entries[0] * 2, entries[1]]})
    torch.testing.assert_close(doubled["y"], 2 * executor.run({"x": x})["y"])


def test_weights_are_read_where_they_lie() -> None:
    model = parse(QDQ)
    scales = np.array([0.1, 0.01, 0.5], dtype=np.float32)
    _, weight = graph.nodes(model, "DequantizeLinear")
    value = graph.replace_constant(model, weight, 1, "scales", scales)
    x = torch.ones(2, 4)
    executor = TorchGraph(model, list(model.graph.outputs))
    before = executor.run({"x": x})["y"].clone()
    assert value.const_value is not None
    value.const_value.numpy()[:] *= 2
    torch.testing.assert_close(executor.run({"x": x})["y"], 2 * before)


SMALL_OPERATORS = """
<ir_version: 10, opset_import: ["" : 20]>
m (float[2, 3, 4] x, int64[2] i) => (float[N, M] y, float[A, B, C] r, float[D, E, F] c, float[G, H] t, float[P, Q, R] g)
<int64[2] starts = {3, -1}, int64[2] ends = {0, -5}, int64[2] axes = {2, 1}, int64[2] steps = {-2, -1},
 int64[1] last = {-1}, int64 axis = {2}, int64[1] zero = {0}, int64[2] flat = {0, -1}>
{
    back = Slice(x, starts, ends, axes, steps)
    y = Reshape(back, flat)
    high = ReduceMax<keepdims = 1>(x, last)
    low = ReduceMin<keepdims = 1>(x, last)
    r = Sub(high, low)
    c = CumSum<exclusive = 1, reverse = 1>(x, axis)
    mean = ReduceMean<keepdims = 0>(x, last)
    t = Trilu<upper = 0>(mean)
    g = Gather<axis = 1>(x, i)
}
"""


def test_operators_of_foreign_graphs_follow_their_definition() -> None:
    model = parse(SMALL_OPERATORS)
    session = Session(model, optimize=False)
    (feed, _) = made_up_feeds(model)
    feed = {**feed, "i": np.array([-1, 0])}
    got, wanted = run(model, feed), session.run(feed)
    for name in wanted:
        assert_close(got[name], wanted[name], name)


def test_an_unknown_operator_is_one_sentence() -> None:
    model = parse(QDQ.replace("MatMul(d, w)", "Det(d)"))
    with pytest.raises(GraphError, match=r"ai\.onnx::Det has no gradient here; learn on the float or QDQ graph"):
        TorchGraph(model, list(model.graph.outputs))


def test_a_feed_that_lacks_a_value_or_does_not_fit_is_one_sentence() -> None:
    executor = TorchGraph(model := parse(QDQ), list(model.graph.outputs))
    with pytest.raises(GraphError, match="the value x: it is not in the feed"):
        executor.run({})
    with pytest.raises(GraphError, match=r"MatMul cannot be computed \("):
        executor.run({"x": torch.ones(2, 5)})
