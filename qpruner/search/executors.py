"""Where trials run: in this process, in local processes or on a Dask cluster."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

from qpruner.errors import UserError
from qpruner.search.ledger import Key
from qpruner.search.workers import Executor, Outcome, Pool, Trial, Work, WorkerDied, evaluate, prepare


@dataclass(frozen=True)
class ExecutorConfig:
    """Where trials run.

    Args:
        kind: ``serial`` runs them one after the other in this process; ``processes`` in local processes, each with one
            of the visible GPUs or a share of the cores; ``dask`` on a Dask cluster.
        workers: trials that run at a time, at least 1. On a Dask cluster at least so many workers must be there.
        address: of a Dask scheduler, such as ``tcp://10.0.0.1:8786``; without one, ``dask`` starts a cluster on this
            machine.
        time_limit: seconds that a trial may take; a longer one fails and its worker is replaced. ``serial`` has none,
            for a process cannot give up on itself.

    Raises:
        UserError: an impossible value, or values that do not go together.
    """

    kind: Literal["serial", "processes", "dask"] = "serial"
    workers: int = 1
    address: str | None = None
    time_limit: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("serial", "processes", "dask"):
            raise UserError(f"executor.kind is {self.kind!r}; it is one of serial, processes and dask.")
        if self.workers < 1:
            raise UserError(f"executor.workers is {self.workers}; it must be at least 1.")
        if self.time_limit is not None and not self.time_limit > 0:
            raise UserError(f"executor.time_limit is {self.time_limit} s; it must be above 0, or null for no limit.")
        if self.kind == "serial" and self.workers > 1:
            raise UserError(
                f"executor.workers is {self.workers}, but the serial executor runs one trial at a time. Choose "
                f"executor.kind processes."
            )
        if self.kind == "serial" and self.time_limit is not None:
            raise UserError(
                f"executor.time_limit is {self.time_limit:g} s, but the serial executor cannot give up on a trial in "
                f"its own process. Choose executor.kind processes, with 1 worker."
            )
        if self.kind != "dask" and self.address is not None:
            raise UserError(f"executor.address is {self.address!r}, which only executor.kind dask has.")


def check_executor(config: ExecutorConfig) -> None:
    """Finds what keeps trials from running there, before the work that they share is prepared.

    Raises:
        UserError: Dask is not installed, or its scheduler does not answer.
    """
    if config.kind == "dask":
        from qpruner.search.cluster import check_cluster

        check_cluster(config.address)


@contextmanager
def make_executor(config: ExecutorConfig, work: Work) -> Iterator[Executor]:
    """Workers that have prepared themselves; they end with the context, whatever they do.

    Raises:
        UserError: from `Work.prepare`, a scheduler that does not answer, or a cluster without workers.
        RuntimeError: the preparation failed in another way.
    """
    if config.kind == "serial":
        yield SerialExecutor(work.prepare())
        return
    if config.kind == "processes":
        environments = worker_environments(config.workers)
        pool = Pool(lambda slot: ProcessWorker(work, environments[slot]), config.workers, config.time_limit)
        try:
            pool.wait()
            yield pool
        finally:
            pool.close()
        return
    from qpruner.search.cluster import cluster_pool

    with cluster_pool(work, config.workers, config.address, config.time_limit) as pool:
        yield pool


class SerialExecutor:
    """Runs trials in this process, one after the other."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial

    def run(self, keys: Sequence[Key]) -> Iterator[tuple[int, Outcome]]:
        for place, key in enumerate(keys):
            yield place, evaluate(self.trial, key)


class ProcessWorker:
    """A process of this machine, started anew rather than forked, so that it may use a GPU.

    Args:
        work: what it prepares.
        environment: variables that it starts with, beside those of this process.
    """

    def __init__(self, work: Work, environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # No daemon, for a trial may load its data in processes of its own; `_end_with_parent` is what ends it.
        self._process = context.Process(target=_serve, args=(theirs, work))
        with environment_of(environment):
            self._process.start()
        theirs.close()
        self._prepared = False

    def ready(self) -> bool:
        alive = self._process.is_alive()
        if not self._prepared and self._connection.poll():
            if error := self._receive():
                raise error
            self._prepared = True
        if not alive:
            raise WorkerDied
        return self._prepared

    def begin(self, key: Key) -> None:
        with suppress(OSError):  # it died just now, which `answer` finds out
            self._connection.send(key)

    def answer(self) -> Outcome | None:
        alive = self._process.is_alive()
        if self._connection.poll():
            return self._receive()
        if not alive:
            raise WorkerDied
        return None

    def dismiss(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            raise WorkerDied from None


def _serve(connection: Connection, work: Work) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C reaches all processes; the one that searches ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    trial = prepare(work)
    if isinstance(trial, Exception):
        connection.send(trial)
        return
    connection.send(None)
    with suppress(EOFError):  # the searching process is gone
        while True:
            connection.send(evaluate(trial, connection.recv()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def worker_environments(workers: int) -> list[dict[str, str]]:
    """Variables of the environment that give each worker one GPU, or where there is none a share of the cores.

    With more workers than GPUs, some share one.
    """
    import torch

    environment = thread_limits(workers)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    devices = visible.split(",")[:count] if visible else [str(device) for device in range(count)]
    return [
        environment | ({"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if devices else {})
        for slot in range(workers)
    ]


def thread_limits(workers: int) -> dict[str, str]:
    """Variables of the environment that divide the threads of this process among its workers."""
    import torch

    threads = str(max(1, torch.get_num_threads() // workers))
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


@contextmanager
def environment_of(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables for the processes that are started meanwhile; afterwards the environment is as it was."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
