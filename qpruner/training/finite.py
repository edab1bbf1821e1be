"""Finds numbers that are not finite, with at most one synchronization with the device."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from qpruner.errors import UserError
from qpruner.training.sharding import is_part

NEVER = 2**62
"""Stands for a step that has not occurred."""


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no floating-point tensor holds an infinity or a nan; of sharded ones only the local shard is checked."""
    flags = [_local(tensor).isfinite().all() for tensor in tensors if tensor.is_floating_point()]
    devices = {flag.device for flag in flags}
    return all(bool(torch.stack([flag for flag in flags if flag.device == device]).all()) for device in devices)


def broken_names(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the floating-point tensors that hold an infinity or a nan."""
    return [
        name for name, tensor in tensors if tensor.is_floating_point() and not bool(_local(tensor).isfinite().all())
    ]


def _local(tensor: Tensor) -> Tensor:
    """This device's shard of a tensor; all of it unless it is sharded."""
    held: Tensor = tensor.to_local() if is_part(tensor) else tensor  # type: ignore[attr-defined]
    return held


def tensors_of(state: object) -> Iterable[Tensor]:
    """All tensors of nested mappings and sequences, such as the state of an optimizer."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for part in state.values() if isinstance(state, dict) else state:
            yield from tensors_of(part)


class NotFinite(UserError):
    """Stops a fit whose numbers are no longer finite.

    Args:
        problem: what is not finite, as a sentence without its full stop.
        kept: what became of the adapters, as a sentence without its full stop.
        remedy: what to change, as a sentence without its full stop.
        again: how to repeat the fit with that change, as the end of the sentence in ``remedy``.
    """

    def __init__(self, problem: str, kept: str, remedy: str, again: str) -> None:
        super().__init__(problem, kept, remedy, again)
        self.problem, self.kept, self.remedy, self.again = problem, kept, remedy, again

    def __str__(self) -> str:
        return f"{self.problem}; {self.kept}. {self.remedy}, and {self.again}."


def not_finite(model: nn.Module, what: str, *, later_phase: bool = False) -> UserError:
    """The error that stops a fit: what is not finite, why if that can be determined, and what to do about it.

    Args:
        model: model that is trained, adapters included.
        what: what is not finite, with its verb, as the beginning of a sentence.
        later_phase: whether earlier phases of the run are complete, which starting over would discard.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if broken := broken_names((name, tensor) for name, tensor in model.state_dict().items() if name not in trained):
        return UserError(
            f"{what} not finite. Of the base model {len(broken)} tensors are not, {broken[0]} the first. Give an "
            f"undamaged model as --model.base, in a --model.dtype that holds its values."
        )
    if not trained:
        return UserError(
            f"{what} not finite, though its weights are: the computation overflows. Use --trainer.precision bf16-mixed "
            f"or 32-true, or another --model.dtype."
        )
    if any(parameter.dtype == torch.float16 for parameter in trained.values()):
        remedy = "Adapters in float16 are too coarse to train: use --trainer.precision 16-mixed or bf16-mixed"
    else:
        rate = "optimizer.lr of this phase in --phases" if later_phase else "--model.optimizer.lr"
        remedy = (
            f"Lower {rate}, clip gradients by --trainer.gradient_clip_val, or compute with --trainer.precision "
            f"bf16-mixed or 32-true"
        )
    again = "begin anew with --restart or under another --run.name"
    if later_phase:
        again = "begin anew under another --run.name; --restart would throw away the phases that are over, too"
    return NotFinite(f"{what} not finite", "what was trained since the last checkpoint is not kept", remedy, again)


class LossWatch:
    """Remembers, on the device, the first step whose loss was not finite; only `first_broken` synchronizes with it."""

    def __init__(self) -> None:
        self._step: Tensor | None = None

    def see(self, loss: Tensor, step: int) -> None:
        """Checks the loss of a step; step numbers must be ascending."""
        if self._step is None:
            self._step = torch.full((), NEVER, dtype=torch.int64, device=loss.device)
        self._step = torch.where(loss.detach().isfinite(), self._step, self._step.clamp(max=step))

    def first_broken(self, device: torch.device, lowest: Callable[[Tensor], Tensor]) -> int | None:
        """The first step whose loss was not finite on any process; a collective call of all processes.

        Args:
            device: device of this process.
            lowest: function that takes the minimum of a number over all processes.
        """
        mine = torch.full((), NEVER, dtype=torch.int64, device=device) if self._step is None else self._step
        step = int(lowest(mine.clone()))
        return None if step == NEVER else step
