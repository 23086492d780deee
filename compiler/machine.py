"""Figures measured on this machine, kept from one run to the next."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import onnxruntime


def cache_folder() -> Path:
    """Where what can be had again is kept: `$SCALEFOLD_CACHE`, or `~/.cache/scalefold`."""
    return Path(os.environ.get("SCALEFOLD_CACHE") or Path.home() / ".cache" / "scalefold")


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """The processor, and whether it has the integer products of VNNI."""
    facts: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    model = facts.get("model name") or platform.processor() or platform.machine()
    return f"{model}, {'VNNI' if 'vnni' in facts.get('flags', '') else 'no VNNI'}"


def figures_file(kind: str, threads: int) -> Path:
    """Where figures of a kind are kept: one file for each model of CPU, number of threads and version of onnxruntime."""
    digest = hashlib.sha256(json.dumps(_machine(threads), sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / f"{kind}-{digest}.json"


def recall(kind: str, threads: int) -> dict[str, float]:
    """The figures that were kept; none where there is no such file, or it is damaged."""
    try:
        figures = json.loads(figures_file(kind, threads).read_text(encoding="utf-8"))["figures"]
        return {str(name): float(value) for name, value in figures.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def keep(kind: str, threads: int, figures: Mapping[str, float]) -> None:
    """Replace a file of figures whole; where there is no writing, they are measured again next time."""
    place = figures_file(kind, threads)
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        content = {**_machine(threads), "figures": dict(figures)}
        with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False, encoding="utf-8") as file:
            json.dump(content, file, indent=2, sort_keys=True)
        Path(file.name).replace(place)


def _machine(threads: int) -> dict[str, str]:
    return {"cpu": cpu_model(), "threads": str(threads), "onnxruntime": onnxruntime.__version__}
