"""Scores of all removable units of a model."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qpruner.anatomy import Coupled, by_linear, decoder_layers
from qpruner.calibration.gates import squared_gate_gradients
from qpruner.calibration.gradients import gradient_sums
from qpruner.calibration.norms import input_norms
from qpruner.calibration.text import Calibration
from qpruner.errors import UserError
from qpruner.pruning.criteria import (
    GRADIENT_CRITERIA,
    SECOND_ORDER,
    Aggregate,
    Criterion,
    aggregate,
    element_scores,
    magnitude,
    sum_by_unit,
    wanda,
)
from qpruner.seeds import derive_seed


@dataclass(frozen=True)
class LayerScores:
    """How much each unit of a layer matters, at least 0; float64, on the CPU.

    Args:
        kv_groups: [groups], scores of KV groups.
        ffn_channels: [channels], scores of FFN channels.
    """

    kv_groups: Tensor
    ffn_channels: Tensor


def score_units(
    model: Any, criterion: Criterion, how: Aggregate, calibration: Calibration | None, *, seed: int
) -> list[LayerScores]:
    """Scores the units of every layer, the same on all processes.

    Args:
        model: causal language model of a supported family with frozen weights, on the device that computes; it is left
            as it was.
        criterion: how a unit is scored; see `qpruner.pruning.criteria`.
        how: what coupled weights make together.
        calibration: calibration text; None for criteria that need none.
        seed: seed of the criterion ``random``.

    Raises:
        UserError: a score is not finite; see also `gradient_sums`.
    """
    layers = decoder_layers(model)
    coupled = {
        f"{number}.{part.name}": part
        for number, layer in enumerate(layers)
        for part in (*layer.group_weights, *layer.channel_weights)
    }
    scores = {name: score.cpu() for name, score in _weight_scores(model, coupled, criterion, calibration, seed).items()}
    if broken := [name for name, score in scores.items() if not score.isfinite().all()]:
        raise UserError(
            f"Scores by {criterion} are not finite in {', '.join(broken)} (layer.projection): the weights there, or "
            f"what reaches them, are not finite. Use --model.dtype float32, or another base model."
        )

    def together(number: int, parts: Iterable[Coupled]) -> Tensor:
        return aggregate([scores[name] for part in parts if (name := f"{number}.{part.name}") in scores], how)

    return [
        LayerScores(together(number, layer.group_weights), together(number, layer.channel_weights))
        for number, layer in enumerate(layers)
    ]


def needs_text(criterion: Criterion) -> bool:
    return criterion in (*GRADIENT_CRITERIA, "fisher", "wanda")


def _weight_scores(
    model: Any, coupled: dict[str, Coupled], criterion: Criterion, calibration: Calibration | None, seed: int
) -> dict[str, Tensor]:
    """The score of each unit by each of its coupled weights, or by one of them."""  # name: [units]
    match criterion:
        case "random":
            return {name: _random(part, derive_seed(seed, "random scores", name)) for name, part in coupled.items()}
        case "magnitude_l1" | "magnitude_l2":
            return {name: magnitude(part, 1 if criterion == "magnitude_l1" else 2) for name, part in coupled.items()}
    assert calibration is not None
    if criterion == "fisher":
        gated = {name: part for name, part in coupled.items() if part.axis == 1}
        return squared_gate_gradients(model, gated, calibration)
    # Text passes through each linear once, whatever number of projections is stacked in it.
    part_names = {id(part): name for name, part in coupled.items()}
    stacks = {part_names[id(stack[0])]: stack for stack in by_linear(coupled.values())}
    linears = {name: stack[0].linear for name, stack in stacks.items()}
    if criterion == "wanda":
        norms = input_norms(model, linears, calibration)
        return {part_names[id(part)]: wanda(part, norms[name]) for name, stack in stacks.items() for part in stack}

    def by_unit(name: str, gradient: Tensor, squared: Tensor | None) -> Tensor:
        elements = element_scores(criterion, linears[name].weight.detach().float(), gradient, squared)
        return torch.cat([sum_by_unit(part, elements) for part in stacks[name]])

    sums = gradient_sums(
        model,
        linears,
        calibration,
        by_unit,
        sizes={name: sum(part.num_units for part in stack) for name, stack in stacks.items()},
        per_sequence=criterion in SECOND_ORDER,
    )
    return {
        part_names[id(part)]: of_part.abs()
        for name, stack in stacks.items()
        for part, of_part in zip(stack, torch.split(sums[name], [part.num_units for part in stack]), strict=True)
    }


def _random(part: Coupled, seed: int) -> Tensor:
    return torch.rand(part.num_units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
