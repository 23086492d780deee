"""Speed, perplexity and memory of decoders for each way to quantize them, beside onnxruntime float.

Prefill runs a prompt of 512 tokens behind an empty cache; decode runs 64 likeliest tokens one by one behind a prompt of
16, for one sequence and for eight. Each engine keeps its cache its own way, and is asked for the next token. Contenders
take turns as in bench_speed.py. All start from one float model and calibrate on windows of 512 tokens of one text, each
as four of --samples; quantize_static is given 8 of them, since its memory grows with each.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress

if TYPE_CHECKING:  # type checkers see the repository as the root, Python the folder of this file
    from scripts import bench_report, bench_turns, contenders
else:
    import bench_report
    import bench_turns
    import contenders

MODELS = "smollm2,gpt2-124m,opt-125m"
DECODES = ("1x16+64", "8x16+64")
BESIDE = ("tokenizer.json", "config.json")
"""What a session for generation needs beside a model."""
SECTION = "decoders"


def measure(
    model: str, work: contenders.Workspace, tasks: list[str], options: argparse.Namespace, progress: Progress
) -> tuple[list[bench_turns.Row], bool]:
    """Build and judge every contender, one at a time; then start them all, and give them turns in rounds."""
    entries = contenders.chosen(options.only, contenders.DECODERS, timed=True)
    given, known = dict(options.compiled), bench_turns.read(work, options.turns, options.threads)
    bar = progress.add_task("", total=len(entries))
    rows = []
    for contender in entries:
        progress.update(bar, description=f"{model}: {contender.name}")
        rows.append(build(contender, work, model, given.get(contender.name), known))
        progress.advance(bar)
    if rows[0].failure:
        raise SystemExit(f"the float model does not run: {rows[0].failure}.")
    commands = [
        [] if row.failure else contenders.command(contender, "decode", work, str(options.threads))
        for contender, row in zip(entries, rows, strict=True)
    ]
    return rows, bench_turns.measure(work, rows, commands, tasks, options, progress)


def build(
    contender: contenders.Contender,
    work: contenders.Workspace,
    model: str,
    given: Path | None,
    known: dict[str, bench_turns.Row],
) -> bench_turns.Row:
    """Quantize and judge, or take the folder of --compiled, whose time and memory are not known."""
    if given is not None:
        contenders.place(given, work.output(contender))
        built = contenders.Built(size_mb=contenders.size_mb(work.model(contender)))
        row = bench_turns.Row(model, contender.name, contender.family, contender.settings, built)
        return bench_turns.checked(row, contender, work, "judge")
    made = contenders.build(contender, work)
    if contender.engine == "onnxruntime" and not made.failure:
        for file in filter(Path.is_file, map(work.float_model.with_name, BESIDE)):
            if not (target := work.model(contender).with_name(file.name)).is_file():
                shutil.copy(file, target)
    return bench_turns.row_of(contender, made, work, model, "judge", known)


def report(rows: list[bench_turns.Row], facts: dict[str, str]) -> str:
    """One Markdown table per model: tokens per second with their ratio to float, perplexity with its own, and sizes."""
    parts = []
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model]
        tasks = tasks_of(mine)
        header = [
            "contender", "settings", *map(title, tasks), "cosine of logits", "perplexity", "to float", "integer matmuls",
            *bench_report.SIZES,
        ]  # fmt: skip
        lines = [
            [
                row.tool,
                row.settings,
                *(bench_report.speed(row, mine[0], task, f"{tokens_per_second(row, task):.1f}") for task in tasks),
                bench_report.optional(row.cosine, ".4f"),
                *_perplexity(row, mine[0]),
                bench_report.optional(row.integer_matmuls, "d"),
                *bench_report.sizes(row),
            ]
            for row in mine
        ]
        parts += [f"### {model}", "", bench_report.table(header, lines), "", *bench_report.failures(mine)]
    return "\n".join([*parts, bench_report.told(facts)])


def tasks_of(rows: list[bench_turns.Row]) -> list[str]:
    """What the float model was run at: prompts first."""
    return sorted(rows[0].turns, key=lambda task: (contenders.sizes_of(task)[2], contenders.sizes_of(task)[0]))


def title(task: str) -> str:
    """A task as the heading of its column."""
    batch, prompt, new = contenders.sizes_of(task)
    return f"decode of {new} x {batch}, tokens/s" if new else f"prefill of {prompt}, tokens/s"


def tokens_per_second(row: bench_turns.Row, task: str) -> float:
    """New tokens of all sequences, or the prompt's where there are none, per second of the median turn."""
    batch, prompt, new = contenders.sizes_of(task)
    seconds = bench_report.median(row, task)
    return batch * (new or prompt) / seconds if seconds else 0.0


def _perplexity(row: bench_turns.Row, reference: bench_turns.Row) -> list[str]:
    if row.perplexity is None or reference.perplexity is None:
        return ["", ""]
    return [f"{row.perplexity:.5g}", f"{row.perplexity / reference.perplexity:.4g}"]


def compiled(text: str) -> tuple[str, Path]:
    """NAME=FOLDER of --compiled."""
    name, _, folder = text.partition("=")
    known = [contender.name for contender in contenders.DECODERS if contender.build is not contenders.keep_float]
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
    made.add_argument("--models", default=MODELS, metavar="NAME,...",
                      help=f"names of reference models, Hugging Face folders or hub ids (default: {MODELS})")  # fmt: skip
    made.add_argument("--float", type=exported, metavar="FOLDER", dest="exported",
                      help="a float model.onnx of the one model, exported already, with its tokenizer.json")  # fmt: skip
    made.add_argument("--compiled", type=compiled, action="append", default=[], metavar="NAME=FOLDER",
                      help="take this folder for the contender NAME instead of making it; may be repeated")  # fmt: skip
    made.add_argument("--data", type=Path, metavar="TEXT", help="running text to take perplexity on; default: none")
    made.add_argument("--windows", type=int, default=12, help="windows of 512 tokens of it (default: 12)")
    bench_turns.add_options(made, turns=9)
    bench_report.add_options(made, SECTION)
    return made


def main() -> None:
    options = parser().parse_args()
    options.until = time.monotonic() + 60 * options.minutes
    if options.data is not None and not options.data.is_file():
        raise SystemExit(f"--data: there is no file {options.data}; give UTF-8 text.")
    models, rows, unfinished = options.models.split(","), [], []
    if len(models) > 1 and (options.exported or options.compiled):
        raise SystemExit("--float and --compiled are for one model: give --models one name.")
    with contenders.work_folder(options.work) as root, Progress(console=Console(stderr=True)) as progress:
        for model in models:
            given = (model, root, options.calibration, options.samples, options.exported)
            work = contenders.prepare_decoder(*given, as_built=options.as_built)
            # random weights have no perplexity worth the name
            contenders.write_windows(work, None if model in contenders.RANDOM else options.data, options.windows)
            measured, complete = measure(model, work, [f"1x{work.window}+0", *DECODES], options, progress)
            rows += measured
            unfinished += [] if complete else [model]
    facts = contenders.machine(options.threads)
    if options.data is not None:
        facts["perplexity"] = f"on {options.windows} windows of {options.data.name}"
    tasks = list(dict.fromkeys(task for row in rows for task in row.turns))
    if options.plot and not options.prepare:
        bench_report.draw(options.plot, rows, tasks_of(rows))
    bench_report.publish(options, SECTION, report(rows, facts), bench_report.data_of(rows, facts, tasks))
    if unfinished:
        raise SystemExit(f"the minutes are over: run it again to go on with {', '.join(unfinished)}.")


if __name__ == "__main__":
    main()
