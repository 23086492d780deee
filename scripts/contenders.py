"""What the benchmarks compare: how each contender quantizes a float ONNX file, and how its result is run.

The benchmarks start this file as a child process for every step, so that memory and time are each contender's own:

    contenders.py build NAME FOLDER          quantize; one line of JSON with what it took
    contenders.py embed NAME FOLDER          sentence embeddings of the evaluation feeds, and the kernels that ran
    contenders.py serve NAME FOLDER THREADS  load, then run one timed turn for each line `BATCHxLENGTH SECONDS`
    contenders.py check NAME FOLDER          its outputs against float's, and the kernels that ran
    contenders.py judge NAME FOLDER          the same for a decoder, and its perplexity where there are windows to read
    contenders.py decode NAME FOLDER THREADS the same as serve for a decoder and lines `BATCHxPROMPT+NEW SECONDS`

FOLDER is a `Workspace`. Only numpy is imported at the top: other engines' children run in environments of their own
(bench_environments.py), and load and run models as bench_engines.py says.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # type checkers see the repository as the root, Python the folder of this file
    from scripts import bench_conversions, bench_engines, bench_environments
else:
    import bench_conversions
    import bench_engines
    import bench_environments

REPOSITORY = Path(__file__).resolve().parent.parent
SEQUENCE = 128
WINDOW = 512
"""Tokens of a decoder's calibration window, of a prompt to prefill, and of a window whose perplexity is taken."""
READ_WINDOWS = 8
"""Windows that `quantize_static` is given: its memory grows with them."""
CHECKED = 64
"""Tokens of a decoder's first window whose logits are held against float's."""
MODEL_FILES = {
    "onnxruntime": "model.onnx", "openvino": "model.xml", "ctranslate2": "model", "llama.cpp": "model.gguf",
    "genai": "model.onnx",
}  # fmt: skip
"""What each engine is given to load: a file, and for CTranslate2 a folder."""
RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-4x768": ("Bert", {"num_hidden_layers": 4}),
    "bert-12x768": ("Bert", {}),
    "gpt2-124m": ("GPT2", {}),
    "opt-125m": ("OPT", {}),
    "opt-1.3b": (
        "OPT",
        {
            "hidden_size": 2048,
            "word_embed_proj_dim": 2048,
            "ffn_dim": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
        },
    ),
}
"""Models of real sizes whose weights are random: the architecture, and what differs from transformers' defaults."""
INTEGER_MATMULS = (
    "MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger", "DynamicQuantizeMatMul", "QGemm", "MatMulNBits",
    "Linear", "LinearUint8", "LinearBfloat16", "LinearNormUint8", "RowLinear",
)  # fmt: skip

Array = npt.NDArray[Any]
Feed = dict[str, Array]
Opened = TypeVar("Opened")


@dataclass(frozen=True)
class Workspace:
    """One model's files: the float model, the calibration samples as text and as feeds, and a folder per contender.

    Attributes:
        folder: where they are.
        as_built: take what was quantized before, even where scalefold or the scripts have changed since.
    """

    folder: Path
    as_built: bool = False

    @property
    def float_model(self) -> Path:
        """The one float ONNX file that every contender starts from."""
        return self.folder / "exported" / "model.onnx"

    @property
    def texts(self) -> Path:
        """Calibration texts, one JSON object a line."""
        return self.folder / "calibration.jsonl"

    @property
    def feeds(self) -> Path:
        """The same texts as feeds, one sample each, without padding."""
        return self.folder / "calibration.npz"

    @property
    def evaluation(self) -> Path:
        """Padded batches of the sentences to embed."""
        return self.folder / "evaluation.npz"

    @property
    def windows(self) -> Path:
        """Windows of running text whose perplexity is taken, token ids [windows, tokens]; missing without a text."""
        return self.folder / "windows.npy"

    @property
    def reference(self) -> Path:
        """Float's output that every contender's is held against."""
        return self.folder / "reference.npy"

    @property
    def results(self) -> Path:
        """What was measured so far."""
        return self.folder / "results.json"

    @property
    def origin(self) -> dict[str, str]:
        """Where the model came from: a Hugging Face folder, and a GGUF file where it was one."""
        found: dict[str, str] = json.loads((self.folder / "origin.json").read_text(encoding="utf-8"))
        return found

    def note_origin(self, **paths: Path) -> None:
        """Write down where the model came from."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({name: str(path) for name, path in paths.items()})
        (self.folder / "origin.json").write_text(text, encoding="utf-8")

    @property
    def window(self) -> int:
        """`WINDOW`, or the length of the decoder's position table where that is shorter."""
        from scalefold.compiler.decoder import position_limit

        return min(WINDOW, position_limit(self.float_model.parent) or WINDOW)

    def output(self, contender: Contender) -> Path:
        """The folder of a contender's result."""
        return self.folder / contender.name

    def model(self, contender: Contender) -> Path:
        """The file that a contender is loaded from."""
        if contender.build is keep_float:
            return self.float_model
        return self.output(contender) / MODEL_FILES[contender.engine]


@dataclass(frozen=True)
class Contender:
    """One row of the tables.

    Attributes:
        name: what `--only` takes.
        family: the rows of one family are the same tool at different settings.
        settings: what was set, for people.
        build: writes the quantized model into a folder.
        engine: what runs it: a key of `MODEL_FILES`.
        timed: False leaves it out of the speed tables, since it runs the same kernels as another row.
    """

    name: str
    family: str
    settings: str
    build: Callable[[Workspace, Path], None]
    engine: str = "onnxruntime"
    timed: bool = True


@dataclass(frozen=True)
class Built:
    """What one quantization took.

    Attributes:
        seconds: wall time of the child, interpreter and imports included.
        peak_mb: peak resident memory of the child and its children.
        size_mb: all files that the result is loaded from.
        failure: the reason when there is no result.
        key: changes with anything that the result depends on; empty for a folder that was given.
    """

    seconds: float = 0.0
    peak_mb: float = 0.0
    size_mb: float = 0.0
    failure: str | None = None
    key: str = ""


class StepError(Exception):
    """A step of a contender failed; the message is the reason for its row."""


def save_feeds(path: Path, feeds: list[Feed]) -> None:
    """Write feeds of any shapes into one file."""
    arrays: dict[str, Any] = {f"{index}|{name}": feed[name] for index, feed in enumerate(feeds) for name in feed}
    np.savez(path, **arrays)


def read_feeds(path: Path) -> list[Feed]:
    """Read what `save_feeds` wrote, in its order."""
    feeds: dict[int, Feed] = {}
    with np.load(path) as archive:
        for key in archive.files:
            index, name = key.split("|")
            feeds.setdefault(int(index), {})[name] = archive[key]
    return [feeds[index] for index in sorted(feeds)]


# How each contender quantizes ---------------------------------------------------------------------------------------


def keep_float(work: Workspace, out: Path) -> None:
    """The float model itself."""


def _dynamic(**settings: Any) -> Callable[[Workspace, Path], None]:
    def build(work: Workspace, out: Path) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        prepared = _prepared(work, out)
        quantize_dynamic(prepared, out / "model.onnx", weight_type=QuantType.QInt8, **settings)
        prepared.unlink()

    return build


@dataclass
class Reader:
    """The calibration feeds in the form that `quantize_static` reads."""

    feeds: Iterator[Feed]

    def get_next(self) -> Feed | None:
        """The next feed, or None at the end."""
        return next(self.feeds, None)


def _static(*, unsigned: bool = False, **settings: Any) -> Callable[[Workspace, Path], None]:
    def build(work: Workspace, out: Path) -> None:
        from onnxruntime.quantization import QuantType, quantize_static

        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8} if unsigned else {}
        prepared = _prepared(work, out)
        quantize_static(prepared, out / "model.onnx", Reader(iter(read_feeds(work.feeds))), **types, **settings)
        prepared.unlink()

    return build


def _prepared(work: Workspace, out: Path) -> Path:
    """Run the documented preparation of onnxruntime: shapes inferred and the graph optimized.

    Shape inference needs `auto_merge` on graphs with symbolic dimensions, and the weights inside the file.
    """
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    whole, prepared = out / "whole.onnx", out / "prepared.onnx"
    onnx.save(onnx.load(str(work.float_model)), str(whole))
    quant_pre_process(whole, prepared, auto_merge=True)
    whole.unlink()
    return prepared


def _transformers(*, dynamic: bool, **settings: Any) -> Callable[[Workspace, Path], None]:
    def build(work: Workspace, out: Path) -> None:
        import onnx_ir as ir
        import torch
        from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer, OnnxRuntimeStaticConfig
        from transformers.exporters.configs import ExportFormat

        samples = [{name: torch.from_numpy(array) for name, array in feed.items()} for feed in read_feeds(work.feeds)]
        config = (OnnxRuntimeDynamicConfig if dynamic else OnnxRuntimeStaticConfig)(**settings)
        quantizer = OnnxRuntimeQuantizer(config, calibration_dataset=samples)
        quantized = quantizer.quantize(ir.load(work.float_model), samples[0], ExportFormat.ONNX)
        ir.save(quantized, out / "model.onnx", external_data="model.onnx.data")

    return build


def _blocks(bits: int) -> Callable[[Workspace, Path], None]:
    def build(work: Workspace, out: Path) -> None:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

        config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, accuracy_level=4, bits=bits)
        quantizer = MatMulNBitsQuantizer(onnx.load(str(work.float_model)), algo_config=config)
        quantizer.process()
        quantizer.model.save_model_to_file(str(out / "model.onnx"), use_external_data_format=True)

    return build


def _ctranslate2(compute_type: str) -> Callable[[Workspace, Path], None]:
    def build(work: Workspace, out: Path) -> None:
        bench_conversions.to_ctranslate2(Path(work.origin["source"]), out / "model", compute_type)

    return build


def _llama_cpp(file_type: str) -> Callable[[Workspace, Path], None]:
    def build(work: Workspace, out: Path) -> None:
        given = work.origin.get("gguf")
        target = out / MODEL_FILES["llama.cpp"]
        bench_conversions.to_gguf(Path(work.origin["source"]), Path(given) if given else None, target, file_type)

    return build


def _genai(work: Workspace, out: Path) -> None:
    bench_conversions.to_genai(Path(work.origin["source"]), out)


def _nncf(*, float_attention: bool) -> Callable[[Workspace, Path], None]:
    def build(work: Workspace, out: Path) -> None:
        import nncf
        import openvino

        feeds = read_feeds(work.feeds)
        model = openvino.Core().read_model(work.float_model)
        products = [node for node in model.get_ops() if node.get_type_name() == "MatMul"]
        attention = [node.get_friendly_name() for node in products if not _constant(node.input_value(1).get_node())]
        settings: dict[str, Any] = {"ignored_scope": nncf.IgnoredScope(names=attention)} if float_attention else {}
        quantized = nncf.quantize(
            model,
            nncf.Dataset(feeds),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(feeds),
            **settings,
        )
        openvino.save_model(quantized, out / "model.xml", compress_to_fp16=False)

    return build


def _constant(node: Any) -> bool:
    if node.get_type_name() in ("Convert", "Transpose"):
        return _constant(node.input_value(0).get_node())
    return bool(node.get_type_name() == "Constant")


def _scalefold(*options: str) -> Callable[[Workspace, Path], None]:
    def build(work: Workspace, out: Path) -> None:
        command = [sys.executable, "-m", "scalefold.compiler.cli", "compile", str(work.float_model), "-o"]
        samples = len(work.texts.read_text(encoding="utf-8").splitlines())
        command += [str(out / "compiled"), "--calibration", str(work.texts), "--samples", str(samples), *options]
        _written(command, out / "compiled", out)

    return build


def _fused(name: str) -> Callable[[Workspace, Path], None]:
    """The folder of another contender on scalefold's own kernels."""

    def build(work: Workspace, out: Path) -> None:
        compiled = work.output(BY_NAME[name])
        if not (compiled / "scalefold.json").is_file():
            raise StepError(f"it is made from {name}, which is not built: name that too")
        command = [sys.executable, "-m", "scalefold.compiler.cli", "fuse", str(compiled), "-o", str(out / "fused")]
        _written([*command, "--data", str(work.texts)], out / "fused", out)

    return build


def _written(command: list[str], folder: Path, out: Path) -> None:
    """Run a command that writes a folder, and move what is in it."""
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise StepError(f"exit code {done.returncode}: {lines[-1]}")
    for file in folder.iterdir():
        displace(out / file.name)
        file.rename(out / file.name)


MATMUL_ONLY: dict[str, Any] = {"unsigned": True, "per_channel": True, "op_types_to_quantize": ["MatMul"]}
INPUTS_ONLY = {"OpTypesToExcludeOutputQuantization": ["MatMul"]}

FLOAT = Contender("float", "onnxruntime float", "", keep_float)
STATIC_7BIT = Contender(
    "static-matmul-7bit",
    "quantize_static",
    "MatMul only, per_channel, QUInt8 x QInt8, reduce_range",
    _static(**MATMUL_ONLY, reduce_range=True),
    timed=False,
)
BLOCKS = tuple(
    Contender(
        f"nbits{bits}",
        "MatMulNBits, onnxruntime's quantizer",
        f"{bits} bits, blocks of 32, symmetric, accuracy level 4",
        _blocks(bits),
    )
    for bits in (8, 4)
)
CTRANSLATE2 = tuple(
    Contender(f"ctranslate2-{kind}", "CTranslate2", kind, _ctranslate2(kind), "ctranslate2")
    for kind in ("float32", "int8")
)
FEW_BITS = ("w4a8", "w4a8-kmeans", "w4a8-bcq", "w3a8-kmeans", "w3a8-bcq")
CONTENDERS = (
    FLOAT,
    Contender("dynamic", "quantize_dynamic", "QInt8, per_channel", _dynamic(per_channel=True)),
    Contender(
        "dynamic-7bit",
        "quantize_dynamic",
        "QInt8, per_channel, reduce_range",
        _dynamic(per_channel=True, reduce_range=True),
        timed=False,
    ),
    *BLOCKS,
    Contender("static", "quantize_static", "defaults: QDQ, MinMax", _static(), timed=False),
    Contender(
        "static-matmul",
        "quantize_static",
        "MatMul only, per_channel, QUInt8 x QInt8",
        _static(**MATMUL_ONLY),
        timed=False,
    ),
    STATIC_7BIT,
    Contender(
        "static-inputs",
        "quantize_static",
        "as MatMul only, outputs left in float",
        _static(**MATMUL_ONLY, extra_options=INPUTS_ONLY),
    ),
    Contender(
        "static-inputs-7bit",
        "quantize_static",
        "as MatMul only, outputs left in float, reduce_range",
        _static(**MATMUL_ONLY, extra_options=INPUTS_ONLY, reduce_range=True),
        timed=False,
    ),
    Contender(
        "transformers-static",
        "transformers OnnxRuntimeQuantizer",
        "static, per_channel",
        _transformers(dynamic=False, per_channel=True),
        timed=False,
    ),
    Contender("transformers-dynamic", "transformers OnnxRuntimeQuantizer", "dynamic", _transformers(dynamic=True)),
    Contender(
        "openvino",
        "OpenVINO + NNCF",
        "INT8, model_type TRANSFORMER",
        _nncf(float_attention=False),
        "openvino",
        timed=False,
    ),
    Contender(
        "openvino-linear",
        "OpenVINO + NNCF",
        "INT8, model_type TRANSFORMER, attention products ignored",
        _nncf(float_attention=True),
        "openvino",
    ),
    *CTRANSLATE2,
    Contender("scalefold", "scalefold", "w8a8", _scalefold("--recipe", "w8a8")),
    Contender("scalefold-fused", "scalefold", "w8a8, fused: own kernels", _fused("scalefold")),
    Contender("scalefold-qdq", "scalefold", "w8a8, target qdq", _scalefold("--recipe", "w8a8", "--target", "qdq")),
    Contender("scalefold-naive", "scalefold", "w8a8-naive", _scalefold("--recipe", "w8a8-naive"), timed=False),
    Contender("scalefold-w6a6", "scalefold", "w6a6", _scalefold("--recipe", "w6a6"), timed=False),
    *(
        Contender(f"scalefold-{recipe}", "scalefold", recipe, _scalefold("--recipe", recipe), timed=False)
        for recipe in FEW_BITS
    ),
    *(
        Contender(
            f"scalefold-{recipe}-fused",
            "scalefold",
            f"{recipe}, fused: own kernels",
            _fused(f"scalefold-{recipe}"),
            timed=False,
        )
        for recipe in FEW_BITS
    ),
)
DECODERS = (
    FLOAT,
    Contender(
        "dynamic-matmul-7bit",
        "quantize_dynamic",
        "MatMul only, QInt8, per_channel, reduce_range",
        _dynamic(per_channel=True, reduce_range=True, op_types_to_quantize=["MatMul"]),
    ),
    STATIC_7BIT,
    *BLOCKS,
    *CTRANSLATE2,
    *(
        Contender(
            f"llama.cpp-{kind.lower()}",
            "llama.cpp",
            kind,
            _llama_cpp(kind),
            "llama.cpp",
        )
        for kind in ("Q8_0", "Q4_0")
    ),
    Contender("genai-int4", "onnxruntime-genai", "int4, blocks of 32, accuracy level 4", _genai, "genai"),
    *(Contender(recipe, "scalefold", recipe, _scalefold("--recipe", recipe)) for recipe in ("w8a8", "w8a8-decode")),
    Contender("w8a8-fused", "scalefold", "w8a8, fused: own kernels", _fused("w8a8")),
    *(
        Contender(recipe, "scalefold", recipe, _scalefold("--recipe", recipe), timed=False)
        for recipe in ("w8a8-static", "w8a8-token")
    ),
    *(
        Contender(
            f"w4a8-{profile}",
            "scalefold",
            f"w4a8, profile {profile}",
            _scalefold("--recipe", "w4a8", "--profile", profile),
            timed=profile == "decode",
        )
        for profile in ("throughput", "decode", "balanced")
    ),
    Contender("w4a8-fused", "scalefold", "w4a8, fused: own kernels", _fused("w4a8-throughput")),
)
BY_NAME = {contender.name: contender for contender in (*CONTENDERS, *DECODERS)}


# In the parent: command line, inputs ---------------------------------------------------------------------------------


def parser(description: str, entries: Sequence[Contender] = CONTENDERS) -> argparse.ArgumentParser:
    """The options that all benchmarks take."""
    made = argparse.ArgumentParser(description=description)
    names = ", ".join(contender.name for contender in entries)
    made.add_argument("--calibration", type=Path, metavar="FILE", help="text, one sample a line, for every contender; "
                      "default: scalefold's own default text, which every Python installation carries")  # fmt: skip
    made.add_argument("--samples", type=int, default=128, help="calibration samples, evenly spaced (default: 128)")
    made.add_argument("--only", metavar="NAME,...", help=f"compare these alone (float is always run): {names}")
    made.add_argument("--work", type=Path, metavar="FOLDER", help="keep exported and quantized models here, so that a "
                      "second run does not make them again; default: a temporary folder")  # fmt: skip
    made.add_argument("--as-built", action="store_true", help="take what --work holds already, even where scalefold or "
                      "these scripts have changed since")  # fmt: skip
    return made


def chosen(only: str | None, entries: Sequence[Contender] = CONTENDERS, *, timed: bool = False) -> list[Contender]:
    """The contenders that `--only` names, with float first; without it all, or all that are `timed`."""
    if only is None:
        return [contender for contender in entries if contender.timed or not timed]
    names = [name.strip() for name in only.split(",")]
    known = [contender.name for contender in entries]
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"--only: there is no contender {', '.join(unknown)}; choose from {', '.join(known)}.")
    return [contender for contender in entries if contender.name in {"float", *names}]


def prepare(model: str, root: Path, calibration: Path | None, samples: int, *, as_built: bool = False) -> Workspace:
    """Export a model once and write the calibration samples.

    Args:
        model: `minilm`, a name of `RANDOM`, or a Hugging Face folder.
        root: where the model's workspace is made.
        calibration: lines of text, or None for the default text.
        samples: how many of them are used.
        as_built: see `Workspace`.
    """
    from scalefold.compiler.calibrate import default_texts

    work = Workspace(root / Path(model).name, as_built)
    source = _source(model, work.folder / "source")
    work.note_origin(source=source)
    _export(source, work, "feature-extraction")
    texts = default_texts()
    if calibration is not None:
        texts = [line.strip() for line in calibration.read_text(encoding="utf-8").splitlines()]
        texts = [line for line in texts if len(line.split()) >= 4]
    texts = [texts[index] for index in np.linspace(0, len(texts) - 1, min(samples, len(texts))).astype(int)]
    work.texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    save_feeds(work.feeds, encode(work, texts))
    return work


def prepare_decoder(
    model: str,
    root: Path,
    calibration: Path | None,
    samples: int,
    exported: Path | None = None,
    *,
    as_built: bool = False,
) -> Workspace:
    """Export a decoder once, and write the calibration text and windows out of it.

    Args:
        model: the name of a reference model, a Hugging Face folder or a hub id.
        root: where the model's workspace is made.
        calibration: running text; None for the reference model's own, or else the default text.
        samples: of 128 tokens each, so a window of 512 is four of them.
        exported: a folder with the float model.onnx, to take instead of exporting.
        as_built: see `Workspace`.
    """
    import onnx_ir as ir

    from scalefold.compiler.calibrate import RunningText

    work = Workspace(root / Path(model).name, as_built)
    source, texts = _decoder_source(model, work.folder / "source")
    work.note_origin(source=source, **_gguf_of(model))
    if exported is not None:
        place(exported, work.float_model.parent)
    else:
        _export(source, work, "causal-lm")
    if calibration is not None:
        texts = calibration.read_text(encoding="utf-8").splitlines()
    parts = np.array_split(np.arange(len(texts)), min(samples, len(texts)))
    pieces = ["\n".join(texts[index] for index in part) for part in parts]
    work.texts.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces), encoding="utf-8")
    tokenizer, graph = work.float_model.with_name("tokenizer.json"), ir.load(work.float_model)
    windows = RunningText(tokenizer, graph, work.window, "\n".join(texts)).windows(READ_WINDOWS)
    save_feeds(work.feeds, [dict(window) for window in windows])
    return work


def _decoder_source(model: str, folder: Path) -> tuple[Path, list[str]]:
    """What to export, and the lines of text to calibrate on."""
    from scalefold.compiler.calibrate import default_running_text, default_texts
    from scalefold.compiler.driver import reference_models

    lines = default_running_text().splitlines()
    if model in RANDOM:
        return random_model(model, folder), lines
    if model not in reference_models():
        return Path(model), lines
    module = importlib.import_module(f"scalefold.models.{model.removesuffix('-outliers').replace('-', '_')}")
    build = module.build_outliers if model.endswith("-outliers") else module.build
    own = module.samples()
    return build(), lines if own == default_texts() else own


def _gguf_of(model: str) -> dict[str, Path]:
    """The GGUF file that a reference model is read from, if it is read from one."""
    from scalefold.compiler.machine import cache_folder
    from scalefold.models import smollm2

    return {"gguf": cache_folder() / smollm2.PACKAGE / smollm2.FILE} if model == "smollm2" else {}


def write_windows(work: Workspace, text: Path | None, count: int) -> None:
    """Cut running text into windows for perplexity; without a text there are none."""
    work.windows.unlink(missing_ok=True)
    if text is None:
        return
    from scalefold.compiler.calibrate import read_tokenizer

    tokenizer = read_tokenizer(work.float_model.with_name("tokenizer.json"))
    ids = np.asarray(tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids)
    whole = min(count, len(ids) // work.window)
    if not whole:
        raise SystemExit(f"--data: {text} holds {len(ids)} tokens, too few for a window of {work.window}.")
    np.save(work.windows, ids[: whole * work.window].reshape(whole, work.window))


def place(given: Path, target: Path) -> None:
    """Let a folder that was made before stand where a benchmark would make its own."""
    if given.resolve() == target.resolve():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    displace(target)
    shutil.rmtree(target, ignore_errors=True)
    target.symlink_to(given.resolve(), target_is_directory=True)


def displace(target: Path) -> None:
    """Take away what `place` put there; nothing of the folder itself is touched."""
    if target.is_symlink():
        target.unlink()


def _export(source: Path, work: Workspace, task: str) -> None:
    from scalefold.compiler.export import export_model

    displace(work.float_model.parent)
    if work.float_model.is_file():
        return
    partial = work.folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    export_model(source, partial, task)
    partial.rename(work.float_model.parent)


def _source(model: str, folder: Path) -> Path:
    """What to export: a reference model, a random one of `RANDOM` made in `folder`, or the user's own folder."""
    if model in RANDOM:
        return random_model(model, folder)
    from scalefold.models import minilm

    return minilm.build() if model == "minilm" else Path(model)


def random_model(model: str, folder: Path) -> Path:
    """A model of real sizes with random weights of a fixed seed, and a tokenizer that its vocabulary holds."""
    import torch
    import transformers

    from scalefold.models import minilm, smollm2

    kind, settings = RANDOM[model]
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**settings)
        body = {"Bert": "BertModel", "GPT2": "GPT2LMHeadModel", "OPT": "OPTForCausalLM"}[kind]
        shutil.rmtree(folder, ignore_errors=True)
        getattr(transformers, body)(config).save_pretrained(folder)
        for file in (minilm if kind == "Bert" else smollm2).build().glob("*token*.json"):
            shutil.copy(file, folder)
        _fill_vocabulary(folder / "tokenizer.json", config.vocab_size)
    return folder


def _fill_vocabulary(tokenizer: Path, size: int) -> None:
    """Give a tokenizer as many tokens as its model has, with ones that stand in no text: some converters insist."""
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"[filler{index}]": index for index in range(len(vocabulary), size)}
    tokenizer.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def encode(work: Workspace, texts: list[str]) -> list[Feed]:
    """One feed per text, at most `SEQUENCE` tokens each."""
    import onnx_ir as ir

    from scalefold.compiler.calibrate import TextEncoder

    encoder = TextEncoder(work.float_model.with_name("tokenizer.json"), ir.load(work.float_model), SEQUENCE)
    return [dict(encoder(text)) for text in texts]


def machine(threads: int) -> dict[str, str]:
    """What the figures were measured on."""
    from datetime import date

    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    name = next((line.split(":")[1].strip() for line in cpu.splitlines() if line.startswith("model name")), "unknown")
    vnni = "yes" if "avx512_vnni" in cpu or "avx_vnni" in cpu else "no"
    return {
        "CPU": name,
        "VNNI": vnni,
        "threads": str(threads),
        "onnxruntime": version("onnxruntime"),
        "date": date.today().isoformat(),
    }


@contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """The folder of `--work`, made when missing, or a temporary one."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="scalefold-bench-") as folder:
        yield Path(folder)


# In the parent: building in children ---------------------------------------------------------------------------------


def interpreter(contender: Contender) -> str:
    """The Python that runs a contender's children.

    Raises:
        StepError: its environment cannot be made.
    """
    try:
        return bench_environments.interpreter(contender.engine)
    except bench_environments.PreparationError as failure:
        raise StepError(str(failure)) from None


def command(contender: Contender, step: str, work: Workspace, *arguments: str) -> list[str]:
    """The command line of one child."""
    return [interpreter(contender), __file__, step, contender.name, str(work.folder), *arguments]


def run_child(contender: Contender, step: str, work: Workspace, *arguments: str) -> dict[str, Any]:
    """Run one step in a child and return the JSON it ends with.

    Raises:
        StepError: the child said why it failed, or died.
    """
    done = subprocess.run(command(contender, step, work, *arguments), capture_output=True, text=True, check=False)
    return answer_of(done.stdout, done.stderr, done.returncode)


def answer_of(stdout: str, stderr: str, code: int | None) -> dict[str, Any]:
    """The JSON object on the last line of a child's output; a `StepError` when it holds one, or there is none."""
    try:
        answer: dict[str, Any] = json.loads(_last_line(stdout))
    except ValueError:
        raise StepError(f"the process died with exit code {code}: {_last_line(stderr)[:300]}") from None
    if "failure" in answer:
        raise StepError(str(answer["failure"]))
    return answer


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def build(contender: Contender, work: Workspace) -> Built:
    """Quantize in a child, or read what an earlier run with the same inputs left."""
    out = work.output(contender)
    record, key = out / "built.json", _key(contender, work)
    if record.is_file():
        saved = json.loads(record.read_text(encoding="utf-8"))
        if work.as_built or (saved["key"] == key and not saved["built"]["failure"]):
            return Built(**{**saved["built"], "key": saved["key"]})
    displace(out)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    try:
        interpreter(contender)
        start = time.perf_counter()
        answer = run_child(contender, "build", work)
        built = Built(time.perf_counter() - start, answer["peak_mb"], size_mb(work.model(contender)), key=key)
    except StepError as failure:
        built = Built(failure=str(failure))
    record.write_text(json.dumps({"key": key, "built": asdict(built)}), encoding="utf-8")
    return built


def size_mb(model: Path) -> float:
    """All files that a model is loaded from."""
    if model.is_dir():
        return sum(file.stat().st_size for file in model.iterdir()) / 1e6
    parts = [model, model.with_name(f"{model.name}.data"), model.with_suffix(".bin")]
    return sum(part.stat().st_size for part in parts if part.is_file()) / 1e6


def _key(contender: Contender, work: Workspace) -> str:
    """Changes with anything that the result depends on."""
    pins = bench_environments.constraints(contender.engine)
    digest = hashlib.sha256(f"{contender.name} {contender.settings} {version('onnxruntime')} {pins}".encode())
    sources = [work.texts, work.float_model, Path(__file__), Path(bench_conversions.__file__)]
    if contender.family == "scalefold":
        sources += [file for name in ("compiler", "passes") for file in sorted((REPOSITORY / name).glob("*.*"))]
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()


# In a child --------------------------------------------------------------------------------------------------------


def integer_matmuls(contender: Contender, model: Path, runtime: Any) -> int | None:
    """How many matrix products run on integers in the graph that the engine optimized; None where it does not say."""
    if contender.engine == "openvino":
        nodes = [node.get_rt_info() for node in runtime.get_runtime_model().get_ops()]
        kinds = [(info["layerType"].value, info["runtimePrecision"].value) for info in nodes]
        return sum(kind in ("FullyConnected", "MatMul") and str(width) in ("i8", "u8") for kind, width in kinds)
    if contender.engine != "onnxruntime":
        return None
    from scalefold.compiler.runtime import optimized_graph

    return sum(node.op_type in INTEGER_MATMULS for node in optimized_graph(model).graph)


def embed(contender: Contender, work: Workspace) -> dict[str, Any]:
    """Mean-pooled, normalised embeddings of the evaluation sentences, saved in the order of the feeds."""
    infer, runtime = bench_engines.encoder(contender.engine, work.model(contender), 2)
    pooled = []
    for feed in read_feeds(work.evaluation):
        mask = feed["attention_mask"][..., None].astype(np.float32)
        mean = (infer(feed) * mask).sum(axis=1) / mask.sum(axis=1)
        pooled.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    np.save(work.output(contender) / "embeddings.npy", np.concatenate(pooled))
    return {"integer_matmuls": integer_matmuls(contender, work.model(contender), runtime)}


def check(contender: Contender, work: Workspace) -> dict[str, Any]:
    """The mean cosine of an encoder's outputs with float's over the tokens of some samples, and its integer products."""
    infer, runtime = bench_engines.encoder(contender.engine, work.model(contender), 2)
    rows = [infer(feed)[0] for feed in read_feeds(work.feeds)[:READ_WINDOWS]]
    found = integer_matmuls(contender, work.model(contender), runtime)
    return {"integer_matmuls": found, "cosine": _cosine(contender, work, np.concatenate(rows))}


def _cosine(contender: Contender, work: Workspace, rows: Array) -> float:
    """The mean cosine of rows with float's, which float itself writes."""
    if contender.build is keep_float:
        np.save(work.reference, rows)
    wanted = np.load(work.reference)
    if rows.shape != wanted.shape:
        raise StepError(f"its output has shape {list(rows.shape)}, and float's {list(wanted.shape)}")
    norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(wanted, axis=1)
    return float(((rows * wanted).sum(axis=1) / np.maximum(norms, 1e-12)).mean())


def serve(contender: Contender, work: Workspace, threads: int) -> None:
    """Answer every line `BATCHxLENGTH SECONDS` with the seconds per run over at least that many seconds."""
    infer, _ = _loaded(contender, partial(bench_engines.encoder, contender.engine, work.model(contender), threads))
    names = list(read_feeds(work.feeds)[0])
    for line in sys.stdin:
        shape, least = line.split()
        feed = random_feed(names, *map(int, shape.split("x")))
        _say(seconds=_repeated(partial(_timed, infer, feed), float(least)), peak_mb=_peak_mb())


def _loaded(contender: Contender, load: Callable[[], Opened]) -> Opened:
    """What an engine loads; says how long that took and how much memory it holds since."""
    bench_engines.bring_in(contender.engine)
    before, start = _status_mb("VmRSS"), time.perf_counter()
    opened = load()
    _say(load_seconds=time.perf_counter() - start, held_mb=_status_mb("VmRSS") - before)
    return opened


def _timed(infer: bench_engines.Encode, feed: Feed) -> float:
    start = time.perf_counter()
    infer(feed)
    return time.perf_counter() - start


def _repeated(run: Callable[[], float], least: float) -> float:
    """Mean seconds of runs that take so long together.

    A short first run only brings back what the others' turns took from caches and memory; in a long one that is nothing.
    """
    taken = [run()]
    if taken[0] < least:
        taken = [run()]
    while sum(taken) < least:
        taken.append(run())
    return sum(taken) / len(taken)


def judge(contender: Contender, work: Workspace) -> dict[str, Any]:
    """The integer products of a decoder, the cosine of its logits with float's, and its perplexity on the windows."""
    model = work.model(contender)
    opened = bench_engines.decoder(contender.engine, model, 2)
    ids = read_feeds(work.feeds)[0]["input_ids"][0]
    found: dict[str, Any] = {"integer_matmuls": integer_matmuls(contender, model, None)}
    found["cosine"] = _cosine(contender, work, opened.logits(ids[:CHECKED]))
    if work.windows.is_file():
        windows = np.load(work.windows)
        nats = sum(_surprise(opened.logits(window), window) for window in windows)
        found["perplexity"] = float(np.exp(nats / (windows.size - len(windows))))
    return found


def _surprise(logits: Array, ids: Array) -> float:
    """The negative log-likelihood of every token of a window but the first, in nats, summed."""
    total = 0.0
    for row, token in zip(logits[:-1].astype(np.float64), ids[1:], strict=True):
        total += float(row.max() + np.log(np.exp(row - row.max()).sum()) - row[token])
    return total


def decode(contender: Contender, work: Workspace, threads: int) -> None:
    """Answer every line `BATCHxPROMPT+NEW SECONDS` with the seconds a run takes, over at least that many seconds.

    `1x512+0` runs a prompt of 512 tokens. `8x16+64` runs eight prompts of 16 and then their 64 likeliest tokens one by one,
    and only those are timed.
    """
    opened = _loaded(contender, partial(bench_engines.decoder, contender.engine, work.model(contender), threads))
    ids = read_feeds(work.feeds)[0]["input_ids"]
    for line in sys.stdin:
        task, least = line.split()
        batch, prompt, new = sizes_of(task)
        opened.seconds(ids[:, :16], 0)  # wakes it up; a turn of a prompt may be one run long
        run = partial(opened.seconds, np.resize(ids, (batch, prompt)), new)
        _say(seconds=_repeated(run, float(least)), peak_mb=_peak_mb())


def sizes_of(task: str) -> tuple[int, int, int]:
    """Sequences, tokens of each prompt, and new tokens of each, from `BATCHxPROMPT+NEW`."""
    batch, _, rest = task.partition("x")
    prompt, _, new = rest.partition("+")
    return int(batch), int(prompt), int(new)


def random_feed(names: list[str], batch: int, length: int) -> Feed:
    """Token ids of a fixed seed, without padding."""
    ids = np.random.default_rng(0).integers(100, 1000, (batch, length))
    every = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
        "position_ids": np.broadcast_to(np.arange(length), ids.shape),
    }
    return {name: every[name] for name in names}


def _peak_mb() -> float:
    """Peak resident memory of this process since it started its program, or of its largest child."""
    return max(_status_mb("VmHWM"), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3)


def _status_mb(name: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1e3


def _say(**answer: Any) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main(step: str, name: str, folder: str, *arguments: str) -> None:
    """A child's whole life; every error becomes its answer."""
    contender, work = BY_NAME[name], Workspace(Path(folder))
    try:
        if step == "build":
            contender.build(work, work.output(contender))
            _say(peak_mb=_peak_mb())
        elif step == "embed":
            _say(**embed(contender, work))
        elif step in ("check", "judge"):
            _say(**{"check": check, "judge": judge}[step](contender, work))
        else:
            {"serve": serve, "decode": decode}[step](contender, work, *map(int, arguments))
    except Exception as error:  # whatever a contender raises is the reason shown in its row
        said = " ".join(str(error).split())[:300]
        plain = isinstance(error, StepError | bench_conversions.ConversionError)
        _say(failure=said if plain else f"{type(error).__name__}: {said}")


if __name__ == "__main__":
    main(*sys.argv[1:])
