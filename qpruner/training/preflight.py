"""Finds options of a Trainer that cannot be honoured, before a fit has done any work."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from traceback import walk_tb
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    DeviceStatsMonitor,
    LearningRateFinder,
    LearningRateMonitor,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from qpruner.datamodules.base import TokenDataModule
from qpruner.errors import UserError
from qpruner.pretrained import is_reachable, model_fingerprint
from qpruner.training.checkpointed import CheckpointedModule
from qpruner.training.distillation import DistillationConfig
from qpruner.training.evaluation import num_batches
from qpruner.training.sharding import FSDP2, ShardedStrategy, splits

AT_LEAST_ONE = ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval")
"""Options that a Trainer divides by without checking them."""
NEEDS_LOGGER = (DeviceStatsMonitor, LearningRateMonitor)
UNFIT = {
    BaseFinetuning: "trains weights of the base, which stays as it is",
    BatchSizeFinder: "looks for a batch_size that it can set; set --data.loader.batch_size",
    LearningRateFinder: "looks for a learning rate that it can set; set --model.optimizer.lr",
    ModelPruning: "changes the base under the adapters, so that what is kept is not what was measured; use "
    "StructuredPruning",
    StochasticWeightAveraging: "copies the model before it has been compressed and has its adapters",
    WeightAveraging: "averages all tensors of the model, a compressed base too, and puts others in checkpoints",
}
"""Callbacks of Lightning that cannot act on a fit of adapters, each with the reason."""


JSONARGPARSE = re.compile(r"Does not validate against any of|Problem with given class_path '(?P<name>[\w.]+)'")
"""Text that jsonargparse puts around the error of a class that could not be instantiated."""


@contextmanager
def refusals_told(*others: type[Exception]) -> Iterator[None]:
    """Reports what Lightning refuses within the context as a mistake of the user.

    Args:
        others: classes of errors, besides Lightning's own, that can only mean a refusal within the context.

    Raises:
        UserError: Lightning refuses something.
    """
    refusals: tuple[type[Exception], ...] = (MisconfigurationException, *others)
    try:
        yield
    except UserError:
        raise
    except refusals as error:
        raise UserError(" ".join(str(error).split())) from error


@contextmanager
def options_told() -> Iterator[None]:
    """Does what `refusals_told` does, around the construction of a Trainer, which depends on its options alone.

    A missing package, a device that does not exist and an option of the wrong type raise errors of several classes.

    Raises:
        UserError: the Trainer cannot be constructed.
    """
    with refusals_told(ValueError, TypeError, ImportError, RuntimeError):
        yield


def check_kept(options: Mapping[str, Any], *, keeps_checkpoint: bool) -> None:
    """Refuses options that make a Trainer leave out what a run depends on.

    Args:
        options: options of the Trainer.
        keeps_checkpoint: whether the command writes a checkpoint.

    Raises:
        UserError: one of the options does.
    """
    if options.get("barebones"):
        raise UserError("--trainer.barebones leaves out the logs and metrics that a run is made of. Leave it out.")
    if keeps_checkpoint and options.get("enable_checkpointing") is False:
        raise UserError(
            "--trainer.enable_checkpointing is false, and a run goes on from its checkpoint. Leave it out; "
            "--run.checkpoint_every_n_steps says how often one is written."
        )


def check_trainer(trainer: Trainer) -> None:
    """Refuses options of a Trainer that no fit supports, not even those of a search.

    Raises:
        UserError: such an option is set.
    """
    for name in AT_LEAST_ONE:
        value = getattr(trainer, name, None)  # a Trainer that validates at time intervals has no val_check_interval
        if isinstance(value, int) and value < 1:
            raise UserError(f"--trainer.{name} is {value}; it is at least 1.")
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ShardedStrategy):
        raise UserError(
            f"--trainer.strategy is {type(strategy).__name__}, which a fit cannot go by. Use auto, ddp, or {FSDP2}, "
            f"which splits the model among devices."
        )
    if isinstance(strategy.checkpoint_io, AsyncCheckpointIO):
        raise UserError(
            "--trainer.plugins has AsyncCheckpointIO, and a run must know when its checkpoint is on disk. Leave it out."
        )
    check_callbacks(trainer, trainer.callbacks)  # type: ignore[attr-defined]


def check_callbacks(trainer: Trainer, callbacks: Sequence[Callback]) -> None:
    """Refuses callbacks that cannot act on a fit of the Trainer.

    Raises:
        UserError: there is such a callback.
    """
    for callback in callbacks:
        name = type(callback).__name__
        for unfit, why in UNFIT.items():
            if isinstance(callback, unfit):
                raise UserError(f"trainer.callbacks has {name}, which {why}. Leave it out.")
        if splits(trainer.strategy) and (needs := getattr(callback, "needs_whole_model", None)):
            raise UserError(
                f"trainer.callbacks has {name}, which {needs}, and --trainer.strategy {FSDP2} splits the model among "
                f"devices. Use ddp, or leave the callback out."
            )
        if isinstance(callback, NEEDS_LOGGER) and not trainer.loggers:
            raise UserError(f"trainer.callbacks has {name}, and --trainer.logger is off. Leave one of both out.")


def check_lengths(trainer: Trainer, data: TokenDataModule) -> float:
    """Refuses options of a Trainer that do not fit the number of batches.

    To be called in ``setup``.

    Returns:
        Number of optimizer steps of the fit; infinite where only time ends it.

    Raises:
        UserError: there is such an option.
    """
    training, validation = trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop
    with refusals_told(ValueError):  # Lightning counts batches, and of our code only builds the loaders
        training.setup_data()
        validation.setup_data()
    if data.has("test"):
        for loader in data.evaluation_loaders("test"):
            num_batches(loader, trainer.limit_test_batches)
    return data.num_steps()


def check_monitored(trainer: Trainer, data: TokenDataModule, distillation: DistillationConfig | None = None) -> None:
    """Refuses callbacks that monitor a metric which nothing in the fit logs.

    Raises:
        UserError: there is such a callback.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(
        isinstance(callback, LearningRateMonitor)
        or not type(callback).__module__.startswith(("lightning.", "qpruner."))
        for callback in callbacks
    ):
        return  # these may log more
    logged = logged_metrics(trainer, data, distillation)
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and monitor not in (*logged, "epoch", "step") and getattr(callback, "strict", True):
            raise UserError(
                f"{type(callback).__name__} of trainer.callbacks has monitor {monitor!r}, which nothing logs. A fit "
                f"with these options logs {', '.join(logged)}."
            )


def logged_metrics(
    trainer: Trainer, data: TokenDataModule, distillation: DistillationConfig | None = None
) -> list[str]:
    """Names of the metrics that a fit of a run logs."""
    names = ["train/loss", "train/tokens_per_second"]
    if distillation is not None:
        names += [f"train/{name}" for name in distillation.logged]
    if trainer.limit_val_batches == 0:
        return names
    if "validation" in data.prepared.splits:
        names += ["val/loss", "val/perplexity", "val/tokens"]
        if bool(data.prepared.splits["validation"].num_bytes.any()):
            names.append("val/bits_per_byte")
    if tasks := data.choices("validation"):
        names += ["val/accuracy", "val/accuracy_error", "val/examples"]
        measured = ("examples", "acc", "acc_norm", "accuracy", "error")
        names += [f"val/{examples.task}/{name}" for examples in tasks for name in measured]
    return names


def check_checkpoint(module: CheckpointedModule, path: str, *, is_first: bool) -> None:
    """Makes sure that a file is the checkpoint of a fit with the adapters and the base of a module.

    Args:
        module: module that the checkpoint is for.
        path: path of the file.
        is_first: whether this is the first process, which alone reads all of the base to compute its fingerprint. The
            processes cannot communicate yet; the others receive it when they load the checkpoint.

    Raises:
        UserError: the file is no such checkpoint.
    """
    if not Path(path).is_file():
        raise UserError(
            f"--ckpt_path is {path!r}, and there is no such file. Give a checkpoint of a fit, or leave it out."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        raise UserError(f"--ckpt_path is {path!r}, which is no checkpoint ({type(error).__name__}).") from error
    if not isinstance(content, dict) or not {"state_dict", "base", "lora"} <= content.keys():
        raise UserError(f"--ckpt_path is {path!r}, which is no checkpoint of a fit of qpruner.")
    module.check_adapters(content)
    if is_first and is_reachable(module.base):
        module.check_trained_on(content, model_fingerprint(module.base))


def class_refused(error: ValueError) -> UserError | None:
    """The error that a class in the Trainer's options raised, without the text that jsonargparse puts around it."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if cause is error or not JSONARGPARSE.search(str(error)):
        return None
    names = [mention["name"] for mention in JSONARGPARSE.finditer(str(error)) if mention["name"]] or _makers(cause)
    return UserError(f"{names[0]}: {cause}" if names else str(cause))


def _makers(error: BaseException) -> list[str]:
    """Names of the classes that were being instantiated when an error was raised."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__) if frame.f_code.co_name == "__init__"]
    makers = [frame.f_locals.get("self") for frame in frames]
    return [type(maker).__name__ for maker in makers if isinstance(maker, Callback | Logger | Strategy)]
