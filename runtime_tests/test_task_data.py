"""Samples of a task: what of them is scored, how they are padded and cut, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from scalefold.compiler.errors import CalibrationError, SourceError
from scalefold.compiler.task_data import UNSCORED, Task, TaskData
from scalefold.compiler.testing import parse

END = 9

DECODER = """
    <ir_version: 9, opset_import: ["" : 20]>
    decoder (int64[B, S] input_ids, float[B, 1, P, 2] past_key_values.0.key)
        => (float[B, S, 10] logits, float[B, 1, T, 2] present.0.key) {
        logits = Identity(input_ids)
        present.0.key = Identity(past_key_values.0.key)
    }"""
CLASSIFIER = """
    <ir_version: 9, opset_import: ["" : 20]>
    classifier (int64[B, S] input_ids, int64[B, S] attention_mask, int64[B, S] token_type_ids) => (float[B, 3] logits) {
        logits = Identity(input_ids)
    }"""


def renamed(text: str) -> ir.Model:
    """Names with dots, which ONNX text does not have, are written with underscores in it."""
    model = parse(text.replace("past_key_values.0.key", "past").replace("present.0.key", "present"))
    for value in [*model.graph.inputs, *model.graph.outputs]:
        value.name = {"past": "past_key_values.0.key", "present": "present.0.key"}.get(value.name or "", value.name)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(9)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token_id": END, "id2label": {"0": "no", "1": "yes", "2": "perhaps"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def data(folder: Path, rows: list[Any], task: Task = "causal-lm", max_length: int = 64) -> TaskData:
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    model = renamed(DECODER if task == "causal-lm" else CLASSIFIER)
    return TaskData(path, task, model, folder, max_length)


def test_only_the_target_and_the_end_are_scored(folder: Path) -> None:
    found = data(folder, [{"prompt": "w1 w2", "target": "w3 w4"}, {"text": "w5 w6"}, {"prompt": "", "target": "w7 w8"}])
    batch = found.batch([0, 1, 2])
    assert batch.feed["input_ids"].tolist() == [[1, 2, 3, 4, END], [5, 6, END, 0, 0], [7, 8, END, 0, 0]]
    no = UNSCORED
    assert batch.wanted.tolist() == [[no, 3, 4, END, no], [6, END, no, no, no], [8, END, no, no, no]]
    assert batch.scored == 7
    assert batch.feed["past_key_values.0.key"].shape == (3, 1, 0, 2)


def test_the_loss_is_the_sum_over_what_is_scored(folder: Path) -> None:
    batch = data(folder, [{"prompt": "w1", "target": "w3"}]).batch([0])
    logits = np.zeros((1, 3, 10), dtype=np.float32)
    logits[0, 0, 3] = np.log(9)  # probability 1/2; the end of text has 1/10
    assert batch.loss(logits) == pytest.approx(np.log(2) + np.log(10))


def test_a_long_prompt_loses_its_beginning_and_a_long_target_its_end(folder: Path) -> None:
    rows = [{"prompt": "w1 w2 w3 w4", "target": "w5"}, {"prompt": "w1 w2", "target": "w3 w4 w5 w6"}]
    found = data(folder, rows, max_length=4)
    assert [example.ids for example in found.examples] == [(3, 4, 5, END), (2, 3, 4, 5)]
    assert [example.first for example in found.examples] == [2, 1]
    assert found.cut == 2


def test_labels_are_numbers_or_names_and_padding_is_masked(folder: Path) -> None:
    rows = [{"text": "w1 w2 w3", "label": 2}, {"text": "w4", "label": "yes"}, {"text": "w5", "label": "0"}]
    batch = data(folder, rows, "classification").batch([0, 1, 2])
    assert batch.wanted.tolist() == [2, 1, 0]
    assert batch.feed["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    assert batch.loss(np.zeros((3, 3), dtype=np.float32)) == pytest.approx(3 * np.log(3))


def test_a_long_text_keeps_its_special_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="w7 $A w8", special_tokens=[("w7", 7), ("w8", 8)])
    tokenizer.save(str(folder / "tokenizer.json"))
    found = data(folder, [{"text": "w1 w2 w3 w4", "label": 1}], "classification", max_length=4)
    assert found.examples[0].ids == (7, 1, 2, 8)


@pytest.mark.parametrize(
    ("row", "task", "message"),
    [
        ({"prompt": "w1"}, "causal-lm", "line 2 has no target"),
        ({"prompt": "w1", "target": ""}, "causal-lm", "line 2 has no target"),
        ({"target": "w1"}, "causal-lm", "line 2 has no prompt"),
        ({"question": "w1"}, "causal-lm", "line 2 has no text"),
        ({"text": 3}, "causal-lm", "line 2 has no text"),
        ("{", "causal-lm", "line 2 is not a JSON object"),
        ("[1]", "causal-lm", "line 2 is not a JSON object"),
        ({"text": "w1"}, "classification", "line 2 has no label"),
        ({"text": "w1", "label": 3}, "classification", "line 2 has the label 3, which is outside the head's 3"),
        ({"text": "w1", "label": -1}, "classification", "outside the head's 3"),
        ({"text": "w1", "label": "maybe"}, "classification", "outside the head's 3"),
        ({"text": "w1", "label": True}, "classification", "outside the head's 3"),
    ],
)
def test_a_line_that_is_no_sample_is_named(folder: Path, row: Any, task: Task, message: str) -> None:
    good = {"text": "w1 w2", "label": 0} if task == "classification" else {"prompt": "w1", "target": "w2"}
    with pytest.raises(CalibrationError, match=message) as raised:
        data(folder, [good, row], task)
    assert "\n" not in str(raised.value)


def test_separators_that_json_allows_do_not_cut_a_line_and_a_mark_in_front_is_skipped(folder: Path) -> None:
    (folder / "rows.jsonl").write_text('\ufeff{"text": "w1\u2028w2"}\n\n{"text": 5}\n', encoding="utf-8")
    with pytest.raises(CalibrationError, match="line 3 has no text"):
        TaskData(folder / "rows.jsonl", "causal-lm", renamed(DECODER), folder, 64)


def test_a_file_without_samples_and_a_model_of_another_task_are_refused(folder: Path) -> None:
    with pytest.raises(CalibrationError, match="it holds no samples"):
        data(folder, [" "])
    with pytest.raises(CalibrationError, match="cannot be read"):
        TaskData(folder / "none.jsonl", "causal-lm", renamed(DECODER), folder, 8)
    with pytest.raises(SourceError, match="one row of logits"):
        TaskData(folder / "rows.jsonl", "classification", renamed(DECODER), folder, 8)
    with pytest.raises(SourceError, match="not a decoder"):
        TaskData(folder / "rows.jsonl", "causal-lm", renamed(CLASSIFIER), folder, 8)
