"""Sentence embeddings with nothing but onnxruntime, tokenizers and numpy: `embed_onnxruntime.py FOLDER`.

The graph takes int64 ids and gives token states [B,S,384]; their mean over the tokens that are no padding, at length 1, is
the embedding. A fused folder brings its operators in a library, which the session is told of.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
from tokenizers import Tokenizer

LIBRARY = "scalefold_kernels.so"
SENTENCES = ("A man is playing a guitar.", "Someone plays an instrument.", "The market fell by two percent.")


def embed(folder: Path, sentences: list[str]) -> npt.NDArray[np.float32]:
    """Embeddings of length 1, [sentences, width]."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(sentences)
    feed = {
        "input_ids": np.array([entry.ids for entry in encoded], dtype=np.int64),
        "attention_mask": np.array([entry.attention_mask for entry in encoded], dtype=np.int64),
        "token_type_ids": np.array([entry.type_ids for entry in encoded], dtype=np.int64),
    }
    options = onnxruntime.SessionOptions()
    if (folder / LIBRARY).is_file():
        options.register_custom_ops_library(str((folder / LIBRARY).absolute()))
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    states = session.run(["last_hidden_state"], feed)[0]
    weights = feed["attention_mask"][..., None].astype(np.float32)
    means = (states * weights).sum(axis=1) / weights.sum(axis=1)
    unit: npt.NDArray[np.float32] = means / np.linalg.norm(means, axis=1, keepdims=True)
    return unit


if __name__ == "__main__":
    vectors = embed(Path(sys.argv[1]), list(SENTENCES))
    for left, right in ((0, 1), (0, 2), (1, 2)):
        print(f"{vectors[left] @ vectors[right]:7.4f}  {SENTENCES[left]} | {SENTENCES[right]}")
