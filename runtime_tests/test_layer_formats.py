from __future__ import annotations

import onnx_ir as ir
import pytest

from scalefold.compiler import graph
from scalefold.compiler.errors import PatternError, RecipeError
from scalefold.compiler.layer_formats import formats_of
from scalefold.compiler.recipe import WeightFormat, Weights
from scalefold.compiler.testing import parse

MODEL = """<ir_version: 10, opset_import: ["" : 20]>
model (float[b, 4] x) => (float[b, 6] y)
<float[4, 4] w = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1},
 float[4, 6] u = {1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0}>
{ [first] h = MatMul(x, w)  [second] y = MatMul(h, u) }"""


def layers() -> list[graph.Linear]:
    model: ir.Model = parse(MODEL)
    return graph.linear_layers(model)


def formats(content: dict[str, object]) -> dict[str, WeightFormat]:
    return formats_of(Weights.model_validate(content), layers())


def test_each_layer_has_its_format() -> None:
    found = formats({"bits": 4, "layers": {"sec": {"format": "bcq", "group_size": 2}}})
    assert found == {"first": WeightFormat(bits=4), "second": WeightFormat(format="bcq", bits=4, group_size=2)}


def test_a_pattern_may_match_a_layer_that_stays_float() -> None:
    weights = Weights.model_validate({"layers": {"head": {"bits": 4}}})
    assert formats_of(weights, layers(), ["head"]) == {"first": WeightFormat(), "second": WeightFormat()}


@pytest.mark.parametrize(("pattern", "fault"), [("third", "matches none of the 2"), ("(", "not a regular expression")])
def test_a_pattern_that_selects_nothing_is_an_error(pattern: str, fault: str) -> None:
    with pytest.raises(PatternError, match=fault) as caught:
        formats({"layers": {"first": {}, pattern: {"bits": 4}}})
    assert str(caught.value).startswith(f"weights.layers pattern {pattern!r}")


@pytest.mark.parametrize(
    ("content", "faults"),
    [
        (
            {"bits": 4, "group_size": 3},
            ["weights.group_size: 3 does not divide the 4 rows of first and 1 other layers"],
        ),
        (
            {"bits": 4, "layers": {"sec": {"group_size": 8}}},
            ["weights.group_size: 8 does not divide the 4 rows of second"],
        ),
        (
            {"bits": 4, "group_size": 3, "layers": {"sec": {"group_size": 8}}},
            [
                "weights.group_size: 3 does not divide the 4 rows of first",
                "weights.group_size: 8 does not divide the 4 rows of second",
            ],
        ),
    ],
)
def test_groups_that_do_not_divide_the_rows_are_all_reported(content: dict[str, object], faults: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        formats(content)
    assert list(caught.value.faults) == faults
