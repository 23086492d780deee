"""Golden files: a graph as text that is kept beside the tests, so that a change shows in review as a readable difference."""

from __future__ import annotations

import difflib
import math
import re

import onnx_ir as ir

from scalefold.compiler.canonical import Form, canonical_text
from scalefold.compiler.diff import layer_names
from scalefold.compiler.quantization import linear_quantization

CONSTANT = re.compile(r"<(\w+)[^<>]*>")
FIGURE = re.compile(r"~(-?(?:inf|nan|\d[\d.]*(?:e[+-]?\d+)?))")


def golden_text(model: ir.Model, *, figures: bool = False) -> str:
    """A graph as text: nodes in an order of its own, named after the linear layer they lead to.

    Args:
        model: the graph.
        figures: write floats and quantized integers as rounded figures instead of values and digests, for graphs that
            calibration decides: another CPU adds floats in another order, and no digest survives that.
    """
    form = Form(model)
    return canonical_text(form, layer_names(form, linear_quantization(form.model)), figures=figures)


def golden_difference(golden: str, text: str, tolerance: float = 0.0) -> str:
    """A unified difference from a golden file to a graph's text; empty when they agree.

    Args:
        golden: the text that is kept.
        text: the text of the graph as it is now.
        tolerance: how far figures (numbers behind `~`) may be apart, relative to the larger; integers by 1 in any case.
    """
    wanted, got = golden.splitlines(), text.splitlines()
    blank, other = ([FIGURE.sub("~", line) for line in lines] for lines in (wanted, got))
    for tag, start, end, place, _ in difflib.SequenceMatcher(None, blank, other, autojunk=False).get_opcodes():
        for offset in range(end - start if tag == "equal" else 0):
            if _close(wanted[start + offset], got[place + offset], tolerance):
                got[place + offset] = wanted[start + offset]
    return "\n".join(difflib.unified_diff(wanted, got, "golden", "graph", n=1, lineterm=""))


def _close(line: str, other: str, tolerance: float) -> bool:
    constants = zip(CONSTANT.finditer(line), CONSTANT.finditer(other), strict=True)
    return all(
        one == two or _near(one, two, tolerance, whole="int" in mine[1])
        for mine, theirs in constants
        for one, two in zip(FIGURE.findall(mine[0]), FIGURE.findall(theirs[0]), strict=True)
    )


def _near(one: str, two: str, tolerance: float, *, whole: bool) -> bool:
    if not (math.isfinite(float(one)) and math.isfinite(float(two))):
        return one == two
    slack = 1.0 if tolerance and whole else 0.0
    apart = abs(float(one) - float(two))
    return apart <= max(slack, tolerance * max(abs(float(one)), abs(float(two))))
