"""The simulation of searches on many workers: where its clock goes, by hand."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from qpruner.search.cluster import POLL_SECONDS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import search_scaling

    return search_scaling


def keys(number: int) -> list[dict[str, Any]]:
    return [{"choices": [place]} for place in range(number)]


def test_a_round_lasts_as_its_slowest_trial_and_idle_workers_are_counted(
    scaling: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(np.arange(0.0, 100.0))  # a second more at each look
    monkeypatch.setattr(scaling.time, "perf_counter", lambda: next(clock))
    executor = scaling.Simulated(3, 10.0, np.array([4.0, 6.0]), [0.5], seed=0)
    first = [place for place, outcome in executor.run(keys(3)) if outcome.scores == {"loss": 0.5}]
    assert sorted(first) == [0, 1, 2] and executor.lost.rounds == 0
    slowest = executor.now - 10 - 1 - POLL_SECONDS  # after its start, and a second in which it was asked
    assert slowest == 6.0 and 12 <= executor.busy <= 18
    assert executor.lost.starting == 30 and executor.lost.asking == 3
    assert executor.lost.last_round == pytest.approx(3 * (slowest + POLL_SECONDS) - executor.busy)
    list(executor.run(keys(1)))  # the trial as before; the others have nothing to do
    lost = executor.lost
    assert lost.rounds > 0 and lost.last_round >= 2 * (4 + POLL_SECONDS)
    assert executor.busy + sum(vars(lost).values()) == pytest.approx(3 * executor.now)


@pytest.mark.parametrize("optimizer", ["bayesian", "random"])
def test_the_true_loop_runs_all_trials_and_more_workers_are_faster(
    scaling: ModuleType, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    space = scaling.space_of([{"choices": [0, 1] * 4}])
    rows = []
    for workers in (1, 4):
        executor = scaling.Simulated(workers, 5.0, np.array([100.0]), [0.5, 0.6], seed=0)
        scaling.simulate(optimizer, space, executor, 8, seed=0)
        assert executor.busy == 800  # each plan once
        rows.append(executor.row())
        assert executor.now - 5 - 800 / workers < 20  # what asking took
    assert [row[0] for row in rows] == ["1", "4"] and rows[0][-1] in ("starting", "asking")
