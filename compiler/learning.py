"""One training loop for few parameters, and its checkpoints.

torch is an optional package: import this module only where something is to be learned.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from scalefold.compiler.errors import CalibrationError
from scalefold.compiler.protocol import Progress

STATE, UNFINISHED = "learning.pt", "learning.part"

Decay = Literal["cosine", "linear"]


@dataclass(frozen=True)
class Schedule:
    """How to train: Adam, one sample a step.

    Attributes:
        steps: most steps.
        rate: learning rate at the start.
        decay: how it falls to 0.
        held_out: share of the samples that only judge.
        rounds: how often they judge, evenly spaced.
        patience: rounds without a better loss before training stops.
        seed: of the order of the samples.
    """

    steps: int = 256
    rate: float = 0.02
    decay: Decay = "cosine"
    held_out: float = 0.25
    rounds: int = 8
    patience: int = 3
    seed: int = 0

    def factor(self, step: int) -> float:
        """The share of the rate at a step."""
        done = step / self.steps
        return 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2

    def split(self, count: int) -> tuple[list[int], list[int]]:
        """Samples to learn from and samples to judge by, evenly spaced; a single sample serves as both."""
        judges = max(1, round(self.held_out * count)) if count > 1 else 0
        held = set(np.linspace(0, count - 1, judges + 2)[1:-1].round().astype(int).tolist())
        learned = [index for index in range(count) if index not in held]
        return learned, sorted(held) or learned


@dataclass(frozen=True)
class Outcome:
    """What training came to.

    Attributes:
        before: loss on the samples that judge, before.
        after: the same with what was kept.
        steps: steps taken.
        remark: why it ended early; empty when it did not.
    """

    before: float
    after: float
    steps: int
    remark: str = ""


class Checkpoint:
    """The state of a run in a folder, from which an interrupted one goes on to the same result.

    Args:
        folder: where; None keeps nothing.
        digest: of everything that the result depends on.

    Raises:
        CalibrationError: the folder holds the state of another run, or cannot be used.
    """

    def __init__(self, folder: Path | None, digest: str) -> None:
        self._path = None if folder is None else folder / STATE
        self._content: dict[str, Any] = {"digest": digest}
        if self._path is None or not self._path.is_file():
            return
        try:
            content = torch.load(self._path, weights_only=True)
        except Exception as error:  # torch.load raises errors of many kinds on a damaged file
            raise self._fault(f"it cannot be read ({' '.join(str(error).split())[:200]})") from error
        if not isinstance(content, dict) or content.get("digest") != digest:
            raise self._fault("it is the state of another run: the model, samples or options differ")
        self._content = content

    def get(self, key: str) -> dict[str, Any] | None:
        """What was put under `key`, or None."""
        found = self._content.get(key)
        return found if isinstance(found, dict) else None

    def put(self, key: str, entry: Mapping[str, Any]) -> None:
        """Keep `entry` under `key`; the file is replaced whole."""
        self._content[key] = dict(entry)
        if self._path is None:
            return
        unfinished = self._path.with_name(UNFINISHED)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self._content, unfinished)
            os.replace(unfinished, self._path)  # noqa: PTH105
        except (OSError, RuntimeError) as error:  # torch.save raises either where the disk is full
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            what = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            raise self._fault(f"it cannot be written ({what})") from error

    def _fault(self, what: str) -> CalibrationError:
        return CalibrationError(what, where=str(self._path), remedy="remove it, or name another folder for checkpoints")


class TrainingState:
    """Parameters in training, their optimizer, the best values so far, and figures of the run: all that the rest depends on.

    Args:
        parameters: leaves with gradients.
        adam: their optimizer.
        figures: numbers and texts by name, changed as the run goes; `step` and `after`, the best loss, among them.
    """

    def __init__(self, parameters: Sequence[Tensor], adam: torch.optim.Optimizer, **figures: Any) -> None:
        self.parameters, self.adam, self.figures = list(parameters), adam, figures
        self._best: list[Tensor] = []

    @contextmanager
    def bar(self, progress: Progress, title: str, steps: int) -> Iterator[Callable[[], None]]:
        """A bar for the steps up to the next judgement, which stands where the run does and tells its best loss."""
        with progress(f"{title}, loss {self.figures['after']:.4g}", steps) as advance:
            for _ in range(self.figures["step"]):
                advance()
            yield advance

    def keep(self) -> None:
        """The values are the best so far."""
        self._best = self._now()

    def finish(self) -> None:
        """Put the best values back."""
        self._set(self._best)

    def snapshot(self) -> dict[str, Any]:
        """What `restore` takes."""
        return {**self.figures, "now": self._now(), "best": self._best, "adam": self.adam.state_dict()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from a snapshot."""
        self.figures = {name: saved[name] for name in self.figures}
        self._best = list(saved["best"])
        self.adam.load_state_dict(saved["adam"])
        self._set(saved["now"])

    def _now(self) -> list[Tensor]:
        return [entry.detach().clone() for entry in self.parameters]

    def _set(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for entry, value in zip(self.parameters, values, strict=True):
                entry.copy_(value)


def learn(
    parameters: Sequence[Tensor],
    loss: Callable[[int], Tensor],
    count: int,
    schedule: Schedule,
    *,
    title: str,
    progress: Progress,
    checkpoint: Checkpoint,
) -> Outcome:
    """Train parameters in place and leave them at their best; they are never worse than they were.

    Args:
        parameters: leaves with gradients.
        loss: of a sample by number.
        count: number of samples.
        schedule: how.
        title: of the progress bar, and the key in the checkpoint.
        progress: opens a bar for each round, under the title and the best loss so far.
        checkpoint: kept after each round.
    """
    run = _Training(parameters, loss, *schedule.split(count), schedule)
    saved = checkpoint.get(title)
    if saved is None:
        run.begin()
    else:
        run.state.restore(saved)
    while run.figures["step"] < schedule.steps and not run.figures["remark"]:
        with run.state.bar(progress, title, schedule.steps) as advance:
            run.round(advance)
        checkpoint.put(title, run.state.snapshot())
    run.state.finish()
    return Outcome(run.figures["before"], run.figures["after"], run.figures["step"], run.figures["remark"])


class _Training:
    """One run of Adam, a round at a time."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        loss: Callable[[int], Tensor],
        learned: Sequence[int],
        judges: Sequence[int],
        schedule: Schedule,
    ) -> None:
        self._loss, self._schedule = loss, schedule
        self._learned, self._judges = learned, judges
        # A loss may fall a thousandfold in a hundred steps: the usual second moment would remember the first gradients
        # for all of them, and the usual epsilon would drown the last.
        adam = torch.optim.Adam(parameters, lr=schedule.rate, betas=(0.9, 0.95), eps=1e-12)
        self.state = TrainingState(parameters, adam, step=0, waited=0, remark="", before=0.0, after=0.0)

    @property
    def figures(self) -> dict[str, Any]:
        """Where the run is."""
        return self.state.figures

    def begin(self) -> None:
        """Judge what is there."""
        self.figures["before"] = self.figures["after"] = self._judge()
        self.state.keep()

    def round(self, advance: Callable[[], None]) -> None:
        """Train up to the next judgement."""
        last = min(self._schedule.steps, self.figures["step"] + -(-self._schedule.steps // self._schedule.rounds))
        for step in range(self.figures["step"], last):
            found = self._step(step)
            self.figures["step"] = step + 1
            advance()
            if not math.isfinite(found):
                self.figures["remark"] = "the loss became infinite: the best before is kept, a smaller rate would help"
                return
        self._compare(self._judge())

    def _compare(self, found: float) -> None:
        if found < self.figures["after"] or not math.isfinite(self.figures["after"]):
            self.state.figures |= {"after": found, "waited": 0}
            self.state.keep()
            return
        self.figures["waited"] += 1
        if self.figures["waited"] >= self._schedule.patience and self.figures["step"] < self._schedule.steps:
            self.figures["remark"] = f"stopped after {self.figures['step']} steps: no better for some time"

    def _step(self, step: int) -> float:
        turn, place = divmod(step, len(self._learned))
        order = np.random.default_rng((self._schedule.seed, turn)).permutation(len(self._learned))
        for group in self.state.adam.param_groups:
            group["lr"] = self._schedule.rate * self._schedule.factor(step)
        found = self._loss(self._learned[order[place]])
        value = float(found.detach())
        if math.isfinite(value):
            torch.autograd.backward(found)
            self.state.adam.step()
            self.state.adam.zero_grad()
        return value

    def _judge(self) -> float:
        with torch.no_grad():
            return sum(float(self._loss(index)) for index in self._judges) / len(self._judges)
