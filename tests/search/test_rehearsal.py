"""Optimizers of others: what is found before the first trial, and what they can do to a search that they fail in."""

import random
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import odd_optimizers
from support.proposers import ForkedProposer

from qpruner.allocation.solving import Choice
from qpruner.errors import UserError
from qpruner.search import proposals, rehearsal
from qpruner.search.optimizers import OptimizerSettings
from qpruner.search.proposals import open_proposals
from qpruner.search.rehearsal import MadeUpScores, check_runs, rehearse
from qpruner.search.space import SearchSpace
from qpruner.search.structure import Part, Structure

TRIALS = 12
SPACE = SearchSpace([[Choice(10, 0.0), Choice(20, -float(gain))] for gain in range(12)], [(4, 8)] * 12, limit=180)


def settings(name: str, num_trials: int = TRIALS, space: SearchSpace = SPACE, num_workers: int = 1) -> Any:
    return OptimizerSettings(name, space, num_trials, num_workers, seed=0)


@pytest.fixture(autouse=True)
def _odd_ones_are_known_to_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposals, "COMMAND", f"import {odd_optimizers.__name__}; {proposals.COMMAND}")


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposals, "subprocess", SimpleNamespace(Popen=ForkedProposer, DEVNULL=subprocess.DEVNULL))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    texts: list[str] = []
    for function in ("rank_zero_info", "rank_zero_warn"):
        monkeypatch.setattr(rehearsal, function, texts.append)
    return texts


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("OddLate", "OddLate fails when it is asked: ValueError: singular matrix. .* after 5 of 12 proposals"),
        ("OddTold", "OddTold fails when it is told a score: ZeroDivisionError. .* after 5 of 12 proposals"),
        ("OddHanging", "OddHanging gives no answer in 1 s when it is asked. .* after 5 of 12 proposals"),
        ("OddDying", "OddDying ended its process when it is asked, with status 3: double free. .* after 5 of 12"),
        ("OddNowhere", r"OddNowhere proposes \[nan, .*which is no point. .* after 5 of 12 proposals"),
        ("OddForgetful", "OddForgetful does not make the same proposals again .* after 0 of 12 proposals"),
    ],
)
def test_late_failures_are_found_in_the_rehearsal(name: str, why: str, forked: None) -> None:
    with pytest.raises(UserError, match=f"{why}.* no trial was spent on it. .*such as bayesian or random"):
        rehearse(settings(name), patience=1)


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, forked: None) -> None:
    for package in ("bayes_optim", "pymoo", "nlopt"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(UserError, match="PCABO fails when it is made: it needs the package 'bayes_optim', which is"):
        check_runs("PCABO", 1)
    # These begin well, and NGOptF's thread stands still once it has failed.
    for name, package in (("PymooNSGA2", "pymoo"), ("NGOptF", "nlopt")):
        with pytest.raises(
            UserError, match=f"{name} fails when it is asked: it needs the package '{package}', .* 1 of"
        ):
            rehearse(settings(name, 50))


def test_names_and_workers_are_checked_without_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposals, "COMMAND", None)
    for name, nearest in (("bayesain", "bayesian"), ("tbpsa", "TBPSA"), ("BAYESIAN", "bayesian"), ("ngopt", "NGOpt")):
        with pytest.raises(UserError, match=f"Did you mean {nearest!r}"):
            check_runs(name, 1)
    with pytest.raises(UserError, match="Cobyla proposes one trial after the other"):
        check_runs("Cobyla", 2)
    check_runs("bayesian", 4)
    rehearse(settings("random"))


@pytest.mark.parametrize("name", ["OddShared", "OddLoud", "CMAL3", "bayesian"])
def test_neither_a_rehearsal_nor_the_random_state_that_all_share_changes_a_proposal(
    name: str, said: list[str], forked: None
) -> None:
    scores = MadeUpScores(SPACE, 0)
    runs: list[list[Any]] = []
    for number in range(2):
        np.random.seed(number)
        random.seed(number)
        before = np.random.get_state()[1].tolist(), random.getstate()
        if number:
            rehearse(settings(name))
        values: list[Any] = []
        with open_proposals(settings(name), hear=lambda warning: None) as optimizer:
            for _ in range(TRIALS):
                proposal = optimizer.ask()
                optimizer.tell(proposal, scores(proposal.value))
                values.append(proposal.value)
        runs.append(values)
        assert (np.random.get_state()[1].tolist(), random.getstate()) == before
    assert runs[0] == runs[1]
    assert len({str(value) for value in runs[0]}) > 1


def test_repeated_plans_and_slow_proposals_are_told(said: list[str], forked: None) -> None:
    rehearse(settings("OddRepeating"))
    assert said[0].startswith("Rehearsed OddRepeating: 12 proposals, 1 different plan(s)")
    assert said[1].startswith("12 proposals of OddRepeating in its rehearsal were 1 different plan(s)")
    said.clear()
    since = time.monotonic()
    rehearse(settings("OddSlow", 1000), seconds=0.7)
    assert time.monotonic() - since < 10
    assert "OddSlow takes 0.2" in said[1] and "of 1000 were rehearsed" in said[1]


@pytest.mark.parametrize("num_trials", [1, 2])
@pytest.mark.parametrize("front", [False, True])
def test_small_searches_fronts_and_batches_can_be_rehearsed(
    num_trials: int, front: bool, said: list[str], forked: None
) -> None:
    space = SearchSpace(SPACE.choices, SPACE.levels, SPACE.limit, spends=front)
    rehearse(settings("TBPSA", num_trials, space))
    rehearse(settings("DE", 3 * num_trials, space, num_workers=3))


def test_made_up_scores_follow_the_prior_and_are_the_same_again() -> None:
    scores, again = MadeUpScores(SPACE, 0), MadeUpScores(SPACE, 0)
    points = SPACE.uninformed(np.random.default_rng(1), 200)
    losses = np.array([scores(point.tolist()) for point in points])
    assert losses.tolist() == [again(point.tolist()) for point in points]
    assert 1 < losses.min() < losses.max() < 3
    assert np.corrcoef(losses, SPACE.costs(SPACE.decode(points)))[0, 1] > 0.8
    front = SearchSpace(SPACE.choices, SPACE.levels, SPACE.limit, spends=True)
    loss, size = MadeUpScores(front, 0)([0.0] * 13)  # type: ignore[misc]
    assert size == front.sizes(front.decode(np.zeros((1, 13))))[0] and 1 < loss < 3


@pytest.mark.parametrize("name", ["bayesian", "DE"])
def test_a_front_of_widths_is_rehearsed_with_multiply_adds_as_a_third_objective(name: str, forked: None) -> None:
    part = Part(0, "kv_groups", (1, 2), (10, 20), (0, 0), (1.0, 0.0), 1)
    space = replace(SPACE, spends=True, structure=Structure((part,), [[] for _ in range(12)], 0.5))
    scores = MadeUpScores(space, 0)
    told = [scores([0.0, coordinate, *[0.0] * 13]) for coordinate in (0.0, -9.0)]
    assert [len(one) for one in told] == [3, 3] and [one[2] for one in told] == [20.0, 10.0]  # type: ignore[arg-type,index]
    rehearse(settings(name, 4, space))


def test_one_that_cannot_be_told_what_was_tried_before_passes(forked: None) -> None:
    rehearse(settings("OddDeaf"), [([0.5] * 12, 2.0)])
