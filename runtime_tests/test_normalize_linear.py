from __future__ import annotations

import pytest

from scalefold.compiler.testing import check_pass
from scalefold.passes.normalize_linear import NormalizeLinear

HEAD = """<ir_version: 10, opset_import: ["" : 20]>
model (float[m, 2] x) => (float[m, 3] y)
<float[2, 3] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}, float[3, 2] wt = {1.0, 4.0, 2.0, 5.0, 3.0, 6.0},
 float[2, 3] twice = {2.0, 4.0, 6.0, 8.0, 10.0, 12.0},
 float[3] c = {0.5, -1.0, 2.0}, float[3] half = {0.25, -0.5, 1.0}, float[3] same = {0.5, 0.5, 0.5},
 float[1, 3] row = {0.5, -1.0, 2.0}, float[1] one = {0.5}, float number = {0.5}>
"""


@pytest.mark.parametrize(
    ("gemm", "weight", "bias"),
    [
        pytest.param("Gemm(x, w, c)", "w", "c", id="plain"),
        pytest.param("Gemm<transB = 1>(x, wt, c)", "w", "c", id="transposed weight"),
        pytest.param("Gemm<alpha = 2.0>(x, w, c)", "twice", "c", id="alpha"),
        pytest.param("Gemm<alpha = 2.0, transB = 1>(x, wt, c)", "twice", "c", id="alpha, transposed weight"),
        pytest.param("Gemm<beta = 0.5>(x, w, c)", "w", "half", id="beta"),
        pytest.param("Gemm(x, w, row)", "w", "c", id="a bias of one row"),
        pytest.param("Gemm<beta = 0.5>(x, w, row)", "w", "half", id="beta, a bias of one row"),
        pytest.param("Gemm(x, w, number)", "w", "same", id="a bias of one number"),
    ],
)
def test_gemm_becomes_matmul_and_add(gemm: str, weight: str, bias: str) -> None:
    result = check_pass(
        NormalizeLinear(),
        before=HEAD + f"{{ y = {gemm} }}",
        after=HEAD + f"{{ p = MatMul(x, {weight})  y = Add(p, {bias}) }}",
    )
    assert [event.reason for event in result.rewrites] == ["Gemm"]


def test_a_bias_vector_of_one_number_becomes_a_bias_of_every_column() -> None:
    check_pass(
        NormalizeLinear(),
        before=HEAD + "{ y = Gemm(x, w, one) }",
        after=HEAD + "{ p = MatMul(x, w)  y = Add(p, same) }",
    )


def test_gemm_without_bias_becomes_matmul_alone() -> None:
    check_pass(NormalizeLinear(), before=HEAD + "{ y = Gemm(x, w) }", after=HEAD + "{ y = MatMul(x, w) }")


def test_the_product_keeps_the_name_of_its_gemm() -> None:
    result = check_pass(NormalizeLinear(), before=HEAD + "{ [classifier] y = Gemm(x, w, c) }")
    assert [event.where for event in result.rewrites] == ["classifier"]


def test_a_weight_that_two_gemms_share_stays_one_constant() -> None:
    result = check_pass(
        NormalizeLinear(),
        before=HEAD + "{ a = Gemm(x, w, c)  b = Gemm(x, w)  y = Add(a, b) }",
        after=HEAD + "{ p = MatMul(x, w)  a = Add(p, c)  b = MatMul(x, w)  y = Add(a, b) }",
    )
    first, second = (event.node for event in result.rewrites)
    assert first.inputs[1] is second.inputs[1]


def test_matmul_with_a_transposed_constant_takes_the_constant_transposed() -> None:
    result = check_pass(
        NormalizeLinear(),
        before=HEAD + "{ t = Transpose<perm = [1, 0]>(wt)  y = MatMul(x, t) }",
        after=HEAD + "{ y = MatMul(x, w) }",
    )
    assert [event.reason for event in result.rewrites] == ["transposed constant"]


def test_a_tied_embedding_that_is_transposed_for_the_output_layer_is_still_looked_up() -> None:
    tied = HEAD.replace("x)", "x, int64[m] ids)")
    check_pass(
        NormalizeLinear(),
        before=tied + "{ t = Transpose(wt)  e = Gather(wt, ids)  h = Add(x, e)  y = MatMul(h, t) }",
        after=tied + "{ e = Gather(wt, ids)  h = Add(x, e)  y = MatMul(h, w) }",
    )


def test_a_transpose_that_moves_nothing_keeps_the_weight_as_it_is() -> None:
    check_pass(NormalizeLinear(), before=HEAD + "{ t = Transpose<perm = [0, 1]>(w)  y = MatMul(x, t) }")


def test_products_of_activations_are_no_linear_layers() -> None:
    square = HEAD.replace("float[m, 3] y", "float[m, m] y")
    before = square + "{ t = Transpose<perm = [1, 0]>(x)  y = MatMul(x, t) }"
    result = check_pass(NormalizeLinear(), before=before, after=before)
    assert not result.declined


@pytest.mark.parametrize(
    ("head", "body", "reason"),
    [
        pytest.param(
            HEAD.replace("x)", "x, float[2, 3] v)"),
            "y = Gemm(x, v, c)",
            "its right-hand side is not a constant",
            id="an activation on the right",
        ),
        pytest.param(
            HEAD.replace("float[m, 2] x", "float[2, m] x"),
            "y = Gemm<transA = 1>(x, w, c)",
            "its left-hand side is transposed",
            id="a transposed activation",
        ),
        pytest.param(
            HEAD.replace("x)", "x, float[m, 3] v)"),
            "y = Gemm(x, w, v)",
            "its bias is not a constant",
            id="an activation as bias",
        ),
        pytest.param(
            HEAD.replace("float[", "double["),
            "y = Gemm<alpha = 2.0>(x, w, c)",
            "its weight or bias is not float32",
            id="double precision",
        ),
    ],
)
def test_a_gemm_that_is_no_linear_layer_is_declined(head: str, body: str, reason: str) -> None:
    before = head + "{" + body + "}"
    result = check_pass(NormalizeLinear(), before=before, after=before)
    assert [event.reason for event in result.declined] == [reason]


def test_a_gemm_that_adds_a_whole_matrix_stays_the_same_function() -> None:
    static = HEAD.replace("float[m,", "float[2,")
    check_pass(NormalizeLinear(), before=static + "{ y = Gemm(x, w, twice) }")


def test_a_gemm_that_adds_a_column_stays_the_same_function() -> None:
    static = HEAD.replace("float[m,", "float[2,").replace(
        "float number", "float[2, 1] column = {1.0, 2.0}, float number"
    )
    check_pass(NormalizeLinear(), before=static + "{ y = Gemm(x, w, column) }")


def test_one_declined_gemm_does_not_keep_the_other_layers_out_of_normal_form() -> None:
    head = HEAD.replace("x)", "x, float[m, 3] v)")
    result = check_pass(NormalizeLinear(), before=head + "{ a = Gemm(x, w, v)  b = Gemm(x, w, c)  y = Add(a, b) }")
    assert len(result.rewrites) + len(result.declined) == 2
