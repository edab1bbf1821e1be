"""How a trial trains: which of a Trainer's options it takes over, which it refuses, and which do not apply to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, DeviceStatsMonitor, LearningRateMonitor, ModelSummary, ProgressBar
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from qpruner.callbacks.compression import Compression
from qpruner.errors import UserError

CARRIED = (
    "accelerator",
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "limit_val_batches",
    "deterministic",
    "benchmark",
    "detect_anomaly",
    "reload_dataloaders_every_n_epochs",
)
"""Options that the Trainer of a trial takes over."""

REFUSED = {
    "devices": "a trial uses one device; more workers are --search.executor.kind processes --search.executor.workers",
    "num_nodes": "a trial uses one device; workers on other machines are --search.executor.kind dask",
    "strategy": "a trial uses one device and holds the model as a whole. Use auto",
    "callbacks": "a search acts by the callbacks that compress, and no other takes part in a trial. Leave it out, and "
    "give it to the fit that recovers the plan",
    "fast_dev_run": "a search has no rehearsal: drop it and give --search.trials 1",
    "overfit_batches": "a trial is there to tell plans apart. Give --trainer.limit_train_batches and "
    "--trainer.limit_val_batches",
    "plugins": "a trial makes its Trainer out of plain options. Leave it out; --trainer.precision says how to compute",
    "profiler": "trials run in processes of their own, which it does not see. Leave it out, and profile a fit",
    "barebones": "a search needs the logs and metrics that it leaves out. Leave it out",
}
"""Options that a search cannot follow, each with what to do instead."""

WITHOUT_EFFECT = {
    "logger": "the search logs what came of each trial, which itself logs nothing",
    "max_epochs": "search.steps says how long a trial trains",
    "min_epochs": "search.steps says how long a trial trains",
    "max_steps": "search.steps says how long a trial trains",
    "min_steps": "search.steps says how long a trial trains",
    "max_time": "search.max_seconds says how long a trial trains",
    "limit_test_batches": "no trial looks at the test split",
    "limit_predict_batches": "a search predicts nothing",
    "val_check_interval": "a trial is scored once, at its end",
    "check_val_every_n_epoch": "a trial is scored once, at its end",
    "num_sanity_val_steps": "a trial is scored once, at its end",
    "log_every_n_steps": "a trial logs nothing",
    "enable_checkpointing": "a trial keeps nothing; the ledger is what a search goes on from",
    "enable_progress_bar": "the search says how far it is",
    "enable_model_summary": "the model of all trials is one",
    "inference_mode": "a trial is scored without gradients either way",
    "use_distributed_sampler": "a trial uses one device",
    "sync_batchnorm": "a trial uses one device",
    "default_root_dir": "a trial writes nothing",
    "enable_autolog_hparams": "a trial logs nothing",
    "model_registry": "a trial keeps nothing",
}
"""Options that do not change any number of a trial, each with the reason."""

WATCHERS = (Checkpoint, DeviceStatsMonitor, LearningRateMonitor, ModelSummary, ProgressBar)
"""Callbacks of Lightning that do not change any number of a fit, nor of a trial, which does without them."""

DEFAULTS = {
    name: parameter.default for name, parameter in signature(Trainer.__init__).parameters.items() if name != "self"
}
"""Default values of all options of a Trainer."""


def check_options(trainer: Trainer, given: Mapping[str, Any]) -> None:
    """Checks that no option that was given to a Trainer is silently ignored.

    Args:
        trainer: Trainer whose trials are to train alike.
        given: arguments that the Trainer was constructed with.

    Raises:
        UserError: the Trainer was given something that a trial cannot follow.
    """
    changed = {name: given[name] for name in REFUSED if given.get(name, DEFAULTS[name]) != DEFAULTS[name]}
    device = trainer.strategy.root_device
    if trainer.world_size > 1:
        raise UserError(
            f"A trial uses one device, and the Trainer has {trainer.world_size}. Give --trainer.devices 1, and more "
            f"workers by --search.executor.kind processes --search.executor.workers {trainer.world_size}."
        )
    if device.index:
        raise UserError(
            f"The Trainer computes on {device}, and a trial on the first device that it sees. Leave --trainer.devices "
            f"at 1 and set the variable CUDA_VISIBLE_DEVICES={device.index}."
        )
    for name in ("devices", "num_nodes"):  # they amount to one device
        changed.pop(name, None)
    if isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        changed.pop("strategy", None)
    callbacks = changed.pop("callbacks", None) or []
    changed |= {
        f"callbacks ({type(callback).__name__})": callback
        for callback in ([callbacks] if isinstance(callbacks, Callback) else callbacks)
        if not isinstance(callback, (Compression, *WATCHERS))
    }
    for name, value in changed.items():
        option = name.partition(" ")[0]
        as_given = f"has {type(value).__name__}" if option == "callbacks" else f"is {value!r}"
        raise UserError(f"--trainer.{option} {as_given}, and {REFUSED[option]}.")


@dataclass(frozen=True)
class TrialTrainer:
    """How a trial trains and evaluates, as plain data.

    Args:
        options: arguments for the Trainer of a trial, all of `CARRIED`.
    """

    options: dict[str, Any]

    @classmethod
    def of(cls, trainer: Trainer, given: Mapping[str, Any]) -> "TrialTrainer":
        """How the trials of a search train.

        Args:
            trainer: Trainer of the search.
            given: arguments that the Trainer was constructed with.
        """
        options = {name: getattr(trainer, name, given.get(name, DEFAULTS[name])) for name in CARRIED}
        return cls(options | {"accelerator": trainer.strategy.root_device.type})

    @property
    def limit_validation(self) -> int | float:
        """Batches of the validation split that score a trial, as a number or as a fraction of all."""
        limit: int | float = self.options["limit_val_batches"]
        return limit

    def trainer(self, steps: int, max_seconds: float | None = None, callbacks: Sequence[Callback] = ()) -> Trainer:
        """A Trainer that leaves nothing behind.

        Args:
            steps: number of optimizer steps of the trial's fit.
            max_seconds: seconds after which the fit ends, whatever its steps; None for steps alone.
            callbacks: callbacks that observe the trial's fit.
        """
        return Trainer(
            **{**self.options, "limit_val_batches": 0},  # a trial is scored once, after its fit
            devices=1,
            max_steps=steps,
            max_time=None if max_seconds is None else timedelta(seconds=max_seconds),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=list(callbacks),
        )
