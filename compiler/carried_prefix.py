"""Letting whoever holds a decoder's cache hold its prefix in it, instead of joining and cutting it in every step."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from scalefold.compiler.decoder import cache_pairs

JOIN, CUT = "Concat", "Slice"


@dataclass(frozen=True)
class _Cache:
    """The cache of one layer's keys or values: names of what it is on its way in and out.

    Attributes:
        past: the graph's input [B,H,P,D].
        prefix: what is joined in front of it [B,H,n,D].
        whole: both [B,H,n+P,D].
        grown: what attention gives back [B,H,n+P+S,D].
        present: the graph's output [B,H,P+S,D].
    """

    past: str
    prefix: str
    whole: str
    grown: str
    present: str


def carry_prefix(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """Let the cache of a decoder hold the prefix that bake-prefix put into the graph, all layers' or none.

    before:  whole = Concat(prefix, past);  grown = Attention(.., whole);  present = Slice(grown, n:)
    after:   grown = Attention(.., past)                 past [B,H,n+P,D] and grown [B,H,n+P+S,D] are the input and output

    Two nodes fewer for the keys of a layer and two for its values, and two copies of the cache fewer in every step. Masks
    and positions are as before: they are those of the tokens that the caller knows of. Done to the message that a file
    holds, as `cut_logits` is, because it is the file's promise that nobody sees the prefix. Why: docs/decisions/0016.

    Args:
        model: a graph; left as it is where nothing is returned.

    Returns:
        the graph that makes the prefix, input_ids [B,S] -> `past` [B,H,n,D] each, named as the inputs of the cache; None
        where there is no prefix, or it is joined or cut in another way, as it is to a cache of 8 bits.
    """
    caches = _caches(model)
    if not caches:
        return None
    prefix = _prefix(model, caches)
    renamed = {cache.whole: cache.past for cache in caches} | {cache.grown: cache.present for cache in caches}
    gone = {cache.whole for cache in caches} | {cache.present for cache in caches}
    kept = [node for node in model.graph.node if not gone.intersection(node.output)]
    for node in kept:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    infos = [info for info in model.graph.value_info if info.name not in renamed]
    del model.graph.value_info[:]
    model.graph.value_info.extend(infos)
    named = {cache.past: "cached" for cache in caches} | {cache.present: "cached and new" for cache in caches}
    for value in (*model.graph.input, *model.graph.output):
        if value.name in named:
            # onnxruntime shares buffers of equal shape, and tells by the names of dimensions
            value.type.tensor_type.shape.dim[2].dim_param = named[value.name]
    return prefix


def _caches(model: onnx.ModelProto) -> list[_Cache]:
    """The caches that a prefix is joined to and cut from; none where that is not so of every one."""
    graph = model.graph
    made = {name: node for node in graph.node for name in node.output}
    read: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            read.setdefault(name, []).append(node)
    pairs = cache_pairs([value.name for value in graph.input], [value.name for value in graph.output])
    found = []
    for past, present in pairs.items():
        readers, cut = read.get(past, []), made.get(present)
        if len(readers) != 1 or cut is None or (readers[0].op_type, cut.op_type) != (JOIN, CUT):
            return []
        if len(readers[0].input) != 2 or readers[0].input[1] != past or read.get(present):
            return []
        found.append(_Cache(past, readers[0].input[0], readers[0].output[0], cut.input[0], present))
    return found


def _prefix(model: onnx.ModelProto, caches: list[_Cache]) -> onnx.ModelProto:
    """The part of a graph that makes the prefix of each cache for the batch of input_ids."""
    needed = {cache.prefix for cache in caches}
    nodes = []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(node.input)
    ports = {value.name: value for value in model.graph.input}
    named = [onnx.helper.make_node("Identity", [cache.prefix], [cache.past]) for cache in caches]
    outputs = [ports[cache.past] for cache in caches]
    constants = [constant for constant in model.graph.initializer if constant.name in needed]
    graph = onnx.helper.make_graph([*reversed(nodes), *named], "prefix", [ports["input_ids"]], outputs, constants)
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
