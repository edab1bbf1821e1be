"""What can be removed from the layers of a model, how much of it at least, and which ratios are therefore refused."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from qpruner.anatomy import decoder_layers, expert_parameters, unit_parameters
from qpruner.errors import UserError
from qpruner.memory import num_parameters
from qpruner.plan import Architecture
from qpruner.pruning.selection import SelectionConfig, Supply, default_round_to, local_widths, num_removed

COARSE = 0.01
"""A step of more than this share of all parameters is mentioned to the user."""


def supplies(model: Any, selection: SelectionConfig, dense: Architecture) -> list[Supply]:
    """What can be removed from each layer of a model.

    Args:
        model: model to prune, in its current state.
        selection: layers to leave alone, floor and rounding.
        dense: dense widths, of which the floors are shares.

    Raises:
        UserError: a layer to leave alone does not exist, all layers are to be left alone, or layers that are to end
            up equal differ already.
    """
    layers = decoder_layers(model)
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


def round_to(model: Any, selection: SelectionConfig) -> int:
    """The number that FFN widths of a model become multiples of; 1 where whole experts are removed."""
    if selection.mixtures == "experts" and any(layer.experts for layer in decoder_layers(model)):
        return 1
    return selection.round_to or default_round_to(model.config.hidden_size)


def supplies_for(
    ratio: float, model: Any, selection: SelectionConfig, dense: Architecture, *, is_start: bool = False
) -> list[Supply]:
    """What can be removed from each layer of a model that is to lose a share of its parameters.

    Args:
        ratio: share of all parameters to remove.
        model: model to prune, in its current state.
        selection: how the layers share what is removed.
        dense: dense widths, of which the floors are shares.
        is_start: whether the ratio is only where a search starts, which may also be the model as it is.

    Raises:
        UserError: the ratio is above what any legal widths reach, and the highest one that they reach is named; or
            nothing would be removed, and the smallest step is named; see also `supplies`.
    """
    offers, total = supplies(model, selection, dense), num_parameters(model)
    removable = sum(offer.parameters for offer in offers)
    if not 0 < ratio < 1 or round(total * ratio) > removable:
        highest = math.floor(removable / total * 10_000) / 10_000
        raise UserError(
            f"The ratio is {ratio}; it is the share of all parameters to remove and must be above 0 and at most "
            f"{highest} with this model and selection. Lower it, lower selection.floor, or leave fewer layers alone."
        )
    multiple = round_to(model, selection)
    if not is_start and _removes_nothing(round(total * ratio), offers, selection, multiple):
        finer = ", or lower selection.round_to" if multiple > 1 else ""
        raise UserError(
            f"A ratio of {ratio} would remove nothing; the smallest step removes "
            f"{smallest_step(offers, selection, multiple) / total:.2%} of all parameters. Ask for more{finer}."
        )
    return offers


def _removes_nothing(remove: int, offers: Sequence[Supply], selection: SelectionConfig, multiple: int) -> bool:
    """Whether selection, asked to remove a number of parameters, would rather remove none, whatever the scores."""
    if selection.scope == "local":
        return _removed_locally(offers, remove, multiple) == 0
    return 2 * remove < smallest_step(offers, selection, multiple)  # no step of more than twice what is left is taken


def _removed_locally(offers: Sequence[Supply], remove: int, multiple: int) -> int:
    return num_removed(offers, local_widths(offers, remove, multiple))


def smallest_step(offers: Sequence[Supply], selection: SelectionConfig, multiple: int) -> int:
    """The least number of parameters that are removed if any are.

    Args:
        offers: [layers], what can be removed from each layer, which is something in at least one of them.
        selection: how the layers share what is removed.
        multiple: number that FFN widths become multiples of.
    """
    if selection.scope == "local":
        targets = range(1, sum(offer.parameters for offer in offers) + 1)
        lowest = bisect_left(targets, True, key=lambda remove: _removed_locally(offers, remove, multiple) > 0)
        return _removed_locally(offers, targets[lowest], multiple)
    groups = [offer.group_parameters for offer in offers if offer.loses_groups]
    widths = [(offer, offer.ffn_widths(multiple)) for offer in offers if offer.loses_channels]
    channels = [(width - next_width) * offer.channel_parameters for offer, (width, next_width, *_) in widths]
    together = sum if selection.uniform else min
    return min(together(costs) for costs in (groups, channels) if costs)


def asked_for(ratio: float, model: Any, selection: SelectionConfig, dense: Architecture) -> str:
    """What was asked for, in words, with the size of the smallest step where that is coarse."""
    step = smallest_step(supplies(model, selection, dense), selection, round_to(model, selection))
    share = step / num_parameters(model)
    return f"asked for {ratio:.2%}" + (f", in steps of {share:.2%} or more" if share > COARSE else "")
