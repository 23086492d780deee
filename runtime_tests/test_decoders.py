from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import compile_model, graph
from scalefold.compiler.decoder import LOGITS, Decoder, decoder_of
from scalefold.compiler.driver import CompileReport
from scalefold.compiler.protocol import Context
from scalefold.compiler.recipe import Recipe, Target
from scalefold.compiler.runtime import Array, Feed, Session
from scalefold.passes import pipeline

FAMILIES = ("gpt2", "opt", "bloom", "llama")
TARGETS: tuple[Target, ...] = ("onnxruntime-cpu", "qdq")
CLOSE = 1e-3


@pytest.fixture(scope="session")
def reports(
    decoder_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, Target], CompileReport]:
    """Every family compiled: `w8a8` for both targets, `w8a8-token` for the default one."""
    folder = tmp_path_factory.mktemp("decoders")
    found = {}
    for family in FAMILIES:
        source = decoder_folders[family] / "model.onnx"
        decoder = decoder_of(ir.load(source))
        generator = np.random.default_rng(4)
        feeds = [decoder.prompt_feed(generator.integers(0, 200, (1, 32))) for _ in range(24)]
        for recipe, target in (("w8a8", TARGETS[0]), ("w8a8", TARGETS[1]), ("w8a8-token", TARGETS[0])):
            place = folder / f"{family}-{recipe}-{target}"
            found[family, recipe, target] = compile_model(
                source, place, recipe=recipe, target=target, calibration=feeds, samples=64
            )
    return found


def opened(report: CompileReport) -> tuple[Session, Decoder]:
    assert report.output is not None
    session = Session(report.output / "model.onnx")
    return session, decoder_of(session)


def logits(session: Session, feed: Feed) -> Array:
    return session.run(feed)[LOGITS]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_as_it_is_measured_has_one_operator_for_attention_and_what_layers_read_by_name(
    decoder_models: dict[str, ir.Model], family: str
) -> None:
    model, plan = decoder_models[family].clone(), pipeline(Recipe())
    for entry in plan.normalize:
        entry.run(model, Context())
    before = [node.op_type for node in model.graph]
    fused = plan.fused(model)
    assert [node.op_type for node in model.graph] == before
    assert len(graph.nodes(fused, "Attention")) == 2 and not graph.nodes(fused, "Softmax")
    names = [*dict.fromkeys(layer.x.name or "" for layer in graph.linear_layers(model)), LOGITS]
    feed = decoder_of(model).prompt_feed(np.random.default_rng(3).integers(0, 200, (2, 9)))
    wanted, got = (Session(entry, outputs=names).run(feed) for entry in (model, fused))
    for name in names:
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_with_the_head_is_integer(
    reports: dict[tuple[str, str, Target], CompileReport], family: str, target: Target
) -> None:
    report = reports[family, "w8a8", target]
    assert all(layer.integer for layer in report.layers)
    assert "lm_head" in {layer.name for layer in report.layers}
    assert len(report.layers) == 9  # four a block: q, k, v are one product, and so are gate and up


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tied_table_is_in_the_file_once(reports: dict[tuple[str, str, Target], CompileReport], family: str) -> None:
    report = reports[family, "w8a8", "qdq"]
    assert report.output is not None
    model = ir.load(report.output / "model.onnx")
    shapes = [graph.whole_shape(value) for value in model.graph.initializers.values() if graph.rank(value) == 2]
    assert sum(shape in ((64, 200), (200, 64)) for shape in shapes) == 1


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_close_to_float(
    reports: dict[tuple[str, str, Target], CompileReport], family: str, recipe: str
) -> None:
    (output,) = reports[family, recipe, "onnxruntime-cpu"].outputs
    assert output.name == LOGITS
    assert output.mean_cosine > 0.999


@pytest.mark.parametrize("family", FAMILIES)
def test_both_targets_give_the_same_logits(reports: dict[tuple[str, str, Target], CompileReport], family: str) -> None:
    feeds = []
    for target in TARGETS:
        session, decoder = opened(reports[family, "w8a8", target])
        feeds.append(logits(session, decoder.prompt_feed(np.arange(20)[None] * 7 % 200)))
    assert np.abs(feeds[0] - feeds[1]).max() < 0.02 * np.abs(feeds[0]).max()


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_one_by_one_behind_a_cache_give_what_they_give_at_once(
    reports: dict[tuple[str, str, Target], CompileReport], family: str, recipe: str
) -> None:
    session, decoder = opened(reports[family, recipe, "onnxruntime-cpu"])
    ids = np.random.default_rng(9).integers(0, 200, (1, 40))
    whole = logits(session, decoder.prompt_feed(ids))
    outputs = session.run(decoder.prompt_feed(ids[:, :8]))
    steps = [outputs[LOGITS]]
    for index in range(8, ids.shape[1]):
        outputs = session.run(decoder.prompt_feed(ids[:, index : index + 1], past=decoder.next_cache(outputs)))
        steps.append(outputs[LOGITS])
    assert np.abs(np.concatenate(steps, axis=1) - whole).max() < CLOSE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_gives_the_same_alone_and_padded_in_a_batch(
    reports: dict[tuple[str, str, Target], CompileReport], family: str, recipe: str, side: str
) -> None:
    session, decoder = opened(reports[family, recipe, "onnxruntime-cpu"])
    generator = np.random.default_rng(3)
    ids, mask = generator.integers(0, 200, (8, 24)), np.ones((8, 24), dtype=np.int64)
    kept = slice(9, None) if side == "left" else slice(None, 15)
    mask[2] = 0
    mask[2, kept] = 1
    alone = logits(session, decoder.prompt_feed(ids[2:3, kept]))
    batch = logits(session, decoder.prompt_feed(ids, mask))
    assert np.abs(alone - batch[2:3, kept]).max() < CLOSE


@pytest.mark.parametrize("family", FAMILIES)
def test_real_caches_can_calibrate(decoder_folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    source = decoder_folders[family] / "model.onnx"
    session = Session(source)
    decoder = decoder_of(session)
    generator = np.random.default_rng(6)
    feeds: list[Feed] = []
    for index in range(12):
        ids = generator.integers(0, 200, (1, 24))
        first = session.run(decoder.prompt_feed(ids[:, :16]))
        behind = decoder.prompt_feed(ids[:, 16:], past=decoder.next_cache(first))
        feeds.append(behind if index % 2 else decoder.prompt_feed(ids))
    report = compile_model(source, tmp_path / "out", recipe="w8a8", calibration=feeds, samples=32)
    assert all(layer.integer for layer in report.layers)
