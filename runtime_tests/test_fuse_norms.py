from __future__ import annotations

import numpy as np
import pytest

from scalefold.compiler.testing import check_pass
from scalefold.passes.fuse_norms import FuseNorms

pytestmark = pytest.mark.usefixtures("kernel_cache")

HEAD = """<ir_version: 10, opset_import: ["" : 23, "scalefold" : 1]>
model (float[b, s, 4] a, float[b, s, 4] c%s) => (float[b, s, 4] y%s)
<float[4] gain = {1.0, 2.0, -1.0, 0.5}, float[4] shift = {0.5, 0.0, 1.0, -1.0}, float[4] none = {0.0, 0.0, 0.0, 0.0},
 float[1] one = {2.0}, float[2, 4] wide = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}>
"""


def text(body: str, inputs: str = "", outputs: str = "") -> str:
    return HEAD % (inputs, outputs) + f"{{ {body} }}"


def test_an_addition_and_the_rms_normalization_behind_it_become_one_operator() -> None:
    result = check_pass(
        FuseNorms(),
        before=text("h = Add(a, c)  y = RMSNormalization<epsilon = 0.001>(h, gain)"),
        after=text("h, y = scalefold.AddNorm<epsilon = 0.001>(a, c, gain)"),
    )
    assert [event.reason for event in result.rewrites] == ["addition and normalization by one operator"]


@pytest.mark.parametrize("axis", [-1, 2])
def test_a_layer_normalization_keeps_its_shift(axis: int) -> None:
    check_pass(
        FuseNorms(),
        before=text(f"h = Add(a, c)  y = LayerNormalization<axis = {axis}, epsilon = 0.001>(h, gain, shift)"),
        after=text("h, y = scalefold.AddNorm<epsilon = 0.001>(a, c, gain, shift)"),
    )


def test_a_layer_normalization_without_a_shift_still_takes_the_mean_off() -> None:
    check_pass(
        FuseNorms(),
        before=text("h = Add(a, c)  y = LayerNormalization<epsilon = 0.001>(h, gain)"),
        after=text("h, y = scalefold.AddNorm<epsilon = 0.001>(a, c, gain, none)"),
    )


def test_a_sum_that_is_read_on_and_is_an_output_stays_one() -> None:
    check_pass(
        FuseNorms(),
        before=text(
            "h = Add(a, c)  n = RMSNormalization<epsilon = 0.001>(h, gain)  y = Add(h, n)", outputs=", float[b, s, 4] h"
        ),
        after=text(
            "h, n = scalefold.AddNorm<epsilon = 0.001>(a, c, gain)  y = Add(h, n)", outputs=", float[b, s, 4] h"
        ),
    )


def test_one_addition_and_two_normalizations_share_it() -> None:
    body = "h = Add(a, c)  n = RMSNormalization(h, gain)  m = LayerNormalization(h, gain, shift)  y = Sub(n, m)"
    result = check_pass(FuseNorms(), before=text(body))
    assert len(result.rewrites) == 1


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        pytest.param("h = Mul(a, c)  y = RMSNormalization(h, gain)", "", id="no addition"),
        pytest.param("h = Add(a, d)  y = RMSNormalization(h, gain)", ", float[1, s, 4] d", id="an addition that broadcasts"),
        pytest.param("h = Add(a, shift)  y = RMSNormalization(h, gain)", "", id="a bias"),
        pytest.param("h = Add(a, c)  y = RMSNormalization(h, g)", ", float[4] g", id="a gain that is computed"),
        pytest.param("h = Add(a, c)  y = LayerNormalization(h, gain, g)", ", float[4] g", id="a shift that is computed"),
        pytest.param("h = Add(a, c)  y = RMSNormalization(h, one)", "", id="a gain that is broadcast"),
        pytest.param("h = Add(a, c)  y, m = LayerNormalization(h, gain, shift)  z = Exp(m)", "", id="its mean is read"),
    ],
)  # fmt: skip
def test_what_is_no_such_pair_stays(body: str, inputs: str) -> None:
    assert not check_pass(FuseNorms(), before=text(body, inputs)).changed


def test_a_normalization_over_two_axes_stays() -> None:
    head = HEAD.replace("float[b, s, 4]", "float[b, 2, 4]") % ("", "")
    body = "{ h = Add(a, c)  y = RMSNormalization<axis = 1>(h, wide) }"
    assert not check_pass(FuseNorms(), before=head + body).changed


def test_dimensions_that_are_not_known_may_differ() -> None:
    body = (
        "d = Compress<axis = 1>(a, few)  e = Compress<axis = 1>(c, many)  h = Add(d, e)  y = RMSNormalization(h, gain)"
    )
    before = text(body, ", bool[s] few, bool[s] many").replace("(float[b, s, 4] y)", "(float[b, n, 4] y)")
    values = np.random.default_rng(1).standard_normal((2, 2, 5, 4)).astype(np.float32)
    feed = {"a": values[0], "c": values[1], "few": np.arange(5) < 1, "many": np.arange(5) < 3}
    assert not check_pass(FuseNorms(), before=before, feeds=[feed]).changed
