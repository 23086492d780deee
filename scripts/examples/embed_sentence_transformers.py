"""Sentence embeddings with sentence-transformers and its ONNX backend: `embed_sentence_transformers.py FOLDER`.

Pooling and normalization come from the folder's modules.json, as for the float model. The operators of a fused folder
go to the session in its options.
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnxruntime
from sentence_transformers import SentenceTransformer

LIBRARY = "scalefold_kernels.so"
SENTENCES = ("A man is playing a guitar.", "Someone plays an instrument.", "The market fell by two percent.")

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    options = onnxruntime.SessionOptions()
    if (folder / LIBRARY).is_file():
        options.register_custom_ops_library(str((folder / LIBRARY).absolute()))
    settings = {"provider": "CPUExecutionProvider", "file_name": "model.onnx", "session_options": options}
    model = SentenceTransformer(str(folder), backend="onnx", device="cpu", model_kwargs=settings)
    vectors = model.encode(list(SENTENCES), normalize_embeddings=True)
    for left, right in ((0, 1), (0, 2), (1, 2)):
        print(f"{vectors[left] @ vectors[right]:7.4f}  {SENTENCES[left]} | {SENTENCES[right]}")
