"""How large each input channel of a model's linears is over calibration text."""

from typing import Any

import torch
from torch import Tensor, nn

from qpruner.calibration.blocks import block_runner, linears_within, watching
from qpruner.calibration.text import Calibration


def input_norms(model: Any, linears: dict[str, nn.Linear], calibration: Calibration) -> dict[str, Tensor]:
    """L2 norm of each input channel of linears within the model's blocks, over all tokens of all processes."""  # [in]
    processes = calibration.processes
    sums = {
        name: torch.zeros(linear.in_features, dtype=torch.float64, device=processes.device)
        for name, linear in linears.items()
    }

    def add(name: str, inputs: Tensor, output: Tensor) -> None:
        sums[name] += inputs.flatten(0, -2).double().square().sum(0)

    with block_runner(model, calibration) as runner:
        states = runner.embed()
        for number, block in enumerate(runner.blocks):
            with watching(linears_within(block, linears), add):
                for place, output in enumerate(runner.outputs(number, states)):
                    states[place] = output.cpu()
    return {name: processes.reduce(total).sqrt() for name, total in sums.items()}
