"""Sentence embeddings with fastembed, the folder as a custom model: `embed_fastembed.py FOLDER`.

`TextEmbedding` makes its session itself and takes no library of operators. A fused folder is opened by a class derived from
fastembed's own for custom models, which adds the library where the session's options are made.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnxruntime
from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType
from fastembed.text.custom_text_embedding import CustomTextEmbedding

NAME = "local/minilm-w8a8"
FOLDER = Path(sys.argv[1])
LIBRARY = FOLDER.absolute() / "scalefold_kernels.so"
SENTENCES = ("A man is playing a guitar.", "Someone plays an instrument.", "The market fell by two percent.")


class FusedTextEmbedding(CustomTextEmbedding):  # type: ignore[misc]
    """A custom model whose session knows the operators of the fused folder."""

    @classmethod
    def add_extra_session_options(
        cls, session_options: onnxruntime.SessionOptions, extra_options: dict[str, Any]
    ) -> None:
        """Called with the options before the session is made."""
        super().add_extra_session_options(session_options, extra_options)
        session_options.register_custom_ops_library(str(LIBRARY))


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
    loader = FusedTextEmbedding if LIBRARY.is_file() else TextEmbedding
    model = loader(NAME, specific_model_path=str(FOLDER))
    vectors = list(model.embed(SENTENCES))
    for left, right in ((0, 1), (0, 2), (1, 2)):
        print(f"{vectors[left] @ vectors[right]:7.4f}  {SENTENCES[left]} | {SENTENCES[right]}")
