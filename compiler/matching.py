"""Which node of one graph is which node of another, by what they compute and not by their names."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping

from scalefold.compiler.canonical import SPELLED_OUT_INTEGERS, Constant, Edge, Form, Port, Slot, Vertex

Keys = Mapping[Vertex, str]
STEPS = 3
"""How far around a node its surroundings are looked at."""


class Matching:
    """A one-to-one relation between the nodes of two graphs, found in steps from certain to likely.

    1. Equal hash of everything a node is computed from, and of everything computed from it (Merkle hashes from the inputs
       and from the outputs, as of Weisfeiler and Lehman): untouched parts of the graph.
    2. Equal hash of one of the two: what lies before, and what lies behind, a change.
    3. The same by structure alone, without the values of constants and attributes.
    4. Constants that occur once in each graph; then the neighbours of what is matched, as long as operators agree; then
       equal surroundings, which start the neighbours off again between two changes.

    Args:
        first: one graph.
        second: the other.
    """

    def __init__(self, first: Form, second: Form) -> None:
        self.first = first
        self.second = second
        self.inputs = pair_up([entry.name for entry in first.inputs], [entry.name for entry in second.inputs])
        self.outputs = pair_up([entry.name for entry in first.outputs], [entry.name for entry in second.outputs])
        self.forward: dict[Vertex, Vertex] = {}
        self.backward: dict[Vertex, Vertex] = {}
        self._around = [left | right for left, right in zip(_surroundings(first), _surroundings(second), strict=True)]
        exact = self._around[0]
        self._loose = {vertex: _loose_label(vertex) for vertex in exact}
        self._by_hashes(*self._hashes(exact))
        self._by_hashes(*self._hashes(self._loose))
        self._by_unique({vertex: label if _is_rare(vertex) else "" for vertex, label in exact.items()})
        self._grow()
        for keys in self._around[:0:-1]:
            self._by_unique(keys)
            self._grow()

    def _hashes(self, label: Keys) -> tuple[tuple[Keys, Keys], tuple[Keys, Keys]]:
        """For each graph the hash of every node from the inputs, and from the outputs."""
        inputs = {place: f"in{index}" for index, (place, _) in enumerate(self.inputs)}
        twins = {place: f"in{index}" for index, (_, place) in enumerate(self.inputs)}
        outputs = {place: f"out{index}" for index, (place, _) in enumerate(self.outputs)}
        twin_outputs = {place: f"out{index}" for index, (_, place) in enumerate(self.outputs)}
        return (
            (_from_inputs(self.first, label, inputs), _from_outputs(self.first, label, outputs)),
            (_from_inputs(self.second, label, twins), _from_outputs(self.second, label, twin_outputs)),
        )

    def _by_hashes(self, mine: tuple[Keys, Keys], theirs: tuple[Keys, Keys]) -> None:
        (before, behind), (their_before, their_behind) = mine, theirs
        both = {vertex: before[vertex] + behind[vertex] for vertex in before}
        their_both = {vertex: their_before[vertex] + their_behind[vertex] for vertex in their_before}
        onward, back = self.first.vertices, self.first.vertices[::-1]
        self._by_key(both, their_both, onward, self._sources_agree)
        self._by_key(before, their_before, onward, self._sources_agree)
        self._by_key(behind, their_behind, back, self._readers_agree)

    def _by_key(
        self, mine: Keys, theirs: Keys, order: Iterable[Vertex], agree: Callable[[Vertex, Vertex], bool]
    ) -> None:
        """Match nodes of equal key; among several take the one whose neighbours are matched to each other."""
        candidates: dict[str, list[Vertex]] = defaultdict(list)
        for vertex in self.second.vertices:
            if vertex not in self.backward and theirs[vertex]:
                candidates[theirs[vertex]].append(vertex)
        undecided = []
        for vertex in order:
            if vertex in self.forward or mine[vertex] not in candidates:
                continue
            free = candidates[mine[vertex]]
            fitting = [entry for entry in free if agree(vertex, entry)]
            if not fitting:
                undecided.append(vertex)
                continue
            twin = max(fitting, key=lambda entry: self._likeness(vertex, entry)) if len(fitting) > 1 else fitting[0]
            free.remove(twin)
            self._match(vertex, twin)
        for vertex in undecided:
            if free := candidates[mine[vertex]]:
                twin = max(free, key=lambda entry: (self._agreement(vertex, entry), self._likeness(vertex, entry)))
                free.remove(twin)
                self._match(vertex, twin)

    def _by_unique(self, keys: Keys) -> None:
        """Match nodes whose key occurs once in each graph, empty keys aside."""
        mine = [vertex for vertex in self.first.vertices if vertex not in self.forward]
        theirs = [vertex for vertex in self.second.vertices if vertex not in self.backward]
        counts = Counter(keys[vertex] for vertex in mine), Counter(keys[vertex] for vertex in theirs)
        once = {keys[vertex]: vertex for vertex in theirs if counts[1][keys[vertex]] == 1}
        for vertex in mine:
            key = keys[vertex]
            if key and counts[0][key] == 1 and key in once:
                self._match(vertex, once[key])

    def _grow(self) -> None:
        """Match the neighbours of matched nodes: first those that are alike but for values, then by operator alone."""
        operators = {vertex: vertex.op for vertex in self._loose}
        for label in (self._around[0], self._loose, operators):
            pending = list(self.forward.items())
            while pending:
                vertex, twin = pending.pop()
                for near, other in (*_paired_sources(vertex, twin), *_paired_readers(self, vertex, twin)):
                    if near not in self.forward and other not in self.backward and label[near] == label[other]:
                        self._match(near, other)
                        pending.append((near, other))

    def join(self, ends: Iterable[tuple[Vertex, Vertex]], starts: Iterable[tuple[Vertex, Vertex]]) -> None:
        """Go on from what stands for each other without being the same operator.

        Args:
            ends: nodes whose readers belong together.
            starts: nodes in front of such a pair, which belong together where their operators agree.
        """
        near = [pair for end, twin in ends for pair in _paired_readers(self, end, twin)]
        near += [(start, twin) for start, twin in starts if start.op == twin.op]
        for vertex, twin in near:
            if vertex not in self.forward and twin not in self.backward:
                self._match(vertex, twin)
        self._grow()

    def _match(self, vertex: Vertex, twin: Vertex) -> None:
        self.forward[vertex] = twin
        self.backward[twin] = vertex

    def _agreement(self, vertex: Vertex, twin: Vertex) -> int:
        """How many neighbours of two nodes are matched to each other."""
        theirs = {*twin.sources, *(reader for reader, _, _ in twin.readers)}
        mine = [*vertex.sources, *(reader for reader, _, _ in vertex.readers)]
        return sum(self.forward.get(near) in theirs for near in mine)

    def _likeness(self, vertex: Vertex, twin: Vertex) -> int:
        """How far around two nodes everything is equal, constants included, in steps."""
        return sum(keys[vertex] == keys[twin] for keys in self._around)

    def _sources_agree(self, vertex: Vertex, twin: Vertex) -> bool:
        mine = [self.forward.get(source) for source in vertex.sources]
        theirs = list(twin.sources)
        return mine == theirs or (vertex.commutative and mine == theirs[::-1])

    def _readers_agree(self, vertex: Vertex, twin: Vertex) -> bool:
        theirs = {reader for reader, _, _ in twin.readers}
        return all(self.forward.get(reader) in theirs for reader, _, _ in vertex.readers)


def pair_up(first: list[str], second: list[str]) -> list[tuple[int, int]]:
    """The places of two lists that belong together: by name, and what is left over in order."""
    known = {name: index for index, name in enumerate(second)}
    named = [(index, known[name]) for index, name in enumerate(first) if name in known]
    left = sorted(set(range(len(first))) - {index for index, _ in named})
    right = sorted(set(range(len(second))) - {index for _, index in named})
    return named + list(zip(left, right, strict=False))


def _hash(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=12).hexdigest()


def _exact_label(vertex: Vertex) -> str:
    """Operator, attributes and constants by value."""
    slots = [slot.digest if isinstance(slot, Constant) else _kind(slot) for slot in vertex.slots]
    return _hash(vertex.op, vertex.attributes, sorted(slots) if vertex.commutative else slots)


def _loose_label(vertex: Vertex) -> str:
    """Operator, and which inputs are constants."""
    slots = [_kind(slot) for slot in vertex.slots]
    return _hash(vertex.op, sorted(slots) if vertex.commutative else slots)


def _is_rare(vertex: Vertex) -> bool:
    """Whether a node reads a large constant, which tells it from others."""
    return any(isinstance(slot, Constant) and slot.size > SPELLED_OUT_INTEGERS for slot in vertex.slots)


def _kind(slot: Slot) -> str:
    return type(slot).__name__


def _from_inputs(form: Form, label: Keys, ports: Mapping[int, str]) -> dict[Vertex, str]:
    """A hash of each node and of all that it is computed from; empty for what follows from constants alone.

    Many weights are read through equal operators: what they are computed from would not tell them apart.
    """
    found: dict[Vertex, str] = {}
    fed: set[Vertex] = set()
    for vertex in form.vertices:
        if any(isinstance(slot, Port) or (isinstance(slot, Edge) and slot.vertex in fed) for slot in vertex.slots):
            fed.add(vertex)
        read = []
        for slot in vertex.slots:
            if isinstance(slot, Edge):
                read.append(f"{found[slot.vertex]}:{slot.output}")
            else:
                read.append(ports.get(slot.index, "new") if isinstance(slot, Port) else "")
        found[vertex] = _hash(label[vertex], sorted(read) if vertex.commutative else read)
    return {vertex: key if vertex in fed else "" for vertex, key in found.items()}


def _from_outputs(form: Form, label: Keys, names: Mapping[int, str]) -> dict[Vertex, str]:
    """A hash of each node and of all that is computed from it."""
    found: dict[Vertex, str] = {}
    for vertex in reversed(form.vertices):
        uses = [
            f"{-1 if reader.commutative else slot}:{output}:{found[reader]}" for reader, slot, output in vertex.readers
        ]
        ends = [f"{output}:{names.get(index, 'new')}" for index, output in vertex.results]
        found[vertex] = _hash(label[vertex], sorted(uses), sorted(ends))
    return found


def _surroundings(form: Form) -> list[dict[Vertex, str]]:
    """A hash of each node's neighbourhood of 0, 1 ... steps, operators and constants included."""
    found = [{vertex: _exact_label(vertex) for vertex in form.vertices}]
    for _ in range(STEPS):
        last = found[-1]
        found.append({})
        for vertex, label in last.items():
            read = [last[slot.vertex] if isinstance(slot, Edge) else "" for slot in vertex.slots]
            uses = sorted(f"{-1 if reader.commutative else slot}:{last[reader]}" for reader, slot, _ in vertex.readers)
            found[-1][vertex] = _hash(label, sorted(read) if vertex.commutative else read, uses)
    return found


def _paired_sources(vertex: Vertex, twin: Vertex) -> list[tuple[Vertex, Vertex]]:
    """The nodes that two matched nodes read in the same place."""
    return [
        (mine.vertex, theirs.vertex)
        for mine, theirs in zip(vertex.slots, twin.slots, strict=False)
        if isinstance(mine, Edge) and isinstance(theirs, Edge) and mine.output == theirs.output
    ]


def _paired_readers(matching: Matching, vertex: Vertex, twin: Vertex) -> list[tuple[Vertex, Vertex]]:
    """The unmatched nodes that read two matched nodes in the same way and are the only ones to do so."""
    mine = _only_readers(vertex, matching.forward)
    theirs = _only_readers(twin, matching.backward)
    return [(reader, theirs[use]) for use, reader in mine.items() if use in theirs]


def _only_readers(vertex: Vertex, matched: Mapping[Vertex, Vertex]) -> dict[tuple[str, int, int], Vertex]:
    uses: dict[tuple[str, int, int], list[Vertex]] = defaultdict(list)
    for reader, slot, output in vertex.readers:
        if reader not in matched:
            uses[reader.op, -1 if reader.commutative else slot, output].append(reader)
    return {use: readers[0] for use, readers in uses.items() if len(readers) == 1}
