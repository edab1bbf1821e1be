"""Maps every point of R^d to a plan within a byte budget: the space that an optimizer moves in.

**Idea.** An optimizer that proposes widths themselves exceeds the budget or wastes bytes. Here a point only says how
much more or less each item deserves than the prior believes; the greedy upgrades that solve the prior's problem then
spend the budget. Every plan fits by construction, and no upgrade that would still fit is left out.

**Formula.** For a point x, with the prior's cost(i, j), `solving.greedy` takes the upgrades j -> k of the largest

    exp(x_i) (cost(i, j) - cost(i, k)) / (size(i, k) - size(i, j)).

x = 0 is the prior's own plan.

**Prior.** The steps between neighbouring choices of an item are rated by saving per byte. The rates are modified in
three ways, none of which changes the plan of x = 0 if the prior sees a gain in every step, smaller in each than before:

1. A step that saves less per byte than a later one of its item gets the rate of both together, as on the concave
   majorant of the item's savings. Otherwise the width between could not be had while the wider one still fits.
2. A hundredth of the mean rate is added to all rates. Their order stays, and an item in which the prior sees no gain
   can be upgraded: last for x = 0, first if its x exceeds that of an average item by log 100 = 4.6.
3. A step has at most 0.99 of the rate of the step before it, so that several items can stop halfway.

As rates then fall within each item, greedy takes single steps in the order of their rates, so a single pass over all
steps, sorted, decodes a thousand points at once. Every plan to which no upgrade can be added is the plan of some point.

**Structure.** Where widths of layers are searched, too, their coordinates come first and are decoded before the bits,
because they change the sizes of all choices; see `qpruner.search.structure`. Rates stay as they are: an item that lost
a tenth of its weights has a tenth less to save, in a tenth fewer bytes.

**Further dimensions.** A coordinate multiplies gains, so anything with a size and a cost can be added: the rank of a
layer's adapters is one more item with choices of its own (`qpruner.search.ranks`), a further format one more choice.

**Sources.** Majorant: Barlow, Bartholomew, Bremner and Brunk 1972, "Statistical inference under order restrictions",
the min-max formula. Greedy: Zhou et al. 2024, QPruner (arXiv 2412.11629).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qpruner.allocation.solving import Choice, Choices
from qpruner.search.structure import Floats, Integers, Structure

FLOOR = 0.01  # of the mean rate
BEND = 0.99
BEYOND = 1.5  # how far, in log rate, `SearchSpace.encode` goes beyond the first or the last rate of an item
FARTHEST = 50.0  # of a coordinate; beyond it nothing changes, and exp stays far from the limits of a float
STRETCH = 1.5  # of the sigmoid of the share, so that a twentieth of all normal draws spends nothing, another one all


@dataclass(frozen=True)
class SearchSpace:
    """The plans for given items that fit into a number of bytes.

    A plan is a row of integers: for each part of the structure the index of its number of units, then for each item
    the index of its choice.

    Args:
        choices: choices of each item, fewest bytes first, [items]; costs are those of the prior, and both sizes and
            costs are those of layers in which all units stay.
        levels: widths of these choices as numbers above 0, such as bits, [items]; more is wider.
        limit: bytes that a plan may take; the smallest choices fit, in the narrowest structure.
        spends: whether the fraction of the bytes that is spent is an additional coordinate, the last one. A search with
            several objectives needs it: without it all plans have nearly the same bytes. 0 spends half of the bytes
            between the smallest choices and the limit, so that both ends of a front are equally near; they are reached
            at -1.6 and 1.6.
        structure: how wide layers may be, whose coordinates come first; None where widths are fixed.
    """

    choices: Choices
    levels: Sequence[Sequence[float]]
    limit: int
    spends: bool = False
    structure: Structure | None = None

    def __post_init__(self) -> None:
        assert [len(item) for item in self.choices] == [len(item) for item in self.levels]
        assert all((np.diff([choice.size for choice in item]) > 0).all() for item in self.choices)
        assert self.limit >= self.smallest

    @property
    def num_items(self) -> int:
        return len(self.choices)

    @property
    def num_parts(self) -> int:
        return 0 if self.structure is None else len(self.structure.parts)

    @property
    def dimension(self) -> int:
        return self.widths_from + self.num_items + self.spends

    @property
    def widths_from(self) -> int:
        """Index of the first item's coordinate."""
        return 0 if self.structure is None else self.structure.num_coordinates

    @cached_property
    def smallest(self) -> int:
        """Bytes of the smallest choices, in the narrowest structure."""
        least = np.zeros((1, self.num_parts), dtype=np.int64)
        return int(self._least_sizes(least)[0])

    @property
    def is_single(self) -> bool:
        """Whether all points map to the same plan: the smallest choices, or the largest."""
        if self.structure is not None:
            return False
        largest = sum(item[-1].size for item in self.choices)
        steps = [item[1].size - item[0].size for item in self.choices if len(item) > 1]
        too_small = not steps or self.limit < self.smallest + min(steps)
        return too_small or (not self.spends and self.limit >= largest)

    @cached_property
    def rates(self) -> list[Floats]:
        """[items][choices - 1], saving per byte of each step to the next choice, modified as above; decreasing."""
        steps = [_majorant(item) for item in self.choices]
        mean = np.mean(np.concatenate(steps)) if any(map(len, steps)) else 0.0
        floor = FLOOR * mean if mean > 0 else 1.0
        rates = []
        for step in steps:
            bent = step + floor
            for number in range(1, len(bent)):
                bent[number] = min(bent[number], BEND * bent[number - 1])
            rates.append(bent)
        return rates

    def decode(self, points: Floats) -> Integers:
        """The plans of points.

        Args:
            points: points to decode, [points, dimension], of any magnitude.
        """  # [points, parts + items]
        points = np.asarray(points, dtype=np.float64)
        budgets = self.budgets(points)
        structures = np.zeros((len(points), 0), dtype=np.int64)
        if self.structure is not None:
            of_structure = points[:, : self.structure.num_coordinates]
            structures = self.structure.decode(of_structure, lambda tried: self._least_sizes(tried) <= budgets)
        owner = np.repeat(np.arange(self.num_items), [len(item) - 1 for item in self.choices])  # [steps]
        added = np.concatenate([np.diff(sizes, axis=1) for sizes in self._choice_sizes(structures)], axis=1)
        coordinates = points[:, self.widths_from : self.widths_from + self.num_items]
        factors = np.exp(np.clip(coordinates, -FARTHEST, FARTHEST))
        order = np.argsort(-np.concatenate(self.rates) * factors[:, owner], axis=1, kind="stable")  # [points, steps]
        taken = np.zeros((len(points), self.num_items), dtype=np.int64)
        left = budgets - self._least_sizes(structures)  # [points], bytes
        stopped = np.zeros(
            taken.shape, dtype=bool
        )  # a step that does not fit ends the upgrades of its item, because the next one builds on it
        rows = np.arange(len(points))
        for step in order.T:
            item, size = owner[step], added[rows, step]
            fits = (size <= left) & ~stopped[rows, item]
            taken[rows, item] += fits
            left -= np.where(fits, size, 0)
            stopped[rows, item] |= ~fits
        return np.concatenate([structures, taken], axis=1)

    def origin(self, *, alike: int = 0) -> list[int]:
        """The plan at the origin, which is the prior's.

        Args:
            alike: number of leading items that are all to have the same choice instead, the widest that fits with the
                others at their smallest.
        """  # [parts + items]
        (plan,) = self.decode(np.zeros((1, self.dimension)))
        if alike:
            most = min(len(item) for item in self.choices[:alike])
            rows = np.tile(plan, (most, 1))
            rows[:, self.num_parts :] = 0
            rows[:, self.num_parts : self.num_parts + alike] = np.arange(most)[:, None]
            plan = rows[np.flatnonzero(self.sizes(rows) <= self.limit)[-1]]
        row: list[int] = plan.tolist()
        return row

    def encode(self, plan: Sequence[int]) -> Floats:
        """A point that decodes to a plan, if it fits and no upgrade can be added to it; else to a plan close to it.

        Each item is scaled so that 1 lies between the rates of the last step that it takes and of the next.

        Args:
            plan: plan to reach, [parts + items].
        """  # [dimension]
        point = np.zeros(self.dimension)
        if self.structure is not None:
            structure = np.array(plan[: self.num_parts], dtype=np.int64)
            point[: self.widths_from] = self.structure.encode(structure)
        for item, (rates, taken) in enumerate(zip(self.rates, plan[self.num_parts :], strict=True)):
            if len(rates):
                logs = np.log(rates)
                before = logs[taken - 1] if taken else logs[0] + 2 * BEYOND
                after = logs[taken] if taken < len(logs) else logs[-1] - 2 * BEYOND
                point[self.widths_from + item] = -(before + after) / 2
        of_items = point[self.widths_from : self.widths_from + self.num_items]
        of_items -= of_items.mean()  # which does not change any order
        if self.spends:
            point[-1] = FARTHEST
        return point

    def budgets(self, points: Floats) -> Integers:
        """[points], bytes that the plan of each point may take."""
        if not self.spends:
            return np.full(len(points), self.limit, dtype=np.int64)
        middle = 1 / (1 + np.exp(-np.clip(points[:, -1], -FARTHEST, FARTHEST)))
        share = np.clip(STRETCH * (middle - 0.5) + 0.5, 0, 1)
        return self.smallest + np.floor(share * (self.limit - self.smallest)).astype(np.int64)

    def uninformed(self, generator: np.random.Generator, count: int) -> Floats:
        """Random points whose plans do not depend on how the prior ranks the items.

        Each point cancels the prior's ranking and replaces it by a random one. How much items differ is random, too: if
        they differ much, a few get all the bytes; if they differ little, many get some.
        """  # [points, dimension]
        first = np.array([np.log(rates[0]) if len(rates) else 0.0 for rates in self.rates])
        points = np.exp(generator.uniform(-1, 1.5, (count, 1))) * generator.standard_normal((count, self.dimension))
        points[:, self.widths_from : self.widths_from + self.num_items] -= first - first.mean()
        if self.spends:
            points[:, -1] = generator.standard_normal(count)
        return points

    def features(self, plans: Integers) -> Floats:
        """[plans, parts + items], how much of each part stays, and log2 of the widths, each scaled to 0 to 1."""
        structures, choices = self._split(plans)
        columns = [] if self.structure is None else [*self.structure.features(structures).T]
        for item, taken in zip(self.levels, choices.T, strict=True):
            logs = np.log2(np.asarray(item, dtype=np.float64))
            columns.append(((logs - logs.min()) / (np.ptp(logs) or 1.0))[taken])
        return np.stack(columns, axis=1)

    def costs(self, plans: Integers) -> Floats:
        """[plans], cost of the prior; that of an item that lost units shrinks in proportion to its bytes."""
        structures, choices = self._split(plans)
        total = np.zeros(len(plans)) if self.structure is None else self.structure.costs(structures)
        for item, sizes, taken in zip(self.choices, self._choice_sizes(structures), choices.T, strict=True):
            costs = np.array([choice.cost for choice in item])
            if self.structure is None:
                total = total + costs[taken]
            else:
                whole = np.array([choice.size for choice in item])[taken]
                left = sizes[np.arange(len(plans)), taken] / np.maximum(whole, 1)
                left[whole == 0] = 1.0  # an item without bytes cannot lose any
                total = total + costs.min() + (costs[taken] - costs.min()) * left
        return total

    def sizes(self, plans: Integers) -> Floats:
        """[plans], bytes that count against the limit."""
        structures, choices = self._split(plans)
        rows = np.arange(len(plans))
        items = zip(self._choice_sizes(structures), choices.T, strict=True)
        total = sum((sizes[rows, taken] for sizes, taken in items), start=self._rest(structures))
        return total.astype(np.float64)

    def _split(self, plans: Integers) -> tuple[Integers, Integers]:
        """Structures [plans, parts] and choices [plans, items]."""
        return plans[:, : self.num_parts], plans[:, self.num_parts :]

    def _choice_sizes(self, structures: Integers) -> Iterator[Integers]:
        """For each item, the bytes of its choices, [points, choices]."""
        for number, item in enumerate(self.choices):
            whole = np.array([choice.size for choice in item], dtype=np.int64)
            change = 0 if self.structure is None else self.structure.change(number, structures)
            yield np.broadcast_to(whole + change, (len(structures), len(item)))

    def _rest(self, structures: Integers) -> Integers:
        """[points], bytes that count but belong to no item, above those where all units stay."""
        none = np.zeros(len(structures), dtype=np.int64)
        return none if self.structure is None else self.structure.rest(structures)

    def _least_sizes(self, structures: Integers) -> Integers:
        """[points], bytes with the smallest choices."""
        return sum((sizes[:, 0] for sizes in self._choice_sizes(structures)), start=self._rest(structures))


def _majorant(item: Sequence[Choice]) -> Floats:
    """[choices - 1], slopes of the least concave majorant of the savings of an item, none below 0."""
    sizes = np.array([choice.size for choice in item], dtype=np.float64)
    savings = np.maximum.accumulate(item[0].cost - np.array([choice.cost for choice in item]))
    return np.array(
        [
            min(
                max((savings[end] - savings[start]) / (sizes[end] - sizes[start]) for end in range(step, len(item)))
                for start in range(step)
            )
            for step in range(1, len(item))
        ]
    )
