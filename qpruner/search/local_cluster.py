"""A Dask cluster on this machine, whose workers share its GPUs and cores."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qpruner.errors import UserError


@contextmanager
def local_cluster(workers: int) -> Iterator[Any]:
    """A scheduler in this process and workers in other processes, which end with the context or with this process.

    Args:
        workers: number of processes; each has a GPU or a share of the cores, see `worker_environments`.

    Raises:
        UserError: the processes cannot be started.
    """
    import dask  # here and below, so that a search in one process is spared the half second that the import takes
    from distributed import Nanny, Scheduler, SpecCluster

    here = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    # Dask's own local cluster gives all workers the same environment, and ends those that use more than a share of the
    # memory that it computes itself.
    options = here | {"nthreads": 1, "memory_limit": 0, "silence_logs": logging.CRITICAL}
    specification = {
        slot: {"cls": Nanny, "options": options | {"env": environment}}
        for slot, environment in enumerate(worker_environments(workers))
    }
    settings = {
        "distributed.worker.daemon": False,  # a trial may load its data in processes of its own
        "distributed.scheduler.worker-ttl": None,  # `ClusterExecutor` decides how long is too long
        # A worker that was lost this long ago, and is just being replaced once more, would be given up for good.
        "distributed.deploy.lost-worker-timeout": "1000 days",
        **{f"distributed.nanny.pre-spawn-environ.{name}": value for name, value in thread_limits(workers).items()},
    }
    with dask.config.set(settings), environment_kept():
        scheduler = {"cls": Scheduler, "options": here | {"port": 0}}
        # Workers are killed when a trial hangs. Dask reports that as an error; `ClusterExecutor` reports it itself.
        try:
            cluster = SpecCluster(workers=specification, scheduler=scheduler, silence_logs=logging.CRITICAL)
        except RuntimeError as error:
            raise UserError(
                f"The {workers} processes of the workers could not be started ({error}). Each imports the script that "
                f"was run, so in one of your own let the search stand under: if __name__ == '__main__'"
            ) from error
        with cluster:
            yield cluster


def worker_environments(workers: int) -> list[dict[str, str]]:
    """Environment variables that give each worker one GPU or, where there is none, a share of the cores.

    With more workers than GPUs, some workers share a GPU.
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
    """Environment variables that divide the threads of this process among its workers."""
    import torch

    threads = str(max(1, torch.get_num_threads() // workers))
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


@contextmanager
def environment_kept() -> Iterator[None]:
    """Restores the environment variables afterwards: Dask sets variables for its processes in this one."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
