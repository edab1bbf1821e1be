"""What a worker does: it prepares itself once, and then runs one trial after the other."""

import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from qpruner.errors import UserError, user_error
from qpruner.search.ledger import Key, Scores

Trial = Callable[[Key], Scores]
"""Function that evaluates a key."""


class Work(Protocol):
    """What a worker needs to run trials; a picklable object, such as a frozen dataclass of paths and options."""

    def prepare(self) -> Trial:
        """Loads what all trials share; each worker calls it once.

        Raises:
            UserError: no trial can be run; this ends the search.
        """
        ...


@dataclass(frozen=True)
class Outcome:
    """The outcome of a trial: exactly one of ``scores`` and ``why``.

    Args:
        scores: what the trial measured, as plain data.
        why: reason why the trial failed, in one line.
        details: traceback or the like, for the log.
    """

    scores: Scores | None = None
    why: str | None = None
    details: str = ""


class Executor(Protocol):
    """Runs trials; a trial that fails, dies or never answers affects no other."""

    def run(self, keys: Sequence[Key]) -> Iterator[tuple[int, Outcome]]:
        """Evaluates keys, and yields the index of each in ``keys`` with its outcome as soon as that is known.

        Raises:
            UserError: no worker can prepare itself, or none is left.
        """
        ...


class SerialExecutor:
    """Runs trials in this process, one after the other."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial

    def run(self, keys: Sequence[Key]) -> Iterator[tuple[int, Outcome]]:
        for place, key in enumerate(keys):
            yield place, evaluate(self.trial, key)


def prepare(work: Work) -> Trial | Exception:
    """What a worker does first; an error is returned as one that can be pickled, whatever it was."""
    try:
        return work.prepare()
    except Exception as error:
        return user_error(error) or RuntimeError(f"A worker could not prepare itself.\n{traceback.format_exc()}")


def evaluate(trial: Trial, key: Key) -> Outcome:
    """Runs a trial; any error becomes an outcome, even one of memory."""
    try:
        return Outcome(scores=json.loads(json.dumps(trial(key))))
    except Exception as error:
        first = str(error).partition("\n")[0]
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return Outcome(why=f"{kind}{first}".removesuffix(": "), details=traceback.format_exc())
