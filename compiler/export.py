"""From a Hugging Face model to a float ONNX file, by the exporter that transformers ships."""

from __future__ import annotations

import gc
import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalefold.compiler.errors import SourceError

if TYPE_CHECKING:
    import torch

TASKS = {
    "feature-extraction": "AutoModel",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
}
ARCHITECTURE_SUFFIXES = {
    "ForMaskedLM": "masked-lm",
    "ForPreTraining": "masked-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}


def export_model(source: object, folder: Path, task: str | None = None) -> str:
    """Export a model with dynamic batch and length, and save its config and tokenizer beside it.

    Writes `model.onnx`, `model.onnx.data` (the weights), `export.json` (transformers' manifest), `config.json` and, when
    the source has one, the tokenizer's files.

    Args:
        source: a hub id, a local folder, or a `PreTrainedModel`.
        folder: where to write; created.
        task: one of `TASKS`; found from the config's architecture when None.

    Returns:
        the task.

    Raises:
        SourceError: the packages are not installed, or the model cannot be found or exported.
    """
    transformers = _require("transformers")
    exporters = _require("transformers.exporters")
    with _quiet(transformers):
        model, tokenizer, task = _load(transformers, source, task)
        model = model.eval().float()
        inputs = _sample_inputs(model, tokenizer)
        try:
            config = exporters.OnnxConfig(dynamic=True, dynamic_shapes=_dynamic_shapes(model, inputs))
            exported = exporters.OnnxExporter().export(model, inputs, config=config)
        except Exception as error:  # torch.export raises errors of many kinds
            raise SourceError(
                f"the exporter of transformers {transformers.__version__} failed ({_first_line(error)})",
                where=_describe(source),
                remedy="export it yourself and give the .onnx file instead",
            ) from error
        exported.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        del exported, model
    gc.collect()
    return task


def _require(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SourceError(
            f"exporting a Hugging Face model needs the package {error.name or name}",
            where="the Python installation",
            remedy="pip install 'scalefold[hf]', or give an .onnx file",
        ) from error


def _load(transformers: Any, source: object, task: str | None) -> tuple[Any, Any, str]:
    if not isinstance(source, str | Path):
        if not hasattr(source, "config"):
            raise SourceError(
                f"a {type(source).__name__} is not a model",
                where="source",
                remedy="give a hub id, a folder, an .onnx file, or a transformers model",
            )
        return source, None, task or _task_of(source.config)
    name = str(source)
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        task = task or _task_of(config)
        if task not in TASKS:
            raise SourceError(f"there is no task {task!r}", where="--task", remedy=f"choose from {', '.join(TASKS)}")
        model = getattr(transformers, TASKS[task]).from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(
            f"no model can be loaded from it ({_first_line(error)})",
            where=name,
            remedy="check the spelling; give an existing folder, an .onnx file, or a hub id that can be reached",
        ) from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        tokenizer = None
    return model, tokenizer, task


def _task_of(config: Any) -> str:
    architecture = (getattr(config, "architectures", None) or [""])[0]
    for suffix, task in ARCHITECTURE_SUFFIXES.items():
        if architecture.endswith(suffix):
            return task
    return "feature-extraction"


def _sample_inputs(model: Any, tokenizer: Any) -> dict[str, torch.Tensor]:
    torch = importlib.import_module("torch")
    names = ["input_ids", "attention_mask"]
    if getattr(model.config, "type_vocab_size", 0) and "token_type_ids" in _names_of(tokenizer):
        names.insert(1, "token_type_ids")
    shape = (2, 8)
    ids = torch.arange(16).reshape(shape) % model.config.vocab_size
    every = {
        "input_ids": ids,
        "attention_mask": torch.ones(shape, dtype=torch.int64),
        "token_type_ids": torch.zeros(shape, dtype=torch.int64),
    }
    return {name: every[name] for name in names}


def _names_of(tokenizer: Any) -> list[str]:
    return list(tokenizer.model_input_names) if tokenizer is not None else ["token_type_ids"]


def _dynamic_shapes(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, dict[int, Any]]:
    """Batch and length vary, and are the same for every input."""
    dim = importlib.import_module("torch.export").Dim
    longest = getattr(model.config, "max_position_embeddings", None)
    batch, length = dim("batch"), dim("sequence", max=longest) if longest else dim("sequence")
    return {name: {0: batch, 1: length} for name in inputs}


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence the exporter: stdout belongs to the caller's machine-readable output, and its warnings are not the user's."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    disabled = logging.root.manager.disable
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _describe(source: object) -> str:
    return str(source) if isinstance(source, str | Path) else type(source).__name__


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300].rstrip(". ") if lines else type(error).__name__
