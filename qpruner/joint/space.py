"""What may be decided about a model: which gates exist, and the bytes that each of them stands for.

Every decision is a binary gate. A unit stays if its gate is open. A quantization unit has the narrowest width, plus one
step for each of its open upgrades up to the first closed one. A lifted input channel is held in the widest precision,
whatever its unit has.

Shapes: L layers, G KV groups and C FFN channels of all layers together, K widths, H hidden size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qpruner.anatomy import unit_shapes
from qpruner.errors import UserError
from qpruner.plan import DENSE, UNITS, Architecture, CompressionPlan, Precision
from qpruner.pricing import weight_bytes

Gates = Mapping[str, Tensor]
"""Gates or their logits by kind: ``groups`` [G], ``channels`` [C], ``upgrades`` [L, 4, K - 1] by the order of `UNITS`,
``lifted_groups`` [G] (input channels of ``o``), ``lifted_channels`` [C] (of ``down``) and ``lifted_hidden`` [L, 2, H]
(of ``qkv`` and ``gate_up``). A kind that is not decided on is missing."""

Logits = Mapping[str, Tensor]
"""What is learned, by kind: as gates, except for ``hidden_order`` [H] and ``hidden_share`` [L, 2], whose sums are the
logits of ``lifted_hidden``: the order of the hidden channels' worth is the same for all layers, as they are reordered
only once, while each unit has its own number of channels to lift."""

BY_GROUPS = ("qkv", "o")
"""The units whose size depends on the KV groups; that of the others depends on the FFN channels."""


@dataclass(frozen=True)
class JointSpace:
    """The gates of a model and what they cost.

    Args:
        dense: plan that keeps all of the model, with the precisions of embedding and head.
        offered: precisions to choose from, the one with fewest bytes first.
        most_weights: most weights that the decoder's units may keep, which are multiply-adds per token; None for all.
        pins_weights: whether ``most_weights`` weights are kept, rather than at most that many.
        dense_size: bytes of a weight that stays dense.
        prunes: whether KV groups and FFN channels may go.
        lifts: whether input channels may be held in the last of the offered precisions, whatever their unit has.
        multiple: number that the FFN channels of a layer, and lifted channels, are a multiple of.
        alone: numbers of the layers that keep all units.
        least: fewest KV groups and FFN channels that each layer may keep; empty for one group and ``multiple``
            channels.

    Raises:
        UserError: channels are to be lifted, but there is a single precision, or the widest stays dense; or nothing is
            left to decide.
    """

    dense: CompressionPlan
    offered: tuple[Precision, ...]
    dense_size: int
    most_weights: int | None = None
    pins_weights: bool = False
    prunes: bool = True
    lifts: bool = False
    multiple: int = 1
    alone: frozenset[int] = frozenset()
    least: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.lifts and len(self.offered) < 2:
            raise UserError(
                f"joint.lifts is true, and deciding.widths offers {self.offered[0]} alone. Offer at least two widths."
            )
        if self.lifts and DENSE in self.offered:
            raise UserError(
                "joint.lifts is true, and deciding.widths offers 16 bits, in which lifted channels would stay dense; "
                "they are held in a packed format, such as that of 8 bits. Leave 16 out of deciding.widths, or drop "
                "joint.lifts."
            )
        if len(self.offered) < 2 and not self.prunes:
            raise UserError(
                f"joint has nothing to decide: deciding.widths offers {self.offered[0]} alone, and nothing may be "
                f"pruned. Add widths to deciding.widths, or StructuredPruning to trainer.callbacks."
            )

    def check(self, limit: int) -> None:
        """Makes sure that there are plans within a budget, and that the budget leaves something to decide.

        Args:
            limit: most bytes that the weights of the decoder's units may take, scales included.

        Raises:
            UserError: it is below the cheapest plan or above the most expensive, layers cannot be narrow enough, or
                the weights that are pinned do not fit even in the fewest bits.
        """
        if not self.cheapest <= limit <= self.dearest:
            raise UserError(
                f"The budget leaves {limit:,} bytes for the weights of the decoder's units; the cheapest plan takes "
                f"{self.cheapest:,} and the dearest {self.dearest:,}. Give a budget between these, or other "
                f"deciding.widths."
            )
        if self.most_weights is not None and not self.fewest_weights <= self.most_weights:
            raise UserError(
                f"The budget leaves {self.most_weights:,} multiply-adds per token, which are weights of the decoder's "
                f"units; the narrowest layers have {self.fewest_weights:,}. Give a higher budget, or prune less."
            )
        if self.most_weights is not None and self.pins_weights and self.least_pinned > limit:
            raise UserError(
                f"The budget leaves {limit:,} bytes for the weights of the decoder's units; the {self.most_weights:,} "
                f"weights that joint.fixed_ratio keeps take at least {self.least_pinned:,}, in the fewest bits. Give a "
                f"higher budget, a higher ratio to StructuredPruning, or fewer bits to deciding.widths."
            )

    @property
    def widths(self) -> Architecture:
        return self.dense.architecture

    @property
    def num_layers(self) -> int:
        return self.widths.num_layers

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each kind of learned logits; `acting` turns these into the logits of all gates."""
        groups, channels = sum(self.widths.kv_groups), sum(self.widths.ffn_channels)
        shapes: dict[str, tuple[int, ...]] = {}
        if self.prunes:
            shapes |= {"groups": (groups,), "channels": (channels,)}
        if len(self.offered) > 1:
            shapes["upgrades"] = (self.num_layers, len(UNITS), len(self.offered) - 1)
        if self.lifts:
            shapes |= {"lifted_groups": (groups,), "lifted_channels": (channels,)}
            shapes |= {"hidden_order": (self.widths.hidden_size,), "hidden_share": (self.num_layers, 2)}
        return shapes

    @cached_property
    def weights(self) -> Tensor:
        """Number of weights of each unit that belong to one KV group or one FFN channel; [L, 4] float64."""
        return torch.tensor(
            [
                [
                    sum(rows * columns for rows, columns in unit_shapes(self.widths, layer)[unit])
                    / (self.widths.kv_groups if unit in BY_GROUPS else self.widths.ffn_channels)[layer]
                    for unit in UNITS
                ]
                for layer in range(self.num_layers)
            ],
            dtype=torch.float64,
        )

    @cached_property
    def bytes_per_weight(self) -> Tensor:
        """Bytes per weight in each offered precision, scales included, for the unpruned unit; [L, 4, K] float64."""
        table = [
            [
                [
                    sum(weight_bytes(shape, precision, self.dense_size) for shape in shapes)
                    / sum(rows * columns for rows, columns in shapes)
                    for precision in self.offered
                ]
                for shapes in map(unit_shapes(self.widths, layer).__getitem__, UNITS)
            ]
            for layer in range(self.num_layers)
        ]
        return torch.tensor(table, dtype=torch.float64)

    @property
    def cheapest(self) -> int:
        """Bytes of the narrowest layers in the fewest bits."""
        groups, channels = self.fewest
        return self._bytes(groups, channels, self.offered[0])

    @property
    def dearest(self) -> int:
        """Bytes of all units in the most bits."""
        return self._bytes(self.widths.kv_groups, self.widths.ffn_channels, self.offered[-1])

    @property
    def fewest_weights(self) -> int:
        """Number of weights of the narrowest layers."""
        groups, channels = (torch.tensor(counts) for counts in self.fewest)
        by_groups, by_channels = self.weights[:, :2].sum(1), self.weights[:, 2:].sum(1)
        return int((by_groups * groups + by_channels * channels).sum())

    @property
    def least_pinned(self) -> int:
        """The fewest bytes that as many weights as are kept can take, whichever these are.

        They are counted at the rate of the unit that takes the fewest bytes per weight, so that no budget is refused
        which some plan meets.
        """
        assert self.most_weights is not None
        return math.floor(self.most_weights * float(self.bytes_per_weight[:, :, 0].min()))

    @cached_property
    def fewest(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The fewest KV groups and FFN channels that each layer may keep, [L] each."""
        whole = tuple(zip(self.widths.kv_groups, self.widths.ffn_channels, strict=True))
        least = self.least or tuple((1, min(self.multiple, channels)) for _, channels in whole)
        kept = [least[n] if self.prunes and n not in self.alone else whole[n] for n in range(self.num_layers)]
        return tuple(groups for groups, _ in kept), tuple(channels for _, channels in kept)

    @cached_property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Number of logits that each layer has of each kind, [L] each; without kinds that belong to no layer."""
        of_shape = {kind: (math.prod(shape[1:]),) * self.num_layers for kind, shape in self.shapes.items()}
        groups, channels = self.widths.kv_groups, self.widths.ffn_channels
        of_units = {"groups": groups, "lifted_groups": groups, "channels": channels, "lifted_channels": channels}
        sizes = {kind: of_units.get(kind, of_shape[kind]) for kind in self.shapes}
        sizes.pop("hidden_order", None)  # of the whole model
        return sizes

    def by_layer(self, values: Tensor, kind: str) -> tuple[Tensor, ...]:
        """Values of KV groups [G] or FFN channels [C] of all layers, layer by layer."""
        sizes = self.widths.kv_groups if kind.endswith("groups") else self.widths.ffn_channels
        parts: tuple[Tensor, ...] = values.split(list(sizes))  # type: ignore[no-untyped-call]
        return parts

    def _bytes(self, groups: tuple[int, ...], channels: tuple[int, ...], precision: Precision) -> int:
        plan = self.dense.keeping(
            (range(kept_groups), range(kept_channels))
            for kept_groups, kept_channels in zip(groups, channels, strict=True)
        ).with_precision([dict.fromkeys(UNITS, precision)] * self.num_layers)
        return unit_bytes(plan, self.dense_size)


def unit_bytes(plan: CompressionPlan, dense_size: int) -> int:
    """Bytes of the weights in the decoder's units of a plan, scales included.

    Args:
        plan: plan with the widths that are left.
        dense_size: bytes of a weight that stays dense.
    """
    widths = plan.widths
    return sum(
        weight_bytes(shape, layer.precision[unit], dense_size)
        for number, layer in enumerate(plan.layers)
        for unit, shapes in unit_shapes(widths, number).items()
        for shape in shapes
    )


def acting(logits: Logits) -> Gates:
    """The logits of all gates, made from those that are learned."""
    gates = dict(logits)
    if "hidden_order" in gates:
        gates["lifted_hidden"] = gates.pop("hidden_share")[:, :, None] + gates.pop("hidden_order")
    return gates
