"""Where the time of compiled models goes, against this machine's ceilings: the tables of docs/performance.md.

Each FOLDER:SHAPE[:PAST] is timed and profiled as `scalefold bench FOLDER --shape SHAPE --past PAST --profile` does.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scalefold.compiler import bench
from scalefold.compiler.ceilings import Ceilings, ceilings

if TYPE_CHECKING:  # type checkers see the repository as the root, Python the folder of this file
    from scripts import bench_report, contenders
else:
    import bench_report
    import contenders

SECTION = "profile"
SHOWN = 0.01
"""Share of a run's time below which lines are added up."""
HEADER = (
    "layers and their size",
    "operator",
    "nodes",
    "ms",
    "share",
    "achieved",
    "ceiling",
    "reached",
    "bound by",
    "gap, ms",
)


@dataclass(frozen=True)
class Wanted:
    """A folder, and the run to profile."""

    folder: Path
    shape: bench.Shape


def wanted(text: str) -> Wanted:
    """FOLDER:SHAPE[:PAST] of the command line."""
    folder, _, rest = text.partition(":")
    shape, _, past = rest.partition(":")
    if not shape or (past and not past.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not FOLDER:BATCHxTOKENS or FOLDER:BATCHxTOKENS:PAST")
    return Wanted(Path(folder), bench.parse_shape(shape, int(past or 0)))


def table(found: bench.Profile) -> str:
    """The lines of a profile, with what is left between each and its floor."""
    shown = [line for line in found.lines if line.share >= SHOWN]
    rows = [
        [
            f"{line.layer} {line.size}".strip(),
            line.kernel,
            str(line.nodes),
            f"{1000 * line.seconds:.2f}",
            f"{line.share:.1%}",
            f"{line.rate:.3g} {line.unit}",
            f"{line.ceiling:.3g}",
            f"{line.reached:.0%}",
            line.bound,
            f"{1000 * line.seconds * (1 - line.reached):.2f}",
        ]
        for line in shown
    ]
    small = [line for line in found.lines if line.share < SHOWN]
    seconds = sum(line.seconds for line in small)
    floor = sum(line.seconds * line.reached for line in small)
    rows.append(
        ["", "others", str(sum(line.nodes for line in small)), f"{1000 * seconds:.2f}", f"{seconds / found.seconds:.1%}",
         "", "", "", "", f"{1000 * (seconds - floor):.2f}"]
    )  # fmt: skip
    between = f"{1000 * found.between:.2f}"
    rows.append(["between nodes", "", "", between, f"{found.between / found.seconds:.1%}", "", "", "", "", between])
    return bench_report.table(HEADER, rows)


def best_of(best: Ceilings) -> str:
    """The ceilings as a table."""
    rows = [
        ["integer products, u8 x s8", f"{best.integer / 1e9:.0f} GOPS"],
        ["float32 products", f"{best.floating / 1e9:.0f} GOPS"],
        ["memory", f"{best.memory / 1e9:.1f} GB/s"],
        ["cache", f"{best.cache / 1e9:.1f} GB/s"],
        ["the smallest node", f"{1e6 * best.node:.2f} us"],
    ]
    return bench_report.table(("ceiling", "of this machine"), rows, text=1)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("runs", nargs="+", type=wanted, metavar="FOLDER:SHAPE[:PAST]")
    made.add_argument("--threads", type=int, default=2, help="(default: 2)")
    made.add_argument("--fresh", action="store_true", help="measure this machine's ceilings again")
    bench_report.add_options(made, SECTION, plot=False)
    options = made.parse_args()
    best = ceilings(options.threads, fresh=options.fresh)
    parts, data = [best_of(best), ""], []
    for entry in options.runs:
        timed = bench.latency(entry.folder, entry.shape, threads=options.threads)
        found = bench.profile(entry.folder, timed, best, threads=options.threads)
        name = "/".join(entry.folder.parts[-2:])
        parts += [f"### {name}, {entry.shape}: {1000 * found.seconds:.2f} ms", "", table(found), ""]
        data.append({"folder": name, "latency": asdict(timed), **found.facts()})
    facts = contenders.machine(options.threads)
    parts.append(", ".join(f"{name} {value}" for name, value in facts.items()) + ". Fastest run of each node.")
    bench_report.publish(options, SECTION, "\n".join(parts), {"machine": facts, "profiles": data})


if __name__ == "__main__":
    main()
