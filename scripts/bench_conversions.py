"""How a Hugging Face folder becomes a model of CTranslate2, llama.cpp and onnxruntime-genai.

Each runs in its engine's environment (bench_environments.py), so nothing but numpy is imported at the top.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

GPT2 = {
    "wte.weight": "token_embd.weight", "wpe.weight": "position_embd.weight",
    "ln_f.weight": "output_norm.weight", "ln_f.bias": "output_norm.bias",
}  # fmt: skip
GPT2_LAYER = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
"""Names of a GPT-2's weights in transformers, and in GGUF."""


class ConversionError(Exception):
    """An engine does not take a model; the message says why."""


def to_ctranslate2(source: Path, out: Path, compute_type: str) -> None:
    """Convert a folder; weights stay float32, or become int8 with a scale per output channel."""
    from ctranslate2.converters import TransformersConverter

    quantization = None if compute_type == "float32" else compute_type
    TransformersConverter(str(source)).convert(str(out), quantization=quantization, force=True)
    (out / "bench.json").write_text(json.dumps({"compute_type": compute_type}), encoding="utf-8")


def to_gguf(source: Path, given: Path | None, out: Path, file_type: str) -> None:
    """Quantize with llama.cpp's own function, from a GGUF file or from a folder of a GPT-2.

    Args:
        source: the Hugging Face folder.
        given: the same model as a GGUF file, when there is one; its tensors are dequantized first.
        out: the file to write.
        file_type: llama.cpp's name for a mixture of types: Q8_0, Q4_0.
    """
    import llama_cpp

    whole = given
    if whole is None:
        whole = out.with_name("float.gguf")
        write_gguf(source, whole)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    settings.allow_requantize = True
    if code := llama_cpp.llama_model_quantize(str(whole).encode(), str(out).encode(), settings):
        raise ConversionError(f"llama.cpp cannot quantize {whole.name} (code {code})")
    if given is None:
        whole.unlink()


def write_gguf(source: Path, target: Path) -> None:
    """A GPT-2 folder as a float32 GGUF file."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "gpt2":
        raise ConversionError(f"llama.cpp has no architecture for {config['model_type']}")
    writer: Any = gguf.GGUFWriter(str(target), "gpt2")
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_feed_forward_length(config["n_inner"] or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(0)
    _add_tokens(writer, source, config["vocab_size"])
    for name, array in load_file(source / "model.safetensors").items():
        if (place := _gguf_name(name.removeprefix("transformer."))) is not None:
            # a Conv1D holds [K,N], and GGUF [N,K]
            linear = array.ndim == 2 and ".h." in f".{name}"
            writer.add_tensor(place, np.ascontiguousarray(array.T if linear else array, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str | None:
    """The tensor's name in GGUF; None for what is no weight, and for a head that is tied to the embedding table."""
    parts = name.split(".")
    if parts[0] == "h" and parts[-1] in ("weight", "bias") and ".".join(parts[2:-1]) in GPT2_LAYER:
        return f"blk.{parts[1]}.{GPT2_LAYER['.'.join(parts[2:-1])]}.{parts[-1]}"
    return GPT2.get(name)


def _add_tokens(writer: Any, source: Path, size: int) -> None:
    """The folder's byte-level tokenizer, filled up to the model's vocabulary; text is never tokenized with it here."""
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    known = sorted(tokenizer["vocab"], key=lambda token: tokenizer["vocab"][token])
    tokens = known + [f"[unused{index}]" for index in range(len(known), size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(known) + [5] * (size - len(known)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def to_genai(source: Path, out: Path) -> None:
    """Run onnxruntime-genai's model builder on a local folder: int4 weights in blocks of 32, for the CPU."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(out)]
    command += ["-p", "int4", "-e", "cpu", "-c", str(out / "cache")]
    command += ["--extra_options", "int4_accuracy_level=4", "int4_block_size=32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()] or ["no message"]
        raise ConversionError(f"its builder stopped: {said[-1][:300]}")
