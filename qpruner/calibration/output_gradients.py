"""How strongly the loss at the end of a model depends on the outputs of its linears, token by token.

To second order the loss rises by about ``(g_t . e_t)^2 / 2`` when an output changes by e at token t, with g the
gradient of the loss there. With the mean of g^2 over a group of outputs in place of each (GuidedQuant, Kim et al. 2025,
arXiv:2505.07004), rounding a linear becomes least squares again, with tokens that weigh that mean.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qpruner.calibration.gradients import blocks_backward
from qpruner.calibration.text import Calibration
from qpruner.errors import UserError


def output_weights(
    model: Any, linears: Mapping[str, nn.Linear], calibration: Calibration, num_groups: int
) -> dict[str, list[Tensor]]:
    """The mean squared gradient of the loss at each group of outputs of each linear.

    Args:
        model: model that the text passes through.
        linears: linears within the model's blocks, by name.
        calibration: this process's share of the text.
        num_groups: number G of groups that the outputs of a linear are cut into, in order and of about equal size.

    Returns:
        For each linear one tensor [B, T, G] in float32 on the CPU for each micro-batch, over all tokens of all
        processes 1 in the mean of each group.

    Raises:
        UserError: more groups than a linear has outputs, or a gradient that is not finite.
    """
    for name, linear in linears.items():
        if num_groups > linear.out_features:
            raise UserError(
                f"{name} has {linear.out_features} outputs, too few for {num_groups} groups of them. Lower "
                f"calibrated.output_groups."
            )
    weights: dict[str, list[Tensor]] = {name: [] for name in linears}

    def see(name: str, inputs: Tensor, gradient: Tensor) -> None:
        groups = gradient.detach().float().square().tensor_split(num_groups, dim=-1)
        weights[name].append(torch.stack([group.mean(-1) for group in groups], dim=-1).cpu())

    for _ in blocks_backward(model, dict(linears), calibration, see):
        pass
    return {name: _normalized(name, batches, num_groups, calibration) for name, batches in weights.items()}


def _normalized(name: str, batches: list[Tensor], num_groups: int, calibration: Calibration) -> list[Tensor]:
    processes = calibration.processes
    sums = torch.zeros(num_groups + 1, dtype=torch.float64, device=processes.device)
    for batch in batches:
        sums[:-1] += batch.flatten(0, 1).sum(0, dtype=torch.float64).to(sums.device)
        sums[-1] += batch[..., 0].numel()
    sums = processes.reduce(sums).cpu()
    means = sums[:-1] / sums[-1]
    if not means.isfinite().all():
        raise UserError(
            f"The gradient of the loss at the output of {name} is not finite. Use --model.dtype bfloat16 or float32, "
            f"or calibrated.output_groups 0."
        )
    return [(batch / means.clamp(min=torch.finfo(torch.float64).tiny)).float() for batch in batches]
