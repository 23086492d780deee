from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from scalefold.compiler import CompileReport
from scalefold.compiler.driver import open_source
from scalefold.compiler.errors import CalibrationError, SourceError
from scalefold.compiler.evaluate import (
    Pair,
    Request,
    Window,
    agreement,
    classification,
    compare_on_text,
    embed,
    masked,
    open_folder,
    perplexity,
    read_pairs,
    score,
    spearman,
    sts,
    text_fidelity,
    windows_of,
)
from scalefold.compiler.runtime import Session

ROW = "main-news\tfile\t2012\t0001\t{score}\t{first}\t{second}\n"
SENTENCES = ["the value of the object", "a module", "it is not used by the function that is called and returns a list"]


def steps() -> None:
    """A progress bar that nobody sees."""


def test_pairs_are_read_with_quotes_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "sts.csv"
    rows = [
        ROW.format(score="4.5", first='He said "no', second="Ünïcode"),
        ROW.format(score="0", first="a", second="b"),
    ]
    path.write_text("\n".join(rows), encoding="utf-8")
    assert read_pairs(path) == [Pair('He said "no', "Ünïcode", 4.5), Pair("a", "b", 0.0)]


@pytest.mark.parametrize("content", ["only\tthree\tcolumns\n", ROW.format(score="high", first="a", second="b")])
def test_a_file_of_another_form_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "sts.csv").write_text(content, encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"not a file of the STS benchmark .*; give a tab-separated file"):
        read_pairs(tmp_path / "sts.csv")


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_pairs_to_rank_are_refused(tmp_path: Path, count: int) -> None:
    (tmp_path / "sts.csv").write_text(ROW.format(score="1", first="a", second="b") * count, encoding="utf-8")
    with pytest.raises(CalibrationError, match="fewer than two pairs"):
        read_pairs(tmp_path / "sts.csv")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="No such file"):
        read_pairs(tmp_path / "gone.csv")


def test_spearman_is_what_is_worked_out_by_hand() -> None:
    # Cosines 1, 0, 0.6 rank 3, 1, 2. Squared rank differences sum to 0; to 8; to 2 of n (n^2 - 1) / 6 = 4.
    embeddings = np.array([[1, 0], [1, 0], [1, 0], [1, 0], [0, 1], [0.6, 0.8]], dtype=np.float32)
    for scores, wanted in (((5, 1, 3), 100.0), ((1, 5, 3), -100.0), ((5, 3, 1), 50.0)):
        pairs = [Pair("", "", float(score)) for score in scores]
        assert spearman(pairs, embeddings) == pytest.approx(wanted)


def test_embeddings_have_length_one_and_come_in_the_order_of_the_sentences(float_model: Path) -> None:
    session, tokenizer = open_folder(float_model.parent)
    found = embed(session, tokenizer, SENTENCES, steps)
    assert found.shape == (3, 64)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-5)
    for index, sentence in enumerate(SENTENCES):
        # alone, a sentence has no padding: it must not have had a part in the mean
        np.testing.assert_allclose(embed(session, tokenizer, [sentence], steps)[0], found[index], atol=1e-5)


def test_embedding_advances_once_a_batch(float_model: Path) -> None:
    session, tokenizer = open_folder(float_model)
    calls: list[int] = []
    embed(session, tokenizer, SENTENCES * 11, lambda: calls.append(1))
    assert len(calls) == 3  # 33 sentences in batches of 16


def test_a_model_without_token_states_cannot_embed(float_model: Path) -> None:
    with open_source(float_model) as model:
        pooled = Session(model, outputs=["pooler_output"])
        with pytest.raises(SourceError, match=r"2 dimensions, not \[batch, tokens, width\]; .* feature-extraction"):
            embed(pooled, float_model.parent / "tokenizer.json", SENTENCES, steps)


def test_a_compiled_model_is_compared_on_text(compiled: dict[str, CompileReport], float_model: Path) -> None:
    folder = compiled["onnxruntime-cpu"].output
    assert folder is not None
    with open_source(float_model) as model:
        found = compare_on_text(model, folder, SENTENCES, steps)
    assert [entry.name for entry in found] == ["last_hidden_state", "pooler_output"]
    assert all(0.99 < entry.mean_cosine < 1 and entry.max_error > 0 for entry in found)


def test_fidelity_compares_something_or_says_why_not(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", FILLER, UNEVEN)
    short, data = text_file(tmp_path, "a b\n", "short.txt"), text_file(tmp_path, "a b c d\n")
    with pytest.raises(CalibrationError, match="none of its lines has four words"):
        text_fidelity(Request(folder, short, str(folder / "model.onnx")))
    renamed = folder_with(tmp_path / "r", FILLER.replace("logits", "scores"), UNEVEN)
    with pytest.raises(SourceError, match="the float model: it has no output of a name that the compiled model has"):
        text_fidelity(Request(folder, data, str(renamed / "model.onnx")))
    wider = folder_with(tmp_path / "w", FILLER.replace("6]", "7]"), np.zeros((7, 7)))
    with pytest.raises(SourceError, match=r"the float model: its output has shape \[1, 4, 7\], and .* \[1, 4, 6\]"):
        text_fidelity(Request(folder, data, str(wider / "model.onnx")))


def test_a_model_with_inputs_that_no_sentence_fills_is_one_error(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", BIGRAM, UNEVEN)
    with pytest.raises(CalibrationError, match=r"cannot run the model on it \(it has no past_key_values\.0\)"):
        embed(Session(folder / "model.onnx"), folder / "tokenizer.json", ["a b"], steps)


def test_spearman_without_scipy_is_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(SourceError, match=r"Spearman's correlation needs the package scipy.*; pip install scipy"):
        sts(Request(tmp_path, tmp_path / "pairs.csv"))


@pytest.mark.parametrize("missing", ["model.onnx", "tokenizer.json"])
def test_a_folder_without_model_or_tokenizer_is_refused(tmp_path: Path, missing: str) -> None:
    for name in {"model.onnx", "tokenizer.json"} - {missing}:
        (tmp_path / name).touch()
    with pytest.raises(SourceError, match=f"there is no {missing} in it; give a compiled folder"):
        open_folder(tmp_path)


def test_a_tokenizer_that_is_cut_short_is_one_error(float_model: Path, tmp_path: Path) -> None:
    whole = float_model.with_name("tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2], encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"tokenizer.json: it is not a tokenizer"):
        embed(Session(float_model), tmp_path / "tokenizer.json", SENTENCES, steps)


WORDS = ("a", "b", "c", "d", "[MASK]", "[CLS]")
UNEVEN = np.log(np.array([[7, 1, 1, 1, 1, 1]] * 3 + [[1, 1, 1, 1, 7, 1]] + [[1, 7, 1, 1, 1, 1]] * 2) / 12)
"""Log-probabilities of the next word: after a, b and c it is a, after d the mask, after the others b."""
EVEN = np.zeros((6, 6))

BIGRAM = """<ir_version: 10, opset_import: ["" : 20]>
bigram (int64[b, s] input_ids, int64[b, t] attention_mask, float[b, 1, p, 1] past_key_values_0)
    => (float[b, s, 6] logits, float[b, 1, t, 1] present_0)
<TABLE, int64[2] axes = {1, 3}>
{ logits = Gather(table, input_ids)
  now = CastLike(input_ids, table)  four = Unsqueeze(now, axes)  present_0 = Concat<axis = 2>(past_key_values_0, four) }"""
FILLER = """<ir_version: 10, opset_import: ["" : 20]>
filler (int64[b, s] input_ids) => (float[b, s, 6] logits) <TABLE> { logits = Gather(table, input_ids) }"""
CLASSIFIER = """<ir_version: 10, opset_import: ["" : 20]>
classifier (int64[b, s] input_ids) => (float[b, 6] logits) <TABLE, int64 last = {-1}>
{ end = Gather<axis = 1>(input_ids, last)  logits = Gather(table, end) }"""
Cli = Callable[..., subprocess.CompletedProcess[str]]


def folder_with(folder: Path, text: str, table: Any, *, end: bool = False, **config: Any) -> Path:
    """A model folder: a graph that looks its logits up in a table of words by words, and its tokenizer."""
    numbers = ", ".join(f"{value:.9g}" for value in np.ravel(table))
    model = ir.from_onnx_text(text.replace("TABLE", f"float[{len(table)}, {len(table)}] table = {{{numbers}}}"))
    for value in [*model.graph.inputs, *model.graph.outputs]:
        value.name = (value.name or "").replace("values_0", "values.0").replace("present_0", "present.0")
    folder.mkdir(parents=True, exist_ok=True)
    ir.save(model, folder / "model.onnx")
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="d"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if end:
        tokenizer.add_special_tokens(["[MASK]", "[CLS]"])
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 5)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def text_file(folder: Path, content: str, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("length", "size", "stride", "wanted"),
    [
        (10, 4, 4, [(0, 1), (4, 1)]),
        (10, 4, 2, [(0, 1), (2, 2), (4, 2), (6, 2)]),
        (4, 4, 1, [(0, 1)]),
        (6, 4, 1, [(0, 1), (1, 3), (2, 3)]),
        (3, 4, 4, []),
    ],
)
def test_windows_are_whole_and_score_what_the_ones_before_have_not(
    length: int, size: int, stride: int, wanted: list[tuple[int, int]]
) -> None:
    found = windows_of(np.arange(length), size, stride)
    assert [(int(window.ids[0]), window.scored) for window in found] == wanted
    assert {len(window.ids) for window in found} <= {size}
    scored = [token for window in found for token in window.ids[window.scored :].tolist()]
    assert len(scored) == len(set(scored))


def test_only_the_first_windows_are_taken() -> None:
    assert len(windows_of(np.arange(100), 10, 10, 3)) == 3


def test_scores_are_what_is_worked_out_by_hand() -> None:
    # Tokens 0, 1, 0: the first is not scored. Row 0 gives 1 the probability 1/4 and row 1 gives 0 the probability 3/4.
    got = np.log(np.array([[3, 1], [3, 1], [1, 1]], dtype=np.float32))
    wanted = np.log(np.array([[1, 3], [1, 1], [9, 1]], dtype=np.float32))
    sums = score(got, Window(np.array([0, 1, 0]), 1), wanted)
    assert sums[0] == pytest.approx(-math.log(1 / 4) - math.log(3 / 4))
    assert sums[1] == pytest.approx(-math.log(3 / 4) - math.log(1 / 2))
    assert sums[2] == 1  # the likeliest differ after token 0; after token 1 an even float model names the first
    first = 1 / 4 * math.log((1 / 4) / (3 / 4)) + 3 / 4 * math.log((3 / 4) / (1 / 4))
    second = 1 / 2 * math.log((1 / 2) / (3 / 4)) + 1 / 2 * math.log((1 / 2) / (1 / 4))
    assert sums[3] == pytest.approx(first + second)
    np.testing.assert_array_equal(score(got, Window(np.array([0, 1, 0]), 1))[1:], 0)


def test_scores_do_not_depend_on_how_many_rows_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(3)
    got, wanted = generator.normal(size=(2, 9, 5)).astype(np.float32)
    window = Window(generator.integers(0, 5, 9), 2)
    whole = score(got, window, wanted)
    monkeypatch.setattr("scalefold.compiler.evaluate.ROWS", 2)
    np.testing.assert_allclose(score(got, window, wanted), whole)


def test_perplexity_is_that_of_the_probabilities(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", BIGRAM, UNEVEN)
    data = text_file(tmp_path, "a a b\na a b a a")
    # windows "a a b a" and "a b a a": of 6 scored tokens 4 have the probability 7/12 and 2 have 1/12
    facts = perplexity(Request(folder, data, window=4))
    assert facts == {
        "tokens": 8, "windows": 2, "window": 4, "stride": 4, "scored_tokens": 6,
        "perplexity": pytest.approx((7 / 12) ** (-4 / 6) * (1 / 12) ** (-2 / 6)),
    }  # fmt: skip
    assert perplexity(Request(folder, data, window=4, windows=1))["scored_tokens"] == 3
    assert perplexity(Request(folder, data, window=4, stride=2))["scored_tokens"] == 7


def test_perplexity_and_agreement_stand_beside_the_float_models(tmp_path: Path) -> None:
    folder, other = folder_with(tmp_path / "m", BIGRAM, UNEVEN), folder_with(tmp_path / "f", BIGRAM, EVEN)
    data = text_file(tmp_path, "a a a a c d d d")
    request = Request(folder, data, str(other / "model.onnx"), window=4)
    facts = perplexity(request)
    assert facts["float_perplexity"] == pytest.approx(6)
    assert facts["ratio"] == pytest.approx(float(facts["perplexity"]) / 6, rel=1e-5)
    found = agreement(request)
    # an even model names the first word, as the other does but after d
    assert found["next_token_agreement"] == pytest.approx(4 / 6)
    divergence = 1 / 6 * math.log((1 / 6) / (7 / 12)) + 5 / 6 * math.log((1 / 6) / (1 / 12))
    assert found["kl_divergence_nats"] == pytest.approx(divergence, rel=1e-5)


def test_agreement_with_itself_is_whole(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", BIGRAM, UNEVEN)
    request = Request(folder, text_file(tmp_path, "a b c d a b"), str(folder / "model.onnx"), window=3)
    found = agreement(request)
    assert found["next_token_agreement"] == 1
    assert found["kl_divergence_nats"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 9}, r"text.txt: it holds 8 tokens, too few for one window of 9; give a longer text, or a smaller"),
        ({"window": 17}, r"position table holds 16 positions, fewer than a window of 17; give --window 16 or less"),
        ({"window": 1}, r"a window of 1 tokens with a stride of 1 cannot be scored"),
        ({"window": 4, "stride": 5}, r"a window of 4 tokens with a stride of 5 cannot be scored; .* stride from 1 to"),
        ({"window": 4, "windows": 0}, r"cannot be scored; .* at least 1 window"),
        ({"window": 4, "data": Path("gone.txt")}, r"gone.txt: it cannot be read .*; give UTF-8 text"),
    ],
)
def test_perplexity_of_wrong_data_is_one_error(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = folder_with(tmp_path / "m", BIGRAM, UNEVEN, n_positions=16)
    data = text_file(tmp_path, "a b c d a b c d")
    with pytest.raises((CalibrationError, SourceError), match=message):
        perplexity(Request(**{"folder": folder, "data": data, **change}))


def test_perplexity_of_an_encoder_is_one_error(float_model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"it is not a decoder: .*; export a causal language model with --task causal-lm"
    ):
        perplexity(Request(float_model, text_file(tmp_path, "a b c"), window=2))


def test_a_float_model_of_another_vocabulary_is_one_error(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", BIGRAM, UNEVEN)
    other = folder_with(tmp_path / "f", BIGRAM.replace("6]", "7]"), np.zeros((7, 7)))
    request = Request(folder, text_file(tmp_path, "a b c"), str(other / "model.onnx"), window=3)
    with pytest.raises(
        SourceError, match=r"the float model: its output has shape \[3, 7\], and .* \[3, 6\]; give the model"
    ):
        agreement(request)


def test_agreement_needs_the_float_model(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", BIGRAM, UNEVEN)
    with pytest.raises(SourceError, match="eval: the agreement metric needs the float model; give it with --against"):
        agreement(Request(folder, text_file(tmp_path, "a b c"), window=3))


def test_masked_accuracy_counts_what_the_model_puts_in_place_of_the_mask(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", FILLER, UNEVEN, end=True)  # it fills every mask with b
    data = text_file(tmp_path, "b b b b b b b b b b b b b b b b b b b b\n\na a a a a a\n")
    facts = masked(Request(folder, data))
    assert facts == {"texts": 2, "masked_tokens": 4, "seed": 0, "accuracy": 0.75}  # 15 % of 20 is 3; of 6 it is 1


def test_the_seed_decides_which_tokens_are_masked(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", FILLER, UNEVEN, end=True)
    data = text_file(tmp_path, "\n".join(["a b c d b a a b c d b b"] * 20))
    found = [masked(Request(folder, data, seed=seed))["accuracy"] for seed in (1, 1, 2, 3)]
    assert found[0] == found[1]
    assert len(set(found)) > 1
    assert all(0 < float(accuracy) < 1 for accuracy in found)


def test_masked_accuracy_stands_beside_the_float_models(tmp_path: Path) -> None:
    folder, other = folder_with(tmp_path / "m", FILLER, UNEVEN, end=True), folder_with(tmp_path / "f", FILLER, EVEN)
    facts = masked(Request(folder, text_file(tmp_path, "a a a\nb b b\na b"), str(other / "model.onnx")))
    assert facts["float_accuracy"] == pytest.approx(1 - float(facts["accuracy"]))  # it fills every mask with a
    assert facts["agreement"] == 0


def test_a_tokenizer_without_a_mask_token_is_one_error(tmp_path: Path, float_model: Path) -> None:
    folder = folder_with(tmp_path / "m", FILLER, UNEVEN)
    content = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(content.replace("[MASK]", "e"), encoding="utf-8")
    data = text_file(tmp_path, "a b")
    with pytest.raises(SourceError, match="its tokenizer has no mask token; this metric needs a masked language model"):
        masked(Request(folder, data))
    (folder / "tokenizer_config.json").write_text('{"mask_token": {"content": "e"}}', encoding="utf-8")
    assert masked(Request(folder, data))["masked_tokens"] == 1
    with pytest.raises(
        SourceError, match="it does not give the logits that this metric needs; compile with --task masked-lm"
    ):
        masked(Request(float_model, data))


@pytest.mark.parametrize("metric", [masked, classification])
def test_logits_of_another_shape_are_one_error(tmp_path: Path, metric: Callable[[Request], Any]) -> None:
    folder = folder_with(tmp_path / "m", CLASSIFIER if metric is masked else FILLER, UNEVEN, end=True)
    with pytest.raises(SourceError, match="it does not give the logits that this metric needs; compile with --task"):
        metric(Request(folder, text_file(tmp_path, "a\t1")))


def test_classification_reads_tabs_and_json_lines_and_names_of_labels(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", CLASSIFIER, UNEVEN, id2label={"0": "first", "4": "fifth"})
    # a text is classified by its last word: after c comes 0, after d comes 4
    tabs = text_file(tmp_path, "a c\t0\nb c\tfirst\nd\tfifth\nd\t3\n")
    assert classification(Request(folder, tabs)) == {"texts": 4, "accuracy": 0.75}
    lines = text_file(tmp_path, '{"text": "c", "label": 0}\n{"text": "d", "label": "fifth"}\n', "text.jsonl")
    assert classification(Request(folder, lines)) == {"texts": 2, "accuracy": 1.0}


def test_classification_without_labels_is_agreement_alone(tmp_path: Path) -> None:
    folder, other = folder_with(tmp_path / "m", CLASSIFIER, UNEVEN), folder_with(tmp_path / "f", CLASSIFIER, EVEN)
    data = text_file(tmp_path, "c\nd\na\nb\n")
    facts = classification(Request(folder, data, str(other / "model.onnx")))
    assert facts == {"texts": 4, "agreement": 0.75}
    with pytest.raises(
        SourceError, match=r"the classification metric needs the float model; .* give every text a label"
    ):
        classification(Request(folder, data))


def test_classification_stands_beside_the_float_models(tmp_path: Path) -> None:
    folder, other = folder_with(tmp_path / "m", CLASSIFIER, UNEVEN), folder_with(tmp_path / "f", CLASSIFIER, EVEN)
    facts = classification(Request(folder, text_file(tmp_path, "c\t0\nd\t4\n"), str(other / "model.onnx")))
    assert facts == {"texts": 2, "accuracy": 1.0, "float_accuracy": 0.5, "agreement": 0.5}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.txt", "c\t0\nd\tunknown\n", "line 2 is not a text with a label"),
        ("text.jsonl", '{"label": 0}\n', "line 1 is not a text with a label"),
        ("text.jsonl", "plain\n", "line 1 is not a text with a label"),
        ("text.jsonl", '{"text": "c", "label": 0}\n\n{"text": 5, "label": 0}\n', "line 3 is not a text with a label"),
        ("text.jsonl", '{"text": "c", "label": 1.5}\n', "line 1 is not a text with a label .1.5 is no label."),
        ("text.txt", "\n\n", "it holds no texts; give one text a line"),
    ],
)
def test_labels_of_another_form_are_one_error(tmp_path: Path, name: str, content: str, message: str) -> None:
    folder = folder_with(tmp_path / "m", CLASSIFIER, UNEVEN)
    with pytest.raises(CalibrationError, match=message):
        classification(Request(folder, text_file(tmp_path, content, name)))


def test_the_command_states_its_windows_and_its_seed(tmp_path: Path, cli: Cli) -> None:
    folder_with(tmp_path / "m", BIGRAM, UNEVEN)
    folder_with(tmp_path / "f", FILLER, UNEVEN, end=True)
    text_file(tmp_path, "a a b a a b a a")
    arguments = ("--data", "text.txt", "--metric", "perplexity", "--window", "4", "--stride", "2", "--windows", "2")
    done = cli("eval", "m", *arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    assert (facts["window"], facts["stride"], facts["windows"], facts["scored_tokens"]) == (4, 2, 2, 5)
    done = cli("eval", "m", *arguments)
    assert "perplexity" in done.stdout and "stride" in done.stdout
    done = cli("eval", "f", "--data", "text.txt", "--metric", "masked", "--seed", "5", "--json")
    assert json.loads(done.stdout)["seed"] == 5
