"""Running a graph piece by piece over a few feeds, so that each layer sees the work of the layers before it.

A search needs the activations at one layer as they are when every earlier layer is quantized already. Running the whole
graph for each layer costs the square of the depth; a walk runs every node once and keeps only the values that nodes
still to come will read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from scalefold.compiler import graph
from scalefold.compiler.errors import GraphError
from scalefold.compiler.runtime import Array, Feed, Session


class Walk:
    """A run of a graph over a few feeds, advanced value by value.

    The graph may be edited on the way as long as what has been run already is left alone, or its values are set anew.

    Args:
        model: the graph.
        feeds: the samples; all their live values are held, so keep them few.
    """

    def __init__(self, model: ir.Model, feeds: Sequence[Feed]) -> None:
        self._model = model
        self._feeds = feeds
        self._done: set[ir.Node] = set()
        self._live: dict[ir.Value, list[Array]] = {
            value: [feed[value.name or ""] for feed in feeds]
            for value in model.graph.inputs
            if all(value.name in feed for feed in feeds)
        }
        self._seen_by: dict[tuple[ir.Value, ir.Node], ir.Value] = {}
        self._weights: dict[ir.Value, Array] = {}

    def value(self, wanted: ir.Value) -> list[Array]:
        """The arrays of a value, one per feed; runs what is still missing for it."""
        if wanted not in self._live:
            pending = graph.ancestors(wanted, lambda value: value in self._live)
            self._run([node for node in self._model.graph if node in pending])
        return self._live[wanted]

    def set_value(self, value: ir.Value, arrays: list[Array]) -> None:
        """What every later reader of `value` sees."""
        self._live[value] = arrays

    def set_input(self, node: ir.Node, value: ir.Value, arrays: list[Array]) -> None:
        """What `node` alone sees in place of `value`."""
        stand_in = ir.Value(name=f"{value.name}.for.{node.name}", type=value.type)
        self._seen_by[value, node] = stand_in
        self._live[stand_in] = arrays

    def set_weight(self, initializer: ir.Value, array: Array) -> None:
        """What the walk uses in place of a constant; the graph itself keeps its own."""
        self._weights[initializer] = array

    def piece(
        self,
        selected: Sequence[ir.Node],
        free: Sequence[ir.Value],
        end: ir.Value,
        *,
        fused: Callable[[ir.Model], ir.Model] | None = None,
    ) -> tuple[Session, list[dict[str, Array]]]:
        """A session of some nodes, to be run again and again with other arrays for its free values.

        Args:
            selected: the nodes, in graph order.
            free: activations that the caller feeds, under their own names; float32 where the graph does not say.
            end: the output.
            fused: writes the nodes in another form, their inputs and output kept. It is shown what masks and tables of
                positions are made of, too, which are computed once all the same.

        Returns:
            the session, and for each feed the arrays of its other inputs.
        """
        if fused is not None:
            model, feeds = self._cut(selected, free, end)
            model = fused(model)
            names = {value.name for value in free}
            free, end = [value for value in model.graph.inputs if value.name in names], model.graph.outputs[0]
            behind = {node for value in free for node in graph.descendants(value)}
            return Walk(model, feeds).piece([node for node in model.graph if node in behind], free, end)
        given = {entry.name or "": self.value(entry) for entry in _outer(selected, free)}
        piece, _ = self._extract(selected, set(free), [end], redirect=False)
        return Session(piece), [
            {name: arrays[index] for name, arrays in given.items()} for index in range(len(self._feeds))
        ]

    def _cut(self, selected: Sequence[ir.Node], free: Sequence[ir.Value], end: ir.Value) -> tuple[ir.Model, list[Feed]]:
        """Some nodes, with those of their other inputs that no layer is behind, and what feeds the rest of these."""
        chosen = set(selected)
        given: dict[ir.Value, list[Array]] = {}
        for entry in _outer(selected, free):
            behind = graph.ancestors(entry, lambda _: False)
            if any(graph.linear_at(node) is not None for node in behind):
                given[entry] = self.value(entry)
            else:
                chosen |= behind
        model, inputs = self._extract(
            [node for node in self._model.graph if node in chosen], {*free, *given}, [end], redirect=False
        )
        others = {name: value for name, value in inputs.items() if value not in free}
        return model, [
            {name: given[value][index] if value in given else feed[name] for name, value in others.items()}
            for index, feed in enumerate(self._feeds)
        ]

    def _run(self, pending: list[ir.Node]) -> None:
        if not pending:
            return
        chosen = set(pending)
        self._done |= chosen
        wanted = [
            out
            for node in pending
            for out in node.outputs
            if out.name and (out.is_graph_output() or any(use.node not in self._done for use in out.uses()))
        ]
        piece, inputs = self._extract(pending, set(), wanted, redirect=True)
        session = Session(piece)
        results = [
            session.run({name: self._live[value][index] for name, value in inputs.items()})
            for index in range(len(self._feeds))
        ]
        for value in wanted:
            self._live[value] = [result[value.name or ""] for result in results]
        self._forget()

    def _forget(self) -> None:
        """Drop the values and weights that no node still to come reads."""
        for (value, node), stand_in in list(self._seen_by.items()):
            if node in self._done:
                del self._live[stand_in], self._seen_by[value, node]
        kept = set(self._seen_by.values())
        for value in list(self._live):
            readers = [use.node for use in value.uses()]
            if readers and value not in kept and not value.is_graph_output() and self._done.issuperset(readers):
                del self._live[value]
        for weight in list(self._weights):
            if self._done.issuperset(use.node for use in weight.uses()):
                del self._weights[weight]

    def _type_of(self, value: ir.Value) -> ir.TypeProtocol | None:
        """A value's type; foreign graphs may not say it, and then the arrays do."""
        arrays = self._live.get(value)
        if arrays:
            return ir.TensorType(ir.DataType.from_numpy(arrays[0].dtype))
        return value.type or ir.TensorType(ir.DataType.FLOAT)

    def _extract(
        self, selected: Sequence[ir.Node], free: set[ir.Value], outputs: Sequence[ir.Value], *, redirect: bool
    ) -> tuple[ir.Model, Mapping[str, ir.Value]]:
        """The selected nodes as a model of their own, and its inputs by name."""
        copies: dict[ir.Value, ir.Value] = {}
        inputs: dict[str, ir.Value] = {}
        constants: list[ir.Value] = []

        def copy_of(value: ir.Value | None, node: ir.Node) -> ir.Value | None:
            if value is None:
                return None
            source = self._seen_by.get((value, node), value) if redirect else value
            if source not in copies:
                copies[source] = copied = ir.Value(name=source.name, type=self._type_of(source), shape=source.shape)
                if source.is_initializer() and source not in free:
                    array = self._weights.get(source)
                    copied.const_value = source.const_value if array is None else ir.tensor(array, name=source.name)
                    constants.append(copied)
                else:
                    inputs[source.name or ""] = source
            return copies[source]

        nodes = []
        for node in selected:
            if graph.captured(node):
                raise GraphError(
                    f"its branches read values from outside, and an {node.op_type} cannot be run on its own then",
                    where=node.name or node.op_type,
                    remedy="let a simplifier decide the condition, or take a recipe without migration such as w8a8-naive",
                )
            entries = [copy_of(entry, node) for entry in node.inputs]
            outs = [ir.Value(name=out.name, type=out.type, shape=out.shape) for out in node.outputs]
            copies.update(zip(node.outputs, outs, strict=True))
            nodes.append(
                ir.Node(
                    node.domain, node.op_type, entries, list(node.attributes.values()), outputs=outs, name=node.name
                )
            )
        piece = ir.Graph(
            [copies[value] for value in inputs.values()],
            [copies[value] for value in outputs],
            nodes=nodes,
            initializers=constants,
            opset_imports=dict(self._model.graph.opset_imports),
            name="piece",
        )
        model = ir.Model(piece, ir_version=self._model.ir_version, functions=list(self._model.functions.values()))
        return model, inputs


def _outer(selected: Sequence[ir.Node], free: Sequence[ir.Value]) -> set[ir.Value]:
    """What some nodes read besides constants, values of their own and free ones."""
    known = {out for node in selected for out in node.outputs} | set(free)
    entries = {entry for node in selected for entry in node.inputs if entry is not None}
    return {entry for entry in entries - known if not entry.is_initializer()}
