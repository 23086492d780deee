from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler.decoder import Decoder, cache_pairs, decoder_of, position_limit
from scalefold.compiler.errors import SourceError
from scalefold.compiler.runtime import Session

TEXT = """<ir_version: 10, opset_import: ["" : 20]>
bigram (int64[b, s] input_ids, int64[b, t] attention_mask, int32[b, s] position_ids,
        float[b, 2, p, 1] k, float[b, 2, p, 3] v) => (float[b, s, 4] logits, float[b, 2, t, 1] k2, float[b, 2, t, 3] v2)
<float[4, 4] table = {9, 0, 0, 0, 0, 9, 0, 0, 0, 0, 9, 0, 0, 0, 0, 9}, int64[2] axes = {1, 3},
 int64[4] one = {1, 2, 1, 1}, int64[4] three = {1, 2, 1, 3}>
{ logits = Gather(table, input_ids)
  there = CastLike(input_ids, table)  four = Unsqueeze(there, axes)
  k1 = Expand(four, one)  k2 = Concat<axis = 2>(k, k1)
  v1 = Expand(four, three)  v2 = Concat<axis = 2>(v, v1) }"""
"""A decoder whose cache holds the token ids it has seen."""
K, V = "input.past_key_values.layers.0.keys", "input.past_key_values.layers.0.values"
NAMES = {"k": K, "v": V, "k2": K.replace("input", "output"), "v2": V.replace("input", "output")}


def graph(*, without: str = "", text: str = TEXT) -> ir.Model:
    model = ir.from_onnx_text(text)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        value.name = NAMES.get(value.name or "", value.name)
    for value in [value for value in model.graph.inputs if value.name == without]:
        model.graph.inputs.remove(value)
    return model


@pytest.fixture
def decoder() -> Decoder:
    return decoder_of(graph())


def test_a_session_and_a_graph_say_the_same(decoder: Decoder) -> None:
    assert decoder_of(Session(graph())) == decoder
    assert list(decoder.tokens) == ["input_ids", "attention_mask", "position_ids"]
    assert decoder.outputs == {K: NAMES["k2"], V: NAMES["v2"]}
    assert {name: port.shape for name, port in decoder.cache.items()} == {K: (None, 2, None, 1), V: (None, 2, None, 3)}


def test_a_size_that_the_exporter_wrote_as_text_is_a_number(decoder: Decoder) -> None:
    model = graph()
    for value in model.graph.inputs[3:]:
        assert value.shape is not None
        value.shape = ir.Shape([str(size) if isinstance(size, int) else size for size in value.shape])
    assert decoder_of(model) == decoder


def test_the_cache_is_paired_by_both_conventions_and_by_nothing_else() -> None:
    assert cache_pairs(["past_key_values.0.key", "input_ids"], ["logits", "present.0.key"]) == {
        "past_key_values.0.key": "present.0.key"
    }
    assert cache_pairs(["input.past_key_values.a"], ["output.past_key_values.b"]) == {}


def test_an_empty_cache_has_heads_and_width_and_no_positions(decoder: Decoder) -> None:
    cache = decoder.empty_cache(3)
    assert {name: array.shape for name, array in cache.items()} == {K: (3, 2, 0, 1), V: (3, 2, 0, 3)}
    assert {array.dtype for array in cache.values()} == {np.dtype(np.float32)}


def test_steps_behind_their_own_cache_collect_every_token(decoder: Decoder) -> None:
    session = Session(graph())
    first = session.run(decoder.prompt_feed(np.array([[3, 1]])))
    second = session.run(decoder.prompt_feed(np.array([[2]]), past=decoder.next_cache(first)))
    np.testing.assert_array_equal(second[NAMES["k2"]][0, :, :, 0], [[3, 1, 2], [3, 1, 2]])
    assert second["logits"].argmax() == 2


def test_padding_on_the_left_takes_no_positions(decoder: Decoder) -> None:
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    feed = decoder.prompt_feed(np.ones((2, 4), dtype=np.int64), mask)
    np.testing.assert_array_equal(feed["position_ids"], [[0, 0, 0, 1], [0, 1, 2, 3]])
    assert [feed[name].dtype.name for name in ("position_ids", "input_ids")] == ["int32", "int64"]
    np.testing.assert_array_equal(feed["attention_mask"], mask)


def test_positions_behind_a_cache_go_on_from_its_length(decoder: Decoder) -> None:
    past = {K: np.zeros((2, 2, 3, 1), np.float32), V: np.zeros((2, 2, 3, 3), np.float32)}
    mask = np.array([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    feed = decoder.prompt_feed(np.ones((2, 2), dtype=np.int64), mask, past)
    np.testing.assert_array_equal(feed["position_ids"], [[2, 3], [3, 4]])
    assert decoder.prompt_feed(np.ones((2, 2), dtype=np.int64), past=past)["attention_mask"].tolist() == [[1] * 5] * 2


@pytest.mark.parametrize(
    ("keys", "values"), [((1, 2, 3, 1), (1, 2, 4, 3)), ((2, 2, 3, 1), (2, 2, 3, 3)), ((1, 3, 1), (1, 2, 3, 3))]
)
def test_a_cache_of_the_wrong_shape_is_one_error(
    decoder: Decoder, keys: tuple[int, ...], values: tuple[int, ...]
) -> None:
    past = {K: np.zeros(keys, np.float32), V: np.zeros(values, np.float32)}
    with pytest.raises(SourceError, match=r"the cache: input\.past_key_values.* has shape .*, not \[1, 2, positions, "):
        decoder.prompt_feed(np.array([[1]]), past=past)


def test_a_mask_of_the_wrong_length_is_one_error(decoder: Decoder) -> None:
    with pytest.raises(SourceError, match=r"the attention mask has shape \[1, 2\], not \[1, 3\]"):
        decoder.prompt_feed(np.array([[1, 2, 3]]), np.ones((1, 2), dtype=np.int64))


def test_a_graph_without_a_mask_refuses_padding_and_takes_the_rest() -> None:
    decoder = decoder_of(graph(without="attention_mask"))
    assert set(decoder.prompt_feed(np.array([[1, 2]]))) == {"input_ids", "position_ids", K, V}
    with pytest.raises(SourceError, match="takes no attention_mask, so padding cannot be left out; run one sequence"):
        decoder.prompt_feed(np.array([[1, 2]]), np.array([[0, 1]]))


def test_a_model_without_a_cache_is_not_a_decoder() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
    f (float[n] input_ids) => (float[n] logits) { logits = Abs(input_ids) }"""
    with pytest.raises(SourceError, match=r"bert: it is not a decoder: .*; export a causal language model with --task"):
        decoder_of(ir.from_onnx_text(text), "bert")


def test_inputs_that_nothing_fills_are_named() -> None:
    with pytest.raises(SourceError, match="neither tokens nor the cache can fill its inputs pixels"):
        decoder_of(graph(text=TEXT.replace("position_ids", "pixels")))


def test_a_cache_of_another_layout_is_named() -> None:
    with pytest.raises(SourceError, match=rf"its cache {K} is not of the shape \[batch, heads, positions, width\]"):
        decoder_of(graph(text=TEXT.replace("float[b, 2, p, 1] k,", "float[b, p, 2] k,")))


@pytest.mark.parametrize(
    ("content", "limit"),
    [
        ('{"max_position_embeddings": 64}', 64),
        ('{"n_positions": 32}', 32),
        (json.dumps({"model_type": "bloom", "n_positions": None}), None),
        ("[1]", None),
        ("no json", None),
    ],
)
def test_the_position_table_is_what_the_config_says(tmp_path: Path, content: str, limit: int | None) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    assert position_limit(tmp_path) == limit


def test_a_folder_without_a_config_states_no_position_table(tmp_path: Path) -> None:
    assert position_limit(tmp_path) is None
