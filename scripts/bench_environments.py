"""Virtual environments for the engines whose packages would not go together, or should not be in the user's own.

Each is made on first use beside the repository's own environment, with the pins of its section of
bench-constraints.txt. llama-cpp-python is built from source there, for this machine, which takes some minutes; pip keeps
what it built.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / ".bench-venv"
CONSTRAINTS = Path(__file__).with_name("bench-constraints.txt")
PACKAGES = {
    "openvino": ("openvino", "nncf"),
    "ctranslate2": ("ctranslate2", "torch", "transformers"),
    "llama.cpp": ("llama-cpp-python", "gguf", "safetensors"),
    "genai": ("onnxruntime-genai", "onnx", "onnx-ir", "torch", "transformers"),
}
"""What is installed for each engine; the others run in the environment of the benchmark itself."""
BUILD = {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TOOLS=OFF"}
"""Leaves out of llama.cpp what no benchmark runs: half of its files."""


class PreparationError(Exception):
    """An environment cannot be made; the message says why."""


def interpreter(engine: str) -> str:
    """The Python that runs an engine's children; its environment is made on first use."""
    if engine not in PACKAGES:
        return sys.executable
    folder, pins = FOLDER / engine, constraints(engine)
    python, complete = folder / "bin" / "python", folder / "complete"
    if complete.is_file() and complete.read_text(encoding="utf-8") == pins:
        return str(python)
    complete.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    pinned = folder / "constraints.txt"
    pinned.write_text(pins, encoding="utf-8")
    install = [str(python), "-m", "pip", "install", "--quiet", "-c", str(pinned), *PACKAGES[engine]]
    for command in ([sys.executable, "-m", "venv", str(folder)], install):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | BUILD)
        if done.returncode:
            said = ((done.stderr or done.stdout).strip().splitlines() or ["no message"])[-1]
            raise PreparationError(f"the environment for {engine} cannot be made: {said[:300]}")
    complete.write_text(pins, encoding="utf-8")
    return str(python)


def constraints(engine: str) -> str:
    """The section of bench-constraints.txt that a line `# == ENGINE ==` opens; empty for the benchmark's own."""
    sections = re.split(r"^# == (.+) ==$", CONSTRAINTS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(sections[1::2], sections[2::2], strict=True)).get(engine, "").strip() + "\n"
