"""Write `genai_config.json` into the folder of a compiled or fused decoder, for onnxruntime-genai: `genai_files.py FOLDER`.

onnxruntime-genai fills the inputs by the names that this file gives, so the graph stays as it is. Sizes are read from the
graph and config.json; the tokens that end a text from generation_config.json, or else from config.json. The library of
a fused folder is named as `custom_ops_library`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from scalefold.compiler.artifact import MODEL, write_json
from scalefold.compiler.decoder import LOGITS, Decoder, decoder_of, position_limit
from scalefold.compiler.errors import ScalefoldError, SourceError
from scalefold.compiler.kernel_library import LIBRARY

CONFIG = "genai_config.json"
DEFAULT_LIMIT = 2048


def write(folder: Path) -> Path:
    """Write the file and return its path.

    Raises:
        SourceError: the folder holds no decoder with a cache.
    """
    if not (folder / MODEL).is_file():
        raise SourceError(f"there is no {MODEL} in it", where=str(folder), remedy="give a compiled decoder")
    decoder = decoder_of(ir.load(folder / MODEL), str(folder))
    config = genai_config(decoder, _read(folder, "config.json"), _ends(folder), _limit(folder))
    if (folder / LIBRARY).is_file():  # a name alone is looked up in the folder
        config["model"]["decoder"]["session_options"]["custom_ops_library"] = LIBRARY
    write_json(folder / CONFIG, config)
    return folder / CONFIG


def genai_config(decoder: Decoder, config: dict[str, Any], ends: list[int], limit: int) -> dict[str, Any]:
    """The content of genai_config.json.

    Args:
        decoder: what the graph takes and gives back.
        config: config.json.
        ends: the tokens that end a text.
        limit: the length of the position table.
    """
    past_keys, past_values = patterns(decoder.cache)
    present_keys, present_values = patterns(decoder.outputs.values())
    _, heads, _, width = next(iter(decoder.cache.values())).shape
    return {
        "model": {
            # any plain decoder is "llama" to it: "gpt2" there means one merged tensor for keys and values
            "type": "llama",
            "bos_token_id": config.get("bos_token_id", ends[0]),
            "eos_token_id": ends,
            "pad_token_id": config.get("pad_token_id") or ends[0],
            "vocab_size": config["vocab_size"],
            "context_length": limit,
            "decoder": {
                "filename": MODEL,
                "session_options": {"provider_options": []},
                "head_size": width,
                "hidden_size": config.get("hidden_size", config.get("n_embd")),
                "num_attention_heads": config.get("num_attention_heads", config.get("n_head")),
                "num_key_value_heads": heads,
                "num_hidden_layers": len(decoder.cache) // 2,
                "inputs": {name: name for name in decoder.tokens}
                | {"past_key_names": past_keys, "past_value_names": past_values},
                "outputs": {"logits": LOGITS, "present_key_names": present_keys, "present_value_names": present_values},
            },
        },
        # the cache grows by concatenation in the graph, so the past and the present are different buffers
        "search": {"max_length": limit, "past_present_share_buffer": False},
    }


def patterns(names: Iterable[str]) -> tuple[str, str]:
    """The names of keys and of values with `%d` where the layer's number stands."""
    found = sorted({re.sub(r"\d+", "%d", name) for name in names})
    keys, values = found  # "...keys" before "...values", and ".key" before ".value"
    return keys, values


def _limit(folder: Path) -> int:
    return position_limit(folder) or DEFAULT_LIMIT


def _ends(folder: Path) -> list[int]:
    """The tokens that end a text."""
    for name in ("generation_config.json", "config.json"):
        found = _read(folder, name).get("eos_token_id")
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    raise SourceError(
        "it does not say which token ends a text", where=str(folder), remedy="add eos_token_id to config.json"
    )


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    assert isinstance(content, dict)
    return content


if __name__ == "__main__":
    try:
        print(write(Path(sys.argv[1])))
    except ScalefoldError as error:
        sys.exit(f"error {error}")
