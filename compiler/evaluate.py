"""Metrics of a compiled model, and of the float model beside it.

sts             Spearman's rank correlation with people's judgement of similarity
perplexity      of running text, in windows
agreement       next-token agreement with the float model, and KL divergence from it, on the same windows
masked          accuracy on masked tokens
classification  accuracy on labelled texts, and agreement with the float model
fidelity        cosine and error of every output against the float model
"""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from tokenizers import Tokenizer

from scalefold.compiler.artifact import MODEL
from scalefold.compiler.calibrate import TEXT_INPUTS, TextEncoder, read_tokenizer
from scalefold.compiler.decoder import LOGITS, Decoder, decoder_of, log_softmax, position_limit
from scalefold.compiler.driver import open_source
from scalefold.compiler.errors import CalibrationError, SourceError, needing_packages
from scalefold.compiler.protocol import Progress, silent
from scalefold.compiler.runtime import Array, Feed, Session, inputs_of
from scalefold.compiler.text_file import numbered_lines, read_text
from scalefold.compiler.verify import Fidelity, fidelity, other_model, require_same_shape

Embeddings = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Facts = dict[str, float | int | str]

ROWS = 64
"""Rows of logits whose probabilities are in memory at a time, in float64."""
MASKED_SHARE = 0.15
LONGEST_TEXT = 512
"""Tokens of a text that is masked or classified; fewer where the position table is shorter."""


@dataclass(frozen=True)
class Request:
    """What to measure, and on what.

    Attributes:
        folder: a compiled folder, or an `.onnx` file with tokenizer.json beside it.
        data: the file of texts; each metric says which form.
        against: the float model, as `compile_model` takes it, or None.
        window: tokens of a window of running text.
        stride: tokens from one window to the next; the window when None, so that windows do not overlap.
        windows: how many windows to take, from the first; all when None.
        seed: of the choice of the tokens that are masked.
        progress: opens progress bars.
    """

    folder: Path
    data: Path
    against: str | None = None
    window: int = 512
    stride: int | None = None
    windows: int | None = None
    seed: int = 0
    progress: Progress = silent


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
    spearmanr = _spearmanr()
    first, second = embeddings[: len(pairs)], embeddings[len(pairs) :]
    return 100 * float(spearmanr((first * second).sum(axis=1), [pair.score for pair in pairs]).statistic)


def _spearmanr() -> Any:
    with needing_packages("Spearman's correlation", "pip install scipy, or choose another metric with --metric"):
        return importlib.import_module("scipy.stats").spearmanr


def sts(request: Request) -> Facts:
    """Spearman's correlation x 100 on a file of the STS benchmark, and the cosine to the float model's embeddings."""
    _spearmanr()  # before the work is done
    pairs = read_pairs(request.data)
    sentences = [pair.first for pair in pairs] + [pair.second for pair in pairs]
    session, tokenizer = open_folder(request.folder)
    steps = -(-len(sentences) // 16)
    with request.progress("embedding", steps) as advance:
        got = embed(session, tokenizer, sentences, advance)
    facts: Facts = {"pairs": len(pairs), "spearman": spearman(pairs, got)}
    with _original(request, "feature-extraction") as original:
        if original is not None:
            with request.progress("embedding in float", steps) as advance:
                wanted = embed(original, tokenizer, sentences, advance)
            require_same_shape(wanted, got)
            cosines = (wanted * got).sum(axis=1)
            facts |= {"float_spearman": spearman(pairs, wanted)}
            facts |= {"mean_cosine": float(cosines.mean()), "min_cosine": float(cosines.min())}
    return facts


def text_fidelity(request: Request) -> Facts:
    """Cosine and error of every output against the float model, on texts, one a line."""
    against = _required(request, "fidelity")
    texts = [line for _, line in _lines(request.data) if len(line.split()) >= 4]
    if not texts:
        raise CalibrationError(
            "none of its lines has four words", where=str(request.data), remedy="give one text a line"
        )
    progress = request.progress
    with open_source(against, progress=progress) as original, progress("comparing", len(texts)) as advance:
        found = compare_on_text(original, request.folder, texts, advance)
    if not found:
        raise other_model("it has no output of a name that the compiled model has")
    facts: Facts = {"samples": len(texts)}
    for entry in found:
        facts |= {f"{entry.name} {name}": value for name, value in asdict(entry).items() if name != "name"}
    return facts


def perplexity(request: Request) -> Facts:
    """Perplexity of running text, and the float model's beside it."""
    facts, sums = _language(request)
    facts["perplexity"] = math.exp(sums[0])
    if request.against is not None:
        facts["float_perplexity"] = math.exp(sums[1])
        facts["ratio"] = math.exp(sums[0] - sums[1])
    return facts


def agreement(request: Request) -> Facts:
    """How often the likeliest next token is the float model's, and the mean KL divergence from the float model."""
    _required(request, "agreement")
    facts, sums = _language(request)
    return facts | {"next_token_agreement": float(sums[2]), "kl_divergence_nats": float(sums[3])}


@dataclass(frozen=True)
class Window:
    """A piece of running text.

    Attributes:
        ids: its tokens.
        scored: index of the first token that is scored; those before it are context.
    """

    ids: Array
    scored: int


def windows_of(ids: Array, size: int, stride: int, count: int | None = None) -> list[Window]:
    """Cut running text into whole windows; what is left at the end is dropped.

    A window's first token has nothing to be predicted from, and is never scored. Where windows overlap, each scores only
    what the windows before it have not: every other token is scored once.
    """
    starts = list(range(0, len(ids) - size + 1, stride))[:count]
    return [Window(ids[start : start + size], size - stride if start and stride < size else 1) for start in starts]


def score(logits: Array, window: Window, wanted: Array | None = None) -> Doubles:
    """Sums over the scored tokens of a window.

    Args:
        logits: [tokens, vocabulary].
        window: the tokens that were run.
        wanted: the float model's logits.

    Returns:
        the negative log-likelihood in nats, the float model's, the number of equal likeliest tokens, and the KL
        divergence from the float model, sum of p log(p / q); the last three are 0 without `wanted`.
    """
    sums = np.zeros(4)
    for start in range(window.scored, len(window.ids), ROWS):
        targets = window.ids[start : start + ROWS]
        rows = slice(start - 1, start - 1 + len(targets))  # the row before a token predicts it
        q = log_softmax(logits[rows])
        sums[0] -= q[np.arange(len(targets)), targets].sum()
        if wanted is not None:
            p = log_softmax(wanted[rows])
            sums[1] -= p[np.arange(len(targets)), targets].sum()
            sums[2] += (p.argmax(axis=1) == q.argmax(axis=1)).sum()
            sums[3] += (np.exp(p) * (p - q)).sum()
    return sums


def _language(request: Request) -> tuple[Facts, Doubles]:
    """The windows, and the means of `score` over their scored tokens; one window is run at a time."""
    session, tokenizer_file = open_folder(request.folder)
    decoder = decoder_of(session, str(request.folder))
    stride = _stride(request)
    ids = np.asarray(read_tokenizer(tokenizer_file).encode(read_text(request.data), add_special_tokens=False).ids)
    windows = windows_of(ids, request.window, stride, request.windows)
    if not windows:
        raise CalibrationError(
            f"it holds {len(ids)} tokens, too few for one window of {request.window}",
            where=str(request.data),
            remedy="give a longer text, or a smaller --window",
        )
    sums = np.zeros(4)
    with (
        _original(request, "causal-lm") as original,
        request.progress("reading windows", len(windows)) as advance,
    ):
        float_decoder = None if original is None else decoder_of(original, "the float model")
        for window in windows:
            logits = _logits(session, decoder, window)
            wanted = None
            if original is not None and float_decoder is not None:
                wanted = _logits(original, float_decoder, window)
                require_same_shape(wanted, logits)
            sums += score(logits, window, wanted)
            advance()
    scored = sum(len(window.ids) - window.scored for window in windows)
    facts: Facts = {"tokens": len(ids), "windows": len(windows), "window": request.window, "stride": stride}
    return facts | {"scored_tokens": scored}, sums / scored


def _stride(request: Request) -> int:
    """The stride, when it and the window fit each other and the model."""
    stride = request.window if request.stride is None else request.stride
    if request.window < 2 or not 1 <= stride <= request.window or (request.windows is not None and request.windows < 1):
        raise SourceError(
            f"a window of {request.window} tokens with a stride of {stride} cannot be scored",
            where="--window, --stride and --windows",
            remedy="give a window of at least 2, a stride from 1 to the window, and at least 1 window",
        )
    limit = position_limit(_place(request.folder))
    if limit is not None and request.window > limit:
        raise SourceError(
            f"its position table holds {limit} positions, fewer than a window of {request.window}",
            where=str(request.folder),
            remedy=f"give --window {limit} or less",
        )
    return stride


def _logits(session: Session, decoder: Decoder, window: Window) -> Array:
    """Logits [tokens, vocabulary] of a window that has nothing before it."""
    logits: Array = session.run(decoder.prompt_feed(window.ids[None]))[LOGITS][0]
    return logits


def masked(request: Request) -> Facts:
    """Accuracy on tokens that are masked out, 15 % of each text; texts come one a line.

    The tokens are drawn without replacement from those that are not special, at least one of each text, by one generator
    for the whole file. Each is replaced by the mask token; none is kept or made another one.
    """
    texts = [line for _, line in _lines(request.data)]
    hits: list[Array] = []
    chosen: list[Array] = []
    with _classifiers(request, "masked-lm") as (run, tokenizer):
        mask = _mask_token(tokenizer, _place(request.folder))
        generator = np.random.default_rng(request.seed)
        with request.progress("filling masks", len(texts)) as advance:
            for text in texts:
                encoding = tokenizer.encode(text)
                ids = np.asarray(encoding.ids, dtype=np.int64)
                places = np.flatnonzero(np.asarray(encoding.special_tokens_mask) == 0)
                places = generator.permutation(places)[: max(1, round(MASKED_SHARE * len(places)))]
                hidden = ids.copy()
                hidden[places] = mask
                found = run(hidden, encoding.type_ids, (len(ids), tokenizer.get_vocab_size()))
                chosen.append(np.stack([logits[places].argmax(axis=-1) for logits in found]))
                hits.append(ids[places])
                advance()
    facts: Facts = {"texts": len(texts), "masked_tokens": sum(map(len, hits)), "seed": request.seed}
    return facts | _rates(np.concatenate(chosen, axis=1), np.concatenate(hits))


def classification(request: Request) -> Facts:
    """Accuracy on labelled texts, and agreement with the float model; without labels agreement alone.

    The file has one text a line with its label behind a tab, or JSON lines with `text` and `label`. A label is a number, or
    a name that config.json lists in `id2label`.
    """
    samples = _labelled(request.data, _place(request.folder))
    labels = None if any(label is None for _, label in samples) else np.asarray([label for _, label in samples])
    if labels is None:
        _required(request, "classification", "give it with --against, or give every text a label")
    chosen: list[Array] = []
    with (
        _classifiers(request, "sequence-classification") as (run, tokenizer),
        request.progress("classifying", len(samples)) as advance,
    ):
        for text, _ in samples:
            encoding = tokenizer.encode(text)
            found = run(np.asarray(encoding.ids, dtype=np.int64), encoding.type_ids, (None,))
            chosen.append(np.stack([logits.argmax() for logits in found]))
            advance()
    facts: Facts = {"texts": len(samples)}
    return facts | _rates(np.stack(chosen, axis=1), labels)


def _rates(chosen: Array, truth: Array | None) -> Facts:
    """Accuracy of the model, and of the float model in the second row of `chosen` [1 or 2, decisions]."""
    facts: Facts = {}
    if truth is not None:
        facts["accuracy"] = float((chosen[0] == truth).mean())
    if len(chosen) == 2:
        if truth is not None:
            facts["float_accuracy"] = float((chosen[1] == truth).mean())
        facts["agreement"] = float((chosen[0] == chosen[1]).mean())
    return facts


Run = Callable[[Array, Sequence[int], tuple[int | None, ...]], list[Array]]
"""From the ids and types of one text and the shape its logits must have, to the logits of each model."""


@contextmanager
def _classifiers(request: Request, task: str) -> Iterator[tuple[Run, Tokenizer]]:
    """What runs one text through the compiled model, and through the float model where there is one."""
    session, tokenizer_file = open_folder(request.folder)
    tokenizer = read_tokenizer(tokenizer_file)
    tokenizer.no_padding()
    tokenizer.enable_truncation(min(LONGEST_TEXT, position_limit(_place(request.folder)) or LONGEST_TEXT))
    with _original(request, task) as original:
        sessions = [session] if original is None else [session, original]
        for entry in sessions:
            if set(entry.inputs) - TEXT_INPUTS or LOGITS not in entry.outputs:
                raise _another_kind(task)

        def run(ids: Array, types: Sequence[int], shape: tuple[int | None, ...]) -> list[Array]:
            feed = _text_feed(ids, types)
            found = [entry.run(feed)[LOGITS][0] for entry in sessions]
            for logits in found:
                if _misfits(logits, shape):
                    raise _another_kind(task)
                require_same_shape(logits, found[0])
            return found

        yield run, tokenizer


def _misfits(logits: Array, shape: tuple[int | None, ...]) -> bool:
    if logits.ndim != len(shape):
        return True
    # a table of embeddings may be longer than the vocabulary, never shorter
    return any(wanted is not None and found < wanted for found, wanted in zip(logits.shape, shape, strict=True))


def _another_kind(task: str) -> SourceError:
    return SourceError(
        "it does not give the logits that this metric needs",
        where="the model",
        remedy=f"compile with --task {task}, and give the same model to --against",
    )


def _text_feed(ids: Array, types: Sequence[int]) -> Feed:
    return {
        "input_ids": ids[None],
        "attention_mask": np.ones((1, len(ids)), dtype=np.int64),
        "token_type_ids": np.asarray([types], dtype=np.int64),
        "position_ids": np.arange(len(ids), dtype=np.int64)[None],
    }


def _mask_token(tokenizer: Tokenizer, folder: Path) -> int:
    """The id of the mask token that tokenizer_config.json names, or of one of the usual names."""
    named = _json_of(folder / "tokenizer_config.json").get("mask_token")
    named = named.get("content") if isinstance(named, dict) else named
    found = (tokenizer.token_to_id(name) for name in (named, "[MASK]", "<mask>") if isinstance(name, str))
    token = next((index for index in found if index is not None), None)
    if token is None:
        raise SourceError(
            "its tokenizer has no mask token", where=str(folder), remedy="this metric needs a masked language model"
        )
    return token


def _labelled(path: Path, folder: Path) -> list[tuple[str, int | None]]:
    """Texts and labels; the label is None where a line has none."""
    names = {str(name): int(index) for index, name in _json_of(folder / "config.json").get("id2label", {}).items()}
    samples: list[tuple[str, int | None]] = []
    for number, line in _lines(path):
        try:
            if path.suffix in (".jsonl", ".ndjson"):
                entry = json.loads(line)
                text, label = entry["text"], entry.get("label")
            else:
                text, tab, label = line.rpartition("\t")
                text, label = (text, label) if tab else (line, None)
            if not isinstance(text, str) or isinstance(label, float):
                raise ValueError(f"{text!r} is no text" if not isinstance(text, str) else f"{label} is no label")
            index = None if label is None else names.get(str(label))
            samples.append((text, int(label) if label is not None and index is None else index))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CalibrationError(
                f"line {number} is not a text with a label ({error})",
                where=str(path),
                remedy="give text, tab, label a line, or JSON lines with text and label; a label is a number or a name",
            ) from error
    return samples


def _json_of(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _place(folder: Path) -> Path:
    return folder if folder.is_dir() else folder.parent


def _lines(path: Path) -> list[tuple[int, str]]:
    lines = numbered_lines(read_text(path))
    if not lines:
        raise CalibrationError("it holds no texts", where=str(path), remedy="give one text a line")
    return lines


def _required(request: Request, metric: str, remedy: str = "give it with --against") -> str:
    if request.against is None:
        raise SourceError(f"the {metric} metric needs the float model", where="eval", remedy=remedy)
    return request.against


@contextmanager
def _original(request: Request, task: str | None) -> Iterator[Session | None]:
    """A session of the float model where one is given."""
    if request.against is None:
        yield None
        return
    with open_source(request.against, task=task, progress=request.progress) as original:
        yield Session(original)


def compare_on_text(
    original: ir.Model, folder: Path, texts: Sequence[str], advance: Callable[[], None]
) -> list[Fidelity]:
    """The outputs of a compiled folder against a float graph, on texts of any length up to 128 tokens."""
    session, tokenizer = open_folder(folder)
    encode = TextEncoder(tokenizer, original, min(128, position_limit(folder) or 128))

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
    first, second = itertools.tee(feeds())
    return fidelity(map(Session(original, lean=True).run, first), session, second)


METRICS: dict[str, Callable[[Request], Facts]] = {
    "sts": sts,
    "perplexity": perplexity,
    "agreement": agreement,
    "masked": masked,
    "classification": classification,
    "fidelity": text_fidelity,
}
