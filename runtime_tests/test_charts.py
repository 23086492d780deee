from __future__ import annotations

import re
import struct
import sys
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from scalefold.compiler import charts
from scalefold.compiler.charts import Chart
from scalefold.compiler.errors import SourceError

SVG = "{http://www.w3.org/2000/svg}"


def drawn(chart: Chart) -> ElementTree.Element:
    """The chart as a tree: it is well-formed."""
    return ElementTree.fromstring(chart.svg())


def test_an_outlier_is_drawn_however_many_channels_share_a_bar() -> None:
    extremes = np.stack([np.full(5000, -1.0), np.full(5000, 1.0)]).astype(np.float32)
    flat = charts.channel_ranges("flat", extremes, "red")
    extremes[1, 1240] = 99.0
    tall = charts.channel_ranges("tall", extremes, "red")

    def tops(chart: Chart) -> list[float]:
        (path,) = drawn(chart).iter(f"{SVG}path")
        return [float(top) for top in re.findall(r"M\S+ (\S+)V", path.attrib["d"])]

    assert len(tops(flat)) == len(tops(tall)) == charts.COLUMNS
    assert len(set(tops(flat))) == 1
    apart = [index for index, top in enumerate(tops(tall)) if top != max(tops(tall))]
    assert apart == [int(1240 / 5000 * charts.COLUMNS)]


def test_bars_leave_out_what_was_not_measured_and_reach_as_far_as_their_values() -> None:
    chart = charts.bars("dB", ["a", "b", "c"], [10.0, None, 20.0], "dB")
    heights = [
        float(bar.attrib["height"]) for bar in drawn(chart).iter(f"{SVG}rect") if bar.find(f"{SVG}title") is not None
    ]
    assert len(heights) == 2
    assert heights[1] == pytest.approx(2 * heights[0], rel=0.01)


def test_logarithmic_marks_lie_a_decade_apart() -> None:
    chart = charts.log_marks("reach", {"before": ("red", [1.0, 10.0, 100.0])}, "sites")
    y = [float(mark.attrib["cy"]) for mark in drawn(chart).iter(f"{SVG}circle")]
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)
    assert y[0] > y[2]


def test_names_are_escaped_and_long_ones_cut_from_the_left() -> None:
    name = "a<b>&" + "x" * 80 + "end"
    chart = charts.shares("<&>", [(name, 1.0, "100%"), ("half", 0.5, "50%")])
    texts = [text.text or "" for text in drawn(chart).iter(f"{SVG}text")]
    assert any(text.startswith("…") and text.endswith("end") for text in texts)
    widths = [float(bar.attrib["width"]) for bar in drawn(chart).iter(f"{SVG}rect") if "y" in bar.attrib]
    assert widths[0] == pytest.approx(2 * widths[1])


def test_charts_stand_side_by_side_in_one_file() -> None:
    chart = charts.bars("one", ["0"], [1.0], "dB")
    joined = charts.side_by_side([chart] * 5, columns=3)
    assert (joined.width, joined.height) == (3 * charts.WIDTH, 2 * chart.height)
    assert len(list(drawn(joined).iter(f"{SVG}g"))) == 5


def test_no_values_are_an_empty_chart() -> None:
    assert drawn(charts.bars("none", [], [], "dB")) is not None
    assert drawn(charts.side_by_side([])) is not None
    assert drawn(charts.channel_ranges("zeros", np.zeros((2, 4), dtype=np.float32), "red")) is not None


PNG_HEAD = struct.Struct(">8s4s4sII")


def test_a_png_file_has_the_letters_of_the_chart() -> None:
    chart = charts.shares("title", [("label", 1.0, "100%")])
    png = chart.png()
    *_, width, height = PNG_HEAD.unpack(png[: PNG_HEAD.size])
    assert (width, height) == (charts.ZOOM * chart.width, charts.ZOOM * chart.height)
    without = re.sub(r"<text.*?</text>", "", chart.body)
    assert png != replace(chart, body=without).png()


def test_a_png_file_without_its_package_or_a_font_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    chart = charts.bars("one", ["0"], [1.0], "dB")
    with monkeypatch.context() as patched:
        patched.setattr(charts, "FONTS", "NoSuchFont")
        with pytest.raises(SourceError, match="PNG plots: there is no font to draw letters with; install one"):
            chart.png()
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(
        SourceError, match=r"drawing PNG files needs the package resvg_py; pip install 'scalefold\[plots\]'"
    ):
        chart.png()
