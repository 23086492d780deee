from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scalefold.compiler import CompileReport
from scalefold.compiler.driver import open_source
from scalefold.compiler.errors import CalibrationError, SourceError
from scalefold.compiler.evaluate import Pair, compare_on_text, embed, open_folder, read_pairs, spearman
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
