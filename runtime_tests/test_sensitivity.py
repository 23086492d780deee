from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import graph, schemes, sensitivity, verify
from scalefold.compiler.errors import CalibrationError, SourceError
from scalefold.compiler.sensitivity import Outliers, Sensitivity, measure_sensitivity, plot
from scalefold.compiler.testing import parse

Cli = Callable[..., subprocess.CompletedProcess[str]]


def two_layers() -> ir.Model:
    """h = relu(x W1 + b), y = h W2, with one channel of x a hundred times the others."""
    rng = np.random.default_rng(0)
    model = parse("""<ir_version: 10, opset_import: ["" : 20]>
    model (float[b, t, 16] x, float[16, 32] first, float[32, 8] second, float[32] bias) => (float[b, t, 8] y)
    <float[16] gain = {100, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}>
    { g = Mul(x, gain)  p = MatMul(g, first)  a = Add(p, bias)  h = Relu(a)  y = MatMul(h, second) }""")
    for value in list(model.graph.inputs)[1:]:
        array = rng.standard_normal(graph.whole_shape(value)).astype(np.float32)
        if value.name == "first":
            array[0] = 0.01
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.register_initializer(value)
    for node, name in zip(graph.nodes(model, "MatMul"), ("fc1", "fc2"), strict=True):
        node.name = name
    return model


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    model = two_layers()
    ir.save(model, folder / "model.onnx")
    rng = np.random.default_rng(1)
    np.savez(folder / "feeds.npz", x=rng.standard_normal((160, 6, 16)).astype(np.float32))
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def found(model_file: Path) -> Sensitivity:
    return measure_sensitivity(model_file, bits=(8, 4), top=2, calibration=model_file.parent / "feeds.npz")


def test_the_layer_behind_the_outlier_comes_first_with_what_explains_it(found: Sensitivity) -> None:
    first, second = found.layers
    assert (first.name, first.shape) == ("fc1", (16, 32))
    assert first.spread > 20 > second.spread
    assert first.kurtosis > 10 > second.kurtosis
    assert first.largest > 100
    for index in range(2):
        assert first.errors[index].sqnr_db < second.errors[index].sqnr_db
        assert first.errors[index].input_sqnr_db < first.errors[index].weight_sqnr_db


def test_fewer_bits_lose_more(found: Sensitivity) -> None:
    assert found.whole[4] > found.whole[8] > 0
    for layer in found.layers:
        eight, four = layer.errors
        assert (eight.bits, four.bits) == (8, 4)
        assert four.sqnr_db < eight.sqnr_db
        assert four.alone is not None and eight.alone is not None and four.alone > eight.alone


def test_of_two_layers_one_alone_is_the_whole_without_the_other(found: Sensitivity) -> None:
    for index, bits in enumerate((8, 4)):
        for layer, other in (found.layers, reversed(found.layers)):
            gain, alone = layer.errors[index].gain, other.errors[index].alone
            assert gain is not None and alone is not None
            assert found.whole[bits] - gain == pytest.approx(alone, rel=1e-4, abs=1e-7)


def test_the_estimate_along_directions_is_near_the_error_itself() -> None:
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((64, 48)).astype(np.float32)
    weight = rng.standard_normal((48, 96)).astype(np.float32)
    projected, (rounded,) = sensitivity._probed(weight, [6], rng)
    grid = schemes.activation_grid(float(rows.min()), float(rows.max()), 6)
    steps = grid.round_trip(rows)
    estimate = 10 * np.log10(np.square(rows @ projected).sum() / np.square(steps @ rounded - rows @ projected).sum())
    exact = verify.sqnr(rows @ weight, steps @ schemes.weight_round_trip(weight, 6, 6))
    assert estimate == pytest.approx(exact, abs=0.7)


def test_a_massive_token_does_not_hide_what_the_others_lose() -> None:
    wanted = np.ones((10, 4), dtype=np.float32)
    wanted[0] = 1000
    got = np.zeros_like(wanted)
    got[0] = 1000
    assert verify.sqnr(wanted, got) > 50
    assert sensitivity.noise_by_token(wanted, got) == pytest.approx(9)


def test_outlier_statistics_do_not_depend_on_how_samples_are_cut() -> None:
    rng = np.random.default_rng(3)
    rows = (rng.standard_normal((500, 20)) * 2 + 1).astype(np.float32)
    rows[7, 4] = 90.0
    whole, pieces = Outliers(), Outliers()
    whole.update(rows)
    for piece in np.array_split(rows, 7):
        pieces.update(piece)
    centred = rows.astype(np.float64) - rows.mean(dtype=np.float64)
    assert whole.kurtosis == pytest.approx((centred**4).mean() / (centred**2).mean() ** 2)
    assert pieces.kurtosis == pytest.approx(whole.kurtosis)
    assert pieces.range == whole.range == (rows.min(), 90.0)
    assert pieces.spread == whole.spread > 8


def test_the_plot_has_a_bar_for_every_layer(found: Sensitivity) -> None:
    drawn = plot(found).svg()
    assert all(drawn.count(f"<title>{layer.name}: ") == 2 for layer in found.layers)


def test_a_bit_width_that_is_none_is_refused(model_file: Path) -> None:
    with pytest.raises(SourceError, match="bit widths are whole numbers from 2 to 8"):
        measure_sensitivity(model_file, bits=(9,))


def test_an_activation_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = two_layers()
    weight = model.graph.initializers["first"]
    assert weight.const_value is not None
    array = weight.const_value.numpy().copy()
    array[0, 0] = np.nan
    weight.const_value = ir.tensor(array, name="first")
    ir.save(model, tmp_path / "model.onnx")
    feeds = [{"x": np.ones((1, 6, 16), np.float32)}] * 2
    with pytest.raises(CalibrationError, match="becomes NaN or infinite"):
        measure_sensitivity(tmp_path / "model.onnx", bits=(8,), calibration=feeds)


def test_the_command_gives_a_table_json_and_a_plot(model_file: Path, tmp_path: Path, cli: Cli) -> None:
    feeds = model_file.parent / "feeds.npz"
    done = cli("sensitivity", model_file, "--calibration", feeds, "--bits", "8", "--plot", "s.svg", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    facts: dict[str, Any] = json.loads(done.stdout)
    assert [layer["name"] for layer in facts["layers"]] == ["fc1", "fc2"]
    assert (tmp_path / "s.svg").read_text(encoding="utf-8").startswith("<svg")
    done = cli("sensitivity", model_file, "--calibration", feeds, "--bits", "8", "--top", "1")
    assert "1 - cosine of y" in done.stdout
    assert "kurtosis" in done.stdout
    assert cli("sensitivity", model_file, "--bits", "eight").returncode != 0
