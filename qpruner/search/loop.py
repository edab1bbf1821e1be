"""The loop that asks an optimizer for proposals, has them evaluated and tells the optimizer the results."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from qpruner.errors import UserError
from qpruner.search.ledger import Key, Ledger, Scores, TrialRecord, flat, identity, plain
from qpruner.search.proposals import Score
from qpruner.search.workers import Executor, Outcome

MOST_ATTEMPTS = 2
"""Number of times that a trial is started if the search itself is interrupted while the trial runs."""

logger = logging.getLogger(__name__)


class Optimizer(Protocol):
    """Proposes trials; those of a search are in `qpruner.search.proposals`. A proposal's ``value`` is plain data."""

    def ask(self) -> Any: ...

    def tell(self, proposal: Any, score: Any) -> None: ...

    def learn(self, value: Any, score: Any) -> None:
        """Tells the optimizer of a trial that another optimizer proposed."""
        ...


class Judge:
    """Turns trials, given one after the other in their order, into the scores that an optimizer is told.

    A failed trial gets a penalty: the worst score so far plus the distance between it and the best score.

    Args:
        score_of: converts the scores of a trial into the score that an optimizer is told.
        first_penalty: score that an optimizer is told for a failed trial as long as none has succeeded, in the form
            that ``score_of`` returns.
    """

    def __init__(self, score_of: Callable[[Scores], Score], first_penalty: Score = 1e6) -> None:
        self.score_of = score_of
        self.first_penalty = first_penalty
        self._history: list[Score] = []  # of the trials that succeeded

    def __call__(self, trial: TrialRecord) -> Score:
        if trial.scores is None:
            return _penalty(self._history) if self._history else self.first_penalty
        self._history.append(self.score_of(trial.scores))
        return self._history[-1]


def run_trials(
    optimizer: Optimizer,
    ledger: Ledger,
    executor: Executor,
    *,
    num_trials: int,
    workers: int,
    key_of: Callable[[Any], Key],
    judge: Judge,
    on_trial: Callable[[TrialRecord], None],
) -> None:
    """Runs trials until the ledger holds ``num_trials``; the optimizer is told those it already holds, without a rerun.

    Trials are proposed ``workers`` at a time and told in the order in which they were proposed, whichever ends first,
    and the ledger records how many had been told before each proposal. A fresh optimizer, made in the same way as the
    first one, therefore repeats the same proposals, even if the number of workers or of trials has changed. Only the
    last optimizer of the ledger does so: it learns what earlier ones proposed before it proposes anything.

    A key is evaluated once. A trial with the same key as another takes over its outcome, and counts: an optimizer that
    only repeats itself comes to an end. A trial that yields NaN or an infinite number fails. A trial that was running
    when the search was interrupted is started once more, and fails if that happens again.

    Args:
        optimizer: fresh optimizer, which has neither been asked nor told anything.
        ledger: ledger of this search; see `finish_started`.
        executor: executor that runs the trials.
        num_trials: total number of trials, including those in the ledger.
        workers: number of trials proposed at a time.
        key_of: converts the ``value`` of a proposal into the key of the trial that evaluates it.
        judge: fresh judge, which decides what the optimizer is told of trials.
        on_trial: called with each trial whose outcome was not yet in the ledger.

    Raises:
        UserError: the optimizer proposes something other than what the ledger says it did; or from the optimizer.
    """
    finish_started(ledger, executor, num_trials=num_trials, score_of=judge.score_of, on_trial=on_trial)
    told = ledger.optimizers[-1].first if ledger.optimizers else 0
    for trial in ledger.records[:told]:
        optimizer.learn(trial.point, judge(trial))
    while told < num_trials:
        size = min(_wave_size(ledger.records[told:], told, workers), num_trials - told)
        proposals = [optimizer.ask() for _ in range(size)]
        wave = [
            TrialRecord(number, plain(key_of(proposal.value)), told, proposal.value)
            for number, proposal in enumerate(proposals, told)
        ]
        recorded = ledger.records[told : told + size]
        _check_same(ledger, recorded, wave)
        _evaluate(ledger, executor, wave[len(recorded) :], judge.score_of)
        for proposal, trial in zip(proposals, ledger.records[told : told + size], strict=True):
            optimizer.tell(proposal, judge(trial))
            if trial not in recorded:
                on_trial(trial)
        told += size


def finish_started(
    ledger: Ledger,
    executor: Executor,
    *,
    num_trials: int,
    score_of: Callable[[Scores], Score],
    on_trial: Callable[[TrialRecord], None],
) -> None:
    """Runs again the trials that were running when the search was interrupted, which needs no optimizer.

    Args:
        ledger: ledger of the search.
        executor: executor that runs the trials.
        num_trials: number of trials of the search; trials beyond them stay as they are.
        score_of: converts the scores of a trial into the score that an optimizer is told.
        on_trial: called with each of these trials.
    """
    started = [trial for trial in ledger.records[:num_trials] if not trial.done]
    _evaluate(ledger, executor, started, score_of)
    for trial in started:
        on_trial(ledger.records[trial.number])


def run_listed(keys: Sequence[Key], ledger: Ledger, executor: Executor, *, known: Ledger) -> list[TrialRecord]:
    """Runs given trials, except those that either ledger already knows, and returns the record of each.

    Args:
        keys: keys of the trials to run.
        ledger: ledger of listed trials.
        executor: executor that runs the trials.
        known: ledger of other trials, whose outcomes are reused.
    """
    new = {identity(key): key for key in keys if ledger.outcome_of(key) is None and known.outcome_of(key) is None}
    open_trials = {identity(trial.key): trial.number for trial in ledger.records if not trial.done}
    to_run: dict[int, Key] = {}
    for name, key in new.items():
        number = open_trials.get(name, len(ledger.records))
        if ledger.attempts(number) >= MOST_ATTEMPTS:
            ledger.fail(number, f"the search was cut off {MOST_ATTEMPTS} times while it ran")
        else:
            ledger.start(number, key, 0)
            to_run[number] = key
    numbers = list(to_run)
    for place, outcome in executor.run(list(to_run.values())):
        _record(ledger, numbers[place], outcome, lambda scores: scores["loss"])
    outcomes = [ledger.outcome_of(key) or known.outcome_of(key) for key in keys]
    return [record for record in outcomes if record is not None]


def _wave_size(recorded: Sequence[TrialRecord], told: int, workers: int) -> int:
    """How many proposals were made, or are to be made, before the next score is told."""
    size = sum(trial.told == told for trial in recorded)
    return size if size < len(recorded) else max(size, workers)


def _check_same(ledger: Ledger, recorded: Sequence[TrialRecord], proposed: Sequence[TrialRecord]) -> None:
    for before, now in zip(recorded, proposed, strict=False):
        if before.key != now.key:
            raise UserError(
                f"{str(ledger.path)!r} does not fit this search: its trial {now.number} was {before.key}, and now the "
                f"optimizer proposes {now.key}. Continue it with the options and versions that it was begun with, give "
                f"another search.optimizer, which learns from the trials so far, or start a new search."
            )


def _evaluate(
    ledger: Ledger, executor: Executor, trials: Sequence[TrialRecord], score_of: Callable[[Scores], Score]
) -> None:
    """Records that trials begin, runs those whose key is new, and records the outcome of each."""
    to_run: list[TrialRecord] = []
    running: set[str] = set()
    for trial in trials:
        attempts = ledger.attempts(trial.number)
        known = ledger.outcome_of(trial.key) is not None or identity(trial.key) in running
        if not known and attempts >= MOST_ATTEMPTS:
            ledger.fail(trial.number, f"the search was cut off {MOST_ATTEMPTS} times while it ran")
            continue
        if not known or attempts == 0:
            ledger.start(trial.number, trial.key, trial.told, trial.point)
        if not known:
            running.add(identity(trial.key))
            to_run.append(trial)
    for place, outcome in executor.run([trial.key for trial in to_run]):
        _record(ledger, to_run[place].number, outcome, score_of)
    for trial in trials:
        if not ledger.records[trial.number].done:
            _repeat(ledger, trial.number, trial.key)


def _record(ledger: Ledger, number: int, outcome: Outcome, score_of: Callable[[Scores], Score]) -> None:
    scores, why = outcome.scores, outcome.why
    if scores is not None:
        numbers = {name: value for name, value in flat(scores).items() if isinstance(value, float)}
        wrong = [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]
        if not wrong and not all(map(math.isfinite, _vector(score := score_of(scores)))):
            wrong = [f"the score is {score}"]
        if not wrong:
            ledger.finish(number, scores)
            return
        why = ", ".join(wrong)
    assert why is not None
    ledger.fail(number, why)
    logger.warning("Trial %d failed: %s\n%s", number, why, outcome.details)


def _repeat(ledger: Ledger, number: int, key: Key) -> None:
    source = ledger.outcome_of(key)
    assert source is not None
    if source.scores is not None:
        ledger.finish(number, source.scores, repeats=source.number)
    else:
        assert source.why is not None
        ledger.fail(number, source.why, repeats=source.number)


def _penalty(history: Sequence[Score]) -> Score:
    """For each objective, the worst score plus the distance between it and the best one."""
    objectives = list(zip(*map(_vector, history), strict=True))
    penalties = [max(values) + (max(values) - min(values) or abs(max(values)) or 1.0) for values in objectives]
    return penalties if isinstance(history[0], list) else penalties[0]


def _vector(score: Score) -> list[float]:
    return score if isinstance(score, list) else [score]
