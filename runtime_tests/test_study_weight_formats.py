"""The study of weight formats on a graph of two linear layers: known bytes, errors that fall, and a run taken up again."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx_ir as ir
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = [f"w{index}" for index in range(32)]
EMBED = """<ir_version: 10, opset_import: ["" : 20]>
embed (int64[b, s] input_ids) => (float[b, s, 8] states) <%s>
{ x = Gather(table, input_ids)  h = MatMul(x, w1)  r = Relu(h)  states = MatMul(r, w2) }"""
CLASSIFY = """<ir_version: 10, opset_import: ["" : 20]>
classify (int64[b, s] input_ids) => (float[b, 8] logits) <%s, int64[1] axes = {1}>
{ x = Gather(table, input_ids)  h = MatMul(x, w1)  r = Relu(h)  y = MatMul(r, w2)
  logits = ReduceMean<keepdims = 0>(y, axes) }"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
        return importlib.import_module("study_weight_formats")


@pytest.fixture
def subject(script: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    """A model of 8 -> 16 -> 8 features with random weights and words, and what it is measured on."""
    generator = np.random.default_rng(3)
    arrays = {"table": (32, 8), "w1": (8, 16), "w2": (16, 8)}
    given = ", ".join(
        f"float[{rows},{columns}] {name} = {{{', '.join(f'{v:.4f}' for v in generator.normal(size=rows * columns))}}}"
        for name, (rows, columns) in arrays.items()
    )
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = [" ".join(generator.choice(WORDS, 6)) for _ in range(40)]

    def made(metric: str) -> Any:
        model = ir.from_onnx_text((EMBED if metric == "sts" else CLASSIFY) % given)
        ir.save(model, tmp_path / "model.onnx")
        pairs = [f"a\tb\tc\t0\t{index % 6}\t{texts[index]}\t{texts[index + 1]}" for index in range(20)]
        lines = pairs if metric == "sts" else texts
        return script.Subject("two", str(tmp_path / "model.onnx"), None, tmp_path, metric, lines, "words", texts)

    return made


def formats(script: ModuleType) -> list[Any]:
    return list(script.chosen_formats("linear-clipped,kmeans-column"))


def test_errors_bytes_and_taking_up_again(
    script: ModuleType, subject: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    path, two = tmp_path / "found.json", subject("sts")
    few = script.combinations(formats(script), [2], "without")
    script.study(two, few, script.Results.at(path), told.append)
    assert len(json.loads(path.read_text(encoding="utf-8"))["rows"]) == 1 + 2  # float comes along

    told.clear()
    results = script.Results.at(path)
    every = script.combinations(formats(script), [2, 4], "both")
    script.study(two, every, results, told.append)
    measured = [title for title in told if "bits" in title]
    assert len(measured) == 6 and "two: 2 bits, k-means per column" not in measured
    found = {(row.format, row.bits, row.compensation): row for row in results.rows.values()}
    for bits in (2, 4):
        linear, kmeans = found["linear-clipped", bits, False], found["kmeans-column", bits, False]
        assert kmeans.weight_error <= linear.weight_error
        # 256 codes; a scale of 4 bytes and a codebook of an int8 per level for each of 24 columns
        assert kmeans.bytes == 256 * bits // 8 + 24 * 4 + 24 * 2**bits
        assert kmeans.bits_per_weight - kmeans.overhead_bits == pytest.approx(bits)
    assert found["linear-clipped", 4, False].weight_error < found["linear-clipped", 2, False].weight_error
    assert found["linear-clipped", 2, True].output_error < found["linear-clipped", 2, False].output_error
    assert found["float", 32, False].bytes == 256 * 4

    monkeypatch.setattr(script, "open_source", None)  # opening the model again would fail
    script.study(two, every, script.Results.at(path), told.append)


def test_agreement_is_with_the_float_model(script: ModuleType, subject: Callable[..., Any]) -> None:
    results = script.Results()
    script.study(subject("classification"), script.combinations(formats(script), [1, 8], "without"), results, str)
    found = {(row.format, row.bits): row.score for row in results.rows.values()}
    assert found["float", 32] == 100
    assert found["kmeans-column", 8] > 90 > found["kmeans-column", 1]


def test_output_error_for_white_inputs_is_that_of_the_weights(script: ModuleType) -> None:
    weight = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
    on_weights, on_outputs = script.relative_errors(weight, np.zeros_like(weight) + weight / 2, np.eye(6) * 7)
    assert on_weights == pytest.approx(0.25) and on_outputs == pytest.approx(0.25)


def test_tables_and_plot(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def row(name: str, bits: int, score: float, error: float) -> Any:
        return script.Row("two", name, bits, False, "words", "sts", score, error, error, 1000, bits + 0.5, 0.5)

    rows = [row("float", 32, 90, 0)]
    rows += [row(name, bits, 60 + 5 * bits + gain, 0.1 / bits / (1 + gain))
             for name, gain in (("linear-clipped", 0), ("kmeans-column", 1)) for bits in (2, 3)]  # fmt: skip
    script.publish(rows, tmp_path, script.Console(quiet=True))
    text = (tmp_path / "weight-formats.md").read_text(encoding="utf-8")
    assert (
        "| linear, clip-searched | 70.00 | 75.00 |" in text and "| k-means per column | **71.00** | **76.00** |" in text
    )
    plot = ElementTree.fromstring((tmp_path / "weight-formats.svg").read_text(encoding="utf-8"))
    lines = [line for line in plot.iter() if line.tag.endswith("polyline")]
    assert len(lines) == 2 * 2  # two formats, in the panels of the error and of the score

    script.publish(rows, None, script.Console(quiet=True))
    assert "**76.00**" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--formats cubic", "--formats: there is no cubic"),
        ("--bits 4,9", "--bits: 4,9 is not a list"),
        ("--models wheels", "--models: wheels is no reference model"),
        ("--models minilm", "minilm needs --sts FILE"),
        ("--limit 1", "--limit: give at least 2 rows"),
    ],
)
def test_wrong_options_say_what_would_help(
    script: ModuleType, arguments: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["study_weight_formats.py", *arguments.split()])
    with pytest.raises(SystemExit, match=message):
        script.main()


def test_a_file_that_holds_no_results_is_refused(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(SystemExit, match="is not a file of results"):
        script.Results.at(path)
