from __future__ import annotations

import pytest

from scalefold.compiler.testing import check_pass
from scalefold.passes.shield_layer_norm import ShieldLayerNorm

HEAD = """<ir_version: 10, opset_import: ["" : 20]>
model (float[b, s, 2] x, float[b, s, 2] r) => (float[b, s, 2] y)
<float[2] gamma = {1.0, -2.0}, float[2] beta = {0.5, 1.0},
 float[1, 1, 2] wide_gamma = {1.0, -2.0}, float[1, 1, 2] wide_beta = {0.5, 1.0}>
"""


@pytest.mark.parametrize("axis", [-1, 2])
def test_parameters_behind_an_addition_are_stored_with_three_dimensions(axis: int) -> None:
    result = check_pass(
        ShieldLayerNorm(),
        before=HEAD + f"{{ h = Add(x, r)  y = LayerNormalization<axis = {axis}>(h, gamma, beta) }}",
        after=HEAD + f"{{ h = Add(x, r)  y = LayerNormalization<axis = {axis}>(h, wide_gamma, wide_beta) }}",
    )
    assert [event.reason for event in result.rewrites] == ["parameters stored as [1, 1, C]"]


def test_a_normalization_without_bias_gets_its_gain_stored_so() -> None:
    check_pass(
        ShieldLayerNorm(),
        before=HEAD + "{ h = Add(x, r)  y = LayerNormalization(h, gamma) }",
        after=HEAD + "{ h = Add(x, r)  y = LayerNormalization(h, wide_gamma) }",
    )


def test_two_normalizations_that_share_their_parameters_are_both_shielded() -> None:
    result = check_pass(
        ShieldLayerNorm(),
        before=HEAD
        + """{ h = Add(x, r)  n = LayerNormalization(h, gamma, beta)  k = Add(n, r)
               y = LayerNormalization(k, gamma, beta) }""",
        after=HEAD
        + """{ h = Add(x, r)  n = LayerNormalization(h, wide_gamma, wide_beta)  k = Add(n, r)
               y = LayerNormalization(k, wide_gamma, wide_beta) }""",
    )
    assert len(result.rewrites) == 2


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(HEAD + "{ h = Mul(x, r)  y = LayerNormalization(h, gamma, beta) }", id="no addition in front"),
        pytest.param(HEAD + "{ y = LayerNormalization(x, gamma, beta) }", id="nothing in front"),
        pytest.param(
            HEAD.replace("b, s, 2", "s, 2") + "{ h = Add(x, r)  y = LayerNormalization(h, gamma, beta) }",
            id="two dimensions",
        ),
        pytest.param(
            HEAD.replace("r)", "r, float[2] g, float[2] c)") + "{ h = Add(x, r)  y = LayerNormalization(h, g, c) }",
            id="parameters that are fed",
        ),
    ],
)
def test_what_onnxruntime_does_not_fuse_is_left_alone(before: str) -> None:
    result = check_pass(ShieldLayerNorm(), before=before, after=before)
    assert not result.declined


def test_a_normalization_over_two_axes_is_declined() -> None:
    before = (
        HEAD.replace("b, s, 2", "3, 2, 2").replace("float[2]", "float[2, 2]").replace("}", ", 3.0, 4.0}", 2)
        + "{ h = Add(x, r)  y = LayerNormalization<axis = 1>(h, gamma, beta) }"
    )
    result = check_pass(ShieldLayerNorm(), before=before, after=before)
    assert [event.reason for event in result.declined] == ["not over the last axis alone"]
