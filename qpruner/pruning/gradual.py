"""Gradual pruning: which units a model keeps on the way to a ratio, as more and more of them are removed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from qpruner.anatomy import num_linear_parameters
from qpruner.memory import num_parameters
from qpruner.plan import Architecture
from qpruner.pruning.scores import LayerScores
from qpruner.pruning.selection import (
    Kept,
    SelectionConfig,
    Supply,
    competing_widths,
    keep_highest,
    local_widths,
    part_way,
)
from qpruner.pruning.supplies import round_to, supplies_for


@dataclass(frozen=True)
class GradualPruning:
    """Chooses, at any share of the way to a ratio, which units of a model stay; removed units stay removed.

    At the end the widths are those that one-shot pruning would give: the same share of each layer, or the outcome of
    the competition between layers.

    Args:
        ratio: share of all parameters to remove at the end, in (0, 1).
        selection: how the layers share what is removed.
        dense: [layers], what can be removed from each layer.
        total: number of parameters of the model, without adapters.
        in_linears: number of parameters of the decoder's projections, which ``total`` includes.
        round_to: number that FFN widths are a multiple of, at the end or whenever layers compete.
    """

    ratio: float
    selection: SelectionConfig
    dense: list[Supply]
    total: int
    in_linears: int
    round_to: int

    @classmethod
    def of(cls, model: Any, ratio: float, selection: SelectionConfig, dense: Architecture) -> Self:
        """Gradual pruning, to a ratio, of a model without adapters, which may be packed.

        Args:
            model: model to prune.
            ratio: share of all its parameters to remove, in (0, 1).
            selection: how the layers share what is removed.
            dense: dense widths, of which the floors are shares.

        Raises:
            UserError: see `supplies_for`.
        """
        offers, total = supplies_for(ratio, model, selection, dense), num_parameters(model)
        return cls(ratio, selection, offers, total, num_linear_parameters(model), round_to(model, selection))

    def removed(self, kept: Kept) -> int:
        """Number of parameters that are removed when these units stay."""
        return sum(s.cost(len(groups), len(channels)) for s, (groups, channels) in zip(self.dense, kept, strict=True))

    def keep(self, scores: Sequence[LayerScores], alive: Kept, share: float) -> Kept:
        """The units that stay, among those still alive, at a share of the way.

        Args:
            scores: [layers], scores of all units.
            alive: indices of the units that are not removed yet.
            share: share of the way, in [0, 1]; at 1 the ratio is met.
        """
        left = [
            LayerScores(score.kv_groups[groups], score.ffn_channels[channels])
            for score, (groups, channels) in zip(scores, alive, strict=True)
        ]
        if self.selection.scope == "local":
            goal = local_widths(self.dense, round(self.total * self.ratio), self.round_to)
            widths = part_way(self.dense, goal, share)
        else:
            remove = round(self.total * self.ratio * share) - self.removed(alive)
            offers = [
                replace(supply, kv_groups=len(groups), ffn_channels=len(channels))
                for supply, (groups, channels) in zip(self.dense, alive, strict=True)
            ]
            uniform, last = self.selection.uniform, share == 1
            widths = competing_widths(left, offers, max(0, remove), self.round_to, uniform=uniform, last=last)
        return [
            ([groups[place] for place in kept_groups], [channels[place] for place in kept_channels])
            for (groups, channels), (kept_groups, kept_channels) in zip(alive, keep_highest(left, widths), strict=True)
        ]


def agreement(alive: Kept, kept: Kept, kept_by_other: Kept) -> float | None:
    """The share of the units removed by one choice that another removes, too; None where the first removes none."""
    removed, removed_by_other = _gone(alive, kept), _gone(alive, kept_by_other)
    return len(removed & removed_by_other) / len(removed) if removed else None


def _gone(alive: Kept, kept: Kept) -> set[tuple[int, int, int]]:
    """The units that are alive and not kept, as (layer, kind, index)."""
    return {
        (number, kind, place)
        for number, layers in enumerate(zip(alive, kept, strict=True))
        for kind, (before, after) in enumerate(zip(*layers, strict=True))
        for place in set(before) - set(after)
    }
