"""What AlphaTuning reaches on the in-house decoders: losses of two tasks, numbers trained, sizes.

For each model, task and number of bits: the held-out loss of float fine-tuning, of the binary-coded model untuned, and with
alpha_1, all alphas, or the scales of columns tuned. Losses of compiled models are measured in onnxruntime. Nothing is
downloaded: the first task is made of the docstrings of this Python; the second is E2E's devset, where --e2e names it.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import inspect
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional

from scalefold.compiler import artifact, calibrate
from scalefold.compiler.driver import compile_model
from scalefold.compiler.export import export_model
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.recipe import Recipe
from scalefold.compiler.task_data import TaskData
from scalefold.compiler.tunable_weights import Train
from scalefold.compiler.tuning import ROUNDS, Settings, split, tune

MODELS = {"gpt2-tiny": "scalefold.models.gpt2_tiny", "opt-tiny": "scalefold.models.opt_tiny"}
TRAINED: tuple[Train, ...] = ("alpha1", "alphas", "scales")
LAYERS = "h\\.|layers\\."
"""The layers of the transformer; the output layer is the table of embeddings, which stays as it is."""

GPT2_MEDIUM = {"width": 1024, "layers": 24, "vocabulary": 50257, "positions": 1024}
LONGEST = 160
"""Characters of a docstring's first sentence."""


@dataclass(frozen=True)
class Plan:
    """How everything is trained."""

    samples: int
    epochs: int
    batch: int
    lr: float
    float_lr: float
    seed: int

    def settings(self, train: Train) -> Settings:
        """Of `scalefold tune`."""
        return Settings(train, self.epochs, self.lr, self.batch, self.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="models, adapters, figures")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--bits", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--e2e", type=Path, metavar="FILE", help="devset.csv of the E2E data set: the second task")
    parser.add_argument("--only-e2e", action="store_true", help="leave out the first task")
    parser.add_argument("--samples", type=int, default=320)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--float-lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.only_e2e and given.e2e is None:
        parser.error("--only-e2e leaves no task without --e2e")
    plan = Plan(given.samples, given.epochs, given.batch, given.lr, given.float_lr, given.seed)
    given.output.mkdir(parents=True, exist_ok=True)
    tasks = {} if given.only_e2e else {"docstrings": docstrings()}
    if given.e2e is not None:
        tasks["e2e"] = e2e(given.e2e)
    print("\n".join(count_gpt2_medium()), flush=True)
    for name in given.models:
        for task, rows in tasks.items():
            data = given.output / f"{task}.jsonl"
            write_rows(data, rows, plan)
            print(
                f"{name}, {task}: float fine-tuning {float_line(name, exported(name, given.output), data, plan)}",
                flush=True,
            )
            for bits in given.bits:
                base = compiled(name, bits, given.output)
                for line in study(base, data, given.output / f"{name}-{task}-{bits}", plan):
                    print(f"{name}, {task}, q = {bits}: {line}", flush=True)


def docstrings() -> list[dict[str, str]]:
    """Names of the standard library's functions and classes, and the first sentences of their docstrings."""
    rows = {}
    for module in calibrate.modules_with_prose():
        for key, entry in inspect.getmembers(module, lambda value: inspect.isfunction(value) or inspect.isclass(value)):
            for where, text in documented(f"{module.__name__}.{key}", entry):
                sentence = " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".")
                if 20 <= len(sentence) <= LONGEST and not key.startswith("_"):
                    rows[where] = sentence
    return [{"prompt": f"{where}:", "target": f" {rows[where]}."} for where in sorted(rows)]


def documented(where: str, entry: Any) -> Iterator[tuple[str, str]]:
    """An object's docstring and, of a class, those of its methods."""
    if isinstance(text := entry.__doc__, str):
        yield where, text
    if inspect.isclass(entry):
        for key, method in vars(entry).items():
            if inspect.isfunction(method) and method.__doc__ and not key.startswith("_"):
                yield f"{where}.{key}", method.__doc__


def e2e(path: Path) -> list[dict[str, str]]:
    """Meaning representations, and the text that people wrote for them."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{"prompt": f"{row['mr']}:", "target": f" {row['ref']}"} for row in csv.DictReader(file)]


def write_rows(path: Path, rows: list[dict[str, str]], plan: Plan) -> None:
    chosen = np.random.default_rng(plan.seed).permutation(len(rows))[: plan.samples]
    path.write_text("".join(json.dumps(rows[index]) + "\n" for index in chosen), encoding="utf-8")


def recipe(bits: int) -> Recipe:
    """Binary-coded layers, a scale per column; all else as float as can be, the embeddings untouched."""
    return Recipe.model_validate(
        {
            "name": f"bcq{bits}",
            "weights": {"format": "bcq", "bits": bits},
            "activations": {"bits": 8, "clipping": 0.1},
            "include": [LAYERS],
        }
    )


def exported(name: str, output: Path) -> Path:
    """The float model's folder; made once."""
    source = output / f"{name}-float"
    if not source.exists():
        with artifact.staged(source) as scratch:
            export_model(importlib.import_module(MODELS[name]).build(), scratch)
            artifact.publish(scratch, source)
    return source


def compiled(name: str, bits: int, output: Path) -> Path:
    """The compiled folder; made once."""
    source = exported(name, output)
    folder = output / f"{name}-bcq{bits}"
    if not folder.exists():
        compile_model(source / artifact.MODEL, folder, recipe=recipe(bits), samples=16)
    return folder


def study(base: Path, data: Path, output: Path, plan: Plan) -> Iterator[str]:
    for train in TRAINED:
        report = tune(base, output.with_name(f"{output.name}-{train}"), data, settings=plan.settings(train))
        if train == TRAINED[0]:
            linear = artifact.parts(base)["linear"]
            yield f"untuned {report.loss_before:.4f}; coded layers {32 / coded_bits(base):.2f} times smaller ({linear})"
        share = report.bytes / report.base_bytes
        yield (
            f"{train} {report.loss:.4f} (before rounding {report.loss_learned:.4f}), {report.trainable} numbers, adapter"
            f" {report.bytes} bytes = {share:.2%} of the base, {report.steps} steps {report.remark}"
        )


def coded_bits(base: Path) -> float:
    """Bits for each weight of the coded layers, scales and alphas included."""
    record = artifact.read_record(base)
    events = next(entry for entry in record["passes"] if entry["name"] == "pack-weights")["rewrites"]
    return float(np.mean([event["figures"]["bits_per_weight"] for event in events]))


def float_line(name: str, source: Path, data: Path, plan: Plan) -> str:
    """Fine-tune all weights of the float model on the same samples, judged by the same held-out ones."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        importlib.import_module(MODELS[name]).build(), dtype=torch.float32
    )
    settings = plan.settings("scales")
    rows = TaskData(data, "causal-lm", read_onnx(source / artifact.MODEL), source, settings.max_length)
    samples = [(list(example.ids), example.first) for example in rows.examples]
    learned, judges = split(len(samples), settings)
    before = float_loss(model, samples, judges, plan.batch)
    best = fine_tune(model, samples, learned, judges, plan)
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{best:.4f}, untuned {before:.4f}, {count} numbers"


Sample = tuple[list[int], int]


def fine_tune(model: Any, samples: list[Sample], learned: list[int], judges: list[int], plan: Plan) -> float:
    """The best held-out loss of AdamW with linear decay, without dropout."""
    adam = torch.optim.AdamW(model.parameters(), lr=plan.float_lr, weight_decay=0.01)
    batches = -(-len(learned) // plan.batch)
    steps, best = plan.epochs * batches, math.inf
    model.eval()
    for step in range(steps):
        epoch, place = divmod(step, batches)
        order = np.random.default_rng((plan.seed, epoch)).permutation(learned)
        adam.param_groups[0]["lr"] = plan.float_lr * (1 - step / steps)
        total, count = batch_loss(model, samples, order[place * plan.batch : (place + 1) * plan.batch].tolist())
        adam.zero_grad()
        torch.autograd.backward(total / count)
        adam.step()
        if (step + 1) % -(-steps // ROUNDS) == 0 or step + 1 == steps:
            best = min(best, float_loss(model, samples, judges, plan.batch))
    return best


def float_loss(model: Any, samples: list[Sample], chosen: list[int], batch: int) -> float:
    with torch.no_grad():
        found = [batch_loss(model, samples, chosen[start : start + batch]) for start in range(0, len(chosen), batch)]
    return sum(float(total) for total, _ in found) / sum(count for _, count in found)


def batch_loss(model: Any, samples: list[Sample], chosen: list[int]) -> tuple[torch.Tensor, int]:
    longest = max(len(samples[index][0]) for index in chosen)
    ids = torch.zeros(len(chosen), longest, dtype=torch.long)
    wanted = torch.full_like(ids, -100)
    for row, index in enumerate(chosen):
        tokens, first = samples[index]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        wanted[row, first - 1 : len(tokens) - 1] = torch.tensor(tokens[first:])
    logits = model(ids).logits
    total = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum")
    return total, int((wanted != -100).sum())


def count_gpt2_medium() -> list[str]:
    """Numbers trained and sizes on GPT-2 medium's shape, counted."""
    width, layers = GPT2_MEDIUM["width"], GPT2_MEDIUM["layers"]
    columns, weights = 9 * width * layers, 12 * width * width * layers
    tables = (GPT2_MEDIUM["vocabulary"] + GPT2_MEDIUM["positions"]) * width
    vectors = columns + (4 * layers + 2) * width
    whole = weights + tables + vectors
    lines = [f"GPT-2 medium: {whole:,} numbers, alpha_1 {columns:,}, {whole / columns:,.0f} times fewer"]
    for bits in (1, 2, 3, 4):
        coded = weights * bits / 8 + columns * (bits + 4)
        base, adapter = coded + 4 * (tables + vectors), columns * (bits + 2)
        lines.append(
            f"  q = {bits}: coded layers {4 * weights / coded:.1f} times smaller, adapter of alphas"
            f" {adapter / 1e6:.2f} MB = {adapter / base:.2%} of {base / 1e6:.0f} MB,"
            f" of scales {4 * columns / 1e6:.2f} MB = {4 * columns / base:.2%}"
        )
    return lines


if __name__ == "__main__":
    main()
