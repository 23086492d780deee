"""Learned scales: what is learned, that it folds without a trace, and that a run can be stopped and resumed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from scalefold.compiler import graph, schemes
from scalefold.compiler.blocks import find_blocks
from scalefold.compiler.decoder import decoder_of
from scalefold.compiler.errors import CalibrationError, SourceError
from scalefold.compiler.facts import row_range
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.learning import Checkpoint, Schedule, learn
from scalefold.compiler.protocol import Context, silent
from scalefold.compiler.recipe import Recipe
from scalefold.compiler.runtime import Array, Feed, Session
from scalefold.compiler.schemes import Float
from scalefold.compiler.straight_through import Observed, fake_activation, fake_weight, operands
from scalefold.compiler.testing import check_pass, context_on, parse
from scalefold.passes import NORMALIZE, pipeline
from scalefold.passes.clip_ranges import ClipRanges, current_grid, source_of
from scalefold.passes.insert_qdq import LEARNED_RANGE, InsertQdq
from scalefold.passes.learn_scales import LearnScales
from scalefold.passes.migrate_outliers import MigrateOutliers
from scalefold.passes.quantize_weights import QuantizeWeights

WIDTH, OUTLIER = 8, 3
BLOCKS_ONLY = LearnScales(steps=48, end_to_end_steps=0, rate=0.2)
BOTH = LearnScales(steps=24, end_to_end_steps=16, rate=0.2, end_to_end_rate=0.02, objective="float")


def constant(name: str, array: Array) -> str:
    """A float32 initializer as ONNX text."""
    sizes = ", ".join(map(str, array.shape))
    return f"float[{sizes}] {name} = {{{', '.join(repr(float(value)) for value in array.ravel())}}}"


def stack(*, shared: bool = False, post_norm: bool = False, head: bool = False) -> ir.Model:
    """Two blocks of two linear layers with a Relu between, with an outlier channel behind each normalization."""
    generator = np.random.default_rng(0)
    constants, body = [], ["[start] h0 = Identity(x)"]
    for index in range(2):
        number = 0 if shared else index
        if index == number:
            gain, weight = np.ones(WIDTH), generator.standard_normal((WIDTH, 2 * WIDTH)) * 0.3
            gain[OUTLIER] = 64.0
            weight[OUTLIER] /= 64.0
            out = generator.standard_normal((2 * WIDTH, WIDTH)) * 0.3
            pairs = {f"g{index}": gain, f"b{index}": np.zeros(WIDTH), f"w{index}": weight, f"v{index}": out}
            constants += [constant(name, array) for name, array in pairs.items()]
        skip = f"n{index}" if post_norm else f"h{index}"
        body += [
            f"[norm{index}] n{index} = LayerNormalization<axis = -1>(h{index}, g{number}, b{number})",
            f"[fc{index}] p{index} = MatMul(n{index}, w{number})",
            f"a{index} = Relu(p{index})",
            f"[out{index}] q{index} = MatMul(a{index}, v{number})",
            f"h{index + 1} = Add({skip}, q{index})",
        ]
    if head:
        constants += [constant("g", np.ones(WIDTH)), constant("b", np.zeros(WIDTH)), constant("t", np.eye(WIDTH))]
        body += ["[last] n = LayerNormalization<axis = -1>(h2, g, b)", "[head] y = MatMul(n, t)"]
    else:
        body += ["y = Identity(h2)"]
    return parse(f"""<ir_version: 10, opset_import: ["" : 20]>
    m (float[b, s, {WIDTH}] x) => (float[b, s, {WIDTH}] y) <{", ".join(constants)}> {{{"  ".join(body)}}}""")


def feeds(count: int = 6) -> list[Feed]:
    generator = np.random.default_rng(3)
    return [{"x": generator.standard_normal((1, 24, WIDTH)).astype(np.float32)} for _ in range(count)]


def quantization_error(model: ir.Model, original: ir.Model) -> float:
    """Squared error of the output once weights and activations are rounded to 8 bits."""
    context = context_on(original, feeds())
    quantized = model.clone()
    for entry in (QuantizeWeights(), InsertQdq()):
        entry.run(quantized, context)
    found, wanted = Session(quantized, optimize=False), Session(original)
    return sum(float(np.square(found.run(feed)["y"] - wanted.run(feed)["y"]).sum()) for feed in feeds())


def weights(model: ir.Model) -> dict[str, Array]:
    return {layer.name: layer.weights() for layer in graph.linear_layers(model)}


def test_outliers_are_scaled_down_and_the_float_function_stays() -> None:
    before = stack()
    result = check_pass(BLOCKS_ONLY, before, feeds=feeds())
    assert [event.where for event in result.rewrites] == ["norm0", "norm1"]
    for event in result.rewrites:
        assert event.figures["scales"] == WIDTH
        assert float(event.figures["block_loss"]) < 0.2 * float(event.figures["block_loss_before"])
        assert float(event.figures["smallest"]) < 0.2
    after = before.clone()
    BLOCKS_ONLY.run(after, context_on(before, feeds()))
    gain = graph.constant(graph.nodes(after, "LayerNormalization")[0].inputs[1])
    assert gain is not None and gain[OUTLIER] < 4 * float(np.median(gain.astype(np.float64)))
    assert quantization_error(after, before) < 0.2 * quantization_error(before, before)


def test_both_phases_are_at_least_as_good_on_what_judges() -> None:
    result = check_pass(BOTH, stack(), feeds=feeds())
    figures = result.rewrites[0].figures
    assert float(figures["end_to_end_loss"]) <= float(figures["end_to_end_loss_before"])
    assert figures["end_to_end_steps"] == BOTH.end_to_end_steps


def test_a_residual_connection_behind_a_normalization_is_restored() -> None:
    result = check_pass(BLOCKS_ONLY, stack(post_norm=True), feeds=feeds())
    assert [event.where for event in result.rewrites] == ["norm0", "norm1"]


def test_blocks_that_share_a_weight_are_learned_together_and_keep_sharing_it() -> None:
    before = stack(shared=True)
    (event,) = check_pass(BLOCKS_ONLY, before, feeds=feeds()).rewrites
    assert float(event.figures["block_loss"]) < 0.2 * float(event.figures["block_loss_before"])
    after = before.clone()
    BLOCKS_ONLY.run(after, context_on(before, feeds()))
    assert len({layer.weight for layer in graph.linear_layers(after)}) == 2


def test_other_places_are_options() -> None:
    result = check_pass(replace(BLOCKS_ONLY, norm=False, relu=True, steps=4), stack(), feeds=feeds())
    assert {event.where for event in (*result.rewrites, *result.declined)} == {"fc0", "fc1"}


def test_what_cannot_be_learned_is_declined_with_its_reason() -> None:
    options = replace(BLOCKS_ONLY, exclude=("fc1",), steps=8)
    result = check_pass(options, stack(head=True), feeds=feeds())
    assert [event.where for event in result.rewrites] == ["norm0"]
    assert {event.where: event.reason for event in result.declined} == {
        "norm1": "all its readers stay in float",
        "last": "no block lies behind it",
    }


def test_scales_that_are_no_better_than_none_are_not_folded() -> None:
    result = check_pass(replace(BLOCKS_ONLY, steps=0), stack(), stack(), feeds=feeds())
    assert {event.reason for event in result.declined} == {"no scales that were learned are better than none"}


def test_learning_goes_on_from_a_migrated_graph() -> None:
    before = stack()
    context = context_on(before, feeds())
    migrated = before.clone()
    MigrateOutliers().run(migrated, context)
    learned = migrated.clone()
    result = replace(BLOCKS_ONLY, rate=0.02).run(learned, context)
    assert result.changed
    assert quantization_error(learned, before) <= 1.05 * quantization_error(migrated, before)


def learned_with(options: LearnScales, context: Context | None = None) -> dict[str, Array]:
    model = stack()
    options.run(model, context or context_on(model, feeds()))
    return weights(model)


def assert_equal(one: dict[str, Array], other: dict[str, Array]) -> None:
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    first = learned_with(BOTH)
    assert_equal(first, learned_with(BOTH))
    other = learned_with(replace(BOTH, seed=1))
    assert any((first[name] != other[name]).any() for name in first)


class _StopError(Exception):
    pass


def stopping_after(steps: int) -> Context:
    """A context whose progress bar stops the run after so many steps of learning."""
    left = [steps]

    def advance() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise _StopError

    @contextmanager
    def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
        yield advance

    return replace(context_on(stack(), feeds()), progress=progress)


@pytest.mark.parametrize("steps", [2, 40, 57])
def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path: Path, steps: int) -> None:
    options = replace(BOTH, checkpoint=str(tmp_path / "state"))
    with pytest.raises(_StopError):
        learned_with(options, stopping_after(steps))
    assert_equal(learned_with(options), learned_with(BOTH))


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    options = replace(BLOCKS_ONLY, steps=2, checkpoint=str(tmp_path))
    learned_with(options)
    with pytest.raises(CalibrationError, match="it is the state of another run"):
        learned_with(replace(options, seed=5))
    (tmp_path / "learning.pt").write_bytes(b"cut short")
    with pytest.raises(CalibrationError, match="it cannot be read"):
        learned_with(options)


def test_a_state_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CalibrationError, match="it cannot be written"):
        learned_with(replace(BLOCKS_ONLY, steps=2, checkpoint=str(tmp_path / "file" / "state")))


def test_without_torch_learning_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[-1] in ("scale_learning", "learning")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SourceError, match=r"learning scales needs the package torch; pip install 'scalefold\[hf\]'"):
        learned_with(BLOCKS_ONLY)


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_fake_quantization_is_that_of_the_schemes(bits: int) -> None:
    generator = np.random.default_rng(bits)
    for weight in (generator.standard_normal((33, 17)), np.zeros((4, 3)), np.abs(generator.standard_normal((1, 5)))):
        array = np.asarray(weight, dtype=np.float32)
        found = fake_weight(torch.from_numpy(array), bits, bits).numpy()
        np.testing.assert_allclose(found, schemes.weight_round_trip(array, bits, bits), rtol=0, atol=1e-6)
    x = generator.standard_normal((50, 8)).astype(np.float32) * 3 + 1
    for low, high in ((float(x.min()), float(x.max())), (0.5, 2.0), (-1.0, 0.5), (0.0, 0.0)):
        found = fake_activation(torch.from_numpy(x), torch.tensor(low), torch.tensor(high), bits).numpy()
        np.testing.assert_allclose(found, schemes.activation_grid(low, high, bits).round_trip(x), rtol=0, atol=1e-5)


def test_gradients_of_a_quantizer_follow_its_range() -> None:
    x = torch.tensor([-5.0, -0.21, 0.3, 5.0], requires_grad=True)
    high = torch.tensor(3.0, requires_grad=True)
    torch.autograd.backward(fake_activation(x, torch.tensor(-1.0), high, 8).sum())
    assert x.grad is not None and high.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0]
    units = np.array([-0.21, 0.3]) * 255 / 4
    inside = float((np.rint(units) - units).sum())
    assert float(high.grad) == pytest.approx((-64 + 191 + inside) / 255, rel=1e-4)


def test_readers_see_the_product_of_the_scaled_and_rounded() -> None:
    model = stack()
    (reader, *_) = graph.nodes(model, "MatMul")
    theta = torch.full((WIDTH,), 0.7, requires_grad=True)
    bound = torch.full((WIDTH,), 3.0)
    seen = operands([Observed((reader,), -bound, bound, theta)], 8, 8)[reader]
    x, weight = torch.randn(5, WIDTH), torch.randn(WIDTH, 4)
    product = torch.matmul(*seen([x, weight]))
    torch.testing.assert_close(product, x.clamp(-3, 3) @ weight, rtol=0, atol=0.2)
    torch.autograd.backward(product.sum())
    assert theta.grad is not None and bool((theta.grad != 0).any())


def test_each_end_of_a_free_range_learns_from_what_lies_beyond_it() -> None:
    x = torch.tensor([-5.0, -0.21, 0.3, 5.0, 6.0], requires_grad=True)
    low, high = torch.tensor(-1.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    found = fake_activation(x, low, high, 8, free=True)
    torch.testing.assert_close(found, fake_activation(x, low, high, 8), rtol=0, atol=0)
    torch.autograd.backward(found.sum())
    assert x.grad is not None and low.grad is not None and high.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0, 0]
    units = np.array([-0.21, 0.3]) * 255 / 4
    inside = float((np.rint(units) - units).sum()) / 255
    # the zero point is rounded forward, so the two ends are off by less than a step
    assert float(low.grad) == pytest.approx(1 - inside, abs=3 / 255)
    assert float(high.grad) == pytest.approx(2 + inside, abs=3 / 255)


RANGES = replace(BOTH, activation_bits=4, ranges=True)
SPIKE = 60.0


def spiky() -> ir.Model:
    """A block in which what a spike adds to an activation is lost on a Tanh."""
    generator = np.random.default_rng(5)
    sizes = {"w": (WIDTH, WIDTH), "v": (WIDTH, WIDTH)}
    arrays = {"g": np.ones(WIDTH), "b": np.zeros(WIDTH)}
    arrays |= {name: generator.standard_normal(size) * 0.5 for name, size in sizes.items()}
    constants = ", ".join(constant(name, array) for name, array in arrays.items())
    return parse(f"""<ir_version: 10, opset_import: ["" : 20]>
    m (float[b, s, {WIDTH}] x, float[b, s, {WIDTH}] z) => (float[b, s, {WIDTH}] y) <{constants}>
    {{ [norm] n = LayerNormalization<axis = -1>(x, g, b)  [fc] p = MatMul(n, w)  a = Add(p, z)
       [out] q = MatMul(a, v)  y = Tanh(q) }}""")


def spiky_feeds() -> list[Feed]:
    """Every sample has a spike in one token: the activation's extremes follow it."""
    found: list[Feed] = []
    for index, feed in enumerate(feeds()):
        spike = np.zeros_like(feed["x"])
        spike[0, index, 2] = SPIKE
        found.append({**feed, "z": spike})
    return found


def learned_ranges(model: ir.Model) -> dict[str, tuple[float, float]]:
    """By the names of activations."""
    found = {layer.x.name or "": layer.x.meta.get(LEARNED_RANGE) for layer in graph.linear_layers(model)}
    return {name: ends for name, ends in found.items() if ends is not None}


def test_ranges_are_learned_only_where_they_are_asked_for() -> None:
    model = stack()
    result = BOTH.run(model, context_on(stack(), feeds()))
    assert not learned_ranges(model)
    assert not any("ranges" in event.figures for event in (*result.rewrites, *result.declined))


def test_every_activation_learns_a_range_once_and_the_event_counts_them() -> None:
    *scaled, event = check_pass(RANGES, stack(), feeds=feeds()).rewrites
    assert [entry.reason for entry in scaled] == ["scales learned"] * 2
    assert (event.where, event.reason, event.figures["ranges"]) == ("fc0", "ranges learned", 4)
    assert float(event.figures["end_to_end_loss"]) < float(event.figures["end_to_end_loss_before"])


def test_layers_left_in_float_have_no_range() -> None:
    model = stack()
    replace(RANGES, exclude=("out1",)).run(model, context_on(stack(), feeds()))
    assert list(learned_ranges(model)) == ["n0", "a0", "n1"]


def test_without_a_place_for_scales_ranges_are_learned_alone() -> None:
    (event,) = check_pass(replace(RANGES, norm=False), spiky(), feeds=spiky_feeds()).rewrites
    assert event.figures["ranges"] == 2


def test_ranges_that_are_no_better_than_the_extremes_are_not_left() -> None:
    model = spiky()
    result = replace(RANGES, norm=False, end_to_end_rate=1e3).run(model, context_on(spiky(), spiky_feeds()))
    (event,) = result.declined
    assert event.figures["ranges"] == 0 and not learned_ranges(model)


@pytest.mark.parametrize("bits", [8, 6])
def test_the_quantizers_take_the_learned_ranges_and_clipping_leaves_them(bits: int) -> None:
    context = context_on(spiky(), spiky_feeds())
    model = spiky()
    replace(RANGES, weight_bits=bits, activation_bits=bits).run(model, context)
    learned = learned_ranges(model)
    model = model.clone()
    for entry in (QuantizeWeights(), InsertQdq(bits)):
        entry.run(model, context)
    assert not ClipRanges(bits=bits).run(model, context).changed
    quantizers = graph.nodes(model, "QuantizeLinear")
    assert [source_of(node).name for node in quantizers] == list(learned) == ["n", "a"]
    for node in quantizers:
        grid = schemes.activation_grid(*learned[source_of(node).name or ""], bits)
        assert current_grid(node, bits) == schemes.Affine(float(np.float32(grid.scale)), grid.zero_point, bits)
    assert learned["a"][1] < 0.5 * SPIKE


def test_ranges_that_are_learned_do_not_follow_an_extreme() -> None:
    def errors(options: LearnScales) -> tuple[float, float]:
        context, model = context_on(spiky(), spiky_feeds()), spiky()
        figures = [event.figures for event in options.run(model, context).rewrites]
        for entry in (QuantizeWeights(), InsertQdq(4)):
            entry.run(model, context)
        quantized, wanted = Session(model, optimize=False), Session(spiky())
        error = sum(float(np.square(quantized.run(feed)["y"] - wanted.run(feed)["y"]).sum()) for feed in spiky_feeds())
        return error, next(float(found["end_to_end_loss"]) for found in figures if "end_to_end_loss" in found)

    (error, loss), (scales_error, scales_loss) = errors(RANGES), errors(replace(RANGES, ranges=False))
    assert loss < 0.3 * scales_loss
    assert error < 0.3 * scales_error


def test_learned_ranges_pass_merged_projections_and_mean_nothing_per_token(decoder_models: dict[str, ir.Model]) -> None:
    learning = {"steps": 0, "end_to_end_steps": 32, "objective": "float", "ranges": True}
    recipe = Recipe.model_validate({"learning": learning, "activations": {"bits": 4, "per_token": ["down_proj"]}})
    before, model = decoder_models["llama"], decoder_models["llama"].clone()
    generator = np.random.default_rng(0)
    samples: list[Feed] = [decoder_of(model).prompt_feed(generator.integers(5, 200, (1, 20))) for _ in range(4)]
    context = replace(context_on(before, samples), float_model=before)
    for entry in pipeline(recipe).transform:
        entry.run(model, context)
    learned = learned_ranges(model)
    for entry in pipeline(recipe).quantize:
        entry.run(model, context)
    static = [node for node in graph.nodes(model, "QuantizeLinear") if row_range(node) is None]
    per_token = [node for node in graph.nodes(model, "QuantizeLinear") if row_range(node) is not None]
    assert len(per_token) == 2 and len(static) == 7 and len(learned) == 9
    for node in static:
        grid = schemes.activation_grid(*learned[source_of(node).name or ""], 4)
        assert current_grid(node, 4).zero_point == grid.zero_point
        assert current_grid(node, 4).scale == pytest.approx(grid.scale, rel=1e-6)


@pytest.mark.parametrize("steps", [40, 57])
def test_an_interrupted_run_with_ranges_goes_on_to_the_same_result(tmp_path: Path, steps: int) -> None:
    def learned(options: LearnScales, context: Context) -> tuple[dict[str, Array], dict[str, tuple[float, float]]]:
        model = stack()
        options.run(model, context)
        return weights(model), learned_ranges(model)

    options = replace(RANGES, checkpoint=str(tmp_path / "state"))
    with pytest.raises(_StopError):
        learned(options, stopping_after(steps))
    with pytest.raises(CalibrationError, match="it is the state of another run"):
        learned_with(replace(options, ranges=False))
    resumed, whole = learned(options, context_on(stack(), feeds())), learned(RANGES, context_on(stack(), feeds()))
    assert_equal(resumed[0], whole[0])
    assert resumed[1] == whole[1] and len(whole[1]) == 4


def minimize(loss: Callable[[int], torch.Tensor], start: torch.Tensor, schedule: Schedule) -> tuple[str, int]:
    outcome = learn([start], loss, 4, schedule, title="t", progress=silent, checkpoint=Checkpoint(None, ""))
    assert outcome.after <= outcome.before
    return outcome.remark, outcome.steps


def test_a_rate_that_diverges_keeps_the_best() -> None:
    start = torch.tensor([3.0], requires_grad=True)
    remark, _ = minimize(lambda index: torch.exp(start**4).sum() - 1, start, Schedule(steps=40, rate=50.0))
    assert "the loss became infinite: the best before is kept" in remark
    assert start.item() == 3.0


def test_learning_stops_early_where_nothing_gets_better() -> None:
    start = torch.tensor([1.0], requires_grad=True)
    remark, steps = minimize(lambda index: (start - start.detach() + 1).abs().sum(), start, Schedule(steps=80))
    assert remark.startswith("stopped after 30 steps") and steps == 30


def test_samples_that_judge_are_never_learned_from() -> None:
    learned, judges = Schedule(held_out=0.25).split(16)
    assert len(judges) == 4 and not set(learned) & set(judges) and len(learned) == 12
    assert Schedule().split(1) == ([0], [0])


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_rates_fall_to_nothing(decay: str) -> None:
    schedule = Schedule(steps=10, decay="linear" if decay == "linear" else "cosine")
    assert (
        schedule.factor(0) == 1 and schedule.factor(5) == pytest.approx(0.5) and schedule.factor(10) == pytest.approx(0)
    )


def test_a_decoder_has_a_block_for_every_layer(decoder_models: dict[str, ir.Model]) -> None:
    for family, model in decoder_models.items():
        blocks = find_blocks(model)
        assert [sum(node.op_type == "Softmax" for node in block.nodes) for block in blocks] == [1, 1], family
        assert blocks[0].end is blocks[1].start


def test_an_encoder_has_a_block_for_every_layer(float_model: Path) -> None:
    model = read_onnx(float_model)
    for entry in NORMALIZE:
        entry.run(model, Context())
    assert [sum(node.op_type == "Softmax" for node in block.nodes) for block in find_blocks(model)] == [1, 1]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoder_learns_from_text_two_scales_a_layer_and_channel(
    decoder_models: dict[str, ir.Model], family: str
) -> None:
    model = decoder_models[family].clone()
    generator = np.random.default_rng(0)
    samples: list[Feed] = [decoder_of(model).prompt_feed(generator.integers(5, 200, (1, 20))) for _ in range(4)]
    options = LearnScales(steps=4, end_to_end_steps=4)
    result = options.run(model, context_on(model.clone(), samples))
    events = (*result.rewrites, *(event for event in result.declined if event.figures))
    assert sum(int(event.figures["scales"]) for event in events) == 2 * 2 * 64
    wanted, found = Session(decoder_models[family]), Session(model)
    for feed in samples:
        one, other = wanted.run(feed)["logits"], found.run(feed)["logits"]
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-4 * float(np.abs(one).max()))


def test_padding_counts_for_nothing(float_model: Path) -> None:
    model = read_onnx(float_model)
    for entry in NORMALIZE:
        entry.run(model, Context())
    generator = np.random.default_rng(2)
    ids = generator.integers(5, 200, (1, 12))

    def padded(filling: int) -> list[Feed]:
        whole = np.concatenate([ids, np.full((1, 6), filling)], axis=1)
        mask = (np.arange(18) < 12).astype(np.int64)[None]
        return [{"input_ids": whole, "attention_mask": mask, "token_type_ids": np.zeros_like(whole)}] * 2

    def scales(filling: int) -> list[Float]:
        learned = model.clone()
        LearnScales(steps=3, end_to_end_steps=0).run(learned, context_on(model, padded(filling)))
        return [layer.weights() for layer in graph.linear_layers(learned)]

    for one, other in zip(scales(7), scales(90), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_a_checkpoint_that_torch_cannot_write_is_one_sentence_and_leaves_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tmp_path, "digest")
    checkpoint.put("a", {"step": 1})

    def full(content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CalibrationError, match=r"learning\.pt: it cannot be written .* unexpected pos"):
        checkpoint.put("a", {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["learning.pt"]
    assert Checkpoint(tmp_path, "digest").get("a") == {"step": 1}
