"""The schedule of gradual pruning: how much is pruned after which optimizer step."""

import math
from dataclasses import dataclass

from qpruner.errors import UserError


@dataclass(frozen=True)
class CubicSchedule:
    """Nothing is pruned in warm-up, everything by the start of cool-down; in between, fast at first and slowly at last.

    With w steps of warm-up and c of cool-down out of T steps, the share of the pruning that is done after step t is ``1
    - (1 - (t - w) / (T - w - c))^3`` (Zhu and Gupta, arXiv 1710.01878, equation 1; LoRAPrune, arXiv 2305.18403). Units
    are removed in events, at the multiples of ``every_n_steps`` in between and at step T - c, which removes the last
    ones.

    Args:
        warmup: share of all optimizer steps before the first units are removed, in [0, 1).
        cooldown: share of all optimizer steps after the last units are removed, in [0, 1); less than 1 together with
            ``warmup``.
        every_n_steps: number of optimizer steps between two pruning events, at least 1.
    """

    warmup: float = 0.1
    cooldown: float = 0.1
    every_n_steps: int = 10

    def __post_init__(self) -> None:
        if not (0 <= self.warmup < 1 and 0 <= self.cooldown < 1 and self.warmup + self.cooldown < 1):
            raise UserError(
                f"schedule.warmup is {self.warmup} and schedule.cooldown {self.cooldown}; both are shares of the steps "
                f"in [0, 1), together less than 1."
            )
        if self.every_n_steps < 1:
            raise UserError(f"schedule.every_n_steps is {self.every_n_steps}; it is at least 1.")

    def first(self, total_steps: int) -> int:
        """The step at which pruning begins; nothing is removed there yet."""
        return round(self.warmup * total_steps)

    def last(self, total_steps: int) -> int:
        """The step of the last pruning event."""
        return total_steps - round(self.cooldown * total_steps)

    def check(self, total_steps: float) -> None:
        """Makes sure that a fit is long enough for one event before the last.

        Args:
            total_steps: number of optimizer steps of the fit; infinite when it has no end.

        Raises:
            UserError: the fit is too short, or has no end.
        """
        if math.isinf(total_steps) or total_steps < 0:
            raise UserError(
                "The fit has no end, so that a pruning schedule has none. Give --trainer.max_steps or "
                "--trainer.max_epochs."
            )
        steps = int(total_steps)
        room = self.last(steps) - self.first(steps)
        if room <= self.every_n_steps:
            raise UserError(
                f"The pruning schedule is longer than the fit: schedule.every_n_steps is {self.every_n_steps}, and "
                f"between warm-up and cool-down lie {room} of the fit's {steps} optimizer steps. Train longer, or "
                f"lower schedule.every_n_steps, schedule.warmup or schedule.cooldown."
            )

    def is_event(self, step: int, total_steps: int) -> bool:
        """Whether units are removed after an optimizer step, counted from 1."""
        first, last = self.first(total_steps), self.last(total_steps)
        return step == last or (step % self.every_n_steps == 0 and first < step < last)

    def share(self, step: int, total_steps: int) -> float:
        """Share of the pruning that is done after an optimizer step, in [0, 1]."""
        first, last = self.first(total_steps), self.last(total_steps)
        if step >= last:
            return 1.0
        return 1 - (1 - max(0, step - first) / (last - first)) ** 3
