"""The recipe `w8a8-token` end to end: every layer on an integer kernel, and no token that depends on another's size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scalefold.compiler import CompileReport, Recipe, compile_model, verify
from scalefold.compiler.errors import PatternError
from scalefold.compiler.recipe import Target
from scalefold.compiler.runtime import Array, Feed, Session
from scalefold.compiler.verify import sqnr

CLOSE_DB = 25.0
"""Least SQNR of an 8-bit model here, as reckoned in test_compile.py."""

SAME_DB = 60.0
"""Least SQNR of one model's two forms, or of one sequence in two batches: other roundings of floats, and no noise."""


@pytest.fixture(scope="module")
def by_token(
    float_model: Path, feeds: list[Feed], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, CompileReport]:
    """The tiny BERT compiled with `w8a8-token` for each target."""
    folder = tmp_path_factory.mktemp("by-token")
    targets: tuple[Target, ...] = ("onnxruntime-cpu", "qdq")
    return {
        target: compile_model(
            float_model, folder / target, recipe="w8a8-token", calibration=feeds, samples=40, target=target
        )
        for target in targets
    }


def model_of(report: CompileReport) -> Path:
    assert report.output is not None
    return report.output / "model.onnx"


def states_of(session: Session, feeds: list[Feed]) -> Array:
    """The token states of every feed, as rows; without the outlier channels, beside which all noise looks small."""
    return np.delete(np.concatenate([session.run(feed)["last_hidden_state"][0] for feed in feeds]), [3, 17], axis=-1)


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "qdq"])
def test_every_layer_is_per_token_and_on_an_integer_kernel(by_token: dict[str, CompileReport], target: str) -> None:
    found = verify.layer_kernels(model_of(by_token[target]))
    assert len(found) == 13
    assert {entry.kernel for entry in found} == {"MatMulIntegerToFloat"}
    assert {entry.activation for entry in found} == {"per-token"}
    assert by_token[target].integer_layers == 13


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "qdq"])
def test_either_target_is_close_to_float(
    by_token: dict[str, CompileReport], float_model: Path, fresh_feeds: list[Feed], target: str
) -> None:
    wanted, got = (
        states_of(Session(float_model), fresh_feeds),
        states_of(Session(model_of(by_token[target])), fresh_feeds),
    )
    assert sqnr(wanted, got) >= CLOSE_DB
    assert all(layer.sqnr_db is not None and layer.sqnr_db >= CLOSE_DB for layer in by_token[target].layers)


def test_the_two_targets_give_the_same_numbers(by_token: dict[str, CompileReport], fresh_feeds: list[Feed]) -> None:
    first, second = (states_of(Session(model_of(report)), fresh_feeds) for report in by_token.values())
    assert sqnr(first, second) >= SAME_DB


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "qdq"])
def test_a_padded_batch_gives_each_sequence_what_it_gets_alone(
    by_token: dict[str, CompileReport], fresh_feeds: list[Feed], target: str
) -> None:
    session = Session(model_of(by_token[target]))
    longest = max(feed["input_ids"].shape[1] for feed in fresh_feeds)
    batch: Feed = {
        name: np.concatenate([np.pad(feed[name], ((0, 0), (0, longest - feed[name].shape[1]))) for feed in fresh_feeds])
        for name in fresh_feeds[0]
    }
    together = session.run(batch)["last_hidden_state"]
    rows = [states[: feed["input_ids"].shape[1]] for states, feed in zip(together, fresh_feeds, strict=True)]
    alone = [session.run(feed)["last_hidden_state"][0] for feed in fresh_feeds]
    assert sqnr(np.concatenate(alone), np.concatenate(rows)) >= SAME_DB


def test_single_layers_can_be_per_token_in_a_static_recipe(
    float_model: Path, feeds: list[Feed], tmp_path: Path
) -> None:
    recipe = Recipe.model_validate(
        {"activations": {"clipping": 0.05, "clipping_refine": False, "per_token": [r"output\.dense$", "key$"]}}
    )
    report = compile_model(float_model, tmp_path / "out", recipe=recipe, calibration=feeds, samples=40)
    found = {entry.name: entry.activation for entry in verify.layer_kernels(model_of(report))}
    dynamic = [name for name, activation in found.items() if activation == "per-token"]
    assert dynamic == [name for name in found if name.endswith(("output.dense", "key"))]
    assert len(dynamic) == 6
    assert report.integer_layers == 13


def test_a_pattern_of_per_token_layers_that_matches_none_is_an_error(
    float_model: Path, feeds: list[Feed], tmp_path: Path
) -> None:
    recipe = Recipe.model_validate({"activations": {"per_token": ["down_proj"]}})
    with pytest.raises(PatternError, match="per-token pattern 'down_proj': it matches none of the 13 linear layers"):
        compile_model(float_model, tmp_path / "out", recipe=recipe, calibration=feeds, samples=40)
