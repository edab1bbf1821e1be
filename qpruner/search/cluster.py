"""Workers on a Dask cluster, of this machine or of others."""

import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from qpruner.errors import UserError
from qpruner.search.executors import environment_of, thread_limits, worker_environments
from qpruner.search.ledger import Key
from qpruner.search.workers import Outcome, Pool, Trial, Work, WorkerDied, evaluate, prepare

CONNECT_SECONDS = 15
WORKERS_SECONDS = 60  # for a worker to come
ANSWER_SECONDS = 10  # for an outcome, which is small, to come over the network
KILL_SECONDS = 2
REFRESH_SECONDS = 0.2


@contextmanager
def cluster_pool(work: Work, workers: int, address: str | None, time_limit: float | None) -> Iterator[Pool]:
    """Workers on a cluster; on one of this machine, which ends with the context, where there is no address.

    A worker that does not answer is restarted by its nanny, which is how ``dask worker`` runs unless told otherwise.

    Raises:
        UserError: Dask is not installed, the scheduler does not answer, or too few workers are there.
    """
    check_cluster(None)
    with ExitStack() as stack:
        place: Any = address if address is not None else stack.enter_context(_local_cluster(workers))
        client = stack.enter_context(_connect(place))
        crew = Crew(client, work)
        try:
            client.wait_for_workers(workers, timeout=WORKERS_SECONDS)
        except TimeoutError:
            raise UserError(
                f"The Dask cluster has {len(crew.addresses())} workers and executor.workers is {workers}. Start more "
                f"with 'dask worker', or lower it."
            ) from None
        pool = Pool(lambda _: ClusterWorker(crew), workers, time_limit)
        stack.callback(pool.close)
        pool.wait()
        yield pool


def check_cluster(address: str | None) -> None:
    """Finds what keeps `cluster_pool` from a scheduler, in moments.

    Args:
        address: of the scheduler; None for one of this machine.

    Raises:
        UserError: Dask is not installed, or the scheduler does not answer.
    """
    try:
        import distributed  # noqa: F401
    except ImportError as error:
        raise UserError("executor.kind dask needs Dask. Install it with: pip install 'qpruner[cluster]'") from error
    if address is not None:
        with _connect(address):
            pass


def _connect(place: Any) -> Any:
    """A client of the scheduler at an address, or of a cluster."""
    from distributed import Client

    try:
        return Client(place, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"No Dask scheduler answers at {place!r} ({error}). Start one with 'dask scheduler' and name the address "
            f"that it prints in executor.address, or leave that out for workers on this machine."
        ) from error


@contextmanager
def _local_cluster(workers: int) -> Iterator[Any]:
    import dask
    from distributed import Nanny, Scheduler, SpecCluster

    here = {"host": "127.0.0.1", "dashboard": False}
    # Dask's own cluster of this machine gives all workers one environment, and ends those that take more than a share
    # of the memory that it works out itself.
    options = here | {"nthreads": 1, "memory_limit": 0, "silence_logs": logging.ERROR}
    environments = worker_environments(workers)
    settings = {
        "distributed.worker.daemon": False,  # a trial may load its data in processes of its own
        "distributed.scheduler.worker-ttl": None,  # `Pool` decides how long is too long
        **{f"distributed.nanny.pre-spawn-environ.{name}": value for name, value in thread_limits(workers).items()},
    }
    with dask.config.set(settings), environment_of({}):
        specification = {
            slot: {"cls": Nanny, "options": options | {"env": environment}}
            for slot, environment in enumerate(environments)
        }
        scheduler = {"cls": Scheduler, "options": here | {"port": 0}}
        with SpecCluster(workers=specification, scheduler=scheduler, silence_logs=logging.ERROR) as cluster:
            yield cluster


class Crew:
    """The workers of a cluster, as `ClusterWorker` shares them out.

    Args:
        client: of the cluster.
        work: what each worker prepares.
    """

    def __init__(self, client: Any, work: Work) -> None:
        self.client = client
        self.work = work
        self.name = uuid.uuid4().hex
        self.taken: set[str] = set()
        self._addresses: set[str] = set()
        self._asked, self._seen = float("-inf"), time.monotonic()

    def addresses(self) -> set[str]:
        """Of the workers that are there, as of a moment ago.

        Raises:
            UserError: the scheduler is gone, or has had no worker for a while.
        """
        now = time.monotonic()
        if now - self._asked > REFRESH_SECONDS:
            try:
                self._addresses = set(self.client.nthreads())
            except OSError as error:
                raise UserError(f"The Dask scheduler is gone ({error}). Go on with the same command.") from error
            self._asked = now
            if self._addresses:
                self._seen = now
            elif now - self._seen > WORKERS_SECONDS:
                raise UserError("The Dask cluster has no worker left. Start some, and go on with the same command.")
        return self._addresses

    def forget_addresses(self) -> None:
        self._asked = float("-inf")

    def take(self) -> str | None:
        """A worker that nobody has, if there is one."""
        free = sorted(self.addresses() - self.taken)
        if not free:
            return None
        self.taken.add(free[0])
        return free[0]

    def give_back(self, address: str) -> None:
        self.taken.discard(address)
        self.forget_addresses()


class ClusterWorker:
    """A worker of the cluster, or the place of one that is to come."""

    def __init__(self, crew: Crew) -> None:
        self.crew = crew
        self._address: str | None = None
        self._prepared = False
        self._future: Any = None

    def ready(self) -> bool:
        if self._address is None:
            self._address = self.crew.take()
            if self._address is not None:
                self._submit(_prepare, self.crew.name, self.crew.work)
        elif self._prepared:
            if self._address not in self.crew.addresses():
                raise WorkerDied
        elif answer := self._answer():
            (error,) = answer
            if error is not None:
                raise error
            self._prepared = True
        return self._prepared

    def begin(self, key: Key) -> None:
        self._submit(_evaluate, self.crew.name, key)

    def answer(self) -> Outcome | None:
        answer = self._answer()
        return answer[0] if answer else None

    def dismiss(self) -> None:
        if self._address is None:
            return
        client = self.crew.client
        self.crew.forget_addresses()
        with suppress(OSError, UserError):  # the scheduler is gone, and this worker with it
            if self._future is not None:
                self._future.cancel()
            if self._address not in self.crew.addresses():
                pass
            elif self._future is not None:  # it is at work, and a thread cannot be made to stop
                client.restart_workers([self._address], timeout=KILL_SECONDS, raise_for_error=False)
            else:
                client.run(_forget, self.crew.name, workers=[self._address], on_error="ignore")
        self.crew.give_back(self._address)

    def _submit(self, function: Any, *arguments: Any) -> None:
        self._future = self.crew.client.submit(
            function, *arguments, workers=[self._address], allow_other_workers=False, pure=False
        )

    def _answer(self) -> tuple[Any] | None:
        future = self._future
        if not future.done():
            if self._address not in self.crew.addresses():
                raise WorkerDied
            return None
        self._future = None
        try:
            return (future.result(timeout=ANSWER_SECONDS),)
        except Exception as error:  # gone with the outcome, killed again and again, or without qpruner
            raise WorkerDied(f"{type(error).__name__}: {error}") from error


# What runs in the workers.

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
