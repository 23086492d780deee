"""Bring every linear layer into the normal form MatMul(x, W[K, N]) + b[N]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.facts import Fact
from scalefold.compiler.protocol import Context, Contract, Event, PassResult


@dataclass(frozen=True)
class NormalizeLinear:
    """Write Gemm with a constant weight, and MatMul with a transposed constant, as MatMul and Add.

    before:  y = Gemm(x, B, c; alpha, beta, transB)          y = MatMul(x, Transpose(B))
    after:   y = Add(MatMul(x, alpha * B or B^T), beta * c)   y = MatMul(x, B^T)

    x is [M, K] for Gemm, [..., K] for MatMul; W becomes [K, N], so that output columns are the last axis.
    """

    name: ClassVar[str] = "normalize-linear"
    requires: ClassVar[frozenset[Fact]] = frozenset()
    provides: ClassVar[frozenset[Fact]] = frozenset({Fact.NORMAL_FORM})
    contract: ClassVar[Contract] = Contract.REASSOCIATED

    def run(self, model: ir.Model, ctx: Context) -> PassResult:
        """Rewrite each such layer; decline a Gemm that is not a linear layer."""
        rewrites, declined = [], []
        for node in graph.nodes(model, "Gemm", "MatMul"):
            if node.op_type == "MatMul":
                if _untranspose(model, node):
                    rewrites.append(Event(node, "transposed constant"))
            elif reason := graph.gemm_obstacle(node):
                declined.append(Event(node, reason))
            else:
                rewrites.append(Event(_split(model, node), "Gemm"))
        if rewrites:
            graph.sweep(model)
        return PassResult(tuple(rewrites), tuple(declined))


def _untranspose(model: ir.Model, matmul: ir.Node) -> bool:
    transpose = graph.producer(matmul.inputs[1], "Transpose")
    source = transpose.inputs[0] if transpose is not None else None
    array = graph.constant(source)
    if transpose is None or source is None or array is None or array.ndim != 2:
        return False
    if graph.attribute(transpose, "perm", (1, 0)) != (1, 0):
        return False
    graph.replace_constant(model, matmul, 1, f"{source.name}_transposed", array.T)
    return True


def _split(model: ir.Model, gemm: ir.Node) -> ir.Node:
    x, source = gemm.inputs[0], gemm.inputs[1]
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    assert source is not None
    weight = np.asarray(graph.constant(source), dtype=np.float32)
    alpha, beta = graph.attribute(gemm, "alpha", 1.0), graph.attribute(gemm, "beta", 1.0)
    assert isinstance(alpha, float) and isinstance(beta, float)
    if graph.attribute(gemm, "transB", 0) or alpha != 1.0:
        oriented = weight.T if graph.attribute(gemm, "transB", 0) else weight
        scaled = np.asarray(oriented * np.float32(alpha) if alpha != 1.0 else oriented, dtype=np.float32)
        source = graph.add_initializer(model, f"{source.name}_columns", scaled)
    columns = graph.whole_shape(source)[1]
    matmul = ir.node("MatMul", [x, source], name=gemm.name, metadata_props=dict(gemm.metadata_props))
    new = [matmul]
    end = gemm.outputs[0]
    if bias is not None:
        array = np.asarray(graph.constant(bias), dtype=np.float32) * np.float32(beta)
        fits = array.shape == (columns,)
        array = np.broadcast_to(array.reshape(-1), (columns,))
        vector = bias if beta == 1.0 and fits else graph.add_initializer(model, f"{bias.name}_vector", np.array(array))
        add = ir.node("Add", [matmul.outputs[0], vector], name=f"{gemm.name}_bias")
        graph.like(matmul.outputs[0], end)
        new.append(add)
    graph.insert_after(gemm, new)
    name = end.name
    graph.like(new[-1].outputs[0], end)
    graph.bypass(end, new[-1].outputs[0])
    end.name, new[-1].outputs[0].name = f"{name}_gemm", name
    return matmul
