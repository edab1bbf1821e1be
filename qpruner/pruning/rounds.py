"""Prunes a model to a ratio, in one or several rounds of scoring and narrowing, and describes the result."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qpruner.anatomy import decoder_layers, expert_parameters, num_linear_parameters, unit_parameters
from qpruner.errors import UserError
from qpruner.memory import num_parameters, tensor_bytes
from qpruner.plan import Architecture, CompressionPlan, format_ranges
from qpruner.pruning.mixtures import gather, keep
from qpruner.pruning.scores import LayerScores
from qpruner.pruning.selection import (
    Kept,
    SelectionConfig,
    Supply,
    Widths,
    competing_widths,
    default_round_to,
    local_widths,
    part_way,
)
from qpruner.pruning.surgery import stated_by_weights

COARSE = 0.01
"""A step of more than this share of all parameters is mentioned to the user."""


def prune_(
    model: Any,
    dense: Architecture,
    *,
    ratio: float,
    rounds: int,
    selection: SelectionConfig,
    score: Callable[[Any], list[LayerScores]],
    narrow: Callable[[Kept], object],
) -> None:
    """Narrows a model in place until a share of all its parameters is removed.

    Args:
        model: model to prune; its weights may also be on the meta device if ``score`` does not need them.
        dense: dense widths, of which the floors are shares.
        ratio: share of all parameters to remove, in (0, 1).
        rounds: number of rounds of scoring and narrowing, each removing the same number of parameters.
        selection: how the layers share what is removed.
        score: returns the scores of the units of the model in its current state.
        narrow: removes all units from the model except those given, the same on all processes.

    Raises:
        UserError: see `supplies_for`.
    """
    total, multiple = num_parameters(model), round_to(model, selection)
    supply = supplies_for(ratio, model, selection, dense)
    goal = local_widths(supply, round(total * ratio), multiple)
    for number in range(1, rounds + 1):
        scores, layers = score(model), decoder_layers(model)
        if selection.scope == "local":
            widths = part_way(supply, goal, number / rounds)
        else:
            remove = round(total * ratio * number / rounds) - (total - num_parameters(model))
            offers = supplies(model, selection, dense)
            last = number == rounds
            of_units = gather(scores, layers, selection.mixtures)
            widths = competing_widths(of_units, offers, remove, multiple, uniform=selection.uniform, last=last)
        narrow(keep(scores, widths, layers, selection.mixtures))
    if num_parameters(model) == total:
        raise _less_than_a_step(ratio, step_parameters(model, selection, dense) / total)


def _less_than_a_step(ratio: float, step: float) -> UserError:
    return UserError(
        f"A ratio of {ratio} is less than half a step and would remove nothing; the smallest step removes {step:.2%} "
        f"of all parameters. Ask for more, or lower selection.round_to."
    )


def supplies_for(ratio: float, model: Any, selection: SelectionConfig, dense: Architecture) -> list[Supply]:
    """What can be removed from each layer of a model that is to lose a share of its parameters.

    Args:
        ratio: share of all parameters to remove.
        model: model to prune, in its current state.
        selection: layers to leave alone, floor and rounding.
        dense: dense widths, of which the floors are shares.

    Raises:
        UserError: the ratio is above what any legal widths reach, and the highest one that they reach is named; or it
            is less than half a step; see also `supplies`.
    """
    offers, total = supplies(model, selection, dense), num_parameters(model)
    removable = sum(offer.parameters for offer in offers)
    if not 0 < ratio < 1 or ratio * total > removable:
        highest = math.floor(removable / total * 10_000) / 10_000
        raise UserError(
            f"The ratio is {ratio}; it is the share of all parameters to remove and must be above 0 and at most "
            f"{highest} with this model and selection. Lower it, lower selection.floor, or leave fewer layers alone."
        )
    step = step_parameters(model, selection, dense)
    if ratio * total < step / 2:
        raise _less_than_a_step(ratio, step / total)
    return offers


def round_to(model: Any, selection: SelectionConfig) -> int:
    """The number that FFN widths of a model become multiples of; 1 where whole experts are removed."""
    if selection.mixtures == "experts" and any(layer.experts for layer in decoder_layers(model)):
        return 1
    return selection.round_to or default_round_to(model.config.hidden_size)


def supplies(model: Any, selection: SelectionConfig, dense: Architecture | None = None) -> list[Supply]:
    """What can be removed from each layer of a model.

    Args:
        model: model to prune, in its current state.
        selection: layers to leave alone, floor and rounding.
        dense: widths that the floor is a share of; those of the model when not given.

    Raises:
        UserError: a layer to leave alone does not exist, all layers are to be left alone, or layers that are to end
            up equal differ already.
    """
    layers = decoder_layers(model)
    dense = dense or stated_by_weights(model)
    multiple = round_to(model, selection)
    if wrong := [number for number in selection.leave_alone if not -len(layers) <= number < len(layers)]:
        raise UserError(f"selection.leave_alone names layers {wrong}; the model has 0 to {len(layers) - 1}.")
    alone = {number % len(layers) for number in selection.leave_alone}
    if len(alone) == len(layers):
        raise UserError("selection.leave_alone names every layer, so that nothing can be pruned. Leave fewer alone.")
    widths = {(layer.kv_groups, layer.ffn_channels, layer.experts) for layer in layers}
    if selection.uniform and len(widths) > 1:
        pairs = sorted({(groups, channels) for groups, channels, _ in widths})
        raise UserError(
            f"selection.uniform is true, but the layers already differ: {pairs} KV groups and FFN channels. "
            f"Start from a model whose layers are equal, or drop the option."
        )
    offers = []
    for number, layer in enumerate(layers):
        least_groups = max(1, _ceil(selection.floor * dense.kv_groups[number]))
        of_group, of_channel = unit_parameters(layer)
        units, of_unit, in_unit = layer.ffn_channels, of_channel, 1
        all_units, fewest = dense.ffn_channels[number], 1
        if layer.experts and selection.mixtures == "experts":
            units, of_unit, in_unit = layer.experts, expert_parameters(layer), layer.channels_of_each
            all_units, fewest = dense.num_experts(number), dense.experts_per_token
        elif layer.experts:
            units, of_unit, in_unit = layer.channels_of_each, layer.experts * of_channel, layer.experts
            all_units = dense.channels_of_each(number)
        least_units = max(fewest, _ceil(selection.floor * all_units / multiple) * multiple, multiple)
        if number in alone:
            least_groups, least_units = layer.kv_groups, units
        least_groups, least_units = min(least_groups, layer.kv_groups), min(least_units, units)
        offers.append(Supply(layer.kv_groups, units, of_group, of_unit, least_groups, least_units, in_unit))
    if not any(supply.parameters for supply in offers):
        raise UserError(
            f"With selection.floor {selection.floor} and FFN widths in multiples of {multiple} nothing can be removed. "
            f"Lower one of them."
        )
    return offers


def _ceil(number: float) -> int:
    return math.ceil(round(number, 6))  # 0.55 * 6400 is a little more than 3520


def step_parameters(model: Any, selection: SelectionConfig, dense: Architecture | None = None) -> int:
    """Number of parameters of the smallest step: `round_to` channels of one layer, or of all that change together.

    Args:
        model: model to prune.
        selection: layers to leave alone, floor and rounding.
        dense: widths that the floor is a share of; those of the model when not given.
    """
    multiple = round_to(model, selection)
    costs = [offer.channel_parameters * multiple for offer in supplies(model, selection, dense) if offer.parameters]
    return sum(costs) if selection.scope == "local" or selection.uniform else max(costs)


def asked_for(ratio: float, model: Any, selection: SelectionConfig, dense: Architecture | None = None) -> str:
    """What was asked for, in words, with the size of a step where that is coarse."""
    step = step_parameters(model, selection, dense) / num_parameters(model)
    return f"asked for {ratio:.2%}" + (f", in steps of {step:.2%}" if step > COARSE else "")


@dataclass(frozen=True)
class Size:
    """Number of parameters of a model, in all and in the decoder's projections, and bytes of its tensors."""

    parameters: int
    in_linears: int
    num_bytes: int

    @classmethod
    def of(cls, model: Any) -> "Size":
        return cls(num_parameters(model), num_linear_parameters(model), tensor_bytes(model))


def describe(plan: CompressionPlan, before: Size, after: Size, asked: str, asked_alone: Sequence[int]) -> str:
    """A one-line summary of what pruning did, and of what it left alone and why.

    Args:
        plan: plan that was carried out.
        before: size of the model before pruning.
        after: size of the model after pruning.
        asked: what was asked for, in words.
        asked_alone: indices of the layers that were to be left alone, negative ones from the end.
    """
    dense, widths = plan.architecture, plan.widths
    pairs = zip(dense.kv_groups, dense.ffn_channels, widths.kv_groups, widths.ffn_channels, strict=True)
    whole = [number for number, (g, c, kept_g, kept_c) in enumerate(pairs) if (g, c) == (kept_g, kept_c)]
    meant = [number for number in whole if number in {n % dense.num_layers for n in asked_alone}]
    alone = ["embeddings, norms and head"]
    if max(dense.kv_groups) == 1:
        alone.append("attention, which has one key-value head, so that the FFN gave all")
    elif dense.kv_groups == widths.kv_groups:
        alone.append("attention, of which a whole KV group was too much or too dear")
    if meant:
        alone.append(f"layers {format_ranges(meant)}, as asked")
    if spared := [number for number in whole if number not in meant]:
        alone.append(f"layers {format_ranges(spared)}, whose units were worth more than those of others")
    of_experts = [pair for pair in zip(widths.experts, dense.experts, strict=True) if pair[1]]
    kept_experts, all_experts = zip(*of_experts, strict=True) if of_experts else ((), ())
    experts = f" in {_range(kept_experts)} of {_range(all_experts)} experts" if of_experts else ""
    return (
        f"Pruned {before.parameters:,} to {after.parameters:,} parameters, {before.num_bytes:,} to "
        f"{after.num_bytes:,} bytes: {1 - after.parameters / before.parameters:.2%} of all ({asked}), "
        f"{1 - after.in_linears / before.in_linears:.2%} of the decoder linears. "
        f"Layers keep {_range(widths.kv_groups)} of {_range(dense.kv_groups)} KV groups and "
        f"{_range(widths.ffn_channels)} of {_range(dense.ffn_channels)} FFN channels{experts}. "
        f"Left alone: {'; '.join(alone)}."
    )


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


@dataclass(frozen=True)
class LegalRatio:
    """A ratio that local pruning can reach, and the resulting widths of the pruned layers."""

    ratio: float
    parameters: int
    linears_removed: float
    kv_groups: str
    ffn_channels: str


def legal_ratios(model: Any, selection: SelectionConfig, step: float) -> Iterator[LegalRatio]:
    """Legal ratios near the multiples of a step, up to the highest one, each with the widths that it results in.

    Only shapes are read: the weights may be on the meta device.
    """
    offers, total = supplies(model, selection), num_parameters(model)
    linears = num_linear_parameters(model)
    removable = sum(offer.parameters for offer in offers)

    def legal(target: int) -> tuple[int, Widths]:
        """A number of parameters near the target that, asked for itself, gives the same widths; and these widths."""
        tried: set[int] = set()
        while True:
            widths = local_widths(offers, target, round_to(model, selection))
            removed = sum(offer.cost(*kept) for kept, offer in zip(widths, offers, strict=True))
            if removed == target or removed in tried:
                return removed, widths
            tried.add(removed)
            target = removed

    last = 0
    for target in [*(round(n * step * total) for n in range(1, int(removable / total / step) + 1)), removable]:
        removed, widths = legal(target)
        if removed > last:
            last = removed
            pruned = [
                (groups, units * offer.channels_of_unit)
                for (groups, units), offer in zip(widths, offers, strict=True)
                if offer.parameters
            ]
            groups, channels = zip(*pruned, strict=True)
            yield LegalRatio(removed / total, total - removed, removed / linears, _range(groups), _range(channels))
