"""Processes that share a piece of work, as threads of this one."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

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
