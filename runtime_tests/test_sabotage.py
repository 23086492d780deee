"""A compiled model, broken in the ways that people break one: `scalefold verify` names layer, fault and remedy."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import CompileReport, graph
from scalefold.compiler.facts import weight_array, weight_dequantizer
from scalefold.compiler.runtime import Array, Feed, Session

Cli = Callable[..., subprocess.CompletedProcess[str]]
LAYER = "encoder.layer.1.output.dense"
QUERY = "encoder.layer.0.attention.self.query"
POOLER = "pooler.dense"
"""The one layer whose input has two dimensions."""


def node_of(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def set_constant(model: ir.Model, name: str, array: Array) -> ir.Value:
    """Give an initializer, new or not, an array."""
    value = model.graph.initializers.get(name) or graph.add_initializer(model, name, array)
    value.const_value = ir.tensor(array, name=name)
    value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(array.dtype)), ir.Shape(array.shape)
    return value


def quantize_as(model: ir.Model, scale: Array, zero: Array) -> None:
    """Give the layer's activation another scale and zero point."""
    set_constant(model, f"{LAYER}.input_scale", scale)
    set_constant(model, f"{LAYER}.input_zero_point", zero)
    node_of(model, f"{LAYER}.input_q").outputs[0].type = ir.TensorType(ir.DataType.from_numpy(zero.dtype))


def requantize_to_int8(model: ir.Model) -> None:
    quantize_as(model, np.array(0.05, np.float32), np.array(0, np.int8))


def requantize_to_uint16(model: ir.Model) -> None:
    model.graph.opset_imports[""] = 21
    quantize_as(model, np.array(1e-4, np.float32), np.array(32768, np.uint16))


def quantize_per_channel(model: ir.Model) -> None:
    quantize_as(model, np.full(128, 0.05, np.float32), np.full(128, 128, np.uint8))


def drop_the_pair(model: ir.Model) -> None:
    quantize = node_of(model, f"{LAYER}.input_q")
    node_of(model, LAYER).replace_input_with(0, quantize.inputs[0])
    graph.sweep(model)


def rescale_one_side(model: ir.Model) -> None:
    node_of(model, f"{LAYER}.input_dq").replace_input_with(
        1, set_constant(model, "rescaled", np.array(0.5, np.float32))
    )


def scale_after_the_pair(model: ir.Model) -> None:
    """Smoothing put where it cannot be folded: between the DequantizeLinear and the product."""
    product = node_of(model, LAYER)
    factors = set_constant(model, "smooth", np.linspace(0.5, 2, 128, dtype=np.float32))
    smooth = ir.Node("", "Mul", [product.inputs[0], factors])
    graph.insert_before(product, [smooth])
    product.replace_input_with(0, smooth.outputs[0])


def float_bias_of_two_dimensions(model: ir.Model) -> None:
    dequantize = node_of(model, f"{POOLER}.bias_dq")
    bias = set_constant(model, "bias", np.ones(64, np.float32))
    graph.bypass(dequantize.outputs[0], bias)
    graph.sweep(model)


def bias_without_a_weight_zero_point(model: ir.Model) -> None:
    node_of(model, f"{POOLER}.weight_dq").resize_inputs(2)


def fix_the_shapes(model: ir.Model) -> None:
    """What `make_dynamic_shape_fixed` does."""
    for value in model.graph.inputs:
        value.shape = ir.Shape((1, 16))
    for node in model.graph:
        for out in node.outputs:
            out.shape = None


def gemm_with_alpha(model: ir.Model) -> None:
    product = node_of(model, POOLER)
    add = graph.only_consumer(product.outputs[0], "Add")
    assert add is not None
    bias = graph.other_input(add, product.outputs[0])
    gemm = ir.Node("", "Gemm", [*product.inputs, bias], [ir.AttrFloat32("alpha", 0.5)], name=POOLER)
    graph.insert_before(add, [gemm])
    graph.bypass(add.outputs[0], gemm.outputs[0])
    product.name = "unused"
    graph.sweep(model)


def share_one_dequantizer(model: ir.Model) -> None:
    """Two products that read one int4 weight: onnxruntime fuses a DequantizeLinear with one reader alone."""
    model.graph.opset_imports[""] = 21
    codes = graph.add_initializer(model, "shared_codes", np.zeros(1, np.int8))
    codes.const_value = ir.tensor(np.clip(weight_of(model, QUERY), -7, 7), dtype=ir.DataType.INT4, name="shared_codes")
    codes.type, codes.shape = ir.TensorType(ir.DataType.INT4), ir.Shape((64, 64))
    scales = set_constant(model, "shared_scales", np.full((2, 64), 0.01, np.float32))
    blocks = {"axis": ir.AttrInt64("axis", 0), "block_size": ir.AttrInt64("block_size", 32)}
    dequantize = ir.Node("", "DequantizeLinear", [codes, scales], list(blocks.values()))
    graph.insert_before(node_of(model, QUERY), [dequantize])
    states = node_of(model, f"{QUERY}.input_q").inputs[0]
    for layer in (QUERY, QUERY.replace("query", "key")):
        product = node_of(model, layer)
        product.replace_input_with(0, states)
        product.replace_input_with(1, dequantize.outputs[0])
    graph.sweep(model)


def store_int4(model: ir.Model) -> None:
    model.graph.opset_imports[""] = 21
    name = f"{LAYER}.weight_codes"
    codes = np.clip(weight_of(model), -7, 7)
    value = model.graph.initializers[name]
    value.const_value = ir.tensor(codes, dtype=ir.DataType.INT4, name=name)
    value.type = ir.TensorType(ir.DataType.INT4)


def weight_of(model: ir.Model, layer: str = LAYER) -> Array:
    dequantize = weight_dequantizer(node_of(model, layer))
    assert dequantize is not None
    array = weight_array(dequantize.inputs[0])
    assert array is not None
    return array


def scale_the_rows(model: ir.Model) -> None:
    """A square weight takes its scales along either axis; only along the columns can they leave the product."""
    node_of(model, f"{POOLER}.weight_dq").attributes["axis"] = ir.AttrInt64("axis", 0)


def scale_in_blocks(model: ir.Model) -> None:
    dequantize = node_of(model, f"{LAYER}.weight_dq")
    set_constant(model, f"{LAYER}.weight_scales", np.full((4, 64), 0.01, np.float32))
    dequantize.attributes["axis"] = ir.AttrInt64("axis", 0)
    dequantize.attributes["block_size"] = ir.AttrInt64("block_size", 32)
    model.graph.opset_imports[""] = 21


def leave_the_weight_in_float(model: ir.Model) -> None:
    product = node_of(model, LAYER)
    product.replace_input_with(1, set_constant(model, "floats", weight_of(model).astype(np.float32) * np.float32(0.01)))
    graph.sweep(model)


def rename_the_layer(model: ir.Model) -> None:
    node_of(model, LAYER).name = "MatMul_17"


def dequantize_the_table_first(model: ir.Model) -> None:
    """The order of `quantize_static`: DequantizeLinear of the table, then Gather."""
    gather = node_of(model, "node_embedding_codes")
    codes, ids = gather.inputs
    scales = set_constant(model, "table_scale", np.array(0.01, np.float32))
    dequantize = ir.Node("", "DequantizeLinear", [codes, scales])
    looked_up = ir.Node("", "Gather", [dequantize.outputs[0], ids], name="word_embeddings")
    (cast,) = graph.consumers(gather.outputs[0])
    graph.insert_before(gather, [dequantize, looked_up])
    graph.bypass(cast.outputs[0], looked_up.outputs[0])
    graph.sweep(model)


UINT8 = "quantize activations to uint8"
INT32 = "quantize its bias to int32 with scale = activation scale x weight scale, or use --target onnxruntime-cpu"
SABOTAGE: list[tuple[Callable[[ir.Model], None], str, str, str]] = [
    (requantize_to_int8, f"layer {LAYER}", "of its int8 activation", UINT8),
    (requantize_to_uint16, f"layer {LAYER}", "of its uint16 activation", UINT8),
    (quantize_per_channel, f"layer {LAYER}", "its activation has a scale for each channel", "per tensor"),
    (drop_the_pair, f"layer {LAYER}", "its activation is not quantized", "quantize its input"),
    (rescale_one_side, f"layer {LAYER}", "have different scales or zero points", "give both the same scale"),
    (scale_after_the_pair, f"layer {LAYER}", "its activation is not quantized", "quantize its input"),
    (float_bias_of_two_dimensions, f"layer {POOLER}", "a two-dimensional product with a float bias", INT32),
    (
        bias_without_a_weight_zero_point,
        f"layer {POOLER}",
        "has no zero point, which QGemm needs",
        "write the zero point",
    ),
    (fix_the_shapes, f"layer {QUERY}", "its shapes are static and its bias is float", INT32),
    (gemm_with_alpha, f"layer {POOLER}", "alpha or beta other than 1", "fold alpha and beta"),
    (share_one_dequantizer, f"layer {QUERY}", "DequantizeLinear is shared", "a DequantizeLinear of its own"),
    (store_int4, f"layer {LAYER}", "its weight is int4 behind an 8-bit activation", "store it as int8 codes"),
    (scale_the_rows, f"layer {POOLER}", "its weight has a scale for each row", "quantize the weight per column"),
    (scale_in_blocks, f"layer {LAYER}", "its weight has a scale for each block", "give each column one scale"),
    (leave_the_weight_in_float, f"layer {LAYER}", "its weight is float", "compile the model again"),
    (rename_the_layer, f"layer {LAYER}", "no product of that name", "compile the model again"),
    (
        dequantize_the_table_first,
        "layer word_embeddings",
        "of the whole table comes before its Gather",
        "look up codes",
    ),
]


def sabotaged(source: Path, target: Path, sabotage: Callable[[ir.Model], None]) -> Path:
    shutil.copytree(source, target, dirs_exist_ok=True)
    model = ir.load(source / "model.onnx")
    sabotage(model)
    for name in ("model.onnx", "model.onnx.data"):
        (target / name).unlink()
    ir.save(model, target / "model.onnx", external_data="model.onnx.data")
    return target


@pytest.mark.parametrize(
    ("sabotage", "where", "reason", "remedy"), SABOTAGE, ids=[entry[0].__name__ for entry in SABOTAGE]
)
def test_verify_says_what_was_done_to_a_model(
    sabotage: Callable[[ir.Model], None],
    where: str,
    reason: str,
    remedy: str,
    compiled: dict[str, CompileReport],
    tmp_path: Path,
    cli: Cli,
) -> None:
    source = compiled["qdq"].output
    assert source is not None
    done = cli("verify", sabotaged(source, tmp_path / "model", sabotage))
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stderr.startswith(f"error {where}")
    assert reason in done.stderr
    assert remedy in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_model_that_nothing_was_done_to_passes(compiled: dict[str, CompileReport], tmp_path: Path, cli: Cli) -> None:
    for name in ("qdq", "onnxruntime-cpu"):
        source = compiled[name].output
        assert source is not None
        done = cli("verify", sabotaged(source, tmp_path / name, lambda model: None))
        assert (done.returncode, done.stderr) == (0, "")


def test_scales_of_rows_do_give_other_numbers_on_the_integer_kernel(
    compiled: dict[str, CompileReport], feeds: list[Feed], tmp_path: Path
) -> None:
    source = compiled["qdq"].output
    assert source is not None
    path = sabotaged(source, tmp_path / "model", scale_the_rows) / "model.onnx"
    fused, plain = (Session(path, optimize=optimize).run(feeds[0])["pooler_output"] for optimize in (True, False))
    assert np.abs(fused - plain).max() > 0.1


def test_the_fused_operator_of_an_int8_activation_is_named(
    compiled: dict[str, CompileReport], tmp_path: Path, cli: Cli
) -> None:
    source = compiled["onnxruntime-cpu"].output
    assert source is not None
    done = cli("verify", sabotaged(source, tmp_path / "model", requantize_to_int8))
    assert done.returncode == 3
    assert f"layer {LAYER}: onnxruntime runs it as MatMulIntegerToFloat, not as a fast integer kernel" in done.stderr


def widen_the_codes(model: ir.Model) -> None:
    """Weights over all of int8, asymmetric or not: two products of neighbours leave 16 bits."""
    set_constant(model, f"{LAYER}.weight_codes", np.where(weight_of(model) < 0, -128, 127).astype(np.int8))


def test_codes_that_saturate_without_vnni_fail_a_gate(
    compiled: dict[str, CompileReport], tmp_path: Path, cli: Cli
) -> None:
    source = compiled["qdq"].output
    assert source is not None
    folder = sabotaged(source, tmp_path / "model", widen_the_codes)
    assert cli("verify", folder).returncode == 0
    done = cli("verify", folder, "--gates")
    assert done.returncode == 3
    assert f"no saturation does not hold: columns of weights that can saturate int16, first in {LAYER}" in done.stderr
    assert "compile it from its float model" in done.stderr


BLOCKS = """<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
model (float[b, t, 32] x{inputs}) => (float[b, t, 2] y) <uint8[2, 1, 16] w = {{{codes}}}{constants}>
{{ y = com.microsoft.MatMulNBits<K = 32, N = 2, bits = 4, block_size = 32{attributes}>(x, w, scales) }}"""
CODES = ", ".join(["137"] * 32)


@pytest.mark.parametrize(
    ("inputs", "constants", "attributes", "reason", "remedy"),
    [
        pytest.param("", ", float[2] scales = {0.1, 0.2}", ", accuracy_level = 4", "", "", id="sound"),
        pytest.param(
            "", ", float[2] scales = {0.1, 0.2}", "", "not as a fast integer kernel, because its accuracy_level is 0",
            "set accuracy_level to 4", id="accuracy_level 0",
        ),
        pytest.param(
            ", float[2] scales", "", ", accuracy_level = 4",
            "which gives wrong numbers, because its scales are not constants", "make them constants", id="fed scales",
        ),
    ],
)  # fmt: skip
def test_a_product_in_blocks_needs_constant_scales_and_integers(
    inputs: str, constants: str, attributes: str, reason: str, remedy: str, tmp_path: Path, cli: Cli
) -> None:
    model = ir.from_onnx_text(BLOCKS.format(inputs=inputs, constants=constants, attributes=attributes, codes=CODES))
    graph.nodes(model, "MatMulNBits")[0].name = "fc"
    ir.save(model, tmp_path / "m.onnx")
    done = cli("verify", "m.onnx")
    assert done.returncode == (3 if reason else 0)
    assert reason in done.stderr
    assert remedy in done.stderr
    assert done.stderr.startswith("error layer fc: onnxruntime runs it as MatMulNBits, ") or not reason


def test_weights_that_are_not_there_are_one_sentence(
    compiled: dict[str, CompileReport], tmp_path: Path, cli: Cli
) -> None:
    source = compiled["qdq"].output
    assert source is not None
    folder = sabotaged(source, tmp_path / "model", lambda model: None)
    (folder / "model.onnx.data").unlink()
    done = cli("verify", folder)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "model.onnx.data" in done.stderr
