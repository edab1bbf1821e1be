"""How often a fit is logged, where nobody said."""

import math

from lightning.pytorch import Callback, LightningModule, Trainer

from qpruner.datamodules.base import TokenDataModule

SELDOM = 50
"""Lightning's own interval, which is right for long fits."""
POINTS = 50
"""At least so many has the curve of a fit of as many steps."""


def log_interval(steps: float) -> int:
    """Optimizer steps between two points of the training curve.

    Args:
        steps: optimizer steps of the fit; infinite where only time ends it.
    """
    return SELDOM if math.isinf(steps) else max(1, min(SELDOM, int(steps) // POINTS))


class LogInterval(Callback):
    """Lets ``log_every_n_steps`` of the Trainer follow the length of the fit, so that a short one has a curve, too.

    For a Trainer that was not given the option, which a callback cannot tell: a run adds it there. In a fit without a
    run::

        Trainer(max_steps=20, callbacks=[LogInterval()])

    setup
        Sets the interval to the optimizer steps of the fit over `POINTS`, from 1 to `SELDOM`.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and isinstance(data, TokenDataModule):
            trainer.log_every_n_steps = log_interval(data.num_steps())  # type: ignore[attr-defined]
