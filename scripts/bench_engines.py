"""How the child processes of the benchmarks load and run a model on each engine.

Only numpy is imported at the top: most engines live in environments of their own, and none of them has scalefold but
onnxruntime's. An encoder is a function from a feed to its first output. A decoder is a `Decoder`.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Feed = dict[str, Array]
Encode = Callable[[Feed], Array]
CONTEXT = 640
"""Positions that engines which reserve their cache are opened with, for each sequence."""
KERNELS = "scalefold_kernels.so"
"""The library that lies beside a fused model."""
BATCH = 8
"""Most sequences that such engines are opened for."""


class Decoder(Protocol):
    """A decoder that is open on some engine."""

    def seconds(self, prompt: Array, new: int) -> float:
        """Time a prompt [B,S] behind an empty cache, or the `new` likeliest tokens of each sequence behind it.

        A prompt is done when the token after it can be chosen; `new` tokens take as many steps of one token each, and
        the prompt before them is not counted.
        """

    def logits(self, ids: Array) -> Array:
        """The logits [S,V] of one sequence [S] behind an empty cache."""


def bring_in(engine: str) -> None:
    """Import what an engine needs, which is no part of loading a model."""
    modules = {
        "onnxruntime": ("onnxruntime", "scalefold.compiler.generate"),
        "openvino": ("openvino",),
        "ctranslate2": ("ctranslate2",),
        "llama.cpp": ("llama_cpp",),
        "genai": ("onnxruntime_genai",),
    }
    for name in modules[engine]:
        importlib.import_module(name)


def encoder(engine: str, model: Path, threads: int) -> tuple[Encode, Any]:
    """A function from a feed to the first output, and the engine's own object behind it."""
    return {"onnxruntime": _onnxruntime_encoder, "openvino": _openvino_encoder, "ctranslate2": _ctranslate2_encoder}[
        engine
    ](model, threads)


def decoder(engine: str, model: Path, threads: int) -> Decoder:
    """A decoder, open."""
    kinds: dict[str, Callable[[Path, int], Decoder]] = {
        "onnxruntime": OnnxruntimeDecoder,
        "ctranslate2": Ctranslate2Decoder,
        "llama.cpp": LlamaCppDecoder,
        "genai": GenaiDecoder,
    }
    return kinds[engine](model, threads)


def _onnxruntime_encoder(model: Path, threads: int) -> tuple[Encode, Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if (kernels := model.with_name(KERNELS)).is_file():
        options.register_custom_ops_library(str(kernels))
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    names, first = {entry.name for entry in session.get_inputs()}, session.get_outputs()[0].name

    def encode(feed: Feed) -> Array:
        return np.asarray(session.run([first], {name: array for name, array in feed.items() if name in names})[0])

    return encode, session


def _openvino_encoder(model: Path, threads: int) -> tuple[Encode, Any]:
    import openvino

    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": str(threads)}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    return lambda feed: np.asarray(request.infer(feed, share_inputs=True)[0]), compiled


def _ctranslate2_encoder(model: Path, threads: int) -> tuple[Encode, Any]:
    import ctranslate2

    opened = ctranslate2.Encoder(
        str(model), device="cpu", compute_type=_compute_type(model), inter_threads=1, intra_threads=threads
    )

    def encode(feed: Feed) -> Array:
        lengths = feed["attention_mask"].sum(axis=1).astype(np.int32)
        kinds = feed.get("token_type_ids")
        output = opened.forward_batch(
            ctranslate2.StorageView.from_array(feed["input_ids"].astype(np.int32)),
            ctranslate2.StorageView.from_array(lengths),
            token_type_ids=None if kinds is None else kinds.tolist(),
        )
        return np.asarray(output.last_hidden_state)

    return encode, opened


def _compute_type(model: Path) -> str:
    """What the folder was converted to; CTranslate2's own choice would depend on the machine."""
    return str(json.loads((model / "bench.json").read_text(encoding="utf-8"))["compute_type"])


class OnnxruntimeDecoder:
    """A graph with a cache, whose outputs are the inputs of the next step."""

    def __init__(self, model: Path, threads: int) -> None:
        from scalefold.compiler.artifact import RECORD
        from scalefold.compiler.generate import CachedSession

        # only scalefold's own folders are opened for the last logits; others run as their users get them
        self._session = CachedSession(model, threads=threads, as_it_is=not (model.parent / RECORD).is_file())

    def seconds(self, prompt: Array, new: int) -> float:
        """See `Decoder`."""
        cache = self._session.hold(self._session.decoder.empty_cache(len(prompt)))
        start = time.perf_counter()
        logits, cache = self._session.step(prompt, None, cache, last=True)
        if new:
            start = time.perf_counter()
        for _ in range(new):
            logits, cache = self._session.step(logits[:, -1].argmax(axis=1)[:, None], None, cache, last=True)
        return time.perf_counter() - start

    def logits(self, ids: Array) -> Array:
        """See `Decoder`."""
        cache = self._session.hold(self._session.decoder.empty_cache())
        logits, _ = self._session.step(ids[None], None, cache)
        return np.asarray(logits[0])


class Ctranslate2Decoder:
    """A generator; the time of a step is read where its token is reported."""

    def __init__(self, model: Path, threads: int) -> None:
        import ctranslate2

        self._generator: Any = ctranslate2.Generator(
            str(model), device="cpu", compute_type=_compute_type(model), inter_threads=1, intra_threads=threads
        )
        self._tokens: list[str] = json.loads((model / "vocabulary.json").read_text(encoding="utf-8"))

    def seconds(self, prompt: Array, new: int) -> float:
        """See `Decoder`."""
        marks: list[float] = []

        def mark(step: Any) -> bool:
            marks.append(time.perf_counter())
            return False

        start = time.perf_counter()
        self._generator.generate_batch(
            [[self._tokens[index] for index in row] for row in prompt],
            beam_size=1,
            max_length=new + 1,
            min_length=new + 1,
            include_prompt_in_result=False,
            callback=mark,
        )
        if not new:
            return marks[0] - start
        return marks[-1] - marks[len(prompt) - 1]

    def logits(self, ids: Array) -> Array:
        """See `Decoder`."""
        logits: Array = np.asarray(self._generator.forward_batch([ids.tolist()]))
        return np.asarray(logits[0])


class LlamaCppDecoder:
    """llama.cpp below its Python class, which knows one sequence only."""

    def __init__(self, model: Path, threads: int) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(_quiet(llama_cpp), None)
        self._model = llama_cpp.llama_model_load_from_file(str(model).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise ValueError("llama.cpp cannot load the file")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = CONTEXT * BATCH, 512, 512
        settings.n_seq_max, settings.n_threads, settings.n_threads_batch = BATCH, threads, threads
        # one cache for all sequences: else every one of them could hold an eighth of the positions
        settings.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(512, 0, 1)

    def seconds(self, prompt: Array, new: int) -> float:
        """See `Decoder`."""
        self._clear()
        start = time.perf_counter()
        last = self._run(prompt, 0, every=False)
        if new:
            start = time.perf_counter()
        for step in range(new):
            last = self._run(last.argmax(axis=1)[:, None], prompt.shape[1] + step, every=False)
        return time.perf_counter() - start

    def logits(self, ids: Array) -> Array:
        """See `Decoder`."""
        self._clear()
        return self._run(ids[None], 0, every=True)

    def _clear(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def _run(self, tokens: Array, position: int, *, every: bool) -> Array:
        """Run [B,S] at a position; the logits of each sequence's last token, [B,V], or of every token, [B*S,V]."""
        batch, wanted = self._batch, []
        batch.n_tokens = tokens.size
        for index, (row, column) in enumerate(np.ndindex(tokens.shape)):
            batch.token[index], batch.pos[index] = int(tokens[row, column]), position + column
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
            batch.logits[index] = every or column == tokens.shape[1] - 1
            if batch.logits[index]:
                wanted.append(index)
        if code := self._api.llama_decode(self._context, batch):
            raise ValueError(f"llama_decode gave {code}")
        rows = [self._api.llama_get_logits_ith(self._context, index) for index in wanted]
        return np.stack([np.ctypeslib.as_array(row, (self._width,)).copy() for row in rows])


def _quiet(llama_cpp: Any) -> Any:
    """A log that drops everything, held by the module so that it lives as long as the library."""
    llama_cpp.bench_log = llama_cpp.llama_log_callback(lambda level, text, data: None)
    return llama_cpp.bench_log


class GenaiDecoder:
    """onnxruntime-genai's own loop over its own graph."""

    def __init__(self, model: Path, threads: int) -> None:
        import onnxruntime_genai

        self._api: Any = onnxruntime_genai
        config = onnxruntime_genai.Config(str(model.parent))
        options = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = onnxruntime_genai.Model(config)

    def seconds(self, prompt: Array, new: int) -> float:
        """See `Decoder`."""
        generator = self._generator(len(prompt), prompt.shape[1] + new + 1)
        start = time.perf_counter()
        generator.append_tokens(prompt.astype(np.int32))
        generator.generate_next_token()
        if new:
            start = time.perf_counter()
        for _ in range(new):
            generator.generate_next_token()
        return time.perf_counter() - start

    def logits(self, ids: Array) -> Array:
        """See `Decoder`."""
        generator = self._generator(1, len(ids) + 1)
        generator.append_tokens(ids[None].astype(np.int32))
        return np.asarray(generator.get_output("logits")[0])

    def _generator(self, batch: int, length: int) -> Any:
        settings = self._api.GeneratorParams(self._model)
        # the end of text must not stop it: every contender makes the same number of tokens
        settings.set_search_options(batch_size=batch, max_length=length, min_length=length, do_sample=False)
        return self._api.Generator(self._model, settings)
