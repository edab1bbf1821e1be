"""The loop that asks an optimizer, has the answers evaluated and tells it what came of them."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from qpruner.errors import UserError
from qpruner.search.ledger import Key, Ledger, Scores, TrialRecord, flat, identity, plain
from qpruner.search.workers import Executor, Outcome

MOST_ATTEMPTS = 2
"""Times that a trial is started when the search itself is cut off while it runs."""

Score = float | list[float]
"""What the optimizer is told, smaller is better: one number, or one for each objective."""

logger = logging.getLogger(__name__)


class Optimizer(Protocol):
    """Nevergrad's ask and tell."""

    def ask(self) -> Any: ...

    def tell(self, candidate: Any, loss: Any) -> None: ...


def run_trials(
    optimizer: Optimizer,
    ledger: Ledger,
    executor: Executor,
    *,
    num_trials: int,
    workers: int,
    key_of: Callable[[Any], Key],
    score_of: Callable[[Scores], Score],
    on_trial: Callable[[TrialRecord], None],
    first_penalty: Score = 1e6,
) -> None:
    """Runs trials until the ledger holds ``num_trials``; what it already holds is told again instead of run again.

    Trials are proposed ``workers`` at a time and told in the order in which they were proposed, whichever ends first,
    and the ledger says how many had been told before each proposal. So an optimizer that is fresh, and made as the
    first one was, goes through the same proposals again, also when the number of workers or of trials is now another.

    A key is evaluated once. A trial with the key of another one takes over what came of that, and counts: an optimizer
    that only repeats itself comes to an end. A trial that fails, or finds NaN or an infinite number, is told as a
    penalty: the worst score so far and as much again as lies between it and the best. A trial that was running when the
    search was cut off is started once more, and fails if that happens again.

    Args:
        optimizer: fresh; nothing asked or told.
        ledger: of this search.
        executor: runs the trials.
        num_trials: in all, those in the ledger included.
        workers: trials proposed at a time.
        key_of: what a candidate's ``value`` asks to be evaluated.
        score_of: what the optimizer is told of scores.
        on_trial: called with each trial that the ledger did not hold yet, after it was told.
        first_penalty: told for a failed trial as long as none has succeeded; in the shape of ``score_of``.

    Raises:
        UserError: the optimizer proposes something else than the ledger says it did.
    """
    history: list[Score] = []  # of the trials that succeeded
    told = 0
    while told < num_trials:
        size = min(_wave_size(ledger.records[told:], told, workers), num_trials - told)
        candidates = [optimizer.ask() for _ in range(size)]
        keys = [plain(key_of(candidate.value)) for candidate in candidates]
        was_done = {trial.number for trial in ledger.records[told : told + size] if trial.done}
        to_run = _start(ledger, told, keys)
        for place, outcome in executor.run([keys[number - told] for number in to_run]):
            _record(ledger, to_run[place], outcome, score_of)
        for place, (candidate, key) in enumerate(zip(candidates, keys, strict=True)):
            number = told + place
            if not ledger.records[number].done:
                _repeat(ledger, number, key)
            trial = ledger.records[number]
            if trial.scores is None:
                score = _penalty(history) if history else first_penalty
            else:
                score = score_of(trial.scores)
                history.append(score)
            optimizer.tell(candidate, score)
            if number not in was_done:
                on_trial(trial)
        told += size


def run_listed(keys: Sequence[Key], ledger: Ledger, executor: Executor, *, known: Ledger) -> list[TrialRecord]:
    """Runs given trials, without what either ledger knows already, and returns what came of each.

    Args:
        keys: to evaluate.
        ledger: of listed trials.
        executor: runs them.
        known: of other trials, whose outcomes count.
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
    found = [ledger.outcome_of(key) or known.outcome_of(key) for key in keys]
    return [record for record in found if record is not None]


def _wave_size(recorded: Sequence[TrialRecord], told: int, workers: int) -> int:
    """How many proposals were or are to be made before the next score is told."""
    size = sum(trial.told == told for trial in recorded)
    return size if size < len(recorded) else max(size, workers)


def _start(ledger: Ledger, told: int, keys: Sequence[Key]) -> list[int]:
    """Writes down the trials of a wave that are not there yet, and returns those to run."""
    to_run: list[int] = []
    running: set[str] = set()
    for number, key in enumerate(keys, told):
        known = ledger.records[number] if number < len(ledger.records) else None
        if known is not None and known.key != key:
            raise UserError(
                f"{str(ledger.path)!r} does not fit this search: its trial {number} was {known.key}, and now the "
                f"optimizer proposes {key}. Continue it with the options and versions that it was begun with, or start "
                f"a new search."
            )
        if known is not None and known.done:
            continue
        if ledger.outcome_of(key) is not None or identity(key) in running:
            if known is None:
                ledger.start(number, key, told)
        elif ledger.attempts(number) >= MOST_ATTEMPTS:
            ledger.fail(number, f"the search was cut off {MOST_ATTEMPTS} times while it ran")
        else:
            ledger.start(number, key, told)
            running.add(identity(key))
            to_run.append(number)
    return to_run


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
    """For each objective the worst score and as much again as it is worse than the best one."""
    objectives = list(zip(*map(_vector, history), strict=True))
    penalties = [max(values) + (max(values) - min(values) or abs(max(values)) or 1.0) for values in objectives]
    return penalties if isinstance(history[0], list) else penalties[0]


def _vector(score: Score) -> list[float]:
    return score if isinstance(score, list) else [score]
