"""Our optimizers on problems small enough to know the best plan of, and Nevergrad's through the same door."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qpruner.allocation.solving import Choice, greedy
from qpruner.errors import UserError
from qpruner.search.optimizers import OptimizerSettings, make_optimizer
from qpruner.search.space import SearchSpace

OURS = ("bayesian", "random")
Plan = tuple[int, ...]


def space_of(gains: Any, upgrades: int, spends: bool = False) -> SearchSpace:
    """Items of 4 or 8 bits and equal size, so many of which may have 8."""
    choices = [[Choice(10, 0.0), Choice(20, -float(gain))] for gain in gains]
    return SearchSpace(choices, [(4, 8)] * len(choices), 10 * (len(choices) + upgrades), spends)


def made(name: str, space: SearchSpace, seed: int = 0, num_workers: int = 1) -> Any:
    return make_optimizer(OptimizerSettings(name, space, num_trials=20, num_workers=num_workers, seed=seed))


def plan_of(space: SearchSpace, candidate: Any) -> Plan:
    return tuple(space.decode(candidate.value[None])[0].tolist())


def searched(optimizer: Any, space: SearchSpace, score: Callable[[Plan], Any], count: int) -> list[Plan]:
    plans = []
    for _ in range(count):
        candidate = optimizer.ask()
        plans.append(plan_of(space, candidate))
        optimizer.tell(candidate, score(plans[-1]))
    return plans


def weighed(weights: Any) -> Callable[[Plan], float]:
    return lambda plan: -float(np.dot(weights, plan))


def test_the_prior_comes_first() -> None:
    space = space_of([1, 5, 2, 4, 3, 0], 3)
    optimizer = made("bayesian", space)
    first = optimizer.ask()
    assert first.value.tolist() == [0.0] * 6
    assert plan_of(space, first) == greedy(space.choices, space.limit) == (0, 1, 0, 1, 1, 0)
    assert plan_of(space, optimizer.ask()) != plan_of(space, first)  # while that is out, and nothing was told


def waves(name: str, space: SearchSpace, starts: Any, num_workers: int) -> list[Plan]:
    """The plans of three waves, each told before the next one."""
    optimizer = make_optimizer(OptimizerSettings(name, space, 20, num_workers, seed=0, starts=starts))
    plans = []
    for _ in range(3):
        wave = [optimizer.ask() for _ in range(num_workers)]
        plans += [plan_of(space, candidate) for candidate in wave]
        for candidate in wave:
            optimizer.tell(candidate, weighed([1, 2, 3, 4, 5, 6])(plan_of(space, candidate)))
    return plans


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_a_start_comes_first_and_not_again(name: str, num_workers: int) -> None:
    """Even where it is the prior's plan, or given twice."""
    space = space_of([1, 5, 2, 4, 3, 0], 3)
    prior = tuple(space.decode(np.zeros((1, 6)))[0].tolist())
    other = [9.0, -9, -9, 9, -9, 9]
    for starts in ([[0.0] * 6], [[0.0] * 6] * 2, [other, [0.0] * 6]):
        plans = waves(name, space, starts, num_workers)
        assert len({*plans}) == len(plans)
        assert plans[0] == (prior if starts[0] != other else (1, 0, 0, 1, 0, 1))
        assert plans.index(prior) < len(starts)


@pytest.mark.parametrize("name", OURS)
def test_no_plan_comes_twice_while_there_are_others(name: str) -> None:
    space = space_of([5, 4, 1, 1, 0, 0], 2)
    plans = searched(made(name, space), space, weighed([1, 2, 3, 4, 5, 6]), 17)
    assert len(set(plans[:15])) == 15  # all there are
    assert set(plans[15:]) <= set(plans[:15])


@pytest.mark.parametrize("name", OURS)
def test_several_may_be_out_at_once(name: str) -> None:
    space = space_of(np.arange(8), 4)
    optimizer = made(name, space, num_workers=5)
    seen = []
    for _ in range(4):
        candidates = [optimizer.ask() for _ in range(5)]
        seen += [plan_of(space, candidate) for candidate in candidates]
        for candidate in candidates:
            optimizer.tell(candidate, weighed(np.arange(8))(plan_of(space, candidate)))
    assert len(set(seen)) == 20


def test_those_that_are_out_count_as_expected() -> None:
    space = space_of([1] * 10, 5)
    weights = np.random.default_rng(0).standard_normal(10)
    optimizer = made("bayesian", space)
    searched(optimizer, space, weighed(weights), 12)
    out = np.array([plan_of(space, optimizer.ask()) for _ in range(6)])
    assert min(np.abs(one - other).sum() for k, one in enumerate(out) for other in out[:k]) >= 2
    values = out @ weights
    assert values.mean() > 0.7 * np.sort(weights)[-5:].sum()  # and all are good


@pytest.mark.filterwarnings("ignore:Updating fitness with inf")  # Nevergrad, of a point worse in both objectives
@pytest.mark.parametrize("name", [*OURS, "OnePlusOne", "DE", "TBPSA"])
@pytest.mark.parametrize("num_objectives", [1, 2])
def test_the_same_seed_and_scores_give_the_same_proposals(name: str, num_objectives: int) -> None:
    space = space_of([3, 1, 2, 5, 4, 1, 1] * 3, 9, spends=num_objectives == 2)
    weights = np.random.default_rng(1).standard_normal(21)

    def score(plan: Plan) -> Any:
        return [weighed(weights)(plan), float(space.sizes(np.array([plan]))[0])][:num_objectives]

    one, again, other = (searched(made(name, space, seed), space, score, 14) for seed in (0, 0, 1))
    assert one == again
    assert one != other


@pytest.mark.parametrize("name", OURS)
def test_a_search_goes_on_from_a_record(name: str) -> None:
    space = space_of([3, 1, 2, 5, 4, 1, 1], 3)
    whole, resumed = made(name, space, num_workers=3), made(name, space, num_workers=3)
    trace: list[Any] = []
    for optimizer in (whole, resumed):  # asked and told out of step
        points = []
        out = [optimizer.ask() for _ in range(3)]
        for number in range(12):
            candidate = out.pop(number % 2)
            points.append(candidate.value.tolist())
            optimizer.tell(candidate, weighed([1, 0, 2, 0, 3, 0, 4])(plan_of(space, candidate)))
            out.append(optimizer.ask())
        trace.append(points)
    assert trace[0] == trace[1]


def test_a_plan_that_was_not_asked_for_can_be_told() -> None:
    space = space_of([1, 2, 3, 4], 2)
    optimizer = made("bayesian", space)
    told = optimizer.parametrization.spawn_child(new_value=np.zeros(4))
    optimizer.tell(told, 1.0)
    assert plan_of(space, optimizer.ask()) != plan_of(space, told)
    assert optimizer.provide_recommendation().value.tolist() == [0.0] * 4


def regret(name: str, space: SearchSpace, weights: Any, count: int, seed: int) -> float:
    best = np.sort(weights)[-(space.limit // 10 - len(weights)) :].sum()
    plans = searched(made(name, space, seed), space, weighed(weights), count)
    return float(best - max(np.dot(weights, plan) for plan in plans))


@pytest.mark.parametrize("prior", ["good", "equal", "reversed"])
def test_finds_better_plans_than_chance_whatever_the_prior(prior: str) -> None:
    """Of 924 plans of 12 items, in 18 trials."""
    generator = np.random.default_rng(7)
    regrets = np.zeros((3, 2))
    for seed in range(3):
        weights = generator.exponential(size=12)
        gains = {"good": weights * np.exp(0.3 * generator.standard_normal(12)), "equal": np.ones(12)}
        gains["reversed"] = weights.max() - weights
        regrets[seed] = [regret(name, space_of(gains[prior], 6), weights, 18, seed) for name in OURS]
    assert (regrets[:, 0] < regrets[:, 1]).all()
    assert regrets[:, 0].mean() < 0.3 * regrets[:, 1].mean()


def test_a_front_is_found_with_two_objectives() -> None:
    space = space_of([1] * 6, 6, spends=True)
    weights = np.array([4, 0.1, 2, 0.3, 1, 0.2])

    def score(plan: Plan) -> list[float]:
        return [weighed(weights)(plan), float(space.sizes(np.array([plan]))[0])]

    optimizer = made("bayesian", space)
    searched(optimizer, space, score, 25)
    front = {tuple(candidate.losses) for candidate in optimizer.pareto_front()}
    best = {(-np.sort(weights)[6 - count :].sum(), 60.0 + 10 * count) for count in range(7)}
    found = sum(any(np.allclose(one, other) for other in front) for one in best)
    assert found >= 6  # of 7


def test_constant_scores_and_a_prior_without_costs_are_no_obstacle() -> None:
    space = space_of([0] * 5, 2)
    assert len(set(searched(made("bayesian", space), space, lambda plan: 1.0, 10))) == 10


def test_a_proposal_takes_little_time() -> None:
    generator = np.random.default_rng(0)
    space = space_of(generator.exponential(size=32), 12)
    optimizer = made("bayesian", space)
    for _ in range(100):
        point = generator.standard_normal(32)
        optimizer.tell(optimizer.parametrization.spawn_child(new_value=point), float(generator.standard_normal()))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        optimizer.ask()
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5  # 0.12 s where nothing else runs


def test_what_cannot_be_made_is_refused() -> None:
    space = space_of([1, 2, 3], 1)
    with pytest.raises(UserError, match=r"no optimizer 'bayesain'\. Did you mean 'bayesian'\? .*bayesian, random"):
        made("bayesain", space)
    with pytest.raises(UserError, match="Did you mean 'TBPSA'"):
        made("TBSPA", space)
    with pytest.raises(UserError, match=r"Cobyla proposes one trial after the other, and there are 2 workers\."):
        made("Cobyla", space, num_workers=2)
    assert made("Cobyla", space).ask().value.shape == (3,)
