"""Tuning a compiled model for a task by its scaling factors alone (AlphaTuning, Kwon et al. 2022; PEQA, Kim et al. 2023).

What is trained is the graph that ships: its activations are quantized as it quantizes them, with gradients passed through
the rounding. Signs, codes, embeddings, norms and biases are frozen. What was learned is rounded to the integers that the
file holds, and measured again in onnxruntime.

torch is an optional package: import this module only where something is to be tuned.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor
from torch.nn import functional

from scalefold.compiler import artifact, serving
from scalefold.compiler.decoder import LOGITS
from scalefold.compiler.errors import SourceError
from scalefold.compiler.learning import STATE, UNFINISHED, Checkpoint, TrainingState
from scalefold.compiler.protocol import Progress, silent
from scalefold.compiler.standard_operators import give_weights, open_differentiable
from scalefold.compiler.task_data import UNSCORED, Batch, Task, TaskData
from scalefold.compiler.torch_graph import TorchGraph, tensor_from
from scalefold.compiler.trainable_weights import Arrays, trainable_weights
from scalefold.compiler.tunable_weights import Train

ROUNDS = 8
"""How often the held-out samples judge, evenly spaced."""

DIVERGED = 3.0
"""A loss of so many times (the first one + 1) is past repair."""


@dataclass(frozen=True)
class Settings:
    """How to tune: AdamW, the rate falling linearly to 0, without warm-up or dropout.

    Attributes:
        train: alpha1, alphas, scales or codebooks.
        epochs: times every sample is seen.
        lr: learning rate at the start, in the units of weights.
        batch: samples a step.
        seed: of the order of the samples, and of which are held out.
        weight_decay: of AdamW.
        max_length: most tokens of a sample.
        held_out: share of the samples that only judge.
        group_gradients: whether a gradient is divided by the number of weights that share what it belongs to.
    """

    train: Train = "alpha1"
    epochs: int = 5
    lr: float = 1e-3
    batch: int = 8
    seed: int = 0
    weight_decay: float = 0.0
    max_length: int = 256
    held_out: float = 0.1
    group_gradients: bool = True


@dataclass(frozen=True)
class TuneReport:
    """What tuning came to.

    Attributes:
        output: the adapter's folder.
        task: causal-lm or classification.
        base: digest of the model.
        layers: weights that were trained.
        trainable: numbers that were trained.
        samples: samples that were learned from.
        held_out: samples that judged.
        cut: samples that were longer than the limit.
        steps: steps taken.
        loss_before: mean loss of the base on the held-out samples, in onnxruntime, in nats.
        loss_learned: the same of what was learned, before it was rounded to integers, in torch.
        loss: the same of the adapter, in onnxruntime.
        remark: why it ended early; empty when it did not.
        bytes: of the adapter's numbers.
        base_bytes: of the base.
    """

    output: Path
    task: str
    base: str
    layers: int
    trainable: int
    samples: int
    held_out: int
    cut: int
    steps: int
    loss_before: float
    loss_learned: float
    loss: float
    remark: str
    bytes: int
    base_bytes: int


def tune(
    base: str | Path,
    output: str | Path,
    data: str | Path,
    *,
    task: Task = "causal-lm",
    settings: Settings | None = None,
    progress: Progress = silent,
) -> TuneReport:
    """Tune a compiled folder and write an adapter; a run that was interrupted goes on where it stopped.

    Args:
        base: the compiled folder; left as it is.
        output: the adapter's folder; an earlier adapter there is replaced.
        data: JSON lines; see `task_data`.
        task: what the samples are.
        settings: how to tune.
        progress: opens progress bars.

    Raises:
        ScalefoldError: one sentence that says what is wrong, where, and what would help.
    """
    settings, folder, place = settings or Settings(), Path(base), Path(output).absolute()
    _check(settings)
    artifact.check_output(place, STATE, UNFINISHED, serving.RECORD)
    if not (folder / artifact.MODEL).is_file():
        raise SourceError(f"there is no {artifact.MODEL} in it", where=str(folder), remedy="give a compiled folder")
    run = _Run(folder, Path(data), task, settings)
    digest = hashlib.sha256(json.dumps([run.base, run.data.digest, task, asdict(settings)]).encode()).hexdigest()
    steps, remark = run.train(Checkpoint(place, digest), progress)
    arrays = {name: array for weight in run.weights for name, array in weight.arrays().items()}
    report = TuneReport(
        output=place,
        task=task,
        base=run.base,
        layers=len(run.weights),
        trainable=run.trainable,
        samples=len(run.learned),
        held_out=len(run.judges),
        cut=run.data.cut,
        steps=steps,
        loss_before=run.measure(serving.load(folder)),
        loss_learned=run.figures["after"],
        loss=run.measure(run.adapted(arrays)),
        remark=remark,
        bytes=sum(array.nbytes for array in arrays.values()),
        base_bytes=artifact.size_of(folder),
    )
    _write(place, arrays, report, settings)
    return report


class _Run:
    """One run of training, a step at a time."""

    def __init__(self, folder: Path, data: Path, task: Task, settings: Settings) -> None:
        self.settings, self._folder = settings, folder
        self.base = serving.base_digest(folder)
        model, weights = open_differentiable(folder / artifact.MODEL)
        self.weights = trainable_weights(weights, settings.train, _activation_bits(folder))
        given = give_weights(model, [entry.weight for entry in self.weights])
        self._names = [(entry, given[entry.weight].name or "") for entry in self.weights]
        self.data = TaskData(data, task, model, folder, settings.max_length)
        self._graph = TorchGraph(model, [_logits(model)])
        self.learned, self.judges = split(len(self.data.examples), settings)
        parameters = [entry.parameter for entry in self.weights]
        adam = torch.optim.AdamW(
            # gradients that are divided by the size of a group must not drown in the usual epsilon of 1e-8
            parameters, lr=settings.lr, weight_decay=settings.weight_decay, eps=1e-12
        )  # fmt: skip
        self._batches = -(-len(self.learned) // settings.batch)
        self._steps = settings.epochs * self._batches
        self.state = TrainingState(parameters, adam, step=0, before=0.0, after=0.0, remark="")

    @property
    def figures(self) -> dict[str, Any]:
        """Where the run is."""
        return self.state.figures

    @property
    def trainable(self) -> int:
        """How many numbers are trained."""
        return sum(entry.numel() for entry in self.state.parameters)

    def train(self, checkpoint: Checkpoint, progress: Progress) -> tuple[int, str]:
        """Train, and leave the weights at the best that the held-out samples found; the steps taken and a remark."""
        saved = checkpoint.get(STATE)
        if saved is None:
            self.figures["before"] = self.figures["after"] = self._judge()
            self.state.keep()
        else:
            self.state.restore(saved)
        while self.figures["step"] < self._steps and not self.figures["remark"]:
            with self.state.bar(progress, "tuning", self._steps) as advance:
                self._round(checkpoint, advance)
        self.state.finish()
        return self.figures["step"], self.figures["remark"]

    def measure(self, session: onnxruntime.InferenceSession) -> float:
        """Mean loss on the held-out samples in onnxruntime."""
        total, count = 0.0, 0
        for chosen in self._portions(self.judges):
            batch = self.data.batch(chosen)
            total += batch.loss(session.run([LOGITS], dict(batch.feed))[0])
            count += batch.scored
        return total / count

    def adapted(self, arrays: Arrays) -> onnxruntime.InferenceSession:
        """The base with these constants."""
        return serving.load_with(self._folder, arrays)

    def _round(self, checkpoint: Checkpoint, advance: Callable[[], None]) -> None:
        """Train up to the next judgement."""
        each = -(-self._steps // ROUNDS)
        last = min(self._steps, (self.figures["step"] // each + 1) * each)
        while self.figures["step"] < last and not self.figures["remark"]:
            self._step()
            checkpoint.put(STATE, self.state.snapshot())
            advance()

    def _step(self) -> None:
        step = self.figures["step"]
        epoch, place = divmod(step, self._batches)
        order = np.random.default_rng((self.settings.seed, epoch)).permutation(self.learned)
        chosen = order[place * self.settings.batch : (place + 1) * self.settings.batch]
        for group in self.state.adam.param_groups:
            group["lr"] = self.settings.lr * (1 - step / self._steps)
        found, count = self._loss(chosen.tolist())
        loss = found / count
        self.figures["step"] = step + 1
        if self._is_lost(float(loss.detach())):
            return
        torch.autograd.backward(loss)
        if self.settings.group_gradients:
            for entry in self.weights:
                if entry.parameter.grad is not None:
                    entry.parameter.grad /= entry.group_size
        self.state.adam.step()
        self.state.adam.zero_grad()
        if self.figures["step"] % -(-self._steps // ROUNDS) == 0 or self.figures["step"] == self._steps:
            found_now = self._judge()
            if not self._is_lost(found_now) and found_now < self.figures["after"]:
                self.figures["after"] = found_now
                self.state.keep()

    def _is_lost(self, loss: float) -> bool:
        if math.isfinite(loss) and loss <= DIVERGED * (self.figures["before"] + 1):
            return False
        self.figures["remark"] = (
            f"it diverged at step {self.figures['step']} (loss {loss:.3g}): the best before is kept; lower --lr"
        )
        return True

    def _loss(self, chosen: Sequence[int]) -> tuple[Tensor, int]:
        """The sum of the losses of some samples, and how many answers they ask for."""
        batch = self.data.batch(chosen)
        feed = {name: tensor_from(array) for name, array in batch.feed.items()}
        sums: dict[str, Tensor] = {}
        for entry, name in self._names:
            weight = entry.value()
            feed[name] = weight
            sums |= {value.name or "": weight.sum(0) for value in entry.weight.sums}
        logits = self._graph.run(feed, sums)[LOGITS]
        return _cross_entropy(logits, batch), batch.scored

    def _judge(self) -> float:
        with torch.no_grad():
            found = [self._loss(chosen) for chosen in self._portions(self.judges)]
        return sum(float(loss) for loss, _ in found) / sum(count for _, count in found)

    def _portions(self, samples: Sequence[int]) -> list[Sequence[int]]:
        size = self.settings.batch
        return [samples[start : start + size] for start in range(0, len(samples), size)]


def _cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    wanted = torch.from_numpy(batch.wanted)
    return functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), wanted.reshape(-1), ignore_index=UNSCORED, reduction="sum"
    )


def split(count: int, settings: Settings) -> tuple[list[int], list[int]]:
    """Samples to learn from and samples to judge by; a single sample serves as both."""
    order = np.random.default_rng(settings.seed).permutation(count).tolist()
    judges = min(max(1, round(settings.held_out * count)), count - 1)
    return sorted(order[judges:]), sorted(order[:judges]) or order


def _logits(model: ir.Model) -> ir.Value:
    found = next((value for value in model.graph.outputs if value.name == LOGITS), None)
    if found is None:
        raise SourceError(
            "it has no output named logits", where="the model", remedy="compile a language model or a classifier"
        )
    return found


def _activation_bits(folder: Path) -> int | None:
    """Bits of the activations, as the record says; 8 where it says nothing."""
    activations = artifact.read_record(folder).get("recipe", {}).get("activations", {})
    return None if activations is None else int(activations.get("bits", 8))


def _check(settings: Settings) -> None:
    faults = (
        (settings.epochs < 1, "--epochs", "it must be at least 1"),
        (not (settings.lr > 0 and math.isfinite(settings.lr)), "--lr", "it must be a positive number"),
        (settings.batch < 1, "--batch", "it must be at least 1"),
        (settings.seed < 0, "--seed", "it must be 0 or more"),
        (settings.max_length < 2, "--max-length", "it must be at least 2"),
        (not 0 <= settings.weight_decay < math.inf, "--weight-decay", "it must be 0 or more"),
        (not 0 < settings.held_out < 1, "--held-out", "it must be a share between 0 and 1"),
    )
    for wrong, where, what in faults:
        if wrong:
            raise SourceError(what, where=where, remedy="give another number")


def _write(place: Path, arrays: Arrays, report: TuneReport, settings: Settings) -> None:
    content = {name: value for name, value in asdict(report).items() if name != "output"}
    record = {"schema_version": 1, **content, "settings": asdict(settings)}
    with artifact.staged(place) as scratch:
        stage = scratch / "adapter"
        stage.mkdir()
        serving.write_adapter(stage, arrays, record, scales_only=settings.train == "scales")
        artifact.publish(stage, place)
