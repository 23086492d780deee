from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import scipy.optimize

from scalefold.compiler import choice_solver
from scalefold.compiler.choice_solver import Option, Quantity, front, least, solve, solve_twice, total
from scalefold.compiler.errors import SourceError


def made_up(seed: int, count: int = 7, options: int = 4) -> list[list[Option]]:
    """Items whose error falls as bytes grow, and whose seconds have little to do with either."""
    rng = np.random.default_rng(seed)
    scale = 10 ** rng.uniform(-5, -2, count)
    bits = np.array([3, 4, 6, 8])[:options]
    return [
        [
            Option(float(scale[item] * 4.0**-b * rng.uniform(0.5, 2)), float(b * 1000 * (item + 1)), rng.uniform(1, 3))
            for b in bits
        ]
        for item in range(count)
    ]


def every(items: Sequence[Sequence[Option]]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(options)) for options in items)))


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_better_by_trying_everything(seed: int) -> None:
    items = made_up(seed)
    answers = every(items)
    budget = float(np.median([total(items, picked, "error") for picked in answers]))
    size = float(np.median([total(items, picked, "bytes") for picked in answers]))
    programs: list[tuple[Quantity, Quantity, float]] = [
        ("bytes", "error", budget),
        ("error", "bytes", size),
        ("error", "seconds", 13.0),
    ]
    for minimise, limited, most in programs:
        found = solve(items, minimise, {limited: most})
        assert found is not None
        assert total(items, found, limited) <= most
        fits = [picked for picked in answers if total(items, picked, limited) <= most]
        best = min(total(items, picked, minimise) for picked in fits)
        assert total(items, found, minimise) <= best * (1 + 2e-4)


def test_two_limits_hold_at_once() -> None:
    items = made_up(5)
    found = solve(items, "error", {"bytes": 150_000, "seconds": 13})
    assert found is not None
    assert total(items, found, "bytes") <= 150_000 and total(items, found, "seconds") <= 13


def test_the_second_wish_costs_little_of_the_first() -> None:
    items = made_up(6)
    budget = 1.5 * least(items, "error")
    alone, both = solve(items, "bytes", {"error": budget}), solve_twice(items, "bytes", "seconds", {"error": budget})
    assert alone is not None and both is not None
    assert total(items, both, "bytes") <= total(items, alone, "bytes") * 1.0101
    assert total(items, both, "seconds") <= total(items, alone, "seconds")
    assert total(items, both, "error") <= budget


def test_what_cannot_be_met_has_no_answer() -> None:
    items = made_up(7)
    assert solve(items, "bytes", {"error": 0.9 * least(items, "error")}) is None
    assert solve(items, "error", {"bytes": 0}) is None
    assert solve_twice(items, "error", "seconds", {"bytes": 0.9 * least(items, "bytes")}) is None


def test_options_without_any_error_can_be_chosen_at_a_limit_of_none() -> None:
    items = [[Option(0.0, 8, 1), Option(1e-9, 4, 1)], [Option(0.0, 8, 1), Option(0.0, 4, 1)]]
    assert solve(items, "bytes", {"error": 0.0}) == [0, 1]


def test_the_front_goes_from_the_closest_to_the_smallest_and_holds_nothing_that_is_beaten() -> None:
    items = made_up(8, count=12)
    found = front(items, 6)
    errors, sizes = ([total(items, picked, name) for picked in found] for name in ("error", "bytes"))
    assert len(found) >= 4
    assert errors == sorted(errors) and sizes == sorted(sizes, reverse=True)
    assert errors[0] == pytest.approx(least(items, "error"), rel=0.011)
    assert sizes[-1] == pytest.approx(least(items, "bytes"), rel=0.011)


def test_a_missing_scipy_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(SourceError, match=r"needs the package scipy.*pip install 'scalefold\[auto\]'"):
        choice_solver.require_solver()


def test_what_the_solver_prints_past_python_is_not_heard(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    items = made_up(1)
    wanted = solve(items, "error", {})
    milp = scipy.optimize.milp

    def loud(*arguments: Any, **options: Any) -> Any:
        ctypes.CDLL(None).printf(b"HighsMipSolverData::transformNewIntegerFeasibleSolution\n")
        return milp(*arguments, **options)

    monkeypatch.setattr(scipy.optimize, "milp", loud)
    assert solve(items, "error", {}) == wanted
    ctypes.CDLL(None).fflush(None)
    os.write(1, b"heard again")
    assert capfd.readouterr().out == "heard again"
