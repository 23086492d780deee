"""The pytest plug-in: golden files of the reference models, and what it says when a graph is another one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import CompileReport, compile_model, graph
from scalefold.compiler.export import export_model
from scalefold.compiler.golden import golden_difference, golden_text
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.runtime import Feed
from scalefold.models import gpt2_tiny

pytest_plugins = ["pytester"]

FIGURES = 0.05
"""How far figures may be apart: ranges differ by float rounding from CPU to CPU, and what a search finds by a step of it."""

PAIR = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[N, 4] x) => (float[N, 2] y)
<float scale = {0.1}, uint8 zero = {128}, int8[4, 2] codes = {1, 2, 3, 4, 5, 6, 7, 8}, float[2] steps = {0.5, 0.25}>
{
    q = QuantizeLinear(x, scale, zero)
    d = DequantizeLinear(q, scale, zero)
    w = DequantizeLinear<axis = 1>(codes, steps)
    y = MatMul(d, w)
}
"""

GOLDEN = """\
opset ai.onnx 20
input x: float[d0, 4]

# linear.0
linear.0.QuantizeLinear = QuantizeLinear(x, <float 0.1>, <uint8 128>)
linear.0.DequantizeLinear = DequantizeLinear(linear.0.QuantizeLinear, <float 0.1>, <uint8 128>)
linear.0.DequantizeLinear.2 = DequantizeLinear(<int8[4, 2] sha:CODES>, <float[2] 0.5, 0.25>)
linear.0.MatMul = MatMul(linear.0.DequantizeLinear, linear.0.DequantizeLinear.2)

output y: float[d0, 2] = linear.0.MatMul
"""


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    export_model(str(gpt2_tiny.build()), folder)
    return folder


def test_golden_bert_naive(
    float_model: Path, feeds: list[Feed], tmp_path: Path, assert_graph_matches: Callable[..., None]
) -> None:
    compile_model(float_model, tmp_path / "o", recipe="w8a8-naive", calibration=feeds, samples=40, target="qdq")
    assert_graph_matches(tmp_path / "o", "golden/bert-w8a8-naive.onnxtxt", tolerance=FIGURES)


def test_golden_bert(compiled: dict[str, CompileReport], assert_graph_matches: Callable[..., None]) -> None:
    assert_graph_matches(compiled["qdq"].output, "golden/bert-w8a8.onnxtxt", tolerance=FIGURES)


@pytest.mark.parametrize(("recipe", "samples"), [("w8a8-naive", 16), pytest.param("w8a8", 64, marks=pytest.mark.slow)])
def test_golden_gpt2_tiny(
    recipe: str, samples: int, gpt2_folder: Path, tmp_path: Path, assert_graph_matches: Callable[..., None]
) -> None:
    compile_model(gpt2_folder / "model.onnx", tmp_path / "o", recipe=recipe, samples=samples, target="qdq")
    assert_graph_matches(tmp_path / "o", f"golden/gpt2-tiny-{recipe}.onnxtxt", tolerance=FIGURES)


def test_golden_files_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in (Path(__file__).parent / "golden").glob("*.onnxtxt")}
    assert len(sizes) == 4
    assert max(sizes.values()) < 200_000


def test_kernels_of_compiled_models(
    compiled: dict[str, CompileReport], float_model: Path, kernel_contract: Callable[..., None]
) -> None:
    for report in compiled.values():
        kernel_contract(report.output)
    model = read_onnx(compiled["qdq"].output / "model.onnx" if compiled["qdq"].output else Path())
    kernel_contract(model)
    dequantize = next(node for node in model.graph if node.name == "pooler.dense.input_dq")
    quantize = graph.producer(dequantize.inputs[0])
    assert quantize is not None and quantize.inputs[0] is not None
    graph.bypass(dequantize.outputs[0], quantize.inputs[0])
    with pytest.raises(AssertionError, match=r"layer pooler.dense: onnxruntime runs it as \w+, not as an integer"):
        kernel_contract(model)
    kernel_contract(model, allow_float=["pooler"])
    with pytest.raises(AssertionError, match="13 linear layers are float"):
        kernel_contract(float_model)


def test_a_graph_reads_well_and_names_do_not_count() -> None:
    model = ir.from_onnx_text(PAIR)
    text = golden_text(model)
    codes = text.split("sha:")[1].split(">")[0]
    assert text == GOLDEN.replace("CODES", codes)
    for index, node in enumerate(model.graph):
        node.outputs[0].name = f"other_{index}" if node.op_type != "MatMul" else "y"
    assert golden_text(model) == text
    assert "<float ~0.1>, <uint8 ~128>" in golden_text(model, figures=True)


def test_figures_agree_within_the_tolerance_and_structure_must_be_equal() -> None:
    model = ir.from_onnx_text(PAIR)
    golden = golden_text(model, figures=True)
    model.graph.initializers["scale"].const_value = ir.tensor(np.array(0.103, dtype=np.float32))
    model.graph.initializers["zero"].const_value = ir.tensor(np.array(127, dtype=np.uint8))
    near = golden_text(model, figures=True)
    assert golden_difference(golden, near, 0.05) == ""
    assert "+linear.0.QuantizeLinear" in golden_difference(golden, near, 0.01)
    assert golden_difference(golden, near.replace("axis=0", "axis=1").replace("MatMul(", "Gemm("), 0.05)


@pytest.mark.parametrize(("one", "two"), [("~1", "~2"), ("~0", "~1"), ("~-inf", "~-3"), ("~inf", "~5"), ("~nan", "~1")])
def test_floats_that_are_whole_or_not_finite_have_no_slack(one: str, two: str) -> None:
    line = "Mul = Mul(x, <float {}>)"
    assert golden_difference(line.format(one), line.format(two), 0.01)
    assert not golden_difference(line.format(one), line.format(one), 0.01)
    assert not golden_difference("a(<uint8 ~127>, <float ~1>)", "a(<uint8 ~128>, <float ~1.005>)", 0.01)


USE = """
import onnx_ir as ir

def test_it(assert_graph_matches):
    assert_graph_matches(ir.load("model.onnx"), "golden/pair.onnxtxt")

def test_kernels(kernel_contract):
    kernel_contract("model.onnx")
"""


def test_the_plugin_writes_compares_and_explains(pytester: pytest.Pytester) -> None:
    model = ir.from_onnx_text(PAIR)
    ir.save(model, pytester.path / "model.onnx")
    pytester.makepyfile(USE)
    run = pytester.runpytest("-p", "no:cacheprovider")
    run.assert_outcomes(passed=1, failed=1)
    run.stdout.fnmatch_lines(["*there is no golden file */golden/pair.onnxtxt; pytest --update-golden writes it"])
    pytester.runpytest("--update-golden").assert_outcomes(passed=2)
    assert (pytester.path / "golden" / "pair.onnxtxt").read_text(encoding="utf-8") == golden_text(model)
    pytester.runpytest().assert_outcomes(passed=2)
    model.graph.initializers["zero"].const_value = ir.tensor(np.array(127, dtype=np.uint8))
    ir.save(model, pytester.path / "model.onnx")
    run = pytester.runpytest()
    run.assert_outcomes(passed=1, failed=1)
    run.stdout.fnmatch_lines(
        [
            "*-linear.0.QuantizeLinear = QuantizeLinear(x, <float 0.1>, <uint8 128>)",
            "*+linear.0.QuantizeLinear = QuantizeLinear(x, <float 0.1>, <uint8 127>)",
        ]
    )


def test_importing_the_plugin_is_light() -> None:
    code = (
        "import sys, scalefold.compiler.pytest_plugin; print({'numpy', 'onnx_ir', 'onnxruntime'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
