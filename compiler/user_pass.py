"""A pass of the user's own: a function of an `onnx_ir.Model` or an onnx-graphsurgeon `Graph`, by dotted name."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from scalefold.compiler.errors import GraphError, RecipeError
from scalefold.compiler.facts import Fact
from scalefold.compiler.protocol import Context, Contract, Event, PassResult

Takes = Literal["onnx_ir", "graphsurgeon"]
KINDS: dict[Takes, type] = {"onnx_ir": ir.Model, "graphsurgeon": gs.Graph}


@dataclass(frozen=True)
class UserPass:
    """Run a function over the graph.

    before:  any graph
    after:   function(graph); where it returns None, what it made of the graph in place

    Which of the two it takes is read from the annotation of its first parameter, where the recipe does not say. A
    graphsurgeon function gets all weights in memory, and loses the metadata of nodes, by which layers are named; so it
    belongs behind the normal form. Unless the recipe promises more, the function of the graph is taken to change: layers and
    outputs are from then on compared with what this pass left.

    Attributes:
        function: `package.module.function` or `package.module:function`.
        takes: what the function takes and returns; None reads its annotation.
    """

    name: ClassVar[str] = "user-pass"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset()
    contract: ClassVar[Contract] = Contract.LOSSY

    function: str
    takes: Takes | None = None

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Call the function and put its graph in the place of the old one."""
        function = _import(self.function)
        takes = self.takes or _kind_of(function, self.function)
        given = model if takes == "onnx_ir" else _surgeon(model)
        try:
            returned = function(given)
        except Exception as error:  # it is the user's code, and may raise anything
            raise GraphError(
                f"it failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})",
                where=f"user pass {self.function}",
                remedy="mend the function, or leave it out of the recipe",
            ) from error
        result = given if returned is None else returned
        if not isinstance(result, KINDS[takes]):
            raise GraphError(
                f"it returned a {type(result).__name__}, not a {KINDS[takes].__name__}",
                where=f"user pass {self.function}",
                remedy="return the graph, or None after a change in place",
            )
        _replace(model, result if isinstance(result, ir.Model) else ir.from_proto(gs.export_onnx(result)))
        return PassResult((Event(next(iter(model.graph)), f"by {self.function}"),))


@dataclass(frozen=True)
class ExactUserPass(UserPass):
    """A user pass that promises equal outputs, bit for bit."""

    contract: ClassVar[Contract] = Contract.EXACT


@dataclass(frozen=True)
class ReassociatedUserPass(UserPass):
    """A user pass that promises equal outputs up to the order of float operations."""

    contract: ClassVar[Contract] = Contract.REASSOCIATED


BY_CONTRACT: dict[str, type[UserPass]] = {
    entry.contract.name.lower(): entry for entry in (UserPass, ExactUserPass, ReassociatedUserPass)
}
"""The kind of user pass for each contract that a recipe can declare."""


def _import(name: str) -> Callable[[Any], Any]:
    module, _, function = name.replace(":", ".").rpartition(".")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # importing runs the user's module, which may raise anything
        raise RecipeError([f"user_passes: {name!r} cannot be imported ({error})"], where="the recipe") from error
    if not callable(found):
        raise RecipeError([f"user_passes: {name!r} is not a function"], where="the recipe")
    return typing.cast(Callable[[Any], Any], found)


def _kind_of(function: Callable[[Any], Any], name: str) -> Takes:
    """What a function takes, by the annotation of its first parameter."""
    parameters = list(inspect.signature(function).parameters)
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # imported for type checkers alone; or no plain function
        hints = {}
    found = hints.get(parameters[0]) if parameters else None
    for takes, kind in KINDS.items():
        if found is kind:
            return takes
    raise RecipeError(
        [
            f"user_passes: what {name!r} takes is not known; annotate its parameter, or say takes: onnx_ir or graphsurgeon"
        ],
        where="the recipe",
    )


def _surgeon(model: ir.Model) -> gs.Graph:
    """The model as an onnx-graphsurgeon graph, with its weights."""
    copy = model.clone()
    for value in copy.graph.initializers.values():
        if isinstance(
            value.const_value, ir.ExternalTensor
        ):  # protobuf would keep the file's name and forget its folder
            value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=value.name)
    return gs.import_onnx(ir.to_proto(copy))


def _replace(model: ir.Model, other: ir.Model) -> None:
    """Let `model`, which others hold on to, have the graph of `other`."""
    if other is not model:
        model.graph = other.graph
        model.functions.clear()
        model.functions.update(other.functions)
    ShapeInferencePass()(model)
