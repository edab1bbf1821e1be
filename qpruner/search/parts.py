"""The structures that a model may have in a search and what each costs: bytes and multiply-adds, from shapes alone.

All linears of a unit of quantization consist of units of one kind, KV groups or FFN channels, so the bytes and
multiply-adds of a model are sums over the parts of its layers, and tables per part give them for every structure.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qpruner.adapters.lora import LoRAConfig, is_target
from qpruner.allocation.budget import Budget
from qpruner.allocation.decision import describe_price, with_choices
from qpruner.allocation.items import Item
from qpruner.anatomy import decoder_layers, refuse_experts, unit_linears, unit_shapes, unit_weights
from qpruner.errors import UserError
from qpruner.memory import num_parameters
from qpruner.outline import outline_of
from qpruner.plan import Architecture, CompressionPlan, Precision
from qpruner.pricing import ADAPTER_BYTES, Price, bytes_of_rank_one, price_narrowed, weight_bytes
from qpruner.pruning.scores import LayerScores
from qpruner.pruning.selection import SelectionConfig, Supply, Widths, competing_widths, local_widths
from qpruner.pruning.supplies import round_to, supplies
from qpruner.pruning.widths import with_widths
from qpruner.search.ranks import Ranks
from qpruner.search.structure import Integers, Kind, Part, Structure, StructureConfig

UNITS_OF: dict[Kind, tuple[str, ...]] = {"kv_groups": ("qkv", "o"), "ffn_channels": ("gate_up", "down")}
"""The units of quantization that consist of units of a kind."""


@dataclass(frozen=True)
class Structures:
    """The changes that a search may make to the widths of a model's layers.

    Args:
        model: dense model; only its shapes are used.
        plan: plan of the dense model, with the precisions of its tables.
        config: how wide layers may be.
        selection: which layers are left alone, and what FFN widths are multiples of.
        lora: adapters that the model will have.
        ranks: ranks that adapters may have, where these are searched; None where they are not.

    Raises:
        UserError: layers are required to end equal, or nothing may be removed from any of them.
    """

    model: Any
    plan: CompressionPlan
    config: StructureConfig
    selection: SelectionConfig
    lora: LoRAConfig
    ranks: Ranks | None = None

    def __post_init__(self) -> None:
        refuse_experts(self.model.config, "search.structure", "a search of bits alone: leave search.structure out")
        if self.selection.uniform:
            raise UserError(
                "selection.uniform is true, and search.structure gives each layer widths of its own. Drop one of both."
            )
        assert self.supplies

    @cached_property
    def supplies(self) -> list[Supply]:
        """[layers], what each layer may lose."""
        offers = supplies(self.model, replace(self.selection, floor=self.config.least), self.plan.architecture)
        if not self.config.groups:
            offers = [replace(offer, least_groups=offer.kv_groups) for offer in offers]
        if not self.config.channels:
            offers = [replace(offer, least_channels=offer.ffn_channels) for offer in offers]
        if not any(offer.parameters for offer in offers):
            raise UserError(
                f"With search.structure.least {self.config.least} no layer can lose anything. Lower it, or leave fewer "
                f"layers alone."
            )
        return offers

    @property
    def multiple(self) -> int:
        """The number that FFN widths are multiples of."""
        return round_to(self.model, self.selection)

    def start(self, ratio: float, scores: Sequence[LayerScores]) -> Widths:
        """[layers], KV groups and FFN channels left by pruning this share of all parameters, or a share close to it."""
        most = sum(offer.parameters for offer in self.supplies)
        remove = min(round(ratio * num_parameters(self.model)), most)
        if self.selection.scope == "local":
            return local_widths(self.supplies, remove, self.multiple)
        return competing_widths(scores, self.supplies, remove, self.multiple, uniform=False)

    def structure(
        self,
        items: Sequence[Item],
        precisions: Sequence[Precision],
        budget: Budget,
        *,
        start: Widths,
        scores: Sequence[LayerScores],
        price_of_all: float,
    ) -> Structure:
        """The parts, with everything that a search space needs to know about them.

        Args:
            items: items that get bits.
            precisions: precisions to choose from, fewest bytes first.
            budget: limit on what may be stored.
            start: [layers], widths at the origin of the space.
            scores: [layers], scores of all units.
            price_of_all: prior's cost of removing all that may be removed; a part's share of it is that of its scores.
        """
        numbered = {
            (number, kind): counts
            for number, offer in enumerate(self.supplies)
            for kind, counts in self._counts(offer).items()
            if len(counts) > 1
        }
        gone = {
            (number, kind): _scores_gone(getattr(scores[number], kind), counts)
            for (number, kind), counts in numbered.items()
        }
        whole = sum(of_part[0] for of_part in gone.values()) or 1.0
        parts = tuple(
            Part(
                number,
                kind,
                counts,
                tuple(self._multiply_adds(number, kind, count) for count in counts),
                self._rest(number, kind, counts, items, budget),
                tuple(price_of_all * score / whole for score in gone[number, kind]),
                counts.index(start[number][kind == "ffn_channels"]),
            )
            for (number, kind), counts in numbered.items()
        )
        changes = [
            [
                (place, self._changes(item, part, precisions))
                for place, part in enumerate(parts)
                if part.layer == item.layer and set(item.units) & set(UNITS_OF[part.kind])
            ]
            for item in items
        ]
        changes += [] if self.ranks is None else [self._rank_changes(number, parts) for number in self.ranks.layers]
        allowed = budget.most_multiply_adds(self.plan)
        if allowed is not None:
            allowed -= unit_weights(self.plan.widths) - sum(part.multiply_adds[-1] for part in parts)
        return Structure(parts, changes, self.config.least, allowed)

    def limit(self, items: Sequence[Item], precisions: Sequence[Precision], budget: Budget) -> int:
        """The most bytes that items may take in an unpruned model; bytes saved outside of items count as negative.

        Where ranks are searched, the bytes that adapters take above their lowest rank belong to items.

        Args:
            items: items that get bits.
            precisions: precisions to choose from, fewest bytes first.
            budget: limit on what may be stored.

        Raises:
            UserError: a budget in bits per weight, which says nothing about size where weights are removed; or one
                below the cheapest plan of the narrowest structure, which the message names.
        """
        if budget.average_bits is not None:
            raise UserError(
                f"The budget is {budget}, and search.structure takes weights away, so that bits per weight say nothing "
                f"of size. Give share or bytes."
            )
        cheapest, whole, dearest = (
            self._price(widths, items, precision, rank)
            for widths, precision, rank in (
                (self.least, precisions[0], self.least_rank),
                (self.plan.widths, precisions[0], self.lora.r),
                (self.plan.widths, precisions[-1], self.lora.r),
            )
        )
        allowed = budget.most_multiply_adds(self.plan)
        if allowed is not None and cheapest.multiply_adds > allowed:
            raise UserError(
                f"The budget is {budget}, which is {allowed:,} multiply-adds for a token; the narrowest structure with "
                f"search.structure.least {self.config.least} has {cheapest.multiply_adds:,} "
                f"({cheapest.multiply_adds / dearest.multiply_adds:.1%}), the dense model {dearest.multiply_adds:,}. "
                f"Raise budget.multiply_adds, lower search.structure.least, or leave fewer layers alone."
            )
        if cheapest.unit_weight_bytes > budget.limit(cheapest, self.plan):
            adapters = "" if self.ranks is None else f", adapters of the lowest rank, {self.least_rank},"
            has = f"{describe_price(cheapest)}; the dearest has {describe_price(dearest)}"
            raise UserError(
                f"The budget is {budget}. The cheapest plan, with search.structure.least {self.config.least}{adapters} "
                f"and every unit that is not left alone in {precisions[0]}, has {has}. Raise the budget, "
                f"lower search.structure.least, add fewer bits to deciding.widths, or leave fewer layers alone."
            )
        of_items = sum(item.num_bytes(self.plan.widths, precisions[0], self.model.dtype.itemsize) for item in items)
        of_ranks = 0 if self.ranks is None else self.ranks.most_bytes
        return budget.limit(whole, self.plan) - (whole.unit_weight_bytes - of_items) + of_ranks

    @property
    def least_rank(self) -> int:
        """The lowest rank that the adapters of a layer may have."""
        return self.lora.r if self.ranks is None else self.ranks.choices[0]

    @property
    def least(self) -> Architecture:
        """The widths of the narrowest structure."""
        return replace(
            self.plan.widths,
            kv_groups=tuple(offer.least_groups for offer in self.supplies),
            ffn_channels=tuple(offer.least_channels for offer in self.supplies),
        )

    def _counts(self, offer: Supply) -> dict[Kind, tuple[int, ...]]:
        return {
            "kv_groups": tuple(range(offer.least_groups, offer.kv_groups + 1)),
            "ffn_channels": tuple(reversed(offer.ffn_widths(self.multiple))),
        }

    def _price(self, widths: Architecture, items: Sequence[Item], precision: Precision, rank: int) -> Price:
        """The price of a plan with given widths that holds all items in one precision, with adapters of one rank."""
        kept = zip(widths.kv_groups, widths.ffn_channels, strict=True)
        plan = self.plan.keeping([(range(groups), range(channels)) for groups, channels in kept])
        plan = with_choices(plan, items, [precision] * len(items))
        return price_of_plan(self.model.config, self.model.dtype, plan, replace(self.lora, r=rank))

    def _with(self, number: int, kind: Kind, count: int) -> Architecture:
        """The widths of the dense model, except for one part."""
        whole = self.plan.widths
        counts = list(getattr(whole, kind))
        counts[number] = count
        if kind == "kv_groups":
            return replace(whole, kv_groups=tuple(counts))
        return replace(whole, ffn_channels=tuple(counts))

    def _multiply_adds(self, number: int, kind: Kind, count: int) -> int:
        shapes = unit_shapes(self._with(number, kind, count), number)
        return sum(rows * columns for unit in UNITS_OF[kind] for rows, columns in shapes[unit])

    def _changes(self, item: Item, part: Part, precisions: Sequence[Precision]) -> Integers:
        """[counts, choices], bytes of an item minus its bytes where all units of the part stay."""
        dense_size = self.model.dtype.itemsize
        table = np.array(
            [
                [
                    item.num_bytes(self._with(part.layer, part.kind, count), precision, dense_size)
                    for precision in precisions
                ]
                for count in part.counts
            ],
            dtype=np.int64,
        )
        return table - table[-1]

    def _rank_changes(self, layer: int, parts: Sequence[Part]) -> list[tuple[int, Integers]]:
        """The parts of a layer, each with the bytes of the layer's adapters above those of the lowest rank, [counts,
        ranks], minus the same bytes where all units of the part stay.
        """
        assert self.ranks is not None
        changes = []
        for place, part in enumerate(parts):
            if part.layer == layer:
                sizes = [
                    bytes_of_rank_one(self.model, self._with(layer, part.kind, count), layer, self.lora.target_modules)
                    for count in part.counts
                ]
                changes.append((place, np.outer(np.array(sizes) - sizes[-1], self.ranks.steps)))
        return changes

    def _rest(
        self, number: int, kind: Kind, counts: Sequence[int], items: Sequence[Item], budget: Budget
    ) -> tuple[int, ...]:
        """[counts], bytes that belong to no item, minus those where all units stay: of units whose bits are fixed and,
        where the budget counts all bytes, of adapters at their lowest rank, of biases and norms.
        """
        with_bits = {unit for item in items if item.layer == number for unit in item.units}
        names = unit_linears(self.model)[number]
        layer, dense_size = decoder_layers(self.model)[number], self.model.dtype.itemsize
        weights = layer.group_weights if kind == "kv_groups" else layer.channel_weights
        of_unit = sum(part.width for part in weights if part.axis == 0 and part.linear.bias is not None)
        of_unit += sum(norm.of.width for norm in layer.wide_norms) if kind == "kv_groups" else 0
        totals = []
        for count in counts:
            shapes = unit_shapes(self._with(number, kind, count), number)
            total = 0
            for unit in UNITS_OF[kind]:
                for name, shape in zip(names[unit], shapes[unit], strict=True):
                    if unit not in with_bits:
                        total += weight_bytes(shape, self.plan.layers[number].precision[unit], dense_size)
                    if budget.bytes is not None and is_target(name, self.lora.target_modules):
                        total += self.least_rank * sum(shape) * ADAPTER_BYTES
            totals.append(total + (of_unit * count * dense_size if budget.bytes is not None else 0))
        return tuple(total - totals[-1] for total in totals)


def price_of_plan(config: Any, dtype: torch.dtype, plan: CompressionPlan, lora: LoRAConfig) -> Price:
    """The price of a plan, from the configuration of the model before it is narrowed."""
    outline = outline_of(with_widths(config, plan.widths)).to(dtype)
    return price_narrowed(outline, plan, rank=lora.r, targets=lora.target_modules)


def _scores_gone(scores: Tensor, counts: Sequence[int]) -> list[float]:
    """[counts], sum of the scores of the units that are removed."""
    ascending = torch.cat([torch.zeros(1, dtype=torch.float64), scores.double().sort().values.cumsum(0)])
    return [float(ascending[counts[-1] - count]) for count in counts]
