"""How often a fit is logged if the user has not set an interval."""

import math

from lightning.pytorch import Callback, LightningModule, Trainer

from qpruner.datamodules.base import TokenDataModule

SELDOM = 50
"""Lightning's own interval, which is right for long fits."""
POINTS = 50
"""Least number of points on the curve of a fit that has at least as many steps."""


def log_interval(steps: float) -> int:
    """Optimizer steps between two points of the training curve.

    Args:
        steps: number of optimizer steps of the fit; infinite if only time ends it.
    """
    return SELDOM if math.isinf(steps) else max(1, min(SELDOM, int(steps) // POINTS))


class LogInterval(Callback):
    """Adapts the Trainer's ``log_every_n_steps`` to the length of the fit, so that a short one has a curve, too.

    It is for a Trainer that was not given this option. A callback cannot tell whether it was, so a run adds this one
    only in that case. In a fit without a run::

        Trainer(max_steps=20, callbacks=[LogInterval()])

    setup
        Sets the interval to the number of optimizer steps of the fit divided by `POINTS`, within 1 to `SELDOM`.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and isinstance(data, TokenDataModule):
            trainer.log_every_n_steps = log_interval(data.num_steps())  # type: ignore[attr-defined]
