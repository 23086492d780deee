"""The models behind `server.py`: what a request may hold, what is refused and how, and how it is run.

A refusal is an HTTP status and one sentence. onnxruntime converts and checks little by itself: int32 ids are an exception
of its own there, and an id outside the vocabulary one from the middle of the graph; here both are the client's fault.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from tokenizers import Tokenizer

from scalefold.compiler import AdapterSession, load
from scalefold.compiler.artifact import MODEL
from scalefold.compiler.decoder import LOGITS, decoder_of, position_limit
from scalefold.compiler.errors import SourceError
from scalefold.compiler.kernel_library import register_beside
from scalefold.compiler.runtime import Array, Feed, session_options
from scalefold.compiler.serving import base_digest, read_adapter

Run = Callable[[list[str], Feed, str | None], list[Array]]

MAX_BATCH = 64
MAX_TEXT_TOKENS = 128
"""Longer texts are cut, as sentence-transformers cuts them for MiniLM."""
MAX_NEW_TOKENS = 256
BAD_REQUEST, NOT_FOUND, TOO_LARGE = 400, 404, 413


class RefusedError(Exception):
    """A request that is not served.

    Args:
        status: of HTTP.
        sentence: what is wrong and what would be right.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence


def check_adapters(folder: Path, adapters: Mapping[str, Path]) -> None:
    """Check that a model is there and its adapters are its own, without loading it.

    Raises:
        ScalefoldError: the first that is wrong.
    """
    if not (folder / MODEL).is_file():
        raise SourceError(f"there is no {MODEL} in it", where=str(folder), remedy="give a compiled folder")
    for adapter in adapters.values():
        if read_adapter(adapter).base != base_digest(folder):
            remedy = "give the base it was tuned on"
            raise SourceError(f"it was tuned on another model than {folder}", where=str(adapter), remedy=remedy)


class Served:
    """A session of a folder with its adapters, which every request chooses from.

    Args:
        folder: a compiled folder, or a fused one or a float export when there are no adapters.
        adapters: folders that `scalefold tune --train scales` wrote, by the name that requests use.
        threads: intra-op threads; 0 lets onnxruntime choose.

    Raises:
        ScalefoldError: a folder cannot be read, or an adapter is another model's.
    """

    def __init__(self, folder: Path, adapters: Mapping[str, Path], threads: int) -> None:
        options = session_options(threads=threads)
        register_beside(options, folder)
        self.adapters = frozenset(adapters)
        if not adapters:  # a float export has no scales that an adapter could change
            plain = load(folder, options=options)
            self._run: Run = lambda outputs, feed, adapter: plain.run(outputs, feed)
            return
        session = AdapterSession(folder, options=options)
        for name, adapter in adapters.items():
            session.add(name, adapter)
        self._run = session.run

    def run(self, outputs: list[str], feed: Feed, adapter: str | None) -> list[Array]:
        """Run one feed by an adapter, or by the model as it was compiled."""
        return self._run(outputs, feed, adapter)

    def adapter_of(self, request: Mapping[str, Any]) -> str | None:
        """The adapter that a request names.

        Raises:
            RefusedError: the session has none of that name.
        """
        name = request.get("adapter")
        if name is not None and (not isinstance(name, str) or name not in self.adapters):
            known = ", ".join(sorted(self.adapters)) or "none"
            raise RefusedError(NOT_FOUND, f"There is no adapter {name!r}; this model has: {known}.")
        return name


class EmbeddingModel:
    """Sentence embeddings: the mean of the token states, at length 1.

    Args: as of `Served`.
    """

    def __init__(self, folder: Path, adapters: Mapping[str, Path], threads: int = 0) -> None:
        self._served = Served(folder, adapters, threads)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(MAX_TEXT_TOKENS)
        self._tokenizer.enable_padding()
        self._limit = position_limit(folder) or MAX_TEXT_TOKENS
        self._vocabulary = _vocabulary(folder)

    def prepare(self, request: Mapping[str, Any]) -> tuple[Feed, str | None]:
        """The feed and the adapter of a request.

        It holds either `texts`, or `inputs`: tensors of the Open Inference Protocol with name, datatype, shape and data.

        Raises:
            RefusedError: it is not served.
        """
        adapter = self._served.adapter_of(request)
        if "texts" in request:
            return self._encoded(request["texts"]), adapter
        if "inputs" in request:
            return self._given(request["inputs"]), adapter
        raise RefusedError(BAD_REQUEST, "The request has neither `texts` nor `inputs`; send one of them.")

    def embed(self, feed: Feed, adapter: str | None) -> list[list[float]]:
        """One embedding for each row of the feed."""
        states = self._served.run(["last_hidden_state"], feed, adapter)[0]
        weights = feed["attention_mask"][..., None].astype(np.float32)
        means = (states * weights).sum(axis=1) / weights.sum(axis=1)
        found: list[list[float]] = (means / np.linalg.norm(means, axis=1, keepdims=True)).tolist()
        return found

    def _encoded(self, texts: Any) -> Feed:
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise RefusedError(BAD_REQUEST, "`texts` is not a list of at least one string; send such a list.")
        _check_batch(len(texts))
        encoded = self._tokenizer.encode_batch(texts)
        rows = [(entry.ids, entry.attention_mask, entry.type_ids) for entry in encoded]
        names = ("input_ids", "attention_mask", "token_type_ids")
        return {name: np.array(row, dtype=np.int64) for name, row in zip(names, zip(*rows, strict=True), strict=True)}

    def _given(self, tensors: Any) -> Feed:
        if not isinstance(tensors, list) or not all(isinstance(tensor, dict) for tensor in tensors):
            raise RefusedError(
                BAD_REQUEST, "`inputs` is not a list of tensors; send name, datatype, shape and data of each."
            )
        given = {str(tensor.get("name")): _tensor(tensor) for tensor in tensors}
        if "input_ids" not in given or not given.keys() <= {"input_ids", "attention_mask"}:
            raise RefusedError(BAD_REQUEST, "`inputs` must hold input_ids, may hold attention_mask, and nothing else.")
        ids = given["input_ids"]
        mask = given.get("attention_mask", np.ones_like(ids))
        _check_batch(len(ids))
        self._check_ids(ids)
        if mask.shape != ids.shape or not np.isin(mask, (0, 1)).all() or not mask.any(axis=1).all():
            raise RefusedError(BAD_REQUEST, "attention_mask must be 0 or 1 for every id, and 1 at least once a row.")
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}

    def _check_ids(self, ids: Array) -> None:
        if ids.shape[1] > self._limit:
            raise RefusedError(
                TOO_LARGE,
                f"The rows are {ids.shape[1]} tokens long and the model takes {self._limit}; send shorter ones.",
            )
        if ids.min() < 0 or ids.max() >= self._vocabulary:
            raise RefusedError(
                BAD_REQUEST, f"input_ids must be from 0 to {self._vocabulary - 1}, the model's vocabulary."
            )


class GenerationModel:
    """A decoder that continues a prompt with its likeliest tokens.

    Args: as of `Served`.
    """

    def __init__(self, folder: Path, adapters: Mapping[str, Path], threads: int = 0) -> None:
        self._served = Served(folder, adapters, threads)
        self._decoder = decoder_of(ir.load(folder / MODEL), str(folder))
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._limit = position_limit(folder)
        self._ends = _ends(folder)

    def prepare(self, request: Mapping[str, Any]) -> tuple[list[int], int, str | None]:
        """The prompt's tokens, how many may follow, and the adapter.

        Raises:
            RefusedError: the request is not served.
        """
        adapter = self._served.adapter_of(request)
        prompt, new = request.get("prompt"), request.get("max_new_tokens", 16)
        if not isinstance(prompt, str) or not (ids := self._tokenizer.encode(prompt).ids):
            raise RefusedError(BAD_REQUEST, "`prompt` is not a text of at least one token; send some text.")
        if not isinstance(new, int) or not 1 <= new <= MAX_NEW_TOKENS:
            raise RefusedError(
                BAD_REQUEST, f"`max_new_tokens` is not a number from 1 to {MAX_NEW_TOKENS}; send such a number."
            )
        if self._limit is not None and len(ids) + new > self._limit:
            raise RefusedError(
                TOO_LARGE,
                f"The prompt is {len(ids)} tokens long and {new} are to follow, where the model has room for {self._limit};"
                " send a shorter one.",
            )
        return ids, new, adapter

    def generate(self, ids: Sequence[int], new: int, adapter: str | None) -> dict[str, Any]:
        """The text that follows, and its tokens."""
        names, cache, step = [LOGITS, *self._decoder.outputs.values()], None, list(ids)
        tokens: list[int] = []
        while len(tokens) < new:
            feed = self._decoder.prompt_feed(np.array([step], dtype=np.int64), past=cache)
            outputs = dict(zip(names, self._served.run(names, feed, adapter), strict=True))
            cache, step = self._decoder.next_cache(outputs), [int(outputs[LOGITS][0, -1].argmax())]
            if step[0] in self._ends:
                break
            tokens += step
        return {"text": self._tokenizer.decode(tokens), "tokens": tokens}


def _check_batch(size: int) -> None:
    if size > MAX_BATCH:
        raise RefusedError(TOO_LARGE, f"The batch has {size} rows and at most {MAX_BATCH} are taken; send it in parts.")


def _tensor(tensor: Mapping[str, Any]) -> Array:
    """A tensor [B,S] of the Open Inference Protocol, its data flat or nested."""
    name, kind = tensor.get("name"), tensor.get("datatype")
    if kind != "INT64":
        raise RefusedError(
            BAD_REQUEST, f"{name} is {kind} and the model takes INT64; convert it, for the server does not."
        )
    try:
        array = np.array(tensor["data"])
        rows, length = (int(size) for size in tensor["shape"])
        if array.dtype.kind != "i" or min(rows, length) < 1:
            raise ValueError
        return array.reshape(rows, length).astype(np.int64)
    except (KeyError, TypeError, ValueError):
        raise RefusedError(
            BAD_REQUEST, f"The data of {name} are not integers that fill its shape [batch, tokens]."
        ) from None


def _vocabulary(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])


def _ends(folder: Path) -> frozenset[int]:
    found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
    return frozenset(found if isinstance(found, list) else [found])
