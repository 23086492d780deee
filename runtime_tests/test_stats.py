from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest

from scalefold.compiler.schemes import Float
from scalefold.compiler.stats import AverageRange, ChannelRange, RowSample, SecondMoment, Statistic, TokenRange

FACTORIES: list[Callable[[], Statistic]] = [
    ChannelRange, AverageRange, TokenRange, lambda: TokenRange(capacity=20), RowSample, lambda: RowSample(capacity=20),
    SecondMoment, lambda: SecondMoment(diagonal=True),
]  # fmt: skip
NAMES = ["ChannelRange", "AverageRange", "TokenRange", "TokenRange of 20", "RowSample", "RowSample of 20"]
NAMES += ["SecondMoment", "its diagonal"]
EVERY = pytest.mark.parametrize("factory", FACTORIES, ids=NAMES)
SEEDS = pytest.mark.parametrize("seed", range(6))


def stream(seed: int, samples: int = 12) -> list[Float]:
    """Samples of 0 to 9 tokens and 5 channels."""
    generator = np.random.default_rng(seed)
    return [generator.standard_normal((int(generator.integers(0, 10)), 5)).astype(np.float32) for _ in range(samples)]


def gathered(factory: Callable[[], Statistic], samples: Sequence[tuple[int, Float]]) -> Statistic:
    found = factory()
    for number, rows in samples:
        found.update(rows, number)
    return found


def assert_equal(first: Statistic, second: Statistic) -> None:
    """Equal to the rounding of sums, field by field."""
    for entry in fields(first):  # type: ignore[arg-type]
        left, right = getattr(first, entry.name), getattr(second, entry.name)
        assert (left is None) == (right is None), entry.name
        if left is not None:
            np.testing.assert_allclose(left, right, rtol=1e-12, err_msg=entry.name)


@EVERY
@SEEDS
def test_the_order_of_samples_does_not_matter(factory: Callable[[], Statistic], seed: int) -> None:
    samples = list(enumerate(stream(seed)))
    shuffled = [samples[index] for index in np.random.default_rng(seed).permutation(len(samples))]
    assert_equal(gathered(factory, samples), gathered(factory, shuffled))


@EVERY
@SEEDS
def test_any_split_merges_to_the_whole(factory: Callable[[], Statistic], seed: int) -> None:
    samples = list(enumerate(stream(seed)))
    whole = gathered(factory, samples)
    cut = int(np.random.default_rng(seed).integers(0, len(samples) + 1))
    assert_equal(gathered(factory, samples[:cut]).merge(gathered(factory, samples[cut:])), whole)
    assert_equal(gathered(factory, samples[::2]).merge(gathered(factory, samples[1::2])), whole)


@EVERY
@SEEDS
def test_merging_is_commutative_and_associative_with_the_empty_one_as_neutral(
    factory: Callable[[], Statistic], seed: int
) -> None:
    samples = list(enumerate(stream(seed)))
    a, b, c = (gathered(factory, samples[start : start + 4]) for start in (0, 4, 8))
    assert_equal(a.merge(b), b.merge(a))
    assert_equal(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert_equal(a.merge(factory()), a)
    assert_equal(factory().merge(a), a)


@EVERY
@SEEDS
def test_merging_changes_neither_side(factory: Callable[[], Statistic], seed: int) -> None:
    samples = list(enumerate(stream(seed)))
    a, b = gathered(factory, samples[:6]), gathered(factory, samples[6:])
    merged = a.merge(b)
    merged.update(np.full((3, 5), 1e6, np.float32), 99)
    assert_equal(a, gathered(factory, samples[:6]))
    assert_equal(b, gathered(factory, samples[6:]))


@EVERY
def test_a_sample_without_tokens_changes_nothing(factory: Callable[[], Statistic]) -> None:
    samples = list(enumerate(stream(1)))
    found = gathered(factory, samples)
    found.update(np.empty((0, 5), np.float32), 50)
    assert_equal(found, gathered(factory, samples))


@SEEDS
def test_a_channel_range_is_the_smallest_and_largest_of_each_channel(seed: int) -> None:
    found = gathered(ChannelRange, list(enumerate(stream(seed))))
    assert isinstance(found, ChannelRange)
    rows = np.concatenate(stream(seed))
    np.testing.assert_array_equal(found.low, rows.min(axis=0))
    np.testing.assert_array_equal(found.high, rows.max(axis=0))


def test_an_average_range_is_the_mean_over_samples_that_have_tokens() -> None:
    found = AverageRange()
    for number, rows in enumerate(([[1.0, -3.0]], [[5.0, 1.0], [0.0, 2.0]])):
        found.update(np.array(rows, np.float32), number)
    found.update(np.empty((0, 2), np.float32), 2)
    assert found.range == (-1.5, 3.0)
    assert AverageRange().range == (0.0, 0.0)


@SEEDS
def test_a_token_range_is_exact_below_its_capacity(seed: int) -> None:
    rows = np.concatenate(stream(seed))
    found = gathered(TokenRange, list(enumerate(stream(seed))))
    assert isinstance(found, TokenRange)
    assert found.count == len(rows)
    np.testing.assert_array_equal(np.sort(found.entries[:, 1]), np.sort(rows.min(axis=1)))
    np.testing.assert_array_equal(np.sort(found.entries[:, 2]), np.sort(rows.max(axis=1)))
    for ratio in (0.99, 0.9, 0.5):
        low, high = found.quantiles(ratio)
        assert low == pytest.approx(np.quantile(rows.min(axis=1).astype(np.float64), 1 - ratio))
        assert high == pytest.approx(np.quantile(rows.max(axis=1).astype(np.float64), ratio))


def test_a_token_range_above_its_capacity_stays_within_it_and_keeps_the_extremes() -> None:
    found = TokenRange(capacity=100)
    for number in range(50):
        rows = np.random.default_rng(number).standard_normal((40, 3)).astype(np.float32)
        if number == 17:
            rows[5] = [-77, 0, 88]
        found.update(rows, number)
        assert len(found.entries) <= 100
    assert found.count == 2000
    assert (found.low, found.high) == (-77.0, 88.0)
    assert found.quantiles(1.0) == (-77.0, 88.0)
    low, high = found.quantiles(0.9)
    assert -4 < low < 0 < high < 4


def test_the_quantiles_of_a_bounded_sample_are_near_those_of_all_tokens() -> None:
    rows = np.random.default_rng(0).standard_normal((20000, 4)).astype(np.float32)
    bounded, whole = TokenRange(capacity=2000), TokenRange()
    for number in range(20):
        part = rows[number * 1000 : (number + 1) * 1000]
        bounded.update(part, number)
        whole.update(part, number)
    np.testing.assert_allclose(bounded.quantiles(0.95), whole.quantiles(0.95), atol=0.1)


def test_a_smaller_ratio_never_widens_the_range() -> None:
    found = gathered(TokenRange, list(enumerate(stream(2, 40))))
    assert isinstance(found, TokenRange)
    ranges = [found.quantiles(ratio) for ratio in (1.0, 0.99, 0.95, 0.9, 0.7)]
    assert all(inner[0] >= outer[0] and inner[1] <= outer[1] for outer, inner in pairwise(ranges))


def test_one_sharp_token_counts_once_however_many_channels_it_has() -> None:
    rows = np.ones((101, 64), np.float32)
    rows[0] = 50
    found = TokenRange()
    found.update(rows, 0)
    assert found.quantiles(1.0)[1] == 50
    assert found.quantiles(0.99)[1] == 1


def test_a_range_without_tokens_is_nothing() -> None:
    assert TokenRange().quantiles(0.9) == (0.0, 0.0)


@SEEDS
def test_a_row_sample_holds_rows_of_the_stream_and_no_more_than_its_capacity(seed: int) -> None:
    rows = np.concatenate(stream(seed, 40))
    found = gathered(lambda: RowSample(capacity=30), list(enumerate(stream(seed, 40))))
    assert isinstance(found, RowSample)
    assert found.rows is not None
    assert len(found.rows) == len(found.priorities) == 30
    known = {row.tobytes() for row in rows}
    assert all(row.tobytes() in known for row in found.rows)


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_second_moment_is_the_mean_of_the_products_of_channels(diagonal: bool) -> None:
    found = gathered(lambda: SecondMoment(diagonal=diagonal), list(enumerate(stream(4))))
    assert isinstance(found, SecondMoment) and found.mean is not None
    rows = np.concatenate(stream(4)).astype(np.float64)
    wanted = rows.T @ rows / len(rows)
    assert found.mean.dtype == np.float64
    np.testing.assert_allclose(found.mean, np.diagonal(wanted) if diagonal else wanted, rtol=1e-12)
    assert SecondMoment(diagonal).mean is None
