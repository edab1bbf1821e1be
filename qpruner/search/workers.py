"""Workers, each of which runs one trial at a time, and the pool that hands trials out to them."""

import json
import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from qpruner.errors import UserError, user_error
from qpruner.search.ledger import Key, Scores

POLL_SECONDS = 0.02  # trials take seconds to minutes
MOST_DEATHS = 3  # in a row of workers that had not prepared themselves yet: it is no accident

Trial = Callable[[Key], Scores]
"""Evaluates a key."""

logger = logging.getLogger(__name__)


class Work(Protocol):
    """What a worker needs to run trials; an object that pickles, such as a frozen dataclass of paths and options."""

    def prepare(self) -> Trial:
        """Loads what all trials share; each worker calls it once.

        Raises:
            UserError: no trial can be run; it ends the search.
        """
        ...


@dataclass(frozen=True)
class Outcome:
    """What became of a trial: exactly one of ``scores`` and ``why``.

    Args:
        scores: what it found, as plain data.
        why: it failed, in a line.
        details: a traceback, for the log.
    """

    scores: Scores | None = None
    why: str | None = None
    details: str = ""


class WorkerDied(Exception):
    """The process of a worker is no longer there."""

    def __init__(self, why: str = "its process ended") -> None:
        super().__init__(why)


class Executor(Protocol):
    """Runs trials; a trial that fails, dies or never answers costs only itself."""

    def run(self, keys: Sequence[Key]) -> Iterator[tuple[int, Outcome]]:
        """Evaluates keys, and gives the place of each among ``keys`` and its outcome as soon as it is known.

        Raises:
            UserError: no worker can prepare itself, or none is left.
        """
        ...


class Worker(Protocol):
    """One process; the methods return at once."""

    def ready(self) -> bool:
        """Whether it has prepared itself.

        Raises:
            WorkerDied: it is gone.
            Exception: what `Work.prepare` raised.
        """
        ...

    def begin(self, key: Key) -> None:
        """Hands it a trial."""
        ...

    def answer(self) -> Outcome | None:
        """The outcome of the trial; None while it runs.

        Raises:
            WorkerDied: it is gone.
        """
        ...

    def dismiss(self) -> None:
        """Ends it, whatever it does."""
        ...


class Pool:
    """An executor that hands trials to workers, and replaces the workers that die or do not answer.

    Args:
        hire: makes the worker of a slot, from 0; it may go on preparing itself.
        workers: trials that run at a time.
        time_limit: seconds that a trial may take, the preparation of its worker apart; None for no limit.
    """

    def __init__(self, hire: Callable[[int], Worker], workers: int, time_limit: float | None) -> None:
        self.hire = hire
        self.time_limit = time_limit
        self._workers = [hire(slot) for slot in range(workers)]
        self._deaths = [0] * workers

    def wait(self) -> None:
        """Returns when every worker has prepared itself, so that what keeps them all from it is known at once."""
        while True:
            ready = [self._ready(slot) for slot in range(len(self._workers))]
            if all(ready):
                return
            time.sleep(POLL_SECONDS)

    def run(self, keys: Sequence[Key]) -> Iterator[tuple[int, Outcome]]:
        waiting = deque(enumerate(keys))
        running: dict[int, tuple[int, float]] = {}
        while waiting or running:
            for slot in range(len(self._workers)):
                if slot in running:
                    place, since = running[slot]
                    if outcome := self._look(slot, time.monotonic() - since):
                        del running[slot]
                        yield place, outcome
                elif waiting and self._ready(slot):
                    place, key = waiting.popleft()
                    self._workers[slot].begin(key)
                    running[slot] = place, time.monotonic()
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        for worker in self._workers:
            worker.dismiss()

    def _ready(self, slot: int) -> bool:
        try:
            ready = self._workers[slot].ready()
        except WorkerDied as error:
            self._deaths[slot] += 1
            if self._deaths[slot] == MOST_DEATHS:
                raise UserError(
                    f"{MOST_DEATHS} workers in a row were lost before their first trial ({error}). Try fewer workers, "
                    f"if there may be too little memory for so many."
                ) from error
            self._replace(slot)
            return False
        if ready:
            self._deaths[slot] = 0
        return ready

    def _look(self, slot: int, seconds: float) -> Outcome | None:
        try:
            outcome = self._workers[slot].answer()
        except WorkerDied as error:
            outcome = Outcome(why="the worker died", details=str(error))
            self._replace(slot)
        if outcome is None and self.time_limit is not None and seconds > self.time_limit:
            outcome = Outcome(why=f"no answer in {self.time_limit:g} s")
            self._replace(slot)
        return outcome

    def _replace(self, slot: int) -> None:
        logger.warning("Worker %d is replaced.", slot)
        self._workers[slot].dismiss()
        self._workers[slot] = self.hire(slot)


def prepare(work: Work) -> Trial | Exception:
    """What a worker does first; an error comes back as one that pickles, whatever it was."""
    try:
        return work.prepare()
    except Exception as error:
        return user_error(error) or RuntimeError(f"A worker could not prepare itself.\n{traceback.format_exc()}")


def evaluate(trial: Trial, key: Key) -> Outcome:
    """Runs a trial; any error is an outcome, also one of memory."""
    try:
        return Outcome(scores=json.loads(json.dumps(trial(key))))
    except Exception as error:
        first = str(error).partition("\n")[0]
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return Outcome(why=f"{kind}{first}".removesuffix(": "), details=traceback.format_exc())
