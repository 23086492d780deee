"""What compiling takes: seconds of each stage, and peak memory against the size of the float model.

    bench_compile.py SOURCE...       what `scalefold compile` takes, or a model of contenders.py with random weights
                                     (bert-12x768, gpt2-124m, opt-125m, opt-1.3b)

Each is compiled by the command line in a process of its own; an exporter has another, whose memory is told apart. The
float model that opt-1.3b is made from takes 5.3 GB in --work, and as much again while it is exported.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers see the repository as the root, Python the folder of this file
    from scripts import bench_report, contenders
else:
    import bench_report
    import contenders

SECTION = "compile"
SHOWN = 0.05
"""Share of the time from which a stage is named."""
HEADER = (
    "model", "recipe", "float, MB", "compiled, MB", "peak, MB", "to float", "peak of export, MB", "export, s", "compile, s",
    "most of it, s",
)  # fmt: skip


def compiled(source: str, target: Path, options: Sequence[str]) -> dict[str, Any]:
    """What the command says of one compilation.

    Raises:
        SystemExit: it failed; says how.
    """
    command = [sys.executable, "-m", "scalefold.compiler.cli", "compile", source, "-o", str(target), "--json", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # its progress stays to be seen
    if done.returncode:
        raise SystemExit(f"{source}: scalefold compile ended with exit code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def row(name: str, recipe: str, found: Mapping[str, Any]) -> list[str]:
    """One line of the table."""
    stages = {stage: seconds for stage, seconds in found["seconds"].items() if stage != "export"}
    total = sum(stages.values())
    longest = sorted((stage for stage in stages if stages[stage] >= SHOWN * total), key=lambda stage: -stages[stage])
    return [
        name,
        recipe,
        f"{found['float_bytes'] / 1e6:,.0f}",
        f"{found['bytes'] / 1e6:,.0f}",
        f"{found['peak_bytes'] / 1e6:,.0f}",
        f"{found['peak_bytes'] / found['float_bytes']:.2f}",
        f"{found['export_peak_bytes'] / 1e6:,.0f}",
        f"{found['seconds'].get('export', 0):.0f}",
        f"{total:.0f}",
        ", ".join(f"{stage} {stages[stage]:.0f}" for stage in longest),
    ]


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("sources", nargs="+", metavar="SOURCE")
    made.add_argument("--recipe", default="w8a8", help="(default: w8a8)")
    made.add_argument("--samples", type=int, help="of the calibration; the recipe's by default")
    made.add_argument("--work", type=Path, metavar="DIR", help="keep the models here")
    bench_report.add_options(made, SECTION, plot=False)
    options = made.parse_args()
    further = ["--recipe", options.recipe, *(["--samples", str(options.samples)] if options.samples else [])]
    found: dict[str, dict[str, Any]] = {}
    with contenders.work_folder(options.work) as folder:
        for source in options.sources:
            own = folder / Path(source).name / "source"
            start = str(contenders.random_model(source, own)) if source in contenders.RANDOM else source
            found[source] = compiled(start, folder / Path(source).name / "compiled", further)
    rows = [row(Path(source).name, options.recipe, facts) for source, facts in found.items()]
    facts = contenders.machine(2)
    told = ", ".join(f"{name} {value}" for name, value in facts.items())
    markdown = (
        f"{bench_report.table(HEADER, rows)}\n\n{told}. Peaks are resident memory, interpreter and packages included."
    )
    bench_report.publish(options, SECTION, markdown, {"machine": facts, "models": found})


if __name__ == "__main__":
    main()
