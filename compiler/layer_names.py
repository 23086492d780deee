"""Names of linear layers: what a merged layer is called, and which patterns find it."""

from __future__ import annotations

import re
from collections.abc import Sequence

JOINT = "+"


def joined(names: Sequence[str]) -> str | None:
    """What the layers of one module are called together, such as `mlp.gate_proj+up_proj`; None for layers of several.

    Args:
        names: of the layers, in the order of their columns.
    """
    parents = {name.rpartition(".")[0] for name in names}
    if len(parents) > 1 or any(JOINT in name for name in names):
        return None
    first, *others = names
    return JOINT.join([first, *(name.rpartition(".")[2] for name in others)])


def parts(name: str) -> tuple[str, ...]:
    """The names that a layer's was joined from; its own where it is no joint one."""
    first, *others = name.split(JOINT)
    parent, dot, _ = first.rpartition(".")
    return (first, *(f"{parent}{dot}{other}" for other in others))


def matches(pattern: str, name: str) -> bool:
    """Whether a regular expression is found in a layer's name, or in one that it was joined from.

    Raises:
        re.error: the pattern is not a regular expression.
    """
    return any(re.search(pattern, candidate) for candidate in {name, *parts(name)})
