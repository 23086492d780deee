"""bloom-tiny: BLOOM's architecture at 4 layers and width 256, trained in-house; not a published model (Apache-2.0).

One fused QKV product with the heads interleaved, ALiBi instead of positions, a norm behind the embeddings, tanh-GELU.
That norm is left alone by the planted variant: it feeds the residual stream. Card: models/bloom-tiny/README.md.
"""

from __future__ import annotations

from scalefold.models.tiny import Decoder

MODEL = Decoder(
    "bloom-tiny",
    layer="transformer.h.{}",
    readers={
        "input_layernorm": ("self_attention.query_key_value",),
        "post_attention_layernorm": ("mlp.dense_h_to_4h",),
    },
    inputs=1,
)
TASK = "causal-lm"

build = MODEL.build
build_outliers = MODEL.build_outliers
samples = MODEL.samples
metric = MODEL.metric
