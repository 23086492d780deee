"""A harness for passes: text before and after, numbers by contract, and a second run that must change nothing."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from scalefold.compiler import graph, verify
from scalefold.compiler.calibrate import collect
from scalefold.compiler.protocol import Context, Contract, Pass, PassResult, Requests
from scalefold.compiler.runtime import Array, Feed, Session, inputs_of
from scalefold.compiler.stats import Statistic

REASSOCIATION_TOLERANCE = 1e-4
"""Largest error that another order of float operations may cause, relative to the largest output."""

SMALL_DIMENSION = 5
"""What a symbolic dimension is set to when the harness makes up inputs."""


def parse(model: str | ir.Model) -> ir.Model:
    """A model from ONNX text, with constants as initializers and shapes inferred; a model is returned as it is."""
    if isinstance(model, ir.Model):
        return model
    parsed = ir.from_onnx_text(model)
    ShapeInferencePass()(parsed)
    return parsed


def check_pass(
    candidate: Pass,
    before: str | ir.Model,
    after: str | ir.Model | None = None,
    *,
    feeds: Iterable[Feed] | None = None,
    context: Context | None = None,
) -> PassResult:
    """Run a pass on a graph and hold it to everything it claims.

    The pass must find the facts it requires and leave those it provides; the result must be the graph `after`, where
    given; outputs must agree as the pass's contract says; and a second run must change nothing.

    Args:
        candidate: the pass.
        before: ONNX text or a model; left as it was.
        after: what it must become, equal up to the names of values; None leaves the structure unchecked.
        feeds: inputs for the comparison; made up from the graph's input types when None.
        context: what the pass may use; calibrates and searches on the feeds when None.

    Raises:
        AssertionError: with what differs.
    """
    original = parse(before)
    inputs = list(feeds) if feeds is not None else made_up_feeds(original)
    context = context or context_on(original, inputs)
    model = original.clone()
    for fact in candidate.requires:
        assert fact.holds(model), f"{candidate.name} requires a graph in which {fact.value}"
    result = candidate.run(model, context)
    if after is not None:
        assert_same_graph(model, parse(after))
    if result.changed:
        for fact in candidate.provides:
            assert fact.holds(model), f"{candidate.name} did not leave a graph in which {fact.value}"
    else:
        assert_same_graph(model, original)
    _check_numbers(candidate, original, model, inputs)
    again = candidate.run(model.clone(), context)
    assert not again.changed, f"{candidate.name} does not settle: {[event.reason for event in again.rewrites]}"
    return result


def context_on(model: ir.Model, feeds: list[Feed]) -> Context:
    """A context that calibrates and searches on a few feeds."""

    def measure(current: ir.Model, requests: Requests) -> dict[str, Statistic]:
        return collect(current, requests, feeds)

    def reference() -> list[dict[str, Array]]:
        session = Session(model)
        return [session.run(feed) for feed in feeds]

    return Context(measure=measure, search=feeds, reference=reference)


def made_up_feeds(model: ir.Model, count: int = 2) -> list[Feed]:
    """Feeds by input type: normal floats, small integers, and all 256 values of an 8-bit input."""
    generator = np.random.default_rng(0)
    return [{name: _made_up(value, generator) for name, value in inputs_of(model).items()} for _ in range(count)]


def _made_up(value: ir.Value, generator: np.random.Generator) -> Array:
    dims = value.shape or ir.Shape(())
    shape = tuple(size if isinstance(size, int) else SMALL_DIMENSION for size in dims)
    dtype = value.dtype or ir.DataType.FLOAT
    if dtype in (ir.DataType.UINT8, ir.DataType.INT8):
        if any(not isinstance(size, int) for size in dims):
            rest = int(np.prod([size for size in dims if isinstance(size, int)], dtype=int))
            first = next(index for index, size in enumerate(dims) if not isinstance(size, int))
            shape = tuple(
                size if isinstance(size, int) else (-(-256 // rest) if index == first else 1)
                for index, size in enumerate(dims)
            )
        return np.resize(np.arange(256), shape).astype(np.uint8).view(dtype.numpy())
    if dtype.is_integer():
        return generator.integers(0, 2, shape).astype(dtype.numpy())
    if dtype == ir.DataType.BOOL:
        return generator.integers(0, 2, shape).astype(bool)
    return generator.standard_normal(shape).astype(dtype.numpy())


def _check_numbers(candidate: Pass, original: ir.Model, model: ir.Model, feeds: list[Feed]) -> None:
    expected, actual = Session(original, optimize=False), Session(model, optimize=False)
    for feed in feeds:
        wanted, got = expected.run(feed), actual.run(feed)
        assert list(wanted) == list(got), f"outputs {list(wanted)} became {list(got)}"
        for name in wanted:
            _compare(candidate, name, wanted[name], got[name])


def _compare(candidate: Pass, name: str, wanted: Array, got: Array) -> None:
    assert wanted.shape == got.shape, f"{name} has shape {got.shape}, not {wanted.shape}"
    if candidate.contract is Contract.EXACT or wanted.dtype.kind != "f":
        np.testing.assert_array_equal(got, wanted, err_msg=f"{name} is not equal bit for bit")
    elif candidate.contract is Contract.REASSOCIATED:
        limit = REASSOCIATION_TOLERANCE * float(np.abs(wanted).max(initial=1e-30))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=limit, err_msg=f"{name} is another function")
    else:
        least = 6 * int(getattr(candidate, "bits", 8)) - 28
        found = verify.sqnr(wanted, got)
        assert found >= least, f"{name} has an SQNR of {found:.1f} dB, below the {least} dB of these bits"


def assert_same_graph(actual: ir.Model, expected: ir.Model) -> None:
    """Raise unless two graphs are equal node by node, up to the names of nodes and values.

    Constants are compared by value, to float32 rounding.
    """
    first, second = list(actual.graph), list(expected.graph)
    lines = "\n".join(map(_line, first)), "\n".join(map(_line, second))
    message = f"\n--- got\n{lines[0]}\n--- wanted\n{lines[1]}"
    assert [node.op_identifier()[:2] for node in first] == [node.op_identifier()[:2] for node in second], message
    match: dict[ir.Value, ir.Value] = dict(zip(actual.graph.inputs, expected.graph.inputs, strict=True))
    for node, twin in zip(first, second, strict=True):
        assert _attributes(node) == _attributes(twin), f"attributes of {_line(node)} are not {_line(twin)}{message}"
        assert len(node.inputs) == len(twin.inputs), message
        for value, other in zip(node.inputs, twin.inputs, strict=True):
            _assert_same_value(value, other, match, message)
        match.update(zip(node.outputs, twin.outputs, strict=True))
    for value, other in zip(actual.graph.outputs, expected.graph.outputs, strict=True):
        assert match.get(value, value) is other or graph.constant(value) is not None, message
        assert value.name == other.name, f"output {other.name} became {value.name}"


def _assert_same_value(
    value: ir.Value | None, other: ir.Value | None, match: dict[ir.Value, ir.Value], message: str
) -> None:
    if value is None or other is None:
        assert value is other, message
        return
    array, twin = graph.constant(value), graph.constant(other)
    if array is None or twin is None:
        assert match.get(value) is other, f"{value.name} is not {other.name}{message}"
        return
    assert array.dtype == twin.dtype and array.shape == twin.shape, (
        f"{value.name} is {array.dtype}{array.shape}, not {twin.dtype}{twin.shape}{message}"
    )
    np.testing.assert_allclose(
        array.astype(np.float64), twin.astype(np.float64), rtol=1e-5, atol=1e-6, err_msg=f"constant {value.name}"
    )


def _attributes(node: ir.Node) -> dict[str, str]:
    return {name: str(attribute.value) for name, attribute in node.attributes.items()}


def _line(node: ir.Node) -> str:
    inputs = ", ".join("-" if value is None else value.name or "?" for value in node.inputs)
    return f"{', '.join(out.name or '?' for out in node.outputs)} = {node.op_type}({inputs}) {_attributes(node)}"


def coded_weight(kind: str, inputs: int, outputs: int) -> Array:
    """A weight int8 [inputs, outputs] of random codes of 4 bits, for the ways in which the kernel library stores such.

    Args:
        kind: "steps" or "values" of a column; with "grouped " before it, of every 64 rows of a column.
        inputs: a multiple of 64.
        outputs: columns.
    """
    generator = np.random.default_rng(outputs)
    groups = inputs // 64 if kind.startswith("grouped ") else 1
    shape = groups, inputs // groups, outputs
    if kind.endswith("steps"):
        steps = generator.choice([1, 3, 7, 11, 16, -2, -15], (groups, 1, outputs))
        weight = generator.integers(-8, 8, shape) * steps
        weight[:, :2] = np.array([-8, 7])[:, None] * steps
    else:
        values = generator.permuted(np.arange(-128, 128)[:, None] * np.ones((1, groups * outputs), int), axis=0)[:16]
        codes = generator.integers(0, 16, shape)
        codes[:, :16] = np.arange(16)[:, None]
        weight = values.reshape(16, groups, outputs)[codes, np.arange(groups)[:, None, None], np.arange(outputs)]
    found: Array = weight.reshape(inputs, outputs).astype(np.int8)
    return found
