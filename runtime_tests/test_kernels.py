"""The operators of the kernel library against numpy, on the fast path and on the plain one, which must agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from scalefold.compiler import kernel_library
from scalefold.compiler.coded_panels import coded_panels
from scalefold.compiler.kernel_library import ACTIVATIONS, packed_pairs, packed_panels, to_bfloat, unpacked_panels
from scalefold.compiler.testing import coded_weight

Array = np.ndarray[Any, Any]
Attributes = Mapping[str, int | float]

BFLOAT = 2.0**-8
"""The largest relative error of a rounding to bfloat16, whose numbers have 8 bits."""

EDGE = 1e-3
"""Of a step: how close to the middle between two codes a value may fall to either side."""

LOWEST = float(np.finfo(np.float32).min)
ROWS = (*range(1, 14), 100)
TYPES = {
    "f": TensorProto.FLOAT, "b": TensorProto.BFLOAT16,
    "u": TensorProto.UINT8, "i": TensorProto.INT8, "s": TensorProto.INT32, "l": TensorProto.INT64,
}  # fmt: skip
GIVEN = {
    "Linear": "uisffuffi", "LinearUint8": "uisffuffui", "LinearBfloat16": "uisffufi", "LinearNormUint8": "uisffufffffffui",
    "LayerNormUint8": "ffffffu", "AttentionUint8": "ffuf", "RowLinear": "fisfffufffi", "LookUp": "ifli",
    "FloatLinear": "fbffff", "CachedAttention": "ffffffff", "AddNorm": "ffff", "GatedSilu": "f",
}  # fmt: skip
"""The inputs of each operator, by type; bfloat16 is given as float."""
MADE = {
    "Linear": "f", "LinearUint8": "u", "LinearBfloat16": "b", "LinearNormUint8": "fu", "LayerNormUint8": "fu",
    "AttentionUint8": "u", "RowLinear": "f", "LookUp": "f", "FloatLinear": "f",
    "CachedAttention": "fff", "AddNorm": "ff", "GatedSilu": "f",
}  # fmt: skip
"""The outputs of each operator, by type."""


@pytest.fixture(scope="session", params=["fast", "plain"])
def kernels(request: pytest.FixtureRequest, built_kernels: Path, plain_kernels: Path) -> Path:
    """The library; on a CPU without AVX512-VNNI both take the plain path."""
    return built_kernels if request.param == "fast" else plain_kernels


@cache
def session(library: Path, operator: str, given: tuple[bool, ...], attributes: tuple[Any, ...], threads: int) -> Any:
    """One node; bfloat16 is cast on its way in and out, as numpy has no such numbers."""
    names = [f"x{index}" if there else "" for index, there in enumerate(given)]
    outputs = [f"y{index}" for index in range(len(MADE[operator]))]
    before, after = [], []
    narrow = {"AttentionUint8": 0, "FloatLinear": 1}.get(operator)
    read = list(names)
    if narrow is not None:
        before = [helper.make_node("Cast", [names[narrow]], ["narrow"], to=TensorProto.BFLOAT16)]
        read[narrow] = "narrow"
    made = ["wide"] if MADE[operator] == "b" else outputs
    node = helper.make_node(operator, read, made, domain="scalefold", **dict(attributes))
    if made != outputs:
        after = [helper.make_node("Cast", made, outputs, to=TensorProto.FLOAT)]
    types = GIVEN[operator]
    graph = helper.make_graph(
        [*before, node, *after],
        "one",
        [
            helper.make_tensor_value_info(n, TYPES[t.replace("b", "f")], None)
            for n, t in zip(names, types, strict=False)
            if n
        ],
        [
            helper.make_tensor_value_info(n, TYPES[t.replace("b", "f")], None)
            for n, t in zip(outputs, MADE[operator], strict=True)
        ],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("scalefold", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    kernel_library.register(options, library)
    message = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return onnxruntime.InferenceSession(message, options, providers=["CPUExecutionProvider"])


def run(
    library: Path, operator: str, inputs: Sequence[Array | None], threads: Any = 2, **attributes: Any
) -> list[Array]:
    opened = session(
        library, operator, tuple(entry is not None for entry in inputs), tuple(sorted(attributes.items())), threads
    )
    feed = {f"x{index}": entry for index, entry in enumerate(inputs) if entry is not None}
    found: list[Array] = opened.run(None, feed)
    return found


def floats(seed: int, *shape: int, spread: float = 1.0) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) * spread).astype(np.float32)


def one(value: float) -> Array:
    return np.array(value, dtype=np.float32)


def zero(value: int) -> Array:
    return np.array(value, dtype=np.uint8)


def activated(x: Array, kind: str) -> Array:
    """An activation function in float64."""
    if kind == "relu":
        x = np.maximum(x, 0)
    elif kind == "gelu":
        x = 0.5 * x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2)))
    elif kind == "gelu_tanh":
        x = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    elif kind == "silu":
        x = x / (1 + np.exp(-x))
    return x


def assert_codes(got: Array, wanted: Array, step: float, zero_point: int) -> None:
    """Codes of float64 values: another code only where the value lies in the middle between two."""
    exact = wanted / np.float64(np.float32(step))
    off = got.astype(int) - np.clip(np.rint(exact) + zero_point, 0, 255)
    assert np.abs(off).max(initial=0) <= 1
    to_edge = np.abs(np.abs(exact - np.trunc(exact)) - 0.5)
    assert np.all(to_edge[off != 0] < EDGE)


class Product:
    """A weight, what belongs to it, and codes to multiply by it."""

    def __init__(self, rows: Sequence[int], k: int, n: int, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.x = generator.integers(0, 256, (*rows, k)).astype(np.uint8)
        self.weight = generator.integers(-128, 128, (k, n)).astype(np.int8)
        self.scales = (generator.uniform(0.5, 1.5, n) / 73 / math.sqrt(k)).astype(np.float32)
        self.bias = floats(seed + 1, n)
        self.step, self.zero, self.n = one(0.0125), zero(117), n

    @property
    def constants(self) -> list[Array]:
        return [packed_panels(self.weight), self.weight.sum(axis=0, dtype=np.int32), self.scales]

    @property
    def inputs(self) -> list[Array | None]:
        return [self.x, *self.constants, self.step, self.zero, self.bias]

    def wanted(self) -> Any:
        """In float64, before any activation."""
        sums = (self.x.astype(np.int64) - int(self.zero)) @ self.weight.astype(np.int64)
        return sums * np.float64(self.step) * self.scales.astype(np.float64) + self.bias


def assert_close(got: Array, wanted: Array, tolerance: float = 3e-6) -> None:
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * max(1.0, np.abs(wanted).max(initial=0)))


def test_panels_hold_what_was_packed() -> None:
    for k, n in ((4, 1), (8, 64), (12, 65), (64, 200)):
        codes = np.random.default_rng(k).integers(-128, 128, (k, n)).astype(np.int8)
        panels = packed_panels(codes)
        assert panels.shape == (-(-n // 64), k // 4, 64, 4)
        np.testing.assert_array_equal(unpacked_panels(panels, n), codes)
        assert panels[0, k // 4 - 1, 0, 3] == codes[k - 1, 0]


@pytest.mark.parametrize("rows", ROWS)
def test_integer_sums_are_exact(kernels: Path, rows: int) -> None:
    for k, n in ((4, 1), (20, 63), (64, 64), (132, 65), (96, 300)):
        product = Product((rows,), k, n, seed=rows)
        product.scales[:], product.bias[:], product.step = 1, 0, one(1)
        product.x[0], product.weight[:, 0] = 255, -128  # the largest sums there are
        (got,) = run(kernels, "Linear", product.inputs, N=n)
        assert np.abs(product.wanted()).max() < 2**24
        np.testing.assert_array_equal(got, product.wanted())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_product_of_codes(kernels: Path, activation: str) -> None:
    number = ACTIVATIONS.index(activation)
    for rows, k, n in (((1,), 64, 100), ((2, 5), 100, 64), ((100,), 32, 130), ((3, 1, 2), 4, 17)):
        product = Product(rows, k, n)
        wanted, step, point = activated(product.wanted(), activation), 0.021, 40
        residual = floats(9, *rows, n)
        more: Attributes = {"N": n, "activation": number}
        (got,) = run(kernels, "Linear", product.inputs, **more)
        assert_close(got, wanted)
        (got,) = run(kernels, "Linear", [*product.inputs, residual], **more)
        assert_close(got, wanted + residual)
        (codes,) = run(kernels, "LinearUint8", [*product.inputs, one(step), zero(point)], **more)
        assert codes.dtype == np.uint8 and codes.shape == wanted.shape
        assert_codes(codes, wanted, step, point)
        (narrow,) = run(kernels, "LinearBfloat16", product.inputs, **more)
        assert np.all(np.abs(narrow - wanted) <= BFLOAT * np.abs(wanted) + 1e-5)


@pytest.mark.parametrize("rows", [1, 2, 6, 7, 48, 49, 100])
@pytest.mark.parametrize("kind", ["steps", "grouped steps", "values", "grouped values"])
def test_codes_give_the_same_as_the_weight_they_stand_for(kernels: Path, kind: str, rows: int) -> None:
    for n in (40, 64, 200):
        product, residual, point = Product((rows,), 192, n), floats(3, rows, n), zero(120)
        product.weight = coded_weight(kind, 192, n)
        product.x[0] = 255
        norm = [floats(4, n), floats(5, n), floats(6, n), floats(7, n), one(0.02), point]
        read = floats(8, rows, 192)
        for operator, given, rest, place in (
            ("Linear", product.inputs, [residual], 8),
            ("LinearUint8", product.inputs, [one(0.1), point], 9),
            ("LinearBfloat16", product.inputs, [], 7),
            ("LinearNormUint8", product.inputs, [residual, *norm], 14),
            ("RowLinear", [read, *product.constants, product.bias], [], 10),
        ):
            inputs = [*given, *rest, *[None] * (place - len(given) - len(rest))]
            wanted = run(kernels, operator, inputs[: len(given) + len(rest)], N=n)
            stored = coded_panels(product.weight)
            assert stored is not None
            inputs[1] = stored.codes
            got = run(kernels, operator, [*inputs, stored.levels], N=n)
            for a, b in zip(got, wanted, strict=True):
                np.testing.assert_array_equal(a, b, err_msg=operator)


@pytest.mark.parametrize("rows", [(1,), (7,), (12,), (18,), (19,), (2, 40), (100,), (333,)])
def test_a_product_its_residual_and_normalization(kernels: Path, rows: tuple[int, ...]) -> None:
    for k, n in ((32, 48), (64, 130)):
        product, residual = Product(rows, k, n), floats(3, *rows, n)
        gain, shift, multiply, add = (floats(10 + index, n) for index in range(4))
        step, point, epsilon = 0.03, 130, 1e-5
        constants = [gain, shift, multiply, add, one(step), zero(point)]
        got, codes = run(kernels, "LinearNormUint8", [*product.inputs, residual, *constants], N=n, epsilon=epsilon)
        check_norm(got, codes, product.wanted() + residual, constants, epsilon)


def check_norm(got: Array, codes: Array, x: Array, constants: Sequence[Array], epsilon: float) -> None:
    gain, shift, multiply, add, step, point = (entry.astype(np.float64) for entry in constants)
    wanted = normalized(x, epsilon) * gain + shift
    assert_close(got, wanted * multiply + add, 1e-5)
    assert_codes(codes, wanted, float(step), int(point))


def normalized(x: Array, epsilon: float, *, centred: bool = True) -> Array:
    x = x.astype(np.float64)
    d = x - x.mean(-1, keepdims=True) if centred else x
    result: Array = d / np.sqrt((d**2).mean(-1, keepdims=True) + epsilon)
    return result


def test_a_normalization_with_codes(kernels: Path) -> None:
    for rows, n in (((1,), 4), ((2, 5), 64), ((35,), 77), ((1, 3), 16)):
        x = floats(1, *rows, n, spread=3) + 2
        constants = [*(floats(20 + index, n) for index in range(4)), one(0.025), zero(128)]
        got, codes = run(kernels, "LayerNormUint8", [x, *constants], epsilon=1e-6)
        check_norm(got, codes, x, constants, 1e-6)


@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
def test_an_addition_and_its_normalization(kernels: Path, centred: bool) -> None:
    for rows, n in (((1,), 4), ((2, 9), 64), ((40,), 77)):
        a, b, gain, shift = floats(1, *rows, n), floats(2, *rows, n, spread=5), floats(3, n), floats(4, n)
        total, norm = run(kernels, "AddNorm", [a, b, gain, *([shift] if centred else [])], epsilon=1e-5)
        np.testing.assert_array_equal(total, a + b)
        assert_close(norm, normalized(a + b, 1e-5, centred=centred) * gain + (shift if centred else 0), 1e-5)


def test_a_gated_unit(kernels: Path) -> None:
    for rows, n in (((1,), 4), ((2, 9), 64), ((40,), 77)):
        x = floats(1, *rows, 2 * n, spread=4)
        (got,) = run(kernels, "GatedSilu", [x])
        assert_close(got, activated(x[..., :n].astype(np.float64), "silu") * x[..., n:])


@pytest.mark.parametrize("step", ["given", "by row"])
@pytest.mark.parametrize("before", ["nothing", "rms", "gated"])
def test_a_product_of_float_rows(kernels: Path, step: str, before: str) -> None:
    for rows, k, n in (((1,), 64, 100), ((2, 5), 100, 64), ((100,), 32, 130)):
        product = Product(rows, k, n)
        wide = 2 * k if before == "gated" else k
        x, gain, residual = floats(4, *rows, wide, spread=2) + 0.3, floats(5, k), floats(6, *rows, n)
        more: dict[str, float] = {"N": n, "epsilon": 1e-5, "gated": int(before == "gated"), "activation": 1}
        parameters = [product.step, product.zero] if step == "given" else [None, None]
        inputs = [x, *product.constants, product.bias, *parameters, gain if before == "rms" else None]
        while inputs[-1] is None:
            inputs.pop()
        (got,) = run(kernels, "RowLinear", inputs, **more)
        (added,) = run(kernels, "RowLinear", [*inputs, *[None] * (9 - len(inputs)), residual], **more)
        assert_close(added, got.astype(np.float64) + residual, 1e-6)
        read = x.astype(np.float64)
        if before == "rms":
            read = normalized(x, 1e-5, centred=False) * gain
        elif before == "gated":
            read = activated(read[..., :k], "silu") * read[..., k:]
        check_row_product(got, read, product, step == "given")


def check_row_product(got: Array, read: Array, product: Product, given: bool) -> None:
    """Against the codes of float64 rows; those on a rounding edge may be the next one, which bounds the difference."""
    low = np.zeros((*read.shape[:-1], 1)) if given else read.min(-1, keepdims=True)
    step = np.float64(product.step) if given else (read.max(-1, keepdims=True) - low) / 255
    exact = (read - low) / step + (int(product.zero) if given else 0)
    codes = np.clip(np.rint(exact), 0, 255)
    on_edge = np.abs(np.abs(exact - np.trunc(exact)) - 0.5) < EDGE
    assert on_edge.mean() < 0.02
    weight, scales = product.weight.astype(np.float64), product.scales.astype(np.float64)
    values = (codes - (int(product.zero) if given else 0)) * step + low
    wanted = np.maximum(values @ weight * scales + product.bias, 0)
    slack = (on_edge * step) @ np.abs(weight) * scales
    assert np.all(np.abs(got - wanted) <= slack + 2e-5 * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("before", ["nothing", "rms", "gated"])
def test_a_product_in_bfloat16(kernels: Path, before: str, activation: str) -> None:
    for rows, k, n in (((1,), 64, 100), ((2, 5), 98, 64), ((100,), 32, 130), ((13,), 2, 5)):
        wide = 2 * k if before == "gated" else k
        x, weight, bias, gain = floats(4, *rows, wide, spread=5), floats(5, k, n), floats(6, n), floats(7, k)
        more: dict[str, float] = {"N": n, "epsilon": 1e-5, "gated": int(before == "gated")}
        more["activation"] = ACTIVATIONS.index(activation)
        pairs, residual = packed_pairs(weight).astype(np.float32), floats(8, *rows, n)
        inputs = [x, pairs, bias, *([gain] if before == "rms" else [])]
        (got,) = run(kernels, "FloatLinear", inputs, **more)
        (added,) = run(kernels, "FloatLinear", [*inputs, *[None] * (5 - len(inputs)), residual], **more)
        np.testing.assert_array_equal(added, got + residual)
        read = x.astype(np.float64)
        if before == "rms":
            read = normalized(x, 1e-5, centred=False) * gain
        elif before == "gated":
            read = activated(read[..., :k], "silu") * read[..., k:]
        sums = to_bfloat(read.astype(np.float32)).astype(np.float64) @ to_bfloat(weight).astype(np.float64)
        size = np.abs(read) @ np.abs(weight)  # a float on the edge may be rounded to the other bfloat16
        slack = 1e-5 * size + (0 if before == "nothing" else BFLOAT * np.abs(read).max() * np.abs(weight).max())
        assert np.all(np.abs(got - activated(sums + bias, activation)) <= 1.2 * slack + 1e-5)


def test_pairs_hold_what_was_packed() -> None:
    weight = floats(1, 6, 70)
    pairs = packed_pairs(weight)
    assert pairs.shape == (2, 3, 64, 2)
    np.testing.assert_array_equal(pairs[1, 2, 5].astype(np.float32), to_bfloat(weight)[4:6, 69])
    assert not pairs[1, :, 6:].any()


def test_a_row_of_one_number_throughout(kernels: Path) -> None:
    product = Product((3,), 16, 20)
    x = np.repeat(np.array([[0.0], [-2.5], [7.0]], np.float32), 16, axis=1)
    (got,) = run(kernels, "RowLinear", [x, *product.constants, product.bias], N=20)
    assert_close(got, x.astype(np.float64) @ product.weight * product.scales + product.bias, 1e-5)


def test_values_far_beyond_the_codes_saturate(kernels: Path) -> None:
    product = Product((4,), 8, 70)
    for bias, code in ((1e9, 255), (-1e9, 0), (1e30, 255), (-1e30, 0)):
        product.bias[:] = bias
        (got,) = run(kernels, "LinearUint8", [*product.inputs, one(0.01), zero(7)], N=70)
        assert np.all(got == code), bias


def test_rows_of_a_table_are_looked_up(kernels: Path) -> None:
    table = np.random.default_rng(2).integers(-128, 128, (130, 20)).astype(np.int8)
    scales = np.random.default_rng(3).uniform(0.1, 1, 130).astype(np.float32)
    panels = packed_panels(table.T)
    for ids in (
        np.array([[0, 129, 64], [-1, -130, 63]]),
        np.array(5),
        np.zeros((2, 0), np.int64),
        np.arange(-130, 130),
    ):
        (got,) = run(kernels, "LookUp", [panels, scales, ids])
        np.testing.assert_array_equal(got, table[ids].astype(np.float32) * scales[ids][..., None])
    for ids in (np.array([130]), np.array([3, -131]), np.array([2**40])):
        with pytest.raises(Exception, match="an id is none of the 130 rows"):
            run(kernels, "LookUp", [panels, scales, ids])


@pytest.mark.parametrize("kind", ["steps", "grouped steps", "values", "grouped values"])
def test_rows_of_a_table_in_codes_are_looked_up(kernels: Path, kind: str) -> None:
    weight = coded_weight(kind, 128, 150)
    scales = np.random.default_rng(3).uniform(0.1, 1, 150).astype(np.float32)
    stored = coded_panels(weight)
    assert stored is not None
    ids = np.concatenate([np.arange(-150, 150), [5] * 20])
    (got,) = run(kernels, "LookUp", [stored.codes, scales, ids, stored.levels])
    np.testing.assert_array_equal(got, weight.T[ids].astype(np.float32) * scales[ids][:, None])


def attended(q: Array, k: Array, v: Array, scale: float, mask: Array | None) -> tuple[Array, Array, Array]:
    """Attention in float64: the result, the mean of |v| by its shares, and the largest |q| |k| of a row of scores.

    As onnxruntime's operator has it, a row whose every key is masked gives zero. All are [B, H, S, ...].
    """
    q, k, v = (entry.astype(np.float64) for entry in (q, k, v))
    scores = np.einsum("bhsd,bhtd->bhst", q, k) * scale
    if mask is not None:
        scores = np.maximum((scores + mask).astype(np.float32), np.float32(LOWEST)).astype(np.float64)
    largest = scores.max(-1, keepdims=True, initial=LOWEST)
    shares = np.exp(scores - largest) * (largest > LOWEST)
    shares /= np.maximum(shares.sum(-1, keepdims=True), 1e-300)
    size = np.einsum("bhsd,bhtd->bhst", np.abs(q), np.abs(k)).max(-1, keepdims=True, initial=0) * scale
    return shares @ v, shares @ np.abs(v), size


def masks(batch: int, heads: int, tokens: int, keys: int) -> list[Array | None]:
    """None, and one of every form that is broadcast: causal, padded, with rows that see nothing, and small numbers."""
    generator = np.random.default_rng(8)
    found: list[Array | None] = [None]
    for shape in ((1, 1, 1), (batch, 1, 1), (1, heads, 1), (1, 1, tokens), (batch, 1, tokens), (batch, heads, tokens)):
        mask = generator.standard_normal((*shape, keys)).astype(np.float32)
        mask[generator.random(mask.shape) < 0.3] = LOWEST
        mask[..., 0] = 0
        found.append(mask)
    causal = np.where(np.tri(tokens, keys, keys - tokens) > 0, 0, LOWEST).astype(np.float32)[None, None]
    nothing = causal.copy()
    nothing[:, :, : tokens // 2] = LOWEST
    infinite = np.where(nothing < 0, -np.inf, nothing).astype(np.float32)
    return [*found, causal, nothing, infinite]


def check_attention_uint8(kernels: Path, batch: int, heads: int, tokens: int, size: int, mask: Array | None) -> None:
    x, step, point = to_bfloat(floats(5, batch, tokens, 3 * heads * size)), 0.01, 120
    parts = x.reshape(batch, tokens, 3, heads, size).transpose(2, 0, 3, 1, 4)
    (codes,) = run(
        kernels, "AttentionUint8", [x, one(step), zero(point), *([] if mask is None else [mask])], heads=heads
    )
    assert codes.shape == (batch, tokens, heads * size)
    wanted, spread, _ = attended(parts[0], parts[1], parts[2], 1 / math.sqrt(size), mask)
    got = codes.reshape(batch, tokens, heads, size).transpose(0, 2, 1, 3).astype(np.float64)
    aim = np.clip(wanted / step + point, 0, 255)
    assert np.all(np.abs(got - aim) <= 0.5 + EDGE + 2 * BFLOAT * spread / step)


@pytest.mark.parametrize("size", [16, 32, 48, 64, 80, 128, 256])
def test_attention_with_codes(kernels: Path, size: int) -> None:
    for tokens in (1, 2, 7, 16, 33, 200):
        check_attention_uint8(kernels, 1, 2, tokens, size, None)


@pytest.mark.parametrize("form", range(10))
def test_attention_with_codes_and_a_mask(kernels: Path, form: int) -> None:
    for batch, heads, tokens in ((2, 3, 5), (3, 2, 37)):
        check_attention_uint8(kernels, batch, heads, tokens, 16, masks(batch, heads, tokens, tokens)[form])


class Cache:
    """New tokens behind a cache, H heads of which each H / G share keys and values, and perhaps angles."""

    def __init__(self, shape: tuple[int, int, int], heads: int, groups: int, size: int, *, rotated: bool) -> None:
        batch, tokens, past = shape
        self.heads, self.groups, self.size, self.shape = heads, groups, size, shape
        self.x = floats(11, batch, tokens, (heads + 2 * groups) * size)
        self.past = [to_bfloat(floats(12 + index, batch, groups, past, size)) for index in range(2)]
        angles = floats(14, batch, tokens, size // 2, spread=3)
        self.angles = [np.cos(angles), np.sin(angles)] if rotated else []

    def check(self, kernels: Path, mask: Array | None, scale: float | None = None) -> None:
        batch, tokens, past = self.shape
        mask = np.zeros((1, 1, 1, past + tokens), np.float32) if mask is None else mask
        more: dict[str, float] = {"heads": self.heads, "groups": self.groups, **({"scale": scale} if scale else {})}
        out, keys, values = run(kernels, "CachedAttention", [self.x, *self.past, mask, *self.angles], **more)
        counts = np.cumsum([self.heads, self.groups])
        q, k, v = np.split(self.x.reshape(batch, tokens, -1, self.size).transpose(0, 2, 1, 3), counts, axis=1)
        q, k = self.turned(q), self.turned(k)
        k, v = (np.concatenate([old, new], axis=2) for old, new in zip(self.past, (k, v), strict=True))
        np.testing.assert_array_equal(values, to_bfloat(v))
        assert np.all(np.abs(keys - k) <= BFLOAT * np.abs(k) + 1e-6)
        share = self.heads // self.groups
        factor = scale or 1 / math.sqrt(self.size)
        wanted, spread, size = attended(q, np.repeat(k, share, 1), np.repeat(v, share, 1), factor, mask)
        got = out.reshape(batch, tokens, self.heads, self.size).transpose(0, 2, 1, 3)
        # rounded queries and keys put scores off, both ways, as the rounding of shares does; values are rounded once
        bound = np.expm1(2 * 2 * BFLOAT * size) + 2 * BFLOAT + BFLOAT
        assert np.all(np.abs(got - wanted) <= bound * spread + 1e-5)
        assert np.abs(got - wanted).mean() <= 2 * BFLOAT * max(1e-3, spread.mean())

    def turned(self, x: Array) -> Array:
        if not self.angles:
            return x
        cosines, sines = (entry[:, None].astype(np.float64) for entry in self.angles)
        a, b = np.split(x.astype(np.float64), 2, axis=-1)
        return np.concatenate([a * cosines - b * sines, b * cosines + a * sines], axis=-1)


@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "as it is"])
@pytest.mark.parametrize("size", [16, 32, 48, 64, 80, 128, 256])
def test_attention_behind_a_cache(kernels: Path, size: int, rotated: bool) -> None:
    for tokens, past in ((1, 0), (1, 300), (2, 17), (7, 31), (8, 0), (9, 5), (50, 33)):
        causal = np.where(np.tri(tokens, past + tokens, past) > 0, 0, LOWEST).astype(np.float32)[None, None]
        Cache((1, tokens, past), 4, 2, size, rotated=rotated).check(kernels, causal)


@pytest.mark.parametrize("form", range(10))
def test_attention_behind_a_cache_and_its_mask(kernels: Path, form: int) -> None:
    for tokens in (1, 5, 11, 100):
        mask = masks(2, 4, tokens, tokens + 6)[form]
        Cache((2, tokens, 6), 4, 4, 16, rotated=True).check(kernels, mask)


@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "as it is"])
def test_what_stands_in_front_of_every_cache(kernels: Path, rotated: bool) -> None:
    for tokens, past, front in ((1, 0, 1), (1, 40, 1), (3, 17, 5), (9, 0, 2), (60, 33, 1)):
        cache = Cache((2, tokens, past), 4, 2, 32, rotated=rotated)
        rows = [to_bfloat(floats(30 + index, 1, 2, front, 32)) for index in range(2)]
        joined = [np.concatenate([np.repeat(f, 2, 0), p], 2) for f, p in zip(rows, cache.past, strict=True)]
        whole = front + past + tokens
        for mask in masks(2, 4, tokens, whole):
            mask = np.zeros((1, 1, 1, whole), np.float32) if mask is None else mask
            more = {"heads": 4, "groups": 2}
            angles: list[Array | None] = [*cache.angles] or [None, None]
            wanted = run(kernels, "CachedAttention", [cache.x, *joined, mask, *cache.angles], **more)
            got = run(kernels, "CachedAttention", [cache.x, *cache.past, mask, *angles, *rows], **more)
            np.testing.assert_array_equal(got[0], wanted[0])
            np.testing.assert_array_equal(got[1], wanted[1][:, :, front:])
            np.testing.assert_array_equal(got[2], wanted[2][:, :, front:])


def test_long_prompts_heads_that_share_and_scales(kernels: Path) -> None:
    causal = np.where(np.tri(700, 1000, 300) > 0, 0, LOWEST).astype(np.float32)[None, None]
    Cache((1, 700, 300), 3, 1, 16, rotated=True).check(kernels, causal)
    for tokens in (3, 20):
        for heads, groups in ((6, 2), (5, 1), (3, 3)):
            Cache((2, tokens, 9), heads, groups, 32, rotated=False).check(kernels, None, scale=0.3)


def test_nothing_to_do_gives_nothing(kernels: Path) -> None:
    product = Product((2, 0), 16, 20)
    codes, vector = [one(0.1), zero(3)], floats(1, 20)
    assert run(kernels, "Linear", product.inputs, N=20)[0].shape == (2, 0, 20)
    assert run(kernels, "Linear", [*product.inputs, np.zeros((2, 0, 20), np.float32)], N=20)[0].shape == (2, 0, 20)
    assert run(kernels, "LinearUint8", [*product.inputs, *codes], N=20)[0].shape == (2, 0, 20)
    assert run(kernels, "LinearBfloat16", product.inputs, N=20)[0].shape == (2, 0, 20)
    empty = np.zeros((2, 0, 20), np.float32)
    outputs = run(kernels, "LinearNormUint8", [*product.inputs, empty, *[vector] * 4, *codes], N=20)
    assert [entry.shape for entry in outputs] == [(2, 0, 20)] * 2
    assert run(kernels, "LayerNormUint8", [empty, *[vector] * 4, *codes])[1].shape == (2, 0, 20)
    assert run(kernels, "AddNorm", [empty, empty, vector])[1].shape == (2, 0, 20)
    assert run(kernels, "GatedSilu", [empty])[0].shape == (2, 0, 10)
    rows = np.zeros((2, 0, 16), np.float32)
    assert run(kernels, "RowLinear", [rows, *product.constants, product.bias], N=20)[0].shape == (2, 0, 20)
    qkv = np.zeros((2, 0, 96), np.float32)
    assert run(kernels, "AttentionUint8", [qkv, *codes], heads=2)[0].shape == (2, 0, 32)
    past, mask = floats(2, 2, 2, 5, 16), np.zeros((2, 1, 0, 5), np.float32)
    out, keys, values = run(kernels, "CachedAttention", [qkv, past, -past, mask], heads=2, groups=2)
    assert out.shape == (2, 0, 32)
    np.testing.assert_array_equal(
        keys, to_bfloat(past)
    )  # a prefix that was baked in is rounded on its first way through
    np.testing.assert_array_equal(values, to_bfloat(-past))


@pytest.mark.parametrize("threads", [1, 3])
def test_both_paths_agree(built_kernels: Path, plain_kernels: Path, threads: int) -> None:
    both = [partial(run, library, threads=threads) for library in (built_kernels, plain_kernels)]
    product, residual = Product((77,), 96, 150), floats(3, 77, 150)
    fast, plain = (each("Linear", [*product.inputs, residual], N=150)[0] for each in both)
    assert_close(fast, plain.astype(np.float64), 1e-6)
    for kind in range(len(ACTIVATIONS)):
        fast, plain = (
            each("LinearUint8", [*product.inputs, one(0.02), zero(99)], N=150, activation=kind)[0] for each in both
        )
        assert np.mean(fast != plain) < 0.002 and np.abs(fast.astype(int) - plain).max() <= 1
    fast, plain = (each("GatedSilu", [residual])[0] for each in both)
    assert_close(fast, plain.astype(np.float64), 1e-6)
    x, mask = to_bfloat(floats(5, 2, 60, 3 * 64)), masks(2, 4, 60, 60)[-1]
    fast, plain = (each("AttentionUint8", [x, one(0.02), zero(120), mask], heads=4)[0] for each in both)
    assert np.mean(fast != plain) < 0.05 and np.abs(fast.astype(int) - plain).max() <= 1
    for tokens in (4, 60):
        cached, causal = Cache((2, tokens, 6), 4, 2, 32, rotated=True), masks(2, 4, tokens, tokens + 6)[-2]
        inputs = [cached.x, *cached.past, causal, *cached.angles]
        fast, plain = (each("CachedAttention", inputs, heads=4, groups=2)[0] for each in both)
        assert np.abs(fast - plain).max() <= 2 * BFLOAT


def test_threads_change_nothing(kernels: Path) -> None:
    product = Product((200,), 64, 300)
    first, second = (run(kernels, "Linear", product.inputs, threads, N=300)[0] for threads in (1, 3))
    np.testing.assert_array_equal(first, second)
    inputs = [*product.inputs, floats(2, 200, 300), *(floats(index, 300) for index in range(4)), one(0.03), zero(128)]
    first, second = (run(kernels, "LinearNormUint8", inputs, threads, N=300)[1] for threads in (1, 3))
    np.testing.assert_array_equal(first, second)


def misfits() -> list[Any]:
    """An operator with inputs that do not fit, by what is wrong."""
    product, vector, codes = Product((3,), 16, 20), floats(1, 20), [one(0.1), zero(3)]
    given: list[Any] = product.inputs
    x, panels, sums, scales, step, point, bias = given
    rows, qkv, past = floats(2, 3, 16), floats(3, 1, 3, 96), floats(4, 1, 2, 5, 16)
    mask, heads = np.zeros((1, 1, 3, 8), np.float32), {"heads": 2, "groups": 2}
    angles = floats(5, 1, 3, 8)
    none = np.zeros(0, np.float32)
    pairs = packed_pairs(floats(9, 16, 20)).astype(np.float32)
    front, longer = floats(6, 1, 2, 1, 16), np.zeros((1, 1, 3, 9), np.float32)
    wide = Product((3,), 96, 70)
    wide.weight = coded_weight("grouped steps", 96, 70)
    stored = coded_panels(wide.weight)
    assert stored is not None

    def with_levels(panels: Array, levels: Array | None) -> list[Array | None]:
        return [wide.x, panels, *wide.inputs[2:], None, *([levels] if levels is not None else [])]

    found = {
        "short weight": ("Linear", [x, panels[:, :3], *product.inputs[2:]], {"N": 20}),
        "odd width": ("Linear", [x[:, :15], *product.inputs[1:]], {"N": 20}),
        "another N": ("Linear", product.inputs, {"N": 21}),
        "no N": ("Linear", product.inputs, {}),
        "negative N": ("Linear", product.inputs, {"N": -64}),
        "short sums": ("Linear", [x, panels, sums[:-1], scales, step, point, bias], {"N": 20}),
        "short scales": ("Linear", [x, panels, sums, scales[:-1], step, point, bias], {"N": 20}),
        "short bias": ("LinearBfloat16", [x, panels, sums, scales, step, point, bias[:-1]], {"N": 20}),
        "short residual": ("Linear", [*product.inputs, floats(1, 2, 20)], {"N": 20}),
        "a number for rows": ("Linear", [np.array(7, np.uint8), *product.inputs[1:]], {"N": 20}),
        "no step": ("Linear", [x, panels, sums, scales, none, point, bias], {"N": 20}),
        "no zero point": ("LinearUint8", [*product.inputs, step, np.zeros(0, np.uint8)], {"N": 20}),
        "short gain": (
            "LinearNormUint8",
            [*product.inputs, floats(1, 3, 20), vector[1:], *[vector] * 3, *codes],
            {"N": 20},
        ),
        "residual of a norm": ("LinearNormUint8", [*product.inputs, vector, *[vector] * 4, *codes], {"N": 20}),
        "short add": ("LayerNormUint8", [floats(1, 3, 20), *[vector] * 3, vector[1:], *codes], {}),
        "norm of a number": ("LayerNormUint8", [one(1), *[floats(1, 1)] * 4, *codes], {}),
        "heads": ("AttentionUint8", [qkv, *codes], {"heads": 4}),
        "rank": ("AttentionUint8", [qkv[0], *codes], {"heads": 2}),
        "size": ("AttentionUint8", [floats(1, 1, 2, 3 * 272), *codes], {"heads": 1}),
        "short mask": ("AttentionUint8", [qkv, *codes, mask[..., :2]], {"heads": 2}),
        "mask's batch": ("AttentionUint8", [qkv, *codes, floats(1, 2, 1, 3, 3)], {"heads": 2}),
        "row of a mask": ("AttentionUint8", [qkv, *codes, floats(1, 3, 3)], {"heads": 2}),
        "short cache": ("CachedAttention", [qkv, past[:, :1], past[:, :1], mask], heads),
        "two caches": ("CachedAttention", [qkv, past, past[:, :, 1:], mask], heads),
        "mask of the new": ("CachedAttention", [qkv, past, past, mask[..., :3]], heads),
        "rows in front of a mask without them": (
            "CachedAttention",
            [qkv, past, past, mask, None, None, front, front],
            heads,
        ),
        "keys in front alone": ("CachedAttention", [qkv, past, past, longer, None, None, front], heads),
        "values in front alone": ("CachedAttention", [qkv, past, past, longer, None, None, None, front], heads),
        "rows in front of two sequences": (
            "CachedAttention",
            [qkv, past, past, longer, None, None, np.repeat(front, 2, 0), np.repeat(front, 2, 0)],
            heads,
        ),
        "one angle": ("CachedAttention", [qkv, past, past, mask, angles], heads),
        "short angles": ("CachedAttention", [qkv, past, past, mask, angles[:, 1:], angles[:, 1:]], heads),
        "heads that do not share": (
            "CachedAttention",
            [floats(1, 1, 3, 112), past, past, mask],
            {"heads": 3, "groups": 2},
        ),
        "two sizes": ("AddNorm", [rows, rows[1:], floats(1, 16)], {}),
        "gain": ("AddNorm", [rows, rows, floats(1, 15)], {}),
        "levels of too few panels": ("Linear", with_levels(stored.codes, stored.levels[:1]), {"N": 70}),
        "groups that do not divide": (
            "Linear",
            with_levels(stored.codes, np.repeat(stored.levels, 4, axis=1)),
            {"N": 70},
        ),
        "no levels": ("Linear", with_levels(stored.codes, stored.levels[:0]), {"N": 70}),
        "codes of too few rows": ("Linear", with_levels(stored.codes[:, :2], stored.levels), {"N": 70}),
        "codes without levels": ("Linear", with_levels(stored.codes, None), {"N": 70}),
        "a weight with levels": ("Linear", with_levels(packed_panels(wide.weight), stored.levels), {"N": 70}),
        "three halves": ("GatedSilu", [rows[:, :15]], {}),
        "row product": ("RowLinear", [rows[:, :12], *product.constants, bias], {"N": 20}),
        "gated of an odd width": ("RowLinear", [floats(1, 3, 33), *product.constants, bias], {"N": 20, "gated": 1}),
        "a step and no zero point": ("RowLinear", [rows, *product.constants, bias, step], {"N": 20}),
        "a zero point and no step": ("RowLinear", [rows, *product.constants, bias, None, point], {"N": 20}),
        "gain of rows": ("RowLinear", [rows, *product.constants, bias, step, point, vector], {"N": 20}),
        "residual of rows": ("RowLinear", [rows, *product.constants, bias, None, None, None, None, vector], {"N": 20}),
        "pairs of too few rows": ("FloatLinear", [rows[:, :14], pairs, vector], {"N": 20}),
        "pairs of other columns": ("FloatLinear", [rows, pairs, vector], {"N": 65}),
        "bias of pairs": ("FloatLinear", [rows, pairs, vector[:19]], {"N": 20}),
        "gain of pairs": ("FloatLinear", [rows, pairs, vector, vector], {"N": 20}),
        "residual of pairs": ("FloatLinear", [rows, pairs, vector, None, None, vector], {"N": 20}),
        "a number in pairs": ("FloatLinear", [one(1), pairs, vector], {"N": 20}),
        "a number of rows": (
            "RowLinear",
            [one(1), np.zeros((0, 4), np.int8), *product.constants[1:], bias],
            {"N": 20, "gated": 1},
        ),
        "a flat table": ("LookUp", [panels.reshape(-1), scales, np.array([1])], {}),
        "a table without levels": ("LookUp", [stored.codes, floats(1, 70), np.array([1])], {}),
        "levels of other panels": ("LookUp", [stored.codes, floats(1, 70), np.array([1]), stored.levels[:1]], {}),
        "rows without codes": ("LookUp", [panels, floats(1, 100), np.array([99])], {}),
    }
    return [pytest.param(*entry, id=name) for name, entry in found.items()]


@pytest.mark.parametrize(("operator", "inputs", "attributes"), misfits())
def test_what_does_not_fit_is_an_error(
    kernels: Path, operator: str, inputs: list[Array | None], attributes: dict[str, float]
) -> None:
    with pytest.raises(Exception, match="scalefold"):
        run(kernels, operator, inputs, **attributes)


def test_the_plain_build_is_plain(plain_kernels: Path) -> None:
    assert not kernel_library.is_fast(plain_kernels)
