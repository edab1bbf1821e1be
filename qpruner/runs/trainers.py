"""The Trainers of a run, one for each phase and each evaluation."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from qpruner.errors import UserError
from qpruner.processes import accelerator_for, check_device
from qpruner.records.folder import RunFolder
from qpruner.search.trainer import SearchTrainer
from qpruner.training.preflight import check_kept, options_told
from qpruner.training.sharding import strategy_of

TRAINER_DEFAULTS = {"use_distributed_sampler": False}
"""The loaders distribute the rows over the ranks themselves."""

TrainerOptions = Mapping[str, Any] | Callable[[], Mapping[str, Any]]
"""Options of a Trainer, or a function that makes them anew: loggers, strategies and the like belong to one Trainer."""


def options_of_trainer(given: TrainerOptions) -> dict[str, Any]:
    """Options for a further Trainer.

    Raises:
        UserError: there are callbacks among them.
    """
    options = dict(given()) if callable(given) else copy.deepcopy(dict(given))
    if options.pop("callbacks", None):
        raise UserError("The trainer of a run has callbacks, which all of its phases need. Give them as its callbacks.")
    return {**TRAINER_DEFAULTS, **options}


def make_trainer(
    options: Mapping[str, Any], folder: RunFolder, callbacks: Sequence[Callback], *, keeps_checkpoint: bool = False
) -> SearchTrainer:
    """A Trainer that works in the folder of a run.

    Args:
        options: options of this Trainer.
        folder: folder of the run, in the phase of the Trainer.
        callbacks: all callbacks that act.
        keeps_checkpoint: whether a checkpoint is kept, so that the fit can be resumed.

    Raises:
        UserError: the options are not possible.
    """
    check_kept(options, keeps_checkpoint=keeps_checkpoint)
    logger = options.get("logger")
    if logger in (None, True):
        logger = TensorBoardLogger(
            folder.phase_folder, name=folder.tensorboard.name, version="", default_hp_metric=False
        )
    ours = {
        "logger": logger,
        "default_root_dir": str(folder.path),
        "callbacks": list(callbacks),
        "accelerator": accelerator_for(options.get("accelerator", "auto")),
        "strategy": strategy_of(options.get("strategy", "auto")),
    }
    with options_told():
        trainer = SearchTrainer(**{**options, **ours})
    check_device(trainer.strategy.root_device)
    return trainer
