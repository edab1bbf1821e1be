"""How wide each layer is, as the first coordinates of a `SearchSpace`, which are decided before the bits.

A part is the KV groups or the FFN channels of a layer. The coordinate of a part determines what share of it stays,

    share = start + SWAY (x_all + x_part) (1 - least),   at most 1 and at least ``least``,

and the number of units is the legal one nearest to that. x_all is one more coordinate, common to all parts, since how
much is removed in total matters more than where. If the layers would take more bytes, even in their smallest bit
widths, than there are, or more multiply-adds, all shares are lowered by the same number, the smallest that is enough.
So every point has a structure that fits, and the bytes that it leaves buy bits.

A pruning criterion decides once which units stay: those with the highest scores. The cost of removing the others is
only a guess of the prior: removing all that may go costs as much as the smallest bit widths instead of the largest, and
each part of that in proportion to its scores. Trials correct this.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from qpruner.errors import UserError

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]
Kind = Literal["kv_groups", "ffn_channels"]

SWAY = 0.25
"""Fraction of the range between all and the least share that a coordinate of 1 moves a share by."""
HALVINGS = 40  # bisections of the interval that holds the number by which shares are lowered
FARTHEST = 50.0  # largest magnitude of a coordinate


@dataclass(frozen=True)
class StructureConfig:
    """How wide layers may be in a search. `StructuredPruning` says by which criterion units stay, which layers are left
    alone and what FFN widths are multiples of; its ratio is the start of the search.

    Args:
        least: smallest share of the units of a layer that may stay, in (0, 1).
        groups: whether KV groups are searched.
        channels: whether FFN channels are searched.
        start: file of a plan to try among the first, such as one that was learned; null for none. The search takes from
            it the number of units of each part and the bits of each item, or the nearest to these that the search has;
            and the units themselves, in every trial that keeps as many of the part as the plan does. In parts that are
            not searched all units stay, and input channels that the plan holds wider than others (``leading``) have the
            bits of their unit. If this exceeds the budget, bits are fewer and, where that is not enough, all shares are
            lowered by the same number; if it leaves bytes, these buy bits. Where the plan that is tried differs from
            the one in the file, the log says how.

    Raises:
        UserError: a share out of its range, or nothing to search.
    """

    least: float = 0.5
    groups: bool = True
    channels: bool = True
    start: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.least < 1:
            raise UserError(
                f"search.structure.least is {self.least}; it is the share of a layer that stays at least, in (0, 1)."
            )
        if not (self.groups or self.channels):
            raise UserError(
                "search.structure has groups false and channels false, so that there is nothing to search but bits. "
                "Set one to true, or leave search.structure out."
            )


@dataclass(frozen=True)
class Part:
    """The units of one kind in a layer.

    Args:
        layer: number of the layer.
        kind: kind of the units.
        counts: numbers of units that may stay, fewest first; the last is all of them.
        multiply_adds: [counts], multiply-adds per token in the linears that have these units.
        rest: [counts], bytes that count against the limit and belong to no item, minus those with all units.
        cost: [counts], prior cost of the units that are removed.
        start: index into the counts at the origin.
    """

    layer: int
    kind: Kind
    counts: tuple[int, ...]
    multiply_adds: tuple[int, ...]
    rest: tuple[int, ...]
    cost: tuple[float, ...]
    start: int

    def __str__(self) -> str:
        return f"layer {self.layer} {self.kind}"

    @property
    def shares(self) -> Floats:
        """[counts], of all units."""
        return np.array(self.counts) / self.counts[-1]


@dataclass(frozen=True, eq=False)
class Structure:
    """The parts whose widths are searched.

    Args:
        parts: parts, in order.
        changes: for each item, the parts that its bytes depend on, each with the change of these bytes relative to the
            whole part, [counts, choices], 0 or less.
        least: smallest share of a part that may stay.
        most_multiply_adds: most multiply-adds that a token may cost in the linears of the parts; None for any number.
    """

    parts: tuple[Part, ...]
    changes: Sequence[Sequence[tuple[int, Integers]]]
    least: float
    most_multiply_adds: int | None = None

    @property
    def num_coordinates(self) -> int:
        return 1 + len(self.parts)

    def decode(self, points: Floats, fits: Callable[[Integers], Booleans]) -> Integers:
        """The structures of points.

        Args:
            points: coordinates, [points, 1 + parts].
            fits: function that says of structures [points, parts] whether everything else to be stored still fits,
                [points]; it must for the least structure, and with fewer units wherever it does with more.
        """  # [points, parts], indices into the counts
        points = np.clip(points, -FARTHEST, FARTHEST)
        starts = np.array([part.shares[part.start] for part in self.parts])
        shares = starts + SWAY * (1 - self.least) * (points[:, :1] + points[:, 1:])
        shares = np.clip(shares, self.least, 1)
        low, high = np.zeros((len(points), 1)), np.full((len(points), 1), 1 - self.least + 1e-9)
        high[self._allowed(self._nearest(shares), fits)] = 0
        for _ in range(HALVINGS if high.any() else 0):
            middle = (low + high) / 2
            enough = self._allowed(self._nearest(shares - middle), fits)[:, None]
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        return self._nearest(shares - high)

    def encode(self, structure: Integers) -> Floats:
        """Coordinates of a structure [parts] that is allowed."""  # [1 + parts]
        moved = [
            part.shares[place] - part.shares[part.start] for part, place in zip(self.parts, structure, strict=True)
        ]
        return np.array([0.0, *moved]) / (SWAY * (1 - self.least))

    def multiply_adds(self, structures: Integers) -> Integers:
        """[points], multiply-adds per token in the linears of the parts."""
        return self._sum([part.multiply_adds for part in self.parts], structures).astype(np.int64)

    @property
    def most(self) -> int:
        """Multiply-adds per token in the linears of the parts if all units stay."""
        return sum(part.multiply_adds[-1] for part in self.parts)

    def rest(self, structures: Integers) -> Integers:
        """[points], bytes other than those of items, minus those of the whole parts."""
        return self._sum([part.rest for part in self.parts], structures).astype(np.int64)

    def costs(self, structures: Integers) -> Floats:
        """[points], prior cost of the units that are removed."""
        return self._sum([part.cost for part in self.parts], structures)

    def features(self, structures: Integers) -> Floats:
        """[points, parts], what stays of each part, scaled to the range from 0 to 1."""
        return structures / np.array([len(part.counts) - 1 for part in self.parts])

    def change(self, item: int, structures: Integers) -> Integers:
        """[points, choices], bytes of an item relative to those that it has if all units stay."""
        total = np.zeros((len(structures), 1), dtype=np.int64)
        for part, table in self.changes[item]:
            total = total + table[structures[:, part]]
        return total

    def counts(self, structure: Sequence[int]) -> list[int]:
        """How many units of each part stay."""
        return [part.counts[place] for part, place in zip(self.parts, structure, strict=True)]

    def _allowed(self, structures: Integers, fits: Callable[[Integers], Booleans]) -> Booleans:
        if self.most_multiply_adds is None:
            return fits(structures)
        return fits(structures) & (self.multiply_adds(structures) <= self.most_multiply_adds)

    def _nearest(self, shares: Floats) -> Integers:
        """Indices of the counts nearest to shares, [points, parts]; of two equally near, the larger."""
        columns = []
        for part, wanted in zip(self.parts, shares.T, strict=True):
            middles = (part.shares[1:] + part.shares[:-1]) / 2
            columns.append(np.searchsorted(middles, wanted, side="right"))
        return np.stack(columns, axis=1)

    def _sum(self, tables: Sequence[Sequence[float]], structures: Integers) -> Floats:
        columns = [np.asarray(table)[places] for table, places in zip(tables, structures.T, strict=True)]
        return np.sum(columns, axis=0)
