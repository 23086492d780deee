"""How much of a sentence model's accuracy each way to quantize keeps, and what quantizing takes.

Every contender starts from the same float ONNX file and the same calibration texts, and runs in processes of its own.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import track
from scipy.stats import spearmanr

if TYPE_CHECKING:  # type checkers see the repository as the root, Python the folder of this file
    from scripts import bench_report, contenders
else:
    import bench_report
    import contenders

BATCH = 16
OWN = "scalefold"
HEADER = [
    "contender", "settings", "Spearman x 100", "mean cosine", "min cosine", "size ratio", "integer matmuls",
    "quantize, s", "peak, MB",
]  # fmt: skip


@dataclass(frozen=True)
class Benchmark:
    """Sentence pairs with people's judgement of their similarity.

    Attributes:
        left, right: for each pair, the places of its sentences among the embeddings.
        gold: the judgements, 0 to 5.
    """

    left: list[int]
    right: list[int]
    gold: list[float]

    def spearman(self, embeddings: contenders.Array) -> float:
        """Rank correlation, times 100, of cosine similarity with the judgements."""
        cosine = (embeddings[self.left] * embeddings[self.right]).sum(axis=1)
        return float(100 * spearmanr(cosine, self.gold).statistic)


@dataclass(frozen=True)
class Row:
    """One contender's figures; `failure` says why there are none."""

    contender: str
    tool: str
    settings: str
    built: contenders.Built
    spearman: float | None = None
    mean_cosine: float | None = None
    min_cosine: float | None = None
    integer_matmuls: int | None = None
    failure: str | None = None


def read_benchmark(path: Path, work: contenders.Workspace) -> Benchmark:
    """Read an STS-B file and write its sentences as padded batches of similar length."""
    fields = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n") if line]
    if short := [number for number, row in enumerate(fields, 1) if len(row) < 7]:
        raise SystemExit(f"{path}, line {short[0]}: fewer than 7 tab-separated columns; give an STS-B file.")
    sentences = sorted({row[column] for row in fields for column in (5, 6)})
    feeds = dict(zip(sentences, contenders.encode(work, sentences), strict=True))
    ordered = sorted(sentences, key=lambda sentence: feeds[sentence]["input_ids"].shape[1])
    batches = []
    for start in range(0, len(ordered), BATCH):
        group = [feeds[sentence] for sentence in ordered[start : start + BATCH]]
        longest = max(feed["input_ids"].shape[1] for feed in group)
        padded = [
            {name: np.pad(array, ((0, 0), (0, longest - array.shape[1]))) for name, array in feed.items()}
            for feed in group
        ]
        batches.append({name: np.concatenate([feed[name] for feed in padded]) for name in padded[0]})
    contenders.save_feeds(work.evaluation, batches)
    place = {sentence: index for index, sentence in enumerate(ordered)}
    return Benchmark(
        [place[row[5]] for row in fields], [place[row[6]] for row in fields], [float(row[4]) for row in fields]
    )


def measure(
    contender: contenders.Contender,
    work: contenders.Workspace,
    benchmark: Benchmark,
    reference: contenders.Array | None,
) -> tuple[Row, contenders.Array]:
    """Quantize and embed in children, then compare with float's embeddings (its own when there is no reference)."""
    built = contenders.build(contender, work)
    row = Row(contender.name, contender.family, contender.settings, built, failure=built.failure)
    if built.failure:
        return row, np.empty(0)
    try:
        answer = contenders.run_child(contender, "embed", work)
    except contenders.StepError as failure:
        return Row(contender.name, contender.family, contender.settings, built, failure=str(failure)), np.empty(0)
    embeddings = np.load(work.output(contender) / "embeddings.npy")
    cosine = (embeddings * (embeddings if reference is None else reference)).sum(axis=1)
    figures = (benchmark.spearman(embeddings), float(cosine.mean()), float(cosine.min()), answer["integer_matmuls"])
    return Row(contender.name, contender.family, contender.settings, built, *figures), embeddings


def report(rows: list[Row], facts: dict[str, str]) -> str:
    """The Markdown report; of each peer's settings, those that did best are in bold."""
    float_mb = rows[0].built.size_mb or float("nan")
    peers = {row.tool for row in rows} - {OWN, rows[0].tool}
    best = {
        max((row for row in rows if row.tool == peer), key=lambda row: row.spearman or -1).contender for peer in peers
    }
    lines, notes = [], []
    for row in rows:
        name = f"**{row.tool}**" if row.contender in best and not row.failure else row.tool
        if row.spearman is None:
            lines.append([name, row.settings, "failed", *[""] * (len(HEADER) - 3)])
            notes.append(f"* {row.contender} failed: {row.failure}")
            continue
        lines.append(
            [
                name,
                row.settings,
                f"{row.spearman:.2f}",
                f"{row.mean_cosine:.4f}",
                f"{row.min_cosine:.4f}",
                f"{row.built.size_mb / float_mb:.3f}",
                f"{row.integer_matmuls}",
                *(["", ""] if row is rows[0] else [f"{row.built.seconds:.1f}", f"{row.built.peak_mb:.0f}"]),
            ]
        )
    told = ", ".join(f"{name} {value}" for name, value in facts.items())
    footer = f"{told}. Bold: of a peer's settings, those with the highest Spearman here."
    return "\n".join([bench_report.table(HEADER, lines), "", *notes, *([""] if notes else []), footer])


def main() -> None:
    made = contenders.parser(__doc__)
    made.add_argument("--model", default="minilm", help="minilm, or a Hugging Face folder (default: minilm)")
    made.add_argument("--data", type=Path, metavar="FILE", help="STS-B sentence pairs: tab-separated, "
                      "unquoted, score in the fifth column, sentences in the sixth and seventh")  # fmt: skip
    bench_report.add_options(made, "accuracy", plot=False)
    options = made.parse_args()
    if options.data is None or not options.data.is_file():
        raise SystemExit(
            "bench_accuracy needs --data FILE: download Stsbenchmark.tar.gz from the STS benchmark's page "
            "(ixa2.si.ehu.eus/stswiki), unpack it, and give the path of sts-dev.csv or sts-test.csv."
        )
    run(options)


def run(options: argparse.Namespace) -> None:
    console = Console(stderr=True)
    rows: list[Row] = []
    reference: contenders.Array | None = None
    with contenders.work_folder(options.work) as root:
        with console.status("exporting the float model"):
            given = (options.model, root, options.calibration, options.samples)
            work = contenders.prepare(*given, as_built=options.as_built)
            benchmark = read_benchmark(options.data, work)
        for contender in track(contenders.chosen(options.only), "contenders", console=console):
            console.log(contender.name)
            row, embeddings = measure(contender, work, benchmark, reference)
            if reference is None:
                if row.failure:
                    raise SystemExit(f"the float model does not run: {row.failure}.")
                reference = embeddings
            if row.failure:
                console.log(f"  {row.failure}", markup=False)
            rows.append(row)
    facts = {"model": options.model, "data": options.data.name, **contenders.machine(2)}
    data = {"machine": facts, "rows": [asdict(row) for row in rows]}
    bench_report.publish(options, "accuracy", report(rows, facts), data)


if __name__ == "__main__":
    main()
