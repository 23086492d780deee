from __future__ import annotations

from scalefold.compiler.testing import check_pass
from scalefold.passes.share_weights import ShareWeights

HEAD = """<ir_version: 10, opset_import: ["" : 20]>
model (float[b, 2] x) => (float[b, 2] y)
<float[2, 2] w = {1.0, 2.0, 3.0, 4.0}, float[2, 2] same = {1.0, 2.0, 3.0, 4.0}, float[2, 2] other = {1.0, 2.0, 3.0, 5.0}>
"""


def test_equal_weights_become_one_constant() -> None:
    result = check_pass(
        ShareWeights(),
        before=HEAD + "{ a = MatMul(x, w)  b = MatMul(a, other)  y = MatMul(b, same) }",
        after=HEAD + "{ a = MatMul(x, w)  b = MatMul(a, other)  y = MatMul(b, w) }",
    )
    assert [event.reason for event in result.rewrites] == ["reads w too"]


def test_different_weights_stay_apart() -> None:
    assert not check_pass(ShareWeights(), before=HEAD + "{ a = MatMul(x, w)  y = MatMul(a, other) }").changed
