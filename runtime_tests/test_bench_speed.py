"""The benchmark of encoders: it goes on where it stopped, measures nothing twice, and writes into a page's markers."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import onnx_ir as ir
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

MODEL = """<ir_version: 10, opset_import: ["" : 20]>
model (int64[b, s] input_ids, int64[b, s] attention_mask) => (float[b, s, 4] last_hidden_state)
<int64[2] sizes = {1000, 4}> { table = ConstantOfShape<value = float[1] {0.5}>(sizes)
  last_hidden_state = Gather(table, input_ids) }"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    return importlib.import_module("bench_speed")


def test_a_run_goes_on_where_it_stopped_and_fills_a_page(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = tmp_path / "work" / "letters" / "exported"
    exported.mkdir(parents=True)
    ir.save(ir.from_onnx_text(MODEL), exported / "model.onnx")
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(exported / "tokenizer.json"))
    text, page, found = tmp_path / "text.txt", tmp_path / "page.md", tmp_path / "found.json"
    text.write_text("a b a b\n" * 4, encoding="utf-8")
    page.write_text("before\n<!-- encoders: begin -->old<!-- encoders: end -->\nafter\n", encoding="utf-8")
    options = f"--models {tmp_path / 'letters'} --work {tmp_path / 'work'} --calibration {text} --only float --turns 2"
    options += f" --shapes 1x4,2x4 --threads 1 --json {found}"

    def run(*more: str) -> list[dict[str, list[float]]]:
        monkeypatch.setattr(sys, "argv", ["bench_speed.py", *options.split(), *more])
        script.main()
        return [row["turns"] for row in json.loads(found.read_text(encoding="utf-8"))["rows"]]

    with pytest.raises(SystemExit, match="run it again to go on"):
        run("--minutes", "0")
    (first,) = run("--write", str(page))
    assert {shape: len(turns) for shape, turns in first.items()} == {"1x4": 2, "2x4": 2}
    (again,) = run()
    assert again == first
    written = page.read_text(encoding="utf-8")
    assert written.startswith("before\n<!-- encoders: begin -->\n\n###") and written.endswith("end -->\nafter\n")
    assert "old" not in written and "(1.00 [1.00, 1.00])" in written


def test_a_page_without_markers_is_refused(script: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text", encoding="utf-8")
    with pytest.raises(SystemExit, match="has no lines `<!-- encoders: begin -->`"):
        script.bench_report.splice(page, "encoders", "new")
    assert page.read_text(encoding="utf-8") == "text"


def test_ratios_go_by_round_and_a_shape_is_measured_for_all_or_none(script: ModuleType) -> None:
    turns = script.bench_turns
    built = script.contenders.Built()
    rows = [
        turns.Row("m", name, name, "", built, turns={"1x4": seconds})
        for name, seconds in (("float", [2.0, 4.0, 6.0]), ("other", [1.0, 1.0, 2.0]))
    ]
    assert turns.speed_up(rows[1], rows[0], "1x4") == (2.5, 3.0, 3.5)
    assert turns.missing(rows, ["1x4"], 3) == []
    assert turns.missing([*rows, turns.Row("m", "new", "new", "", built)], ["1x4"], 3) == ["1x4"]
    failed = turns.Row("m", "new", "new", "", built, failure="it stopped")
    assert turns.missing([*rows, failed], ["1x4"], 3) == []
    assert turns.speed_up(failed, rows[0], "1x4") is None


def test_each_engine_has_pins_of_its_own(script: ModuleType) -> None:
    environments = script.contenders.bench_environments
    for engine, packages in environments.PACKAGES.items():
        pinned = {line.partition("==")[0].lower() for line in environments.constraints(engine).splitlines()}
        assert set(packages) <= pinned
    assert environments.interpreter("onnxruntime") == sys.executable
