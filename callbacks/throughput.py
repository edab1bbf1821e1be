"""Tokens per second of training."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class Throughput(Callback):
    """Logs ``train/tokens_per_second``: tokens of all ranks, without padding, over the time since the last log.

    A run adds it by default; in a fit without a run::

        Trainer(callbacks=[Throughput()])

    on_train_start
        Starts counting.
    on_train_batch_end
        Adds the tokens of the batch, and logs every ``log_every_n_steps`` optimizer steps, however many batches these
        accumulate; only then does it wait for the device. The time of loading data counts.
    on_validation_start, on_validation_end
        Exclude the time of validation.
    """

    def __init__(self) -> None:
        self._tokens: int | Tensor = 0  # on the device after the first batch
        self._since = 0.0
        self._paused = 0.0
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._tokens = self._tokens + batch["attention_mask"].sum()
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        stepped = trainer.global_step != self._step  # other batches only accumulate, and are not logged
        self._step = trainer.global_step
        if every and stepped and self._step % every == 0:
            rate = float(self._tokens) / (time.perf_counter() - self._since)
            pl_module.log("train/tokens_per_second", rate, prog_bar=True, sync_dist=True, reduce_fx="sum")
            self._begin()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since += time.perf_counter() - self._paused

    def _begin(self) -> None:
        self._tokens = 0
        self._since = time.perf_counter()
