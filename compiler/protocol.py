"""What a pass is, what it may ask for, and what it answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, Protocol

import onnx_ir as ir

from scalefold.compiler.errors import CalibrationError, PatternError
from scalefold.compiler.facts import Fact
from scalefold.compiler.layer_names import matches
from scalefold.compiler.runtime import Array, Feed
from scalefold.compiler.stats import Statistic

Requests = Mapping[str, Callable[[], Statistic]]
"""The statistics wanted, as factories by value name."""

Measure = Callable[[ir.Model, Requests], dict[str, Statistic]]
"""Streams the calibration samples through a graph once and returns the statistics by value name."""

Fused = Callable[[ir.Model], ir.Model]
"""Gives a graph of the same function in fewer operators; the graph that it is given is left as it was."""

Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""Opens a progress bar of so many steps under a title; what it yields is called once a step."""


def silent(title: str, total: int) -> AbstractContextManager[Callable[[], None]]:
    """A progress bar that nobody sees."""
    return nullcontext(lambda: None)


class Contract(Enum):
    """What a pass promises about the function of the graph; the harness picks the comparison by it."""

    EXACT = "bit for bit"
    REASSOCIATED = "equal up to the order of float additions and multiplications"
    LOSSY = "changed on purpose, by quantization"


@dataclass(frozen=True)
class Event:
    """One thing that a pass did or declined to do.

    Attributes:
        node: the node it is about.
        reason: why, in a few words.
        figures: measurements that go into the report.
    """

    node: ir.Node
    reason: str
    figures: Mapping[str, float | int | str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """The node's name, or its op type when it has none."""
        return self.node.name or self.node.op_type


@dataclass(frozen=True)
class PassResult:
    """What a pass did and what it declined, each with node and reason."""

    rewrites: tuple[Event, ...] = ()
    declined: tuple[Event, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether the graph is another one than before."""
        return bool(self.rewrites)


@dataclass(frozen=True)
class Context:
    """What passes may use besides the graph.

    Attributes:
        measure: streams the calibration set; raises when there is none.
        search: the few feeds that searches run on, without padding where the source allows it.
        reference: the outputs of the float model for each of the search feeds, computed on first use.
        float_model: the float graph that the result is to reproduce; None where there is none to compare with.
        progress: opens a progress bar.
        fused: a graph as it is run while it is measured; see `Pipeline.fused`.
    """

    measure: Measure = field(default=lambda model, requests: _no_calibration())
    search: Sequence[Feed] = ()
    reference: Callable[[], list[dict[str, Array]]] = field(default=lambda: _no_reference())
    float_model: ir.Model | None = None
    progress: Progress = silent
    fused: Fused = field(default=lambda model: model)


class Pass(Protocol):
    """One graph transformation; a frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[Fact]]
    provides: ClassVar[frozenset[Fact]]
    contract: ClassVar[Contract]

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Edit `model` in place and say what was done."""


@dataclass(frozen=True)
class Pipeline:
    """The passes of a recipe, by stage.

    Attributes:
        normalize: bring any graph into normal form; the function stays.
        transform: tame activations; the function stays.
        quantize: round weights and activations, in QDQ form.
        lower: write what the target runs; the function stays.
        fuse: write what this machine runs fastest, of copies that are run to measure something; the function stays, and
            so do the names of the values between layers.
    """

    normalize: tuple[Pass, ...]
    transform: tuple[Pass, ...]
    quantize: tuple[Pass, ...]
    lower: tuple[Pass, ...]
    fuse: tuple[Pass, ...] = ()

    def fused(self, model: ir.Model) -> ir.Model:
        """A copy of a graph, fused: a measurement runs it as it is no part of the result."""
        copy = model.clone()
        for entry in self.fuse:
            entry.run(copy, Context())
        return copy


def select(patterns: Sequence[str], names: Iterable[str], *, what: str) -> frozenset[str]:
    """The names that any of the regular expressions is found in; a merged layer has those of its parts too.

    Args:
        patterns: regular expressions, searched anywhere in a name.
        names: the names to choose from.
        what: what the patterns are for, such as `exclude`; used in the error.

    Raises:
        PatternError: a pattern is not a regular expression, or matches nothing.
    """
    names = list(names)
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            matched = {name for name in names if matches(pattern, name)}
        except re.error as error:
            raise PatternError(
                f"it is not a regular expression ({error})",
                where=f"{what} pattern {pattern!r}",
                remedy="escape special characters with a backslash",
            ) from error
        if not matched:
            raise PatternError(
                f"it matches none of the {len(names)} linear layers",
                where=f"{what} pattern {pattern!r}",
                remedy=f"`scalefold inspect` lists their names, such as {', '.join(names[:2]) or 'none'}",
            )
        chosen |= matched
    return frozenset(chosen)


def refusals(names: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> dict[str, str]:
    """The layers that a recipe leaves in float, each with the reason.

    Args:
        names: all linear layers.
        include: patterns of layers to quantize; all when empty.
        exclude: patterns of layers to leave.

    Raises:
        PatternError: a pattern is not a regular expression, or matches nothing.
    """
    included = select(include, names, what="include") if include else frozenset(names)
    excluded = select(exclude, names, what="exclude")
    left = {name: "not included by the recipe" for name in names if name not in included}
    return left | dict.fromkeys(sorted(excluded), "excluded by the recipe")


def missing_facts(candidate: Pass, model: ir.Model) -> Iterator[Fact]:
    """The facts that a pass requires and `model` does not have."""
    return (fact for fact in sorted(candidate.requires, key=lambda fact: fact.name) if not fact.holds(model))


def _no_reference() -> list[dict[str, Array]]:
    _no_calibration()
    return []


def _no_calibration() -> dict[str, Statistic]:
    raise CalibrationError(
        "this recipe needs calibration samples and there are none",
        where="calibration",
        remedy="give --calibration, or a model with a tokenizer so that the default text can be used",
    )
