"""Sites of a migration on graphs of two channels: what makes an activation, and folding into it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import DeduplicateInitializersPass

from scalefold.compiler import graph, schemes
from scalefold.compiler.export import export_model
from scalefold.compiler.protocol import Context, Event
from scalefold.compiler.runtime import Feed, Session
from scalefold.compiler.schemes import Float
from scalefold.compiler.sites import find_sites, group_sites
from scalefold.compiler.testing import check_pass, context_on, parse
from scalefold.passes import NORMALIZE
from scalefold.passes.migrate_outliers import MigrateOutliers, scales_for


def floats(values: object) -> Float:
    return np.asarray(values, dtype=np.float32)


def constant(name: str, array: object) -> str:
    """A float32 initializer as ONNX text."""
    values = np.asarray(array, dtype=np.float32)
    sizes = ", ".join(map(str, values.shape))
    return f"float[{sizes}] {name} = {{{', '.join(repr(float(value)) for value in values.ravel())}}}"


MAKER, OFFSET = floats([[40, 1], [30, 2]]), floats([200, -3])
READER, BIAS = floats([[1, 2, 3], [4, 5, 6]]), floats([1, 0, -1])
SQUARE = floats([[1, 2], [4, 5]])
USUAL: dict[str, object] = {
    "u": MAKER, "a": OFFSET, "w": READER, "c": BIAS, "g": [[1, 1], [2, -1]], "gain": [50, 1], "beta": [3000, -1],
}  # fmt: skip
FEEDS: list[Feed] = [{"x": floats([[[0, 1], [1, 0]]])}, {"x": floats([[[3, 4], [-7, 2]]])}]


def two(body: str, changed: Mapping[str, object] | None = None, *, width: int = 3, outputs: str = "") -> str:
    """A graph of two channels; constants that nothing reads are left out."""
    every = {**USUAL, **(changed or {})}
    names = {name: array for name, array in every.items() if f" {name})" in body or f", {name}," in body}
    constants = ", ".join(constant(name, array) for name, array in names.items())
    return f"""<ir_version: 11, opset_import: ["" : 23]>
    model (float[b, s, 2] x) => (float[b, s, {width}] y{outputs}) <{constants}> {{{body}}}"""


V = "[up] vp = MatMul(x, u)  v = Add(vp, a)"
READ = "[down] p = MatMul(n, w)  y = Add(p, c)"
BARE = "[down] y = MatMul(n, w)"
RMS = "[rms] n = RMSNormalization<axis = -1>(x, gain)"
BODIES = {
    "relu": f"{V}  n = Relu(v)  {READ}",
    "gate": f"{V}  [gate] h = MatMul(x, g)  i = Sigmoid(h)  n = Mul(i, v)  {READ}",
    "linear": f"[up] vp = MatMul(x, u)  n = Add(vp, a)  {READ}",
}


def migrate(kind: str) -> MigrateOutliers:
    return MigrateOutliers(norm=False, linear=kind == "linear", value=False, relu=kind == "relu", gate=kind == "gate")


def scales(event: Event, low: Float, high: Float) -> Float:
    return scales_for(float(event.figures["threshold"]), low, high)


def rows() -> Float:
    """All tokens."""
    return np.concatenate([floats(feed["x"]).reshape(-1, 2) for feed in FEEDS])


def product(weight: Float) -> Float:
    """What a layer makes of all tokens when it is quantized, as the search sees those before a site."""
    x = rows()
    seen = schemes.activation_grid(float(x.min()), float(x.max())).round_trip(x)
    return floats(seen @ schemes.weight_round_trip(weight))


def activation(kind: str) -> Float:
    """The activation at the site of BODIES."""
    made = product(MAKER) + OFFSET
    if kind == "relu":
        return floats(np.maximum(made, 0))
    return floats(made / (1 + np.exp(-product(floats(USUAL["g"]))))) if kind == "gate" else made


@pytest.mark.parametrize("kind", ["relu", "gate"])
def test_a_scale_moves_into_the_layer_before(kind: str) -> None:
    (event,) = check_pass(migrate(kind), before=two(BODIES[kind]), feeds=FEEDS).rewrites
    n = activation(kind)
    s = scales(event, n.min(axis=0), n.max(axis=0))
    assert (event.where, event.reason) == ("up", "scaled")
    assert s[0] > 1
    changed = {"u": MAKER / s, "a": OFFSET / s, "w": READER * s[:, None]}
    check_pass(migrate(kind), before=two(BODIES[kind]), after=two(BODIES[kind], changed), feeds=FEEDS)
    assert event.figures["largest_before"] == pytest.approx(float(np.abs(n).max()), rel=1e-5)
    assert event.figures["largest_after"] == pytest.approx(float(np.abs(n / s).max()), rel=1e-5)


def test_a_shift_and_a_scale_move_into_a_linear_layer_before() -> None:
    before = two(BODIES["linear"])
    (event,) = check_pass(migrate("linear"), before=before, feeds=FEEDS).rewrites
    n = activation("linear")
    z = floats((n.min(axis=0) + n.max(axis=0)) / 2)
    s = scales(event, n.min(axis=0) - z, n.max(axis=0) - z)
    changed = {"u": MAKER / s, "a": (OFFSET - z) / s, "w": READER * s[:, None], "c": BIAS + z @ READER}
    check_pass(migrate("linear"), before=before, after=two(BODIES["linear"], changed), feeds=FEEDS)


def test_a_linear_layer_without_bias_gets_one_and_is_restored_behind_it() -> None:
    body = "[up] n = MatMul(x, u)  [down] q = MatMul(n, sq)  y = Add(n, q)"
    shifted = MigrateOutliers(scale=False)
    n = product(MAKER)
    z = floats((n.min(axis=0) + n.max(axis=0)) / 2)
    after = """[up] vp = MatMul(x, u)  n = Add(vp, a)  back = Add(n, z)
    [down] p = MatMul(n, sq)  q = Add(p, c)  y = Add(back, q)"""
    check_pass(
        shifted,
        before=two(body, {"sq": SQUARE}, width=2),
        after=two(after, {"sq": SQUARE, "a": -z, "z": z, "c": z @ SQUARE}, width=2),
        feeds=FEEDS,
    )


def test_a_relu_that_something_else_reads_is_restored_there() -> None:
    body = f"{V}  n = Relu(v)  [down] p = MatMul(n, sq)  y = Add(n, p)"
    (event,) = check_pass(migrate("relu"), before=two(body, {"sq": SQUARE}, width=2), feeds=FEEDS).rewrites
    n = activation("relu")
    s = scales(event, n.min(axis=0), n.max(axis=0))
    after = f"{V}  n = Relu(v)  back = Mul(n, s)  [down] p = MatMul(n, sq)  y = Add(back, p)"
    changed = {"u": MAKER / s, "a": OFFSET / s, "sq": SQUARE * s[:, None], "s": s}
    check_pass(
        migrate("relu"), before=two(body, {"sq": SQUARE}, width=2), after=two(after, changed, width=2), feeds=FEEDS
    )


def test_an_rms_normalization_is_scaled_and_never_shifted() -> None:
    before = two(f"{RMS} {BARE}")
    (event,) = check_pass(MigrateOutliers(), before=before, feeds=FEEDS).rewrites
    n = rows() / np.sqrt(np.square(rows()).mean(axis=1, keepdims=True) + 1e-5) * floats([50, 1])
    s = scales(event, floats(n.min(axis=0)), floats(n.max(axis=0)))
    assert (event.where, event.reason) == ("rms", "scaled")
    assert float(event.figures["largest_after"]) < 0.5 * float(event.figures["largest_before"])
    changed = {"gain": floats([50, 1]) / s, "w": READER * s[:, None]}
    check_pass(MigrateOutliers(), before=before, after=two(f"{RMS} {BARE}", changed), feeds=FEEDS)


def test_a_shift_alone_leaves_an_rms_normalization_as_it_is() -> None:
    before = two(f"{RMS} {BARE}")
    result = check_pass(MigrateOutliers(scale=False), before=before, after=before, feeds=FEEDS)
    assert not result.declined


@pytest.mark.parametrize("kind", ["relu", "gate"])
def test_a_kind_that_is_not_asked_for_is_passed_over(kind: str) -> None:
    result = check_pass(MigrateOutliers(), before=two(BODIES[kind]), after=two(BODIES[kind]), feeds=FEEDS)
    assert not result.declined


def test_normalizations_can_be_left_alone() -> None:
    before = two(f"{RMS} {BARE}")
    assert not check_pass(MigrateOutliers(norm=False), before=before, after=before, feeds=FEEDS).declined


MORE = "the output of the layer that makes it is read by something else too"


@pytest.mark.parametrize(
    ("kind", "body", "outputs", "reason"),
    [
        pytest.param("relu", f"{BODIES['relu']}  t = Neg(v)", ", float[b, s, 2] t", MORE, id="read before the Relu"),
        pytest.param(
            "gate", f"{V}  i = Sigmoid(v)  n = Mul(i, v)  {READ}", "", MORE, id="a layer that is its own gate"
        ),
        pytest.param("gate", f"{V}  n = Mul(v, v)  {READ}", "", MORE, id="a square"),
        pytest.param(
            "relu", BODIES["relu"], ", float[b, s, 2] n", "the activation is an output of the graph", id="an output"
        ),
        pytest.param(
            "linear", BODIES["linear"], ", float[b, s, 2] n", "the activation is an output of the graph", id="linear"
        ),
        pytest.param(
            "relu",
            f"{BODIES['relu']}  t = Transpose(w)",
            ", float[3, 2] t",
            "a weight is shared with something that is not a linear layer",
            id="a weight that a Transpose reads",
        ),
        pytest.param(
            "relu",
            f"{BODIES['relu']}  [other] t = MatMul(x, u)",
            ", float[b, s, 2] t",
            "the weight of the layer that makes it is shared with another layer",
            id="a shared weight before",
        ),
    ],
)
def test_a_site_where_the_algebra_does_not_hold_is_declined(kind: str, body: str, outputs: str, reason: str) -> None:
    before = two(body, outputs=outputs)
    result = check_pass(migrate(kind), before=before, after=before, feeds=FEEDS)
    assert [event.reason for event in result.declined] == [reason]


def test_a_layer_that_reads_what_it_makes_is_declined() -> None:
    before = two("[one] n = MatMul(x, sq)  [two] y = MatMul(n, sq)", {"sq": SQUARE}, width=2)
    result = check_pass(MigrateOutliers(), before=before, after=before, feeds=FEEDS)
    assert [event.reason for event in result.declined] == [
        "a weight is shared with a layer whose input cannot be migrated"
    ]


def test_a_layer_that_makes_and_reads_the_activation_is_declined() -> None:
    body = "[rms] m = RMSNormalization(x, gain)  [one] n = MatMul(m, sq)  [two] y = MatMul(n, sq)"
    before = two(body, {"sq": SQUARE}, width=2)
    result = check_pass(MigrateOutliers(), before=before, after=before, feeds=FEEDS)
    assert [event.reason for event in result.declined] == ["a layer both makes and reads the activation"]


# ---- one weight in two layers

JOINT = """
[first] n = LayerNormalization<epsilon = 0.0>(x, gain, beta)  [a] p = MatMul(n, sq)  q = Add(p, c)  r = Add(n, q)
[second] m = LayerNormalization<epsilon = 0.0>(r, gain, beta)  [b] d = MatMul(m, sq)  e = Add(d, c)  y = Add(m, e)
"""
SHARED: Mapping[str, object] = {"sq": SQUARE, "c": [1, 0]}


def test_sites_whose_readers_share_a_weight_are_a_group() -> None:
    model = parse(two(JOINT + "[c] z = MatMul(y, w)", SHARED, outputs=", float[b, s, 3] z", width=2))
    sites = find_sites(model)
    assert [site.x.name for site in sites] == ["n", "m", "y"]
    groups = group_sites(sites)
    assert groups[sites[0]] == groups[sites[1]] == (sites[0], sites[1])
    assert groups[sites[2]] == (sites[2],)


def test_a_shared_weight_and_a_shared_gain_are_folded_once_and_stay_shared() -> None:
    model = parse(two(JOINT, SHARED, width=2))
    (event,) = check_pass(MigrateOutliers(), before=model, feeds=FEEDS).rewrites
    assert (event.where, event.figures["uses"]) == ("first", 2)
    assert float(event.figures["largest_after"]) < 0.5 * float(event.figures["largest_before"])
    z = floats([3000, -1])
    s = scales(event, floats([-50, -1]), floats([50, 1]))
    assert s[0] > 1
    after = """
    n = LayerNormalization<epsilon = 0.0>(x, gain, beta)  ns = Mul(n, s)  nb = Add(ns, z)
    [a] p = MatMul(n, sq)  q = Add(p, c)  r = Add(nb, q)
    m = LayerNormalization<epsilon = 0.0>(r, gain, beta)  ms = Mul(m, s)  mb = Add(ms, z)
    [b] d = MatMul(m, sq)  e = Add(d, c)  y = Add(mb, e)
    """
    changed = {"gain": floats([50, 1]) / s, "beta": [0, 0], "sq": SQUARE * s[:, None], "s": s, "z": z}
    biased = {**changed, "c": floats([1, 0]) + z @ SQUARE}
    check_pass(MigrateOutliers(), before=model, after=two(after, biased, width=2), feeds=FEEDS)
    folded = model.clone()
    MigrateOutliers().run(folded, context_on(folded, FEEDS))
    first, second = graph.linear_layers(folded)
    assert (first.weight, first.bias) == (second.weight, second.bias)
    norms = graph.nodes(folded, "LayerNormalization")
    assert norms[0].inputs[1:] == norms[1].inputs[1:]
    assert len(folded.graph.initializers) == 6


def test_a_group_with_a_use_that_cannot_be_migrated_is_declined_whole() -> None:
    body = JOINT + "[fed] o = MatMul(x, sq)"
    before = two(body, SHARED, width=2, outputs=", float[b, s, 2] o")
    result = check_pass(MigrateOutliers(), before=before, after=before, feeds=FEEDS)
    assert [(event.where, event.reason) for event in result.declined] == [
        ("first", "a weight is shared with a layer whose input cannot be migrated")
    ]


def test_a_weight_that_is_an_embedding_table_too_is_declined() -> None:
    body = JOINT + "o = Gather(sq, ids)"
    before = two(body, SHARED, width=2, outputs=", float[1, 2] o").replace("<float", "<int64[1] ids = {1}, float", 1)
    result = check_pass(MigrateOutliers(), before=before, after=before, feeds=FEEDS)
    assert [event.reason for event in result.declined] == [
        "a weight is shared with something that is not a linear layer"
    ]


def test_uses_far_apart_are_not_shifted_to_a_middle_that_serves_few() -> None:
    norm = "n{0} = LayerNormalization<epsilon = 0.0>(x, gain, {1})  [l{0}] p{0} = MatMul(n{0}, sq)  "
    body = (
        norm.format(0, "far") + "".join(norm.format(use, "beta") for use in range(1, 5)) + "y = Sum(p0, p1, p2, p3, p4)"
    )
    changed = {"sq": SQUARE, "gain": [1, 1], "beta": [0, 0], "far": [-40, 0]}
    model = parse(two(body, changed, width=2))
    check_pass(MigrateOutliers(scale=False), before=model, after=model, feeds=FEEDS)
    near = parse(two(body, {**changed, "beta": [-39, 0]}, width=2))
    (event,) = check_pass(MigrateOutliers(scale=False), before=near, feeds=FEEDS).rewrites
    assert event.figures["largest_after"] == 1.5


# ---- ALBERT: two layers that are one, behind an embedding projection


@pytest.fixture(scope="module")
def albert(tmp_path_factory: pytest.TempPathFactory) -> ir.Model:
    """A tiny AlbertForMaskedLM with two outlier channels, in normal form."""
    import torch
    from transformers import AlbertConfig, AlbertForMaskedLM

    config = AlbertConfig(
        vocab_size=100,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    model = AlbertForMaskedLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.12)
            else:
                parameter[3], parameter[11] = 12.0, 8.0
    folder: Path = tmp_path_factory.mktemp("albert")
    model.save_pretrained(folder / "source")
    export_model(str(folder / "source"), folder / "float")
    graph_ = ir.load(folder / "float" / "model.onnx")
    for candidate in NORMALIZE:
        candidate.run(graph_, Context())
    # an exporter may write the transposed weight anew for every use
    DeduplicateInitializersPass(size_limit=1 << 30)(graph_)
    return graph_


def albert_feeds() -> list[Feed]:
    generator = np.random.default_rng(3)
    feeds: list[Feed] = []
    for length, padding in ((9, 0), (14, 4)):
        ids = generator.integers(5, 100, (2, length))
        mask = np.ones_like(ids)
        mask[0, length - padding :] = 0
        feeds.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)})
    return feeds


def test_the_shared_layers_of_albert_are_migrated_jointly_and_stay_shared(albert: ir.Model) -> None:
    feeds = albert_feeds()
    migrate_all = MigrateOutliers(value=True)
    result = check_pass(migrate_all, before=albert, feeds=feeds)
    joint = [event for event in result.rewrites if "uses" in event.figures]
    assert [event.figures["readers"] for event in joint] == [3, 1, 1]
    assert joint[0].where == "albert.encoder.embedding_hidden_mapping_in"
    assert joint[1].where.endswith("attention.value")
    for event in joint:
        assert event.figures["uses"] == 2
        assert float(event.figures["largest_after"]) < float(event.figures["largest_before"])
    folded = albert.clone()
    migrate_all.run(folded, context_on(albert, feeds))
    before, after = ({layer.weight for layer in graph.linear_layers(model)} for model in (albert, folded))
    assert len(after) == len(before) == 9
    assert len({layer.bias for layer in graph.linear_layers(folded)}) == 9


def test_what_every_use_reads_in_albert_is_tamed(albert: ir.Model) -> None:
    feeds = albert_feeds()
    folded = albert.clone()
    MigrateOutliers().run(folded, context_on(albert, feeds))
    query = [layer for layer in graph.linear_layers(albert) if "attention.query" in layer.name]
    assert len(query) == 2
    for layer in query:
        (twin,) = [other for other in graph.linear_layers(folded) if other.name == layer.name]
        before, after = Session(albert, outputs=[layer.x.name or ""]), Session(folded, outputs=[twin.x.name or ""])
        for feed in feeds:
            wide, narrow = (float(np.abs(next(iter(s.run(feed).values()))).max()) for s in (before, after))
            assert narrow < wide
