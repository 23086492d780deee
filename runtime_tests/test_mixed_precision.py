"""The recipe that is chosen by measurement: its targets, what it meets, and the file that says it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import CompileReport, block_timing, compile_model, graph, layer_choices, mixed_precision, verify
from scalefold.compiler.calibrate import collect
from scalefold.compiler.choice_solver import Option, Quantity
from scalefold.compiler.decoder import decoder_of
from scalefold.compiler.errors import RecipeError, SourceError
from scalefold.compiler.kernel_timing import Product
from scalefold.compiler.layer_choices import exactly
from scalefold.compiler.mixed_precision import Goal, read_goal
from scalefold.compiler.output_error import OutputError
from scalefold.compiler.protocol import Requests
from scalefold.compiler.recipe import Recipe, WeightFormat, WeightOverride, load_recipe
from scalefold.compiler.runtime import Feed, Session
from scalefold.compiler.stats import SecondMoment, Statistic, TokenRange
from scalefold.compiler.testing import parse

Cli = Callable[..., subprocess.CompletedProcess[str]]

TARGET = 0.003
"""Of 1 - cosine; between that of 8-bit weights with a range per token and that of 3-bit weights."""

BLOCK = "p{0} = MatMul(h{0}, up{0})  r{0} = Relu(p{0})  q{0} = MatMul(r{0}, down{0})  h{1} = Add(h{0}, q{0})"
TEXT = f"""<ir_version: 10, opset_import: ["" : 20]>
    model (float[b, t, 32] x, float[32, 64] up0, float[64, 32] down0, float[32, 64] up1, float[64, 32] down1,
           float[32, 32] out) => (float[b, t, 32] y)
    {{ h0 = Identity(x)  {BLOCK.format(0, 1)}  {BLOCK.format(1, 2)}  y = MatMul(h2, out) }}"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two residual blocks and an output layer, and samples in which the first token has one massive channel."""
    model = parse(TEXT)
    rng = np.random.default_rng(0)
    for value in list(model.graph.inputs)[1:]:
        shape = graph.whole_shape(value)
        array = (rng.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.register_initializer(value)
    for node in graph.nodes(model, "MatMul"):
        node.name = node.inputs[1].name if node.inputs[1] is not None else None
    folder = tmp_path_factory.mktemp("blocks")
    ir.save(model, folder / "model.onnx")
    np.savez(folder / "samples.npz", x=np.concatenate([feed["x"] for feed in made_up(96, seed=1)]))
    return folder / "model.onnx"


def made_up(count: int, seed: int) -> list[Feed]:
    x = np.random.default_rng(seed).standard_normal((count, 8, 32)).astype(np.float32)
    x[:, 0, 5] *= 60
    return [{"x": sample[None]} for sample in x]


def error_of(source: Path, report: CompileReport) -> float:
    """On samples that nothing has seen."""
    return OutputError(ir.load(source), made_up(32, seed=2)).mean(Session(folder_of(report) / "model.onnx"))


def made_up_seconds(products: Iterable[Product]) -> dict[Product, float]:
    """Times that follow from the shape: a range per token costs a tenth, blocks win at one row and lose at many."""
    factors = {"per-tensor": 1.0, "per-token": 1.1}
    return {
        entry: 1e-9
        * entry.rows
        * entry.k
        * entry.n
        * (factors[entry.kernel.activation] if entry.kernel.activation else 0.5 if entry.rows == 1 else 2.0)
        for entry in products
    }


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterable[None]:
    """Which kernel is faster is the machine's business, and no matter of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_choices, "kernel_seconds", made_up_seconds)
        patch.setattr(block_timing, "kernel_seconds", made_up_seconds)
        yield


@pytest.fixture(scope="module")
def by_error(source: Path, tmp_path_factory: pytest.TempPathFactory) -> CompileReport:
    """The blocks at the target."""
    return searched(source, tmp_path_factory.mktemp("auto") / "out", Goal("error", TARGET))


def searched(source: Path, output: Path, goal: Goal, **options: Any) -> CompileReport:
    samples = source.parent / "samples.npz"
    return compile_model(source, output, recipe="auto", goal=goal, calibration=samples, samples=64, **options)


def folder_of(report: CompileReport) -> Path:
    assert report.output is not None
    return report.output


def test_the_error_is_met_on_samples_that_nothing_has_seen(by_error: CompileReport, source: Path) -> None:
    found = by_error.search
    assert found is not None and found.held_out_error is not None
    assert found.measure == "1 - cosine of y"
    assert 2 * found.front[0].error < found.chosen.error <= TARGET
    assert found.held_out_error <= TARGET
    assert error_of(source, by_error) <= TARGET


def test_the_size_is_that_of_the_file_and_formats_are_mixed(by_error: CompileReport) -> None:
    found = by_error.search
    assert found is not None
    # Another range in a constant may be written with another number of digits, and names say what is clipped.
    assert abs(by_error.bytes - found.chosen.bytes) < 0.01 * by_error.bytes
    assert sum(found.chosen.layers.values()) == len(by_error.layers) == by_error.integer_layers == 5
    assert len({choice.partition(",")[0] for choice in found.chosen.layers}) > 1


def test_the_front_trades_error_for_size_and_holds_the_choice(by_error: CompileReport) -> None:
    found = by_error.search
    assert found is not None
    assert found.chosen in found.front and found.chosen.measured
    assert 4 <= len(found.front) <= 9
    errors = [point.error for point in found.front]
    assert errors == sorted(errors)
    assert found.front[0].bytes > found.chosen.bytes >= found.front[-1].bytes


def test_the_recipe_file_compiles_to_the_same_bytes_without_a_search(
    by_error: CompileReport, source: Path, tmp_path: Path
) -> None:
    folder = folder_of(by_error)
    chosen = load_recipe(folder / "recipe.yaml")
    assert chosen.name == by_error.recipe == "w8a8-mixed"
    assert chosen.exceptions is None and chosen.migration == load_recipe("w8a8").migration
    samples = source.parent / "samples.npz"
    again = compile_model(source, tmp_path / "again", recipe=folder / "recipe.yaml", calibration=samples)
    assert again.search is None
    for name in ("model.onnx", "model.onnx.data", "scalefold.json"):
        assert (folder_of(again) / name).read_bytes() == (folder / name).read_bytes()


def test_each_layer_has_what_was_chosen_for_it(by_error: CompileReport) -> None:
    chosen = load_recipe(folder_of(by_error) / "recipe.yaml")
    found = by_error.search
    assert chosen.activations is not None and found is not None
    kernels = {entry.name: entry for entry in verify.layer_kernels(folder_of(by_error) / "model.onnx")}
    per_token = {name for name, entry in kernels.items() if entry.activation == "per-token"}
    assert {exactly(name) for name in per_token} == set(chosen.activations.per_token)
    counted = dict.fromkeys(found.chosen.layers, 0)
    for name, entry in kernels.items():
        counted[f"{chosen.weights.of(name)}, {entry.activation}"] += 1
    assert counted == found.chosen.layers


def test_at_a_size_the_error_is_smaller_than_that_of_one_format_for_all(source: Path, tmp_path: Path) -> None:
    base = load_recipe("w8a8")
    six = base.model_copy(update={"weights": base.weights.model_copy(update={"bits": 6})})
    samples = source.parent / "samples.npz"
    uniform = compile_model(source, tmp_path / "six", recipe=six, calibration=samples, samples=64)
    mixed = searched(source, tmp_path / "mixed", Goal("bytes", uniform.bytes))
    assert mixed.bytes <= uniform.bytes
    assert mixed.search is not None and mixed.search.chosen.bytes <= uniform.bytes
    assert error_of(source, mixed) < 0.9 * error_of(source, uniform)


def test_at_a_latency_some_layers_are_per_token(source: Path, tmp_path: Path) -> None:
    operations = 4 * 32 * 64 + 32 * 32
    goal = Goal("seconds", 1.06 * 1e-9 * operations * 8)
    found = searched(source, tmp_path / "out", goal, rows=[8]).search
    assert found is not None and found.rows == (8,)
    assert 1e-9 * operations * 8 < found.chosen.seconds <= goal.most
    assert {choice.split(", ")[1] for choice in found.chosen.layers} == {"per-token", "per-tensor"}


def test_blocks_are_offered_where_the_profile_takes_them(source: Path, tmp_path: Path) -> None:
    operations = 4 * 32 * 64 + 32 * 32
    goal = Goal("seconds", 0.6 * 1e-9 * operations)
    with pytest.raises(SourceError, match=r"the linear layers take \S+ ms with the fastest formats offered .* 1 rows"):
        searched(source, tmp_path / "out", goal, rows=[1])
    report = searched(source, tmp_path / "out", goal, rows=[1], profile="decode")
    assert report.search is not None
    assert any("in blocks" in choice for choice in report.search.chosen.layers)
    assert "MatMulNBits" in {layer.kernel for layer in report.layers}


def test_a_size_with_room_for_the_least_error_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [[Option(0.1, 100, 1), Option(0.5, 50, 1), Option(0.9, 20, 1)]] * 3
    trials = object.__new__(mixed_precision._Trials)
    trials._items, trials._sizes, trials._known, trials._fixed = items, {}, {}, None

    def size(picked: Sequence[int]) -> int:
        trials._sizes[tuple(picked)] = found = 1000 + sum(int(items[0][index].bytes) for index in picked)
        return found

    monkeypatch.setattr(trials, "_size", size)
    monkeypatch.setattr(trials, "_measured", lambda picked, advance: None)
    for most, picked in ((9000, [0, 0, 0]), (1300, [0, 0, 0]), (1250, [0, 0, 1]), (1060, [2, 2, 2])):
        trials._sizes.clear()
        trials._fixed = None
        assert sorted(trials.meet_size(most, lambda: None)) == picked


def test_what_nothing_reaches_is_one_sentence_with_the_best(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"reaches an error of 1e-09; the best one has [\d.e-]+") as raised:
        searched(source, tmp_path / "out", Goal("error", 1e-9))
    best = re.search(r"the best one has (\S+)", str(raised.value))
    assert best is not None and 1e-9 < float(best[1]) < TARGET
    with pytest.raises(SourceError, match=r"no mix of the formats offered is smaller than 0\.\d+ MB"):
        searched(source, tmp_path / "out", Goal("bytes", 1000))
    assert list(tmp_path.iterdir()) == []


def test_a_decoder_with_a_tied_table_is_met_in_nats(decoder_folders: dict[str, Path], tmp_path: Path) -> None:
    model = decoder_folders["llama"] / "model.onnx"
    decoder = decoder_of(ir.load(model))
    generator = np.random.default_rng(4)
    feeds = [decoder.prompt_feed(generator.integers(0, 200, (1, 32))) for _ in range(48)]
    goal = Goal("error", 1e-4)
    report = compile_model(model, tmp_path / "out", recipe="auto", goal=goal, calibration=feeds, samples=64)
    found = report.search
    assert found is not None and found.held_out_error is not None
    assert found.measure == "divergence of the logits in nats"
    assert found.held_out_error <= 1e-4
    chosen = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert chosen.weights.of("lm_head") == WeightFormat(), "a table that is looked up too keeps its format"
    assert len({chosen.weights.of(layer.name).bits for layer in report.layers}) > 1


@pytest.mark.parametrize(
    ("quantity", "text", "value"),
    [
        ("error", "0.02", 0.02), ("error", "1e-3", 1e-3), ("error", ".5", 0.5),
        ("bytes", "20MB", 20e6), ("bytes", "1.5 GiB", 1.5 * 2**30), ("bytes", "300", 300), ("bytes", "7kb", 7000),
        ("seconds", "5ms", 5e-3), ("seconds", "250 us", 250e-6), ("seconds", "1s", 1),
    ],
)  # fmt: skip
def test_targets_are_numbers_with_their_unit(quantity: Quantity, text: str, value: float) -> None:
    found = read_goal({quantity: text})
    assert found.quantity == quantity and found.most == pytest.approx(value)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({}, "there is none, and recipe auto chooses by one"),
        ({"error": "1", "bytes": "2MB"}, "--target-error and --target-size are given"),
        ({"error": "-1"}, "--target-error: '-1' is not a positive number;"),
        ({"error": "0"}, "'0' is not a positive number;"),
        ({"error": "2MB"}, "'2MB' is not a positive number;"),
        ({"error": "nan"}, "'nan' is not"),
        ({"bytes": "-20MB"}, "'-20MB' is not a positive number with the unit kB or MB or GB"),
        ({"bytes": "20ms"}, "'20ms' is not a positive number with the unit kB"),
        ({"bytes": "MB"}, "'MB' is not"),
        ({"seconds": "5"}, "'5' is not a positive number with the unit us or ms or s"),
        ({"seconds": "0ms"}, "'0ms' is not"),
    ],
)
def test_a_target_that_is_none_is_one_sentence(texts: dict[Quantity, str | None], said: str) -> None:
    with pytest.raises(SourceError, match=re.escape(said)):
        read_goal(texts)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--recipe", "auto"), "there is none, and recipe auto chooses by one"),
        (
            ("--recipe", "auto", "--target-error", "0.1", "--target-size", "1MB"),
            "are given, and recipe auto chooses by",
        ),
        (("--recipe", "auto", "--target-size", "-1MB"), "--target-size: '-1MB' is not a positive number"),
        (("--target-error", "0.1"), "a target is for --recipe auto"),
        (("--base", "w6a6"), "a base recipe is for --recipe auto"),
        (("--recipe", "auto", "--target-error", "0.1", "--dry-run"), "there is no dry run of it"),
        (("--recipe", "auto", "--target-error", "0.1", "--max-float-fraction", "0.1"), "leaves no layer in float"),
        (("--recipe", "auto", "--target-error", "0.1", "--base", "w9"), "no recipe of this name"),
    ],
)
def test_the_command_refuses_what_does_not_go_together(
    arguments: tuple[str, ...], said: str, tmp_path: Path, cli: Cli
) -> None:
    done = cli("compile", "model.onnx", "-o", "out", *arguments)
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_the_front_and_gives_it_as_json(source: Path, tmp_path: Path, cli: Cli) -> None:
    samples = source.parent / "samples.npz"
    arguments = ("--recipe", "auto", "--target-size", "1MB", "--calibration", samples, "--samples", "64", "--rows", "1")
    done = cli("compile", source, "-o", "out", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 - cosine of y against size and time" in done.stdout
    assert re.search(r"[\d.e-]+, chosen\W+0\.\d+\W+[\d.e-]+\W+\d+ x ", done.stdout)
    assert re.search(r"model on samples held out: [\d.e-]+", done.stdout)
    assert f"the choices are in {tmp_path / 'out' / 'recipe.yaml'}" in done.stdout
    facts = json.loads(cli("compile", source, "-o", "out", *arguments, "--json").stdout)
    found = facts["search"]
    assert found["goal"] == {"quantity": "bytes", "most": 1e6}
    assert found["chosen"] in found["front"]
    assert sum(found["chosen"]["layers"].values()) == 5
    assert "search" not in json.loads((tmp_path / "out" / "scalefold.json").read_text(encoding="utf-8"))


def test_a_base_without_activations_is_refused(source: Path, tmp_path: Path) -> None:
    base = Recipe(activations=None)
    with pytest.raises(RecipeError, match="activations are null"):
        searched(source, tmp_path / "out", Goal("error", 0.1), base=base)


def test_moments_are_measured_once_for_all_formats_and_filled_in_for_the_next(source: Path, tmp_path: Path) -> None:
    model = ir.load(source)
    asked = []

    def measure(current: ir.Model, requests: Requests) -> dict[str, Statistic]:
        asked.append(sorted(requests))
        return collect(current, requests, made_up(3, seed=5))

    moments = layer_choices._Moments(measure, tmp_path)
    shared = SecondMoment()
    first = moments(model, {"h0": SecondMoment, "h1": lambda: shared, "h2": lambda: shared, "r0": TokenRange})
    assert asked == [["h0", "h1", "h2", "r0"]]
    again = SecondMoment()
    second = moments(model, {"h0": SecondMoment, "h1": lambda: again, "h2": lambda: again})
    assert len(asked) == 1
    for name in ("h0", "h1"):
        one, other = first[name], second[name]
        assert isinstance(one, SecondMoment) and isinstance(other, SecondMoment)
        assert one.mean is not None and other.mean is not None
        np.testing.assert_array_equal(one.mean, other.mean)
    moments(model, {"h0": lambda: SecondMoment(diagonal=True), "r0": TokenRange})
    moments(model, {"h1": SecondMoment})
    assert asked[1:] == [["h0", "r0"], ["h1"]]


def test_an_override_says_what_differs_and_gives_the_format_back() -> None:
    bases = (WeightFormat(), WeightFormat(bits=4, group_size=32, compensation=True), WeightFormat(bits=6, solver="rtn"))
    for base in bases:
        for wanted in (*layer_choices.CANDIDATES, layer_choices.IN_BLOCKS, WeightFormat()):
            assert mixed_precision._override(base, wanted).apply(base) == wanted
    assert mixed_precision._override(WeightFormat(), WeightFormat(bits=6)) == WeightOverride(format="linear", bits=6)
