"""Sentence embeddings with infinity's engine and its ONNX backend: `embed_infinity.py FOLDER`.

infinity gives optimum the whole path of an ONNX file it finds in a local folder, where optimum wants the path within that
folder; the two are the same when the folder is the current one.
"""

from __future__ import annotations

import asyncio
import os
import sys

from infinity_emb import AsyncEmbeddingEngine, EngineArgs

SENTENCES = ("A man is playing a guitar.", "Someone plays an instrument.", "The market fell by two percent.")


async def main() -> None:
    settings = EngineArgs(
        model_name_or_path=".",
        engine="optimum",
        device="cpu",
        pooling_method="mean",
        model_warmup=False,
        onnx_disable_optimize=True,  # onnxruntime has nothing left to fuse, and the optimizer would copy the model
    )
    engine = AsyncEmbeddingEngine.from_args(settings)
    async with engine:
        vectors, _ = await engine.embed(sentences=list(SENTENCES))
    for left, right in ((0, 1), (0, 2), (1, 2)):
        print(f"{vectors[left] @ vectors[right]:7.4f}  {SENTENCES[left]} | {SENTENCES[right]}")


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    asyncio.run(main())
