"""Measures the stages of a run and records them in its folder."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from qpruner.allocation.decision import Allocation
from qpruner.callbacks.compression import Compression, CompressionInTraining
from qpruner.callbacks.quantization import MixedPrecisionQuantization
from qpruner.compressed import State
from qpruner.datamodules.base import TokenDataModule
from qpruner.errors import UserError
from qpruner.memory import num_parameters, peak_meaning, place_, read_peak, reset_peak, tensor_bytes
from qpruner.records.allocation_report import allocation_figure, allocation_section
from qpruner.records.folder import RunFolder
from qpruner.records.manifest import record_session
from qpruner.records.pictures import plan_figure
from qpruner.records.report import Stage, Summary, tasks_figure
from qpruner.training.evaluation import evaluate
from qpruner.training.finite import NotFinite
from qpruner.training.module import LoRAFinetuner
from qpruner.training.sharding import is_sharded, splits


class ResultNotFinite(NotFinite):
    """Stops a fit whose numbers stayed finite but whose result is unusable all the same."""


class RunReport(Callback):
    """Evaluates the model on the test split before and after the fit.

    A run adds it by default. It comes before every callback that changes the model. Each callback that does so in
    ``setup`` is followed by a `MeasuredStage`, and all of them by a `MeasuredEnd`, which measures the model after the
    fit. Each stage is recorded in ``summary.json``. Without a test split the rows have no perplexity.

    setup
        In a fit: records the manifest, and measures the dense model unless an earlier session of the run did.
    on_fit_start
        Measures the base with adapters that start from the rounding error, and writes ``plan.json``.
    on_train_start, on_train_end
        Measure the seconds and the peak memory of training.
    on_save_checkpoint, on_load_checkpoint
        Carry these two numbers over to a session that resumes the fit.

    Args:
        folder: folder of the run, set to the phase of this fit.
        phase: number of this fit within the run, from 1.
    """

    def __init__(self, folder: RunFolder, phase: int = 1) -> None:
        self.folder = folder
        self.phase = phase
        self._seconds = 0.0  # of training in finished sessions
        self._peak: int | None = None  # of training in finished sessions
        self._since: float | None = None  # when training began in this session; None while nothing trains
        self._measured = 0.0  # when the last stage was measured

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        module, data = _expect(trainer, pl_module)
        self._measured = time.perf_counter()
        module.load_base()
        loading = time.perf_counter() - self._measured
        if trainer.is_global_zero:
            record_session(
                self.folder.manifest,
                seed=module.seed,
                base={"name": module.base, "sha256": module.compressed.base_sha256},
                phase=self.phase,
                data=data.fingerprint(),
                compression=[
                    {"callback": type(callback).__name__, **callback.options} for callback in compressing(trainer)
                ],
                devices=f"{trainer.world_size} x {trainer.strategy.root_device.type}",
            )
        if module.compressed.base_state is State.DENSE:  # otherwise an earlier session has already measured it
            self.measure(trainer, "dense", seconds=loading)

    def measure(self, trainer: Trainer, name: str, *, seconds: float | None = None) -> None:
        """Measures the model as it is, unless an earlier session of the run did.

        Args:
            trainer: Trainer of the fit.
            name: name of the stage.
            seconds: seconds that it took to reach the stage; by default the time since the previous stage was measured.
        """
        name = self._titled(name)
        if name not in self._measured_stages(trainer):
            if seconds is None:
                seconds = time.perf_counter() - self._measured
            self._add(trainer, self._measure(trainer, name, seconds=seconds, peak_training=None))
        self._measured = time.perf_counter()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, _ = _expect(trainer, pl_module)
        for callback in compressing(trainer):
            if isinstance(callback, MixedPrecisionQuantization) and module.compressed.has_initial_adapters:
                self.measure(trainer, f"quantized + {callback.start_of_adapters}")
        plan = module.compressed.plan
        if plan is not None and module.compressed.base_state is not State.DENSE and trainer.is_global_zero:
            plan.write(self.folder.plan)
            if isinstance(trainer.logger, TensorBoardLogger):
                board = trainer.logger.experiment
                board.add_figure("plan/layers", plan_figure(plan))
                if self.folder.allocation.exists():
                    allocation = Allocation.read(self.folder.allocation)
                    board.add_figure("plan/allocation", allocation_figure(allocation))
                    board.add_text("plan/allocation", "\n".join(allocation_section(self.folder)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reset_peak(trainer.strategy.root_device)
        self._since = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seconds, self._peak = self._trained(trainer.strategy.root_device)
        self._since = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # In the checkpoint rather than in `state_dict`, which does not know the device.
        seconds, peak = self._trained(trainer.strategy.root_device)
        checkpoint["run_report"] = {"seconds": seconds, "peak": peak}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("run_report", {"seconds": 0.0, "peak": None})
        self._seconds, self._peak = state["seconds"], state["peak"]

    def end(self, trainer: Trainer) -> None:
        """Measures the model that the fit has produced.

        Raises:
            ResultNotFinite: the model's loss or accuracy is not finite; raised on all ranks.
        """
        module, _ = _expect(trainer, trainer.lightning_module)
        in_training = [callback for callback in compressing(trainer) if isinstance(callback, CompressionInTraining)]
        name = self._titled(in_training[0].leaves if in_training else "recovered")
        try:
            stage = self._measure(trainer, name, seconds=self._seconds, peak_training=self._peak)
        except NotFinite as error:
            raise ResultNotFinite(error.problem, error.kept, error.remedy, error.again) from error
        self._add(trainer, stage)
        if trainer.is_global_zero:
            plan = module.compressed.plan
            if plan is not None and module.compressed.base_state is not State.DENSE:
                plan.write(self.folder.plan)
            if self.folder.phase is None and isinstance(trainer.logger, TensorBoardLogger):
                results = {f"test/{name}": value for name, value in stage.results.items()}
                trainer.logger.log_hyperparams(dict(module.hparams), results)
                if (bars := tasks_figure(Summary.read(self.folder.summary))) is not None:
                    trainer.logger.experiment.add_figure("test/tasks", bars)
                trainer.logger.save()

    def _titled(self, name: str) -> str:
        """The name of a stage in the table."""
        return name if self.phase == 1 else f"{name} (phase {self.phase})"

    def _trained(self, device: torch.device) -> tuple[float, int | None]:
        """Seconds and peak memory of training over all sessions so far."""
        if self._since is None:
            return self._seconds, self._peak
        peaks = [peak for peak in (self._peak, read_peak(device)) if peak is not None]
        return self._seconds + time.perf_counter() - self._since, max(peaks, default=None)

    def _measure(self, trainer: Trainer, name: str, *, seconds: float, peak_training: int | None) -> Stage:
        """Measures the model as it is now.

        Raises:
            UserError: the model's loss or accuracy is not finite, which makes it useless to the fit.
        """
        module, data = _expect(trainer, trainer.lightning_module)
        device = trainer.strategy.root_device
        reset_peak(device)
        results: dict[str, float] = {}
        if data.has("test") and self._has_room(trainer, module, name):
            rank_zero_info(f"Evaluating the {name} model on the test split.")
            results = evaluate(
                module.model,
                data.evaluation_loaders("test"),
                limit=trainer.limit_test_batches,
                device=device,
                precision=trainer.precision_plugin,
                title=f"Testing {name}",
                progress=trainer.is_global_zero and trainer.progress_bar_callback is not None,
            )
            module.check_results(f"the {name} model on the test split", results)
        size = num_parameters(module.model), tensor_bytes(module.model)
        bits = module.compressed.average_bits
        return Stage(name, *size, bits, results, seconds, peak_training, read_peak(device))

    def _has_room(self, trainer: Trainer, module: LoRAFinetuner, name: str) -> bool:
        """Whether a model that is yet to be split fits on each device; all others are left to the evaluation."""
        if not splits(trainer.strategy) or is_sharded(module.model):
            return True
        device, lacks = trainer.strategy.root_device, None
        try:
            place_(module.model, device)
        except UserError as error:
            lacks = str(error)
        fits = trainer.strategy.reduce(torch.tensor(float(lacks is None), device=device), reduce_op="min")
        if not fits:
            rank_zero_info(f"The {name} model is not evaluated as long as it is not split. {lacks or ''}")
        return bool(fits)

    def _add(self, trainer: Trainer, stage: Stage) -> None:
        """Adds a stage to the summary."""
        if trainer.is_global_zero:
            others = (other for other in self._stages() if other.name != stage.name)  # of an interrupted session
            _, data = _expect(trainer, trainer.lightning_module)
            peak_of = peak_meaning(trainer.strategy.root_device)
            Summary(False, data.protocol, peak_of, (*others, stage)).write(self.folder.summary)

    def _measured_stages(self, trainer: Trainer) -> list[str]:
        """Names of the stages measured so far, as seen by rank zero, whose view of the folder is up to date."""
        return trainer.strategy.broadcast([stage.name for stage in self._stages()])

    def _stages(self) -> tuple[Stage, ...]:
        return Summary.read(self.folder.summary).stages if self.folder.summary.exists() else ()


class MeasuredStage(Callback):
    """Measures the model as the preceding callback has left it.

    setup
        In a fit: evaluates the model on the test split, unless an earlier session of the run did.

    Args:
        report: report that receives the stage.
        name: name of the stage in the table.
    """

    def __init__(self, report: RunReport, name: str) -> None:
        self.report = report
        self.name = name

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.report.measure(trainer, self.name)


class MeasuredEnd(Callback):
    """Measures the model that a fit has produced, after all callbacks that change it at the end.

    on_fit_end
        Evaluates the model on the test split; a result that is not finite is an error.

    Args:
        report: report that receives the stage.
    """

    def __init__(self, report: RunReport) -> None:
        self.report = report

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report.end(trainer)


def compressing(trainer: Trainer) -> list[Compression]:
    """The callbacks of a fit that compress its base."""
    return [callback for callback in trainer.callbacks if isinstance(callback, Compression)]  # type: ignore[attr-defined]


def _expect(trainer: Trainer, pl_module: LightningModule) -> tuple[LoRAFinetuner, TokenDataModule]:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(pl_module, LoRAFinetuner) or not isinstance(data, TokenDataModule):
        raise TypeError(
            f"RunReport reports on a LoRAFinetuner with a data module of qpruner, not on a {type(pl_module).__name__} "
            f"with a {type(data).__name__}."
        )
    return pl_module, data
