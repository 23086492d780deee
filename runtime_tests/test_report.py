from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import CompileReport, channel_ranges
from scalefold.compiler.cli import report_command
from scalefold.compiler.errors import CalibrationError, OutputError
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.node_timing import node_times
from scalefold.compiler.report import Report, gather_report, kind_of
from scalefold.compiler.report_page import plots, render
from scalefold.compiler.runtime import Feed

Cli = Callable[..., subprocess.CompletedProcess[str]]
VOID = {"meta", "br", "link", "img"}


@pytest.fixture(scope="module")
def folder(compiled: dict[str, CompileReport]) -> Path:
    output = compiled["onnxruntime-cpu"].output
    assert output is not None
    return output


@pytest.fixture(scope="module")
def report(folder: Path, float_model: Path) -> Report:
    return gather_report(folder, str(float_model))


class Page(HTMLParser):
    """Checks that tags are closed in order, and gathers texts and references."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_stands_alone_and_says_what_was_done(report: Report) -> None:
    text = render(report)
    page = Page(text)
    assert page.references == []
    assert "<script" not in text and "@import" not in text and "url(" not in text
    said = " ".join(page.text)
    for layer in report.layer_names:
        assert layer in said
    for entry in report.record["passes"]:
        assert entry["name"] in said
        for event in entry["rewrites"] + entry["declined"]:
            assert event["reason"] in said
    assert report.record["calibration"]["digest"] in said
    assert "no saturation" in said


def test_migration_shows_in_the_recorded_ranges(report: Report) -> None:
    assert report.ranges_origin.startswith("held-out")
    sites = report.sites()
    migrated = [site for site in sites if site["largest_after"] < 0.5 * site["largest_before"]]
    assert len(sites) == 9
    assert migrated
    assert all(site["spread_after"] < 0.5 * site["spread_before"] for site in migrated)


def test_ranges_of_a_compiled_graph_are_those_of_the_float_graph_behind_migration(
    compiled: dict[str, CompileReport], report: Report, fresh_feeds: list[Feed]
) -> None:
    for written in compiled.values():
        assert written.output is not None
        found = channel_ranges.measure(read_onnx(written.output / "model.onnx"), report.layer_names, list(fresh_feeds))
        _, after = channel_ranges.read(written.output)
        assert list(found) == list(after)
        for name in found:
            largest = np.abs(after[name]).max()
            assert np.abs(np.abs(found[name]).max() - largest) < 0.3 * largest, name


def test_what_a_per_token_layer_reads_is_found_behind_its_rows(feeds: list[Feed]) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
    model (float[b, 2] x) => (float[b, 2] y)
    <int8[2, 2] w = {1, 2, 3, 4}, float[2] ws = {0.1, 0.2}, float s = {0.0039}, uint8 z = {0}, float t = {0.000001},
     int64[1] last = {-1}, float two = {2.0}>
    { h = Mul(x, two)  m = ReduceMin(h, last)  M = ReduceMax(h, last)  d = Sub(M, m)  r = Max(d, t)
      c = Sub(h, m)  u = Div(c, r)  q = QuantizeLinear(u, s, z)  a = DequantizeLinear(q, s, z)
      wd = DequantizeLinear<axis = 1>(w, ws)  y = MatMul(a, wd) }"""
    model = ir.from_onnx_text(text)
    next(node for node in model.graph if node.op_type == "MatMul").name = "fc"
    rows = np.array([[1, -2], [3, 0.5]], dtype=np.float32)
    found = channel_ranges.measure(model, ["fc"], [{"x": rows}])
    np.testing.assert_array_equal(found["fc"], [[2, -4], [6, 1]])


def test_times_cover_every_node_and_every_layer(report: Report, folder: Path) -> None:
    assert {entry.kernel for entry in report.times} >= {"MatMulIntegerToFloat", "LayerNormalization"}
    layers = report.seconds_by_layer()
    assert set(layers) == {*report.layer_names, "everything else"}
    total = sum(entry.seconds for entry in report.times)
    assert sum(layers.values()) == pytest.approx(total)
    assert sum(report.seconds_by_kernel().values()) == pytest.approx(total)


def test_node_times_leave_no_file_behind(folder: Path, fresh_feeds: list[Feed], tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert node_times(folder / "model.onnx", fresh_feeds[0], runs=1)
    assert list(tmp_path.iterdir()) == []


def test_the_float_model_is_compared_where_it_is_given(report: Report, folder: Path) -> None:
    assert report.against is not None
    (states, *_) = report.against.outputs
    assert states.name == "last_hidden_state"
    assert 0.98 < states.mean_cosine < 1
    alone = gather_report(folder)
    assert alone.against is None
    assert "On one sample" not in render(alone)


def test_ranges_are_measured_where_none_were_recorded(folder: Path, float_model: Path, tmp_path: Path) -> None:
    older = shutil.copytree(folder, tmp_path / "older")
    (older / channel_ranges.FILE).unlink()
    assert "give the float model" in render(gather_report(older))
    assert len(gather_report(older, str(float_model)).sites()) == 9


def test_a_comparison_that_cannot_be_made_is_refused(folder: Path, float_model: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "without")
    (tmp_path / "without" / "tokenizer.json").unlink()
    gather_report(tmp_path / "without")
    with pytest.raises(CalibrationError, match="tokenizer"):
        gather_report(tmp_path / "without", str(float_model))


def test_every_picture_is_a_file_of_its_own(report: Report) -> None:
    found = plots(report)
    assert {"sqnr", "size", "latency", "ranges", "ranges-1"} <= set(found)
    for chart in found.values():
        assert chart.svg().startswith("<svg") and chart.width > 0 and chart.height > 0


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        ("model.layers.12.mlp.down_proj", ("model.layers.*.mlp.down_proj", 12)),
        ("group.0.layers.0.query.3", ("group.*.layers.*.query", 3)),
        ("group.0.layers.0.query", ("group.*.layers.*.query", 0)),
        ("lm_head", ("lm_head", 0)),
    ],
)
def test_layers_of_one_kind_differ_by_a_number(layer: str, kind: tuple[str, int]) -> None:
    assert kind_of(layer) == kind


def test_the_command_writes_the_page_and_the_plots(folder: Path, tmp_path: Path, cli: Cli) -> None:
    done = cli("report", folder, "-o", "page.html", "--plots", "drawn", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    facts: dict[str, Any] = json.loads(done.stdout)
    assert facts["latency"]["seconds"] > 0
    assert len(facts["ranges"]["sites"]) == 9
    assert {Path(path).suffix for path in facts["plots"]} == {".svg"}
    assert all((tmp_path / path).is_file() for path in facts["plots"])
    assert list((tmp_path / "drawn").glob("*.png")) == []
    Page((tmp_path / "page.html").read_text(encoding="utf-8"))


def test_png_files_are_drawn_beside_the_svg_files(folder: Path, tmp_path: Path, cli: Cli) -> None:
    done = cli("report", folder, "--plots", "drawn", "--png", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    written = [Path(path) for path in json.loads(done.stdout)["plots"]]
    assert {path.suffix for path in written} == {".svg", ".png"}
    assert {path.stem for path in written if path.suffix == ".png"} == {path.stem for path in written}
    assert all((tmp_path / path).read_bytes().startswith(b"\x89PNG") for path in written if path.suffix == ".png")
    refused = cli("report", folder, "--png")
    assert refused.returncode == 2
    assert "--png: there is no folder for the plots; give one with --plots." in refused.stderr


def test_a_page_that_cannot_be_written_is_one_sentence_and_leaves_the_earlier_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.html"
    page.write_text("earlier", encoding="utf-8")

    def full(path: Path, *_: object, **__: object) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(OutputError, match=r"page\.html: it cannot be written .No space left on device"):
            report_command(folder, page)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert page.read_text(encoding="utf-8") == "earlier"


def test_a_folder_without_a_record_is_refused(tmp_path: Path, cli: Cli) -> None:
    done = cli("report", tmp_path)
    assert done.returncode != 0
    assert re.search(r"there is no readable scalefold\.json", done.stderr)
