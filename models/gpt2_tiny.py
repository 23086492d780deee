"""gpt2-tiny: GPT-2's architecture at 4 layers and width 256, trained in-house; not a published model (Apache-2.0).

One fused QKV product, weights stored inputs first (Conv1D), tanh-GELU, learned positions. Card: models/gpt2-tiny/README.md.
"""

from __future__ import annotations

from scalefold.models.tiny import Decoder

MODEL = Decoder(
    "gpt2-tiny",
    layer="transformer.h.{}",
    readers={"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)},
    inputs=0,
)
TASK = "causal-lm"

build = MODEL.build
build_outliers = MODEL.build_outliers
samples = MODEL.samples
metric = MODEL.metric
