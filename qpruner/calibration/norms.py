"""How large each input channel of a model's linears is over calibration text, and how much it varies."""

from typing import Any

import torch
from torch import Tensor, nn

from qpruner.calibration.blocks import block_runner, linears_within, watching
from qpruner.calibration.text import Calibration


def input_norms(model: Any, linears: dict[str, nn.Linear], calibration: Calibration) -> dict[str, Tensor]:
    """L2 norm of each input channel of linears within the model's blocks, over all tokens of all processes."""  # [in]
    return {name: squares.sqrt() for name, (squares, _) in _sums(model, linears, calibration).items()}


def input_variances(model: Any, linears: dict[str, nn.Linear], calibration: Calibration) -> dict[str, Tensor]:
    """Variance of each input channel of linears within the model's blocks, over all tokens of all processes."""  # [in]
    processes = calibration.processes
    mine = float(sum(batch.tokens.numel() for batch in calibration.batches))
    tokens = processes.reduce(torch.tensor(mine, dtype=torch.float64, device=processes.device)).clamp(min=1)
    return {
        name: (squares / tokens - (sums / tokens).square()).clamp(min=0)
        for name, (squares, sums) in _sums(model, linears, calibration).items()
    }


def _sums(model: Any, linears: dict[str, nn.Linear], calibration: Calibration) -> dict[str, Tensor]:
    """Sums of squares and plain sums of each input channel, over all tokens of all processes."""  # [2, in]
    processes = calibration.processes
    totals = {
        name: torch.zeros(2, linear.in_features, dtype=torch.float64, device=processes.device)
        for name, linear in linears.items()
    }

    def add(name: str, inputs: Tensor, output: Tensor) -> None:
        seen = inputs.flatten(0, -2).double()
        totals[name] += torch.stack([seen.square().sum(0), seen.sum(0)])

    with block_runner(model, calibration) as runner:
        states = runner.embed()
        for number, block in enumerate(runner.blocks):
            with watching(linears_within(block, linears), add):
                for place, output in enumerate(runner.outputs(number, states)):
                    states[place] = runner.keep(output)
    return {name: processes.reduce(total) for name, total in totals.items()}
