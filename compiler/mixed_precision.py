"""Mixed precision by measurement: for each layer the format and granularity that meet one target at the least cost."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import onnx_ir as ir

from scalefold.compiler import artifact, choice_solver, graph, layer_names
from scalefold.compiler.choice_solver import Option, Quantity, least, solve_twice, total
from scalefold.compiler.errors import SourceError
from scalefold.compiler.facts import Fact
from scalefold.compiler.layer_choices import Build, Candidates, Item, exactly, measured_options
from scalefold.compiler.output_error import OutputError
from scalefold.compiler.protocol import Context, Measure, Requests
from scalefold.compiler.recipe import Recipe, WeightFormat, WeightOverride, changed
from scalefold.compiler.runtime import Feed, Session
from scalefold.compiler.stats import Statistic, TokenRange

FRONT = 8
"""Points of the front that are asked for; those that another beats are left out."""

TRIALS = 8
"""Whole models that are measured at most on the way to a target."""

CLOSE = 0.95
"""A model whose error is above this share of the target has met it well enough for the search to end."""

SURE = 2.0
"""Standard errors that are added to a measured error before it is held against the target, for samples yet unseen."""

UNITS: dict[Quantity, dict[str, float]] = {
    "error": {"": 1},
    "bytes": {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30},
    "seconds": {"us": 1e-6, "ms": 1e-3, "s": 1.0},
}
NAMES: dict[Quantity, str] = {"error": "--target-error", "bytes": "--target-size", "seconds": "--target-latency"}
EXAMPLES: dict[Quantity, str] = {"error": "0.02", "bytes": "20MB", "seconds": "5ms"}
SECOND_WISH: dict[Quantity, tuple[Quantity, Quantity]] = {
    "error": ("bytes", "seconds"),
    "bytes": ("error", "seconds"),
    "seconds": ("error", "bytes"),
}
"""For a target, what is made least, and what counts between answers that are as good."""


@dataclass(frozen=True)
class Goal:
    """What is to be met.

    Attributes:
        quantity: error of the model, bytes of its file, or seconds of its linear layers.
        most: the largest value that will do.
    """

    quantity: Quantity
    most: float


def read_goal(texts: Mapping[Quantity, str | None]) -> Goal:
    """The one target that is given as text: a number with its unit, such as 0.02, 20MB or 5ms.

    Raises:
        SourceError: none or several are given, or one is no positive number of its unit.
    """
    given = {quantity: text for quantity, text in texts.items() if text is not None}
    if len(given) != 1:
        found = f"{' and '.join(NAMES[quantity] for quantity in given)} are given" if given else "there is none"
        raise SourceError(
            f"{found}, and recipe auto chooses by one",
            where="the target",
            remedy=f"give exactly one of {', '.join(NAMES.values())}",
        )
    ((quantity, text),) = given.items()
    parts = re.fullmatch(r"\s*(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)\s*([a-z]*)\s*", text.lower())
    factor = UNITS[quantity].get(parts[2]) if parts else None
    if parts is None or factor is None or float(parts[1]) <= 0:
        units = " or ".join(unit for unit in ("kB", "MB", "GB", "us", "ms", "s") if unit.lower() in UNITS[quantity])
        kind = f"a positive number{f' with the unit {units}' if units else ''}"
        raise SourceError(
            f"{text!r} is not {kind}", where=NAMES[quantity], remedy=f"give one such as {EXAMPLES[quantity]}"
        )
    return Goal(quantity, float(parts[1]) * factor)


@dataclass(frozen=True)
class Point:
    """One mix of choices and what it costs.

    Attributes:
        error: of the whole model, on the samples held out of calibration.
        bytes: of the file.
        seconds: of the linear layers in one run, the mean over the numbers of rows.
        layers: how many layers have each format and granularity.
        measured: whether the error is that of this very mix; else the sum of its layers' own, scaled as measured mixes say.
    """

    error: float
    bytes: int
    seconds: float
    layers: dict[str, int]
    measured: bool


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        base: the recipe that it started from.
        goal: the target.
        measure: what the error is.
        rows: numbers of rows that kernels were timed at.
        chosen: the mix that was compiled.
        front: mixes of which none is beaten by another, from the least error to the least size.
        held_out_error: of the compiled model, on the samples held out; None before it is measured.
    """

    base: str
    goal: Goal
    measure: str
    rows: tuple[int, ...]
    chosen: Point
    front: tuple[Point, ...]
    held_out_error: float | None = None


def search(
    model: ir.Model, recipe: Recipe, goal: Goal, ctx: Context, samples: Sequence[Feed], build: Build, folder: Path
) -> tuple[Recipe, Search]:
    """Choose for each linear layer and give the recipe that says so.

    Single layers are measured and an integer program adds them up; what it picks is measured whole, and its limit moved
    until the whole model meets the target.

    Args:
        model: the float graph behind the base recipe's float passes; left as it was.
        recipe: the base.
        goal: the target.
        ctx: calibrates.
        samples: errors are measured on these. Of those that weights are fitted to, errors come out too small.
        build: gives the passes of a recipe.
        folder: for large arrays; the caller removes it.

    Raises:
        SourceError: the target cannot be met; says what can.
    """
    candidates = Candidates(model, recipe, build, ctx, folder)
    chosen = [layer for layer in graph.linear_layers(model) if layer.name in candidates.names]
    found = ctx.measure(model, {layer.x.name or "": TokenRange for layer in chosen})
    ranges = {name: seen for name, seen in found.items() if isinstance(seen, TokenRange)}
    options = measured_options(model, candidates.items, recipe, ranges, samples, ctx)
    # Ranges hardly move when weights are rounded: one measurement of them serves all trials.
    remembered = replace(ctx, measure=_remembering(ctx.measure, ranges))
    wanted = OutputError(model, samples)
    trials = _Trials(recipe, candidates, options, build, remembered, wanted, folder)
    with ctx.progress("whole models", TRIALS) as advance:
        picked = {"error": trials.meet_error, "bytes": trials.meet_size, "seconds": trials.meet_latency}[goal.quantity](
            goal.most, advance
        )
    trials.weigh(picked)
    result = Search(recipe.name, goal, wanted.measure, recipe.rows, trials.point(picked), trials.front(picked))
    return mixed_recipe(recipe, candidates.items, picked, goal), result


def judged(found: Search, model: ir.Model, compiled: ir.Model, feeds: Sequence[Feed]) -> Search:
    """What a search found, with the error of the compiled model on samples held out.

    Args:
        found: the search.
        model: the float graph that it started from.
        compiled: what became of it.
        feeds: the samples.
    """
    wanted = OutputError(model, feeds)
    return replace(found, held_out_error=wanted.mean(Session(compiled, outputs=[wanted.output])))


def mixed_recipe(recipe: Recipe, items: Sequence[Item], picked: Sequence[int], goal: Goal) -> Recipe:
    """The base recipe with the choices picked, each layer by its name."""
    assert recipe.activations is not None
    base = recipe.weights.base
    formats, per_token = {}, []
    for item, index in zip(items, picked, strict=True):
        choice = item.choices[index]
        for name in chain.from_iterable(map(layer_names.parts, item.layers)):
            if choice.weights != base:
                formats[exactly(name)] = _override(base, choice.weights)
            if choice.granularity == "per-token":
                per_token.append(exactly(name))
    wish = f"{NAMES[goal.quantity].removeprefix('--target-')} of at most {goal.most:.6g}"
    changes: dict[str, object] = {
        "name": f"{recipe.name}-mixed",
        "summary": f"as {recipe.name}, formats and granularities chosen layer by layer for {_with_unit(wish, goal)}",
        "weights": {**recipe.weights.model_dump(), "packed": True, "layers": formats},
        "activations": {**recipe.activations.model_dump(), "granularity": "per-tensor", "per_token": per_token},
        "exceptions": None,
    }
    return changed(recipe, changes)


def _with_unit(wish: str, goal: Goal) -> str:
    return wish if goal.quantity == "error" else f"{wish} {goal.quantity}"


def _override(base: WeightFormat, wanted: WeightFormat) -> WeightOverride:
    """What to write for a layer: format, bits, and what differs from the base, or from the defaults of another format."""
    kept = base if base.format == wanted.format else WeightFormat(format=wanted.format, bits=wanted.bits)
    differs = {name: value for name, value in wanted.model_dump().items() if value != getattr(kept, name)}
    return WeightOverride.model_validate({"format": wanted.format, "bits": wanted.bits, **differs})


def _remembering(measure: Measure, ranges: Mapping[str, TokenRange]) -> Measure:
    def recalled(model: ir.Model, requests: Requests) -> dict[str, Statistic]:
        if set(requests) <= set(ranges):
            return {name: ranges[name] for name in requests}
        return measure(model, requests)

    return recalled


@dataclass(frozen=True)
class _Whole:
    """A whole model that was measured.

    Attributes:
        picked: its choices.
        error: mean error.
        surely: the same with some standard errors on top.
    """

    picked: tuple[int, ...]
    error: float
    surely: float


class _Trials:
    """Puts whole models together and measures them."""

    def __init__(
        self,
        recipe: Recipe,
        candidates: Candidates,
        options: list[list[Option]],
        build: Build,
        ctx: Context,
        wanted: OutputError,
        folder: Path,
    ) -> None:
        self._recipe = recipe
        self._candidates = candidates
        self._items = options
        self._build = build
        self._ctx = ctx
        self._wanted = wanted
        self._folder = folder
        self._known: dict[tuple[int, ...], _Whole] = {}
        self._sizes: dict[tuple[int, ...], int] = {}
        self._fixed: int | None = None

    def meet_error(self, most: float, advance: Callable[[], None]) -> list[int]:
        """The smallest mix whose measured error is surely within the target."""
        closest = self._smallest("error")
        low = self._measured(closest, advance)
        if low.surely > most:
            low = self._measured(closest, advance, clipped=True)
        if low.error > most:
            raise SourceError(
                f"no mix of the formats offered reaches an error of {most:.4g}; the best one has {low.error:.4g}"
                f" ({self._wanted.measure})",
                where="--target-error",
                remedy="give a larger one, or a base recipe that migrates more",
            )
        high: _Whole | None = None
        while low.surely <= CLOSE * most and len(self._known) < TRIALS:
            picked = solve_twice(self._items, *SECOND_WISH["error"], {"error": self._between(low, high, most)})
            if picked is None or tuple(picked) in self._known:
                break
            whole = self._measured(picked, advance)
            if whole.surely <= most:
                low = whole
            else:
                high = whole
        return list(low.picked)

    def _between(self, low: _Whole, high: _Whole | None, most: float) -> float:
        """The next limit on the sum of errors: between that of a mix within the target and one beyond it.

        The measured error is taken to grow as a power of the sum; without a mix beyond, in proportion.
        """
        first = max(total(self._items, low.picked, "error"), 1e-30)
        if high is None:
            return first * most / max(low.surely, 1e-30)
        second = total(self._items, high.picked, "error")
        share = np.log(most / low.surely) / np.log(max(high.surely / low.surely, 1 + 1e-9))
        return float(first * (second / first) ** np.clip(share, 0.1, 0.9))

    def meet_size(self, most: float, advance: Callable[[], None]) -> list[int]:
        """The mix with the least error whose file is within the target."""
        best: list[int] | None = None
        for _ in range(TRIALS - 2):
            picked = solve_twice(self._items, *SECOND_WISH["bytes"], {"bytes": most - self._other_bytes()})
            if picked is None:
                break
            known = tuple(picked) in self._sizes
            # What the graph itself takes depends on the mix: the next limit counts on what this one took.
            self.weigh(picked)
            if self._sizes[tuple(picked)] <= most:
                best = picked
            if known:
                break
        if best is None:
            best = self._smallest("bytes")
            size = self._size(best)
            if size > most:
                raise SourceError(
                    f"no mix of the formats offered is smaller than {size / 1e6:.2f} MB",
                    where="--target-size",
                    remedy="give a larger one, or a base recipe with smaller embeddings",
                )
        self._measured(best, advance)
        return best

    def meet_latency(self, most: float, advance: Callable[[], None]) -> list[int]:
        """The mix with the least error whose linear layers take no longer than the target."""
        picked = solve_twice(self._items, *SECOND_WISH["seconds"], {"seconds": most})
        if picked is None:
            rows = " and ".join(str(number) for number in self._recipe.rows)
            raise SourceError(
                f"the linear layers take {least(self._items, 'seconds') * 1e3:.3g} ms with the fastest formats offered"
                f" (mean over {rows} rows)",
                where="--target-latency",
                remedy="give a longer one, or fewer --rows",
            )
        self._measured(picked, advance)
        return picked

    def weigh(self, picked: Sequence[int]) -> None:
        """Measure the file of a mix, and count on what its graph takes in the estimates for others."""
        size = self._sizes.get(tuple(picked)) or self._size(picked)
        self._fixed = size - round(total(self._items, picked, "bytes"))

    def point(self, picked: Sequence[int]) -> Point:
        """A mix and what it costs."""
        whole = self._known.get(tuple(picked))
        size = self._other_bytes() + total(self._items, picked, "bytes")
        return Point(
            error=whole.error if whole is not None else self._scale() * total(self._items, picked, "error"),
            bytes=round(size),
            seconds=total(self._items, picked, "seconds"),
            layers=self._counts(picked),
            measured=whole is not None,
        )

    def front(self, chosen: Sequence[int]) -> tuple[Point, ...]:
        """The chosen mix among others that trade error for size and time."""
        found = [*choice_solver.front(self._items, FRONT), list(chosen)]
        points = [self.point(picked) for picked in dict.fromkeys(map(tuple, found))]
        return tuple(sorted(points, key=lambda point: (point.error, -point.bytes)))

    def _scale(self) -> float:
        """How much larger the error of whole models is than the sum of their layers', by those that were measured."""
        ratios = [whole.error / max(total(self._items, whole.picked, "error"), 1e-30) for whole in self._known.values()]
        return float(np.exp(np.mean(np.log(np.maximum(ratios, 1e-30))))) if ratios else 1.0

    def _counts(self, picked: Sequence[int]) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for item, index in zip(self._candidates.items, picked, strict=True):
            counts[str(item.choices[index])] += len(item.layers)
        return dict(counts.most_common())

    def _smallest(self, quantity: Quantity) -> list[int]:
        picked = choice_solver.solve(self._items, quantity, {})
        assert picked is not None
        return picked

    def _measured(self, picked: Sequence[int], advance: Callable[[], None], *, clipped: bool = False) -> _Whole:
        model = self._quantized(picked, clipped=clipped)
        session = Session(model, outputs=[self._wanted.output])
        samples = [self._wanted.of(session, index) for index in range(len(self._wanted.feeds))]
        errors, means = np.concatenate(samples), np.array([sample.mean() for sample in samples])
        # Tokens of one sample are alike, and few samples may happen to be alike: the larger spread counts.
        spread = max(float(one.std()) / len(one) ** 0.5 for one in (errors, means))
        whole = _Whole(tuple(picked), float(errors.mean()), float(errors.mean()) + SURE * spread)
        self._known[whole.picked] = whole
        advance()
        return whole

    def _quantized(self, picked: Sequence[int], *, clipped: bool) -> ir.Model:
        """The model with these choices; unless ranges are `clipped`, which takes a search, its error is a little larger."""
        model = self._candidates.assembled(picked)
        recipe = mixed_recipe(self._recipe, self._candidates.items, picked, Goal("error", 1))
        assert recipe.activations is not None
        if not clipped:
            unclipped = recipe.activations.model_copy(update={"clipping": 0.0})
            recipe = recipe.model_copy(update={"activations": unclipped})
        for entry in self._build(recipe).quantize:
            if Fact.QUANTIZED_WEIGHTS not in entry.provides:
                entry.run(model, self._ctx)
        return model

    def _size(self, picked: Sequence[int]) -> int:
        """Bytes of the file that these choices make."""
        model = self._quantized(picked, clipped=False)
        recipe = mixed_recipe(self._recipe, self._candidates.items, picked, Goal("error", 1))
        for entry in self._build(recipe).lower:
            entry.run(model, self._ctx)
        place = self._folder / "sized"
        place.mkdir()
        artifact.save_model(model, place)
        size = artifact.size_of(place)
        shutil.rmtree(place)
        self._sizes[tuple(picked)] = size
        return size

    def _other_bytes(self) -> int:
        """Bytes of the file that are not counted with any choice."""
        if self._fixed is None:
            self.weigh(self._smallest("error"))
        assert self._fixed is not None
        return self._fixed
