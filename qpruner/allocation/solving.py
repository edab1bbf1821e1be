"""Chooses one of several widths for each item when bytes are limited: the multiple-choice knapsack.

**Idea.** An item is a layer or a unit of a layer, a choice is a width that it may have. `greedy` upgrades the item that
gains most for its bytes until nothing more fits; `exact` finds the cheapest of all allocations that fit.

**Formula.** With one choice j(i) for each of the items i,

    minimise sum_i cost(i, j(i))    so that    sum_i size(i, j(i)) <= budget.

`greedy` starts from the smallest choices and always takes the upgrade j -> k that fits with the largest

    (cost(i, j) - cost(i, k)) / (size(i, k) - size(i, j)) > 0.

With cost = -I_l log2(bits) that is QPruner's I_l log2(b' / b) / (mem(b') - mem(b)).

`exact` goes through the items and keeps the states (bytes, saving) that the choices so far can reach, except those that
save no more than a smaller one. A state is dropped if even fractional upgrades, taken best first along the convex hulls
of the remaining items (the linear relaxation), could not beat the best allocation found. Such allocations come from the
same curve: each state with the whole upgrades that fit. Savings are whole multiples of 2^-48 of what all items together
can save, about as fine as a float sum of as many numbers, so that sums are exact and ties are ties.

**Sources.** Greedy: Zhou et al. 2024, QPruner (arXiv 2412.11629). States: Nemhauser and Ullmann 1969, "Discrete dynamic
programming and capital allocation". Relaxation: Sinha and Zoltners 1979, "The multiple-choice knapsack problem". Both
together: Pisinger 1995, "A minimal algorithm for the multiple-choice knapsack problem"; Kellerer, Pferschy and Pisinger
2004, "Knapsack problems", chapter 11.

**Trade-off.** `greedy` may leave bytes unused that another mix would have used, and never takes an upgrade back.
`exact` takes milliseconds for 128 items, and longer the more nearly costs are proportional to bytes, where the
relaxation tells little. At a deviation of 10^-6, the largest number of states that it keeps, seconds of work, is no
longer enough for a proof; it then warns by how much it may have missed the optimum: a billionth of what is saved.

As an integer program (``scipy.optimize.milp``) the same optimum takes 2 to 200 times as long, the more the nearer costs
are to proportional, has no rule for ties, and needs costs scaled against an absolute tolerance
(``benchmarks/allocation_solvers.py``).
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

DIGITS = 48  # binary digits of savings; 5 fewer than a float holds, to leave room for rounding in the relaxation
SLACK = 0.25  # more than the rounding error of numbers below 2^DIGITS, and less than 1
MOST_STATES = 2**17  # 10 s for 128 items


@dataclass(frozen=True)
class Choice:
    """A width that an item may have.

    Args:
        size: bytes of the choice.
        cost: loss of quality of the choice, lower is better; any finite number, of either sign.
    """

    size: int
    cost: float


Choices = Sequence[Sequence[Choice]]
"""[items], the choices that each item has, in any order."""


def smallest(choices: Choices) -> tuple[int, ...]:
    """The smallest choice of each item; of equally small ones the cheapest, then the first."""  # [items]
    return tuple(min(range(len(item)), key=lambda number: (item[number].size, item[number].cost)) for item in choices)


def total_size(choices: Choices, taken: Sequence[int]) -> int:
    """Bytes of an allocation."""
    return sum(item[number].size for item, number in zip(choices, taken, strict=True))


def total_cost(choices: Choices, taken: Sequence[int]) -> float:
    """Cost of an allocation."""
    return math.fsum(item[number].cost for item, number in zip(choices, taken, strict=True))


def greedy(choices: Choices, budget: int) -> tuple[int, ...]:
    """Upgrades from the smallest choices, largest saving per byte first; of equal ones the first item, first choice.

    Args:
        choices: choices that each item has, [items]; the smallest fit.
        budget: bytes that the allocation may take.
    """  # [items], indices of choices
    counts = [len(item) for item in choices]
    starts = np.cumsum([0, *counts[:-1]])[: len(counts)]  # [items], where each item's choices begin in one flat list
    owner = np.repeat(np.arange(len(counts)), counts)  # [all choices], as are the next two
    sizes = np.array([choice.size for item in choices for choice in item], dtype=np.int64)
    costs = np.array([choice.cost for item in choices for choice in item], dtype=np.float64)
    taken = starts + np.array(smallest(choices), dtype=np.int64)  # [items], indices into the flat list
    left = budget - total_size(choices, smallest(choices))
    assert left >= 0
    while True:
        added, saved = sizes - sizes[taken][owner], costs[taken][owner] - costs
        possible = np.flatnonzero((added > 0) & (added <= left) & (saved > 0))
        if not possible.size:
            return tuple((taken - starts).tolist())
        best = possible[np.argmax(saved[possible] / added[possible])]
        taken[owner[best]] = best
        left -= int(added[best])


def exact(choices: Choices, budget: int) -> tuple[int, ...]:
    """The allocation of least cost that fits; of equal ones one of the fewest bytes, always the same.

    Warns if too many states were open and some were dropped, with a bound on what that may have cost.

    Args:
        choices: choices that each item has, [items]; the smallest fit.
        budget: bytes that the allocation may take.
    """  # [items], indices of choices
    first = dict(enumerate(smallest(choices)))
    best, best_saving, best_size = first, 0, 0
    scale = _scale(choices)
    # Large items first: the small ones that remain fill the rest more evenly, so that fewer states stay open.
    items = sorted(_upgrades(choices, scale), key=lambda upgrades: -upgrades[-1].size)
    left = min(budget - total_size(choices, smallest(choices)), sum(upgrades[-1].size for upgrades in items))
    assert left >= 0
    steps = _steps(items)
    sizes = savings = np.zeros(1, dtype=np.int64)  # [states], ascending, both relative to the smallest choices
    origins: list[Origin] = []
    dropped = 0.0
    for upgrades in items:
        sizes, savings, origin = _extend(sizes, savings, upgrades, left)
        origins.append(origin)
        # The most that the remaining items save in so many bytes: a concave curve through the sums of whole steps.
        steps = [step for step in steps if step.item != upgrades[0].item]
        curve_sizes = np.cumsum([0, *(step.size for step in steps)])
        curve_savings = np.cumsum([0, *(step.saving for step in steps)])

        whole = np.searchsorted(curve_sizes, left - sizes, side="right") - 1  # [states], how many steps fit
        filled_sizes, filled_savings = sizes + curve_sizes[whole], savings + curve_savings[whole]
        state = np.lexsort((filled_sizes, -filled_savings))[0]
        size, saving = int(filled_sizes[state]), int(filled_savings[state])
        if saving > best_saving or (saving == best_saving and size < best_size):
            best_saving, best_size = saving, size
            best = first | {step.item: step.choice for step in steps[: whole[state]]} | _trace(origins, state)

        most = savings + np.floor(np.interp(left - sizes, curve_sizes, curve_savings) + SLACK)
        least = sizes + np.ceil(np.interp(best_saving - savings, curve_savings, curve_sizes) - SLACK)  # bytes
        (kept,) = np.nonzero((most > best_saving) | ((most == best_saving) & (least < best_size)))
        if len(kept) > MOST_STATES:
            by_promise = kept[np.argsort(-most[kept], kind="stable")]
            dropped = max(dropped, float(most[by_promise[MOST_STATES]]))
            kept = np.sort(by_promise[:MOST_STATES])
        if not kept.size:
            break
        sizes, savings = sizes[kept], savings[kept]
        origins[-1] = Origin(origin.item, origin.before[kept], origin.choice[kept])
    if dropped > best_saving:
        gap = math.ldexp(dropped - best_saving, -scale)
        warnings.warn(
            f"Costs follow bytes so closely that not all allocations could be looked at: this one costs at most "
            f"{gap:.3g} more than the best, of {math.ldexp(best_saving, -scale):.3g} that it saves.",
            stacklevel=2,
        )
    return tuple(best.values())


class Upgrade(NamedTuple):
    """A choice of an item, or the step to it from a smaller one.

    Args:
        item: index of the item.
        choice: index of the choice.
        size: bytes that the upgrade adds.
        saving: cost that the upgrade saves, in whole units of 2^-scale; see `_scale`.
    """

    item: int
    choice: int
    size: int
    saving: int


class Origin(NamedTuple):
    """Where the states after an item come from.

    Args:
        item: index of the item.
        before: indices of the states before the item that they come from, [states].
        choice: indices of the choices that the item has in them, [states].
    """

    item: int
    before: Integers
    choice: Integers


def _scale(choices: Choices) -> int:
    """The exponent of the power of two by which costs are multiplied, so that all savings are below 2^DIGITS."""
    spread = sum(max(choice.cost for choice in item) - min(choice.cost for choice in item) for item in choices)
    assert math.isfinite(spread)
    return DIGITS - math.frexp(spread)[1]


def _upgrades(choices: Choices, scale: int) -> list[list[Upgrade]]:
    """The choices that save more than every smaller one, starting with the smallest."""  # [items]
    upgrades = []
    for number, (item, first) in enumerate(zip(choices, smallest(choices), strict=True)):
        kept = [Upgrade(number, first, 0, 0)]
        for choice in sorted(range(len(item)), key=lambda place: (item[place].size, item[place].cost)):
            saving = round(math.ldexp(item[first].cost - item[choice].cost, scale))
            if saving > kept[-1].saving:
                kept.append(Upgrade(number, choice, item[choice].size - item[first].size, saving))
        upgrades.append(kept)
    return upgrades


def _steps(items: Sequence[Sequence[Upgrade]]) -> list[Upgrade]:
    """The steps along the convex hulls of all items, largest saving per byte first."""
    steps = []
    for upgrades in items:
        hull: list[Upgrade] = []
        for point in upgrades:
            while len(hull) > 1 and _turns_up(hull[-2], hull[-1], point):
                hull.pop()
            hull.append(point)
        steps += [
            Upgrade(b.item, b.choice, b.size - a.size, b.saving - a.saving)
            for a, b in zip(hull, hull[1:], strict=False)
        ]
    # The sort is stable, so that steps of one item stay in order.
    return sorted(steps, key=lambda step: -step.saving / step.size)


def _turns_up(a: Upgrade, b: Upgrade, c: Upgrade) -> bool:
    """Whether b lies on or below the line from a to c."""
    return (b.saving - a.saving) * (c.size - a.size) <= (c.saving - a.saving) * (b.size - a.size)


def _extend(
    sizes: Integers, savings: Integers, upgrades: Sequence[Upgrade], left: int
) -> tuple[Integers, Integers, Origin]:
    """The states after one more item that fit and save more than all smaller ones, and where they come from."""
    before = np.tile(np.arange(len(sizes)), len(upgrades))
    after = np.repeat(np.arange(len(upgrades)), len(sizes))
    sizes = np.concatenate([sizes + upgrade.size for upgrade in upgrades])
    savings = np.concatenate([savings + upgrade.saving for upgrade in upgrades])
    order = np.argsort(sizes, kind="stable")  # merges runs that are already sorted
    order = order[sizes[order] <= left]
    highest = np.maximum.accumulate(savings[order])
    order = order[np.concatenate([[True], highest[1:] > highest[:-1]])]
    last = sizes[order][1:] != sizes[order][:-1]  # of several states of one size, the last one saves most
    order = order[np.concatenate([last, [True]])]
    chosen = np.array([upgrade.choice for upgrade in upgrades])[after[order]]
    return sizes[order], savings[order], Origin(upgrades[0].item, before[order], chosen)


def _trace(origins: Sequence[Origin], state: int) -> dict[int, int]:
    """The choices, by item, that led to a state after the last of these items."""
    taken = {}
    for origin in reversed(origins):
        taken[origin.item] = int(origin.choice[state])
        state = int(origin.before[state])
    return taken
