from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from scalefold.compiler import export
from scalefold.compiler.errors import SourceError
from scalefold.compiler.export import export_model, task_of
from scalefold.compiler.runtime import Feed, Session
from scalefold.compiler.verify import sqnr

RUN = subprocess.run


def test_an_export_equals_the_model_at_any_batch_and_length(
    tiny_model: Any, float_model: Path, fresh_feeds: list[Feed]
) -> None:
    import torch

    session = Session(float_model)
    wide = {name: np.repeat(array, 3, axis=0) for name, array in fresh_feeds[2].items()}
    longest: Feed = {name: np.ones((1, 64), dtype=np.int64) for name in fresh_feeds[0]}
    for feed in (fresh_feeds[0], wide, longest):
        with torch.no_grad():
            wanted = tiny_model(**{name: torch.from_numpy(array) for name, array in feed.items()})
        got = session.run(feed)
        assert sqnr(wanted.last_hidden_state.numpy(), got["last_hidden_state"]) >= 90
        assert sqnr(wanted.pooler_output.numpy(), got["pooler_output"]) >= 90


def test_config_tokenizer_and_manifest_travel_along(float_model: Path) -> None:
    names = {path.name for path in float_model.parent.iterdir()}
    assert {"model.onnx", "model.onnx.data", "export.json", "config.json", "tokenizer.json"} <= names
    manifest = json.loads((float_model.parent / "export.json").read_text(encoding="utf-8"))
    assert manifest["components"]["model"]["file"] == "model.onnx"
    assert set(manifest["components"]["model"]["metadata"]["kwargs"]) == {
        "input_ids",
        "token_type_ids",
        "attention_mask",
    }


def test_weights_lie_in_one_external_file(float_model: Path, tiny_model: Any) -> None:
    weights = sum(parameter.numel() * 4 for parameter in tiny_model.parameters())
    assert float_model.with_name("model.onnx.data").stat().st_size >= 0.95 * weights
    assert [path.name for path in float_model.parent.glob("*.data")] == ["model.onnx.data"]


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertModel", "feature-extraction"),
        ("BertForMaskedLM", "masked-lm"),
        ("BertForPreTraining", "masked-lm"),
        ("RobertaForSequenceClassification", "sequence-classification"),
        ("DebertaV2ForTokenClassification", "token-classification"),
        ("DistilBertForQuestionAnswering", "question-answering"),
    ],
)
def test_the_task_is_what_the_architecture_says(architecture: str, task: str) -> None:
    assert task_of(SimpleNamespace(architectures=[architecture])) == task
    assert task in export.TASKS


def test_the_task_is_feature_extraction_when_no_architecture_is_named() -> None:
    assert task_of(SimpleNamespace(architectures=None)) == "feature-extraction"
    assert task_of(SimpleNamespace()) == "feature-extraction"


def test_an_object_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"source: a dict is not a model; give a hub id, a folder, an .onnx file"):
        export_model({}, tmp_path)


def child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let the exporting process run other code."""

    def other(command: list[str], **options: Any) -> Any:
        return RUN([sys.executable, "-c", code], **options)

    monkeypatch.setattr(subprocess, "run", other)


def test_an_exporter_that_dies_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, "import sys; sys.exit('Killed by\\nthe kernel')")
    with pytest.raises(SourceError, match=r"some/model: the exporter's process died \(the kernel\); check the memory"):
        export_model("some/model", tmp_path)
    child(monkeypatch, "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(SourceError, match=r"the exporter's process died \(exit code -9\)"):
        export_model("some/model", tmp_path)


def test_an_error_of_the_exporting_process_comes_through_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, 'import sys; print(\'noise\'); print(\'["what", "where", "remedy"]\'); sys.exit(2)')
    with pytest.raises(SourceError) as caught:
        export_model("some/model", tmp_path)
    assert (caught.value.what, caught.value.where, caught.value.remedy) == ("what", "where", "remedy")


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert export.main(["some/model", str(tmp_path), ""]) == SourceError.exit_code
    what, where, remedy = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "needs the package transformers" in what
    assert where == "the Python installation"
    assert "pip install 'scalefold[hf]'" in remedy


def test_one_slow_rule_of_the_exporters_optimizer_is_left_out_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rules = tuple(SimpleNamespace(name=name) for name in ("FlattenToReshape", "SlicesSplit", "OneReshape"))
    known = SimpleNamespace(_DEFAULT_REWRITE_RULES=rules)
    monkeypatch.setitem(sys.modules, "onnxscript.rewriter", known)
    export._leave_out("SlicesSplit")
    assert [rule.name for rule in known._DEFAULT_REWRITE_RULES] == ["FlattenToReshape", "OneReshape"]
    other = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "onnxscript.rewriter", other)
    export._leave_out("SlicesSplit")
    assert vars(other) == {}


def test_the_rule_that_is_left_out_is_one_that_the_optimizer_has() -> None:
    rewriter = pytest.importorskip("onnxscript.rewriter")
    assert export.SLOW_RULE in {rule.name for rule in rewriter._DEFAULT_REWRITE_RULES}


def test_torch_has_the_settings_that_make_tracing_quicker() -> None:
    for module, name, _ in export.TRACING:
        assert hasattr(importlib.import_module(module), name)


def test_settings_that_torch_does_not_have_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SimpleNamespace(known=1)
    monkeypatch.setitem(sys.modules, "settings", settings)
    monkeypatch.setattr(export, "TRACING", (("settings", "known", 2), ("settings", "unknown", 3)))

    export._trace_quickly()

    assert vars(settings) == {"known": 2}
