from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import pytest

from scalefold.compiler import graph
from scalefold.compiler.decode_chain import (
    FIELDS,
    PAIRED_BITS,
    DecodeChain,
    evaluate,
    is_constant,
    leaves,
    origin_of,
    pack,
    remember,
    stored_codes,
)
from scalefold.compiler.runtime import Session
from scalefold.compiler.weight_formats import BinaryCoding, Codebook, CodedWeight, Decoder, Grid, Int8

K, N = 24, 5
NARROW = range(1, 8)


def decoders(bits: int, rng: np.random.Generator) -> Iterator[tuple[str, Decoder]]:
    """Every kind of decoder of a [K, N] weight that these bits allow, as large as int8 lets its integers be."""
    top, half = (1 << bits) - 1, 1 << (bits - 1)
    for groups in (1, 3):
        steps = rng.integers(1, min(255 // top, 127) + 1, (groups, N))
        small = np.minimum(steps, min(128 // half, 127))
        yield f"central {groups}", Grid(np.full((groups, N), -half, dtype=np.int8))
        yield f"central, steps {groups}", Grid((-half * small).astype(np.int8), small.astype(np.int8))
        yield f"offsets {groups}", Grid(rng.integers(-128, 128 - top, (groups, N)).astype(np.int8))
        yield f"offsets, steps {groups}", Grid(np.full((groups, N), -128, dtype=np.int8), steps.astype(np.int8))
        alphas = -np.sort(-rng.integers(0, 127 // bits + 1, (bits, groups, N)), axis=0)
        yield f"binary {groups}", BinaryCoding(alphas.astype(np.int8))
    for columns in (1, N):
        yield (
            f"codebook {columns}",
            Codebook(np.sort(rng.integers(-128, 128, (1 << bits, columns)), axis=0).astype(np.int8)),
        )


def coded(bits: int, rows: int = K) -> dict[str, CodedWeight]:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (rows, N)).astype(np.uint8)
    scales = rng.uniform(0.1, 1, N).astype(np.float32)
    return {name: CodedWeight(codes, bits, decoder, scales) for name, decoder in decoders(bits, rng)}


def empty(opset: int = 20) -> ir.Model:
    return ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": opset}), ir_version=10)


def add_chain(
    model: ir.Model, weight: CodedWeight, name: str, *, by_rows: bool, four_bit: bool, ids: ir.Value | None = None
) -> ir.Value:
    rank = 2 if ids is not None else 1
    nodes = DecodeChain(
        model, weight, f"{name}_weight", {}, {}, by_rows=by_rows, ids=ids, rank=rank, four_bit=four_bit
    ).nodes()
    model.graph.extend(nodes)
    out = nodes[-1].outputs[0]
    out.name, out.type = name, ir.TensorType(ir.DataType.INT8)
    model.graph.outputs.append(out)
    return out


def laid_out(weight: CodedWeight, by_rows: bool) -> Int8:
    return weight.integers().T if by_rows else weight.integers()


BOTH_WAYS = pytest.mark.parametrize("by_rows", [False, True], ids=["columns", "rows"])


@BOTH_WAYS
@pytest.mark.parametrize("bits", NARROW)
@pytest.mark.parametrize("four_bit", [False, True], ids=["packed", "4-bit types"])
def test_a_chain_gives_the_solvers_integers_with_and_without_a_runtime(
    bits: int, four_bit: bool, by_rows: bool
) -> None:
    model, weights = empty(21 if four_bit else 17), coded(bits)
    for name, weight in weights.items():
        out = add_chain(model, weight, name, by_rows=by_rows, four_bit=four_bit)
        decoded = evaluate(out)
        assert is_constant(out)
        assert decoded is not None and decoded.dtype == np.int8
        np.testing.assert_array_equal(decoded, laid_out(weight, by_rows), err_msg=name)
    for optimize in (True, False):
        for name, array in Session(model, optimize=optimize).run({}).items():
            np.testing.assert_array_equal(array, laid_out(weights[name], by_rows), err_msg=name)


@pytest.mark.parametrize("bits", NARROW)
def test_rows_that_are_looked_up_are_the_rows_of_the_whole(bits: int) -> None:
    model, weights = empty(), coded(bits)
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["b", "s"]))
    model.graph.inputs.append(ids)
    for name, weight in weights.items():
        add_chain(model, weight, name, by_rows=True, four_bit=False, ids=ids)
    chosen = np.array([[4, 0, 2], [1, 1, -1]])
    for name, array in Session(model).run({"ids": chosen}).items():
        np.testing.assert_array_equal(array, weights[name].integers().T[chosen], err_msg=name)


@BOTH_WAYS
@pytest.mark.parametrize("bits", NARROW)
def test_rows_that_do_not_fill_their_last_byte_are_cut_to_size(bits: int, by_rows: bool) -> None:
    for name, weight in coded(bits, rows=21).items():
        model = empty()
        out = add_chain(model, weight, "odd", by_rows=by_rows, four_bit=False)
        np.testing.assert_array_equal(evaluate(out), laid_out(weight, by_rows), err_msg=name)
        np.testing.assert_array_equal(Session(model).run({})["odd"], laid_out(weight, by_rows), err_msg=name)


@BOTH_WAYS
@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("bits", NARROW)
def test_codes_take_their_bits_on_disk_and_no_more(bits: int, four_bit: bool, by_rows: bool) -> None:
    for name, weight in coded(bits).items():
        model = empty(21)
        out = add_chain(model, weight, name, by_rows=by_rows, four_bit=four_bit)
        stored = {value.name: value.const_value.nbytes for value in stored_codes(out) if value.const_value}
        assert sum(stored.values()) == K * N * bits / 8, name
        assert set(stored) < {value.name for value in leaves(out)} or len(leaves(out)) == 1


@pytest.mark.parametrize("width", [1, 2, 4])
def test_packed_fields_follow_each_other_a_row_at_a_time(width: int) -> None:
    each = 8 // width
    codes = (np.arange(2 * 3 * each).reshape(2, -1) % (1 << width)).astype(np.uint8)
    packed = pack(codes, width, axis=1)
    assert packed.shape == (2, 1, 3)
    np.testing.assert_array_equal(pack(codes.T, width, axis=0), packed.transpose(1, 2, 0))
    for place in range(each):
        field = packed[:, 0] >> np.uint8(width * place) & np.uint8((1 << width) - 1)
        np.testing.assert_array_equal(field, codes[:, 3 * place : 3 * place + 3])


@pytest.mark.parametrize("bits", NARROW)
def test_two_codes_of_few_bits_are_looked_up_at_once(bits: int) -> None:
    for name, weight in coded(bits).items():
        model = empty(21)
        add_chain(model, weight, name, by_rows=False, four_bit=True)
        indices = [
            node.outputs[0] for node in graph.nodes(model, "Cast") if node.attributes["to"].value == ir.DataType.INT32
        ]
        sizes = [array.size for index in indices if (array := evaluate(index)) is not None]
        assert sizes == ([] if isinstance(weight.decoder, Grid) else [K * N // (2 if bits <= PAIRED_BITS else 1)]), name


def test_the_fields_of_every_width_add_up_to_it() -> None:
    assert {bits: sum(fields) for bits, fields in FIELDS.items()} == {bits: bits for bits in NARROW}


def test_eight_bits_have_nothing_to_gain_and_are_not_noted() -> None:
    value = ir.Value(name="w")
    remember(value, coded(7)["codebook 1"])
    assert origin_of(value) is not None
    eight = CodedWeight(
        np.zeros((2, 1), dtype=np.uint8),
        8,
        Codebook(np.arange(-128, 128).astype(np.int8)[:, None]),
        np.ones(1, np.float32),
    )
    other = ir.Value(name="v")
    remember(other, eight)
    assert origin_of(other) is None
    assert origin_of(None) is None


@pytest.mark.parametrize("body", ["y = Add(x, c)", "t = Softmax(c)  y = Add(t, x)", "y = Softmax(c)"])
def test_what_an_input_or_another_operator_makes_is_no_constant(body: str) -> None:
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        model (float[2] x) => (float[2] y) <float[2] c = {{1.0, 2.0}}> {{ {body} }}"""
    )
    assert evaluate(model.graph.outputs[0]) is None
    assert not is_constant(model.graph.outputs[0])
    assert graph.constant(model.graph.outputs[0]) is None
