"""Trials on the workers of a Dask cluster, on this machine or on others."""

import logging
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from qpruner.errors import UserError
from qpruner.search.ledger import Key
from qpruner.search.local_cluster import local_cluster
from qpruner.search.workers import Outcome, Trial, Work, evaluate, prepare

POLL_SECONDS = 0.02  # trials take seconds to minutes
REFRESH_SECONDS = 0.2  # after which the scheduler is asked again which workers are there
CONNECT_SECONDS = 15
WORKERS_SECONDS = 60  # to wait for a worker
ANSWER_SECONDS = 10  # for an outcome, which is small, to arrive over the network
KILL_SECONDS = 2
DIED = "the worker died"
MOST_DEATHS = 3  # per worker, in a row, before any has prepared itself: beyond that it is no accident

logger = logging.getLogger(__name__)


@contextmanager
def cluster_executor(
    work: Work, workers: int, address: str | None, time_limit: float | None
) -> Iterator["ClusterExecutor"]:
    """Workers of a cluster that have prepared themselves; without an address, those of a cluster on this machine.

    A cluster on this machine ends with the context. On any other cluster, a worker that does not answer is restarted by
    its nanny, which ``dask worker`` uses by default.

    Raises:
        UserError: the scheduler does not answer, too few workers are there, or they cannot prepare themselves.
    """
    with ExitStack() as stack:
        client = stack.enter_context(_connect(address or stack.enter_context(local_cluster(workers))))
        executor = ClusterExecutor(client, work, workers, time_limit)
        if address is not None:
            stack.callback(executor.leave)
        try:
            client.wait_for_workers(workers, timeout=WORKERS_SECONDS)
        except TimeoutError:
            raise UserError(
                f"The Dask cluster has {len(client.nthreads())} workers and executor.workers is {workers}. Start more "
                f"with 'dask worker', or lower it."
            ) from None
        executor.wait()
        yield executor


def check_scheduler(address: str) -> None:
    """Checks that a scheduler answers.

    Raises:
        UserError: it does not answer.
    """
    with _connect(address):
        pass


def _connect(place: Any) -> Any:
    """A client of the scheduler at an address, or of a cluster object."""
    from distributed import Client

    try:
        return Client(place, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"No Dask scheduler answers at {place!r} ({error}). Start one with 'dask scheduler' and name the address "
            f"that it prints in executor.address, or leave that out for workers on this machine."
        ) from error


@dataclass
class Task:
    """What a worker is doing.

    Args:
        future: future of the worker's answer.
        place: index of the worker's trial among those of `ClusterExecutor.run`; None while the worker prepares itself.
        since: time at which the task began, in seconds of the monotonic clock.
    """

    future: Any
    place: int | None
    since: float


class ClusterExecutor:
    """Hands each worker one trial at a time; a worker that dies or does not answer is replaced.

    A trial whose worker dies is started once more, because the trial may not be at fault: clusters take machines away.
    A trial that kills two workers fails; one that does not answer fails at once. Workers are polled every
    `POLL_SECONDS`. Every new worker, also one that replaces another, prepares itself first.

    Args:
        client: client connected to the cluster.
        work: work that each worker prepares.
        workers: number of trials that run at a time.
        time_limit: seconds that a trial may take, excluding the preparation of its worker; None for no limit.
    """

    def __init__(self, client: Any, work: Work, workers: int, time_limit: float | None) -> None:
        self.client = client
        self.work = work
        self.workers = workers
        self.time_limit = time_limit
        self.name = uuid.uuid4().hex  # of the work, in workers that serve other searches, too
        self._tasks: dict[str, Task | None] = {}  # by the worker's address; None for one that is prepared and idle
        self._deaths = 0
        self._present: set[str] = set()
        self._asked, self._seen = float("-inf"), time.monotonic()

    def wait(self) -> None:
        """Returns when all workers have prepared themselves, so that a problem common to all is known at once."""
        while [*self._tasks.values()].count(None) < self.workers:
            for _ in self._look():
                pass
            time.sleep(POLL_SECONDS)

    def run(self, keys: Sequence[Key]) -> Iterator[tuple[int, Outcome]]:
        waiting, num_open = deque(enumerate(keys)), len(keys)
        begun_again: set[int] = set()
        while num_open:
            for place, outcome in self._look():
                if outcome.why == DIED and place not in begun_again:
                    begun_again.add(place)
                    waiting.appendleft((place, keys[place]))
                else:
                    num_open -= 1
                    yield place, outcome
            for address in [address for address, task in self._tasks.items() if task is None]:
                if waiting:
                    place, key = waiting.popleft()
                    self._begin(address, place, _evaluate, self.name, key)
            time.sleep(POLL_SECONDS)

    def leave(self) -> None:
        """Leaves the workers to others: busy ones are restarted, idle ones forget what they prepared."""
        idle = [address for address, task in self._tasks.items() if task is None]
        with suppress(OSError):  # the scheduler has gone, and its workers with it
            for address in self._tasks.keys() - idle:
                self._restart(address)
            if idle:
                self.client.run(_forget, self.name, workers=idle, on_error="ignore")

    def _look(self) -> Iterator[tuple[int, Outcome]]:
        """Looks which workers came, left or answered; yields the index of each trial that ended, and its outcome."""
        newcomers = sorted(self._addresses() - self._tasks.keys())
        for address in newcomers[: self.workers - len(self._tasks)]:
            self._begin(address, None, _prepare, self.name, self.work)
        for address, task in list(self._tasks.items()):
            if task is None:
                if address not in self._addresses():
                    self._lose(address, "its process ended")
            elif task.future.done():
                try:
                    answer = task.future.result(timeout=ANSWER_SECONDS)
                except Exception as error:  # lost with the outcome, killed again and again, or without qpruner
                    self._asked = float("-inf")
                    self._addresses()  # raises if it is the scheduler that has gone: then no trial has failed
                    yield from self._died(address, task, f"{type(error).__name__}: {error}")
                    continue
                self._tasks[address] = None
                if task.place is not None:
                    yield task.place, answer
                elif answer is not None:
                    raise answer
                else:
                    self._deaths = 0
            elif address not in self._addresses():
                yield from self._died(address, task, "its process ended")
            elif task.place is not None and time.monotonic() - task.since > (self.time_limit or float("inf")):
                self._restart(address)
                self._lose(address, why := f"no answer in {self.time_limit:g} s")
                yield task.place, Outcome(why=why)

    def _begin(self, address: str, place: int | None, function: Any, *arguments: Any) -> None:
        future = self.client.submit(function, *arguments, workers=[address], allow_other_workers=False, pure=False)
        self._tasks[address] = Task(future, place, time.monotonic())

    def _died(self, address: str, task: Task, why: str) -> Iterator[tuple[int, Outcome]]:
        self._lose(address, why)
        task.future.cancel()  # otherwise the scheduler keeps it for a worker with the same address
        if task.place is not None:
            yield task.place, Outcome(why=DIED, details=why)
            return
        self._deaths += 1
        if self._deaths == MOST_DEATHS * self.workers:
            raise UserError(
                f"{self._deaths} workers in a row were lost before their first trial ({why}). Try fewer workers, "
                f"if there may be too little memory for so many."
            )

    def _lose(self, address: str, why: str) -> None:
        logger.warning("The worker at %s is replaced: %s.", address, why)
        del self._tasks[address]

    def _restart(self, address: str) -> None:
        """Ends what a worker is doing; its thread cannot be stopped, so its process is killed."""
        task = self._tasks[address]
        assert task is not None
        task.future.cancel()
        self.client.restart_workers([address], timeout=KILL_SECONDS, raise_for_error=False)
        self._asked = float("-inf")

    def _addresses(self) -> set[str]:
        """Addresses of the workers that are there, up to `REFRESH_SECONDS` old.

        Raises:
            UserError: the scheduler has gone, or has had no worker for a while.
        """
        now = time.monotonic()
        if now - self._asked > REFRESH_SECONDS:
            try:
                self._present = set(self.client.nthreads())
            except OSError as error:
                raise UserError(f"The Dask scheduler is gone ({error}). Go on with the same command.") from error
            self._asked = now
            if self._present:
                self._seen = now
            elif now - self._seen > WORKERS_SECONDS:
                raise UserError("The Dask cluster has no worker left. Start some, and go on with the same command.")
        return self._present


# What runs inside the workers.

_trials: dict[str, Trial] = {}


def _prepare(name: str, work: Work) -> Exception | None:
    trial = prepare(work)
    if isinstance(trial, Exception):
        return trial
    _trials[name] = trial
    return None


def _evaluate(name: str, key: Key) -> Outcome:
    return evaluate(_trials[name], key)


def _forget(name: str) -> None:
    _trials.pop(name, None)
