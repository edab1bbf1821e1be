"""The training curve of fits of any length."""

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from qpruner.callbacks.log_interval import LogInterval, log_interval
from qpruner.datamodules import StoriesDataModule


@pytest.mark.parametrize(
    ("steps", "interval"),
    [(0, 1), (1, 1), (49, 1), (99, 1), (100, 2), (149, 2), (2499, 49), (2500, 50), (10**6, 50), (math.inf, 50)],
)
def test_interval_by_steps(steps: float, interval: int) -> None:
    assert log_interval(steps) == interval


class Curve(Logger):
    """Keeps the steps at which the loss was logged."""

    name, version = "curve", "0"

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def log_hyperparams(self, *args: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "loss" in metrics:
            assert step is not None
            self.steps.append(step)


class Slope(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any) -> torch.Tensor:
        self.log("loss", self.weight)
        return self.weight * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("accumulate", "epochs", "logged"), [(1, 2, range(10)), (2, 40, range(1, 120, 2))])
def test_a_short_fit_has_a_curve(stories: StoriesDataModule, accumulate: int, epochs: int, logged: range) -> None:
    """Five batches an epoch, which are three optimizer steps of two."""
    curve = Curve()
    Trainer(
        accelerator="cpu", max_epochs=epochs, accumulate_grad_batches=accumulate, limit_val_batches=0, logger=curve,
        callbacks=[LogInterval()], enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(Slope(), datamodule=stories)  # fmt: skip
    assert sorted(set(curve.steps)) == [*logged]
