"""scalefold's own operators for onnxruntime's CPU: built from kernels.cpp by the machine's compiler, and registered."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from scalefold.compiler.errors import SourceError
from scalefold.compiler.machine import cache_folder

DOMAIN = "scalefold"
"""The operators' domain."""

VERSION = 1
"""Version of the operator set."""

LIBRARY = "scalefold_kernels.so"
"""The library's name in a fused folder."""

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
"""The values of the attribute `activation`, in order."""

PRODUCTS = frozenset({"Linear", "LinearUint8", "LinearBfloat16", "LinearNormUint8", "RowLinear"})
"""The operators that multiply by a weight."""

FLOAT_PRODUCT = "FloatLinear"
"""The operator that does so in bfloat16."""

HEAD_LANES = 16
"""Sizes of attention heads are multiples of it."""

LARGEST_HEAD = 256
"""The largest size of a head."""

PANEL = 64
"""Columns of a panel of weights."""

BLOCK = 32
"""Rows of a weight that lie together where its codes are of 4 bits."""

FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-w")

COMPILERS = ("c++", "g++", "clang++")
"""What is looked for on the path where the environment names none."""


def packed_panels(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """A weight [K, N] as the kernels read it: [ceil(N / 64), K / 4, 64, 4], filled up with columns of 0.

    The four numbers of a column that one instruction multiplies lie side by side.
    """
    k, n = codes.shape
    panels = -(-n // PANEL)
    filled = np.zeros((k, panels * PANEL), dtype=np.int8)
    filled[:, :n] = codes
    return np.ascontiguousarray(filled.reshape(k // 4, 4, panels, PANEL).transpose(2, 0, 3, 1))


def packed_pairs(weight: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """A float weight [K, N] as FloatLinear reads it: bfloat16 [ceil(N / 64), K / 2, 64, 2], filled up with columns of 0."""
    k, n = weight.shape
    filled = np.pad(weight, ((0, 0), (0, -n % PANEL))).reshape(k // 2, 2, -1, PANEL)
    return np.ascontiguousarray(filled.transpose(2, 0, 3, 1)).astype(ir.DataType.BFLOAT16.numpy())


def input_channels(panels: Sequence[int]) -> int:
    """K of a weight [K, N], from the shape of its panels of int8, of codes, or of bfloat16."""
    return panels[1] * (BLOCK if panels[3] == PANEL else panels[3])


def unpacked_panels(panels: npt.NDArray[np.int8], columns: int) -> npt.NDArray[np.int8]:
    """The weight [K, N] that `packed_panels` was given."""
    count, groups = panels.shape[:2]
    return np.ascontiguousarray(panels.transpose(1, 3, 0, 2).reshape(4 * groups, count * PANEL)[:, :columns])


def to_bfloat(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Floats rounded to bfloat16, to the even one in the middle."""
    return values.astype(ir.DataType.BFLOAT16.numpy()).astype(np.float32)


def library() -> Path:
    """The library, built when this machine has not built it from this source yet, and kept in the user's cache.

    Raises:
        SourceError: there is no C++ compiler, or it refuses the source.
    """
    source = files("scalefold.compiler") / "kernels.cpp"
    compiler = _compiler()
    told = "\n".join([source.read_text(encoding="utf-8"), *compiler, *FLAGS, platform.machine(), sys.platform])
    place = cache_folder() / f"kernels-{hashlib.sha256(told.encode()).hexdigest()[:16]}" / LIBRARY
    if not place.is_file():
        with as_file(source) as path:
            _build(path, compiler, place)
    return place


def is_fast(path: Path) -> bool:
    """Whether this machine's processor has the instructions that a library's fast kernels are made of.

    Raises:
        SourceError: it is damaged.
    """
    try:
        _require_whole(path)
        return bool(ctypes.CDLL(str(path.absolute())).scalefold_vectorized())
    except (OSError, AttributeError) as error:
        raise SourceError(
            f"it is no library of scalefold's kernels ({error})",
            where=str(path),
            remedy="delete it, so that it is built again",
        ) from error


def register_beside(options: onnxruntime.SessionOptions, folder: Path) -> None:
    """Make the operators of a fused folder known to a session; does nothing for any other folder."""
    if (folder / LIBRARY).is_file():
        register(options, folder / LIBRARY)


def register(options: onnxruntime.SessionOptions, path: Path | None = None) -> None:
    """Make the operators known to a session that is opened with these options.

    Args:
        options: of the session.
        path: a library, such as the one in a fused folder; built here when None.

    Raises:
        SourceError: there is none, and none can be built, or it is none of this machine's.
    """
    place = library() if path is None else path
    try:
        _require_whole(place)
        options.register_custom_ops_library(str(place.absolute()))  # a bare name is looked up where the system's are
    except Exception as error:  # onnxruntime has a private class for each of its faults, and dlopen says why
        raise SourceError(
            f"the library cannot be loaded ({' '.join(str(error).split())[:200]})",
            where=str(place),
            remedy="fuse the folder again on a machine like this one",
        ) from error


def _require_whole(path: Path) -> None:
    """Raise OSError for an ELF file that is cut short: to load one kills the process. Its table of sections ends it."""
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) == 64 and head[:5] == b"\x7fELF\x02":
        (offset,), (size, count) = struct.unpack_from("=Q", head, 40), struct.unpack_from("=HH", head, 58)
        if offset + size * count > path.stat().st_size:
            raise OSError("it is cut short")


def _compiler() -> tuple[str, ...]:
    """The command of a C++ compiler: `$CXX`, one on the path, or the one of the package ziglang."""
    if given := os.environ.get("CXX"):
        return tuple(shlex.split(given))
    found = next((name for name in COMPILERS if shutil.which(name)), None)
    if found is not None:
        return (found,)
    if importlib.util.find_spec("ziglang") is not None:
        return (sys.executable, "-m", "ziglang", "c++")
    raise SourceError(
        "there is no C++ compiler to build scalefold's kernels with",
        where="the machine",
        remedy="install g++ or clang, name one in CXX, or pip install 'scalefold[kernels]', which brings one",
    )


def _build(source: Path, compiler: tuple[str, ...], place: Path) -> None:
    """Build beside, then rename: processes that build at once leave one whole library."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=place.parent)
    except OSError as error:
        raise SourceError(
            f"the kernel library cannot be kept in it ({error.strerror or error})",
            where=str(cache_folder()),
            remedy="free some space, or name a folder to write to in SCALEFOLD_CACHE",
        ) from error
    with scratch as folder:
        made = Path(folder) / LIBRARY
        command = [*compiler, *FLAGS, str(source), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            said = done.stderr.strip()
            failed = done.returncode != 0
        except OSError as error:
            said, failed = str(error), True
        if failed:
            raise SourceError(
                f"the C++ compiler refuses scalefold's kernels ({' '.join(said.split())[:300]})",
                where=shlex.join(compiler),
                remedy="name another compiler of C++17 in CXX",
            )
        made.replace(place)
