"""Prunes a model to a ratio, in one or several rounds of scoring and narrowing, and describes the result."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qpruner.anatomy import architecture_of, decoder_layers, num_linear_parameters
from qpruner.memory import num_parameters, tensor_bytes
from qpruner.plan import Architecture, CompressionPlan, format_ranges
from qpruner.pruning.mixtures import gather, keep
from qpruner.pruning.scores import LayerScores
from qpruner.pruning.selection import (
    Kept,
    SelectionConfig,
    Widths,
    competing_widths,
    local_widths,
    num_removed,
    part_way,
)
from qpruner.pruning.supplies import round_to, supplies, supplies_for


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
    offers = supplies_for(ratio, model, selection, dense)
    goal = local_widths(offers, round(total * ratio), multiple)
    widths = [(offer.kv_groups, offer.ffn_channels) for offer in offers]
    for number in range(1, rounds + 1):
        scores, layers = score(model), decoder_layers(model)
        if selection.scope == "local":
            widths = part_way(offers, goal, number / rounds)
        else:
            remove = round(total * ratio * number / rounds) - num_removed(offers, widths)
            left = [
                replace(offer, kv_groups=groups, ffn_channels=channels)
                for offer, (groups, channels) in zip(offers, widths, strict=True)
            ]
            last = number == rounds
            of_units = gather(scores, layers, selection.mixtures)
            widths = competing_widths(of_units, left, remove, multiple, uniform=selection.uniform, last=last)
        narrow(keep(scores, widths, layers, selection.mixtures))


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
    offers, total = supplies(model, selection, architecture_of(model.config)), num_parameters(model)
    linears = num_linear_parameters(model)
    removable = sum(offer.parameters for offer in offers)

    def legal(target: int) -> tuple[int, Widths]:
        """A number of parameters near the target that, asked for itself, gives the same widths; and these widths."""
        tried: set[int] = set()
        while True:
            widths = local_widths(offers, target, round_to(model, selection))
            gone = num_removed(offers, widths)
            if gone == target or gone in tried:
                return gone, widths
            tried.add(gone)
            target = gone

    last = 0
    for target in [*(round(n * step * total) for n in range(1, int(removable / total / step) + 1)), removable]:
        gone, widths = legal(target)
        if gone > last:
            last = gone
            pruned = [
                (groups, units * offer.channels_of_unit)
                for (groups, units), offer in zip(widths, offers, strict=True)
                if offer.parameters
            ]
            groups, channels = zip(*pruned, strict=True)
            yield LegalRatio(gone / total, total - gone, gone / linears, _range(groups), _range(channels))
