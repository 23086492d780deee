"""Weight formats compared at 1 to 5 bits: linear, k-means and binary coding, on real sentence and reaction models.

Weights alone are rounded: each linear layer's weight in the float graph is replaced by what its codes decode to, and
activations and embeddings stay float. Every format gets int8 levels and a scale per output column, as the kernel does.

    minilm     BERT, 6 layers    Spearman x 100 on an STS benchmark file (--sts)
    rxnmapper  ALBERT, 12 layers of one weight    % of masked tokens found, of reactions
    rxnfp      BERT, 12 layers    % of reactions sorted into the class that the float model gives

Results are written to --json after every combination, and those that are in the file already are not measured again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from scalefold.compiler import ScalefoldError, artifact, graph
from scalefold.compiler.calibrate import Calibration, TextEncoder, calibration_from, collect
from scalefold.compiler.charts import Chart
from scalefold.compiler.decoder import LOGITS, position_limit
from scalefold.compiler.driver import SIDECARS, open_source, reference_models
from scalefold.compiler.errors import SourceError
from scalefold.compiler.evaluate import LONGEST_TEXT, METRICS, Request
from scalefold.compiler.recipe import WeightFormat
from scalefold.compiler.runtime import Session
from scalefold.compiler.solve import solve
from scalefold.compiler.stats import SecondMoment

FLOAT = "float"
BITS = (4, 3, 2, 1, 5)
HESSIAN_BYTES = 300_000_000
"""Second moments that are gathered in one run over the calibration samples."""
FIGURE = {"sts": "spearman", "masked": "accuracy", "classification": "accuracy"}
"""What each metric's answer is called; with the float model's classes as labels, accuracy is agreement."""
Key = tuple[str, str, int, bool, str]
UNIT = {"sts": "Spearman x 100", "masked": "masked tokens found, %", "classification": "agreement with float, %"}


@dataclass(frozen=True)
class Format:
    """A column of the comparison: a format with its solver, without bits."""

    name: str
    title: str
    colour: str
    options: dict[str, Any]

    def at(self, bits: int, *, compensation: bool) -> WeightFormat:
        """The format as a recipe says it."""
        return WeightFormat(bits=bits, compensation=compensation, **self.options)


FORMATS = (
    Format("linear-minmax", "linear, min-max", "#999999", {"symmetric": False, "solver": "rtn"}),
    Format("linear-clipped", "linear, clip-searched", "#000000", {"symmetric": False, "solver": "mse"}),
    Format("kmeans-tensor", "k-means per tensor", "#f1948a", {"format": "kmeans", "codebook": "tensor"}),
    Format("kmeans-column", "k-means per column", "#c0392b", {"format": "kmeans", "codebook": "column"}),
    Format(
        "kmeans-hessian",
        "k-means per column, Hessian-weighted",
        "#8e44ad",
        {"format": "kmeans", "codebook": "column", "weighting": "hessian"},
    ),
    Format("bcq-greedy", "binary coding, greedy", "#85c1e9", {"format": "bcq", "solver": "greedy"}),
    Format("bcq-alternating", "binary coding, alternating", "#2471a3", {"format": "bcq", "solver": "alternating"}),
)


@dataclass(frozen=True)
class Subject:
    """A model and what it is measured on.

    Attributes:
        name: what the report calls it.
        source: what `open_source` opens.
        task: for Hugging Face models; None for a file.
        folder: where tokenizer and config are.
        metric: sts, masked or classification.
        lines: rows of the STS benchmark, or reactions, one a line.
        data: what the lines are, for people.
        calibration: texts that second moments are gathered from.
    """

    name: str
    source: str
    task: str | None
    folder: Path
    metric: str
    lines: Sequence[str]
    data: str
    calibration: Sequence[str]


@dataclass(frozen=True)
class Row:
    """One combination and its figures.

    Attributes:
        model, format, bits, compensation, data: which one.
        metric: the kind of score.
        score: the task metric, x 100.
        weight_error: |W - W'|^2 / |W|^2, mean over weights.
        output_error: |X (W - W')|^2 / |X W|^2 on the calibration samples, mean over weights.
        bytes: of all linear weights: codes, scales, codebooks, offsets and alphas.
        bits_per_weight: the same per weight.
        overhead_bits: of those, what is not codes.
    """

    model: str
    format: str
    bits: int
    compensation: bool
    data: str
    metric: str
    score: float
    weight_error: float
    output_error: float
    bytes: int
    bits_per_weight: float
    overhead_bits: float

    @property
    def key(self) -> Key:
        """What tells one row from another."""
        return self.model, self.format, self.bits, self.compensation, self.data


@dataclass
class Results:
    """The rows so far, in a JSON file where one is given."""

    path: Path | None = None
    rows: dict[Key, Row] = field(default_factory=dict)

    @classmethod
    def at(cls, path: Path | None) -> Results:
        """The rows that a file holds; none where there is no file."""
        if path is None or not path.is_file():
            return cls(path)
        try:
            rows = [Row(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["rows"]]
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path} is not a file of results ({error}); give another, or remove it.") from error
        return cls(path, {row.key: row for row in rows})

    def add(self, row: Row) -> None:
        """Keep a row, on disk too; a file is there whole or as it was."""
        self.rows[row.key] = row
        if self.path is None:
            return
        partial = self.path.with_name(f"{self.path.name}.partial")
        content = {"rows": [asdict(entry) for entry in self.rows.values()]}
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


@dataclass(frozen=True)
class Weight:
    """A weight and the layers that read it."""

    value: ir.Value
    layers: list[graph.Linear]

    @property
    def inputs(self) -> list[str]:
        """The tensors it is multiplied with."""
        return list(dict.fromkeys(layer.x.name or "" for layer in self.layers))


def weights_of(model: ir.Model) -> list[Weight]:
    """Every weight of a linear layer, once."""
    found: dict[ir.Value, Weight] = {}
    for layer in graph.linear_layers(model):
        found.setdefault(layer.weight, Weight(layer.weight, [])).layers.append(layer)
    return list(found.values())


class Moments:
    """Second moments X^T X / tokens of every linear layer's input, in files: one weight's is in memory at a time."""

    def __init__(self, model: ir.Model, weights: Sequence[Weight], calibration: Calibration, folder: Path) -> None:
        self._folder = folder
        sizes = {name: weight.layers[0].shape[0] for weight in weights for name in weight.inputs}
        self._places = {name: folder / f"{index}.npy" for index, name in enumerate(sizes)}
        for names in _batches(sizes):
            found = collect(model, dict.fromkeys(names, SecondMoment), calibration.feeds())
            for name, moment in found.items():
                assert isinstance(moment, SecondMoment) and moment.mean is not None
                np.save(self._places[name], moment.mean)

    def of(self, weight: Weight) -> npt.NDArray[np.float64]:
        """The mean over all inputs of a weight, [K, K]."""
        total = sum(np.load(self._places[name]) for name in weight.inputs)
        return np.asarray(total / len(weight.inputs), dtype=np.float64)


def _batches(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Names cut so that the moments of a batch fit the budget."""
    batch: list[str] = []
    held = 0
    for name, size in sizes.items():
        if batch and held + 8 * size**2 > HESSIAN_BYTES:
            yield batch
            batch, held = [], 0
        batch.append(name)
        held += 8 * size**2
    yield batch


@dataclass(frozen=True)
class Combination:
    """What one row is about."""

    format: Format
    bits: int
    compensation: bool

    @property
    def title(self) -> str:
        """For the progress bar."""
        return f"{self.bits} bits, {self.format.title}{', compensated' if self.compensation else ''}"


def combinations(formats: Sequence[Format], bits: Sequence[int], compensation: str) -> list[Combination]:
    """All of them, those without compensation first."""
    wanted = {"both": (False, True), "without": (False,), "with": (True,)}[compensation]
    return [Combination(entry, width, flag) for flag in wanted for width in bits for entry in formats]


def study(subject: Subject, wanted: Sequence[Combination], results: Results, say: Callable[[str], None]) -> None:
    """Measure what is not in the results yet; `say` is told what is being done."""
    missing = [entry for entry in wanted if _key(subject, entry) not in results.rows]
    if not missing and _float_key(subject) in results.rows:
        return
    say(f"{subject.name}: opening")
    with (
        open_source(subject.source, task=subject.task) as model,
        tempfile.TemporaryDirectory(prefix="scalefold-study-") as scratch,
    ):
        bench = Bench(subject, model, Path(scratch), say)
        if _float_key(subject) not in results.rows:
            results.add(bench.float_row())
        for entry in missing:
            say(f"{subject.name}: {entry.title}")
            results.add(bench.row(entry))


def _key(subject: Subject, entry: Combination) -> Key:
    return subject.name, entry.format.name, entry.bits, entry.compensation, subject.data


def _float_key(subject: Subject) -> Key:
    return subject.name, FLOAT, 32, False, subject.data


class Bench:
    """A float model that stays open while its weights are exchanged in copies of the graph."""

    def __init__(self, subject: Subject, model: ir.Model, scratch: Path, say: Callable[[str], None]) -> None:
        self.subject = subject
        self.model = model
        self.weights = weights_of(model)
        self.scratch = scratch
        self.data = scratch / "data.txt"
        tokenizer = subject.folder / "tokenizer.json"
        lines = list(subject.lines)
        if subject.metric == "classification":
            say(f"{subject.name}: the float model's classes")
            lines = _with_classes(lines, model, tokenizer, position_limit(subject.folder) or LONGEST_TEXT)
        self.data.write_text("\n".join(lines) + "\n", encoding="utf-8")
        say(f"{subject.name}: second moments")
        calibration = calibration_from(
            list(subject.calibration), model, tokenizer_file=tokenizer, samples=128, max_length=128
        )
        (scratch / "moments").mkdir()
        self.moments = Moments(model, self.weights, calibration, scratch / "moments")

    def float_row(self) -> Row:
        """The model as it is."""
        size = sum(entry.value.const_value.nbytes for entry in self.weights if entry.value.const_value is not None)
        return self._row(FLOAT, 32, False, self._score(self.model.clone()), 0.0, 0.0, size, 32.0, 0.0)

    def row(self, entry: Combination) -> Row:
        """One format in all linear layers."""
        options = entry.format.at(entry.bits, compensation=entry.compensation)
        variant = self.model.clone()
        errors, coded_bytes, overhead_bytes, elements = [], 0, 0, 0
        for weight in self.weights:
            name, array, hessian = weight.value.name or "", weight.layers[0].weights(), self.moments.of(weight)
            coded = solve(array, options, hessian if options.needs_hessian else None, name=name)
            found = coded.dequantized()
            errors.append(relative_errors(array, found, hessian))
            variant.graph.initializers[name].const_value = ir.tensor(found, name=name)
            coded_bytes, overhead_bytes = coded_bytes + coded.code_bytes, overhead_bytes + coded.overhead_bytes
            elements += array.size
        weight_error, output_error = np.mean(errors, axis=0).tolist()
        size = coded_bytes + overhead_bytes
        figures = (weight_error, output_error, size, 8 * size / elements, 8 * overhead_bytes / elements)
        return self._row(entry.format.name, entry.bits, entry.compensation, self._score(variant), *figures)

    def _row(self, format: str, bits: int, compensation: bool, score: float, *figures: Any) -> Row:
        subject = self.subject
        return Row(subject.name, format, bits, compensation, subject.data, subject.metric, score, *figures)

    def _score(self, variant: ir.Model) -> float:
        """The task metric of a graph, as `scalefold eval` takes it of a folder."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as name:
            folder = Path(name)
            artifact.save_model(variant, folder)
            for sidecar in SIDECARS:
                if (self.subject.folder / sidecar).is_file():
                    (folder / sidecar).parent.mkdir(exist_ok=True)
                    shutil.copyfile(self.subject.folder / sidecar, folder / sidecar)
            facts = METRICS[self.subject.metric](Request(folder, self.data))
        score = float(facts[FIGURE[self.subject.metric]])
        score = 0.0 if math.isnan(score) else score  # all embeddings alike: nothing correlates
        return score if self.subject.metric == "sts" else 100 * score


def relative_errors(
    weight: npt.NDArray[np.float32], found: npt.NDArray[np.float32], hessian: npt.NDArray[np.float64]
) -> tuple[float, float]:
    """Squared error of a weight [K, N], and of what it gives for inputs of second moment H [K, K], relative to float."""
    error = weight - found
    narrow = hessian.astype(np.float32)
    output = float(np.sum((narrow @ error) * error, dtype=np.float64))
    power = float(np.sum((narrow @ weight) * weight, dtype=np.float64))
    return float(np.sum(error**2) / np.sum(weight**2)), output / power


def _with_classes(lines: Sequence[str], model: ir.Model, tokenizer: Path, limit: int) -> list[str]:
    """Texts, each with the class that the float model gives it behind a tab."""
    session, encode = Session(model), TextEncoder(tokenizer, model, min(limit, LONGEST_TEXT))
    return [f"{line}\t{int(session.run(encode(line))[LOGITS][0].argmax())}" for line in lines]


def subject_of(name: str, options: argparse.Namespace) -> Subject:
    """A reference model, and the rows to measure it on."""
    if name not in reference_models():
        raise SystemExit(f"--models: {name} is no reference model; they are {', '.join(reference_models())}.")
    module = importlib.import_module(f"scalefold.models.{name.removesuffix('-outliers').replace('-', '_')}")
    metric = module.metric()
    if metric not in FIGURE:
        raise SystemExit(f"--models: {name} is measured by {metric}; this study takes {', '.join(FIGURE)}.")
    path = options.sts if metric == "sts" else options.reactions
    if metric == "sts" and path is None:
        raise SystemExit(
            f"{name} needs --sts FILE: download Stsbenchmark.tar.gz from the STS benchmark's page "
            "(ixa2.si.ehu.eus/stswiki), unpack it, and give the path of sts-dev.csv."
        )
    lines, origin = _lines(path, module.samples())
    kept = lines if options.limit is None else evenly_spaced(lines, options.limit)
    data = f"{origin}, {len(kept)} of {len(lines)}"
    return Subject(name, name, module.TASK, module.build(), metric, kept, data, module.samples())


def _lines(path: Path | None, own: list[str]) -> tuple[list[str], str]:
    if path is None:
        return own, "the model's own samples"
    try:
        return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()], path.name
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path} cannot be read ({error}); give a file of UTF-8 text.") from error


def evenly_spaced(lines: Sequence[str], count: int) -> list[str]:
    """At most `count` lines, from the first to the last."""
    places = np.linspace(0, len(lines) - 1, min(count, len(lines))).astype(int)
    return [lines[place] for place in places]


# The report ----------------------------------------------------------------------------------------------------------

TABLES: tuple[tuple[str, str, bool, str], ...] = (
    ("score", "%s", False, ".2f"),
    ("score", "%s, with error compensation", True, ".2f"),
    ("weight_error", "squared error of the weights, %% of their power", False, ".2f"),
    ("weight_error", "squared error of the weights, with error compensation, %%", True, ".2f"),
    ("output_error", "squared error of the layers' outputs, %% of their power", False, ".2f"),
    ("output_error", "squared error of the layers' outputs, with error compensation, %%", True, ".2f"),
    ("bytes", "bytes of linear weights, kB", False, ".0f"),
    ("bits_per_weight", "bits per weight on disk", False, ".3f"),
)
"""Field, title (with the metric put in), with compensation or not, form of a figure."""
FACTOR = {"weight_error": 100.0, "output_error": 100.0, "bytes": 0.001}
"""What a field is multiplied with to be shown."""


def report(rows: Sequence[Row]) -> str:
    """Markdown tables: for each model formats by bits."""
    parts = []
    for model, data in dict.fromkeys((row.model, row.data) for row in rows):
        chosen = [row for row in rows if (row.model, row.data) == (model, data)]
        reference = next((row for row in chosen if row.format == FLOAT), None)
        parts.append(f"## {model} ({data})")
        if reference is not None:
            parts.append(f"Float: {reference.score:.2f}; linear weights {reference.bytes / 1000:.0f} kB.")
        for name, title, compensation, form in TABLES:
            shown = [row for row in chosen if row.compensation == compensation and row.format != FLOAT]
            if shown:
                parts += [
                    f"### {title % UNIT[shown[0].metric] if '%s' in title else title % ()}",
                    table(shown, name, form),
                ]
    return "\n\n".join(parts)


def table(rows: Sequence[Row], name: str, form: str) -> str:
    """Formats down, bits across; the best of each column in bold where there is more than one."""
    bits = sorted({row.bits for row in rows})
    found = {(row.format, row.bits): FACTOR.get(name, 1.0) * getattr(row, name) for row in rows}
    every = {width: [value for (_, other), value in found.items() if other == width] for width in bits}
    best = {width: (max if name == "score" else min)(values) for width, values in every.items() if len(values) > 1}
    lines = [["bits", *map(str, bits)], ["---", *["---:"] * len(bits)]]
    for entry in FORMATS:
        if any((entry.name, width) in found for width in bits):
            lines.append(
                [entry.title, *(_cell(found.get((entry.name, width)), best.get(width), form) for width in bits)]
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: float | None, best: float | None, form: str) -> str:
    if value is None:
        return ""
    return f"**{value:{form}}**" if value == best else f"{value:{form}}"


WIDTH, HEIGHT, LEFT, TOP, GAP = 270, 150, 60, 50, 62
LEGEND_STEP, LEGEND_LINE = 275, 18
BASELINE = "linear-clipped"
LEAST_LOSS = 0.1
"""Points lost that are drawn at least: below is noise."""
Lines = dict[str, dict[int, float]]
"""A figure by format and bits."""


def draw(rows: Sequence[Row]) -> Chart:
    """A column of panels for each model, bits across, a line for each format, all on logarithmic scales."""
    models = list(dict.fromkeys((row.model, row.data) for row in rows))
    wide, high = len(models) * (WIDTH + LEFT) + 20, TOP + 3 * (HEIGHT + GAP) + 140 // len(models)
    parts = []
    for column, chosen_model in enumerate(models):
        chosen = [row for row in rows if (row.model, row.data) == chosen_model]
        left = LEFT + column * (WIDTH + LEFT)
        parts.append(f'<text x="{left}" y="18" font-size="14" font-weight="bold">{chosen_model[0]}</text>')
        lost = f"{UNIT[chosen[0].metric].partition(',')[0]}: points lost"
        panels = (
            ("squared error of weights / clip-searched linear's", errors_to_baseline(chosen)),
            (lost, losses(chosen, compensation=False)),
            ("the same, with error compensation", losses(chosen, compensation=True)),
        )
        for index, (title, lines) in enumerate(panels):
            if lines:
                parts.append(panel(lines, title, left, TOP + index * (HEIGHT + GAP)))
    return Chart(
        "error of the weights and loss of the task metric, by bits",
        wide,
        high,
        "\n".join([*parts, _legend(wide, high)]),
    )


def errors_to_baseline(rows: Sequence[Row]) -> Lines:
    """Error of the weights over that of the clip-searched linear format of as many bits, without compensation."""
    chosen = [row for row in rows if not row.compensation]
    baseline = {row.bits: row.weight_error for row in chosen if row.format == BASELINE}
    lines: Lines = {}
    for row in chosen:
        if baseline.get(row.bits):
            lines.setdefault(row.format, {})[row.bits] = row.weight_error / baseline[row.bits]
    return lines


def losses(rows: Sequence[Row], *, compensation: bool) -> Lines:
    """By how many points the task metric is below float's."""
    reference = max((row.score for row in rows if row.format == FLOAT), default=0.0)
    lines: Lines = {}
    for row in rows:
        if row.compensation == compensation and row.format != FLOAT:
            lines.setdefault(row.format, {})[row.bits] = max(reference - row.score, LEAST_LOSS)
    return lines


def panel(lines: Lines, title: str, left: float, top: float) -> str:
    """One panel: its own logarithmic scale, grid lines at 1, 2 and 5 times powers of ten."""
    values = [math.log10(value) for line in lines.values() for value in line.values()]
    room = max(max(values) - min(values), 0.1) * 0.05
    low, high = min(values) - room, max(values) + room
    bits = sorted({width for line in lines.values() for width in line})

    def at(width: int, value: float) -> tuple[float, float]:
        across = left + bits.index(width) * WIDTH / max(len(bits) - 1, 1)
        return across, top + HEIGHT * (high - math.log10(value)) / (high - low)

    parts = [f'<text x="{left}" y="{top - 8}">{title}</text>']
    for tick in _ticks(low, high):
        y = at(bits[0], tick)[1]
        parts.append(f'<line x1="{left}" x2="{left + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for width in bits:
        parts.append(f'<text x="{at(width, 1)[0]:.1f}" y="{top + HEIGHT + 16}" text-anchor="middle">{width}</text>')
    for entry in FORMATS:
        if entry.name not in lines:
            continue
        points = [at(width, value) for width, value in sorted(lines[entry.name].items())]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{entry.colour}" stroke-width="1.6"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{entry.colour}"/>' for x, y in points]
    return "\n".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    every = [factor * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for factor in (1, 2, 5)]
    return [tick for tick in every if low <= math.log10(tick) <= high]


def _legend(wide: float, high: float) -> str:
    across = max(1, int((wide - LEFT) // LEGEND_STEP))
    top = high - LEGEND_LINE * math.ceil(len(FORMATS) / across)
    parts = [
        f'<text x="{LEFT}" y="{top - 12}">across: bits per code; losses below {LEAST_LOSS} are drawn at {LEAST_LOSS}</text>'
    ]
    for index, entry in enumerate(FORMATS):
        x, y = LEFT + index % across * LEGEND_STEP, top + 4 + index // across * LEGEND_LINE
        parts.append(f'<line x1="{x}" x2="{x + 18}" y1="{y}" y2="{y}" stroke="{entry.colour}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 24}" y="{y + 4}">{entry.title}</text>')
    return "\n".join(parts)


# The command ---------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(entry.name for entry in FORMATS)
    made.add_argument("--models", default="minilm,rxnmapper,rxnfp", metavar="NAME,...",
                      help="reference models, in this order (default: %(default)s)")  # fmt: skip
    made.add_argument("--sts", type=Path, metavar="FILE", help="sentence pairs of the STS benchmark, for minilm")
    made.add_argument("--reactions", type=Path, metavar="FILE", help="reaction SMILES, one a line, for rxnmapper and "
                      "rxnfp; default: the models' own samples, on which they are calibrated too")  # fmt: skip
    made.add_argument("--limit", type=int, metavar="N", help="measure on N rows, evenly spaced; default: all")
    made.add_argument("--bits", default=",".join(map(str, BITS)), metavar="B,...",
                      help="bits per code, in this order (default: %(default)s)")  # fmt: skip
    made.add_argument("--formats", metavar="NAME,...", help=f"these alone: {names}")
    made.add_argument("--compensation", choices=("both", "without", "with"), default="both",
                      help="error compensation (GPTQ) by the second moments of the inputs (default: both)")  # fmt: skip
    made.add_argument("--json", type=Path, metavar="FILE", help="results; what is in it already is not measured again")
    made.add_argument("-o", "--output", type=Path, metavar="DIR", help="write weight-formats.md (tables), .svg and .png "
                      "here; default: print the tables")  # fmt: skip
    return made


def chosen_formats(names: str | None) -> list[Format]:
    """The formats that `--formats` names; all when None."""
    if names is None:
        return list(FORMATS)
    known = {entry.name: entry for entry in FORMATS}
    wanted = [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"--formats: there is no {', '.join(unknown)}; choose from {', '.join(known)}.")
    return [known[name] for name in wanted]


def chosen_bits(text: str) -> list[int]:
    """The widths that `--bits` names."""
    try:
        bits = [int(word) for word in text.split(",")]
    except ValueError:
        bits = []
    if not bits or min(bits) < 1 or max(bits) > 8:
        raise SystemExit(f"--bits: {text} is not a list of widths from 1 to 8, such as 4,3,2.")
    return bits


def publish(rows: Sequence[Row], folder: Path | None, console: Console) -> None:
    """Print the tables, or write them and the plot."""
    if folder is None:
        sys.stdout.write(report(rows) + "\n")
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weight-formats.md").write_text(report(rows) + "\n", encoding="utf-8")
    chart = draw(rows)
    (folder / "weight-formats.svg").write_text(chart.svg(), encoding="utf-8")
    try:
        (folder / "weight-formats.png").write_bytes(chart.png())
    except SourceError as error:
        console.print(str(error))


def main() -> None:
    """Read the options, measure what is missing, and report."""
    options = parser().parse_args()
    if options.limit is not None and options.limit < 2:
        raise SystemExit("--limit: give at least 2 rows.")
    wanted = combinations(chosen_formats(options.formats), chosen_bits(options.bits), options.compensation)
    subjects = [subject_of(name, options) for name in dict.fromkeys(options.models.replace(" ", "").split(","))]
    results, console = Results.at(options.json), Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        keys = [key for each in subjects for key in (_float_key(each), *(_key(each, entry) for entry in wanted))]
        bar = progress.add_task("", total=len(keys))

        def say(title: str) -> None:
            progress.update(bar, description=title, completed=sum(key in results.rows for key in keys))

        try:
            for subject in subjects:
                study(subject, wanted, results, say)
            say("done")
        except ScalefoldError as error:
            raise SystemExit(str(error)) from error
    publish([results.rows[key] for key in keys], options.output, console)


if __name__ == "__main__":
    main()
