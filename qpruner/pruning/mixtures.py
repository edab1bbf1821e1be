"""What is removed from a mixture of experts, in steps that leave all experts of a layer equally wide.

A step of selection is a number of units of one kind. In a mixture, such a unit is either one channel of every expert,
the worst one that each has left, or one whole expert. The units of a plain FFN are its channels, as usual.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qpruner.anatomy import DecoderLayer
from qpruner.pruning.scores import LayerScores
from qpruner.pruning.selection import ByExpert, Kept, keep_highest


def gather(scores: Sequence[LayerScores], layers: Sequence[DecoderLayer], how: ByExpert) -> list[LayerScores]:
    """The scores, with those of a mixture's channels summed over each of its units.

    Args:
        scores: [layers], scores of all units.
        layers: layers that the scores belong to.
        how: kind of unit that is removed from a mixture.
    """
    return [
        LayerScores(score.kv_groups, _of_units(score.ffn_channels, layer, how)) if layer.experts else score
        for score, layer in zip(scores, layers, strict=True)
    ]


def _of_units(scores: Tensor, layer: DecoderLayer, how: ByExpert) -> Tensor:
    by_expert = scores.view(layer.experts, -1)
    # The channels of each expert are sorted from best to worst; those of equal rank form a unit.
    return by_expert.sum(1) if how == "experts" else by_expert.sort(1, descending=True).values.sum(0)


def keep(
    scores: Sequence[LayerScores], widths: Sequence[tuple[int, int]], layers: Sequence[DecoderLayer], how: ByExpert
) -> Kept:
    """The units of each layer with the highest scores; those of a mixture are returned as its FFN channels.

    Args:
        scores: [layers], scores of all units.
        widths: [layers], numbers of KV groups, and of FFN channels or the units of a mixture, that stay.
        layers: layers that the scores belong to.
        how: kind of unit that is removed from a mixture.
    """
    kept = keep_highest(gather(scores, layers, how), list(widths))
    return [
        (groups, _channels(score.ffn_channels, units, layer, how) if layer.experts else units)
        for score, (groups, units), layer in zip(scores, kept, layers, strict=True)
    ]


def _channels(scores: Tensor, units: Sequence[int], layer: DecoderLayer, how: ByExpert) -> list[int]:
    numbers = torch.arange(layer.ffn_channels).view(layer.experts, -1)  # [experts, channels of each]
    if how == "experts":
        return numbers[list(units)].flatten().tolist()
    from_best = scores.view(layer.experts, -1).cpu().argsort(dim=1, descending=True, stable=True)
    return numbers.gather(1, from_best[:, : len(units)].sort(1).values).flatten().tolist()


def first(widths: Sequence[tuple[int, int]], layers: Sequence[DecoderLayer], how: ByExpert) -> Kept:
    """The first units of each layer; arguments as for `keep`."""
    alike = [
        LayerScores(torch.ones(layer.kv_groups), torch.ones(layer.ffn_channels, dtype=torch.float64))
        for layer in layers
    ]
    return keep(alike, widths, layers, how)
