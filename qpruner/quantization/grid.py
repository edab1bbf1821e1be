"""Grids: the equally spaced values to which the weights of a linear are rounded.

In a group of G consecutive weights of a row, a grid of b bits has the 2^b values

    scale * code + minimum,    code = 0, 1, ..., 2^b - 1.

A linear of two segments has a grid for each, side by side (`GridOfTwo`).

A grid holds its scales and minima exactly as a number format stores them, so packing weights that are rounded to it
loses nothing more. `qpruner.quantization.grid_search` chooses scales and minima; the formats that have a grid store
them.

Shapes: O rows (outputs), I columns (inputs), G columns in a group, M = ceil(I / G) groups in a row, the last of which
may be short.
"""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional

from qpruner.plan import ROW, Precision


@dataclass(frozen=True)
class Grid:
    """The values that weights [O, I] may take.

    Args:
        scales: step from the value of a code to the value of the next code in each group, [O, M] in float32; below 0
            where higher codes have lower values, and 0 where all values of a group are equal.
        minima: value of code 0 in each group, [O, M] in float32; the lowest value, unless the scale is below 0.
        bits: number of bits b of a code.
        group: number G of columns in a group; -1 where a group is a whole row.
    """

    scales: Tensor
    minima: Tensor
    bits: int
    group: int

    @property
    def levels(self) -> int:
        """Number of values in a group."""
        return 1 << self.bits

    def round(self, weight: Tensor, first: int = 0) -> Tensor:
        """The codes of the values nearest to weights; ties go to the higher code.

        Args:
            weight: weights of some neighbouring columns, [O, n].
            first: index of the first of these columns.
        """  # uint8 [O, n]
        scales, minima = self._of_columns(first, weight.shape[1])
        places = (weight.float() - minima).mul_(inverse(scales))
        return places.add_(0.5).floor_().clamp_(0, self.levels - 1).to(torch.uint8)

    def values(self, codes: Tensor, first: int = 0) -> Tensor:
        """The values of codes [O, n] of some neighbouring columns; see `round`."""  # float32 [O, n]
        scales, minima = self._of_columns(first, codes.shape[1])
        return torch.addcmul(minima, scales, codes.float())

    def cut(self, parts: int) -> list[Self]:
        """The grids of ``parts`` groups of rows, which are cut like rows by `torch.Tensor.tensor_split`."""
        rows = zip(self.scales.tensor_split(parts), self.minima.tensor_split(parts), strict=True)
        return [self.on(*both) for both in rows]

    def on(self, scales: Tensor, minima: Tensor) -> Self:
        """A copy of the grid with other scales and minima [O, M]."""
        return replace(self, scales=scales, minima=minima)

    def sums(self, values: Tensor) -> Tensor:
        """The sums [O, M] of values [O, I] over each group."""
        size = values.shape[1] if self.group == ROW else self.group
        return functional.pad(values, (0, -values.shape[1] % size)).view(len(values), -1, size).sum(2)

    def _of_columns(self, first: int, number: int) -> tuple[Tensor, Tensor]:
        """The scale and the minimum of each weight in some neighbouring columns, [O, number]."""
        groups = groups_of_columns(first, number, self.group, self.scales.device)
        return self.scales.index_select(1, groups), self.minima.index_select(1, groups)


@dataclass(frozen=True)
class GridOfTwo:
    """The grids of two segments of columns, combined into one grid with the groups of both.

    Args:
        leading: grid of the leading columns.
        columns: number of leading columns.
        rest: grid of the columns after them.
    """

    leading: Grid
    columns: int
    rest: Grid

    @property
    def scales(self) -> Tensor:
        return torch.cat([self.leading.scales, self.rest.scales], 1)

    @property
    def minima(self) -> Tensor:
        return torch.cat([self.leading.minima, self.rest.minima], 1)

    @property
    def levels(self) -> Tensor:
        """Number of values in each group, [M]."""
        device = self.leading.scales.device
        return torch.cat(
            [torch.full(grid.scales.shape[1:], grid.levels, device=device) for grid in (self.leading, self.rest)]
        )

    def round(self, weight: Tensor) -> Tensor:
        """The codes of the values nearest to weights [O, I]."""  # uint8 [O, I]
        first, behind = weight[:, : self.columns], weight[:, self.columns :]
        return torch.cat([self.leading.round(first), self.rest.round(behind)], 1)

    def values(self, codes: Tensor) -> Tensor:
        """The values of codes [O, I]."""  # float32 [O, I]
        first, behind = codes[:, : self.columns], codes[:, self.columns :]
        return torch.cat([self.leading.values(first), self.rest.values(behind)], 1)

    def cut(self, parts: int) -> list[Self]:
        """As `Grid.cut`."""
        both = zip(self.leading.cut(parts), self.rest.cut(parts), strict=True)
        return [replace(self, leading=leading, rest=rest) for leading, rest in both]

    def on(self, scales: Tensor, minima: Tensor) -> Self:
        """As `Grid.on`."""
        groups = self.leading.scales.shape[1]
        leading = self.leading.on(scales[:, :groups], minima[:, :groups])
        return replace(self, leading=leading, rest=self.rest.on(scales[:, groups:], minima[:, groups:]))

    def sums(self, values: Tensor) -> Tensor:
        """As `Grid.sums`."""
        first, behind = values[:, : self.columns], values[:, self.columns :]
        return torch.cat([self.leading.sums(first), self.rest.sums(behind)], 1)


AnyGrid = Grid | GridOfTwo


@dataclass(frozen=True)
class Span:
    """The columns of a group, and the codes and minima that it can have.

    Args:
        first: index of its first column.
        last: index of the column after its last one.
        top: largest code.
        offset: minimum in units of the scale, for a symmetric format; None where the minimum is free.
    """

    first: int
    last: int
    top: int
    offset: float | None

    @property
    def size(self) -> int:
        return self.last - self.first


def groups_of_columns(first: int, number: int, group: int, device: torch.device) -> Tensor:
    """The index of the group of each of ``number`` neighbouring columns, beginning with column ``first``; [number]."""
    columns = torch.arange(first, first + number, device=device)
    return torch.zeros_like(columns) if group == ROW else columns // group


def inverse(scales: Tensor) -> Tensor:
    """The factor that converts a difference into units of the scale; 0 where the scale is 0."""
    tiny = torch.finfo(torch.float32).tiny  # the inverse of a smaller number is infinite
    return torch.where(scales.abs() >= tiny, 1 / scales, 0.0)


class GridStore(Protocol):
    """The part of a number format on which the choice of a grid depends: how grids are stored."""

    def storable(self, scales: Tensor, minima: Tensor, precision: Precision) -> AnyGrid:
        """The storable grid that is nearest to scales and minima [out, groups].

        A symmetric format computes its minima from the scales, and ignores the given ones.
        """
