"""The ranks of the adapters of each layer, as further items of a `SearchSpace`, after those that get bits.

Adapters count against a budget of bytes, and at few bits they are not negligible: in float32, those of rank 8 on a
linear of 576 x 576 take 37 kB, its weights in 2 bits 83 kB. Bytes that the adapters of one layer do not take pay for
bits, or for rank in another layer.

The item of a layer has the bytes that its adapters take above those of the lowest rank, which every layer has. The
prior only guesses what a lower rank costs: the lowest rank instead of the highest in all layers costs a tenth of what
the smallest widths of bits cost instead of the largest, each layer has an equal share of that, and each doubling of the
rank recovers the same part of it. Trials correct this guess.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any, Self

import numpy as np

from qpruner.adapters.lora import LoRAConfig
from qpruner.allocation.solving import Choice
from qpruner.anatomy import architecture_of
from qpruner.callbacks.bits_under_budget import Allocator
from qpruner.errors import UserError
from qpruner.plan import CompressionPlan
from qpruner.pricing import bytes_of_rank_one

WHOLE_COST = 0.1
"""Cost of the lowest rank in all layers, as a fraction of the cost of the smallest widths of bits."""


@dataclass(frozen=True)
class Ranks:
    """The ranks that adapters may have in a search.

    Args:
        choices: ranks to choose from, lowest first; the highest is the rank of the module's adapters.
        layers: numbers of the layers whose linears get adapters.
        bytes_of_one: [layers], bytes that the adapters of each of these layers take at rank 1, where all units stay.
    """

    choices: tuple[int, ...]
    layers: tuple[int, ...]
    bytes_of_one: tuple[int, ...]

    @classmethod
    def of(cls, choices: Sequence[int], model: Any, lora: LoRAConfig) -> Self:
        """The ranks of a model's adapters.

        Args:
            choices: ranks to choose from, checked by `check_ranks_of_search`.
            model: model without adapters; only its shapes are used.
            lora: adapters that the model will have.
        """
        widths = architecture_of(model.config)
        sizes = {
            number: bytes_of_rank_one(model, widths, number, lora.target_modules) for number in range(widths.num_layers)
        }
        sizes = {number: size for number, size in sizes.items() if size}
        return cls(tuple(sorted(choices)), tuple(sizes), tuple(sizes.values()))

    @property
    def steps(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[choices], how far each rank is above the lowest."""
        return np.array(self.choices, dtype=np.int64) - self.choices[0]

    @property
    def most_bytes(self) -> int:
        """Bytes that the highest rank takes above the lowest, over all layers, where all units stay."""
        return self.bytes_above(self.choices[-1])

    def bytes_above(self, rank: int) -> int:
        """Bytes that a rank takes above the lowest, over all layers, where all units stay."""
        return (rank - self.choices[0]) * sum(self.bytes_of_one)

    def highest_within(self, num_bytes: int) -> int:
        """The highest rank for which, in all layers, this many bytes above those of the lowest rank suffice."""
        return max(rank for rank in self.choices if self.bytes_above(rank) <= num_bytes)

    def items(self, price_of_bits: float) -> list[list[Choice]]:
        """[layers][choices], bytes above those of the lowest rank, with the prior's cost.

        Args:
            price_of_bits: cost of the smallest widths of bits in all items instead of the largest.
        """
        whole = WHOLE_COST * price_of_bits / len(self.layers)
        doublings = log(self.choices[-1] / self.choices[0])
        costs = [whole * log(self.choices[-1] / rank) / doublings for rank in self.choices]
        return [
            [Choice(int(step) * size, cost) for step, cost in zip(self.steps, costs, strict=True)]
            for size in self.bytes_of_one
        ]

    def carried_out(self, plan: CompressionPlan, ranks: Sequence[int]) -> CompressionPlan:
        """The plan with these ranks, one for each of `layers`."""
        by_layer = dict(zip(self.layers, ranks, strict=True))
        return plan.with_ranks(by_layer.get(number) for number in range(len(plan.layers)))

    def nearest(self, plan: CompressionPlan) -> list[int]:
        """For each layer, the index of the rank nearest to the plan's; of the highest where the plan has none."""
        wanted = [plan.layers[number].rank or self.choices[-1] for number in self.layers]
        places = range(len(self.choices))
        return [min(places, key=lambda place: abs(self.choices[place] - rank)) for rank in wanted]


def check_ranks_of_search(ranks: Sequence[int], lora: LoRAConfig, allocator: Allocator) -> None:
    """Checks, before any work, that ranks can be searched.

    Args:
        ranks: ranks to choose from.
        lora: adapters of the module.
        allocator: allocator that spends the budget.

    Raises:
        UserError: the highest rank is not that of the adapters, adapters do not count against the budget, or LoftQ
            alternates, so that codes depend on the rank.
    """
    listed = ", ".join(map(str, ranks))
    if max(ranks) != lora.r:
        raise UserError(
            f"search.ranks is {listed}, and the adapters have --model.lora.r {lora.r}, which is to be the highest that "
            f"a layer may have. Set it to {max(ranks)}, or make {lora.r} the highest of the ranks."
        )
    if allocator.budget.bytes is None:
        raise UserError(
            f"The budget is {allocator.budget}, in which adapters do not count, so that the highest of search.ranks is "
            f"always the best. Give the budget in bytes, such as bytes: 900 MiB, or leave search.ranks out."
        )
    if allocator.loftq_iterations > 1 and allocator.calibrated is None:
        raise UserError(
            f"loftq_iterations is {allocator.loftq_iterations}; with more than 1 the codes of a linear depend on the "
            f"rank of its adapter, and search.ranks would need them for each. Give 1 or 0."
        )
