"""Run one example: `run.py NAME ARGUMENTS...`; without a name it lists them.

What an example needs beyond the project's own packages is pinned in `requirements/`, and goes into a virtual environment
of its own below `$SCALEFOLD_CACHE/examples` (default `~/.cache/scalefold/examples`), made on first use.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from scalefold.compiler.machine import cache_folder

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent


@dataclass(frozen=True)
class Example:
    """One file of this folder.

    Attributes:
        file: what is run.
        environment: its file in `requirements/`, without `.txt`; `node` for Node; None for the interpreter that runs this.
        scalefold: whether its environment holds this repository too.
    """

    file: str
    environment: str | None = None
    scalefold: bool = False


EXAMPLES = {
    "onnxruntime": Example("embed_onnxruntime.py"),
    "node": Example("embed_node.mjs", "node"),
    "transformers": Example("embed_transformers.py"),
    "sentence-transformers": Example("embed_sentence_transformers.py", "optimum"),
    "optimum": Example("generate_optimum.py", "optimum"),
    "fastembed": Example("embed_fastembed.py", "fastembed"),
    "infinity": Example("embed_infinity.py", "optimum"),
    "genai-files": Example("genai_files.py"),
    "genai": Example("generate_genai.py", "genai"),
    "triton-files": Example("triton_files.py"),
    "check-triton": Example("check_triton.py", "kserve"),
    "kserve-files": Example("kserve_files.py"),
    "check-kserve": Example("check_kserve.py", "kserve"),
    "server": Example("server.py", "litserve", scalefold=True),
    "load-test": Example("load_test.py"),
}


class InstallError(Exception):
    """An environment could not be made; the message says why."""


def command(name: str) -> list[str]:
    """The start of the command line of an example, its environment made.

    Raises:
        InstallError: pip or npm failed.
    """
    example = EXAMPLES[name]
    file = HERE / example.file
    if example.environment is None:
        return [sys.executable, str(file)]
    if example.environment == "node":
        return ["node", str(_node_environment() / file.name)]
    return [str(_python_environment(example.environment, scalefold=example.scalefold)), str(file)]


def _python_environment(name: str, *, scalefold: bool) -> Path:
    """The interpreter of a virtual environment that holds what `requirements/NAME.txt` pins, and nothing else."""
    requirements = HERE / "requirements" / f"{name}.txt"
    folder = cache_folder() / "examples" / name
    python, stamp = folder / "bin" / "python", _digest(requirements) + f" {REPOSITORY if scalefold else ''}"
    if _is_complete(folder, stamp):
        return python
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _call([sys.executable, "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements)]
    _call([*pip, "-e", str(REPOSITORY)] if scalefold else pip)
    (folder / "complete").write_text(stamp, encoding="utf-8")
    return python


def _node_environment() -> Path:
    """A folder with the Node example and the packages that package-lock.json pins."""
    if shutil.which("npm") is None:
        raise InstallError("npm was not found; install Node 20 or later")
    folder, source = cache_folder() / "examples" / "node", HERE / "node"
    stamp = _digest(*sorted(source.iterdir()))
    if not _is_complete(folder, stamp):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        # the package's install script would fetch CUDA libraries from elsewhere; the CPU's are in the package
        _call(["npm", "ci", "--silent", "--ignore-scripts"], folder)
        (folder / "complete").write_text(stamp, encoding="utf-8")
    return folder


def _is_complete(folder: Path, stamp: str) -> bool:
    complete = folder / "complete"
    return complete.is_file() and complete.read_text(encoding="utf-8") == stamp


def _digest(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _call(words: list[str], folder: Path | None = None) -> None:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise InstallError(f"`{' '.join(words[:4])} ...` failed: {said[-1]}")


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] not in EXAMPLES:
        sys.exit(f"usage: run.py NAME ARGUMENTS...; NAME is one of {', '.join(EXAMPLES)}")
    try:
        start = command(arguments[0])
    except InstallError as error:
        sys.exit(f"error {error}")
    os.execvp(start[0], [*start, *arguments[1:]])


if __name__ == "__main__":
    main(sys.argv[1:])
