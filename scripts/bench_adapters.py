"""Two adapters of scales in turn on one session: are the answers those of each alone, and what does it cost?

    bench_adapters.py BASE FIRST SECOND       a compiled decoder, and two folders that `scalefold tune --train scales` wrote

Answers are compared with those of the base loaded with one adapter. Throughput is the time of the base as it was
compiled over that of one session which takes the adapters in turn, by rounds. The sessions share a process: their threads
do not spin, so they do not disturb each other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from scalefold.compiler import artifact, serving
from scalefold.compiler.decoder import LOGITS, decoder_of
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.runtime import Feed

WARM = 5
"""Runs before the clock starts."""


def largest_difference(base: Path, adapter: Path, alternating: serving.AdapterSession, feed: Feed) -> float:
    """Between the session's answer with an adapter, and that of the base loaded with it; relative to the largest logit."""
    alone = serving.load(base, adapter).run([LOGITS], dict(feed))[0]
    (found,) = alternating.run([LOGITS], feed, str(adapter))
    return float(np.abs(found - alone).max() / np.abs(alone).max())


def seconds(run: Callable[[int], object], runs: int) -> float:
    """The mean of a run."""
    for index in range(WARM):
        run(index)
    start = time.perf_counter()
    for index in range(runs):
        run(index)
    return (time.perf_counter() - start) / runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapters", type=Path, nargs=2)
    parser.add_argument("--tokens", type=int, default=64, help="of the prompt (default: 64)")
    parser.add_argument("--turns", type=int, default=11, help="rounds (default: 11)")
    parser.add_argument("--runs", type=int, default=40, help="in each round (default: 40)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    plain, alternating = serving.load(given.base), serving.AdapterSession(given.base)
    for adapter in given.adapters:
        alternating.add(str(adapter), adapter)
    feed = decoder_of(read_onnx(given.base / artifact.MODEL)).prompt_feed(np.arange(given.tokens)[None] + 5)
    differences = [largest_difference(given.base, adapter, alternating, feed) for adapter in given.adapters]
    names = [str(adapter) for adapter in given.adapters]
    ratios = []
    for _ in range(given.turns):
        alone = seconds(lambda index: plain.run([LOGITS], dict(feed)), given.runs)
        ratios.append(alone / seconds(lambda index: alternating.run([LOGITS], feed, names[index % 2]), given.runs))
    found = {
        "largest_relative_difference": max(differences),
        "throughput_to_base": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }
    print("\n".join(f"{name}: {value:.4g}" for name, value in found.items()))
    if given.json:
        artifact.write_json(given.json, found)


if __name__ == "__main__":
    main()
