"""Charts as SVG text: a few kinds, narrow enough for a phone, and nothing to install."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from scalefold.compiler.errors import SourceError, needing_packages
from scalefold.compiler.schemes import Float

WIDTH = 370
LEFT, RIGHT, TOP, BOTTOM = 42, 8, 28, 20
COLUMNS = 320
"""Most bars of a range chart; channels that share one are drawn at their extremes, so that no outlier is lost."""

RED, BLUE, GREY = "#c0392b", "#2471a3", "#7f8c8d"
FONTS = "Helvetica, Arial, 'DejaVu Sans', 'Liberation Sans', 'Noto Sans', sans-serif"
"""Families by name: what draws PNG files finds no font by `sans-serif` alone."""

ZOOM = 2
"""Pixels of a PNG file for each unit of a chart."""


@dataclass(frozen=True)
class Chart:
    """A drawing in its own coordinates.

    Attributes:
        title: its heading, which is also drawn.
        width: of the drawing.
        height: of the drawing.
        body: SVG elements.
    """

    title: str
    width: int
    height: int
    body: str

    def svg(self) -> str:
        """The chart as one SVG element, a file of its own or a part of a page."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{escape(self.title)}" font-family="{FONTS}" font-size="11">'
            f'<rect width="100%" height="100%" fill="white"/>{self.body}</svg>\n'
        )

    def png(self) -> bytes:
        """The chart as a PNG file.

        Raises:
            SourceError: the package that draws it is not installed, or no font is.
        """
        draw = _renderer()
        letters = Chart("", 20, 20, '<text y="15">x</text>')
        if draw(letters.svg()) == draw(Chart("", 20, 20, "").svg()):
            raise SourceError(
                "there is no font to draw letters with",
                where="PNG plots",
                remedy="install one, such as Debian's fonts-dejavu-core, or take the SVG files",
            )
        return draw(self.svg())


def _renderer() -> Callable[[str], bytes]:
    with needing_packages("drawing PNG files", "pip install 'scalefold[plots]'"):
        import resvg_py
    return lambda svg: bytes(resvg_py.svg_to_bytes(svg_string=svg, zoom=ZOOM))


def side_by_side(charts: Sequence[Chart], columns: int = 2) -> Chart:
    """Charts in rows of so many, as one."""
    body, top = [], 0
    for start in range(0, len(charts), columns):
        row = charts[start : start + columns]
        body += [f'<g transform="translate({index * WIDTH},{top})">{chart.body}</g>' for index, chart in enumerate(row)]
        top += max(chart.height for chart in row)
    title = charts[0].title if charts else ""
    return Chart(title, WIDTH * min(columns, max(len(charts), 1)), top, "".join(body))


def channel_ranges(title: str, extremes: Float, colour: str) -> Chart:
    """A bar from the smallest to the largest value of each channel.

    Args:
        title: its heading.
        extremes: [2, K], lows and highs.
        colour: of the bars.
    """
    height, count = 200, extremes.shape[1]
    edges = np.linspace(0, count, min(count, COLUMNS) + 1).astype(int)[:-1]
    lows, highs = np.minimum.reduceat(extremes[0], edges), np.maximum.reduceat(extremes[1], edges)
    axis = _Axis(min(float(lows.min()), 0.0), max(float(highs.max()), 0.0), height)
    step = (WIDTH - LEFT - RIGHT) / len(edges)
    path = "".join(
        f"M{LEFT + (index + 0.5) * step:.1f} {axis.y(high):.1f}V{axis.y(low):.1f}"
        for index, (low, high) in enumerate(zip(lows, highs, strict=True))
    )
    # a channel that hardly moves is still a mark
    bars = f'<path d="{path}" stroke="{colour}" stroke-width="{max(step * 0.85, 0.9):.2f}" stroke-linecap="square"/>'
    return Chart(
        title, WIDTH, height, _heading(title) + axis.draw() + bars + _ends("channel 0", str(count - 1), height)
    )


def bars(
    title: str, labels: Sequence[str], values: Sequence[float | None], unit: str, top: float | None = None
) -> Chart:
    """A vertical bar for each value; what was not measured is left out.

    Args:
        title: its heading.
        labels: of the first and the last bar the label is written, of all it is shown on hovering.
        values: the heights.
        unit: what they are measured in.
        top: end of the axis; the largest value when None.
    """
    height = 120
    known = [value for value in values if value is not None]
    axis = _Axis(min(0.0, *known, 0.0), max(top or 0.0, *known, 1e-9), height, ticks=3)
    step = (WIDTH - LEFT - RIGHT) / max(len(values), 1)
    wide = min(step * 0.8, 24)
    shapes = [
        f'<rect x="{LEFT + (index + 0.5) * step - wide / 2:.1f}" y="{min(axis.y(value), axis.y(0)):.1f}" '
        f'width="{wide:.1f}" height="{abs(axis.y(0) - axis.y(value)):.1f}" fill="{BLUE}">'
        f"<title>{escape(label)}: {value:.1f} {escape(unit)}</title></rect>"
        for index, (label, value) in enumerate(zip(labels, values, strict=True))
        if value is not None
    ]
    first, last = (labels[0], labels[-1] if len(labels) > 1 else "") if labels else ("", "")
    middle = (
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 6}" text-anchor="middle" fill="#555" font-size="10">'
        f"{escape(unit)}</text>"
    )
    body = _heading(title) + axis.draw() + "".join(shapes) + _ends(first, last, height) + middle
    return Chart(title, WIDTH, height, body)


def log_marks(title: str, series: Mapping[str, tuple[str, Sequence[float]]], caption: str) -> Chart:
    """Marks over the places of a model on a logarithmic axis, one colour for each series.

    Args:
        title: its heading.
        series: for each name its colour and its positive values, all of one length.
        caption: what the places are.
    """
    height = 200
    every = np.log10(np.maximum([value for _, values in series.values() for value in values] or [1.0], 1e-9))
    axis = _Axis(math.floor(every.min()), max(math.ceil(every.max()), math.floor(every.min()) + 1), height, log=True)
    shapes, legend = [], []
    for order, (name, (colour, values)) in enumerate(series.items()):
        step = (WIDTH - LEFT - RIGHT) / max(len(values), 1)
        shapes += [
            f'<circle cx="{LEFT + (index + 0.5) * step:.1f}" cy="{axis.y(math.log10(max(value, 1e-9))):.1f}" r="2.2" '
            f'fill="{colour}" fill-opacity="0.8"/>'
            for index, value in enumerate(values)
        ]
        legend.append(f'<text x="{WIDTH - RIGHT - 120 + 64 * order}" y="14" fill="{colour}">● {escape(name)}</text>')
    body = _heading(title) + "".join(legend) + axis.draw() + "".join(shapes)
    return Chart(title, WIDTH, height, body + _ends(caption, "", height))


def shares(title: str, entries: Sequence[tuple[str, float, str]]) -> Chart:
    """A horizontal bar for each entry, under its label and figure.

    Args:
        title: its heading.
        entries: (label, value, figure to write).
    """
    row, largest = 30, max((value for _, value, _ in entries), default=1.0) or 1.0
    shapes = []
    for index, (label, value, figure) in enumerate(entries):
        y = TOP + index * row
        shown = label if len(label) <= 44 else "…" + label[-43:]
        shapes.append(
            f'<text x="8" y="{y + 9}">{escape(shown)}</text>'
            f'<text x="{WIDTH - RIGHT}" y="{y + 9}" text-anchor="end" fill="#444">{escape(figure)}</text>'
            f'<rect x="8" y="{y + 13}" width="{max(value / largest, 0) * (WIDTH - 16):.1f}" height="8" fill="{BLUE}"/>'
        )
    return Chart(title, WIDTH, TOP + row * len(entries) + 4, _heading(title) + "".join(shapes))


@dataclass(frozen=True)
class _Axis:
    """The vertical axis of a chart; in logarithmic ones its values are exponents of 10."""

    low: float
    high: float
    height: int
    ticks: int = 5
    log: bool = False

    def y(self, value: float) -> float:
        """Where a value lies."""
        share = (float(value) - self.low) / max(self.high - self.low, 1e-12)
        return self.height - BOTTOM - share * (self.height - BOTTOM - TOP)

    def draw(self) -> str:
        """Grid lines with their numbers."""
        lines = []
        for tick in self._ticks():
            y, text = self.y(tick), _number(10**tick if self.log else tick)
            colour = "#999" if tick == 0 and not self.log else "#e4e4e4"
            lines.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}"/>'
                f'<text x="{LEFT - 4}" y="{y + 4:.1f}" text-anchor="end" fill="#555" font-size="10">{text}</text>'
            )
        return "".join(lines)

    def _ticks(self) -> list[float]:
        if self.log:
            step = max(1, round((self.high - self.low) / self.ticks))
            return [float(tick) for tick in range(int(self.low), int(self.high) + 1, step)]
        rough = (self.high - self.low) / self.ticks
        unit = 10 ** math.floor(math.log10(max(rough, 1e-12)))
        step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def _heading(title: str) -> str:
    shown = title if len(title) <= 58 else "…" + title[-57:]
    return f'<text x="8" y="14" font-weight="bold"><title>{escape(title)}</title>{escape(shown)}</text>'


def _ends(first: str, last: str, height: int) -> str:
    y = height - 6
    return (
        f'<text x="{LEFT}" y="{y}" fill="#555" font-size="10">{escape(first)}</text>'
        f'<text x="{WIDTH - RIGHT}" y="{y}" text-anchor="end" fill="#555" font-size="10">{escape(last)}</text>'
    )


def _number(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e5 else f"{value:.0e}"
