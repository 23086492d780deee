"""Sentence embeddings with sentence-transformers and its ONNX backend: `embed_sentence_transformers.py FOLDER`.

Pooling and normalization come from the folder's modules.json, as for the float model.
"""

from __future__ import annotations

import sys

from sentence_transformers import SentenceTransformer

SENTENCES = ("A man is playing a guitar.", "Someone plays an instrument.", "The market fell by two percent.")

if __name__ == "__main__":
    settings = {"provider": "CPUExecutionProvider", "file_name": "model.onnx"}
    model = SentenceTransformer(sys.argv[1], backend="onnx", device="cpu", model_kwargs=settings)
    vectors = model.encode(list(SENTENCES), normalize_embeddings=True)
    for left, right in ((0, 1), (0, 2), (1, 2)):
        print(f"{vectors[left] @ vectors[right]:7.4f}  {SENTENCES[left]} | {SENTENCES[right]}")
