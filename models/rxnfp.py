"""rxnfp: a BERT of 12 layers and width 256 that sorts chemical reactions into 50 classes (MIT).

The files come from the package `rxnfp==0.1.0`, which is read and never imported: `bert_ft_10k_25s`, trained on 10,000
reactions of the Schneider 50k set. Their labels are not at hand, so the metric is agreement with the float model.
"""

from __future__ import annotations

from pathlib import Path

from scalefold.compiler.machine import cache_folder
from scalefold.models import rxnmapper
from scalefold.models.wheels import files_of

TASK = "sequence-classification"
METRIC = "classification"
PACKAGE = "rxnfp==0.1.0"
CLASSES = 50
PATTERN = (
    r"(\%\([0-9]{3}\)|\[[^\]]+\]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\||\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$"
    r"|\%[0-9]{2}|[0-9])"
)
"""`SMI_REGEX_PATTERN` of `rxnfp/tokenization.py`."""


def build() -> Path:
    """The folder of the model: config, weights, and a tokenizer that splits as the package does."""
    source = files_of(
        PACKAGE,
        "rxnfp/models/transformers/bert_ft_10k_25s",
        "pytorch_model.bin",
        "f9bcac41c7c09eb0ca2c0b355494fe92ca03aa5085e0f2b7a44f716212e61c71",
    )
    # the package's config counts 50 labels and names two of them
    names = {str(index): f"LABEL_{index}" for index in range(CLASSES)}
    changes = {"id2label": names, "label2id": {name: int(index) for index, name in names.items()}}
    return rxnmapper.with_tokenizer(source, cache_folder() / f"{PACKAGE}-tokenizer", PATTERN, changes)


def samples() -> list[str]:
    """Reactions to calibrate with."""
    return rxnmapper.samples()


def metric() -> str:
    """The name of the metric in `scalefold eval`."""
    return METRIC
