"""Give every linear layer the name its module has in the source model."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.facts import Fact
from scalefold.compiler.protocol import Context, Contract, Event, PassResult

SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class NameLayers:
    """Name the MatMul of each linear layer after its module, and its constants after the layer.

    before:  node_MatMul_69(x, val_69)
    after:   encoder.layer.0.attention.self.query(x, encoder.layer.0.attention.self.query.weight)

    The module path comes from, in this order: the exporter's node metadata; the names of the bias and the weight; the
    node name that the TorchScript exporter gives (`/encoder/layer.0/.../MatMul`). Names are made unique by a number.
    """

    name: ClassVar[str] = "name-layers"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.NORMAL_FORM})
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.NAMED_LAYERS})
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Name every layer; nothing is declined."""
        rewrites = []
        taken: set[str] = set()
        for index, layer in enumerate(graph.linear_layers(model)):
            name = _unique(_module_path(layer) or f"linear.{index}", taken)
            taken.add(name)
            renamed = _rename(model, layer.weight, f"{name}.weight")
            if layer.bias is not None:
                renamed = _rename(model, layer.bias, f"{name}.bias") or renamed
            if layer.matmul.name != name or renamed:
                layer.matmul.name = name
                rewrites.append(Event(layer.matmul, "named after its module"))
        return PassResult(tuple(rewrites))


def _rename(model: ir.Model, value: ir.Value, name: str) -> bool:
    """Rename a constant that one node reads; a shared one keeps the name of its first reader."""
    if value.name == name or len(value.uses()) != 1 or name in model.graph.initializers:
        return False
    value.name = name
    if value.const_value is not None:
        value.const_value.name = name
    return True


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}.{count}"
    return candidate


def _module_path(layer: graph.Linear) -> str | None:
    scopes = layer.matmul.metadata_props.get(SCOPES)
    if scopes:
        path = ast.literal_eval(scopes)
        if len(path) >= 2 and path[-2]:
            return str(path[-2])
    for value in (layer.bias, layer.weight):
        if value is not None and (match := re.fullmatch(r"(.+)\.(?:weight|bias)", value.name or "")):
            return match[1]
    node = layer.matmul.name or ""
    if node.startswith("/"):
        return re.sub(r"/(MatMul|Gemm)(_\d+)?$", "", node).strip("/").replace("/", ".")
    return node or None
