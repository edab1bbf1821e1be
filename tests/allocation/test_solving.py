"""Against brute force, a table of all budgets, the paper's loop and allocations made by hand."""

import itertools
import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpruner.allocation import solving
from qpruner.allocation.solving import Choice, Choices, exact, greedy, smallest, total_cost, total_size


def brute_force(choices: Choices, budget: int) -> tuple[float, int]:
    """Cost and bytes of the best allocation; of equal ones with the fewest bytes."""
    everything = itertools.product(*(range(len(item)) for item in choices))
    return min(
        (total_cost(choices, taken), total_size(choices, taken))
        for taken in everything
        if total_size(choices, taken) <= budget
    )


def by_table(choices: Choices, budget: int) -> int:
    """Least whole cost within a budget, by a table of every number of bytes."""
    table = [0] * (budget + 1)
    for item in choices:
        table = [
            min((table[room - c.size] + int(c.cost) for c in item if c.size <= room), default=10**9)
            for room in range(budget + 1)
        ]
    return table[budget]


def paper_loop(importances: Sequence[float], widths: Sequence[int], weights: Sequence[int], budget: int) -> list[int]:
    """QPruner's allocation for mutual information: bits of each layer."""
    bits = [min(widths)] * len(importances)

    def memory() -> int:
        return sum(weight * b // 8 for weight, b in zip(weights, bits, strict=True))

    while True:
        gains = [
            (importances[layer] * math.log2(wider / bits[layer]) / (weights[layer] * (wider - bits[layer]) / 8), layer)
            + (wider,)
            for layer in range(len(bits))
            for wider in widths
            if wider > bits[layer] and memory() + weights[layer] * (wider - bits[layer]) // 8 <= budget
        ]
        if not gains:
            return bits
        _, layer, wider = max(gains)
        bits[layer] = wider


def instance(rows: Sequence[Sequence[tuple[int, float]]]) -> list[list[Choice]]:
    return [[Choice(size, cost) for size, cost in row] for row in rows]


def random_instance(seed: int, items: int, largest: int, proportional: float = 0.0) -> list[list[Choice]]:
    """Four choices each with whole costs, as near to a multiple of the bytes as told."""
    generator = np.random.default_rng(seed)
    return [
        [
            Choice(size, float(round(-proportional * size + generator.normal() * largest / 8)))
            for size in generator.integers(1, largest, 4).tolist()
        ]
        for _ in range(items)
    ]


# Sizes and costs are drawn from few values, so that many are equal.
items = st.lists(
    st.builds(Choice, st.integers(0, 9), st.integers(-4, 4) | st.sampled_from([0.5, -0.25, 3.75])),
    min_size=1,
    max_size=4,
)
instances = st.lists(items, max_size=5)
uneven = st.lists(
    st.lists(st.builds(Choice, st.integers(0, 10**10), st.floats(-10, 10)), min_size=1, max_size=4), max_size=4
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(instances, st.integers(0, 30))
def test_exact_is_the_best_of_all_allocations_with_the_fewest_bytes(choices: Choices, spare: int) -> None:
    budget = total_size(choices, smallest(choices)) + spare
    found = exact(choices, budget)
    assert (total_cost(choices, found), total_size(choices, found)) == brute_force(choices, budget)
    assert exact(choices, budget) == found


@settings(max_examples=100, deadline=None, derandomize=True)
@given(uneven, st.floats(0, 1.1))
def test_exact_with_costs_and_bytes_of_any_value(choices: Choices, share: float) -> None:
    least = total_size(choices, smallest(choices))
    budget = least + int(share * (sum(max(c.size for c in item) for item in choices) - least))
    found = exact(choices, budget)
    assert total_size(choices, found) <= budget
    assert total_cost(choices, found) == pytest.approx(brute_force(choices, budget)[0], abs=1e-12)
    assert total_cost(choices, found) <= total_cost(choices, greedy(choices, budget)) + 1e-12


def test_six_items_of_four_choices_whatever_the_budget() -> None:
    choices = random_instance(0, 6, 40, proportional=1)
    costs = []
    for budget in range(total_size(choices, smallest(choices)), 6 * 40, 7):
        found, plain = exact(choices, budget), greedy(choices, budget)
        assert (total_cost(choices, found), total_size(choices, found)) == brute_force(choices, budget)
        assert total_cost(choices, found) <= total_cost(choices, plain)
        assert max(total_size(choices, found), total_size(choices, plain)) <= budget
        costs.append(total_cost(choices, found))
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]


@pytest.mark.parametrize("seed", range(100))
def test_ties_go_to_fewer_bytes(seed: int) -> None:
    """As many savings as bytes, or one more, so that many allocations save the same."""
    generator = np.random.default_rng(seed)
    choices = [
        [Choice(size, -float(size + generator.integers(0, 2))) for size in generator.integers(0, 12, 2).tolist()]
        for _ in range(8)
    ]
    budget = total_size(choices, smallest(choices)) + int(generator.integers(5, 30))
    found = exact(choices, budget)
    assert (total_cost(choices, found), total_size(choices, found)) == brute_force(choices, budget)


@pytest.mark.parametrize("largest", [3, 5])
def test_the_last_digit_of_savings_counts(largest: int) -> None:
    """Beside an item that saves 2^47 others save a few units, which is the rounding of the relaxation."""
    for seed in range(300):
        generator = np.random.default_rng(seed)
        choices = [
            [Choice(size, -float(generator.integers(0, largest))) for size in generator.integers(0, 40, 3).tolist()]
            for _ in range(5)
        ]
        choices.append([Choice(0, 0.0), Choice(1, -(2.0**47))])
        budget = total_size(choices, smallest(choices)) + int(generator.integers(5, 80))
        found = exact(choices, budget)
        assert (total_cost(choices, found), total_size(choices, found)) == brute_force(choices, budget)


@pytest.mark.parametrize("proportional", [0, 1, 8])
@pytest.mark.parametrize("seed", range(3))
def test_exact_against_a_table_of_all_budgets(seed: int, proportional: float) -> None:
    choices = random_instance(seed, 40, 30, proportional)
    least = total_size(choices, smallest(choices))
    for budget in (least, least + 1, least + 37, least + 200):
        assert total_cost(choices, exact(choices, budget)) == by_table(choices, budget)


@pytest.mark.parametrize("solve", [greedy, exact])
def test_budgets_that_leave_no_choice(solve: Callable[[Choices, int], tuple[int, ...]]) -> None:
    choices = instance([[(5, -1.0), (3, 2.0), (9, -1.0)], [(4, 0.0), (4, -2.0), (8, 7.0)]])
    assert smallest(choices) == (1, 1)
    assert solve(choices, 7) == (1, 1)
    assert solve(choices, 8) == (1, 1)
    assert solve(choices, 9) == (0, 1)
    assert solve(choices, 10**30) == (0, 1)
    assert solve([], 0) == ()
    with pytest.raises(AssertionError):
        solve(choices, 6)


def test_nothing_is_bought_that_saves_nothing() -> None:
    choices = instance([[(1, 0.0), (2, 0.0), (3, 0.0)], [(2, -1.0), (1, -1.0)], [(1, 0.0), (2, 5.0), (4, -0.0)]])
    assert greedy(choices, 100) == exact(choices, 100) == (0, 1, 0)


def test_greedy_step_by_step() -> None:
    """Savings per byte: at first 3/2, 4/6 | 2/1, 5/3, and after (1, 1) 3/2 and after (0, 1) 1/4."""
    choices = instance([[(2, 5.0), (4, 2.0), (8, 1.0)], [(1, 6.0), (2, 4.0), (4, 1.0)]])
    steps = {3: (0, 0), 4: (0, 1), 5: (0, 1), 6: (1, 1), 7: (1, 1), 8: (1, 2), 11: (1, 2), 12: (2, 2)}
    assert {budget: greedy(choices, budget) for budget in steps} == steps


def test_greedy_takes_the_most_per_byte_and_not_the_most() -> None:
    choices = instance([[(0, 0.0), (10, -10.0)], [(0, 0.0), (4, -8.0)]])
    assert greedy(choices, 10) == (0, 1)


def test_greedy_takes_the_first_of_equals() -> None:
    choices = instance([[(0, 0.0), (4, -4.0), (2, -2.0)], [(0, 0.0), (2, -2.0)]])
    assert greedy(choices, 2) == (2, 0)
    assert greedy(choices, 4) == (1, 0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_greedy_is_the_papers_loop(seed: int, share: float) -> None:
    generator = np.random.default_rng(seed)
    importances, weights = generator.random(12).tolist(), (8 * generator.integers(50, 200, 12)).tolist()
    widths = (2, 4, 8)
    choices = [
        [Choice(weight * bits // 8, -importance * math.log2(bits)) for bits in widths]
        for importance, weight in zip(importances, weights, strict=True)
    ]
    budget = int(sum(weights) * (2 + 6 * share) / 8)
    assert [widths[number] for number in greedy(choices, budget)] == paper_loop(importances, widths, weights, budget)


def test_greedy_can_be_worse() -> None:
    """The small item gains more per byte, and then the large one, which gains more, does not fit any more."""
    choices = instance([[(0, 0.0), (1, -2.0)], [(0, 0.0), (10, -15.0)]])
    assert greedy(choices, 10) == (1, 0)
    assert exact(choices, 10) == (0, 1)


@pytest.mark.parametrize("budget", [128 * 2_123_457, 128 * 3_000_000, 128 * 4_567_891])
def test_equal_items_do_not_multiply(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best mix of counts, found by looking at all of them; and few states on the way."""
    sizes, costs = (2_123_457, 4_246_914, 8_493_828), (0.0, -0.7, -1.1)
    monkeypatch.setattr(solving, "MOST_STATES", 1000)
    choices = [[Choice(size, cost) for size, cost in zip(sizes, costs, strict=True)]] * 128
    mixes = [(128 - a - b, a, b) for a in range(129) for b in range(129 - a)]
    best = min(
        sum(n * cost for n, cost in zip(mix, costs, strict=True))
        for mix in mixes
        if sum(n * size for n, size in zip(mix, sizes, strict=True)) <= budget
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = exact(choices, budget)
    assert total_size(choices, found) <= budget
    assert total_cost(choices, found) == pytest.approx(best, abs=1e-9)


def test_large_and_nearly_proportional_costs_stay_few_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 items of the bytes of a 7B model's linears, costs within a hundredth of proportional."""
    generator = np.random.default_rng(5)
    weights = generator.integers(10**7, 10**8, 128).tolist()
    choices = [
        [Choice(weight * bits // 16, -weight * bits * float(1 + 0.01 * generator.normal())) for bits in (9, 10, 16, 32)]
        for weight in weights
    ]
    least = total_size(choices, smallest(choices))
    monkeypatch.setattr(solving, "MOST_STATES", 30_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for budget in (least * 5 // 4, least * 2):
            found = exact(choices, budget)
            assert 0 <= budget - total_size(choices, found) < 10**5
            assert total_cost(choices, found) < total_cost(choices, greedy(choices, budget))


def test_a_cut_is_announced_with_what_it_may_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs are the bytes, so that every state could be the best: 60 items, of whose 3^60 allocations few are kept."""
    generator = np.random.default_rng(6)
    sizes = [[0, *generator.integers(10**8, 10**9, 2).tolist()] for _ in range(60)]
    choices = [[Choice(2 * size, -2.0 * size) for size in item] for item in sizes]
    monkeypatch.setattr(solving, "MOST_STATES", 20)
    budget = 10**10 + 1
    with pytest.warns(UserWarning, match=r"costs at most (\S+) more than the best") as caught:
        found = exact(choices, budget)
    said = float(str(caught[0].message).split("at most ")[1].split()[0])
    assert 0 < -total_cost(choices, found) <= budget - 1
    assert said == pytest.approx(budget + total_cost(choices, found), rel=0.01)
    assert said < 10**7
