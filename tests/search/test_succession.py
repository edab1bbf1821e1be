"""One optimizer after another: what the next one is told, and that a search goes on with it exactly."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.toys import Counting

from qpruner.allocation.solving import Choice
from qpruner.errors import UserError
from qpruner.search import succession
from qpruner.search.ledger import Ledger, OptimizerRecord, TrialRecord
from qpruner.search.loop import Judge, finish_started, run_trials
from qpruner.search.optimizers import make_optimizer
from qpruner.search.proposals import LocalProposals, OptimizerFailed
from qpruner.search.results import proposers
from qpruner.search.space import SearchSpace
from qpruner.search.succession import settings_of, succeed

SPACE = SearchSpace([[Choice(10, 0.0), Choice(20, -float(gain))] for gain in range(8)], [(4, 8)] * 8, limit=120)


class Cut(Exception):
    pass


class CutOff(Counting):
    """Is cut off in the wave after some."""

    def __init__(self, waves: int) -> None:
        super().__init__()
        self.left = waves

    def run(self, keys: Any) -> Any:
        if keys and self.left == 0:
            raise Cut
        self.left -= bool(keys)
        yield from super().run(keys)


def plan_of(value: Any) -> dict[str, Any]:
    return {"choices": SPACE.decode(np.array([value]))[0].tolist()}


@pytest.fixture(autouse=True)
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Names of those rehearsed, and how many trials they were told of; all of them pass."""
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(succession, "rehearse", lambda settings, known: seen.append((settings.name, len(list(known)))))
    return seen


def search(
    path: Path, name: str, num_trials: int, *, workers: int = 1, executor: Any = None
) -> tuple[TrialRecord, ...]:
    ledger, judge = Ledger.open(path, {}), Judge(lambda scores: scores["loss"])
    succeed(ledger, name, SPACE, judge, num_trials=num_trials, workers=workers, seed=3)
    run_trials(
        LocalProposals(settings_of(ledger.optimizers[-1], SPACE, 3)),
        ledger,
        executor or Counting(),
        num_trials=num_trials,
        workers=workers,
        key_of=plan_of,
        judge=Judge(lambda scores: scores["loss"]),
        on_trial=lambda trial: None,
    )
    return ledger.records


def test_the_next_optimizer_is_told_all_that_was_tried(tmp_path: Path, rehearsed: list[tuple[str, int]]) -> None:
    path = tmp_path / "ledger"
    before = search(path, "DE", 5)
    records = search(path, "bayesian", 12)
    assert records[:5] == before
    assert Ledger.open(path, {}).optimizers == (OptimizerRecord("DE", 0, 5, 1), OptimizerRecord("bayesian", 5, 12, 1))
    assert rehearsed == [("DE", 0), ("bayesian", 5)]
    assert [trial.told for trial in records[5:]] == [5, 6, 7, 8, 9, 10, 11]
    assert [(one.optimizer, one.first, one.last) for one in proposers(Ledger.open(path, {}))] == [
        ("DE", 1, 5), ("bayesian", 6, 12),
    ]  # fmt: skip
    # By hand.
    optimizer = make_optimizer(settings_of(OptimizerRecord("bayesian", 5, 12, 1), SPACE, 3))
    for trial in before:
        told = optimizer.parametrization.spawn_child(new_value=np.array(trial.point))
        optimizer.tell(told, trial.scores["loss"])  # type: ignore[index]
    for trial in records[5:]:
        candidate = optimizer.ask()
        assert candidate.value.tolist() == trial.point
        optimizer.tell(candidate, trial.scores["loss"])  # type: ignore[index]
    # Which proposes nothing that the one before it proposed.
    assert not {str(trial.key) for trial in before} & {str(trial.key) for trial in records[5:]}


@pytest.mark.parametrize("name", ["bayesian", "OnePlusOne"])
def test_a_search_killed_after_the_change_makes_the_same_proposals(tmp_path: Path, name: str) -> None:
    whole = tmp_path / "whole"
    search(whole, "DE", 4)
    expected = search(whole, name, 11)
    for cut in (0, 1, 2):
        path = tmp_path / str(cut)
        search(path, "DE", 4)
        with pytest.raises(Cut):
            search(path, name, 11, executor=CutOff(cut))
        records = search(path, name, 11)
        assert [(one.key, one.point, one.scores) for one in records] == [
            (one.key, one.point, one.scores) for one in expected
        ]
        assert len(Ledger.open(path, {}).optimizers) == 2


def test_what_ran_when_the_change_was_made_is_finished_first(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    with pytest.raises(Cut):
        search(path, "DE", 9, workers=3, executor=CutOff(1))
    assert [trial.done for trial in Ledger.open(path, {}).records] == [True] * 3 + [False] * 3
    records = search(path, "random", 9)
    assert all(trial.done for trial in records)
    # The fourth proposal was the plan of an earlier one, which takes no run.
    assert [trial.attempts for trial in records] == [1, 1, 1, 1, 2, 2, 1, 1, 1]
    assert [trial.repeats is None for trial in records] == [True] * 3 + [False] + [True] * 5
    assert Ledger.open(path, {}).optimizers[-1].first == 6


def test_more_trials_or_workers_begin_those_anew_that_plan_for_them(tmp_path: Path) -> None:
    for name, anew in (("bayesian", False), ("random", False), ("DE", True)):
        path = tmp_path / name
        before = search(path, name, 4)
        assert search(path, name, 3)[:4] == before  # fewer are no change
        assert search(path, name, 6)[:4] == before
        assert search(path, name, 8, workers=2)[:4] == before
        firsts = [record.first for record in Ledger.open(path, {}).optimizers]
        assert firsts == ([0, 4, 6] if anew else [0])
        points = [str(trial.point) for trial in Ledger.open(path, {}).records]
        assert len(set(points)) == 8  # one that begins anew does not propose the same again


def test_a_search_with_nothing_left_to_propose_needs_no_optimizer(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    with pytest.raises(Cut):
        search(path, "DE", 3, executor=CutOff(2))
    ledger, seen = Ledger.open(path, {}), list[int]()
    succeed(ledger, "random", SPACE, Judge(lambda scores: scores["loss"]), num_trials=3, workers=1, seed=3)
    assert [record.name for record in ledger.optimizers] == ["DE"]
    finish_started(
        ledger, Counting(), num_trials=3, score_of=lambda scores: scores["loss"],
        on_trial=lambda trial: seen.append(trial.number),
    )  # fmt: skip
    assert seen == [2] and all(trial.done for trial in ledger.records)


def test_a_failed_rehearsal_leaves_the_ledger_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger"
    search(path, "random", 3)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OptimizerFailed("no")

    monkeypatch.setattr(succession, "rehearse", fail)
    with pytest.raises(UserError, match="no"):
        search(path, "DE", 6)
    assert path.read_bytes() == before
