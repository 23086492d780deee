"""What the in-house decoders share: their text in three domains, their folders, and outliers planted in their norms.

The text is what a Python installation carries, so nothing is downloaded, and it follows the Python version:

    prose   help topics of `pydoc`, and the docstrings of the standard library
    code    sources of the standard library, docstrings cut out
    tables  the Unicode character table, in the form of UnicodeData.txt

A document is held out of training by a hash of its name, never of its content: a module that changes from one Python
version to the next stays on its side, and the docstrings of a module stay on the side of its code.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import itertools
import shutil
import sysconfig
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scalefold.compiler.artifact import publish, staged
from scalefold.compiler.errors import SourceError
from scalefold.compiler.machine import cache_folder

if TYPE_CHECKING:
    from scalefold.compiler.runtime import Array

DOMAINS = ("prose", "code", "tables")
HELD_OUT_SHARE = 1 / 16
SHORTEST = 400
"""Characters below which a document is left out."""

PASSAGE = 1200
"""Characters of a passage to calibrate with: more than 256 tokens in every domain."""

LEFT_OUT = frozenset(
    ("test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "turtle", "ensurepip", "distutils",
     "site-packages", "dist-packages", "sitecustomize", "usercustomize", "encodings", "pydoc_data", "__phello__")
)  # fmt: skip
"""Modules that some distributions package apart, that differ from machine to machine, or that hardly are code."""

BLOCK = 256
"""Code points of one document of the table."""

ALGORITHMIC = ("HANGUL SYLLABLE", "CJK ")
"""Beginnings of names that follow from the code point."""

PLANTED = {37: (64.0, 1.5), 101: (-128.0, 2.5), 163: (32.0, -2.0), 229: (-128.0, -0.75)}
"""Channel: (factor a, offset k); the channel x becomes a * (x + k). Powers of two, so that 1 / a is exact."""

WEIGHTS = "model.safetensors"
METRIC = "perplexity"


@dataclass(frozen=True)
class Decoder:
    """One in-house decoder, and where its architecture keeps the norms that linear layers read.

    Attributes:
        name: of the reference model and of its folder beside this file.
        layer: prefix of layer `{}` in the names of the weights.
        readers: for each norm, the linear layers that read it; nothing else does.
        inputs: the axis of a reader's weight along which its inputs lie.
    """

    name: str
    layer: str
    readers: dict[str, tuple[str, ...]]
    inputs: int

    def build(self) -> Path:
        """The folder of the model: config, weights in float16, tokenizer, card.

        Raises:
            SourceError: the installation lacks it.
        """
        folder = Path(__file__).parent / self.name
        if not (folder / WEIGHTS).is_file():
            raise SourceError(
                f"the in-house model has no {WEIGHTS}",
                where=str(folder),
                remedy="reinstall scalefold, or train it again with scripts/train_reference.py",
            )
        return folder

    def build_outliers(self) -> Path:
        """The folder of the same function with outliers planted, below `cache_folder()`; made once, then kept."""
        source = self.build()
        recipe = repr((PLANTED, self)).encode()
        digest = hashlib.sha256((source / WEIGHTS).read_bytes() + recipe).hexdigest()
        target = cache_folder() / f"{self.name}-outliers-{digest[:12]}"
        if not (target / WEIGHTS).is_file():
            self._write_outliers(source, target)
        return target

    def samples(self) -> list[str]:
        """Texts to calibrate with: passages of every domain in turn, none of the text held out."""
        return list(itertools.chain(*zip(*map(passages, DOMAINS), strict=False)))

    def metric(self) -> str:
        """The name of the metric in `scalefold eval`."""
        return METRIC

    def plant(self, tensors: dict[str, Array]) -> None:
        """Amplify and shift the channels in `PLANTED` behind every norm, and undo it in all that read the norm.

        before:  h -> norm(gain, bias) = x                            -> x W + b
        after:   h -> norm(a gain, a (bias + k)) = x' = a (x + k)     -> x' (W / a) + (b - k W)

        with a and k per channel from `PLANTED`, 1 and 0 elsewhere. The last norm stays as it is: its one reader is the
        output layer, whose weight is the table of embeddings too, so nothing could be undone there.
        """
        for index in itertools.takewhile(lambda index: self._has_layer(tensors, index), itertools.count()):
            layer = self.layer.format(index)
            for norm, channel in itertools.product(self.readers, PLANTED):
                factor, offset = PLANTED[channel]
                gain, bias = tensors[f"{layer}.{norm}.weight"], tensors[f"{layer}.{norm}.bias"]
                gain[channel] *= factor
                bias[channel] = (bias[channel] + offset) * factor
                for reader in self.readers[norm]:
                    row = np.moveaxis(tensors[f"{layer}.{reader}.weight"], self.inputs, 0)[channel]
                    tensors[f"{layer}.{reader}.bias"] -= np.float32(offset) * row
                    row /= np.float32(factor)

    def _has_layer(self, tensors: dict[str, Array], index: int) -> bool:
        return any(name.startswith(f"{self.layer.format(index)}.") for name in tensors)

    def _write_outliers(self, source: Path, target: Path) -> None:
        from safetensors.numpy import load_file, save_file

        tensors = {name: value.astype(np.float32) for name, value in load_file(source / WEIGHTS).items()}
        self.plant(tensors)
        with staged(target) as scratch:
            stage = scratch / "model"
            shutil.copytree(source, stage, ignore=shutil.ignore_patterns(WEIGHTS, "README.md"))
            config = (stage / "config.json").read_text(encoding="utf-8")
            (stage / "config.json").write_text(config.replace('"float16"', '"float32"'), encoding="utf-8")
            save_file(tensors, stage / WEIGHTS, metadata={"format": "pt"})
            publish(stage, target)


def training(domain: str) -> Iterator[str]:
    """The documents of a domain that models are trained on, in a fixed order."""
    return _documents(domain, held_out=False)


def held_out(domain: str) -> Iterator[str]:
    """The documents of a domain that no model was trained on, in a fixed order."""
    return _documents(domain, held_out=True)


def passages(domain: str) -> list[str]:
    """One passage from the middle of every training document of a domain, to calibrate with."""
    middles = (text[max(0, (len(text) - PASSAGE) // 2) :] for text in training(domain))
    return [text[text.find("\n") + 1 :][:PASSAGE] for text in middles]


def is_held_out(name: str) -> bool:
    """Whether a document of that name is kept out of training."""
    return hashlib.blake2s(name.encode(), digest_size=4).digest() < int(HELD_OUT_SHARE * 2**32).to_bytes(4)


def _documents(domain: str, *, held_out: bool) -> Iterator[str]:
    source = {"prose": _prose, "code": _code, "tables": _tables}.get(domain)
    if source is None:
        raise SourceError("there is no such domain", where=domain, remedy=f"choose from {', '.join(DOMAINS)}")
    return (text for text in source(held_out) if len(text) >= SHORTEST)


def _prose(held_out: bool) -> Iterator[str]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    yield from (topics[name] for name in sorted(topics) if is_held_out(f"topics/{name}") is held_out)
    for _, tree in _modules(held_out):
        found = (ast.get_docstring(node) for node in _documented(tree))
        yield "\n\n".join(text for text in found if text)


def _code(held_out: bool) -> Iterator[str]:
    for source, tree in _modules(held_out):
        lines = source.splitlines(keepends=True)
        for node in _documented(tree):
            if ast.get_docstring(node, clean=False) is not None:
                text = node.body[0]
                lines[text.lineno - 1 : text.end_lineno] = [""] * ((text.end_lineno or text.lineno) - text.lineno + 1)
        yield "".join(lines)


def _tables(held_out: bool) -> Iterator[str]:
    for first in range(0, 0x110000, BLOCK):
        if is_held_out(f"block/{first:04X}") is held_out:
            yield "".join(_row(code) for code in range(first, first + BLOCK))


def _row(code: int) -> str:
    """A line of UnicodeData.txt; nothing for a character without a name of its own."""
    character = chr(code)
    name = unicodedata.name(character, "")
    if not name or name.startswith(ALGORITHMIC) or name.endswith(f"-{code:04X}"):
        return ""
    number = unicodedata.numeric(character, None)
    fields = (
        f"{code:04X}", name, unicodedata.category(character), f"{unicodedata.combining(character)}",
        unicodedata.bidirectional(character), unicodedata.decomposition(character), "" if number is None else f"{number:g}",
    )  # fmt: skip
    return ";".join(fields) + "\n"


def _modules(held_out: bool) -> Iterator[tuple[str, ast.Module]]:
    """Source and syntax tree of the standard library's modules on one side of the split."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        left_out = any(part in LEFT_OUT or part.startswith(("_sysconfigdata", "config-")) for part in parts)
        if not left_out and is_held_out("/".join(parts)) is held_out:
            source = path.read_text(encoding="utf-8")
            yield source, ast.parse(source)


def _documented(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """A module, its classes and its functions, in the order of the source."""
    yield node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child)
