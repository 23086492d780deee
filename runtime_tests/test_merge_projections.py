from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import artifact, compile_model, graph
from scalefold.compiler.decoder import decoder_of
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.layer_names import joined, matches, parts
from scalefold.compiler.protocol import PassResult
from scalefold.compiler.recipe import Weights
from scalefold.compiler.runtime import Feed
from scalefold.compiler.testing import check_pass, parse
from scalefold.passes.merge_projections import MergeProjections

HEAD = """<ir_version: 10, opset_import: ["" : 20]>
model (float[b, s, 2] x, float[b, 1, p, 2] "past_key_values.0.key")
    => (float[b, s, 2] q, float[b, s, 1] k, float[b, 1, p, 2] "present.0.key")
<float[2, 2] wq = {1.0, 2.0, 3.0, 4.0}, float[2, 1] wk = {5.0, 6.0}, float[2] bq = {0.5, 1.0}, float[1] bk = {2.0},
 float[2, 3] w = {1.0, 2.0, 5.0, 3.0, 4.0, 6.0}, float[3] bias = {0.5, 1.0, 2.0}, int64[2] sizes = {2, 1}>
{ "present.0.key" = Identity("past_key_values.0.key")
"""
APART = "hq = MatMul(x, wq)  hk = MatMul(x, wk)  q = Add(hq, bq)  k = Add(hk, bk) }"
WITHOUT_BIAS = "q = MatMul(x, wq)  k = MatMul(x, wk) }"
SHARED = "q = MatMul(x, wq)  h = MatMul(x, wk)  i = MatMul(x, wk)  k = Add(h, i) }"


def named(body: str, *names: str, head: str = HEAD) -> ir.Model:
    model = parse(head + body)
    for node, name in zip(graph.nodes(model, "MatMul"), names or ("a.q_proj", "a.k_proj"), strict=True):
        node.name = name
    return model


def declined(result: PassResult) -> list[str]:
    assert not result.changed
    return [event.reason for event in result.declined]


def test_projections_with_bias_become_one_product() -> None:
    result = check_pass(
        MergeProjections(),
        before=named(APART),
        after=HEAD + "h = MatMul(x, w)  y = Add(h, bias)  q, k = Split<axis = -1>(y, sizes) }",
    )
    assert [(event.where, event.reason) for event in result.rewrites] == [("a.q_proj+k_proj", "2 products in one")]


def test_projections_without_bias_become_one_product() -> None:
    check_pass(
        MergeProjections(),
        before=named(WITHOUT_BIAS),
        after=HEAD + "y = MatMul(x, w)  q, k = Split<axis = -1>(y, sizes) }",
    )


def test_where_one_has_a_bias_the_others_get_one_of_zeros() -> None:
    check_pass(
        MergeProjections(),
        before=named("h = MatMul(x, wq)  q = Add(h, bq)  k = MatMul(x, wk) }"),
        after=HEAD.replace("{0.5, 1.0, 2.0}", "{0.5, 1.0, 0.0}")
        + "h = MatMul(x, w)  y = Add(h, bias)  q, k = Split<axis = -1>(y, sizes) }",
    )


def test_a_group_that_reads_a_merged_group_is_merged_too() -> None:
    head = HEAD.replace(
        "float[2, 1] wk", "float[2, 2] wa = {1.0, 0.0, 2.0, 1.0}, float[2, 2] wb = {0.0, 1.0, 1.0, 3.0}, float[2, 1] wk"
    )
    body = "a = MatMul(x, wa)  b = MatMul(x, wb)  q0 = MatMul(a, wq)  k = MatMul(a, wk)  q = Add(q0, b) }"
    model = named(body, "a.first", "a.second", "a.q_proj", "a.k_proj", head=head)
    result = check_pass(MergeProjections(), before=model)
    assert [event.where for event in result.rewrites] == ["a.first+second", "a.q_proj+k_proj"]


def test_a_model_without_a_cache_keeps_its_layers() -> None:
    head = HEAD.replace("past_key_values.0.key", "before").replace("present.0.key", "after")
    result = check_pass(MergeProjections(), before=named(APART, head=head))
    assert not result.changed and not result.declined


@pytest.mark.parametrize(
    ("weights", "alike", "reason"),
    [
        ({"layers": {"q_proj": {"bits": 4}}}, (), "the recipe gives the layers different formats"),
        ({"format": "kmeans", "bits": 4, "codebook": "tensor"}, (), "each layer has a codebook of its own"),
        ({}, (r"a\.k_proj$",), r"the recipe's pattern 'a\\.k_proj$' finds only some of the layers"),
    ],
)
def test_layers_that_a_recipe_treats_differently_stay_apart(
    weights: dict[str, object], alike: tuple[str, ...], reason: str
) -> None:
    candidate = MergeProjections(Weights.model_validate(weights), alike)
    assert declined(check_pass(candidate, before=named(APART))) == [reason]


@pytest.mark.parametrize(
    ("body", "names", "reason"),
    [
        (APART, ("a.q_proj", "b.k_proj"), "layers of several modules read its input"),
        (SHARED, ("a.q", "a.k", "a.v"), "something else reads one of the weights"),
    ],
)
def test_layers_that_do_not_belong_together_stay_apart(body: str, names: tuple[str, ...], reason: str) -> None:
    assert declined(check_pass(MergeProjections(), before=named(body, *names))) == [reason]


def test_a_joint_name_has_the_names_of_its_parts() -> None:
    names = ("layers.0.attn.q_proj", "layers.0.attn.k_proj", "layers.0.attn.v_proj")
    assert joined(names) == "layers.0.attn.q_proj+k_proj+v_proj"
    assert parts("layers.0.attn.q_proj+k_proj+v_proj") == names
    assert joined(("q", "k")) == "q+k" and parts("q+k") == ("q", "k") and parts("lm_head") == ("lm_head",)


@pytest.mark.parametrize("pattern", [r"^a\.k_proj$", "q_proj", r"a\.q_proj\+k_proj$"])
def test_a_pattern_finds_a_merged_layer_by_any_of_its_names(pattern: str) -> None:
    assert matches(pattern, "a.q_proj+k_proj")


def test_a_compiled_llama_has_four_products_in_a_layer(decoder_folders: dict[str, Path], tmp_path: Path) -> None:
    source = decoder_folders["llama"] / artifact.MODEL
    generator, decoder = np.random.default_rng(8), decoder_of(read_onnx(source))
    feeds: list[Feed] = [decoder.prompt_feed(generator.integers(0, 200, (1, 16))) for _ in range(4)]
    report = compile_model(source, tmp_path / "out", recipe="w8a8-naive", calibration=feeds, samples=8)
    assert all(layer.integer for layer in report.layers)
    kinds = [layer.name.rpartition(".")[2] for layer in report.layers if ".layers.0." in layer.name]
    assert sorted(kinds) == ["down_proj", "gate_proj+up_proj", "o_proj", "q_proj+k_proj+v_proj"]
