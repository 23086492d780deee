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

HEADS, GROUPS, WIDTH = 6, 2, 8
LOWEST = float(np.finfo(np.float32).min)
TEXT = f"""<ir_version: 10, opset_import: ["" : 23]>
model (float[b, s, {HEADS * WIDTH}] q, float[b, s, {GROUPS * WIDTH}] k, float[b, s, {GROUPS * WIDTH}] v,
 float[b, 1, s, t] mask, float[b, {GROUPS}, p, {WIDTH}] past_keys, float[b, {GROUPS}, p, {WIDTH}] past_values)
 => (float[b, s, {HEADS * WIDTH}] y, float[b, {GROUPS}, t, {WIDTH}] keys, float[b, {GROUPS}, t, {WIDTH}] values)
{{ y, keys, values =
 Attention<q_num_heads = {HEADS}, kv_num_heads = {GROUPS}OPTIONS>(q, k, v, mask, past_keys, past_values) }}
"""


def tokens(count: int, batch: int = 2) -> Feed:
    """Queries, keys and values of some tokens."""
    rng = np.random.default_rng(count)
    widths = {"q": HEADS, "k": GROUPS, "v": GROUPS}
    return {name: rng.normal(size=(batch, count, n * WIDTH)).astype(np.float32) for name, n in widths.items()}


def run(session: Session, feed: Feed, parts: list[int], padding: int = 0) -> Array:
    """What comes out when the tokens are fed in parts, the first `padding` of them masked."""
    batch = len(feed["q"])
    cache: Feed = {name: np.zeros((batch, GROUPS, 0, WIDTH), dtype=np.float32) for name in ("past_keys", "past_values")}
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


def split(options: str = "") -> tuple[ir.Model, Session]:
    model = parse(TEXT.replace("OPTIONS", options))
    result = SplitAttention().run(model, Context())
    assert [event.reason for event in result.rewrites] == ["6 heads over 2"] and not result.declined
    assert not graph.nodes(model, "Attention", "Softmax")
    assert not SplitAttention().run(model, Context()).changed
    return model, Session(model)


@pytest.mark.parametrize("options", ["", ", scale = 0.2"])
def test_it_is_the_same_attention(options: str) -> None:
    feed, (_, session) = tokens(40), split(options)
    wanted = run(Session(parse(TEXT.replace("OPTIONS", options))), feed, [30, 9, 1])
    np.testing.assert_allclose(run(session, feed, [30, 9, 1]), wanted, atol=2e-6)


@pytest.mark.parametrize("count", [70, 253])
def test_the_bits_do_not_depend_on_how_tokens_are_fed(count: int) -> None:
    feed, (_, session) = tokens(count), split()
    wanted = run(session, feed, [count])
    for parts in ([1] * count, [count - 13, 13], [7, *[9] * 7, count - 70]):
        np.testing.assert_array_equal(run(session, feed, [part for part in parts if part]), wanted)
    alone = {name: array[:1] for name, array in feed.items()}
    np.testing.assert_array_equal(run(session, alone, [count]), wanted[:1])


def test_padding_on_the_left_does_not_change_the_bits() -> None:
    feed, (_, session) = tokens(60), split()
    padded = {name: np.concatenate([array[:, :11] * 3, array], axis=1) for name, array in feed.items()}
    np.testing.assert_array_equal(run(session, padded, [71], padding=11)[:, 11:], run(session, feed, [60]))


def test_every_size_is_known_to_readers_by_the_names_that_were() -> None:
    model, _ = split()
    assert [output.name for output in model.graph.outputs] == ["y", "keys", "values"]
    assert all(output.shape is not None for output in model.graph.outputs)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (f"kv_num_heads = {GROUPS}", f"kv_num_heads = {HEADS}", "one token would be a product of one row"),
        ("OPTIONS", ", softcap = 2.0", "it has attributes besides heads and scale"),
        (", past_keys, past_values) }", ") }", "it has no mask or no cache of floats"),
        (f"p, {WIDTH}] past_keys", "p, d] past_keys", "the width of its heads is not known"),
    ],
)
def test_what_it_cannot_split_is_declined(old: str, new: str, reason: str) -> None:
    model = parse(TEXT.replace(old, new).replace("OPTIONS", ""))
    result = SplitAttention().run(model, Context())
    assert not result.changed and [reason in event.reason for event in result.declined] == [True]


def test_the_recipe_asks_for_it(tmp_path: Path) -> None:
    asked = tmp_path / "r.yaml"
    asked.write_text("attention: {invariant: true}\n", encoding="utf-8")
    names = [[entry.name for entry in passes.pipeline(load_recipe(r)).lower] for r in (str(asked), "w8a8")]
    assert ["split-attention" in found for found in names] == [True, False]
