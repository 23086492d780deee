"""RXNMapper: an ALBERT of 12 layers that share their weights, width 256, over reaction SMILES (MIT).

The files come from the package `rxnmapper==0.4.3`, which is read and never imported. The model was trained to fill masked
tokens of reactions, `reactants>>products`; the package maps atoms by its attention. The metric is accuracy on masked
tokens. `models/rxnfp.py` shares the way its tokenizer is built.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from scalefold.compiler.machine import cache_folder
from scalefold.models.wheels import files_of

TASK = "masked-lm"
METRIC = "masked"
PACKAGE = "rxnmapper==0.4.3"
PATTERN = r"(\[[^\]]+\]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|\%[0-9]{2}|[0-9])"
"""`SMI_REGEX_PATTERN` of `rxnmapper/smiles_utils.py`: what a token is. Text between tokens is dropped."""
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}

ACYLS = (
    "CC(=O)", "CCOC(=O)CC(=O)", "CC[C@H](C)C(=O)", "c1ccccc1C(=O)", "c1cc(F)ccc1C(=O)", "c1cc([N+](=O)[O-])ccc1C(=O)",
    "c1ccncc1C(=O)", "c1ccoc1/C=C/C(=O)", "CC(C)(C)OC(=O)N1CCC[C@@H]1C(=O)", "c1ccc2[nH]ccc2c1C(=O)",
)  # fmt: skip
"""Pieces of SMILES whose last atom takes the bond."""
AMINES = (
    "NCC", "NCc1ccccc1", "Nc1ccc(Cl)cc1", "N1CCOCC1", "N1CCN(C)CC1", "NC1CC1", "NCCc1c[nH]c2ccccc12",
    "N[C@@H](C)C(=O)OC", "Nc1nccs1", "NCC#N",
)  # fmt: skip
ARYLS = (
    "c1ccccc1", "c1ccc(OC)cc1", "c1ccc(C#N)cc1", "c1ccc(C(F)(F)F)nc1", "c1cnc2ccccc2c1", "c1csc(Br)c1",
    "c1ccc(S(C)(=O)=O)cc1",
)  # fmt: skip
"""Pieces of SMILES whose first atom takes the bond."""


def build() -> Path:
    """The folder of the model: config, weights, and a tokenizer that splits as the package does."""
    source = files_of(
        PACKAGE,
        "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
        "pytorch_model.bin",
        "8541f3f500dae71abe678d546bd035ca946e2d1c819f6b2cf41a97faedd7e6a2",
    )
    return with_tokenizer(source, cache_folder() / f"{PACKAGE}-tokenizer", PATTERN, {})


def samples() -> list[str]:
    """Reactions to calibrate with, put together from pieces: `reactants>>product`."""
    amides = (f"{acyl}O.{amine}.CCN=C=NCCCN(C)C>>{acyl}{amine}" for acyl, amine in product(ACYLS, AMINES))
    aminations = (f"O=C{aryl}.{amine}.[BH4-].[Na+]>>C({aryl}){amine}" for aryl, amine in product(ARYLS, AMINES))
    sulfonamides = (
        f"O=S(=O)(Cl){aryl}.{amine}.CCN(CC)CC>>O=S(=O)({aryl}){amine}" for aryl, amine in product(ARYLS, AMINES)
    )
    hydrolyses = (f"{acyl}OC.[Li+].[OH-].O>>{acyl}O" for acyl in ACYLS)
    reductions = (f"[O-][N+](=O){aryl}.[H][H].[Pd]>>N{aryl}" for aryl in ARYLS)
    return [*amides, *aminations, *sulfonamides, *hydrolyses, *reductions]


def metric() -> str:
    """The name of the metric in `scalefold eval`."""
    return METRIC


def smiles_tokenizer(vocabulary: list[str], pattern: str) -> Tokenizer:
    """A tokenizer of reaction SMILES: a token is what the pattern matches, between [CLS] and [SEP].

    The packages take `re.findall(pattern, text)`, so what lies between matches is dropped, and look the pieces up in the
    vocabulary as they are: `Split` by the inverted pattern that removes what does not match, and a word-level model.
    """
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL["unk"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    tokenizer.post_processor = processors.BertProcessing(
        (SPECIAL["sep"], ids[SPECIAL["sep"]]), (SPECIAL["cls"], ids[SPECIAL["cls"]])
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL.values()])
    return tokenizer


def with_tokenizer(source: Path, target: Path, pattern: str, changes: dict[str, Any]) -> Path:
    """A copy of a package's model with a tokenizer that transformers loads.

    Args:
        source: config.json, pytorch_model.bin and vocab.txt.
        target: the folder to make; left as it is when it is there.
        pattern: see `smiles_tokenizer`.
        changes: entries of config.json to set.
    """
    if target.is_dir():
        return target
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | changes
    vocabulary = (source / "vocab.txt").read_text(encoding="utf-8").splitlines()
    described = {f"{name}_token": token for name, token in SPECIAL.items()} | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        stage = Path(scratch) / "model"
        stage.mkdir()
        shutil.copyfile(source / "pytorch_model.bin", stage / "pytorch_model.bin")
        smiles_tokenizer(vocabulary, pattern).save(str(stage / "tokenizer.json"))
        for name, content in (("config.json", config), ("tokenizer_config.json", described)):
            (stage / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if not target.is_dir():  # another process may have been faster
            stage.rename(target)
    return target
