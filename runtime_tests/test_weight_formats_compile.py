from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import CompileReport, Recipe, calibrate, compile_model, graph, verify
from scalefold.compiler.errors import CalibrationError, PatternError, RecipeError
from scalefold.compiler.facts import weight_array
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.runtime import Feed, Session, optimized_graph
from scalefold.compiler.verify import sqnr

FORMATS: dict[str, dict[str, Any]] = {
    "linear, 4 bits in groups": {"bits": 4, "group_size": 16, "compensation": True},
    "k-means, 4 bits": {"format": "kmeans", "bits": 4},
    "k-means, 3 bits per column": {"format": "kmeans", "bits": 3, "codebook": "column", "weighting": "hessian"},
    "binary coding, 4 bits in groups": {"format": "bcq", "bits": 4, "group_size": 32},
    "mixed": {
        "bits": 5,
        "layers": {
            "pooler": {"format": "bcq", "bits": 2},
            "attention": {"format": "kmeans", "bits": 6},
            "intermediate": {"bits": 3, "symmetric": False},
        },
    },
}
LEAST_DB = {3: 4.0, 4: 9.0, 5: 9.0}
"""Least SQNR of the outputs by bits of weight, with two bits and a half to spare: noise of nine products in a row."""


def compiled_with(folder: Path, float_model: Path, feeds: list[Feed], **sections: Any) -> CompileReport:
    recipe = Recipe.model_validate({"name": "mine", "calibration": {"samples": 12, "search_samples": 2}, **sections})
    return compile_model(float_model, folder / "out", recipe=recipe, calibration=feeds)


def model_of(report: CompileReport) -> Path:
    assert report.output is not None
    return report.output / "model.onnx"


@pytest.fixture(scope="module", params=FORMATS)
def both(
    request: pytest.FixtureRequest, float_model: Path, feeds: list[Feed], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[CompileReport]]:
    """A format, and the tiny BERT compiled with it for each target."""
    weights, folder = FORMATS[request.param], tmp_path_factory.mktemp("formats")
    targets = ("onnxruntime-cpu", "qdq")
    return weights, [
        compiled_with(folder / target, float_model, feeds, weights=weights, target=target) for target in targets
    ]


def test_every_format_runs_on_an_integer_kernel_with_int8_in_memory(
    both: tuple[dict[str, Any], list[CompileReport]],
) -> None:
    for report in both[1]:
        assert report.integer_layers == len(report.layers) == 13
        optimized = optimized_graph(model_of(report))
        kernels = graph.nodes(optimized, "MatMulIntegerToFloat", "QGemm")
        held = {node.inputs[verify.WEIGHT_INPUT.get(node.op_type, 1)] for node in kernels}
        assert {value.dtype for value in held if value is not None} == {ir.DataType.INT8}
        assert all(value is not None and value.is_initializer() for value in held)
        assert not graph.nodes(optimized, "BitShift", "GatherElements")


def test_both_targets_hold_the_same_weights_and_give_the_same_numbers(
    both: tuple[dict[str, Any], list[CompileReport]], float_model: Path, fresh_feeds: list[Feed]
) -> None:
    weights, reports = both
    first, second = (_weights(model_of(report)) for report in reports)
    assert sorted(first) == sorted(second) and len(first) == 13
    for layer, array in first.items():
        assert array is not None
        np.testing.assert_array_equal(array, second[layer], err_msg=layer)
    wanted = Session(float_model).run(fresh_feeds[0])["last_hidden_state"]
    got = [Session(model_of(report)).run(fresh_feeds[0])["last_hidden_state"] for report in reports]
    assert sqnr(got[0], got[1]) > 40
    assert sqnr(wanted, got[0]) > LEAST_DB[weights["bits"]]


def _weights(path: Path) -> dict[str, Any]:
    model = read_onnx(path)
    found = {node.name or "": weight_array(node.inputs[1]) for node in graph.nodes(model, "MatMulIntegerToFloat")}
    for node in graph.nodes(model, "MatMul"):
        dequantize = graph.producer(node.inputs[1], "DequantizeLinear")
        if dequantize is not None:
            found[node.name or ""] = weight_array(dequantize.inputs[0])
    return found


def test_the_record_says_what_the_bytes_are(float_model: Path, feeds: list[Feed], tmp_path: Path) -> None:
    report = compiled_with(tmp_path, float_model, feeds, weights={"bits": 3}, embeddings={"bits": 4})
    assert report.output is not None
    recorded = json.loads((report.output / "scalefold.json").read_text(encoding="utf-8"))["parts"]
    linear = report.parts["linear"]
    assert recorded["linear"] == {
        "elements": linear.elements, "code_bytes": linear.code_bytes, "overhead_bytes": linear.overhead_bytes
    }  # fmt: skip
    assert linear.code_bytes == linear.elements * 3 / 8
    assert sum(part.code_bytes + part.overhead_bytes for part in report.parts.values()) == report.bytes


@pytest.mark.parametrize(
    ("weights", "block"),
    [({"format": "kmeans", "bits": 4}, None), ({"bits": 4, "group_size": 16, "solver": "rtn"}, 16)],
)
def test_float_activations_say_what_runs(
    weights: dict[str, Any], block: int | None, float_model: Path, feeds: list[Feed], tmp_path: Path
) -> None:
    report = compiled_with(tmp_path, float_model, feeds, weights=weights, activations=None)
    assert [entry.shape for entry in report.layers].count((64, 128)) == 2 and len(report.layers) == 13
    assert {(entry.kernel, entry.integer, entry.activation) for entry in report.layers} == {
        ("MatMulNBits", True, "float")
    }
    written = graph.nodes(read_onnx(model_of(report)), "MatMulNBits")
    assert [graph.attribute(node, "block_size") for node in written] == ([block] * 13 if block else [])
    assert report.parts["linear"].elements == sum(k * n for k, n in (entry.shape for entry in report.layers))


def test_a_second_run_gives_the_same_bytes(float_model: Path, feeds: list[Feed], tmp_path: Path) -> None:
    weights = {"format": "kmeans", "bits": 3, "compensation": True}
    first, second = (
        compiled_with(tmp_path / name, float_model, feeds, weights=weights, embeddings={"bits": 4}) for name in "ab"
    )
    for name in ("model.onnx", "model.onnx.data"):
        assert model_of(first).with_name(name).read_bytes() == model_of(second).with_name(name).read_bytes()


@pytest.mark.parametrize(
    ("weights", "fault"),
    [
        ({"bits": 4, "group_size": 48}, RecipeError),
        ({"layers": {"nothing": {"bits": 4}}}, PatternError),
    ],
)
def test_a_recipe_that_does_not_fit_the_model_is_refused_before_calibration(
    weights: dict[str, Any], fault: type[Exception], float_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise CalibrationError("read", where="calibration", remedy="do not")

    monkeypatch.setattr(calibrate, "calibration_from", refuse)
    with pytest.raises(fault):
        compiled_with(tmp_path, float_model, [], weights=weights)
