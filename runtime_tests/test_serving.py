"""Adapters in onnxruntime: per session and per request, each equal to a model of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from scalefold.compiler import AdapterSession, compile_model, load, serving, verify, write_overridable
from scalefold.compiler.artifact import MODEL, save_model
from scalefold.compiler.errors import OutputError, ScalefoldError
from scalefold.compiler.intake import read_onnx
from scalefold.compiler.recipe import Recipe
from scalefold.compiler.runtime import Array
from scalefold.compiler.tunable_weights import tunable_weights

WIDTH = 128


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two linear layers, binary-coded with 3 bits."""
    folder = tmp_path_factory.mktemp("serving")
    generator = np.random.default_rng(0)
    tensors = [
        numpy_helper.from_array((0.1 * generator.standard_normal((WIDTH, WIDTH))).astype(np.float32), name)
        for name in ("up", "down")
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["a"], name="up"),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("MatMul", ["r", "down"], ["y"], name="down"),
    ]
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["B", "S", WIDTH]) for name in ("x", "y")]
    made = helper.make_graph(nodes, "two", values[:1], values[1:], tensors)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), folder / "two.onnx")
    recipe = Recipe.model_validate({"weights": {"format": "bcq", "bits": 3}, "activations": {"bits": 8}})
    feeds = [{"x": sample} for sample in generator.standard_normal((4, 1, 16, WIDTH)).astype(np.float32)]
    compile_model(folder / "two.onnx", folder / "base", recipe=recipe, calibration=feeds)
    return folder / "base"


X = np.random.default_rng(5).standard_normal((2, 9, WIDTH)).astype(np.float32)


def new_values(base: Path, seed: int, *, scales_only: bool) -> dict[str, Array]:
    """Other scales, and other alphas within int8 unless scales alone are wanted."""
    generator = np.random.default_rng(seed)
    found: dict[str, Array] = {}
    for weight in tunable_weights(read_onnx(base / MODEL)):
        scales = weight.scale_array()
        found[weight.scales.name or ""] = (scales * generator.uniform(0.5, 1.5, scales.shape)).astype(np.float32)
        assert weight.coding is not None
        if not scales_only:
            changed = (weight.coding.entries * generator.uniform(0.5, 1.0, weight.coding.entries.shape)).astype(np.int8)
            found[weight.coding.constant] = weight.coding.stored(changed)
    return found


def written(folder: Path, base: Path, arrays: Mapping[str, Array], *, scales_only: bool) -> Path:
    folder.mkdir()
    serving.write_adapter(folder, arrays, {"base": serving.base_digest(base)}, scales_only=scales_only)
    return folder


def own_model(base: Path, folder: Path, arrays: Mapping[str, Array]) -> Array:
    """What a file gives that has the values written into it."""
    model = read_onnx(base / MODEL)
    for name, array in arrays.items():
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    folder.mkdir()
    save_model(model, folder)
    session = onnxruntime.InferenceSession(folder / MODEL, providers=["CPUExecutionProvider"])
    found: Array = session.run(["y"], {"x": X})[0]
    return found


def test_a_session_with_an_adapter_equals_a_model_of_its_own(base: Path, tmp_path: Path) -> None:
    arrays = new_values(base, 1, scales_only=False)
    adapter = written(tmp_path / "adapter", base, arrays, scales_only=False)
    got = load(base, adapter).run(["y"], {"x": X})[0]
    np.testing.assert_array_equal(got, own_model(base, tmp_path / "own", arrays))
    assert not np.allclose(got, load(base).run(["y"], {"x": X})[0], atol=1e-3)


def test_two_adapters_take_turns_in_one_session(base: Path, tmp_path: Path) -> None:
    session = AdapterSession(base)
    wanted: dict[str | None, Array] = {None: load(base).run(["y"], {"x": X})[0]}
    for seed, name in enumerate(("first", "second")):
        arrays = new_values(base, seed, scales_only=True)
        session.add(name, written(tmp_path / name, base, arrays, scales_only=True))
        wanted[name] = own_model(base, tmp_path / f"{name}-own", arrays)
    for turn in ("first", "second", None, "first", None, "second"):
        np.testing.assert_allclose(session.run(["y"], {"x": X}, turn)[0], wanted[turn], rtol=0, atol=1e-5)
    assert not np.allclose(wanted["first"], wanted["second"], atol=1e-3)
    with pytest.raises(ScalefoldError, match="no adapter of that name"):
        session.run(None, {"x": X}, "third")


def test_overridable_scales_keep_every_kernel(base: Path) -> None:
    kernels = verify.layer_kernels(write_overridable(base))
    assert [entry.kernel for entry in kernels] == ["MatMulIntegerToFloat"] * 2
    assert all(entry.integer for entry in kernels)
    plain, inputs = load(base), AdapterSession(base).session
    np.testing.assert_array_equal(inputs.run(["y"], {"x": X})[0], plain.run(["y"], {"x": X})[0])
    assert [entry.name for entry in inputs.get_inputs()] == ["x"]


def test_an_adapter_without_a_change_gives_the_base(base: Path, tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", base, {}, scales_only=True)
    session = AdapterSession(base)
    session.add("same", adapter)
    wanted = load(base).run(["y"], {"x": X})[0]
    np.testing.assert_array_equal(session.run(["y"], {"x": X}, "same")[0], wanted)
    np.testing.assert_array_equal(load(base, adapter).run(["y"], {"x": X})[0], wanted)


def test_what_does_not_fit_is_refused(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    serving.write_adapter(other, {}, {"base": "0" * 64}, scales_only=True)
    alphas = written(tmp_path / "alphas", base, new_values(base, 1, scales_only=False), scales_only=False)
    strange = written(tmp_path / "strange", base, {"z": np.zeros(3, np.float32)}, scales_only=True)
    faults: dict[str, Callable[[], object]] = {
        "tuned on another model": lambda: load(base, other),
        "it was tuned on another model": lambda: AdapterSession(base).add("a", other),
        "no constant z": lambda: load(base, strange),
        "which onnxruntime folds": lambda: AdapterSession(base).add("a", alphas),
        "no readable adapter": lambda: load(base, tmp_path),
        "there is no model.onnx": lambda: load(tmp_path),
    }
    for wanted, call in faults.items():
        with pytest.raises(ScalefoldError, match=wanted) as raised:
            call()
        assert "\n" not in str(raised.value)


def test_a_damaged_adapter_leaves_the_one_of_its_name(base: Path, tmp_path: Path) -> None:
    arrays = new_values(base, 1, scales_only=True)
    adapter = written(tmp_path / "adapter", base, arrays, scales_only=True)
    session = AdapterSession(base)
    session.add("a", adapter)
    before = session.run(["y"], {"x": X}, "a")[0]
    damaged = written(tmp_path / "damaged", base, arrays, scales_only=True) / serving.SCALES
    damaged.write_bytes(damaged.read_bytes()[:40])  # a file of its own: onnxruntime maps the one that it has open
    with pytest.raises(OutputError, match=f"there is no readable {serving.SCALES} in it"):
        session.add("a", damaged.parent)
    np.testing.assert_array_equal(session.run(["y"], {"x": X}, "a")[0], before)


def test_an_adapter_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("No space left on device")  # as safetensors and onnxruntime say it, by classes of their own

    monkeypatch.setattr(serving, "_write_arrays", full)
    with pytest.raises(OutputError, match=r"it cannot be written .No space left on device.; free some space"):
        serving.write_adapter(tmp_path, {}, {}, scales_only=True)


def test_a_base_without_scales_is_refused(tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in ("x", "y")]
    made = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", values[:1], values[1:])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), tmp_path / MODEL)
    with pytest.raises(ScalefoldError, match="no scales to tune"):
        AdapterSession(tmp_path)
