"""Metrics of a compiled model: semantic similarity, and closeness to the float model."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from scalefold.compiler.artifact import MODEL
from scalefold.compiler.calibrate import TextEncoder, read_tokenizer
from scalefold.compiler.errors import CalibrationError, SourceError
from scalefold.compiler.runtime import Feed, Session, inputs_of
from scalefold.compiler.verify import Fidelity, fidelity

Embeddings = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Pair:
    """Two sentences and how similar people found them, 0 to 5."""

    first: str
    second: str
    score: float


def read_pairs(path: Path) -> list[Pair]:
    """Read the STS benchmark's files: tab-separated, score in column 5, sentences in columns 6 and 7.

    Raises:
        CalibrationError: no such file, or not of this form.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row]
        pairs = [Pair(row[5], row[6], float(row[4])) for row in rows]
    except (OSError, IndexError, ValueError) as error:
        raise CalibrationError(
            f"it is not a file of the STS benchmark ({error})",
            where=str(path),
            remedy="give a tab-separated file with the score in column 5 and the sentences in columns 6 and 7",
        ) from error
    if len(pairs) < 2:
        raise CalibrationError("it holds fewer than two pairs", where=str(path), remedy="give the whole file")
    return pairs


def open_folder(folder: Path) -> tuple[Session, Path]:
    """The session of a compiled folder, or of an `.onnx` file, and the tokenizer beside it.

    Raises:
        SourceError: the model or the tokenizer is missing.
    """
    model = folder / MODEL if folder.is_dir() else folder
    tokenizer = model.parent / "tokenizer.json"
    for path in (model, tokenizer):
        if not path.is_file():
            raise SourceError(f"there is no {path.name} in it", where=str(folder), remedy="give a compiled folder")
    return Session(model), tokenizer


def embed(session: Session, tokenizer_file: Path, sentences: Sequence[str], advance: Callable[[], None]) -> Embeddings:
    """Sentence embeddings: mean of the token states that are not padding, normalized. Shape [sentences, width].

    Sentences run in batches of 16 of similar length.
    """
    tokenizer = read_tokenizer(tokenizer_file)
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding()
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    found: dict[int, Embeddings] = {}
    for start in range(0, len(order), 16):
        batch = order[start : start + 16]
        encodings = tokenizer.encode_batch([sentences[index] for index in batch])
        feed: Feed = {
            "input_ids": np.asarray([entry.ids for entry in encodings], dtype=np.int64),
            "attention_mask": np.asarray([entry.attention_mask for entry in encodings], dtype=np.int64),
            "token_type_ids": np.asarray([entry.type_ids for entry in encodings], dtype=np.int64),
        }
        states = session.run(feed)[session.outputs[0]]
        if states.ndim != 3:
            raise SourceError(
                f"its first output has {states.ndim} dimensions, not [batch, tokens, width]",
                where="the model",
                remedy="this metric needs a feature-extraction model; compile with --task feature-extraction",
            )
        mask = feed["attention_mask"][..., None]
        means = (states * mask).sum(axis=1) / mask.sum(axis=1)
        found.update(zip(batch, means / np.linalg.norm(means, axis=1, keepdims=True), strict=True))
        advance()
    return np.stack([found[index] for index in range(len(sentences))])


def spearman(pairs: Sequence[Pair], embeddings: Embeddings) -> float:
    """100 x Spearman's rank correlation of cosine similarity with people's scores.

    Args:
        pairs: n pairs.
        embeddings: [2 n, width]: the first sentences, then the second ones.
    """
    from scipy.stats import spearmanr  # an optional package: only this metric needs it

    first, second = embeddings[: len(pairs)], embeddings[len(pairs) :]
    return 100 * float(spearmanr((first * second).sum(axis=1), [pair.score for pair in pairs]).statistic)


def compare_on_text(
    original: ir.Model, folder: Path, texts: Sequence[str], advance: Callable[[], None]
) -> list[Fidelity]:
    """The outputs of a compiled folder against a float graph, on texts of any length up to 128 tokens."""
    session, tokenizer = open_folder(folder)
    encode = TextEncoder(tokenizer, original, 128)

    def feeds() -> Iterator[Feed]:
        for text in texts:
            yield encode(text)
            advance()

    missing = sorted(set(inputs_of(original)) - set(session.inputs))
    if missing:
        raise SourceError(
            f"it takes {', '.join(missing)}, which the compiled model does not",
            where="the float model",
            remedy="give the model that the folder was compiled from",
        )
    return fidelity(Session(original, lean=True), session, feeds())
