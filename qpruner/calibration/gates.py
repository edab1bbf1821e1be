"""How much the loss of each sequence depends on gates, numbers of 1 that what reaches a linear is multiplied by."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qpruner.anatomy import Coupled
from qpruner.calibration.gradients import blocks_backward, only_finite
from qpruner.calibration.text import Calibration


def squared_gate_gradients(model: Any, gates: Mapping[str, Coupled], calibration: Calibration) -> dict[str, Tensor]:
    """Mean over all sequences of the squared derivative of a sequence's mean loss in the gate of each unit.

    With x the inputs of a unit's columns at a token and d the gradient at them, the derivative is the sum of x d over
    the columns and over all tokens of the sequence. No gradient of a weight is computed.

    Args:
        model: model whose weights stay frozen.
        gates: projections by columns of which units are gated, by name.
        calibration: this process's share of the text.

    Raises:
        UserError: a gradient is not finite; the sequence is named.
    """  # name: [units], float64, on the device that computes
    linears: dict[str, nn.Linear] = {name: part.linear for name, part in gates.items()}
    device = calibration.processes.device

    def find(share: Calibration) -> dict[str, Tensor]:
        sums = {name: torch.zeros(part.num_units, dtype=torch.float64, device=device) for name, part in gates.items()}

        def add(name: str, inputs: Tensor, at_output: Tensor) -> None:
            part = gates[name]
            weight = part.linear.weight.detach()
            at_input = at_output.to(weight.dtype) @ weight
            by_column = (inputs.float() * at_input.float()).sum(1)[:, part.block]  # [B, units * width]
            sums[name] += by_column.reshape(-1, part.num_units, part.width).sum(2).double().square().sum(0)

        for _ in blocks_backward(model, linears, share, add):
            pass
        return {name: share.processes.reduce(total) / share.num_sequences for name, total in sums.items()}

    return only_finite(find, model, calibration)
