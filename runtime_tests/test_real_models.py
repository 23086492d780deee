"""Reference models that come out of packages: their readers on small files made here and, where slow, the real ones."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import pre_tokenizers

from scalefold.compiler.errors import SourceError
from scalefold.models import rxnfp, rxnmapper, smollm2

VOCABULARY = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>", "th", "Ġth"]
MERGES = ["t h", "Ġ th"]
CONTROL = (256, 257, 258)
HEADS, KEY_HEADS, WIDTH, INNER = 4, 2, 32, 64
REACTION = "C[C@@H](N)C(=O)O.[Na+].BrC%12CC%12>>c1ccc(Cl)cc1/C=C\\N"


@pytest.fixture(scope="module")
def llama() -> Any:
    """A Llama with random weights and an untied head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 2, "vocab_size": len(VOCABULARY)}
    config = LlamaConfig(
        **sizes,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model.eval()


def pairs_side_by_side(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """The order of rows that llama.cpp's converter gives q and k (`LlamaModel.permute` of convert_hf_to_gguf.py)."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def tensors_of(llama: Any) -> dict[str, npt.NDArray[np.float32]]:
    """The weights under GGUF's names, as llama.cpp's converter writes them."""
    found = {}
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    layer = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, tensor in llama.state_dict().items():
        inside = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
        array = tensor.numpy()
        if inside and inside[2].endswith(("q_proj", "k_proj")):
            array = pairs_side_by_side(array, HEADS if inside[2].endswith("q_proj") else KEY_HEADS)
        renamed = f"blk.{inside[1]}.{layer[inside[2]]}" if inside else names[name.removesuffix(".weight")]
        found[f"{renamed}.weight"] = array
    return found


def write_gguf(
    path: Path,
    tensors: dict[str, npt.NDArray[np.float32]],
    *,
    architecture: str = "llama",
    split: str = "smollm",
    quantized: dict[str, gguf.GGMLQuantizationType] | None = None,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """A GGUF file of these tensors, in the form of llama.cpp's converter."""
    writer = gguf.GGUFWriter(path, architecture)
    for add, value in (
        (writer.add_block_count, 2), (writer.add_context_length, 64), (writer.add_embedding_length, WIDTH),
        (writer.add_feed_forward_length, INNER), (writer.add_head_count, HEADS), (writer.add_head_count_kv, KEY_HEADS),
        (writer.add_vocab_size, len(VOCABULARY)), (writer.add_bos_token_id, 257), (writer.add_eos_token_id, 258),
        (writer.add_pad_token_id, 258), (writer.add_unk_token_id, 256),
    ):  # fmt: skip
        add(value)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3 if index in CONTROL else 1 for index in range(len(VOCABULARY))])
    writer.add_token_merges(MERGES)
    change(writer)
    for name, array in tensors.items():
        kind = (quantized or {}).get(name)
        if kind is None:
            writer.add_tensor(name, array)
        else:
            stored = gguf.quantize(array, kind) if kind == gguf.GGMLQuantizationType.Q8_0 else array.astype(np.int8)
            writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_becomes_the_model_it_was_written_from(llama: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    smollm2.convert(write_gguf(tmp_path / "m.gguf", tensors_of(llama)), tmp_path / "model")
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(found.values()), found
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == dict.fromkeys(
        llama.state_dict(), torch.float32
    )
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, llama(ids).logits, rtol=0, atol=0)
    assert (model.generation_config.eos_token_id, model.generation_config.bos_token_id) == (258, 257)


def test_a_head_that_is_tied_is_in_the_folder_once(llama: Any, tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    tensors = {name: array for name, array in tensors_of(llama).items() if name != "output.weight"}
    smollm2.convert(write_gguf(tmp_path / "m.gguf", tensors), tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", "np") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (it is no dictionary)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_quantized_tensors_are_dequantized(llama: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    kinds = {"blk.0.ffn_up.weight": gguf.GGMLQuantizationType.Q8_0}
    smollm2.convert(write_gguf(tmp_path / "m.gguf", tensors_of(llama), quantized=kinds), tmp_path / "model")
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()["model.layers.0.mlp.up_proj.weight"]
    wanted = llama.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert 0 < (got - wanted).abs().max() <= wanted.abs().max() / 127


def test_the_tokenizer_merges_splits_digits_and_keeps_control_tokens_whole(llama: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    smollm2.convert(write_gguf(tmp_path / "m.gguf", tensors_of(llama)), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.tokenize("the 12 thé<|im_end|>") == [
        "th", "e", "Ġ", "1", "2", "Ġth", "Ã", "©", "<|im_end|>",
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer("the 12 thé\n")["input_ids"]) == "the 12 thé\n"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_start|>", "<|im_end|>", 64)


def dropped(llama: Any) -> dict[str, npt.NDArray[np.float32]]:
    return {name: array for name, array in tensors_of(llama).items() if "ffn_up" not in name}


FAULTS: dict[str, tuple[Callable[[Any, Path], object], str]] = {
    "another architecture": (
        lambda llama, path: write_gguf(path, tensors_of(llama), architecture="qwen2"),
        "its architecture is qwen2, which this reader does not know",
    ),
    "missing tensors": (
        lambda llama, path: write_gguf(path, dropped(llama)),
        r"it lacks 2 of its tensors, such as blk\.0\.ffn_up\.weight",
    ),
    "an unknown tensor": (
        lambda llama, path: write_gguf(path, tensors_of(llama) | {"blk.0.attn_q.bias": np.ones(WIDTH, np.float32)}),
        r"it holds blk\.0\.attn_q\.bias, which this reader does not know",
    ),
    "a tensor of another shape": (
        lambda llama, path: write_gguf(path, tensors_of(llama) | {"output_norm.weight": np.ones(5, np.float32)}),
        r"output_norm\.weight has shape \[5\], not \[32\]",
    ),
    "an unknown quantization": (
        lambda llama, path: write_gguf(
            path, tensors_of(llama), quantized={"blk.1.ffn_up.weight": gguf.GGMLQuantizationType.I8}
        ),
        r"blk\.1\.ffn_up\.weight is quantized as I8, which gguf cannot read",
    ),
    "another tokenizer": (
        lambda llama, path: write_gguf(path, tensors_of(llama), split="qwen2"),
        "its tokenizer is gpt2/qwen2, which this reader does not know",
    ),
    "scaled positions": (
        lambda llama, path: write_gguf(
            path, tensors_of(llama), change=lambda writer: writer.add_rope_scaling_factor(2.0)
        ),
        r"its rotary embedding is scaled \(llama\.rope\.scaling\.factor\)",
    ),
    "text": (lambda llama, path: path.write_text("no model at all " * 9), "it is not a GGUF file of a known form"),
    "nothing": (lambda llama, path: path.touch(), "it is not a GGUF file of a known form"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_gguf_that_the_reader_does_not_know_is_one_error(llama: Any, tmp_path: Path, fault: str) -> None:
    write, message = FAULTS[fault]
    write(llama, tmp_path / "m.gguf")
    with pytest.raises(SourceError, match=rf"m\.gguf: {message}.*; give the whole GGUF file of a Llama"):
        smollm2.convert(tmp_path / "m.gguf", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("share", [0.01, 0.3, 0.99])
def test_a_gguf_that_is_cut_short_is_one_error(llama: Any, tmp_path: Path, share: float) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", tensors_of(llama)).read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(SourceError, match=r"m\.gguf: it is not a GGUF file of a known form, or it is cut short"):
        smollm2.convert(tmp_path / "m.gguf", tmp_path / "model")


def test_reading_a_gguf_without_its_package_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SourceError, match=r"needs the package gguf; pip install 'scalefold\[hf\]'"):
        smollm2.convert(tmp_path / "m.gguf", tmp_path / "model")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (REACTION, None),  # nothing is dropped
        ("CC(=O)[O-].[K+]>>[13CH3]N", ["C", "C", "(", "=", "O", ")", "[O-]", ".", "[K+]", ">>", "[13CH3]", "N"]),
        ("BrBClC", ["Br", "B", "Cl", "C"]),
        ("A>B", [">", "B"]),
        ("C é\tZ1", ["C", "1"]),
        ("[unclosed", ["n", "c", "o", "s"]),
        ("C%10C[C@@]%123", ["C", "%10", "C", "[C@@]", "%12", "3"]),
        ("", []),
    ],
)
@pytest.mark.parametrize("pattern", [rxnmapper.PATTERN, rxnfp.PATTERN], ids=["rxnmapper", "rxnfp"])
def test_a_reaction_is_split_as_the_pattern_finds_it(pattern: str, text: str, wanted: list[str] | None) -> None:
    found = re.findall(pattern, text)
    vocabulary = [*rxnmapper.SPECIAL.values(), *dict.fromkeys(found)]
    tokens = rxnmapper.smiles_tokenizer(vocabulary, pattern).encode(text).tokens
    assert tokens == ["[CLS]", *found, "[SEP]"]
    assert found == (wanted if wanted is not None else found)
    if wanted is None:
        assert "".join(found) == text


def test_only_rxnfp_knows_three_digits_and_bars() -> None:
    text = "C%(123)|"
    assert re.findall(rxnfp.PATTERN, text) == ["C", "%(123)", "|"]
    assert re.findall(rxnmapper.PATTERN, text) == ["C", "(", "1", "2", "3", ")"]


def test_a_piece_outside_the_vocabulary_is_unknown() -> None:
    tokenizer = rxnmapper.smiles_tokenizer([*rxnmapper.SPECIAL.values(), "C"], rxnmapper.PATTERN)
    assert tokenizer.encode("C[Xx]C").tokens == ["[CLS]", "C", "[UNK]", "C", "[SEP]"]
    assert tokenizer.encode("C", "C").type_ids == [0, 0, 0, 1, 1]


def test_sample_reactions_are_whole_and_different() -> None:
    texts = rxnmapper.samples()
    assert len(texts) == len(set(texts)) >= 200
    for text in texts:
        assert text.count(">>") == 1
        assert "".join(re.findall(rxnmapper.PATTERN, text)) == text
        assert text.count("(") == text.count(")")
    assert rxnfp.samples() == texts


@pytest.mark.slow
def test_smollm2_knows_a_capital() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, found = AutoModelForCausalLM.from_pretrained(smollm2.build(), output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(smollm2.build())
    assert not any(found.values()), found
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


@pytest.mark.slow
def test_rxnmapper_fills_masks_of_a_reaction() -> None:
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    model, found = AutoModelForMaskedLM.from_pretrained(rxnmapper.build(), output_loading_info=True)
    assert (found["missing_keys"], found["mismatched_keys"]) == (set(), set())
    tokenizer = AutoTokenizer.from_pretrained(rxnmapper.build())
    ids = tokenizer("CC(=O)O.NCc1ccccc1>>CC(=O)NCc1ccccc1", return_tensors="pt")["input_ids"]
    hits = []
    for place in range(1, ids.shape[1] - 1):
        hidden = ids.clone()
        hidden[0, place] = tokenizer.mask_token_id
        with torch.no_grad():
            hits.append(bool(model(hidden).logits[0, place].argmax() == ids[0, place]))
    assert sum(hits) / len(hits) > 0.9


@pytest.mark.slow
def test_rxnfp_puts_reactions_of_one_kind_into_one_class() -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, found = AutoModelForSequenceClassification.from_pretrained(rxnfp.build(), output_loading_info=True)
    assert not any(found.values()), found
    assert model.config.num_labels == len(model.config.id2label) == rxnfp.CLASSES
    tokenizer = AutoTokenizer.from_pretrained(rxnfp.build())
    kinds = {"amides": rxnfp.samples()[:30], "sulfonamides": rxnfp.samples()[170:200]}
    likeliest = {}
    for kind, texts in kinds.items():
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        with torch.no_grad():
            classes = model(**batch).logits.argmax(dim=1).tolist()
        likeliest[kind] = max(set(classes), key=classes.count)
        assert classes.count(likeliest[kind]) >= 20
    assert likeliest["amides"] != likeliest["sulfonamides"]
