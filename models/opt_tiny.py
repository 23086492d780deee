"""opt-tiny: OPT's architecture at 4 layers and width 256, trained in-house; not a published model (Apache-2.0).

Separate Q, K and V, ReLU, norms before the layers, learned positions at an offset of 2. Card: models/opt-tiny/README.md.
"""

from __future__ import annotations

from scalefold.models.tiny import Decoder

MODEL = Decoder(
    "opt-tiny",
    layer="model.decoder.layers.{}",
    readers={
        "self_attn_layer_norm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "final_layer_norm": ("fc1",),
    },
    inputs=1,
)
TASK = "causal-lm"

build = MODEL.build
build_outliers = MODEL.build_outliers
samples = MODEL.samples
metric = MODEL.metric
