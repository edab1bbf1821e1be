"""Coupled weights: which part of which tensor belongs to the units of a kind."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Coupled:
    """A projection: the block of rows or columns of a linear that belongs to one kind of unit.

    Unit u owns the rows (``axis`` 0, with their biases) or columns (``axis`` 1) from ``start + u * width`` to ``start +
    (u + 1) * width``. Where several projections are stacked in one linear, each is a block of it.

    Args:
        name: name of the projection, such as ``q``.
        linear: linear that holds the projection; it may be packed, or have an adapter around it.
        axis: axis of the weight [out, in] along which units lie.
        width: number of rows or columns of a unit.
        num_units: number of units.
        start: first row or column of unit 0.
    """

    name: str
    linear: nn.Linear
    axis: int
    width: int
    num_units: int
    start: int = 0

    @property
    def block(self) -> slice:
        """All rows or columns that belong to units."""
        return slice(self.start, self.start + self.num_units * self.width)

    def by_unit(self, values: Tensor) -> Tensor:
        """Values of the shape of the weight, or of its bias, with the units along the first axis."""  # [units, ...]
        values = values.movedim(self.axis if values.ndim > 1 else 0, 0)[self.block]
        return values.reshape(-1, self.width, *values.shape[1:])

    def places(self, units: Sequence[int]) -> Tensor:
        """The indices of the rows or columns of the weight that the given units own."""  # [units * width]
        return self.start + within(units, self.width)


@dataclass(frozen=True)
class WideNorm:
    """An RMS norm over the outputs of a projection, across all of its heads.

    Args:
        norm: norm module; unit u owns the same ``width`` entries of its weight as of the projection's rows.
        of: projection whose output is normalized.
    """

    norm: nn.Module
    of: Coupled


def within(units: Sequence[int], width: int) -> Tensor:
    """The indices that the given units, of a width each, own in a block of such units."""  # [units * width]
    return (torch.tensor(units)[:, None] * width + torch.arange(width)).flatten()


def by_linear(parts: Iterable[Coupled]) -> list[list[Coupled]]:
    """The projections, grouped by the linear in which they are stacked, in their order."""
    groups: dict[int, list[Coupled]] = {}
    for part in parts:
        groups.setdefault(id(part.linear), []).append(part)
    return list(groups.values())
