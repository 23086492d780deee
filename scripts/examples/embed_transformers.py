"""Sentence embeddings with transformers' own loader of exported models: `embed_transformers.py FOLDER`.

It hands `session_options` to onnxruntime, and with them the operators of a fused folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnxruntime
import torch
from transformers import AutoTokenizer
from transformers.exporters import ExportedModel

LIBRARY = "scalefold_kernels.so"
SENTENCES = ("A man is playing a guitar.", "Someone plays an instrument.", "The market fell by two percent.")

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    options = onnxruntime.SessionOptions()
    if (folder / LIBRARY).is_file():
        options.register_custom_ops_library(str((folder / LIBRARY).absolute()))
    model = ExportedModel.from_pretrained(folder, session_options=options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(list(SENTENCES), padding=True, truncation=True, return_tensors="pt")
    states = model(**encoded)["last_hidden_state"]
    weights = encoded["attention_mask"][..., None].to(states.dtype)
    vectors = torch.nn.functional.normalize((states * weights).sum(dim=1) / weights.sum(dim=1))
    for left, right in ((0, 1), (0, 2), (1, 2)):
        print(f"{float(vectors[left] @ vectors[right]):7.4f}  {SENTENCES[left]} | {SENTENCES[right]}")
