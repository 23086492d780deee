"""Tuning a compiled toy decoder: its gradients, its rounding, interruptions, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from scalefold.compiler import compile_model, load, saturation, serving
from scalefold.compiler.artifact import MODEL
from scalefold.compiler.errors import ScalefoldError
from scalefold.compiler.recipe import Recipe
from scalefold.compiler.runtime import Array, Session
from scalefold.compiler.standard_operators import give_weights, open_differentiable
from scalefold.compiler.testing import parse
from scalefold.compiler.torch_graph import TorchGraph, tensor_from
from scalefold.compiler.trainable_weights import TrainableWeight, binary_levels, look_up, round_entries
from scalefold.compiler.tunable_weights import Coding, Train, tunable_weights
from scalefold.compiler.tuning import Settings, tune
from scalefold.compiler.weight_formats import bit_signs

WORDS = 24
WIDTH = 32
FAST = Settings(epochs=2, lr=0.02, batch=4, held_out=0.25)


def toy_decoder(path: Path) -> None:
    """Logits of the next token from each token alone, and a cache that nothing reads."""
    generator = np.random.default_rng(0)
    table = generator.standard_normal((WORDS, WIDTH)).astype(np.float32)
    constants = {
        "table": table,
        "up": (0.3 * generator.standard_normal((WIDTH, 2 * WIDTH))).astype(np.float32),
        "down": (0.3 * generator.standard_normal((2 * WIDTH, WIDTH))).astype(np.float32),
        "head": (0.3 * generator.standard_normal((WIDTH, WORDS))).astype(np.float32),
        "axis": np.array([1]),
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["h"]),
        helper.make_node("MatMul", ["h", "up"], ["a"], name="layer.up"),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("MatMul", ["r", "down"], ["m"], name="layer.down"),
        helper.make_node("Add", ["h", "m"], ["s"]),
        helper.make_node("MatMul", ["s", "head"], ["logits"], name="head"),
        helper.make_node("Unsqueeze", ["h", "axis"], ["key"]),
        helper.make_node("Concat", ["past_key_values.0.key", "key"], ["present.0.key"], axis=2),
    ]
    ports: dict[str, tuple[int, list[str | int | None]]] = {
        "input_ids": (onnx.TensorProto.INT64, ["B", "S"]),
        "attention_mask": (onnx.TensorProto.INT64, ["B", "T"]),
        "past_key_values.0.key": (onnx.TensorProto.FLOAT, ["B", 1, "P", WIDTH]),
        "logits": (onnx.TensorProto.FLOAT, ["B", "S", WORDS]),
        "present.0.key": (onnx.TensorProto.FLOAT, ["B", 1, "T", WIDTH]),
    }
    values = [helper.make_tensor_value_info(name, *port) for name, port in ports.items()]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    made = helper.make_graph(nodes, "toy", values[:3], values[3:], tensors)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)


def save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def compiled_toy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The toy compiled with other weights or activations; each once."""
    folder = tmp_path_factory.mktemp("toy")
    toy_decoder(folder / "toy.onnx")
    save_tokenizer(folder)
    ids = np.random.default_rng(1).integers(0, WORDS, (8, 1, 12))
    past = np.zeros((1, 1, 0, WIDTH), dtype=np.float32)
    feeds = [{"input_ids": row, "attention_mask": np.ones_like(row), "past_key_values.0.key": past} for row in ids]
    made: dict[str, Path] = {}

    def compiled(target: str = "onnxruntime-cpu", granularity: str = "per-tensor", **weights: Any) -> Path:
        activations = {"bits": 8, "granularity": granularity}
        settings = {"name": "toy", "weights": {"format": "bcq", "bits": 2} | weights, "activations": activations}
        key = json.dumps([settings, target])
        if key not in made:
            recipe = Recipe.model_validate(settings | {"target": target, "embeddings": {"bits": 4, "group_size": 16}})
            made[key] = folder / f"compiled{len(made)}"
            compile_model(folder / "toy.onnx", made[key], recipe=recipe, calibration=feeds)
        return made[key]

    return compiled


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 samples: after a word comes the next one."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = []
    for start in range(16):
        words = [f"w{(start + step) % WORDS}" for step in range(4 + start % 3)]
        lines.append(json.dumps({"prompt": words[0], "target": " ".join(words[1:])}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("granularity", ["per-tensor", "per-token"])
@pytest.mark.parametrize("target", ["onnxruntime-cpu", "qdq"])
def test_the_differentiable_graph_is_the_one_that_ships(
    compiled_toy: Callable[..., Path], target: str, granularity: str
) -> None:
    path = compiled_toy(target, granularity, group_size=16) / MODEL
    model, weights = open_differentiable(path)
    floats = [torch.from_numpy(weight.integers() * weight.scale_array()) for weight in weights]
    given = give_weights(model, weights)
    ids = np.arange(24).reshape(2, 12) % WORDS
    feed: dict[str, Array] = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "past_key_values.0.key": np.zeros((2, 1, 0, WIDTH), dtype=np.float32),
    }
    values = {given[weight].name or "": array for weight, array in zip(weights, floats, strict=True)}
    part = TorchGraph(model, [value for value in model.graph.outputs if value.name == "logits"])
    got = part.run({name: tensor_from(array) for name, array in feed.items()} | values)["logits"]
    assert len(weights) == 3
    np.testing.assert_allclose(got.numpy(), Session(path).run(feed)["logits"], rtol=1e-4, atol=1e-4)


def test_attention_and_rotary_embedding_are_written_out(tmp_path: Path) -> None:
    model = parse("""
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[B, S, 8] x, float[B, 1, P, 4] past, float[9, 2] cos, float[9, 2] sin, int64[B, S] places,
                float[B, 1, S, T] mask)
            => (float[B, S, 8] logits) {
            turned = RotaryEmbedding<num_heads = 2>(x, cos, sin, places)
            four = Constant<value_ints = [4]>()
            zero = Constant<value_ints = [0]>()
            last = Constant<value_ints = [2]>()
            k = Slice(turned, zero, four, last)
            v = Slice(x, zero, four, last)
            logits, keys, values = Attention<q_num_heads = 2, kv_num_heads = 1>(turned, k, v, mask, past, past)
        }""")
    onnx.save(onnx.shape_inference.infer_shapes(_proto(model)), tmp_path / MODEL)
    plain, weights = open_differentiable(tmp_path / MODEL)
    shapes = {"x": (2, 5, 8), "past": (2, 1, 3, 4), "cos": (9, 2), "sin": (9, 2), "mask": (2, 1, 5, 8)}
    generator = np.random.default_rng(0)
    feed: dict[str, Array] = {
        name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    feed["places"] = np.tile(np.arange(3, 8), (2, 1))
    got = TorchGraph(plain, plain.graph.outputs).run({name: tensor_from(array) for name, array in feed.items()})
    assert not weights
    wanted = Session(tmp_path / MODEL).run(feed)["logits"]
    np.testing.assert_allclose(got["logits"].numpy(), wanted, rtol=1e-5, atol=1e-6)


def _proto(model: Any) -> onnx.ModelProto:
    import onnx_ir as ir

    proto = ir.to_proto(model)
    assert isinstance(proto, onnx.ModelProto)
    return proto


def test_the_gradient_of_an_alpha_is_the_formula_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    q, g, n, k, tokens = 3, 2, 5, 12, 7
    alphas = torch.rand(q, g, n, generator=generator, dtype=torch.float64).requires_grad_()
    codes = torch.randint(0, 2**q, (k, n), generator=generator, dtype=torch.uint8)
    x = torch.randn(tokens, k, generator=generator, dtype=torch.float64)
    out = x @ look_up(binary_levels(alphas), codes)
    dy = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    out.backward(dy)  # type: ignore[no-untyped-call]
    signs = torch.from_numpy(bit_signs(q)).double()[codes.long()]  # [K, N, q]
    # d alpha_i = sum_t dY[t] * (X B_i)[t], for each column and the rows of each group
    wanted = torch.stack(
        [
            torch.stack([(dy * (x[:, rows] @ signs[rows, :, i])).sum(0) for rows in torch.arange(k).reshape(g, -1)])
            for i in range(q)
        ]
    )
    assert alphas.grad is not None
    torch.testing.assert_close(alphas.grad, wanted)


@pytest.mark.parametrize("columns", [1, 4])
def test_the_gradient_of_a_centroid_is_the_sum_over_its_weights(columns: int) -> None:
    codes = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.uint8)
    table = torch.zeros(1, 2, columns, requires_grad=True)
    gradient = torch.arange(8.0).reshape(2, 4)
    look_up(table, codes).backward(gradient)  # type: ignore[no-untyped-call]
    found = torch.stack([torch.where(codes == code, gradient, 0.0).sum(0) for code in (0, 1)])
    assert table.grad is not None
    torch.testing.assert_close(table.grad[0], found if columns == 4 else found.sum(1, keepdim=True))


def test_untrained_alphas_give_the_same_integers_and_nothing_to_ship(compiled_toy: Callable[..., Path]) -> None:
    _, weights = open_differentiable(compiled_toy(group_size=16) / MODEL)
    for weight in weights:
        trainable = TrainableWeight(weight, "alphas", 8)
        np.testing.assert_allclose(
            trainable.value().detach().numpy(), weight.integers() * weight.scale_array(), rtol=1e-5, atol=1e-7
        )
        assert trainable.arrays() == {}


def test_rounded_entries_are_close_and_cannot_saturate() -> None:
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 8, (64, 16)).astype(np.uint8)
    coding = Coding(codes, "alphas", (3, 16), np.full((3, 1, 16), 20, dtype=np.int8), binary=True)
    entries = (generator.uniform(5, 90, (3, 1, 16))).astype(np.float32)
    rounded, steps = round_entries(entries, coding, 8)
    assert not saturation.saturating(coding.integers(rounded), 8).any()
    assert np.abs(rounded * steps - entries).max() <= 0.5 * steps.max() + 1e-3


@pytest.mark.parametrize(
    ("train", "weights", "trainable"),
    [
        ("alpha1", {}, 64 + 32 + 24),
        ("alphas", {"group_size": 16}, 2 * (2 * 64 + 4 * 32 + 2 * 24)),
        ("scales", {}, 64 + 32 + 24),
        ("codebooks", {"format": "kmeans", "codebook": "column"}, 4 * (64 + 32 + 24)),
        ("codebooks", {"format": "kmeans"}, 4 * 3),
    ],
)
def test_tuning_lowers_the_loss_and_ships_what_was_learned(
    compiled_toy: Callable[..., Path],
    rows: Path,
    tmp_path: Path,
    train: Train,
    weights: dict[str, Any],
    trainable: int,
) -> None:
    base = compiled_toy(**weights)
    before = serving.base_digest(base)
    report = tune(base, tmp_path / "adapter", rows, settings=replace(FAST, train=train))
    assert report.trainable == trainable
    assert report.loss < report.loss_before
    assert report.loss == pytest.approx(report.loss_learned, rel=0.05)
    assert serving.base_digest(base) == before == report.base
    names = {"adapter.json", "adapter.safetensors"} | ({"scales.onnx_adapter"} if train == "scales" else set())
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == names
    arrays = load_file(tmp_path / "adapter" / "adapter.safetensors")
    assert sum(array.nbytes for array in arrays.values()) == report.bytes


def test_per_token_sums_follow_their_weights(compiled_toy: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    base = compiled_toy(granularity="per-token", group_size=16)
    report = tune(base, tmp_path / "adapter", rows, settings=FAST)
    arrays = load_file(tmp_path / "adapter" / "adapter.safetensors")
    model, _ = open_differentiable(base / MODEL)
    sums = {entry.name for weight in tunable_weights(model) for entry in weight.sums}
    assert sums and sums <= set(arrays)
    assert report.loss == pytest.approx(report.loss_learned, rel=0.05)


def test_a_classifier_learns_its_labels(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    constants = {
        "table": generator.standard_normal((WORDS, WIDTH)).astype(np.float32),
        "pooler": (0.3 * generator.standard_normal((WIDTH, WIDTH))).astype(np.float32),
        "head": (0.3 * generator.standard_normal((WIDTH, 2))).astype(np.float32),
        "axis": np.array([1]),
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["h"]),
        helper.make_node("MatMul", ["h", "pooler"], ["p"], name="pooler"),
        helper.make_node("Relu", ["p"], ["r"]),
        helper.make_node("ReduceMean", ["r", "axis"], ["m"], keepdims=0),
        helper.make_node("MatMul", ["m", "head"], ["logits"], name="head"),
    ]
    ids = helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["B", "S"])
    logits = helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["B", 2])
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    made = helper.make_graph(nodes, "toy", [ids], [logits], tensors)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), tmp_path / "toy.onnx")
    save_tokenizer(tmp_path)
    recipe = Recipe.model_validate({"weights": {"format": "bcq", "bits": 2}, "activations": {"bits": 8}})
    feeds = [{"input_ids": row} for row in generator.integers(0, WORDS, (8, 1, 12))]
    compile_model(tmp_path / "toy.onnx", tmp_path / "base", recipe=recipe, calibration=feeds)
    lines = [{"text": f"w{index} w{(5 * index) % WORDS}", "label": int(index < 12)} for index in range(WORDS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    settings = replace(FAST, train="alphas", epochs=6)
    report = tune(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "rows.jsonl", task="classification", settings=settings
    )
    assert report.loss < report.loss_before
    lines[3]["label"] = 2
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with pytest.raises(ScalefoldError, match="line 4 has the label 2, which is outside the head's 2"):
        tune(tmp_path / "base", tmp_path / "other", tmp_path / "rows.jsonl", task="classification", settings=settings)


@contextmanager
def stop_at(step: int, title: str, total: int) -> Iterator[Callable[[], None]]:
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if done == step:
            raise KeyboardInterrupt

    yield advance


def test_a_run_that_is_stopped_at_any_step_goes_on_to_the_same_adapter(
    compiled_toy: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    base = compiled_toy()
    whole = tune(base, tmp_path / "whole", rows, settings=FAST)
    assert whole.steps == 6
    for step in range(1, whole.steps + 1):
        with pytest.raises(KeyboardInterrupt):
            tune(base, tmp_path / "parts", rows, settings=FAST, progress=lambda *bar, at=step: stop_at(at, *bar))
    tune(base, tmp_path / "parts", rows, settings=FAST)
    for name in ("adapter.safetensors", "adapter.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_diverging_rate_stops_keeps_the_best_and_says_so(
    compiled_toy: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    report = tune(compiled_toy(), tmp_path / "adapter", rows, settings=replace(FAST, epochs=40, lr=1e4))
    assert "diverged at step" in report.remark and "lower --lr" in report.remark
    assert report.steps < 120
    assert report.loss <= report.loss_before + 1e-6
    load(compiled_toy(), tmp_path / "adapter")


def test_bad_input_is_one_sentence(compiled_toy: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    base, out = compiled_toy(), tmp_path / "adapter"
    linear = compiled_toy(format="linear", bits=8)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    faults: dict[str, Callable[[], object]] = {
        "no binary-coded weights": lambda: tune(linear, out, rows),
        "no k-means weights": lambda: tune(base, out, rows, settings=Settings("codebooks")),
        "there is no model.onnx": lambda: tune(tmp_path, out, rows),
        "the folder holds other files": lambda: tune(base, tmp_path / "other", rows),
        "positive number": lambda: tune(base, out, rows, settings=Settings(lr=float("nan"))),
        "one row of logits": lambda: tune(base, out, rows, task="classification"),
    }
    for wanted, call in faults.items():
        with pytest.raises(ScalefoldError, match=wanted) as raised:
            call()
        assert "\n" not in str(raised.value)
    assert not out.exists()


def test_the_state_of_another_run_is_refused(compiled_toy: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(compiled_toy(), tmp_path, rows, settings=FAST, progress=lambda *bar: stop_at(1, *bar))
    with pytest.raises(ScalefoldError, match="the state of another run"):
        tune(compiled_toy(), tmp_path, rows, settings=replace(FAST, seed=3))


def logits_of(base: Path, adapter: Path | None) -> Array:
    ids = np.arange(WORDS).reshape(1, -1)
    feed = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "past_key_values.0.key": np.zeros((1, 1, 0, WIDTH), dtype=np.float32),
    }
    found: Array = load(base, adapter).run(["logits"], feed)[0]
    return found


def test_the_command_tunes_and_prints_json(
    compiled_toy: Callable[..., Path], rows: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    base = compiled_toy()
    done = cli(
        "tune", base, "--data", rows, "-o", "adapter", "--epochs", 2, "--lr", 0.02, "--train", "scales", "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["loss"] < report["loss_before"]
    assert not np.allclose(logits_of(base, tmp_path / "adapter"), logits_of(base, None))
    failed = cli("tune", base, "--data", rows, "-o", "b", "--train", "beta")
    assert failed.returncode == 2 and "choose from alpha1" in failed.stderr
