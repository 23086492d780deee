from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import graph
from scalefold.compiler.protocol import Context
from scalefold.compiler.runtime import Feed
from scalefold.compiler.testing import check_pass
from scalefold.passes.fuse_attention import FuseAttention
from scalefold.passes.unmerge_heads import UnmergeHeads

CONSTANTS = (
    "<int64[5] fused = {0, 0, 2, 3, 4}, int64 first = {0}, int64 second = {1}, int64 third = {2},"
    " int64[3] rows = {-1, 0, 4}, int64[1] one = {1}, int64[1] two = {2}, int64[1] four = {4}, int64[1] rest = {-1},"
    " int64[3] join = {0, 0, 8}, float half = {0.5}, float[b, s, 2, 4] q0, float[b, s, 2, 4] k0, float[b, s, 2, 4] v0,"
    " float[b, 2, s, 4] qh, float[b, 2, s, 4] kh, float[b, 2, t, 4] keys, float[b, 2, t, 4] values,"
    " float[m, s, 4] q3, float[m, t, 4] k3, float[m, t, 4] v3, float[b, 2, s, t] split, float[b, 2, s, t] total,"
    " float[b, 2, s, 4] out>"
)
PICKED = (
    "parts = Reshape(x, fused)  q0 = Gather<axis = 3>(parts, first)  k0 = Gather<axis = 3>(parts, second)"
    "  v0 = Gather<axis = 3>(parts, third)  qh = Transpose<perm = [0, 2, 1, 3]>(q0)"
    "  kh = Transpose<perm = [0, 2, 1, 3]>(k0)  vh = Transpose<perm = [0, 2, 1, 3]>(v0)"
    "  keys = Concat<axis = -2>(past_k, kh)  values = Concat<axis = -2>(past_v, vh)"
    "  batch = Shape<start = 0, end = 1>(keys)  width = Shape<start = 2, end = 3>(keys)"
    "  length = Shape<start = 2, end = 3>(qh)"
    "  merged_q = Concat<axis = 0>(rest, length, four)  merged_k = Concat<axis = 0>(rest, width, four)"
    "  merged_p = Concat<axis = 0>(rest, length, width)  apart_s = Concat<axis = 0>(batch, two, length, width)"
    "  apart_o = Concat<axis = 0>(batch, two, length, four) "
)
CORE = (
    "q3 = Reshape(qh, merged_q)  k3 = Reshape(keys, merged_k)  v3 = Reshape(values, merged_k)"
    "  kt = Transpose<perm = [0, 2, 1]>(k3)  scores = MatMul(q3, kt)  scaled = Mul(scores, half)"
    "  biased = Add(scaled, alibi)  split = Reshape(biased, apart_s)  total = Add(split, mask)"
    "  p = Softmax<axis = -1>(total)  p3 = Reshape(p, merged_p)  o3 = MatMul(p3, v3)  out = Reshape(o3, apart_o)"
    "  joined = Transpose<perm = [0, 2, 1, 3]>(out)  y = Reshape(joined, join)"
)


def text(body: str) -> str:
    return (
        '<ir_version: 10, opset_import: ["" : 23]>\nmodel (float[b, s, 24] x, float[b, 2, p, 4] past_k,'
        " float[b, 2, p, 4] past_v, float[m, 1, t] alibi, float[b, 1, s, t] mask) => (float[b, s, 8] y,"
        f" float[b, 2, t, 4] keys, float[b, 2, t, 4] values){CONSTANTS}{{{body}}}"
    )


def feeds() -> list[Feed]:
    generator = np.random.default_rng(3)
    found: list[Feed] = []
    for s, p in ((5, 0), (1, 4), (3, 2)):
        later = np.arange(s + p)[None, :] > np.arange(s)[:, None] + p
        mask = np.where(later, np.finfo(np.float32).min, np.float32(0)).astype(np.float32)
        shapes = {"x": (2, s, 24), "past_k": (2, 2, p, 4), "past_v": (2, 2, p, 4), "alibi": (4, 1, s + p)}
        arrays = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        found.append({**arrays, "mask": np.broadcast_to(mask, (2, 1, s, s + p)).copy()})
    return found


def test_merged_heads_come_apart_and_keep_their_numbers() -> None:
    result = check_pass(UnmergeHeads(), before=text(PICKED + CORE), feeds=feeds())
    assert [event.reason for event in result.rewrites] == ["2 heads apart"]


def test_attention_is_fused_afterwards() -> None:
    model = ir.from_onnx_text(text(PICKED + CORE))
    UnmergeHeads().run(model, Context())
    result = FuseAttention().run(model, Context())
    assert not result.declined
    assert len(graph.nodes(model, "Attention")) == 1 and not graph.nodes(model, "Softmax")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("scaled = Mul(scores, half)", "scaled = Mul(scores, scores)"),
        ("out = Reshape(o3, apart_o)", "o4 = Neg(o3)  out = Reshape(o4, apart_o)"),
        ("p3 = Reshape(p, merged_p)", "again = Neg(p)  p3 = Reshape(again, merged_p)"),
    ],
)
def test_another_core_stays(old: str, new: str) -> None:
    body = text((PICKED + CORE).replace(old, new))
    assert not check_pass(UnmergeHeads(), before=body, after=body, feeds=feeds()).changed
