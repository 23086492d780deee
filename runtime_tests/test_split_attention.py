from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from scalefold import passes
from scalefold.compiler import graph
from scalefold.compiler.protocol import Context
from scalefold.compiler.recipe import load_recipe
from scalefold.compiler.runtime import Array, Feed, Session
from scalefold.compiler.testing import parse
from scalefold.passes.split_attention import SplitAttention

HEADS, WIDTH = 6, 8
GROUPS = [2, HEADS]
LOWEST = float(np.finfo(np.float32).min)


def written(groups: int, options: str = "") -> str:
    """Attention with a mask and a cache."""
    keys = f"float[b, {groups}, p, {WIDTH}]", f"float[b, {groups}, t, {WIDTH}]"
    return f"""<ir_version: 10, opset_import: ["" : 23]>
model (float[b, s, {HEADS * WIDTH}] q, float[b, s, {groups * WIDTH}] k, float[b, s, {groups * WIDTH}] v,
 float[b, 1, s, t] mask, {keys[0]} past_keys, {keys[0]} past_values)
 => (float[b, s, {HEADS * WIDTH}] y, {keys[1]} keys, {keys[1]} values)
{{ y, keys, values =
 Attention<q_num_heads = {HEADS}, kv_num_heads = {groups}{options}>(q, k, v, mask, past_keys, past_values) }}
"""


def tokens(count: int, groups: int, batch: int = 2) -> Feed:
    """Queries, keys and values of some tokens."""
    rng = np.random.default_rng(count)
    widths = {"q": HEADS, "k": groups, "v": groups}
    return {name: rng.normal(size=(batch, count, n * WIDTH)).astype(np.float32) for name, n in widths.items()}


def run(session: Session, feed: Feed, parts: list[int], padding: int = 0) -> Array:
    """What comes out when the tokens are fed in parts, the first `padding` of them masked."""
    batch, groups = len(feed["q"]), feed["k"].shape[2] // WIDTH
    cache: Feed = {name: np.zeros((batch, groups, 0, WIDTH), dtype=np.float32) for name in ("past_keys", "past_values")}
    outputs, start = [], 0
    for part in parts:
        stop = start + part
        visible = np.arange(stop)[None, :] <= np.arange(start, stop)[:, None]
        visible &= (np.arange(stop)[None, :] >= padding) | (np.arange(start, stop)[:, None] < padding)
        mask = np.broadcast_to(np.where(visible, 0, LOWEST).astype(np.float32), (batch, 1, part, stop))
        now = {name: array[:, start:stop] for name, array in feed.items()}
        found = session.run({**now, "mask": np.ascontiguousarray(mask), **cache})
        cache = {"past_keys": found["keys"], "past_values": found["values"]}
        outputs.append(found["y"])
        start = stop
    return np.concatenate(outputs, axis=1)


def split(groups: int, options: str = "") -> tuple[ir.Model, Session]:
    model = parse(written(groups, options))
    result = SplitAttention().run(model, Context())
    assert [event.reason for event in result.rewrites] == [f"6 heads over {groups}"] and not result.declined
    assert not graph.nodes(model, "Attention", "Softmax")
    assert not SplitAttention().run(model, Context()).changed
    return model, Session(model)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("options", ["", ", scale = 0.2"])
def test_it_is_the_same_attention(groups: int, options: str) -> None:
    feed, (_, session) = tokens(40, groups), split(groups, options)
    wanted = run(Session(parse(written(groups, options))), feed, [30, 9, 1])
    np.testing.assert_allclose(run(session, feed, [30, 9, 1]), wanted, atol=2e-6)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("count", [70, 253])
def test_the_bits_do_not_depend_on_how_tokens_are_fed(groups: int, count: int) -> None:
    feed, (_, session) = tokens(count, groups), split(groups)
    wanted = run(session, feed, [count])
    for parts in ([1] * count, [count - 13, 13], [7, *[9] * 7, count - 70]):
        np.testing.assert_array_equal(run(session, feed, [part for part in parts if part]), wanted)
    alone = {name: array[:1] for name, array in feed.items()}
    np.testing.assert_array_equal(run(session, alone, [count]), wanted[:1])


@pytest.mark.parametrize("groups", GROUPS)
def test_padding_on_the_left_does_not_change_the_bits(groups: int) -> None:
    feed, (_, session) = tokens(60, groups), split(groups)
    padded = {name: np.concatenate([array[:, :11] * 3, array], axis=1) for name, array in feed.items()}
    np.testing.assert_array_equal(run(session, padded, [71], padding=11)[:, 11:], run(session, feed, [60]))


@pytest.mark.parametrize("groups", GROUPS)
def test_every_size_is_known_to_readers_by_the_names_that_were(groups: int) -> None:
    model, _ = split(groups)
    assert [output.name for output in model.graph.outputs] == ["y", "keys", "values"]
    assert all(output.shape is not None for output in model.graph.outputs)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("q_num_heads = 6, kv_num_heads = 2", "scale = 0.2", "its queries, keys and values have four dimensions"),
        ("kv_num_heads = 2", "kv_num_heads = 2, softcap = 2.0", "it has attributes besides heads and scale"),
        ("v, mask, past_keys, past_values) }", 'v, mask, past_keys, "") }', "it has no mask or no cache of floats"),
        ("float[b, 1, s, t] mask", "float[b, 6, s, t] mask", "not one row a query for all heads"),
        ("float[b, 1, s, t] mask", "float[b, 1, 1, t] mask", "not one row a query for all heads"),
        (f"p, {WIDTH}] past_keys", "p, d] past_keys", "the width of its heads is not known"),
    ],
)
def test_what_it_cannot_split_is_declined(old: str, new: str, reason: str) -> None:
    model = parse(written(2).replace(old, new))
    result = SplitAttention().run(model, Context())
    assert not result.changed and [reason in event.reason for event in result.declined] == [True]


def test_attention_without_a_cache_is_left_as_it_is() -> None:
    model = parse(written(2).replace(", past_keys, past_values) }", ") }"))
    result = SplitAttention().run(model, Context())
    assert not result.changed and not result.declined


def test_keys_from_a_cache_of_integers_are_declined() -> None:
    shape = f"float[b, {HEADS}, s, {WIDTH}]"
    model = parse(
        f"""<ir_version: 10, opset_import: ["" : 23]>
        model ({shape} q, {shape} k, {shape} v, float[b, 1, s, s] mask) => ({shape} y) {{ y = Attention(q, k, v, mask) }}"""
    )
    result = SplitAttention().run(model, Context())
    assert not result.changed and [event.reason for event in result.declined] == [
        "it has no mask or no cache of floats"
    ]


def test_the_recipe_asks_for_it(tmp_path: Path) -> None:
    asked = tmp_path / "r.yaml"
    asked.write_text("attention: {invariant: true}\n", encoding="utf-8")
    names = [
        [entry.name for entry in passes.pipeline(load_recipe(r)).lower]
        for r in (str(asked), "w8a8-static", "w8a8-token", "w8a8")
    ]
    assert ["split-attention" in found for found in names] == [True, True, True, False]
