"""Speed, perplexity and memory of a decoder for each way to quantize it, beside onnxruntime float.

Prefill runs a prompt of 512 tokens behind an empty cache; decode runs 64 likeliest tokens one by one behind a prompt of
16, and the cache is not copied between them. Every contender is loaded once, in a process of its own that rests while
others have their turn; the ratio to float is that of the same rounds. All start from one float ONNX file and calibrate on
windows of 512 tokens of one text, each as four of --samples; quantize_static is given 8 of them, since its memory grows
with each.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import Progress

if TYPE_CHECKING:  # type checkers see the repository as the root, Python the folder of this file
    from scripts import bench_speed, contenders
else:
    import bench_speed
    import contenders

DECODE = "16+64"
BESIDE = ("tokenizer.json", "config.json")
"""What perplexity needs beside a model."""


@dataclass
class Row(bench_speed.Row):
    """One contender; `turns` holds the seconds of a whole prompt, and of all new tokens.

    Attributes:
        integer_matmuls: matrix products that run on integers.
        perplexity: of running text; None without --data.
    """

    integer_matmuls: int | None = None
    perplexity: float | None = None


def measure(work: contenders.Workspace, tasks: list[str], options: argparse.Namespace, progress: Progress) -> list[Row]:
    """Build and judge every contender, one at a time; then start them all, and give them turns in rounds."""
    entries = contenders.chosen(options.only, contenders.DECODERS)
    bar = progress.add_task("", total=2 * len(entries) + len(tasks) * (options.turns + 1))
    given, rows = dict(options.compiled), []
    for contender in entries:
        progress.update(bar, description=f"{contender.name}: building")
        built = build(contender, work, given.get(contender.name))
        row = Row(options.model, contender.name, contender.family, contender.settings, built, failure=built.failure)
        rows.append(row)
        progress.update(bar, description=f"{contender.name}: reading text", advance=1)
        judge(row, contender, work, options)
        progress.advance(bar)
    commands = [contenders.command(contender, "decode", work, str(options.threads)) for contender in entries]
    for task in bench_speed.take_turns(rows, commands, tasks, options.turns):
        progress.update(bar, description=task, advance=1)
    return rows


def build(contender: contenders.Contender, work: contenders.Workspace, given: Path | None) -> contenders.Built:
    """Quantize, or take the folder of --compiled, whose time and memory are not known."""
    if given is None:
        contenders.displace(work.output(contender))
        built = contenders.build(contender, work)
        for file in filter(Path.is_file, map(work.float_model.with_name, BESIDE)):
            if not (target := work.model(contender).with_name(file.name)).is_file():
                shutil.copy(file, target)
        return built
    contenders.place(given, work.output(contender))
    return contenders.Built(size_mb=contenders.size_mb(work.model(contender)))


def judge(row: Row, contender: contenders.Contender, work: contenders.Workspace, options: argparse.Namespace) -> None:
    """Count a contender's integer products and take its perplexity, in a child."""
    if row.failure:
        return
    text = [] if options.data is None else [str(options.data), str(options.windows)]
    try:
        answer = contenders.run_child(contender, "judge", work, *text)
    except contenders.StepError as failure:
        row.failure = str(failure)
        return
    row.integer_matmuls, row.perplexity = answer["integer_matmuls"], answer.get("perplexity")


def report(rows: list[Row], tasks: list[str], facts: dict[str, str]) -> str:
    """The Markdown report: tokens per second with their ratio to float, perplexity with its own, and sizes."""
    prefill, decode = ([int(part) for part in task.split("+")] for task in tasks)
    header = [
        "contender", "settings", f"prefill of {prefill[0]}, tokens/s (speed-up)",
        f"decode of {decode[1]}, tokens/s (speed-up)", "perplexity", "to float", "integer matmuls", "load, s",
        "peak, MB", "file, MB",
    ]  # fmt: skip
    lines = [
        [
            row.tool,
            row.settings,
            *(_speed(row, rows[0], task) for task in tasks),
            *_perplexity(row, rows[0]),
            "" if row.integer_matmuls is None else str(row.integer_matmuls),
            *_sizes(row),
        ]
        for row in rows
    ]
    notes = [f"* {row.tool} {row.settings} failed: {row.failure}" for row in rows if row.failure]
    told = ", ".join(f"{name} {value}" for name, value in facts.items())
    footer = f"{told}. Median of turns; speed-up over onnxruntime float as the median [quartiles] of the rounds."
    return "\n".join([contenders.table(header, lines), "", *notes, *([""] if notes else []), footer])


def tokens_of(task: str) -> int:
    """How many tokens are timed: the new ones, or the prompt where there are none."""
    prompt, new = map(int, task.split("+"))
    return new or prompt


def _speed(row: Row, reference: Row, task: str) -> str:
    turns = row.turns.get(task, [])
    if not turns or len(turns) != len(reference.turns[task]):
        return "failed"
    low, middle, high = bench_speed.speed_up(row, reference, task)
    return f"{tokens_of(task) / float(np.median(turns)):.1f} ({middle:.2f} [{low:.2f}, {high:.2f}])"


def _perplexity(row: Row, reference: Row) -> list[str]:
    if row.perplexity is None or reference.perplexity is None:
        return ["", ""]
    return [f"{row.perplexity:.5g}", f"{row.perplexity / reference.perplexity:.4g}"]


def _sizes(row: Row) -> list[str]:
    return [f"{row.load_seconds:.2f}", f"{row.peak_mb:.0f}", f"{row.built.size_mb:.1f}"] if row.turns else ["", "", ""]


def compiled(text: str) -> tuple[str, Path]:
    """NAME=FOLDER of --compiled."""
    name, _, folder = text.partition("=")
    known = [contender.name for contender in contenders.DECODERS if contender is not contenders.FLOAT]
    if name not in known:
        raise argparse.ArgumentTypeError(f"there is no contender {name!r}; choose from {', '.join(known)}")
    return name, exported(folder)


def exported(text: str) -> Path:
    """A folder with a model.onnx, or that file itself."""
    path = Path(text)
    folder = path.parent if path.name == "model.onnx" else path
    if not (folder / "model.onnx").is_file():
        raise argparse.ArgumentTypeError(f"there is no model.onnx in {folder}")
    return folder


def parser() -> argparse.ArgumentParser:
    made = contenders.parser(__doc__, contenders.DECODERS)
    made.add_argument("--model", default="smollm2",
                      help="name of a reference model, a Hugging Face folder or a hub id (default: smollm2)")  # fmt: skip
    made.add_argument("--float", type=exported, metavar="FOLDER", dest="exported",
                      help="a float model.onnx that is exported already, with tokenizer.json beside it")  # fmt: skip
    made.add_argument("--compiled", type=compiled, action="append", default=[], metavar="NAME=FOLDER",
                      help="take this folder for the contender NAME instead of making it; may be repeated")  # fmt: skip
    made.add_argument("--data", type=Path, metavar="TEXT", help="running text to take perplexity on; default: none")
    made.add_argument("--windows", type=int, default=12, help="windows of 512 tokens of it (default: 12)")
    made.add_argument("--turns", type=int, default=9, help="rounds for each task (default: 9)")
    made.add_argument("--threads", type=int, default=2, help="threads of every contender (default: 2)")
    return made


def main() -> None:
    options = parser().parse_args()
    if options.data is not None and not options.data.is_file():
        raise SystemExit(f"--data: there is no file {options.data}; give UTF-8 text.")
    console = Console(stderr=True)
    with contenders.work_folder(options.work) as root, Progress(console=console) as progress:
        work = contenders.prepare_decoder(options.model, root, options.calibration, options.samples, options.exported)
        tasks = [f"{work.window}+0", DECODE]
        rows = measure(work, tasks, options, progress)
    if rows[0].failure:
        raise SystemExit(f"the float model does not run: {rows[0].failure}.")
    facts = {"model": options.model, **contenders.machine(options.threads)}
    if options.data is not None:
        facts["perplexity"] = f"on {options.windows} windows of {work.window} tokens of {options.data.name}"
    contenders.publish(options, report(rows, tasks, facts), {"machine": facts, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
