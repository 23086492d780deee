"""Calibration data from many sources, streamed through a graph for the statistics that passes ask for."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import onnx_ir as ir
from tokenizers import Tokenizer

from scalefold.compiler.decoder import decoder_of, is_decoder
from scalefold.compiler.errors import CalibrationError
from scalefold.compiler.protocol import Requests
from scalefold.compiler.runtime import Array, Feed, Session, inputs_of
from scalefold.compiler.schemes import Float
from scalefold.compiler.stats import Statistic
from scalefold.compiler.text_file import numbered_lines

TEXT_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids"})
DEFAULT_ORIGIN = "English text of the Python installation (language reference and standard-library docstrings)"
MODULES_WITH_PROSE = (
    "argparse", "asyncio", "collections", "csv", "datetime", "decimal", "difflib", "email", "fractions", "heapq",
    "imaplib", "json", "locale", "logging", "mailbox", "optparse", "pickle", "random", "sched", "shutil", "statistics",
    "string", "subprocess", "tarfile", "textwrap", "threading", "turtle", "unittest", "urllib.request", "zipfile",
)  # fmt: skip


@runtime_checkable
class DataReader(Protocol):
    """onnxruntime's CalibrationDataReader: `get_next` gives a feed, or None at the end."""

    def get_next(self) -> Mapping[str, Array] | None:
        """The next feed, or None."""


@dataclass(frozen=True)
class Calibration:
    """A calibration set that can be read more than once.

    Attributes:
        feeds: opens a fresh iterator over the feeds.
        count: number of feeds.
        origin: where the samples come from, for people.
    """

    feeds: Callable[[], Iterator[Feed]]
    count: int
    origin: str

    def digest(self) -> str:
        """SHA-256 over the names, types, shapes and bytes of every feed."""
        digest = hashlib.sha256()
        for feed in self.feeds():
            for name in sorted(feed):
                array = np.ascontiguousarray(feed[name])
                digest.update(f"{name}:{array.dtype.str}:{array.shape}".encode())
                digest.update(array.tobytes())
        return digest.hexdigest()

    def split(self, held: int, wanted: int) -> tuple[Calibration, Calibration]:
        """A set to calibrate with and one of `held` samples to compare on, evenly spaced.

        When that would leave fewer to calibrate with than are wanted, and than twice as many, both are the whole set.
        """
        if self.count - held < min(wanted, 2 * held) or self.count - 2 < held:
            return self, self
        apart = frozenset(np.linspace(1, self.count - 2, held).astype(int).tolist())

        def part(wanted: bool) -> Iterator[Feed]:
            return (feed for index, feed in enumerate(self.feeds()) if (index in apart) == wanted)

        return (
            Calibration(lambda: part(False), self.count - held, self.origin),
            Calibration(lambda: part(True), held, self.origin),
        )

    def head(self, count: int) -> list[Feed]:
        """`count` feeds, evenly spaced over the set."""
        chosen = set(np.linspace(0, self.count - 1, min(count, self.count)).astype(int).tolist())
        return [feed for index, feed in enumerate(self.feeds()) if index in chosen]


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`.

    Raises:
        CalibrationError: it is not one, or it is cut short.
    """
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more particular
        raise CalibrationError(
            f"it is not a tokenizer, or it is cut short ({error})",
            where=str(path),
            remedy="save the tokenizer again",
        ) from error


class TextEncoder:
    """Turns text into the feeds of a model whose inputs are token ids.

    Args:
        tokenizer_file: a `tokenizer.json` of the `tokenizers` library.
        model: its inputs say which of the ids, masks and positions are wanted.
        max_length: tokens per sample, special tokens included.
    """

    def __init__(self, tokenizer_file: Path, model: ir.Model, max_length: int) -> None:
        self._tokenizer = read_tokenizer(tokenizer_file)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)
        self._types = {
            name: value.dtype.numpy() if value.dtype is not None else np.dtype(np.int64)
            for name, value in inputs_of(model).items()
        }
        unknown = sorted(set(self._types) - TEXT_INPUTS)
        if unknown:
            raise CalibrationError(
                f"text cannot fill the model's inputs {', '.join(unknown)}",
                where="calibration",
                remedy="give feeds instead: .npz, JSON lines with one key per input, or a data reader",
            )

    def __call__(self, text: str) -> Feed:
        """The feed of one text: arrays of shape [1, tokens], of the integer types that the model takes."""
        encoding = self._tokenizer.encode(text)
        every = {
            "input_ids": encoding.ids,
            "attention_mask": encoding.attention_mask,
            "token_type_ids": encoding.type_ids,
            "position_ids": list(range(len(encoding.ids))),
        }
        return {name: np.asarray([every[name]], dtype=dtype) for name, dtype in self._types.items()}


class RunningText:
    """Cuts windows out of running text, as the feeds of a decoder with an empty cache.

    A step behind a cache computes for its tokens what a prompt that holds the same tokens computes for them, so windows
    fed whole cover the activations of prefill and decode alike.

    Args:
        tokenizer_file: a `tokenizer.json` of the `tokenizers` library.
        model: the decoder.
        length: tokens per window.
        text: what windows are cut from.
    """

    def __init__(self, tokenizer_file: Path, model: ir.Model, length: int, text: str) -> None:
        self._tokenizer = read_tokenizer(tokenizer_file)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._decoder = decoder_of(model)
        self._length = length
        self._text = text

    def windows(self, count: int) -> list[Feed]:
        """At most `count` windows of equal length that begin at lines evenly spaced over the text."""
        found: list[list[int]] = []
        end = 0
        for wanted in np.linspace(0, len(self._text), count, endpoint=False).astype(int):
            start = self._begin(max(int(wanted), end))
            piece = self._text[start : start + 8 * self._length]
            encoding = self._tokenizer.encode(piece, add_special_tokens=False)
            if len(encoding.ids) >= self._length and (start or not found):
                found.append(encoding.ids[: self._length])
                end = start + encoding.offsets[self._length - 1][1]
        if not found:
            ids = self._tokenizer.encode(self._text, add_special_tokens=False).ids
            found = [ids] if len(ids) > 1 else []
        return [self._decoder.prompt_feed(np.asarray([ids])) for ids in found]

    def _begin(self, place: int) -> int:
        """Where the next line begins behind a place in the text; the next word, where there is no further line."""
        if place == 0:
            return 0
        end = next((found for mark in "\n " if (found := self._text.find(mark, place)) >= 0), len(self._text))
        return end + 1


def default_texts() -> list[str]:
    """Paragraphs and single sentences of English that every Python installation carries, in a fixed order."""
    texts: dict[str, None] = {}
    for document in _documents():
        for paragraph in re.split(r"\n\s*\n", document):
            flat = " ".join(paragraph.split())
            if _is_prose(flat):
                texts[flat] = None
                for sentence in re.split(r"(?<=[.!?]) +(?=[A-Z])", flat):
                    if _is_prose(sentence):
                        texts[sentence] = None
    return list(texts)


def default_running_text() -> str:
    """The paragraphs of prose behind `default_texts`, in their order."""
    paragraphs = (
        " ".join(paragraph.split()) for document in _documents() for paragraph in re.split(r"\n\s*\n", document)
    )
    return "\n".join(dict.fromkeys(paragraph for paragraph in paragraphs if _is_prose(paragraph)))


def _documents() -> list[str]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    documents = [topics[key] for key in sorted(topics)]
    for module in modules_with_prose():
        classes = inspect.getmembers(module, inspect.isclass)
        members = [member for _, member in classes if member.__module__ == module.__name__]
        documents += [inspect.getdoc(entry) or "" for entry in (module, *members)]
    return documents


def modules_with_prose() -> Iterator[ModuleType]:
    """Those of `MODULES_WITH_PROSE` that this Python has, in their order."""
    for name in MODULES_WITH_PROSE:
        try:
            module = importlib.import_module(name)
        except ImportError:  # turtle needs tkinter, which some distributions package apart
            continue
        yield module


def _is_prose(text: str) -> bool:
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return len(text) >= 30 and letters >= 0.85 * len(text) and text[0].isupper()


def calibration_from(
    source: object, model: ir.Model, *, tokenizer_file: Path | None, samples: int, max_length: int
) -> Calibration:
    """Open a calibration source.

    Args:
        source: None for the default text; a path to text, JSON lines or `.npz`; an object with `get_next`; or an
            iterable of feeds or of texts.
        model: the graph to be fed; its inputs are what feeds must hold.
        tokenizer_file: a `tokenizer.json`, needed for text.
        samples: how many samples to take, evenly spaced where the source's length is known.
        max_length: tokens per sample of text.

    Raises:
        CalibrationError: the source is empty, unreadable, or does not fit the model.
    """
    if source is None and is_decoder(model):
        return _from_texts([default_running_text()], DEFAULT_ORIGIN, model, tokenizer_file, samples, max_length)
    if source is None:
        return _from_texts(default_texts(), DEFAULT_ORIGIN, model, tokenizer_file, samples, max_length)
    if isinstance(source, str | Path):
        return _from_file(Path(source), model, tokenizer_file, samples, max_length)
    if isinstance(source, DataReader):
        return _spooled(iter(source.get_next, None), f"data reader {type(source).__name__}", model, samples)
    if isinstance(source, Iterable):
        entries = iter(source)
        first = next(entries, None)
        rest = entries if isinstance(source, Sequence) else islice(entries, samples - 1)
        if isinstance(first, str) and not isinstance(source, Mapping):
            texts = [first, *rest]
            if all(isinstance(entry, str) for entry in texts):
                return _from_texts(texts, "texts", model, tokenizer_file, samples, max_length)
        return _spooled(chain([] if first is None else [first], entries), "feeds", model, samples)
    raise CalibrationError(
        f"a {type(source).__name__} is not calibration data",
        where="calibration",
        remedy="give a path, texts, feeds, or an object with get_next()",
    )


def _from_file(path: Path, model: ir.Model, tokenizer_file: Path | None, samples: int, max_length: int) -> Calibration:
    if not path.is_file():
        raise CalibrationError("there is no such file", where=str(path), remedy="check the path of --calibration")
    try:
        if path.suffix == ".npz":
            return _spooled(_npz_feeds(path, model), str(path), model, samples)
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix in (".jsonl", ".ndjson"):
            return _from_json_lines(path, text, model, tokenizer_file, samples, max_length)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CalibrationError(
            f"it cannot be read ({' '.join(str(error).split())})",
            where=str(path),
            remedy="give UTF-8 text, JSON lines, or an .npz with one array per input",
        ) from error
    lines = [line for _, line in numbered_lines(text) if len(line.split()) >= 4]
    if is_decoder(model):
        lines = [text] if lines else []
    return _from_texts(lines, str(path), model, tokenizer_file, samples, max_length)


def _from_json_lines(
    path: Path, text: str, model: ir.Model, tokenizer_file: Path | None, samples: int, max_length: int
) -> Calibration:
    entries = [json.loads(line) for _, line in numbered_lines(text)]
    if all(isinstance(entry, dict) and isinstance(entry.get("text"), str) for entry in entries):
        texts = [entry["text"] for entry in entries]
        return _from_texts(texts, str(path), model, tokenizer_file, samples, max_length)
    if not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("every line must be an object with a text, or with one key per input")
    inputs = inputs_of(model)
    feeds = ({name: _typed(values, inputs.get(name)) for name, values in entry.items()} for entry in entries)
    return _spooled(feeds, str(path), model, samples)


def _typed(values: object, value: ir.Value | None) -> Array:
    dtype = value.dtype.numpy() if value is not None and value.dtype is not None else None
    array = np.asarray(values, dtype=dtype)
    missing = len(value.shape) - array.ndim if value is not None and value.shape is not None else 0
    return array.reshape((1,) * max(missing, 0) + array.shape)


def _npz_feeds(path: Path, model: ir.Model, batch: int = 8) -> Iterator[Feed]:
    fixed = [value.shape[0] for value in inputs_of(model).values() if value.shape]
    batch = next((size for size in fixed if isinstance(size, int)), batch)
    loaded = np.load(path)
    if isinstance(loaded, np.ndarray):
        raise ValueError("it is one array, not an archive of arrays")
    with loaded as archive:
        arrays = {name: archive[name] for name in archive.files}
    lengths = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(lengths) > 1:
        raise ValueError(f"the arrays hold different numbers of samples: {sorted(lengths)}")
    for start in range(0, max(lengths, default=0), batch):
        yield {name: array[start : start + batch] for name, array in arrays.items()}


def _from_texts(
    texts: list[str], origin: str, model: ir.Model, tokenizer_file: Path | None, samples: int, max_length: int
) -> Calibration:
    if not texts:
        raise _empty(origin)
    if tokenizer_file is None:
        raise CalibrationError(
            "text needs a tokenizer and there is no tokenizer.json beside the model",
            where="calibration",
            remedy="put tokenizer.json beside the model, or give feeds with --calibration feeds.npz",
        )
    if is_decoder(model):
        windows = RunningText(tokenizer_file, model, max_length, "\n".join(texts)).windows(samples)
        if not windows:
            raise _empty(origin)
        return Calibration(lambda: iter(windows), len(windows), origin)
    encode = TextEncoder(tokenizer_file, model, max_length)
    chosen = [texts[index] for index in np.linspace(0, len(texts) - 1, min(samples, len(texts))).astype(int)]
    return Calibration(lambda: (encode(text) for text in chosen), len(chosen), origin)


def _spooled(feeds: Iterator[Mapping[str, Array]], origin: str, model: ir.Model, samples: int) -> Calibration:
    """Feeds that can be read only once, checked and kept on disk so that memory does not grow with their number."""
    folder = tempfile.TemporaryDirectory(prefix="scalefold-calibration-")
    inputs = inputs_of(model)
    count = 0
    for feed in feeds:
        if count == samples:
            break
        _check_feed(feed, inputs, f"sample {count} of {origin}")
        arrays: dict[str, Any] = {
            name: np.asarray(feed[name], dtype=None if value.dtype is None else value.dtype.numpy())
            for name, value in inputs.items()
        }
        np.savez(Path(folder.name) / f"{count}.npz", **arrays)
        count += 1
    if not count:
        raise _empty(origin)

    def read() -> Iterator[Feed]:
        for index in range(count):
            with np.load(Path(folder.name) / f"{index}.npz") as archive:
                yield {name: archive[name] for name in archive.files}

    return Calibration(read, count, origin)


def _empty(origin: str) -> CalibrationError:
    return CalibrationError("it holds no samples", where=origin, remedy="give at least one; 32 to 128 serve well")


def _check_feed(feed: object, inputs: Mapping[str, ir.Value], where: str) -> None:
    if not isinstance(feed, Mapping):
        raise CalibrationError(
            f"it is a {type(feed).__name__}, not a mapping of input names to arrays",
            where=where,
            remedy="give feeds such as {'input_ids': array, ...}",
        )
    takes = ", ".join(inputs)
    if unknown := [name for name in feed if name not in inputs]:
        raise CalibrationError(
            f"the model does not take {', '.join(map(str, unknown))}", where=where, remedy=f"it takes {takes}"
        )
    if missing := [name for name in inputs if name not in feed]:
        raise CalibrationError(f"it lacks {', '.join(missing)}", where=where, remedy=f"the model takes {takes}")
    for name, values in feed.items():
        try:
            array = np.asarray(values)
        except ValueError as error:
            raise CalibrationError(
                f"{name} is not an array ({error})", where=where, remedy="give rows of one length"
            ) from error
        if not array.size and name == "input_ids":
            raise CalibrationError(f"{name} holds no token", where=where, remedy="remove the sample")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise CalibrationError(
                f"{name} holds NaN or infinity", where=where, remedy="remove the sample or mend what made it"
            )
        if misfit := _misfit(array, inputs[name]):
            raise CalibrationError(f"{name} {misfit}", where=where, remedy="give what the model takes")


def _misfit(array: Array, value: ir.Value) -> str | None:
    """How an array differs from what an input takes, but for the width of its numbers."""
    dtype = array.dtype if value.dtype is None else value.dtype.numpy()
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        return f"holds {array.dtype}, not {dtype}"
    sizes = list(value.shape) if value.shape is not None else list(array.shape)
    fits = len(sizes) == array.ndim and all(
        size == found for size, found in zip(sizes, array.shape, strict=True) if isinstance(size, int)
    )
    return None if fits else f"has shape {list(array.shape)}, not {value.shape}"


def rows_of(activation: Array, mask: Array | None) -> Float:
    """The tokens of an activation as rows, padding left out.

    Args:
        activation: float32 [..., channels]; a single number is one token of one channel.
        mask: [batch, length] of the feed, 0 where a token is padding, or None.

    Returns:
        float32 [tokens, channels].
    """
    padded = mask is not None and activation.ndim == mask.ndim + 1 and activation.shape[:-1] == mask.shape
    if mask is not None and padded and not mask.all():  # without padding nothing is copied
        return np.asarray(activation[mask != 0], dtype=np.float32)
    activation = np.atleast_1d(activation)
    return np.asarray(activation.reshape(-1, activation.shape[-1]), dtype=np.float32)


def padding_mask(feed: Feed) -> Array | None:
    """The feed's attention mask when it is of shape [batch, length]; of a decoder's, the part for the new tokens."""
    mask, ids = feed.get("attention_mask"), feed.get("input_ids")
    if mask is None or mask.ndim != 2:
        return None
    return mask[:, -ids.shape[1] :] if ids is not None and ids.ndim == 2 else mask


def require_finite(name: str, rows: Float, sample: int) -> None:
    """Raise a CalibrationError when an activation's rows hold NaN or infinity."""
    if not np.isfinite(rows).all():
        raise CalibrationError(
            f"the activation {name} becomes NaN or infinite",
            where=f"calibration sample {sample}",
            remedy="check the sample, and that the float model itself gives finite outputs on it",
        )


def collect(
    model: ir.Model, requests: Requests, feeds: Iterable[Feed], advance: Callable[[], None] = lambda: None
) -> dict[str, Statistic]:
    """Stream feeds through a graph once and gather the statistics asked for.

    One feed's activations are in memory at a time.

    Args:
        model: the graph, run in float by onnxruntime.
        requests: for each value name a factory of an empty statistic.
        feeds: the samples.
        advance: called after each sample.

    Raises:
        CalibrationError: an activation is NaN or infinite.
    """
    session = Session(model, outputs=list(requests))
    gathered = {name: factory() for name, factory in requests.items()}
    for sample, feed in enumerate(feeds):
        mask = padding_mask(feed)
        for name, activation in session.run(feed).items():
            rows = rows_of(activation, mask)
            require_finite(name, rows, sample)
            gathered[name].update(rows, sample)
        advance()
    return gathered
