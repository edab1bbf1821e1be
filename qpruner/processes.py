"""The processes that share a piece of work, each with a device of its own; what a Trainer knows of them, without it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from qpruner.errors import UserError

T = TypeVar("T")

LONGEST = 1000
"""Bytes of an error that the other processes hear of."""


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
        precision: name of the precision that ``forward_context`` computes in, such as ``bf16-mixed``.
    """

    device: torch.device
    rank: int
    world_size: int
    forward_context: Callable[[], AbstractContextManager[Any]]
    reduce: Callable[[Tensor], Tensor]
    broadcast: Callable[[Any], Any]
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
        )

    def first_alone(self) -> "Processes":
        """This process, which is the first, as one that shares its work with no other."""
        return replace(self.alone(self.device, self.forward_context), precision=self.precision)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files and speaks."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Prints a text once, however many processes say it."""
        if self.is_first:
            print(text)

    def of_first(self, find: Callable[[], T]) -> T:
        """What the first process finds, or the error that it meets, on all; see `of_first`."""
        return of_first(find, is_first=self.is_first, broadcast=self.broadcast)

    def of_each(self, find: Callable[[], T]) -> T:
        """The result of a function that every process calls; returns once all are done, and fails if any of them did.

        Args:
            find: function that does a share of the work, without waiting for other processes.

        Raises:
            UserError: one of the others met an error; its own error is raised as it is.
        """
        error: Exception | None = None
        try:
            answer = find()
        except Exception as own:
            error = own
        said = torch.zeros(self.world_size, LONGEST, dtype=torch.int64, device=self.device)
        if error is not None:
            text = list(_told(error, f"Process {self.rank}").encode()[:LONGEST])
            said[self.rank, : len(text)] = torch.tensor(text, device=self.device)
        rows = self.reduce(said).tolist()
        if error is not None:
            raise error
        for row in rows:
            if any(row):
                raise UserError(bytes(row).rstrip(b"\0").decode(errors="ignore"))
        return answer


def accelerator_for(given: Any) -> Any:
    """What Lightning is given as an accelerator: ``auto`` is the CPU on machines whose GPU it would reach by MPS.

    Calibration, metrics and the price of gates are computed in float64, which MPS does not have.

    Args:
        given: what the user gave: a name, or an object of Lightning's.
    """
    return "cpu" if given == "auto" and torch.backends.mps.is_available() else given


def check_device(device: torch.device) -> None:
    """Refuses a device that cannot compute everything that is computed on one.

    Raises:
        UserError: it is that of MPS.
    """
    if device.type == "mps":
        raise UserError(
            "The accelerator is mps, which has no float64, and calibration and metrics are computed in it. Use cpu."
        )


def of_first(find: Callable[[], T], *, is_first: bool, broadcast: Callable[[Any], Any]) -> T:
    """Calls a function on the first process alone and gives its result to all processes.

    Args:
        find: function that does the work.
        is_first: whether this is the first process.
        broadcast: function that gives each process the object of the first.

    Raises:
        UserError: the first process met an error; none of the others is left waiting.
    """
    answer: Any = None
    if is_first:
        try:
            answer = find()
        except Exception as error:
            broadcast(error if isinstance(error, UserError) else UserError(_told(error, "The first process")))
            raise
    answer = broadcast(answer)
    if isinstance(answer, UserError):
        raise answer
    result: T = answer
    return result


def _told(error: Exception, who: str) -> str:
    """An error of one process, for the others to tell: a mistake as it is, any other with who met it."""
    return str(error) if isinstance(error, UserError) else f"{who} failed: {type(error).__name__}: {error}"
