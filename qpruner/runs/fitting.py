"""Carries out the phases of a run, each with a module and a Trainer of its own."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info

from qpruner.callbacks import KeepModel, LogInterval, MeasuredEnd, MeasuredStage, RunCheckpoint, RunReport, Throughput
from qpruner.callbacks.compression import CompressionInSetup
from qpruner.callbacks.report import ResultNotFinite
from qpruner.datamodules.base import TokenDataModule
from qpruner.records.model_card import write_model_card
from qpruner.records.report import Summary, show_summary, write_report
from qpruner.runs.checks import Preflight
from qpruner.runs.phases import Phase
from qpruner.runs.trainers import TrainerOptions, make_trainer, options_of_trainer
from qpruner.training.checkpoint_file import read_checkpoint
from qpruner.training.module import LoRAFinetuner
from qpruner.training.preflight import check_callbacks, check_checkpoint, check_trainer
from qpruner.training.sharding import splits


@dataclass
class PhasedFit:
    """The fits of a run, from one of its phases to the last.

    Args:
        phases: all phases of the run.
        model: module of the first phase.
        data: data module of all phases.
        trainer: options of the Trainers.
        checkpoint_every_n_steps: number of optimizer steps between two checkpoints.
        rehearses: whether only a few batches are tried, in the first phase, and nothing is kept.
    """

    phases: Sequence[Phase]
    model: LoRAFinetuner
    data: TokenDataModule
    trainer: TrainerOptions
    checkpoint_every_n_steps: int
    rehearses: bool

    def prepare(self, number: int, options: Mapping[str, Any]) -> tuple[LoRAFinetuner, Trainer]:
        """The module and the Trainer of a phase.

        Args:
            number: number of the phase, from 1.
            options: options for this Trainer alone, in addition to those of all Trainers.

        Raises:
            UserError: the options of the Trainer are not possible, or callbacks cannot act.
        """
        phase, later = self.phases[number - 1], self.phases[number:]
        module = phase.module(self.model)
        module.kept_in = None if self.rehearses else phase.kept_in
        for callback in phase.compressing:
            callback.folder = None if self.rehearses else phase.folder
        callbacks = phase.callbacks if self.rehearses else [*self._acting(phase, later)]
        if options.get("log_every_n_steps") is None:
            callbacks = [LogInterval(), *callbacks]
        trainer = make_trainer(
            {**options, **phase.length}, phase.folder, callbacks, keeps_checkpoint=not self.rehearses
        )
        check_trainer(trainer)
        for other in later:
            check_callbacks(trainer, other.callbacks)
        if splits(trainer.strategy):
            for fitted in (module, *(other.module(self.model) for other in later)):
                fitted.check_split()
        return module, trainer

    def _acting(self, phase: Phase, later: Sequence[Phase]) -> Iterator[Callback]:
        """The callbacks of a phase, together with those that check, measure and save, in the order of their actions."""
        yield Preflight(phase, [callback for other in later for callback in other.compressing])
        yield (report := RunReport(phase.folder, phase.number))
        for callback in phase.callbacks:
            yield callback
            if isinstance(callback, CompressionInSetup):
                yield MeasuredStage(report, callback.leaves.value)
        yield MeasuredEnd(report)
        yield KeepModel(phase.kept_in, phase.folder.model)
        yield Throughput()
        yield RunCheckpoint(phase.folder.checkpoint, self.checkpoint_every_n_steps)

    def run(
        self, number: int, module: LoRAFinetuner, trainer: Trainer, *, continues: bool, ckpt_path: str | None
    ) -> None:
        """Fits one phase after the other.

        Args:
            number: number of the phase to begin with.
            module: module of that phase.
            trainer: Trainer of that phase.
            continues: whether that phase resumes from its checkpoint, if it has one.
            ckpt_path: checkpoint whose adapters the first phase begins with, if it does not resume; None for none.
        """
        if trainer.is_global_zero and not self.rehearses:
            for finished in self.phases[: number - 1]:  # perhaps interrupted before they could do so
                finished.folder.drop_training_state()
        while True:
            phase = self.phases[number - 1]
            if len(self.phases) > 1:
                rank_zero_info(f"Phase {number} of {len(self.phases)}.")
            begins_with = ckpt_path if number == 1 else None
            if continues and phase.folder.checkpoint.exists():
                read_checkpoint(phase.folder.checkpoint)  # so that damage is reported
                begins_with = str(phase.folder.checkpoint)
                rank_zero_info(f"Going on from {begins_with}.")
            elif begins_with is not None:
                check_checkpoint(module, begins_with, is_first=trainer.is_global_zero)
            module.release()  # what an earlier fit left in its memory is in the folder, too
            try:
                trainer.fit(module, datamodule=self.data, ckpt_path=begins_with, weights_only=True)
            except ResultNotFinite as error:  # raised on all ranks
                raise self._set_aside(phase, error, acts=trainer.is_global_zero) from error
            if self.rehearses:
                return
            if trainer.is_global_zero:
                self._end(phase)
            if number == len(self.phases):
                return
            module.release()  # the next phase loads the result of this one
            number += 1
            module, trainer = self.prepare(number, options_of_trainer(self.trainer))

    def _end(self, phase: Phase) -> None:
        """Marks a phase as finished and, with the last one, the run, whose result has been saved by now."""
        folder = phase.folder
        if folder.phase is None:
            write_report(folder)
            summary = replace(Summary.read(folder.summary), finished=True)
            write_model_card(folder, summary)
            summary.write(folder.summary)  # written last: a run whose summary says so is not continued
            show_summary(summary)
            print(f"Report: {folder.report}")
        phase.end()

    def _set_aside(self, phase: Phase, error: ResultNotFinite, *, acts: bool) -> ResultNotFinite:
        """Keeps later sessions from resuming from the adapters of this one, which are finite themselves but useless."""
        checkpoint = phase.folder.checkpoint
        aside = checkpoint.with_name("not_finite.ckpt")
        if acts and checkpoint.exists():
            os.replace(checkpoint, aside)
        kept = f"the run does not go on from its checkpoint, which is now {str(aside)!r}"
        return ResultNotFinite(error.problem, kept, error.remedy, error.again)
