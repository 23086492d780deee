from __future__ import annotations

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.decoder import decoder_of, prefix_length
from scalefold.compiler.protocol import Context
from scalefold.compiler.runtime import Session
from scalefold.compiler.testing import check_pass
from scalefold.passes.bake_prefix import bake
from scalefold.passes.merge_expands import MergeExpands

BODY = """<ir_version: 10, opset_import: ["" : 20]>
model (float[b, 1, p, 2] k, float[b, 1, p, 2] v) => (float[b, 1, t, 2] keys, float[b, 1, t, 2] values)
<float[1, 1, 1, 2] "k.prefix" = {1.0, 2.0}, float[1, 1, 1, 2] "v.prefix" = {5.0, 6.0}, int64[3] ones = {1, 1, ONE},
 float[1, 2, 1, 2] "past.prefix" = {1.0, 2.0, 5.0, 6.0}>
{ batch = Shape<start = 0, end = 1>(k)  sizes = Concat<axis = 0>(batch, ones)
"""
EXPANDS = 'pk = Expand("k.prefix", sizes)  pv = Expand("v.prefix", sizes)'
FEEDS = [{"k": np.ones((3, 1, 4, 2), np.float32), "v": np.zeros((3, 1, 4, 2), np.float32)}]
JOINED = " keys = Concat<axis = 2>(pk, k)  values = Concat<axis = 2>(pv, v) }"


def test_two_layers_share_one_expand() -> None:
    body = BODY.replace("ONE", "1")
    result = check_pass(
        MergeExpands(),
        before=body + EXPANDS + JOINED,
        after=body + 'all = Expand("past.prefix", sizes)  pk, pv = Split<axis = 1, num_outputs = 2>(all)' + JOINED,
        feeds=FEEDS,
    )
    assert [event.reason for event in result.rewrites] == ["2 constants expanded at once"]


def test_what_is_expanded_along_other_axes_stays() -> None:
    wide = BODY.replace("ONE", "2")

    assert not check_pass(MergeExpands(), before=wide + EXPANDS + JOINED, feeds=FEEDS).changed


def test_a_decoder_keeps_its_function_and_the_length_of_its_prefix(decoder_models: dict[str, ir.Model]) -> None:
    model = decoder_models["llama"].clone()
    bake(model, (3, 11))
    feed = decoder_of(model).prompt_feed(np.arange(10).reshape(2, 5) + 7)
    wanted = Session(model).run(feed)
    assert MergeExpands().run(model, Context()).changed
    assert len([node for node in graph.nodes(model, "Expand") if (node.name or "").startswith("past")]) == 1
    got = Session(model).run(feed)
    assert all(np.array_equal(wanted[name], got[name]) for name in wanted)
    assert prefix_length(model) == 2
