"""A report as one HTML file that needs nothing else: no script, no network, charts drawn in place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from scalefold.compiler import charts
from scalefold.compiler.charts import BLUE, RED, Chart
from scalefold.compiler.report import Report, kind_of

SHOWN_SITES = 8
"""How many values have the ranges of their channels drawn: those that one channel stands out of most."""

SHOWN_NODES = 12

STYLE = """
*{box-sizing:border-box} body{margin:0;font:15px/1.5 system-ui,sans-serif;color:#1c2833;background:#f4f6f7}
main{max-width:1180px;margin:0 auto;padding:16px} h1{font-size:22px;margin:8px 0;overflow-wrap:anywhere}
h2{font-size:17px;margin:0 0 8px} section{background:#fff;border:1px solid #dfe4e6;border-radius:6px;padding:14px;
margin:12px 0} p{margin:4px 0 10px;max-width:80ch;overflow-wrap:anywhere} .cards{display:flex;flex-wrap:wrap;gap:10px}
.card{flex:1 1 150px;background:#fff;border:1px solid #dfe4e6;border-radius:6px;padding:10px 12px}
.card b{display:block;font-size:21px;line-height:1.3} .card span{color:#5d6d7e;font-size:13px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr));gap:10px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(340px,100%),1fr));gap:0 10px;max-width:960px;
border-top:1px solid #eef0f1;padding:6px 0} svg{width:100%;height:auto;display:block} .scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13px} td,th{text-align:left;padding:3px 12px 3px 0;vertical-align:top;
border-bottom:1px solid #eef0f1} td.n,th.n{text-align:right;white-space:nowrap} td:first-child{overflow-wrap:anywhere;
min-width:130px} table.facts td{overflow-wrap:anywhere;min-width:90px}
summary{cursor:pointer;padding:3px 0} .bad{color:#b03a2e;font-weight:bold} .quiet{color:#5d6d7e}
@media(max-width:600px){main{padding:8px} section{padding:10px} td,th{padding-right:8px}}
"""


def render(report: Report) -> str:
    """The page."""
    record = report.record
    title = f"{record['source']} compiled with {record['recipe']['name']}"
    sections = [
        _cards(report),
        _section("What went in", _inputs(record)),
        _section("Against float", _against(report)),
        _section("Range of each channel", _ranges(report)),
        _section("Linear layers", _layers(report)),
        _section("Where the time goes", _latency(report)),
        _section("What the bytes are", _size(report)),
        _section("Gates", _gates(record)),
        _section("What each pass did", "".join(map(_pass, record["passes"]))),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main><h1>{escape(title)}</h1>{''.join(sections)}</main></body></html>\n"
    )


def plots(report: Report) -> dict[str, Chart]:
    """Every picture of the page by the name of its file, those of one subject joined."""
    found = {
        "sqnr": charts.side_by_side(_sqnr_charts(report), 3),
        "size": _size_chart(report),
    }
    if report.times:
        found["latency"] = charts.side_by_side(_latency_charts(report))
    if sites := report.sites():
        found["ranges"] = charts.side_by_side([_reach_chart(sites), _spread_chart(sites)])
        for order, layer in enumerate(_shown(sites)):
            found[f"ranges-{order + 1}"] = charts.side_by_side(_range_charts(report, layer))
    return found


def write_plots(report: Report, folder: Path, *, png: bool = False) -> list[Path]:
    """Save every picture as an SVG file, and as a PNG file too where those are wanted.

    Raises:
        SourceError: PNG files cannot be drawn here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, chart in plots(report).items():
        path = folder / f"{name}.svg"
        path.write_text(chart.svg(), encoding="utf-8")
        written.append(path)
        if png:
            written.append(path.with_suffix(".png"))
            written[-1].write_bytes(chart.png())
    return written


def _cards(report: Report) -> str:
    record, layers = report.record, report.record["layers"]
    figures = [
        (f"{record['bytes'] / 1e6:.1f} MB", f"{record['bytes'] / max(record['float_bytes'], 1):.3f} of float"),
        (f"{sum(layer['integer'] for layer in layers)} of {len(layers)}", "linear layers on integer kernels"),
    ]
    figures += [(f"{entry['mean_cosine']:.5f}", f"mean cosine of {entry['name']}") for entry in record["outputs"][:2]]
    if report.against is not None:
        ratio = report.against.seconds / max(report.against.compiled_seconds, 1e-9)
        figures.append((f"{ratio:.2f}x", f"the speed of float, {report.tokens} tokens"))
    elif report.times:
        total = sum(entry.seconds for entry in report.times)
        figures.append((f"{1e3 * total:.1f} ms", f"in the nodes, {report.tokens} tokens"))
    cards = (f'<div class="card"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in figures)
    return f'<div class="cards">{"".join(cards)}</div>'


def _inputs(record: Mapping[str, Any]) -> str:
    calibration, recipe = record["calibration"], record["recipe"]
    rows = [
        ("source", f"{record['source']}, {record['float_bytes'] / 1e6:.1f} MB in float"),
        ("recipe", f"{recipe['name']}: {recipe.get('summary', '')}"),
        ("target", record["target"]),
        ("calibrated on", f"{calibration['samples']} samples of {calibration['origin']}"),
        ("their digest", calibration["digest"]),
        *(("note", note) for note in record["notes"]),
    ]
    options = {name: value for name, value in recipe.items() if name not in ("name", "summary")}
    return (
        _table((), rows)
        + _details("the whole recipe", _table((), [(name, _plain(value)) for name, value in options.items()]))
        + _details("versions of the tools", _table((), sorted(record["tools"].items())))
    )


def _against(report: Report) -> str:
    columns = ("output", "mean cosine", "min cosine", "max error", "SQNR dB")

    def rows(entries: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
        return [
            (
                entry["name"],
                f"{entry['mean_cosine']:.5f}",
                f"{entry['min_cosine']:.5f}",
                f"{entry['max_error']:.4f}",
                f"{entry['sqnr_db']:.1f}",
            )
            for entry in entries
        ]

    text = f"<p>On {escape(report.record['held_out'])}, when it was compiled:</p>"
    text += _table(columns, rows(report.record["outputs"]))
    if (found := report.against) is not None:
        text += (
            f"<p>On one sample of {report.tokens} tokens now, against {escape(found.name)}, which takes"
            f" {1e3 * found.seconds:.1f} ms where the compiled model takes {1e3 * found.compiled_seconds:.1f} ms:</p>"
        )
        text += _table(columns, rows([vars(entry) for entry in found.outputs]))
    return text


def _ranges(report: Report) -> str:
    sites = report.sites()
    if not sites:
        return "<p>No ranges were recorded; give the float model with --against to measure them.</p>"
    rows = [
        (
            site["layer"],
            f"{site['largest_before']:.3g}",
            f"{site['largest_after']:.3g}",
            f"{site['spread_before']:.1f}",
            f"{site['spread_after']:.1f}",
        )
        for site in sites
    ]
    columns = ("read by", "largest before", "after", "largest / median channel before", "after")
    pairs = (
        f'<div class="pair">{"".join(chart.svg() for chart in _range_charts(report, layer))}</div>'
        for layer in _shown(sites)
    )
    return (
        f"<p>What linear layers read, before migration (red) and after it (blue), on {escape(report.ranges_origin)}."
        " One static range holds a tensor well when its channels reach equally far.</p>"
        f'<div class="charts">{_reach_chart(sites).svg()}{_spread_chart(sites).svg()}</div>'
        f"<p>The {len(_shown(sites))} values that one channel stands out of most:</p>{''.join(pairs)}"
        + _details(f"all {len(sites)} values", _table(columns, rows))
    )


def _shown(sites: Sequence[Mapping[str, Any]]) -> list[str]:
    return [site["layer"] for site in sorted(sites, key=lambda site: -site["spread_before"])[:SHOWN_SITES]]


def _range_charts(report: Report, layer: str) -> list[Chart]:
    before, after = report.before[layer], report.after[layer]
    return [
        charts.channel_ranges(f"{layer}: {before.min():.3g} to {before.max():.3g}", before, RED),
        charts.channel_ranges(f"after: {after.min():.3g} to {after.max():.3g}", after, BLUE),
    ]


def _reach_chart(sites: Sequence[Mapping[str, Any]]) -> Chart:
    series = {
        "before": (RED, [site["largest_before"] for site in sites]),
        "after": (BLUE, [site["largest_after"] for site in sites]),
    }
    return charts.log_marks("largest |x|", series, "values in graph order")


def _spread_chart(sites: Sequence[Mapping[str, Any]]) -> Chart:
    series = {
        "before": (RED, [site["spread_before"] for site in sites]),
        "after": (BLUE, [site["spread_after"] for site in sites]),
    }
    return charts.log_marks("largest / median channel", series, "values in graph order")


def _layers(report: Report) -> str:
    layers = report.record["layers"]
    seconds = report.seconds_by_layer()
    total = sum(seconds.values())
    rows = [
        (
            layer["name"],
            f"{layer['shape'][0]} x {layer['shape'][1]}",
            layer["kernel"] + ("" if layer["integer"] else " (float)"),
            layer.get("activation", ""),
            "" if layer["sqnr_db"] is None else f"{layer['sqnr_db']:.1f}",
            f"{seconds[layer['name']] / total:.1%}" if layer["name"] in seconds and total else "",
        )
        for layer in layers
    ]
    columns = ("layer", "K x N", "kernel", "range", "SQNR dB", "time")
    kernels = _summary_of(f"{layer['kernel']}, {layer.get('activation', '')} range" for layer in layers)
    drawn = "".join(chart.svg() for chart in _sqnr_charts(report))
    return (
        f"<p>{kernels}. SQNR in dB of each layer's output in the quantized graph against float, block by block; all"
        f' layers before it are quantized too.</p><div class="charts">{drawn}</div>'
        + _details(f"all {len(layers)} layers", _table(columns, rows))
    )


def _sqnr_charts(report: Report) -> list[Chart]:
    kinds: dict[str, list[tuple[str, float | None]]] = {}
    for layer in report.record["layers"]:
        kind, number = kind_of(layer["name"])
        kinds.setdefault(kind, []).append((str(number), layer["sqnr_db"]))
    top = max((value for found in kinds.values() for _, value in found if value is not None), default=1.0)
    return [
        charts.bars(kind, [number for number, _ in found], [value for _, value in found], "dB SQNR", top)
        for kind, found in kinds.items()
    ]


def _latency(report: Report) -> str:
    if not report.times:
        return "<p>Text cannot fill its inputs, so no sample was run.</p>"
    total = sum(entry.seconds for entry in report.times)
    drawn = "".join(chart.svg() for chart in _latency_charts(report))
    slowest = sorted(report.times, key=lambda entry: -entry.seconds)[:50]
    rows = [
        (entry.name, entry.kernel, f"{1e3 * entry.seconds:.2f}", f"{entry.seconds / total:.1%}") for entry in slowest
    ]
    return (
        f"<p>{1e3 * total:.1f} ms in {len(report.times)} nodes for one sample of {report.tokens} tokens on this machine,"
        f' each the fastest of a few runs.</p><div class="charts">{drawn}</div>'
        + _details("the slowest nodes", _table(("node", "kernel", "ms", "share"), rows))
    )


def _latency_charts(report: Report) -> list[Chart]:
    total = max(sum(entry.seconds for entry in report.times), 1e-12)
    kinds: dict[str, float] = {}
    for layer, seconds in report.seconds_by_layer().items():
        kind = kind_of(layer)[0]
        kinds[kind] = kinds.get(kind, 0.0) + seconds

    def drawn(title: str, found: Mapping[str, float]) -> Chart:
        largest = sorted(found.items(), key=lambda item: -item[1])[:SHOWN_NODES]
        entries = [(name, seconds, f"{1e3 * seconds:.2f} ms  {seconds / total:.1%}") for name, seconds in largest]
        return charts.shares(title, entries)

    return [drawn("by operator", report.seconds_by_kernel()), drawn("by kind of layer", kinds)]


def _size(report: Report) -> str:
    rows = [
        (
            name,
            f"{part.code_bytes / 1e6:.2f}",
            f"{part.overhead_bytes / 1e6:.2f}",
            f"{part.bits_per_element:.2f}" if part.elements else "",
        )
        for name, part in report.parts.items()
    ]
    table = _table(("part", "MB of values", "MB of scales", "bits each"), rows)
    return f'<div class="charts">{_size_chart(report).svg()}<div>{table}</div></div>'


def _size_chart(report: Report) -> Chart:
    sizes = {name: part.code_bytes + part.overhead_bytes for name, part in report.parts.items()}
    total = max(sum(sizes.values()), 1)
    entries = [(name, size, f"{size / 1e6:.2f} MB  {size / total:.1%}") for name, size in sizes.items()]
    return charts.shares(f"{total / 1e6:.1f} MB", [(name, float(size), text) for name, size, text in entries])


def _gates(record: Mapping[str, Any]) -> str:
    gates = record.get("gates", [])
    if not gates:
        return "<p>None were recorded; `scalefold verify` checks them.</p>"
    rows = [
        (gate["name"], "holds" if gate["passed"] else "does not hold", f"{gate['figure']:.2g}", f"{gate['limit']:g}",
         gate["detail"])
        for gate in gates
    ]  # fmt: skip
    return _table(("gate", "verdict", "figure", "limit", "of what"), rows)


def _pass(entry: Mapping[str, Any]) -> str:
    done, declined = entry["rewrites"], entry["declined"]
    heading = (
        f"<b>{escape(entry['name'])}</b> <span class='quiet'>{len(done)} rewrites, {len(declined)} declined</span>"
    )
    if not done and not declined:
        return f"<div>{heading}</div>"
    text = f"<p>Contract: {escape(entry['contract'].lower())}.</p>"
    for title, events in (("did", done), ("declined", declined)):
        if events:
            rows = [(event["where"], event["reason"], _plain(event.get("figures", {}))) for event in events]
            text += _table((title, "why", "figures"), rows)
    return f"<details><summary>{heading}</summary>{text}</details>"


def _summary_of(entries: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for entry in entries:
        counts[entry] = counts.get(entry, 0) + 1
    return escape(", ".join(f"{count} with {name}" for name, count in counts.items()))


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_plain(entry) or 'none'}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    return "none" if value is None else str(value)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls in its place where it is too wide; one without a head is of names and facts, and wraps."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    if not head:
        return f'<table class="facts">{body}</table>'
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _cell(text: str) -> str:
    number = text.rstrip("%").replace(".", "", 1).replace("-", "", 1).replace("e", "", 1).replace("+", "", 1).isdigit()
    number = number or re.fullmatch(r"\d+ x \d+", text) is not None
    marked = ' class="n"' if number else ' class="bad"' if text == "does not hold" or text.endswith("(float)") else ""
    return f"<td{marked}>{escape(text)}</td>"
