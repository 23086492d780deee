"""How fast each way to quantize runs, as a ratio to onnxruntime float measured in the same rounds.

Every contender is loaded once, in a process of its own that rests while others have their turn. In each round every
contender runs for the same time, one after the other, so that a slow spell of the machine meets all of them.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

if TYPE_CHECKING:  # type checkers see the repository as the root, Python the folder of this file
    from scripts import contenders
else:
    import contenders

MODELS = "bert-4x768,minilm"
SHAPES = "8x128,1x16,1x128,2x512"
TURN_SECONDS = 0.3


@dataclass
class Row:
    """One contender on one model.

    Attributes:
        turns: for each shape the seconds per run of every turn.
        failure: why it stopped, or never started.
    """

    model: str
    contender: str
    tool: str
    settings: str
    built: contenders.Built
    turns: dict[str, list[float]] = field(default_factory=dict)
    load_seconds: float = 0.0
    peak_mb: float = 0.0
    failure: str | None = None


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
        """Let it run one shape for at least so many seconds."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{shape} {seconds}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        return self.receive()


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


def measure(
    model: str,
    work: contenders.Workspace,
    entries: list[contenders.Contender],
    options: argparse.Namespace,
    progress: Progress,
) -> list[Row]:
    """Build every contender, start them all, and give them turns in rounds, shape by shape."""
    shapes = options.shapes.split(",")
    task = progress.add_task(f"{model}: building", total=len(entries) + len(shapes) * (options.turns + 1))
    rows = []
    for contender in entries:
        built = contenders.build(contender, work)
        rows.append(Row(model, contender.name, contender.family, contender.settings, built, failure=built.failure))
        progress.advance(task)
    commands = [contenders.command(contender, "serve", work, str(options.threads)) for contender in entries]
    for shape in take_turns(rows, commands, shapes, options.turns):
        progress.update(task, description=f"{model}: {shape}", advance=1)
    return rows


def take_turns(rows: Sequence[Row], commands: Sequence[list[str]], shapes: list[str], turns: int) -> Iterator[str]:
    """Start the process of every row that has not failed, and give them turns in rounds, shape by shape.

    Yields:
        the shape, after each of its rounds; the first of them only warms up.
    """
    with ExitStack() as stack:
        servers: list[tuple[Row, Server]] = []
        for row, command in zip(rows, commands, strict=True):
            if row.failure:
                continue
            server = stack.enter_context(started(command))
            try:
                row.load_seconds = server.receive()["load_seconds"]
                servers.append((row, server))
            except contenders.StepError as failure:
                row.failure = str(failure)
        for shape in shapes:
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
    row.peak_mb = answer["peak_mb"]
    if not warming:
        row.turns.setdefault(shape, []).append(answer["seconds"])


def report(rows: list[Row], shapes: list[str], facts: dict[str, str]) -> str:
    """One Markdown table per model: milliseconds, and the speed-up over float with its quartiles."""
    parts = []
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model]
        header = [
            "contender",
            "settings",
            *(f"{shape}, ms (speed-up)" for shape in shapes),
            "load, s",
            "peak, MB",
            "file, MB",
        ]
        lines = [
            [row.tool, row.settings, *(_cell(row, mine[0], shape) for shape in shapes), *_sizes(row)] for row in mine
        ]
        failures = [f"* {row.contender} failed: {row.failure}" for row in mine if row.failure]
        parts += [f"### {model}", "", contenders.table(header, lines), "", *failures, *([""] if failures else [])]
    told = ", ".join(f"{name} {value}" for name, value in facts.items())
    parts.append(f"{told}. Median of turns; speed-up over onnxruntime float as the median [quartiles] of the rounds.")
    return "\n".join(parts)


def speed_up(row: Row, reference: Row, shape: str) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of float's time over this row's time, round by round."""
    ratios = np.array(reference.turns[shape]) / np.array(row.turns[shape])
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


def _cell(row: Row, reference: Row, shape: str) -> str:
    turns = row.turns.get(shape, [])
    if not turns or len(turns) != len(reference.turns[shape]):
        return "failed"
    low, middle, high = speed_up(row, reference, shape)
    return f"{1000 * float(np.median(turns)):.2f} ({middle:.2f} [{low:.2f}, {high:.2f}])"


def _sizes(row: Row) -> list[str]:
    return [f"{row.load_seconds:.2f}", f"{row.peak_mb:.0f}", f"{row.built.size_mb:.1f}"] if row.turns else ["", "", ""]


def main() -> None:
    made = contenders.parser(__doc__)
    made.add_argument("--models", default=MODELS, metavar="NAME,...", help=f"names or folders (default: {MODELS})")
    made.add_argument("--shapes", default=SHAPES, metavar="BxL,...", help=f"batch x tokens (default: {SHAPES})")
    made.add_argument("--turns", type=int, default=11, help="rounds for each shape (default: 11)")
    made.add_argument("--threads", type=int, default=2, help="threads of every contender (default: 2)")
    options = made.parse_args()
    console = Console(stderr=True)
    entries = [contender for contender in contenders.chosen(options.only) if contender.timed or options.only]
    rows: list[Row] = []
    with contenders.work_folder(options.work) as root, Progress(console=console) as progress:
        for model in options.models.split(","):
            work = contenders.prepare(model, root, options.calibration, options.samples)
            measured = measure(model, work, entries, options, progress)
            if measured[0].failure:
                raise SystemExit(f"the float model does not run: {measured[0].failure}.")
            rows += measured
    facts = contenders.machine(options.threads)
    contenders.publish(
        options,
        report(rows, options.shapes.split(","), facts),
        {"machine": facts, "rows": [asdict(row) for row in rows]},
    )


if __name__ == "__main__":
    main()
