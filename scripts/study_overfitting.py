"""Does tuning for quantization fit the text it is tuned on? Perplexity in that domain and outside it, for each method.

Every method starts from the same float decoder and sees the same windows of one domain; all are then quantized alike, with
static ranges from the extremes on those windows, and judged in onnxruntime on text that neither they nor the model has
seen. Embeddings stay float.

    min-max          calibration alone
    OS+              Outlier Suppression+: searched shifts and scales
    QAT              every weight learns, and the range of every activation
    OS+, then QAT    the same from migrated activations, a far better start
    Quadapter 1      scales behind normalizations learn, block by block
    Quadapter 1+2    the same, then end to end on the next token, as QAT does

The domains are those of the in-house models (prose, code and tables that every Python installation carries); --data adds
files to judge on. The float model knows those three. --tune-on takes a file in their place, a domain that is new to it, as
the published experiment does: its first three quarters are calibrated and tuned on, its last is judged on.
Results go to -o: overfitting.json, overfitting.md and overfitting.svg.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from rich.console import Console

from scalefold.compiler import calibrate
from scalefold.compiler.decoder import LOGITS
from scalefold.compiler.driver import open_source
from scalefold.compiler.learning import Checkpoint, Schedule, learn
from scalefold.compiler.protocol import Context, Requests
from scalefold.compiler.recipe import Activations, Recipe, Weights
from scalefold.compiler.runtime import Feed, Session
from scalefold.compiler.scale_learning import channel_ranges, next_token_loss
from scalefold.compiler.sites import Site, find_sites
from scalefold.compiler.stats import ChannelRange, Statistic
from scalefold.compiler.straight_through import Observed, operands
from scalefold.compiler.torch_graph import TorchGraph, tensor_from, tensor_of
from scalefold.models import tiny
from scalefold.passes import pipeline
from scalefold.passes.insert_qdq import LEARNED_RANGE
from scalefold.passes.learn_scales import LearnScales
from scalefold.passes.migrate_outliers import MigrateOutliers

FLOAT, MINMAX, OSPLUS, QAT, MIGRATED_QAT = "float", "min-max", "OS+", "QAT", "OS+, then QAT"
BLOCKS, BOTH = "Quadapter 1", "Quadapter 1+2"
COLOURS = {
    MINMAX: "#7f8c8d", OSPLUS: "#2471a3", QAT: "#c0392b", MIGRATED_QAT: "#e67e22", BLOCKS: "#52be80", BOTH: "#1e8449",
}  # fmt: skip
RANGE_SPEED = 100.0
"""How much faster the logarithm of a range learns than a weight: their sizes differ so."""


@dataclass(frozen=True)
class Plan:
    """What is studied, and how much of everything.

    Attributes:
        domain: what is calibrated and tuned on; the stem of a file's name when that is `tune_on`.
        tune_on: a file of text that stands for the domain.
        bits: of weights and activations.
        methods: by name.
        window: tokens of a window.
        calibrated: windows that static ranges cover.
        tuned: windows of those to search and learn on.
        judged: windows to judge on, of each domain.
        block_steps: steps for each block.
        steps: steps end to end, of QAT and of the second phase alike.
        rate: learning rate of weights in QAT.
        seed: of the order of samples.
    """

    domain: str = "prose"
    tune_on: Path | None = None
    bits: tuple[int, ...] = (8, 6)
    methods: tuple[str, ...] = (MINMAX, OSPLUS, QAT, MIGRATED_QAT, BLOCKS, BOTH)
    window: int = 256
    calibrated: int = 48
    tuned: int = 16
    judged: int = 16
    block_steps: int = 192
    steps: int = 192
    rate: float = 5e-4
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One method at one width.

    Attributes:
        method: its name.
        bits: of weights and activations; 32 for float.
        learned: numbers that were learned.
        perplexity: by domain.
    """

    method: str
    bits: int
    learned: int
    perplexity: dict[str, float]


@dataclass(frozen=True)
class Bench:
    """What every method starts from."""

    model: ir.Model
    context: Context
    bits: int
    plan: Plan

    def quantized(self, model: ir.Model) -> ir.Model:
        """The QDQ graph of a float one, its ranges the extremes on the windows to tune on."""
        recipe = Recipe(weights=Weights(bits=self.bits), activations=Activations(bits=self.bits))
        for entry in pipeline(recipe).quantize:
            entry.run(model, self.context)
        return model


def minmax(bench: Bench) -> tuple[ir.Model, int]:
    """Calibration alone."""
    return bench.quantized(bench.model.clone()), 0


def outlier_suppression(bench: Bench) -> tuple[ir.Model, int]:
    """Searched shifts and scales."""
    model = bench.model.clone()
    MigrateOutliers(weight_bits=bench.bits, activation_bits=bench.bits).run(model, bench.context)
    return bench.quantized(model), 0


def quadapter(bench: Bench, *, end_to_end: bool) -> tuple[ir.Model, int]:
    """Learned scales."""
    model, plan = bench.model.clone(), bench.plan
    options = LearnScales(
        weight_bits=bench.bits,
        activation_bits=bench.bits,
        steps=plan.block_steps,
        end_to_end_steps=plan.steps if end_to_end else 0,
        seed=plan.seed,
    )
    result = options.run(model, bench.context)
    figures = (event.figures for event in (*result.rewrites, *result.declined))
    return bench.quantized(model), sum(int(found["scales"]) for found in figures if "scales" in found)


def quantization_aware_training(bench: Bench, *, migrated: bool) -> tuple[ir.Model, int]:
    """Every weight learns, and the two ends of every activation's range; gradients pass through rounding."""
    model, plan = bench.model.clone(), bench.plan
    if migrated:
        MigrateOutliers(weight_bits=bench.bits, activation_bits=bench.bits).run(model, bench.context)
    weights = {name: tensor_of(value).clone().requires_grad_() for name, value in _learnable(model).items()}
    extremes = channel_ranges(model, bench.context)
    observed = [_observed(site, extremes[site.x.name or ""]) for site in find_sites(model)]
    rhos = [entry.rho for entry in observed if entry.rho is not None]
    whole = TorchGraph(model, [value for value in model.graph.outputs if value.name == LOGITS])

    def loss(index: int) -> torch.Tensor:
        feed = bench.context.search[index]
        given = {name: tensor_from(array) for name, array in feed.items()}
        found = whole.run(given, weights, operands(observed, bench.bits, bench.bits))
        return next_token_loss(found[LOGITS], feed)

    schedule = Schedule(steps=plan.steps, rate=plan.rate, seed=plan.seed)
    learn(
        [*weights.values(), *rhos],
        loss,
        len(bench.context.search),
        schedule,
        title="quantization-aware training",
        progress=bench.context.progress,
        checkpoint=Checkpoint(None, ""),
    )
    for name, tensor in weights.items():
        model.graph.initializers[name].const_value = ir.tensor(tensor.detach().numpy(), name=name)
    for entry in observed:
        low, high = entry.ends(None)
        x = entry.readers[0].inputs[0]
        assert x is not None
        x.meta[LEARNED_RANGE] = (float(low.detach()), float(high.detach()))
    return bench.quantized(model), sum(map(torch.numel, [*weights.values(), *rhos]))


def _learnable(model: ir.Model) -> dict[str, ir.Value]:
    """Weights, biases, gains and embeddings: all float constants of more than one number."""
    return {
        name: value
        for name, value in model.graph.initializers.items()
        if value.dtype == ir.DataType.FLOAT and value.const_value is not None and value.const_value.size > 1
    }


def _observed(site: Site, extremes: ChannelRange) -> Observed:
    """An activation whose range learns, from its extremes."""
    assert extremes.low is not None and extremes.high is not None
    low, high = torch.from_numpy(extremes.low), torch.from_numpy(extremes.high)
    return Observed(site.readers, low, high, rho=torch.zeros(2, requires_grad=True), speed=RANGE_SPEED)


METHODS: dict[str, Callable[[Bench], tuple[ir.Model, int]]] = {
    MINMAX: minmax,
    OSPLUS: outlier_suppression,
    QAT: partial(quantization_aware_training, migrated=False),
    MIGRATED_QAT: partial(quantization_aware_training, migrated=True),
    BLOCKS: partial(quadapter, end_to_end=False),
    BOTH: partial(quadapter, end_to_end=True),
}


def perplexity(model: ir.Model, feeds: Sequence[Feed]) -> float:
    """Per token, in onnxruntime; the first token of a window is not predicted."""
    session = Session(model, outputs=[LOGITS])
    losses = [float(next_token_loss(torch.from_numpy(session.run(feed)[LOGITS]), feed)) for feed in feeds]
    return math.exp(float(np.mean(losses)))


def windows(model: ir.Model, tokenizer: Path, texts: Sequence[str], plan: Plan, count: int) -> list[Feed]:
    """Windows of equal length, evenly spaced over texts."""
    found = calibrate.RunningText(tokenizer, model, plan.window, "\n".join(texts)).windows(count)
    if not found:
        raise SystemExit("a text to tune or to judge on is empty; give files of many lines.")
    return found


def study(source: str, data: Sequence[Path], plan: Plan, console: Console) -> list[Row]:
    """The methods at each width, all tuned on one domain."""
    with open_source(source) as model, console.status("") as status:

        @contextmanager
        def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
            status.update(title)
            yield lambda: None

        tokenizer = _tokenizer(source)
        judged = {
            name: windows(model, tokenizer, texts, plan, plan.judged)
            for name, texts in judged_texts(data, plan).items()
        }
        passages = tiny.passages(plan.domain) if plan.tune_on is None else [parted(plan.tune_on)[0]]
        feeds = windows(model, tokenizer, passages, plan, plan.calibrated)
        calibration = calibrate.Calibration(lambda: iter(feeds), len(feeds), plan.domain)

        def measure(current: ir.Model, requests: Requests) -> dict[str, Statistic]:
            return calibrate.collect(current, requests, feeds)

        context = Context(measure=measure, search=calibration.head(plan.tuned), float_model=model, progress=progress)
        rows = [Row(FLOAT, 32, 0, {name: perplexity(model, held) for name, held in judged.items()})]
        for bits in plan.bits:
            for method in plan.methods:
                made, learned = METHODS[method](Bench(model, context, bits, plan))
                rows.append(Row(method, bits, learned, {name: perplexity(made, held) for name, held in judged.items()}))
                console.print(f"{method}, {bits} bits: " + _figures(rows[-1]))
    return rows


def judged_texts(data: Sequence[Path], plan: Plan) -> dict[str, list[str]]:
    """By name: what the in-house domains hold out, the last quarter of the file tuned on, and every other file.

    Raises:
        SystemExit: two of them have one name.
    """
    texts = {name: list(tiny.held_out(name)) for name in tiny.DOMAINS}
    if plan.tune_on is not None:
        _add(texts, plan.domain, parted(plan.tune_on)[1])
    for path in data:
        _add(texts, path.stem, path.read_text(encoding="utf-8"))
    return texts


def _add(texts: dict[str, list[str]], name: str, text: str) -> None:
    if name in texts:
        raise SystemExit(f"--data: two texts to judge on are called {name}; give one of the files another name.")
    texts[name] = [text]


def parted(path: Path) -> tuple[str, str]:
    """The text to tune on and the text to judge on."""
    text = path.read_text(encoding="utf-8")
    cut = text.rfind("\n", 0, len(text) * 3 // 4) + 1
    return text[:cut], text[cut:]


def _figures(row: Row) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in row.perplexity.items())


def _tokenizer(source: str) -> Path:
    """Of a folder, or of an in-house model by name."""
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    own = Path(tiny.__file__).parent / source.removesuffix("-outliers")
    return (own if own.is_dir() else folder) / "tokenizer.json"


def table(rows: Sequence[Row], domain: str) -> str:
    """Perplexity and its ratio to float, as Markdown."""
    (reference, *others) = rows
    names = list(reference.perplexity)
    head = " | ".join(f"{name} (tuned on)" if name == domain else name for name in names)
    lines = [f"| bits | method | learned | {head} |", f"| --- | --- | ---: | {'---: | ' * len(names)}".rstrip()]
    lines.append(f"| | {FLOAT} | | " + " | ".join(f"{reference.perplexity[name]:.2f}" for name in names) + " |")
    for row in others:
        cells = (
            f"{row.perplexity[name]:.2f} ({row.perplexity[name] / reference.perplexity[name]:.3f})" for name in names
        )
        lines.append(f"| {row.bits} | {row.method} | {row.learned:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n" + "\n".join(f"* {line}" for line in sentences(rows, domain)) + "\n"


def sentences(rows: Sequence[Row], domain: str) -> list[str]:
    """What the figures say about training all weights and about learning scales, for each width.

    Whether a method loses outside the domain is told from what Outlier Suppression+, which learns nothing, has there.
    """
    reference, said = rows[0].perplexity, []
    for row in rows[1:]:
        if row.method not in (QAT, MIGRATED_QAT, BLOCKS, BOTH):
            continue
        ratios = {name: row.perplexity[name] / reference[name] - 1 for name in reference}
        outside = {name: change for name, change in ratios.items() if name != domain}
        worst = max(outside, key=lambda name: outside[name])
        start = next((other for other in rows if (other.method, other.bits) == (OSPLUS, row.bits)), rows[0]).perplexity
        learned = {name: row.perplexity[name] / start[name] - 1 for name in start}
        lost = max(change for name, change in learned.items() if name != domain)
        said.append(
            f"{row.method} at {row.bits} bits: {ratios[domain]:+.1%} to float in {domain}, {outside[worst]:+.1%} in "
            f"{worst}, the worst outside it; {_verdict(learned[domain], lost)}."
        )
    return said


def _verdict(inside: float, outside: float) -> str:
    """Whether more is lost outside the domain than inside, by more than one percent of perplexity."""
    return "it loses outside its domain" if outside - inside > 0.01 else "it does not lose outside its domain"


def plot(rows: Sequence[Row], domain: str) -> str:
    """Bars of perplexity relative to float, by width and domain, on a logarithmic scale, as an SVG."""
    reference = rows[0].perplexity
    widths = sorted({row.bits for row in rows[1:]}, reverse=True)
    size, height, left, top = 26 * len(METHODS) * len(reference), 150, 60, 50
    parts = []
    for panel, bits in enumerate(widths):
        base = top + panel * (height + 60) + height
        parts.append(f'<text x="{left}" y="{base - height - 8}">{bits} bits, perplexity / float</text>')
        for index, name in enumerate(reference):
            start = left + index * size / len(reference)
            label = f"{name} (tuned on)" if name == domain else name
            parts.append(f'<text x="{start}" y="{base + 16}">{label}</text>')
            for place, row in enumerate(row for row in rows[1:] if row.bits == bits):
                ratio = row.perplexity[name] / reference[name]
                parts.append(_bar(start + 22 * place, base, ratio, COLOURS[row.method], height))
        parts.append(f'<line x1="{left}" x2="{left + size}" y1="{base}" y2="{base}" stroke="#444"/>')
    legend = "".join(
        f'<rect x="{left + 130 * index}" y="10" width="12" height="12" fill="{colour}"/>'
        f'<text x="{left + 130 * index + 16}" y="20">{method}</text>'
        for index, (method, colour) in enumerate(COLOURS.items())
    )
    wide, tall = max(left + size, left + 130 * len(COLOURS)), top + len(widths) * (height + 60)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:.0f} {tall}" font-family="sans-serif" font-size="11">'
        f'<rect width="100%" height="100%" fill="white"/>{legend}{"".join(parts)}</svg>\n'
    )


def _bar(x: float, base: float, ratio: float, colour: str, height: float) -> str:
    """From 0.5 to 8 times float, in powers of two; below 1 the bar hangs under the line of float."""
    long = height / 3 * min(abs(math.log2(max(ratio, 0.5))), 3.0) * 0.9
    y = base - long if ratio >= 1 else base
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="18" height="{max(long, 0.8):.1f}" fill="{colour}"/>'
        f'<text x="{x:.1f}" y="{min(y, base) - 2:.1f}" font-size="7">{ratio:.3f}</text>'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="gpt2-tiny-outliers", help="a reference decoder, or a folder with a tokenizer"
    )
    domain = parser.add_mutually_exclusive_group()
    domain.add_argument("--domain", default=Plan.domain, choices=tiny.DOMAINS, help="what is tuned on; default prose")
    domain.add_argument("--tune-on", type=Path, metavar="FILE", help="a text to tune and judge on instead")
    parser.add_argument(
        "--bits", type=int, nargs="+", default=Plan.bits, help="of weights and activations; default 8 6"
    )
    parser.add_argument("--methods", nargs="+", default=Plan.methods, choices=Plan.methods, help="default: all")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="more text files to judge on")
    for name in ("window", "calibrated", "tuned", "judged", "block-steps", "steps", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Plan, name.replace("-", "_")))
    parser.add_argument("--threads", type=int, default=2, help="default 2; part of the result")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plan = Plan(
        domain=options.domain if options.tune_on is None else options.tune_on.stem,
        tune_on=options.tune_on,
        bits=tuple(options.bits),
        methods=tuple(options.methods),
        window=options.window,
        calibrated=options.calibrated,
        tuned=options.tuned,
        judged=options.judged,
        block_steps=options.block_steps,
        steps=options.steps,
        seed=options.seed,
    )
    rows = study(options.model, options.data, plan, Console())
    write(rows, plan, options.output)


def write(rows: Sequence[Row], plan: Plan, folder: Path) -> None:
    """The figures, the table and the plot."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"plan": asdict(plan) | {"tune_on": str(plan.tune_on or "")}, "rows": [asdict(row) for row in rows]}
    (folder / "overfitting.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "overfitting.md").write_text(table(rows, plan.domain), encoding="utf-8")
    (folder / "overfitting.svg").write_text(plot(rows, plan.domain), encoding="utf-8")


if __name__ == "__main__":
    main()
