from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import graph
from scalefold.compiler.decode_chain import origin_of, remember
from scalefold.compiler.facts import weight_dequantizer
from scalefold.compiler.kernel_timing import Kernel
from scalefold.compiler.protocol import Context, PassResult
from scalefold.compiler.recipe import Weights
from scalefold.compiler.runtime import Session
from scalefold.compiler.schemes import activation_grid
from scalefold.compiler.weight_formats import Grid
from scalefold.passes import lower_block_matmul
from scalefold.passes.insert_qdq import quantize_input
from scalefold.passes.lower_block_matmul import LowerBlockMatmul
from scalefold.passes.quantize_weights import QuantizeWeights


def layer(k: int = 96, n: int = 24, **wanted: Any) -> ir.Model:
    """One linear layer whose weight is quantized as wanted."""
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]>\n'
        f"model (float[b, s, {k}] x) => (float[b, s, {n}] y)<float[{k}, {n}] w, float[{n}] bias>"
        "{ [fc] p = MatMul(x, w)  y = Add(p, bias) }"
    )
    generator = np.random.default_rng(3)
    arrays = {"w": generator.standard_normal((k, n)), "bias": generator.standard_normal(n)}
    for name, array in arrays.items():
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(array.astype(np.float32), name=name)
        model.graph.register_initializer(value)
    QuantizeWeights(Weights(**{"bits": 4, **wanted})).run(model, Context())
    return model


def weight_of(model: ir.Model) -> np.ndarray[Any, Any]:
    dequantize = weight_dequantizer(graph.nodes(model, "MatMul")[0])
    assert dequantize is not None
    origin = origin_of(dequantize.inputs[0])
    assert origin is not None
    return origin.coded.dequantized()


def product(model: ir.Model, k: int) -> np.ndarray[Any, Any]:
    """What the layer makes of each unit vector, without its bias: the rows of its weight."""
    out = Session(model).run({"x": np.eye(k, dtype=np.float32)[None]})["y"][0]
    return np.asarray(out - Session(model).run({"x": np.zeros((1, 1, k), dtype=np.float32)})["y"][0])


@pytest.mark.parametrize(
    ("k", "group_size"), [(96, 32), (128, 128), (96, 16), (96, None), (80, None)], ids=lambda value: str(value)
)
def test_the_kernel_multiplies_with_the_weight_that_was_solved(k: int, group_size: int | None) -> None:
    model = layer(k, group_size=group_size, solver="rtn")
    weight = weight_of(model)
    result = LowerBlockMatmul().run(model, Context())
    assert not result.declined and [node.op_type for node in model.graph] == ["MatMulNBits", "Add"]
    np.testing.assert_allclose(product(model, k), weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [256, 192, 80])
@pytest.mark.parametrize("symmetric", [True, False])
def test_8_bit_weights_are_multiplied_as_they_are(k: int, symmetric: bool) -> None:
    model = layer(k, bits=8, symmetric=symmetric)
    dequantize = weight_dequantizer(graph.nodes(model, "MatMul")[0])
    assert dequantize is not None
    wanted = np.multiply(*(np.asarray(graph.constant(value), dtype=np.float32) for value in dequantize.inputs[:2]))
    result = LowerBlockMatmul().run(model, Context())
    node = graph.nodes(model, "MatMulNBits")[0]
    assert not result.declined and (graph.attribute(node, "bits"), len(node.inputs)) == (8, 3)
    np.testing.assert_allclose(product(model, k), wanted, rtol=1e-5, atol=1e-5)


def test_a_table_that_is_looked_up_too_is_left_to_the_integer_kernel() -> None:
    model = layer(32, n=8, bits=8)
    codes = next(value for name, value in model.graph.initializers.items() if name.endswith("weight_codes"))
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["n"]))
    model.graph.inputs.append(ids)
    model.graph.append(ir.node("Gather", [codes, ids], {"axis": 1}))
    result = LowerBlockMatmul().run(model, Context())
    assert [event.reason for event in result.declined] == [
        "its weight is a table that is looked up too, and stored once"
    ]


def test_a_zero_that_lies_on_another_code_is_told_to_the_kernel() -> None:
    model = layer(32, n=2, group_size=16, solver="rtn")
    dequantize = weight_dequantizer(graph.nodes(model, "MatMul")[0])
    assert dequantize is not None and dequantize.inputs[0] is not None
    origin = origin_of(dequantize.inputs[0])
    assert origin is not None and isinstance(origin.coded.decoder, Grid)
    steps = np.array([[2, 3], [1, 4]], dtype=np.int8)
    moved = Grid(offsets=-steps * np.array([[3, 8], [8, 5]], dtype=np.int8), multipliers=steps)
    coded = replace(origin.coded, decoder=moved)
    remember(dequantize.inputs[0], coded)
    LowerBlockMatmul().run(model, Context())
    np.testing.assert_allclose(product(model, 32), coded.dequantized(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"bits": 3}, "its weight is neither 4-bit and linear nor 8-bit"),
        ({"bits": 6}, "its weight is neither 4-bit and linear nor 8-bit"),
        ({"format": "kmeans"}, "its weight is neither 4-bit and linear nor 8-bit"),
        ({"group_size": 32, "symmetric": False}, "its zero is not one of its codes"),
        ({"group_size": 24}, "groups of 24 rows are no blocks of the kernel: they must be a power of two from 16"),
        ({"group_size": 8}, "groups of 8 rows are no blocks of the kernel: they must be a power of two from 16"),
    ],
)
def test_what_the_kernel_cannot_take_is_declined(wanted: dict[str, Any], reason: str) -> None:
    model = layer(**wanted)
    result = LowerBlockMatmul().run(model, Context())
    assert not result.changed and [event.reason for event in result.declined] == [reason]


def test_a_quantized_input_is_left_to_the_integer_kernel() -> None:
    model = layer(group_size=32)
    matmul = graph.nodes(model, "MatMul")[0]
    assert matmul.inputs[0] is not None
    quantize_input(model, matmul.inputs[0], [matmul], activation_grid(-1, 1))
    assert [event.reason for event in LowerBlockMatmul().run(model, Context()).declined] == [
        "its input is quantized already"
    ]


@pytest.mark.parametrize("faster", [True, False])
def test_measured_takes_the_faster_kernel(monkeypatch: pytest.MonkeyPatch, faster: bool) -> None:
    asked: list[tuple[int, int, Kernel, tuple[int, ...]]] = []

    def timed(k: int, n: int, blocks: Kernel, rows: tuple[int, ...]) -> bool:
        asked.append((k, n, blocks, rows))
        return faster

    monkeypatch.setattr(lower_block_matmul, "faster_in_blocks", timed)
    model = layer(group_size=32, solver="rtn")
    result: PassResult = LowerBlockMatmul("measured", (1, 64)).run(model, Context())
    assert asked == [(96, 24, Kernel(None, 32, 4), (1, 64))]
    assert result.changed == faster
    assert faster or result.declined[0].reason == "the integer kernel is faster at 1 and 64 rows"
