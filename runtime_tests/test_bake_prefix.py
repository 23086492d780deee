from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import artifact, compile_model, graph
from scalefold.compiler.decoder import LOGITS, decoder_of
from scalefold.compiler.protocol import Context
from scalefold.compiler.runtime import Array, Feed, Session
from scalefold.passes import bake_prefix
from scalefold.passes.bake_prefix import BakePrefix, bake

FAMILIES = ("gpt2", "opt", "bloom", "llama")


def run(
    model: ir.Model, ids: Array, mask: Array | None = None, past: dict[str, Array] | None = None
) -> dict[str, Array]:
    return Session(model).run(decoder_of(model).prompt_feed(ids, mask, past))


@pytest.fixture(params=FAMILIES)
def decoder_model(request: pytest.FixtureRequest, decoder_models: dict[str, ir.Model]) -> ir.Model:
    """A float decoder in normal form."""
    return decoder_models[request.param].clone()


def test_logits_are_those_behind_the_token(decoder_model: ir.Model) -> None:
    ids = np.arange(10).reshape(2, 5) + 7
    wanted = run(decoder_model, np.concatenate([np.full((2, 1), 3), ids], axis=1))
    bake(decoder_model, (3,))
    got = run(decoder_model, ids)
    assert np.abs(wanted[LOGITS][:, 1:] - got[LOGITS]).max() < 1e-5
    for name in got:
        if name != LOGITS:
            assert np.abs(wanted[name][:, :, 1:] - got[name]).max() < 1e-5


def test_two_tokens_are_baked_as_well_as_one(decoder_model: ir.Model) -> None:
    ids = np.arange(10).reshape(2, 5) + 7
    wanted = run(decoder_model, np.concatenate([np.tile([3, 11], (2, 1)), ids], axis=1))
    bake(decoder_model, (3, 11))
    assert np.abs(wanted[LOGITS][:, 2:] - run(decoder_model, ids)[LOGITS]).max() < 1e-5


def test_the_cache_goes_on_without_the_prefix(decoder_model: ir.Model) -> None:
    bake(decoder_model, (3,))
    ids = np.arange(12).reshape(2, 6) + 7
    whole = run(decoder_model, ids)
    first = run(decoder_model, ids[:, :4])
    past = decoder_of(decoder_model).next_cache(first)
    assert {array.shape[2] for array in past.values()} == {4}
    behind = run(decoder_model, ids[:, 4:], past=past)
    assert np.abs(whole[LOGITS][:, 4:] - behind[LOGITS]).max() < 1e-5


def test_padding_on_the_left_changes_nothing(decoder_model: ir.Model) -> None:
    bake(decoder_model, (3,))
    ids = np.arange(4)[None] + 7
    alone = run(decoder_model, ids)[LOGITS]
    padded = np.concatenate([np.zeros((1, 3), dtype=ids.dtype), ids], axis=1)
    mask = np.array([[0, 0, 0, 1, 1, 1, 1]])
    assert np.abs(alone - run(decoder_model, padded, mask)[LOGITS][:, 3:]).max() < 1e-5


def with_massive_first_token(model: ir.Model) -> ir.Model:
    """A feed-forward input that is huge where no earlier token can be seen, as in trained Llamas."""
    layer = next(entry for entry in graph.linear_layers(model) if entry.name.endswith("layers.0.mlp.down_proj"))
    positions = next(value for value in model.graph.inputs if value.name == "position_ids")
    zero = graph.add_initializer(model, "zero", np.array(0, dtype=np.int64))
    tall = graph.add_initializer(model, "tall", np.array(1000, dtype=np.float32))
    last = graph.add_initializer(model, "last", np.array([-1], dtype=np.int64))
    first = ir.node("Equal", [positions, zero])
    number = ir.node("Cast", [first.outputs[0]], {"to": ir.DataType.FLOAT})
    column = ir.node("Unsqueeze", [number.outputs[0], last])
    spike = ir.node("Mul", [column.outputs[0], tall])
    x = layer.matmul.inputs[0]
    assert x is not None
    total = ir.node("Add", [x, spike.outputs[0]])
    total.outputs[0].shape, total.outputs[0].type, total.outputs[0].name = x.shape, x.type, "spiked"
    graph.insert_before(layer.matmul, [first, number, column, spike, total])
    layer.matmul.replace_input_with(0, total.outputs[0])
    return model


def test_a_massive_first_token_calls_for_a_prefix(decoder_models: dict[str, ir.Model]) -> None:
    model = with_massive_first_token(decoder_models["llama"].clone())
    feeds = [decoder_of(model).prompt_feed(np.arange(8)[None] + start) for start in (5, 9)]
    result = BakePrefix(candidates=3).run(model, Context(search=feeds))
    assert len(result.rewrites) == 1
    figures = result.rewrites[0].figures
    assert float(figures["largest_before"]) > 900 and float(figures["largest_after"]) < 100
    assert not BakePrefix(candidates=3).run(model, Context(search=feeds)).rewrites


def test_a_full_position_table_has_no_room_for_a_prefix(
    decoder_models: dict[str, ir.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder_models["gpt2"]  # of 64 positions
    ids = np.random.default_rng(2).integers(5, 200, (1, 64))
    assert bake_prefix._has_room(model, decoder_of(model), ids[:, :63], 5)
    assert not bake_prefix._has_room(model, decoder_of(model), ids, 5)
    massive = with_massive_first_token(decoder_models["llama"].clone())
    monkeypatch.setattr(bake_prefix, "_has_room", lambda *_: False)
    feed = decoder_of(massive).prompt_feed(ids[:, :8])
    result = BakePrefix(candidates=3).run(massive, Context(search=[feed]))
    assert [event.reason for event in result.declined] == ["the samples leave no room for it in the position table"]
    assert not result.changed


def test_a_calm_decoder_gets_none(decoder_models: dict[str, ir.Model]) -> None:
    model = decoder_models["llama"].clone()
    result = BakePrefix().run(model, Context(search=[decoder_of(model).prompt_feed(np.arange(8)[None] + 5)]))
    assert not result.changed
    assert [event.reason for event in result.declined] == ["no prefix is called for"]


def test_an_encoder_is_left_alone(float_model: Path) -> None:
    model = ir.load(float_model)
    result = BakePrefix().run(model, Context())
    assert not result.rewrites and not result.declined


def test_a_compiled_folder_offers_fewer_positions(
    decoder_models: dict[str, ir.Model], decoder_folders: dict[str, Path], tmp_path: Path
) -> None:
    model = with_massive_first_token(decoder_models["llama"].clone())
    (tmp_path / "float").mkdir()
    artifact.save_model(model, tmp_path / "float")
    shutil.copy(decoder_folders["llama"] / "config.json", tmp_path / "float")
    generator = np.random.default_rng(8)
    feeds: list[Feed] = [decoder_of(model).prompt_feed(generator.integers(0, 200, (1, 16))) for _ in range(12)]
    source = tmp_path / "float" / "model.onnx"
    report = compile_model(source, tmp_path / "out", recipe="w8a8-token", calibration=feeds, samples=32)
    assert [len(entry.rewrites) for entry in report.passes if entry.name == "bake-prefix"] == [1]
    assert all(layer.integer for layer in report.layers)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 63


def test_of_the_tokens_that_hold_the_worse_half_is_left_out_but_never_all() -> None:
    trials = {token: bake_prefix._Trial(largest=float(token % 2), divergence=float(-token)) for token in range(40)}
    kept = bake_prefix._better_half(trials, enough=0.5)
    assert list(kept) == list(range(0, 40, 2))
    assert list(bake_prefix._better_half(kept, enough=0.5)) == list(range(20, 40, 2))
    few = {token: kept[token] for token in (0, 2, 4, 6)}
    assert bake_prefix._better_half(few, enough=0.5) == few
