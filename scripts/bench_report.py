"""What the benchmarks write: Markdown tables, a plot as PNG and SVG, and both spliced into a page between markers."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # type checkers see the repository as the root, Python the folder of this file
    from scripts import bench_turns
else:
    import bench_turns

OWN = "scalefold"


def add_options(made: argparse.ArgumentParser, section: str, *, plot: bool = True) -> None:
    """Where the results go."""
    made.add_argument("-o", "--output", type=Path, metavar="FILE.md", help="write the Markdown here too")
    made.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured here")
    if plot:
        made.add_argument("--plot", type=Path, metavar="NAME", help="draw NAME.png and NAME.svg; needs matplotlib, which "
                          "is in the extra `bench`")  # fmt: skip
    made.add_argument("--write", type=Path, metavar="FILE.md", help="put the Markdown into this page, between "
                      f"`<!-- {section}: begin -->` and `<!-- {section}: end -->`")  # fmt: skip


def publish(options: argparse.Namespace, section: str, markdown: str, data: Mapping[str, Any]) -> None:
    """Print the report and write the files that were asked for."""
    if options.write and getattr(options, "plot", None) and not options.prepare:
        image = os.path.relpath(options.plot.with_suffix(".svg"), options.write.parent)
        markdown = f"{markdown}\n\n![speed-up of every contender]({image})"
    sys.stdout.write(markdown + "\n")
    if options.output:
        options.output.write_text(markdown + "\n", encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    if options.write:
        splice(options.write, section, markdown)


def splice(page: Path, section: str, markdown: str) -> None:
    """Put Markdown between the two markers of a section of a page."""
    begin, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"--write: {page} has no lines `{begin}` and `{end}`.")
    page.write_text(f"{before}{begin}\n\n{markdown.strip()}\n\n{end}{after}", encoding="utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text: int = 2) -> str:
    """A Markdown table; the first columns are text, the others figures."""
    marks = ["---" if index < text else "---:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, marks, *rows])


def told(facts: Mapping[str, str], reference: str = "onnxruntime float") -> str:
    """The line below a table that says what was measured, and how."""
    listed = ", ".join(f"{name} {value}" for name, value in facts.items())
    return f"{listed}. Median of turns; in brackets the speed-up over {reference}: median [quartiles] of the rounds."


def failures(rows: Sequence[bench_turns.Row]) -> list[str]:
    """A line for every contender that gave nothing."""
    lines = [f"* {row.tool} {row.settings} failed: {row.failure}" for row in rows if row.failure]
    return [*lines, ""] if lines else []


def speed(row: bench_turns.Row, reference: bench_turns.Row, shape: str, figure: str) -> str:
    """A figure with its speed-up."""
    found = bench_turns.speed_up(row, reference, shape)
    if found is None:
        return "failed" if row.failure else ""
    low, middle, high = found
    return f"{figure} ({middle:.2f} [{low:.2f}, {high:.2f}])"


def median(row: bench_turns.Row, shape: str) -> float:
    """Median seconds of a turn; 0 where there is none."""
    return float(np.median(row.turns[shape])) if row.turns.get(shape) else 0.0


SIZES = ("load, s", "held, MB", "peak, MB", "file, MB")
"""The headings of what `sizes` gives."""


def sizes(row: bench_turns.Row) -> list[str]:
    """Load time, memory that loading took, peak memory and file size; empty where nothing was timed."""
    figures = (f"{row.load_seconds:.2f}", f"{row.held_mb:.0f}", f"{row.peak_mb:.0f}", f"{row.built.size_mb:.1f}")
    return [figure if row.turns else "" for figure in figures]


def optional(value: float | None, form: str) -> str:
    """A figure, or nothing."""
    return "" if value is None else format(value, form)


def data_of(rows: Sequence[bench_turns.Row], facts: Mapping[str, str], shapes: Sequence[str]) -> dict[str, Any]:
    """Everything that was measured, with the ratios of the tables."""
    reference = {row.model: row for row in rows if row.contender == "float"}
    ratios = [
        {shape: bench_turns.speed_up(row, reference[row.model], shape) for shape in shapes if row.turns.get(shape)}
        for row in rows
    ]
    return {
        "machine": facts,
        "rows": [asdict(row) | {"speed_up": ratio} for row, ratio in zip(rows, ratios, strict=True)],
    }


def draw(target: Path, rows: Sequence[bench_turns.Row], shapes: Sequence[str]) -> None:
    """Speed-ups over float with their quartiles, a panel for each model and shape, as PNG and SVG."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib: pip install 'scalefold[bench]'.") from error
    models = list(dict.fromkeys(row.model for row in rows))
    width, height = 3.2 * len(shapes) + 2.5, 1.0 + sum(_height(rows, model) for model in models)
    heights = [_height(rows, model) for model in models]
    figure, axes = pyplot.subplots(
        len(models), len(shapes), figsize=(width, height), squeeze=False, sharey="row", height_ratios=heights
    )
    for line, model in zip(axes, models, strict=True):
        mine = [row for row in rows if row.model == model]
        for panel, shape in zip(line, shapes, strict=True):
            _panel(panel, mine, shape)
            panel.set_title(f"{model}, {shape}", fontsize=9)
    figure.supxlabel("speed-up over onnxruntime float, median and quartiles", fontsize=9)
    figure.tight_layout()
    for suffix in (".png", ".svg"):
        figure.savefig(target.with_suffix(suffix), dpi=150, metadata={"Date": None} if suffix == ".svg" else None)
    pyplot.close(figure)


def _height(rows: Sequence[bench_turns.Row], model: str) -> float:
    return 0.6 + 0.24 * sum(row.model == model for row in rows)


def _panel(panel: Any, rows: Sequence[bench_turns.Row], shape: str) -> None:
    reference = rows[0]
    for place, row in enumerate(reversed(rows)):
        found = bench_turns.speed_up(row, reference, shape)
        if found is None:
            continue
        low, middle, high = found
        colour = "#2471a3" if row.tool == OWN else "#7f8c8d"
        panel.barh(place, middle, color=colour, xerr=[[middle - low], [high - middle]], ecolor="#333", height=0.7)
    panel.set_yticks(range(len(rows)), [row.contender for row in reversed(rows)], fontsize=8)
    panel.axvline(1, color="#c0392b", linewidth=0.8)
    panel.tick_params(axis="x", labelsize=8)
