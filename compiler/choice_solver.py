"""One choice for every item, the best together: a multiple-choice knapsack, solved as an integer program."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import numpy as np
import numpy.typing as npt

from scalefold.compiler.errors import needing_packages

Quantity = Literal["error", "bytes", "seconds"]

SLACK = 0.01
"""How much of the best a second wish may cost."""

GAP = 1e-4
"""How far from the proven optimum an answer may be, relative to it."""

TOLERANCE = 1e-6
"""How far the solver may exceed a limit, relative to it; where it does, the limit is tightened by as much."""


@dataclass(frozen=True)
class Option:
    """What one choice costs.

    Attributes:
        error: what it adds to the error of the model.
        bytes: what it takes in the file.
        seconds: what it takes to run.
    """

    error: float
    bytes: float
    seconds: float


Items = Sequence[Sequence[Option]]


def require_solver() -> None:
    """Find scipy, whose HiGHS solves it, before anything is measured.

    Raises:
        SourceError: it is not installed.
    """
    with needing_packages("choosing by measurement", "pip install 'scalefold[auto]'"):
        import_module("scipy.optimize")


def total(items: Items, picked: Sequence[int], quantity: Quantity) -> float:
    """The sum of a quantity over the options picked."""
    return float(sum(getattr(options[index], quantity) for options, index in zip(items, picked, strict=True)))


def least(items: Items, quantity: Quantity) -> float:
    """The smallest sum of a quantity that there is."""
    return float(sum(min(getattr(option, quantity) for option in options) for options in items))


def solve(items: Items, minimise: Quantity, limits: Mapping[Quantity, float]) -> list[int] | None:
    """The option of each item with the least sum of one quantity, others within limits; None where there is none."""
    found = _program(items, minimise, limits, margin=0.0)
    if found is None or all(total(items, found, name) <= most for name, most in limits.items()):
        return found
    return _program(items, minimise, limits, margin=TOLERANCE)


def _program(items: Items, minimise: Quantity, limits: Mapping[Quantity, float], margin: float) -> list[int] | None:
    """Solve it by HiGHS.

    min c x   with   sum of x over an item's options = 1,   a x <= limit for each limited quantity,   x in {0, 1}
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    costs = _column(items, minimise)
    owner = np.repeat(np.arange(len(items)), [len(options) for options in items])
    one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(len(items), len(owner)))
    allowed = np.ones(len(owner))
    rows = [LinearConstraint(one_each, 1, 1)]
    for quantity, most in limits.items():
        column = _column(items, quantity)
        allowed[column > most] = 0
        if most > 0:
            rows.append(LinearConstraint(column[None] / most, -np.inf, 1 - margin))
    with _unheard():
        found = milp(
            costs / (least(items, minimise) or costs.max() or 1.0),
            constraints=rows,
            integrality=np.ones(len(owner)),
            bounds=Bounds(0, allowed),
            options={"mip_rel_gap": GAP},
        )
    if found.x is None:
        return None
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    return [int(np.argmax(part)) for part in np.split(found.x, starts[1:])]


@contextmanager
def _unheard() -> Iterator[None]:
    """Keep out of standard output what HiGHS prints there past Python, now and then: with `--json` others read it."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # it is closed: nobody hears anything
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        with suppress(OSError, AttributeError, TypeError):  # where the C library is not found by this name
            ctypes.CDLL(None).fflush(None)  # it keeps what was printed until later
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def solve_twice(items: Items, first: Quantity, then: Quantity, limits: Mapping[Quantity, float]) -> list[int] | None:
    """Of the answers within `SLACK` of the least sum of `first`, the one with the least sum of `then`."""
    best = solve(items, first, limits)
    if best is None:
        return None
    # The best is an answer to the second program too, however its limits are rounded.
    allowed = total(items, best, first) * (1 + SLACK)
    return solve(items, then, {**limits, first: allowed}) or best


def front(items: Items, count: int) -> list[list[int]]:
    """Answers from the least error to the least bytes, each the smallest at its error and then the fastest."""
    closest = solve_twice(items, "error", "bytes", {})
    smallest = solve_twice(items, "bytes", "error", {})
    assert closest is not None and smallest is not None
    low, high = (max(total(items, picked, "error"), 1e-30) for picked in (closest, smallest))
    budgets = np.geomspace(low, max(low, high), count)[1:-1]
    between = [solve_twice(items, "bytes", "seconds", {"error": float(budget)}) for budget in budgets]
    answers = [closest, *(picked for picked in between if picked is not None), smallest]
    return [picked for picked in answers if not any(_beats(items, other, picked) for other in answers)]


def _beats(items: Items, first: Sequence[int], second: Sequence[int]) -> bool:
    quantities: tuple[Quantity, ...] = ("error", "bytes", "seconds")
    pairs = [(total(items, first, quantity), total(items, second, quantity)) for quantity in quantities]
    return all(one <= other for one, other in pairs) and any(one < other for one, other in pairs)


def _column(items: Items, quantity: Quantity) -> npt.NDArray[np.float64]:
    return np.array([getattr(option, quantity) for options in items for option in options], dtype=np.float64)
