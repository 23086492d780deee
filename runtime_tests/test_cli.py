from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from scalefold.compiler import CompileReport

Cli = Callable[..., subprocess.CompletedProcess[str]]
OPTIONS = {
    "compile": (
        "--output", "--recipe", "--target-error", "--target-size", "--target-latency", "--base", "--calibration",
        "--samples", "--task", "--target", "--include", "--exclude",
        "--allow-float", "--max-float-fraction", "--profile", "--rows", "--dry-run", "--json", "SOURCE",
    ),
    "verify": ("--allow-float", "--gates", "--json", "FOLDER"),
    "inspect": ("--json", "SOURCE"),
    "sensitivity": ("--recipe", "--bits", "--top", "--calibration", "--plot", "--json", "SOURCE"),
    "report": ("--output", "--against", "--plots", "--png", "--json", "FOLDER"),
    "diff": ("--tolerance", "--ignore-metadata", "--quantization", "--json", "FIRST", "SECOND"),
    "eval": (
        "--data", "--metric", "--against", "--window", "--stride", "--windows", "--seed", "--json", "FOLDER",
    ),
    "generate": (
        "--prompt", "--max-new-tokens", "--temperature", "--top-k", "--top-p", "--seed", "--json", "FOLDER",
    ),
    "bench": ("--shape", "--past", "--threads", "--runs", "--profile", "--fresh", "--json", "FOLDER"),
    "recipes": ("--json",),
}  # fmt: skip


def facts_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Standard output as JSON: all of it, and nothing on the other stream."""
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def folder_of(report: CompileReport) -> Path:
    assert report.output is not None
    return report.output


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option_and_says_what_it_is_for(command: str, cli: Cli) -> None:
    done = cli(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    described = set(re.findall(r"(--[a-z-]+)[^\n]*\s{2,}\S*[A-Za-z]{3}", text))
    wanted = {name for name in OPTIONS[command] if name.startswith("--")}
    assert wanted <= described, text
    assert described - wanted == {"--help"}
    assert set(OPTIONS[command]) - wanted <= {word.upper() for word in re.findall(r"\w+", text)}


def test_the_overview_lists_every_command(cli: Cli) -> None:
    done = cli("--help")
    assert done.returncode == 0
    for command in OPTIONS:
        assert re.search(rf"^\W*{command}\s{{2,}}\w+", done.stdout, re.MULTILINE), done.stdout


def test_no_command_shows_the_overview(cli: Cli) -> None:
    done = cli()
    assert "compile" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_compile_prints_layers_outputs_and_what_every_pass_did(float_model: Path, tmp_path: Path, cli: Cli) -> None:
    done = cli("compile", float_model, "-o", "out", "--samples", "4")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"encoder\.layer\.1\.output\.dense\W+128 x 64\W+MatMulIntegerToFloat\W+\d+\.\d", done.stdout)
    assert re.search(r"last_hidden_state\W+0\.9\d+", done.stdout)
    assert re.search(r"integer kernels\W+13 of 13 linear layers", done.stdout)
    assert re.search(r"migrate-outliers\W+4 rewrites", done.stdout)
    assert "English text of the Python installation" in done.stdout
    assert (tmp_path / "out" / "scalefold.json").is_file()


def test_compile_in_json_gives_the_report_and_nothing_else(float_model: Path, tmp_path: Path, cli: Cli) -> None:
    facts = facts_of(cli("compile", float_model, "-o", "out", "--samples", "4", "--target", "qdq", "--json"))
    assert (facts["integer_layers"], len(facts["layers"]), facts["target"]) == (13, 13, "qdq")
    assert facts["output"] == str(tmp_path / "out")
    assert facts["seconds"]["verify"] > 0
    assert facts["peak_bytes"] > 0


def test_a_dry_run_prints_the_layers_it_would_quantize(float_model: Path, tmp_path: Path, cli: Cli) -> None:
    done = cli("compile", float_model, "--dry-run", "--exclude", "pooler")
    assert (done.returncode, done.stderr) == (0, "")
    assert "12 linear layers would be quantized" in done.stdout
    assert list(tmp_path.iterdir()) == []
    facts = facts_of(cli("compile", float_model, "-o", "out", "--dry-run", "--json"))
    assert facts["output"] == ""
    assert len(facts["layers"]) == 13
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_file_is_taken(float_model: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "mine.yaml").write_text("weights: {bits: 7}\nembeddings: null\n", encoding="utf-8")
    facts = facts_of(cli("compile", float_model, "-o", "out", "--recipe", "mine.yaml", "--samples", "2", "--json"))
    assert facts["recipe"] == "mine"
    record = json.loads((tmp_path / "out" / "scalefold.json").read_text(encoding="utf-8"))
    assert (record["recipe"]["weights"]["bits"], record["recipe"]["embeddings"]) == (7, None)


def test_verify_names_the_kernel_of_every_layer(compiled: dict[str, CompileReport], cli: Cli) -> None:
    folder = folder_of(compiled["qdq"])
    done = cli("verify", folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"pooler\.dense\W+64 x 64\W+QGemm\W+\d+\.\d", done.stdout)
    assert re.search(r"pooler_output\W+0\.9\d+", done.stdout)
    facts = facts_of(cli("verify", folder, "--json"))
    assert [layer["integer"] for layer in facts["layers"]] == [True] * 13
    assert [layer["sqnr_db"] for layer in facts["layers"]] == [layer.sqnr_db for layer in compiled["qdq"].layers]
    assert facts["bytes"] == compiled["qdq"].bytes


def test_verify_takes_a_file_without_a_record(compiled: dict[str, CompileReport], cli: Cli) -> None:
    facts = facts_of(cli("verify", folder_of(compiled["qdq"]) / "model.onnx", "--json"))
    assert len(facts["layers"]) == 13
    assert facts["outputs"] == []


def test_verify_fails_when_a_layer_missed_its_kernel_unless_it_is_allowed(tmp_path: Path, cli: Cli) -> None:
    import onnx_ir as ir

    text = """<ir_version: 10, opset_import: ["" : 20]>
    model (float[b, 2] x) => (float[b, 2] y)
    <int8[2, 2] w = {1, 2, 3, 4}, float[2] ws = {0.1, 0.2}, float[2] c = {1.0, 2.0}, float s = {0.1}, uint8 z = {128}>
    { q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  wd = DequantizeLinear<axis = 1>(w, ws)
      p = MatMul(d, wd)  y = Add(p, c) }"""
    model = ir.from_onnx_text(text)
    next(node for node in model.graph if node.op_type == "MatMul").name = "fc"
    ir.save(model, tmp_path / "m.onnx")
    done = cli("verify", "m.onnx")
    assert done.returncode == 3
    assert done.stderr.startswith("error layer fc: onnxruntime runs it as Gemm, not as an integer kernel")
    assert "a two-dimensional product with a float bias" in done.stderr
    assert re.search(r"fc\W+2 x 2\W+Gemm \(missed\)", done.stdout)
    assert cli("verify", "m.onnx", "--allow-float", "fc").returncode == 0


def test_inspect_lists_inputs_outputs_and_layers_of_a_float_model(float_model: Path, cli: Cli) -> None:
    done = cli("inspect", float_model)
    assert (done.returncode, done.stderr) == (0, "")
    assert "13 linear layers" in done.stdout
    assert re.search(r"encoder\.layer\.0\.attention\.self\.query\W+64 x 64\W+float32", done.stdout)
    facts = facts_of(cli("inspect", float_model.parent, "--json"))
    assert set(facts["inputs"]) == {"input_ids", "token_type_ids", "attention_mask"}
    assert set(facts["outputs"]) == {"last_hidden_state", "pooler_output"}
    assert {layer["quantized"] for layer in facts["layers"]} == {False}
    assert facts["nodes"] > 50


def test_inspect_shows_which_layers_of_a_compiled_model_are_integer(
    compiled: dict[str, CompileReport], cli: Cli
) -> None:
    for report in compiled.values():
        facts = facts_of(cli("inspect", folder_of(report), "--json"))
        assert [layer["name"] for layer in facts["layers"]] == [layer.name for layer in report.layers]
        assert {layer["quantized"] for layer in facts["layers"]} == {True}


def test_recipes_lists_what_the_package_ships(cli: Cli) -> None:
    shipped = {Path(str(entry)).stem for entry in files("scalefold.passes").iterdir() if str(entry).endswith(".yaml")}
    few_bits = {"w4a8", "w4a8-kmeans", "w4a8-bcq", "w3a8-kmeans", "w3a8-bcq"}
    learned = {"quadapter-w8a8", "quadapter-w6a6"}
    assert shipped == {"w8a8", "w6a6", "w8a8-naive", "w8a8-static", "w8a8-token", "w8a8-decode", *few_bits, *learned}
    done = cli("recipes")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(name in done.stdout for name in shipped)
    assert re.search(r"^\W*auto\s", done.stdout, re.MULTILINE)
    listed = " ".join(done.stdout.split()).partition("reference models: ")[2].split(", ")
    assert {"minilm", "rxnfp", "rxnmapper", "smollm2", "gpt2-tiny", "gpt2-tiny-outliers"} <= set(listed)
    facts = facts_of(cli("recipes", "--json"))
    assert set(facts) == shipped
    assert facts["w6a6"]["weights"]["bits"] == 6 and not facts["w6a6"]["weights"]["packed"]
    assert facts["w8a8-naive"]["migration"] is None


def test_eval_fidelity_compares_with_the_float_model(
    compiled: dict[str, CompileReport], float_model: Path, tmp_path: Path, cli: Cli
) -> None:
    (tmp_path / "text.txt").write_text(
        "the value of the object\nshort\nit is a list of the modules\n", encoding="utf-8"
    )
    arguments = ("--data", "text.txt", "--metric", "fidelity", "--against", float_model)
    facts = facts_of(cli("eval", folder_of(compiled["qdq"]), *arguments, "--json"))
    assert facts["samples"] == 2
    assert 0.99 < facts["last_hidden_state mean_cosine"] < 1 + 1e-6
    assert facts["last_hidden_state max_error"] > 0
    done = cli("eval", folder_of(compiled["qdq"]), *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"last_hidden_state mean_cosine\W+(0\.99\d\d|1\.0000)", done.stdout)


def test_eval_sts_ranks_pairs_and_compares_with_float(
    compiled: dict[str, CompileReport], float_model: Path, tmp_path: Path, cli: Cli
) -> None:
    pairs = (
        ("5.0", "the value of a list", "the value of a list"),
        ("2.0", "a list", "the list"),
        ("0.0", "if", "is not a"),
    )
    rows = [f"main\tfile\t2012\t1\t{score}\t{first}\t{second}" for score, first, second in pairs]
    (tmp_path / "sts.csv").write_text("\n".join(rows), encoding="utf-8")
    facts = facts_of(
        cli("eval", folder_of(compiled["onnxruntime-cpu"]), "--data", "sts.csv", "--against", float_model, "--json")
    )
    assert facts["pairs"] == 3
    assert -100 <= facts["spearman"] <= 100
    assert 0.99 < facts["min_cosine"] <= facts["mean_cosine"] <= 1
