"""The study of overfitting: every method gives a quantized decoder, and what is written follows from the figures."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import graph
from scalefold.compiler.decoder import decoder_of
from scalefold.compiler.runtime import Feed
from scalefold.compiler.testing import context_on

if TYPE_CHECKING:  # type checkers see the repository as the root, Python the folder of the script
    from scripts import study_overfitting as study
else:
    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
    import study_overfitting as study

PLAN = study.Plan(block_steps=4, steps=4)
FLOAT = study.Row(study.FLOAT, 32, 0, {"prose": 50.0, "code": 40.0})
ROWS = [
    FLOAT,
    study.Row(study.MINMAX, 8, 0, {"prose": 400.0, "code": 500.0}),
    study.Row(study.QAT, 8, 1000, {"prose": 45.0, "code": 60.0}),
    study.Row(study.BOTH, 8, 16, {"prose": 50.1, "code": 40.2}),
]


@pytest.fixture(scope="module")
def bench(decoder_models: dict[str, ir.Model]) -> study.Bench:
    model = decoder_models["gpt2"]
    generator = np.random.default_rng(0)
    samples: list[Feed] = [decoder_of(model).prompt_feed(generator.integers(5, 200, (1, 24))) for _ in range(3)]
    return study.Bench(model, context_on(model, samples), 8, PLAN)


@pytest.mark.parametrize("method", list(study.METHODS))
def test_a_method_gives_a_quantized_decoder_and_leaves_the_float_one(bench: study.Bench, method: str) -> None:
    before = study.perplexity(bench.model, bench.context.search)
    made, learned = study.METHODS[method](bench)
    assert all(graph.producer(node.inputs[0], "DequantizeLinear") for node in study_layers(made))
    assert study.perplexity(made, bench.context.search) == pytest.approx(before, rel=0.1)
    assert study.perplexity(bench.model, bench.context.search) == before
    expected = {study.MINMAX: 0, study.OSPLUS: 0, study.BLOCKS: 2 * 2 * 64, study.BOTH: 2 * 2 * 64}
    assert learned == expected.get(method, learned)
    assert (learned > 100_000) == (method in (study.QAT, study.MIGRATED_QAT))


def study_layers(model: ir.Model) -> list[ir.Node]:
    """The products of linear layers."""
    found = [node for node in graph.nodes(model, "MatMul") if graph.producer(node.inputs[1], "DequantizeLinear")]
    assert len(found) == 9
    return found


def test_a_file_to_tune_on_is_judged_on_lines_that_were_not_tuned_on(tmp_path: Path) -> None:
    path = tmp_path / "new.txt"
    path.write_text("".join(f"line {number}\n" for number in range(100)))
    tuned, judged = study.parted(path)
    assert tuned + judged == path.read_text() and tuned.endswith("\n")
    assert 70 < len(tuned.splitlines()) < 80
    plan = study.Plan(domain=path.stem, tune_on=path)
    assert study.judged_texts([], plan)["new"] == [judged]


def test_a_file_to_judge_on_cannot_take_the_place_of_another_text(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    path, other = tmp_path / "new.txt", tmp_path / "elsewhere/new.txt"
    for file in (path, other):
        file.write_text("a line\n" * 8)
    plan = study.Plan(domain=path.stem, tune_on=path)
    with pytest.raises(SystemExit, match="two texts to judge on are called new; give one of the files another name"):
        study.judged_texts([other], plan)
    assert study.judged_texts([other], PLAN)["new"] == [other.read_text()]


def test_the_sentences_follow_from_the_figures() -> None:
    assert study.sentences(ROWS, "prose") == [
        "QAT at 8 bits: -10.0% to float in prose, +50.0% in code, the worst outside it; it loses outside its domain.",
        "Quadapter 1+2 at 8 bits: +0.2% to float in prose, +0.5% in code, the worst outside it; "
        "it does not lose outside its domain.",
    ]


def test_what_calibration_alone_loses_elsewhere_is_not_held_against_learning() -> None:
    calibrated = study.Row(study.OSPLUS, 8, 0, {"prose": 50.0, "code": 42.0})
    (_, said) = study.sentences(
        [FLOAT, calibrated, *ROWS[2:3], study.Row(study.BOTH, 8, 16, {"prose": 50, "code": 42})], "prose"
    )
    assert said == (
        "Quadapter 1+2 at 8 bits: +0.0% to float in prose, +5.0% in code, the worst outside it; "
        "it does not lose outside its domain."
    )


def test_the_figures_are_written_as_json_a_table_and_a_plot(tmp_path: Path) -> None:
    study.write(ROWS, PLAN, tmp_path / "new")
    content = json.loads((tmp_path / "new/overfitting.json").read_text())
    assert content["rows"][2]["perplexity"]["code"] == 60.0 and content["plan"]["steps"] == 4
    table = (tmp_path / "new/overfitting.md").read_text()
    assert "| 8 | QAT | 1,000 | 45.00 (0.900) | 60.00 (1.500) |" in table and "prose (tuned on)" in table
    bars = ET.parse(tmp_path / "new/overfitting.svg").getroot().iter("{http://www.w3.org/2000/svg}text")
    assert {"1.500", "0.900", "8.000"} <= {bar.text for bar in bars}
