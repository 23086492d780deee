from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from scalefold.compiler import compile_model, graph
from scalefold.compiler.calibrate import collect
from scalefold.compiler.decoder import LOGITS, decoder_of, divergence
from scalefold.compiler.errors import RecipeError
from scalefold.compiler.generate import CachedSession
from scalefold.compiler.protocol import Context, PassResult
from scalefold.compiler.recipe import Target, load_recipe
from scalefold.compiler.runtime import Array, Feed, Session
from scalefold.compiler.testing import assert_same_graph, context_on, parse
from scalefold.passes.bake_prefix import bake
from scalefold.passes.fuse_attention import FuseAttention
from scalefold.passes.quantize_cache import QuantizeCache
from scalefold.passes.recover_rotary import RecoverRotary
from scalefold.passes.unmerge_heads import UnmergeHeads

FAMILIES = ("gpt2", "opt", "bloom", "llama")
HEAD = """<ir_version: 10, opset_import: ["" : 20]>
model (int64[b, s] input_ids, CACHE[b, 1, p, 2] PAST) => (float[b, 1, s, 2] logits, CACHE[b, 1, t, 2] NOW)
<float[4, 2] table = {0.0, 0.0, 1.0, -0.25, 0.5, 1.5, -1.0, 2.0}, int64[1] axis = {1}, int64[1] one = {1},
 int64[1] two = {2}, int64[1] far = {9223372036854775807}, float[1, 1, 1, 2] prefix = {9.0, -9.0},
 float scale = {0.011764706}, uint8 zero = {85}>
{ FIRST rows = Gather<axis = 0>(table, input_ids)  k = Unsqueeze(rows, axis)
"""


def text(body: str, cache: str = "float", first: str = "") -> str:
    """A decoder of one layer whose keys are rows of a table."""
    named = HEAD.replace("CACHE", cache).replace("FIRST", first) + body + "}"
    named = named.replace("PAST", '"past_key_values.0.key"')
    return named.replace("NOW", '"present.0.key"')


def attended(whole: str, past: str) -> str:
    """Something that reads the whole cache, and something that reads the length of the past."""
    return (
        f" total = ReduceSum<keepdims = 1>({whole}, two)  sizes = Shape({past})  numbers = Cast<to = 1>(sizes)"
        "  largest = ReduceMax<keepdims = 0>(numbers)  sum = Add(total, largest)  logits = Add(k, sum)"
    )


JOINED = "NOW = Concat<axis = 2>(PAST, k)"
KEPT = "q = QuantizeLinear(k, scale, zero)  NOW = Concat<axis = 2>(PAST, q)  read = DequantizeLinear(NOW, scale, zero) "
BEFORE = text(JOINED + attended("NOW", "PAST"))
AFTER = text(KEPT + attended("read", "PAST"), "uint8")
PREFIXED = text(
    "behind = Concat<axis = 2>(prefix, PAST)  whole = Concat<axis = 2>(behind, k)  NOW = Slice(whole, one, far, two)"
    + attended("whole", "behind")
)
PREFIXED_AFTER = text(
    "behind = Concat<axis = 2>(prefix, earlier) "
    + KEPT
    + "whole = Concat<axis = 2>(prefix, read)"
    + attended("whole", "behind"),
    "uint8",
    "earlier = DequantizeLinear(PAST, scale, zero) ",
)
ALONE = "  logits = Add(k, k)"


def mini_feed(*ids: int, past: int = 0) -> Feed:
    return {
        "input_ids": np.array([ids], dtype=np.int64),
        "past_key_values.0.key": np.zeros((1, 1, past, 2), dtype=np.float32),
    }


def run_mini(before: str, feeds: list[Feed]) -> tuple[ir.Model, PassResult]:
    model = parse(before)
    return model, QuantizeCache().run(model, context_on(model.clone(), feeds))


@pytest.mark.parametrize(("before", "after"), [(BEFORE, AFTER), (PREFIXED, PREFIXED_AFTER)], ids=["plain", "prefix"])
def test_what_enters_the_cache_is_rounded(before: str, after: str) -> None:
    model, result = run_mini(before, [mini_feed(0, 1, 2, 3)])

    assert_same_graph(model, parse(after))
    assert [(event.reason, event.figures["zero_point"]) for event in result.rewrites] == [("uint8 per tensor", 85)]
    again = QuantizeCache().run(model, Context())
    assert not again.changed and [event.reason for event in again.declined] == ["it is not of 32-bit floats"]


def test_rounding_is_all_that_changes() -> None:
    feed = mini_feed(0, 1, 2, 3, 3)
    model, _ = run_mini(BEFORE, [feed])
    wanted, got = Session(parse(BEFORE)).run(feed), Session(model).run(feed)
    scale, zero = 3.0 / 255, 85
    assert got["present.0.key"].dtype == np.uint8
    read = (got["present.0.key"].astype(np.float32) - zero) * scale
    assert np.abs(read - wanted["present.0.key"]).max() <= scale / 2 + 1e-6
    assert np.abs(wanted["logits"] - got["logits"]).max() <= 5 * scale / 2


@pytest.mark.parametrize(
    ("body", "feed", "reason"),
    [
        (JOINED, mini_feed(1, 2, past=3), "the calibration samples come with a cache of floats"),
        (
            "turned = Neg(PAST)  NOW = Concat<axis = 2>(turned, k)",
            mini_feed(1, 2),
            "it is not the past alone, behind a prefix or not, that the new keys or values are joined to",
        ),
        (
            "made = Concat<axis = 2>(PAST, k)  NOW = Neg(made)",
            mini_feed(1, 2),
            "it is not Concat(past, new) along the positions",
        ),
        ("NOW = Concat<axis = 3>(PAST, k)", mini_feed(1, 2), "it is not Concat(past, new) along the positions"),
    ],
    ids=["past", "turned", "negated", "channels"],
)
def test_what_is_built_otherwise_is_declined(body: str, feed: Feed, reason: str) -> None:
    model = parse(text(body + ALONE))
    result = QuantizeCache().run(model, Context(search=[feed]))
    assert not result.changed and [event.reason for event in result.declined] == [reason]
    assert_same_graph(model, parse(text(body + ALONE)))


def test_an_encoder_is_left_alone(float_model: Path) -> None:
    result = QuantizeCache().run(ir.load(float_model), Context())
    assert not result.rewrites and not result.declined


@pytest.fixture(params=[(family, prefix) for family in FAMILIES for prefix in (False, True)], ids=str)
def pair(request: pytest.FixtureRequest, decoder_models: dict[str, ir.Model]) -> tuple[ir.Model, ir.Model]:
    """A float decoder, behind a prefix or not, and what the pass makes of it."""
    family, prefix = request.param
    model = decoder_models[family].clone()
    if prefix:
        bake(model, (3,))
    feeds = [decoder_of(model).prompt_feed(np.arange(24)[None] + start) for start in (5, 90)]
    result = model.clone()
    found = QuantizeCache().run(
        result, Context(measure=lambda current, requests: collect(current, requests, feeds), search=feeds)
    )
    assert len(found.rewrites) == len(decoder_of(model).cache) and not found.declined
    return model, result


def test_logits_hardly_move(pair: tuple[ir.Model, ir.Model]) -> None:
    model, result = pair
    feed = decoder_of(model).prompt_feed(np.arange(16)[None] + 40)  # its empty cache is of floats
    wanted, got = Session(model).run(feed), Session(result).run(feed)
    assert 0 < divergence(wanted[LOGITS][0], got[LOGITS][0]) < 1e-4
    assert {array.dtype for name, array in got.items() if name != LOGITS} == {np.dtype(np.uint8)}
    assert {name: array.shape for name, array in got.items()} == {name: array.shape for name, array in wanted.items()}


def test_tokens_one_by_one_give_what_they_give_at_once(pair: tuple[ir.Model, ir.Model]) -> None:
    session, ids = Session(pair[1]), np.arange(12).reshape(2, 6) + 40
    decoder = decoder_of(pair[1])
    whole = session.run(decoder.prompt_feed(ids))
    past: dict[str, Array] = decoder.empty_cache(2)
    for step in range(6):
        outputs = session.run(decoder.prompt_feed(ids[:, step : step + 1], past=past))
        past = decoder.next_cache(outputs)
        assert np.abs(outputs[LOGITS][:, 0] - whole[LOGITS][:, step]).max() < 1e-4
    for name, array in past.items():
        assert np.array_equal(array, whole[decoder.outputs[name]])


def test_attention_is_fused_all_the_same(pair: tuple[ir.Model, ir.Model]) -> None:
    model = pair[1].clone()
    for entry in (RecoverRotary(), UnmergeHeads(), FuseAttention()):
        result = entry.run(model, Context())
    layers = len(decoder_of(model).cache) // 2
    assert len(result.rewrites) == layers and not result.declined
    fused = graph.nodes(model, "Attention")
    assert len(fused) == layers and not graph.nodes(model, "Softmax")
    assert all(len(node.outputs) == 1 and graph.producer(node.inputs[0], "MatMul") is None for node in fused)
    feed = decoder_of(model).prompt_feed(np.arange(16).reshape(2, 8) + 40, mask=np.array([[0, 0] + [1] * 6, [1] * 8]))
    wanted, got = Session(pair[1]).run(feed), Session(model).run(feed)
    assert np.abs(wanted[LOGITS][1] - got[LOGITS][1]).max() < 1e-4
    assert np.abs(wanted[LOGITS][0, 2:] - got[LOGITS][0, 2:]).max() < 1e-4


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "qdq"])
def test_a_recipe_asks_for_it(decoder_folders: dict[str, Path], tmp_path: Path, target: Target) -> None:
    recipe = tmp_path / "small-cache.yaml"
    recipe.write_text("activations: {bits: 8}\ncache: {bits: 8}\n", encoding="utf-8")
    source = decoder_folders["llama"]
    decoder = decoder_of(ir.load(source / "model.onnx"))
    feeds = [decoder.prompt_feed(np.arange(24)[None] + start) for start in (5, 40, 90)]
    report = compile_model(source / "model.onnx", tmp_path / "out", recipe=recipe, target=target, calibration=feeds)
    assert all(layer.integer for layer in report.layers)
    assert {gate.name for gate in report.gates if gate.passed} >= {"cache parity", "batch invariance, padded left"}
    decoder = decoder_of(ir.load(tmp_path / "out" / "model.onnx"))
    assert {port.dtype for port in decoder.cache.values()} == {np.dtype(np.uint8)}
    session = CachedSession(tmp_path / "out" / "model.onnx")
    _, past = session.step(np.arange(6)[None] + 40, None, session.hold(decoder.empty_cache()))
    stepped, past = session.step(np.array([[46]]), None, past)
    at_once, _ = session.step(np.arange(7)[None] + 40, None, session.hold(decoder.empty_cache()))
    assert np.abs(stepped[:, 0] - at_once[:, 6]).max() < 1e-4
    assert {value.element_type() for value in past.values()} == {TensorProto.UINT8}


def test_there_are_8_bits_or_none(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("cache: {bits: 4}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"cache\.bits"):
        load_recipe(tmp_path / "r.yaml")
