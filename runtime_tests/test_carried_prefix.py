from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from scalefold.compiler import artifact
from scalefold.compiler.carried_prefix import carry_prefix
from scalefold.compiler.decoder import prefix_length
from scalefold.compiler.generate import CachedSession
from scalefold.compiler.protocol import Context
from scalefold.compiler.runtime import Message, Session
from scalefold.compiler.testing import assert_same_graph
from scalefold.passes.bake_prefix import bake
from scalefold.passes.merge_expands import MergeExpands

HEAD = """<ir_version: 10, opset_import: ["" : 21]>
model (int64[b, s] input_ids, float[b, 1, PAST, 2] "past_key_values.0.key", float[b, 1, s, 2] k)
    => (float[b, 1, PRESENT, 2] "present.0.key")
<float[1, 1, 1, 2] first = {1.0, 2.0}, int64[3] ones = {1, 1, 1}, int64[1] n = {1}, int64[1] end = {9223372036854775807},
 int64[1] axis = {2}>
{ batch = Shape <start = 0, end = 1> (input_ids)  sizes = Concat <axis = 0> (batch, ones)  prefix = Expand(first, sizes)
"""
BEFORE = (
    HEAD.replace("PAST", "p").replace("PRESENT", "q")
    + """
  whole = Concat <axis = 2> (prefix, "past_key_values.0.key")  grown = Concat <axis = 2> (whole, k)
  "present.0.key" = Slice(grown, n, end, axis) }
"""
)


def parse(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(text)


def test_the_cache_carries_the_prefix(tmp_path: Path) -> None:
    model = parse(BEFORE)
    prefix = carry_prefix(model)
    assert prefix is not None
    onnx.checker.check_model(model)
    onnx.checker.check_model(prefix)
    assert [value.name for value in prefix.graph.input] == ["input_ids"]
    made = Session(Message(prefix.SerializeToString(), tmp_path)).run({"input_ids": np.zeros((2, 5), dtype=np.int64)})
    np.testing.assert_array_equal(made["past_key_values.0.key"], [[[[1, 2]]], [[[1, 2]]]])
    after = HEAD.replace("PAST", "cached").replace("PRESENT", "cached_and_new")
    after += '"present.0.key" = Concat <axis = 2> ("past_key_values.0.key", k) }'
    assert_same_graph(ir.from_proto(model), ir.from_proto(parse(after)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"present.0.key" = Slice(grown, n, end, axis)', '"present.0.key" = Identity(grown)'),
        ('(prefix, "past_key_values.0.key")', '("past_key_values.0.key", prefix)'),
        ("(whole, k)", '(whole, "past_key_values.0.key")'),
    ],
    ids=["nothing is cut", "behind the cache", "the cache is read elsewhere"],
)
def test_what_joins_the_cache_in_another_way_is_left(old: str, new: str) -> None:
    model = parse(BEFORE.replace(old, new))
    text = model.SerializeToString()
    assert carry_prefix(model) is None and model.SerializeToString() == text


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tokens", [(5,), (5, 9)])
def test_generation_gives_what_the_file_gives(
    decoder_models: dict[str, ir.Model], tmp_path: Path, family: str, tokens: tuple[int, ...]
) -> None:
    model = decoder_models[family].clone()
    bake(model, tokens)
    MergeExpands().run(model, Context())
    assert prefix_length(model)
    artifact.save_model(model, tmp_path)
    artifact.write_json(tmp_path / artifact.RECORD, {})
    carried = CachedSession(tmp_path / artifact.MODEL)
    plain = CachedSession(tmp_path / artifact.MODEL, as_it_is=True)
    ids, mask = np.arange(10).reshape(2, 5) + 7, np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    caches = [session.hold(session.decoder.empty_cache(2)) for session in (carried, plain)]
    for step in range(3):
        found, caches[0] = carried.step(ids, mask, caches[0])
        wanted, caches[1] = plain.step(ids, mask, caches[1])
        assert np.array_equal(found, wanted)
        lengths = [next(iter(cache.values())).shape()[2] for cache in caches]
        assert lengths == [5 + step + len(tokens), 5 + step]
        ids, mask = wanted[:, -1:].argmax(axis=2), np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
