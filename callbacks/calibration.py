"""The calibration text of one process of a Trainer."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch import Trainer

from qpruner.datamodules.base import TokenDataModule
from qpruner.errors import UserError
from qpruner.memory import check_room
from qpruner.pruning.calibration import Calibration, CalibrationConfig, micro_batches
from qpruner.training.module import LoRAFinetuner


def calibration_of(trainer: Trainer, module: LoRAFinetuner, config: CalibrationConfig, whose: str) -> Calibration:
    """This process's share of the text, with the model moved to the device that computes.

    Args:
        trainer: of the fit.
        module: with its base loaded.
        config: which text.
        whose: what needs it, to be named where there is none.

    Raises:
        UserError: no data module, too little text, or no room on the device.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, TokenDataModule):
        raise UserError(f"{whose} needs calibration text; give fit a data module.")
    tokens = data.calibration(config.num_sequences, config.length)
    check_room(module.model, trainer.strategy.root_device)
    module.model.to(trainer.strategy.root_device)
    context: Callable[[], AbstractContextManager[Any]] = trainer.precision_plugin.forward_context
    return Calibration(
        batches=micro_batches(tokens, config.batch_size)[trainer.global_rank :: trainer.world_size],
        num_sequences=len(tokens),
        forward_context=context,
        reduce=lambda total: trainer.strategy.reduce(total, reduce_op="sum"),
    )
