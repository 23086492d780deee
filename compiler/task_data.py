"""Samples of a task: JSON lines as token ids, and what a model should answer to them.

    {"prompt": "...", "target": "..."}     causal-lm: the target's tokens are to be predicted, and the end of text
    {"text": "..."}                        causal-lm: all tokens but the first are
    {"text": "...", "label": 1}            classification: a number, or a name of config.json's id2label

Prompt and target are encoded apart, so that the target begins at a token; a space between them belongs to one of the two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from scalefold.compiler.calibrate import TEXT_INPUTS, read_tokenizer
from scalefold.compiler.decoder import LOGITS, decoder_of, log_softmax, position_limit
from scalefold.compiler.errors import CalibrationError, SourceError
from scalefold.compiler.runtime import Array, Feed, inputs_of
from scalefold.compiler.text_file import numbered_lines, read_text

Task = Literal["causal-lm", "classification"]

UNSCORED = -100
"""Stands where nothing is to be predicted: what torch's cross entropy leaves out."""


@dataclass(frozen=True)
class Example:
    """One sample.

    Attributes:
        ids: its tokens.
        first: index of the first token that is to be predicted; the number of tokens for classification.
        label: the class, for classification.
    """

    ids: tuple[int, ...]
    first: int
    label: int | None = None


@dataclass(frozen=True)
class Batch:
    """Some samples as a model takes them.

    Attributes:
        feed: the model's inputs.
        wanted: int64: the class of each sample [B], or what follows each token [B,S], `UNSCORED` where nothing is asked.
    """

    feed: Feed
    wanted: Array

    @property
    def scored(self) -> int:
        """How many answers are asked for."""
        return int((self.wanted != UNSCORED).sum())

    def loss(self, logits: Array) -> float:
        """The sum of the negative log-likelihoods, in nats, of logits [B,V] or [B,S,V]."""
        asked = self.wanted != UNSCORED
        rows = log_softmax(logits[asked])
        return -float(rows[np.arange(len(rows)), self.wanted[asked]].sum())


class TaskData:
    """The samples of a file, for one model.

    Args:
        path: JSON lines.
        task: what is asked.
        model: its inputs say what a feed holds, its logits how many classes there are.
        folder: where its tokenizer.json and config.json are.
        max_length: most tokens of a sample: prompts lose their beginning, targets and texts their end.

    Raises:
        CalibrationError: the file cannot be read, a line is no sample of the task, or a label is outside the head.
        SourceError: the model is not one for the task.
    """

    def __init__(self, path: Path, task: Task, model: ir.Model, folder: Path, max_length: int) -> None:
        self._path, self._task, self._model = path, task, model
        self._limit = min(max_length, position_limit(folder) or max_length)
        self._tokenizer = read_tokenizer(folder / "tokenizer.json")
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._config = _config(folder)
        self.cut = 0
        self._decoder = decoder_of(model) if task == "causal-lm" else None
        self._classes = _classes(model, self._config) if task == "classification" else 0
        content = read_text(path, "give JSON lines")
        self.digest = hashlib.sha256(content.encode()).hexdigest()
        self.examples = [self._example(_row(line, number, path), number) for number, line in numbered_lines(content)]
        if not self.examples:
            raise CalibrationError("it holds no samples", where=str(path), remedy="give one JSON object a line")

    def batch(self, chosen: Sequence[int]) -> Batch:
        """The samples of these numbers, padded on the right to the longest."""
        picked = [self.examples[index] for index in chosen]
        longest = max(len(example.ids) for example in picked)
        ids = np.zeros((len(picked), longest), dtype=np.int64)
        mask = np.zeros_like(ids)
        wanted = np.full_like(ids, UNSCORED)
        for row, example in enumerate(picked):
            length = len(example.ids)
            ids[row, :length], mask[row, :length] = example.ids, 1
            wanted[row, example.first - 1 : length - 1] = example.ids[example.first :]
        if self._decoder is not None:
            # what is padded on the right is seen by no token before it, so no mask is needed
            return Batch(self._decoder.prompt_feed(ids), wanted)
        return Batch(self._text_feed(ids, mask), np.array([example.label for example in picked], dtype=np.int64))

    def _text_feed(self, ids: Array, mask: Array) -> Feed:
        names = inputs_of(self._model)
        if "attention_mask" not in names and not mask.all():
            raise SourceError(
                "its graph takes no attention_mask, so texts of two lengths do not fit one batch",
                where="the model",
                remedy="train on one sample at a time",
            )
        every = {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": np.zeros_like(ids),
            "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0),
        }
        return {
            name: np.asarray(every[name], dtype=np.int64 if value.dtype is None else value.dtype.numpy())
            for name, value in names.items()
        }

    def _example(self, row: dict[str, Any], number: int) -> Example:
        if self._task == "classification":
            text = self._encode(self._text(row, "text", number))
            return Example(self._kept(text), len(text), self._label(row, number))
        end = self._config.get("eos_token_id")
        ends = [] if end is None else [end[0] if isinstance(end, list) else end]
        if "prompt" in row or "target" in row:
            prompt = self._encode(self._text(row, "prompt", number))
            target = [*self._encode(self._text(row, "target", number), special=False), *ends]
        else:
            prompt, target = [], [*self._encode(self._text(row, "text", number)), *ends]
        self.cut += len(prompt) + len(target) > self._limit
        prompt = prompt[-max(self._limit - len(target), 1) :]
        ids, first = [*prompt, *target][: self._limit], max(len(prompt), 1)
        if first >= len(ids):
            raise self._fault(number, "has no target", "give every sample some text to predict")
        return Example(tuple(ids), first)

    def _kept(self, ids: list[int]) -> tuple[int, ...]:
        """A text without its middle: its special tokens stand at its ends."""
        self.cut += len(ids) > self._limit
        return tuple(ids if len(ids) <= self._limit else [*ids[: self._limit - 1], ids[-1]])

    def _encode(self, text: str, *, special: bool = True) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def _text(self, row: dict[str, Any], key: str, number: int) -> str:
        found = row.get(key)
        if not isinstance(found, str) or (key != "prompt" and not found):
            remedy = (
                'give {"text": ..., "label": ...} a line'
                if self._task == "classification"
                else 'give {"prompt": ..., "target": ...} or {"text": ...} a line'
            )
            raise self._fault(number, f"has no {key}", remedy)
        return found

    def _label(self, row: dict[str, Any], number: int) -> int:
        label = row.get("label")
        names = {str(name): int(index) for index, name in (self._config.get("id2label") or {}).items()}
        index = names.get(label) if isinstance(label, str) else label
        if isinstance(label, str) and index is None and label.isdigit():
            index = int(label)
        if label is None:
            raise self._fault(number, "has no label", 'give {"text": ..., "label": ...} a line')
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < self._classes:
            remedy = f"give a number below {self._classes}, or a name of config.json's id2label"
            raise self._fault(number, f"has the label {label!r}, which is outside the head's {self._classes}", remedy)
        return index

    def _fault(self, number: int, what: str, remedy: str) -> CalibrationError:
        return CalibrationError(f"line {number} {what}", where=str(self._path), remedy=remedy)


def _row(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise CalibrationError(
            f"line {number} is not a JSON object", where=str(path), remedy="give one JSON object a line"
        )
    return row


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _classes(model: ir.Model, config: dict[str, Any]) -> int:
    """How many classes the head of a classifier has."""
    logits = next((value for value in model.graph.outputs if value.name == LOGITS), None)
    if logits is None or set(inputs_of(model)) - TEXT_INPUTS or (logits.shape is not None and len(logits.shape) != 2):
        raise SourceError(
            "it does not give one row of logits for a text",
            where="the model",
            remedy="compile a classifier with --task sequence-classification",
        )
    last = str(logits.shape[1]) if logits.shape is not None else ""
    return int(last) if last.isdigit() else len(config.get("id2label") or {})
