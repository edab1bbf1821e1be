"""The calibration text of one of the processes that share a model."""

from torch import nn

from qpruner.calibration.text import Calibration, CalibrationConfig
from qpruner.datamodules.base import TokenDataModule
from qpruner.errors import UserError
from qpruner.memory import check_room
from qpruner.processes import Processes


def calibration_of(
    model: nn.Module, data: TokenDataModule | None, config: CalibrationConfig, processes: Processes, whose: str
) -> Calibration:
    """This process's share of the text, with the model moved to the device that computes.

    Args:
        model: network that the text passes through.
        data: source of the text; None where there is none.
        config: options of the text: how many sequences, and how long.
        processes: processes that share the text.
        whose: name of what needs the text, for the message where there is none.

    Raises:
        UserError: no data module, too little text, or no room on the device.
    """
    if not isinstance(data, TokenDataModule):
        raise UserError(f"{whose} needs calibration text; give fit a data module.")
    tokens = data.calibration(config.num_sequences, config.length)
    check_room(model, processes.device)
    model.to(processes.device)
    return Calibration.share(tokens, processes, config.batch_size)
