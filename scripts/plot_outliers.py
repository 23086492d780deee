"""Draw the range of every channel behind one LayerNormalization of MiniLM, before and after migration, as an SVG."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx_ir as ir

from scalefold.compiler.calibrate import Calibration, calibration_from, collect
from scalefold.compiler.driver import open_source
from scalefold.compiler.protocol import Context
from scalefold.compiler.sites import find_sites
from scalefold.compiler.stats import ChannelRange
from scalefold.models import minilm
from scalefold.passes.migrate_outliers import MigrateOutliers

WIDTH, HEIGHT, LEFT, TOP = 760, 240, 50, 46


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/outliers.svg"))
    parser.add_argument("--site", type=int, default=1, help="which activation that linear layers read, from 0")
    arguments = parser.parse_args()
    with open_source("minilm") as model:
        tokenizer = minilm.build() / "tokenizer.json"
        calibration = calibration_from(None, model, tokenizer_file=tokenizer, samples=64, max_length=128)
        sites = [site for site in find_sites(model) if site.norm is not None]
        x = sites[arguments.site].x
        before = channel_ranges(model, x, calibration)
        MigrateOutliers().run(model, Context(search=calibration.head(16)))
        after = channel_ranges(model, x, calibration)
    arguments.output.write_text(draw(sites[arguments.site].readers[0].name, before, after), encoding="utf-8")


def channel_ranges(model: ir.Model, x: ir.Value, calibration: Calibration) -> ChannelRange:
    """The range of each channel of `x`."""
    name = x.name or ""
    found = collect(model, {name: ChannelRange}, calibration.feeds())[name]
    assert isinstance(found, ChannelRange)
    return found


def draw(layer: str, before: ChannelRange, after: ChannelRange) -> str:
    """Two panels side by side, each with a bar from smallest to largest value per channel."""
    panels = [panel(0, "before", before, "#c0392b"), panel(1, "after migration", after, "#2471a3")]
    title = f"all-MiniLM-L6-v2: range of each channel at the input of {layer}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + TOP}" font-family="sans-serif">'
        f'<rect width="100%" height="100%" fill="white"/><text x="{LEFT}" y="18" font-size="14">{title}</text>'
        f"{''.join(panels)}</svg>\n"
    )


def panel(index: int, title: str, ranges: ChannelRange, colour: str) -> str:
    """One panel: its own scale, with the tensor's range written beside the title."""
    assert ranges.low is not None and ranges.high is not None
    low, high = float(ranges.low.min()), float(ranges.high.max())
    span = (WIDTH - 2 * LEFT - 30) / 2
    left, height = LEFT + index * (span + 60), HEIGHT - 30
    xs = left + np.arange(len(ranges.low)) * span / len(ranges.low)
    tops = TOP + 6 + (high - ranges.high) / (high - low) * height
    bottoms = TOP + 6 + (high - ranges.low) / (high - low) * height
    bars = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
        for x, top, bottom in zip(xs, tops, bottoms, strict=True)
    )
    zero = TOP + 6 + high / (high - low) * height
    return (
        f'<g stroke="{colour}" stroke-width="1">{bars}</g>'
        f'<line x1="{left}" x2="{left + span}" y1="{zero:.1f}" y2="{zero:.1f}" stroke="#888" stroke-width="0.5"/>'
        f'<text x="{left}" y="{TOP - 6}">{title}: {low:.1f} to {high:.1f}</text>'
    )


if __name__ == "__main__":
    main()
