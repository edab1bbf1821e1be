"""The calibration text of one of several processes that share a model."""

from torch import Tensor, nn

from qpruner.calibration.text import Calibration, CalibrationConfig
from qpruner.datamodules.base import TokenDataModule
from qpruner.errors import UserError
from qpruner.memory import place_
from qpruner.processes import Processes


def calibration_of(
    model: nn.Module, data: TokenDataModule | None, config: CalibrationConfig, processes: Processes, whose: str
) -> Calibration:
    """This process's share of the text; moves the model to the device that computes, see `place_`.

    Args:
        model: network that the text passes through.
        data: source of the text; None if there is none.
        config: options of the text: how many sequences, and how long.
        processes: processes that share the text.
        whose: name of what needs the text, for the error message if there is none.

    Raises:
        UserError: no data module, too little text, or no room on the device.
    """
    tokens = text_of(data, config, whose)
    place_(model, processes.device)
    return Calibration.share(tokens, processes, config.batch_size)


def text_of(data: TokenDataModule | None, config: CalibrationConfig, whose: str) -> Tensor:
    """The text of all processes; see `calibration_of`.

    Raises:
        UserError: no data module, or too little text.
    """  # [num_sequences, length] int64
    if not isinstance(data, TokenDataModule):
        raise UserError(f"{whose} needs calibration text; give fit a data module.")
    return data.calibration(config.num_sequences, config.length, whose=whose)
