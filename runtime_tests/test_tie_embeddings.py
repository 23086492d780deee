from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import graph
from scalefold.compiler.decode_chain import FIELDS, origin_of
from scalefold.compiler.protocol import Context
from scalefold.compiler.recipe import Weights
from scalefold.compiler.runtime import Feed, Session
from scalefold.compiler.testing import check_pass
from scalefold.passes.pack_weights import PackWeights
from scalefold.passes.tie_embeddings import TieEmbeddings

V, H = 12, 4
FEEDS: list[Feed] = [
    {"ids": np.arange(12).reshape(2, 6), "x": np.linspace(-1, 1, 48, dtype=np.float32).reshape(2, 6, 4)}
]


def tied(factors: float = 1.0, noise: float = 0.0) -> ir.Model:
    """A look-up of a table and a linear layer of its transpose, channels divided by `factors`."""
    table = np.random.default_rng(3).standard_normal((V, H)).astype(np.float32)
    u = np.array([1.0, factors, 1.0, 1.0], dtype=np.float32)
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        model (int64[b, s] ids, float[b, s, {H}] x) => (float[b, s, {H}] e, float[b, s, {V}] y)
        {{ e = Gather<axis = 0>(table, ids)  [lm_head] y = MatMul(x, weight) }}"""
    )
    for node, index, name, array in (
        (graph.nodes(model, "Gather")[0], 0, "table", table),
        (graph.nodes(model, "MatMul")[0], 1, "weight", (table / u).T + np.float32(noise)),
    ):
        node.replace_input_with(index, graph.add_initializer(model, name, np.ascontiguousarray(array)))
    return model


def test_both_read_one_array_of_codes() -> None:
    model = tied()
    result = check_pass(TieEmbeddings(), before=model, feeds=FEEDS)
    assert [event.where for event in result.rewrites] == ["lm_head"]
    TieEmbeddings().run(model, _context())
    stored = [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.INT8]
    assert [value.const_value.shape.numpy() for value in stored if value.const_value] == [(V, H)]
    assert {node.op_type for node in graph.consumers(stored[0])} == {"Gather", "Transpose"}


@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_both_come_out_close_to_float(factor: float) -> None:
    before, after = tied(factor), tied(factor)
    TieEmbeddings().run(after, _context())
    wanted, got = Session(before).run(FEEDS[0]), Session(after).run(FEEDS[0])
    assert bool(graph.nodes(after, "Mul")[1:]) == (factor != 1.0)
    for name in wanted:
        # a channel that the migration has divided by u is stored u times coarser
        assert np.abs(wanted[name] - got[name]).max() < 0.01 * max(1, factor / 2) * np.abs(wanted[name]).max()


def test_another_weight_of_the_same_shape_is_left_alone() -> None:
    assert not check_pass(TieEmbeddings(), before=tied(noise=0.1), feeds=FEEDS).changed


def test_an_excluded_output_layer_keeps_the_float_table() -> None:
    model = tied()
    other = ir.node(
        "MatMul", [model.graph.outputs[1], graph.add_initializer(model, "other", np.ones((V, 3), np.float32))]
    )
    other.name, other.outputs[0].name = "other", "z"
    graph.insert_after(graph.nodes(model, "MatMul")[0], [other])
    model.graph.outputs.append(other.outputs[0])
    result = check_pass(TieEmbeddings(exclude=("lm_head",)), before=model, feeds=FEEDS)
    assert [event.reason for event in result.declined] == ["excluded by the recipe"]


@pytest.mark.parametrize(
    "weights",
    [Weights(bits=4), Weights(bits=4, group_size=2), Weights(format="kmeans", bits=3), Weights(format="bcq", bits=2)],
    ids=str,
)
def test_both_read_one_array_of_packed_codes(weights: Weights) -> None:
    model = tied()
    tie = TieEmbeddings(weights, bits=weights.bits)
    check_pass(tie, before=model, feeds=FEEDS)
    tie.run(model, _context())
    (stored,) = [value for value in model.graph.initializers.values() if origin_of(value) is not None]
    wanted = Session(model).run(FEEDS[0])
    check_pass(PackWeights(), before=model, feeds=FEEDS)
    PackWeights().run(model, _context())
    got = Session(model).run(FEEDS[0])
    np.testing.assert_array_equal(wanted["e"], got["e"])
    np.testing.assert_array_equal(wanted["y"], got["y"])
    codes = [value for name, value in model.graph.initializers.items() if name.startswith(f"{stored.name}_codes")]
    wanted_bytes = V * sum(-(-H * width // 8) for width in FIELDS[weights.bits])
    assert sum(value.const_value.nbytes for value in codes if value.const_value) == wanted_bytes


def test_an_output_layer_of_other_bits_is_not_tied() -> None:
    weights = Weights.model_validate({"layers": {"lm_head": {"bits": 4}}})
    result = check_pass(TieEmbeddings(weights), before=tied(), after=tied(), feeds=FEEDS)
    assert [event.reason for event in result.declined] == ["the layer has 4 bits and the table 8"]


def _context() -> Context:
    return Context()
