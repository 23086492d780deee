"""How fast each way to quantize runs an encoder, as a ratio to onnxruntime float measured in the same rounds.

Every contender is loaded once, in a process of its own that is stopped while others have their turn (bench_turns.py); in
each round every contender runs for the same time, so that a slow spell of the machine meets all of them. Decoders have
bench_decoders.py, which takes the same options.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress

if TYPE_CHECKING:  # type checkers see the repository as the root, Python the folder of this file
    from scripts import bench_report, bench_turns, contenders
else:
    import bench_report
    import bench_turns
    import contenders

MODELS = "minilm,bert-4x768,bert-12x768"
SHAPES = "1x16,1x128,8x128,2x512"
SECTION = "encoders"


def measure(
    model: str, work: contenders.Workspace, options: argparse.Namespace, progress: Progress
) -> tuple[list[bench_turns.Row], bool]:
    """Build every contender, start them all, and give them turns; the rows, and whether all shapes are measured."""
    entries, shapes = contenders.chosen(options.only, timed=True), options.shapes.split(",")
    known, rows = bench_turns.read(work, options.turns, options.threads), []
    task = progress.add_task(f"{model}: building", total=len(entries))
    for contender in entries:
        progress.update(task, description=f"{model}: {contender.name}")
        made = contenders.build(contender, work)
        rows.append(bench_turns.row_of(contender, made, work, model, "check", known))
        progress.advance(task)
    if rows[0].failure:
        raise SystemExit(f"the float model does not run: {rows[0].failure}.")
    commands = [
        [] if row.failure else contenders.command(contender, "serve", work, str(options.threads))
        for contender, row in zip(entries, rows, strict=True)
    ]
    return rows, bench_turns.measure(work, rows, commands, shapes, options, progress)


def report(rows: list[bench_turns.Row], shapes: list[str], facts: dict[str, str]) -> str:
    """One Markdown table per model: milliseconds, and the speed-up over float with its quartiles."""
    times = [f"{shape}, ms (speed-up)" for shape in shapes]
    header = ["contender", "settings", *times, "mean cosine", "integer matmuls", *bench_report.SIZES]
    parts = []
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model]
        lines = [
            [
                row.tool,
                row.settings,
                *(bench_report.speed(row, mine[0], shape, f"{1000 * bench_report.median(row, shape):.2f}")
                  for shape in shapes),
                bench_report.optional(row.cosine, ".4f"),
                bench_report.optional(row.integer_matmuls, "d"),
                *bench_report.sizes(row),
            ]
            for row in mine
        ]  # fmt: skip
        parts += [f"### {model}", "", bench_report.table(header, lines), "", *bench_report.failures(mine)]
    return "\n".join([*parts, bench_report.told(facts)])


def parser() -> argparse.ArgumentParser:
    made = contenders.parser(__doc__)
    made.add_argument("--models", default=MODELS, metavar="NAME,...", help=f"names or folders (default: {MODELS})")
    made.add_argument("--shapes", default=SHAPES, metavar="BxL,...", help=f"batch x tokens (default: {SHAPES})")
    bench_turns.add_options(made, turns=11)
    bench_report.add_options(made, SECTION)
    return made


def main() -> None:
    options = parser().parse_args()
    options.until = time.monotonic() + 60 * options.minutes
    shapes = options.shapes.split(",")
    rows: list[bench_turns.Row] = []
    unfinished = []
    with contenders.work_folder(options.work) as root, Progress(console=Console(stderr=True)) as progress:
        for model in options.models.split(","):
            work = contenders.prepare(model, root, options.calibration, options.samples, as_built=options.as_built)
            measured, complete = measure(model, work, options, progress)
            rows += measured
            unfinished += [] if complete else [model]
    facts = contenders.machine(options.threads)
    if options.plot and not options.prepare:
        bench_report.draw(options.plot, rows, shapes)
    bench_report.publish(options, SECTION, report(rows, shapes, facts), bench_report.data_of(rows, facts, shapes))
    if unfinished:
        raise SystemExit(f"the minutes are over: run it again to go on with {', '.join(unfinished)}.")


if __name__ == "__main__":
    main()
