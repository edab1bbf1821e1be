"""Who proposes, in this process and in another: the same proposals, and every failure by its name."""

import os
import subprocess
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import odd_optimizers
from support.proposers import ForkedProposer

from qpruner.allocation.solving import Choice
from qpruner.search import proposals
from qpruner.search.optimizers import OptimizerSettings
from qpruner.search.proposals import LocalProposals, OptimizerFailed, ProposingProcess, open_proposals
from qpruner.search.space import SearchSpace

TRIALS = 12
SPACE = SearchSpace([[Choice(10, 0.0), Choice(20, -float(gain))] for gain in range(12)], [(4, 8)] * 12, limit=180)


def settings(name: str, seed: int = 0) -> OptimizerSettings:
    return OptimizerSettings(name, SPACE, TRIALS, 1, seed=seed)


@pytest.fixture(autouse=True)
def _odd_ones_are_known_to_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposals, "COMMAND", f"import {odd_optimizers.__name__}; {proposals.COMMAND}")


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposals, "subprocess", SimpleNamespace(Popen=ForkedProposer, DEVNULL=subprocess.DEVNULL))


def asked_and_told(optimizer: Any) -> list[list[float]]:
    values = []
    for number in range(TRIALS):
        proposal = optimizer.ask()
        assert proposal.number == number
        values.append(proposal.value)
        optimizer.tell(proposal, float(1 + np.square(proposal.value).sum()))
    return values


def test_ours_propose_in_this_process_and_the_others_in_one_of_their_own(forked: None) -> None:
    with open_proposals(settings("random")) as ours, open_proposals(settings("DE")) as other:
        assert isinstance(ours, LocalProposals) and isinstance(other, ProposingProcess)


@pytest.mark.parametrize("name", ["DE", "OnePlusOne", "OddListening"])
def test_a_process_proposes_what_the_optimizer_here_does(name: str, forked: None) -> None:
    with open_proposals(settings(name), hear=lambda warning: None) as other:
        elsewhere = asked_and_told(other)
    assert elsewhere == asked_and_told(LocalProposals(settings(name)))
    assert len(elsewhere[0]) == SPACE.dimension and len({str(value) for value in elsewhere}) > 1


def test_proposals_may_be_out_and_are_told_out_of_order(forked: None) -> None:
    """The number of a proposal says which it was, not when it was told."""
    here = LocalProposals(settings("OddListening"))
    with open_proposals(settings("OddListening")) as elsewhere:
        for optimizer in (here, elsewhere):
            first, second = optimizer.ask(), optimizer.ask()
            optimizer.tell(second, 5.0)
            optimizer.tell(first, 3.0)
            assert (first.number, second.number) == (0, 1)
            assert optimizer.ask().value == pytest.approx([value + 0.3 for value in first.value])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_point_is_no_proposal(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = LocalProposals(settings("random"))
    candidate = SimpleNamespace(value=np.array([0.0, bad]))
    monkeypatch.setattr(optimizer, "_optimizer", SimpleNamespace(ask=lambda: candidate))
    with pytest.raises(OptimizerFailed, match=r"random proposes \[0.0, (nan|inf)\], which is no point"):
        optimizer.ask()


@pytest.mark.parametrize(
    ("name", "when", "why"),
    [
        ("OddLate", "is asked", "fails when it is asked: ValueError: singular matrix."),
        ("OddTold", "is told", "fails when it is told a score: ZeroDivisionError."),
        ("OddHanging", "is asked", "gives no answer in 0.5 s when it is asked."),
        ("OddDying", "is asked", "ended its process when it is asked, with status 3: double free."),
        ("Nothing", "is made", "There is no optimizer 'Nothing'"),
    ],
)
def test_a_failure_is_told_in_a_line_with_its_moment(name: str, when: str, why: str, forked: None) -> None:
    with open_proposals(settings(name), patience=0.5) as optimizer, pytest.raises(OptimizerFailed) as caught:
        asked_and_told(optimizer)
    assert why in str(caught.value) and "\n" not in str(caught.value)


def test_a_process_that_was_killed_is_an_error_and_not_a_hang(forked: None) -> None:
    with open_proposals(settings("DE")) as optimizer:
        assert isinstance(optimizer, ProposingProcess)
        optimizer.wait()
        optimizer._process.kill()
        optimizer._process.wait()
        with pytest.raises(OptimizerFailed, match="DE ended its process when it is asked, with status -9"):
            optimizer.ask()


def test_no_process_outlives_the_context_whatever_it_is_at(forked: None) -> None:
    since = time.monotonic()
    with open_proposals(settings("OddHanging"), patience=0.2) as optimizer:
        assert isinstance(optimizer, ProposingProcess)
        with pytest.raises(OptimizerFailed):
            asked_and_told(optimizer)
    assert time.monotonic() - since < 30
    with pytest.raises(ProcessLookupError):
        os.kill(optimizer._process.pid, 0)


def test_what_was_tried_before_is_told(forked: None) -> None:
    value = [0.5] * 12
    with open_proposals(settings("OddListening")) as optimizer:
        optimizer.learn(value, 2.0)
        assert optimizer.ask().value == pytest.approx([0.7] * 12)
    heard: list[str] = []
    with open_proposals(settings("OddDeaf"), hear=heard.append) as deaf, open_proposals(settings("OddDeaf")) as fresh:
        for _ in range(3):
            deaf.learn(value, 2.0)
        assert [deaf.ask() for _ in range(4)] == [fresh.ask() for _ in range(4)]
    (warning,) = heard
    assert "OddDeaf: cannot be told of plans that others proposed, and begins without them" in warning


def test_a_process_is_silent_and_ends_with_its_search(capfd: pytest.CaptureFixture[str]) -> None:
    heard: list[str] = []
    with open_proposals(settings("OddLoud"), hear=heard.append) as optimizer:
        assert isinstance(optimizer, ProposingProcess)
        for _ in range(3):
            optimizer.tell(optimizer.ask(), 1.0)
    assert heard == ["OddLoud: the budget is small"]
    with pytest.raises(ProcessLookupError):
        os.kill(optimizer._process.pid, 0)
    assert capfd.readouterr() == ("", "")


def test_a_search_does_not_wait_for_ever(forked: None) -> None:
    with open_proposals(settings("OddHanging"), patience=0.5) as optimizer:
        for _ in range(odd_optimizers.LATE):
            optimizer.tell(optimizer.ask(), 1.0)
        with pytest.raises(OptimizerFailed, match="OddHanging gives no answer in 0.5 s when it is asked"):
            optimizer.ask()
