"""Where trials run: in this process, in other processes on this machine, or on a Dask cluster."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from qpruner.errors import UserError
from qpruner.search.cluster import check_scheduler, cluster_executor
from qpruner.search.workers import Executor, SerialExecutor, Work


@dataclass(frozen=True)
class ExecutorConfig:
    """Where trials run.

    Args:
        kind: where trials run: ``serial`` runs them one after the other in this process; ``processes`` in processes on
            this machine, each with one of the visible GPUs or a share of the cores; ``dask`` on the cluster of a Dask
            scheduler or, if no address is given, in the same way as ``processes``.
        workers: number of trials that run at a time, at least 1. A Dask cluster must have at least this many workers.
        address: address of a Dask scheduler, such as ``tcp://10.0.0.1:8786``.
        time_limit: seconds that a trial may take; a trial that takes longer fails, and its worker is replaced. Not
            available for ``serial``, because a process cannot give up on itself.

    Raises:
        UserError: an invalid value, or values that contradict each other.
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
    """Checks that trials can run there, before the work that they share is prepared.

    Raises:
        UserError: the scheduler at the address does not answer.
    """
    if config.address is not None:
        check_scheduler(config.address)


@contextmanager
def make_executor(config: ExecutorConfig, work: Work) -> Iterator[Executor]:
    """Workers that have prepared themselves; they end with the context, whatever they are doing.

    Raises:
        UserError: from `Work.prepare`, a scheduler that does not answer, or a cluster without workers.
        RuntimeError: the preparation failed in another way.
    """
    if config.kind == "serial":
        yield SerialExecutor(work.prepare())
    else:
        with cluster_executor(work, config.workers, config.address, config.time_limit) as executor:
            yield executor
