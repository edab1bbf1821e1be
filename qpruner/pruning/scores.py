"""Scores of all removable units of a model."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qpruner.anatomy import Coupled, by_linear, decoder_blocks, decoder_layers, refuse_experts, unit_parameters
from qpruner.calibration.gates import squared_gate_gradients
from qpruner.calibration.gradients import gradient_sums
from qpruner.calibration.gram import MASSIVE_POSITIONS, Gram, input_grams
from qpruner.calibration.norms import input_norms, input_variances
from qpruner.calibration.text import Calibration
from qpruner.errors import UserError
from qpruner.offload import opened
from qpruner.pruning.criteria import (
    GRADIENT_CRITERIA,
    SECOND_ORDER,
    Aggregate,
    Criterion,
    WeightCriterion,
    aggregate,
    element_scores,
    fluctuation,
    magnitude,
    sum_by_unit,
    wanda,
)
from qpruner.pruning.reconstruction import deal, greedy_removal
from qpruner.seeds import derive_seed


@dataclass(frozen=True)
class LayerScores:
    """The importance of each unit of a layer, at least 0; float64.

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
        model: causal language model of a supported family with frozen weights, on the compute device; it is left as it
            was.
        criterion: how a unit is scored; see `qpruner.pruning.criteria`.
        how: how the scores of coupled weights are combined; ignored by ``fisher``, ``flap`` and ``reconstruction``,
            which look at one of them.
        calibration: calibration text; None for criteria that need none.
        seed: seed of the criterion ``random``.

    Raises:
        UserError: a score is not finite; see also `gradient_sums` and `input_grams`.
    """
    check_criterion(model, criterion)
    match criterion:
        case "fisher" | "flap" | "reconstruction":
            assert calibration is not None
            return {"fisher": _fisher, "flap": _flap, "reconstruction": _reconstruction}[criterion](model, calibration)
    layers = decoder_layers(model)
    coupled = {
        f"{number}.{part.name}": part
        for number, layer in enumerate(layers)
        for part in (*layer.group_weights, *layer.channel_weights)
    }
    scores = {name: score.cpu() for name, score in _weight_scores(model, coupled, criterion, calibration, seed).items()}
    _check_finite(criterion, scores)

    def together(number: int, parts: Iterable[Coupled]) -> Tensor:
        return aggregate([scores[f"{number}.{part.name}"] for part in parts], how)

    return [
        LayerScores(
            together(number, layer.group_weights),
            torch.cat([together(number, parts) for parts in layer.channel_weights_of_each]),
        )
        for number, layer in enumerate(layers)
    ]


def check_criterion(model: Any, criterion: Criterion) -> None:
    """Makes sure that the units of a model can be scored by a criterion.

    Args:
        model: model to prune, with or without its weights.
        criterion: criterion to score by.

    Raises:
        UserError: the criterion is ``reconstruction``, and the model is a mixture of experts.
    """
    if criterion == "reconstruction":
        refuse_experts(model.config, f"The criterion {criterion!r}", "another, such as fisher")


def needs_text(criterion: Criterion) -> bool:
    return criterion in GRADIENT_CRITERIA or criterion in ("wanda", "fisher", "flap", "reconstruction")


def _check_finite(criterion: Criterion, scores: dict[str, Tensor]) -> None:
    """Makes sure that the values found for each projection are finite."""
    if broken := [name for name, score in scores.items() if not score.isfinite().all()]:
        raise UserError(
            f"Scores by {criterion} are not finite in {', '.join(broken)} (layer.projection): the weights there, or "
            f"what reaches them, are not finite. Use --model.dtype float32, or another base model."
        )


def _outputs(model: Any) -> dict[str, Coupled]:
    """The projections whose columns belong to units: o and down of each layer, or the down of each of its experts."""
    return {
        f"{number}.{part.name}": part for number, layer in enumerate(decoder_layers(model)) for part in layer.outputs
    }


def _by_layer(model: Any, scores: dict[str, Tensor]) -> list[LayerScores]:
    """The values found for each of `_outputs`, layer by layer."""
    layers = []
    for number, layer in enumerate(decoder_layers(model)):
        of_groups, *of_channels = (scores[f"{number}.{part.name}"] for part in layer.outputs)
        layers.append(LayerScores(of_groups, torch.cat(of_channels)))
    return layers


def _fisher(model: Any, calibration: Calibration) -> list[LayerScores]:
    scores = squared_gate_gradients(model, _outputs(model), calibration)
    return _by_layer(model, {name: score.cpu() for name, score in scores.items()})


def _reconstruction(model: Any, calibration: Calibration) -> list[LayerScores]:
    fisher, orders = _fisher(model, calibration), _removal_orders(model, calibration)
    taylor = score_units(model, "param_first", "sum", calibration, seed=0)
    return [
        LayerScores(
            deal((first.kv_groups * second.kv_groups).sqrt(), groups),
            deal((first.ffn_channels * second.ffn_channels).sqrt(), channels),
        )
        for first, second, (groups, channels) in zip(fisher, taylor, orders, strict=True)
    ]


def _flap(model: Any, calibration: Calibration) -> list[LayerScores]:
    """Scores by FLAP, which ranks all units of the model by `fluctuation`, however many parameters they have.

    Here, steps compete by score per parameter, so the scores are multiplied by the number of parameters; and scores
    must be at least 0, so all are shifted by the lowest one. Neither changes the ranking.
    """
    variances = input_variances(model, {name: part.linear for name, part in _outputs(model).items()}, calibration)
    layers, blocks, deviations = decoder_layers(model), decoder_blocks(model), {}
    for number, (block, layer) in enumerate(zip(blocks, layers, strict=True)):
        o, *downs = layer.outputs
        for kind, parts in (("o", [o]), ("down", downs)):
            home = parts[0].linear.weight.device
            of_parts = [variances[f"{number}.{part.name}"].to(home) for part in parts]
            with opened(model, block):
                deviations[f"{number}.{kind}"] = fluctuation(parts, of_parts).cpu()
    _check_finite("flap", deviations)
    lowest = torch.cat([*deviations.values()]).min()
    return [
        LayerScores(
            (deviations[f"{number}.o"] - lowest) * of_group, (deviations[f"{number}.down"] - lowest) * of_channel
        )
        for number, (of_group, of_channel) in enumerate(map(unit_parameters, layers))
    ]


def _removal_orders(model: Any, calibration: Calibration) -> list[tuple[Tensor, Tensor]]:
    """The order in which reconstruction removes the KV groups and the FFN channels of each layer; on the CPU."""
    parts = _outputs(model)

    def order(name: str, gram: Gram) -> Tensor:
        part = parts[name]
        products = gram.products if part.linear.bias is None else gram.centred
        _check_finite("reconstruction", {name: products})
        return greedy_removal(part.linear.weight, products, part.width).order.cpu()

    linears = {name: part.linear for name, part in parts.items()}
    orders = input_grams(model, linears, calibration, order, skip_positions=MASSIVE_POSITIONS)
    return [(orders[f"{number}.o"], orders[f"{number}.down"]) for number in range(len(parts) // 2)]


def _weight_scores(
    model: Any, coupled: dict[str, Coupled], criterion: WeightCriterion, calibration: Calibration | None, seed: int
) -> dict[str, Tensor]:
    """The score of each unit by each of its coupled weights."""  # name: [units]

    def of_weight(part: Coupled, power: int) -> Tensor:
        with opened(model, part.linear):
            return magnitude(part, power)

    def with_norms(part: Coupled, norms: Tensor) -> Tensor:
        with opened(model, part.linear):
            return wanda(part, norms.to(part.linear.weight.device))

    match criterion:
        case "random":
            return {name: _random(part, derive_seed(seed, "random scores", name)) for name, part in coupled.items()}
        case "magnitude_l1" | "magnitude_l2":
            return {name: of_weight(part, 1 if criterion == "magnitude_l1" else 2) for name, part in coupled.items()}
    assert calibration is not None
    # Text passes through each linear once, however many projections are stacked in it.
    part_names = {id(part): name for name, part in coupled.items()}
    stacks = {part_names[id(stack[0])]: stack for stack in by_linear(coupled.values())}
    linears = {name: stack[0].linear for name, stack in stacks.items()}
    if criterion == "wanda":
        norms = input_norms(model, linears, calibration)
        return {part_names[id(part)]: with_norms(part, norms[name]) for name, stack in stacks.items() for part in stack}

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
