"""Against the solver that decodes one point at a time, and plans enumerated by hand."""

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qpruner.allocation.solving import Choice, greedy, total_cost, total_size
from qpruner.search.space import BEND, SearchSpace

WIDTHS = (4, 8, 16)


def random_space(seed: int, items: int, *, noise: float = 0.0, spends: bool = False) -> SearchSpace:
    """Three widths each; the rate of saving falls within an item, and steps grow, where there is no noise."""
    generator = np.random.default_rng(seed)
    weights = generator.integers(50, 150, items)
    gains = np.exp(generator.standard_normal(items))
    middles = np.where(generator.random(items) < noise, 12, 8)  # bytes of the middle one for each weight
    choices = [
        [
            Choice(int(weight * size), float(gain / bits + noise * generator.standard_normal()))
            for bits, size in zip(WIDTHS, (4, middle, 16), strict=True)
        ]
        for weight, gain, middle in zip(weights, gains, middles, strict=True)
    ]
    limit = int(generator.uniform(4, 16) * weights.sum())
    return SearchSpace(choices, [WIDTHS] * items, limit, spends)


def scaled(space: SearchSpace, point: np.ndarray) -> list[list[Choice]]:
    """The problem of a point, written out: rates as costs, each item's multiplied."""
    problem = []
    for item, rates, coordinate in zip(space.choices, space.rates, point, strict=False):
        costs = [0.0]
        for before, after, rate in zip(item, item[1:], rates, strict=False):
            costs.append(costs[-1] - rate * (after.size - before.size) * float(np.exp(coordinate)))
        problem.append([Choice(choice.size, cost) for choice, cost in zip(item, costs, strict=True)])
    return problem


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_decodes_each_point_as_greedy_does(noise: float) -> None:
    for seed in range(20):
        space = random_space(seed, 7, noise=noise)
        points = 2 * np.random.default_rng(seed).standard_normal((20, 7))
        plans = [greedy(scaled(space, point), space.limit) for point in points]
        assert space.decode(points).tolist() == [list(plan) for plan in plans]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    points=arrays.arrays(np.float64, (3, 6), elements=st.floats(-1e300, 1e300) | st.floats(-3, 3)),
    spends=st.booleans(),
)
def test_every_point_is_a_plan_within_the_budget_that_nothing_can_be_added_to(
    seed: int, points: np.ndarray, spends: bool
) -> None:
    space = random_space(seed, 6 - spends, noise=0.3, spends=spends)
    for plan, budget in zip(space.decode(points), space.budgets(points), strict=True):
        size = total_size(space.choices, plan)
        assert size <= budget <= space.limit
        for item, taken in zip(space.choices, plan, strict=True):
            assert taken == len(item) - 1 or size + item[taken + 1].size - item[taken].size > budget


def test_the_origin_is_the_plan_of_the_prior() -> None:
    for seed in range(50):
        space = random_space(seed, 8)
        assert tuple(space.decode(np.zeros((1, 8)))[0]) == greedy(space.choices, space.limit)


def test_an_item_without_gain_is_upgraded_last_by_the_prior_and_first_by_a_point() -> None:
    gains = [0.0, 3.0, 2.0, 1.0]
    space = SearchSpace([[Choice(1, 0.0), Choice(2, -gain)] for gain in gains], [(4, 8)] * 4, 6)
    assert space.decode(np.array([[0, 0, 0, 0], [6, 0, 0, 0], [0, 0, 0, 0.8]])).tolist() == [
        [0, 1, 1, 0],
        [1, 1, 0, 0],
        [0, 1, 0, 1],
    ]
    assert replace(space, limit=8).decode(np.zeros((1, 4))).tolist() == [[1, 1, 1, 1]]  # what is left is not wasted
    blind = SearchSpace([[Choice(1, 5.0), Choice(2, 5.0)]] * 4, [(4, 8)] * 4, 5)
    assert blind.decode(np.eye(4)).tolist() == np.eye(4).tolist()


def test_a_late_gain_counts_for_the_step_before_it() -> None:
    sound = SearchSpace([[Choice(1, 0.0), Choice(2, -4.0), Choice(4, -6.0)]], [WIDTHS], 4)
    floor = 0.01 * 2.5
    assert sound.rates[0] == pytest.approx([4 + floor, 1 + floor])
    late = SearchSpace([[Choice(1, 0.0), Choice(2, -1.0), Choice(4, -6.0)]], [WIDTHS], 4)
    assert late.rates[0] == pytest.approx([2.02, BEND * 2.02])
    worse = SearchSpace([[Choice(1, 0.0), Choice(2, 1.0), Choice(4, -3.0)]], [WIDTHS], 4)
    assert worse.rates[0] == pytest.approx([1.01, BEND * 1.01])


def test_items_without_gain_can_stop_halfway() -> None:
    space = SearchSpace([[Choice(4, 0.0), Choice(8, 0.0), Choice(16, 0.0)]] * 3, [WIDTHS] * 3, 24)
    assert space.decode(np.array([[0, 0, 0], [0, 0, -9], [9, 0, 0]])).tolist() == [[1, 1, 1], [1, 1, 1], [2, 0, 0]]


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_every_plan_that_nothing_can_be_added_to_is_reached(noise: float) -> None:
    for seed in range(4):
        space = random_space(seed, 4, noise=noise)
        wanted = set()
        for plan in itertools.product(range(3), repeat=4):
            left = space.limit - total_size(space.choices, plan)
            steps = [item[j + 1].size - item[j].size for item, j in zip(space.choices, plan, strict=True) if j < 2]
            if left >= 0 and all(step > left for step in steps):
                wanted.add(plan)
        points = space.uninformed(np.random.default_rng(0), 40_000)
        assert set(map(tuple, np.unique(space.decode(points), axis=0).tolist())) == wanted


def test_the_last_coordinate_spends() -> None:
    space = replace(random_space(0, 10), spends=True)
    least, most = total_size(space.choices, [0] * 10), space.limit
    points = np.zeros((5, 11))
    points[:, -1] = [-1e9, -1.7, 0, 1.7, 1e9]
    assert space.budgets(points).tolist() == [least, least, least + (most - least) // 2, most, most]
    plans = space.decode(points)
    assert space.sizes(plans)[0] == least < space.sizes(plans)[2] < space.sizes(plans)[4] <= most
    assert tuple(plans[4]) == greedy(space.choices, most)
    assert np.ptp(replace(space, spends=False).budgets(points)) == 0


def test_uninformed_points_do_not_know_the_prior() -> None:
    gains = [0.0, 1e-3, 1.0, 30.0]
    space = SearchSpace([[Choice(1, 0.0), Choice(2, -gain)] for gain in gains], [(4, 8)] * 4, 5)
    plans = space.decode(space.uninformed(np.random.default_rng(1), 20_000))
    assert plans.mean(0) == pytest.approx([0.25] * 4, abs=0.015)


def test_features_costs_and_sizes_of_plans() -> None:
    space = random_space(3, 5)
    plans = np.array([[0, 1, 2, 0, 1], [2, 2, 2, 2, 2]])
    assert space.features(plans).tolist() == [[0, 0.5, 1, 0, 0.5], [1] * 5]  # log2 of 4, 8 and 16
    assert space.costs(plans) == pytest.approx([total_cost(space.choices, plan) for plan in plans])
    assert space.sizes(plans).tolist() == [total_size(space.choices, plan) for plan in plans]
    single = SearchSpace([[Choice(3, 1.0)], [Choice(1, 0.0), Choice(2, -1.0)]], [(16,), (4, 8)], 5)
    assert single.features(single.decode(np.zeros((1, 2)))).tolist() == [[0, 1]]


def test_a_thousand_points_take_little_time() -> None:
    space = random_space(0, 32)
    points = np.random.default_rng(0).standard_normal((1000, 32))
    space.decode(points)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        space.decode(points)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.1  # 0.007 s where nothing else runs


@pytest.mark.parametrize("spends", [False, True])
def test_a_budget_that_leaves_one_plan_is_told(spends: bool) -> None:
    choices = [[Choice(10, 0.0), Choice(20, -1.0)], [Choice(10, 0.0), Choice(25, -1.0)]]
    for limit in range(20, 60):
        space = SearchSpace(choices, [(4, 8)] * 2, limit, spends)
        plans = space.decode(np.random.default_rng(0).standard_normal((500, space.dimension)))
        single = len(np.unique(plans, axis=0)) == 1
        # Where only the first item's upgrade fits, that is not known without decoding.
        assert space.is_single == (single and not 30 <= limit < 35)
