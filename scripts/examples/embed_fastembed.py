"""Sentence embeddings with fastembed, the folder as a custom model: `embed_fastembed.py FOLDER`."""

from __future__ import annotations

import sys

from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType

NAME = "local/minilm-w8a8"
SENTENCES = ("A man is playing a guitar.", "Someone plays an instrument.", "The market fell by two percent.")

if __name__ == "__main__":
    TextEmbedding.add_custom_model(
        model=NAME,
        pooling=PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(hf=NAME),  # required, and never asked, for the path below is given
        dim=384,
        model_file="model.onnx",
        additional_files=["model.onnx.data"],
    )
    model = TextEmbedding(NAME, specific_model_path=sys.argv[1])
    vectors = list(model.embed(SENTENCES))
    for left, right in ((0, 1), (0, 2), (1, 2)):
        print(f"{vectors[left] @ vectors[right]:7.4f}  {SENTENCES[left]} | {SENTENCES[right]}")
