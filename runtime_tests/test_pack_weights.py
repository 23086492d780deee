from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import artifact, graph
from scalefold.compiler.decode_chain import remember
from scalefold.compiler.facts import weight_array
from scalefold.compiler.protocol import Context
from scalefold.compiler.recipe import WeightFormat
from scalefold.compiler.runtime import Feed, Session, optimized_graph
from scalefold.compiler.testing import check_pass, parse
from scalefold.compiler.verify import layer_kernels
from scalefold.compiler.weight_formats import CodedWeight
from scalefold.passes.pack_weights import PackWeights
from scalefold.passes.quantize_weights import quantized

K, N = 32, 6
BODIES = {
    "onnxruntime-cpu": "[fc] y = com.microsoft.MatMulIntegerToFloat(q, codes, s, scales, z)",
    "qdq": "x = DequantizeLinear(q, s, z)  d = DequantizeLinear<axis = 1>(codes, scales)  [fc] y = MatMul(x, d)",
}
FORMATS = [
    WeightFormat(format=format, bits=bits, group_size=group, symmetric=symmetric, codebook=codebook)
    for bits in range(1, 8)
    for format, group, symmetric, codebook in (
        ("linear", None, True, "tensor"),
        ("linear", None, False, "tensor"),
        ("linear", 16 if bits < 7 else None, True, "tensor"),
        ("linear", 8 if bits < 7 else None, False, "tensor"),
        ("kmeans", None, True, "tensor"),
        ("kmeans", None, True, "column"),
        ("bcq", None, True, "tensor"),
        ("bcq", 16, True, "tensor"),
    )
]


def layer(target: str, wanted: WeightFormat, opset: int = 20) -> tuple[ir.Model, CodedWeight]:
    """A layer whose int8 weight [K, N] was decoded from fewer bits."""
    weight = np.random.default_rng(3).standard_normal((K, N)).astype(np.float32)
    integers, scales, coded = quantized(weight, wanted, None, 8, "fc")
    model = parse(
        f"""<ir_version: 9, opset_import: ["" : {opset}, "com.microsoft" : 1]>
        model (uint8[b, t, {K}] q) => (float[b, t, {N}] y)
        <float s = {{0.02}}, uint8 z = {{100}}, int8[1, 1] codes = {{0}}, float[1] scales = {{1.0}}>
        {{ {BODIES[target]} }}"""
    )
    assert coded is not None
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            if value is not None and value.name == "codes":
                remember(graph.replace_constant(model, node, index, "codes", integers), coded)
            elif value is not None and value.name == "scales":
                graph.replace_constant(model, node, index, "scales", scales)
    return model, coded


def table(wanted: WeightFormat, rank: str = "[b, s]", tied: bool = False) -> ir.Model:
    """A look-up in an int8 table [N, K], and the product with its transpose where it is tied."""
    array = np.random.default_rng(4).standard_normal((N, K)).astype(np.float32)
    integers, _, coded = quantized(array.T, wanted, None, None, "table")
    second = "  [t] w = Transpose<perm = [1, 0]>(codes)  n = Cast<to = 6>(w)" if tied else "  n = Identity(ids)"
    model = parse(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        model (int64{rank} ids) => (int32[a, b, K] y, {"int32[K, N]" if tied else "int64[e, f]"} n)
        <int8[1, 1] codes = {{0}}> {{ r = Gather<axis = 0>(codes, ids)  y = Cast<to = 6>(r) {second} }}"""
    )
    gather, readers = graph.nodes(model, "Gather")[0], graph.nodes(model, "Transpose")
    value = graph.add_initializer(model, "table_codes", integers.T)
    for node in (gather, *readers):
        node.replace_input_with(0, value)
    model.graph.initializers.pop("codes")
    assert coded is not None
    remember(value, coded, by_rows=True)
    return model


@pytest.mark.parametrize("target", BODIES)
@pytest.mark.parametrize("bits", range(1, 8))
def test_every_format_decodes_to_the_solvers_weights_bit_for_bit(target: str, bits: int) -> None:
    for wanted in FORMATS:
        if wanted.bits == bits:
            model, coded = layer(target, wanted)
            PackWeights().run(model, Context())
            node = graph.nodes(model, "DequantizeLinear" if target == "qdq" else "MatMulIntegerToFloat")[-1]
            integers = weight_array(node.inputs[0 if target == "qdq" else 1])
            scales = graph.constant(node.inputs[1 if target == "qdq" else 3])
            assert integers is not None and scales is not None
            np.testing.assert_array_equal(
                integers.astype(np.float32) * np.asarray(scales, dtype=np.float32),
                coded.dequantized(),
                err_msg=str(wanted),
            )


@pytest.mark.parametrize("target", BODIES)
@pytest.mark.parametrize("wanted", [entry for entry in FORMATS if entry.bits in (3, 4)], ids=str)
def test_packing_changes_no_bit_of_the_output(target: str, wanted: WeightFormat) -> None:
    model, _ = layer(target, wanted)
    result = check_pass(PackWeights(), before=model)
    (event,) = result.rewrites
    assert event.reason == f"{wanted.bits} bits"
    assert float(event.figures["bits_per_weight"]) > wanted.bits


@pytest.mark.parametrize("target", BODIES)
@pytest.mark.parametrize("wanted", [entry for entry in FORMATS if entry.bits in (2, 4, 7)], ids=str)
def test_onnxruntime_folds_the_chain_and_packs_int8_for_its_kernel(
    target: str, wanted: WeightFormat, tmp_path: Path
) -> None:
    model, coded = layer(target, wanted)
    PackWeights().run(model, Context())
    artifact.save_model(model, tmp_path)
    optimized = optimized_graph(tmp_path / artifact.MODEL)
    assert [node.op_type for node in optimized.graph] == ["MatMulIntegerToFloat"]
    weight = optimized.graph[0].inputs[1]
    assert weight is not None and weight.is_initializer() and weight.dtype == ir.DataType.INT8
    assert graph.whole_shape(weight) == coded.codes.shape


@pytest.mark.parametrize("target", BODIES)
def test_the_sums_of_a_binary_coded_weight_are_no_layer_of_their_own(target: str, tmp_path: Path) -> None:
    model, _ = layer(target, WeightFormat(format="bcq", bits=4))
    PackWeights().run(model, Context())
    artifact.save_model(model, tmp_path)
    assert graph.nodes(model, "MatMulInteger")
    assert [(kernel.name, kernel.kernel) for kernel in layer_kernels(tmp_path / artifact.MODEL)] == [
        ("fc", "MatMulIntegerToFloat")
    ]


@pytest.mark.parametrize("opset", [17, 20])
def test_an_older_model_gets_bytes_where_a_newer_gets_a_4_bit_tensor(opset: int) -> None:
    model, _ = layer("onnxruntime-cpu", WeightFormat(bits=4, solver="rtn"), opset)
    PackWeights().run(model, Context())
    types = {value.dtype for value in model.graph.initializers.values()}
    assert (ir.DataType.INT4 in types) == (opset == 20)
    assert (model.graph.opset_imports[""], model.ir_version) == ((21, 10) if opset == 20 else (17, 9))


def test_a_weight_that_layers_share_is_stored_once() -> None:
    model, _ = layer("qdq", WeightFormat(bits=4))
    first = graph.nodes(model, "DequantizeLinear")[1]
    second = ir.node("DequantizeLinear", list(first.inputs), {"axis": 1})
    product = ir.node("MatMul", [graph.nodes(model, "MatMul")[0].inputs[0], second.outputs[0]])
    model.graph.extend([second, product])
    product.outputs[0].name, product.outputs[0].type = "other", ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.append(product.outputs[0])
    assert len(check_pass(PackWeights(), before=model).rewrites) == 1
    PackWeights().run(model, Context())
    assert first.inputs[0] is second.inputs[0]


@pytest.mark.parametrize("wanted", [entry for entry in FORMATS if entry.bits in (3, 4)], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["alone", "tied"])
def test_only_the_rows_of_a_table_that_are_looked_up_are_decoded(wanted: WeightFormat, tied: bool) -> None:
    feeds: list[Feed] = [{"ids": np.array([[0, 5, -1], [2, 2, 3]])}]
    model = table(wanted, tied=tied)
    check_pass(PackWeights(), before=model, feeds=feeds)
    PackWeights().run(model, Context())
    assert not [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.UINT4]
    rows = next(node for node in model.graph if node.op_type == "Gather")
    assert rows.inputs[0] is not None and rows.inputs[0].dtype in (ir.DataType.UINT8, ir.DataType.INT8)
    assert Session(model).run(feeds[0])["y"].shape == (2, 3, K)


def test_a_table_whose_ids_have_no_known_rank_stays_as_it_is() -> None:
    model = table(WeightFormat(bits=4))
    model.graph.inputs[0].shape = None
    result = PackWeights().run(model, Context())
    assert [event.reason for event in result.declined] == ["it is looked up by ids of unknown rank"]
    assert not result.changed
