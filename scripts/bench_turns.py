"""Turns: every contender loaded once, in a process of its own, and measured in rounds so that each meets the same spells.

In each round every contender runs for the same time, one after the other. Between its turns a process is stopped
altogether, so that no engine's threads spin while another has its turn. What was measured is kept after every shape:
a run that is broken off, or that has used up its minutes, goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from rich.progress import Progress

if TYPE_CHECKING:  # type checkers see the repository as the root, Python the folder of this file
    from scripts import contenders
else:
    import contenders

TURN_SECONDS = 0.3


@dataclass
class Row:
    """One contender on one model.

    Attributes:
        turns: for each shape the seconds per run of every turn.
        load_seconds: until it is ready, its packages imported before.
        held_mb: resident memory that loading took.
        peak_mb: of the process.
        failure: why it stopped, or never started.
        integer_matmuls: matrix products that run on integers; None where the engine does not say.
        cosine: mean cosine of its outputs with float's.
        perplexity: of running text; None without one.
    """

    model: str
    contender: str
    tool: str
    settings: str
    built: contenders.Built
    turns: dict[str, list[float]] = field(default_factory=dict)
    load_seconds: float = 0.0
    held_mb: float = 0.0
    peak_mb: float = 0.0
    failure: str | None = None
    integer_matmuls: int | None = None
    cosine: float | None = None
    perplexity: float | None = None


@dataclass
class Server:
    """A contender's process, which computes only between a line sent and its answer."""

    process: subprocess.Popen[str]
    errors: IO[str]

    def receive(self) -> dict[str, Any]:
        """The next line of the process.

        Raises:
            StepError: it says why it failed, or has died.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
        self.errors.seek(0)
        return contenders.answer_of(line, self.errors.read(), self.process.returncode)

    def turn(self, shape: str, seconds: float) -> dict[str, Any]:
        """Let it run one shape for at least so many seconds, and stop it again."""
        assert self.process.stdin is not None
        self.signal(signal.SIGCONT)
        try:
            self.process.stdin.write(f"{shape} {seconds}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self.receive()
        self.signal(signal.SIGSTOP)
        return answer

    def signal(self, number: signal.Signals) -> None:
        """Stop it, or let it go on; one that has ended stays ended."""
        if self.process.poll() is None:
            os.kill(self.process.pid, number)


@contextmanager
def started(command: list[str]) -> Iterator[Server]:
    """A contender's process, ended on the way out."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            yield Server(process, errors)
        finally:
            process.kill()
            process.communicate()


def add_options(made: argparse.ArgumentParser, turns: int) -> None:
    """The options of every benchmark that takes turns."""
    made.add_argument("--turns", type=int, default=turns, help=f"rounds for each shape (default: {turns})")
    made.add_argument("--threads", type=int, default=2, help="threads of every contender (default: 2)")
    made.add_argument("--minutes", type=float, default=1e9, help="begin no shape after so many minutes; with --work, the "
                      "same command goes on where it stopped (default: no limit)")  # fmt: skip
    made.add_argument("--prepare", action="store_true", help="only export, quantize and check, and time nothing; needs "
                      "--work")  # fmt: skip


def row_of(
    contender: contenders.Contender,
    made: contenders.Built,
    work: contenders.Workspace,
    model: str,
    step: str,
    known: dict[str, Row],
) -> Row:
    """The row of a contender with its outputs checked, or that of an earlier run with the same result.

    Args:
        contender: which.
        made: what it was quantized to.
        work: where.
        model: its name in the tables.
        step: of contenders.py, which checks the outputs.
        known: rows of an earlier run, by contender.
    """
    row = known.get(contender.name)
    same = row is not None and made.key and row.built.key == made.key and not row.failure
    if row is not None and same and not (work.windows.is_file() and row.perplexity is None):
        return row
    return checked(Row(model, contender.name, contender.family, contender.settings, made, failure=made.failure),
                   contender, work, step)  # fmt: skip


def checked(row: Row, contender: contenders.Contender, work: contenders.Workspace, step: str) -> Row:
    """The row with what its check found; a contender that cannot run fails here."""
    if row.failure:
        return row
    try:
        answer = contenders.run_child(contender, step, work)
    except contenders.StepError as failure:
        row.failure = str(failure)
        return row
    row.integer_matmuls, row.cosine = answer["integer_matmuls"], answer["cosine"]
    row.perplexity = answer.get("perplexity")
    return row


def read(work: contenders.Workspace, turns: int, threads: int) -> dict[str, Row]:
    """The rows of an earlier run with as many turns and threads, by contender."""
    try:
        kept = json.loads(work.results.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if (kept["turns"], kept["threads"]) != (turns, threads):
        return {}
    rows = (Row(**{**entry, "built": contenders.Built(**entry["built"])}) for entry in kept["rows"])
    return {row.contender: row for row in rows}


def write(work: contenders.Workspace, rows: Sequence[Row], turns: int, threads: int) -> None:
    """Keep what was measured; rows of contenders that this run leaves out stay."""
    others = [row for name, row in read(work, turns, threads).items() if name not in {row.contender for row in rows}]
    kept = {"turns": turns, "threads": threads, "rows": [asdict(row) for row in [*rows, *others]]}
    partial = work.results.with_suffix(".partial")
    partial.write_text(json.dumps(kept), encoding="utf-8")
    partial.rename(work.results)


def missing(rows: Sequence[Row], shapes: Sequence[str], turns: int) -> list[str]:
    """The shapes that some row has not been measured at: these are measured anew for all, since ratios go by round."""
    return [
        shape for shape in shapes
        if any(len(row.turns.get(shape, ())) != turns for row in rows if not row.failure)
    ]  # fmt: skip


def take_turns(
    rows: Sequence[Row], commands: Sequence[list[str]], shapes: Sequence[str], turns: int, until: float = float("inf")
) -> Iterator[str]:
    """Start the process of every row that has not failed, and give them turns in rounds, shape by shape.

    Args:
        rows: what is measured goes into them.
        commands: of their processes.
        shapes: what to run.
        turns: rounds that count; one before them warms up.
        until: begin no shape after this time of `time.monotonic`.

    Yields:
        the shape, when all of its rounds are done.
    """
    with ExitStack() as stack:
        servers: list[tuple[Row, Server]] = []
        for row, command in zip(rows, commands, strict=True):
            if row.failure:
                continue
            server = stack.enter_context(started(command))
            try:
                answer = server.receive()
                row.load_seconds, row.held_mb = answer["load_seconds"], answer["held_mb"]
                server.signal(signal.SIGSTOP)
                servers.append((row, server))
            except contenders.StepError as failure:
                row.failure = str(failure)
        for shape in shapes:
            if time.monotonic() > until:
                return
            for row, _ in servers:
                row.turns.pop(shape, None)
            for turn in range(turns + 1):
                for row, server in servers:
                    _take_turn(row, server, shape, warming=turn == 0)
            yield shape


def _take_turn(row: Row, server: Server, shape: str, *, warming: bool) -> None:
    if row.failure:
        return
    try:
        answer = server.turn(shape, TURN_SECONDS)
    except contenders.StepError as failure:
        row.failure = str(failure)
        return
    row.peak_mb = max(row.peak_mb, answer["peak_mb"])
    if not warming:
        row.turns.setdefault(shape, []).append(answer["seconds"])


def measure(
    work: contenders.Workspace,
    rows: Sequence[Row],
    commands: Sequence[list[str]],
    shapes: Sequence[str],
    options: argparse.Namespace,
    progress: Progress,
) -> bool:
    """Measure the shapes that are not measured yet, keeping each; whether all of them are now."""
    write(work, rows, options.turns, options.threads)
    wanted = missing(rows, shapes, options.turns)
    if options.prepare or not wanted:
        return options.prepare or not wanted
    task = progress.add_task(f"{work.folder.name}: {wanted[0]}", total=len(wanted))
    done = []
    for shape in take_turns(rows, commands, wanted, options.turns, options.until):
        write(work, rows, options.turns, options.threads)
        done.append(shape)
        progress.update(task, description=f"{work.folder.name}: after {shape}", advance=1)
    return done == wanted


def speed_up(row: Row, reference: Row, shape: str) -> tuple[float, float, float] | None:
    """Lower quartile, median and upper quartile of float's time over this row's time, round by round."""
    mine, other = row.turns.get(shape, []), reference.turns.get(shape, [])
    if not mine or len(mine) != len(other):
        return None
    low, middle, high = np.quantile(np.array(other) / np.array(mine), [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)
