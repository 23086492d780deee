"""Text from a compiled decoder: greedy, or sampled by transformers' own logits processors.

The cache stays where onnxruntime wrote it: the outputs of one step are the inputs of the next as they are, and only logits
come back as numbers.

    prompt, empty cache -> logits, cache [B,H,S,D] -> token, cache -> logits, cache [B,H,S+1,D] -> ...
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from scalefold.compiler.artifact import MODEL, RECORD, read_record
from scalefold.compiler.calibrate import read_tokenizer
from scalefold.compiler.carried_prefix import carry_prefix
from scalefold.compiler.decoder import LOGITS, decoder_of, position_limit
from scalefold.compiler.errors import GraphError, SourceError, needing_packages
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.last_logits import KEPT, cut_logits
from scalefold.compiler.runtime import Array, Message, Session, faults_become

Cache = Mapping[str, onnxruntime.OrtValue]
Choose = Callable[[Array, Array], Array]
"""From the tokens so far, [B,length], and the logits of the next, [B,V], to the next tokens, [B]."""
Show = Callable[[int, str], None]
"""Told the index of a prompt, and each new piece of its text."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; else logits are divided by it and a token is drawn.
        top_k: draw only from so many of the likeliest tokens.
        top_p: draw only from the likeliest tokens that together reach this probability.
        seed: of the draws.
        processors: `LogitsProcessor`s of transformers that see the logits first, such as a repetition penalty.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    processors: Sequence[Any] = ()


@dataclass(frozen=True)
class Continuation:
    """What one prompt became.

    Attributes:
        prompt: the prompt.
        text: the new text.
        tokens: the new tokens, an end-of-text token included.
        stopped: "end" at an end-of-text token, "length" at the number of new tokens asked for, "positions" at the end of
            the position table.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    stopped: str


@dataclass(frozen=True)
class Generation:
    """What a batch of prompts became, and how long it took.

    Attributes:
        continuations: one for each prompt.
        prompt_tokens: tokens of the prompts, padding left out.
        new_tokens: tokens that were generated.
        prefill_seconds: from the prompts to their first new tokens.
        decode_seconds: for all later tokens.
        decode_steps: steps that took, one token of every prompt each.
    """

    continuations: tuple[Continuation, ...]
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    decode_steps: int

    @property
    def tokens_per_second(self) -> float:
        """New tokens after the first ones, per second of decoding; 0 when there were none."""
        later = self.new_tokens - len(self.continuations)
        return later / self.decode_seconds if later else 0.0


class CachedSession(Session):
    """A session of a decoder that passes its cache from step to step without copying it.

    Of a compiled folder the graph is changed as it is opened: it can be asked for the last logits alone (`last_logits`),
    and a prefix is part of the cache that is passed (`carried_prefix`).

    Args:
        model: the model file.
        threads: intra-op threads; 0 lets onnxruntime choose.
        as_it_is: open the file itself, which computes the logits of a whole prompt even where the last are wanted, and
            joins a prefix to the cache in every step.

    Raises:
        SourceError: it is not a decoder with a cache.
    """

    def __init__(self, model: Path, *, threads: int = 0, as_it_is: bool = False) -> None:
        try:
            opened = _Opened(model) if as_it_is else _for_generation(model)
            super().__init__(opened.source, threads=threads, quiet=False)
        except (GraphError, DecodeError, OSError):
            read_onnx(model)  # knows better what is wrong with the file
            raise
        self._cuts_logits = opened.cuts_logits
        self.decoder = decoder_of(self, str(model))
        self._prefix = None if opened.prefix is None else Session(opened.prefix, threads=1)
        self._prefix_length = next(iter(self._first(1).values())).shape()[2]

    def hold(self, arrays: Mapping[str, Array]) -> Cache:
        """Arrays, such as those of a cache, as onnxruntime's own values."""
        own = onnxruntime.OrtValue.ortvalue_from_numpy
        return {name: own(np.ascontiguousarray(array)) for name, array in arrays.items()}

    def step(self, ids: Array, mask: Array | None, cache: Cache, *, last: bool = False) -> tuple[Array, Cache]:
        """Run tokens behind a cache.

        Args:
            ids: [B,S].
            mask: [B,P+S]; see `Decoder.prompt_feed`.
            cache: P positions, from the step before, or from `hold` where there are none yet.
            last: only the logits of the last token are wanted, which spares a prompt the others; see `last_logits`.

        Returns:
            the logits, [B,S,V], or where `last` is asked for [B,1,V], and the cache of P + S positions, and of the prefix
            where it is part of the cache.

        Raises:
            SourceError: the cache or the mask has a wrong shape, or the tokens are none of the model's.
        """
        length = self.decoder.check_cache({name: tuple(value.shape()) for name, value in cache.items()}, len(ids))
        if length:
            length -= self._prefix_length
        else:
            cache = self._first(len(ids))
        feed = {**self.hold(self.decoder.token_feed(ids, mask, length)), **cache}
        if last and self._cuts_logits and ids.shape[1] > 1:
            feed |= self.hold({KEPT: np.array([1], dtype=np.int64)})
        with faults_become(_cannot_run):
            logits, *grown = self._session.run_with_ort_values([LOGITS, *self.decoder.outputs.values()], feed)
        found = logits.numpy()
        return found[:, -1:] if last else found, dict(zip(self.decoder.outputs, grown, strict=True))

    def _first(self, batch: int) -> Cache:
        """The cache that a sequence begins with: empty, or the prefix."""
        if self._prefix is None:
            return self.hold(self.decoder.empty_cache(batch))
        ids = np.zeros((batch, 1), dtype=self.decoder.tokens["input_ids"].dtype)
        return self.hold(self._prefix.run({"input_ids": ids}))


def _output_layer_input(folder: Path) -> str | None:
    """What the output layer reads where it can be cut, as the record of a compiled folder has it."""
    found = read_record(folder).get("output_layer_input")
    return found if isinstance(found, str) else None


@dataclass(frozen=True)
class _Opened:
    """A model as it is opened for generation.

    Attributes:
        source: what onnxruntime opens.
        cuts_logits: whether it can be asked for the last logits alone.
        prefix: the graph of the prefix that its cache begins with.
    """

    source: Message | Path
    cuts_logits: bool = False
    prefix: Message | None = None


def _for_generation(path: Path) -> _Opened:
    """A compiled model with what spares `CachedSession` work; any other file as it is."""
    if not (path.parent / RECORD).is_file():
        return _Opened(path)
    model, folder, reads = onnx.load(str(path), load_external_data=False), path.parent, _output_layer_input(path.parent)
    cuts_logits = reads is not None and cut_logits(model, reads)
    prefix = carry_prefix(model)
    if not cuts_logits and prefix is None:
        return _Opened(path)
    first = None if prefix is None else Message(prefix.SerializeToString(), folder)
    return _Opened(Message(model.SerializeToString(), folder), cuts_logits, first)


def _cannot_run(said: str) -> SourceError:
    return SourceError(
        f"onnxruntime cannot run these tokens ({said})",
        where="the decoder",
        remedy="check that the tokenizer is the model's own",
    )


@dataclass
class _Row:
    """One prompt while it is being continued."""

    prompt: str
    tokens: list[int] = field(default_factory=list)
    shown: str = ""
    stopped: str = ""
    stream: DecodeStream = field(default_factory=lambda: DecodeStream(skip_special_tokens=True))


class Generator:
    """A compiled decoder that is open for generation.

    Args:
        folder: a compiled folder, or an `.onnx` file with tokenizer.json beside it.
        threads: intra-op threads; 0 lets onnxruntime choose.

    Raises:
        SourceError: the model or the tokenizer is missing, or the model is not a decoder.
    """

    def __init__(self, folder: Path, *, threads: int = 0) -> None:
        model = folder / MODEL if folder.is_dir() else folder
        for path in (model, model.with_name("tokenizer.json")):
            if not path.is_file():
                raise SourceError(f"there is no {path.name} in it", where=str(folder), remedy="give a compiled folder")
        self.session = CachedSession(model, threads=threads)
        self.tokenizer: Tokenizer = read_tokenizer(model.with_name("tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.limit = position_limit(model.parent)
        self.ends = _end_tokens(model.parent)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        show: Show = lambda index, text: None,
    ) -> Generation:
        """Continue a batch of prompts, padded on the left to the longest.

        Args:
            prompts: at least one.
            max_new_tokens: for each prompt.
            sampling: how tokens are chosen; the likeliest ones when None.
            show: is told each piece of text as soon as it is there.

        Raises:
            SourceError: an option is out of range, a prompt is empty or longer than the position table, or sampling is
                asked for and transformers is not installed.
        """
        choose = chooser(sampling or Sampling())
        if max_new_tokens < 1:
            raise SourceError("it must be at least 1", where="--max-new-tokens", remedy="give a larger number")
        seen, mask = self._padded(prompts)
        prompt_tokens = int(mask.sum())
        room = max_new_tokens if self.limit is None else min(max_new_tokens, self.limit - seen.shape[1] + 1)
        rows = [_Row(prompt) for prompt in prompts]
        cache = self.session.hold(self.session.decoder.empty_cache(len(rows)))
        step, marks = seen, [time.perf_counter()]
        while len(marks) <= room and not all(row.stopped for row in rows):
            logits, cache = self.session.step(step, mask, cache, last=True)
            step = choose(seen, logits[:, -1])[:, None]
            self._extend(rows, step[:, 0], show)
            seen = np.concatenate([seen, step], axis=1)
            mask = np.concatenate([mask, np.ones_like(step)], axis=1)
            marks.append(time.perf_counter())
        last = "length" if room == max_new_tokens else "positions"
        return Generation(
            continuations=tuple(self._finished(index, row, last, show) for index, row in enumerate(rows)),
            prompt_tokens=prompt_tokens,
            new_tokens=sum(len(row.tokens) for row in rows),
            prefill_seconds=marks[1] - marks[0],
            decode_seconds=marks[-1] - marks[1],
            decode_steps=len(marks) - 2,
        )

    def _padded(self, prompts: Sequence[str]) -> tuple[Array, Array]:
        """Ids and mask of the prompts, [B,S]."""
        encoded = [self.tokenizer.encode(prompt).ids for prompt in prompts]
        if not encoded or not all(encoded):
            raise SourceError("there are no tokens in it", where="the prompt", remedy="give some text")
        longest = max(map(len, encoded))
        if self.limit is not None and longest > self.limit:
            raise SourceError(
                f"it is {longest} tokens long and the model's position table holds {self.limit}",
                where="the prompt",
                remedy="give a shorter one",
            )
        pads = [longest - len(ids) for ids in encoded]
        ids = np.asarray([[0] * pad + entry for pad, entry in zip(pads, encoded, strict=True)], dtype=np.int64)
        mask = np.asarray([[0] * pad + [1] * (longest - pad) for pad in pads], dtype=np.int64)
        return ids, mask

    def _extend(self, rows: Sequence[_Row], chosen: Array, show: Show) -> None:
        """Add a token to every row that has not ended; a row that has is run on, and not looked at."""
        for index, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            if row.stopped:
                continue
            row.tokens.append(token)
            if token in self.ends:
                row.stopped = "end"
            elif piece := row.stream.step(self.tokenizer, token):
                row.shown += piece
                show(index, piece)

    def _finished(self, index: int, row: _Row, last: str, show: Show) -> Continuation:
        text = self.tokenizer.decode(row.tokens, skip_special_tokens=True)
        if text.startswith(row.shown) and (rest := text[len(row.shown) :]):
            show(index, rest)  # bytes that make no whole character
        return Continuation(row.prompt, text, tuple(row.tokens), row.stopped or last)


def chooser(sampling: Sampling) -> Choose:
    """What picks the next tokens.

    Raises:
        SourceError: an option is out of range, or sampling is asked for and transformers is not installed.
    """
    _check(sampling)
    if sampling.temperature == 0 and not sampling.processors:
        return lambda seen, logits: np.asarray(logits.argmax(axis=1))
    with needing_packages("sampling", "pip install 'scalefold[hf]', or take the likeliest token with --temperature 0"):
        torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    processors = transformers.LogitsProcessorList(sampling.processors)
    if sampling.temperature not in (0, 1):
        processors.append(transformers.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        processors.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        processors.append(transformers.TopPLogitsWarper(sampling.top_p))
    generator = torch.Generator().manual_seed(sampling.seed)

    def choose(seen: Array, logits: Array) -> Array:
        scores = processors(torch.from_numpy(seen), torch.from_numpy(logits).float())
        if sampling.temperature == 0:
            chosen = scores.argmax(dim=1)
        else:
            chosen = torch.multinomial(scores.softmax(dim=1), 1, generator=generator)[:, 0]
        return np.asarray(chosen.numpy())

    return choose


def _check(sampling: Sampling) -> None:
    narrowed = sampling.top_k is not None or sampling.top_p is not None
    faults = (
        (not sampling.temperature >= 0, "--temperature", "it must be 0 or more", "0 takes the likeliest token"),
        (sampling.top_k is not None and sampling.top_k < 1, "--top-k", "it must be at least 1", "give a larger number"),
        (
            sampling.top_p is not None and not 0 < sampling.top_p <= 1,
            "--top-p",
            "it must be above 0 and at most 1",
            "0.9 is usual",
        ),
        (
            narrowed and sampling.temperature == 0,
            "--top-k and --top-p",
            "they have no part in taking the likeliest token",
            "give --temperature too",
        ),
    )
    for wrong, where, what, remedy in faults:
        if wrong:
            raise SourceError(what, where=where, remedy=remedy)


def _end_tokens(folder: Path) -> frozenset[int]:
    """The end-of-text tokens that generation_config.json names, or else config.json."""
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))["eos_token_id"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()
