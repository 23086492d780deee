"""From a Hugging Face model to a float ONNX file, by the exporter that transformers ships."""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from scalefold.compiler.errors import SourceError, needing_packages

if TYPE_CHECKING:
    import torch

TASKS = {
    "feature-extraction": "AutoModel",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "causal-lm": "AutoModelForCausalLM",
}
ARCHITECTURE_SUFFIXES = {
    "ForMaskedLM": "masked-lm",
    "ForPreTraining": "masked-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
}


SENTENCE_FILES = (
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json",
)  # fmt: skip
"""What sentence-transformers reads beside a model: how its tokens become the embedding of a sentence."""

SLOW_RULE = "SlicesSplit"
"""Two Slices to one Split: onnxscript goes through the whole graph for every node of it, a third of an export's time."""

TRACING = (
    ("torch.fx.config", "do_not_emit_stack_traces", True),
    ("torch._dynamo.config", "fake_tensor_cache_enabled", False),
)
"""Settings of torch that make tracing a decoder a fifth quicker: no node is told where in the model's code it comes from,
and shapes are not looked up among earlier ones, which are other shapes almost always where sizes are symbols."""


def export_model(source: object, folder: Path, task: str | None = None) -> None:
    """Export a model with dynamic batch and length, and save its config and tokenizer beside it.

    Writes `model.onnx`, `model.onnx.data` (the weights), `export.json` (transformers' manifest), `config.json` and, when
    the source has one, the tokenizer's files. The export runs in a process of its own: what it prints stays out of the
    way, and the memory of torch is given back before anything else is done.

    Args:
        source: a hub id, a local folder, or a `PreTrainedModel`.
        folder: where to write; created.
        task: one of `TASKS`; found from the config's architecture when None.

    Raises:
        SourceError: the packages are not installed, or the model cannot be found or exported.
    """
    folder.mkdir(parents=True, exist_ok=True)
    where = str(source)
    if not isinstance(source, str | Path):
        where = type(source).__name__
        if not hasattr(source, "save_pretrained") or not hasattr(source, "config"):
            raise SourceError(
                f"a {where} is not a model",
                where="source",
                remedy="give a hub id, a folder, an .onnx file, or a transformers model",
            )
        source.save_pretrained(folder / "source")
        source = folder / "source"
    command = [sys.executable, "-m", "scalefold.compiler.export", str(source), str(folder), task or ""]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    lines = done.stdout.strip().splitlines()
    if done.returncode == SourceError.exit_code and lines:
        what, where_in_child, remedy = json.loads(lines[-1])
        raise SourceError(what, where=where_in_child, remedy=remedy)
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    raise SourceError(
        f"the exporter's process died ({reason[:300]})",
        where=where,
        remedy="check the memory that is free, or export it yourself and give the .onnx file instead",
    )


def main(arguments: list[str]) -> int:
    """The exporting process: source, folder and task (may be empty); an error goes to stdout as one line of JSON."""
    source, folder, task = arguments
    try:
        _export(source, Path(folder), task or None)
    except SourceError as error:
        sys.stdout.write("\n" + json.dumps([error.what, error.where, error.remedy]) + "\n")
        return error.exit_code
    return 0


def _export(source: str, folder: Path, task: str | None) -> None:
    with needing_packages("exporting a Hugging Face model", "pip install 'scalefold[hf]', or give an .onnx file"):
        transformers, exporters = map(importlib.import_module, ("transformers", "transformers.exporters"))
    model, tokenizer, task = _load(transformers, source, task)
    _leave_out(SLOW_RULE)
    _trace_quickly()
    try:
        inputs = _step_inputs(model) if task == "causal-lm" else _sample_inputs(model, tokenizer)
        shapes = None if task == "causal-lm" else _dynamic_shapes(model, inputs)  # None: the exporter finds them
        config = exporters.OnnxConfig(dynamic=True, dynamic_shapes=shapes)
        exported = exporters.OnnxExporter().export(model, inputs, config=config)
    except Exception as error:  # torch.export raises errors of many kinds
        raise SourceError(
            f"the exporter of transformers {transformers.__version__} failed ({_first_line(error)})",
            where=source,
            remedy="export it yourself and give the .onnx file instead",
        ) from error
    if task == "causal-lm":
        _rename_sizes(exported.program)
    exported.save_pretrained(folder)
    if task == "causal-lm":
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if task == "feature-extraction":
        _copy_sentence_files(transformers, source, folder)


def _leave_out(rule: str) -> None:
    """Let the exporter's optimizer do without one of its rules, where this version has it."""
    known = vars(importlib.import_module("onnxscript.rewriter"))
    name = "_DEFAULT_REWRITE_RULES"
    if name in known:
        known[name] = tuple(entry for entry in known[name] if entry.name != rule)


def _trace_quickly() -> None:
    """Change what `TRACING` names, where this version has it."""
    for module, name, value in TRACING:
        settings = importlib.import_module(module)
        if hasattr(settings, name):
            setattr(settings, name, value)


def _copy_sentence_files(transformers: Any, source: str, folder: Path) -> None:
    """Copy what sentence-transformers reads, so that it loads the compiled folder too; most models have none of it."""
    for name in SENTENCE_FILES:
        found = transformers.utils.cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(found, folder / name)


def _load(transformers: Any, source: str, task: str | None) -> tuple[Any, Any, str]:
    """(model, tokenizer or None, task)."""
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        task = task or task_of(config)
        if task not in TASKS:
            raise SourceError(f"there is no task {task!r}", where="--task", remedy=f"choose from {', '.join(TASKS)}")
        loader = getattr(transformers, TASKS[task])
        model, loading = loader.from_pretrained(source, output_loading_info=True)
        model = model.eval().float()
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(
            f"no model can be loaded from it ({_first_line(error)})",
            where=source,
            remedy="check the spelling; give an existing folder, an .onnx file, or a hub id that can be reached",
        ) from error
    if missing := _not_to_be_invented(loading["missing_keys"]):
        raise SourceError(
            f"the checkpoint lacks {len(missing)} of the weights that {task} needs, such as {missing[0]}",
            where=source,
            remedy="give the whole checkpoint, or --task for what it was trained on",
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError):
        return model, None, task
    # A source without tokenizer files gives one that knows its special tokens alone, and would make a word of nothing.
    return model, tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None, task


def _not_to_be_invented(missing: Iterable[str]) -> list[str]:
    """The missing weights that matter: a pooler that a checkpoint lacks is no part of its embeddings."""
    return sorted(name for name in missing if "pooler." not in name)


def task_of(config: Any) -> str:
    """The task that a config's first architecture names; feature extraction when it names none."""
    architecture = (getattr(config, "architectures", None) or [""])[0]
    for suffix, task in ARCHITECTURE_SUFFIXES.items():
        if architecture.endswith(suffix):
            return task
    return "feature-extraction"


def _step_inputs(model: Any) -> dict[str, Any]:
    """Three tokens behind a cache of two: the step that serves a prompt (empty cache) and every token after it.

    As `OnnxExporter.export_for_generation(..., multi_token_decode=True)` captures its decode component, but with the
    attention mask, which generation leaves out where nothing is padded, and without a second graph for the prompt.
    """
    torch = importlib.import_module("torch")
    ids = torch.arange(10).reshape(2, 5) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        first = {name: values[:, :2] for name, values in inputs.items()}
        past = model(**first, use_cache=True).past_key_values
    behind = {name: values if name == "attention_mask" else values[:, 2:] for name, values in inputs.items()}
    return {**behind, "past_key_values": past, "use_cache": True}


def _rename_sizes(model: ir.Model) -> None:
    """Call the sizes that vary batch, sequence and past, which the exporter numbers, and make numbers of the others."""
    whole = "past + sequence"
    called = {
        "input_ids": ("batch", "sequence"),
        "attention_mask": ("batch", whole),
        "past_key_values": ("batch", None, "past"),
    }
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        wanted = next((sizes for name, sizes in called.items() if name in (value.name or "")), ())
        for size, name in zip(value.shape or (), wanted, strict=False):
            if name and isinstance(size, ir.SymbolicDim) and size.value is not None:
                names.setdefault(size.value, name)

    def renamed(size: ir.SymbolicDim | int) -> ir.SymbolicDim | int:
        if isinstance(size, int) or size.value is None:
            return size
        text = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), size.value)
        return int(text) if text.isdigit() else ir.SymbolicDim(text.replace("sequence + past", whole))

    values = [*model.graph.inputs, *(out for node in model.graph for out in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([renamed(size) for size in value.shape])


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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300].rstrip(". ") if lines else type(error).__name__


if __name__ == "__main__":
    gc.disable()  # a trace is millions of objects that live to its end: a tenth of the time went into looking at them
    sys.exit(main(sys.argv[1:]))
