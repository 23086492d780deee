"""Sentence embeddings with transformers' own loader of exported models: `embed_transformers.py FOLDER`."""

from __future__ import annotations

import sys

import torch
from transformers import AutoTokenizer
from transformers.exporters import ExportedModel

SENTENCES = ("A man is playing a guitar.", "Someone plays an instrument.", "The market fell by two percent.")

if __name__ == "__main__":
    model = ExportedModel.from_pretrained(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    encoded = tokenizer(list(SENTENCES), padding=True, truncation=True, return_tensors="pt")
    states = model(**encoded)["last_hidden_state"]
    weights = encoded["attention_mask"][..., None].to(states.dtype)
    vectors = torch.nn.functional.normalize((states * weights).sum(dim=1) / weights.sum(dim=1))
    for left, right in ((0, 1), (0, 2), (1, 2)):
        print(f"{float(vectors[left] @ vectors[right]):7.4f}  {SENTENCES[left]} | {SENTENCES[right]}")
