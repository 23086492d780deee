from __future__ import annotations

import io
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from scalefold.compiler import compile_model, graph
from scalefold.compiler.driver import open_source
from scalefold.compiler.errors import GraphError, ScalefoldError, SourceError
from scalefold.compiler.intake import clean, read_onnx
from scalefold.compiler.runtime import Array, Feed, Session
from scalefold.compiler.verify import sqnr

NAMES = ("input_ids", "attention_mask", "token_type_ids")
LAYERS = [
    *(
        f"encoder.layer.{layer}.{part}"
        for layer in (0, 1)
        for part in (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        )
    ),
    "pooler.dense",
]

FLOAT_DB = 90.0
"""Least SQNR of a float graph against torch: float32 carries 24 bits, 144 dB, and sums of a few hundred terms lose some."""

CLOSE_DB = 25.0
"""As in test_compile.py: what 18 sources of 8-bit noise leave."""


def torch_script(opset: int, attention: str) -> Callable[[Any, Path], Path]:
    def export(model: Any, folder: Path) -> Path:
        import torch

        path = folder / "model.onnx"
        axes = {name: {0: "batch", 1: "sequence"} for name in (*NAMES, "last_hidden_state")}
        before = model.config._attn_implementation
        model.set_attn_implementation(attention)
        torch.onnx.export(
            wrapped(model),
            samples(),
            str(path),
            input_names=list(NAMES),
            output_names=["last_hidden_state", "pooler_output"],
            dynamic_axes={**axes, "pooler_output": {0: "batch"}},
            opset_version=opset,
            dynamo=False,
        )
        model.set_attn_implementation(before)
        return path

    return export


def dynamo(external: bool) -> Callable[[Any, Path], Path]:
    def export(model: Any, folder: Path) -> Path:
        import torch

        path = folder / "model.onnx"
        dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=64)}
        program = torch.onnx.export(
            wrapped(model),
            samples(),
            input_names=list(NAMES),
            output_names=["last_hidden_state", "pooler_output"],
            dynamic_shapes=(dims, dims, dims),
            dynamo=True,
        )
        assert program is not None
        program.save(str(path), external_data=external)
        return path

    return export


def wrapped(model: Any) -> Any:
    import torch

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            found = self.bert(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, use_cache=False
            )
            return found[0], found[1]

    return Wrapped().eval()


def samples() -> tuple[Any, Any, Any]:
    import torch

    ids = torch.arange(16).reshape(2, 8)
    return ids, torch.ones_like(ids), torch.zeros_like(ids)


EXPORTERS = {
    "TorchScript, opset 14, sdpa": torch_script(14, "sdpa"),
    "TorchScript, opset 14, eager": torch_script(14, "eager"),
    "TorchScript, opset 17, sdpa": torch_script(17, "sdpa"),
    "TorchScript, opset 17, eager": torch_script(17, "eager"),
    "dynamo, inline": dynamo(external=False),
    "dynamo, external data": dynamo(external=True),
}


@pytest.fixture(scope="module", params=[*EXPORTERS, "transformers"])
def exported(
    request: pytest.FixtureRequest, tiny_model: Any, float_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny BERT as one exporter writes it."""
    if request.param == "transformers":
        return float_model
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return EXPORTERS[request.param](tiny_model, tmp_path_factory.mktemp("exported"))


def in_torch(model: Any, feed: Feed) -> Array:
    import torch

    with torch.no_grad():
        found = model(**{name: torch.from_numpy(array) for name, array in feed.items()})
    return np.asarray(found.last_hidden_state.numpy())


def padded(feed: Feed) -> Feed:
    """The feed twice, the second time with its last tokens masked."""
    twice = {name: np.concatenate([array, array]) for name, array in feed.items()}
    twice["attention_mask"][1, -4:] = 0
    return twice


def test_any_exporters_graph_comes_to_the_same_normal_form(
    exported: Path, tiny_model: Any, fresh_feeds: list[Feed]
) -> None:
    with open_source(exported) as model:
        names = [layer.name for layer in graph.linear_layers(model)]
        assert all(name.endswith(wanted) for name, wanted in zip(names, LAYERS, strict=True)), names
        counts = Counter(node.op_type for node in model.graph)
        assert (counts["LayerNormalization"], counts["Gelu"], counts["Softmax"]) == (5, 2, 2)
        assert (counts["Gemm"], counts["Erf"]) == (0, 0)
        session = Session(model)
        for feed in (fresh_feeds[0], padded(fresh_feeds[1])):
            assert sqnr(in_torch(tiny_model, feed), session.run(feed)["last_hidden_state"]) >= FLOAT_DB


def test_any_exporters_graph_compiles_to_integer_layers_and_fused_attention(
    exported: Path, tiny_model: Any, feeds: list[Feed], fresh_feeds: list[Feed], tmp_path: Path
) -> None:
    report = compile_model(exported, tmp_path / "out", calibration=feeds, samples=40)
    assert report.integer_layers == len(report.layers) == 13
    passes = {entry.name: entry for entry in report.passes}
    assert len(passes["migrate-outliers"].rewrites) == 4
    assert passes["fuse-attention"].declined == ()
    assert len(passes["fuse-attention"].rewrites) == 2
    session = Session(tmp_path / "out" / "model.onnx")
    for feed in (fresh_feeds[0], padded(fresh_feeds[1])):
        wanted, got = in_torch(tiny_model, feed), session.run(feed)["last_hidden_state"]
        assert sqnr(np.delete(wanted, [3, 17], -1), np.delete(got, [3, 17], -1)) >= CLOSE_DB


def small_model(*nodes: onnx.NodeProto, functions: tuple[onnx.FunctionProto, ...] = ()) -> onnx.ModelProto:
    """`h = x W1 + b1`, then the given nodes from h to g, then `y = g W2`."""
    generator = np.random.default_rng(0)
    first, second = (generator.standard_normal((32, 32)).astype(np.float32) for _ in range(2))
    weights = [
        numpy_helper.from_array(first, "first.weight"),
        numpy_helper.from_array(second, "second.weight"),
        numpy_helper.from_array(generator.standard_normal(32).astype(np.float32), "first.bias"),
    ]
    body = [
        helper.make_node("MatMul", ["x", "first.weight"], ["p"], name="first"),
        helper.make_node("Add", ["p", "first.bias"], ["h"], name="first_bias"),
        *nodes,
        helper.make_node("MatMul", ["g", "second.weight"], ["y"], name="second"),
    ]
    shape: list[str | int | None] = ["batch", "sequence", 32]
    made = helper.make_graph(
        body,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        weights,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("acme", 1)]
    return helper.make_model(made, opset_imports=opsets, functions=list(functions), ir_version=10)


def small_feeds() -> list[Feed]:
    generator = np.random.default_rng(5)
    return [{"x": generator.standard_normal((1, 6, 32)).astype(np.float32)} for _ in range(20)]


def test_an_operator_that_onnxruntime_lacks_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "custom.onnx"
    onnx.save(small_model(helper.make_node("Frobnicate", ["h"], ["g"], domain="acme", name="frob")), path)
    with pytest.raises(ScalefoldError) as caught:
        compile_model(path, tmp_path / "out", calibration=small_feeds())
    message = str(caught.value)
    assert "Frobnicate" in message
    assert "acme" in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


def test_a_dry_run_passes_around_an_unknown_operator_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "custom.onnx"
    onnx.save(small_model(helper.make_node("Frobnicate", ["h"], ["g"], domain="acme", name="frob")), path)
    report = compile_model(path, None, dry_run=True)
    assert [layer.name for layer in report.layers] == ["first", "second"]
    assert [note for note in report.notes if "acme::Frobnicate" in note]


def test_a_custom_operator_that_is_a_local_function_is_inlined(tmp_path: Path) -> None:
    function = helper.make_function(
        "acme",
        "Frobnicate",
        ["v"],
        ["w"],
        [helper.make_node("Abs", ["v"], ["a"]), helper.make_node("Sqrt", ["a"], ["w"])],
        [helper.make_opsetid("", 20)],
    )
    path = tmp_path / "custom.onnx"
    onnx.save(
        small_model(helper.make_node("Frobnicate", ["h"], ["g"], domain="acme", name="frob"), functions=(function,)),
        path,
    )
    report = compile_model(path, tmp_path / "out", calibration=small_feeds())
    assert (report.integer_layers, report.notes) == (2, ())
    written = ir.load(tmp_path / "out" / "model.onnx")
    assert not written.functions
    feed = small_feeds()[3]
    assert sqnr(Session(path).run(feed)["y"], Session(tmp_path / "out" / "model.onnx").run(feed)["y"]) >= CLOSE_DB


def test_a_gemm_with_either_transposition_becomes_a_linear_layer(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
    model (float[b, 3] x) => (float[b, 2] y)
    <float[2, 3] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}, float[2] c = {0.5, -0.5}>
    { y = Gemm<alpha = 2.0, beta = 4.0, transB = 1>(x, w, c) }"""
    path = tmp_path / "gemm.onnx"
    ir.save(ir.from_onnx_text(text), path)
    feed = {"x": np.array([[1.0, -1.0, 2.0]], dtype=np.float32)}
    with open_source(path) as model:
        assert [layer.shape for layer in graph.linear_layers(model)] == [(3, 2)]
        got = Session(model).run(feed)["y"]
    # x W^T = (1 - 2 + 6, 4 - 5 + 12) = (5, 11); times alpha, plus beta c
    np.testing.assert_array_equal(got, [[12.0, 20.0]])


def test_small_weights_in_external_data_are_read_from_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(helper.make_node("Abs", ["h"], ["g"]))
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    onnx.save(
        model,
        folder / "m.onnx",
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
        convert_attribute=False,
    )
    monkeypatch.chdir(tmp_path)
    cleaned = clean(read_onnx(Path("elsewhere/m.onnx")), "elsewhere/m.onnx")
    feed = small_feeds()[0]
    whole = Session(folder / "m.onnx").run(feed)["y"]
    np.testing.assert_allclose(Session(cleaned).run(feed)["y"], whole, rtol=1e-5)
    report = compile_model("elsewhere/m.onnx", "out", calibration=small_feeds())
    assert report.integer_layers == 2


def test_a_model_that_takes_32_bit_token_ids_is_calibrated_on_text(float_model: Path, tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
    model (int32[b, s] input_ids) => (float[b, s, 8] y) { e = Gather(table, input_ids)  y = MatMul(e, fc_weight) }"""
    generator = np.random.default_rng(2)
    made = onnx.parser.parse_model(text)
    made.graph.initializer.extend(
        numpy_helper.from_array(generator.standard_normal(shape).astype(np.float32), name)
        for name, shape in (("table", (200, 16)), ("fc_weight", (16, 8)))
    )
    onnx.save(made, tmp_path / "model.onnx")
    shutil.copyfile(float_model.with_name("tokenizer.json"), tmp_path / "tokenizer.json")
    report = compile_model(tmp_path / "model.onnx", tmp_path / "out", samples=8)
    assert report.integer_layers == 1


def test_constants_are_folded_and_dead_nodes_are_gone(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
    model (float[b, 2] x) => (float[b, 2] y)
    <float[2] c = {1.0, 2.0}, float[2] d = {3.0, 4.0}>
    { e = Add(c, d)  dead = Exp(x)  y = Add(x, e) }"""
    cleaned = clean(ir.from_onnx_text(text), "text")
    assert [node.op_type for node in cleaned.graph] == ["Add"]
    assert [value.name for value in cleaned.graph.inputs] == ["x"]
    feed = {"x": np.zeros((1, 2), dtype=np.float32)}
    np.testing.assert_array_equal(Session(cleaned).run(feed)["y"], [[4.0, 6.0]])


def test_a_large_constant_behind_an_identity_is_a_constant_of_its_readers() -> None:
    numbers = ", ".join(["0.5"] * 1100)
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 20]> g (float[N, 1100] x) => (float[N, 1100] y)
        <float[1100] gain = {{{numbers}}}> {{ s = Identity(gain)  y = LayerNormalization(x, s) }}"""
    )
    (norm,) = clean(model, "here").graph
    assert norm.op_type == "LayerNormalization"
    assert norm.inputs[1] is not None and norm.inputs[1].is_initializer()


def test_an_input_that_nothing_reads_stays_an_input() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
    model (float[b, 2] x, float[b, 2] unused) => (float[b, 2] y)
    { y = Exp(x) }"""
    cleaned = clean(ir.from_onnx_text(text), "text")
    assert [value.name for value in cleaned.graph.inputs] == ["x", "unused"]


def test_an_initializer_that_is_an_input_too_becomes_a_constant() -> None:
    made = small_model(helper.make_node("Abs", ["h"], ["g"]))
    made.graph.input.append(helper.make_tensor_value_info("first.weight", TensorProto.FLOAT, [32, 32]))
    cleaned = clean(ir.from_proto(made), "proto")
    assert [value.name for value in cleaned.graph.inputs] == ["x"]
    assert [layer.name for layer in graph.linear_layers(cleaned)] == ["first", "second"]


@pytest.mark.parametrize("opset", [7, 11, 13])
def test_an_old_opset_is_raised_and_means_the_same(opset: int) -> None:
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]>
    model (float[b, 2] x) => (float[b, 1] y)
    {{ s = Softmax<axis = 1>(x)  y = ReduceMax<axes = [1], keepdims = 1>(s) }}"""
    model = ir.from_onnx_text(text)
    feed = {"x": np.array([[0.0, 1.0], [2.0, 2.0]], dtype=np.float32)}
    cleaned = clean(model, "text")
    assert cleaned.graph.opset_imports[""] == 20
    np.testing.assert_allclose(Session(cleaned).run(feed)["y"], [[1 / (1 + np.exp(-1.0))], [0.5]], rtol=1e-6)


def test_an_opset_that_cannot_be_converted_is_refused_with_the_remedy() -> None:
    text = """<ir_version: 8, opset_import: ["" : 6]>
    model (float[2] x) => (float[2] y)
    { y = Upsample<scales = [1.0]>(x) }"""
    with pytest.raises(GraphError, match=r"opset 6 is too old .* export the model again with opset 17 or later"):
        clean(ir.from_onnx_text(text), "old.onnx")


def test_a_file_of_zeros_is_not_onnx(tmp_path: Path) -> None:
    (tmp_path / "zeros.onnx").write_bytes(bytes(1000))
    with pytest.raises(SourceError, match="it is not an ONNX model, or it is cut short"):
        read_onnx(tmp_path / "zeros.onnx")


def test_a_model_that_is_links_is_run_from_where_they_lead(float_model: Path, tmp_path: Path) -> None:
    for path in float_model.parent.glob("model.onnx*"):
        (tmp_path / path.name).symlink_to(path)
    feed = {name: np.ones((1, 4), dtype=np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    wanted, got = (Session(read_onnx(path)).run(feed) for path in (float_model, tmp_path / "model.onnx"))
    assert all(np.array_equal(wanted[name], got[name]) for name in wanted)
