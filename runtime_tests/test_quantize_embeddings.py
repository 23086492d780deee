from __future__ import annotations

import numpy as np
import pytest

from scalefold.compiler import graph
from scalefold.compiler.decode_chain import origin_of
from scalefold.compiler.protocol import Context
from scalefold.compiler.recipe import WeightFormat
from scalefold.compiler.runtime import Feed, Session
from scalefold.compiler.solve import solve
from scalefold.compiler.testing import check_pass, parse
from scalefold.passes.pack_weights import PackWeights
from scalefold.passes.quantize_embeddings import QuantizeEmbeddings

HEAD = """<ir_version: 10, opset_import: ["" : 20]>
model (int64[b, s] ids) => (float[b, s, 2] y)
<float[4, 2] table = {127.0, 1.0, 0.0, 0.0, 0.5, -63.5, 3.0, -254.0},
 int8[4, 2] codes = {127, 1, 0, 0, 1, -127, 2, -127}, float[4, 1] scales = {1.0, 1.0, 0.5, 2.0}, float c = {2.0}>
"""
LOOK_UP = "%s = Gather<axis = 0>(codes, ids)  %s = Gather<axis = 0>(scales, ids)  %s = Cast<to = 1>(%s)"
FEEDS: list[Feed] = [{"ids": np.array([[0, 1, 2], [3, 3, 0]])}]
SMALL = QuantizeEmbeddings(smallest=8)


def test_rows_are_looked_up_as_integers_and_multiplied_with_their_step() -> None:
    result = check_pass(
        SMALL,
        before=HEAD + "{ y = Gather(table, ids) }",
        after=HEAD + "{" + LOOK_UP % ("r", "t", "f", "r") + "  y = Mul(f, t) }",
        feeds=FEEDS,
    )
    assert [event.reason for event in result.rewrites] == ["int8 per row of table"]


def test_a_row_beyond_the_end_counts_from_the_end_as_before() -> None:
    check_pass(SMALL, before=HEAD + "{ y = Gather(table, ids) }", feeds=[{"ids": np.array([[-1, -4]])}])


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_keeps_the_signal_that_its_bits_can_hold(bits: int) -> None:
    array = np.random.default_rng(bits).standard_normal((100, 64)).astype(np.float32)
    text = ", ".join(repr(float(value)) for value in array.ravel())
    model = f"""<ir_version: 10, opset_import: ["" : 20]>
    model (int64[m] ids) => (float[m, 64] y) <float[100, 64] table = {{{text}}}> {{ y = Gather(table, ids) }}"""
    check_pass(QuantizeEmbeddings(WeightFormat(bits=bits)), before=model, feeds=[{"ids": np.arange(100)}])


def test_a_table_that_is_looked_up_twice_is_stored_once() -> None:
    before = HEAD + "{ a = Gather(table, ids)  b = Gather(table, ids)  y = Add(a, b) }"
    check_pass(
        SMALL,
        before=before,
        after=HEAD
        + "{"
        + LOOK_UP % ("r", "t", "f", "r")
        + "  a = Mul(f, t) "
        + LOOK_UP % ("r2", "t2", "f2", "r2")
        + "  b = Mul(f2, t2)  y = Add(a, b) }",
        feeds=FEEDS,
    )
    model = parse(before)
    SMALL.run(model, Context())
    assert sorted(model.graph.initializers) == ["table_codes", "table_scales"]


def test_an_index_that_is_a_constant_works_too() -> None:
    check_pass(
        SMALL,
        before=HEAD.replace("float c", "int64[2] at = {1, 3}, float c")
        + "{ e = Gather(table, at)  o = Gather(table, ids)  m = ReduceSum(e)  y = Add(o, m) }",
        feeds=FEEDS,
    )


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        pytest.param(
            HEAD.replace("float[b, s, 2] y", "float[4, b, s] y") + "{ y = Gather<axis = 1>(table, ids) }",
            "not a look-up of rows",
            id="columns",
        ),
        pytest.param(
            HEAD.replace("float[4, 2] table", "float[8] table").replace("float[b, s, 2] y", "float[b, s] y")
            + "{ y = Gather(table, ids) }",
            "not a look-up of rows",
            id="a vector",
        ),
        pytest.param(
            HEAD.replace("float[4, 2] table", "float[8, 1] table").replace("float[b, s, 2] y", "float[b, s, 1] y")
            + "{ y = Gather(table, ids) }",
            "its rows are single numbers, such as the scales of a table that is stored already",
            id="a column",
        ),
        pytest.param(
            HEAD + "{ e = Gather(table, ids)  k = ReduceSum(table)  y = Add(e, k) }",
            "the table is read by other operators too",
            id="a tied table",
        ),
    ],
)
def test_a_table_that_is_not_only_looked_up_by_rows_is_declined(before: str, reason: str) -> None:
    feeds: list[Feed] = [{"ids": np.array([[0, 1], [1, 0]])}]
    result = check_pass(SMALL, before=before, after=before, feeds=feeds)
    assert [event.reason for event in result.declined] == [reason]


def test_a_small_table_is_declined() -> None:
    before = HEAD + "{ y = Gather(table, ids) }"
    result = check_pass(QuantizeEmbeddings(smallest=9), before=before, after=before, feeds=FEEDS)
    assert [event.reason for event in result.declined] == ["the table has fewer than 9 entries"]


def test_look_ups_in_integers_and_in_activations_are_passed_over() -> None:
    before = HEAD.replace("float c", "int64[4, 2] numbers = {1, 2, 3, 4, 5, 6, 7, 8}, float c") + (
        "{ n = Gather(numbers, ids)  f = Cast<to = 1>(n)  first = Gather<axis = 0>(f, ids)  m = ReduceSum(first)"
        "  y = Add(f, m) }"
    )
    result = check_pass(SMALL, before=before, after=before, feeds=[{"ids": np.array([[0, 1], [1, 0]])}])
    assert not result.declined


@pytest.mark.parametrize(
    "wanted",
    [
        WeightFormat(bits=4),
        WeightFormat(bits=4, group_size=16),
        WeightFormat(format="kmeans", bits=4),
        WeightFormat(format="bcq", bits=3, group_size=32),
    ],
    ids=str,
)
def test_a_table_of_fewer_bits_is_what_its_solver_says_and_its_codes_are_noted(wanted: WeightFormat) -> None:
    array = np.random.default_rng(2).standard_normal((100, 64)).astype(np.float32)
    model = parse(
        """<ir_version: 10, opset_import: ["" : 20]>
        model (int64[m] ids) => (float[m, 64] y) <float[1, 1] table = {0.0}> { y = Gather(table, ids) }"""
    )
    graph.replace_constant(model, graph.nodes(model, "Gather")[0], 0, "rows", array)
    result = QuantizeEmbeddings(wanted).run(model, Context())
    assert [event.reason for event in result.rewrites] == [f"{wanted} of rows".replace("per column", "per row")]
    expected = solve(array.T, wanted, None, None)
    origin = origin_of(model.graph.initializers["rows_codes"])
    assert origin is not None and origin.by_rows and origin.coded.bits == wanted.bits
    np.testing.assert_array_equal(Session(model).run({"ids": np.arange(100)})["y"], expected.dequantized().T)


def test_packed_tables_give_the_same_rows() -> None:
    array = np.random.default_rng(2).standard_normal((100, 64)).astype(np.float32)
    model = parse(
        """<ir_version: 10, opset_import: ["" : 20]>
        model (int64[m] ids) => (float[m, 64] y) <float[1, 1] table = {0.0}> { y = Gather(table, ids) }"""
    )
    graph.replace_constant(model, graph.nodes(model, "Gather")[0], 0, "rows", array)
    QuantizeEmbeddings(WeightFormat(bits=4, group_size=16)).run(model, Context())
    check_pass(PackWeights(), before=model, feeds=[{"ids": np.array([0, 99, 5, 5, -1])}])
