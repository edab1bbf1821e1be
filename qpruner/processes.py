"""The processes that share a piece of work, each with a device of its own; what a Trainer knows of them, without it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


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
