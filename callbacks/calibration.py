"""The calibration text of one of the processes that share a model."""

from torch import nn

from qpruner.datamodules.base import TokenDataModule
from qpruner.errors import UserError
from qpruner.memory import check_room
from qpruner.processes import Processes
from qpruner.pruning.calibration import Calibration, CalibrationConfig, micro_batches


def calibration_of(
    model: nn.Module, data: TokenDataModule | None, config: CalibrationConfig, processes: Processes, whose: str
) -> Calibration:
    """This process's share of the text, with the model moved to the device that computes.

    Args:
        model: the model that reads the text.
        data: where the text comes from.
        config: which text.
        processes: those that share it.
        whose: what needs it, to be named where there is none.

    Raises:
        UserError: no data module, too little text, or no room on the device.
    """
    if data is None:
        raise UserError(f"{whose} needs calibration text; give fit a data module.")
    tokens = data.calibration(config.num_sequences, config.length)
    check_room(model, processes.device)
    model.to(processes.device)
    return Calibration(
        batches=micro_batches(tokens, config.batch_size)[processes.rank :: processes.world_size],
        num_sequences=len(tokens),
        forward_context=processes.forward_context,
        reduce=processes.reduce,
    )
