"""Keeps the one checkpoint from which a run resumes."""

import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from qpruner.errors import UserError
from qpruner.files import writing


class RunCheckpoint(Checkpoint):
    """Writes a checkpoint every few optimizer steps and at the end of training, replacing the previous one.

    The file is complete at all times: the new one is written next to the old one and replaces it once it is on disk.
    A run adds this callback by default; in a fit without a run::

        Trainer(callbacks=[RunCheckpoint("last.ckpt", every_n_steps=50)])

    on_train_start
        Creates the folder and checks that the disk has enough space.
    on_train_batch_end
        Writes the checkpoint after every ``every_n_steps`` optimizer steps, or one step later if the model is validated
        after that step: a fit that resumes from there would skip this validation and lack its point of the curve.
    on_train_end
        Writes the checkpoint once more.

    Args:
        path: path of the checkpoint file.
        every_n_steps: number of optimizer steps between two checkpoints, at least 1.

    Raises:
        UserError: ``every_n_steps`` is below 1; or the disk lacks the space for a checkpoint, before the first step or
            at any step that writes one, in which case the previous checkpoint stays.
    """

    def __init__(self, path: str | Path, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise UserError(f"A checkpoint is to be written every {every_n_steps} steps; it must be at least 1.")
        self.path = Path(path)
        self.every_n_steps = every_n_steps
        self._step, self._due = 0, False  # no checkpoint is wanted before the first step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step, self._due = trainer.global_step, False
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Weights and the two moments of AdamW, twice, because the old file stays until the new one is whole.
            trained = sum(p.numel() * p.element_size() for p in pl_module.parameters() if p.requires_grad)
            needed, free = 2 * 3 * trained, shutil.disk_usage(self.path.parent).free
            if free < needed:
                raise UserError(
                    f"Checkpoints in {str(self.path.parent)!r} need {needed:,} bytes and the disk has {free:,} left. "
                    f"Free some, or name another place with --run.dir."
                )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # in the middle of a step of several micro-batches
            return
        self._step = trainer.global_step
        waited, self._due = self._due, self._due or self._step % self.every_n_steps == 0
        if self._due and (waited or not _is_validated(trainer)):
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            with writing(self.path):
                trainer.save_checkpoint(temporary, weights_only=False)  # returns on every rank once the file is written
                if trainer.is_global_zero:
                    with temporary.open("r+b") as file:
                        os.fsync(file.fileno())
                    os.replace(temporary, self.path)
        finally:
            if trainer.is_global_zero:
                temporary.unlink(missing_ok=True)
        trainer.strategy.barrier("run_checkpoint")
        self._due = False


def _is_validated(trainer: Trainer) -> bool:
    """Whether the model is validated after the batch that has just ended."""
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
