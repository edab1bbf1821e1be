"""Processes that share a piece of work, as threads of this one or as its forks."""

import multiprocessing
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from qpruner.processes import Processes

SECONDS = 60
"""How long one waits for the others before the test fails."""


def together(*works: Callable[[Processes], Any]) -> list[Any]:
    """What each of several processes returns or raises, where each waits for all others wherever these must meet.

    Args:
        works: functions, one for each process, that do its work.
    """
    meeting = threading.Barrier(len(works), timeout=SECONDS)
    shared: dict[int, Any] = {}

    def exchanged(rank: int, value: Any) -> list[Any]:
        shared[rank] = value
        meeting.wait()
        values = [shared[other] for other in range(len(works))]
        meeting.wait()  # none gives the next before all have read this
        return values

    def processes(rank: int) -> Processes:
        def reduce(tensor: Tensor) -> Tensor:
            total: Tensor = sum(exchanged(rank, tensor.clone()))  # type: ignore[assignment]
            return total

        return replace(
            Processes.alone(),
            rank=rank,
            world_size=len(works),
            reduce=reduce,
            broadcast=lambda value: exchanged(rank, value)[0],
        )

    with ThreadPoolExecutor(len(works)) as pool:
        answers = [pool.submit(work, processes(rank)) for rank, work in enumerate(works)]
        return [answer.exception() or answer.result() for answer in answers]


def on_two_ranks(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What a function of the rank returns on each of two ranks.

    Args:
        work: function that finds the ranks in the environment, as a Trainer of two devices does.
        folder: folder for what they return.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def begin(rank: int) -> None:
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2"
        )
        rank_zero_only.rank = rank  # as Lightning sets it when it is imported
        torch.save(work(rank), folder / f"{rank}.pt")
        if dist.is_initialized():
            dist.destroy_process_group()

    ranks = [multiprocessing.get_context("fork").Process(target=begin, args=(rank,)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(2 * SECONDS)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
