"""The processes that share a piece of work, each with a device of its own; what a Trainer knows of them, without it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from qpruner.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes that work on one model together, as one of them sees them.

    Args:
        device: device that this process computes on.
        rank: place of this process among all, from 0.
        world_size: number of processes.
        forward_context: function that makes the context in which a model computes, such as autocast under
            ``bf16-mixed``.
        reduce: function that sums a tensor over all processes; the sum is the same on each.
        broadcast: function that gives each process the object of the first.
        barrier: function that waits until all processes have called it.
        precision: name of the precision that ``forward_context`` computes in, such as ``bf16-mixed``.
    """

    device: torch.device
    rank: int
    world_size: int
    forward_context: Callable[[], AbstractContextManager[Any]]
    reduce: Callable[[Tensor], Tensor]
    broadcast: Callable[[Any], Any]
    barrier: Callable[[], None]
    precision: str = "32-true"

    @classmethod
    def alone(
        cls,
        device: torch.device | str = "cpu",
        forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Self:
        """One process that shares its work with no other."""
        return cls(
            device=torch.device(device),
            rank=0,
            world_size=1,
            forward_context=forward_context,
            reduce=lambda tensor: tensor,
            broadcast=lambda value: value,
            barrier=lambda: None,
        )

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files and speaks."""
        return self.rank == 0

    def of_first(self, find: Callable[[], T]) -> T:
        """What the first process finds, or the error that it meets, on all; see `of_first`."""
        return of_first(find, is_first=self.is_first, broadcast=self.broadcast)


def of_first(find: Callable[[], T], *, is_first: bool, broadcast: Callable[[Any], Any]) -> T:
    """What the first of several processes finds, on all of them; the others are spared the work.

    Args:
        find: what it does.
        is_first: whether this is the first process.
        broadcast: gives each process the object of the first.

    Raises:
        UserError: the first met an error; none of the others waits for it.
    """
    answer: Any = None
    if is_first:
        try:
            answer = find()
        except Exception as error:
            told = isinstance(error, UserError)
            broadcast(error if told else UserError(f"The first process failed: {type(error).__name__}: {error}"))
            raise
    answer = broadcast(answer)
    if isinstance(answer, UserError):
        raise answer
    found: T = answer
    return found
