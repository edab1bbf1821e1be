"""Which units are removed: from scores and a number of parameters to what every layer keeps.

Units are removed in steps: one KV group of a layer, or as many of its FFN channels as bring its width to the next
multiple of ``round_to``. There are three ways to take steps:

- local: every layer gives up the same share of its groups and of its channels. The share of groups is rounded to the
  nearest, the channels make up the rest.
- global: the steps of all layers compete, lowest score per parameter first.
- global, uniform: as global, with a step taken in all layers at once, so that they end up equal.
"""

import heapq
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qpruner.errors import UserError
from qpruner.pruning.scores import LayerScores

Kept = list[tuple[list[int], list[int]]]
"""[layers], indices of the KV groups and of the FFN channels that stay."""

Widths = list[tuple[int, int]]
"""[layers], numbers of KV groups and of FFN channels, or of what is removed together in a mixture of experts."""

ByExpert = Literal["channels", "experts"]
"""What is removed from a mixture of experts: channels of each expert, or whole experts."""


@dataclass(frozen=True)
class SelectionConfig:
    """How the removal of units is distributed over layers.

    Args:
        scope: how layers share the removal: ``global``, they compete by score per parameter; ``local``, every layer
            gives up the same share.
        uniform: whether all layers must end up equally wide, as required by engines without per-layer widths.
        leave_alone: numbers of layers, from 0, that stay whole; negative ones count from the last.
        floor: share of the units of a layer of the dense model that always stays, in (0, 1), however many have gone
            in earlier phases.
        round_to: number of which FFN widths become multiples; default ``hidden_size / 32`` rounded down to a power of
            two, at most 128. Has no effect on models of which whole experts are removed.
        mixtures: what is removed from a mixture of experts: ``channels``, the same number from each expert, or whole
            ``experts``, of which at least as many stay as a token is sent to, however low the floor. Has no effect on
            models without experts.
    """

    scope: Literal["local", "global"] = "global"
    uniform: bool = False
    leave_alone: Sequence[int] = ()
    floor: float = 0.1
    round_to: int | None = None
    mixtures: ByExpert = "channels"

    def __post_init__(self) -> None:
        object.__setattr__(self, "leave_alone", tuple(self.leave_alone))  # a list from YAML compares as a tuple
        if not 0 < self.floor < 1:
            raise UserError(f"selection.floor is {self.floor}; the share that a layer keeps lies in (0, 1).")
        if self.round_to is not None and self.round_to < 1:
            raise UserError(f"selection.round_to is {self.round_to}; FFN widths are multiples of at least 1.")
        if self.uniform and self.leave_alone:
            raise UserError(
                f"selection.leave_alone is {list(self.leave_alone)} and selection.uniform is true; layers that stay "
                f"whole and others that do not cannot end equal. Drop one of the two."
            )


def default_round_to(hidden_size: int) -> int:
    """A thirty-second of the hidden size, rounded down to a power of two, from 1 to 128."""
    return min(128, 1 << max(0, (hidden_size // 32).bit_length() - 1))


@dataclass(frozen=True)
class Supply:
    """What can be removed from one layer.

    Args:
        kv_groups: number of KV groups that the layer has.
        ffn_channels: number of FFN channels that the layer has; in a mixture of experts, of those removed together.
        group_parameters: number of parameters removed with one KV group.
        channel_parameters: number of parameters removed with one FFN channel.
        least_groups: number of KV groups that must stay; all of them in a layer that is left alone.
        least_channels: number of FFN channels that must stay, a legal width.
        channels_of_unit: number of FFN channels that are removed together; 1 in a layer with a plain FFN.
    """

    kv_groups: int
    ffn_channels: int
    group_parameters: int
    channel_parameters: int
    least_groups: int
    least_channels: int
    channels_of_unit: int = 1

    @property
    def parameters(self) -> int:
        """The largest number of parameters that can be removed."""
        return self.cost(self.least_groups, self.least_channels)

    def cost(self, groups: int, channels: int) -> int:
        """Number of parameters removed if these numbers of groups and channels stay."""
        gone = self.kv_groups - groups, self.ffn_channels - channels
        return gone[0] * self.group_parameters + gone[1] * self.channel_parameters

    @property
    def loses_groups(self) -> bool:
        """Whether any KV group can go."""
        return self.least_groups < self.kv_groups

    @property
    def loses_channels(self) -> bool:
        """Whether any FFN channel can go."""
        return self.least_channels < self.ffn_channels

    def ffn_widths(self, round_to: int) -> list[int]:
        """The widths that the FFN may end up with, widest first."""
        first = (self.ffn_channels - 1) // round_to * round_to
        return [self.ffn_channels, *range(first, self.least_channels - 1, -round_to)]

    def ffn_width_near(self, ideal: float, round_to: int) -> int:
        """The legal FFN width nearest to a number."""
        width = max(self.least_channels, round(ideal / round_to) * round_to)
        nearer_to_all = self.ffn_channels - ideal <= abs(width - ideal)
        return self.ffn_channels if nearer_to_all or width > self.ffn_channels else width


def keep_highest(scores: Sequence[LayerScores], widths: Widths) -> Kept:
    """The units of each layer with the highest scores; among equal scores the first."""
    return [
        (_highest(score.kv_groups, groups), _highest(score.ffn_channels, channels))
        for score, (groups, channels) in zip(scores, widths, strict=True)
    ]


def num_removed(supplies: Sequence[Supply], kept: Widths) -> int:
    """Number of parameters removed if layers keep these widths."""
    return sum(supply.cost(*widths) for supply, widths in zip(supplies, kept, strict=True))


def part_way(supplies: Sequence[Supply], goal: Widths, share: float) -> Widths:
    """Widths at a given fraction of the way from the present ones to a goal."""
    return [
        (
            s.kv_groups - round(share * (s.kv_groups - groups)),
            s.ffn_channels - round(share * (s.ffn_channels - channels)),
        )
        for s, (groups, channels) in zip(supplies, goal, strict=True)
    ]


def local_widths(supplies: Sequence[Supply], remove: int, round_to: int) -> Widths:
    """Numbers of KV groups and FFN channels that each layer keeps if all give up the same share.

    Among the shares of groups with which the channels can meet the total, the one nearest to the overall share is used.
    """  # [layers]
    prunable = [supply for supply in supplies if supply.parameters]
    share = remove / sum(supply.cost(0, 0) for supply in prunable)
    grouped = max(prunable, key=lambda supply: (supply.loses_groups, supply.kv_groups))
    widest = max(prunable, key=lambda supply: (supply.loses_channels, supply.ffn_channels))
    group_shares = [gone / grouped.kv_groups for gone in range(grouped.kv_groups - grouped.least_groups + 1)]
    channel_shares = [1 - width / widest.ffn_channels for width in widest.ffn_widths(round_to)]

    def widths(group_share: float, channel_share: float) -> Widths:
        return [
            (
                max(s.least_groups, s.kv_groups - round(group_share * s.kv_groups)),
                s.ffn_width_near(s.ffn_channels * (1 - channel_share), round_to),
            )
            if s.parameters
            else (s.kv_groups, s.ffn_channels)
            for s in supplies
        ]

    def removed(group_share: float, channel_share: float) -> int:
        return num_removed(supplies, widths(group_share, channel_share))

    def miss(shares: tuple[float, float]) -> int:
        return abs(removed(*shares) - remove)

    candidates: list[tuple[float, float]] = []
    for group_share in sorted(group_shares, key=lambda candidate: abs(candidate - share)):
        # A larger share of channels removes more, so the share that suffices is found by bisection.
        place = bisect_left(channel_shares, remove, key=lambda channel_share: removed(group_share, channel_share))
        around = [(group_share, channel_share) for channel_share in channel_shares[max(0, place - 1) : place + 1]]
        if removed(group_share, 0) <= remove <= removed(group_share, channel_shares[-1]):
            return widths(*min(around, key=miss))
        candidates += around
    return widths(*min(candidates, key=miss))


def competing_widths(
    scores: Sequence[LayerScores],
    supplies: Sequence[Supply],
    remove: int,
    round_to: int,
    *,
    uniform: bool,
    last: bool = True,
) -> Widths:
    """Numbers of KV groups and FFN channels that each layer keeps if steps compete by score per parameter.

    Args:
        scores: [layers], scores of the units of each layer.
        supplies: [layers], what can be removed from each layer.
        remove: number of parameters to remove, at most what the supplies allow.
        round_to: number of which FFN widths become multiples.
        uniform: whether a step is taken in all layers at once.
        last: whether the total is to be met now; otherwise a step that is too large waits for later rounds, and so do
            those that cost more.
    """  # [layers]
    groups = [
        _steps(score.kv_groups, range(s.kv_groups, s.least_groups - 1, -1), s.group_parameters)
        for score, s in zip(scores, supplies, strict=True)
    ]
    channels = [
        _steps(score.ffn_channels, s.ffn_widths(round_to), s.channel_parameters)
        for score, s in zip(scores, supplies, strict=True)
    ]
    if uniform:
        step = round_to * sum(s.channel_parameters for s in supplies)
        group_steps, channel_steps = _take([_everywhere(groups), _everywhere(channels)], remove, step, last)
        taken = [(group_steps, channel_steps)] * len(supplies)
    else:
        each = _take([*groups, *channels], remove, round_to * max(s.channel_parameters for s in supplies), last)
        taken = list(zip(each[: len(supplies)], each[len(supplies) :], strict=True))
    return [
        (s.kv_groups - sum(step.units for step in mine), s.ffn_channels - sum(step.units for step in ffn))
        for s, (mine, ffn) in zip(supplies, taken, strict=True)
    ]


@dataclass(frozen=True)
class Step:
    """Units that are removed together: one KV group, or the channels down to the next legal width.

    Args:
        units: number of units, in each layer in which the step is taken.
        parameters: number of parameters removed with these units, in all of these layers.
        score: score of all these units together.
    """

    units: int
    parameters: int
    score: float

    @property
    def price(self) -> float:
        return self.score / self.parameters


def _steps(scores: Tensor, widths: Sequence[int], parameters: int) -> list[Step]:
    """The steps from each width to the next, weakest units first."""
    weakest_first = scores.sort().values
    total = len(scores)
    return [
        Step(wide - narrow, (wide - narrow) * parameters, float(weakest_first[total - wide : total - narrow].sum()))
        for wide, narrow in zip(widths, widths[1:], strict=False)
    ]


def _everywhere(layers: Sequence[Sequence[Step]]) -> list[Step]:
    """Steps taken in all layers at once."""
    return [
        Step(same[0].units, sum(step.parameters for step in same), math.fsum(step.score for step in same))
        for same in zip(*layers, strict=True)
    ]


def _take(places: Sequence[Sequence[Step]], remove: int, step_parameters: int, last: bool) -> list[list[Step]]:
    """Takes steps, cheapest first and in order within each place, while they bring the total nearer to ``remove``.

    A step that would exceed it by more than half of ``step_parameters`` waits until there is nothing smaller left.
    """
    taken: list[list[Step]] = [[] for _ in places]
    for beyond in (step_parameters / 2, math.inf):
        closed: set[int] = set()  # if a step has to wait, those after it cannot be reached
        for place, step in heapq.merge(*_numbered(places, taken), key=lambda entry: entry[1].price):
            if place in closed or step.parameters > min(2 * remove, remove + beyond):
                if not last:
                    return taken
                closed.add(place)
            else:
                taken[place].append(step)
                remove -= step.parameters
    return taken


def _numbered(places: Sequence[Sequence[Step]], taken: Sequence[Sequence[Step]]) -> list[list[tuple[int, Step]]]:
    """The steps of each place that are not taken yet, with the number of the place."""
    return [
        [(number, step) for step in steps[len(mine) :]]
        for number, (steps, mine) in enumerate(zip(places, taken, strict=True))
    ]


def _highest(scores: Tensor, count: int) -> list[int]:
    """Indices of the highest scores, ascending."""
    order = torch.argsort(scores, descending=True, stable=True)
    return sorted(order[:count].tolist())
