from __future__ import annotations

from scalefold.compiler.testing import check_pass
from scalefold.passes.fold_shift import FoldShift

HEAD = """<ir_version: 10, opset_import: ["" : 20]>
model (float[b, s, 2] r, float[b, s, 2] x) => (float[b, s, 2] h)
<float[2] z = {1.0, 2.0}, float[2, 2] w = {1.0, 2.0, 3.0, 4.0}, float[2] b0 = {0.5, 0.25}, float[2] b1 = {1.5, 2.25}>
"""


def test_the_shift_of_a_residual_goes_into_the_bias_it_meets() -> None:
    result = check_pass(
        FoldShift(),
        before=HEAD + "{ shifted = Add(r, z)  p = MatMul(x, w)  y = Add(p, b0)  h = Add(shifted, y) }",
        after=HEAD + "{ p = MatMul(x, w)  y = Add(p, b1)  h = Add(r, y) }",
    )
    assert len(result.rewrites) == 1


def test_a_layer_read_elsewhere_is_declined() -> None:
    result = check_pass(
        FoldShift(),
        before=HEAD + "{ shifted = Add(r, z)  p = MatMul(x, w)  y = Add(p, b0)  t = Add(shifted, y)  h = Add(t, y) }",
    )
    assert [event.reason for event in result.declined] == ["the layer's output is read elsewhere too"]
