"""A tiny BERT with outlier channels, its float ONNX export and its compiled folders, and tiny decoders: made once."""

from __future__ import annotations

import gc
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from filelock import FileLock
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from scalefold.compiler import CompileReport, compile_model, kernel_library
from scalefold.compiler.calibrate import default_texts
from scalefold.compiler.export import export_model
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.protocol import Context
from scalefold.compiler.runtime import Array, Feed
from scalefold.passes import NORMALIZE

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = 200


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills, once for all the processes that the tests are spread over."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, done = root / name, root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def tiny_model() -> Any:
    """A BertModel of 2 layers and width 64: random weights and biases, and LayerNorm gains with two outlier channels."""
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    model = BertModel(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
            else:
                parameter[3], parameter[17] = 6.0, 4.0
    return model


@pytest.fixture(scope="session")
def source_folder(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT as Hugging Face saves it, with a tokenizer whose words are those of the default text."""
    from transformers import PreTrainedTokenizerFast

    words = Counter(word for text in default_texts() for word in re.findall(r"\w+|[^\w\s]+", text.lower()))
    known = [*SPECIAL, *(word for word, _ in words.most_common(VOCABULARY - len(SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(known)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    folder = tmp_path_factory.mktemp("source")
    tiny_model.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    gc.freeze()  # the compiler collects garbage after every pass, and torch brings a million objects to look through
    return folder


@pytest.fixture(scope="session")
def float_model(source_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float export of the tiny BERT: `model.onnx`, with its data, tokenizer and config beside it."""
    folder = made_once(tmp_path_factory, "float", lambda folder: export_model(str(source_folder), folder))
    return folder / "model.onnx"


@pytest.fixture(scope="session")
def feeds() -> list[Feed]:
    """56 samples of 6 to 39 random tokens: 40 to calibrate with and 16 to hold out."""
    generator = np.random.default_rng(7)
    return [_feed(generator.integers(5, VOCABULARY, (1, length))) for length in generator.integers(6, 40, 56)]


@pytest.fixture(scope="session")
def fresh_feeds() -> list[Feed]:
    """12 samples that no calibration has seen."""
    generator = np.random.default_rng(11)
    return [_feed(generator.integers(5, VOCABULARY, (1, length))) for length in generator.integers(6, 40, 12)]


def _feed(ids: Array) -> Feed:
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


@pytest.fixture(scope="session")
def compiled(
    float_model: Path, feeds: list[Feed], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, CompileReport]:
    """The tiny BERT compiled with `w8a8` for each target; `report.output` is the folder. Not to be written to."""
    folder = tmp_path_factory.mktemp("compiled")
    return {
        "onnxruntime-cpu": compile_model(float_model, folder / "cpu", calibration=feeds, samples=40),
        "qdq": compile_model(float_model, folder / "qdq", calibration=feeds, samples=40, target="qdq"),
    }


def _built(folder: Path, *, plain: bool = False) -> None:
    """The kernel library in a cache of its own: the machine's compiler has to be there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", shlex.join([*kernel_library._compiler(), *(["-DSCALEFOLD_PLAIN"] if plain else [])]))
        patch.setenv("SCALEFOLD_CACHE", str(folder))
        shutil.copyfile(kernel_library.library(), folder / kernel_library.LIBRARY)


@pytest.fixture(scope="session")
def built_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel library as this machine builds it."""
    return made_once(tmp_path_factory, "kernels", _built) / kernel_library.LIBRARY


@pytest.fixture
def kernel_cache(built_kernels: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lets what needs the kernel library find it built, in a folder that is the tests' own."""
    monkeypatch.setenv("SCALEFOLD_CACHE", str(built_kernels.parent))
    return built_kernels.parent


@pytest.fixture(scope="session")
def plain_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel library without what AVX512-VNNI runs."""
    make = partial(_built, plain=True)
    return made_once(tmp_path_factory, "kernels-plain", make) / kernel_library.LIBRARY


SERVER = """
import json, os, sys, traceback
from scalefold.compiler import cli

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    code = 1
    try:
        os.chdir(job["folder"])
        os.environ.update(job["environment"])
        for number, path in ((1, job["stdout"]), (2, job["stderr"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = ["scalefold", *job["arguments"]]
        try:
            cli.main()
            code = 0
        except SystemExit as done:
            code = done.code or 0
        except BaseException:
            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
"""
"""Imports the command line once and forks a process for every command, which saves the two seconds of importing."""


@pytest.fixture(scope="session")
def server() -> Iterator[subprocess.Popen[str]]:
    """The process that `cli` commands are forked from."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "NO_COLOR": "1"}
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        yield running


@pytest.fixture
def cli(tmp_path: Path, server: subprocess.Popen[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `scalefold ...` as a process of its own, in `tmp_path` and without a network; keywords go to its environment."""

    def run(*arguments: object, **environment: object) -> subprocess.CompletedProcess[str]:
        assert server.stdin is not None and server.stdout is not None
        words = [str(argument) for argument in arguments]
        with tempfile.TemporaryDirectory() as scratch:
            outputs = {name: Path(scratch) / name for name in ("stdout", "stderr")}
            job: dict[str, Any] = {
                "folder": str(tmp_path),
                "arguments": words,
                **{name: str(path) for name, path in outputs.items()},
            }
            job["environment"] = {name: str(value) for name, value in environment.items()}
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()
            code = int(server.stdout.readline())
            texts = {name: path.read_text(encoding="utf-8") for name, path in outputs.items()}
        return subprocess.CompletedProcess(["scalefold", *words], code, **texts)

    return run


@pytest.fixture(scope="session")
def decoder_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A float export of each family of decoders, 2 layers of width 64 with random weights, by family."""
    import torch
    import transformers as hf

    small = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "vocab_size": 200}
    torch.manual_seed(5)
    sources: dict[str, Any] = {
        "gpt2": hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=200, n_positions=64)),
        "opt": hf.OPTForCausalLM(
            hf.OPTConfig(**small, ffn_dim=128, max_position_embeddings=64, word_embed_proj_dim=64)
        ),
        "bloom": hf.BloomForCausalLM(hf.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=200)),
        "llama": hf.LlamaForCausalLM(
            hf.LlamaConfig(
                **small,
                intermediate_size=96,
                num_key_value_heads=2,
                max_position_embeddings=64,
                tie_word_embeddings=True,
            )
        ),
    }
    folders = {}
    for family, model in sources.items():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim == 1 else 0.0
            parameter.data += spread * torch.randn_like(parameter) if "embed" not in name else 0.0
        folders[family] = made_once(tmp_path_factory, family, partial(export_model, model))
    return folders


@pytest.fixture(scope="session")
def decoder_models(decoder_folders: dict[str, Path]) -> dict[str, ir.Model]:
    """The float decoders in normal form; clone before editing."""
    graphs = {}
    for family, folder in decoder_folders.items():
        graphs[family] = read_onnx(folder / "model.onnx")
        for entry in NORMALIZE:
            entry.run(graphs[family], Context())
    return graphs
